"""Labels of axes: sums and products of atoms, and what it takes to make two labels equal.

The label of an axis says how it is built of parts that are relabelled as one. An axis that Concat glues together is a
sum of labels, an axis that Reshape merges from heads and channels is a product of labels, outermost first; and both
can be inside each other. Making two labels equal is unification: where one is finer, the other is refined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

REASONS = 8
"""Of the reasons why an atom is pinned, this many are kept."""


class Atom:
    """A part of an axis: a leaf, or bound to the label that it was found to be equal to."""

    __slots__ = ("bound", "pins", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.bound: Label | None = None
        self.pins: dict[str, None] = {}


Factor = tuple[Atom, bool]
"""An atom, and whether it is transformed by the inverse (transposed) of the atom's element."""
Term = tuple[Factor, ...]
"""A product of atoms, outermost first."""
Label = tuple[Term, ...]
"""A sum of products: the parts of an axis one after another."""


@dataclass(frozen=True)
class Piece:
    """A place of an atom on an axis: elements [offset, offset + outer * atom.size * inner)."""

    atom: Atom
    offset: int
    outer: int
    inner: int
    inverse: bool


class Labels:
    """Makes labels equal.

    Args:
        signed: Whether an element and its inverse (transposed) are two things. They are one for permutations and for
            orthogonal matrices.
    """

    def __init__(self, *, signed: bool) -> None:
        self.signed = signed

    def fresh(self, size: int) -> Label:
        """The label of an axis of which nothing is known."""
        return (((Atom(size), False),),)

    def inverse(self, label: Label) -> Label:
        """The label of what is transformed the other way round."""
        return _flipped(label, self.signed)

    def product(self, labels: Iterable[Label]) -> Label:
        """The label of axes merged into one, outermost first."""
        factors: list[Factor] = []
        for label in labels:
            if len(label) == 1:
                factors.extend(label[0])
            else:
                atom = Atom(size_of(label))
                atom.bound = label
                factors.append((atom, False))
        return (tuple(factors),)

    def pin(self, label: Label, reason: str) -> None:
        """Nothing but the identity is allowed for any part of a label."""
        self._pin(label, (reason,))

    def is_pinned(self, label: Label) -> bool:
        """Whether every part of a label is pinned (parts of one element are)."""
        return all(atom.size == 1 or atom.pins for atom in self._leaves(label))

    def tie(self, one: Label, other: Label, reason: str) -> None:
        """Make two labels equal; what cannot be made equal is pinned with the reason."""
        pending = [(one, other)]
        while pending:
            a, b = pending.pop()
            a, b = self._normal(a), self._normal(b)
            if size_of(a) != size_of(b):
                self._pin((*a, *b), (reason,))
            elif size_of(a) <= 1:
                continue
            elif _is_leaf(a):
                self._bind(a[0][0], b)
            elif _is_leaf(b):
                self._bind(b[0][0], a)
            else:
                first, second = math.prod(f.size for f, _ in a[0]), math.prod(f.size for f, _ in b[0])
                if first == second:
                    if len(a) > 1:
                        pending.append((a[1:], b[1:]))
                        pending.append((a[:1], b[:1]))
                    elif not self._tie_products(a[0], b[0], pending):
                        self._pin((*a, *b), (reason,))
                else:
                    if first < second:
                        a, b, first, second = b, a, second, first
                    cut = self._cut(a[0], second)
                    if cut is None:
                        self._pin((*a, *b), (reason,))
                    else:
                        pending.append(((*cut, *a[1:]), b))

    def layout(self, label: Label) -> list[Piece]:
        """Where the atoms of a label are on its axis, in order."""
        pieces: list[Piece] = []
        offset = 0
        for term in self._normal(label):
            for piece in self._places(term):
                place = Piece(piece.atom, offset + piece.offset, piece.outer, piece.inner, piece.inverse)
                last = pieces[-1] if pieces else None
                if last is not None and _continues(last, place):
                    place = Piece(last.atom, last.offset, last.outer + place.outer, last.inner, last.inverse)
                    pieces.pop()
                pieces.append(place)
            offset += math.prod(atom.size for atom, _ in term)
        return pieces

    # -- how it is done --------------------------------------------------------------------------------------------

    def _find(self, factor: Factor) -> Factor:
        """The atom at the end of a chain of bindings."""
        atom, flip = factor
        trail: list[Factor] = []
        while (bound := atom.bound) is not None and len(bound) == 1 and len(bound[0]) == 1:
            trail.append((atom, flip))
            following, flips = bound[0][0]
            atom, flip = following, flip ^ flips
        for passed, flipped in trail:
            passed.bound = (((atom, flipped ^ flip),),)
        return atom, flip

    def _normal(self, label: Label) -> Label:
        return tuple(part for term in label for part in self._parts(term))

    def _parts(self, term: Term) -> list[Term]:
        """A product of leaves and of sums, sums at its outer end multiplied out."""
        factors: list[Factor] = []
        pending = list(reversed(term))
        while pending:
            atom, flip = self._find(pending.pop())
            if atom.bound is None:
                if atom.size != 1:
                    factors.append((atom, flip))
            elif len(atom.bound) == 1:
                pending.extend(reversed(_flipped(atom.bound, flip)[0]))
            elif factors:
                factors.append((atom, flip))
            else:
                rest = tuple(reversed(pending))
                return [part for outer in _flipped(atom.bound, flip) for part in self._parts(outer + rest)]
        return [tuple(factors) or term[:1]]

    def _leaves(self, label: Label) -> list[Atom]:
        found: list[Atom] = []
        pending = list(label)
        while pending:
            for factor in pending.pop():
                atom = self._find(factor)[0]
                if atom.bound is None:
                    found.append(atom)
                else:
                    pending.extend(atom.bound)
        return found

    def _pin(self, label: Label, reasons: Iterable[str]) -> None:
        for atom in self._leaves(label):
            for reason in reasons:
                if len(atom.pins) < REASONS:
                    atom.pins.setdefault(reason)

    def _bind(self, factor: Factor, label: Label) -> None:
        """Let a leaf be equal to a label of its size, in which it is nowhere unless it is all of it."""
        atom, flip = factor
        if _is_leaf(label) and label[0][0][0] is atom:
            if label[0][0][1] != flip:
                self._pin(label, ("tied to its own inverse",))
            return
        if atom.pins:
            self._pin(label, atom.pins)
        atom.bound = _flipped(label, flip)

    def _tie_products(self, one: Term, other: Term, pending: list[tuple[Label, Label]]) -> bool:
        """Match the innermost factors of two products; False where they do not go into each other."""
        a, b = one[-1], other[-1]
        if a[0].size == b[0].size:
            pending.append((((a,),), ((b,),)))
            if len(one) > 1:
                pending.append(((one[:-1],), (other[:-1],)))
            return True
        if a[0].size < b[0].size:
            one, other, a, b = other, one, b, a
        if a[0].size % b[0].size:
            return False
        refined = self._factored(a, b[0].size, pending)
        if refined is None:
            return False
        pending.append(((one[:-1] + refined,), (other,)))
        return True

    def _factored(self, factor: Factor, size: int, pending: list[tuple[Label, Label]]) -> Term | None:
        """A factor as a product whose innermost part has the given size."""
        atom, flip = factor
        if atom.bound is None:
            product: Term = ((Atom(atom.size // size), False), (Atom(size), False))
            self._bind((atom, False), (product,))
            return _flipped((product,), flip)[0]
        parts = self._normal(_flipped(atom.bound, flip))
        sizes = {math.prod(f.size for f, _ in part) for part in parts}
        if len(sizes) > 1:
            return None
        # A sum of equal parts is a product once the parts are one; which part it is stays fixed.
        pending.extend(((parts[0],), (part,)) for part in parts[1:])
        count = Atom(len(parts))
        count.pins["parts of an axis that are tied to each other"] = None
        return ((count, False), *parts[0])

    def _cut(self, term: Term, size: int) -> tuple[Term, Term] | None:
        """A product as a sum whose first part has the given size; None where that cuts through its inner factors."""
        (atom, flip), rest = term[0], term[1:]
        inner = math.prod(f.size for f, _ in rest)
        if size % inner or atom.bound is not None:
            return None
        first, second = Atom(size // inner), Atom(atom.size - size // inner)
        self._bind((atom, False), (((first, False),), ((second, False),)))
        return ((first, flip), *rest), ((second, flip), *rest)

    def _places(self, term: Term) -> list[Piece]:
        found: list[Piece] = []
        outer, inner = 1, math.prod(atom.size for atom, _ in term)
        for atom, flip in term:
            inner //= atom.size
            if atom.bound is None:
                found.append(Piece(atom, 0, outer, inner, flip))
            else:
                parts = self.layout(_flipped(atom.bound, flip))
                found.extend(
                    Piece(p.atom, (block * atom.size + p.offset) * inner, p.outer, p.inner * inner, p.inverse)
                    for block in range(outer)
                    for p in parts
                )
            outer *= atom.size
        return found


def size_of(label: Label) -> int:
    """The number of elements of an axis with this label."""
    return sum(math.prod(atom.size for atom, _ in term) for term in label)


def _flipped(label: Label, flip: bool) -> Label:
    return tuple(tuple((atom, not sign) for atom, sign in term) for term in label) if flip else label


def _is_leaf(label: Label) -> bool:
    return len(label) == 1 and len(label[0]) == 1 and label[0][0][0].bound is None


def _continues(last: Piece, piece: Piece) -> bool:
    return (last.atom, last.inner, last.inverse) == (
        piece.atom,
        piece.inner,
        piece.inverse,
    ) and last.offset + last.outer * last.atom.size * last.inner == piece.offset
