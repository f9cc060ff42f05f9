"""The format `onnx`: graphs for ONNX Runtime and transformers.js."""
