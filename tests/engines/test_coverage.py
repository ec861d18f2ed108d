"""What is predicted of a build, beside the library itself where it is installed."""

from __future__ import annotations

import importlib.util

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from benchmarks import rtx_corpus
from benchmarks.rtx_corpus import VARIANTS, Answer, Item, judge
from graphopt.engines.coverage import Coverage, facts, predict
from graphopt.engines.coverage.conditions import CONDITIONS
from graphopt.errors import BadInput
from graphopt.targets import load_target
from tests.models import RUNNABLE, deep_chain, many_small_nodes
from tests.models.engines import FORMS, NAMESAKE, Form

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed"
)
TARGETS = ("tensorrt", "tensorrt-rtx")
OURS = "(float[4] x) => (float[4] y) { y = other.Ours(x) }"


def covered(form: Form | str, target: str = "tensorrt-rtx", **options: object) -> Coverage:
    form = form if isinstance(form, Form) else Form(form)
    return predict(ir.from_proto(form.proto()), target, **options)  # type: ignore[arg-type]


def only(coverage: Coverage) -> str:
    assert len(coverage.refused) == 1, [str(refusal) for refusal in coverage.refused]
    return str(coverage.refused[0])


# -- the facts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_the_facts_are_whole(target: str) -> None:
    known = facts(target)
    ops = {op for rule in known.rules for name in rule.op for op in known.members(name)}
    assert ops <= known.operators
    for rule in known.rules:
        for test in rule.when:
            assert set(test) <= set(CONDITIONS), rule
        # One condition brings the hint along, by its name.
        assert rule.hint == "{hint}" or len(known.hint(rule.hint).split()) > 1, rule
    for op, hint in known.refused.items():
        assert len(known.hint(hint).split()) > 1, op


@pytest.mark.parametrize("target", TARGETS)
def test_passes_and_builds_know_the_same_operators(target: str) -> None:
    """The target's list is what passes may not write; the facts' list is what a build refuses."""
    known = facts(target)
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    runs = known.operators - set(known.refused)
    assert load_target(target).unsupported <= standard
    # Passes write none of these: the parser has them, and they ask for plugins.
    plugins = {"CausalConvWithState", "LinearAttention", "NonMaxSuppression", "NonZero", "RoiAlign"}
    assert standard - runs - load_target(target).unsupported <= plugins


def test_unknown_target() -> None:
    with pytest.raises(BadInput, match=r"there are tensorrt, tensorrt-rtx"):
        facts("tensorflow")


# -- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    coverage = covered(FORMS[name])
    assert coverage.ok == (FORMS[name].refused == "")
    assert FORMS[name].refused in ("", *(refusal.op_type for refusal in coverage.refused))
    assert all(refusal.tried and refusal.hint and refusal.reason for refusal in coverage.refused)


def test_what_a_refusal_says() -> None:
    text = "(float[4] x) => (int64[k] y) { z = Relu(x)\n y = NonZero(z) }"
    coverage = covered(text)
    assert only(coverage) == (
        "NonZero 'node_of_y': TensorRT-RTX does not run NonZero (the size of its result depends on data; compute it"
        " outside of the model, or with a fixed size by TopK or Where)"
    )
    assert coverage.nodes == 2 and coverage.certain
    error = coverage.error("m.onnx")
    assert str(error).startswith("m.onnx: TensorRT-RTX 1.7 refuses NonZero 'node_of_y': ")


def test_the_others_are_counted() -> None:
    text = "(float[4] x) => (float y) { a = other.A(x)\n b = other.B(a)\n c = other.B(b)\n y = other.B(c) }"
    assert "; and 3 more: B 3" in covered(text).error().what


def test_the_full_library_was_not_tried() -> None:
    coverage = covered("(float[4] x) => (float y) { y = Unique(x) }", "tensorrt")
    assert not coverage.certain
    assert "by its documentation (not tried here)" in only(coverage)
    assert "(not tried here)" in coverage.error().what
    assert covered("(float[4] x) => (int64[k] y) { y = NonZero(x) }", "tensorrt").ok


def test_operators_of_newer_versions() -> None:
    form = FORMS["Attention, float16, batch 1, 4 heads of 64, 4 queries, mask none"]
    assert "has Attention from 10.14 on" in only(covered(form, "tensorrt", version="10.9.0.34"))
    for version in ("10.14.1", "11.4.0.106", None):
        assert covered(form, "tensorrt", version=version).ok


def test_plugins_run_what_the_library_has_not() -> None:
    assert covered(OURS, plugins=["Ours"]).ok
    assert "a plugin, or a function body" in only(covered(OURS))


def test_an_operator_that_is_taken_for_another() -> None:
    assert "takes other.Relu for the standard operator" in only(covered(NAMESAKE))


