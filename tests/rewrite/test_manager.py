"""The manager: order, repetition, errors, structure after each pass, what the records say."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphopt.errors import BadInput, GraphoptError
from graphopt.rewrite import Context, Kind, Stage
from graphopt.rewrite.contract import ForeignPass
from graphopt.rewrite.manager import MAX_ROUNDS, most_frequent, run_passes
from tests.rewrite import toys
from tests.rewrite.toys import bypass, context, model, ops, producer, rule, run, swap, whole

CHAIN = "g (float[N,4] x) => (float[N,4] y) { a = Neg(x) b = Abs(a) y = Exp(b) }"


def test_stages_decide_the_order_and_then_the_order_given() -> None:
    seen: list[str] = []
    passes = [
        whole(lambda ctx, n=name: seen.append(n), name=name, stage=stage)
        for name, stage in (("f", Stage.FUSE), ("i", Stage.IMPORT), ("m2", Stage.MERGE), ("m1", Stage.MERGE))
    ]
    _, records = run(model(CHAIN), *passes)
    assert seen == ["i", "m2", "m1", "f"]
    assert [r.name for r in records] == ["i", "m2", "m1", "f"]
    assert [r.stage for r in records] == ["import", "merge", "merge", "fuse"]


def test_a_stage_repeats_until_nothing_changes() -> None:
    """Each pass makes work for the other: Neg -> Abs -> Exp -> Sign, two steps by one, one by the other."""
    made = model(CHAIN)
    _, records = run(
        made, swap("Abs", "Exp", name="late"), swap("Neg", "Abs", name="early"), swap("Exp", "Sign", name="z")
    )
    assert ops(made) == ["Sign", "Sign", "Sign"]
    assert [r.applications for r in records] == [2, 1, 3]


def test_a_patient_pass_waits_until_the_others_find_nothing() -> None:
    """The two others need two rounds for Neg -> Abs -> Exp; a patient pass that took Abs away would end that."""
    made = model(CHAIN)
    patient = swap("Abs", "Tanh", name="patient")
    patient.patient = True  # type: ignore[misc]
    _, records = run(made, swap("Abs", "Exp", name="late"), swap("Neg", "Abs", name="early"), patient)
    assert ops(made) == ["Exp", "Exp", "Exp"]
    assert records[-1].applications == 0
    again = model(CHAIN)
    _, records = run(again, swap("Neg", "Abs", name="early"), patient)
    assert ops(again) == ["Tanh", "Tanh", "Exp"] and records[-1].applications == 2


def test_elimination_runs_again_after_later_stages() -> None:
    made = model(CHAIN)
    eliminate = bypass("Identity", name="eliminate", stage=Stage.ELIMINATE)
    _, records = run(made, eliminate, swap("Abs", "Identity", name="fuse", stage=Stage.FUSE))
    assert ops(made) == ["Neg", "Exp"]
    assert {r.name: r.kept for r in records} == {"eliminate": 1, "fuse": 1}


def test_a_pass_that_never_settles_ends() -> None:
    calls = 0

    def count(ctx: Context) -> None:
        nonlocal calls
        calls += 1

    flip = {"Neg": "Abs", "Abs": "Neg"}

    def never(node: ir.Node, ctx: Context) -> bool:
        if node.op_type not in flip or node.outputs[0].name != "a" or node.metadata_props.get("round") == str(calls):
            return False
        new = ctx.node(flip[node.op_type], node.inputs, like=node.outputs[0])
        new.metadata_props["round"] = str(calls)
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="flip", certain=True)

    _, records = run(model(CHAIN), whole(count, name="count"), rule(never, name="never"))
    assert calls == MAX_ROUNDS
    assert records[1].applications == MAX_ROUNDS


def test_what_a_pass_did_before_it_raised_stands() -> None:
    def half(node: ir.Node, ctx: Context) -> bool:
        if node.op_type == "Exp":
            raise ZeroDivisionError("in the pass")
        if node.op_type != "Neg":
            return False
        new = ctx.node("Sign", node.inputs, like=node.outputs[0])
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="r", certain=True)

    made = model(CHAIN)
    _, records = run(made, rule(half, name="half"), swap("Abs", "Tanh", name="other", stage=Stage.FUSE))
    assert records[0].error == "ZeroDivisionError: in the pass"
    assert (records[0].kept, records[1].kept) == (1, 1)
    assert ops(made) == ["Sign", "Tanh", "Exp"]


def test_a_users_mistake_ends_the_run() -> None:
    def complain(ctx: Context) -> None:
        raise BadInput("cannot be used")

    with pytest.raises(BadInput, match="cannot be used"):
        run(model(CHAIN), whole(complain))


def breaking(break_it: str) -> type[toys.Pass]:
    def apply(ctx: Context) -> None:
        node = producer(ctx.model, "a")
        new = ctx.node("Sign", node.inputs, like=node.outputs[0])
        if not ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="r", certain=True):
            return
        if break_it == "gone":
            ctx.model.graph.remove(new)
        elif break_it == "name":
            new.outputs[0].name = "b"
        elif break_it == "interface":
            ctx.model.graph.outputs[0].name = "other"
        elif break_it == "input":
            ctx.model.graph.inputs[0].dtype = ir.DataType.DOUBLE
        elif break_it == "domain":
            new.domain = "nobody.knows"

    return whole(apply, name="breaker")


@pytest.mark.parametrize("damage", ["gone", "name", "interface", "input", "domain"])
def test_a_broken_graph_ends_the_run_and_names_the_pass(damage: str) -> None:
    with pytest.raises(GraphoptError) as caught:
        run(model(CHAIN), breaking(damage))
    assert caught.value.where == "pass breaker"
    assert "--set breaker.enabled=false" in (caught.value.hint or "")


def test_damage_that_was_there_before_is_nobodys_fault() -> None:
    text = ("g (float[4] x, bool c) => (float[4] y) { a = Neg(x) y = If(c)<then_branch = t () => (float[4] u)"
            " { a = Abs(x) u = Exp(a) }, else_branch = e () => (float[4] w) { w = Abs(x) }> }")  # fmt: skip
    _, records = run(model(text), swap("Exp", "Sign"))
    assert records[0].kept == 1


def test_nodes_are_put_in_order_where_a_pass_left_them_out_of_order() -> None:
    made = model("g (float[4] x) => (float[4] y, float[4] z) { y = Neg(x) a = Abs(x) z = Exp(a) }")

    def late(node: ir.Node, ctx: Context) -> bool:
        if node.op_type != "Neg":
            return False
        new = ctx.node("Sign", [toys.value(ctx.model, "a")], like=node.outputs[0])
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="r", certain=True)

    run(made, rule(late))
    assert ops(made) == ["Abs", "Sign", "Exp"]


def test_records_count_nodes_and_what_was_not_cheaper() -> None:
    def dearer(node: ir.Node, ctx: Context) -> bool:
        if node.op_type != "Exp":
            return False
        first = ctx.node("Exp", node.inputs, like=node.outputs[0])
        second = ctx.node("Abs", first.outputs, like=node.outputs[0])
        return ctx.replace({node.outputs[0]: second.outputs[0]}, [first, second], rule="r")

    _, records = run(model(CHAIN), bypass("Abs", name="one"), rule(dearer, name="two"))
    one, two = records
    assert (one.nodes_before, one.nodes_after, one.applications, one.kept) == (3, 2, 1, 1)
    assert (two.applications, two.kept) == (0, 0)
    assert "not cheaper on onnxruntime" in two.reason
    assert list(two.near_misses.values()) == ["not cheaper on onnxruntime"]


def test_a_pass_that_did_nothing_says_why_most_often() -> None:
    text = "g (float[4] x) => (float[4] y) { a = Abs(x) b = Neg(a) c = Abs(b) d = Exp(c) y = Abs(d) }"

    def refuse(node: ir.Node, ctx: Context) -> bool:
        if node.op_type in ("Abs", "Exp"):
            ctx.refuse(node, f"{node.name}: too small" if node.op_type == "Abs" else "steep")
        return False

    made = model(text)
    for index, node in enumerate(made.graph):
        node.name = f"n{index}"
    _, (record,) = run(made, rule(refuse))
    assert len(record.near_misses) == 4
    assert record.reason == "mostly: too small"
    assert most_frequent(["w: a", "v: a"]) == "a"
    assert most_frequent([]) == ""


def test_progress_hears_every_pass() -> None:
    heard: list[str] = []
    run_passes(
        context(model(CHAIN)), [bypass("Abs", name="one")(), bypass("Neg", name="two")()],
        progress=lambda name, seconds: heard.append(name),
    )  # fmt: skip
    assert heard == ["one", "two"] * 2


class Foreign(ForeignPass):
    """Removes Abs by its own means."""

    name, kind, stage, explanation = "foreign", Kind.ROUNDING, Stage.IMPORT, toys.EXPLANATION

    def rewrite_model(self, ctx: Context) -> bool:
        found = [node for node in ctx.model.graph if node.op_type == "Abs"]
        for node in found:
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            ctx.model.graph.remove(node)
        return bool(found)


def test_a_foreign_pass_is_one_application_or_none() -> None:
    made = model(CHAIN)
    ctx, records = run(made, Foreign)
    assert [a.key for a in ctx.applications] == ["foreign:foreign@model"]
    assert ops(made) == ["Neg", "Exp"]
    assert records[0].kept == 1
    ctx, records = run(made, Foreign)
    assert ctx.applications == []
    for how in ({"skip": ["foreign:foreign@model"]}, {"limit": 0}):
        made = model(CHAIN)
        run(made, Foreign, **how)  # type: ignore[arg-type]
        assert ops(made) == ["Neg", "Abs", "Exp"]


def test_a_rule_is_tried_again_on_readers_of_what_it_changed() -> None:
    looked: list[str] = []

    def look(node: ir.Node, ctx: Context) -> bool:
        looked.append(node.op_type)
        if node.op_type != "Neg":
            return False
        new = ctx.node("Sign", node.inputs, like=node.outputs[0])
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="r", certain=True)

    rule(look)().apply(toys.running(model(CHAIN)))
    assert looked == ["Neg", "Abs", "Exp", "Abs"]
