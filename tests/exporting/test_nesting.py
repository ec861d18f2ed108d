"""Loops in loops become Loops in Loops, which compute what the module does."""

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
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

from graphopt.errors import GateFailed, GraphoptError  # noqa: E402
from graphopt.exporting import export  # noqa: E402
from graphopt.exporting.branches import deciding  # noqa: E402
from graphopt.exporting.branches.tracer import _told  # noqa: E402
from tests.exporting import nesting  # noqa: E402

FAST = ["Restarted"]


def drawn(kind: Any, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {}
    for name in list(inspect.signature(kind.forward).parameters)[1:]:
        if name == "row":
            inputs[name] = torch.tensor(seed % 5)
        elif name == "n":
            inputs[name] = torch.tensor(1 + 13 * seed)
        else:
            inputs[name] = torch.randn(3, 3, generator=generator) * (1 + seed % 3)
    return inputs


def check(name: str, out: Path) -> None:
    kind, loops = nesting.LOOPS[name]
    export(lambda: (kind().eval(), drawn(kind, 1), None), out)
    assert sum(node.op_type == "Loop" for node in ir.load(out).graph.all_nodes()) == loops
    session = ort.InferenceSession(out)
    for seed in range(16):
        inputs = drawn(kind, seed)
        expected = [np.asarray(leaf) for leaf in pytree.tree_leaves(kind()(**inputs))]
        found = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAST)
def test_loops_in_loops(tmp_path: Path, name: str) -> None:
    check(name, tmp_path / "m.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in nesting.LOOPS if name not in FAST])
def test_each_loop_in_a_loop(tmp_path: Path, name: str) -> None:
    check(name, tmp_path / "m.onnx")


class Largest(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            x = x * 2
        return x / x.abs().amax() - x.amin() + x.sum().amax()


@pytest.mark.slow
def test_the_largest_of_all_axes(tmp_path: Path) -> None:
    export(lambda: (Largest(), {"x": drawn(Largest, 1)["x"]}, None), tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            NotImplementedError("could not find kernel for graphopt_flow.decide.default at dispatch key CPU"),
            "torch cannot trace a turn that stands for all of them",
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x4)"), "shapes cannot be multiplied"),
    ],
)
def test_why_a_loop_is_none_says_nothing_of_torchs_inside(error: Exception, told: str) -> None:
    text = _told(error)
    assert told in text and "kernel" not in text


class Random(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            return x + torch.rand(3, 3)
        return x


@pytest.mark.slow
def test_random_numbers_on_one_side_are_told(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="draws random numbers"):
        export(lambda: (Random(), {"x": -torch.ones(3, 3)}, None), tmp_path / "m.onnx")


class Appended(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        seen = []
        while x.abs().max() > 1:
            x = x * 0.7
            seen.append(x)
        for y in seen:
            x = x + y
        return x


@pytest.mark.slow
def test_the_loop_and_the_line_that_hinders_it_are_both_told(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError) as caught:
        export(lambda: (Appended(), drawn(Appended, 1), None), tmp_path / "m.onnx")
    lines, start = inspect.getsourcelines(Appended)
    line = {text.strip(): start + index for index, text in enumerate(lines)}
    text = str(caught.value)
    here = Path(__file__).name
    assert f"{here}:{line['while x.abs().max() > 1:']} is no Loop: a list that grows in it is read, at " in text
    assert text.split(" is no Loop: ")[1].split(" (")[0].endswith(f"{here}:{line['for y in seen:']}")
    assert "\n" not in text and "Dispatch" not in text


def endless() -> ir.Model:
    """A Loop without a trip count that goes on for ever, and adds 1 to 0 in each turn."""
    text = """<ir_version: 9, opset_import: ["" : 20]>
        endless (bool go) => (float y) {
            zero = Constant <value = float {0}> ()
            y = Loop <body = body (int64 turn, bool on, float a) => (bool on_out, float b) {
                one = Constant <value = float {1}> ()
                b = Add(a, one)
                on_out = Identity(on)
            }> (, go, zero)
        }"""
    return ir.from_onnx_text(text)


@settings(max_examples=10, deadline=None)
@given(st.booleans())
def test_a_forced_model_always_ends(go: bool) -> None:
    model = endless()
    deciding.force(model, 1)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds = {"go": np.array(go), deciding.TABLE: np.full((1, deciding.TURNS), -1, np.int8)}
    given_names = {value.name for value in session.get_inputs()}
    (found,) = session.run(None, {key: value for key, value in feeds.items() if key in given_names})
    assert found == (deciding.MOST_TURNS if go else 0)


class Endless(torch.nn.Module):
    """Ends on its example; on other values it may not."""

    def forward(self, x: Any) -> Any:
        while x[0] != 8:
            x = x + 2
        return x


def test_a_loop_that_does_not_end_on_other_values_ends_the_comparison(tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match="a loop does not end"):
        export(lambda: (Endless(), {"x": torch.tensor([0.0, 1.0, 2.5])}, None), tmp_path / "m.onnx")
