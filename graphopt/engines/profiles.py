"""Optimization profiles: the sizes an engine is built for, from ``--shapes`` or from data."""

from __future__ import annotations

import difflib
import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.errors import BadInput
from graphopt.feeds import Feeds

Sizes = tuple[int, ...]
Range = tuple[Sizes, Sizes, Sizes]

_SIZES = re.compile(r"\d+(x\d+)*")
_LARGEST = (1 << 31) - 1  # an axis that is larger, the libraries refuse


@dataclass(frozen=True)
class Profile:
    """The shapes of one input: the smallest, the one to be fastest at, the largest."""

    min: Sizes
    opt: Sizes
    max: Sizes


@dataclass(frozen=True)
class Seen:
    """What sizes some data has: the smallest, the middle one, the largest.

    Attributes:
        symbols: Symbol of the model → its size, over every input that has it.
        inputs: Input → its shape; axes without a name are looked up here.
        values: Input that decides a shape → its values, flattened.
    """

    symbols: Mapping[str, Range] = field(default_factory=dict)
    inputs: Mapping[str, Range] = field(default_factory=dict)
    values: Mapping[str, Profile] = field(default_factory=dict)


def observe(inputs: Sequence[ir.Value], feeds: Iterable[Feeds], deciding: Collection[str] = ()) -> Seen:
    """Look at the sizes of data. The middle size is the median, which more than half of the data having one size is.

    Args:
        inputs: The model's inputs.
        feeds: The data; each is looked at once and not kept.
        deciding: Inputs whose values decide shapes: their values are looked at, too.

    Raises:
        BadInput: An input that decides a shape has another number of values in one sample than in the others.
    """
    axes = {value.name or "": [_symbol(size) for size in value.shape or ()] for value in inputs}
    shapes: dict[str, list[Sizes]] = defaultdict(list)
    values: dict[str, list[Sizes]] = defaultdict(list)
    for feed in feeds:
        for name, array in feed.items():
            shapes[name].append(tuple(array.shape))
            if name in deciding:
                values[name].append(tuple(int(item) for item in np.asarray(array).reshape(-1)))
    symbols: dict[str, list[int]] = defaultdict(list)
    for name, seen in shapes.items():
        for symbol, sizes in zip(axes[name], zip(*seen, strict=True), strict=True):
            if isinstance(symbol, str):
                symbols[symbol] += sizes
    for name, found in values.items():
        if len({len(one) for one in found}) > 1:
            raise BadInput(
                f"{name!r} decides a shape and has another number of values in some samples", where="--calibration"
            )
    return Seen(
        {symbol: _spread([(size,) for size in sizes]) for symbol, sizes in symbols.items()},
        {name: _spread(seen) for name, seen in shapes.items()},
        {name: Profile(*_spread(found)) for name, found in values.items()},
    )


def _spread(rows: Sequence[Sizes]) -> Range:
    columns = list(zip(*rows, strict=True))
    return (
        tuple(min(column) for column in columns),
        tuple(statistics.median_low(column) for column in columns),
        tuple(max(column) for column in columns),
    )


