"""What the tests of channel classes share: small networks from text, and relabelling every free class of one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.channels import ChannelClass, Group, channel_classes, relabel, rescale
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.shapes import infer_shapes
from graphopt.targets import load_target
from graphopt.verification.structure import check_structure, interface_of
from tests.passes.common import run_ort


class Nothing(Pass):
    """Lets a test call ``ctx.replace``."""

    name, kind, stage = "nothing", Kind.ROUNDING, Stage.FACTORIZE
    explanation = Explanation(matches="", refuses="", costs="", source="")

    def apply(self, ctx: Context) -> None:
        pass


def context(model: ir.Model) -> Context:
    """A context in which a test may replace."""
    ctx = Context(model, load_target("onnxruntime"))
    ctx.running(Nothing())
    return ctx


def network(
    text: str, opset: int = 20, seed: int = 0, extra: Mapping[str, np.ndarray] | None = None, **weights: tuple[int, ...]
) -> ir.Model:
    """A model from ``(inputs) => (outputs) { nodes }`` and the shapes of its weights, which get seeded random values.

    A weight whose name begins with ``pos`` is positive. ``extra`` gives constants with their values.
    """
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g {text}')
    rng = np.random.default_rng(seed)
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        array = np.abs(array) + np.float32(0.5) if name.startswith("pos") else array
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for name, array in (extra or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    infer_shapes(model)
    return model


def feeds_of(model: ir.Model, seed: int = 1) -> dict[str, np.ndarray]:
    """Seeded inputs: unknown axes are of 3, integers are indices below 4, booleans random."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None and value.name is not None
        shape = [axis if isinstance(axis, int) else 3 for axis in value.shape]
        if value.dtype == ir.DataType.BOOL:
            feeds[value.name] = rng.integers(0, 2, shape).astype(bool)
        elif value.dtype.is_integer():
            feeds[value.name] = rng.integers(0, 4, shape).astype(value.dtype.numpy())
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(value.dtype.numpy())
    return feeds


def assert_close(before: ir.Model, after: ir.Model, feeds: Mapping[str, np.ndarray], what: str = "") -> None:
    """Both models give the same but for rounding."""
    for expected, found in zip(run_ort(before, feeds), run_ort(after, feeds), strict=True):
        assert expected.shape == found.shape
        if expected.dtype.kind != "f":
            np.testing.assert_array_equal(expected, found, err_msg=what)
            continue
        assert np.isfinite(expected).all()
        scale = max(1e-3, float(np.abs(expected).max()))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4 * scale, err_msg=what)


def apply_random(model: ir.Model, number: int, group: Group, seed: int = 0) -> ir.Model:
    """A copy of a model whose free class of a number was relabelled at random."""
    copy = model.clone()
    infer_shapes(copy)
    cls = free(copy, group)[number]
    rng = np.random.default_rng(seed)
    ctx = context(copy)
    if group is Group.PERMUTATION:
        order = rng.permutation(cls.size)
        while np.array_equal(order, np.arange(cls.size)):
            order = rng.permutation(cls.size)
        done = relabel(ctx, cls, order, rule="test", certain=True)
    else:
        done = rescale(ctx, cls, np.exp(rng.uniform(-1, 1, cls.size)), rule="test", certain=True)
    # Not done, and no reason: nothing that the class is in is read in the end.
    assert done or not ctx.near_misses, ctx.near_misses
    assert check_structure(copy, interface_of(model)) == []
    return copy


def free(model: ir.Model, group: Group = Group.PERMUTATION) -> list[ChannelClass]:
    """The free classes of a model."""
    return [cls for cls in channel_classes(model, group).classes if cls.free]


def sizes(model: ir.Model, group: Group = Group.PERMUTATION) -> list[int]:
    """The sizes of the free classes, in order of size."""
    return sorted(cls.size for cls in free(model, group))


def check_free(model: ir.Model, seed: int = 0) -> int:
    """Every free class of permutations and of scales leaves the outputs as they are. Returns how many there are."""
    feeds = feeds_of(model)
    count = 0
    for group in (Group.PERMUTATION, Group.SCALE):
        for number, cls in enumerate(free(model, group)):
            what = f"{group} of {[(s.value.name, s.axis, s.offset, s.outer, s.inner, s.inverse) for s in cls.slots]}"
            assert_close(model, apply_random(model, number, group, seed), feeds, what)
            count += 1
    return count
