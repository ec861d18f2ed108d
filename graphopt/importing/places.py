"""Which products of a graph a module of a state dict is: by name, else by value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import graphs
from graphopt.errors import BadInput
from graphopt.importing.formats import Form, Layout, Module
from graphopt.importing.states import State
from graphopt.matching import float_attribute, int_attribute
from graphopt.sites import Linear, Spelling, linear_at

Array = npt.NDArray[Any]

_PREFIX = re.compile(r"^(?:base_model|model|module|_orig_mod)\.")
_SCOPES = "pkg.torch.onnx.name_scopes"
_ROWS = 256
_PROBE_SEED = 7
# Numbers that were rounded once or twice on the way agree to some eps; those of another layer do not agree at all.
_EPS_ALLOWED = 8.0


@dataclass
class Place:
    """All products with one weight of a graph.

    Attributes:
        linears: The products.
        names: What the module may have been called: from the weight's name and from the nodes'.
    """

    linears: list[Linear]
    names: dict[str, str] = field(default_factory=dict)
    _probe: Array | None = None

    @property
    def linear(self) -> Linear:
        """One of them; the others multiply by the same numbers."""
        return self.linears[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of W: (outputs, inputs, *kernel)."""
        return (self.linear.outputs, self.linear.inputs, *_kernel(self.linear.kernel))

    def probe(self, opset: int) -> Array:
        """W times a fixed vector, in float64: places that differ in it are different."""
        if self._probe is None:
            matrix = self.linear.matrix(opset)
            matrix = matrix.reshape(matrix.shape[0], -1)
            vector = _probe_vector(matrix.shape[1])
            self._probe = np.concatenate([block.astype(np.float64) @ vector for block in _blocks(matrix)])
        return self._probe


@dataclass(frozen=True)
class Match:
    """A module found in the graph.

    Attributes:
        module: The module.
        place: Where it is.
        layout: How its shapes are read.
        by: How it was found: ``weight name``, ``node name`` or ``values``.
        difference: Between W in the graph and the product, relative; None of an adapter.
        limit: What rounding explains; None of an adapter.
        present: Whether the graph holds the factors themselves already, so that there is nothing to write.
    """

    module: Module
    place: Place
    layout: Layout
    by: str
    difference: float | None = None
    limit: float | None = None
    present: bool = False


