"""Feeds that a model runs on, found by running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.feeds import telling
from graphopt.feeds.attempts import REDRAWS, STRETCHES, Attempt, Draw, sizes_to_try
from graphopt.feeds.synthesis import Feeds, Synthesis
from graphopt.runtime.ending import MOST_CUT, Endless, Limit, current_limit, limit_of, under

_SMALL = 64
_MOST_FUTILE = 2  # cases where no other values help; nor would they in further ones


def synthesise_feeds(
    model: ir.Model, *, cases: int = 3, seed: int = 0, shapes: Mapping[str, Sequence[int]] | None = None
) -> list[Feeds]:
    """Make inputs for a model, without running it.

    Scalar inputs that the model compares with constants, and those that choose the branch of an ``If``, take
    each such value in turn (and one that equals none); there are more cases than asked for where that needs it.
    The batch is 2, 1, 3, ... from case to case, and larger than 1 for every value of every switch; symbolic sizes of
    one name are equal within a case, those of different names differ, and all change between cases.

    Args:
        model: The model; it is not changed.
        cases: How many feeds, at least.
        seed: The same seed gives the same arrays.
        shapes: Sizes to use for some inputs; sizes that have a name there bind the other inputs too.

    Raises:
        BadInput: ``shapes`` contradicts the model, or an input has a type that cannot be made up.
    """
    synthesis = Synthesis(model, cases, seed, shapes)
    return [synthesis.feeds(case, Attempt()) for case in range(synthesis.cases)]


def feeds_that_run(
    model: ir.Model,
    run: Callable[[Feeds], object],
    *,
    cases: int = 3,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[Feeds]:
    """Make inputs that a model runs on: like `synthesise_feeds`, and where a case fails, other sizes are tried.

    A case on which a loop has no end (`graphopt.runtime.ending`) is left out: that is no matter of sizes. After a few
    runs without an end no further case is tried: each takes long.

    Tried in turn for each case: parameters at their most harmless; unnamed sizes not shared between inputs; integers of
    unknown use 0 and 1, as if they were indices; all free sizes equal, growing from 4 to 640; the same with a batch of
    1; every size equal. A case for which nothing runs is left out.

    One case has floats of large magnitude, where the outputs stay finite there. In a case where every output is
    constant other values are drawn.

    Args:
        model: The model; it is not changed.
        run: Runs the model once, by `run_to_end`; whatever else than `Endless` it raises means that the sizes were
            wrong. Where it gives the outputs by name, values are chosen by what they show.
        cases: How many feeds, at least (before those left out).
        seed: The same seed gives the same arrays.
        shapes: As for `synthesise_feeds`.

    Raises:
        Endless: A loop has no end on any case that it began with.
        GraphoptError: No case runs; with the reason that the first one was refused for.
    """
    limit = current_limit() or limit_of(model, made_up=True)
    with under(limit):
        return _those_that_run(Synthesis(model, cases, seed, shapes), run, limit)


def _those_that_run(synthesis: Synthesis, run: Callable[[Feeds], object], limit: Limit | None) -> list[Feeds]:
    attempts = list(sizes_to_try())
    found: list[Feeds] = []
    first_error: Exception | None = None
    futile = 0
    for case in range(synthesis.cases):
        if limit is not None and limit.cut >= MOST_CUT:
            break
        tried: set[tuple[object, ...]] = set()
        for attempt in attempts:
            feeds = synthesis.feeds(case, attempt)
            key = (*map(_looks, feeds.values()), attempt.unknown_limit, attempt.integers)
            if key in tried:
                continue
            tried.add(key)
            # Larger magnitudes tell more than the plain values, which need not be run where those do.
            draws = STRETCHES if case == synthesis.large_case else ()
            better = _first(synthesis, case, attempt, draws, run, feeds, telling.is_finite)
            results = None
            if better is None:
                try:
                    results = run(feeds)
                except Endless as error:
                    first_error = first_error if isinstance(first_error, Endless) else error
                    break
                except Exception as error:
                    first_error = first_error or error
                    continue
            if better is None and futile < _MOST_FUTILE and telling.says_nothing(results):
                better = _first(synthesis, case, attempt, REDRAWS, run, feeds, lambda made: True)
                futile += better is None
            found.append(feeds if better is None else better)
            # What worked once is tried first from now on.
            attempts.remove(attempt)
            attempts.insert(0, attempt)
            break
    if not found:
        if isinstance(first_error, Endless):
            raise first_error
        reason = "no inputs" if first_error is None else str(first_error).splitlines()[0]
        raise GraphoptError(
            f"no inputs were found that the model runs on: {reason}", hint="give real ones with --calibration"
        )
    return found


def _first(
    synthesis: Synthesis,
    case: int,
    attempt: Attempt,
    draws: Sequence[Draw],
    run: Callable[[Feeds], object],
    known: Feeds,
    accepts: Callable[[object], bool],
) -> Feeds | None:
    """The first of some draws, other than what is known, whose outputs say something and are accepted."""
    for draw in draws:
        feeds = synthesis.feeds(case, attempt, draw)
        if all(map(_same, feeds.values(), known.values())):
            continue
        try:
            results = run(feeds)
        except Endless:
            return None  # others would take as long
        except Exception:  # what the values do not suit
            continue
        if isinstance(results, Mapping) and not telling.says_nothing(results) and accepts(results):
            return feeds
    return None


def _looks(value: Any) -> tuple[Any, ...]:
    """What tells inputs of two attempts apart: the shape, and small values."""
    if value is None or isinstance(value, list):
        return () if value is None else tuple(map(_looks, value))
    small = value.size <= _SMALL and value.dtype.kind in "iub"
    return (value.shape, value.tobytes() if small else b"")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return all(map(_same, a, b))
    if a is None or b is None:
        return a is b
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
