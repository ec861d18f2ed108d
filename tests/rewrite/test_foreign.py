"""Other libraries' passes: they run as ours do, and what they spoil is guarded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from graphopt import graphs
from graphopt.errors import BadInput, MissingDependency
from graphopt.files.load import EXTERNAL, load_model
from graphopt.files.save import save_model
from graphopt.passes.foreign.graphsurgeon import Graphsurgeon
from graphopt.passes.foreign.upgrade_opset import UpgradeOpset
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.rewrite.foreign import Aside, apply_graphsurgeon, apply_proto_function, from_ir_pass, from_rules
from graphopt.rewrite.manager import run_passes
from graphopt.targets import load_target
from graphopt.verification.structure import check_structure
from tests.passes.common import assert_same_bits, op_types, run_ort, run_pass, to_ir

EXPLANATION = Explanation(matches="m", refuses="r", costs="c", source="s")
X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)


def text(body: str, *, opset: int = 18, x: str = "float[3,8] x", y: str = "float[3,8] y", ir_version: int = 9) -> str:
    return f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\ng ({x}) => ({y})\n{body}'


def wide(opset: int = 18) -> ir.Model:
    """MatMul and Add, with names and metadata everywhere."""
    body = "<float[1] w = {0}, float[8] b = {1,2,3,4,5,6,7,8}> { h = MatMul(x, w)\n y = Add(h, b) }"
    model = to_ir(text(body, opset=opset))
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32), name="w")
    weight.shape = ir.Shape([8, 8])
    weight.metadata_props["weight"] = "kept"
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
        node.metadata_props["origin"] = f"layer{index}"
        node.doc_string = f"doc{index}"
    model.graph.metadata_props["graph"] = "kept"
    model.metadata_props["model"] = "kept"
    model.producer_name = "someone"
    return model


def large() -> ir.Model:
    """With a weight of 10 kB: above the size that travels."""
    model = to_ir(
        text("<float[1] w = {0}> { h = Relu(x)\n y = MatMul(h, w) }", x="float[40,3,8] x", y="float[40,3,8] y")
    )
    w = model.graph.initializers["w"]
    values = np.random.default_rng(1).standard_normal((40, 8, 8)).astype(np.float32)
    w.const_value, w.shape = ir.tensor(values, name="w"), ir.Shape(values.shape)
    return model


LARGE_X = np.random.default_rng(0).standard_normal((40, 3, 8)).astype(np.float32)


# --- onnx_ir passes ----------------------------------------------------------------------------------------------


def test_an_ir_pass() -> None:
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    cls = from_ir_pass(
        CommonSubexpressionEliminationPass,
        name="ir-cse",
        kind=Kind.BITWISE,
        stage=Stage.ELIMINATE,
        explanation=EXPLANATION,
    )
    before = text("{ a = Relu(x)\n b = Relu(x)\n y = Add(a, b) }")
    found, records = run_pass(before, cls)
    assert (cls.name, cls.__name__, records[0].kind, records[0].stage) == ("ir-cse", "IrCse", "bitwise", "eliminate")
    assert records[0].applications == 1
    assert op_types(found) == ["Relu", "Add"]
    assert_same_bits(before, found, {"x": X})
    unchanged, records = run_pass(before, cls, skip=["ir-cse:foreign@model"])
    assert records[0].applications == 0
    assert op_types(unchanged) == ["Relu", "Relu", "Add"]


class Copying(ir.passes.FunctionalPass):
    """A pass that gives back another model."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        copy = model.clone()
        (node,) = [n for n in copy.graph if n.op_type == "Relu"]
        modified = "seen" not in node.metadata_props
        node.metadata_props["seen"] = "yes"
        return ir.passes.PassResult(copy, modified)


def test_a_functional_ir_pass_reaches_the_model() -> None:
    cls = from_ir_pass(Copying, name="copying", kind=Kind.BITWISE, stage=Stage.MERGE, explanation=EXPLANATION)
    found, records = run_pass(text("{ y = Relu(x) }"), cls)
    assert found.graph.node(0).metadata_props["seen"] == "yes"
    assert records[0].applications == 1


