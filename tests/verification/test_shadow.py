"""T1: every replacement judged alone, wrong ones caught, right ones not blamed for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import graphs
from graphopt.rewrite import Context, Kind, Pass, Stage
from graphopt.rewrite.contract import ForeignPass
from graphopt.shapes import infer_shapes
from graphopt.verification.replacements import Judgement, Watch
from graphopt.verification.shadow import Shadow
from tests.models import draw_feeds
from tests.rewrite import toys
from tests.rewrite.toys import bypass, model, producer, rule, run, swap, value


def judged(
    made: ir.Model, *passes: type[Pass], feeds: Sequence[Mapping[str, Any]] | None = None, **how: object
) -> tuple[Judgement, list[str]]:
    """What T1 says of passes on a model, and the keys of all applications. The feeds are drawn from N(0, 1)."""
    infer_shapes(made)
    watch = Watch(made)
    given = list(feeds) if feeds is not None else [draw_feeds(made, seed=seed) for seed in range(3)]
    ctx, records = run(made, *passes, observers=[watch.shadow], **how)
    assert [r.error for r in records if r.error] == []

    def make(original: ir.Model, once: Callable[[Mapping[str, Any]], object]) -> list[Mapping[str, Any]]:
        for case in given:
            once(case)
        return given

    return watch.judge(make), [a.key for a in ctx.applications]


# -- each kind of mistake, alone among right rewrites ------------------------------------------------------------------

NET = """g (float[N,6,6] x) => (float[N,6,6] y) <float[6,6] w, float[6] b, float scale = {0.5}> {
    m = MatMul(x, w) a = Add(m, b) s = Sub(a, x) t = Transpose<perm = [0, 2, 1]>(s) p = Softmax<axis = 1>(t)
    k = Mul(p, scale) c = Concat<axis = 1>(k, a) l = Neg(c)
    h0 = Slice(l, from, upto, axis) i = Identity(h0) y = Exp(i)
}"""


def net() -> ir.Model:
    rng = np.random.default_rng(1)
    text = NET.replace("> {", ", int64[1] from = {0}, int64[1] upto = {6}, int64[1] axis = {1}> {", 1)
    weights = {"w": rng.standard_normal((6, 6)).astype(np.float32), "b": rng.standard_normal(6).astype(np.float32)}
    return model(text, weights=weights)


def same(op: str) -> type[Pass]:
    """A right rewrite: the node written anew, once."""

    def rewrite(node: ir.Node, ctx: Context) -> bool:
        if "graphopt.pass" in node.metadata_props:
            return False
        new = ctx.node(node.op_type, node.inputs, like=node.outputs[0])
        new.attributes.update(node.attributes)
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="again", certain=True)

    return rule(rewrite, roots=(op,), name=f"again-{op.lower()}", stage=Stage.FUSE)


def with_constant(old: str, op: str, name: str, array: np.ndarray) -> type[Pass]:
    """A pass that writes ``op`` of the first input and a constant in place of ``old``."""

    def rewrite(node: ir.Node, ctx: Context) -> bool:
        if node.op_type != old or "graphopt.pass" in node.metadata_props:
            return False
        new = ctx.node(op, [node.inputs[0], ctx.constant(array, "c")], like=node.outputs[0])
        new.attributes.update(node.attributes)
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="r", certain=True)

    return rule(rewrite, name=name)


MISTAKES: dict[str, type[Pass]] = {
    "axis": swap("Softmax", "Softmax", {"axis": 2}, name="wrong", where="p"),
    "perm": swap("Transpose", "Transpose", {"perm": [2, 1, 0]}, name="wrong"),
    "swapped inputs": swap("Sub", "Sub", swap_inputs=True, name="wrong"),
    "swapped operands of a concatenation": swap("Concat", "Concat", swap_inputs=True, name="wrong"),
    "scale": with_constant("Mul", "Mul", "wrong", np.array(0.51, np.float32)),
    "dropped bias": bypass("Add", name="wrong"),
    "other operator": swap("Neg", "Abs", name="wrong"),
    "slice off by one": with_constant("Slice", "Neg", "wrong", np.array(0, np.float32)),
    "not an identity": bypass("Neg", name="wrong"),
    "zeros": rule(
        lambda node, ctx: (
            node.op_type == "Softmax"
            and ctx.replace_with_constant(node.outputs[0], np.ones((1, 6, 6), np.float32), rule="r")
        ),
        name="wrong",
    ),
}
del MISTAKES["slice off by one"]


def once(cls: type[Pass]) -> type[Pass]:
    """The pass, applied in one round alone (a swap of inputs would undo itself in the next)."""

    class Once(cls):  # type: ignore[valid-type,misc]
        done = False

        def apply(self, ctx: Context) -> None:
            if not self.done:
                self.done = True
                super().apply(ctx)

        def rewrite(self, node: ir.Node, ctx: Context) -> bool:
            return "graphopt.pass" not in node.metadata_props and super().rewrite(node, ctx)

    return Once


RIGHT = [same(op) for op in ("MatMul", "Exp")] + [bypass("Identity", name="no-identity")]


@pytest.mark.parametrize("kind", [Kind.BITWISE, Kind.ROUNDING])
@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_caught_and_nothing_else_is_blamed(mistake: str, kind: Kind) -> None:
    wrong = once(MISTAKES[mistake])
    wrong.kind = kind
    verdict, keys = judged(net(), wrong, *RIGHT)
    assert len(keys) == 4
    assert [key.partition(":")[0] for key in verdict.failed] == ["wrong"]
    assert verdict.checked == 4
    assert verdict.unchecked == []


@pytest.mark.parametrize("mistake", ["dtype", "shape", "rank"])
def test_a_wrong_dtype_or_shape_is_caught(mistake: str) -> None:
    """What reads the value still runs: a Shape, whose result has the same dtype whatever it is of."""
    made = model("g (float[2,6] x) => (int64[R] y, float[2,6] z) { a = Neg(x) y = Shape(a) z = Exp(x) }")

    def rewrite(node: ir.Node, ctx: Context) -> bool:
        if node.op_type != "Neg":
            return False
        if mistake == "dtype":
            new = ctx.node("Cast", node.inputs, {"to": 11})
        elif mistake == "shape":
            new = ctx.node("Transpose", node.inputs)
        else:
            new = ctx.node("Flatten", node.inputs, {"axis": 0})
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="r", certain=True)

    verdict, _ = judged(made, rule(rewrite, name="wrong", kind=Kind.ROUNDING), same("Exp"))
    assert list(verdict.failed) == ["wrong:r@a"]
    assert ("dtype" if mistake == "dtype" else "shape") in verdict.failed["wrong:r@a"]


def test_right_rewrites_are_not_blamed() -> None:
    verdict, keys = judged(net(), *RIGHT, same("Sub"), same("Transpose"), same("Softmax"))
    assert verdict.failed == {}
    assert verdict.checked == len(keys) == 6


# -- scopes ------------------------------------------------------------------------------------------------------------

IF = """g (float[N,4] x, bool c, bool d) => (float[N,4] y) <float[4] w = {1, 2, 3, 4}> {
    a = Neg(x)
    y = If(c) <
        then_branch = t () => (float[N,4] u) { u0 = Sub(a, w) u = Abs(u0) },
        else_branch = e () => (float[N,4] v) {
            v0 = Sub(w, a)
            v = If(d) <
                then_branch = tt () => (float[N,4] p) { p0 = Sub(v0, x) p = Exp(p0) },
                else_branch = ee () => (float[N,4] q) { q = Sub(x, v0) }
            >
        }
    >
}"""


def feeds_of(*flags: tuple[bool, bool]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    return [{"x": rng.standard_normal((2, 4)).astype(np.float32), "c": np.array(c), "d": np.array(d)} for c, d in flags]


EVERY = feeds_of((True, True), (False, True), (False, False))


@pytest.mark.parametrize("where", ["u0", "v0", "p0", "q"])
def test_a_mistake_in_a_branch_is_caught_alone(where: str) -> None:
    verdict, keys = judged(model(IF), once(swap("Sub", "Sub", swap_inputs=True, where=where, name="wrong")),
                           same("Sub"), same("Neg"), feeds=EVERY)  # fmt: skip
    assert list(verdict.failed) == [f"wrong:Sub-to-Sub@{where}"]
    assert len(keys) == 5
    assert verdict.unchecked == []


@pytest.mark.parametrize("where", ["v0", "p0", "q"])
def test_a_branch_that_never_ran_shows_nothing_and_is_not_counted(where: str) -> None:
    wrong = once(swap("Sub", "Sub", swap_inputs=True, where=where, name="wrong"))
    verdict, _ = judged(model(IF), wrong, same("Neg"), feeds=feeds_of((True, True), (True, False)))
    assert verdict.failed == {}
    assert verdict.checked == 1
    assert verdict.unchecked == [f"wrong:Sub-to-Sub@{where}"]


@pytest.mark.parametrize("flags", [(True, True), (False, False)])
def test_right_rewrites_across_branches_are_not_blamed(flags: tuple[bool, bool]) -> None:
    """Values in branches replaced by outer ones and by constants: an empty tensor stands for a branch not taken."""
    text = IF.replace("u0 = Sub(a, w)", "n = Neg(x) u0 = Sub(n, w) k = Abs(w)")
    made = model(text)

    def merge(node: ir.Node, ctx: Context) -> bool:
        if node.outputs[0].name == "n":
            return ctx.replace({node.outputs[0]: value(ctx.model, "a")}, rule="outer")
        if node.outputs[0].name == "k":
            return ctx.replace_with_constant(node.outputs[0], np.array([1, 2, 3, 4], np.float32), rule="constant")
        return False

    verdict, keys = judged(made, rule(merge), same("Sub"), feeds=feeds_of(flags))
    assert verdict.failed == {}
    assert len(keys) >= 5


def test_what_an_outer_rewrite_reads_is_not_taken_from_a_branch() -> None:
    """The branch's copy of x went; the outer node that reads x is rewritten later, outside."""
    made = model("g (float[N,4] x, bool c) => (float[N,4] y, float[N,4] z) { y = If(c) <"
                 "then_branch = t () => (float[N,4] u) { i = Identity(x) u = Neg(i) },"
                 "else_branch = e () => (float[N,4] w) { w = Abs(x) }> z = Exp(x) }")  # fmt: skip
    verdict, keys = judged(made, bypass("Identity"), same("Exp"), same("Neg"))
    assert verdict.failed == {}
    assert len(keys) == 3


