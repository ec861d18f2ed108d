"""Files that tf2onnx wrote (how: files/make_tf2onnx.py): channels-last Conv, names with ``:0``, a Loop, an If."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.real_inputs.common import optimize_and_compare

FILES = Path(__file__).parent / "files"


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


CASES = {
    "convnet": [{"image": draw(2, 16, 16, 3)}, {"image": draw(1, 9, 12, 3)}],
    "loop": [{"steps": draw(2, 5, 6)}, {"steps": -draw(2, 5, 6)}, {"steps": draw(3, 1, 6)}],
}


@pytest.mark.parametrize("name", CASES)
def test_tf2onnx(name: str, tmp_path: Path) -> None:
    source = Path(shutil.copy(FILES / f"tf2onnx_{name}.onnx", tmp_path))
    report = optimize_and_compare(source, CASES[name])
    assert report.output is not None
    assert report.output.nodes <= report.input.nodes
