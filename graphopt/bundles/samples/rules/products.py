"""Matrix products."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.bundles.samples.lift import Lift
from graphopt.bundles.samples.lifted import STACKED, Lifted
from graphopt.bundles.samples.rules.shared import integer, operand
from graphopt.bundles.samples.rules.table import rule
from graphopt.matching import float_attribute


@rule("MatMul")
def _matmul(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    left, right = operand(t, node, 0), operand(t, node, 1)
    place = _matmul_place(left, right)
    if place is not None:
        return t.same_results(node, [left.value, right.value], place)
    rank = max(left.rank, right.rank, 2)
    a, b = _matrices(t, left, rank, 0), _matrices(t, right, rank, 1)
    gone = [1 + rank - 2] * (left.rank == 1) + [1 + rank - 1] * (right.rank == 1)
    made = t.again(node, [a, b])[0]
    made.type = node.outputs[0].type
    return [t.result(node, t.squeeze(made, gone) if gone else made, STACKED)]


def _matmul_place(left: Lifted, right: Lifted) -> int | None:
    """Where the product has the samples if nothing is changed; None where something must be."""
    rank = max(left.rank, right.rank)
    if min(left.rank, right.rank) < 2 or STACKED in (left.place, right.place):
        return None
    ends = {v.place - v.rank for v in (left, right) if v.place is not None}
    if len(ends) != 1:
        return None
    end = ends.pop()
    if end <= -3:  # a batch of products: the other has it too, or has one
        return rank + end if all(v.padded(rank)[rank + end] == 1 for v in (left, right)) else None
    if (
        left.place is not None
        and right.place is None
        and end == -2
        and all(size == 1 for size in right.padded(rank)[:-2])
    ):
        return rank - 2  # rows of the product; the matrix is one
    return None


def _matrices(t: Lift, given: Lifted, rank: int, vector: int) -> ir.Value:
    """An operand as matrices under an axis of samples; a vector as a matrix of one row or of one column."""
    if given.rank == 1 and given.place is None:
        return t.unsqueeze(given.value, [vector])
    if given.place is None:
        return given.value
    if given.rank > 1:
        return t.stacked(given, rank)
    return t.unsqueeze(t.stacked(given), [*range(1, rank - 1), rank - 1 if vector == 0 else rank])


@rule("Gemm")
def _gemm(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    left, right = operand(t, node, 0), operand(t, node, 1)
    added = t.of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    across = integer(t, node, "transA", 0), integer(t, node, "transB", 0)
    rows = 1 if across[0] else 0
    if left.place is not None and right.place is None and left.is_one(rows):
        bias = _bias_of_rows(t, added)
        if added is None or bias is not None:
            return t.same_results(node, [t.along(left, rows), right.value, bias], 0)
    return [t.result(node, _written_out(t, node, left, right, added, across), STACKED)]


def _bias_of_rows(t: Lift, added: Lifted | None) -> ir.Value | None:
    """What is added to a row for each sample; None where it is none such."""
    if added is None:
        return None
    if added.place is None:
        return added.value if added.padded(2)[0] == 1 else None
    if added.rank < 2:
        return t.stacked(added, 1)
    return t.along(added, 0) if added.is_one(0) else None


def _written_out(
    t: Lift, node: ir.Node, left: Lifted, right: Lifted, added: Lifted | None, across: tuple[int, int]
) -> ir.Value:
    """The product and the sum apart."""
    sides = []
    for given, flipped in zip((left, right), across, strict=True):
        value = given.value if given.place is None else t.stacked(given)
        rank = given.rank + (given.place is not None)
        sides.append(t.transpose(value, [*range(rank - 2), rank - 1, rank - 2]) if flipped else value)
    product = _scaled(t, node, t.one("MatMul", sides), "alpha")
    if added is None:
        return product
    more = added.value if added.place is None else t.stacked(added, 2)
    return t.one("Add", [product, _scaled(t, node, more, "beta")])


def _scaled(t: Lift, node: ir.Node, value: ir.Value, name: str) -> ir.Value:
    factor = float_attribute(node, name, 1.0)
    kind = node.outputs[0].dtype
    if factor == 1.0 or factor is None or kind is None:
        return value
    return t.one("Mul", [value, t.of_array(np.array(factor, kind.numpy()))])


@rule("Einsum")
def _einsum(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    text = node.attributes["equation"].as_string().replace(" ", "")
    if "." in text or "->" not in text:
        t.refuse(f"its equation '{text}' does not name all axes")
    sources, result = text.split("->")
    terms = sources.split(",")
    given = [operand(t, node, index) for index in range(len(node.inputs))]
    letter = next(letter for letter in string.ascii_letters if letter not in text)
    marked = [term if value.place is None else letter + term for term, value in zip(terms, given, strict=True)]
    values = [value.value if value.place is None else t.stacked(value) for value in given]
    return t.same_results(node, values, STACKED, equation=f"{','.join(marked)}->{letter}{result}")
