"""``pivot``: factor pairs as pivot rows or columns and coefficients, the permutation folded into their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field

from graphopt import graphs
from graphopt.channels import ChannelClass, Channels, Group, Override, channel_classes, is_current, relabel
from graphopt.passes.lowrank.merge_factors import merge_larger
from graphopt.passes.lowrank.pivot_forms import amplification, form_nodes, joint_order
from graphopt.passes.lowrank.pivot_sites import PivotSite, is_owed, pivot_sites
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.sites import Linear, Pair, Spelling, pairs

Array = npt.NDArray[Any]

JOINT = 4
"""At most so many sites share their pivots: with each the coefficients grow, and with them what rounding does."""
LEAST_GAIN = 0.05
"""The share of the time that the form must save by the cost profile, which does not see all that smaller nodes cost."""
MOST_AMPLIFIED = 3.0
"""Times that rounding errors may grow on random inputs. The rule allows four, on inputs that are not random."""
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
        "factorize counted on it; where that has no form all the same and its factors hold more than their product, "
        "they become one weight again",
        costs="a QR of one factor and an elimination of rows, O(m (m - r) r), while rewriting; the rest when the model "
        "is saved. Saves the fraction r / (m + n) of the factors' weights and multiplications. In 16 bits the "
        "coefficients amplify rounding about three times: it is kept where that is within the rounding rule",
        source="PIFA (Zhao et al., ICML 2025), section 3; pivots on an orthonormal basis by A-optimal elimination, "
        "coefficients refitted to the rounded pivots, column form, bias and joint pivots are ours",
    )
    Parameters: ClassVar[type[BaseModel] | None] = Parameters

    def apply(self, ctx: Context) -> None:
        self._pivot(ctx)
        if self.kind is Kind.ROUNDING:  # pivot-lossy leaves pairs for pivot, which runs behind it
            _merge_owed(ctx)

    def _pivot(self, ctx: Context) -> None:
        assert isinstance(self.parameters, Parameters)
        tried: set[str] = set()
        while True:
            multiple = self.parameters.multiple
            sites = [replace(site, multiple=multiple) for site in pivot_sites(ctx) if self.takes(site)]
            if not sites:
                return
            channels = channel_classes(ctx.model, Group.PERMUTATION)
            progress = False
            coarse: dict[str, str] = {}
            classes = list(_shared(channels, sites))
            for number, (cls, together) in enumerate(classes, 1):
                ctx.say(f"choosing pivots: {number} of {len(classes)} classes of channels")
                dear: set[tuple[tuple[str, bool], ...]] = set()
                for members in self._attempts(together):
                    which = tuple((site.key, rows) for site, rows in members)
                    if which in dear:
                        continue  # more pivots cost more
                    name = "+".join(sorted(f"{site.key} {rows} {site.pivots}" for site, rows in members))
                    if name in tried or not all(site.is_current for site, _ in members) or not is_current(cls):
                        continue  # an earlier class took its nodes along: it is looked at anew
                    tried.add(name)
                    before = ctx.not_cheaper[self.name]
                    if _fold(ctx, cls, members, coarse, lossy=self.kind is Kind.LOSSY):
                        progress = True
                        break
                    if ctx.not_cheaper[self.name] > before:
                        dear.add(which)
            if progress:
                continue
            for number, site in enumerate(sites, 1):
                ctx.say(f"choosing pivots: {number} of {len(sites)} by themselves")
                if site.is_current:
                    self._alone(ctx, site, coarse.get(site.key) or _what_pins(ctx, channels, site))
            return

    def takes(self, site: PivotSite) -> bool:
        """Whether this pass is for a site; others may be for others."""
        return True

    def _attempts(self, members: list[tuple[PivotSite, bool]]) -> Iterable[list[tuple[PivotSite, bool]]]:
        """All sites of a class at once; where that is refused, with spare pivots; then fewer sites, down to one."""
        yield members
        yield _spared(members)
        if self.kind is Kind.ROUNDING and members[0][0].second.weight.dtype in _HALF:
            return  # one alone would fail, too, and each failure is a run of everything
        parts = [part for rows in (True, False) if (part := [member for member in members if member[1] is rows])]
        fewer = parts if len(parts) > 1 else []
        if any(len(part) > 1 for part in parts):
            fewer = [*fewer, *([member] for member in members)]
        yield from fewer
        yield from map(_spared, fewer)

    def _alone(self, ctx: Context, site: PivotSite, why: str) -> None:
        """The row form with a Gather behind it; ``why`` its permutation was not folded."""
        assert isinstance(self.parameters, Parameters)
        if self.parameters.gather == "never" or not site.second.pointwise:
            ctx.refuse(site.nodes[-1], why)
            return
        always = self.parameters.gather == "always" or site.owed
        if not always and not _is_cheaper(ctx, site):
            ctx.refuse(site.nodes[-1], f"not cheaper with a Gather, and {why}")
            return
        for tried in (site, replace(site, spare=_spare(site))):
            order = joint_order(ctx, [(tried, True)])
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


def _merge_owed(ctx: Context) -> None:
    """Factors of a rank that only pivots make worth while, and that have none: one weight again, which is smaller."""
    for found in list(pairs(ctx.model)):
        if isinstance(found, Pair) and is_owed(found):
            merge_larger(ctx, found)


def _spare(site: PivotSite) -> int:
    """How many further pivots are tried where the rounding of a form is too much."""
    return site.rank // 32 + 1


def _spared(members: list[tuple[PivotSite, bool]]) -> list[tuple[PivotSite, bool]]:
    """The same sites with pivots to spare."""
    return [(replace(site, spare=_spare(site)), rows) for site, rows in members]


def _suffix(site: PivotSite) -> str:
    return "-spare" if site.spare else ""


def _what_pins(ctx: Context, channels: Channels, site: PivotSite) -> str:
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

    def takes(self, site: PivotSite) -> bool:
        return site.second.weight.dtype in _HALF


def _shared(channels: Channels, sites: list[PivotSite]) -> Iterable[tuple[ChannelClass, list[tuple[PivotSite, bool]]]]:
    """The free classes that sites can give their permutation to, with those sites; True: by rows."""
    options: dict[ChannelClass, list[tuple[PivotSite, bool]]] = {}
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


def _class_of(channels: Channels, site: PivotSite, rows: bool) -> ChannelClass | None:
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


def _fold(
    ctx: Context, cls: ChannelClass, members: list[tuple[PivotSite, bool]], coarse: dict[str, str], *, lossy: bool
) -> bool:
    """Pivot the sites of a class on the same channels, and bring the class into the order of the pivots.

    Where their rounding is too much ``coarse`` says so, by their keys.
    """
    order = joint_order(ctx, members)
    if order is None:
        return False
    if not lossy and (reason := _too_coarse(ctx, members, order)) is not None:
        coarse.update((site.key, f"folded, its {reason}") for site, _ in members)
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


def _too_coarse(ctx: Context, members: list[tuple[PivotSite, bool]], order: Array) -> str | None:
    """Why verification would take a form back, where its rounding says so; None where it should pass."""
    worst = max(amplification(ctx, site, order, rows=rows) for site, rows in members)
    return f"rounding errors would be {worst:.1f} times those of the factors" if worst > MOST_AMPLIFIED else None


def _with_gather(ctx: Context, site: PivotSite, order: Array) -> tuple[list[ir.Node], ir.Value]:
    """The row form, and a Gather that brings its result into the order of y."""
    nodes, y = form_nodes(ctx, site, order, site.x, rows=True)
    places = ctx.constant(np.argsort(order), f"{site.y.name or 'y'}_places")
    gather = ctx.node("Gather", [y, places], {"axis": site.second.y_axis}, like=site.y)
    return [*nodes, gather], gather.outputs[0]


def _is_cheaper(ctx: Context, site: PivotSite) -> bool:
    """Whether the row form with a Gather is cheaper, asked before its pivots are chosen: any order costs the same."""
    nodes, _ = _with_gather(ctx, site, np.arange(site.second.outputs))
    cheaper = ctx.target.cheaper(nodes, site.nodes, by=LEAST_GAIN)
    for node in nodes:
        graphs.detach(node)
    return cheaper


def _vanish(value_of: Callable[[ir.Value], ir.Value]) -> tuple[list[ir.Node], Mapping[ir.Value, ir.Value]]:
    return [], {}


def _pivoted(ctx: Context, site: PivotSite, order: Array, rows: bool) -> Override:
    def make(value_of: Callable[[ir.Value], ir.Value]) -> tuple[list[ir.Node], Mapping[ir.Value, ir.Value]]:
        nodes, y = form_nodes(ctx, site, order, value_of(site.x), rows=rows)
        return nodes, {site.y: y}

    return make


def _place(value: ir.Value, axis: int) -> int:
    """An axis counted from the front."""
    rank = 0 if value.shape is None else len(value.shape)
    return axis % rank if rank else axis
