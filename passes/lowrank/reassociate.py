"""A product of weights that a network computes at run time, as the chain of products that it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import graphs
from graphopt.matching import FLOATS, float_attribute, int_attribute, permutation, used_once
from graphopt.numerics.affine import all_finite
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.sites import Weight, weight_of
from graphopt.weights import computed

Array = npt.NDArray[Any]

_DEEPEST = 12
_MOST_FACTORS = 8
_MASK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class _Matrix:
    """A weight of two axes among the factors of a product.

    Attributes:
        weight: As it is stored.
        turned: Whether its transpose is meant.
        rows: Numbers that its rows are multiplied by, float64, or None.
        columns: The same of its columns.
    """

    weight: Weight
    turned: bool = False
    rows: Array | None = None
    columns: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.weight.shape
        return (second, first) if self.turned else (first, second)

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    def transposed(self) -> _Matrix:
        return replace(self, turned=not self.turned, rows=self.columns, columns=self.rows)

    def read(self, opset: int) -> Array:
        """The numbers, in float64."""
        array = self.weight.read(opset).astype(np.float64)
        array = array.T if self.turned else array
        if self.rows is not None:
            array = array * self.rows[:, None]
        return array if self.columns is None else array * self.columns[None, :]


_Factor = _Matrix | Array
"""A matrix, the diagonal of one (k,), or a number for the whole product ()."""


class _Refused(Exception):
    """A product of weights that has to stay as it is."""


class Reassociate(RulePass):
    """Turns x (A B), with weights A and B, into (x A) B where that holds fewer weights, and into x W where not.

    A module that computes its weight from factors in forward multiplies them anew in every run, and folding the
    product would leave one dense weight.
    """

    name = "reassociate"
    kind = Kind.ROUNDING
    stage = Stage.MERGE
    explanation = Explanation(
        matches="MatMul, Gemm or Einsum of an activation and a product of weights: MatMul, Gemm, Einsum, Transpose, and"
        " a diagonal between as Mul, Div, or Where with the identity matrix as mask, which goes into the smaller factor"
        " beside it; Einsum of the last axis of an activation and one weight",
        refuses="a product that something else reads or a caller gets; a sum with another weight; quantised factors;"
        " batches of matrices",
        costs="linear in the nodes; saves the product of the weights in every run. Factors that are multiplied because"
        " the result holds fewer weights are multiplied in float64, when the model is saved",
        source="associativity of matrix products; SST and factors that are multiplied in forward",
    )
    roots = ("MatMul", "Gemm", "Einsum")

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        if any(attribute.is_ref() for attribute in node.attributes.values()):
            return False
        if node.op_type == "Einsum":
            return self._einsum(node, ctx)
        for place in (1, 0):
            value, other = node.inputs[place], node.inputs[1 - place]
            if value is None or other is None or other.dtype not in FLOATS or graphs.is_constant(value):
                continue
            if node.op_type == "Gemm" and place == 0:
                continue
            try:
                factors = _factors(value, ctx.opset)
                if factors is None or weight_of(other) is not None or _is_product(other, ctx.opset):
                    continue
                matrices = _absorb(factors)
            except _Refused as refusal:
                ctx.refuse(node, str(refusal))
                continue
            if len(matrices) > 1 and _write(node, other, matrices, ctx, left=place == 0):
                return True
        return False

    def _einsum(self, node: ir.Node, ctx: Context) -> bool:
        try:
            found = _of_activation(node, ctx.opset)
            matrices = [] if found is None else _absorb(found[1])
        except _Refused as refusal:
            ctx.refuse(node, str(refusal))
            return False
        return found is not None and bool(matrices) and _write(node, found[0], matrices, ctx, left=False)


def _is_product(value: ir.Value, opset: int) -> bool:
    try:
        return _factors(value, opset) is not None
    except _Refused:
        return True


# -- reading -----------------------------------------------------------------------------------------------------------


def _factors(value: ir.Value | None, opset: int, depth: int = 0) -> list[_Factor] | None:
    """The factors of a product of weights, in order; None where it is none.

    Raises:
        _Refused: It is one, and has to stay.
    """
    if value is None or depth > _DEEPEST:
        return None
    weight = weight_of(value)
    if weight is not None:
        if len(weight.shape) != 2:
            return None
        if weight.quantised:
            raise _Refused("a factor is quantised")
        return [_Matrix(weight)]
    node = value.producer()
    if node is None or node.domain != "" or any(a.is_ref() for a in node.attributes.values()):
        return None
    read = _READERS.get(node.op_type)
    found = None if read is None else read(node, opset, depth + 1)
    if found is not None and len(found) > 1 and not used_once(value):
        raise _Refused("the product of weights is read elsewhere, or returned")
    if found is not None and len(found) > _MOST_FACTORS:
        raise _Refused(f"a product of {len(found)} weights")
    return found


def _of_matmul(node: ir.Node, opset: int, depth: int) -> list[_Factor] | None:
    left = _factors(node.inputs[0], opset, depth)
    right = None if left is None else _factors(node.inputs[1], opset, depth)
    return None if left is None or right is None else [*left, *right]


def _of_gemm(node: ir.Node, opset: int, depth: int) -> list[_Factor] | None:
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return None
    sides = []
    for place, name in ((0, "transA"), (1, "transB")):
        side = _factors(node.inputs[place], opset, depth)
        if side is None:
            return None
        sides += _transposed(side) if int_attribute(node, name, 0) else side
    alpha = float_attribute(node, "alpha", 1.0)
    return sides if alpha == 1.0 else [*sides, np.array(alpha, np.float64)]


def _of_transpose(node: ir.Node, opset: int, depth: int) -> list[_Factor] | None:
    if "perm" in node.attributes and permutation(node) != (1, 0):
        return None
    inner = _factors(node.inputs[0], opset, depth)
    return None if inner is None else _transposed(inner)


def _of_identity(node: ir.Node, opset: int, depth: int) -> list[_Factor] | None:
    return _factors(node.inputs[0], opset, depth)


def _of_scale(node: ir.Node, opset: int, depth: int) -> list[_Factor] | None:
    """A product times one number for each row or column, or for all."""
    left, right = node.inputs
    for value, other in ((left, right), (right, left)):
        scale = weight_of(other)
        if scale is None or scale.quantised or (node.op_type == "Div" and other is not right):
            continue
        inner = _factors(value, opset, depth)
        if inner is None:
            continue
        rows, columns = _size(inner)
        shape = (1,) * (2 - len(scale.shape)) + scale.shape
        if len(shape) != 2 or shape not in ((1, 1), (1, columns), (rows, 1)):
            continue
        numbers = scale.read(opset).astype(np.float64)
        if node.op_type == "Div":
            with np.errstate(divide="ignore"):
                numbers = 1.0 / numbers
        if not all_finite(numbers):
            raise _Refused("a scale is not finite")
        if numbers.size == 1:
            return [*inner, numbers.reshape(())]
        diagonal = numbers.reshape(-1)
        if len(inner) == 1 and isinstance(inner[0], _Matrix) and _is_identity(inner[0].weight, opset):
            return [diagonal]
        return [*inner, diagonal] if shape[0] == 1 else [diagonal, *inner]
    return None


def _of_where(node: ir.Node, opset: int, depth: int) -> list[_Factor] | None:
    """torch.diag: the vector where the mask is the identity matrix, zero elsewhere."""
    mask, vector, otherwise = node.inputs
    scale = weight_of(vector)
    if scale is None or graphs.scalar_of(otherwise) != 0.0 or len(scale.shape) > 2:
        return None
    array = graphs.constant_array(mask, limit=_MASK_ELEMENTS)
    size = int(np.prod(scale.shape))
    if array is None or array.shape != (size, size) or max(scale.shape, default=0) != size:
        return None
    if np.count_nonzero(array) != size or not array.diagonal().all():
        return None
    numbers = scale.read(opset).astype(np.float64).reshape(-1)
    if not all_finite(numbers):
        raise _Refused("a scale is not finite")
    return [numbers]


def _of_einsum(node: ir.Node, opset: int, depth: int) -> list[_Factor] | None:
    """``mk,k,kn->mn``: matrices and diagonals from one letter of the result to the other."""
    operands, result = _equation(node)
    if len(result) != 2 or result[0] == result[1]:
        return None
    return _path(operands, result[0], result[1], opset, depth)


_Operand = tuple[str, ir.Value | None]


def _equation(node: ir.Node) -> tuple[list[_Operand], str]:
    """The operands of an Einsum with their letters, and those of the result; "" where it is spelled otherwise."""
    terms, arrow, result = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    if not arrow or "." in terms or terms.count(",") != len(node.inputs) - 1:
        return [], ""
    return list(zip(terms.split(","), node.inputs, strict=True)), result


def _path(operands: list[_Operand], start: str, end: str, opset: int, depth: int) -> list[_Factor] | None:
    """The factors that lead from one letter to another, where that is all that the operands are."""
    chain: list[_Factor] = []
    letter, left = start, list(operands)
    while left:
        diagonal = next((o for o in left if o[0] == letter), None)
        if diagonal is not None:
            scale = weight_of(diagonal[1])
            if scale is None or len(scale.shape) != 1:
                return None
            chain.append(scale.read(opset).astype(np.float64))
            left.remove(diagonal)
            continue
        steps = [o for o in left if len(o[0]) == 2 and letter in o[0] and o[0][0] != o[0][1]]
        if len(steps) != 1 or letter == end:
            return None
        (term, value) = steps[0]
        inner = _factors(value, opset, depth)
        if inner is None:
            return None
        turned = term[1] == letter
        chain += _transposed(inner) if turned else inner
        letter = term[0] if turned else term[1]
        left.remove(steps[0])
    if letter != end or not all(all_finite(factor) for factor in chain if not isinstance(factor, _Matrix)):
        return None
    return chain


def _of_activation(node: ir.Node, opset: int) -> tuple[ir.Value, list[_Factor]] | None:
    """``bli,ri,or->blo``: the activation of an Einsum whose last axis is multiplied by weights, and the weights."""
    operands, result = _equation(node)
    active = [o for o in operands if weight_of(o[1]) is None and (o[1] is None or not _is_product(o[1], opset))]
    if len(active) != 1 or len(result) < 2 or len(set(result)) != len(result):
        return None
    (term, x) = active[0]
    others = [o for o in operands if o is not active[0]]
    if x is None or x.dtype not in FLOATS or term[:-1] != result[:-1] or term[-1] in result:
        return None
    if any(set(letters) & set(result[:-1]) for letters, _ in others):
        return None
    factors = _path(others, term[-1], result[-1], opset, 0)
    return None if factors is None else (x, factors)


_READERS = {
    "MatMul": _of_matmul,
    "Gemm": _of_gemm,
    "Transpose": _of_transpose,
    "Identity": _of_identity,
    "Mul": _of_scale,
    "Div": _of_scale,
    "Where": _of_where,
    "Einsum": _of_einsum,
}


def _transposed(factors: Sequence[_Factor]) -> list[_Factor]:
    return [factor.transposed() if isinstance(factor, _Matrix) else factor for factor in reversed(factors)]


def _size(factors: Sequence[_Factor]) -> tuple[int, int]:
    """Rows and columns of a product."""
    sizes = [
        factor.shape if isinstance(factor, _Matrix) else (len(factor), len(factor))
        for factor in factors
        if isinstance(factor, _Matrix) or factor.ndim == 1
    ]
    return (sizes[0][0], sizes[-1][1]) if sizes else (1, 1)


def _is_identity(weight: Weight, opset: int) -> bool:
    rows, columns = weight.shape
    if rows != columns or rows * columns > _MASK_ELEMENTS:
        return False
    array = weight.read(opset)
    return bool(np.count_nonzero(array) == rows and (array.diagonal() == 1).all())


def _absorb(factors: Sequence[_Factor]) -> list[_Matrix]:
    """Diagonals and numbers multiplied into the smallest matrix beside them. Empty where there is no matrix."""
    places = [index for index, factor in enumerate(factors) if isinstance(factor, _Matrix)]
    matrices: dict[int, _Matrix] = {index: f for index, f in enumerate(factors) if isinstance(f, _Matrix)}
    for index, factor in enumerate(factors):
        if isinstance(factor, _Matrix) or not places:
            continue
        if factor.ndim == 0:
            place = min(places, key=lambda i: matrices[i].elements)
            vector = np.full(matrices[place].shape[1], float(factor))
            behind = True
        else:
            before = max((i for i in places if i < index), default=None)
            after = min((i for i in places if i > index), default=None)
            place = min((i for i in (before, after) if i is not None), key=lambda i: matrices[i].elements)
            vector, behind = factor, place == before
        matrix = matrices[place]
        if behind:
            vector = vector if matrix.columns is None else matrix.columns * vector
            matrices[place] = replace(matrix, columns=vector)
        else:
            vector = vector if matrix.rows is None else matrix.rows * vector
            matrices[place] = replace(matrix, rows=vector)
    return [matrices[index] for index in places]


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(node: ir.Node, x: ir.Value, matrices: list[_Matrix], ctx: Context, *, left: bool) -> bool:
    if node.op_type == "Gemm" and int_attribute(node, "transB", 0):
        matrices = [matrix.transposed() for matrix in reversed(matrices)]
    groups = min(_groupings(matrices), key=lambda g: (sum(_elements(group) for group in g), len(g)))
    nodes: list[ir.Node] = []
    dtype = x.dtype
    assert dtype is not None  # it is a float type
    operands = [_operand(group, dtype, ctx, nodes) for group in groups]
    result = x
    for place, operand in enumerate(reversed(operands) if left else operands):
        last = place == len(operands) - 1
        like = node.outputs[0] if last else None
        if left:
            made = ctx.node("MatMul", [operand, result], like=like)
        elif node.op_type != "Gemm":
            made = ctx.node("MatMul", [result, operand], like=like)
        else:
            attributes: dict[str, object] = {"transA": 1} if place == 0 and int_attribute(node, "transA", 0) else {}
            if last:
                attributes |= {
                    key: node.attributes[key].as_float() for key in ("alpha", "beta") if key in node.attributes
                }
            made = ctx.node("Gemm", [result, operand, *(node.inputs[2:] if last else [])], attributes, like=like)
        if not last:
            made.outputs[0].type = node.outputs[0].type
            made.outputs[0].shape = _resized(node.outputs[0].shape, operand, left=left)
        nodes.append(made)
        result = made.outputs[0]
    # Certain: with no more elements there is no more to multiply by, and the product of the weights goes.
    rule = "factors" if len(operands) > 1 else "dense"
    return ctx.replace({node.outputs[0]: result}, nodes, rule=rule, certain=True)


def _resized(shape: ir.Shape | None, operand: ir.Value, *, left: bool) -> ir.Shape | None:
    """The shape between two products of a chain."""
    if shape is None or operand.shape is None or len(shape) < 2:
        return None
    place = -2 if left else -1
    sizes = list(shape)
    sizes[place] = operand.shape[place]
    return ir.Shape(sizes)


def _groupings(matrices: list[_Matrix]) -> Iterator[list[list[_Matrix]]]:
    """Every way to multiply neighbours beforehand."""
    if not matrices:
        yield []
        return
    for size in range(1, len(matrices) + 1):
        for rest in _groupings(matrices[size:]):
            yield [matrices[:size], *rest]


def _elements(group: list[_Matrix]) -> int:
    return group[0].shape[0] * group[-1].shape[1]


def _operand(group: list[_Matrix], dtype: ir.DataType, ctx: Context, nodes: list[ir.Node]) -> ir.Value:
    """A weight that is read as it is, or the product of several, computed when it is read."""
    first = group[0]
    if len(group) == 1 and first.rows is None and first.columns is None:
        if not first.turned:
            return first.weight.value
        if first.weight.shared:  # a copy would grow the file
            transpose = ctx.node("Transpose", [first.weight.value], {"perm": [1, 0]})
            made = transpose.outputs[0]
            made.type, made.shape = first.weight.value.type, ir.Shape(first.shape)
            nodes.append(transpose)
            return made
    opset = ctx.opset

    def compute() -> ir.TensorProtocol:
        product = group[0].read(opset)
        for matrix in group[1:]:
            product = product @ matrix.read(opset)
        return ir.tensor(np.ascontiguousarray(product.astype(dtype.numpy())))

    shape = (group[0].shape[0], group[-1].shape[1])
    name = "_".join(matrix.weight.root.name or "factor" for matrix in group)
    return ctx.constant(computed(compute, dtype, shape), name)
