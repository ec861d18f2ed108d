"""Everything about one model that its feeds are made from, and the feeds of one case."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import BadInput
from graphopt.feeds.attempts import Attempt, Draw
from graphopt.feeds.sizes import (
    SIZES,
    axes_of,
    batch_symbols,
    check_shapes,
    evaluate,
    is_expression,
    name_of,
    spatial_size,
)
from graphopt.feeds.values import PARAMETERS, Maker
from graphopt.runtime.roles import ModelRoles, Roles
from graphopt.runtime.scalars import Scalar

Feeds = dict[str, Any]  # an array for a tensor, a list of arrays for a sequence, None for what is absent

_BATCHES = (2, 3, 4)  # besides 1
_MOST_COMBINATIONS = 12


class Synthesis:
    """Everything about one model that its feeds are made from."""

    def __init__(self, model: ir.Model, cases: int, seed: int, shapes: Mapping[str, Sequence[int]] | None) -> None:
        self.seed = seed
        self.model = model
        self._windows: dict[tuple[Scalar, ...], dict[int, int]] = {}
        self.inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
        self.analysis = ModelRoles(model)
        self.roles = {name_of(value): self.analysis.of(value) for value in self.inputs}
        if any(limit.size is None for roles in self.roles.values() for limit in roles.limits):
            self._infer_shapes()
        self.given = {name: tuple(int(size) for size in shape) for name, shape in (shapes or {}).items()}
        check_shapes(self.inputs, self.given)
        self.choices = {
            name_of(value): found for value in self.inputs if (found := _choices(value, self.roles[name_of(value)]))
        }
        lengths = [len(found) for found in self.choices.values()]
        self.combined = math.prod(lengths) <= _MOST_COMBINATIONS
        self.combinations = math.prod(lengths) if self.combined else max(lengths)
        # A branch may be wrong for a batch of 1 alone, or for larger ones alone: the single sample has its turn after
        # every switch had its.
        alone = 1 if self.combinations > 1 and self._batched() else 0
        self.cases = max(cases, self.combinations + alone)
        self.large_case = min(self.combinations + 1, self.cases - 1) if self.cases > 1 else None

    def _batched(self) -> bool:
        axes = {name_of(value): axes_of(value, Attempt(), self.given.get(name_of(value))) for value in self.inputs}
        symbols = [axis for found in axes.values() for axis in found if isinstance(axis, str)]
        return bool(batch_symbols(axes, symbols, {}))

    def batch(self, case: int) -> int:
        """How many samples a case has: 2, 1, 3, 4 in turn; with switches, the 1 after all of their values."""
        turn = case % (self.combinations + len(_BATCHES))
        if turn == self.combinations:
            return 1
        return _BATCHES[(turn if turn < self.combinations else turn - 1) % len(_BATCHES)]

    def _infer_shapes(self) -> None:
        from graphopt.shapes import infer_shapes

        inferred = self.model.clone()
        infer_shapes(inferred)
        self.analysis = ModelRoles(inferred)
        names = set(self.roles)
        inputs = [value for value in inferred.graph.inputs if value.name in names]
        self.roles = {name_of(value): self.analysis.of(value) for value in inputs}
        self.inputs = inputs

    def feeds(self, case: int, attempt: Attempt, draw: Draw = Draw()) -> Feeds:  # noqa: B008 (it is immutable)
        """The feeds of one case."""
        switches = self.switches(case)
        shapes, sizes = self.shapes(case, attempt, switches)
        feeds: Feeds = {}
        for value in self.inputs:
            name = name_of(value)
            # Seeded by name, so that an input more or less changes none of the others.
            rng = np.random.default_rng([self.seed, case, zlib.crc32(name.encode()), *[draw.again] * bool(draw.again)])
            kind = value.type
            optional = isinstance(kind, ir.OptionalType)
            if isinstance(kind, ir.OptionalType):
                kind = kind.elem_type
            maker = Maker(value, self.roles[name], shapes[name], sizes, case, attempt, draw, rng)
            if name in switches:
                feeds[name] = np.full(shapes[name], switches[name], maker.dtype)
            elif optional and case % 2 and not attempt.timid:
                feeds[name] = None
            elif isinstance(kind, ir.SequenceType):
                feeds[name] = [maker.array() for _ in range(2 + case % 2)]
            elif isinstance(kind, ir.TensorType) or kind is None:
                feeds[name] = maker.array()
            else:
                raise BadInput("inputs of this type cannot be made up", where=f"input '{name}'")
        return feeds

    def switches(self, case: int) -> dict[str, Scalar]:
        """The value of each enumerated scalar input in a case: all combinations, where there are few."""
        chosen: dict[str, Scalar] = {}
        stride = 1
        for name, values in self.choices.items():
            chosen[name] = values[(case // stride if self.combined else case) % len(values)]
            stride *= len(values)
        return chosen

    def shapes(
        self, case: int, attempt: Attempt, switches: Mapping[str, Scalar]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """The shape of each input in a case, and the sizes behind the symbols."""
        axes: dict[str, list[int | str]] = {}
        windows: dict[str, tuple[int, int, int]] = {}  # symbol -> (widest window, spatial axes, position)
        for value in self.inputs:
            name = name_of(value)
            axes[name] = axes_of(value, attempt, self.given.get(name))
            spatial = self._spatial(value, switches)
            for position, axis in enumerate(sorted(spatial)):
                symbol = axes[name][axis]
                if isinstance(symbol, str):
                    widest = max(spatial[axis], windows.get(symbol, (0, 0, 0))[0])
                    windows[symbol] = (widest, len(spatial), position)
        sizes = self._given_sizes(axes)
        symbols = list(dict.fromkeys(axis for found in axes.values() for axis in found if isinstance(axis, str)))
        plain = [symbol for symbol in symbols if not is_expression(symbol, symbols)]
        batches = batch_symbols(axes, plain, windows)
        batch = attempt.batch or self.batch(case)
        free = [symbol for symbol in plain if symbol not in batches]
        for symbol in plain:
            if symbol in sizes:
                continue
            if attempt.ties == "equal" and attempt.size is not None:
                sizes[symbol] = attempt.size
            elif symbol in batches:
                sizes[symbol] = batch
            elif attempt.size is not None:
                sizes[symbol] = attempt.size
            elif symbol in windows:
                sizes[symbol] = spatial_size(*windows[symbol], case)
            else:
                sizes[symbol] = SIZES[(case * len(free) + free.index(symbol)) % len(SIZES)]
        for symbol in symbols:
            if symbol not in sizes:
                sizes[symbol] = max(evaluate(symbol, sizes) or 1, 0)
        shapes = {
            name: tuple(sizes[axis] if isinstance(axis, str) else axis for axis in found)
            for name, found in axes.items()
        }
        return shapes, sizes

    def _spatial(self, value: ir.Value, switches: Mapping[str, Scalar]) -> dict[int, int]:
        key = (name_of(value), *switches.values())
        if key not in self._windows:
            self._windows[key] = self.analysis.spatial(value, switches)
        return self._windows[key]

    def _given_sizes(self, axes: Mapping[str, Sequence[int | str]]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name, shape in self.given.items():
            for axis, size in zip(axes[name], shape, strict=True):
                if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                    raise BadInput(
                        f"axis '{axis}' cannot be {size} here and {sizes[axis]} elsewhere", where=f"input '{name}'"
                    )
        return sizes


def _choices(value: ir.Value, roles: Roles) -> list[Scalar]:
    """The values that a scalar input should take in turn; [] if it is not a switch."""
    shape = value.shape
    if not isinstance(value.type, ir.TensorType) or shape is None or not shape.is_static():
        return []
    if math.prod(shape.numpy()) != 1 or roles.limits or roles.meanings & (PARAMETERS | {"loop_condition", "never"}):
        return []
    if value.dtype == ir.DataType.BOOL:
        return [True, False] if roles.meanings & {"switch", "condition"} or roles.equals else []
    found: list[Scalar] = list(dict.fromkeys(roles.equals))
    if found and all(isinstance(item, str) for item in found):
        found.append("none of these")
    elif found:
        numbers = [item for item in found if not isinstance(item, str)]
        # One that equals none; half of the first is what sampling rates and strides come in.
        first = numbers[0]
        others = (first // 2, first + 1, max(numbers) + 1) if first > 1 else (max(numbers) + 1,)
        found.append(next(item for item in others if item not in numbers))
    for limit in dict.fromkeys(roles.thresholds):
        if not isinstance(limit, str):
            found.extend(item for item in (limit, limit + 1, limit - 1) if item not in found)
    if value.dtype is not None and value.dtype.is_integer():
        lowest = int(value.dtype.min)
        found = [item for item in found if not isinstance(item, str) and int(item) == item and item >= lowest]
    return found
