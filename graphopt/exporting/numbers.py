"""Python's numbers beside float64 tensors, with all their digits: torch's exporter makes float32 of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def exact_numbers() -> dict[Any, Callable[..., Any]]:
    """What torch's ONNX exporter makes of `scalar_tensor`, which every such number is by then."""
    import onnx_ir as ir
    import torch
    from onnxscript import opset18 as op
    from onnxscript.function_libs.torch_lib.ops.common import cast_to

    def scalar_tensor(s: Any, dtype: int = -1, layout: str = "", device: str = "", pin_memory: bool = False) -> Any:
        if dtype == ir.DataType.DOUBLE and isinstance(s, int | float):
            number: Any = ir.tensor(s, dtype=ir.DataType.DOUBLE)
            return op.Constant(value=number)
        return cast_to(s, dtype=ir.DataType.FLOAT if dtype == -1 else dtype)

    return {torch.ops.aten.scalar_tensor.default: scalar_tensor}
