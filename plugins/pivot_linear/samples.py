"""What a machine with a GPU checks PivotLinear by: launches of its kernels, and a small model that takes the plugin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from graphopt.kernels.sample import Sample, draw, off_of_sum
from graphopt.plugins.pivot_linear.function import Form
from graphopt.plugins.pivot_linear.kernels import FORMS, positions_of
from graphopt.plugins.pivot_linear.reference import column_form, row_form

Array = npt.NDArray[Any]

# Channels that are not pivoted, the rank, channels that are: nothing is a multiple of anything; whole vectors and
# tiles; one of each.
_SMALL = ((24, 5, 13), (1, 1, 2), (40, 17, 50))
_LARGE = ((200, 96, 264), (512, 256, 512), (1000, 333, 777))
_FEW, _ALL, _MOST = ((1,), (3,)), ((), (1,), (2, 3), (16,), (17,), (0,), (65,)), ((1,), (16,), (65,))


def samples(types: Sequence[str], *, small: bool = False) -> Iterator[Sample]:
    """Launches for one combination of types.

    Args:
        types: As the plugin declares them.
        small: Few and little ones.
    """
    launches = [(sizes, leading) for sizes in _SMALL for leading in (_FEW if small else _ALL)]
    if not small:
        launches += [(sizes, leading) for sizes in _LARGE for leading in _MOST]
    for form in FORMS:
        for sizes, leading in launches:
            yield sample(form, types[0], leading, sizes)


def sample(form: Form, dtype: str, leading: Sequence[int], sizes: tuple[int, int, int], *, seed: int = 0) -> Sample:
    """One launch, of normal numbers.

    Args:
        form: ``row`` or ``column``.
        dtype: Of all but the positions.
        leading: The leading axes of x; their product is the rows.
        sizes: Channels that are not pivoted, the rank, channels that are.
        seed: Of what is drawn.
    """
    rng = np.random.default_rng([seed, *sizes, len(leading)])
    plain, rank, pivoted = sizes
    row = form == "row"
    x = draw(rng, (*leading, plain if row else pivoted), dtype)
    kept = draw(rng, (rank, plain) if row else (plain, rank), dtype)
    coefficients = draw(rng, (pivoted - rank, rank) if row else (rank, pivoted - rank), dtype)
    bias = draw(rng, (pivoted if row else plain,), dtype)
    positions = positions_of(rng.permutation(pivoted), form, pivoted)
    wide = [array.astype(np.float64) for array in (x, kept, coefficients, bias)]
    y = (row_form if row else column_form)(wide[0], wide[1], wide[2], positions, wide[3])
    inner = _inner(form, wide, positions)
    y_off, inner_off = _off(form, dtype, [np.abs(array) for array in wide], positions)
    at = "x".join(map(str, leading)) or "no leading axes"
    return Sample(
        label=f"{form} {at}, {plain}, {rank}, {pivoted}",
        inputs=(x, kept, coefficients, bias, positions),
        dtypes=(dtype, dtype),
        wanted=(y, inner),
        off=(y_off, inner_off),
        attributes={"form": np.array([FORMS.index(form)], np.int64)},
    )


def _inner(form: Form, wide: Sequence[Array], positions: Array) -> Array:
    x, kept, coefficients, _ = wide
    if form == "row":
        return np.asarray(x @ kept.T)
    ordered, rank = x[..., positions], kept.shape[1]
    return np.asarray(ordered[..., :rank] + ordered[..., rank:] @ coefficients.T)


def _off(form: Form, dtype: str, magnitudes: Sequence[Array], positions: Array) -> tuple[Array, Array]:
    """How far y and inner may be off; what inner is off by goes through the second product."""
    x, kept, coefficients, bias = magnitudes
    if form == "column":
        rank = kept.shape[1]
        ordered = x[..., positions]
        inner = ordered[..., :rank] + ordered[..., rank:] @ coefficients.T
        inner_off = off_of_sum(inner, x.shape[-1] - rank + 1, dtype)
        return off_of_sum((inner + inner_off) @ kept.T + bias, rank + 1, dtype, inner_off @ kept.T), inner_off
    rank = kept.shape[0]
    pivots = x @ kept.T
    inner_off = off_of_sum(pivots, x.shape[-1], dtype)
    first, second = positions[:rank], positions[rank:]
    y_off = np.empty((*x.shape[:-1], len(bias)))
    y_off[..., first] = off_of_sum(pivots + bias[first], x.shape[-1] + 1, dtype)
    others = (pivots + inner_off) @ coefficients.T + bias[second]
    y_off[..., second] = off_of_sum(others, rank + 1, dtype, inner_off @ coefficients.T)
    return y_off, inner_off


@dataclass(frozen=True)
class Example:
    """A model whose only layer the plugin runs.

    Attributes:
        model: Static, one input ``x``, one output ``y``.
        sample: What it computes; the output ``y`` is the first of the sample's.
    """

    model: onnx.ModelProto
    sample: Sample


_TENSOR_TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT}


def example(dtype: str, form: Literal["row", "column"], *, rows: int = 4, small: bool = False) -> Example:
    """A pivot form in standard operators, as the passes write it.

    Args:
        dtype: Of x and the weights.
        form: Which.
        rows: Of x.
        small: A very small one.
    """
    made = sample(form, dtype, (rows,), (40, 17, 50) if small else (512, 256, 768))
    x, kept, coefficients, bias, positions = made.inputs
    kind, rank = _TENSOR_TYPES[dtype], int(kept.shape[0 if form == "row" else 1])
    constants = {"kept": kept.T, "coefficients": coefficients.T, "bias": bias}
    if form == "row":
        # Gather takes for each channel of y where it stands in [K x; C K x]: the inverse of where each of those goes.
        constants["order"] = np.argsort(positions).astype(np.int64)
        nodes = [
            helper.make_node("MatMul", ["x", "kept"], ["pivots"]),
            helper.make_node("MatMul", ["pivots", "coefficients"], ["others"]),
            helper.make_node("Concat", ["pivots", "others"], ["stacked"], axis=-1),
            helper.make_node("Gather", ["stacked", "order"], ["ordered"], axis=-1),
            helper.make_node("Add", ["ordered", "bias"], ["y"]),
        ]
    else:
        constants["order"] = positions.astype(np.int64)
        constants["sizes"] = np.array([rank, x.shape[-1] - rank], np.int64)
        nodes = [
            helper.make_node("Gather", ["x", "order"], ["ordered"], axis=-1),
            helper.make_node("Split", ["ordered", "sizes"], ["kept_channels", "other_channels"], axis=-1),
            helper.make_node("MatMul", ["other_channels", "coefficients"], ["brought"]),
            helper.make_node("Add", ["kept_channels", "brought"], ["inner"]),
            helper.make_node("MatMul", ["inner", "kept"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes,
        "pivot_form",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", kind, made.wanted[0].shape)],
        [_tensor(name, array) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Example(model, made)


def _tensor(name: str, array: Array) -> TensorProto:
    if array.dtype.name == "bfloat16":
        return helper.make_tensor(name, TensorProto.BFLOAT16, array.shape, array.tobytes(), raw=True)
    return onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
