"""What running an ONNX model needs, both while it is exported and while it is served."""
