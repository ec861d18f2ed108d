"""Networks with quantised, half-precision or packed weights, and with ops of other domains."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from tests.models.text import model_from_text, random_weight


def qdq_int8() -> ir.Model:
    """Two layers in QuantizeLinear/DequantizeLinear form: uint8 activations, int8 weights, one per channel."""
    w1, s1 = _int8(random_weight("w1", (8, 16)), axis=1)
    w2, s2 = _int8(random_weight("w2", (16, 4)), axis=None)
    return model_from_text(
        """
        <ir_version: 8, opset_import: ["": 17]>
        qdq (float[N, 8] x) => (float[N, 4] y)
        <int8[8, 16] w1, float[16] s1, int8[16] z1, int8[16, 4] w2, float s2, int8 z2 = {0}, float[16] b1,
         float sx = {0.03}, uint8 zx = {128}, float sh = {0.02}, uint8 zh = {0}> {
            xq = QuantizeLinear(x, sx, zx)
            xd = DequantizeLinear(xq, sx, zx)
            wd1 = DequantizeLinear<axis = 1>(w1, s1, z1)
            m1 = MatMul(xd, wd1)
            a1 = Add(m1, b1)
            r1 = Relu(a1)
            hq = QuantizeLinear(r1, sh, zh)
            hd = DequantizeLinear(hq, sh, zh)
            wd2 = DequantizeLinear(w2, s2, z2)
            y = MatMul(hd, wd2)
        }""",
        weights={"w1": w1, "s1": s1, "z1": np.zeros(16, np.int8), "w2": w2, "s2": s2},
    )


def _int8(weight: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    largest = np.abs(weight).max() if axis is None else np.abs(weight).max(axis=0)
    scale = np.asarray(largest / 127, np.float32)
    return np.round(weight / scale).astype(np.int8), scale


def float16() -> ir.Model:
    """An MLP in float16 with float32 inputs and outputs, as mixed-precision converters write it."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17]>
        half (float[N, 16] x) => (float[N, 4] y)
        <float16[16, 32] w1, float16[32] b1, float16[32, 4] w2> {
            xh = Cast<to = 10>(x)
            m1 = MatMul(xh, w1)
            a1 = Add(m1, b1)
            r1 = Relu(a1)
            back = Cast<to = 1>(r1)
            again = Cast<to = 10>(back)
            m2 = MatMul(again, w2)
            y = Cast<to = 1>(m2)
        }""")


def bfloat16_weights() -> ir.Model:
    """Weights stored in bfloat16 and cast to float32 before use: ORT's CPU runs this."""
    return model_from_text(
        """
        <ir_version: 8, opset_import: ["": 17]>
        bf16_weights (float[N, 16] x) => (float[N, 8] y)
        <bfloat16[16, 8] w, bfloat16[8] b> {
            wf = Cast<to = 1>(w)
            bf = Cast<to = 1>(b)
            m = MatMul(x, wf)
            y = Add(m, bf)
        }""",
        weights={
            "w": random_weight("w", (16, 8)).astype(ml_dtypes.bfloat16),
            "b": random_weight("b", (8,)).astype(ml_dtypes.bfloat16),
        },
    )


def bfloat16_compute() -> ir.Model:
    """MatMul, Add and Tanh in bfloat16 itself: ORT's CPU has no kernels for this."""
    return model_from_text(
        """
        <ir_version: 8, opset_import: ["": 17]>
        bf16_compute (float[N, 16] x) => (float[N, 8] y)
        <bfloat16[16, 8] w, bfloat16[8] b> {
            xb = Cast<to = 16>(x)
            m = MatMul(xb, w)
            a = Add(m, b)
            t = Tanh(a)
            y = Cast<to = 1>(t)
        }""",
        weights={
            "w": random_weight("w", (16, 8)).astype(ml_dtypes.bfloat16),
            "b": random_weight("b", (8,)).astype(ml_dtypes.bfloat16),
        },
    )


def float8_weights() -> ir.Model:
    """Weights in float8 (e4m3fn and e5m2) behind DequantizeLinear (opset 19)."""
    return model_from_text(
        """
        <ir_version: 9, opset_import: ["": 19]>
        fp8 (float[N, 16] x) => (float[N, 8] y)
        <float8e4m3fn[16, 16] w1, float8e5m2[16, 8] w2, float s1 = {0.01}, float s2 = {0.02}> {
            d1 = DequantizeLinear(w1, s1)
            m1 = MatMul(x, d1)
            r1 = Relu(m1)
            d2 = DequantizeLinear(w2, s2)
            y = MatMul(r1, d2)
        }""",
        weights={
            "w1": (random_weight("w1", (16, 16)) / 0.01).astype(ml_dtypes.float8_e4m3fn),
            "w2": (random_weight("w2", (16, 8)) / 0.02).astype(ml_dtypes.float8_e5m2),
        },
    )


def int4_weights() -> ir.Model:
    """Weights in int4, blocks of 16 along the rows, behind DequantizeLinear (opset 21)."""
    weight = random_weight("w", (32, 8))
    blocks = weight.reshape(2, 16, 8)
    scale = (np.abs(blocks).max(axis=1) / 7).astype(np.float32)
    codes = np.round(blocks / scale[:, None, :]).reshape(32, 8).astype(ml_dtypes.int4)
    return model_from_text(
        """
        <ir_version: 10, opset_import: ["": 21]>
        int4 (float[N, 32] x) => (float[N, 8] y)
        <int4[32, 8] w, float[2, 8] s, float[8] b> {
            d = DequantizeLinear<axis = 0, block_size = 16>(w, s)
            m = MatMul(x, d)
            y = Add(m, b)
        }""",
        weights={"w": codes, "s": scale},
    )


def unknown_op() -> ir.Model:
    """A node of a domain that no runtime knows, between nodes that can be simplified."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17, "com.example.private": 3]>
        unknown (float[N, 8] x) => (float[N, 8] y) {
            one = Constant<value = float {1.0}>()
            two = Constant<value = float {2.0}>()
            three = Add(one, two)
            a = Mul(x, three)
            same = Identity(a)
            b, extra = com.example.private.Mystery<strength = 2, mode = "soft">(same, three)
            c = Tanh(b)
            y = Identity(c)
        }""")
    return ir.from_proto(model)


def contrib_ops() -> ir.Model:
    """ORT's own ops (com.microsoft), as its optimizer leaves them: FusedMatMul, BiasGelu, SkipLayerNormalization."""
    return model_from_text(
        """
        <ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        contrib (float[batch, sequence, 16] x) => (float[batch, sequence, 16] y)
        <float[16, 16] w, float[16] b, float[16] g, float[16] beta> {
            m = com.microsoft.FusedMatMul<alpha = 0.5, transB = 1>(x, w)
            a = com.microsoft.BiasGelu(m, b)
            y, , = com.microsoft.SkipLayerNormalization<epsilon = 0.00001>(a, x, g, beta)
        }""",
        weights={"g": 1 + random_weight("g", (16,))},
    )
