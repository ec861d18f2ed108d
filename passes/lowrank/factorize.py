"""``factorize``: dense weights become two factors, within a budget for the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field

from graphopt import graphs
from graphopt.channels import Channels, Group, channel_classes
from graphopt.errors import BadInput
from graphopt.moments import Moments, Relay, moments, tap_of
from graphopt.numerics import budget
from graphopt.numerics.low_rank import (
    Factors,
    Form,
    elements,
    rank_at_density,
    weighted_truncated_svd,
)
from graphopt.numerics.reconstruct import reconstruct
from graphopt.passes.lowrank.dense import DenseWeight, dense_weights
from graphopt.passes.lowrank.factor_chain import factor_constants, factor_nodes
from graphopt.passes.lowrank.hidden import FORM
from graphopt.passes.lowrank.sensitivity import sensitivities
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.store import Arrays, digest

Array = npt.NDArray[Any]


class Parameters(BaseModel):
    """How far, and how. Without ``density``, ``energy`` or ``rank`` the pass does nothing.

    Attributes:
        density: The fraction of elements that is kept of all weights that can be factorised, taken together.
        energy: Of each weight, the fraction of its squared singular values that is kept.
        rank: Of each weight, the rank.
        method: svd: the best factors of the weight; weighted: the best for the inputs that the data show; m: those,
            and then fitted again to what the model computes with the earlier weights already factorised.
        form: What a rank is to be stored as, when elements are counted: factors, pivot, or auto, which is pivot where
            a class of channels can take the permutation and the pass pivot runs.
        ranks: For a density. sensitivity: each weight's rank by what its error does to the outputs, as measured;
            uniform: every weight at the same density.
        mix: Of m: the share of the original's activations in what the factors are fitted to.
        steps: Of m: how often one of the two factors is fitted.
        skip: Patterns of names of weights to leave alone.
    """

    model_config = ConfigDict(extra="forbid")

    density: float | None = Field(default=None, gt=0, le=1)
    energy: float | None = Field(default=None, gt=0, le=1)
    rank: int | None = Field(default=None, ge=1)
    method: Literal["svd", "weighted", "m"] = "m"
    form: Literal["auto", "factors", "pivot"] = "auto"
    ranks: Literal["sensitivity", "uniform"] = "sensitivity"
    mix: float = Field(default=0.25, ge=0, le=1)
    steps: int = Field(default=2, ge=1, le=16)
    skip: list[str] = Field(default_factory=list)


_MISSED = 0.005
"""Densities that are apart by less are called the same: so little is what other passes add."""
_NOISE = 1e-3
"""Of the squared singular values' sum: what is left below this says nothing of a weight's sensitivity."""
_UNSEEN = 0.1
"""How much the directions that too few samples did not show count, against the mean of those that they did."""

Settings = Parameters  # its name means the class attribute within the pass


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A weight, the form that its rank is counted in, and the key of its best factors."""

    weight: DenseWeight
    form: Form
    key: str


