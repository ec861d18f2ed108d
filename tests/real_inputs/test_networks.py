"""Every test network through recipe ``safe``: it gets no larger, and computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt import optimize
from tests.models import RUNNABLE, deep_chain, draw_feeds, dtypes, large_transformer, many_small_nodes
from tests.real_inputs.common import assert_close, interface, ops, optimize_and_compare, run

# float16 has three digits; int8 codes may round the other way where a value lies between two of them.
TOLERANCES = {"float16": 2e-3, "qdq_int8": 2e-2}
# Here the runtime quantises the activations too, in the original as well.
DEPLOYED_TOLERANCES = {"int4_weights": 1e-2}


@pytest.mark.parametrize("name", RUNNABLE)
def test_network(name: str, tmp_path: Path) -> None:
    model = RUNNABLE[name]()
    source = tmp_path / f"{name}.onnx"
    ir.save(model, source)
    cases = [draw_feeds(model, size=size, seed=seed) for seed, size in enumerate((3, 2, 5, 4))]
    rtol = TOLERANCES.get(name, 1e-5)
    report = optimize_and_compare(source, cases, rtol=rtol, deployed_rtol=DEPLOYED_TOLERANCES.get(name, rtol))
    assert report.output is not None
    assert report.output.nodes <= report.input.nodes


def test_overridable_weight_stays_overridable(tmp_path: Path) -> None:
    source = tmp_path / "overridable.onnx"
    ir.save(RUNNABLE["overridable_weight"](), source)
    out = tmp_path / "out.onnx"
    optimize(source, out)
    feeds = draw_feeds(ir.load(source))
    for scale in (0.0, 2.5):
        given = {**feeds, "scale": 0 * feeds["x"][0] + feeds["x"].dtype.type(scale)}
        (found,), (wanted,) = (run(path, given, optimized=False) for path in (out, source))
        assert_close(found, wanted, 1e-6)
        assert_close(found, feeds["x"] * feeds["x"].dtype.type(scale + 1), 1e-6)


def test_unknown_op_is_carried_through(tmp_path: Path) -> None:
    source = tmp_path / "unknown.onnx"
    ir.save(dtypes.unknown_op(), source)
    report = optimize(source)
    out = tmp_path / "unknown.opt.onnx"
    assert interface(out) == interface(source)
    assert ops(out).count("Mystery") == 1
    assert "Identity" not in ops(out)
    node = next(node for node in onnx.load(out).graph.node if node.op_type == "Mystery")
    assert node.domain == "com.example.private"
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {"strength": 2, "mode": b"soft"}
    assert report.verification.coverage["opaque"]


def test_bfloat16_is_verified_through_a_twin(tmp_path: Path) -> None:
    source = tmp_path / "bf16.onnx"
    ir.save(dtypes.bfloat16_compute(), source)
    report = optimize(source)
    assert report.verification.verdict == "passed"
    assert report.verification.coverage["twin"]
    weights = onnx.load(tmp_path / "bf16.opt.onnx").graph.initializer
    assert {weight.data_type for weight in weights} == {onnx.TensorProto.BFLOAT16}


@pytest.mark.parametrize(("build", "n"), [(many_small_nodes, 600), (deep_chain, 2500)])
def test_many_nodes(build: Callable[[int], ir.Model], n: int, tmp_path: Path) -> None:
    model = build(n)
    source = tmp_path / "many.onnx"
    ir.save(model, source)
    report = optimize_and_compare(source, [draw_feeds(model, size=size, seed=size) for size in (1, 4)])
    assert report.output is not None
    assert report.output.nodes < report.input.nodes


def test_external_weights(tmp_path: Path) -> None:
    source = large_transformer(tmp_path / "twin.onnx", layers=2, width=64, heads=4)
    cases = [{"ids": np.random.default_rng(n).integers(0, 2048, (n, 3 + n))} for n in (1, 2)]
    report = optimize_and_compare(source, cases)
    assert report.output is not None
    assert report.output.nodes < 0.7 * report.input.nodes