def parse_shapes(options: Iterable[str]) -> dict[str, Range]:
    """Parse ``NAME=MIN/OPT/MAX`` (or ``NAME=SHAPE`` for all three), shapes like ``1x16``.

    Raises:
        BadInput: An option is malformed, names something twice, or is not ordered.
    """
    shapes: dict[str, Range] = {}
    for option in options:
        name, separator, text = option.rpartition("=")
        parts = text.lower().split("/")
        if not separator or not name or len(parts) not in (1, 3) or not all(map(_SIZES.fullmatch, parts)):
            raise BadInput(
                f"{option!r} is not NAME=MIN/OPT/MAX", where="--shapes", hint="for example x=1x16/4x64/8x128"
            )
        if name in shapes:
            raise BadInput(f"{name!r} is given twice", where="--shapes")
        low, best, high = (tuple(int(size) for size in part.split("x")) for part in parts * (3 // len(parts)))
        if not len(low) == len(best) == len(high):
            raise BadInput(f"{option!r} has shapes of different rank", where="--shapes")
        if max(high) > _LARGEST:
            raise BadInput(f"{option!r} has an axis larger than {_LARGEST}", where="--shapes")
        if any(not a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise BadInput(f"{option!r} is not in the order MIN ≤ OPT ≤ MAX", where="--shapes")
        shapes[name] = (low, best, high)
    return shapes


def make_profiles(
    inputs: Sequence[ir.Value], shapes: Mapping[str, Range], seen: Seen | None = None
) -> dict[str, Profile]:
    """A profile for each input that has a dynamic axis.

    Args:
        inputs: The model's inputs.
        shapes: Input → shapes, or symbol → one size each. Both hold on every axis of a symbol, of other inputs too.
        seen: The sizes of data, for axes that ``shapes`` does not name.

    Raises:
        BadInput: A dynamic axis has no size; a name is unknown; a shape does not fit its input; two inputs
            differ in the size of one symbol.
    """
    known = {value.name or "": value for value in inputs}
    symbols = {symbol for value in inputs for symbol in map(_symbol, value.shape or ()) if isinstance(symbol, str)}
    for name in shapes:
        if name not in known and name not in symbols:
            near = difflib.get_close_matches(name, [*known, *symbols], n=1)
            named = f"; their axes {', '.join(sorted(symbols))}" if symbols else ""
            hint = f"did you mean {near[0]!r}?" if near else f"the inputs are {', '.join(known)}{named}"
            raise BadInput(f"{name!r} is neither an input nor a symbolic axis", where="--shapes", hint=hint)
        if name not in known and len(shapes[name][0]) != 1:
            raise BadInput(f"{name!r} is an axis: give one size, not a shape", where="--shapes")
    sizes = {**_implied(known, shapes), **shapes}
    seen = seen or Seen()
    profiles: dict[str, Profile] = {}
    missing: list[ir.Value] = []
    for name, value in known.items():
        if value.shape is None:
            raise BadInput("has no known number of axes", where=f"input {name!r}", hint="export it with a shape")
        axes = [_symbol(size) for size in value.shape]
        if name in shapes:
            profiles[name] = _fit(name, axes, shapes[name])
        elif any(not isinstance(axis, int) for axis in axes):
            axis_sizes = [_sizes_of(name, index, axis, sizes, seen) for index, axis in enumerate(axes)]
            found = [one for one in axis_sizes if one is not None]
            if len(found) == len(axes):
                low, best, high = zip(*found, strict=True)
                profiles[name] = Profile(low, best, high)
            else:
                missing.append(value)
    if missing:
        raise BadInput(
            f"dynamic inputs without sizes: {', '.join(_described(value) for value in missing)}",
            hint=f"for example {_example(missing, {*sizes, *seen.symbols})}",
        )
    _refuse_contradictions(known, profiles, shapes)
    return {name: profile for name, profile in profiles.items() if not _is_static(known[name])}


def _implied(inputs: Mapping[str, ir.Value], shapes: Mapping[str, Range]) -> dict[str, Range]:
    """The sizes of the symbols on the axes of inputs that are given whole; the first that has a symbol says it."""
    implied: dict[str, Range] = {}
    for name, given in shapes.items():
        axes = list(inputs[name].shape or ()) if name in inputs else []
        if len(axes) != len(given[0]):
            continue  # `_fit` refuses it
        for index, symbol in enumerate(map(_symbol, axes)):
            if isinstance(symbol, str):
                low, best, high = (shape[index] for shape in given)
                implied.setdefault(symbol, ((low,), (best,), (high,)))
    return implied


def _sizes_of(
    name: str, index: int, axis: int | str | None, shapes: Mapping[str, Range], seen: Seen
) -> tuple[int, int, int] | None:
    """The three sizes of an axis, from what knows it best; None where nothing does."""
    if isinstance(axis, int):
        return axis, axis, axis
    if axis is not None and (given := shapes.get(axis) or seen.symbols.get(axis)):
        return given[0][0], given[1][0], given[2][0]
    if axis is None and (whole := seen.inputs.get(name)):
        return whole[0][index], whole[1][index], whole[2][index]
    return None


def symbol_sizes(inputs: Sequence[ir.Value], profiles: Mapping[str, Profile]) -> dict[str, tuple[int, int]]:
    """The smallest and the largest size of each symbol of the inputs."""
    return {
        symbol: (profile.min[index], profile.max[index])
        for value in inputs
        if (profile := profiles.get(value.name or "")) is not None
        for index, symbol in enumerate(map(_symbol, value.shape or ()))
        if isinstance(symbol, str)
    }


def best_sizes(inputs: Sequence[ir.Value], profiles: Mapping[str, Profile]) -> dict[str, int]:
    """The size of each symbol of the inputs that the engine shall be fastest at."""
    return {
        symbol: profile.opt[index]
        for value in inputs
        if (profile := profiles.get(value.name or "")) is not None
        for index, symbol in enumerate(map(_symbol, value.shape or ()))
        if isinstance(symbol, str)
    }


def fix_profiles(
    inputs: Sequence[ir.Value], profiles: Mapping[str, Profile], sizes: Mapping[str, int]
) -> dict[str, Profile]:
    """The profiles for one size a symbol.

    Raises:
        BadInput: An axis of another size in the profiles has no name, so that nothing fixes it.
    """
    fixed: dict[str, Profile] = {}
    for value in inputs:
        name = value.name or ""
        if name not in profiles:
            continue
        profile = profiles[name]
        chosen = []
        for axis, low, high in zip(map(_symbol, value.shape or ()), profile.min, profile.max, strict=True):
            if axis not in sizes and low != high:
                raise BadInput(
                    f"an axis of the input {name!r} has no name",
                    where="--buckets",
                    hint="name it when exporting, or give it one size with --shapes",
                )
            chosen.append(sizes[axis] if isinstance(axis, str) and axis in sizes else low)
        fixed[name] = Profile(tuple(chosen), tuple(chosen), tuple(chosen))
    return fixed


def _symbol(size: int | ir.SymbolicDim) -> int | str | None:
    return size if isinstance(size, int) else size.value


def _is_static(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.is_static()


def _fit(name: str, axes: Sequence[int | str | None], given: Range) -> Profile:
    if len(given[0]) != len(axes):
        raise BadInput(f"{name!r} has {len(axes)} axes, not {len(given[0])}", where="--shapes")
    for index, axis in enumerate(axes):
        if isinstance(axis, int) and any(shape[index] != axis for shape in given):
            raise BadInput(f"axis {index} of {name!r} is fixed at {axis}", where="--shapes")
    return Profile(*given)


def _described(value: ir.Value) -> str:
    axes = [_symbol(size) for size in value.shape or ()]
    return f"{value.name} [{', '.join('?' if axis is None else str(axis) for axis in axes)}]"


def _example(missing: Sequence[ir.Value], known: Collection[str]) -> str:
    """Options that would do: one for each symbol, or one for an input that has an unnamed axis."""
    options: dict[str, str] = {}
    for value in missing:
        axes = [_symbol(size) for size in value.shape or ()]
        if None in axes:
            low, best, high = (
                "x".join(str(axis) if isinstance(axis, int) else size for axis in axes) for size in ("1", "4", "8")
            )
            options[value.name or ""] = f"{low}/{best}/{high}"
        else:
            options |= {str(a): "1/4/8" for a in axes if not isinstance(a, int) and str(a) not in known}
    return " ".join(f"--shapes {name}={sizes}" for name, sizes in options.items())


def _refuse_contradictions(
    known: Mapping[str, ir.Value], profiles: Mapping[str, Profile], shapes: Mapping[str, Range]
) -> None:
    seen: dict[str, tuple[str, tuple[int, int, int]]] = {
        name: ("by its name", (low[0], best[0], high[0]))
        for name, (low, best, high) in shapes.items()
        if name not in known
    }
    for name, profile in profiles.items():
        for index, size in enumerate(known[name].shape or ()):
            symbol = _symbol(size)
            if not isinstance(symbol, str):
                continue
            sizes = (profile.min[index], profile.opt[index], profile.max[index])
            other, expected = seen.setdefault(symbol, (f"in {name!r}", sizes))
            if sizes != expected:
                raise BadInput(
                    f"{symbol!r} is {'/'.join(map(str, expected))} {other} and {'/'.join(map(str, sizes))} in {name!r}",
                    where="--shapes",
                )
