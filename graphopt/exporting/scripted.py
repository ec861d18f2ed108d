"""Modules of torch.jit.script, through torch's older exporter: torch.export takes none.

TorchScript's own branches and loops become If and Loop there. The exporter runs nothing, so no path is lost.
"""

from __future__ import annotations

import io
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.exporting.capture import Captured, quiet
from graphopt.exporting.factory import Example

NEWEST_OPSET = 20  # of the older exporter

NOTE = "a scripted module: its branches and loops were compared as the inputs took them, none was forced"


def is_scripted(module: Any) -> bool:
    import torch

    return isinstance(module, torch.jit.ScriptModule)


def capture_scripted(example: Example, name: str, *, opset: int, verbose: bool) -> Captured:
    """Export a scripted module, nothing folded.

    Raises:
        GraphoptError: The exporter has no form of something in it; the line says of what.
    """
    import onnx_ir as ir
    import torch
    from onnx import load_from_string

    if opset > NEWEST_OPSET:
        raise GraphoptError(f"torch writes scripted modules to opset {NEWEST_OPSET} at most", where="--opset")
    written = io.BytesIO()
    with quiet(not verbose), torch.no_grad():
        try:
            torch.onnx.export(
                example.module,
                tuple(example.inputs.values()),
                written,
                dynamo=False,
                opset_version=opset,
                input_names=list(example.inputs),
                dynamic_axes={key: dict(axes) for key, axes in example.axes.items()},
                do_constant_folding=False,
                keep_initializers_as_inputs=False,
            )
        except Exception as error:
            line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise GraphoptError(
                f"torch could not export the scripted module: {line[:300]}",
                where=name,
                hint="give the module itself, not torch.jit.script of it: its Python control flow is followed",
            ) from error
    model = ir.from_proto(load_from_string(written.getvalue()))
    count = len(model.graph.outputs)
    names = ["output"] if count == 1 else [f"output_{index}" for index in range(count)]
    symbols = {symbol for axes in example.axes.values() for symbol in axes.values()}
    return Captured(model, names, list(range(count)), dict.fromkeys(sorted(symbols), (1, None)))
