"""A pivot form of a site: its order of channels, its constants, its nodes, and what its rounding adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.numerics.pivot import Pivoted, choose_pivots, pivot_columns, pivot_rows
from graphopt.passes.lowrank.hidden import FACTOR
from graphopt.passes.lowrank.pivot_sites import PivotSite
from graphopt.plugins.pivot_linear import Side, column_nodes, row_nodes
from graphopt.rewrite import Context
from graphopt.sites import Linear, Spelling, channel_vector
from graphopt.store import Arrays, digest

Array = npt.NDArray[Any]

_SAMPLES = 64


def form_nodes(
    ctx: Context, site: PivotSite, order: Array, x: ir.Value, *, rows: bool
) -> tuple[list[ir.Node], ir.Value]:
    """The nodes of a form, in no graph yet, and their result."""
    side = _side(ctx, site, order, rows=rows)
    nodes, y = (row_nodes if rows else column_nodes)(ctx, side, x, like=site.y)
    for node in nodes:
        node.metadata_props[FACTOR] = "pivot"
    return nodes, y


def joint_order(ctx: Context, members: list[tuple[PivotSite, bool]]) -> Array | None:
    """The channels in the order of joint pivots; None where no rows span the others."""

    def compute() -> Arrays:
        bases = []
        for site, rows in members:
            factor = site.left() if rows else site.right()
            flat = factor.reshape(factor.shape[:2])
            bases.append(flat if rows else flat.T)
        try:
            return {"order": choose_pivots(bases, [site.pivots for site, _ in members])}
        except ValueError:
            return {}

    key = digest("order", *[(site.key, rows, site.pivots) for site, rows in members])
    return ctx.store.arrays(key, compute).get("order")


def _form(ctx: Context, site: PivotSite, order: Array, *, rows: bool) -> Callable[[], Arrays]:
    """``kept``, (pivots, inputs[, *kernel]) or (outputs, pivots[, *kernel]), and ``coefficients``, a kernel of ones."""
    dtype, r = site.second.weight.dtype, site.pivots
    m, n = site.second.outputs, site.first.inputs
    kernel = site.first.kernel if rows else site.second.kernel
    key = digest("pivot", site.key, rows, order, r, dtype.name)

    def compute() -> Arrays:
        left, right = site.left(), site.right()
        # The channel axes last or first, the kernel beside the other side's channels.
        u = np.moveaxis(left, 1, -1).reshape(-1, left.shape[1])
        v = right.reshape(right.shape[0], -1)
        made: Pivoted = (pivot_rows if rows else pivot_columns)(u, v, order=order, count=r, dtype=dtype.numpy())
        if rows:
            kept = made.kept.reshape(r, n, *kernel)
            coefficients = made.coefficients.reshape(m - r, r, *[1] * len(site.second.kernel))
        else:
            kept = np.moveaxis(made.kept.T.reshape(m, *kernel, r), -1, 1)
            coefficients = made.coefficients.T.reshape(r, n - r, *[1] * len(site.first.kernel))
        return {"kept": np.ascontiguousarray(kept), "coefficients": np.ascontiguousarray(coefficients)}

    return lambda: ctx.store.arrays(key, compute)


def amplification(ctx: Context, site: PivotSite, order: Array, *, rows: bool) -> float:
    """How many times larger the rounding errors of a form are than those of the factors, in float32 on random inputs.

    Verification measures it on the values of the model, and each form that it takes back is a run of everything.
    """
    if site.second.weight.dtype is not ir.DataType.FLOAT:
        return 0.0
    try:
        form = _form(ctx, site, order, rows=rows)()
    except ValueError:  # the first rows do not span the others, or a number does not fit the type
        return float("inf")
    kept, coefficients = form["kept"], form["coefficients"]
    left, right = site.left(), site.right()
    u = np.moveaxis(left, 1, -1).reshape(-1, left.shape[1])
    v = right.reshape(right.shape[0], -1)
    x = np.random.default_rng(0).standard_normal((_SAMPLES, v.shape[1])).astype(np.float32)
    exact = (x.astype(np.float64) @ v.T.astype(np.float64)) @ u.T.astype(np.float64)
    plain = (x @ v.T.astype(np.float32)) @ u.T.astype(np.float32)
    c = coefficients.reshape(coefficients.shape[:2])
    if rows:
        t = x @ kept.reshape(len(kept), -1).T
        found = np.empty_like(plain)
        found[:, order] = np.concatenate([t, t @ c.T], axis=1)
    else:
        ordered = x[:, order]
        inner = ordered[:, : site.pivots] + ordered[:, site.pivots :] @ c.T
        found = inner @ np.moveaxis(kept, 1, -1).reshape(-1, site.pivots).T
    before, after = float(np.abs(plain - exact).max()), float(np.abs(found - exact).max())
    return after / before if before > 0 else 0.0


def _side(ctx: Context, site: PivotSite, order: Array, *, rows: bool) -> Side:
    """The constants of a form, computed when they are read."""
    r, m, n = site.pivots, site.second.outputs, site.first.inputs
    kernel = site.first.kernel if rows else site.second.kernel
    form = _form(ctx, site, order, rows=rows)

    def part(name: str) -> Callable[[], Array]:
        return lambda: form()[name]

    base = (site.first.weight.root.name or "weight").removesuffix("_kept")
    kept_shape = (r, n, *kernel) if rows else (m, r, *kernel)
    inner = site.second if rows else site.first
    shape = (m - r, r) if rows else (r, n - r)
    return _with_bias(
        ctx,
        site,
        Side(
            site.first,
            site.second,
            (site.first if rows else site.second).constant(ctx, f"{base}_kept", kept_shape, part("kept")),
            inner.constant(ctx, f"{base}_coefficients", (*shape, *[1] * len(inner.kernel)), part("coefficients")),
            r,
            m if rows else n,
        ),
        order if rows else None,
        part("coefficients"),
    )


def _with_bias(
    ctx: Context, site: PivotSite, side: Side, order: Array | None, coefficients: Callable[[], Array]
) -> Side:
    """The bias of both products, where it belongs: in the products that can add it, else behind them."""
    first, second, dtype = site.first, site.second, site.second.weight.dtype.numpy()
    offset = None if site.offset is None else site.offset()
    if second.bias is not None:
        own = channel_vector(second.bias, second.outputs)
        offset = own if offset is None else offset + own
    if offset is None:
        return side
    name = "pivot_bias"
    adds = {Spelling.GEMM, Spelling.CONV}
    if order is None:
        if second.spelling in adds:
            return replace(side, second_bias=ctx.constant(offset.astype(dtype), name))
        return replace(side, offset=ctx.constant(_spread(offset, second).astype(dtype), name))
    ordered, r = offset[order], site.pivots
    if first.spelling in adds and second.spelling in adds:
        kept = ordered[:r].astype(dtype)

        def others() -> Array:
            # What the first product added goes through C, too.
            through = coefficients().reshape(-1, r).astype(np.float64) @ kept.astype(np.float64)
            return np.asarray((ordered[r:] - through).astype(dtype))

        lazy = ir.LazyTensor(
            lambda: ir.tensor(others()), dtype=site.second.weight.dtype, shape=ir.Shape([len(ordered) - r])
        )
        return replace(side, first_bias=ctx.constant(kept, name), second_bias=ctx.constant(lazy, name))
    return replace(side, offset=ctx.constant(_spread(ordered, second).astype(dtype), name))


def _spread(vector: Array, linear: Linear) -> Array:
    """A vector of channels as it broadcasts against the result of a product."""
    behind = len(linear.kernel) if linear.spelling is Spelling.CONV else -1 - linear.y_axis
    return vector.reshape(-1, *[1] * behind)
