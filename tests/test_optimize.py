"""The main job end to end: files, gates, what is undone and why, determinism, the report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import checking, optimizing
from graphopt.cli.output import to_plain
from graphopt.errors import BadInput, GateFailed, GraphoptError
from graphopt.rewrite import Context, Kind, Pass, Stage
from tests import models
from tests.rewrite import toys
from tests.rewrite.toys import bypass, model, ops, register, rule, swap, whole
from tests.verification.test_shadow import once

NET = """g (float[N,8] x) => (float[N,8] y) <float[8,8] w> {
    i = Identity(x) m = MatMul(i, w) s = Sub(m, x) a = Abs(s) dead = Exp(a) k = Identity(a) y = Tanh(k)
}"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    return write(model(NET.replace(" <float[8,8] w>", ""), weights={"w": weight}), tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Calibration data for `net`."""
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32))
    return tmp_path / "data.npz"


def write(made: ir.Model, folder: Path, name: str = "m.onnx") -> Path:
    ir.save(made, folder / name)
    return folder / name


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by the hash of its bytes."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


WRONG = once(swap("Sub", "Sub", swap_inputs=True, name="wrong", kind=Kind.ROUNDING))


# -- where it is written -----------------------------------------------------------------------------------------------


def test_without_an_output_it_writes_beside_the_input(net: Path) -> None:
    before = net.read_bytes()
    report = graphopt.optimize(net)
    assert report.output is not None
    assert Path(report.output.path) == net.with_name("m.opt.onnx")
    assert net.with_name("m.opt.onnx").is_file()
    assert net.read_bytes() == before
    assert sorted(p.name for p in net.parent.iterdir()) == ["m.onnx", "m.opt.onnx"]
    assert graphopt.verify(net, net.with_name("m.opt.onnx")).passed


def test_one_name_stands_for_a_list_of_one(net: Path) -> None:
    report = graphopt.optimize(net, recipe="safe", settings="merge-duplicates.enabled=false", fail_if="cosine<0.9")
    assert report.recipe == ["safe"] and "merge-duplicates" not in {record.name for record in report.passes}
    assert graphopt.bisect(net, recipe="safe", fail_if="max_abs>1") is None
    assert graphopt.verify(net, net, fail_if="cosine<0.9").passed
    with pytest.raises(BadInput, match="no recipe 'lowrnk'"):
        graphopt.optimize(net, recipe="lowrnk")


def test_where_nothing_can_be_written_nothing_is_done(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizing, "run_attempt", None)
    with pytest.raises(BadInput, match="no such folder"):
        graphopt.optimize(net, net.parent / "missing" / "out.onnx")


def test_in_place(net: Path) -> None:
    copy = write(ir.load(net), net.parent, "copy.onnx")
    graphopt.optimize(net, net)
    assert "Identity" not in ops(ir.load(net))
    assert graphopt.verify(copy, net).passed
    assert sorted(p.name for p in net.parent.iterdir()) == ["copy.onnx", "m.onnx"]


def test_a_missing_folder_is_the_users_to_make(net: Path) -> None:
    before = contents(net.parent)
    with pytest.raises(BadInput) as caught:
        graphopt.optimize(net, net.parent / "nowhere" / "out.onnx")
    assert "nowhere" in str(caught.value)
    assert contents(net.parent) == before


def large(folder: Path) -> Path:
    """A model with external weights, one of which is used by an Identity alone."""
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((64, 64)).astype(np.float32) for n in ("w", "v")}
    nodes = "i = Identity(w) m = MatMul(x, i) d = MatMul(x, v) y = Tanh(m)"
    made = model(f"g (float[N,64] x) => (float[N,64] y) {{ {nodes} }}", weights=weights)
    ir.save(made, folder / "big.onnx", external_data="big.data")
    return folder / "big.onnx"


def test_facts_are_those_of_the_files(tmp_path: Path) -> None:
    source = large(tmp_path)
    report = graphopt.optimize(source)
    assert report.output is not None
    assert report.input.bytes == sum((tmp_path / n).stat().st_size for n in ("big.onnx", "big.data"))
    assert (report.input.nodes, report.input.parameters) == (4, 2 * 64 * 64)
    assert (report.output.nodes, report.output.parameters) == (2, 64 * 64)
    written = [p for p in tmp_path.iterdir() if p.name not in ("big.onnx", "big.data")]
    assert report.output.bytes == sum(p.stat().st_size for p in written)


