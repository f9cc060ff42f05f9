"""ONNX graphs: traced once, then bound to weights in several forms."""
