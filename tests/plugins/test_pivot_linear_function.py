"""The bodies of PivotLinear on ONNX Runtime: every signature, type and opset against the definition in float64."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from graphopt.errors import BadInput
from graphopt.plugins.pivot_linear import Signature, attach, column_form, function, pivot_linear, row_form
from tests.passes.common import run_ort

Array = npt.NDArray[Any]

OPSETS = range(13, 25)
N, M, R, B = 7, 9, 4, 3
TYPES = {
    ir.DataType.FLOAT: (np.float32, 1e-6),
    ir.DataType.FLOAT16: (np.float16, 4e-3),
    ir.DataType.BFLOAT16: (ml_dtypes.bfloat16, 3e-2),
    ir.DataType.DOUBLE: (np.float64, 1e-14),
}
RUNS = {
    (type_, spatial)
    for type_ in TYPES
    for spatial in (0, 1, 2)
    # ONNX Runtime's CPU has no product of bfloat16, and convolutions of float and float16 only.
    if type_ is not ir.DataType.BFLOAT16 and (spatial == 0 or type_ is not ir.DataType.DOUBLE)
}
LAYOUTS = [(-1, 0), (-2, 0), (1, 1), (1, 2)]
STRIDED = (("dilations", (1, 2)), ("pads", (1, 0, 1, 2)), ("strides", (2, 1)))


class Case:
    """One node with inputs for all that its signature reads."""

    def __init__(self, signature: Signature, type_: ir.DataType = ir.DataType.FLOAT, kernel: int = 1) -> None:
        self.signature, self.type = signature, type_
        spatial = signature.spatial
        rng = np.random.default_rng(1)
        rows = signature.form == "row"
        window, ones = (kernel,) * spatial, (1,) * spatial
        shapes = {
            "kept": (R, N, *window) if rows else (M, R, *window),
            "coefficients": (M - R, R, *ones) if rows else (R, N - R, *ones),
        }
        x_shape = {0: (2, N, B) if signature.axis == -2 else (2, B, N)}.get(spatial, (2, N, *(6,) * spatial))
        shapes |= {"X": x_shape}
        if signature.bias:
            shapes["bias"] = (M,)
        dtype = TYPES[type_][0]
        self.feeds: dict[str, Array] = {
            name: np.asarray(rng.standard_normal(shape).astype(dtype)) for name, shape in shapes.items()
        }
        self.order = rng.permutation(M if rows else N) if signature.order else np.arange(M if rows else N)
        if signature.order:
            self.feeds["order"] = self.order

    def model(self) -> ir.Model:
        values = {
            name: ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.INT64 if name == "order" else self.type),
                shape=ir.Shape(array.shape),
            )
            for name, array in self.feeds.items()
        }
        inputs = [values.get(name) for name in ("X", "kept", "coefficients", "bias", "order")]
        y = ir.Value(type=ir.TensorType(self.type), shape=ir.Shape([None] * self.feeds["X"].ndim))
        node = pivot_linear(self.signature, *inputs, like=y)  # type: ignore[arg-type]
        node.outputs[0].name = "Y"
        graph = ir.Graph(
            list(values.values()), node.outputs, nodes=[node], opset_imports={"": self.signature.opset}, name="g"
        )
        model = ir.Model(graph, ir_version=8)
        assert attach(model) == 1
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        return model

    def expected(self) -> Array:
        """By definition, for kernels of one element."""
        feeds = {name: array.astype(np.float64) for name, array in self.feeds.items()}
        axis = self.signature.axis
        x = np.moveaxis(feeds["X"], axis, -1)
        kept, coefficients = (feeds[name].reshape(feeds[name].shape[:2]) for name in ("kept", "coefficients"))
        # The definition says where each row goes; the node, where each comes from.
        if self.signature.form == "row":
            made = row_form(x, kept, coefficients, np.argsort(self.order), feeds.get("bias"))
        else:
            made = column_form(x, kept, coefficients, self.order, feeds.get("bias"))
        return np.moveaxis(made, -1, axis)

    def check(self, expected: Array) -> None:
        (found,) = run_ort(self.model(), self.feeds)
        dtype, tolerance = TYPES[self.type]
        assert found.dtype == dtype and found.shape == expected.shape
        assert np.abs(found.astype(np.float64) - expected).max() <= tolerance * np.abs(expected).max()


def signatures(opset: int) -> list[Signature]:
    return [
        Signature(opset, form, axis, spatial, bias, order)  # type: ignore[arg-type]
        for form, (axis, spatial), bias, order in itertools.product(
            ("row", "column"), LAYOUTS, (False, True), (False, True)
        )
    ]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("type_", TYPES, ids=lambda type_: type_.name.lower())
def test_every_signature(type_: ir.DataType, opset: int) -> None:
    ran = 0
    for signature in signatures(opset):
        case = Case(signature, type_)
        if (type_, signature.spatial) in RUNS:
            case.check(case.expected())
            ran += 1
        else:
            with pytest.raises(Exception, match=r"Could not find an implementation|has unsupported type"):
                run_ort(case.model(), case.feeds)
    assert ran == {ir.DataType.BFLOAT16: 0, ir.DataType.DOUBLE: 16}.get(type_, 32)


def windows(
    x: Array, kernel: int, strides: tuple[int, ...], pads: tuple[int, ...], dilations: tuple[int, ...]
) -> Array:
    """What each position of a two-dimensional convolution sees: (batch, rows, columns, channels, kernel, kernel)."""
    padded = np.pad(x, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    sizes = [(kernel - 1) * d + 1 for d in dilations]
    seen = np.lib.stride_tricks.sliding_window_view(padded, sizes, (2, 3))
    seen = seen[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    return np.moveaxis(seen, 1, 3)


@pytest.mark.parametrize("form", ["row", "column"])
@pytest.mark.parametrize("convolution", [(), STRIDED, (("auto_pad", "VALID"),)], ids=["plain", "strided", "auto_pad"])
def test_a_kernel(form: str, convolution: tuple[tuple[str, object], ...]) -> None:
    signature = Signature(17, form, 1, 2, True, True, convolution)  # type: ignore[arg-type]
    case = Case(signature, kernel=3)
    told: dict[str, Any] = {"strides": (1, 1), "pads": (0,) * 4, "dilations": (1, 1)} | dict(convolution)
    told.pop("auto_pad", None)
    feeds = {name: array.astype(np.float64) for name, array in case.feeds.items()}
    seen = windows(feeds["X"], 3, **told)
    coefficients = feeds["coefficients"][..., 0, 0]
    expected = np.zeros((*seen.shape[:3], M)) + feeds["bias"]
    for place in itertools.product(range(3), repeat=2):
        at, kept = seen[(..., *place)], feeds["kept"][(..., *place)]
        if form == "row":
            expected += row_form(at, kept, coefficients, np.argsort(case.order))
        else:
            expected += column_form(at, kept, coefficients, case.order)
    case.check(np.moveaxis(expected, -1, 1))


def test_a_body_for_each_signature() -> None:
    names = [signature.overload for opset in OPSETS for signature in signatures(opset)]
    assert len(set(names)) == len(names)
    assert Signature(17, "row", -1, bias=True).overload == "row_axism1_opset17_bias"
    assert Signature(17, "row", 1, 2, convolution=STRIDED).overload.endswith("dilations1x2_pads1x0x1x2_strides2x1")


def test_a_body_reads_what_its_signature_says() -> None:
    body = function(Signature(17, "row", -1))
    assert [value.name for value in body.inputs] == ["X", "kept", "coefficients"]
    body = function(Signature(17, "row", -1, order=True))
    assert [value.name for value in body.inputs] == ["X", "kept", "coefficients", "bias", "order"]
    assert not body.inputs[3].uses()


def test_nodes_of_one_signature_share_a_body_and_those_that_nobody_needs_go() -> None:
    model = Case(Signature(17, "row", -1)).model()
    (node,) = model.graph
    more = pivot_linear(Signature(17, "row", -1), *node.inputs, like=node.outputs[0])  # type: ignore[arg-type]
    other = pivot_linear(Signature(17, "row", -1), *node.inputs, like=node.outputs[0])  # type: ignore[arg-type]
    model.graph.extend([more, other])
    assert attach(model) == 1 and len(model.functions) == 1
    model.graph.remove([node, more, other], safe=False)
    assert attach(model) == 0 and not model.functions


def test_a_model_that_got_another_opset_gets_other_bodies() -> None:
    model = Case(Signature(17, "column", -1)).model()
    model.graph.opset_imports[""] = 21
    assert attach(model) == 1
    ((key, body),) = model.functions.items()
    assert body.opset_imports == {"": 21} and key[2].startswith("column_axism1_opset21")
    assert next(iter(model.graph)).overload == key[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((12, "row", -1), "needs opset 13"),
        ((17, "rows", -1), "no form"),
        ((17, "row", 0), "no channel axis"),
        ((17, "row", -1, 2), "no channel axis"),
        ((17, "row", 1, 0), "no channel axis"),
        ((17, "row", -1, 0, False, False, STRIDED), "for convolutions"),
    ],
)
def test_signatures_that_are_none(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Signature(*arguments)


@pytest.mark.parametrize("what", ["inputs", "axes", "form", "refers"])
def test_nodes_that_have_no_signature(what: str) -> None:
    model = Case(Signature(17, "row", -1)).model()
    (node,) = model.graph
    if what == "inputs":
        node.replace_input_with(2, None)
    elif what == "axes":
        node.inputs[1].shape = None  # type: ignore[union-attr]
    elif what == "form":
        del node.attributes["form"]
    else:
        node.attributes["axis"] = ir.RefAttr("axis", "axis", ir.AttributeType.INT)
    with pytest.raises(BadInput):
        attach(model)
