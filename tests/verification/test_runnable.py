"""Models that ONNX Runtime's CPU does not run: float32 twins, unknown operators cut out."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt import optimize, verify
from graphopt.errors import GraphoptError
from graphopt.shapes import infer_shapes
from graphopt.verification import runnable
from graphopt.verification.runnable import Preparation, prepare
from tests import models
from tests.models import draw_feeds
from tests.rewrite.toys import model, ops, ort, producer, value

MYSTERY = ', "com.example": 1'


def prepared(made: ir.Model) -> Preparation:
    infer_shapes(made)
    return prepare(made)


def typed(text: str) -> ir.Model:
    """A model with an operator nobody knows, whose output types the file declares."""
    return model(text, imports=MYSTERY)


@pytest.mark.parametrize("name", [n for n in models.RUNNABLE if n != "float16"])
def test_what_runs_stays_as_it_is(name: str) -> None:
    made = models.RUNNABLE[name]()
    infer_shapes(made)
    before = ir.to_proto(made).SerializeToString()
    assert prepare(made) == Preparation()
    assert ir.to_proto(made).SerializeToString() == before


# -- twins -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_a_twin_computes_in_float32(kind: str) -> None:
    code = {"bfloat16": 16, "float16": 10}[kind]
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[kind]
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(dtype)
    made = model(f"""g ({kind}[N,4] x, float[N,4] z) => ({kind}[N,3] y, float[N,3] f) {{
        m = MatMul(x, w) one = Constant<value = float {{1}}>() a = Add(m, one) y = Tanh(a)
        zc = Cast<to={code}>(z) zm = MatMul(zc, w) f = Cast<to=1>(zm) }}""", weights={"w": weight})  # fmt: skip
    one = ir.tensor(np.array(1, dtype))  # the text syntax has bits, not numbers, for these types
    producer(made, "one").attributes["value"] = ir.AttrTensor("value", one)
    done = prepared(made)
    assert done.twin
    assert done.needed
    assert not done.opaque
    dtypes = {v.dtype for n in made.graph for v in (*n.inputs, *n.outputs) if v is not None}
    assert dtypes == {ir.DataType.FLOAT}
    x = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
    found = ort(made, {"x": x, "z": x})
    np.testing.assert_allclose(found["y"], np.tanh(x @ weight.astype(np.float32) + 1), rtol=1e-5)
    np.testing.assert_allclose(found["f"], x @ weight.astype(np.float32), rtol=1e-5)


def test_a_twin_reaches_into_bodies() -> None:
    made = model("""g (bfloat16[4] x, bool c) => (bfloat16[4] y) {
        y = If(c) <then_branch = t () => (bfloat16[4] u) { u = Mul(x, w) },
                   else_branch = e () => (bfloat16[4] v) <bfloat16[4] k = {1, 2, 3, 4}> { v = Add(x, k) }> }""",
                 weights={"w": np.array([2, 3, 4, 5], ml_dtypes.bfloat16)})  # fmt: skip
    value(made, "k").const_value = ir.tensor(np.array([1, 2, 3, 4], ml_dtypes.bfloat16), name="k")
    assert prepared(made).twin
    x = np.ones(4, np.float32)
    np.testing.assert_array_equal(ort(made, {"x": x, "c": np.array(True)})["y"], [2, 3, 4, 5])
    np.testing.assert_array_equal(ort(made, {"x": x, "c": np.array(False)})["y"], [2, 3, 4, 5])


@pytest.mark.parametrize("name", ["float8_weights", "int4_weights", "bfloat16_weights", "qdq_int8"])
def test_narrow_weights_that_the_runtime_reads_need_no_twin(name: str) -> None:
    assert not prepared(models.RUNNABLE[name]()).needed


def test_a_bfloat16_model_is_verified_through_its_twin(tmp_path: Path) -> None:
    ir.save(models.OPAQUE["bfloat16_compute"](), tmp_path / "m.onnx")
    report = optimize(tmp_path / "m.onnx")
    assert report.verification.coverage["twin"]
    assert report.verification.verdict == "passed"
    assert verify(tmp_path / "m.onnx", tmp_path / "m.opt.onnx").passed


# -- unknown operators -------------------------------------------------------------------------------------------------

MIDDLE = """g (float[2,4] x) => (float[2,4] y) {{
    a = Neg(x)
    {node}
    c = Exp(b)
    y = Abs(c)
}}"""


def middle(node: str = "b = com.example.Mystery(a)", *, known: bool = True, name: str = "") -> ir.Model:
    made = typed(MIDDLE.format(node=node))
    for output in producer(made, "b").outputs:
        if known:
            output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2, 4])
    producer(made, "b").name = name
    return made


def test_an_unknown_operator_in_the_middle_splits_the_model() -> None:
    made = middle(name="odd")
    done = prepared(made)
    assert done == Preparation(opaque=["odd"])
    assert [v.name for v in made.graph.inputs] == ["x", "opaque:odd:out0"]
    assert [v.name for v in made.graph.outputs] == ["y", "opaque:odd:0"]
    x, b = np.ones((2, 4), np.float32), np.full((2, 4), -2, np.float32)
    found = ort(made, {"x": x, "opaque:odd:out0": b})
    np.testing.assert_array_equal(found["opaque:odd:0"], -x)
    np.testing.assert_allclose(found["y"], np.exp(b), rtol=1e-6)


def test_what_lies_behind_an_unknown_type_is_dropped_and_named() -> None:
    made = middle(known=False)
    made.graph.outputs.append(value(made, "a"))
    done = prepared(made)
    assert done.opaque == ["Mystery"]
    assert len(done.dropped) == 2
    assert [v.name for v in made.graph.outputs] == ["a", "opaque:Mystery:0"]
    assert set(ops(made)) == {"Neg", "Identity"}


def test_several_without_names_are_told_apart() -> None:
    made = typed("g (float[2] x) => (float[2] y) { a = com.example.Mystery(x) b = Neg(a) c = com.example.Mystery(b)"
                 " y = Abs(c) }")  # fmt: skip
    for name in ("a", "c"):
        value(made, name).type, value(made, name).shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2])
    done = prepared(made)
    assert done.opaque == ["Mystery", "Mystery#2"]
    names = [v.name for v in (*made.graph.inputs, *made.graph.outputs)]
    assert len(set(names)) == len(names) == 6
    feeds = draw_feeds(made)
    assert set(ort(made, feeds)) == {"y", "opaque:Mystery:0", "opaque:Mystery#2:0"}


def test_one_that_gives_an_output_of_the_model() -> None:
    made = typed("g (float[2] x) => (float[2] y, float[2] z) { a = Neg(x) y = com.example.Mystery(a) z = Abs(y) }")
    prepared(made)
    found = ort(made, {"x": np.ones(2, np.float32), "opaque:Mystery:out0": np.array([3, -4], np.float32)})
    np.testing.assert_array_equal(found["y"], [3, -4])
    np.testing.assert_array_equal(found["z"], [3, 4])
    np.testing.assert_array_equal(found["opaque:Mystery:0"], [-1, -1])


def test_constants_that_it_reads_are_compared_too() -> None:
    made = typed("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = com.example.Mystery(x, w) }")
    prepared(made)
    assert [v.name for v in made.graph.outputs] == ["y", "opaque:Mystery:0", "opaque:Mystery:1"]


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2] x, bool c) => (float[2] y) { y = If(c) <then_branch = t () => (float[2] u)"
        " { u = com.example.Mystery(x) }, else_branch = e () => (float[2] v) { v = Abs(x) }> }",
        "g (float[2] x, bool c) => (float[2] y) { o = com.example.Mystery(x) y = If(c) <then_branch = t () =>"
        " (float[2] u) { u = com.example.Mystery(x) }, else_branch = e () => (float[2] v) { v = Abs(x) }> }",
        'g (float[2] x) => (float[2] y) { y = com.example.F(x) } <domain: "com.example", opset_import:'
        ' ["": 17, "com.example": 1]> F (a) => (b) { b = com.example.Mystery(a) }',
    ],
)
def test_one_in_a_body_or_function_cannot_be_checked(text: str) -> None:
    with pytest.raises(GraphoptError) as caught:
        prepared(typed(text))
    assert "inside a body or function" in str(caught.value)
    assert "--custom-ops" in str(caught.value)


def test_nothing_left_to_check_is_said() -> None:
    made = middle("b = com.example.Mystery()", known=False)
    with pytest.raises(GraphoptError, match="nothing can be checked: every output depends on Mystery"):
        prepared(made)


def test_with_a_library_of_custom_operators_nothing_is_cut() -> None:
    made = middle()
    infer_shapes(made)
    assert prepare(made, has_custom_ops=True) == Preparation()


def test_functions_and_contrib_operators_are_known() -> None:
    for name in ("functions", "contrib_ops"):
        made = models.RUNNABLE[name]()
        assert all(runnable.is_known(node, made) for node in made.graph)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("node", ["b = com.example.Mystery(a)", "i = Identity(a) b = com.example.Mystery(i)"])
def test_a_model_with_an_unknown_operator_is_optimized_around_it(tmp_path: Path, node: str, calibrated: bool) -> None:
    """What the operator gives is copied to an output: that renames it, and must not confuse the comparison."""
    made = middle(node)
    made.graph.outputs.append(ir.Value(name="z", type=made.graph.outputs[0].type, shape=ir.Shape([2, 4])))
    copy = ir.Node("", "Identity", [value(made, "b")], outputs=[made.graph.outputs[1]])
    made.graph.append(copy)
    ir.save(made, tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((6, 2, 4)).astype(np.float32))
    data = tmp_path / "data.npz" if calibrated else None
    if calibrated:
        (tmp_path / "data").mkdir()
        for i in range(3):
            np.savez(tmp_path / "data" / f"{i}.npz", x=np.full((2, 4), i - 1.5, np.float32))
        data = tmp_path / "data"
    report = optimize(tmp_path / "m.onnx", recipe=["safe"], calibration=data)
    assert report.undone == {}
    assert report.verification.verdict == "passed"
    assert report.verification.coverage["opaque"] == ["Mystery"]
    after = ir.load(tmp_path / "m.opt.onnx")
    assert "Identity" not in ops(after)
    mystery = next(n for n in after.graph if n.op_type == "Mystery")
    assert mystery.domain == "com.example"
