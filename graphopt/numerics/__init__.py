"""Pure numpy: the arithmetic behind the passes. Knows nothing of ONNX."""
