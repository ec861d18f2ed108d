"""One network at every opset from 9 to the newest that ONNX Runtime takes: the opset is kept, the result the same."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.models import RUNNABLE, draw_feeds
from tests.real_inputs.common import optimize_and_compare

NEWEST = onnx.defs.onnx_opset_version()
STARTS = {"opset_9": 9, "mlp": 17, "convnet": 17, "transformer_block": 17, "if_on_input": 17, "loop": 17}


def _takes(path: Path) -> bool:
    try:
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        if "opset" not in str(error) and "IR version" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize(
    ("name", "version"),
    [
        (name, version)
        for name, start in STARTS.items()
        for version in range(start, NEWEST + 1)
        if name == "opset_9" or version in (start, 20, 21, NEWEST - 1, NEWEST)
    ],
)
def test_opset(name: str, version: int, tmp_path: Path) -> None:
    model = ir.to_proto(RUNNABLE[name]())
    if version != STARTS[name]:
        model = onnx.version_converter.convert_version(model, version)
    path = tmp_path / f"{name}-{version}.onnx"
    onnx.save(model, path)
    if not _takes(path):
        pytest.skip(f"this ONNX Runtime does not take opset {version}")
    feeds = [draw_feeds(RUNNABLE[name](), size=size, seed=size) for size in (2, 5)]
    optimize_and_compare(path, feeds)
    opsets = {
        imported.domain: imported.version for imported in onnx.load(tmp_path / f"{path.stem}.opt.onnx").opset_import
    }
    assert opsets[""] == version
