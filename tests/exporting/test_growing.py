"""Loops whose state grows, whose bounds are tensors, and whose lists are read after them: one Loop each."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

import onnx_ir as ir  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

import graphopt  # noqa: E402
from examples import token_loop  # noqa: E402
from graphopt.errors import GraphoptError  # noqa: E402
from graphopt.exporting import export  # noqa: E402
from tests.exporting import growing  # noqa: E402

RUNS = 40


def count(path: Path) -> tuple[int, int]:
    kinds = [node.op_type for node in ir.load(path).graph.all_nodes()]
    return kinds.count("Loop"), kinds.count("If")


def agree(module: Any, session: Any, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        returned = module(**{key: value.clone() for key, value in inputs.items()})
    names = {value.name for value in session.get_inputs()}
    found = session.run(None, {key: value.numpy() for key, value in inputs.items() if key in names})
    expected = [np.asarray(leaf) for leaf in pytree.tree_leaves(returned)]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def check(kind: Any, out: Path, *, dynamic: bool) -> None:
    module, example = kind().eval(), growing.inputs(kind, 4)
    export(lambda: (module, example, growing.axes(kind) if dynamic else None), out)
    session = ort.InferenceSession(out)
    run = 0
    for seed in range(RUNS):
        inputs = growing.inputs(kind, seed)
        if dynamic or all(inputs[key].shape == value.shape for key, value in example.items()):
            agree(module, session, inputs)
            run += 1
    assert run >= 10


def body(path: Path) -> ir.Graph:
    loop = next(node for node in ir.load(path).graph.all_nodes() if node.op_type == "Loop")
    return loop.attributes["body"].as_graph()


@pytest.mark.slow
def test_a_cache_is_a_state_that_a_concat_makes_longer(tmp_path: Path) -> None:
    check(growing.CacheFromNothing, tmp_path / "m.onnx", dynamic=False)
    assert count(tmp_path / "m.onnx") == (1, 0)
    graph = body(tmp_path / "m.onnx")
    appended = {
        value.name: value.producer()
        for value in graph.outputs
        if value.producer() is not None and value.producer().op_type == "Concat"
    }
    assert len(appended) == 3  # keys, values, tokens
    assert all(concat.inputs[0] in graph.inputs for concat in appended.values())


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", growing.GROWING)
def test_each_loop_that_grows(tmp_path: Path, name: str, dynamic: bool) -> None:
    kind, loops, branches = growing.GROWING[name]
    check(kind, tmp_path / "m.onnx", dynamic=dynamic)
    found = count(tmp_path / "m.onnx")
    assert found[0] == loops
    assert dynamic or found[1] == branches


def test_a_counted_loop_has_a_trip_count_and_no_condition(tmp_path: Path) -> None:
    check_range(tmp_path / "m.onnx", "Counts")
    loop = next(node for node in ir.load(tmp_path / "m.onnx").graph if node.op_type == "Loop")
    start = loop.inputs[1]
    assert start.const_value is not None and start.const_value.numpy().item() is True
    again = loop.attributes["body"].as_graph().outputs[0].producer()
    assert again.op_type == "Identity" and again.inputs[0].const_value.numpy().item() is True


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in growing.RANGES if name != "Counts"])
def test_each_range_of_tensors(tmp_path: Path, name: str) -> None:
    check_range(tmp_path / "m.onnx", name)


def check_range(out: Path, name: str) -> None:
    kind, loops = growing.RANGES[name]
    module = kind().eval()
    export(lambda: (module, growing.ranged(5), None), out)
    assert count(out)[0] == loops
    loop = next(node for node in ir.load(out).graph if node.op_type == "Loop")
    assert loop.inputs[0] is not None  # a trip count, which the condition does not repeat
    session = ort.InferenceSession(out)
    for seed in range(27):
        agree(module, session, growing.ranged(seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", growing.LISTS)
def test_each_list_that_is_read_after_the_loop(tmp_path: Path, name: str) -> None:
    kind, loops = growing.LISTS[name]
    module = kind().eval()
    example = {"x": growing.ranged(5)["x"]}
    export(lambda: (module, example, None), tmp_path / "m.onnx")
    assert count(tmp_path / "m.onnx")[0] == loops
    session = ort.InferenceSession(tmp_path / "m.onnx")
    for seed in range(27):
        agree(module, session, {"x": growing.ranged(seed)["x"]})


@pytest.mark.slow
@pytest.mark.parametrize("name", growing.MATCHES)
def test_each_match(tmp_path: Path, name: str) -> None:
    kind, branches = growing.MATCHES[name]
    module = kind().eval()
    export(lambda: (module, growing.ranged(5), None), tmp_path / "m.onnx")
    assert count(tmp_path / "m.onnx") == (0, branches)
    session = ort.InferenceSession(tmp_path / "m.onnx")
    for seed in range(27):
        agree(module, session, growing.ranged(seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what", "line", "instead"),
    [
        ("Iterated", "a list that grows in it is read", "for y in seen", "torch.stack"),
        ("Returned", "a list that grows in it is returned", "return seen", "return torch.stack"),
        ("NoTurnNoTensor", "'best' is no tensor and changes, and there may be no turn", "while x.sum()", "of size 0"),
        ("ManyValues", "more than 64", "int(x.sum() * 9)", "torch.stack the choices"),
    ],
)
def test_a_refusal_names_the_line_and_what_to_write(
    tmp_path: Path, name: str, what: str, line: str, instead: str
) -> None:
    kind = getattr(growing, name)
    with pytest.raises(GraphoptError) as caught:
        export(lambda: (kind(), {"x": growing.ranged(5)["x"]}, None), tmp_path / "m.onnx")
    lines, start = inspect.getsourcelines(kind)
    number = start + next(index for index, text in enumerate(lines) if line in text)
    text = str(caught.value)
    assert what in text
    assert f"{Path(growing.__file__).name}:{number}" in text
    assert instead in (caught.value.hint or "")
    assert "\n" not in text


SEEDS = (0, 1, 2, 3, 6, 8, 23)  # 5 to 20 words: the end at once, and never


def words(seed: int) -> Any:
    return torch.randint(1, token_loop.WORDS, (1, 4), generator=torch.Generator().manual_seed(seed))


def test_the_example_is_one_loop_and_a_bundle_of_it_writes_the_same_words(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export(token_loop.network, tmp_path / "tokens.onnx")
    assert count(tmp_path / "tokens.onnx") == (1, 0)
    module = token_loop.TokenLoop().eval()
    with torch.no_grad():
        expected = {seed: module(words(seed)).numpy() for seed in SEEDS}
    lengths = {array.shape[1] for array in expected.values()}
    assert {5, 4 + token_loop.LONGEST} <= lengths
    session = ort.InferenceSession(tmp_path / "tokens.onnx")
    for seed, array in expected.items():
        np.testing.assert_array_equal(session.run(None, {"words": words(seed).numpy()})[0], array)
    report = graphopt.optimize(tmp_path / "tokens.onnx", tmp_path / "tokens.bundle", recipe=["static"], target="onnx")
    assert report.verification.verdict == "passed"
    runner = graphopt.load(tmp_path / "tokens.bundle")
    for seed, array in expected.items():
        np.testing.assert_array_equal(runner.run({"words": words(seed).numpy()})["output"], array)
