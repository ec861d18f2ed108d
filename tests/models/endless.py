"""Networks with loops that only values end, and may not."""

from __future__ import annotations

import onnx

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'

NEVER = f"""
{HEAD}
g (float[2] x) => (float[2] y) {{
    yes = Constant <value = bool {{1}}> ()
    [spin] y = Loop ("", yes, x) <body = b (int64 i, bool go, float[2] s) => (bool more, float[2] t) {{
        t = Tanh (s)
        top = ReduceMax <keepdims = 0> (t)
        two = Constant <value = float {{2}}> ()
        more = Less (top, two)
    }}>
}}
"""
"""Never ends, whatever x is."""

IF_POSITIVE = f"""
{HEAD}
g (float[2] x) => (float[2] y) {{
    zero = Constant <value = int64 {{0}}> ()
    first = Gather (x, zero)
    none = Constant <value = float {{0}}> ()
    yes = Constant <value = bool {{1}}> ()
    [climb] y = Loop ("", yes, x) <body = b (int64 i, bool go, float[2] s) => (bool more, float[2] t) {{
        t = Tanh (s)
        more = Less (first, none)
    }}>
}}
"""
"""Ends after a turn where x begins with a number from 0 on, else never."""

LONG = f"""
{HEAD}
g (float[2] x, int64 n) => (float[2] y) {{
    [count] y = Loop (n, "", x) <body = b (int64 i, bool go, float[2] s) => (bool more, float[2] t) {{
        t = Neg (s)
        more = Identity (go)
    }}>
}}
"""
"""Takes n turns."""

INNER = f"""
{HEAD}
g (float[2] x) => (float[2] y) {{
    yes = Constant <value = bool {{1}}> ()
    three = Constant <value = int64 {{3}}> ()
    [outer] y = Loop (three, "", x) <body = b (int64 i, bool go, float[2] s) => (bool more, float[2] t) {{
        more = Identity (go)
        [inner] t = Loop ("", yes, s) <body = c (int64 j, bool on, float[2] u) => (bool again, float[2] v) {{
            v = Tanh (u)
            again = Identity (on)
        }}>
    }}>
}}
"""
"""The loop inside never ends."""

BARE = f"""
{HEAD}
g (float[2] x, bool go) => (float[2] y) {{
    w = Exp (x)
    [still] y = Loop ("", go, w) <body = b (int64 i, bool c, float[2] s) => (bool c, float[2] s) {{ }}>
}}
"""
"""Never ends where go is true; a turn does nothing at all."""


def endless(text: str) -> onnx.ModelProto:
    """One of these, as a file holds it."""
    return onnx.parser.parse_model(text)