class Factorize(Pass):
    """Replaces dense weights by two factors of a lower rank, within a budget for the whole model."""

    name = "factorize"
    kind = Kind.LOSSY
    stage = Stage.FACTORIZE
    explanation = Explanation(
        matches="MatMul, Gemm and Conv with a constant weight of at least 48 x 48, also one that several products "
        "read: W x becomes U (V x), a k x k convolution a k x k one to fewer channels and a 1 x 1 one",
        refuses="tables; quantised weights; weights that something else reads (a tied embedding); products in bodies; "
        "what skip names; a weight whose factors would hold more elements than it does",
        costs="a singular value decomposition of each weight; with data, runs of the model: one for the second "
        "moments, one for each weight on four samples for the sensitivities; m one more, whose values "
        "lie on disk. --work keeps what was done",
        source="SVD-LLM (Wang et al. 2024); MPIFA (Zhao et al., ICML 2025); WeLore (Jaiswal et al. 2024) for ranks "
        "that differ",
    )
    Parameters: ClassVar[type[BaseModel] | None] = Parameters

    def __init__(self, parameters: dict[str, object] | None = None) -> None:
        super().__init__(parameters)
        self._done = False
        self._counted = (0, 0)

    @property
    def settings(self) -> Settings:
        """The parameters."""
        assert isinstance(self.parameters, Settings)
        return self.parameters

    @property
    def asked(self) -> bool:
        return any(value is not None for value in (self.settings.density, self.settings.energy, self.settings.rank))

    def apply(self, ctx: Context) -> None:
        if self._done or not self.asked:
            return
        self._done = True  # what is dense after it was left dense on purpose
        settings = self.settings
        if sum(value is not None for value in (settings.density, settings.energy, settings.rank)) > 1:
            raise BadInput("give one of density, energy and rank", where=f"pass {self.name}")
        if settings.method != "svd" and not ctx.feeds:
            raise BadInput(
                f"the method {settings.method} looks at data", where=f"pass {self.name}", hint="give --calibration"
            )
        weights = dense_weights(ctx, settings.skip)
        for pattern in settings.skip:
            names = [value.name or "" for graph in ctx.graphs() for value in graph.initializers.values()]
            if not any(fnmatchcase(name, pattern) for name in names):
                raise BadInput(f"skip: no constant is named like '{pattern}'", where=f"pass {self.name}")
        if not weights:
            return
        self._counted = sum(weight.outputs * weight.inputs for weight in weights), _elements(ctx)
        candidates = self._decompose(ctx, weights)
        ranks = self._ranks(ctx, candidates)
        chosen = [(c, rank) for c, rank in zip(candidates, ranks, strict=True) if rank is not None]
        for candidate, factors in self._factors(ctx, chosen):
            _write(ctx, candidate, factors)

    def remark(self, ctx: Context) -> str:
        whole, before = self._counted
        wanted = self.settings.density
        if not whole or wanted is None:
            return ""
        density = 1 - (before - _elements(ctx)) / whole
        if density < wanted + _MISSED:
            return ""
        told = f"a density of {density:.3g}, above the {wanted:g} that was asked for"
        return f"{told}: pivot has no form for all weights that were counted on it" if ctx.runs("pivot") else told

    # -- the best factors of each weight ---------------------------------------------------------------------------

    def _decompose(self, ctx: Context, weights: Sequence[DenseWeight]) -> list[_Candidate]:
        """Put the best factors of each weight at the largest rank of interest into the store, with its spectrum."""
        settings = self.settings
        auto = settings.form == "auto" and ctx.runs("pivot")
        channels = channel_classes(ctx.model, Group.PERMUTATION) if auto else None
        data = "" if settings.method == "svd" else digest(*_numbers(ctx), "moments")
        candidates = []
        for weight in weights:
            form: Form = "factors"
            wanted = settings.form == "pivot" or (channels is not None and _takes_pivots(channels, weight))
            if wanted and len(weight.nodes) == 1:  # of factors that several products share there is no pivot form
                form = "pivot"
            key = digest("svd", weight.key, data, [tap.value for tap in weight.taps] if data else "")
            candidates.append(_Candidate(weight, form, key))
        missing = [c for c in candidates if not ctx.store.has(c.key)] if data else []
        grams = _grams(ctx, [c.weight for c in missing]) if missing else {}
        for number, candidate in enumerate(candidates):
            ctx.say(f"factorize: {candidate.weight.name}, {number + 1} of {len(candidates)}")
            gram = grams.get(candidate.weight)
            ctx.store.arrays(candidate.key, lambda c=candidate, g=gram: _best(ctx, c.weight, g))  # type: ignore[misc]
        return candidates

    # -- ranks -----------------------------------------------------------------------------------------------------

    def _ranks(self, ctx: Context, candidates: Sequence[_Candidate]) -> list[int | None]:
        settings = self.settings
        shapes = [(c.weight.outputs, c.weight.inputs) for c in candidates]
        if settings.rank is not None:
            ranks = [_useful(settings.rank, c) for c in candidates]
            for c, rank in zip(candidates, ranks, strict=True):
                if rank is None:
                    m, n = c.weight.outputs, c.weight.inputs
                    told = f"of rank {settings.rank} it would hold no fewer elements than its {m} x {n}"
                    ctx.refuse(c.weight.nodes[0], f"{c.weight.name}: {told}")
            return ranks
        if settings.energy is not None:
            spectra = (ctx.store.arrays(c.key, dict)["values"] for c in candidates)
            return [
                _useful(budget.energy_rank(values, settings.energy), c)
                for c, values in zip(candidates, spectra, strict=True)
            ]
        assert settings.density is not None
        if settings.ranks == "uniform":
            return [
                _useful(rank_at_density(m, n, settings.density, c.form), c)
                for c, (m, n) in zip(candidates, shapes, strict=True)
            ]
        weights = [c.weight for c in candidates]
        references = [
            _reference(ctx.store.arrays(c.key, dict)["values"], rank_at_density(m, n, settings.density, c.form))
            for c, (m, n) in zip(candidates, shapes, strict=True)
        ]
        trials = [
            lambda c=c, r=r: _cut(ctx.store.arrays(c.key, dict), r).product()
            for c, r in zip(candidates, references, strict=True)
        ]
        measured = sensitivities(ctx, weights, trials)
        sites = []
        for candidate, rank, error, (m, n) in zip(candidates, references, measured, shapes, strict=True):
            values = ctx.store.arrays(candidate.key, dict)["values"]
            losses = budget.tail_losses(values)
            scale = losses[rank] if error is not None else losses[0]
            sensitivity = (1.0 if error is None else error) / scale if scale > 0 else 0.0
            sites.append(budget.Site(m, n, losses * sensitivity, candidate.form))
        total = sum(m * n for m, n in shapes)
        try:
            return budget.allocate(sites, int(settings.density * total))
        except ValueError as error:
            raise BadInput(f"a density of {settings.density}: {error}", where=f"pass {self.name}") from error

    # -- the factors that are written ------------------------------------------------------------------------------

    def _factors(
        self, ctx: Context, chosen: Sequence[tuple[_Candidate, int]]
    ) -> Iterator[tuple[_Candidate, Callable[[], Factors]]]:
        if self.settings.method != "m":
            for candidate, rank in chosen:
                yield candidate, (lambda c=candidate, r=rank: _cut(ctx.store.arrays(c.key, dict), r))  # type: ignore[misc]
            return
        yield from self._reconstructed(ctx, chosen)

    def _reconstructed(
        self, ctx: Context, chosen: Sequence[tuple[_Candidate, int]]
    ) -> Iterator[tuple[_Candidate, Callable[[], Factors]]]:
        """Each weight fitted to the model as it is when those before it are factorised."""
        settings = self.settings
        original = ctx.model.clone()
        assert ctx.feeds is not None
        chain = digest(*_numbers(ctx), settings.mix, settings.steps)
        with Relay(original, ctx.model, ctx.feeds) as relay:
            # Products of one input are fitted together: one look at the data does for all of them.
            for number, (_, members) in enumerate(groupby(chosen, key=lambda item: item[0].weight.taps)):
                group = list(members)
                chain = digest("m", chain, *[(c.key, rank) for c, rank in group])
                keys = [digest(chain, index) for index in range(len(group))]
                if not all(ctx.store.has(key) for key in keys):
                    ctx.say(f"factorize: fitting {group[0][0].weight.name}, group {number + 1}")
                    self._fit(ctx, relay, group, keys)
                for (candidate, _), key in zip(group, keys, strict=True):
                    yield candidate, (lambda k=key: Factors(**ctx.store.arrays(k, dict)))  # type: ignore[misc]

    def _fit(self, ctx: Context, relay: Relay, group: Sequence[tuple[_Candidate, int]], keys: Sequence[str]) -> None:
        settings = self.settings
        taps = group[0][0].weight.taps
        pairs = list(zip(taps, map(tap_of, group[0][0].weight.linears()), strict=True))
        found, refused = relay.cross_moments(pairs)
        for (candidate, rank), key in zip(group, keys, strict=True):
            best = _cut(ctx.store.arrays(candidate.key, dict), rank)
            if refused or not found:
                fitted = best
            else:
                gram = sum((m.current.gram for m in found.values()), np.zeros(()))
                cross = sum((m.cross for m in found.values()), np.zeros(()))
                matrix = candidate.weight.matrix(ctx.opset)
                fitted = reconstruct(matrix, best, gram, cross, mix=settings.mix, steps=settings.steps)
            made = {"left": fitted.left.astype(np.float32), "right": fitted.right.astype(np.float32)}
            ctx.store.arrays(key, lambda made=made: made)  # type: ignore[misc]