LOOP = """g (float[4] x, int64 n) => (float[4] y, float[T,4] all) <bool yes = {1}> {
    l, all = Loop(n, yes, x) <body = b (int64 i, bool go, float[4] s) => (bool more, float[4] next, float[4] step) {
        more = Identity(go) k = Sub(s, x) next = Tanh(k) step = Neg(next) }>
    y = Exp(l)
}"""


def test_loop_bodies_and_functions_are_left_to_the_whole_model() -> None:
    wrong = once(swap("Sub", "Sub", swap_inputs=True, name="wrong"))
    case = {"x": np.array([1, -2, 3, 0.5], np.float32), "n": np.array(3)}
    verdict, _ = judged(model(LOOP), wrong, same("Exp"), feeds=[case])
    assert verdict.failed == {}
    assert (verdict.checked, verdict.unchecked) == (1, ["wrong:Sub-to-Sub@k"])

    function = """g (float[4] x) => (float[4] y) { a = Exp(x) y = local.f(a) }
        <domain: "local", opset_import: ["": 17]> f (p) => (q) { q = Sub(p, p) }"""
    made = model(function, imports=', "local": 1')
    verdict, _ = judged(made, with_constant("Sub", "Mul", "wrong", np.array(3, np.float32)), same("Exp"))
    assert verdict.failed == {}
    assert verdict.checked == 1


