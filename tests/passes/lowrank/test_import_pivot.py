"""Scatters that fill an axis between them: Concat and Gather, the same bits. All others stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

pytest.importorskip("onnxruntime")

from graphopt.passes.canonical.fold_constants import FoldConstants
from graphopt.passes.lowrank.import_pivot import ImportPivot
from tests.passes.common import applications, assert_same_bits, op_types, run_ort, run_pass
from tests.passes.fuse.common import G, random, reasons

M, N, R = 10, 6, 4
KEPT = np.array([1, 4, 5, 9])
REST = np.array([0, 2, 3, 6, 7, 8])
WP, C = random((N, R)), random((R, M - R), seed=1)


def ints(g: G, array: np.ndarray) -> str:
    return g.const(np.asarray(array, np.int64))


def expanded(g: G, positions: np.ndarray, like: str, axis: int = -1) -> str:
    """The index of a scatter, as torchscript writes it."""
    return g.op("Expand", ints(g, positions.reshape(-1, *[1] * (-1 - axis))), g.op("Shape", like))


def pivot(
    *,
    kept: np.ndarray = KEPT,
    rest: np.ndarray = REST,
    opset: int = 18,
    op_type: str = "ScatterElements",
    into: Callable[[G, str], str] | None = None,
    extra: Callable[[G, str], object] | None = None,
    index: Callable[[G, np.ndarray, str], str] = expanded,
    **attributes: object,
) -> onnx.ModelProto:
    """An official PIFA layer: two scatters into a tensor of zeros."""
    g = G(opset)
    x = g.input("x", "batch", 3, N)
    t = g.op("MatMul", x, g.const(WP))
    s = g.op("MatMul", t, g.const(C))
    into = into or (lambda g, x: zeros(g, x, M))
    first = g.op(op_type, into(g, x), index(g, kept, t), t, axis=-1, **attributes)
    second = g.op(op_type, first, index(g, rest, s), s, axis=-1)
    g.output(g.op("Relu", second), "batch", 3, M)
    if extra is not None:
        extra(g, first)
    return g.model()


def zeros(g: G, x: str, size: int) -> str:
    lead = g.op("Slice", g.op("Shape", x), g.ints(0), g.ints(2)) if g.opset >= 10 else ""
    return g.op("ConstantOfShape", g.op("Concat", lead, g.ints(size), axis=0))


def types(model: onnx.ModelProto, *feeds: dict[str, np.ndarray]) -> list[str]:
    after = run_pass(model, ImportPivot)[0]
    assert_same_bits(model, after, *(feeds or ({"x": random((2, 3, N))}, {"x": random((1, 3, N))})))
    return [node.op_type for node in after.graph]


DONE = ["MatMul", "MatMul", "Concat", "Gather", "Relu"]


def refusal(model: onnx.ModelProto, *more: type) -> str:
    records = run_pass(model, ImportPivot, *more)[1]
    assert records[0].kept == 0
    return reasons(records)


@pytest.mark.parametrize("opset", [11, 13, 16, 18, 20])
def test_two_scatters(opset: int) -> None:
    assert types(pivot(opset=opset)) == DONE


def test_the_scatter_of_old_opsets() -> None:
    assert types(pivot(opset=10, op_type="Scatter")) == DONE


def test_the_other_order() -> None:
    assert types(pivot(kept=REST[[1, 0, 3, 5]], rest=np.array([9, 7, 5, 1, 3, 4]))) == DONE


def test_negative_positions() -> None:
    assert types(pivot(kept=KEPT - M)) == DONE


def test_pivots_first_need_no_gather() -> None:
    assert types(pivot(kept=np.arange(R), rest=np.arange(R, M))) == ["MatMul", "MatMul", "Concat", "Relu"]


def test_folded_first() -> None:
    """Elimination may have run in an earlier round of the tool."""
    folded, _ = run_pass(pivot(), FoldConstants)
    after, _ = run_pass(folded, ImportPivot)
    assert [node.op_type for node in after.graph] == DONE


def test_an_index_of_full_size() -> None:
    def full(g: G, positions: np.ndarray, like: str) -> str:
        return ints(g, np.broadcast_to(positions, (2, 3, len(positions))))

    g = pivot(index=full, into=lambda g, x: g.const(np.full((2, 3, M), 7.0)))
    g.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    g.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    assert types(g, {"x": random((2, 3, N))}) == DONE


def test_what_the_tensor_held_before_does_not_matter() -> None:
    def garbage(g: G, x: str) -> str:
        return g.op("Expand", g.const(np.nan), g.op("Concat", g.op("Shape", x, end=2), g.ints(M), axis=0))

    assert types(pivot(into=garbage)) == DONE


def test_three_scatters_and_what_they_write() -> None:
    g = G(18)
    x = g.input("x", "batch", 6)
    parts = [g.op(op, x) for op in ("Relu", "Neg", "Exp")]
    last = g.op("ConstantOfShape", g.op("Concat", g.op("Shape", x, end=1), g.ints(18), axis=0))
    order = np.random.default_rng(0).permutation(18).reshape(3, 6)
    for positions, part in zip(order, parts, strict=True):
        last = g.op("ScatterElements", last, expanded(g, positions, part), part, axis=1)
    g.output(last, "batch", 18)
    assert types(g.model(), {"x": random((5, 6))}) == ["Relu", "Neg", "Exp", "Concat", "Gather"]


def test_along_the_channels_of_an_image() -> None:
    g = G(18)
    x = g.input("x", "batch", 4, 5, 5)
    y = g.op("Relu", x)
    shape = g.op("Shape", x)
    last = g.op("ConstantOfShape", g.op("Concat", g.op("Shape", x, end=1), g.ints(8, 5, 5), axis=0))
    for positions, part in ((np.array([6, 0, 1, 7]), x), (np.array([2, 3, 5, 4]), y)):
        index = g.op("Expand", ints(g, positions.reshape(4, 1, 1)), shape)
        last = g.op("ScatterElements", last, index, part, axis=1)
    g.output(last, "batch", 8, 5, 5)
    assert types(g.model(), {"x": random((2, 4, 5, 5))}) == ["Relu", "Concat", "Gather"]


# -- ScatterND, as torch.export writes it ------------------------------------------------------------------------------


def by_rows(*, moved: bool = True, cancelled: bool = False, batch: bool = True, read: bool = False) -> onnx.ModelProto:
    """Each scatter between two Transposes; ``cancelled``: those in the middle are gone already."""
    g = G(18)
    x = g.input("x", "batch" if batch else 2, 3, N)
    t = g.op("MatMul", x, g.const(WP))
    s = g.op("MatMul", t, g.const(C))
    there, back = ([2, 0, 1], [1, 2, 0]) if moved else ([0, 1, 2], [0, 1, 2])
    held = g.op("Expand", g.const(0.0), g.op("Concat", g.op("Shape", x, end=2), g.ints(M), axis=0))
    for index, (positions, part) in enumerate(((KEPT, t), (REST, s))):
        if index == 0 or not cancelled:
            held = g.op("Transpose", held, perm=there)
        rows = g.op("Concat", g.ints(len(positions)), g.op("Shape", held, start=1), axis=0)
        written = g.op("Expand", g.op("Transpose", part, perm=there), rows)
        held = g.op("ScatterND", held, g.op("Unsqueeze", ints(g, positions), g.ints(1)), written)
        if index == 1 or not cancelled:
            if read and index == 1:
                g.output(g.op("Abs", held), M, "batch" if batch else 2, 3)
            held = g.op("Transpose", held, perm=back)
    g.output(held, "batch" if batch else 2, 3, M)
    return g.model()


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_scatters_of_rows(cancelled: bool, batch: bool) -> None:
    feeds = [{"x": random((size, 3, N))} for size in ((2, 1) if batch else (2,))]
    assert types(by_rows(cancelled=cancelled, batch=batch), *feeds) == ["MatMul", "MatMul", "Concat", "Gather"]


def test_scatters_of_rows_that_something_else_reads() -> None:
    found = types(by_rows(read=True), {"x": random((2, 3, N))})
    assert found == ["MatMul", "MatMul", "Concat", "Gather", "Transpose", "Abs", "Transpose"]


def test_scatters_of_rows_as_they_are() -> None:
    g = G(18)
    x = g.input("x", 4, 3)
    held = g.const(np.zeros((10, 3)))
    held = g.op("ScatterND", held, ints(g, KEPT[:, None]), x)
    y = g.op("MatMul", g.const(random((6, 4))), x)
    g.output(g.op("ScatterND", held, ints(g, REST[:, None]), y), 10, 3)
    assert types(g.model(), {"x": random((4, 3))}) == ["MatMul", "Concat", "Gather"]


# -- what has to stay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: pivot(rest=np.array([0, 2, 3, 6, 7, 9])), "two scatters write to one place"),
        (lambda: pivot(rest=np.array([0, 2, 3, 6, 7, 7])), "names a place twice"),
        (lambda: pivot(into=lambda g, x: zeros(g, x, M + 1)), "1 places of 11 are not written"),
        (lambda: pivot(into=lambda g, x: g.input("held", "batch", "length", M)), "may be larger"),
        (lambda: pivot(into=lambda g, x: g.input("held", "rows", 3, M)), "may be larger"),
        (lambda: pivot(into=lambda g, x: g.input("held", "batch", 3, "m")), "the size of the axis is not known"),
        (lambda: pivot(reduction="add"), "the scatter combines (add)"),
        (lambda: pivot(extra=lambda g, first: g.output(g.op("Abs", first), "batch", 3, M)), "read elsewhere"),
        (lambda: pivot(extra=lambda g, first: g.output(first, "batch", 3, M)), "read elsewhere"),
    ],
)
def test_look_alikes(model: Callable[[], onnx.ModelProto], told: str) -> None:
    assert told in refusal(model())


def test_indices_that_differ_along_another_axis() -> None:
    def index(g: G, positions: np.ndarray, like: str) -> str:
        rows = np.stack([positions, positions[::-1], positions])
        return g.op("Expand", ints(g, rows), g.op("Shape", like))

    assert "differ along another axis" in refusal(pivot(index=index))


def test_indices_that_are_an_input() -> None:
    g = G(18)
    x = g.input("x", "batch", 4)
    indices = g.input("indices", "batch", 4, dtype=onnx.TensorProto.INT64)
    held = g.op("ScatterElements", g.const(np.zeros((2, 8))), indices, x, axis=1)
    g.output(g.op("ScatterElements", held, indices, x, axis=1), 2, 8)
    assert "the indices are not constant" in refusal(g.model())


def test_a_larger_tensor_shows_what_it_held() -> None:
    """The proof above is needed: this one computes something else with Concat."""
    model = pivot(into=lambda g, x: g.input("held", "rows", 3, M))
    feeds = {"x": random((2, 3, N)), "held": random((4, 3, M))}
    assert run_ort(model, feeds)[0].shape == (4, 3, M)


def test_another_axis_in_between() -> None:
    g = G(18)
    x = g.input("x", 4, 4)
    held = g.op("ScatterElements", g.const(np.zeros((4, 8))), ints(g, np.tile(np.arange(4), (4, 1))), x, axis=1)
    held = g.op(
        "ScatterElements", held, ints(g, np.tile(np.arange(4)[:, None], (1, 8))), g.op("Tile", x, g.ints(1, 2)), axis=0
    )
    g.output(g.op("ScatterElements", held, ints(g, np.tile(np.arange(4, 8), (4, 1))), x, axis=1), 4, 8)
    found, records = run_pass(g.model(), ImportPivot)
    assert records[0].kept == 0
    assert len([n for n in found.graph if n.op_type == "ScatterElements"]) == 3


def test_what_is_written_over_a_complete_pivot_form() -> None:
    g = G(18)
    x = g.input("x", 4, 3)
    held = g.op("ScatterND", g.const(np.zeros((10, 3))), ints(g, KEPT[:, None]), x)
    held = g.op("ScatterND", held, ints(g, REST[:, None]), g.op("MatMul", g.const(random((6, 4))), x))
    g.output(g.op("ScatterND", held, ints(g, [[2], [4]]), g.const(np.ones((2, 3)))), 10, 3)
    assert types(g.model(), {"x": random((4, 3))}) == ["MatMul", "Concat", "Gather", "ScatterND"]


def test_a_lone_scatter_is_no_near_miss() -> None:
    g = G(18)
    x = g.input("x", 2, 3)
    g.output(g.op("ScatterElements", g.const(np.zeros((2, 8))), ints(g, [[0, 1, 5], [0, 1, 5]]), x, axis=1), 2, 8)
    assert refusal(g.model()) == ""


def test_in_a_body() -> None:
    model = pivot()
    graph = model.graph
    outputs = [helper.make_tensor_value_info(o.name, o.type.tensor_type.elem_type, None) for o in graph.output]
    body = helper.make_graph(graph.node, "then", [], outputs, graph.initializer)
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    other = helper.make_graph(
        [helper.make_node("Identity", ["zero"], ["none"])],
        "else",
        [],
        [helper.make_tensor_value_info("none", 1, None)],
        [zero],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=other)
    inputs = [helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []), *graph.input]
    outer = helper.make_graph([node], "outer", inputs, [helper.make_tensor_value_info("y", 1, None)])
    whole = helper.make_model(outer, opset_imports=model.opset_import, ir_version=10)
    after, records = run_pass(whole, ImportPivot)
    assert_same_bits(whole, after, {"c": np.array(True), "x": random((2, 3, N))})
    assert records[0].kept == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exporter", "opset"), [("torchscript", 13), ("torchscript", 17), ("dynamo", 18), ("dynamo", 20)]
)
def test_official_modules_as_exported(tmp_path: Path, exporter: str, opset: int) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from tests.models.lowrank import LOOK_ALIKES, SPELLINGS, export

    scattered = ["pifa", "pifa_rows", "pifa_bias_parts", "pifa_bias_after"]
    if exporter == "dynamo":
        scattered.append("pifa_index_put")  # torchscript writes 129 nodes that name each element
    entries = {entry.name: entry for entry in (*SPELLINGS, *LOOK_ALIKES)}
    chosen = [entries[name] for name in scattered]
    model = onnx.load(export(chosen, exporter, opset, tmp_path))  # type: ignore[arg-type]
    after, records = run_pass(model, ImportPivot)
    assert records[0].kept == len(scattered), reasons(records)
    names = {node.op_type for node in after.graph}
    assert not names & {"ScatterElements", "ScatterND"}
    feeds = {
        f"{entry.name}.x{i}": value.numpy()
        for entry in chosen
        for i, value in enumerate(entry.draw(7, batch=2, length=4))
    }
    assert_same_bits(model, after, feeds)
    overlapping = onnx.load(export(entries["pifa_overlapping"], exporter, opset, tmp_path))  # type: ignore[arg-type]
    assert run_pass(overlapping, ImportPivot)[1][0].kept == 0


# ---- GatherND --------------------------------------------------------------------------------------------------------


def gathered(
    *, perm: str | None, back: str | None, indices: str, shape: str = "2,3,6", batch: int = 0, read: bool = False
) -> str:
    """x[..., idx] as torch.export writes it; perm and back are left out where they are None."""
    first = f"m = Transpose <perm = [{perm}]> (x)" if perm else "m = Identity (x)"
    last = f"y = Transpose <perm = [{back}]> (g)" if back else "y = Identity (g)"
    more = "z = Neg (g)" if read else ""
    outputs = "float[] y" + (", float[] z" if read else "")
    rank = shape.count(",") + 1
    dims = ",".join(["?"] * rank)
    return f"""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[{shape}] x) => ({outputs.replace("[]", f"[{dims}]")})
        <int64[{indices.count(",") + 1},1] i = {{{indices}}}>
        {{
            {first}
            g = GatherND <batch_dims = {batch}> (m, i)
            {last}
            {more}
        }}
    """


@pytest.mark.parametrize("indices", ["5,0,3,1", "5,4,3,2,1,0", "0,0,-1", "2"])
@pytest.mark.parametrize(("perm", "back"), [("2,0,1", "1,2,0"), ("2,1,0", "2,1,0"), ("1,0,2", "1,0,2")])
def test_gather_between_transposes(perm: str, back: str, indices: str) -> None:
    before = gathered(perm=perm, back=back, indices=indices, shape="6,6,6")
    after, records = run_pass(before, ImportPivot)
    assert applications(records) == 1
    assert op_types(after) == ["Gather"]
    assert_same_bits(before, after, {"x": np.random.default_rng(0).standard_normal((6, 6, 6)).astype(np.float32)})


@pytest.mark.parametrize(
    ("perm", "back", "read", "ops"),
    [
        (None, None, False, ["Identity", "Gather", "Identity"]),
        ("2,0,1", None, False, ["Transpose", "Gather", "Identity"]),
        ("2,0,1", "2,0,1", False, ["Transpose", "Gather", "Transpose"]),
        (None, "1,2,0", False, ["Identity", "Gather", "Transpose"]),
        ("2,0,1", "1,2,0", True, ["Transpose", "Gather", "Transpose", "Neg"]),
    ],
)
def test_gather_where_it_stands(perm: str | None, back: str | None, read: bool, ops: list[str]) -> None:
    before = gathered(perm=perm, back=back, indices="1,0", shape="6,6,6", read=read)
    after, _ = run_pass(before, ImportPivot)
    assert op_types(after) == ops
    assert_same_bits(before, after, {"x": np.random.default_rng(0).standard_normal((6, 6, 6)).astype(np.float32)})


def test_gather_of_each_batch_stays() -> None:
    before = gathered(perm=None, back=None, indices="1,0", shape="2,3,6", batch=1)
    after, records = run_pass(before, ImportPivot)
    assert not applications(records) and "GatherND" in op_types(after)


def test_gather_of_places_of_two_axes_stays() -> None:
    before = """
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[2,3,6] x) => (float[2,6] y) <int64[2,2] i = {0, 1, 1, 2}> { y = GatherND (x, i) }
    """
    after, records = run_pass(before, ImportPivot)
    assert not applications(records) and op_types(after) == ["GatherND"]


def test_gather_of_places_that_are_computed_stays() -> None:
    before = """
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[2,3,6] x, int64[2,1] i) => (float[2,3,6] y) { y = GatherND (x, i) }
    """
    after, records = run_pass(before, ImportPivot)
    assert not applications(records) and op_types(after) == ["GatherND"]


# ---- an index for every axis -----------------------------------------------------------------------------------------


def every_axis(
    *,
    axis: int = 2,
    kept: np.ndarray = KEPT,
    start: float = 0,
    step: float = 1,
    of: int | None = None,
    other: bool = False,
    twisted: bool = False,
    expand: bool = True,
    larger: bool = False,
) -> onnx.ModelProto:
    """Two ScatterND that name every axis, as TorchScript writes index_put; the flags spoil what they say."""
    g = G(18)
    shape: list[int | str] = ["batch", 3, "length"]
    shape[axis] = 0
    x = g.input("x", "batch", 3, "length", 5)
    first = g.op("Shape", x)
    dims = []
    for place in range(3):
        index = g.const(np.array(place, np.int64))
        dims.append(g.ints(M) if place == axis else g.op("Unsqueeze", g.op("Gather", first, index), g.ints(0)))
    if larger:
        dims[0] = g.op("Add", dims[0], g.ints(1))
    tensor = g.op("ConstantOfShape", g.op("Concat", *dims, axis=0))
    data = tensor
    for name, places in (("t", kept), ("s", REST)):
        shape[axis] = len(places)
        part = g.input(name, *shape)
        of_whom = tensor if other else data
        columns, sizes = [], g.op("Shape", part)
        for place in range(3):
            behind = [1] * (2 - place)
            if place == axis:
                column = g.ints(*places)
                column = g.op("Reshape", column, g.ints(-1, *(behind[1:] if twisted else behind)))
            else:
                whose = place if of is None else of
                limit = g.op("Gather", g.op("Shape", of_whom), g.const(np.array(whose, np.int64)))
                limit = g.op("Cast", limit, to=7)
                numbers = [g.const(np.array(number, np.int64)) for number in (start, step)]
                column = g.op("Reshape", g.op("Range", numbers[0], limit, numbers[1]), g.ints(-1, *behind))
            if expand:
                column = g.op("Expand", column, sizes)
            columns.append(g.op("Unsqueeze", column, g.ints(-1)))
        data = g.op("ScatterND", data, g.op("Concat", *columns, axis=-1), g.op("Reshape", part, sizes))
    g.output(data, None, None, None)
    return g.model()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_index_for_every_axis(axis: int) -> None:
    before = every_axis(axis=axis)
    after, records = run_pass(before, ImportPivot)
    assert applications(records) == 1 and {"Concat", "Gather"} == set(op_types(after))
    for batch, length in ((2, 4), (1, 1), (0, 3)):
        sizes = [batch, 3, length]
        feed = {"x": random((*sizes, 5))}
        for seed, (name, places) in enumerate((("t", KEPT), ("s", REST))):
            sizes[axis] = len(places)
            feed[name] = random(sizes, seed=seed)
        assert_same_bits(before, after, feed)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"start": 1},
        {"step": 2},
        {"of": 1},
        {"other": True},
        {"twisted": True, "axis": 1},
        {"larger": True},
        {"kept": np.array([1, 4, 5, 8])},
    ],
    ids=lambda spoilt: "-".join(spoilt),
)
def test_an_index_for_every_axis_that_does_not_name_all_of_it(spoilt: dict[str, object]) -> None:
    before = every_axis(**spoilt)  # type: ignore[arg-type]
    after, records = run_pass(before, ImportPivot)
    assert not applications(records)
    assert op_types(after).count("ScatterND") == 2
