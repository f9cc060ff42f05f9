"""Classifiers of ONNX exports on Ray Serve: tasks go where they are loaded, and a batch is of one task."""