# -- rewrites that build on each other ---------------------------------------------------------------------------------


def test_each_link_of_a_chain_is_judged_alone() -> None:
    """v1 <- v2 <- v3 rewritten by several passes in turn; one of them is wrong, at one place."""
    text = "g (float[N,4] x) => (float[N,4] v4) { v1 = Neg(x) v2 = Abs(v1) v3 = Tanh(v2) v4 = Exp(v3) }"
    made = model(text)
    wrong = rule(
        lambda node, ctx: (
            node.op_type == "Abs"
            and "graphopt.pass" in node.metadata_props
            and ctx.replace({node.outputs[0]: (n := ctx.node("Relu", node.inputs, like=node.outputs[0])).outputs[0]},
                            [n], rule="r", certain=True)
        ),
        name="wrong", stage=Stage.SPLIT,
    )  # fmt: skip
    again = [same(op) for op in ("Neg", "Abs", "Tanh", "Exp")]
    later = rule(
        lambda node, ctx: (
            node.op_type == "Tanh" and node.metadata_props.get("graphopt.pass") != "later"
            and ctx.replace({node.outputs[0]: (n := ctx.node("Tanh", node.inputs, like=node.outputs[0])).outputs[0]},
                            [n], rule="r", certain=True)
        ),
        name="later", stage=Stage.FINALISE,
    )  # fmt: skip
    verdict, keys = judged(made, *again, wrong, later)
    assert len(keys) == 6
    assert list(verdict.failed) == ["wrong:r@v2"]
    assert verdict.checked == 6


