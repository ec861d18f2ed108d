"""Networks with If, Loop, Scan and local functions."""

from __future__ import annotations

import onnx_ir as ir

from tests.models.text import model_from_text


def if_on_input() -> ir.Model:
    """An If on an input; its branches capture a value and a weight of the outer graph, one nests another If."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17]>
        if_on_input (float[N, 8] x, bool flag, bool inner_flag) => (float[N, 8] y)
        <float[8, 8] w, float[8] b> {
            h = MatMul(x, w)
            r = If(flag) <
                then_branch = then () => (float[N, 8] t) {
                    t0 = Add(h, b)
                    t = Tanh(t0)
                },
                else_branch = otherwise () => (float[N, 8] e) {
                    e0 = MatMul(h, w)
                    e = If(inner_flag) <
                        then_branch = inner_then () => (float[N, 8] it) { it = Sub(e0, h) },
                        else_branch = inner_else () => (float[N, 8] ie) { ie = Identity(e0) }
                    >
                }
            >
            y = Add(r, x)
        }""")


def if_constant() -> ir.Model:
    """Two If whose conditions are decided before any input is known: a constant, and constants compared."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17]>
        if_constant (float[N, 8] x) => (float[N, 8] y)
        <float[8, 8] w, bool always = {1}, int64 two = {2}, int64 three = {3}> {
            h = If(always) <
                then_branch = a () => (float[N, 8] a_out) { a_out = MatMul(x, w) },
                else_branch = b () => (float[N, 8] b_out) { b_out = Neg(x) }
            >
            sum = Add(two, two)
            less = Less(sum, three)
            y = If(less) <
                then_branch = c () => (float[N, 8] c_out) { c_out = Exp(h) },
                else_branch = d () => (float[N, 8] d_out) { d0 = MatMul(h, w) d_out = Tanh(d0) }
            >
        }""")


def if_on_shape() -> ir.Model:
    """An If on the rank of the input, as TorchScript writes it for Squeeze, and one on a static dimension."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17]>
        if_on_shape (float[N, 1, 8] x) => (float[N, 8] y)
        <float[8, 8] w, int64 one = {1}, int64 at_two = {2}, int64 eight = {8}, int64[1] axis1 = {1}> {
            shape = Shape(x)
            dim = Gather(shape, one)
            is_one = Equal(dim, one)
            squeezed = If(is_one) <
                then_branch = a () => (float[N, 8] a_out) { a_out = Squeeze(x, axis1) },
                else_branch = b () => (float[N, 1, 8] b_out) { b_out = Identity(x) }
            >
            last = Gather(shape, at_two)
            wide = Greater(last, eight)
            y = If(wide) <
                then_branch = c () => (float[N, 8] c_out) { c_out = Neg(squeezed) },
                else_branch = d () => (float[N, 8] d_out) { d_out = MatMul(squeezed, w) }
            >
        }""")


def loop() -> ir.Model:
    """A Loop with a trip count from the input, one carried value, one scanned output, captures, an If inside."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17]>
        loop (float[N, 6] x, int64 steps) => (float[N, 6] last, float[T, N, 6] all)
        <float[6, 6] w, float[6] b, bool yes = {1}, int64 two = {2}, int64 zero = {0}> {
            start = Tanh(x)
            last, all = Loop(steps, yes, start) <
                body = step (int64 i, bool go, float[N, 6] h) => (bool go_on, float[N, 6] next, float[N, 6] seen) {
                    m = MatMul(h, w)
                    a = Add(m, b)
                    rest = Mod(i, two)
                    even = Equal(rest, zero)
                    mixed = If(even) <
                        then_branch = on_even () => (float[N, 6] p) { p = Add(a, start) },
                        else_branch = on_odd () => (float[N, 6] q) { q = Sub(a, h) }
                    >
                    next = Tanh(mixed)
                    seen = Identity(next)
                    go_on = Identity(go)
                }
            >
        }""")


def loop_constant_trips() -> ir.Model:
    """A Loop of three steps, known in advance, whose condition is computed from what it carries."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17]>
        loop_constant_trips (float[N, 6] x) => (float[N, 6] y)
        <float[6, 6] w, int64 three = {3}, bool yes = {1}, float limit = {1000}> {
            y = Loop(three, yes, x) <
                body = step (int64 i, bool go, float[N, 6] h) => (bool go_on, float[N, 6] next) {
                    m = MatMul(h, w)
                    next = Add(m, h)
                    total = ReduceMax<keepdims = 0>(next)
                    go_on = Less(total, limit)
                }
            >
        }""")


def scan() -> ir.Model:
    """A Scan over the first axis: one state, one scanned input, two scanned outputs, an outer weight."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17]>
        scan (float[T, 5] x) => (float[5] state, float[T, 5] states, float[T, 5] products)
        <float[5, 5] w, float[5] start> {
            scaled = Tanh(x)
            state, states, products = Scan(start, scaled) <
                num_scan_inputs = 1,
                body = step (float[5] h, float[5] row) => (float[5] next, float[5] seen, float[5] product) {
                    m = MatMul(h, w)
                    sum = Add(m, row)
                    next = Tanh(sum)
                    seen = Identity(next)
                    product = Mul(next, row)
                }
            >
        }""")


def functions() -> ir.Model:
    """Local functions: one calls another, attributes with references and a default, two calls that differ."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17, "local": 1]>
        functions (float[N, 8] x) => (float[N, 8] y)
        <float[8, 8] w, float[8] b> {
            h = local.dense_act<alpha = 0.3>(x, w, b)
            k = local.dense_act(h, w, b)
            y = local.leaky<alpha = 0.7>(k)
        }
        <domain: "local", opset_import: ["": 17]>
        leaky <alpha: float = 0.01> (q) => (r) {
            r = LeakyRelu<alpha: float = @alpha>(q)
        }
        <domain: "local", opset_import: ["": 17, "local": 1]>
        dense_act <alpha: float = 0.2> (q, weight, bias) => (r) {
            m = MatMul(q, weight)
            same = Identity(m)
            a = Add(same, bias)
            r = local.leaky<alpha: float = @alpha>(a)
        }""")


def function_with_if() -> ir.Model:
    """A local function whose body holds an If that captures a value of the function."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17, "local": 1]>
        function_with_if (float[N, 8] x, bool flag) => (float[N, 8] y)
        <float[8, 8] w> {
            h = local.choose(x, flag, w)
            y = Tanh(h)
        }
        <domain: "local", opset_import: ["": 17]>
        choose (q, flag, weight) => (r) {
            m = MatMul(q, weight)
            r = If(flag) <
                then_branch = a () => (a_out) { a_out = Relu(m) },
                else_branch = b () => (b_out) { b_out = Sub(m, q) }
            >
        }""")


def loop_sequence() -> ir.Model:
    """A Loop that carries a sequence of tensors, concatenated at the end."""
    return model_from_text("""
        <ir_version: 8, opset_import: ["": 17]>
        loop_sequence (float[N, 4] x, int64 steps) => (float[M, 4] y)
        <float half = {0.5}, bool yes = {1}> {
            empty = SequenceConstruct(x)
            parts, end = Loop(steps, yes, empty, x) <
                body = step (int64 i, bool go, seq(float[N, 4]) held, float[N, 4] h)
                       => (bool go_on, seq(float[N, 4]) more, float[N, 4] next) {
                    next = Mul(h, half)
                    more = SequenceInsert(held, next)
                    go_on = Identity(go)
                }
            >
            y = ConcatFromSequence<axis = 0>(parts)
        }""")
