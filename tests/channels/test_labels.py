"""Labels: what is equal is laid out equally, however its parts were cut and merged."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.channels.labels import Atom, Label, Labels, size_of


def layout(labels: Labels, label: Label) -> list[tuple[Atom, int, int, int, bool]]:
    return [(p.atom, p.offset, p.outer, p.inner, p.inverse) for p in labels.layout(label)]


def told(labels: Labels, label: Label) -> list[tuple[int, int, int, int]]:
    """Size, offset, outer and inner of each piece."""
    return [(p.atom.size, p.offset, p.outer, p.inner) for p in labels.layout(label)]


def test_merged_axes() -> None:
    labels = Labels(signed=False)
    whole, heads, channels = labels.fresh(12), labels.fresh(3), labels.fresh(4)
    labels.tie(whole, labels.product([heads, channels]), "")
    assert told(labels, whole) == [(3, 0, 1, 4), (4, 0, 3, 1)]


def test_two_ways_to_merge() -> None:
    """2 x 6 and 4 x 3: both become 2 x 2 x 3."""
    labels = Labels(signed=False)
    whole = labels.fresh(12)
    labels.tie(whole, labels.product([labels.fresh(2), labels.fresh(6)]), "")
    labels.tie(whole, labels.product([labels.fresh(4), labels.fresh(3)]), "")
    assert told(labels, whole) == [(2, 0, 1, 6), (2, 0, 2, 3), (3, 0, 4, 1)]
    assert not labels.is_pinned(whole)


def test_ways_that_do_not_go_together() -> None:
    labels = Labels(signed=False)
    whole = labels.fresh(24)
    labels.tie(whole, labels.product([labels.fresh(2), labels.fresh(12)]), "")
    labels.tie(whole, labels.product([labels.fresh(3), labels.fresh(8)]), "halves and thirds")
    assert labels.is_pinned(whole)
    assert {why for p in labels.layout(whole) for why in p.atom.pins} == {"halves and thirds"}


def test_cuts() -> None:
    labels = Labels(signed=False)
    whole, parts = labels.fresh(12), [labels.fresh(n) for n in (5, 4, 3)]
    labels.tie(whole, (*parts[0], *parts[1], *parts[2]), "")
    other = labels.fresh(7)
    labels.tie(whole, (*other, *labels.fresh(5)), "")
    assert told(labels, whole) == [(5, 0, 1, 1), (2, 5, 1, 1), (2, 7, 1, 1), (3, 9, 1, 1)]
    assert told(labels, other) == [(5, 0, 1, 1), (2, 5, 1, 1)]


def test_equal_halves_of_heads() -> None:
    """What rotary positions do: the halves of each head are one class, and each head has two of it."""
    labels = Labels(signed=False)
    whole, heads, channels = labels.fresh(24), labels.fresh(3), labels.fresh(8)
    labels.tie(whole, labels.product([heads, channels]), "")
    one, two = labels.fresh(4), labels.fresh(4)
    labels.tie(channels, (*one, *two), "")
    labels.tie((*one, *two), (*two, *one), "")
    assert told(labels, whole) == [(3, 0, 1, 8), (4, 0, 6, 1)]


def test_inverses() -> None:
    labels = Labels(signed=True)
    one, other = labels.fresh(4), labels.fresh(4)
    labels.tie(one, labels.inverse(other), "")
    (a,), (b,) = labels.layout(one), labels.layout(other)
    assert a.atom is b.atom and a.inverse != b.inverse
    labels.tie(one, other, "")
    assert labels.is_pinned(one)
    assert list(a.atom.pins) == ["tied to its own inverse"]


def test_pins_go_where_labels_go() -> None:
    labels = Labels(signed=False)
    whole, part, rest = labels.fresh(6), labels.fresh(2), labels.fresh(4)
    labels.pin(whole, "why")
    labels.tie(whole, (*part, *rest), "")
    assert labels.is_pinned(part) and labels.is_pinned(rest)


@st.composite
def equations(draw: st.DrawFn) -> tuple[bool, list[tuple[list[list[int]], list[list[int]], bool]], list[int]]:
    """Sums of products of a few atoms, two by two of one size."""
    atoms = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), min_size=3, max_size=7))
    term = st.lists(st.integers(0, len(atoms) - 1), min_size=1, max_size=3)
    label = st.lists(term, min_size=1, max_size=3)
    pairs = draw(st.lists(st.tuples(label, label, st.booleans()), min_size=1, max_size=5))
    return draw(st.booleans()), pairs, atoms


@settings(max_examples=300, deadline=None, derandomize=True)
@given(equations())
def test_equal_labels_are_laid_out_equally(
    made: tuple[bool, list[tuple[list[list[int]], list[list[int]], bool]], list[int]],
) -> None:
    signed, pairs, atoms = made
    labels = Labels(signed=signed)
    fresh = [labels.fresh(size) for size in atoms]
    tied: list[tuple[Label, Label]] = []

    def build(terms: list[list[int]]) -> Label:
        return tuple(part for term in terms for part in labels.product([fresh[n] for n in term]))

    for one, other, inverse in pairs:
        a, b = build(one), build(other)
        if size_of(a) < size_of(b):
            a = (*a, *labels.fresh(size_of(b) - size_of(a)))
        elif size_of(b) < size_of(a):
            b = (*labels.fresh(size_of(a) - size_of(b)), *b)
        b = labels.inverse(b) if inverse else b
        labels.tie(a, b, "does not fit")
        tied.append((a, b))
    for a, b in tied:
        found, other_found = layout(labels, a), layout(labels, b)
        covered = [piece for piece in found if piece[0].size > 1 and not piece[0].pins]
        # What is free is at the same places on both sides; what is pinned may be cut differently.
        assert covered == [piece for piece in other_found if piece[0].size > 1 and not piece[0].pins]
        for atom, offset, outer, inner, _ in found:
            assert offset >= 0 and offset + outer * atom.size * inner <= size_of(a)