class Failing(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        model.graph.outputs.clear()
        raise RuntimeError("half way")


def test_a_failing_ir_pass_leaves_the_model_as_it_was() -> None:
    cls = from_ir_pass(Failing, name="failing", kind=Kind.BITWISE, stage=Stage.MERGE, explanation=EXPLANATION)
    model = to_ir(text("{ y = Relu(x) }"))
    (record,) = run_passes(Context(model, load_target("onnxruntime")), [cls()])
    assert record.applications == 0
    assert "half way" in record.error
    assert check_structure(model) == []
    np.testing.assert_array_equal(run_ort(model, {"x": X})[0], np.maximum(X, 0))


# --- onnxscript rules --------------------------------------------------------------------------------------------


def rule(name: str, target: Any, replacement: Any, **more: Any) -> Any:
    from onnxscript.rewriter import RewriteRule

    return RewriteRule(target, replacement, name=name, **more)


def double_negation() -> Any:
    return rule("double-negation", lambda op, x: op.Neg(op.Neg(x)), lambda op, x: op.Identity(x))


def rules_pass(*rules: Any) -> type[Pass]:
    return from_rules(rules, name="rules", kind=Kind.BITWISE, stage=Stage.FUSE, explanation=EXPLANATION)


@pytest.mark.parametrize("where", ["main", "body", "function"])
def test_rules_are_applications(where: str) -> None:
    chain = "b = Neg({x})\n c = Neg(b)\n {y} = Relu(c)"
    if where == "main":
        before = text("{ " + chain.format(x="x", y="y") + " }")
    elif where == "body":
        inner = chain.format(x="x", y="t")
        before = text(
            f"{{ y = If (p) <then_branch = t () => (float[3,8] t) {{ {inner} }}, "
            "else_branch = e () => (float[3,8] e) { e = Identity(x) }> }",
            x="float[3,8] x, bool p",
        )
    else:
        inner = chain.format(x="v", y="w")
        before = (
            '<ir_version: 9, opset_import: ["" : 18, "local" : 1]> g (float[3,8] x) => (float[3,8] y) '
            '{ y = local.f(x) } <opset_import: ["" : 18], domain: "local"> f (v) => (w) { ' + inner + " }"
        )
    found, records = run_pass(before, rules_pass(double_negation()))
    assert records[0].applications == 1
    kinds = [node.op_type for graph in graphs.all_graphs(found) for node in graph]
    assert "Neg" not in kinds
    feeds = [{"x": X, "p": np.array(p)} for p in (True, False)] if where == "body" else [{"x": X}]
    assert_same_bits(before, found, *feeds)


def test_a_rule_that_brings_a_constant() -> None:
    made = rule(
        "minus",
        lambda op, x: op.Neg(op.Neg(op.Neg(x))),
        lambda op, x: op.Mul(x, op.initializer(ir.tensor(np.array(-1, np.float32)), name="b")),
    )
    before = text("<float[8] b = {1,2,3,4,5,6,7,8}> { r = Add(x, b)\n s = Neg(r)\n t = Neg(s)\n y = Neg(t) }")
    found, records = run_pass(before, rules_pass(made))
    assert records[0].applications == 1
    assert sorted(found.graph.initializers) == ["b", "b_1"], "its name was taken"
    assert_same_bits(before, found, {"x": X})


def test_a_replacement_that_costs_more_is_not_made() -> None:
    slower = rule("slower", lambda op, x: op.Relu(x), lambda op, x: op.Max(op.Abs(x), op.Relu(x)))
    found, records = run_pass(text("{ y = Relu(x) }"), rules_pass(slower))
    assert records[0].applications == 0
    assert "not cheaper" in records[0].reason
    assert op_types(found) == ["Relu"]


def test_a_rule_for_another_domain_leaves_no_import_where_the_target_has_no_such_operator() -> None:
    other = rule("other", lambda op, x: op.Neg(op.Neg(x)), lambda op, x: op.NoSuchOp(x, _domain="com.acme"))
    found, records = run_pass(text("{ a = Neg(x)\n y = Neg(a) }"), rules_pass(other))
    assert records[0].applications == 0
    assert set(found.opset_imports) == {""}


def test_rules_do_not_take_an_overridable_input_for_a_constant() -> None:
    adds_zero = rule("adds-zero", lambda op, x: op.Add(x, 0.0), lambda op, x: op.Identity(x))
    constant = text("<float z = {0}> { a = Add(x, z)\n y = Relu(a) }")
    overridable = text("<float z = {0}> { a = Add(x, z)\n y = Relu(a) }", x="float[3,8] x, float z")
    assert run_pass(constant, rules_pass(adds_zero))[1][0].applications == 1
    found, records = run_pass(overridable, rules_pass(adds_zero))
    assert records[0].applications == 0
    assert found.graph.initializers["z"].const_value is not None


def test_onnxscripts_own_rules() -> None:
    from onnxscript.rewriter.rules.common import _basic_rules

    rules = [r for r in _basic_rules.basic_optimization_rules() if r._target_pattern.has_single_output_node]
    before = text("{ a = Transpose<perm = [1, 0]>(x)\n y = Transpose<perm = [1, 0]>(a) }")
    found, records = run_pass(before, rules_pass(*rules))
    assert records[0].applications >= 1
    assert "Transpose" not in op_types(found)
    assert_same_bits(before, found, {"x": X})


def test_rules_with_several_outputs_are_refused() -> None:
    def two(op: Any, x: Any) -> Any:
        return op.Neg(x), op.Abs(x)

    with pytest.raises(ValueError, match="several output nodes"):
        rules_pass(rule("two", two, two))


def test_visitors_see_every_graph() -> None:
    seen: list[str] = []
    made = rule(
        "visits",
        lambda op, x: op.Neg(x),
        lambda op, x: op.Neg(x),
        condition_function=lambda context, **_: False,
        graph_pre_visitor=lambda: seen.append("before"),
        graph_post_visitor=lambda: seen.append("after"),
    )
    run_pass(text("{ y = Neg(x) }"), rules_pass(made))
    assert seen == ["before", "after"]


# --- graphs without weights --------------------------------------------------------------------------------------


def test_large_tensors_stay_aside() -> None:
    model = large()
    aside = Aside(model)
    assert ir.to_proto(aside.model).ByteSize() < 2000
    assert isinstance(model.graph.initializers["w"].const_value, ir.Tensor), "the model itself is as it was"
    reloaded = ir.from_proto(ir.to_proto(aside.model))
    reloaded.graph.initializers["w"].name = "renamed"
    aside.put_back(reloaded)
    assert reloaded.graph.initializers["renamed"].const_value is model.graph.initializers["w"].const_value


def test_a_proto_function_keeps_metadata() -> None:
    model = wide()

    def bare(proto: onnx.ModelProto) -> onnx.ModelProto:
        for node in proto.graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
        del proto.graph.metadata_props[:]
        return proto

    apply_proto_function(model, bare)
    check_metadata(model)


def test_a_proto_function_cannot_redeclare_the_interface() -> None:
    model = to_ir(text("{ y = Relu(x) }", y="float[a,b] y"))

    def infers(proto: onnx.ModelProto) -> onnx.ModelProto:
        proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 3
        return proto

    apply_proto_function(model, infers)
    assert str(model.graph.outputs[0].shape) == "[a,b]"


def check_metadata(model: ir.Model) -> None:
    assert [node.metadata_props["origin"] for node in model.graph if node.name in ("n0", "n1")] == ["layer0", "layer1"]
    assert [node.doc_string for node in model.graph if node.name in ("n0", "n1")] == ["doc0", "doc1"]
    assert model.graph.metadata_props["graph"] == "kept"
    assert model.metadata_props["model"] == "kept"
    assert model.graph.initializers["w"].metadata_props["weight"] == "kept"
    assert model.producer_name == "someone"


# --- graphsurgeon ------------------------------------------------------------------------------------------------

gs = pytest.importorskip("onnx_graphsurgeon")


def surgery(model: Any, function: Any) -> tuple[ir.Model, bool]:
    copy = to_ir(model)
    changed = apply_graphsurgeon(copy, function, "test")
    assert check_structure(copy) == []
    return copy, changed


def relu_to_identity(graph: Any) -> None:
    for node in graph.nodes:
        if node.op == "Relu":
            node.op = "Identity"


def test_a_function_that_changes_in_place() -> None:
    model = large()
    weight = model.graph.initializers["w"].const_value
    found, changed = surgery(model, relu_to_identity)
    assert changed
    assert op_types(found) == ["Identity", "MatMul"]
    assert found.graph.initializers["w"].const_value is weight, "not copied, not even read"
    np.testing.assert_allclose(run_ort(found, {"x": LARGE_X})[0], LARGE_X @ weight.numpy(), rtol=1e-5, atol=1e-5)


def test_a_function_that_returns_a_graph() -> None:
    def copied(graph: Any) -> Any:
        other = graph.copy()
        relu_to_identity(other)
        return other.cleanup().toposort()

    found, changed = surgery(large(), copied)
    assert changed
    assert op_types(found) == ["Identity", "MatMul"]


def test_a_function_that_changes_nothing() -> None:
    model = wide()
    graph = model.graph
    assert not apply_graphsurgeon(model, lambda graph: None, "test")
    assert model.graph is graph


def test_large_weights_are_loaded_where_they_are_read() -> None:
    def scaled(graph: Any) -> None:
        weight = graph.tensors()["w"]
        assert isinstance(weight, gs.Constant)
        weight.values = weight.values * 2

    model = large()
    found, changed = surgery(model, scaled)
    assert changed
    before, after = model.graph.initializers["w"].const_value, found.graph.initializers["w"].const_value
    assert before is not None
    assert after is not None
    np.testing.assert_array_equal(after.numpy(), 2 * before.numpy())


def test_a_renamed_weight_is_found_again() -> None:
    def renamed(graph: Any) -> None:
        graph.tensors()["w"].name = "kernel"

    model = large()
    found, _ = surgery(model, renamed)
    assert found.graph.initializers["kernel"].const_value is model.graph.initializers["w"].const_value


def test_weights_from_disk_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save_model(
        ir.to_proto(large()), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="m.data"
    )
    monkeypatch.chdir("/")  # graphsurgeon alone would look for the weights in the current folder
    model = load_model(tmp_path / "m.onnx")

    def touches(graph: Any) -> None:
        relu_to_identity(graph)
        assert graph.tensors()["w"].values.shape == (40, 8, 8)

    for function in (relu_to_identity, touches):
        copy = model.clone()
        copy.graph.meta.update(model.graph.meta)
        assert apply_graphsurgeon(copy, function, "test")
        assert copy.graph.meta[EXTERNAL]
        reloaded = load_model(save_model(copy, tmp_path / "out.onnx"))
        np.testing.assert_array_equal(
            reloaded.graph.initializers["w"].const_value.numpy(), large().graph.initializers["w"].const_value.numpy()
        )


def test_metadata_survives() -> None:
    def added(graph: Any) -> None:
        graph.nodes[0].attrs.clear()
        out = graph.outputs[0]
        producer = out.inputs[0]
        middle = gs.Variable("middle", dtype=np.float32, shape=(3, 8))
        producer.outputs = [middle]
        graph.nodes.append(gs.Node("Identity", "extra", inputs=[middle], outputs=[out]))

    model = wide()
    found, changed = surgery(model, added)
    assert changed
    check_metadata(found)
    assert_same_bits(model, found, {"x": X})


def test_nodes_out_of_order_are_sorted() -> None:
    """A function may append a node whose result earlier nodes read."""

    def inserts(graph: Any) -> None:
        middle = graph.nodes[0].outputs[0]
        first = gs.Variable("first", dtype=np.float32)
        graph.nodes[0].outputs = [first]
        graph.nodes.append(gs.Node("Neg", "late", inputs=[first], outputs=[middle]))

    found, _ = surgery(text("{ a = Relu(x)\n y = Abs(a) }"), inserts)
    assert op_types(found) == ["Relu", "Neg", "Abs"]


def test_overridable_inputs_stay_inputs() -> None:
    before = text("<float[8] b = {1,2,3,4,5,6,7,8}> { a = Relu(x)\n y = Add(a, b) }", x="float[8] b, float[3,8] x")
    found, changed = surgery(before, relu_to_identity)
    assert changed
    assert [value.name for value in found.graph.inputs] == ["b", "x"]
    other = np.zeros(8, np.float32)
    np.testing.assert_array_equal(run_ort(found, {"x": X, "b": other})[0], X)


def test_a_constant_given_as_a_number_stays_float32() -> None:
    before = text("{ c = Constant<value_float = 1.5>()\n a = Relu(x)\n y = Add(a, c) }")

    def folds(graph: Any) -> Any:
        relu_to_identity(graph)
        return graph.fold_constants().cleanup()

    found, _ = surgery(before, folds)
    np.testing.assert_array_equal(run_ort(found, {"x": X})[0], X + np.float32(1.5))


def test_bodies_and_functions_travel() -> None:
    before = large()
    body = text(
        "{ y = If (p) <then_branch = t () => (float[3,8] t) { t = Relu(x) }, "
        "else_branch = e () => (float[3,8] e) { e = Neg(x) }> }",
        x="float[3,8] x, bool p",
    )

    def inside(graph: Any) -> None:
        for inner in graph.subgraphs(recursive=True):
            relu_to_identity(inner)

    found, changed = surgery(body, inside)
    assert changed
    np.testing.assert_array_equal(run_ort(found, {"x": X, "p": np.array(True)})[0], X)
    assert before.graph.initializers["w"].const_value is not None


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ("int4", "cannot carry INT4 (w)"),
        ("float8e4m3fnuz", "cannot carry FLOAT8E4M3FNUZ (w)"),
        ("optional", "cannot carry optional inputs (o)"),
        ("overload", "cannot carry overloads of functions (f)"),
        ("attribute", "cannot carry INT4 (y.value)"),
        ("value", "cannot carry UINT4 (q)"),
    ],
)
def test_what_graphsurgeon_would_spoil_is_refused(spoiled: str, message: str) -> None:
    model = to_ir(text("{ q = Neg(x)\n y = Relu(q) }"))
    graph = model.graph
    if spoiled in ("int4", "float8e4m3fnuz"):
        dtype = ir.DataType[spoiled.upper()]
        tensor = ir.tensor(np.zeros(4, dtype.numpy()), name="w")
        graph.register_initializer(ir.Value(name="w", type=ir.TensorType(dtype), const_value=tensor))
    elif spoiled == "optional":
        graph.inputs.append(ir.Value(name="o", type=ir.OptionalType(ir.TensorType(ir.DataType.FLOAT))))
    elif spoiled == "overload":
        inner = ir.Value(name="v")
        function = ir.Function("local", "f", "two", graph=ir.Graph([inner], [inner], nodes=[]), attributes=[])
        model.functions[function.identifier()] = function
    elif spoiled == "attribute":
        tensor = ir.tensor(np.zeros(4, ir.DataType.INT4.numpy()))
        graph.insert_before(graph.node(0), ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], name="y"))
    else:
        graph.node(0).outputs[0].type = ir.TensorType(ir.DataType.UINT4)
    with pytest.raises(BadInput) as caught:
        apply_graphsurgeon(model, lambda graph: None, "surgery.py:fn")
    assert message in str(caught.value)


