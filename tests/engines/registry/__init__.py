"""NVIDIA's own Python layer for plugins over a real plugin registry, without a GPU and without libnvinfer."""
