"""Networks to build engines of, and small graphs whose one node a TensorRT library takes or refuses.

``FORMS`` holds what ONNX's node corpus does not: constants that are computed, bodies, attention, operators of other
domains, narrow codes. Each says which operator TensorRT-RTX refuses in it, as was seen with the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from tests.models.text import model_from_text

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Form:
    """A small graph around one node.

    Attributes:
        text: The model in ONNX's text syntax, from the graph's name on.
        refused: The operator that TensorRT-RTX refuses; "" where it builds.
        opset: Of the model.
        weights: Constants that the text does not hold.
        feeds: Values of inputs that decide shapes, and the shapes of dynamic ones.
        dies: Whether the library crashes.
    """

    text: str
    refused: str = ""
    opset: int = 20
    weights: Arrays = field(default_factory=dict)
    feeds: Arrays = field(default_factory=dict)
    dies: bool = False

    def proto(self) -> onnx.ModelProto:
        """The model."""
        head = f'<ir_version: 10, opset_import: ["" : {self.opset}, "com.microsoft" : 1, "other" : 1]> g '
        model = onnx.parser.parse_model(head + self.text)
        for name, array in self.weights.items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return model


# -- constants --------------------------------------------------------------------------------------------------------

_AXES = """(float[4, 3] x) => (float y)
<int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[1] axis = {1}, int64[1, 1] nested = {1}, int64[1] at = {0},
 float[1] real = {1}, int32[1] narrow = {1}, bool[1] yes = {1}> """
_MADE = {
    "identity": "axes = Identity(axis)",
    "cast": "axes = Cast<to = 7>(narrow)",
    "cast_twice": "a = Cast<to = 6>(real) axes = Cast<to = 7>(a)",
    "cast_like": "axes = CastLike(narrow, axis)",
    "constant": "axes = Constant<value_ints = [1]>()",
    "unsqueeze": "axes = Unsqueeze(one, at)",
    "squeeze": "axes = Squeeze(nested, at)",
    "concat": "axes = Concat<axis = 0>(axis)",
    "arithmetic": "axes = Sub(axis, at)",
    "range": "axes = Range(one, two, one)",
    "of_shape": "s = Shape(x) r = Shape(s) axes = Sub(r, axis)",
}
_LOST = ("unsqueeze", "squeeze", "concat", "arithmetic", "range", "of_shape")


def _constants() -> dict[str, Form]:
    made: dict[str, Form] = {}
    for name, nodes in _MADE.items():
        lines = nodes.replace(") ", ")\n")
        reduced = f"{_AXES} {{ {lines}\n y = ReduceMean(x, axes) }}"
        made[f"reduce, axes by {name}"] = Form(reduced, "ReduceMean" if name in _LOST else "")
        made[f"unsqueeze, axes by {name}"] = Form(f"{_AXES} {{ {lines}\n y = Unsqueeze(x, axes) }}")
    return made


# -- sizes ------------------------------------------------------------------------------------------------------------

_SIZES = """(float[4, 4] x, int64[1] n, float[1] real) => (float y)
<int64[1] at = {0}, int64[1] four = {4}, int64 zero = {0}, int64 one = {1}> """
_FROM_DATA = "m = ReduceMax<keepdims = 0>(x)\n k = Cast<to = 7>(m)\n c = Unsqueeze(k, at)\n"
_TWO: dict[str, np.ndarray[Any, Any]] = {"n": np.array([2], np.int64), "real": np.array([2], np.float32)}


def _sizes() -> dict[str, Form]:
    made = {
        "slice, end given": Form(_SIZES + "{ y = Slice(x, at, n, at) }", feeds=_TWO),
        "slice, end given as float": Form(
            _SIZES + "{ e = Cast<to = 7>(real)\n y = Slice(x, at, e, at) }", "Slice", feeds=_TWO
        ),
        "top k, k given": Form(_SIZES + "{ y, i = TopK(x, n) }", feeds=_TWO),
        "gather, index given as float": Form(_SIZES + "{ i = Cast<to = 7>(real)\n y = Gather(x, i) }", feeds=_TWO),
    }
    for op, nodes in {
        "Slice": "y = Slice(x, c, four, at)",
        "Range": "r = Range(zero, k, one)\n y = Cast<to = 1>(r)",
        "Reshape": "s = Concat<axis = 0>(c, four)\n y = Reshape(x, s)",
        "Expand": "s = Concat<axis = 0>(c, four, four)\n y = Expand(x, s)",
        "Tile": "s = Concat<axis = 0>(c, four)\n y = Tile(x, s)",
        "Pad": "s = Concat<axis = 0>(c, c, c, c)\n y = Pad(x, s)",
        "TopK": "y, i = TopK(x, c)",
        "ConstantOfShape": "y = ConstantOfShape(c)",
    }.items():
        made[f"{op}, sizes from data"] = Form(f"{_SIZES} {{ {_FROM_DATA} {nodes} }}", op)
    return made


# -- bodies -----------------------------------------------------------------------------------------------------------

_LOOP = """(int64 n, float[1] y, float[4] whole) => (float[1] result) <bool yes = {1}> {
 result = Loop(n, yes, y)<body = b (int64 i, bool on, float[1] a) => (bool still, float[1] next)
 <int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[1] at = {0}, int64[1] last = {-1}, int64[1] single = {1},
  float[4] x = {1, 2, 3, 4}, int64[2] parts = {1, 3}, float[2] codes = {0, 1}>
 { still = Identity(on)
   after = Add(i, one)
   from = Unsqueeze(i, at)
   to = Unsqueeze(after, at)
   """
_REST = "\n s = ReduceSum(r)\n one_number = Reshape(s, single)\n next = Add(a, one_number) }> }"
_THREE = {"n": np.array(3)}


def _bodies() -> dict[str, Form]:
    made: dict[str, Form] = {}
    for op, nodes in {
        "Slice": "r = Slice(x, from, to)",
        "Range": "k = Range(zero, i, one)\n r = Cast<to = 1>(k)",
        "Reshape": "k = Concat<axis = 0>(to, last)\n r = Reshape(x, k)",
        "Expand": "k = Concat<axis = 0>(to, single)\n r = Expand(a, k)",
        "Tile": "r = Tile(a, to)",
        "ConstantOfShape": "r = ConstantOfShape(to)",
        "TopK": "r, k = TopK(x, to)",
        "Pad": "k = Concat<axis = 0>(to, single)\n r = Pad(a, k)",
        "OneHot": "r = OneHot(single, after, codes)",
    }.items():
        made[f"{op} in a Loop, sizes by the run"] = Form(_LOOP + nodes + _REST, op, feeds=_THREE)
    for name, nodes in {
        "Gather in a Loop, index by the run": "r = Gather(x, from)",
        "Slice in a Loop, sizes by shapes": "k = Shape(a)\n r = Slice(x, at, k)",
        "Split in a Loop": "r, k = Split<axis = 0>(x, parts)",
        "Range in a Loop, constants": "k = Range(zero, two, one)\n r = Cast<to = 1>(k)",
    }.items():
        made[name] = Form(_LOOP + nodes + _REST, feeds=_THREE)
    head = "(int64 n, float[1] y) => (float[k] r) <bool yes = {1}, float[1] most = {9}>"
    body = "body = b (int64 i, bool on, float[m] a) => (bool still, float[q] next"
    made |= {
        "growing state": Form(
            f"{head} {{ r = Loop(n, yes, y)<{body}) {{ still = Identity(on)\n next = Concat<axis = 0>(a, a) }}> }}",
            "Loop",
            feeds=_THREE,
        ),
        "no condition, read": Form(
            f"{head} {{ r = Loop(n, , y)<{body}) {{ still = Identity(on)\n next = Add(a, a) }}> }}",
            "Loop",
            feeds=_THREE,
        ),
        "no condition, not read": Form(
            f"{head} {{ r = Loop(n, , y)<{body}) <bool t = {{1}}> {{ still = Identity(t)\n next = Add(a, a) }}> }}",
            feeds=_THREE,
        ),
        "while": Form(
            "(float[1] y) => (float[1] r) <bool yes = {1}, float[1] most = {9}> { r = Loop(, yes, y)<"
            "body = b (int64 i, bool on, float[1] a) => (bool still, float[1] next)"
            " { next = Add(a, a)\n l = Less(next, most)\n still = Squeeze(l) }> }"
        ),
        "while, collecting": Form(
            "(float[1] y) => (float[1] r, float[k, 1] all) <bool yes = {1}, float[1] most = {9}> {"
            "r, all = Loop(, yes, y)<body = b (int64 i, bool on, float[1] a) => (bool still, float[1] next, float[1] o)"
            " { next = Add(a, a)\n l = Less(next, most)\n still = Squeeze(l)\n o = Identity(next) }> }",
            "Loop",
        ),
        "scan": Form(
            "(float[5, 3] x, float[3] start) => (float[3] s, float[5, 3] o) { s, o = Scan<num_scan_inputs = 1,"
            " body = b (float[3] a, float[3] xi) => (float[3] next, float[3] oi)"
            " { next = Add(a, xi)\n oi = Identity(next) }>(start, x) }"
        ),
    }
    branches = (
        "<then_branch = t () => (float[2, 3] p) { p = Relu(x) },"
        " else_branch = e () => (float[6] q) { q = Reshape(x, six) }>"
    )
    for name, condition, refused in (
        ("given", "c = Identity(flag)", "If"),
        ("by constants", "c = Equal(one, one)", ""),
        ("by a shape", "k = Size(x)\n c = Equal(k, many)", ""),
    ):
        made[f"branches of unequal rank, condition {name}"] = Form(
            "(float[2, 3] x, bool flag) => (float y) <int64[1] six = {6}, int64 one = {1}, int64 many = {6}>"
            f" {{ {condition}\n z = If(c) {branches}\n y = Abs(z) }}",
            refused,
        )
    return made


# -- attention --------------------------------------------------------------------------------------------------------


def _attention_text(dtype: str, batch: int, heads: int, queries: int, keys: int, width: int, mask: str = "") -> str:
    given = f", {mask}[{queries}, {keys}] m" if mask else ""
    inputs = f"{dtype}[{batch}, {heads}, {queries}, {width}] q, " + ", ".join(
        f"{dtype}[{batch}, {heads}, {keys}, {width}] {name}" for name in "kv"
    )
    return f"({inputs}{given}) => ({dtype} y) {{ y = Attention(q, k, v{', m' if mask else ''}) }}"


def _attention() -> dict[str, Form]:
    made: dict[str, Form] = {}
    for dtype, batch, heads, queries, width, mask, runs in (
        ("float", 1, 4, 1, 64, "", True),
        ("float", 1, 2, 1, 64, "", False),
        ("float", 1, 4, 1, 12, "", False),
        ("float", 1, 4, 1, 264, "", False),
        ("float", 1, 4, 4, 64, "", False),
        ("float16", 1, 4, 4, 64, "", True),
        ("float16", 1, 4, 4, 64, "bool", True),
        ("float16", 1, 4, 4, 64, "float16", True),
        ("float16", 1, 4, 4, 8, "", False),
        ("float16", 1, 4, 4, 12, "", True),
        ("float16", 1, 4, 4, 12, "bool", False),
        ("float16", 1, 4, 4, 264, "", False),
        ("float16", 1, 1, 4, 64, "", False),
        ("float16", 2, 1, 4, 64, "", True),
        ("float16", 2, 1, 4, 64, "float16", False),
        ("bfloat16", 1, 4, 4, 64, "", True),
    ):
        name = f"Attention, {dtype}, batch {batch}, {heads} heads of {width}, {queries} queries, mask {mask or 'none'}"
        text = _attention_text(dtype, batch, heads, queries, 64, width, mask)
        made[name] = Form(text, "" if runs else "Attention", opset=23)
    flat = "(float[2, 4, 64] q, float[2, 4, 64] k, float[2, 4, 64] v) => (float y) "
    call = "y = com.microsoft.MultiHeadAttention<num_heads = 4>"
    bias = {"b": np.ones(192, np.float32)}
    made |= {
        "Attention of three axes": Form(
            flat + "{ y = Attention<q_num_heads = 4, kv_num_heads = 4>(q, k, v) }", opset=23
        ),
        "Attention of one tensor": Form(
            "(float[2, 4, 64] x) => (float y) { y = Attention<q_num_heads = 4, kv_num_heads = 4>(x, x, x) }",
            "Attention",
            opset=23,
            dies=True,
        ),
        "Attention of one tensor, added 0": Form(
            "(float[2, 4, 64] x) => (float y) <float[1] zero = {0}> { q = Add(x, zero)\n"
            " y = Attention<q_num_heads = 4, kv_num_heads = 4>(q, x, x) }",
            opset=23,
        ),
        "Attention of one tensor, times 1": Form(
            "(float16[2, 4, 8, 64] x) => (float16 y) { q = Mul(x, one)\n y = Attention(q, x, x) }",
            "Attention",
            opset=23,
            weights={"one": np.ones(1, np.float16)},
            dies=True,
        ),
        "Attention, queries and keys by equal nodes": Form(
            "(float16[2, 4, 8, 64] x) => (float16 y) { q = Relu(x)\n k = Relu(x)\n y = Attention(q, k, x) }",
            "Attention",
            opset=23,
            dies=True,
        ),
        "Attention, queries and keys by a cast there and back": Form(
            "(float16[2, 4, 8, 64] x) => (float16 y)"
            " { a = Cast<to = 1>(x)\n q = Cast<to = 10>(a)\n y = Attention(q, x, x) }",
            "Attention",
            opset=23,
            dies=True,
        ),
        "Attention, queries and keys by equal weights": Form(
            "(float16[2, 4, 8, 64] x) => (float16 y) { q = MatMul(x, w)\n k = MatMul(x, w)\n y = Attention(q, k, x) }",
            opset=23,
            weights={"w": np.eye(64, dtype=np.float16)},
        ),
        "Attention, queries are values": Form(
            "(float16[2, 4, 8, 64] x, float16[2, 4, 8, 64] k) => (float16 y) { y = Attention(x, k, x) }", opset=23
        ),
        "MultiHeadAttention, queries are values": Form(flat + f"{{ {call}(q, k, q) }}"),
        "MultiHeadAttention": Form(flat + f"{{ {call}(q, k, v) }}"),
        "MultiHeadAttention, keys are values": Form(flat + f"{{ {call}(q, k, k) }}"),
        "MultiHeadAttention, queries are keys": Form(flat + f"{{ {call}(q, q, v) }}", "MultiHeadAttention", dies=True),
        "MultiHeadAttention, bias": Form(flat + f"{{ {call}(q, k, v, b) }}", "MultiHeadAttention", weights=bias),
        "MultiHeadAttention, one query and head": Form(
            "(float[1, 1, 64] q, float[1, 8, 64] k, float[1, 8, 64] v) => (float y)"
            " { y = com.microsoft.MultiHeadAttention<num_heads = 1>(q, k, v) }",
            "MultiHeadAttention",
        ),
    }
    return made


# -- narrow codes -----------------------------------------------------------------------------------------------------

_CODES = {"w": np.arange(16, dtype=np.int8).reshape(4, 4)}


def _codes() -> dict[str, Form]:
    made: dict[str, Form] = {}
    for name, nodes, refused in (
        ("DequantizeLinear", "d = DequantizeLinear(w, s)\n y = MatMul(x, d)", ""),
        ("Transpose", "t = Transpose(w)\n d = DequantizeLinear(t, s)\n y = MatMul(x, d)", "Transpose"),
        ("Reshape", "t = Reshape(w, sizes)\n d = DequantizeLinear(t, s)\n y = MatMul(x, d)", "Reshape"),
        ("Cast", "d = Cast<to = 1>(w)\n y = MatMul(x, d)", "Cast"),
        ("Shape", "d = Shape(w)\n y = Reshape(x, d)", ""),
    ):
        text = f"(float[4, 4] x) => (float y) <float s = {{0.1}}, int64[2] sizes = {{4, 4}}> {{ {nodes} }}"
        made[f"int8 constant into {name}"] = Form(text, refused, weights=_CODES)
    rows = {"x": np.zeros((4, 4), np.float32)}
    scales = {"s": np.ones(4, np.float32)}
    per_axis = "y = QuantizeLinear<axis = 1, output_dtype = 3>(x, s)"
    made |= {
        "scales by column, rows dynamic": Form(
            f"(float[N, 4] x) => (int8 y) {{ {per_axis} }}", opset=21, weights=scales, feeds=rows
        ),
        "scales by column, columns dynamic": Form(
            f"(float[4, N] x) => (int8 y) {{ {per_axis} }}", "QuantizeLinear", opset=21, weights=scales, feeds=rows
        ),
        "scale found at run time": Form(
            "(float[4, 4] x) => (int8 y) { s = ReduceMax<keepdims = 0>(x)\n"
            " y = QuantizeLinear<output_dtype = 3>(x, s) }",
            opset=21,
        ),
        "scale by row found at run time, rows dynamic": Form(
            "(float[N, 4] x) => (int8 y) <int64[1] axes = {1}> { s = ReduceMax<keepdims = 0>(x, axes)\n"
            " y = QuantizeLinear<axis = 0, output_dtype = 3>(x, s) }",
            "QuantizeLinear",
            opset=21,
            feeds=rows,
        ),
    }
    return made


# -- other domains, other types ---------------------------------------------------------------------------------------


def _others() -> dict[str, Form]:
    vector = "(float[4] x) => (float[4] y) "
    r = np.random.default_rng(0).standard_normal
    lstm = {
        "w": r((1, 16, 3)).astype(np.float32),
        "r": r((1, 16, 4)).astype(np.float32),
        "b": r((1, 32)).astype(np.float32),
    }
    steps = "(float[5, 2, 3] x) => (float y) "
    image = {"x": np.zeros((1, 1, 2, 2), np.float32)}
    sized = 'y = Resize<axes = [2, 3], mode = "nearest">(x, , , sizes) }'
    return {
        "Gelu of ONNX Runtime": Form(vector + "{ y = com.microsoft.Gelu(x) }"),
        "FastGelu of ONNX Runtime": Form(vector + "{ y = com.microsoft.FastGelu(x) }", "FastGelu"),
        "FusedMatMul of ONNX Runtime": Form(
            "(float[4, 4] x) => (float y) { y = com.microsoft.FusedMatMul(x, x) }", "FusedMatMul"
        ),
        "custom operator": Form(vector + "{ y = other.Thing(x) }", "Thing"),
        "integers multiplied": Form("(int64[2, 2] x) => (int64 y) { y = MatMul(x, x) }", "MatMul"),
        "types mixed": Form("(float[2, 2] x, float16[2, 2] z) => (float y) { y = MatMul(x, z) }", "MatMul"),
        "number reduced": Form("(float x) => (float y) { y = ReduceSum(x) }", "ReduceSum"),
        "float64 multiplied": Form("(double[2, 2] x) => (double y) { y = MatMul(x, x) }"),
        "LSTM": Form(steps + "{ y = LSTM<hidden_size = 4>(x, w, r, b) }", weights=lstm),
        "LSTM, clip": Form(steps + "{ y = LSTM<hidden_size = 4, clip = 1.0>(x, w, r, b) }", weights=lstm),
        "LSTM, input_forget": Form(
            steps + "{ y = LSTM<hidden_size = 4, input_forget = 1>(x, w, r, b) }", "LSTM", weights=lstm
        ),
        "Resize of two axes, these dynamic": Form(
            "(float[1, 1, H, W] x) => (float y) <int64[2] sizes = {6, 8}> {" + sized, feeds=image
        ),
        "Resize of two axes, the batch dynamic": Form(
            "(float[N, 1, 2, 2] x) => (float y) <int64[2] sizes = {6, 8}> {" + sized, "Resize", feeds=image
        ),
    }


FORMS: Mapping[str, Form] = {
    **_constants(),
    **_sizes(),
    **_bodies(),
    **_attention(),
    **_codes(),
    **_others(),
}

# An operator of another domain by the name of a standard one builds, as the standard one: predicted, not measurable.
NAMESAKE = Form("(float[4] x) => (float[4] y) { y = other.Relu(x) }", "Relu")


# -- networks ---------------------------------------------------------------------------------------------------------


def resnet(*, channels: tuple[int, ...] = (16, 32, 64), blocks: int = 2, size: int = 64) -> ir.Model:
    """A ResNet of basic blocks: a 7 x 7 stem, ``blocks`` blocks a stage, average pooling, ten classes.

    image: float32 [batch, 3, size, size]; logits: float32 [batch, 10].
    """
    weights = [f"float[{channels[0]}, 3, 7, 7] stem", f"float[{channels[0]}] stem_bias"]
    nodes = [
        "s = Conv<strides = [2, 2], pads = [3, 3, 3, 3]>(image, stem, stem_bias)",
        "t = Relu(s)",
        "x0 = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(t)",
    ]
    before, at = channels[0], 0
    for stage, width in enumerate(channels):
        for block in range(blocks):
            name, stride = f"b{stage}_{block}", 2 if stage > 0 and block == 0 else 1
            weights += [f"float[{width}, {before}, 3, 3] {name}_w1", f"float[{width}] {name}_c1"]
            weights += [f"float[{width}, {width}, 3, 3] {name}_w2", f"float[{width}] {name}_c2"]
            nodes += [
                f"{name}_1 = Conv<strides = [{stride}, {stride}], pads = [1, 1, 1, 1]>(x{at}, {name}_w1, {name}_c1)",
                f"{name}_2 = Relu({name}_1)",
                f"{name}_3 = Conv<pads = [1, 1, 1, 1]>({name}_2, {name}_w2, {name}_c2)",
            ]
            skip = f"x{at}"
            if before != width or stride != 1:
                weights.append(f"float[{width}, {before}, 1, 1] {name}_w3")
                nodes.append(f"{name}_s = Conv<strides = [{stride}, {stride}]>(x{at}, {name}_w3)")
                skip = f"{name}_s"
            nodes += [f"{name}_4 = Add({name}_3, {skip})", f"x{at + 1} = Relu({name}_4)"]
            before, at = width, at + 1
    weights += [f"float[{before}, 10] head", "float[10] head_bias"]
    nodes += [f"p = GlobalAveragePool(x{at})", "f = Flatten(p)", "logits = Gemm(f, head, head_bias)"]
    return _network("resnet", f"float[batch, 3, {size}, {size}] image", "float[batch, 10] logits", weights, nodes)


def unet(*, width: int = 16, levels: int = 3, size: int = 64) -> ir.Model:
    """A U-Net: two convolutions a level, ConvTranspose up, at the last level Resize; the skips concatenated.

    image: float32 [batch, 3, size, size]; mask: float32 [batch, 1, size, size].
    """
    weights: list[str] = ["float[4] twice = {1, 1, 2, 2}"]
    nodes: list[str] = []

    def double(name: str, x: str, inputs: int, outputs: int) -> str:
        weights.extend([f"float[{outputs}, {inputs}, 3, 3] {name}_w1", f"float[{outputs}] {name}_c1"])
        weights.extend([f"float[{outputs}, {outputs}, 3, 3] {name}_w2", f"float[{outputs}] {name}_c2"])
        nodes.extend(
            [
                f"{name}_1 = Conv<pads = [1, 1, 1, 1]>({x}, {name}_w1, {name}_c1)",
                f"{name}_2 = Relu({name}_1)",
                f"{name}_3 = Conv<pads = [1, 1, 1, 1]>({name}_2, {name}_w2, {name}_c2)",
                f"{name} = Relu({name}_3)",
            ]
        )
        return name

    x, channels, skips = "image", 3, []
    for level in range(levels):
        x = double(f"down{level}", x, channels, width << level)
        skips.append(x)
        nodes.append(f"pool{level} = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>({x})")
        x, channels = f"pool{level}", width << level
    x = double("bottom", x, channels, width << levels)
    channels = width << levels
    for level in reversed(range(levels)):
        if level == 0:
            nodes.append(f'up{level} = Resize<mode = "linear">({x}, , twice)')
        else:
            weights.append(f"float[{channels}, {width << level}, 2, 2] up{level}_w")
            nodes.append(f"up{level} = ConvTranspose<strides = [2, 2]>({x}, up{level}_w)")
            channels = width << level
        nodes.append(f"cat{level} = Concat<axis = 1>(up{level}, {skips[level]})")
        x = double(f"out{level}", f"cat{level}", channels + (width << level), width << level)
        channels = width << level
    weights.append(f"float[1, {channels}, 1, 1] last")
    nodes += [f"logits = Conv({x}, last)", "mask = Sigmoid(logits)"]
    shape = f"{size}, {size}"
    return _network("unet", f"float[batch, 3, {shape}] image", f"float[batch, 1, {shape}] mask", weights, nodes)


def lstm(*, inputs: int = 80, hidden: int = 128, state: bool = False) -> ir.Model:
    """Two LSTM layers, the first in both directions, and a Gemm of their last state.

    x: float32 [time, batch, inputs]. With ``state``: h, c, float32 [1, batch, hidden] before and next_h, next_c after;
    one direction then. y: float32 [time, batch, 16].
    """
    both = 1 if state else 2
    weights = [
        f"float[{both}, {4 * hidden}, {inputs}] w1",
        f"float[{both}, {4 * hidden}, {hidden}] r1",
        f"float[{both}, {8 * hidden}] b1",
        f"float[1, {4 * hidden}, {both * hidden}] w2",
        f"float[1, {4 * hidden}, {hidden}] r2",
        f"float[1, {8 * hidden}] b2",
        f"float[{hidden}, 16] out",
        "int64[3] merged = {0, 0, -1}",
        "int64[1] direction = {1}",
    ]
    first = (
        f"o1, next_h, next_c = LSTM<hidden_size = {hidden}>(x, w1, r1, b1, , h, c)"
        if state
        else f'o1, h1, c1 = LSTM<hidden_size = {hidden}, direction = "bidirectional">(x, w1, r1, b1)'
    )
    nodes = [
        first,
        "t1 = Transpose<perm = [0, 2, 1, 3]>(o1)",
        "m1 = Reshape(t1, merged)",
        f"o2, h2, c2 = LSTM<hidden_size = {hidden}>(m1, w2, r2, b2)",
        "s2 = Squeeze(o2, direction)",
        "y = MatMul(s2, out)",
    ]
    given, results = f"float[time, batch, {inputs}] x", "float[time, batch, 16] y"
    if state:
        carried = f"float[1, batch, {hidden}]"
        given += f", {carried} h, {carried} c"
        results += f", {carried} next_h, {carried} next_c"
    return _network("lstm", given, results, weights, nodes)


def _network(name: str, inputs: str, outputs: str, weights: list[str], nodes: list[str]) -> ir.Model:
    text = f'<ir_version: 8, opset_import: ["" : 17]> {name} ({inputs}) => ({outputs})\n<{", ".join(weights)}> {{\n'
    return model_from_text(text + "\n".join(nodes) + "\n}")
