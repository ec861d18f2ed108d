"""graphopt: rewrite ONNX models, prove that they still compute the same, build engines from them."""