def test_a_function_that_fails_is_named() -> None:
    def fails(graph: Any) -> None:
        raise KeyError("no such layer")

    model = to_ir(text("{ y = Relu(x) }"))
    graph = model.graph
    with pytest.raises(BadInput, match="KeyError: 'no such layer'"):
        apply_graphsurgeon(model, fails, "surgery.py:fails")
    assert model.graph is graph
    with pytest.raises(BadInput, match="returned a int, not a graph or None"):
        apply_graphsurgeon(model, lambda graph: 3, "surgery.py:three")


def test_graphsurgeon_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    with pytest.raises(MissingDependency, match="needs onnx-graphsurgeon"):
        apply_graphsurgeon(to_ir(text("{ y = Relu(x) }")), lambda graph: None, "x:y")


def test_the_pass_takes_a_function_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "surgery.py"
    file.write_text("def negate(graph):\n    graph.nodes[0].op = 'Neg'\n")
    found, records = run_pass(text("{ y = Relu(x) }"), Graphsurgeon, function=f"{file}:negate")
    assert op_types(found) == ["Neg"]
    assert (records[0].applications, records[0].kind, records[0].stage) == (1, "rounding", "import")
    _, records = run_pass(text("{ y = Relu(x) }"), Graphsurgeon, function=f"{file}:negate", kind="lossy")
    assert records[0].kind == "lossy"


