"""The decoder of the examples: its cache is right, its check can fail, and it prints its table."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

EXAMPLE = Path(__file__).parent.parent / "examples" / "decoder.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decoder_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def small(example: ModuleType) -> object:
    return replace(example.Sizes(), width=32, heads=4, kv_heads=2, hidden=48, vocabulary=40)


def run(network: object, ids: object, cache: dict[str, object]) -> tuple[object, dict[str, object]]:
    """The logits, and the cache under the names of the inputs."""
    with torch.no_grad():
        results = network(ids=ids, **cache)  # type: ignore[operator]
    logits = results.pop("logits")
    return logits, {name.replace("present", "past"): value for name, value in results.items()}


@pytest.mark.parametrize("merged", [False, True])
def test_decoding_continues_what_prefill_began(example: ModuleType, merged: bool) -> None:
    sizes = small(example)
    network = example.decoder(sizes, merged=merged)
    ids = torch.randint(0, 40, (1, 9), generator=torch.Generator().manual_seed(0))
    empty = {name: torch.from_numpy(array) for name, array in example.empty_cache(sizes).items()}
    whole, last = run(network, ids, empty)
    logits, cache = run(network, ids[:, :5], empty)
    pieces = [logits]
    for i in range(5, 9):
        logits, cache = run(network, ids[:, i : i + 1], cache)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert cache.keys() == last.keys() == empty.keys()
    for name, value in last.items():
        assert value.shape == (1, 2, 9, 8)
        torch.testing.assert_close(cache[name], value)


def test_a_token_sees_none_after_it(example: ModuleType) -> None:
    sizes = small(example)
    network = example.decoder(sizes)
    empty = {name: torch.from_numpy(array) for name, array in example.empty_cache(sizes).items()}
    a, _ = run(network, torch.tensor([[1, 2, 3, 4]]), empty)
    b, _ = run(network, torch.tensor([[1, 2, 3, 9]]), empty)
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert (a[:, 3] - b[:, 3]).abs().max() > 0.1


def test_merged_is_the_same_function_with_half_the_rank_hidden(example: ModuleType) -> None:
    sizes = small(example)
    factors, dense = example.decoder(sizes), example.decoder(sizes, merged=True)
    inputs = example.factory(sizes)[1]
    ids, cache = inputs.pop("ids"), inputs
    torch.testing.assert_close(run(factors, ids, cache)[0], run(dense, ids, cache)[0])
    gate = dense.blocks[0].gate.weight
    assert gate.shape == (48, 32)
    assert torch.linalg.matrix_rank(gate.double(), rtol=1e-5) == 16
    assert not [m for m in dense.modules() if isinstance(m, example.LowRank)]


@pytest.mark.slow
def test_the_whole_example(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = small(example)
    example.main(tmp_path / "made", sizes, seconds=0.2)
    printed = capsys.readouterr().out
    assert max(map(len, printed.replace(str(tmp_path), "").splitlines())) <= 100
    rows = dict(re.findall(r"^(dense|factors|opt) +([\d,]+) ", printed, re.MULTILINE))
    assert set(rows) == {"dense", "factors", "opt"}
    assert len(set(rows.values())) >= 2  # dense has other weights than the factors

    files = [tmp_path / "made" / f"decoder.{name}.onnx" for name in ("dense", "factors", "opt")]
    worst = example.compare(files[0], files[1:], sizes, prompt=7, steps=3)
    assert all(0 < value < 1e-5 for value in worst.values())
    broken = tmp_path / "broken.onnx"
    model = onnx.load(files[2])
    weight = next(w for w in model.graph.initializer if len(w.dims) == 2 and w.data_type == onnx.TensorProto.FLOAT)
    array = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(array * np.float32(1.01), weight.name))
    onnx.save(model, broken)
    with pytest.raises(SystemExit, match="at step 0"):
        example.compare(files[0], [broken], sizes, prompt=7, steps=3)
