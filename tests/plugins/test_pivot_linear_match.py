"""PivotLinear in graphs of standard operators: what nodes and pivot write is found, what only looks like it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from graphopt import graphs
from graphopt.passes.canonical.fold_constants import FoldConstants
from graphopt.passes.fuse.matmul_add import FuseMatMulAdd
from graphopt.passes.lowrank.pivot import Pivot
from graphopt.plugins.pivot_linear import PivotSite, collapse, expand, pivot_at
from graphopt.plugins.pivot_linear.function import is_pivot_linear
from graphopt.shapes import infer_shapes
from tests.models.blocks import bert_block, llama_block, mlp_block, resnet_block
from tests.passes.common import op_types, run_ort, run_pass
from tests.passes.fuse.common import G, in_body, random
from tests.plugins.test_pivot_linear import M, N, R, _Case, _pair

Array = npt.NDArray[Any]

B = 3
MATRICES = [("MatMul", "MatMul"), ("Gemm transB", "Gemm transB"), ("Gemm", "MatMul"), ("left", "left")]


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A target on which multiplications cost time and nothing else does."""
    path = tmp_path_factory.mktemp("target") / "arithmetic.yaml"
    costs = "costs: {node: 0.0, gigaflops: 0.001, gigabytes: 1.0e+12}"
    path.write_text(f"name: arithmetic\nbackend: onnxruntime\nversion: '1'\nopset: 24\nir_version: 12\n{costs}\n")
    return str(path)


def sites(model: ir.Model) -> list[PivotSite]:
    """The largest form of each place."""
    found = [site for node in graphs.all_nodes(model) if isinstance(site := pivot_at(node), PivotSite)]
    return [s for s in found if not any(o is not s and set(s.nodes) < set(o.nodes) for o in found)]


def why(model: ir.Model) -> str:
    """Why there are none."""
    assert sites(model) == []
    return "; ".join(found for node in graphs.all_nodes(model) if isinstance(found := pivot_at(node), str) and found)


def calls(model: ir.Model) -> list[ir.Node]:
    return [node for node in graphs.all_nodes(model) if is_pivot_linear(node)]


