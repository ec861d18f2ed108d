"""Functions written out at their calls: the same numbers, and names that are used once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from graphopt import graphs
from graphopt.errors import BadInput
from graphopt.inlining import inline_all

HEAD = '<ir_version: 10, opset_import: ["" : 20, "own" : 1]>'


def domain(opset: int = 20) -> str:
    return f'<domain: "own", opset_import: ["" : {opset}, "own" : 1]>'


CASES = {
    "twice": f"""{HEAD} g (float[3] x) => (float[3] y) {{ t = own.F(x)  u = own.F(t)  y = Mul(t, u) }}
        {domain()} F (a) => (b) {{ c = Neg(a)  b = Exp(c) }}""",
    "names that the caller has, swapped": f"""{HEAD} g (float[3] x, float[3] b) => (float[3] y) {{ y = own.F(b, x) }}
        {domain()} F (x, b) => (y) {{ y = Sub(x, b) }}""",
    "an output unused": f"""{HEAD} g (float[3] x) => (float[3] y) {{ y = own.F(x) }}
        {domain()} F (a) => (b, c) {{ b = Neg(a)  c = Exp(a) }}""",
    "an input returned": f"""{HEAD} g (float[3] x) => (float[3] y, float[3] z) {{ y, z = own.F(x) }}
        {domain()} F (a) => (b, a) {{ b = Neg(a) }}""",
    "a value returned twice": f"""{HEAD} g (float[3] x) => (float[3] y, float[3] z) {{ y, z = own.F(x) }}
        {domain()} F (a) => (b, b) {{ b = Neg(a) }}""",
    "one inside the other": f"""{HEAD} g (float[3] x) => (float[3] y) {{ t = own.G(x)  y = own.G(t) }}
        {domain()} F (a) => (b) {{ b = Neg(a) }}
        {domain()} G (a) => (b) {{ c = own.F(a)  d = own.F(c)  b = Add(d, c) }}""",
    "an attribute handed on": f"""{HEAD} g (float[3] x) => (float[3] y) {{ y = own.G <s = 2.5> (x) }}
        {domain()} F <alpha> (a) => (b) {{ b = LeakyRelu <alpha : float = @alpha> (a) }}
        {domain()} G <s> (a) => (b) {{ b = own.F <alpha : float = @s> (a) }}""",
    "another opset, the same operator": f"""{HEAD} g (float[3] x) => (float[3] y) {{ y = own.F(x) }}
        {domain(17)} F (a) => (b) {{ b = Neg(a) }}""",
    "in a body": f"""{HEAD} g (float[3] x, bool c) => (float[3] y) {{
            t = own.F(x)
            y = If (c) <then_branch = p () => (float[3] r) {{ r = own.F(t) }},
                        else_branch = q () => (float[3] r) {{ s = own.F(t)  r = own.F(s) }}>
        }} {domain()} F (a) => (b) {{ c = Neg(a)  b = Exp(c) }}""",
}


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], *, ort: bool) -> list[np.ndarray]:
    """By ONNX's evaluator, which does not hand attributes on, or by ONNX Runtime, which knows only tidy functions."""
    outputs: list[np.ndarray]
    if not ort:
        outputs = ReferenceEvaluator(model).run(None, feeds)
        return outputs
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, feeds)
    return outputs


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_the_same_numbers(text: str) -> None:
    model = ir.from_onnx_text(text)
    before = ir.to_proto(model)
    assert inline_all(model)
    after = ir.to_proto(model)
    assert not after.functions
    feeds = {"x": np.array([0.5, -1, 2], np.float32)}
    for value in before.graph.input[1:]:
        feeds[value.name] = np.array(True) if value.name == "c" else np.array([3, 1, -2], np.float32)
    onnx.checker.check_model(after, full_check=True)
    wanted, found = (run(one, feeds, ort="@alpha" in text) for one in (before, after))
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(one, other)
    names = Counter(output.name for node in graphs.all_nodes(model) for output in node.outputs)
    assert max(names.values()) == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            f"""{HEAD} g (float[3] x) => (float[3] y) {{ y = own.F(x) }}
            {domain(11)} F (a) => (b) {{ b = Softmax(a) }}""",
            "a node of type Softmax: Softmax of opset 11 means something else in opset 20",
        ),
        (
            f"""{HEAD} g (float[3] x) => (float[3] y) {{ y = own.F(x) }}
            {domain()} F (a) => (b) {{ b = own.F(a) }}""",
            "function F: calls itself",
        ),
        (
            f"""{HEAD} g (float[3] x) => (float[3] y) {{ [n] y = own.F(x, x) }}
            {domain()} F (a) => (b) {{ b = Neg(a) }}""",
            "node 'n': the call does not fit the function F",
        ),
    ],
)
def test_what_cannot_be_written_out(text: str, line: str) -> None:
    with pytest.raises(BadInput) as caught:
        inline_all(ir.from_onnx_text(text))
    assert str(caught.value) == line


def test_a_model_without_functions_is_left_alone() -> None:
    model = ir.from_onnx_text(f"{HEAD} g (float[3] x) => (float[3] y) {{ y = Relu(x) }}")
    assert not inline_all(model)