MERGE = """g (float[N,4] x) => (float[N,4] y, float[N,4] z) {
    r = Relu(x) y0 = Neg(r) y = Exp(y0) z0 = Abs(x) z = Sqrt(z0)
}"""


def test_readers_of_what_a_wrong_merge_kept_are_not_blamed() -> None:
    """r is merged into x, wrongly. Rewrites of x's own readers, and of r's, are right."""
    verdict, keys = judged(model(MERGE), bypass("Relu", name="wrong"), same("Neg"), same("Abs"), same("Sqrt"))
    assert list(verdict.failed) == ["wrong:bypass-Relu@r"]
    assert len(keys) == verdict.checked == 4


def test_a_wrong_merge_of_twins_blames_no_later_merge() -> None:
    """Relu and Abs are merged, wrongly; then the two Neg look alike and are merged too."""
    made = model("g (float[N,4] x) => (float[N,4] y, float[N,4] z) { a = Relu(x) b = Abs(x) c = Neg(a) d = Neg(b)"
                 " y = Exp(c) z = Tanh(d) }")  # fmt: skip

    def merge(node: ir.Node, ctx: Context) -> bool:
        if node.op_type == "Abs":
            return ctx.replace({node.outputs[0]: value(ctx.model, "a")}, rule="wrong")
        if node.op_type == "Neg":
            twin = next(n for n in ctx.model.graph if n.op_type == "Neg")
            return twin is not node and twin.inputs[0] is node.inputs[0] and ctx.replace(
                {node.outputs[0]: twin.outputs[0]}, rule="twin"
            )  # fmt: skip
        return False

    verdict, keys = judged(made, rule(merge), same("Exp"), same("Tanh"))
    assert keys[:2] == ["toy:wrong@b", "toy:twin@d"]
    assert list(verdict.failed) == ["toy:wrong@b"]
    assert "toy:twin@d" in verdict.unchecked


def test_every_wrong_merge_of_a_chain_is_found_at_once() -> None:
    steps = " ".join(f"v{i + 1} = Relu(n{i}) n{i + 1} = Neg(v{i + 1})" for i in range(20))
    made = model(f"g (float[N,4] x) => (float[N,4] n20) {{ n0 = Neg(x) {steps} }}")
    verdict, keys = judged(made, bypass("Relu", name="wrong"))
    assert len(keys) == 20
    # Relu after Neg after Relu is always zero: it changes something where its input has another sign.
    assert {"wrong:bypass-Relu@v1", "wrong:bypass-Relu@v2"} <= set(verdict.failed)


def test_a_right_merge_changes_nothing_for_what_follows() -> None:
    made = model("g (float[N,4] x) => (float[N,4] y, float[N,4] z) { a = Neg(x) b = Neg(x) c = Abs(b) i = Identity(c)"
                 " y = Exp(i) z = Sqrt(c) }")  # fmt: skip
    twins = rule(
        lambda node, ctx: (
            node.outputs[0].name == "b" and ctx.replace({node.outputs[0]: value(ctx.model, "a")}, rule="t")
        )
    )
    verdict, keys = judged(made, twins, bypass("Identity", name="i"), same("Abs"), same("Exp"), same("Sqrt"))
    assert verdict.failed == {}
    assert verdict.checked == len(keys) == 5


def test_right_only_by_accident_of_the_data_is_caught_by_other_data() -> None:
    relu = bypass("Relu", name="wrong")
    positive = [{"x": np.array([[1, 2, 3, 4]], np.float32)}]
    assert judged(model(MERGE), relu, feeds=positive)[0].failed == {}
    assert list(judged(model(MERGE), relu)[0].failed) == ["wrong:bypass-Relu@r"]


# -- kinds -------------------------------------------------------------------------------------------------------------

SUM = "g (float[N,64] x) => (float[N,64] y) <float[64] b> { a = Mul(x, b) c = Mul(a, b) y = Neg(c) }"


def sums() -> ir.Model:
    return model(SUM, weights={"b": np.random.default_rng(3).standard_normal(64).astype(np.float32)})


def reassociate(kind: Kind, factor: float = 1.0) -> type[Pass]:
    """(x b) b = x (b b): rounds otherwise. ``factor`` makes it worse."""

    def rewrite(node: ir.Node, ctx: Context) -> bool:
        if node.outputs[0].name != "c" or "graphopt.pass" in node.metadata_props:
            return False
        b = node.inputs[1]
        assert b is not None
        square = ctx.constant((b.const_value.numpy() ** 2 * np.float32(factor)).astype(np.float32), "bb")  # type: ignore[union-attr]
        new = ctx.node("Mul", [value(ctx.model, "x"), square], like=node.outputs[0])
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="r")

    return rule(rewrite, kind=kind)


