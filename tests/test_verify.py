"""``verify``: do two models compute the same?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.cli.output import to_plain
from graphopt.errors import BadInput
from tests import models
from tests.rewrite.toys import model

NET = "g (float[N,8] x) => (float[N,8] y, float[N,8] z) { a = Neg(x) y = Softmax(a) z = Exp(a) }"


def write(text: str, path: Path) -> Path:
    ir.save(model(text), path)
    return path


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return write(NET, tmp_path / "a.onnx")


@pytest.mark.parametrize("name", [*models.RUNNABLE, *models.OPAQUE])
def test_a_model_is_itself(name: str, tmp_path: Path) -> None:
    ir.save({**models.RUNNABLE, **models.OPAQUE}[name](), tmp_path / "m.onnx")
    report = graphopt.verify(tmp_path / "m.onnx", tmp_path / "m.onnx", bitwise=True)
    assert report.passed, report.reason
    assert report.reason == ""
    assert report.verification.verdict == "passed"
    assert report.verification.cases >= 1


def test_what_differs_is_named(a: Path, tmp_path: Path) -> None:
    b = write(NET.replace("Softmax(a)", "Softmax<axis = 0>(a)"), tmp_path / "b.onnx")
    report = graphopt.verify(a, b)
    assert not report.passed
    assert report.reason.startswith("output y, case ")
    assert report.verification.verdict == "failed"
    assert len(report.differences) >= 2
    assert not any("output z" in line for line in report.differences)
    plain = json.loads(json.dumps(to_plain(report)))
    assert plain["passed"] is False
    assert plain["verification"]["max_abs"] > 0


def test_rounding_is_the_same_and_bits_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((8, 8)).astype(np.float32), "v": rng.standard_normal((8, 8)).astype(np.float32)}
    one = "g (float[N,8] x) => (float[N,8] y) { a = MatMul(x, w) y = MatMul(a, v) }"
    ir.save(model(one, weights=weights), tmp_path / "a.onnx")
    product = {"wv": weights["w"] @ weights["v"]}
    ir.save(model("g (float[N,8] x) => (float[N,8] y) { y = MatMul(x, wv) }", weights=product), tmp_path / "b.onnx")
    assert graphopt.verify(tmp_path / "a.onnx", tmp_path / "b.onnx").passed
    report = graphopt.verify(tmp_path / "a.onnx", tmp_path / "b.onnx", bitwise=True)
    assert not report.passed
    assert "bits differ" in report.reason


def test_conditions_replace_the_rounding_rule(a: Path, tmp_path: Path) -> None:
    longer = NET.replace("y = S", "k = Constant<value = float {1.01}>() h = Mul(a, k) y = S")
    b = write(longer.replace("Exp(a)", "Exp(h)"), tmp_path / "b.onnx")
    assert not graphopt.verify(a, b).passed
    assert graphopt.verify(a, b, fail_if=["max_rel>2"]).passed
    report = graphopt.verify(a, b, fail_if=["max_rel>2", "max_rel>1e-4"])
    assert not report.passed
    assert report.reason == "max_rel>1e-4 holds"


def test_nothing_to_tell_them_apart_is_not_the_same(tmp_path: Path) -> None:
    a = write("g (float[N,4] x) => (float[N,4] y) { y = Sub(x, x) }", tmp_path / "a.onnx")
    report = graphopt.verify(a, a)
    assert not report.passed
    assert report.reason.startswith("vacuous")


def test_real_inputs_are_used(a: Path, tmp_path: Path) -> None:
    """The two differ for negative numbers alone."""
    a = write("g (float[N,4] x) => (float[N,4] y) { i = Abs(x) y = Exp(i) }", tmp_path / "a.onnx")
    b = write("g (float[N,4] x) => (float[N,4] y) { y = Exp(x) }", tmp_path / "b.onnx")
    assert not graphopt.verify(a, b).passed
    np.savez(tmp_path / "data.npz", x=np.abs(np.random.default_rng(0).standard_normal((3, 4))).astype(np.float32))
    report = graphopt.verify(a, b, calibration=tmp_path / "data.npz")
    assert report.passed
    assert report.verification.coverage["feeds"] == "calibration"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NET.replace("float[N,8] x)", "float[N,8] x2)").replace("Neg(x)", "Neg(x2)"), "has no input 'x' (it has: x2)"),
        (NET.replace("y, float[N,8] z)", "y, float[N,8] z2)").replace("z =", "z2 ="), "has no output 'z'"),
        (NET.replace("float[N", "double[N"), "input 'x' is DOUBLE, the other model has FLOAT"),
        (NET.replace("x)", "x, float[N,8] x2)", 1), "takes a further input 'x2'"),
    ],
)
def test_other_inputs_or_outputs_cannot_be_compared(a: Path, tmp_path: Path, text: str, message: str) -> None:
    b = write(text, tmp_path / "b.onnx")
    with pytest.raises(BadInput) as caught:
        graphopt.verify(a, b)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(b))


def test_further_outputs_do_no_harm(a: Path, tmp_path: Path) -> None:
    b = write(NET.replace("(float[N,8] y,", "(float[N,8] a, float[N,8] y,"), tmp_path / "b.onnx")
    assert graphopt.verify(a, b).passed
