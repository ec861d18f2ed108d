"""What became of faults that were put in: counted by kind, printed, and as the result files have it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

OUTCOMES = ("killed", "survived", "equivalent")
ALL = "all"


class Fault(Protocol):
    """One fault: what kind it is of, what became of it (one of `OUTCOMES`), and how or why."""

    @property
    def kind(self) -> str: ...
    @property
    def outcome(self) -> str: ...
    @property
    def how(self) -> str: ...


AnyFault = TypeVar("AnyFault", bound=Fault)
Counts = Mapping[str, Counter[str]]


def count_outcomes(mutants: Sequence[Fault], kinds: Iterable[str]) -> dict[str, Counter[str]]:
    """The outcomes of each kind, and of ``all``."""
    counts = {kind: Counter(mutant.outcome for mutant in mutants if mutant.kind == kind) for kind in kinds}
    return {**counts, ALL: sum(counts.values(), Counter())}


def kill_rate(counts: Counts) -> float:
    """The share of those that count that was killed; equivalent ones do not count."""
    return counts[ALL]["killed"] / max(1, counts[ALL]["killed"] + counts[ALL]["survived"])


def print_left(mutants: Sequence[AnyFault], told: Callable[[AnyFault], str]) -> None:
    """A line for each that was not killed: those set aside first, survivors last, where they are seen."""
    for outcome in ("equivalent", "survived"):
        for mutant in mutants:
            if mutant.outcome == outcome:
                print(f"{outcome} · {mutant.kind} · {told(mutant)} · {mutant.how}")


def to_json(mutants: Sequence[Fault], counts: Counts) -> dict[str, Any]:
    """What both result files say."""
    return {
        "by_kind": {
            kind: {
                "killed": found["killed"],
                "mutants": found["killed"] + found["survived"],
                "equivalent": found["equivalent"],
            }
            for kind, found in counts.items()
        },
        "kill_rate": kill_rate(counts),
        **{
            name: [mutant for mutant in mutants if mutant.outcome == outcome]
            for name, outcome in (("survivors", "survived"), ("equivalent", "equivalent"))
        },
    }