def test_in_place_with_external_weights(tmp_path: Path) -> None:
    source = large(tmp_path)
    report = graphopt.optimize(source, source)
    assert report.output is not None
    assert len(ops(ir.load(source))) == 2
    x = np.ones((2, 64), np.float32)
    assert np.isfinite(graphopt.load(source).run({"x": x})["y"]).all()
    graphopt.optimize(source, source)
    np.testing.assert_array_equal(ops(ir.load(source)), ["MatMul", "Tanh"])


# -- what is wrong is undone -------------------------------------------------------------------------------------------


def test_only_what_is_wrong_is_undone(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = register(monkeypatch, WRONG)
    report = graphopt.optimize(net, settings=settings)
    assert list(report.undone) == ["wrong:Sub-to-Sub@s"]
    record = next(p for p in report.passes if p.name == "wrong")
    assert (record.applications, record.kept, record.undone) == (1, 0, 1)
    assert "1 undone: is " in record.reason
    assert "from the float64 result" in record.reason
    assert "Identity" not in ops(ir.load(net.with_name("m.opt.onnx")))
    assert graphopt.verify(net, net.with_name("m.opt.onnx")).passed


def test_many_wrong_places_take_one_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = " ".join(f"v{i + 1} = Sub(v{i}, x)" for i in range(40))
    source = write(model(f"g (float[N,4] x) => (float[N,4] v40) {{ v0 = Neg(x) {steps} }}"), tmp_path)
    runs: list[int] = []
    real = optimizing.run_attempt
    monkeypatch.setattr(optimizing, "run_attempt", lambda *a, **k: runs.append(1) or real(*a, **k))
    report = graphopt.optimize(source, recipe=(), settings=register(monkeypatch, WRONG))
    assert len(report.undone) == 40
    assert len(runs) == 2


LOOP = """g (float[4] x, int64 n) => (float[4] y) <bool yes = {1}> {
    l = Loop(n, yes, x) <body = b (int64 i, bool go, float[4] s) => (bool more, float[4] next) {
        more = Identity(go) k = Sub(s, x) q = Sub(k, s) next = Tanh(q) }>
    e = Identity(l) y = Exp(e)
}"""


def test_what_only_the_whole_model_shows_is_found_by_bisection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a Loop no value can be looked at: the result tells, and the one application is found and left out."""
    settings = register(
        monkeypatch, once(swap("Sub", "Sub", swap_inputs=True, where="k", name="wrong")),
        once(swap("Tanh", "Tanh", name="right", stage=Stage.FUSE)),
    )  # fmt: skip
    source = write(model(LOOP), tmp_path)
    report = graphopt.optimize(source, settings=settings)
    assert list(report.undone) == ["wrong:Sub-to-Sub@k"]
    assert next(p for p in report.passes if p.name == "right").kept == 1
    assert graphopt.verify(source, source.with_name("m.opt.onnx")).passed


def test_a_foreign_pass_that_is_wrong_is_left_out(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.rewrite.contract import ForeignPass

    class Foreign(ForeignPass):
        """Swaps the operands of every Sub by its own means."""

        name, kind, stage, explanation = "foreign", Kind.BITWISE, Stage.IMPORT, toys.EXPLANATION

        def rewrite_model(self, ctx: Context) -> bool:
            for node in ctx.model.graph:
                if node.op_type == "Sub":
                    node.op_type = "Add"
            return True

    report = graphopt.optimize(net, settings=register(monkeypatch, Foreign))
    assert list(report.undone) == ["foreign:foreign@model"]
    assert report.verification.verdict == "passed"


def test_what_differs_only_as_deployed_is_avoided_and_said_so(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime, its optimizations on, makes something else of one rewrite."""
    settings = register(monkeypatch, once(swap("Abs", "Abs", name="unlucky")))
    real = checking.run_file

    def miscompiled(path: Path, *args: Any, deployed: bool, session: Any = None) -> list[dict[str, Any]] | None:
        results = real(path, *args, deployed=deployed, session=session)
        if deployed and any("unlucky" in n.metadata_props.get("graphopt.pass", "") for n in ir.load(path).graph):
            assert results is not None
            return [{name: array + 1 for name, array in case.items()} for case in results]
        return results

    monkeypatch.setattr(checking, "run_file", miscompiled)
    report = graphopt.optimize(net, settings=settings)
    ((key, reason),) = report.undone.items()
    assert key == "unlucky:Abs-to-Abs@a"
    assert "only with the runtime's optimizations on" in reason
    assert report.verification.verdict == "passed"
    assert "Identity" not in ops(ir.load(net.with_name("m.opt.onnx")))


def test_a_difference_that_no_rewrite_makes_ends_the_run(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(net.parent)
    real = checking.run_file

    def broken(*args: Any, deployed: bool, session: Any = None) -> list[dict[str, Any]]:
        results = real(*args, deployed=deployed, session=session)
        assert results is not None
        return [{name: array + 1 for name, array in case.items()} for case in results]

    monkeypatch.setattr(checking, "run_file", broken)
    with pytest.raises(GateFailed, match="no single rewrite is to blame; nothing was written"):
        graphopt.optimize(net)
    assert contents(net.parent) == before


def test_a_pass_that_raises_costs_nothing_but_itself(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ctx: Context) -> None:
        raise ZeroDivisionError("oh")

    report = graphopt.optimize(net, settings=register(monkeypatch, whole(fail, name="failing")))
    assert next(p for p in report.passes if p.name == "failing").error == "ZeroDivisionError: oh"
    assert report.verification.verdict == "passed"
    assert "Identity" not in ops(ir.load(net.with_name("m.opt.onnx")))


def test_a_pass_that_breaks_the_graph_writes_nothing(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.rewrite.test_manager import breaking

    before = contents(net.parent)
    monkeypatch.setattr(sys.modules["tests.rewrite.test_manager"], "producer", lambda m, name: toys.producer(m, "m"))
    with pytest.raises(GraphoptError, match="left a broken graph"):
        graphopt.optimize(net, recipe=(), settings=register(monkeypatch, breaking("gone")))
    assert contents(net.parent) == before


def test_vacuous_verification_writes_nothing(tmp_path: Path) -> None:
    source = write(model("g (float[N,4] x) => (float[N,4] y) { i = Identity(x) a = Sub(i, i) y = Relu(a) }"), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(GateFailed) as caught:
        graphopt.optimize(source)
    assert "vacuous" in str(caught.value)
    assert "--calibration" in str(caught.value)
    assert contents(tmp_path) == before
    assert graphopt.optimize(source, verify=False).verification.verdict == "skipped"


def test_one_telling_output_is_enough_and_the_others_are_named(tmp_path: Path) -> None:
    source = write(model("g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Sub(x, x) z = Neg(x) }"), tmp_path)
    assert graphopt.optimize(source).verification.coverage["vacuous"] == ["y"]


# -- gates -------------------------------------------------------------------------------------------------------------

LOSSY = rule(
    lambda node, ctx: (
        node.op_type == "Abs"
        and "graphopt.pass" not in node.metadata_props
        and lossy(node, ctx)
    ),
    name="lossy", kind=Kind.LOSSY, stage=Stage.QUANTISE,
)  # fmt: skip


def lossy(node: ir.Node, ctx: Context) -> bool:
    shrunk = ctx.node("Mul", [node.inputs[0], ctx.constant(np.array(0.99, np.float32), "c")], like=node.outputs[0])
    new = ctx.node("Abs", shrunk.outputs, like=node.outputs[0])
    return ctx.replace({node.outputs[0]: new.outputs[0]}, [shrunk, new], rule="shrink", certain=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "lossy loses accuracy and needs data to be judged on (give --calibration"),
        ({"fail_if": ["cosine<0.9"]}, "needs data to be judged on"),
        ({"calibration": True}, "lossy loses accuracy and no budget is given (give --fail-if 'cosine<0.999'"),
        ({"calibration": True, "evaluate": lambda run: 1.0}, "no budget is given"),
        (
            {"calibration": True, "evaluate": lambda run: 1.0, "minimum": 0.5, "verify": False},
            "cannot run with --no-verify",
        ),
        ({"verify": False}, "needs data to be judged on"),
    ],
)
def test_lossy_passes_want_data_and_a_budget(
    net: Path, data: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], message: str
) -> None:
    settings = register(monkeypatch, LOSSY)
    before = contents(net.parent)
    if "calibration" in how:
        how = {**how, "calibration": data}
    with pytest.raises(BadInput) as caught:
        graphopt.optimize(net, settings=settings, **how)
    assert message in str(caught.value)
    assert contents(net.parent) == before


def test_within_the_budget_it_is_written(net: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = register(monkeypatch, LOSSY)
    report = graphopt.optimize(net, settings=settings, calibration=data, fail_if=["cosine<0.9", "max_rel>0.1"])
    assert report.verification.verdict == "within budget"
    assert 0 < report.verification.max_rel < 0.1
    assert report.verification.coverage["feeds"] == "calibration"
    assert report.undone == {}


@pytest.mark.parametrize("stage", [Stage.ELIMINATE, Stage.FUSE])
def test_a_budget_is_for_lossy_passes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    """A small mistake, before or after, where only the whole model shows it, is no part of what the user allowed."""
    text = LOOP.replace("(float[4] y)", "(float[4] y, float[4] z)").replace("> {", "> { p = Neg(x) z = Abs(p)", 1)
    source = write(model(text), tmp_path)
    cases = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=cases, n=np.full(4, 3, np.int64))
    wrong = once(swap("Tanh", "Sin", name="wrong", stage=stage, kind=Kind.ROUNDING))
    settings = register(monkeypatch, LOSSY, wrong)
    report = graphopt.optimize(source, settings=settings, calibration=tmp_path / "data.npz", fail_if=["cosine<0.5"])
    assert [key.partition(":")[0] for key in report.undone] == ["wrong"]
    assert {record.name: record.kept for record in report.passes}["lossy"] == 1
    assert report.verification.verdict == "within budget"


def test_no_budget_covers_another_shape(net: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def transpose(node: ir.Node, ctx: Context) -> bool:
        if node.op_type != "Tanh":
            return False
        flat = ctx.node("Transpose", node.inputs, {"perm": [1, 0]})
        new = ctx.node("Tanh", flat.outputs, like=node.outputs[0])
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [flat, new], rule="turn", certain=True)

    turned = once(rule(transpose, name="turned", kind=Kind.LOSSY, stage=Stage.QUANTISE))
    report = graphopt.optimize(
        net, settings=register(monkeypatch, LOSSY, turned), calibration=data, fail_if=["cosine<0.1"]
    )
    assert list(report.undone) == ["turned:turn@y"]
    assert {record.name: record.kept for record in report.passes}["lossy"] == 1


CONDITIONS = ["cosine<0.9999999", "max_abs>1e-6", "max_rel>=0.0001", "cosine <= 0.9999999"]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_that_holds_leaves_the_files_as_they_were(
    net: Path, data: Path, monkeypatch: pytest.MonkeyPatch, condition: str
) -> None:
    settings = register(monkeypatch, LOSSY)
    out = net.parent / "out.onnx"
    out.write_bytes(b"what was there before")
    before = contents(net.parent)
    with pytest.raises(GateFailed) as caught:
        graphopt.optimize(net, out, settings=settings, calibration=data, fail_if=["max_abs>1e9", condition])
    assert f"--fail-if {condition}" in str(caught.value)
    assert "nothing was written" in str(caught.value)
    assert contents(net.parent) == before


def test_conditions_need_something_to_go_by(net: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has nothing to go by with --no-verify"):
        graphopt.optimize(net, verify=False, fail_if=["cosine<0.9"])
    text = "g (float[N,4] x) => (float[N,4] y) { n = RandomNormalLike(x) y = Add(x, n) }"
    source = write(model(text), tmp_path, "random.onnx")
    assert graphopt.optimize(source).verification.coverage["random"]
    with pytest.raises(GateFailed, match="draws random numbers"):
        graphopt.optimize(source, fail_if=["cosine<0.9"])


Run = Callable[[Mapping[str, Any]], dict[str, Any]]


def mean(run: Run) -> float:
    """The mean of the output: a user's metric."""
    return float(run({"x": np.ones((2, 8), np.float32)})["y"].mean())


def test_the_users_metric_is_reported_and_guards(net: Path) -> None:
    report = graphopt.optimize(net, evaluate=mean)
    assert set(report.verification.metric) == {"before", "after"}
    value = report.verification.metric["before"]
    assert report.verification.metric["after"] == pytest.approx(value, rel=1e-6)
    before = contents(net.parent)
    assert graphopt.optimize(net, evaluate="tests.test_optimize:mean", minimum=value - 0.01).output is not None
    with pytest.raises(GateFailed) as caught:
        graphopt.optimize(net, net.parent / "out.onnx", evaluate=mean, minimum=value + 0.01)
    assert "below" in str(caught.value)
    assert "nothing was written" in str(caught.value)
    assert contents(net.parent) == before


@pytest.mark.parametrize("metric", [lambda run: float("nan"), lambda run: 1 / 0, lambda run: "much"])
def test_a_metric_that_gives_no_number_fails(net: Path, metric: Callable[[Run], Any]) -> None:
    before = contents(net.parent)
    with pytest.raises(GateFailed):
        graphopt.optimize(net, evaluate=metric, minimum=0.0)
    assert contents(net.parent) == before


def test_a_minimum_needs_a_metric(net: Path) -> None:
    with pytest.raises(BadInput, match="--min needs --evaluate"):
        graphopt.optimize(net, minimum=1.0)


# -- determinism -------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, graphopt
for name in sys.argv[2:]:
    graphopt.optimize(f"{sys.argv[1]}/{name}.onnx", f"{sys.argv[1]}/{name}.out.onnx")
"""
SEVERAL = ["transformer_block", "convnet", "functions", "if_constant", "shared_weights"]


def test_the_same_input_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    for folder, seed in (("a", "0"), ("b", "12345")):
        (tmp_path / folder).mkdir()
        for name in SEVERAL:
            write(models.RUNNABLE[name](), tmp_path / folder, f"{name}.onnx")
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / folder), *SEVERAL],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) >= 2 * len(SEVERAL)


@pytest.mark.parametrize("name", models.RUNNABLE)
def test_networks_come_out_the_same_and_a_second_run_changes_nothing(name: str, tmp_path: Path) -> None:
    source = write(models.RUNNABLE[name](), tmp_path)
    first = graphopt.optimize(source, tmp_path / "once.onnx")
    assert first.undone == {}
    assert [p.error for p in first.passes if p.error] == []
    assert first.verification.verdict == "passed"
    assert first.output is not None
    assert first.output.nodes <= first.input.nodes or name == "functions"
    assert graphopt.verify(source, tmp_path / "once.onnx").passed
    second = graphopt.optimize(tmp_path / "once.onnx", tmp_path / "twice.onnx")
    assert sum(p.applications for p in second.passes) == 0, [p.name for p in second.passes if p.applications]
    assert (tmp_path / "once.onnx").read_bytes() == (tmp_path / "twice.onnx").read_bytes()


def test_inferred_shapes_are_not_written(net: Path) -> None:
    graphopt.optimize(net)
    written = onnx.load(net.with_name("m.opt.onnx")).graph
    made = {name for node in written.node for name in node.output}
    assert made.isdisjoint(info.name for info in written.value_info)


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_has_the_fields_that_were_promised(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = graphopt.optimize(net, settings=register(monkeypatch, WRONG))
    plain = json.loads(json.dumps(to_plain(report)))
    assert {"input", "output", "passes", "verification", "environment"} <= set(plain)
    for side in ("input", "output"):
        assert {"nodes", "parameters", "bytes"} <= set(plain[side])
    fields = {"name", "kind", "stage", "applications", "kept", "undone", "reason", "seconds", "peak_bytes",
              "nodes_before", "nodes_after", "error"}  # fmt: skip
    for record in plain["passes"]:
        assert fields <= set(record)
        assert record["applications"] == record["kept"] + record["undone"]
        assert record["kind"] in {"bitwise", "rounding", "lossy"}
        assert record["stage"] == record["stage"].lower()
        assert record["seconds"] >= 0
        assert record["peak_bytes"] > 1e6
    assert {"max_abs", "max_rel", "cosine_min", "cases", "coverage"} <= set(plain["verification"])
    assert plain["verification"]["cases"] >= 3
    coverage = plain["verification"]["coverage"]
    assert coverage["applications"] >= coverage["checked_alone"] >= 1
    assert coverage["feeds"] == "synthesised"
    assert coverage["reference"] == "float64"
    assert {"python", "onnx", "onnxruntime"} <= set(plain["environment"])
    assert plain["recipe"] == ["safe"]
    assert plain["target"] == "onnxruntime"
    assert dataclasses.asdict(report.input) == plain["input"]


def test_without_verification_the_report_claims_none(net: Path) -> None:
    report = graphopt.optimize(net, verify=False)
    assert (report.verification.verdict, report.verification.cases) == ("skipped", 0)
    assert report.verification.coverage == {}
    assert "Identity" not in ops(ir.load(net.with_name("m.opt.onnx")))


def test_a_recipe_without_passes_copies(net: Path) -> None:
    report = graphopt.optimize(net, recipe=())
    assert report.passes == []
    assert report.output is not None
    assert report.output.nodes == report.input.nodes
    assert report.verification.verdict == "passed"


def test_progress_says_what_is_done(net: Path) -> None:
    heard: list[str] = []
    graphopt.optimize(net, progress=heard.append)
    assert heard[0] == "reading"
    assert heard[-2:] == ["writing", "verifying"]
    assert any(text.startswith("remove-identities (") for text in heard)


def _endless() -> type[Pass]:
    """A pass whose every application is wrong and has another key each time."""
    count = 0

    def endless(ctx: Context) -> None:
        nonlocal count
        count += 1
        node = toys.producer(ctx.model, "s")
        new = ctx.node("Add", node.inputs, like=node.outputs[0])
        ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule=f"r{count}", certain=True)

    return whole(endless, name="endless")


def test_a_pass_that_is_refused_again_and_again_is_left_out(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = graphopt.optimize(net, recipe=(), settings=register(monkeypatch, _endless()))
    assert report.verification.verdict == "passed"
    assert [(p.name, p.kept) for p in report.passes] == [("endless", 0)]
    assert "endless:" in report.undone


def test_a_limit_of_repetitions(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where leaving out passes does not help, nothing is written."""
    monkeypatch.setattr(optimizing, "PATIENCE", 0)
    before = contents(net.parent)
    with pytest.raises(GateFailed, match=r"verification keeps failing: endless:r\d+@s: .*nothing was written"):
        graphopt.optimize(net, recipe=(), settings=register(monkeypatch, _endless()))
    assert contents(net.parent) == before


def test_a_pass_class_may_keep_state(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are made anew for each repetition."""
    made: list[Pass] = []

    class Stateful(bypass("Identity", name="stateful")):  # type: ignore[misc]
        def __init__(self, parameters: Mapping[str, object] | None = None) -> None:
            super().__init__(parameters)
            made.append(self)

    graphopt.optimize(net, recipe=(), settings=register(monkeypatch, Stateful, WRONG))
    assert len({id(p) for p in made}) == len(made) >= 3


def test_small_external_weights_and_those_of_bodies_are_verified(tmp_path: Path) -> None:
    made = model(
        "g (float[N,4] x, bool c) => (float[N,4] y) { i = Identity(x) a = Add(i, w) y = If(c) <"
        "then_branch = t () => (float[N,4] u) <float[4] k = {1, 2, 3, 4}> { u = Mul(a, k) },"
        "else_branch = e () => (float[N,4] v) { v = Neg(a) }> }",
        weights={"w": np.ones(4, np.float32)},
    )
    for value in (made.graph.initializers["w"], toys.value(made, "k")):
        assert value.const_value is not None
        (tmp_path / "m.data").open("ab").write(value.const_value.tobytes())
        offset = (tmp_path / "m.data").stat().st_size - 16
        value.const_value = ir.ExternalTensor(
            "m.data", offset, 16, ir.DataType.FLOAT, shape=ir.Shape([4]), name=value.name or "", base_dir=tmp_path
        )
    (tmp_path / "m.onnx").write_bytes(ir.to_proto(made).SerializeToString())
    report = graphopt.optimize(tmp_path / "m.onnx")
    assert report.verification.verdict == "passed"
    assert graphopt.verify(tmp_path / "m.onnx", tmp_path / "m.opt.onnx").passed