def test_the_parameters_of_the_pass() -> None:
    for bad in ({}, {"function": "a:b", "kind": "perfect"}, {"function": "a:b", "extra": 1}):
        with pytest.raises(ValidationError):
            Graphsurgeon(bad)


def test_the_recipe(tmp_path: Path) -> None:
    from graphopt.recipes import load_recipe, passes_of

    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\npasses:\n  - {pass: graphsurgeon, function: 'my_module:fn', kind: bitwise}\n")
    (step,) = passes_of([load_recipe(str(recipe))])
    assert isinstance(step, Graphsurgeon)
    assert step.kind is Kind.BITWISE
    assert Graphsurgeon.kind is Kind.ROUNDING


SURGERY = """
def negate(graph):
    graph.nodes[0].op = "Neg"

def drop_the_sign(graph):
    assert graph.nodes[0].op == "Neg", "the first function has not run"
    graph.nodes[2].op = "Abs"
"""


def test_several_functions_in_one_recipe(tmp_path: Path) -> None:
    """Each is a pass of its own: one is wrong about its promise and undone, the other stays."""
    import graphopt

    (tmp_path / "surgery.py").write_text(SURGERY)
    steps = [
        f"  - {{pass: graphsurgeon@{label}, function: '{tmp_path}/surgery.py:{function}', kind: bitwise}}\n"
        for label, function in (("one", "negate"), ("two", "drop_the_sign"))
    ]
    (tmp_path / "mine.yaml").write_text("name: mine\npasses:\n" + "".join(steps))
    # -|x| becomes -|-x|, which is the same, and then |-x|, which is not.
    ir.save(to_ir(text("{ a = Identity(x)\n b = Abs(a)\n y = Neg(b) }")), tmp_path / "m.onnx")
    report = graphopt.optimize(tmp_path / "m.onnx", recipe=[str(tmp_path / "mine.yaml")])
    assert [(p.name, p.kept, p.undone) for p in report.passes] == [
        ("graphsurgeon@one", 1, 0),
        ("graphsurgeon@two", 0, 1),
    ]
    assert list(report.undone) == ["graphsurgeon@two:foreign@model"]
    report = graphopt.optimize(
        tmp_path / "m.onnx", recipe=[str(tmp_path / "mine.yaml")], settings=["graphsurgeon@two.enabled=false"]
    )
    assert [p.name for p in report.passes] == ["graphsurgeon@one"]