def _elements(ctx: Context) -> int:
    """Of all constants of floats that something reads, each once."""
    values = (
        value
        for graph in ctx.graphs()
        for value in (*graph.initializers.values(), *(node.outputs[0] for node in graph if node.op_type == "Constant"))
        if value.uses()
    )
    tensors = {id(tensor): tensor for value in values if (tensor := graphs.constant_tensor(value)) is not None}
    return sum(tensor.size for tensor in tensors.values() if tensor.dtype.is_floating_point())


def _numbers(ctx: Context) -> Iterator[object]:
    """What a run depends on besides the weight: the data, and the names of the model's nodes."""
    for case in ctx.feeds or ():
        for name, array in sorted(case.items()):
            yield name
            yield array if isinstance(array, np.ndarray) else repr(array)


def _takes_pivots(channels: Channels, weight: DenseWeight) -> bool:
    """Whether the permutation of a pivot form vanishes: the outputs' or the inputs' class is free."""
    for linear in weight.linears():
        if linear.weight.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            return False  # pivot refuses what rounding makes of it there; pivot-lossy is for the user to ask for
        ends = [(linear.y, linear.y_axis, True), (linear.x, linear.x_axis, linear.pointwise)]
        free = False
        for value, axis, allowed in ends:
            rank = 0 if value.shape is None else len(value.shape)
            cls = channels.whole(value, axis % rank) if rank and allowed else None
            free = free or (cls is not None and cls.free)
        if not free:
            return False
    return True


