"""Classifiers on ONNX Runtime."""