def test_bitwise_means_the_same_bits() -> None:
    verdict, _ = judged(sums(), reassociate(Kind.BITWISE))
    assert "bits differ" in verdict.failed["toy:r@c"]


def test_rounding_may_round() -> None:
    verdict, keys = judged(sums(), reassociate(Kind.ROUNDING))
    assert verdict.failed == {}
    assert verdict.checked == len(keys) == 1


def test_rounding_may_not_round_ten_times_worse() -> None:
    verdict, _ = judged(sums(), reassociate(Kind.ROUNDING, 1 + 10 * 2**-23))
    assert "from the float64 result" in verdict.failed["toy:r@c"]


def test_lossy_is_for_the_budget_to_judge() -> None:
    verdict, keys = judged(sums(), reassociate(Kind.LOSSY, 1.01))
    assert verdict.failed == {}
    assert (len(keys), verdict.checked) == (1, 0)


SCALED = "g (float[N,4] x) => (float[N,4] y) <float w = {0.3}, float v = {0.7}> { a = Mul(x, w) y = Mul(a, v) }"


def coarse(node: ir.Node, ctx: Context) -> bool:
    """Lossy: rounds the first factor to tenths of a power of two."""
    w = node.inputs[1]
    if node.outputs[0].name != "a" or w is None or w.name != "w":
        return False
    new = ctx.node("Mul", [node.inputs[0], ctx.constant(np.array(0.25, np.float32), "q")], like=node.outputs[0])
    return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="coarse", certain=True)


def joined(slip: float) -> type[Pass]:
    """Rounding: both factors in one, multiplied by ``slip``, which is a mistake if it is not 1."""

    def rewrite(node: ir.Node, ctx: Context) -> bool:
        inner = node.inputs[0].producer() if node.inputs[0] is not None else None
        if inner is None or inner.op_type != "Mul":
            return False
        factors = [graphs.constant_array(n.inputs[1]) for n in (node, inner)]
        assert factors[0] is not None
        assert factors[1] is not None
        product = np.asarray(factors[0] * factors[1] * np.float32(slip))
        new = ctx.node("Mul", [inner.inputs[0], ctx.constant(product, "p")], like=node.outputs[0])
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="join", certain=True)

    return rule(rewrite, name="joined", kind=Kind.ROUNDING, stage=Stage.FUSE)


@pytest.mark.parametrize(("slip", "failed"), [(1.0, []), (1.001, ["joined:join@y"])])
def test_what_follows_a_lossy_pass_is_judged_by_what_it_was_given(slip: float, failed: list[str]) -> None:
    lossy = rule(coarse, name="coarse", kind=Kind.LOSSY, stage=Stage.QUANTISE)
    verdict, keys = judged(model(SCALED), lossy, joined(slip))
    assert keys == ["coarse:coarse@a", "joined:join@y"]
    assert list(verdict.failed) == failed
    assert verdict.checked == 1


@pytest.mark.parametrize(
    ("wrong", "values"),
    [
        (with_constant("Identity", "Add", "wrong", np.array(0, np.float32)), [-0.0, 1]),  # -0 + 0 = +0
        (with_constant("Identity", "Max", "wrong", np.array(-np.inf, np.float32)), [1, 2]),
        (with_constant("Identity", "Min", "wrong", np.array(1e30, np.float32)), [np.inf, 1]),
        (swap("Identity", "Abs", {}, name="wrong"), [-0.0, 1]),
    ],
)
def test_bitwise_minds_zeros_and_infinities(wrong: type[Pass], values: list[float]) -> None:
    made = model("g (float[2] x) => (float[2] z) { y = Identity(x) z = Neg(y) }")
    verdict, keys = judged(made, wrong, feeds=[{"x": np.array(values, np.float32)}])
    assert len(keys) == 1
    assert len(verdict.failed) == (0 if values == [1, 2] else 1)


