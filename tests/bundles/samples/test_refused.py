"""What cannot be run on many samples is refused, with the node that is the reason."""

from __future__ import annotations

import pytest

from graphopt.bundles.samples import for_samples
from graphopt.errors import BadInput
from tests.models.text import model_from_text

HEAD = '<ir_version: 10, opset_import: ["" : 18, "custom" : 1]>'


def one_node(line: str, initializers: str = "") -> str:
    given = f"<{initializers}>" if initializers else ""
    return f"{HEAD} g (float[1, 3, 4, 4] x, int64[1, 2] i) => (float[m] y) {given} {{ {line} }}"


@pytest.mark.parametrize(
    ("line", "initializers", "said"),
    [
        ("y = NonZero (x)", "", "NonZero 'y.*': cannot run on many samples: the sizes of what it makes differ"),
        ("f = Reshape (x, flat) c = Cast <to = 9> (f) y = Compress (f, c)", "int64[1] flat = {-1}", "Compress 'y"),
        ("f = Reshape (x, flat) y, z, v, u = Unique (f)", "int64[1] flat = {-1}", "Unique 'y.*sizes"),
        ("y = custom.Op (x)", "", "Op 'y.*nothing is known"),
        ("y, a, b = DynamicQuantizeLinear (x)", "", "DynamicQuantizeLinear .*whole batch"),
        ("y = RandomNormalLike (x)", "", "RandomNormalLike .*random"),
        ("r = RandomNormal <shape = [1]> () y = Add (x, r)", "", "RandomNormal .*random"),
        ("y = Dropout (x, ratio, train)", "float ratio = {0.5}, bool train = {1}", "Dropout .*random"),
        (
            "y, m, v = BatchNormalization <training_mode = 1> (x, s, s, s, s)",
            "float[3] s = {1, 1, 1}",
            "BatchNormalization .*trains",
        ),
        ("p, y = MaxPool <kernel_shape = [2, 2]> (x)", "", "MaxPool .*count through the batch"),
        ("r = ReduceMean (x, all) y = Conv (x, r)", "int64[1] all = {1}", "Conv .*input 1 differs"),
        ("y = Reshape (x, i)", "", "Reshape .*input 1 differs"),
        ("s = Squeeze (i, zero) y = ConstantOfShape (s)", "int64[1] zero = {0}", "ConstantOfShape .*sizes"),
        ("s = Squeeze (i, zero) y = Expand (x, s)", "int64[1] zero = {0}", "Expand .*differs"),
        (
            "s = Slice (i, zero, one, one) f = Squeeze (s) y, z = TopK (x, f)",
            "int64[1] zero = {0}, int64[1] one = {1}",
            "TopK",
        ),
        ('y = Einsum <equation = "...a->..."> (x)', "", "Einsum .*does not name all axes"),
        ("q = SequenceConstruct (x, x) y = ConcatFromSequence <axis = 1> (q)", "", "SequenceConstruct"),
    ],
)
def test_operators_that_mix_samples(line: str, initializers: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as found:
        for_samples(model_from_text(one_node(line, initializers)))
    assert found.value.hint


def net(body: str, inputs: str = "float[1, 3] x", outputs: str = "float[1, 3] y", opset: int = 18) -> str:
    return f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {body}'


LOOP = """<bool yes = {1}, float t = {2}, int64 n = {5}> {
    y, rows = Loop (n, yes, x) <body = b (int64 i, bool c, float[1, 3] s)
        => (bool again, float[1, 3] after, float[1, 3] row) {
        after = Add (s, s)
        m = ReduceMax <keepdims = 0> (after)
        again = Less (m, t)
        row = Identity (after)
    }>
}"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (net("{ y = Neg (x) }", "float[3] x", "float[3] y"), "no input has an axis of samples"),
        (net("{ y = Neg (x) }", opset=10), "opset 10 is too old"),
        (net(LOOP, outputs="float[1, 3] y, float[t, 1, 3] rows"), "Loop .*output 1 collects a value of each turn"),
        (
            net(
                "<float t = {2}> { m = ReduceMax <keepdims = 0> (x) c = Less (m, t) y = If (c) <"
                "then_branch = a () => (float[1, 3] p) { p = Neg (x) },"
                "else_branch = b () => (float[1, 6] q) { q = Concat <axis = 1> (x, x) }> }",
                outputs="float[m] y",
            ),
            r"If .*other sizes, \[1, 3\] and \[1, 6\]",
        ),
    ],
)
def test_networks_that_cannot_be_taken_apart(text: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as found:
        for_samples(model_from_text(text))
    assert found.value.hint


def test_a_loop_that_collects_may_turn_as_often_for_all() -> None:
    """Only what each sample decides by itself is refused."""
    text = net(LOOP.replace("Less (m, t)", "Identity (c)"), outputs="float[1, 3] y, float[t, 1, 3] rows")
    first, second = for_samples(model_from_text(text)).graph.outputs
    assert [str(first.shape), str(second.shape)] == ["[batch,3]", "[None,batch,3]"]
