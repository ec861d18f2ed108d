"""The usual blocks with every linear as two factors, written out as exporters write them. Any size, seeded.

Each builder takes ``density``, the share of the dense weights' elements that the two factors have, and ``form``:
"factors" writes V and U one after the other, "product" their product as one dense weight that hides its rank. The
same arguments but ``form`` give the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

Form = Literal["factors", "product"]


def mlp_block(
    *,
    width: int = 48,
    hidden: int = 96,
    density: float = 0.5,
    form: Form = "factors",
    bias: bool = True,
    opset: int = 17,
    seed: int = 0,
) -> ir.Model:
    """y = x + fc2(gelu(fc1(LayerNorm(x)))). x, y: float32 [batch, length, width]."""
    build = _Builder(density, form, opset, seed)
    x = build.input("x", ["batch", "length", width])
    normed = build.layer_norm(x, "norm", width)
    middle = build.gelu(build.linear(normed, "fc1", width, hidden, bias=bias))
    y = build.op("Add", x, build.linear(middle, "fc2", hidden, width, bias=bias))
    return build.finish("mlp_block", [x], {"y": (y, x)})


def llama_block(
    *,
    width: int = 48,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 112,
    density: float = 0.5,
    form: Form = "factors",
    cache: bool = False,
    opset: int = 17,
    seed: int = 0,
) -> ir.Model:
    """RMSNorm, grouped-query attention with rotary positions, RMSNorm, silu(gate) * up, down; two residual sums.

    x, y: float32 [batch, length, width]; causal. With ``cache``: past_k, past_v, float32 [batch, kv_heads, past, head]
    before and present_k, present_v after; x are the tokens that follow them.
    """
    build = _Builder(density, form, opset, seed)
    head = width // heads
    x = build.input("x", ["batch", "length", width])
    inputs = [x]
    normed = build.rms_norm(x, "attention_norm", width)
    query = build.split_heads(build.linear(normed, "q", width, width), heads, head)
    key = build.split_heads(build.linear(normed, "k", width, kv_heads * head), kv_heads, head)
    value = build.split_heads(build.linear(normed, "v", width, kv_heads * head), kv_heads, head)
    length, before = build.size(x, 1), build.constant(np.int64(0))
    if cache:
        past_k = build.input("past_k", ["batch", kv_heads, "past", head])
        past_v = build.input("past_v", ["batch", kv_heads, "past", head])
        inputs += [past_k, past_v]
        before = build.size(past_k, 2)
    total = build.op("Add", before, length)
    one = build.constant(np.int64(1))
    positions = build.op("Range", before, total, one)
    query, key = (build.rotate(part, positions, head) for part in (query, key))
    outputs: dict[str, tuple[ir.Value, ir.Value | Sequence[int | str]]] = {}
    if cache:
        key, value = build.op("Concat", past_k, key, axis=2), build.op("Concat", past_v, value, axis=2)
        shape: list[int | str] = ["batch", kv_heads, "past + length", head]
        outputs = {"present_k": (key, shape), "present_v": (value, shape)}
    key, value = (build.repeat_heads(part, kv_heads, heads // kv_heads, head) for part in (key, value))
    later = build.op(
        "Greater",
        build.unsqueeze(build.op("Range", build.constant(np.int64(0)), total, one), 0),
        build.unsqueeze(positions, 1),
    )
    attended = build.attend(query, build.op("Transpose", key, perm=[0, 1, 3, 2]), value, head, hide=later)
    x1 = build.op("Add", x, build.linear(build.merge_heads(attended, width), "o", width, width))
    normed = build.rms_norm(x1, "mlp_norm", width)
    gate, up = (build.linear(normed, name, width, hidden) for name in ("gate", "up"))
    silu = build.op("Mul", gate, build.op("Sigmoid", gate))
    y = build.op("Add", x1, build.linear(build.op("Mul", silu, up), "down", hidden, width))
    return build.finish("llama_block", inputs, {"y": (y, x), **outputs})


def bert_block(
    *,
    width: int = 48,
    heads: int = 4,
    hidden: int = 96,
    density: float = 0.5,
    form: Form = "factors",
    opset: int = 17,
    seed: int = 0,
) -> ir.Model:
    """Attention over unmasked tokens and a Gelu MLP, a LayerNorm after each residual sum.

    x, y: float32 [batch, length, width]; mask: float32 [batch, length], 1 for tokens and 0 for padding.
    """
    build = _Builder(density, form, opset, seed)
    head = width // heads
    x = build.input("x", ["batch", "length", width])
    mask = build.input("mask", ["batch", "length"])
    query, key, value = (
        build.split_heads(build.linear(x, name, width, width, bias=True), heads, head, perm)
        for name, perm in (("query", (0, 2, 1, 3)), ("key", (0, 2, 3, 1)), ("value", (0, 2, 1, 3)))
    )
    far = build.op("Sub", build.constant(np.float32(1)), build.unsqueeze(mask, 1, 2))
    away = build.op("Mul", far, build.constant(np.float32(-1e4)))
    attended = build.merge_heads(build.attend(query, key, value, head, add=away), width)
    summed = build.op("Add", build.linear(attended, "output", width, width, bias=True), x)
    normed = build.layer_norm(summed, "attention_norm", width)
    middle = build.gelu(build.linear(normed, "intermediate", width, hidden, bias=True))
    summed = build.op("Add", build.linear(middle, "down", hidden, width, bias=True), normed)
    y = build.layer_norm(summed, "mlp_norm", width)
    return build.finish("bert_block", [x, mask], {"y": (y, x)})


def resnet_block(
    *,
    channels: int = 24,
    outputs: int | None = None,
    stride: int = 1,
    density: float = 0.5,
    form: Form = "factors",
    norm: Literal["folded", "kept"] = "folded",
    opset: int = 17,
    seed: int = 0,
) -> ir.Model:
    """Two 3x3 convolutions with ReLU and a residual sum; each is a 3x3 of few channels and a 1x1.

    Where ``outputs`` or ``stride`` change the shape, the residual goes through a 1x1, in two factors too. ``norm``
    "kept" leaves a BatchNormalization behind every convolution, "folded" its bias.
    x: float32 [batch, channels, height, width]; y: float32 [batch, outputs, height / stride, width / stride].
    """
    build = _Builder(density, form, opset, seed)
    outputs = channels if outputs is None else outputs
    x = build.input("x", ["batch", channels, "height", "width"])

    def conv(value: ir.Value, name: str, inputs: int, *, kernel: int, stride: int = 1) -> ir.Value:
        made = build.conv(value, name, inputs, outputs, kernel=kernel, stride=stride, bias=norm == "folded")
        return build.batch_norm(made, f"{name}.norm", outputs) if norm == "kept" else made

    middle = build.op("Relu", conv(x, "conv1", channels, kernel=3, stride=stride))
    last = conv(middle, "conv2", outputs, kernel=3)
    skip = x if (outputs, stride) == (channels, 1) else conv(x, "downsample", channels, kernel=1, stride=stride)
    y = build.op("Relu", build.op("Add", last, skip))
    side = ("height", "width") if stride == 1 else ("out_height", "out_width")
    return build.finish("resnet_block", [x], {"y": (y, ["batch", outputs, *side])})


def rank_at(outputs: int, inputs: int, density: float) -> int:
    """The rank at which two factors have the share ``density`` of the dense weight's elements; at least 1."""
    return max(1, int(outputs * inputs * density / (outputs + inputs)))


