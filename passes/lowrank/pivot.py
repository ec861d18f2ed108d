"""``pivot``: factor pairs as pivot rows or columns and coefficients, the permutation folded into their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field

from graphopt import graphs
from graphopt.channels import ChannelClass, Channels, Group, Override, channel_classes, is_current, relabel
from graphopt.numerics.pivot import Pivoted, choose_pivots, pivot_columns, pivot_rows
from graphopt.passes.lowrank.hidden import FACTOR, FORM, HiddenRank, factored, hidden_ranks
from graphopt.plugins.pivot_linear import Side, column_nodes, row_nodes
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.sites import Linear, Pair, Spelling, channel_vector, pairs
from graphopt.store import Arrays, digest

Array = npt.NDArray[Any]

JOINT = 4
"""At most so many sites share their pivots: with each the coefficients grow, and with them what rounding does."""
LEAST_GAIN = 0.05
"""The share of the time that the form must save by the cost profile, which does not see all that smaller nodes cost."""
MOST_AMPLIFIED = 3.0
"""Times that rounding errors may grow on random inputs. The rule allows four, on inputs that are not random."""
_SAMPLES = 64
_HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class Parameters(BaseModel):
    """What is pivoted.

    Attributes:
        gather: Where no class of channels takes the permutation it can stay as a Gather: cheaper, where the target's
            cost profile calls the whole cheaper; always, for the sake of size; never.
        multiple: Ranks are rounded up to a multiple of this, with further pivots, which lower the error. Tensor cores
            like 16.
    """

    model_config = ConfigDict(extra="forbid")

    gather: Literal["cheaper", "always", "never"] = "cheaper"
    multiple: int = Field(default=1, ge=1, le=256)


@dataclass(frozen=True)
class Site:
    """A matrix of low rank in a graph: a pair of factors, or a dense weight whose rank is found to be low.

    Attributes:
        first: How the product that reads x is written.
        second: How the product that makes y is written.
        nodes: What goes.
        y: The result.
        rank: Of the matrix.
        key: The digest of what it is.
        left: Reads U, (outputs, rank[, *kernel]), scales in it.
        right: Reads V, (rank, inputs[, *kernel]).
        offset: Reads U c of U (V x) + U c, float64 (outputs,); None: nothing is added between.
        owed: The rank was chosen for this form, within a budget of elements: time does not count.
        multiple: Of what the number of pivots is to be a multiple.
        spare: Pivots beyond the rank. A thirty-second part more halves what rounding the coefficients adds.
    """

    first: Linear
    second: Linear
    nodes: tuple[ir.Node, ...]
    y: ir.Value
    rank: int
    key: str
    left: Callable[[], Array]
    right: Callable[[], Array]
    offset: Callable[[], Array] | None = None
    owed: bool = False
    multiple: int = 1
    spare: int = 0

    @property
    def pivots(self) -> int:
        """The number of pivots: the rank, rounded up where there are rows and columns left for that."""
        padded = -(-(self.rank + self.spare) // self.multiple) * self.multiple
        return padded if padded < min(self.second.outputs, self.first.inputs) else self.rank

    @property
    def x(self) -> ir.Value:
        """What is multiplied."""
        return self.first.x

    @property
    def is_current(self) -> bool:
        """Whether the nodes are still in the graph, and still read what they did."""
        return all(node.graph is not None for node in self.nodes) and self.x in self.nodes[0].inputs


class Pivot(Pass):
    """Stores a weight of low rank as some of its own rows or columns, and what makes the others of them."""

    name = "pivot"
    kind = Kind.ROUNDING
    stage = Stage.FACTORIZE
    explanation = Explanation(
        matches="pairs of factors, and dense weights whose rank is hidden: row form y = P [K; C K] x, column form "
        "y = K (x_p + C x_np), r (m + n - r) elements. The permutation goes into the other readers and makers of the "
        "channels where their class is free; sites of one class (gate, up and down) share their pivots; elsewhere a "
        "Gather stays, if the whole is still cheaper",
        refuses="factors that something else reads; quantised factors; a rank that is full on one side; convolutions "
        "whose second (row form) or first (column form) is not of one position; channels whose class is pinned, where "
        "a Gather costs what the form saves; what saves less than 5 % of the time by the target's cost profile, unless "
        "factorize counted on it",
        costs="a QR of one factor and an elimination of rows, O(m (m - r) r), while rewriting; the rest when the model "
        "is saved. Saves the fraction r / (m + n) of the factors' weights and multiplications. In 16 bits the "
        "coefficients amplify rounding about three times: it is kept where that is within the rounding rule",
        source="PIFA (Zhao et al., ICML 2025), section 3; pivots on an orthonormal basis by A-optimal elimination, "
        "coefficients refitted to the rounded pivots, column form, bias and joint pivots are ours",
    )
    Parameters: ClassVar[type[BaseModel] | None] = Parameters

    def apply(self, ctx: Context) -> None:
        assert isinstance(self.parameters, Parameters)
        tried: set[str] = set()
        while True:
            multiple = self.parameters.multiple
            sites = [replace(site, multiple=multiple) for site in _sites(ctx) if self.takes(site)]
            if not sites:
                return
            channels = channel_classes(ctx.model, Group.PERMUTATION)
            progress = False
            classes = list(_shared(channels, sites))
            for number, (cls, together) in enumerate(classes, 1):
                ctx.say(f"choosing pivots: {number} of {len(classes)} classes of channels")
                dear = False
                for members in self._attempts(together):
                    if dear and members[0][0].spare:
                        continue  # more pivots cost more
                    name = "+".join(sorted(f"{site.key} {rows} {site.pivots}" for site, rows in members))
                    if name in tried or not all(site.is_current for site, _ in members) or not is_current(cls):
                        continue  # an earlier class took its nodes along: it is looked at anew
                    tried.add(name)
                    before = ctx.not_cheaper[self.name]
                    if _fold(ctx, cls, members, lossy=self.kind is Kind.LOSSY):
                        progress = True
                        break
                    dear = ctx.not_cheaper[self.name] > before
            if progress:
                continue
            for number, site in enumerate(sites, 1):
                ctx.say(f"choosing pivots: {number} of {len(sites)} by themselves")
                if site.is_current:
                    self._alone(ctx, channels, site)
            return

    def takes(self, site: Site) -> bool:
        """Whether this pass is for a site; others may be for others."""
        return True

    def _attempts(self, members: list[tuple[Site, bool]]) -> Iterable[list[tuple[Site, bool]]]:
        """All sites of a class at once; where that is refused, with spare pivots; then fewer sites, down to one."""
        yield members
        yield [(_spared(site), rows) for site, rows in members]
        if self.kind is Kind.ROUNDING and members[0][0].second.weight.dtype in _HALF:
            return  # one alone would fail, too, and each failure is a run of everything
        parts = [part for rows in (True, False) if (part := [member for member in members if member[1] is rows])]
        if len(parts) > 1:
            yield from parts
        if any(len(part) > 1 for part in parts):
            yield from ([member] for member in members)

    def _alone(self, ctx: Context, channels: Channels, site: Site) -> None:
        """The row form with a Gather behind it."""
        assert isinstance(self.parameters, Parameters)
        why = _what_pins(ctx, channels, site)
        if self.parameters.gather == "never" or not site.second.pointwise:
            ctx.refuse(site.nodes[-1], why)
            return
        always = self.parameters.gather == "always" or site.owed
        if not always and not _is_cheaper(ctx, site):
            ctx.refuse(site.nodes[-1], f"not cheaper with a Gather, and {why}")
            return
        for tried in (site, _spared(site)):
            order = _order(ctx, [(tried, True)])
            if order is None:
                ctx.refuse(site.nodes[-1], "no rows of it span the others")
                return
            reason = None if self.kind is Kind.LOSSY else _too_coarse(ctx, [(tried, True)], order)
            if reason is not None:
                ctx.refuse(site.nodes[-1], reason)
                continue
            nodes, y = _with_gather(ctx, tried, order)
            if ctx.replace({site.y: y}, nodes, rule=f"rows-gather{_suffix(tried)}", certain=always):
                return


def _spared(site: Site) -> Site:
    """The same site with pivots to spare."""
    return replace(site, spare=site.rank // 32 + 1)


def _suffix(site: Site) -> str:
    return "-spare" if site.spare else ""


def _what_pins(ctx: Context, channels: Channels, site: Site) -> str:
    """Why the permutation of a site was not folded, in words."""
    cannot = "the permutation cannot be folded"
    if site.nodes[-1].graph is not ctx.model.graph:
        return f"{cannot}: it is in a body"
    # Where there is no row form it is the columns that nothing could be done with.
    end = (site.y, site.second.y_axis) if site.second.pointwise else (site.x, site.first.x_axis)
    cls = channels.whole(end[0], _place(*end))
    if cls is None:
        return f"{cannot}: its channels are labelled in parts"
    return f"{cannot}: {'; '.join(cls.pinned[:2])}" if cls.pinned else "folding the permutation gains nothing"


class PivotLossy(Pivot):
    """Stores 16-bit weights of low rank as pivots and coefficients, where rounding grows by more than a little."""

    name = "pivot-lossy"
    kind = Kind.LOSSY
    explanation = Explanation(
        matches="what pivot matches, in float16 and bfloat16",
        refuses="what pivot refuses; float32 and float64, which pivot takes",
        costs="what pivot costs. The error against float64 is about three times that of the factors",
        source="PIFA (Zhao et al., ICML 2025); see pivot",
    )

    def takes(self, site: Site) -> bool:
        return site.second.weight.dtype in _HALF


def _sites(ctx: Context) -> list[Site]:
    """Every matrix of low rank that has a pivot form smaller than it is."""
    found = []
    opset = ctx.opset
    for pair in pairs(ctx.model):
        if not isinstance(pair, Pair):
            if not _is_ours(pair[0]):
                ctx.refuse(*pair)
            continue
        m, n = pair.second.outputs, pair.first.inputs
        if pair.quantised:
            ctx.refuse(pair.second.node, "the factors are quantised")
        elif pair.first.weight.shared or pair.second.weight.shared:
            ctx.refuse(pair.second.node, "something else reads a factor too: it would be kept beside the pivots")
        elif not (pair.first.pointwise or pair.second.pointwise):
            ctx.refuse(pair.second.node, "both convolutions look beside a position")
        elif pair.rank >= min(m, n):
            ctx.refuse(pair.second.node, f"rank {pair.rank} is full: the pivot form would be the dense weight")
        elif not _fits(ctx, site := _of_pair(pair, opset)):
            ctx.refuse(pair.second.node, f"the product of the factors may leave the range of {pair.dtype.name}")
        else:
            found.append(site)
    found.extend(_of_hidden(hidden, opset) for hidden in hidden_ranks(ctx, factored(ctx.model)))
    return found


def _fits(ctx: Context, site: Site) -> bool:
    """Whether every number of the matrix is sure to be one of its type: pivots are made of those."""

    def compute() -> Arrays:
        left, right = (factor().astype(np.float64).reshape(-1) for factor in (site.left, site.right))
        u, v = left.reshape(site.second.outputs, site.rank, -1), right.reshape(site.rank, -1)
        with np.errstate(all="ignore"):
            rows, columns = np.einsum("ijk,ijk->ik", u, u), np.einsum("ij,ij->j", v, v)
            return {"bound": np.sqrt(rows.max() * columns.max())}

    bound = float(ctx.store.arrays(digest("bound", site.key), compute)["bound"])
    most = float(ml_dtypes.finfo(site.second.weight.dtype.numpy()).max)  # type: ignore[no-untyped-call]
    return bound < most / 4


def _is_ours(node: ir.Node) -> bool:
    return node.metadata_props.get("graphopt.pass", "").startswith("pivot")


def _of_pair(pair: Pair, opset: int) -> Site:
    first, second = pair.first, pair.second
    # One of two matrix products may be MatMul and the other Gemm: then both may be Gemm.
    if {first.spelling, second.spelling} == {Spelling.MATMUL, Spelling.GEMM}:
        first = replace(first, spelling=Spelling.GEMM)
        second = replace(second, spelling=Spelling.GEMM)
    key = digest(*first.parts(), *second.parts(), pair.scale, first.inputs, second.outputs)
    return Site(
        first,
        second,
        pair.nodes(),
        pair.y,
        pair.rank,
        key,
        lambda: pair.factors(opset)[0],
        lambda: pair.first.matrix(opset),
        None if pair.shift is None else lambda: _through(second, pair.shift, opset),
        pair.second.node.metadata_props.get(FORM) == "pivot",
    )


def _through(second: Linear, shift: Array | None, opset: int) -> Array:
    """What a shift between the factors adds behind them. The scale is in it already: U alone is applied."""
    left = second.matrix(opset).astype(np.float64)
    return np.asarray(left.reshape(*left.shape[:2], -1).sum(axis=2) @ shift)


def _of_hidden(hidden: HiddenRank, opset: int) -> Site:
    linear = hidden.linear
    kernel = linear.kernel
    return Site(
        linear,
        replace(linear.follower(), y=linear.y, outputs=linear.outputs, bias=linear.bias),
        (linear.node,),
        linear.y,
        hidden.rank,
        hidden.key,
        lambda: hidden.factors()["left"].reshape(linear.outputs, hidden.rank, *[1] * len(kernel)),
        lambda: hidden.factors()["right"].reshape(hidden.rank, linear.inputs, *kernel),
    )


def _shared(channels: Channels, sites: list[Site]) -> Iterable[tuple[ChannelClass, list[tuple[Site, bool]]]]:
    """The free classes that sites can give their permutation to, with those sites; True: by rows."""
    options: dict[ChannelClass, list[tuple[Site, bool]]] = {}
    for site in sites:
        for rows in (True, False):
            cls = _class_of(channels, site, rows)
            if cls is not None:
                options.setdefault(cls, []).append((site, rows))
    taken: set[int] = set()
    # Where few meet, their pivots are good for all of them.
    for cls, members in sorted(options.items(), key=lambda item: len(item[1])):
        left = [(site, rows) for site, rows in members if id(site) not in taken]
        if not left:
            continue
        # Where many meet, those that gain most; the others keep their factors, in the new order, or have a Gather.
        left = sorted(left, key=lambda member: -member[0].rank)[:JOINT]
        taken.update(id(site) for site, _ in left)
        yield cls, left


def _class_of(channels: Channels, site: Site, rows: bool) -> ChannelClass | None:
    """The free class of the channels that a form of a site permutes."""
    if rows:
        if not site.second.pointwise:
            return None
        cls, other = channels.whole(site.y, _place(site.y, site.second.y_axis)), site.x
    else:
        if not site.first.pointwise or site.first.spelling is Spelling.GATHER or _is_turned(site.first):
            return None
        cls, other = channels.whole(site.x, _place(site.x, site.first.x_axis)), site.y
    if cls is None or not cls.free or any(slot.value is other for slot in cls.slots):
        return None
    return cls


def _is_turned(linear: Linear) -> bool:
    """Whether the channels are another axis of x than of y: of Gemm that transposes x."""
    return linear.spelling is Spelling.GEMM and linear.x_axis != linear.y_axis


def _fold(ctx: Context, cls: ChannelClass, members: list[tuple[Site, bool]], *, lossy: bool) -> bool:
    """Pivot the sites of a class on the same channels, and bring the class into the order of the pivots."""
    order = _order(ctx, members)
    if order is None:
        return False
    if not lossy and (reason := _too_coarse(ctx, members, order)) is not None:
        ctx.refuse(members[0][0].nodes[-1], reason)
        return False
    overrides: dict[ir.Node, Override] = {}
    for site, rows in members:
        for node in site.nodes[:-1]:
            overrides[node] = _vanish
        overrides[site.nodes[-1]] = _pivoted(ctx, site, order, rows)
    # Each choice of sites has a rule of its own: that one was taken back does not speak against the others.
    forms = dict.fromkeys("rows" if rows else "columns" for _, rows in members)
    rule = ("-".join(forms) if len(members) == 1 else f"{'-'.join(forms)}-of-{len(members)}") + _suffix(members[0][0])
    owed = any(site.owed for site, _ in members)
    return relabel(ctx, cls, order, rule=rule, overrides=overrides, certain=owed, by=LEAST_GAIN)


def _too_coarse(ctx: Context, members: list[tuple[Site, bool]], order: Array) -> str | None:
    """Why verification would take a form back, where its rounding says so; None where it should pass."""
    worst = max(_amplification(ctx, site, order, rows=rows) for site, rows in members)
    return f"rounding errors would be {worst:.1f} times those of the factors" if worst > MOST_AMPLIFIED else None


def _with_gather(ctx: Context, site: Site, order: Array) -> tuple[list[ir.Node], ir.Value]:
    """The row form, and a Gather that brings its result into the order of y."""
    nodes, y = _written(ctx, site, order, site.x, rows=True)
    places = ctx.constant(np.argsort(order), f"{site.y.name or 'y'}_places")
    gather = ctx.node("Gather", [y, places], {"axis": site.second.y_axis}, like=site.y)
    return [*nodes, gather], gather.outputs[0]


def _is_cheaper(ctx: Context, site: Site) -> bool:
    """Whether the row form with a Gather is cheaper, asked before its pivots are chosen: any order costs the same."""
    nodes, _ = _with_gather(ctx, site, np.arange(site.second.outputs))
    cheaper = ctx.target.cheaper(nodes, site.nodes, by=LEAST_GAIN)
    for node in nodes:
        graphs.detach(node)
    return cheaper


def _vanish(value_of: Callable[[ir.Value], ir.Value]) -> tuple[list[ir.Node], Mapping[ir.Value, ir.Value]]:
    return [], {}


def _pivoted(ctx: Context, site: Site, order: Array, rows: bool) -> Override:
    def make(value_of: Callable[[ir.Value], ir.Value]) -> tuple[list[ir.Node], Mapping[ir.Value, ir.Value]]:
        nodes, y = _written(ctx, site, order, value_of(site.x), rows=rows)
        return nodes, {site.y: y}

    return make


def _written(ctx: Context, site: Site, order: Array, x: ir.Value, *, rows: bool) -> tuple[list[ir.Node], ir.Value]:
    """The nodes of a form, in no graph yet, and their result."""
    side = _side(ctx, site, order, rows=rows)
    nodes, y = (row_nodes if rows else column_nodes)(ctx, side, x, like=site.y)
    for node in nodes:
        node.metadata_props[FACTOR] = "pivot"
    return nodes, y


def _order(ctx: Context, members: list[tuple[Site, bool]]) -> Array | None:
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


def _form(ctx: Context, site: Site, order: Array, *, rows: bool) -> Callable[[], Arrays]:
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


def _amplification(ctx: Context, site: Site, order: Array, *, rows: bool) -> float:
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


def _side(ctx: Context, site: Site, order: Array, *, rows: bool) -> Side:
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


def _with_bias(ctx: Context, site: Site, side: Side, order: Array | None, coefficients: Callable[[], Array]) -> Side:
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


def _place(value: ir.Value, axis: int) -> int:
    """An axis counted from the front."""
    rank = 0 if value.shape is None else len(value.shape)
    return axis % rank if rank else axis
