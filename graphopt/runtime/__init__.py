"""Running models: which onnxruntime is there, sessions, and runners for any backend."""
