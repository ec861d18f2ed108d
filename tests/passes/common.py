"""What the tests of passes share: run a pass on a model, run models on ONNX Runtime with its optimizations off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import graphs
from graphopt.rewrite import Context, Pass
from graphopt.rewrite.manager import PassRecord, run_passes
from graphopt.shapes import infer_shapes
from graphopt.targets import load_target
from graphopt.verification.structure import check_structure, interface_of

AnyModel = ir.Model | onnx.ModelProto | str


def to_ir(model: AnyModel) -> ir.Model:
    """A model of its own, from ONNX text, a proto or an IR model (which stays as it is)."""
    if isinstance(model, str):
        model = onnx.parser.parse_model(model)
    if isinstance(model, ir.Model):
        return model.clone()
    return ir.from_proto(model)


def run_pass(
    model: AnyModel,
    pass_class: type[Pass],
    *more: type[Pass],
    target: str = "onnxruntime",
    skip: Sequence[str] = (),
    limit: int | None = None,
    feeds: Sequence[Mapping[str, np.ndarray]] | None = None,
    **parameters: object,
) -> tuple[ir.Model, list[PassRecord]]:
    """Run one pass (or several) on a copy of a model until nothing changes.

    Fails where a pass raised, changed the interface or left a broken graph.

    Args:
        model: ONNX text, a proto or an IR model; left as it is.
        parameters: Of the first pass.

    Returns:
        The rewritten model, and one record a pass.
    """
    copy = to_ir(model)
    infer_shapes(copy)
    ctx = Context(copy, load_target(target), skip=skip, limit=limit, feeds=feeds)
    records = run_passes(ctx, [pass_class(parameters), *(cls() for cls in more)])
    assert [r.error for r in records if r.error] == []
    assert check_structure(copy, interface_of(to_ir(model))) == []
    return copy, records


def run_ort(model: AnyModel, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Every output of a model on ONNX Runtime's CPU, with its optimizations off."""
    from graphopt.runtime.session import create_session

    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    if isinstance(proto, str):
        proto = onnx.parser.parse_model(proto)
    session = create_session(proto.SerializeToString(), optimized=False, threads=1)
    outputs: list[np.ndarray] = session.run(None, dict(feeds))
    return outputs


def assert_same_bits(before: AnyModel, after: AnyModel, *feeds: Mapping[str, np.ndarray]) -> None:
    """Both models give the same dtypes, shapes and bits for every feed (any NaN is like any other)."""
    assert feeds, "nothing to compare"
    for feed in feeds:
        for expected, found in zip(run_ort(before, feed), run_ort(after, feed), strict=True):
            assert_same_array(expected, found)


def assert_same_array(expected: object, found: object) -> None:
    """The same dtype, shape and bits; lists (sequences) element by element."""
    if isinstance(expected, list):
        assert isinstance(found, list)
        for one, other in zip(expected, found, strict=True):
            assert_same_array(one, other)
        return
    if not isinstance(expected, np.ndarray) or not isinstance(found, np.ndarray):
        assert expected == found
        return
    assert expected.dtype == found.dtype
    assert expected.shape == found.shape
    if expected.dtype.kind in "fc":
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(found), nan)
        expected, found = np.where(nan, 0, expected), np.where(nan, 0, found)
        np.testing.assert_array_equal(np.signbit(expected.real), np.signbit(found.real))
    np.testing.assert_array_equal(expected, found)


def op_types(model: ir.Model, *, constants: bool = False) -> list[str]:
    """The operators of the main graph and its bodies in order, ``Constant`` left out unless asked for."""
    return [
        node.op_type
        for graph in graphs.nested_graphs(model.graph)
        for node in graph
        if constants or node.op_type != "Constant"
    ]


def applications(records: Sequence[PassRecord]) -> int:
    """How many replacements the passes made in all."""
    return sum(record.applications for record in records)
