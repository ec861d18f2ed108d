"""Python control flow that depends on tensors, as If and Loop.

`torch.export` refuses a module that asks a tensor for its truth. Here it is exported all the same: while torch.export
runs the module, each such question is answered both ways, and what the two paths leave behind is joined by a marker
operator (`tracer`, `joining`, `staging`; the source is outlined by `outlining` for that). In the ONNX model the
markers become If and Loop (`sinking`). The result is compared with the module on every side of every decision
(`following`, `checking`).

`questions` and what builds on it import torch at the top; it is imported where it is used.
"""
