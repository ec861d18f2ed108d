"""What an export took for granted about the sizes of dynamic axes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from graphopt.exporting.branches.places import Place, here, is_users

if TYPE_CHECKING:
    from graphopt.exporting.factory import Example

_SOURCE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_OURS = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True)
class Guard:
    """A truth about sizes that an export depends on.

    Attributes:
        expression: A sympy truth over the user's symbols.
        place: The line that it comes from, where that is known.
        asked: The user's own code asked for it; otherwise torch did, on the way.
    """

    expression: Any
    place: Place | None
    asked: bool

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it is true at ``sizes`` (symbol → size)."""
        return _truth(self.expression, tuple(sizes[symbol.name] for symbol in _symbols(self.expression)))

    def __str__(self) -> str:
        said = self.expression
        return f"{said.lhs} {said.rel_op} {said.rhs}" if said.is_Relational else str(said)

    def constants(self) -> set[int]:
        """The whole numbers that stand in it."""
        import sympy

        return {abs(int(atom)) for atom in self.expression.atoms(sympy.Integer)}

    def symbols(self) -> set[str]:
        return {symbol.name for symbol in self.expression.free_symbols}


@lru_cache(maxsize=1 << 16)
def _truth(expression: Any, values: tuple[int, ...]) -> bool:
    """``expression`` with ``values`` for its symbols, in the order of their names."""
    import sympy

    integers = dict(zip(_symbols(expression), map(sympy.Integer, values), strict=True))
    try:
        return bool(expression.xreplace(integers) == True)  # noqa: E712  (sympy's true is no bool)
    except (ArithmeticError, AssertionError, ValueError):  # of torch's own functions, at sizes that it rules out
        return False


@lru_cache(maxsize=1 << 10)
def _symbols(expression: Any) -> tuple[Any, ...]:
    return tuple(sorted(expression.free_symbols, key=str))


@dataclass
class Questions:
    """What was asked about sizes in one export: expressions over torch's symbols, with the answer and the line."""

    asked: list[tuple[Any, bool, Place | None]] = field(default_factory=list)
    places: dict[Any, Place] = field(default_factory=dict)  # of what torch notes down itself

    def fixed_at(self) -> Place | None:
        """The first line at which torch took two sizes for equal."""
        return next((place for said, place in self.places.items() if type(said).__name__ == "Equality"), None)


@contextmanager
def questions() -> Iterator[Questions]:
    """Note each question about a size that the user's code asks, and the line of those that torch notes down."""
    import torch
    from torch.fx.experimental import symbolic_shapes

    noted = Questions()
    ask, guard = torch.SymBool.__bool__, symbolic_shapes.ShapeGuard

    def asked(value: Any) -> bool:
        truth = bool(ask(value))
        if _by_user(sys._getframe(1)):
            noted.asked.append((value.node.expr, truth, here()))
        return truth

    def guarded(expression: Any, *arguments: Any, **options: Any) -> Any:
        place = here()
        if place is not None:
            noted.places.setdefault(expression, place)
        return guard(expression, *arguments, **options)

    torch.SymBool.__bool__ = asked
    symbolic_shapes.ShapeGuard = guarded
    try:
        yield noted
    finally:
        torch.SymBool.__bool__ = ask
        symbolic_shapes.ShapeGuard = guard


def _by_user(frame: FrameType | None) -> bool:
    """Whether ``frame`` is the user's, seen through frames of this package."""
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return frame is not None and is_users(frame.f_code)


def user_symbols(program: Any, example: Example) -> dict[Any, str]:
    """Torch's symbol → the user's, of the sizes of ``example``'s dynamic axes in an exported program."""
    environment = _environment(program)
    found: dict[Any, str] = {}
    for symbol, sources in (environment.var_to_sources if environment is not None else {}).items():
        for source in sources:
            match = _SOURCE.fullmatch(source.name if isinstance(source.name, str) else source.name())
            name = example.axes.get(match[1], {}).get(int(match[2])) if match else None
            if name is not None:
                found[symbol] = name
    return found


def guards_of(program: Any, example: Example, noted: Questions) -> list[Guard]:
    """What ``program``, an export of ``example``, depends on; what the user's code asked first."""
    import sympy

    environment = _environment(program)
    if environment is None:
        return []
    names = user_symbols(program, example)
    replacements = {symbol: symbol_of(name) for symbol, name in names.items()}
    guards: dict[Any, Guard] = {}

    def add(expression: Any, place: Place | None, *, asked: bool) -> None:
        if set(expression.free_symbols) <= set(replacements):
            said = expression.xreplace(replacements)
            if said != True and said not in guards:  # noqa: E712
                guards[said] = Guard(said, place, asked)

    for expression, truth, place in noted.asked:
        add(expression if truth else sympy.Not(expression), place, asked=True)
    for guard in environment.guards:
        add(guard.expr, noted.places.get(guard.expr), asked=False)
    for expression, name in _fixed(program, example):
        add(sympy.Eq(symbol_of(name), expression), None, asked=False)
    return list(guards.values())


def fixes_an_axis(guards: list[Guard]) -> bool:
    """Whether torch, unasked, took one size of an axis, or of what is made of it, for the only one (1 excepted)."""
    for guard in guards:
        said = guard.expression
        if not guard.asked and type(said).__name__ == "Equality":
            numbers = [int(side) for side in said.args if side.is_Integer]
            if numbers and numbers[0] > 1 and not any("Mod" in type(side).__name__ for side in said.args):
                return True
    return False


def symbol_of(name: str) -> Any:
    """The sympy symbol that stands for the user's ``name``."""
    import sympy

    return sympy.Symbol(name, integer=True, positive=True)


def _environment(program: Any) -> Any:
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode.shape_env
    return None


def _fixed(program: Any, example: Example) -> list[tuple[int, str]]:
    """The sizes of dynamic axes that the program has one size of, with their symbols."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    fixed = []
    for placeholder, key in zip(program.graph_signature.user_inputs, example.inputs, strict=True):
        for axis, symbol in example.axes.get(key, {}).items():
            size = values[placeholder].shape[axis]
            if isinstance(size, int):
                fixed.append((size, symbol))
    return fixed
