"""Which values are the same whatever is fed, by the graph alone: what ``Identity`` copies, and what is computed twice.

Half of what elimination passes do is of this kind, and a value that is returned to be compared costs the runtime as
much as a node that computes one.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graphs


class Proofs:
    """Remembers which values were found to be the same, to conclude from them what else is."""

    def __init__(self) -> None:
        self._same: dict[ir.Value, ir.Value] = {}

    def are_same(self, a: ir.Value, b: ir.Value) -> bool:
        """Whether two values are proved to be the same. False says nothing."""
        a, b = self._root(a), self._root(b)
        if a is b or _same_constant(a, b) or self._computed_alike(a, b):
            if a is not b:
                self._same[a] = b
            return True
        return False

    def _root(self, value: ir.Value) -> ir.Value:
        """Where a value comes from, behind what is known to be the same and every Identity."""
        while True:
            known = self._same.get(value)
            if known is None:
                producer = value.producer()
                if producer is None or producer.op_type != "Identity" or producer.domain:
                    return value
                known = producer.inputs[0]
                if known is None:
                    return value
            value = known

    def _computed_alike(self, a: ir.Value, b: ir.Value) -> bool:
        """Whether nodes of one kind compute both from the same."""
        p, q = a.producer(), b.producer()
        if p is None or q is None or a.index() != b.index() or p.op_type in graphs.RANDOM:
            return False
        kind = (p.op_type, p.domain, p.overload, len(p.inputs), len(p.outputs), len(p.attributes))
        if kind != (q.op_type, q.domain, q.overload, len(q.inputs), len(q.outputs), len(q.attributes)):
            return False
        # A function or custom operator may do anything; and which outputs are asked for may change the others.
        if p.domain or graphs.has_subgraphs(p):
            return False
        if any(
            (v is None or not v.name) != (w is None or not w.name) for v, w in zip(p.outputs, q.outputs, strict=True)
        ):
            return False
        return _same_attributes(p, q) and all(
            v is w if v is None or w is None else self._root(v) is self._root(w)
            for v, w in zip(p.inputs, q.inputs, strict=True)
        )


def _same_constant(a: ir.Value, b: ir.Value) -> bool:
    if a.const_value is None or a.const_value is not b.const_value:
        return False
    return graphs.is_constant(a) and graphs.is_constant(b)  # a caller may set a weight that is an input


_PLAIN = frozenset(
    {
        ir.AttributeType.INT,
        ir.AttributeType.INTS,
        ir.AttributeType.FLOAT,
        ir.AttributeType.FLOATS,
        ir.AttributeType.STRING,
        ir.AttributeType.STRINGS,
    }
)


def _same_attributes(p: ir.Node, q: ir.Node) -> bool:
    for name, one in p.attributes.items():
        other = q.attributes.get(name)
        if other is None or one.is_ref() or other.is_ref() or one.type is not other.type or one.type not in _PLAIN:
            return False
        if repr(one.value) != repr(other.value):  # 0.0 and -0.0 are not the same
            return False
    return True
