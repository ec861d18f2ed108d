"""Small questions about graphs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import graphs
from tests import models
from tests.rewrite.toys import dangling, model, producer, value

TEXT = """g (float[N,4] x, bool c) => (float[N,4] y, float[N,4] z) <float[4] w = {1, 2, 3, 4}> {
    k = Constant<value_float = 2.0>()
    a = Add(x, w)
    y = If(c) <
        then_branch = t () => (float[N,4] u) <float[4] v0 = {1, 1, 1, 1}> { u0 = Mul(a, v0) u = Mul(u0, k) },
        else_branch = e () => (float[N,4] v) { v = If(c) <
            then_branch = tt () => (float[N,4] p) { p = Sub(a, x) },
            else_branch = ee () => (float[N,4] q) { q = Neg(w) }> }>
    z = local.f(a)
}
<domain: "local", opset_import: ["": 17]>
f (p) => (q) { r = Neg(p) q = Abs(r) }"""


@pytest.fixture
def made() -> ir.Model:
    return model(TEXT, imports=', "local": 1')


def test_walking(made: ir.Model) -> None:
    names = [g.name for g in graphs.nested_graphs(made.graph)]
    assert names[0] == "g"
    assert set(names) == {"g", "t", "e", "tt", "ee"}
    assert names.index("e") < min(names.index("tt"), names.index("ee"))
    assert len(list(graphs.all_graphs(made))) == 6
    assert sorted(n.op_type for n in graphs.all_nodes(made)) == sorted(
        ["Constant", "Add", "If", "f", "Mul", "Mul", "If", "Sub", "Neg", "Neg", "Abs"]
    )
    assert graphs.count_nodes(made) == 10
    assert [g.name for g in graphs.subgraphs(producer(made, "y"))] == ["t", "e"]
    assert graphs.has_subgraphs(producer(made, "y"))
    assert not graphs.has_subgraphs(producer(made, "a"))


def test_captures(made: ir.Model) -> None:
    bodies = {g.name: g for g in graphs.nested_graphs(made.graph)}
    assert {v.name for v in graphs.captured_values(bodies["t"])} == {"a", "k"}
    assert sorted(v.name or "" for v in graphs.captured_values(bodies["e"])) == ["a", "c", "w", "x"]
    assert [v.name for v in graphs.captured_values(bodies["ee"])] == ["w"]
    assert graphs.captured_values(made.graph) == []


def test_a_body_output_from_outside_is_captured(made: ir.Model) -> None:
    bodies = {g.name: g for g in graphs.nested_graphs(made.graph)}
    bodies["ee"].outputs[0] = value(made, "a")
    assert "a" in {v.name for v in graphs.captured_values(bodies["ee"])}


def test_detaching_releases_everything_below(made: ir.Model) -> None:
    node = producer(made, "y")
    released = graphs.detach(node)
    assert {"a", "w", "c", "x", "k", "v0"} <= {v.name for v in released}
    made.graph.outputs.pop(0)
    made.graph.remove(node)
    assert value(made, "w").uses()  # by Add alone
    assert {use.node.op_type for use in value(made, "a").uses()} == {"f"}
    assert dangling(made) == []


def test_names(made: ir.Model) -> None:
    assert {"x", "c", "w", "k", "a", "u0", "v0", "p", "q", "r", "z"} <= graphs.value_names(made)


def test_parameters_count_each_tensor_once(made: ir.Model) -> None:
    assert graphs.parameters(made) == (4 + 4 + 1, 36)
    shared = ir.tensor(np.ones((2, 3), np.float32))
    for name in ("s1", "s2"):
        made.graph.register_initializer(ir.Value(name=name, const_value=shared))
    assert graphs.parameters(made) == (4 + 4 + 1 + 6, 60)


@pytest.mark.parametrize(
    ("constant", "expected"),
    [
        ("Constant<value_int = 3>()", 3.0),
        ("Constant<value_ints = [3]>()", 3.0),
        ("Constant<value_float = 0.5>()", 0.5),
        ("Constant<value = float[1,1] {0.5}>()", 0.5),
        ("Constant<value = bool {1}>()", 1.0),
        ("Constant<value_ints = [3, 4]>()", None),
        ("Constant<value = float[0] {}>()", None),
        ('Constant<value_string = "x">()', None),
        ("Neg(x)", None),
    ],
)
def test_scalars(constant: str, expected: float | None) -> None:
    made = model(f"g (float[1] x) => (float[1] y) {{ k = {constant} y = Abs(x) }}")
    assert graphs.scalar_of(value(made, "k")) == expected


def test_absent_values_are_no_constants() -> None:
    assert graphs.constant_tensor(None) is None
    assert graphs.scalar_of(None) is None
    assert not graphs.is_constant(None)
    assert graphs.static_shape(None) is None
    assert graphs.rank(None) is None


def test_a_constant_with_a_reference_attribute_has_no_value() -> None:
    node = ir.Node("", "Constant", [], [ir.RefAttr("value", "outer", ir.AttributeType.TENSOR)])
    assert graphs.constant_tensor(node.outputs[0]) is None
    assert not graphs.is_constant(node.outputs[0])


def test_shapes(made: ir.Model) -> None:
    assert graphs.static_shape(value(made, "w")) == (4,)
    assert graphs.static_shape(value(made, "x")) is None
    assert graphs.rank(value(made, "x")) == 2
    assert graphs.rank(value(made, "r")) is None


def test_sole_consumers(made: ir.Model) -> None:
    assert graphs.sole_consumer(value(made, "u0")) is producer(made, "u")
    assert graphs.sole_consumer(value(made, "a")) is None
    assert graphs.sole_consumer(value(made, "y")) is None  # an output
    twice = model("g (float[1] x) => (float[1] y) { a = Neg(x) y = Mul(a, a) }")
    assert graphs.sole_consumer(value(twice, "a")) is None
    assert graphs.is_used(producer(made, "y"))
    assert not graphs.is_used(ir.Node("", "Neg", [value(made, "x")]))


def test_opsets() -> None:
    made = model("g (float[1] x) => (float[1] y) { y = Neg(x) }", opset=13, imports=', "com.microsoft": 1')
    assert graphs.opset(made) == 13
    assert graphs.opset(made, "com.microsoft") == 1
    assert graphs.opset(made, "nobody") == 0


@pytest.mark.parametrize("name", models.RUNNABLE)
def test_detaching_every_node_leaves_no_use(name: str) -> None:
    made = models.RUNNABLE[name]()
    made.graph.outputs.clear()
    for node in reversed(list(made.graph)):
        graphs.detach(node)
        made.graph.remove(node)
    values = [*made.graph.inputs, *made.graph.initializers.values()]
    assert [v.name for v in values if v.uses()] == []
