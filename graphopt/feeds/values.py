"""The values of one input in one case, of the dtype and in the range that its roles ask for."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.feeds.attempts import Attempt, Draw
from graphopt.feeds.patterns import matching
from graphopt.feeds.sizes import name_of
from graphopt.runtime.roles import Limit, Roles

Array = np.ndarray[Any, Any]

_TRIPS = (3, 1, 5, 0, 2)
_MOST_NEGATIVE = -1e4  # what models add to a masked score; float16 can hold it
_DENSITIES = (0.5, 0.2, 0.8)  # of true among booleans
_AROUND = (3, -1, 2, -2, 5)
_WORDS = ("graph", "node", "edge", "tensor", "axis", "loop", "a b", "")

# Inputs with these meanings are sizes and parameters, not data.
PARAMETERS = frozenset(
    "reshape expand ones repeats zero start end axes pads count size depth scales split trip_count".split()  # noqa: SIM905
)
_MASK_NAME = re.compile(r"mask", re.IGNORECASE)
_IGNORE_MASK_NAME = re.compile(r"pad(ding)?_mask", re.IGNORECASE)  # torch's: true is what to leave out
_POSITION_NAME = re.compile(r"position", re.IGNORECASE)
_SEGMENT_NAME = re.compile(r"token_type|segment", re.IGNORECASE)


@dataclasses.dataclass
class Maker:
    """Makes the array of one input in one case."""

    value: ir.Value
    roles: Roles
    shape: tuple[int, ...]
    sizes: Mapping[str, int]
    case: int
    attempt: Attempt
    draw: Draw
    rng: np.random.Generator

    @property
    def name(self) -> str:
        return name_of(self.value)

    @property
    def kind(self) -> ir.DataType:
        return self.value.dtype or ir.DataType.FLOAT

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.kind.numpy()

    def array(self) -> Array:
        """The array: shape ``self.shape``, dtype ``self.dtype``."""
        return np.asarray(self._drawn())  # numpy makes scalars of what has no axes

    def _drawn(self) -> Array:
        if self.kind == ir.DataType.STRING:
            return self.words()
        if self.kind == ir.DataType.BOOL:
            return self.booleans()
        if self.is_mask():
            return self.mask().astype(self.dtype)
        if self.roles.limits:
            return self.indices().astype(self.dtype)
        parameter = self.parameter()
        if parameter is not None:
            return np.asarray(parameter).astype(self.dtype)
        if self.kind.is_floating_point():
            return self.floats().astype(self.dtype)
        if self.kind in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
            return (self.normal() + 1j * self.normal()).astype(self.dtype)
        return self.integers().astype(self.dtype)

    def is_mask(self) -> bool:
        meanings = self.roles.meanings
        if not self.shape or meanings & PARAMETERS:
            return False
        return bool(_MASK_NAME.search(self.name) or meanings & {"condition", "complement"})

    def mask(self) -> Array:
        """Ones with padding on the right; in every row at least one 1."""
        length = self.shape[-1]
        rows = math.prod(self.shape[:-1])
        named = bool(_MASK_NAME.search(self.name))
        lengths = self.rng.integers(1, max(length, 2), size=rows)  # at least one 0, too
        # Unless the name tells which of 0 and 1 means "leave out", every row holds both.
        if named and not _IGNORE_MASK_NAME.search(self.name) and rows > 1:
            lengths[0] = length
        kept = np.arange(length) < lengths[:, None]
        if _IGNORE_MASK_NAME.search(self.name):
            kept = ~kept
        kept = kept.reshape(self.shape)
        additive = self.roles.meanings & {"added", "additive"} and "complement" not in self.roles.meanings
        if additive and self.kind.is_floating_point():
            return np.where(kept, 0.0, _MOST_NEGATIVE)
        return kept

    def booleans(self) -> Array:
        if "loop_condition" in self.roles.meanings:
            return np.ones(self.shape, np.bool_)
        if "never" in self.roles.meanings:
            return np.zeros(self.shape, np.bool_)
        if self.is_mask():
            return self.mask()
        drawn = self.rng.random(self.shape) < _DENSITIES[(self.case + self.draw.again) % len(_DENSITIES)]
        if drawn.size > 1:  # never all equal
            drawn.flat[0], drawn.flat[-1] = True, False
        return drawn

    def indices(self) -> Array:
        low, high = self._range(self.roles.limits)
        if _POSITION_NAME.search(self.name):
            steps = np.arange(self.shape[-1] if self.shape else 1)
            return np.broadcast_to(low + steps % (high - low), self.shape or (1,)).reshape(self.shape)
        if _SEGMENT_NAME.search(self.name) and self.shape:
            starts = self.rng.integers(1, max(self.shape[-1], 1) + 1, size=(*self.shape[:-1], 1))
            return np.where(np.arange(self.shape[-1]) < starts, low, min(low + 1, high - 1))
        drawn = self.rng.integers(low, high, size=self.shape)
        if any(limit.unique for limit in self.roles.limits):
            drawn = self._distinct(low, high)
        padding = [item for item in self.roles.equals if isinstance(item, (int, float)) and low <= item < high]
        if padding and self.shape and self.shape[-1] > 2:  # such as the padding token: at the end of the last row
            drawn.reshape(-1)[-1] = int(padding[0])
        return np.asarray(drawn)

    def _range(self, limits: Sequence[Limit]) -> tuple[int, int]:
        low, high = 0, np.iinfo(np.int32).max
        for limit in limits:
            size = self._size(limit.size)
            if size is None:
                size = limit.low + self.attempt.unknown_limit
            elif limit.inclusive:
                size += 1
            low = max(low, -(-(limit.low - limit.offset) // limit.scale))
            high = min(high, (size - 1 - limit.offset) // limit.scale + 1)
        return (low, high) if high > low else (low, low + 1)

    def _distinct(self, low: int, high: int) -> Array:
        """Indices that name no place twice, as scattering needs: along the last axis if not altogether."""
        count = math.prod(self.shape)
        if count <= high - low:
            return low + self.rng.permutation(high - low)[:count].reshape(self.shape)
        return low + np.argsort(self.rng.random(self.shape), axis=-1) % (high - low)

    def parameter(self) -> Array | None:
        """The values of a size or another parameter of an operator, or None if the input is not one."""
        meanings = self.roles.meanings
        full = np.full(self.shape, 1, np.int64)
        count = full.size
        timid = self.attempt.timid
        turns = np.arange(count).reshape(self.shape) + (0 if timid else self.case)
        if "trip_count" in meanings:
            return full * _TRIPS[self.case % len(_TRIPS)]
        fits = [shape for shape in self.roles.suggested if shape and len(shape) == count]
        if fits and meanings & {"reshape", "ones", "expand", "size", "split"}:
            return np.array(fits[0]).reshape(self.shape)
        if "scales" in meanings:
            scales = np.ones(self.shape)
            scales.reshape(-1)[2:] = 2.0
            return scales
        table: list[tuple[str, Callable[[], Array | None]]] = [
            ("reshape", self._target),
            ("axes", lambda: np.arange(count).reshape(self.shape)),
            ("expand", self._expanded),
            ("ones", lambda: full),
            ("split", self._parts),
            ("count", lambda: full if timid else 1 + turns % 2),
            ("zero", lambda: full * 0),
            ("start", lambda: full * 0 if self._narrow() else turns % 2),
            ("end", lambda: np.where(self._narrow() | (turns % 3 != 0), np.iinfo(np.int32).max, -1)),
            ("repeats", lambda: 1 + turns % 2),
            ("pads", lambda: turns % (2 if timid else 3)),
            ("size", lambda: 2 + turns % 3),
            ("depth", lambda: 5 + turns % 3),
            ("bound", self._bound),
        ]
        integer = not self.kind.is_floating_point()
        return next((make() for meaning, make in table if integer and meaning in meanings), None)

    def _current(self) -> Array | None:
        """The sizes of what this input's values change, one for each; None where they are not known."""
        count = math.prod(self.shape)
        for named in self.roles.current:
            sizes = [self._size(size) for size in named]
            known = [size for size in sizes if size is not None]
            if len(known) == len(sizes) == count or (len(known) == len(sizes) == 1 and count):
                return np.broadcast_to(np.array(known, np.int64), (count,)).reshape(self.shape)
        return None

    def _narrow(self) -> bool:
        """Whether cutting off an element at either end may leave nothing."""
        narrowest = min((size for sizes in self.roles.current for size in sizes if isinstance(size, int)), default=3)
        return self.attempt.timid or narrowest < 3

    def _target(self) -> Array:
        """What to reshape to: the sizes in another order, one left to be computed."""
        current = self._current()
        target = np.full(self.shape, 1, np.int64).reshape(-1)
        if current is not None and current.all() and not self.attempt.timid:
            target = np.roll(current.reshape(-1), 1 + self.case)
            target[self.case % max(target.size, 1) :][:1] = -1
        else:
            target[:1] = -1
        return target.reshape(self.shape)

    def _expanded(self) -> Array:
        """What to expand to: axes of size 1 grow, new axes come in front."""
        target = np.full(self.shape, 1, np.int64)
        if self.attempt.timid:
            return target
        flat = target.reshape(-1)
        flat[...] = 1 + (np.arange(flat.size) + self.case) % 2
        for named in self.roles.current[:1]:
            for back, size in enumerate(reversed(named[-flat.size :] if flat.size else ())):
                known = self._size(size)
                flat[-1 - back] = 2 + (back + self.case) % 3 if known == 1 else 1 if known is None else known
        return target

    def _parts(self) -> Array:
        """Sizes that add up to that of what is split, or one for all parts; different ones where there is room."""
        total = next((self._size(total) for total in self.roles.totals if self._size(total) is not None), None)
        count = math.prod(self.shape)
        if total is None or not self.shape:
            several = not self.shape and not self.attempt.timid and total is not None and total > 2
            return np.full(self.shape, 1 + self.case % 2 if several else 1, np.int64)
        parts = np.full(count, total // max(count, 1), np.int64)
        parts[-1:] += total - parts.sum()
        if count > 1 and parts[0] > 1 and not self.attempt.timid:
            parts[[0, -1]] += (-1, 1)
        return parts.reshape(self.shape)

    def _bound(self) -> Array | None:
        """What sizes or bounds are computed from: some above the sizes that are there, some below, all different."""
        if self.attempt.timid:
            return None
        turns = np.arange(math.prod(self.shape)).reshape(self.shape) + self.case
        current = self._current()
        if current is None:
            return 1 + 3 * turns % 7
        moved = current + np.array(_AROUND)[turns % len(_AROUND)]
        return np.where(moved < 1, current + 1, moved)

    def _size(self, size: int | str | None) -> int | None:
        return self.sizes.get(size) if isinstance(size, str) else size

    def words(self) -> Array:
        """Strings: those that the model knows, and others."""
        known = [item for item in (*self.roles.known, *self.roles.equals) if isinstance(item, str)]
        known += [text for pattern in self.roles.patterns for text in matching(pattern, self.rng)]
        few = self.draw.few or "matched" in self.roles.meanings
        others = np.array(_WORDS[:3] if few else _WORDS, dtype=object)
        drawn = others[self.rng.integers(len(others), size=self.shape)]
        if known:
            chosen = np.array(known, dtype=object)[self.rng.integers(len(known), size=self.shape)]
            drawn = np.where(self.rng.random(self.shape) < 0.6, chosen, drawn)
        return np.asarray(drawn, dtype=object)

    def normal(self) -> Array:
        return self.rng.standard_normal(self.shape)

    def floats(self) -> Array:
        """Normal values; columns differ in scale, so that a permutation of them shows."""
        meanings = self.roles.meanings
        drawn = self.normal()
        if "unit_interval" in meanings:
            return self.rng.uniform(0.1, 0.9, self.shape)
        if "unit" in meanings:
            return self.rng.uniform(-0.95, 0.95, self.shape)
        if "above_one" in meanings:
            return 1.1 + np.abs(drawn)
        if "lower" in meanings:
            return -0.5 - np.abs(drawn)
        if "upper" in meanings:
            return 0.1 + np.abs(drawn)
        if "positive" in meanings:
            return (0.1 + np.abs(drawn)) * self.draw.scale
        if "nonzero" in meanings:
            return np.sign(drawn) * (0.25 + np.abs(drawn)) * self.draw.scale
        if self.draw.few or "matched" in meanings:
            return self.rng.choice([-1.0, 0.0, 0.5, 2.0], size=self.shape)
        columns = self.shape[-1] if self.shape else 1
        drawn = drawn * 2.0 ** self.rng.uniform(-2, 1, columns).reshape((columns,) if self.shape else ())
        drawn = self._some_known(drawn * self.draw.scale)
        if "special" in meanings and self.case % 2 == 0 and not self.draw.again:
            special = self.rng.choice([np.nan, np.inf, -np.inf], size=self.shape)
            drawn = np.where(self.rng.random(self.shape) < 0.4, special, drawn)
        return drawn

    def integers(self) -> Array:
        meanings = self.roles.meanings
        if self.attempt.integers is not None:
            return self.rng.integers(*self.attempt.integers, size=self.shape)
        if self.draw.few or "matched" in meanings:
            return self.rng.integers(1 if "nonzero" in meanings else 0, 3, size=self.shape)
        if self.kind.bitwidth <= 8:
            low, high = int(self.kind.min), int(self.kind.max) + 1
            return self.rng.integers(1 if "nonzero" in meanings else low, high, size=self.shape)
        if "opaque" in meanings:  # perhaps an index
            return self.rng.integers(0, 2, size=self.shape)
        low = 1 if "nonzero" in meanings else -8 if self.kind.is_signed() else 0
        return self._some_known(self.rng.integers(low, 9, size=self.shape))

    def _some_known(self, drawn: Array) -> Array:
        """Numbers, some of them replaced by those that an operator treats one by one."""
        known = [item for item in self.roles.known if not isinstance(item, str)]
        if not known:
            return drawn
        chosen = np.array(known)[self.rng.integers(len(known), size=self.shape)]
        return np.where(self.rng.random(self.shape) < 0.6, chosen, drawn)
