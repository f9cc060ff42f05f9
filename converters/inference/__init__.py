"""Running ONNX models: sessions, adapter files and preprocessing, shared by export and serving."""
