"""Where to look for what a linear site multiplies."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.moments.collect import Tap
from graphopt.moments.layouts import Channels, Layout, Patches, Tokens
from graphopt.sites import Linear, Spelling


def tap_of(site: Linear) -> Tap:
    """The tap whose rows x a site multiplies: the Gram has the order of ``site.matrix`` reshaped to (outputs, n)."""
    return Tap(site.x.name or "", _layout_of(site))


def _layout_of(site: Linear) -> Layout:
    if site.spelling is Spelling.GATHER:
        return Tokens(site.inputs)
    if site.spelling is not Spelling.CONV or site.pointwise:
        return Channels(site.inputs, site.x_axis)
    mode = site.node.attributes.get("auto_pad")
    auto_pad = "" if mode is None else mode.as_string()
    return Patches(
        site.inputs,
        site.kernel,
        _ints(site.node, "strides"),
        _ints(site.node, "pads") if auto_pad in ("", "NOTSET") else (),
        _ints(site.node, "dilations"),
        auto_pad if auto_pad.startswith("SAME") else "",
    )


def _ints(node: ir.Node, name: str) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return () if attribute is None else tuple(attribute.as_ints())