class _Builder:
    """Writes nodes one after the other; weights are drawn in that order."""

    def __init__(self, density: float, form: Form, opset: int, seed: int) -> None:
        self.density = density
        self.form = form
        self.opset = opset
        self.tape = tape.Tape()
        self.weights: list[ir.Value] = []
        self.random = np.random.default_rng(seed)

    def input(self, name: str, shape: Sequence[int | str]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))

    def op(self, kind: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        return self.tape.op(kind, list(inputs), attributes)  # type: ignore[arg-type]

    def constant(self, value: np.generic | np.ndarray) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.asarray(value)))

    def draw(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
        return (self.random.standard_normal(shape) * scale + mean).astype(np.float32)

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        array = np.ascontiguousarray(array)
        value = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(array.shape),
            const_value=ir.tensor(array, name=name),
        )
        self.weights.append(value)
        return value

    def finish(
        self,
        name: str,
        inputs: Sequence[ir.Value],
        outputs: dict[str, tuple[ir.Value, ir.Value | Sequence[int | str]]],
    ) -> ir.Model:
        """The model; each output gets its name and its shape, or that of another value."""
        for title, (value, shape) in outputs.items():
            value.name = title
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = shape.shape if isinstance(shape, ir.Value) else ir.Shape(shape)
        graph = ir.Graph(
            inputs,
            [value for value, _ in outputs.values()],
            nodes=self.tape.nodes,
            initializers=self.weights,
            opset_imports={"": self.opset},
            name=name,
        )
        for i, node in enumerate(graph):
            node.name = f"{node.op_type.lower()}_{i}"
        return ir.Model(graph, ir_version=10)

    # linears

    def linear(self, x: ir.Value, name: str, inputs: int, outputs: int, *, bias: bool = False) -> ir.Value:
        """Two MatMuls by V and U as an exporter stores them, (in, out); a bias added from the left."""
        rank = rank_at(outputs, inputs, self.density)
        v, u = self.draw(inputs, rank, scale=inputs**-0.5), self.draw(rank, outputs, scale=rank**-0.5)
        if self.form == "product":
            product = (v.astype(np.float64) @ u.astype(np.float64)).astype(np.float32)
            y = self.op("MatMul", x, self.weight(f"{name}.weight", product))
        else:
            middle = self.op("MatMul", x, self.weight(f"{name}.v", v))
            y = self.op("MatMul", middle, self.weight(f"{name}.u", u))
        if not bias:
            return y
        return self.op("Add", self.weight(f"{name}.bias", self.draw(outputs, scale=0.1)), y)

    def conv(
        self, x: ir.Value, name: str, inputs: int, outputs: int, *, kernel: int, stride: int, bias: bool
    ) -> ir.Value:
        """A convolution of few channels, then a 1x1 with the bias."""
        n = inputs * kernel * kernel
        rank = rank_at(outputs, n, self.density)
        v, u = self.draw(rank, n, scale=n**-0.5), self.draw(outputs, rank, scale=rank**-0.5)
        biases = [self.weight(f"{name}.bias", self.draw(outputs, scale=0.1))] if bias else []
        pad = kernel // 2
        attributes = {"kernel_shape": [kernel, kernel], "strides": [stride, stride], "pads": [pad] * 4}
        if self.form == "product":
            product = (u.astype(np.float64) @ v.astype(np.float64)).astype(np.float32)
            whole = self.weight(f"{name}.weight", product.reshape(outputs, inputs, kernel, kernel))
            return self.op("Conv", x, whole, *biases, **attributes)
        first = self.weight(f"{name}.v", v.reshape(rank, inputs, kernel, kernel))
        middle = self.op("Conv", x, first, **attributes)
        second = self.weight(f"{name}.u", u.reshape(outputs, rank, 1, 1))
        return self.op("Conv", middle, second, *biases, kernel_shape=[1, 1])

    # norms and activations

    def batch_norm(self, x: ir.Value, name: str, channels: int) -> ir.Value:
        scale, shift, mean = (
            self.weight(f"{name}.{part}", self.draw(channels, scale=0.2, mean=centre))
            for part, centre in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0))
        )
        variance = self.weight(f"{name}.running_var", 0.5 + self.random.random(channels).astype(np.float32))
        return self.op("BatchNormalization", x, scale, shift, mean, variance, epsilon=1e-5)

    def layer_norm(self, x: ir.Value, name: str, width: int) -> ir.Value:
        scale = self.weight(f"{name}.weight", self.draw(width, scale=0.1, mean=1.0))
        shift = self.weight(f"{name}.bias", self.draw(width, scale=0.1))
        if self.opset >= 17:
            return self.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-5)
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes=[-1], keepdims=1))
        normed = self.op("Div", centred, self.root_mean_square(centred))
        return self.op("Add", self.op("Mul", normed, scale), shift)

    def rms_norm(self, x: ir.Value, name: str, width: int) -> ir.Value:
        normed = self.op("Mul", x, self.op("Reciprocal", self.root_mean_square(x)))
        return self.op("Mul", self.weight(f"{name}.weight", self.draw(width, scale=0.1, mean=1.0)), normed)

    def root_mean_square(self, x: ir.Value) -> ir.Value:
        square = self.op("Pow", x, self.constant(np.float32(2)))
        if self.opset >= 18:
            mean = self.op("ReduceMean", square, self.constant(np.array([-1])), keepdims=1)
        else:
            mean = self.op("ReduceMean", square, axes=[-1], keepdims=1)
        return self.op("Sqrt", self.op("Add", mean, self.constant(np.float32(1e-5))))

    def gelu(self, x: ir.Value) -> ir.Value:
        if self.opset >= 20:
            return self.op("Gelu", x)
        erf = self.op("Erf", self.op("Div", x, self.constant(np.float32(2**0.5))))
        both = self.op("Mul", x, self.op("Add", erf, self.constant(np.float32(1))))
        return self.op("Mul", both, self.constant(np.float32(0.5)))

    # attention

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        return self.op("Gather", self.op("Shape", x), self.constant(np.int64(axis)), axis=0)

    def unsqueeze(self, x: ir.Value, *axes: int) -> ir.Value:
        return self.op("Unsqueeze", x, self.constant(np.array(axes, np.int64)))

    def shape(self, *dims: ir.Value | int) -> ir.Value:
        parts = [
            self.constant(np.array([dim], np.int64)) if isinstance(dim, int) else self.unsqueeze(dim, 0) for dim in dims
        ]
        return self.op("Concat", *parts, axis=0)

    def split_heads(self, x: ir.Value, heads: int, head: int, perm: Sequence[int] = (0, 2, 1, 3)) -> ir.Value:
        split = self.op("Reshape", x, self.shape(self.size(x, 0), self.size(x, 1), heads, head))
        return self.op("Transpose", split, perm=list(perm))

    def merge_heads(self, x: ir.Value, width: int) -> ir.Value:
        merged = self.op("Transpose", x, perm=[0, 2, 1, 3])
        return self.op("Reshape", merged, self.shape(self.size(merged, 0), self.size(merged, 1), width))

    def repeat_heads(self, x: ir.Value, heads: int, times: int, head: int) -> ir.Value:
        """Each head ``times`` times, side by side."""
        if times == 1:
            return x
        batch, length = self.size(x, 0), self.size(x, 2)
        spread = self.op("Expand", self.unsqueeze(x, 2), self.shape(batch, heads, times, length, head))
        return self.op("Reshape", spread, self.shape(batch, heads * times, length, head))

    def rotate(self, x: ir.Value, positions: ir.Value, head: int) -> ir.Value:
        """x cos + rotate_half(x) sin, the angles by position."""
        slow = self.constant((10000.0 ** (-np.arange(0, head, 2) / head)).astype(np.float32)[None])
        angles = self.op("Mul", self.unsqueeze(self.op("Cast", positions, to=ir.DataType.FLOAT), 1), slow)
        angles = self.op("Concat", angles, angles, axis=-1)
        axis, half = self.constant(np.array([3])), head // 2
        low = self.op("Slice", x, self.constant(np.array([0])), self.constant(np.array([half])), axis)
        high = self.op("Slice", x, self.constant(np.array([half])), self.constant(np.array([head])), axis)
        turned = self.op("Concat", self.op("Neg", high), low, axis=-1)
        straight = self.op("Mul", x, self.op("Cos", angles))
        return self.op("Add", straight, self.op("Mul", turned, self.op("Sin", angles)))

    def attend(
        self,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        head: int,
        *,
        hide: ir.Value | None = None,
        add: ir.Value | None = None,
    ) -> ir.Value:
        """softmax(q k / sqrt(head)) v; ``hide`` says which scores do not count, ``add`` is added to them."""
        scores = self.op("Div", self.op("MatMul", query, key), self.constant(np.float32(head**0.5)))
        if hide is not None:
            scores = self.op("Where", hide, self.constant(np.float32(-1e9)), scores)
        if add is not None:
            scores = self.op("Add", scores, add)
        return self.op("MatMul", self.op("Softmax", scores, axis=-1), value)