class Finder:
    """The products of a graph, by name and by shape."""

    def __init__(self, model: ir.Model, state: State) -> None:
        self._opset = graphs.opset(model)
        self._state = state
        groups: dict[tuple[object, ...], Place] = {}
        for node in graphs.all_nodes(model):
            linear = linear_at(node)
            if isinstance(linear, Linear):
                place = groups.setdefault((linear.weight.root, *_sense(linear)), Place([]))
                place.linears.append(linear)
                _add_names(place.names, linear)
        self.places = list(groups.values())

    def find(self, module: Module, *, by_value: bool) -> Match | None:
        """Where a module is in the graph; None where it is not there and need not be.

        Args:
            module: Of the state dict.
            by_value: Whether the numbers in the graph are those of the module, so that they can decide.

        Raises:
            BadInput: It is not there, or in more than one place, or has another shape there.
        """
        places = [place for place in self.places if (place.linear.spelling is Spelling.GATHER) == module.embedding]
        named = _by_name(module, places, anywhere=by_value)
        fitting = [(place, how) for place, how in named if _layouts(module, place)]
        if not named and module.sure and (present := self._as_factors(module)) is not None:
            return present
        if not fitting and by_value:
            fitting = [(place, "values") for place in places if _layouts(module, place)]
            fitting = [(place, how) for place, how in fitting if self._agrees(module, place)]
        elif len(fitting) > 1 and by_value:
            fitting = [(place, how) for place, how in fitting if self._agrees(module, place)] or fitting
        if len(fitting) == 1:
            (place, how) = fitting[0]
            return self._settle(module, place, how)
        if not fitting and not module.sure:
            return None
        where = f"{self._state.path}: {module.name}"
        if fitting:
            told = ", ".join(place.linear.node.name or "a node without a name" for place, _ in fitting[:4])
            raise BadInput(
                f"fits {len(fitting)} places of the graph: {told}",
                where=where,
                hint="export the graph with `graphopt export`, which keeps the names of modules",
            )
        sizes = " or ".join(dict.fromkeys(_times((x.outputs, x.inputs, *module.kernel)) for x in module.layouts))
        if named:
            raise BadInput(
                f"is {_times(named[0][0].shape)} in the graph, the factors give {sizes}",
                where=where,
                hint="is the graph of the same network?",
            )
        raise BadInput(
            f"no product of the graph has this name{', or the numbers of this product' if by_value else ''}"
            f" ({module.form.value}, {sizes})",
            where=where,
            hint="export the dense network with `graphopt export`, which keeps the names of modules"
            + (
                "" if by_value or module.form is Form.ADAPTER else "; without --replace the numbers are looked for, too"
            ),
        )

    def _as_factors(self, module: Module) -> Match | None:
        """A module whose factors the graph multiplies by one after the other, under their own names."""
        differences = []
        found: Place | None = None
        for role in ("first", "second"):
            key = module.keys[role]
            shape = self._state.shapes[key]
            alone = replace(module, names=(key.removesuffix(".weight"),))
            gather = module.embedding and role == "first"
            places = [place for place in self.places if (place.linear.spelling is Spelling.GATHER) == gather]
            named = [place for place, _ in _by_name(alone, places, anywhere=False)]
            if len(named) != 1 or named[0].shape != (*shape[:2], *_kernel(shape[2:])):
                return None
            found = found or named[0]
            wanted = self._state.read(key).astype(np.float64).reshape(shape[0], -1)
            matrix = named[0].linear.matrix(self._opset).astype(np.float64).reshape(wanted.shape)
            differences.append(_relative(matrix - wanted, matrix))
        assert found is not None
        return Match(
            module, found, module.layouts[0], "weight name", max(differences), self.limit(module, found), present=True
        )

    def _settle(self, module: Module, place: Place, how: str) -> Match:
        layouts = _layouts(module, place)
        if module.form is Form.ADAPTER:
            return Match(module, place, layouts[0], how)
        compared = [(self.difference(module, place, layout), layout) for layout in layouts]
        difference, layout = min(compared, key=lambda pair: pair[0])
        return Match(module, place, layout, how, difference, self.limit(module, place))

    def limit(self, module: Module, place: Place) -> float:
        """The relative difference that rounding explains: of the graph's dtype and of the state dict's."""
        stored = [self._state.dtype(module.keys[role]) for role in ("first", "second")]
        dtypes = [place.linear.weight.dtype.numpy(), *stored]
        return _EPS_ALLOWED * max(eps(np.dtype(dtype)) for dtype in dtypes)

    def _agrees(self, module: Module, place: Place) -> bool:
        probe = place.probe(self._opset)
        for layout in _layouts(module, place):
            found = self._product(module, layout, _probe_vector(self._columns(module, layout)))
            if _relative(found - probe, probe) <= 8 * self.limit(module, place):
                return True
        return False

    def _columns(self, module: Module, layout: Layout) -> int:
        return layout.inputs * int(np.prod(module.kernel, dtype=np.int64))

    def _product(self, module: Module, layout: Layout, vector: Array) -> Array:
        """The module's matrix times a vector, in float64."""
        inner = module.first(self._state, layout).astype(np.float64) @ vector
        if (scale := module.scale(self._state)) is not None:
            inner = inner * scale
        outer = module.second(self._state, layout).astype(np.float64) @ inner
        if module.form is not Form.PIVOT:
            return np.asarray(outer)
        made = np.empty(layout.outputs)
        kept, rest = module.positions(self._state, layout)
        made[kept], made[rest] = inner, outer
        return made

    def difference(self, module: Module, place: Place, layout: Layout) -> float:
        """||W - product|| / ||W|| in float64, a block of rows at a time."""
        first = module.first(self._state, layout).astype(np.float64)
        second = module.second(self._state, layout)
        scale = module.scale(self._state)
        matrix = place.linear.matrix(self._opset)
        matrix = matrix.reshape(matrix.shape[0], -1)
        apart = size = 0.0
        rows = np.arange(len(matrix))
        if module.form is Form.PIVOT:
            kept, rows = module.positions(self._state, layout)
            wanted = matrix[kept].astype(np.float64)
            apart, size = float(np.square(wanted - first).sum()), float(np.square(wanted).sum())
        for begin in range(0, len(rows), _ROWS):
            chosen = slice(begin, begin + _ROWS)
            left = second[chosen].astype(np.float64)
            wanted = matrix[rows[chosen]].astype(np.float64)
            apart += float(np.square(wanted - (left if scale is None else left * scale) @ first).sum())
            size += float(np.square(wanted).sum())
        return _root_ratio(apart, size)


