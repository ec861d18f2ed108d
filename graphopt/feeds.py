"""Inputs for a model whose user gave none: of the right types, in the right ranges, telling.

What the inputs are for is read off the graph (`graphopt.runtime.roles`): indices stay inside what they index,
masks are ones with padding on the right, switches take every value that the model compares them with, sizes
that go by different names differ. Everything follows from the model and the seed.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import BadInput, GraphoptError
from graphopt.runtime.roles import Limit, ModelRoles, Roles, Scalar

Feeds = dict[str, Any]  # an array for a tensor, a list of arrays for a sequence
Array = np.ndarray[Any, Any]

_BATCHES = (2, 1, 3, 4)
_SIZES = (5, 7, 4, 9, 6, 8, 11, 10, 13, 12, 15, 14)  # none of them a batch size
_LADDER = (4, 8, 16, 32, 64, 128, 224, 256, 384, 512, 640)
_MOST_COMBINATIONS = 12
_TRIPS = (3, 1, 5, 0, 2)
_MOST_NEGATIVE = -1e4  # what models add to a masked score; float16 can hold it
_WORDS = ("graph", "node", "edge", "tensor", "axis", "loop", "a b", "")
_WIDE_1D = 8  # a window at least this wide is a signal frame, not a filter

# Inputs with these meanings are sizes and parameters, not data.
_PARAMETERS = frozenset(
    "reshape ones repeats zero large axes pads count size depth scales split trip_count".split()  # noqa: SIM905
)
_BATCH_NAME = re.compile(r"batch|^(n|b|bs)$", re.IGNORECASE)
_MASK_NAME = re.compile(r"mask", re.IGNORECASE)
_IGNORE_MASK_NAME = re.compile(r"pad(ding)?_mask", re.IGNORECASE)  # torch's: true is what to leave out
_POSITION_NAME = re.compile(r"position", re.IGNORECASE)
_SEGMENT_NAME = re.compile(r"token_type|segment", re.IGNORECASE)


def synthesise_feeds(
    model: ir.Model, *, cases: int = 3, seed: int = 0, shapes: Mapping[str, Sequence[int]] | None = None
) -> list[Feeds]:
    """Make inputs for a model, without running it.

    Scalar inputs that the model compares with constants, and those that choose the branch of an ``If``, take
    each such value in turn (and one that equals none); there are more cases than asked for where that needs it.
    The batch is 2, 1, 3, ... from case to case; symbolic sizes of one name are equal within a case, those of
    different names differ, and all change between cases.

    Args:
        model: The model; it is not changed.
        cases: How many feeds, at least.
        seed: The same seed gives the same arrays.
        shapes: Sizes to use for some inputs; sizes that have a name there bind the other inputs too.

    Raises:
        BadInput: ``shapes`` contradicts the model, or an input has a type that cannot be made up.
    """
    synthesis = _Synthesis(model, cases, seed, shapes)
    return [synthesis.feeds(case, _Attempt()) for case in range(synthesis.cases)]


def feeds_that_run(
    model: ir.Model,
    run: Callable[[Feeds], object],
    *,
    cases: int = 3,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[Feeds]:
    """Make inputs that a model runs on: like `synthesise_feeds`, and where a case fails, other sizes are tried.

    Tried in turn for each case: unnamed sizes not shared between inputs; integers of unknown use 0 and 1, as if
    they were indices; all free sizes equal, growing from 4 to
    640; the same with a batch of 1; every size equal. A case for which nothing runs is left out.

    Args:
        model: The model; it is not changed.
        run: Runs the model once; whatever it raises means that the sizes were wrong.
        cases: How many feeds, at least (before those left out).
        seed: The same seed gives the same arrays.
        shapes: As for `synthesise_feeds`.

    Raises:
        GraphoptError: No case runs; with the reason that the first one was refused for.
    """
    synthesis = _Synthesis(model, cases, seed, shapes)
    attempts = list(sizes_to_try())
    found: list[Feeds] = []
    first_error: Exception | None = None
    for case in range(synthesis.cases):
        tried: set[tuple[object, ...]] = set()
        for attempt in attempts:
            feeds = synthesis.feeds(case, attempt)
            shape_key = (*map(_shapes_of, feeds.values()), attempt.unknown_limit, attempt.integers)
            if shape_key in tried:
                continue
            tried.add(shape_key)
            try:
                run(feeds)
            except Exception as error:
                first_error = first_error or error
                continue
            found.append(feeds)
            # What worked once is tried first from now on.
            attempts.remove(attempt)
            attempts.insert(0, attempt)
            break
    if not found:
        reason = "no inputs" if first_error is None else str(first_error).splitlines()[0]
        raise GraphoptError(
            f"no inputs were found that the model runs on: {reason}", hint="give real ones with --calibration"
        )
    return found


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """One way to choose what the model leaves open."""

    size: int | None = None  # of every free axis; None: by name and use
    ties: str = "shared"  # unnamed axes: "shared" between inputs by position, "separate", or "equal": all sizes
    batch: int | None = None  # None: 2, 1, 3, ...
    unknown_rank: int | None = None
    unknown_limit: int = 2  # indices into nobody knows what
    integers: tuple[int, int] | None = None  # of unknown use: from, below


def sizes_to_try() -> Iterator[_Attempt]:
    """The ways to choose sizes, the most telling first."""
    yield _Attempt()
    yield _Attempt(ties="separate")
    yield _Attempt(unknown_limit=1)
    yield from (_Attempt(integers=span) for span in ((0, 2), (1, 2), (0, 1)))
    for batch in (None, 1):
        yield from (_Attempt(size=size, batch=batch) for size in _LADDER)
    yield from (_Attempt(size=size, ties="equal") for size in (2, 1, *_LADDER))
    yield from (_Attempt(unknown_rank=rank) for rank in range(5))


class _Synthesis:
    """Everything about one model that its feeds are made from."""

    def __init__(self, model: ir.Model, cases: int, seed: int, shapes: Mapping[str, Sequence[int]] | None) -> None:
        self.seed = seed
        self.model = model
        self._windows: dict[tuple[Scalar, ...], dict[int, int]] = {}
        self.inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
        self.analysis = ModelRoles(model)
        self.roles = {_name(value): self.analysis.of(value) for value in self.inputs}
        if any(limit.size is None for roles in self.roles.values() for limit in roles.limits):
            self._infer_shapes()
        self.given = {name: tuple(int(size) for size in shape) for name, shape in (shapes or {}).items()}
        _check_shapes(self.inputs, self.given)
        self.choices = {
            _name(value): found for value in self.inputs if (found := _choices(value, self.roles[_name(value)]))
        }
        lengths = [len(found) for found in self.choices.values()]
        self.combined = math.prod(lengths) <= _MOST_COMBINATIONS
        self.cases = max(cases, math.prod(lengths) if self.combined else max(lengths, default=1))

    def _infer_shapes(self) -> None:
        from graphopt.shapes import infer_shapes

        inferred = self.model.clone()
        infer_shapes(inferred)
        self.analysis = ModelRoles(inferred)
        names = set(self.roles)
        inputs = [value for value in inferred.graph.inputs if value.name in names]
        self.roles = {_name(value): self.analysis.of(value) for value in inputs}
        self.inputs = inputs

    def feeds(self, case: int, attempt: _Attempt) -> Feeds:
        switches = self.switches(case)
        shapes, sizes = self.shapes(case, attempt, switches)
        feeds: Feeds = {}
        for value in self.inputs:
            name = _name(value)
            # Seeded by name, so that an input more or less changes none of the others.
            rng = np.random.default_rng([self.seed, case, zlib.crc32(name.encode())])
            kind = value.type
            maker = _Maker(value, self.roles[name], shapes[name], sizes, case, attempt, rng)
            if name in switches:
                feeds[name] = _full(shapes[name], switches[name], maker.dtype)
            elif isinstance(kind, ir.SequenceType):
                feeds[name] = [maker.array() for _ in range(2 + case % 2)]
            elif isinstance(kind, (ir.TensorType, ir.OptionalType)) or kind is None:
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
        self, case: int, attempt: _Attempt, switches: Mapping[str, Scalar]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """The shape of each input in a case, and the sizes behind the symbols."""
        axes: dict[str, list[int | str]] = {}
        windows: dict[str, tuple[int, int, int]] = {}  # symbol -> (widest window, spatial axes, position)
        for value in self.inputs:
            name = _name(value)
            axes[name] = _axes(value, attempt, self.given.get(name))
            spatial = self._spatial(value, switches)
            for position, axis in enumerate(sorted(spatial)):
                symbol = axes[name][axis]
                if isinstance(symbol, str):
                    widest = max(spatial[axis], windows.get(symbol, (0, 0, 0))[0])
                    windows[symbol] = (widest, len(spatial), position)
        sizes = self._given_sizes(axes)
        symbols = list(dict.fromkeys(axis for found in axes.values() for axis in found if isinstance(axis, str)))
        plain = [symbol for symbol in symbols if not _is_expression(symbol, symbols)]
        batches = _batch_symbols(axes, plain, windows)
        batch = attempt.batch or _BATCHES[case % len(_BATCHES)]
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
                sizes[symbol] = _spatial_size(*windows[symbol], case)
            else:
                sizes[symbol] = _SIZES[(case * len(free) + free.index(symbol)) % len(_SIZES)]
        for symbol in symbols:
            if symbol not in sizes:
                sizes[symbol] = max(_evaluate(symbol, sizes) or 1, 0)
        shapes = {
            name: tuple(sizes[axis] if isinstance(axis, str) else axis for axis in found)
            for name, found in axes.items()
        }
        return shapes, sizes

    def _spatial(self, value: ir.Value, switches: Mapping[str, Scalar]) -> dict[int, int]:
        key = (_name(value), *switches.values())
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


@dataclasses.dataclass
class _Maker:
    """Makes the array of one input in one case."""

    value: ir.Value
    roles: Roles
    shape: tuple[int, ...]
    sizes: Mapping[str, int]
    case: int
    attempt: _Attempt
    rng: np.random.Generator

    @property
    def name(self) -> str:
        return _name(self.value)

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
            words = np.array(_WORDS, dtype=object)
            return np.asarray(words[self.rng.integers(len(words), size=self.shape)], dtype=object)
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
        if not self.shape or meanings & _PARAMETERS:
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
        drawn = self.rng.integers(0, 2, size=self.shape).astype(np.bool_)
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
            size = self.sizes.get(limit.size) if isinstance(limit.size, str) else limit.size
            if size is None:
                size = limit.low + self.attempt.unknown_limit
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
        turns = np.arange(count).reshape(self.shape) + self.case
        if "trip_count" in meanings:
            return full * _TRIPS[self.case % len(_TRIPS)]
        fits = [shape for shape in self.roles.suggested if shape and len(shape) == count]
        if fits and meanings & {"reshape", "ones", "size", "split"}:
            return np.array(fits[0]).reshape(self.shape)
        if "reshape" in meanings:
            full.reshape(-1)[:1] = -1
            return full
        if "scales" in meanings:
            scales = np.ones(self.shape)
            scales.reshape(-1)[2:] = 2.0
            return scales
        table: list[tuple[str, Callable[[], Array]]] = [
            ("axes", lambda: np.arange(count).reshape(self.shape)),
            ("ones", lambda: full),
            ("split", lambda: full),
            ("count", lambda: full),
            ("zero", lambda: full * 0),
            ("large", lambda: full * np.iinfo(np.int32).max),
            ("repeats", lambda: 1 + turns % 2),
            ("pads", lambda: turns % 2),
            ("size", lambda: 2 + turns % 3),
            ("depth", lambda: 5 + turns % 3),
        ]
        integer = not self.kind.is_floating_point()
        return next((make() for meaning, make in table if integer and meaning in meanings), None)

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
        if "positive" in meanings or "upper" in meanings:
            return 0.1 + np.abs(drawn)
        if "nonzero" in meanings:
            return np.sign(drawn) * (0.25 + np.abs(drawn))
        columns = self.shape[-1] if self.shape else 1
        return drawn * 2.0 ** self.rng.uniform(-2, 1, columns).reshape((columns,) if self.shape else ())

    def integers(self) -> Array:
        meanings = self.roles.meanings
        if self.attempt.integers is not None:
            return self.rng.integers(*self.attempt.integers, size=self.shape)
        if self.kind.bitwidth <= 8:
            low, high = int(self.kind.min), int(self.kind.max) + 1
            return self.rng.integers(1 if "nonzero" in meanings else low, high, size=self.shape)
        if "opaque" in meanings:  # perhaps an index
            return self.rng.integers(0, 2, size=self.shape)
        low = 1 if "nonzero" in meanings else -8 if self.kind.is_signed() else 0
        return self.rng.integers(low, 9, size=self.shape)


def _choices(value: ir.Value, roles: Roles) -> list[Scalar]:
    """The values that a scalar input should take in turn; [] if it is not a switch."""
    shape = value.shape
    if not isinstance(value.type, ir.TensorType) or shape is None or not shape.is_static():
        return []
    if math.prod(shape.numpy()) != 1 or roles.limits or roles.meanings & (_PARAMETERS | {"loop_condition", "never"}):
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


def _axes(value: ir.Value, attempt: _Attempt, given: tuple[int, ...] | None) -> list[int | str]:
    """The axes of an input: sizes that are known, names for those that are not."""
    name = _name(value)
    if value.shape is None:
        if given is not None:
            return list(given)
        rank = attempt.unknown_rank
        if rank is None:
            rank = 2 if value.dtype is None or value.dtype.is_floating_point() else 1
        unranked: list[int | str] = ["?batch", *(f"?{axis}" for axis in range(1, rank))]
        return unranked[:rank]
    known = [_known(size) for size in value.shape]
    unnamed = [axis for axis, size in enumerate(known) if size is None]
    axes: list[int | str] = []
    for axis, size in enumerate(known):
        if size is not None:
            axes.append(size)
        elif attempt.ties == "separate" and axis > 0:
            axes.append(f"?{name}.{axis}")
        elif axis == 0 or (len(unnamed) == 1 and isinstance(known[0], int) and len(known) > 2):
            axes.append("?batch")  # the states of recurrent networks are [layers, batch, size]
        else:
            axes.append(f"?{axis}")
    return axes


def _known(size: Any) -> int | str | None:
    if isinstance(size, (int, np.integer)):
        return int(size) if size >= 0 else None
    return size.value if isinstance(size.value, str) and size.value else None


def _batch_symbols(
    axes: Mapping[str, Sequence[int | str]], symbols: Sequence[str], windows: Mapping[str, object]
) -> set[str]:
    """The symbols that count samples: named so, or else the one that leads inputs."""
    named = {symbol for symbol in symbols if _BATCH_NAME.search(symbol)}
    if named:
        return named
    leading = {found[0] for found in axes.values() if found and found[0] in symbols and found[0] not in windows}
    return {str(symbol) for symbol in leading} if len(leading) == 1 else set()


def _spatial_size(widest: int, spatial_axes: int, position: int, case: int) -> int:
    """A size for an axis that windows slide over: at least twice the widest; images in steps of 32.

    A network that halves its resolution five times and adds it up again needs multiples of 32.
    """
    if spatial_axes == 1:
        base = max(-(-2 * widest // 16) * 16, 16) if widest >= _WIDE_1D else 64
        return base + (0, max(base // 8, 16), -max(base // 8, 16) if base > 32 else 32)[case % 3]
    step = 32 if spatial_axes == 2 else 16
    return max(-(-2 * widest // step) * step, step if spatial_axes > 2 else 2 * step) + step * ((case + position) % 3)


def _is_expression(symbol: str, symbols: Sequence[str]) -> bool:
    """Whether a size is computed from others, such as ``past_sequence_length + 1``."""
    if symbol == "total_sequence_length":
        return "past_sequence_length" in symbols and "sequence_length" in symbols
    names = _names_in(symbol)
    return bool(names) and symbol not in names and names <= set(symbols)


def _names_in(symbol: str) -> set[str]:
    try:
        tree = ast.parse(symbol, mode="eval")
    except (SyntaxError, ValueError):
        return set()
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called}


_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Div: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}


def _evaluate(symbol: str, sizes: Mapping[str, int]) -> int | None:
    """The value of a size that is written as an expression of others, or None."""
    if symbol == "total_sequence_length":
        return sizes["past_sequence_length"] + sizes["sequence_length"]

    def of(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            values = [of(argument) for argument in node.args]
            return max(values) if node.func.id.lower() == "max" else min(values)
        raise ValueError

    try:
        return of(ast.parse(symbol, mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError):
        return None


def _check_shapes(inputs: Sequence[ir.Value], given: Mapping[str, tuple[int, ...]]) -> None:
    known = {_name(value): value for value in inputs}
    for name, shape in given.items():
        where = f"input '{name}'"
        if name not in known:
            raise BadInput("the model has no such input", where=where, hint=f"inputs: {', '.join(known)}")
        declared = known[name].shape
        if declared is None:
            continue
        sizes = [_known(size) for size in declared]
        text = "x".join("?" if size is None else str(size) for size in sizes) or "a scalar"
        wrong = any(isinstance(size, int) and size != got for size, got in zip(sizes, shape, strict=False))
        if len(sizes) != len(shape) or wrong:
            raise BadInput(f"the shape is {text}, not {'x'.join(map(str, shape)) or 'a scalar'}", where=where)


def _full(shape: tuple[int, ...], value: Scalar, dtype: np.dtype[Any]) -> Array:
    filled = np.empty(shape, dtype)
    filled[...] = value
    return filled


def _name(value: ir.Value) -> str:
    return value.name or ""


def _shapes_of(value: Any) -> tuple[Any, ...]:
    return tuple(item.shape for item in value) if isinstance(value, list) else tuple(value.shape)
