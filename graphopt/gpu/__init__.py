"""NVIDIA's driver, spoken to directly: what launches our own PTX on a GPU without TensorRT, torch or a CUDA toolkit."""
