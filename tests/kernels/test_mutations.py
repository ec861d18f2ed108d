"""Faults in kernels: that they are put where they are meant, and that the emulator catches them."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_mutations
from benchmarks.kernel_faults import KINDS, code_of, edits
from benchmarks.kernel_mutations import (
    UNEXPLAINED,
    Mutant,
    checks_of,
    draw_places,
    read_explanations,
    report,
    run_checks,
    run_places,
    sources,
)
from graphopt.kernels.emulate import find_compiler

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler to emulate kernels with")

SOURCE = """// sync_block(); i < n
#define WIDE(x) (x < 4)
template <int Count>
DEVICE int where(int row, int chunk) { return row * 4 + (chunk ^ (row / 2 % 4)); }
KERNEL(32 * 2)
void kernel(GLOBAL(const float) x, int n, GLOBAL(float) y) {
    SHARED(float, kept, 2 * 32);
    u32 r[4];
    for (int i = thread(); i < n && i < 64; i += 32) kept[i] = x[i];
    sync_block();
    if (lane() == 0) y[r[1] - 1] += kept[lane() + n] * scale[n];
}
"""


def changed_lines(kind: str) -> list[str]:
    lines = []
    for edit in edits(kind, SOURCE):
        after = edit.apply(SOURCE).splitlines()
        (index,) = [i for i, line in enumerate(SOURCE.splitlines()) if line != after[i]]
        lines.append(after[index].strip())
    return lines


def test_what_each_kind_changes() -> None:
    assert changed_lines("barrier") == [";"]
    loop = "for (int i = thread(); i {} n && i {} 64; i += 32) kept[i] = x[i];"
    assert set(changed_lines("bound")) == {
        loop.format("<=", "<"),
        loop.format("<", "<="),
        "for (int i = thread(); i < 64; i += 32) kept[i] = x[i];",
        "for (int i = thread(); i < n; i += 32) kept[i] = x[i];",
        "if (lane() != 0) y[r[1] - 1] += kept[lane() + n] * scale[n];",
        "if (lane() == 0) y[r[1]] += kept[lane() + n] * scale[n];",
    }
    where = "DEVICE int where(int row, int chunk) {{ return row * 4 + (chunk{}); }}"
    assert set(changed_lines("swizzle")) == {
        where.format(" + (row / 2 % 4)"),
        where.format(""),
        where.format(" ^ (row / 2 % 4) + 1"),
    }
    assert "if (lane() == 0) y[r[0] - 1] += kept[lane() + n] * scale[n];" in changed_lines("fragment index")
    assert "if ((31 - lane()) == 0) y[r[1] - 1] += kept[lane() + n] * scale[n];" in changed_lines("fragment index")
    assert "if (lane() == 0) y[r[1] - 1] += kept[lane()] * scale[n];" in changed_lines("fragment index")
    assert set(changed_lines("scale")) == {
        "if (lane() == 0) y[r[1] - 1] += kept[lane() + n];",
        "if (lane() == 0) y[r[1] - 1] += kept[lane()] * scale[n];",
        "if (lane() == 0) y[r[1] - 1] = kept[lane() + n] * scale[n];",
        "if (lane() == 0) y[r[1] - 1] -= kept[lane() + n] * scale[n];",
    }


@pytest.mark.parametrize("file", sources(), ids=lambda file: file.name)
def test_only_code_is_changed(file: Path) -> None:
    text = file.read_text()
    code = code_of(text)
    assert len(code) == len(text)
    assert code.count("\n") == text.count("\n")
    for kind in KINDS:
        for edit in edits(kind, text):
            assert edit.apply(text) != text
            line = text[text.rfind("\n", 0, edit.start) + 1 :].split("\n", 1)[0]
            assert not line.lstrip().startswith(("//", "#", "SHARED", "KERNEL", "template"))


def test_every_kind_has_places_enough() -> None:
    found = {kind: len(draw_places(kind, 0)) for kind in KINDS}
    assert sum(found.values()) >= 300
    assert min(found.values()) >= 10


def test_places_are_drawn_from_the_seed() -> None:
    assert draw_places("bound", 1) == draw_places("bound", 1) != draw_places("bound", 2)


def test_explanations_are_of_lines_that_could_be() -> None:
    """An explanation whose line no fault makes any more is out of date."""
    made = {(kind, place.lines[1]) for kind in KINDS for place in draw_places(kind, 0)}
    explanations = read_explanations()
    assert set(explanations) <= made
    assert {outcome for outcome, _ in explanations.values()} <= {"equivalent", "survived"}
    assert all(len(reason) > 20 for _, reason in explanations.values())


@needs_compiler
def test_the_kernels_pass_as_they_are() -> None:
    """Those of the matrix products; the full program begins with all of them."""
    assert run_checks(checks_of(sources()[0]), lambda kernel: kernel) is None


@needs_compiler
@pytest.mark.slow
def test_a_few_mutants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    mutants = run_places({kind: draw_places(kind, 7) for kind in KINDS}, 10)
    outcomes = Counter(mutant.outcome for mutant in mutants)
    assert outcomes["killed"] + outcomes["survived"] == 10
    assert [mutant for mutant in mutants if (mutant.outcome, mutant.how) == UNEXPLAINED] == []
    assert {mutant.kind for mutant in mutants} == set(KINDS)


@needs_compiler
def test_what_nothing_notices_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_mutations, "checks_of", lambda file: checks_of(sources()[2])[:1])
    places = [place for place in draw_places("bound", 0) if place.file.name == "few_rows.cu"][:1]
    (mutant,) = run_places({"bound": places}, 1)  # the product's launches, which have no part of it
    assert (mutant.outcome, mutant.how) == UNEXPLAINED


def test_the_result_says_how_many_places_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(kernel_mutations, "write_result", lambda name, content: written.append(content))
    caught = Mutant("bound", "a.cu", 3, "i < n", "i <= n", "killed", "wrong result: 1")
    left = Mutant("scale", "a.cu", 5, "x * s", "x", "survived", "explained")
    places = dict.fromkeys(KINDS, 7)
    options = argparse.Namespace(places=200, seed=0)
    assert report([caught, left], places, options, 1.0) == 0
    (found,) = written
    assert found["by_kind"]["bound"] == {"places": 7, "killed": 1, "mutants": 1, "equivalent": 0}
    assert found["by_kind"]["all"] == {"places": 7 * len(KINDS), "killed": 1, "mutants": 2, "equivalent": 0}
    assert (found["kill_rate"], found["killed_by"], found["survivors"]) == (0.5, {"wrong result": 1}, [left])
    unexplained = Mutant("scale", "a.cu", 5, "x * s", "x", *UNEXPLAINED)
    assert report([caught, unexplained], places, options, 1.0) == 1