def _grams(ctx: Context, weights: Sequence[DenseWeight]) -> dict[DenseWeight, Array]:
    """The Gram matrix of the inputs of each weight, summed over its products; none where the data cannot show it."""
    assert ctx.feeds is not None
    taps = list(dict.fromkeys(tap for weight in weights for tap in weight.taps))
    found, refused = moments(ctx.model, taps, ctx.feeds, progress=ctx.say)
    grams = {}
    for weight in weights:
        parts: list[Moments] = [found[tap] for tap in weight.taps if tap in found]
        if len(parts) == len(weight.taps):
            rows = sum(part.rows for part in parts)
            grams[weight] = _spread(sum((part.gram for part in parts), np.zeros(())), rows)
            if rows < 2 * weight.inputs:
                told = f"the data show {rows} rows for {weight.inputs} inputs: with more samples it would be closer"
                ctx.refuse(weight.nodes[0], f"{weight.name}: {told}")
        else:
            reason = next(refused[tap] for tap in weight.taps if tap in refused)
            ctx.refuse(weight.nodes[0], f"{weight.name}: the data do not weigh it: {reason}")
    return grams


def _spread(gram: Array, rows: int) -> Array:
    """A Gram matrix in which directions that too few rows did not show count a little.

    Otherwise a weight would seem to lose nothing at the rank of the data, and be fitted to them alone.
    """
    n = len(gram)
    if rows >= 2 * n or n == 0:
        return gram
    return gram + np.eye(n) * (_UNSEEN * n / (n + rows) * float(np.trace(gram)) / n)


def _best(ctx: Context, weight: DenseWeight, gram: Array | None) -> Arrays:
    matrix = weight.matrix(ctx.opset)
    try:
        factors = weighted_truncated_svd(matrix, min(matrix.shape), gram)
    except ValueError as error:
        raise BadInput(f"cannot be factorised: {error}", where=weight.name, hint="leave it out with skip") from error
    # Row i of U^T W is |left_i| right_i, and its length in the metric of G is the singular value.
    right = factors.right
    squares = np.sum((right if gram is None else right @ gram) * right, axis=1)
    values = np.sqrt(np.maximum(squares, 0.0)) * np.linalg.norm(factors.left, axis=0)
    return {"left": factors.left.astype(np.float32), "right": right.astype(np.float32), "values": values}


def _cut(best: Arrays, rank: int) -> Factors:
    """The best factors of a lower rank: the first columns and rows."""
    return Factors(best["left"][:, :rank], best["right"][:rank])


def _reference(values: Array, rank: int) -> int:
    """The rank at which a weight's error is measured: at most ``rank``, and low enough that there is an error.

    Where few samples span few directions the tail is nothing but rounding, and so would the sensitivity be.
    """
    losses = budget.tail_losses(values)
    seen = int(np.argmax(losses <= _NOISE * losses[0]))  # the first rank that leaves next to nothing
    return max(1, min(rank, seen - 1, len(values) - 1))


def _useful(rank: int, candidate: _Candidate) -> int | None:
    """A rank, or None where its form holds no fewer elements than the dense weight."""
    m, n = candidate.weight.outputs, candidate.weight.inputs
    if rank >= min(m, n) or elements(m, n, rank, candidate.form) >= m * n:
        return None
    return rank


def _write(ctx: Context, candidate: _Candidate, factors: Callable[[], Factors]) -> None:
    rank = factors().rank
    shared: tuple[ir.Value, ir.Value] | None = None
    for linear in candidate.weight.linears():
        made = shared or factor_constants(ctx, linear, rank, lambda: factors().right, lambda: factors().left)
        inner, outer = factor_nodes(ctx, linear, rank, *made)
        if candidate.form == "pivot":
            outer.metadata_props[FORM] = "pivot"
        # The budget decides, not the clock: where a pivot form follows, the factors may hold more than the weight.
        if ctx.replace({linear.y: outer.outputs[0]}, [inner, outer], rule="factors", certain=True):
            shared = made