# --- upgrade-opset -----------------------------------------------------------------------------------------------


def test_an_old_model_is_upgraded() -> None:
    before = text("{ a = Softmax<axis = 1>(x)\n b = Unsqueeze<axes = [0]>(a)\n y = Squeeze<axes = [0]>(b) }", opset=11)
    found, records = run_pass(before, UpgradeOpset)
    assert records[0].applications == 1
    assert graphs.opset(found) == load_target("onnxruntime").opset
    assert found.ir_version >= 10
    onnx.checker.check_model(ir.to_proto(found))
    np.testing.assert_allclose(run_ort(before, {"x": X})[0], run_ort(found, {"x": X})[0], rtol=1e-6)


@pytest.mark.parametrize(("opset", "version"), [(11, 13), (11, 18), (13, 21), (18, 21), (20, 21), (21, 23)])
def test_versions(opset: int, version: int) -> None:
    before = wide(opset)
    found, records = run_pass(before, UpgradeOpset, version=version)
    assert records[0].applications == 1
    assert graphs.opset(found) == version
    assert_same_bits(before, found, {"x": X})
    check_metadata(found)


def test_an_opset_is_never_lowered() -> None:
    for version in (None, 18, 13):
        _, records = run_pass(text("{ y = Relu(x) }", opset=24, ir_version=10), UpgradeOpset, version=version)
        assert records[0].applications == 0


