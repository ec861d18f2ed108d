"""What the graph alone proves to be the same, and what it must not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.verification.proofs import Proofs
from tests.rewrite.toys import model, value


def are_same(made: ir.Model, a: str, b: str) -> bool:
    return Proofs().are_same(value(made, a), value(made, b))


HEAD = "g (float[N,4] x, float[4] set, bool flag) => (float[N,4] y)"


@pytest.mark.parametrize(
    ("nodes", "proved"),
    [
        ("a = Identity(x) b = Identity(a)", True),
        ("i = Identity(x) a = Neg(i) b = Neg(x)", True),
        ("a = Neg(x) b = Neg(x)", True),
        ("a = Neg(x) b = Abs(x)", False),
        ("k = Abs(x) a = Neg(k) b = Neg(x)", False),
        ("a = Sub(x, set) b = Sub(set, x)", False),
        ("a = Softmax<axis = 1>(x) b = Softmax<axis = 1>(x)", True),
        ("a = Softmax<axis = 1>(x) b = Softmax<axis = 0>(x)", False),
        ("a = Softmax<axis = 1>(x) b = Softmax(x)", False),
        ("a = LeakyRelu<alpha = 0.0>(x) b = LeakyRelu<alpha = -0.0>(x)", False),
        ("a = RandomNormalLike(x) b = RandomNormalLike(x)", False),
        ("a, m = Dropout(x) b, n = Dropout(x)", False),
        ("a, o = Split<num_outputs = 2>(x) p, b = Split<num_outputs = 2>(x)", False),
        ("a, o = Split<num_outputs = 2>(x) b, p = Split<num_outputs = 2>(x)", True),
        ("a = Clip(x, lo) b = Clip(x, , lo)", False),
        ("a = com.example.Op(x) b = com.example.Op(x)", False),
    ],
)
def test_two_nodes(nodes: str, proved: bool) -> None:
    made = model(f"{HEAD} <float lo = {{0}}> {{ {nodes} y = Add(a, b) }}")
    assert are_same(made, "a", "b") is proved
    assert are_same(made, "b", "a") is proved


def test_what_was_proved_proves_what_builds_on_it() -> None:
    made = model(f"{HEAD} {{ a = Neg(x) b = Neg(x) c = Abs(a) d = Abs(b) e = Exp(c) f = Exp(d) y = Add(e, f) }}")
    proofs = Proofs()
    pairs = ("e", "f"), ("c", "d")
    assert not any(proofs.are_same(value(made, left), value(made, right)) for left, right in pairs)
    assert all(proofs.are_same(value(made, le), value(made, ri)) for le, ri in (("a", "b"), ("c", "d"), ("e", "f")))


def test_constants_are_the_same_where_they_are_one_tensor_that_no_caller_sets() -> None:
    made = model(f"{HEAD} {{ y = Add(x, set) }}")
    tensor = ir.tensor(np.ones(4, np.float32))
    values = [ir.Value(name=name, const_value=tensor) for name in ("v", "w")]
    for one in values:
        made.graph.register_initializer(one)
    given = value(made, "set")
    given.const_value = tensor
    made.graph.register_initializer(given)
    assert Proofs().are_same(values[0], values[1])
    assert not Proofs().are_same(values[0], given)