def _sense(linear: Linear) -> tuple[object, ...]:
    """In what sense a product reads its weight: products that agree in it multiply by one matrix."""
    node, through = linear.node, linear.weight.through
    turned = node.op_type in ("MatMul", "Gather") and linear.spelling is not Spelling.LEFT
    if node.op_type in ("Gemm", "FusedMatMul"):
        turned = not int_attribute(node, "transB", 0)
    turns = sum(other.op_type == "Transpose" for other in through) + turned
    others = tuple(other for other in through if other.op_type not in ("Transpose", "Identity"))
    return linear.spelling is Spelling.GATHER, turns % 2, others, float_attribute(node, "alpha", 1.0)


def eps(dtype: np.dtype[Any]) -> float:
    """The distance from 1 to the next number of a float dtype; 0 of an integer type."""
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).eps) if dtype.kind in "fV" else 0.0  # type: ignore[no-untyped-call]


def _blocks(matrix: Array) -> Iterable[Array]:
    return (matrix[begin : begin + _ROWS] for begin in range(0, len(matrix), _ROWS))


def _probe_vector(size: int) -> Array:
    return np.random.default_rng(_PROBE_SEED).standard_normal(size)


def _relative(apart: Array, size: Array) -> float:
    return _root_ratio(float(np.square(apart).sum()), float(np.square(size).sum()))


def _root_ratio(apart: float, size: float) -> float:
    if apart == 0.0:
        return 0.0
    ratio = apart / size if size > 0 else np.inf
    return float(np.sqrt(ratio)) if not np.isnan(ratio) else float("inf")


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _kernel(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return kernel if set(kernel) - {1} else ()


def _layouts(module: Module, place: Place) -> list[Layout]:
    """The ways to read a module's shapes that give the shape that the place has."""
    kernel = _kernel(module.kernel)
    return [x for x in module.layouts if (x.outputs, x.inputs, *kernel) == place.shape]


# -- names -------------------------------------------------------------------------------------------------------------


def _add_names(names: dict[str, str], linear: Linear) -> None:
    root = linear.weight.root.name or ""
    stored = re.sub(r"(\.T|\.weight|\.base_layer)+$", "", root)
    if stored:
        names.setdefault(stored, "weight name")
    for scope in _scopes(linear.node):
        names.setdefault(scope, "node name")


def _scopes(node: ir.Node) -> list[str]:
    """The module that a node belongs to, as torch's exporters note it down."""
    found = []
    if (scopes := node.metadata_props.get(_SCOPES)) is not None:
        # A list in Python's spelling: the modules from the outside in, then the node.
        found.extend(re.findall(r"'([^']*)'", scopes)[-2:-1])
    if node.name and node.name.startswith("/"):
        parts: list[str] = []
        for part in node.name.split("/")[1:-1]:
            # A Sequential's children repeat its name: /net/net.0/Gemm.
            if parts and part.startswith(f"{parts[-1]}."):
                parts.pop()
            parts.append(part)
        found.append(".".join(parts))
    return [re.sub(r"\.base_layer$", "", scope) for scope in found if scope]


def _bare(name: str) -> str:
    while (shorter := _PREFIX.sub("", name)) != name:
        name = shorter
    return name


def _by_name(module: Module, places: Sequence[Place], *, anywhere: bool) -> list[tuple[Place, str]]:
    """The places that have one of a module's names: as it is, without prefixes, or at the end of a longer one.

    Args:
        module: Of the state dict.
        places: Of the graph.
        anywhere: Whether one part of a name in common is enough, since the numbers are compared afterwards.
    """
    for name in module.names:
        wanted = _bare(name)
        for fits in (lambda n, name=name: n == name, lambda n, wanted=wanted: _bare(n) == wanted):
            if found := _having(places, fits):
                return found

    def ends_alike(name: str) -> bool:
        for candidate in module.names:
            short, long = sorted((_bare(name).split("."), _bare(candidate).split(".")), key=len)
            if long[-len(short) :] == short and (anywhere or len(short) > 1):
                return True
        return False

    return _having(places, ends_alike)


def _having(places: Sequence[Place], fits: Any) -> list[tuple[Place, str]]:
    found = []
    for place in places:
        how = next((how for name, how in place.names.items() if fits(name)), None)
        if how is not None:
            found.append((place, how))
    return found
