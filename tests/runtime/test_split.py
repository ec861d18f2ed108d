"""What a session is given of a model in memory."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt import graphs
from graphopt.runtime.session import create_session, run
from graphopt.runtime.split import split_weights
from graphopt.shapes import infer_shapes
from tests.rewrite.toys import model, value

NET = """g (float[N,4] x, bool flag) => (float[N,4] y, float[1] k) <float[4,4] w> {
    a = MatMul(x, w)
    axes = Constant<value = int64[1] {0}>() half = Constant<value = float {0.5}>()
    u = Unsqueeze(half, axes) e = Exp(u)
    b = Mul(a, e)
    y = If(flag) <then_branch = t () => (float[N,4] p) { two = Constant<value = float {2.0}>() p = Mul(b, two) },
                  else_branch = f () => (float[N,4] q) { q = Sub(b, a) }>
    k = Constant<value = float[1] {3.0}>()
}"""


@pytest.fixture
def net() -> ir.Model:
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    made = model(NET.replace(" <float[4,4] w>", "", 1), weights={"w": weight})
    infer_shapes(made)
    return made


def parsed(made: ir.Model, **how: object) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    content, weights = split_weights(made, **how)  # type: ignore[arg-type]
    return onnx.ModelProto.FromString(content), weights


def test_constants_become_initializers_and_what_reads_them_alone_comes_first(net: ir.Model) -> None:
    proto, weights = parsed(net)
    assert weights == {}
    assert {tensor.name for tensor in proto.graph.initializer} == {"w", "axes", "half"}
    assert [node.output[0] for node in proto.graph.node] == ["u", "e", "k", "a", "b", "y"]
    assert not proto.graph.value_info
    (branch,) = (a.g for a in proto.graph.node[-1].attribute if a.name == "then_branch")
    assert [tensor.name for tensor in branch.initializer] == ["two"]


@pytest.mark.parametrize("threshold", [32, 1024])
@pytest.mark.parametrize("flag", [True, False])
def test_computes_what_the_model_computes(net: ir.Model, threshold: int, flag: bool) -> None:
    before = ir.to_proto(net).SerializeToString(deterministic=True)
    content, weights = split_weights(
        net, outputs=[value(net, "a"), value(net, "y"), value(net, "a")], threshold=threshold
    )
    assert set(weights) == ({"w"} if threshold == 32 else set())
    session = create_session(content, optimized=False, threads=1, initializers=weights)
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    found = run(session, {"x": x, "flag": np.array(flag)})
    assert list(found) == ["y", "k", "a"]
    w = graphs.constant_array(net.graph.initializers["w"])
    assert w is not None
    b = (x @ w) * np.exp(np.float32(0.5))
    np.testing.assert_allclose(found["a"], x @ w, rtol=1e-5)
    np.testing.assert_allclose(found["y"], b * 2 if flag else b - x @ w, rtol=1e-5)
    assert ir.to_proto(net).SerializeToString(deterministic=True) == before
