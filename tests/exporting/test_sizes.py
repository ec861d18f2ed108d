"""Decisions on the sizes of dynamic axes, and on what torch.cond and single integers say: right at every size."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402
import sympy  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.utils._sympy.functions import FloorDiv, IntTrueDiv  # noqa: E402

from graphopt.errors import BadInput, GraphoptError  # noqa: E402
from graphopt.exporting import export  # noqa: E402
from graphopt.exporting.sizes.guards import Guard, symbol_of  # noqa: E402
from graphopt.exporting.sizes.probes import probes  # noqa: E402
from graphopt.exporting.sizes.regions import Explored, Region, deciding, explore  # noqa: E402
from graphopt.exporting.sizes.uniting import unite  # noqa: E402
from tests.exporting import sizing  # noqa: E402

n, m = symbol_of("n"), symbol_of("m")


def drawn(shapes: dict[str, Any], axes: Any, sizes: dict[str, int], seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(
            [sizes.get(axes[key].get(axis, ""), size) for axis, size in enumerate(shape)], generator=generator
        )
        for key, shape in shapes.items()
    }


def made(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def check(name: str, out: Path) -> Any:
    kind, shapes, axes, sizes = sizing.SIZES[name]
    result = export(lambda: (made(kind), drawn(shapes, axes, {}, 0), axes), out)
    onnx.checker.check_model(onnx.load(out), full_check=True)
    session, module = ort.InferenceSession(out), made(kind)
    for seed, chosen in enumerate(sizes, 1):
        inputs = drawn(shapes, axes, chosen, seed)
        with torch.no_grad():
            expected = module(**inputs).numpy()
        (found,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        assert found.shape == expected.shape, chosen
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=str(chosen))
    return result


def line_of(kind: Any, text: str) -> int:
    lines, start = inspect.getsourcelines(kind)
    return start + next(index for index, line in enumerate(lines) if text in line)


def test_a_decision_on_a_size_is_an_if_on_it(tmp_path: Path) -> None:
    result = check("threshold", tmp_path / "m.onnx")
    line = line_of(sizing.Threshold, "if x.shape")
    nodes = list(ir.load(tmp_path / "m.onnx").graph)
    assert [node.op_type for node in nodes] == ["Shape", "Squeeze", "LessOrEqual", "If"]
    assert nodes[-1].name == f"If_forward_{line}"
    assert [note for note in result.notes if f"sizing.py:{line}" in note]
    assert {size for case in result.comparison for size in case.sizes.values()} >= {6, 7}  # next to where it turns


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in sizing.SIZES if name != "threshold"])
def test_each_decision_on_sizes(tmp_path: Path, name: str) -> None:
    check(name, tmp_path / "m.onnx")


@pytest.mark.slow
def test_weights_are_stored_once_and_what_comes_before_the_decision_stands_once(tmp_path: Path) -> None:
    kind, shapes, axes, _ = sizing.SIZES["in a submodule, with a tensor"]
    result = export(lambda: (made(kind), drawn(shapes, axes, {}, 0), axes), tmp_path / "m.onnx")
    assert result.parameters - 2 * (4 * 4 + 4) <= 16  # constants
    model = ir.load(tmp_path / "m.onnx")
    assert sum(node.op_type == "Gemm" for node in model.graph.all_nodes()) == 3  # before once, after in each branch
    assert sum(node.op_type == "Gemm" for node in model.graph) == 1


@pytest.mark.slow
def test_a_size_that_python_runs_through_is_refused_with_its_line(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(5, 4)}
    with pytest.raises(BadInput, match=r"fixes the dynamic axis 'n' at 5.*sizing\.py:") as error:
        export(lambda: (sizing.EachRow(), inputs, sizing.N), tmp_path / "m.onnx")
    assert f"sizing.py:{line_of(sizing.EachRow, 'for row')}" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_where_the_module_raises_is_told(tmp_path: Path) -> None:
    result = check("asserted", tmp_path / "m.onnx")
    assert [note for note in result.notes if note.startswith("the module raises at n=9")]


@pytest.mark.slow
def test_an_axis_that_squeeze_takes_away_is_told(tmp_path: Path) -> None:
    shapes, axes, _ = sizing.SECOND
    result = export(lambda: (sizing.Squeezed(), drawn(shapes, axes, {}, 0), axes), tmp_path / "m.onnx")
    assert any(
        note.startswith("at b=3, n=1 and the like the module returns tensors of other ranks") for note in result.notes
    )
    x = torch.randn(1, 6, 4)
    (found,) = ort.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, sizing.Squeezed()(x).numpy(), rtol=1e-5)


# What the exploration is made of.


class Steps:
    """A module by its value at each size; an export of it holds for the sizes between two steps."""

    def __init__(self, steps: list[int], raises: set[int]) -> None:
        self.steps, self.raises = steps, raises

    def part(self, size: int) -> int:
        return sum(size > step for step in self.steps)

    def export(self, sizes: dict[str, int]) -> tuple[int, list[Guard]]:
        size = sizes["n"]
        return self.part(size), [Guard(n > step if size > step else n <= step, None, True) for step in self.steps]

    def runs(self, sizes: dict[str, int]) -> bool:
        return self.part(sizes["n"]) not in self.raises

    def agrees(self, made: int, sizes: dict[str, int]) -> bool:
        return made == self.part(sizes["n"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 5_000), min_size=1, max_size=4, unique=True), st.data())
def test_every_range_is_found_and_told_apart(steps: list[int], data: Any) -> None:
    steps.sort()
    own = data.draw(st.integers(1, 6_000))
    module = Steps(steps, set())
    module.raises = data.draw(st.sets(st.integers(0, len(steps)))) - {module.part(own)}
    found = explore({"n": own}, module, "steps")
    assert {region.made for region in found.regions} == set(range(len(steps) + 1)) - module.raises
    assert {module.part(sizes["n"]) for sizes in found.raising} == module.raises
    conditions = [deciding(found, index, "steps") for index in range(len(found.regions) - 1)]
    for size in {1, own, *steps, *(step + 1 for step in steps)}:
        if module.part(size) in module.raises:
            continue
        chosen = next((i for i, c in enumerate(conditions) if all(g.holds({"n": size}) for g in c)), len(conditions))
        assert found.regions[chosen].made == module.part(size)


def test_what_torch_took_for_granted_counts_only_where_it_matters() -> None:
    class Granted(Steps):
        def export(self, sizes: dict[str, int]) -> tuple[int, list[Guard]]:
            made, guards = super().export(sizes)
            return made, [*guards, Guard(sympy.Ne(n, 3), None, False)]

    assert [region.sizes for region in explore({"n": 5}, Granted([], set()), "m").regions] == [{"n": 5}]


def test_probes_stand_on_both_sides_of_each_turn() -> None:
    found = {
        sizes["n"] for sizes in probes({"n": 5}, [Guard(n * n > 10_000, None, True), Guard(n // 8 < 20, None, True)])
    }
    assert {1, 5, 100, 101, 159, 160} <= found


CONDITIONS = [
    n > 3,
    sympy.Eq(n, m),
    sympy.Ne(sympy.Mod(n, 3), 0),
    sympy.Or(n < 3, m >= 5),
    sympy.Not(sympy.And(n > 2, n * m <= 12), evaluate=False),
    sympy.Max(n, m) - 2 * sympy.Min(n, 4) > -1,
    n**2 < 3 * m + 7,
    IntTrueDiv(n, sympy.Integer(2)) > 1.25,
    FloorDiv(n + m, sympy.Integer(3)) >= 2,
]


def constant_model(value: float) -> ir.Model:
    x, y = (ir.Value(name=k, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([k])) for k in "xy")
    total = ir.Node("", "ReduceSum", [x], [ir.AttrInt64("keepdims", 0)], name="sum")
    kept = ir.Value(name="c", const_value=ir.tensor(np.float32(value), name="c"))
    kept.type, kept.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    added = ir.Node("", "Add", [total.outputs[0], kept], name="add")
    for node in (total, added):
        node.outputs[0].name = f"{node.name}_value"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph = ir.Graph(
        [x, y], list(added.outputs), nodes=[total, added], initializers=[kept], opset_imports={"": 20}, name="main"
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
def test_a_condition_on_sizes_in_onnx(condition: Any) -> None:
    guard = Guard(condition, None, True)
    axes = {"x": {0: "n"}, "y": {0: "m"}}
    model = unite([constant_model(1), constant_model(2)], [[guard]], axes)
    assert next(iter(model.graph)).op_type == "ReduceSum"  # what both begin with
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString())
    for size in range(1, 7):
        for other in range(1, 7):
            feeds = {"x": np.zeros(size, np.float32), "y": np.zeros(other, np.float32)}
            expected = 1 if guard.holds({"n": size, "m": other}) else 2
            assert session.run(None, feeds) == [expected], (size, other)


def test_a_condition_without_a_form_names_its_line() -> None:
    from graphopt.exporting.branches.places import Place

    guard = Guard(sympy.Function("odd")(n) > 0, Place("net.py", 7, "forward"), True)
    with pytest.raises(GraphoptError, match=r"odd\(n\).*net\.py:7"):
        unite([constant_model(1), constant_model(2)], [[guard]], {"x": {0: "n"}})


def test_regions_that_no_question_tells_apart_are_refused() -> None:
    regions = [Region({"n": 2}, 0, [Guard(n > 1, None, True)]), Region({"n": 1}, 1, [Guard(n < 9, None, True)])]
    found = Explored(regions, [], [({"n": 2}, 0), ({"n": 5}, 1)])
    with pytest.raises(GraphoptError, match="at n=5"):
        deciding(found, 0, "m")


# What else decides.


def test_operators_that_decide_are_forced_like_python(tmp_path: Path) -> None:
    before = torch.cond.__code__
    result = export(lambda: (made(sizing.NestedOperators), {"x": torch.ones(4)}, None), tmp_path / "m.onnx")
    assert torch.cond.__code__ is before
    assert [note for note in result.notes if note.startswith("5 decisions on values, every side compared")]
    session = ort.InferenceSession(tmp_path / "m.onnx")
    for seed in range(12):
        x = torch.randn(4, generator=torch.Generator().manual_seed(seed)) * (1 + seed % 3)
        turns, y = decided(x)
        found = session.run(None, {"x": x.numpy()})
        assert int(found[0]) == turns
        np.testing.assert_allclose(found[1], y.numpy(), rtol=1e-5, atol=1e-6)


def decided(x: Any) -> tuple[int, Any]:
    """`sizing.NestedOperators` in Python."""
    y = (x.sin() if x.max() > 1 else x.exp()) if x.sum() > 0 else x.cos() * 3
    turns = 0
    while turns < 3 and y.sum() < 5:
        y = y * 1.5 if y.sum() > 2 else y + 1
        turns += 1
    return turns, y


def test_a_single_integer_is_drawn_anew(tmp_path: Path) -> None:
    export(lambda: (sizing.Integer(), {"n": torch.tensor(5)}, None), tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx")
    assert [int(session.run(None, {"n": np.array(k)})[0]) for k in range(-2, 7)] == [-1, 0, 1, 2, 3, 4, 8, 10, 12]


def test_random_numbers_are_refused_with_their_line(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="draws random numbers") as error:
        export(lambda: (sizing.Noisy(), {"x": torch.randn(4)}, None), tmp_path / "m.onnx")
    assert f"sizing.py:{line_of(sizing.Noisy, 'torch.rand')}" in str(error.value)


@pytest.mark.slow
def test_a_class_of_data_is_returned(tmp_path: Path) -> None:
    from dataclasses import dataclass

    @dataclass
    class Found:
        y: Any
        score: Any

    class Net(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return Found(x, x.sum()) if x.sum() > 0 else Found(-x, x.mean())

    result = export(lambda: (Net(), {"x": torch.randn(4)}, None), tmp_path / "m.onnx")
    assert [value.name for value in result.outputs] == ["y", "score"]