def test_functions_are_followed() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20, "other" : 1]>
        g (float[4] x) => (float[k] y) { y = other.Ours(x) }
        <domain: "other", opset_import: ["" : 20]>
        Ours (a) => (b) { b = Unique(a) }""")
    coverage = predict(ir.from_proto(model))
    assert coverage.refused[0].place == "function other::Ours"
    assert coverage.refused[0].op_type == "Unique"


def test_places_in_bodies() -> None:
    text = """(float[2] x, bool c) => (float y) { y = If(c)<then_branch = t () => (float p) { p = Relu(x) },
        else_branch = e () => (float q) { q = If(c)<then_branch = t2 () => (float r) { r = Unique(x) },
        else_branch = e2 () => (float s) { s = Abs(x) }> }> }"""
    assert covered(text).refused[0].place == "else_branch of y / then_branch of q"


def test_inputs_outputs_and_weights() -> None:
    text = "(uint16[2] x, seq(float[2]) s) => (float[2] y) <uint4[2] w = {1, 2}> { y = Cast<to = 1>(x) }"
    found = [(refusal.node, refusal.op_type, refusal.reason) for refusal in covered(text).refused]
    assert found == [
        ("x", "", "TensorRT-RTX has no inputs of type uint16"),
        ("s", "", "is a sequence"),
        ("w", "", "TensorRT-RTX has no weights of type uint4"),
    ]


def test_inputs_whose_values_decide_shapes() -> None:
    text = """(float[4, 4] x, int64[1] n, int64[2] s, int64[1] i) => (float y) {
        a = Slice(x, i, n, i)  b = Reshape(a, s)  k = Shape(x)  c = Expand(b, k)  y = Gather(c, i) }"""
    assert covered(text.replace("  ", "\n")).shape_inputs == ("i", "n", "s")
    assert covered("(float[N] x) => (float y) { s = Shape(x)\n y = ConstantOfShape(s) }").shape_inputs == ()


def test_one_size_of_a_symbolic_axis() -> None:
    """A decode engine has one query, and a kernel for that."""
    inputs = ", ".join(f"float[1, 4, {axis}, 64] {name}" for name, axis in (("q", "Q"), ("k", "K"), ("v", "K")))
    form = Form(f"({inputs}) => (float y) {{ y = Attention(q, k, v) }}", opset=23)
    assert not covered(form).ok
    assert covered(form, sizes={"Q": 1}).ok
    assert not covered(form, sizes={"Q": 2}).ok


def test_predicting_changes_nothing_but_types() -> None:
    model = ir.from_proto(FORMS["LSTM"].proto())
    before = [(node.op_type, len(node.inputs), dict(node.attributes)) for node in model.graph]
    predict(model)
    assert [(node.op_type, len(node.inputs), dict(node.attributes)) for node in model.graph] == before


def test_long_chains_and_many_nodes() -> None:
    """No recursion, and no walk to the inputs from each node."""
    assert predict(deep_chain(5000)).ok
    assert predict(many_small_nodes(1000)).ok


# -- the judge --------------------------------------------------------------------------------------------------------


def test_the_judge_sees_every_kind() -> None:
    item = Item("one", Form("(float[4] x) => (float y) { z = Relu(x)\n y = Unique(z) }").proto(), {})
    refusing, fine = (
        covered("(float[4] x) => (float y) { z = Relu(x)\n y = Unique(z) }"),
        covered("(float x) => (y) { y = Relu(x) }"),
    )
    right = Answer("parse", "false", "Unique", ("node_of_y",))
    assert judge(item, right, refusing).kind == "refused"
    assert judge(item, Answer("parse", "false", "Relu", ("node_of_z",)), refusing).kind == "wrong node"
    assert judge(item, Answer("build", "node_of_z", "", ("node_of_z",)), refusing).kind == "wrong node"
    assert judge(item, Answer("built"), refusing).kind == "false"
    assert judge(item, right, fine).kind == "missed"
    assert judge(item, Answer("crash"), fine).kind == "missed"
    assert judge(item, Answer("built"), fine).kind == "built"


# -- the library ------------------------------------------------------------------------------------------------------


def assert_right(items: list[Item | None]) -> None:
    summary = rtx_corpus.summarise(list(rtx_corpus.run(items)))
    assert summary["not_right"] == []
    assert summary["built"] and summary["refused"]


@needs_rtx
def test_a_sample_of_the_corpus() -> None:
    """Cases spread over all, each as another of the variants."""
    from benchmarks.corpus import collect

    cases = collect()[7::47]
    variants = list(VARIANTS)
    assert_right([rtx_corpus.make_item(case, variants[index % 4]) for index, case in enumerate(cases)])


@needs_rtx
def test_a_sample_of_the_forms() -> None:
    names = list(FORMS)[::4]
    assert_right([Item(name, FORMS[name].proto(), FORMS[name].feeds) for name in names])


@needs_rtx
def test_a_crash_was_predicted_and_costs_one_model() -> None:
    dying = next(name for name, form in FORMS.items() if form.dies)
    items = [Item(name, FORMS[name].proto(), {}) for name in (dying, "LSTM", "MultiHeadAttention", dying)]
    judged = list(rtx_corpus.run(items, workers=1))
    assert [one.stage for one in judged] == ["crash", "built", "built", "crash"]
    assert {one.kind for one in judged} == {"built", "refused"}


@needs_rtx
@pytest.mark.slow
def test_all_forms() -> None:
    assert_right([Item(name, form.proto(), form.feeds) for name, form in FORMS.items()])


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_corpus(variant: str) -> None:
    from benchmarks.corpus import collect

    assert_right(rtx_corpus.items(collect(), variant))


@needs_rtx
@pytest.mark.slow
def test_the_networks_of_other_tests() -> None:
    """Their functions left in: the build inlines, and the answer is of what it then parses."""
    from graphopt.inlining import inline_all

    items: list[Item | None] = []
    for name, make in RUNNABLE.items():
        model = make()
        inline_all(model)
        shapes = {value.name: value.shape for value in model.graph.inputs if not value.is_initializer()}
        feeds = {
            key: np.ones([axis if isinstance(axis, int) else 3 for axis in shape], np.int64)
            for key, shape in shapes.items()
            if shape is not None
        }
        items.append(Item(name, ir.to_proto(model), feeds))
    assert_right(items)