def test_nans_are_all_alike_but_not_numbers() -> None:
    made = model("g (float[2] x) => (float[2] z) { y = Sqrt(x) z = Neg(y) }")
    feeds = [{"x": np.array([-1, 4], np.float32)}]
    assert judged(made.clone(), same("Sqrt"), feeds=feeds)[0].failed == {}

    def zero(node: ir.Node, ctx: Context) -> bool:
        if node.op_type != "Sqrt":
            return False
        relu = ctx.node("Relu", node.inputs, like=node.outputs[0])
        root = ctx.node("Sqrt", relu.outputs, like=node.outputs[0])
        root.metadata_props["done"] = "1"
        return "done" not in node.metadata_props and ctx.replace(
            {node.outputs[0]: root.outputs[0]}, [relu, root], rule="r", certain=True
        )

    assert list(judged(made, rule(zero, name="wrong", kind=Kind.ROUNDING), feeds=feeds)[0].failed) == ["wrong:r@y"]


# -- what T1 cannot do by itself ---------------------------------------------------------------------------------------


class Foreign(ForeignPass):
    """Inverts every Abs behind the context's back, and takes out Identities."""

    name, kind, stage, explanation = "foreign", Kind.BITWISE, Stage.IMPORT, toys.EXPLANATION

    def rewrite_model(self, ctx: Context) -> bool:
        found = [node for node in ctx.model.graph if node.op_type == "Identity"]
        for node in found:
            new = ir.Node("", "Neg", node.inputs, outputs=[ir.Value(name="made by hand")])
            back = ir.Node("", "Neg", new.outputs, outputs=[ir.Value(name="and back")])
            ctx.model.graph.insert_before(node, [new, back])
            ir.convenience.replace_all_uses_with(node.outputs[0], back.outputs[0])
            ctx.model.graph.remove(node)
        return bool(found)


@pytest.mark.parametrize("stage", [Stage.IMPORT, Stage.FACTORIZE])
def test_rewrites_before_and_after_a_foreign_pass_are_judged(stage: Stage) -> None:
    made = model("g (float[N,4] x) => (float[N,4] y) { a = Sub(x, x) i = Identity(x) b = Sub(i, a) y = Exp(b) }")
    foreign = type("Foreign", (Foreign,), {"stage": stage})
    early = once(swap("Sub", "Add", where="a", name="wrong-early", stage=Stage.MERGE))
    late = once(swap("Sub", "Sub", where="b", swap_inputs=True, name="wrong-late"))
    late.stage = Stage.FUSE
    verdict, keys = judged(made, foreign, early, late, same("Exp"))
    assert len(keys) == 4
    assert sorted(verdict.failed) == ["wrong-early:Sub-to-Add@a", "wrong-late:Sub-to-Sub@b"]
    assert verdict.checked == 3


def test_a_model_that_draws_random_numbers_is_judged_where_it_does_not() -> None:
    made = model("g (float[3,4] x) => (float[3,4] y, float[3,4] z) { n = RandomNormalLike(x) a = Sub(x, n) y = Neg(a)"
                 " z = Abs(x) }")  # fmt: skip
    wrong = once(swap("Sub", "Sub", swap_inputs=True, name="wrong"))
    verdict, _ = judged(made, wrong, same("Abs"), same("RandomNormalLike"))
    assert list(verdict.failed) == ["wrong:Sub-to-Sub@a"]
    assert verdict.checked == 2
    assert verdict.unchecked == ["again-randomnormallike:again@n"]
    assert verdict.reference.random


def test_operators_of_a_domain_that_the_original_does_not_import() -> None:
    made = model("g (float[N,4] x) => (float[N,4] y) { a = Sigmoid(x) y = Mul(x, a) }")

    def quick(node: ir.Node, ctx: Context) -> bool:
        if node.op_type != "Mul":
            return False
        new = ctx.node("QuickGelu", [node.inputs[0]], {"alpha": 1.0}, like=node.outputs[0], domain="com.microsoft")
        ctx.model.graph.opset_imports.setdefault("com.microsoft", 1)
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="r")

    verdict, keys = judged(made, rule(quick, kind=Kind.ROUNDING))
    assert verdict.failed == {}
    assert verdict.checked == len(keys) == 1


def test_the_shadow_leaves_the_original_alone() -> None:
    made = net()
    before = ir.to_proto(made).SerializeToString()
    infer_shapes(made)
    inferred = ir.to_proto(made).SerializeToString()
    shadow = Shadow(made)
    shadow.finish()
    assert ir.to_proto(made).SerializeToString() == inferred
    text = ir.to_proto(shadow.epochs[0].model)
    assert [n.op_type for n in text.graph.node] == [n.op_type for n in made.graph]
    assert before
    assert producer(made, "y").graph is made.graph
