"""Small plain networks: what the usual exporters write for the usual layers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from tests.models.text import model_from_text, random_weight


def mlp() -> ir.Model:
    """Gemm, Relu, MatMul + Add, with an Identity and a dead branch."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17]>
        mlp (float[N, 16] x) => (float[N, 4] y)
        <float[16, 32] w1, float[32] b1, float[32, 32] w2, float[32] b2, float[4, 32] w3, float[4] b3> {
            h1 = Gemm(x, w1, b1)
            a1 = Relu(h1)
            i1 = Identity(a1)
            unused = Exp(i1)
            m2 = MatMul(i1, w2)
            h2 = Add(m2, b2)
            a2 = Tanh(h2)
            y = Gemm<alpha = 0.5, transB = 1>(a2, w3, b3)
        }""")


def convnet() -> ir.Model:
    """Conv+BatchNormalization+Relu twice (one Conv without bias, one grouped), pooling, Gemm."""
    return model_from_text(
        """
        <ir_version: 8, opset_import: ["": 17]>
        convnet (float[N, 3, 16, 16] image) => (float[N, 5] logits)
        <float[8, 3, 3, 3] w1, float[8] s1, float[8] o1, float[8] m1, float[8] v1,
         float[16, 4, 3, 3] w2, float[16] b2, float[16] s2, float[16] o2, float[16] m2, float[16] v2,
         float[16, 5] w3, float[5] b3> {
            c1 = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(image, w1)
            n1 = BatchNormalization<epsilon = 0.00001>(c1, s1, o1, m1, v1)
            r1 = Relu(n1)
            p1 = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r1)
            c2 = Conv<kernel_shape = [3, 3], group = 2, strides = [2, 2]>(p1, w2, b2)
            n2 = BatchNormalization(c2, s2, o2, m2, v2)
            r2 = Relu(n2)
            g = GlobalAveragePool(r2)
            f = Flatten<axis = 1>(g)
            logits = Gemm(f, w3, b3)
        }""",
        weights={
            **{f"s{i}": 1 + random_weight(f"s{i}", (8 * i,)) for i in (1, 2)},
            **{f"v{i}": 0.5 + np.abs(random_weight(f"v{i}", (8 * i,))) for i in (1, 2)},
        },
    )


def transformer_block() -> ir.Model:
    """One attention block, two heads, LayerNormalization and Gelu decomposed, shapes computed at run time."""
    ones = np.ones(16, np.float32)
    return model_from_text(
        """
        <ir_version: 8, opset_import: ["": 17]>
        block (float[batch, sequence, 16] x) => (float[batch, sequence, 16] y)
        <float[16] g1, float[16] d1, float[16, 48] wqkv, float[48] bqkv, float[16, 16] wo, float[16] bo,
         float[16] g2, float[16] d2, float[16, 64] wu, float[64] bu, float[64, 16] wd, float[16] bd,
         float two = {2}, float eps = {0.00001}, float root_dim = {2.8284271},
         float root_two = {1.4142135}, float one = {1}, float half = {0.5},
         int64 zero = {0}, int64 at_one = {1}, int64[1] axis0 = {0},
         int64[2] heads = {2, 24}, int64[1] width = {16}, int64[3] thirds = {8, 8, 8}> {
            mean1 = ReduceMean<axes = [-1]>(x)
            c1 = Sub(x, mean1)
            sq1 = Pow(c1, two)
            var1 = ReduceMean<axes = [-1]>(sq1)
            vare1 = Add(var1, eps)
            std1 = Sqrt(vare1)
            n1 = Div(c1, std1)
            ng1 = Mul(n1, g1)
            l1 = Add(ng1, d1)
            qkvm = MatMul(l1, wqkv)
            qkv = Add(bqkv, qkvm)
            shape = Shape(qkv)
            b = Gather(shape, zero)
            s = Gather(shape, at_one)
            b1 = Unsqueeze(b, axis0)
            s1 = Unsqueeze(s, axis0)
            split_shape = Concat<axis = 0>(b1, s1, heads)
            split = Reshape(qkv, split_shape)
            swapped = Transpose<perm = [0, 2, 1, 3]>(split)
            q, k, v = Split<axis = 3>(swapped, thirds)
            kt = Transpose<perm = [0, 1, 3, 2]>(k)
            qk = MatMul(q, kt)
            scores = Div(qk, root_dim)
            probs = Softmax<axis = -1>(scores)
            mixed = MatMul(probs, v)
            back = Transpose<perm = [0, 2, 1, 3]>(mixed)
            merged_shape = Concat<axis = 0>(b1, s1, width)
            merged = Reshape(back, merged_shape)
            om = MatMul(merged, wo)
            o = Add(om, bo)
            r1 = Add(x, o)
            mean2 = ReduceMean<axes = [-1]>(r1)
            c2 = Sub(r1, mean2)
            sq2 = Mul(c2, c2)
            var2 = ReduceMean<axes = [-1]>(sq2)
            vare2 = Add(var2, eps)
            std2 = Sqrt(vare2)
            n2 = Div(c2, std2)
            ng2 = Mul(g2, n2)
            l2 = Add(ng2, d2)
            um = MatMul(l2, wu)
            u = Add(um, bu)
            ur = Div(u, root_two)
            e = Erf(ur)
            e1 = Add(e, one)
            ue = Mul(u, e1)
            gelu = Mul(ue, half)
            dm = MatMul(gelu, wd)
            d = Add(dm, bd)
            y = Add(r1, d)
        }""",
        weights={"g1": ones + random_weight("g1", (16,)), "g2": ones + random_weight("g2", (16,))},
    )


def recurrent() -> ir.Model:
    """A bidirectional LSTM followed by a GRU, with an initial state that the graph makes from zeros."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17]>
        recurrent (float[time, batch, 6] x) => (float[time, batch, 5] y, float[1, batch, 5] last)
        <float[2, 32, 6] w, float[2, 32, 8] r, float[2, 64] b, float[1, 15, 16] wg, float[1, 15, 5] rg,
         int64 one = {1}, int64[1] two = {2}, int64[1] eight = {8}, int64[1] axis0 = {0},
         int64[3] merge = {0, 0, -1}, int64[1] direction = {1}> {
            shape = Shape(x)
            batch = Gather(shape, one)
            batch1 = Unsqueeze(batch, axis0)
            state_shape = Concat<axis = 0>(two, batch1, eight)
            h0 = ConstantOfShape<value = float[1] {0.0}>(state_shape)
            o, hn, cn = LSTM<hidden_size = 8, direction = "bidirectional">(x, w, r, b, , h0, h0)
            ot = Transpose<perm = [0, 2, 1, 3]>(o)
            om = Reshape(ot, merge)
            g, last = GRU<hidden_size = 5>(om, wg, rg)
            y = Squeeze(g, direction)
        }""")


def unet() -> ir.Model:
    """A U-Net of two levels: strided Conv down, ConvTranspose and Resize up, skips concatenated."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17]>
        unet (float[N, 2, 16, 16] image) => (float[N, 1, 16, 16] mask)
        <float[8, 2, 3, 3] w1, float[8] b1, float[16, 8, 3, 3] w2, float[16] b2, float[16, 16, 3, 3] w3,
         float[16, 8, 2, 2] wu, float[8] bu, float[8, 24, 3, 3] w4, float[8, 16, 3, 3] w5, float[1, 8, 1, 1] wo,
         float[4] twice = {1, 1, 2, 2}> {
            c1 = Conv<pads = [1, 1, 1, 1]>(image, w1, b1)
            e1 = LeakyRelu<alpha = 0.1>(c1)
            c2 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(e1, w2, b2)
            e2 = Relu(c2)
            c3 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(e2, w3)
            e3 = Sigmoid(c3)
            up = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric",
                        nearest_mode = "floor">(e3, , twice)
            u2 = ConvTranspose<strides = [2, 2]>(e2, wu, bu)
            upu = Resize<mode = "linear">(up, , twice)
            skip2 = Concat<axis = 1>(u2, upu)
            c4 = Conv<pads = [1, 1, 1, 1]>(skip2, w4)
            d1 = Relu(c4)
            skip1 = Concat<axis = 1>(d1, e1)
            c5 = Conv<pads = [1, 1, 1, 1]>(skip1, w5)
            d0 = Relu(c5)
            mask = Conv(d0, wo)
        }""")


def tied_embeddings() -> ir.Model:
    """A word table that both looks up the input and, transposed, computes the logits."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17]>
        tied (int64[batch, sequence] ids) => (float[batch, sequence, 20] logits)
        <float[20, 12] table, float[12, 12] w> {
            words = Gather(table, ids)
            h = MatMul(words, w)
            a = Tanh(h)
            turned = Transpose<perm = [1, 0]>(table)
            logits = MatMul(a, turned)
        }""")


def shared_weights() -> ir.Model:
    """One weight under two names and one name used by three layers."""
    same = random_weight("same", (8, 8))
    return model_from_text(
        """
        <ir_version: 8, opset_import: ["": 17]>
        shared (float[N, 8] x) => (float[N, 8] y)
        <float[8, 8] w, float[8, 8] copy, float[8] b> {
            m1 = MatMul(x, w)
            a1 = Add(m1, b)
            t1 = Tanh(a1)
            m2 = MatMul(t1, copy)
            a2 = Add(m2, b)
            t2 = Tanh(a2)
            m3 = MatMul(t2, w)
            y = Add(m3, t1)
        }""",
        weights={"w": same, "copy": same},
    )


def zero_dims() -> ir.Model:
    """Tensors of zero elements: an empty weight concatenated, an empty slice, a sum over nothing."""
    return model_from_text(
        """
        <ir_version: 8, opset_import: ["": 17]>
        zero_dims (float[N, 4] x) => (float[N, 4] y, float[N, 0] empty)
        <float[0, 4] none, int64[1] zero = {0}, int64[1] one = {1}, int64[1] from = {0}, int64[1] upto = {0}> {
            rows = Concat<axis = 0>(x, none)
            empty = Slice(x, from, upto, one)
            sum = ReduceSum<keepdims = 1>(empty, one)
            y = Add(rows, sum)
        }""",
        weights={"none": np.zeros((0, 4), np.float32)},
    )


def opset_9() -> ir.Model:
    """A file of 2019: IR 3, opset 9, weights listed among the inputs, axes and slices as attributes."""
    model = onnx.parser.parse_model("""
        <ir_version: 3, opset_import: ["": 9]>
        old (float[N, 3, 8, 8] x, float[4, 3, 3, 3] w, float[4] b, float[4] s, float[4] o, float[4] m, float[4] v,
             float[64, 6] w2, float[6] b2) => (float[N, 6] y) {
            c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w, b)
            n = BatchNormalization(c, s, o, m, v)
            r = Relu(n)
            p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
            d = Dropout<ratio = 0.5>(p)
            shape = Shape(d)
            s0 = Slice<axes = [0], starts = [0], ends = [1]>(shape)
            rest = Constant<value = int64[1] {-1}>()
            target = Concat<axis = 0>(s0, rest)
            f = Reshape(d, target)
            f4 = Unsqueeze<axes = [1]>(f)
            f2 = Squeeze<axes = [1]>(f4)
            g = Gemm(f2, w2, b2)
            y = Clip<min = -2.0, max = 2.0>(g)
        }""")
    values = {value.name: value for value in model.graph.input if value.name != "x"}
    for name, value in values.items():
        shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        weight = random_weight(name, shape)
        if name in "sv":
            weight = 1 + np.abs(weight)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.checker.check_model(model)
    return ir.from_proto(model)


def overridable_weight() -> ir.Model:
    """A weight that is also an input (IR 8): a default that the caller may replace, never a constant."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        overridable (float[N, 4] x, float[4] scale) => (float[N, 4] y) {
            one = Constant<value = float {1.0}>()
            more = Add(scale, one)
            y = Mul(x, more)
        }""")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(4, np.float32), "scale"))
    return ir.from_proto(model)


def layout_transposes() -> ir.Model:
    """Channels-last in and out, with a Transpose on each side of every Conv, names ending in ``:0``.

    This is how converters from TensorFlow spell a Conv; the names would not be legal in ONNX's text, so they
    are put in after parsing.
    """
    model = model_from_text("""
        <ir_version: 8, opset_import: ["": 15]>
        channels_last (float[N, 8, 8, 3] image) => (float[N, 8, 8, 4] features)
        <float[4, 3, 3, 3] w1, float[4] b1, float[4, 4, 3, 3] w2, float[1, 1, 1, 4] b2> {
            t1 = Transpose<perm = [0, 3, 1, 2]>(image)
            c1 = Conv<auto_pad = "SAME_UPPER", kernel_shape = [3, 3]>(t1, w1, b1)
            u1 = Transpose<perm = [0, 2, 3, 1]>(c1)
            r1 = Relu(u1)
            t2 = Transpose<perm = [0, 3, 1, 2]>(r1)
            c2 = Conv<auto_pad = "SAME_UPPER", kernel_shape = [3, 3]>(t2, w2)
            u2 = Transpose<perm = [0, 2, 3, 1]>(c2)
            a2 = Add(u2, b2)
            features = Identity(a2)
        }""")
    graph = model.graph
    for value in [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]:
        if value.name and not value.name.endswith(":0"):
            value.name = f"model/{value.name}:0"
    return model
