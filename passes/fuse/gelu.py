"""Gelu, written out by exporters with Erf or Tanh, as one operator."""

from __future__ import annotations

import math

import onnx_ir as ir

from graphopt import graphs
from graphopt.matching import close, import_domain, made_by, split_scalar, used_once
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage

Polynomial = dict[int, float]

_ERF: Polynomial = {1: math.sqrt(0.5)}
_TANH: Polynomial = {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715}
_DEPTH = 8


class FuseGelu(RulePass):
    """Turns x/2 (1 + erf(x/sqrt 2)), or its approximation with tanh, into Gelu."""

    name = "fuse-gelu"
    kind = Kind.ROUNDING
    stage = Stage.FUSE
    explanation = Explanation(
        matches="0.5 x (1 + erf(x / sqrt 2)) and 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), factors in any "
        "order and grouping, the powers of x spelled with Pow or Mul",
        refuses="other constants (erf(x / 2), x * sigmoid(1.702 x)); a scalar whose rank would add axes to x; an "
        "intermediate value that something else reads; a target that runs no form of Gelu at the model's "
        "opset: Gelu of the standard needs opset 20, before that com.microsoft's is used where the target "
        "runs it and the data is float32",
        costs="linear in the nodes; saves four to eight passes over the data",
        source="Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415; ONNX operator Gelu-20",
    )
    roots = ("Erf", "Tanh")

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        inner = node.outputs[0]
        one_plus = graphs.sole_consumer(inner)
        if one_plus is None or one_plus.op_type != "Add" or one_plus.domain != "":
            return False
        addend = split_scalar(one_plus)
        if addend is None or addend[0] is not inner or addend[1] != 1.0:
            return False
        found = _product_above(one_plus.outputs[0])
        if found is None:
            ctx.refuse(
                node, "1 + erf or tanh is not multiplied by x and one half, or an intermediate value is read elsewhere"
            )
            return False
        x, root = found
        end = root.producer()
        if end is None or end.graph is not node.graph:
            ctx.refuse(
                node, "the product stands in another graph: a body must not repeat what is computed once around it"
            )
            return False
        # The argument is a polynomial in x: that covers every spelling of the cube and every grouping of the constants.
        argument = node.inputs[0]
        assert argument is not None
        polynomial = _polynomial(argument, x, _DEPTH)
        wanted = _ERF if node.op_type == "Erf" else _TANH
        dtype = x.dtype
        if (
            polynomial is None
            or polynomial.keys() != wanted.keys()
            or not all(close(polynomial[power], wanted[power], dtype) for power in wanted)
        ):
            ctx.refuse(node, f"the argument is not that of Gelu: coefficients {polynomial}, not {wanted}")
            return False
        return self._write(node, root, x, ctx)

    def _write(self, node: ir.Node, root: ir.Value, x: ir.Value, ctx: Context) -> bool:
        attributes = {} if node.op_type == "Erf" else {"approximate": "tanh"}
        gelu = ctx.node("Gelu", [x], attributes, like=root)
        if ctx.target.supports(gelu, ctx.opset):
            return ctx.replace({root: gelu.outputs[0]}, [gelu], rule=node.op_type.lower())
        graphs.detach(gelu)
        name = "Gelu" if node.op_type == "Erf" else "FastGelu"
        contrib = ctx.node(name, [x], like=root, domain="com.microsoft")
        if not ctx.target.supports(contrib, 1) or x.dtype is not ir.DataType.FLOAT:
            graphs.detach(contrib)
            dtype = "a type not known" if x.dtype is None else x.dtype.name.lower()
            ctx.refuse(node, f"no Gelu on {ctx.target.name} at opset {ctx.opset} for {dtype}")
            return False
        owner = node.graph
        if not ctx.replace({root: contrib.outputs[0]}, [contrib], rule=node.op_type.lower()):
            return False
        import_domain(ctx.model, owner, "com.microsoft")
        return True


def _product_above(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """From 1 + erf(...): the x in x * 0.5 * value, and the last value of that product.

    The product is followed upwards while its values are read once. Each step contributes a number or the x, and the
    other operand of a step may itself be x times a number.
    """
    factor, x = 1.0, None
    current = value
    while True:
        step = graphs.sole_consumer(current)
        if step is None or step.domain != "" or step.op_type not in ("Mul", "Div"):
            return None
        if step.op_type == "Div":
            if step.inputs[0] is not current or (scalar := split_scalar(step)) is None or scalar[1] == 0:
                return None
            factor /= scalar[1]
        elif (scalar := split_scalar(step)) is not None and scalar[0] is current:
            factor *= scalar[1]
        elif x is None:
            other = step.inputs[1] if step.inputs[0] is current else step.inputs[0]
            if other is None or other is current:
                return None
            scale, x = _scaled(other) if close(factor, 1.0, ir.DataType.FLOAT) else (1.0, other)
            factor *= scale
        else:
            return None
        current = step.outputs[0]
        # A power of two in every dtype: no tolerance is needed.
        if x is not None and factor == 0.5:
            return x, current


def _scaled(value: ir.Value) -> tuple[float, ir.Value]:
    """A value as a number times another value, where it is one half of it and nothing else reads the half."""
    node = made_by(value, "Mul", "Div")
    if node is None or not used_once(value):
        return 1.0, value
    scalar = split_scalar(node)
    if scalar is None:
        return 1.0, value
    if node.op_type == "Mul" and scalar[1] == 0.5:
        return 0.5, scalar[0]
    if node.op_type == "Div" and scalar[0] is node.inputs[0] and scalar[1] == 2.0:
        return 0.5, scalar[0]
    return 1.0, value


def _polynomial(value: ir.Value, x: ir.Value, depth: int) -> Polynomial | None:
    """The coefficients of a value as a polynomial in x, where Add, Sub, Mul, Div and Pow with numbers make it one."""
    if value is x:
        return {1: 1.0}
    node = made_by(value, "Add", "Sub", "Mul", "Div", "Pow")
    if node is None or depth == 0:
        return None
    left, right = node.inputs
    if left is None or right is None:
        return None
    if node.op_type == "Pow":
        base = _polynomial(left, x, depth - 1)
        exponent = split_scalar(node)
        if base is None or exponent is None or exponent[0] is not left or exponent[1] not in (2.0, 3.0):
            return None
        result = base
        for _ in range(int(exponent[1]) - 1):
            result = _times(result, base)
        return result
    operands: list[Polynomial | None] = []
    scalar = split_scalar(node)
    for operand in (left, right):
        if scalar is not None and operand is not scalar[0]:
            operands.append({0: scalar[1]})
        else:
            operands.append(_polynomial(operand, x, depth - 1))
    one, other = operands
    if one is None or other is None:
        return None
    if node.op_type == "Mul":
        return _times(one, other)
    if node.op_type == "Div":
        if set(other) != {0} or other[0] == 0:
            return None
        return {power: c / other[0] for power, c in one.items()}
    sign = 1.0 if node.op_type == "Add" else -1.0
    return {p: one.get(p, 0.0) + sign * other.get(p, 0.0) for p in one.keys() | other.keys()}


def _times(one: Polynomial, other: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for p, a in one.items():
        for q, b in other.items():
            product[p + q] = product.get(p + q, 0.0) + a * b
    return product