def test_bodies_are_converted() -> None:
    before = text(
        "{ y = If (p) <then_branch = t () => (float[3,8] t) "
        "{ u = Unsqueeze<axes = [0]>(x)\n t = Squeeze<axes = [0]>(u) }, "
        "else_branch = e () => (float[3,8] e) { e = Neg(x) }> }",
        x="float[3,8] x, bool p",
        opset=11,
    )
    found, _ = run_pass(before, UpgradeOpset, version=21)
    assert_same_bits(before, found, *({"x": X, "p": np.array(p)} for p in (True, False)))


def test_functions_are_inlined() -> None:
    before = (
        '<ir_version: 8, opset_import: ["" : 15, "local" : 1]> g (float[3,8] x) => (float[3,8] y) '
        '{ y = local.f(x) } <opset_import: ["" : 15], domain: "local"> f (v) => (w) { w = Relu(v) }'
    )
    found, _ = run_pass(before, UpgradeOpset, version=21)
    assert op_types(found) == ["Relu"]
    assert_same_bits(before, found, {"x": X})


@pytest.mark.parametrize("opset", [11, 18])
def test_weights_are_not_touched(opset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight whose values cannot be had (or are too large for a proto) is no obstacle."""

    def unreadable() -> ir.TensorProtocol:
        raise AssertionError("read a weight")

    model = to_ir(text("<float[1] w = {0}> { y = MatMul(x, w) }", opset=opset, y="float[3,1000000000] y"))
    w = model.graph.initializers["w"]
    w.shape = ir.Shape([8, 1_000_000_000])
    tensor = ir.LazyTensor(unreadable, dtype=ir.DataType.FLOAT, shape=ir.Shape([8, 1_000_000_000]), name="w")
    w.const_value = tensor
    context = Context(model, load_target("onnxruntime"))
    (record,) = run_passes(context, [UpgradeOpset({"version": 21})])
    assert record.error == ""
    assert graphs.opset(model) == 21
    assert model.graph.initializers["w"].const_value is tensor


def test_versions_beyond_the_target() -> None:
    with pytest.raises(BadInput, match="onnxruntime takes opsets up to 24, not 25"):
        run_pass(text("{ y = Relu(x) }"), UpgradeOpset, version=25)


def test_what_the_converter_leaves_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxscript's converter only raises the number where it has no adapter."""
    from onnxscript import version_converter

    def renumbers(model: ir.Model, version: int) -> None:
        model.opset_imports[""] = version

    monkeypatch.setattr(version_converter, "convert_version", renumbers)
    before = text("{ y = GroupNormalization<num_groups = 2>(x, s, s) }", opset=18, x="float[3,8] x, float[2] s")
    found = to_ir(before)
    found.graph.node(0).op_type = "Scatter"
    found.graph.node(0).attributes.clear()
    with pytest.raises(BadInput, match=r"cannot be converted to opset 21: Scatter .*deprecated"):
        run_passes(Context(found, load_target("onnxruntime")), [UpgradeOpset({"version": 21})])
    assert graphs.opset(found) == 18


def test_a_conversion_that_fails_is_one_line() -> None:
    model = to_ir(text("{ y = Frobnicate(x) }", opset=11))
    with pytest.raises(BadInput) as caught:
        run_passes(Context(model, load_target("onnxruntime")), [UpgradeOpset({"version": 18})])
    assert "cannot be converted to opset 18" in str(caught.value)
    assert "\n" not in caught.value.what
    assert graphs.opset(model) == 11
