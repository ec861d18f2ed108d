"""CUDA kernels: the header kit they are written against, their compilers, and an emulator that runs them on the CPU.

Knows no ONNX and no TensorRT: a kernel is a source file, its parameters, and a grid worked out from shapes.
"""