def assert_close(model: ir.Model, other: ir.Model, feeds: Mapping[str, Array]) -> None:
    for wanted, found in zip(run_ort(model, feeds), run_ort(other, feeds), strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        if wanted.size:
            assert np.abs(found - wanted).max() <= 2e-5 * max(1.0, float(np.abs(wanted).max()))


def assert_there_and_back(model: ir.Model, feeds: Mapping[str, Array], count: int, *, checked: bool = True) -> ir.Model:
    """As nodes, as standard operators, and as nodes again: the same numbers. Gives the first."""
    outputs = [value.name for value in model.graph.outputs]
    once = model.clone()
    infer_shapes(once)
    assert collapse(once) == count == len(calls(once))
    if checked:
        onnx.checker.check_model(ir.to_proto(once), full_check=True)
    assert [value.name for value in once.graph.outputs] == outputs
    assert_close(model, once, feeds)
    back = once.clone()
    assert expand(back) == count and not calls(back) and not back.functions
    assert "graphopt" not in back.graph.opset_imports
    if checked:
        onnx.checker.check_model(ir.to_proto(back), full_check=True)
    assert_close(model, back, feeds)
    infer_shapes(back)
    assert collapse(back) == count
    assert_close(model, back, feeds)
    return once


# ---- what nodes writes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 13, 17, 24])
@pytest.mark.parametrize("biases", ["none", "offset", "inside"])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("kinds", MATRICES, ids="-".join)
def test_matrices(kinds: tuple[str, str], rows: bool, biases: str, opset: int) -> None:
    if biases == "inside" and (kinds[0][:4], kinds[1][:4]) != ("Gemm", "Gemm"):
        pytest.skip("a MatMul adds nothing")
    g = G(opset)
    shape = (N, B) if "left" in kinds else (B, N)
    g.output(_pair(g, g.input("x", *shape), kinds, (N, R, M)))
    case = _Case(g, rows=rows, bias=biases != "none")
    after = case.write(biases=biases)
    infer_shapes(after)
    (site,) = sites(after)
    x = after.graph.inputs[0]
    assert site.form == ("row" if rows else "column") and site.x is x and site.y is after.graph.outputs[0]
    assert len(site.nodes) == len([n for n in after.graph if n.op_type not in ("Constant", "Transpose")])
    assert (site.inputs, site.outputs, site.rank) == (case.n, case.m, case.r)
    assert site.axis == (-2 if "left" in kinds else -1)
    np.testing.assert_array_equal(site.kept.matrix(opset), case.kept)
    np.testing.assert_array_equal(site.coefficients.matrix(opset), case.coefficients)
    assert site.order is not None
    np.testing.assert_array_equal(site.order, np.argsort(case.order) if rows else case.order)
    bias = site.bias(opset)
    if case.bias is None:
        assert bias is None and not site.biased
    else:
        assert bias is not None
        np.testing.assert_allclose(bias, case.bias, rtol=0, atol=1e-5)
    feed = {"x": random(shape)}
    if opset < 13:
        assert collapse(after) == 0
        return
    once = assert_there_and_back(after, feed, 1)
    assert op_types(once) == ["PivotLinear"]


@pytest.mark.parametrize("shape", [(N,), (2, 4, N), (0, N), ("batch", "length", N)])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
def test_axes_before_the_channels(rows: bool, shape: tuple[int | str, ...]) -> None:
    g = G(17)
    g.output(_pair(g, g.input("x", *shape), ("MatMul", "MatMul"), (N, R, M)))
    after = _Case(g, rows=rows, bias=True).write()
    sizes = [2 if isinstance(size, str) else size for size in shape]
    assert_there_and_back(after, {"x": random(sizes)}, 1)


@pytest.mark.parametrize("biases", ["none", "inside", "offset"])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
def test_convolutions(rows: bool, axes: int, biases: str) -> None:
    g = G(17)
    size, options = (2, N, *(6,) * axes), {"pads": [1] * 2 * axes, "strides": [2] * axes}
    wide, one = (3,) * axes, (1,) * axes
    first = g.op(
        "Conv", g.input("x", *size), g.const(random((R, N, *(wide if rows else one)))), **(options if rows else {})
    )
    second = g.const(random((M, R, *(one if rows else wide))))
    g.output(g.op("Conv", first, second, **({} if rows else options)))
    case = _Case(g, rows=rows, bias=biases != "none")
    after = case.write(biases=biases)
    infer_shapes(after)
    (site,) = sites(after)
    assert site.axis == 1 and site.order is not None and site.biased == (biases != "none")
    np.testing.assert_array_equal(site.kept.matrix(17), case.kept)
    once = assert_there_and_back(after, {"x": random(size)}, 1)
    (node,) = calls(once)
    assert node.attributes["strides"].as_ints() == (2,) * axes
    assert node.inputs[1].const_value is not None  # type: ignore[union-attr]  # the kernel that was there


def test_a_table_is_seen_and_stays() -> None:
    g = G(17)
    rows = g.op("Gather", g.const(random((9, R), seed=1)), g.input("x", B, dtype=TensorProto.INT64))
    g.output(g.op("MatMul", rows, g.const(random((R, M), seed=2))))
    after = _Case(g, rows=True, bias=True).write()
    infer_shapes(after)
    (site,) = sites(after)
    assert site.inputs == 9 and site.outputs == M
    assert collapse(after) == 0


def test_gemm_that_fused_what_was_added() -> None:
    """fuse-matmul-add turns the column form into two Gemms, the first of which adds the pivots."""
    g = G(17)
    g.output(_pair(g, g.input("x", B, N), ("MatMul", "MatMul"), (N, R, M)))
    after, _ = run_pass(_Case(g, rows=False, bias=True).write(), FuseMatMulAdd)
    assert op_types(after) == ["Gather", "Split", "Gemm", "Gemm"]
    assert op_types(assert_there_and_back(after, {"x": random((B, N))}, 1)) == ["PivotLinear"]


def test_a_bias_behind_the_gather() -> None:
    g = G(17)
    x, k = g.input("x", B, N), random((N, R), seed=1)
    t = g.op("MatMul", x, g.const(k))
    y = g.op("Concat", t, g.op("MatMul", t, g.const(random((R, M - R), seed=2))), axis=-1)
    y = g.op("Gather", g.op("Add", g.const(random((M,), seed=3)), y), g.ints(*range(M - 1, -1, -1)), axis=1)
    g.output(g.op("Add", y, g.const(random((1, M), seed=4))))
    model = ir.from_proto(g.model())
    infer_shapes(model)
    (site,) = sites(model)
    np.testing.assert_array_equal(site.bias(17), random((M,), seed=3).astype(float)[::-1] + random((M,), seed=4))
    assert op_types(assert_there_and_back(model, {"x": random((B, N))}, 1)) == ["PivotLinear"]


def test_in_a_body() -> None:
    g = G(17)
    x = g.input("x", B, N)
    t = g.op("MatMul", x, g.const(random((N, R))))
    g.output(g.op("Concat", t, g.op("MatMul", t, g.const(random((R, M - R)))), axis=-1))
    model = ir.from_proto(in_body(g.model()))
    assert_there_and_back(model, {"x": random((B, N)), "condition": np.array(True)}, 1, checked=False)


def test_two_forms_of_one_weight_share_it() -> None:
    g = G(17)
    kept, coefficients = g.const(random((N, R))), g.const(random((R, M - R)))
    for name in "ab":
        t = g.op("MatMul", g.input(name, B, N), kept)
        g.output(g.op("Concat", t, g.op("MatMul", t, coefficients), axis=-1))
    model = ir.from_proto(g.model())
    once = assert_there_and_back(model, {"a": random((B, N)), "b": random((B, N), seed=1)}, 2)
    one, other = calls(once)
    assert one.inputs[1:] == other.inputs[1:]
    assert len(once.graph.initializers) == 2 and len(once.functions) == 1


def test_only_those_that_are_wanted() -> None:
    g = G(17)
    g.output(_pair(g, g.input("x", B, N), ("MatMul", "MatMul"), (N, R, M)))
    after = _Case(g, rows=True, bias=False).write()
    assert collapse(after, wanted=lambda site: site.form == "column") == 0 and not after.functions
    assert collapse(after, wanted=lambda site: site.form == "row") == 1


def test_weights_behind_transpose_are_read_before_it() -> None:
    g = G(17)
    turned = [g.op("Transpose", g.const(random(shape))) for shape in ((R, N), (M - R, R))]
    t = g.op("MatMul", g.input("x", B, N), turned[0])
    g.output(g.op("Concat", t, g.op("MatMul", t, turned[1]), axis=-1))
    once = assert_there_and_back(ir.from_proto(g.model()), {"x": random((B, N))}, 1)
    assert op_types(once) == ["PivotLinear"] and len(once.graph.initializers) == 2


# ---- what pivot writes -----------------------------------------------------------------------------------------------

BLOCKS: dict[str, tuple[Callable[..., ir.Model], dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "mlp": (mlp_block, {}, {"x": (2, 5, 48)}),
    "llama": (llama_block, {}, {"x": (2, 5, 48)}),
    "bert": (bert_block, {}, {"x": (2, 5, 48), "mask": (2, 5)}),
    "resnet": (resnet_block, {}, {"x": (2, 24, 6, 6)}),
    "resnet by two": (resnet_block, {"outputs": 32, "stride": 2}, {"x": (2, 24, 6, 6)}),
    "resnet with norms": (resnet_block, {"norm": "kept"}, {"x": (2, 24, 6, 6)}),
}


@pytest.mark.parametrize("gather", ["cheaper", "always", "never"])
@pytest.mark.parametrize("form", ["factors", "product"])
@pytest.mark.parametrize("name", BLOCKS)
def test_what_pivot_writes(name: str, form: str, gather: str, arithmetic: str) -> None:
    build, arguments, shapes = BLOCKS[name]
    pivoted, records = run_pass(build(form=form, opset=18, **arguments), Pivot, target=arithmetic, gather=gather)
    count = Counter(
        node.op_type
        for node in pivoted.graph
        if node.op_type in ("Concat", "Split") and node.metadata_props.get("graphopt.pass") == "pivot"
    ).total()
    assert bool(count) == bool(records[0].applications)
    feeds = {key: random(shape) for key, shape in shapes.items()}
    if "mask" in feeds:
        feeds["mask"] = (feeds["mask"] > -1).astype(np.float32)
    found = sites(pivoted)
    assert len(found) == count
    assert_there_and_back(pivoted, feeds, count)


def test_fused_and_folded_all_the_same(arithmetic: str) -> None:
    before = mlp_block(form="factors", opset=18)
    fused, _ = run_pass(before, Pivot, FuseMatMulAdd, FoldConstants, target=arithmetic)
    assert_there_and_back(fused, {"x": random((2, 5, 48))}, 2)


# ---- what only looks like it -----------------------------------------------------------------------------------------


def row(g: G, x: str, *, between: Callable[[str], str] = lambda t: t, axis: int = -1) -> tuple[str, str]:
    t = g.op("MatMul", x, g.const(random((N, R), seed=1)))
    return t, g.op("MatMul", between(t), g.const(random((R, M - R), seed=2)))


def refused(g: G, says: str, *names: str) -> None:
    for name in names:
        g.output(name)
    model = ir.from_proto(g.model())
    infer_shapes(model)
    assert says in why(model)
    assert collapse(model) == 0


def test_the_others_first() -> None:
    g = G(17)
    t, s = row(g, g.input("x", B, N))
    refused(g, "", g.op("Concat", s, t, axis=-1))


def test_something_between_the_products() -> None:
    g = G(17)
    t, s = row(g, g.input("x", B, N), between=lambda t: g.op("Relu", t))
    refused(g, "something else before the product", g.op("Concat", t, s, axis=-1))


def test_a_product_of_something_else() -> None:
    g = G(17)
    t, _ = row(g, g.input("x", B, N))
    _, s = row(g, g.input("z", B, N))
    refused(g, "something else before the product", g.op("Concat", t, s, axis=-1))


def test_no_product_before() -> None:
    g = G(17)
    t = g.op("Relu", g.input("x", B, R))
    s = g.op("MatMul", t, g.const(random((R, M - R))))
    refused(g, "is no product", g.op("Concat", t, s, axis=-1))


def test_concat_along_another_axis() -> None:
    g = G(17)
    t = g.op("MatMul", g.input("x", B, N), g.const(random((N, R))))
    s = g.op("MatMul", t, g.const(random((R, R))))
    refused(g, "different axes", g.op("Concat", t, s, axis=0))


def test_products_along_different_axes() -> None:
    g = G(17)
    t = g.op("MatMul", g.const(random((R, N))), g.input("x", N, R))
    s = g.op("MatMul", t, g.const(random((R, R))))
    refused(g, "different axes", g.op("Concat", t, s, axis=-1))


def test_an_operand_that_is_no_constant() -> None:
    g = G(17)
    t = g.op("MatMul", g.input("x", B, N), g.const(random((N, R))))
    s = g.op("MatMul", t, g.input("w", R, M - R))
    refused(g, "", g.op("Concat", t, s, axis=-1))


def test_a_weight_that_a_caller_may_replace() -> None:
    g = G(17)
    t = g.op("MatMul", g.input("x", B, N), g.const(random((N, R))))
    s = g.op("MatMul", t, g.overridable(random((R, M - R))))
    refused(g, "", g.op("Concat", t, s, axis=-1))


@pytest.mark.parametrize("which", ["t", "s"])
def test_a_value_within_that_something_else_reads(which: str) -> None:
    g = G(17)
    t, s = row(g, g.input("x", B, N))
    refused(g, "read elsewhere", g.op("Concat", t, s, axis=-1), g.op("Relu", t if which == "t" else s))


def test_a_value_within_that_is_returned() -> None:
    g = G(17)
    t, s = row(g, g.input("x", B, N))
    refused(g, "read elsewhere", g.op("Concat", t, s, axis=-1), t)


def test_a_result_that_is_read_before_its_bias_keeps_it_apart() -> None:
    g = G(17)
    t, s = row(g, g.input("x", B, N))
    y = g.op("Concat", t, s, axis=-1)
    z = g.op("Add", y, g.const(random((M,))))
    for name in (y, z):
        g.output(name)
    model = ir.from_proto(g.model())
    infer_shapes(model)
    (site,) = sites(model)
    assert site.y.name == y and not site.biased
    assert sorted(op_types(assert_there_and_back(model, {"x": random((B, N))}, 1))) == ["Add", "PivotLinear"]


@pytest.mark.parametrize("what", ["rows", "matrix", "axes", "gather", "twice", "axis"])
def test_what_follows_and_does_not_belong(what: str) -> None:
    """The form is found, what follows is left alone."""
    g = G(17)
    t, s = row(g, g.input("x", M, N))
    y = g.op("Concat", t, s, axis=-1)
    places = g.ints(*range(M - 1, -1, -1))
    if what == "gather":
        z = g.op("Gather", y, g.ints(*[0] * M), axis=-1)
    elif what == "axis":
        z = g.op("Gather", y, places, axis=0)
    elif what == "twice":
        z = g.op("Gather", g.op("Gather", y, places, axis=-1), places, axis=-1)
    else:
        z = g.op("Add", y, g.const(random({"rows": (M, 1), "matrix": (M, M), "axes": (1, 1, M)}[what])))
    g.output(z)
    model = ir.from_proto(g.model())
    infer_shapes(model)
    (site,) = sites(model)
    assert len(site.nodes) == (4 if what == "twice" else 3)
    kept = {"gather": "Gather", "axis": "Gather", "twice": "Gather"}.get(what, "Add")
    assert op_types(assert_there_and_back(model, {"x": random((M, N))}, 1)) == ["PivotLinear", kept]


def column(
    g: G, x: str, *, sizes: tuple[int, int] = (R, N - R), swapped: bool = False, axis: int = -1
) -> tuple[str, str]:
    names = [g._fresh("part"), g._fresh("part")]
    g.nodes.append(helper.make_node("Split", [x, g.ints(*sizes)], names, axis=axis, name=g._fresh("split")))
    pivots, others = names[::-1] if swapped else names
    return pivots, others


def test_the_others_as_pivots() -> None:
    g = G(17)
    p, o = column(g, g.input("x", B, N), sizes=(N - R, R), swapped=True)
    u = g.op("Add", p, g.op("MatMul", o, g.const(random((N - R, R)))))
    refused(g, "not the first of two parts", g.op("MatMul", u, g.const(random((R, M)))))


def test_three_parts() -> None:
    g = G(17)
    names = ["p", "o", "q"]
    g.nodes.append(helper.make_node("Split", [g.input("x", B, N), g.ints(R, 2, N - R - 2)], names, axis=-1, name="sp"))
    u = g.op("Add", "p", g.op("MatMul", "o", g.const(random((2, R)))))
    refused(g, "not the first of two parts", g.op("MatMul", u, g.const(random((R, M)))))


def test_parts_of_two_tensors() -> None:
    g = G(17)
    p, _ = column(g, g.input("x", B, N))
    _, o = column(g, g.input("z", B, N))
    u = g.op("Add", p, g.op("MatMul", o, g.const(random((N - R, R)))))
    refused(g, "", g.op("MatMul", u, g.const(random((R, M)))))


def test_a_pivot_that_broadcasts() -> None:
    g = G(17)
    p, o = column(g, g.input("x", B, N), sizes=(1, N - 1))
    u = g.op("Add", p, g.op("MatMul", o, g.const(random((N - 1, R)))))
    refused(g, "other sizes than", g.op("MatMul", u, g.const(random((R, M)))))


def test_split_along_another_axis() -> None:
    g = G(17)
    p, o = column(g, g.input("x", 2, B, R), sizes=(1, 1), axis=0)
    u = g.op("Add", p, g.op("MatMul", o, g.const(random((R, R)))))
    refused(g, "other sizes than", g.op("MatMul", u, g.const(random((R, M)))))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_part_that_something_else_reads(which: int) -> None:
    g = G(17)
    p, o = column(g, g.input("x", B, N))
    u = g.op("Add", p, g.op("MatMul", o, g.const(random((N - R, R)))))
    y = g.op("MatMul", u, g.const(random((R, M))))
    refused(g, "read elsewhere", y, g.op("Relu", (p, o, u)[which]))


def test_a_nonlinearity_on_the_way() -> None:
    g = G(17)
    p, o = column(g, g.input("x", B, N))
    u = g.op("Relu", g.op("Add", p, g.op("MatMul", o, g.const(random((N - R, R))))))
    refused(g, "", g.op("MatMul", u, g.const(random((R, M)))))


@pytest.mark.parametrize("attribute", [{"alpha": 0.5}, {"beta": 0.5}, {"transA": 1}])
def test_gemm_that_does_more(attribute: dict[str, Any]) -> None:
    g = G(17)
    square = N - R
    p, o = column(g, g.input("x", square, 2 * square), sizes=(square, square))
    u = g.op("Gemm", o, g.const(random((square, square))), p, **attribute)
    refused(g, "", g.op("MatMul", u, g.const(random((square, M)))))


def test_a_gather_that_repeats_stays_before_the_form() -> None:
    g = G(17)
    p, o = column(g, g.op("Gather", g.input("x", B, N), g.ints(*[0] * N), axis=-1))
    u = g.op("Add", p, g.op("MatMul", o, g.const(random((N - R, R)))))
    g.output(g.op("MatMul", u, g.const(random((R, M)))))
    model = ir.from_proto(g.model())
    assert op_types(assert_there_and_back(model, {"x": random((B, N))}, 1)) == ["Gather", "PivotLinear"]


def test_a_second_convolution_that_looks_beside() -> None:
    g = G(17)
    t = g.op("Conv", g.input("x", 1, N, 5, 5), g.const(random((R, N, 1, 1))))
    s = g.op("Conv", t, g.const(random((M - R, R, 3, 3))), pads=[1] * 4)
    refused(g, "looks beside", g.op("Concat", t, s, axis=1))
