"""T0: each kind of damage to a graph is seen, and a sound graph is not."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from graphopt.verification.structure import Port, check_structure, differences, interface_of, sort_if_needed
from tests import models
from tests.rewrite.toys import model, ops, producer, value

TEXT = """g (float[N,4] x, bool c) => (float[N,4] y, float[N,4] z) <float[4] w = {1, 2, 3, 4}> {
    a = Add(x, w)
    y = If(c) <then_branch = t () => (float[N,4] u) { k = Neg(a) u = Mul(k, w) },
               else_branch = e () => (float[N,4] v) { v = Abs(a) }>
    z = local.f(a)
}
<domain: "local", opset_import: ["": 17]>
f (p) => (q) { r = Neg(p) q = Abs(r) }"""


def good() -> ir.Model:
    return model(TEXT, imports=', "local": 1')


@pytest.mark.parametrize("name", [*models.RUNNABLE, *models.OPAQUE])
def test_sound_models_are_sound(name: str) -> None:
    made = {**models.RUNNABLE, **models.OPAQUE}[name]()
    assert check_structure(made, interface_of(made)) == []


DAMAGE: dict[str, tuple[Callable[[ir.Model], object], str]] = {}


def damage(message: str) -> Callable[[Callable[[ir.Model], object]], Callable[[ir.Model], object]]:
    def add(spoil: Callable[[ir.Model], object]) -> Callable[[ir.Model], object]:
        DAMAGE[spoil.__name__] = (spoil, message)
        return spoil

    return add


@damage("which nothing before it produces")
def removed_node(made: ir.Model) -> None:
    made.graph.remove(producer(made, "a"))


@damage("which nothing before it produces")
def foreign_value(made: ir.Model) -> None:
    producer(made, "a").replace_input_with(0, ir.Value(name="elsewhere"))


@damage("which nothing before it produces")
def initializer_gone(made: ir.Model) -> None:
    made.graph.initializers.pop("w")


@damage("which nothing before it produces")
def out_of_order(made: ir.Model) -> None:
    node = producer(made, "a")
    made.graph.remove(node)
    made.graph.append(node)


@damage("which nothing before it produces")
def value_of_one_branch_read_in_the_other(made: ir.Model) -> None:
    producer(made, "v").replace_input_with(0, value(made, "k"))


@damage("which nothing before it produces")
def value_of_a_branch_read_outside(made: ir.Model) -> None:
    producer(made, "z").replace_input_with(0, value(made, "k"))


@damage("which nothing before it produces")
def later_outer_value_read_in_a_branch(made: ir.Model) -> None:
    producer(made, "v").replace_input_with(0, value(made, "z"))


@damage("which nothing before it produces")
def outer_value_read_in_a_function(made: ir.Model) -> None:
    producer(made, "q").replace_input_with(0, value(made, "a"))


@damage("which nothing before it produces")
def own_output(made: ir.Model) -> None:
    producer(made, "a").replace_input_with(0, value(made, "a"))


@damage("produces k, which exists already")
def name_twice_in_a_branch(made: ir.Model) -> None:
    value(made, "u").name = "k"


@damage("produces w, which exists already")
def name_of_an_initializer(made: ir.Model) -> None:
    value(made, "a").name = "w"


@damage("produces a, which exists already")
def name_of_an_outer_value(made: ir.Model) -> None:
    value(made, "k").name = "a"


@damage("reads a value that has no name")
def no_name(made: ir.Model) -> None:
    value(made, "k").name = None


@damage("is of domain com.nobody, which is not imported")
def domain_not_imported(made: ir.Model) -> None:
    producer(made, "v").domain = "com.nobody"


@damage("is not produced")
def output_not_produced(made: ir.Model) -> None:
    made.graph.outputs[0] = ir.Value(name="y", type=value(made, "y").type, shape=value(made, "y").shape)


@damage("output u of graph t is not produced")
def body_output_not_produced(made: ir.Model) -> None:
    value(made, "u").graph.outputs[0] = ir.Value(name="u")  # type: ignore[union-attr]


@damage("output q of graph")
def function_output_not_produced(made: ir.Model) -> None:
    next(iter(made.functions.values())).graph.outputs[0] = ir.Value(name="q")


@damage("initializer w has no tensor")
def constant_without_tensor(made: ir.Model) -> None:
    made.graph.initializers["w"].const_value = None


@damage("inputs were ['x', 'c'], are ['x']")
def input_gone(made: ir.Model) -> None:
    producer(made, "y").replace_input_with(0, value(made, "c"))
    made.graph.inputs.pop()


@damage("outputs were ['y', 'z'], are ['z', 'y']")
def outputs_swapped(made: ir.Model) -> None:
    made.graph.outputs.reverse()


@damage("output z was FLOAT[N,4], is DOUBLE[N,4]")
def output_dtype(made: ir.Model) -> None:
    made.graph.outputs[1].type = ir.TensorType(ir.DataType.DOUBLE)


@damage("input x was FLOAT[N,4], is FLOAT[N,5]")
def input_shape(made: ir.Model) -> None:
    made.graph.inputs[0].shape = ir.Shape(["N", 5])


@damage("output y was FLOAT[N,4], is FLOAT[M,4]")
def output_axis_name(made: ir.Model) -> None:
    made.graph.outputs[0].shape = ir.Shape(["M", 4])


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_seen(name: str) -> None:
    made = good()
    interface = interface_of(made)
    assert check_structure(made, interface) == []
    spoil, message = DAMAGE[name]
    spoil(made)
    problems = check_structure(made, interface)
    assert any(message in line for line in problems), problems


def test_names_may_repeat_in_scopes_side_by_side() -> None:
    made = good()
    value(made, "v").name = "k"
    value(made, "r").name = "a"
    assert check_structure(made) == []


def test_interfaces_are_compared_port_by_port() -> None:
    interface = interface_of(good())
    assert interface.inputs[0] == Port("x", "FLOAT", "[N,4]")
    assert differences(interface, interface_of(good())) == []


def test_order_is_mended_in_bodies_too_and_an_ordered_graph_is_left_alone() -> None:
    made = good()
    before = ops(made)
    sort_if_needed(made)
    assert ops(made) == before
    body = value(made, "k").graph
    node = producer(made, "k")
    body.remove(node)  # type: ignore[union-attr]
    body.append(node)  # type: ignore[union-attr]
    out_of_order(made)
    assert check_structure(made)
    sort_if_needed(made)
    assert check_structure(made) == []
