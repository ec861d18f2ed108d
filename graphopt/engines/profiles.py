"""Optimization profiles: the sizes an engine is built for, from ``--shapes``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.errors import BadInput

Sizes = tuple[int, ...]
Range = tuple[Sizes, Sizes, Sizes]

_SIZES = re.compile(r"\d+(x\d+)*")


@dataclass(frozen=True)
class Profile:
    """The shapes of one input: the smallest, the one to be fastest at, the largest."""

    min: Sizes
    opt: Sizes
    max: Sizes


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
        if any(not a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise BadInput(f"{option!r} is not in the order MIN ≤ OPT ≤ MAX", where="--shapes")
        shapes[name] = (low, best, high)
    return shapes


def make_profiles(inputs: Sequence[ir.Value], shapes: Mapping[str, Range]) -> dict[str, Profile]:
    """A profile for each input that has a dynamic axis.

    Args:
        inputs: The model's inputs.
        shapes: Input → shapes, or symbol → one size each, which then holds on every axis of that symbol.

    Raises:
        BadInput: A dynamic axis has no size; a name is unknown; a shape does not fit its input; two inputs
            differ in the size of one symbol.
    """
    known = {value.name or "": value for value in inputs}
    symbols = {symbol for value in inputs for symbol in map(_symbol, value.shape or ()) if isinstance(symbol, str)}
    for name in shapes:
        if name not in known and name not in symbols:
            near = difflib.get_close_matches(name, [*known, *symbols], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the inputs are {', '.join(known)}"
            raise BadInput(f"{name!r} is neither an input nor a symbolic axis", where="--shapes", hint=hint)
        if name not in known and len(shapes[name][0]) != 1:
            raise BadInput(f"{name!r} is an axis: give one size, not a shape", where="--shapes")
    profiles: dict[str, Profile] = {}
    missing: list[ir.Value] = []
    for name, value in known.items():
        if value.shape is None:
            raise BadInput(f"the input {name!r} has no shape", hint="export it with its rank known")
        axes = [_symbol(size) for size in value.shape]
        if name in shapes:
            profiles[name] = _fit(name, axes, shapes[name])
        elif any(not isinstance(axis, int) for axis in axes):
            if all(isinstance(axis, int) or axis in shapes for axis in axes):
                low, best, high = (
                    tuple(axis if isinstance(axis, int) else shapes[str(axis)][level][0] for axis in axes)
                    for level in range(3)
                )
                profiles[name] = Profile(low, best, high)
            else:
                missing.append(value)
    if missing:
        raise BadInput(
            f"dynamic inputs without sizes: {', '.join(_described(value) for value in missing)}",
            hint=f"for example {_example(missing, shapes)}",
        )
    _refuse_contradictions(known, profiles)
    return {name: profile for name, profile in profiles.items() if not _is_static(known[name])}


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


def _example(missing: Sequence[ir.Value], shapes: Mapping[str, Range]) -> str:
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
            options |= {str(a): "1/4/8" for a in axes if not isinstance(a, int) and str(a) not in shapes}
    return " ".join(f"--shapes {name}={sizes}" for name, sizes in options.items())


def _refuse_contradictions(known: Mapping[str, ir.Value], profiles: Mapping[str, Profile]) -> None:
    seen: dict[str, tuple[str, tuple[int, int, int]]] = {}
    for name, profile in profiles.items():
        for index, size in enumerate(known[name].shape or ()):
            symbol = _symbol(size)
            if not isinstance(symbol, str):
                continue
            sizes = (profile.min[index], profile.opt[index], profile.max[index])
            other, expected = seen.setdefault(symbol, (name, sizes))
            if sizes != expected:
                raise BadInput(
                    f"{symbol!r} is {'/'.join(map(str, expected))} in {other!r}"
                    f" and {'/'.join(map(str, sizes))} in {name!r}",
                    where="--shapes",
                )
