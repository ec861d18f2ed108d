"""``bisect``: the one wrong application among many, in few runs, and the first tensor that differs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import bisecting
from graphopt.cli.output import to_plain
from graphopt.errors import BadInput, GraphoptError
from graphopt.rewrite import Context, Kind, Pass
from tests.rewrite.toys import model, register, rule


def long_model(folder: Path, length: int = 240) -> Path:
    """A chain that keeps its numbers in range: each step an Abs, every tenth a Tanh."""
    steps = " ".join(f"v{i + 1} = {'Tanh' if i % 10 == 9 else 'Neg'}(v{i})" for i in range(length))
    ir.save(model(f"g (float[N,8] x) => (float[N,8] v{length}) {{ v0 = Neg(x) {steps} }}"), folder / "m.onnx")
    return folder / "m.onnx"


def with_mistake(where: str | None) -> type[Pass]:
    """A pass that writes every node anew, wrongly at one place."""

    def rewrite(node: ir.Node, ctx: Context) -> bool:
        if "graphopt.pass" in node.metadata_props:
            return False
        op = "Sin" if node.outputs[0].name == where else node.op_type
        new = ctx.node(op, node.inputs, like=node.outputs[0])
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="again", certain=True)

    return rule(rewrite, name="again", kind=Kind.ROUNDING)


@pytest.mark.parametrize("seed", range(6))
def test_the_culprit_is_found_in_few_runs(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = random.Random(seed).randrange(240)
    settings = register(monkeypatch, with_mistake(f"v{number}"))
    culprit = graphopt.bisect(long_model(tmp_path), recipe=(), settings=settings)
    assert culprit is not None
    assert culprit.application.key == f"again:again@v{number}"
    assert (culprit.number, culprit.applications) == (number + 1, 241)
    assert culprit.tensor == f"v{number}"
    assert culprit.tensor_max_abs > 0
    assert "from the float64 result" in culprit.reason
    assert culprit.runs <= 12
    assert json.loads(json.dumps(to_plain(culprit)))["application"]["rule"] == "again"


@pytest.mark.parametrize("number", [0, 240])
def test_the_first_and_the_last_are_found(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    culprit = graphopt.bisect(
        long_model(tmp_path), recipe=(), settings=register(monkeypatch, with_mistake(f"v{number}"))
    )
    assert culprit is not None
    assert culprit.number == number + 1


def test_nothing_wrong_nothing_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = register(monkeypatch, with_mistake(None))
    source = long_model(tmp_path, 20)
    before = source.read_bytes()
    assert graphopt.bisect(source, recipe=(), settings=settings) is None
    assert graphopt.bisect(source) is None
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert source.read_bytes() == before


def test_conditions_are_the_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = register(monkeypatch, with_mistake("v7"))
    source = long_model(tmp_path, 20)
    assert graphopt.bisect(source, recipe=(), settings=settings, fail_if=["max_abs>100"]) is None
    culprit = graphopt.bisect(source, recipe=(), settings=settings, fail_if=["max_abs>100", "max_abs>1e-4"])
    assert culprit is not None
    assert culprit.application.key == "again:again@v7"
    assert culprit.reason.startswith("max_abs>1e-4 holds: max_abs is ")


def test_a_model_that_fails_as_it_is_cannot_be_bisected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = long_model(tmp_path, 20)
    with pytest.raises(GraphoptError, match="the unchanged model fails too") as caught:
        graphopt.bisect(source, recipe=(), settings=register(monkeypatch, with_mistake("v7")), fail_if=["max_abs>=0"])
    assert "give a --fail-if that the unchanged model passes" in str(caught.value)
    assert "\n" not in str(caught.value)


def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime whose optimizations move every output by 1e-3."""
    run = bisecting.run_file

    def moved(*arguments: Any, deployed: bool) -> list[dict[str, Any]] | None:
        results = run(*arguments, deployed=deployed)
        if results is None or not deployed:
            return results
        return [{name: array + np.float32(1e-3) for name, array in case.items()} for case in results]

    monkeypatch.setattr(bisecting, "run_file", moved)


def test_a_tolerance_below_what_the_runtimes_optimizations_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no rewrite's fault: with them off the culprit is found, or none is."""
    noisy(monkeypatch)
    source = long_model(tmp_path, 20)
    wrong = register(monkeypatch, with_mistake("v7"))
    culprit = graphopt.bisect(source, recipe=(), settings=wrong, fail_if=["max_abs>1e-4"])
    assert culprit is not None
    assert culprit.application.key == "again:again@v7"
    assert culprit.reason.endswith("with the runtime's optimizations off (on, they alone break the tolerance)")
    right = register(monkeypatch, with_mistake(None))
    with pytest.raises(GraphoptError) as caught:
        graphopt.bisect(source, recipe=(), settings=right, fail_if=["max_abs>1e-4"])
    line = str(caught.value)
    assert "no rewrite is to blame: the unchanged model breaks the tolerance as well: max_abs>1e-4 holds" in line
    assert "give a --fail-if above that" in line
    assert "\n" not in line
    assert graphopt.bisect(source, recipe=(), settings=right, fail_if=["max_abs>1e-2"]) is None


def test_the_first_tensor_is_the_one_in_the_originals_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong value has a reader that hides it; another shows it only at the end."""
    made = model("g (float[N,8] x) => (float[N,8] y) { a = Neg(x) b = Mul(a, a) c = Neg(b) d = Add(c, a) y = Exp(d) }")
    ir.save(made, tmp_path / "m.onnx")
    culprit = graphopt.bisect(tmp_path / "m.onnx", recipe=(), settings=register(monkeypatch, with_mistake_at_a()))
    assert culprit is not None
    assert culprit.tensor == "a"


def with_mistake_at_a() -> type[Pass]:
    def rewrite(node: ir.Node, ctx: Context) -> bool:
        if node.outputs[0].name != "a" or node.op_type != "Neg":
            return False
        new = ctx.node("Identity", node.inputs, like=node.outputs[0])
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="sign", certain=True)

    return rule(rewrite, name="sign", kind=Kind.BITWISE)


def test_bad_options_are_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bisecting, "reference_of", lambda plan: pytest.fail("something ran"))
    source = long_model(tmp_path, 4)
    with pytest.raises(BadInput, match="no recipe 'saef'"):
        graphopt.bisect(source, recipe=("saef",))
    with pytest.raises(BadInput, match="cannot read --fail-if nonsense"):
        graphopt.bisect(source, fail_if=["nonsense"])
    with pytest.raises(BadInput, match="no pass"):
        graphopt.bisect(source, settings=["nothing.enabled=true"])
