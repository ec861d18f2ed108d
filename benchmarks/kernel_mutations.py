"""How many wrong kernels the emulator catches: 200 faults of fixed kinds at seeded random places of their sources.

    python -m benchmarks.kernel_mutations [--places N] [--seed S]

A mutant is compiled for the emulator and launched on a few ragged shapes, in several schedules, with whole numbers
whose results are exact in every dtype. It is killed where the emulator reports an error, or a result is not numpy's.
Where it does not compile, another place is drawn: anything would notice that. One that is not killed is looked up by
kind and changed line in ``kernel_survivors.yaml``. Where that says why it computes the same, it is set aside and
printed, and another place drawn. Where it says why the emulator cannot see it, or nothing, it is a survivor.

A fault that costs time alone, or one that only the hardware would show, cannot be caught here.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from benchmarks.common import print_table, work_folder, write_result
from benchmarks.kernel_faults import KINDS, Edit, edits
from benchmarks.mutants import ALL, OUTCOMES, count_outcomes, kill_rate, print_left, to_json
from benchmarks.pool import Died, Pool
from graphopt.errors import GraphoptError
from graphopt.kernels.compile import INCLUDE
from graphopt.kernels.emulate import EmulatedModule, EmulationError, Work
from graphopt.kernels.gemm import half_gemm, int8_gemm
from graphopt.kernels.kernel import Kernel
from graphopt.plugins.pivot_linear.kernels import kernel_of, kernels_for, tactics_for
from tests.kernels.common import Case, column_results, differences, half_gemm_case, int8_gemm_case, pivot_case

EXPLANATIONS = Path(__file__).with_name("kernel_survivors.yaml")
TIMEOUT = 90.0
SCHEDULES = 3
STEPS = 2_000_000
"""Of all threads together; a launch here takes far fewer."""
SHARED_HEADER = "tile_product.h"

Check = tuple[Kernel, Callable[[EmulatedModule], Iterator[str]]]
"""A kernel, and what launches it and yields what is wrong."""


Explanations = Mapping[tuple[str, str], tuple[str, str]]
UNEXPLAINED = ("survived", "nothing noticed")


@dataclass(frozen=True)
class Place:
    """A fault at a place of a file, with the file's text as it was when places were drawn."""

    kind: str
    file: Path
    text: str
    edit: Edit

    @property
    def mutated(self) -> str:
        """The text with the fault."""
        return self.edit.apply(self.text)

    @property
    def line(self) -> int:
        """The number of the first line that is changed."""
        return self.text.count("\n", 0, self.edit.start) + 1

    @property
    def lines(self) -> tuple[str, str]:
        """What is changed, before and after, as whole lines."""
        start = self.text.rfind("\n", 0, self.edit.start) + 1
        end = self.text.find("\n", self.edit.end)
        longer = len(self.mutated) - len(self.text)
        return self.text[start:end].strip(), self.mutated[start : end + longer].strip()


@dataclass(frozen=True)
class Mutant:
    """One fault, and what became of it: ``killed``, ``survived`` or ``equivalent``; how, or why."""

    kind: str
    file: str
    line: int
    before: str
    after: str
    outcome: str
    how: str


# -- what a kernel is launched on --------------------------------------------------------------------------------------


def _launches(cases: Sequence[Case], module: EmulatedModule) -> Iterator[str]:
    """Every case in several schedules, one launch after the other on the same loaded module."""
    for seed, case in itertools.product(range(SCHEDULES), cases):
        outputs = [(wanted.shape, dtype.name) for wanted, dtype in zip(case.wanted, case.dtypes, strict=True)]
        (found,) = module.launch_together([Work(case.inputs, outputs)], seed=seed, steps=STEPS)
        yield from differences(case, found)


def _full_table(cases: Sequence[Case], module: EmulatedModule) -> Iterator[str]:
    """As `_launches`, in a module whose table of outputs is full of others."""
    module.state["owners"][:] = 255
    yield from _launches(cases, module)


def _together(cases: Sequence[Case], module: EmulatedModule) -> Iterator[str]:
    """All cases at the same time, as from several streams; again and again, so that each finds what the last left."""
    works = [
        Work(
            case.inputs, [(wanted.shape, dtype.name) for wanted, dtype in zip(case.wanted, case.dtypes, strict=True)], i
        )
        for i, case in enumerate(cases)
    ]
    for seed in range(6):
        for case, found in zip(cases, module.launch_together(works, seed=seed, steps=len(works) * STEPS), strict=True):
            yield from differences(case, found)


def _wild_positions(case: Case, form: str, module: EmulatedModule) -> Iterator[str]:
    """Places that are none, as memory may hold while a build times a kernel: nothing outside of a tensor is touched."""
    x, kept, coefficients, bias, positions = case.inputs
    for place in (len(positions), -1, 2**31 - 1):
        wild, tame = positions.copy(), positions.copy()
        wild[3], tame[3] = place, 0  # the column form takes the first channel then
        inputs = [x, kept, coefficients, bias, wild]
        if form == "column":
            wanted = column_results(x, kept, coefficients, bias, tame)
            yield from _launches([replace(case, inputs=inputs, wanted=wanted)], module)
            continue
        try:
            yield from _launches([replace(case, inputs=inputs)], module)
        except EmulationError as error:
            if "never written" not in str(error):  # the channel that has no place is the one fault there is
                raise


def checks_of(file: Path) -> list[Check]:
    """The kernels that a source is part of, with their launches; the quickest to tell first."""
    sizes = ((33, 70, 40), (65, 17, 129), (17, 130, 240))
    halves = [half_gemm_case(dtype, *size, "whole", 0) for dtype in ("float16", "bfloat16") for size in sizes]
    bytes_ = [int8_gemm_case("float32", *size, "whole", 0) for size in sizes]
    half: list[Check] = [
        (half_gemm("float16")[1], partial(_launches, halves[:3])),
        (half_gemm("bfloat16")[3], partial(_launches, halves[3:])),
    ]
    int8: list[Check] = [(int8_gemm("float32")[tactic], partial(_launches, bytes_)) for tactic in (1, 3)]
    match file.name:
        case "half_gemm.cu":
            return half
        case "int8_gemm.cu":
            return int8
        case "tile_product.h":
            return half + int8
        case "few_rows.cu":
            return _pivot_checks()
    raise ValueError(f"no launches for {file.name}")


def _pivot_checks() -> list[Check]:
    checks: list[Check] = []
    for form, dtype, tactic in (
        ("row", "float16", 4),
        ("column", "bfloat16", 1),
        ("column", "float32", 2),
        ("row", "float32", 1),
    ):
        # rows, n, r, m: in vectors and not, one row, many and none, fewer channels than a tile and more, pivots alone.
        sizes = [(17, 33, 7, 50), (1, 40, 24, 64), (18, 200, 40, 72), (2, 40, 24, 64), (2, 40, 24, 64)]
        sizes += [(16, 24, 16, 16), (0, 40, 24, 64)]
        if form == "column":
            sizes = [(rows, m, r, n) for rows, n, r, m in sizes]
        cases = [pivot_case(form, dtype, *size, seed) for seed, size in enumerate(sizes)]
        kernel = kernels_for("row" if form == "row" else "column", dtype)[tactic]
        checks += [(kernel, partial(launch, cases)) for launch in (_launches, _full_table, _together)]
        # Outputs that want the same places of the table: some find one and some none.
        crowded = kernel_of("row" if form == "row" else "column", dtype, tactics_for(dtype)[tactic], slots=2)
        checks.append((crowded, partial(_together, cases)))
        checks.append((kernel, partial(_wild_positions, cases[0], form)))
    return checks


# -- one place ---------------------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    """The files that faults are put into."""
    from graphopt.kernels.catalogue import all_kernels

    return [INCLUDE / SHARED_HEADER, *dict.fromkeys(kernel.source for kernel in all_kernels())]


def draw_places(kind: str, seed: int) -> list[Place]:
    """All places for faults of a kind, each once, in random order."""
    texts = {file: file.read_text() for file in sources()}
    places = [Place(kind, file, text, edit) for file, text in texts.items() for edit in edits(kind, text)]
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    return [places[i] for i in rng.permutation(len(places))]


def run_checks(checks: Sequence[Check], mutate: Callable[[Kernel], Kernel]) -> str | None:
    """What the first check that fails says; None where all pass.

    Raises:
        GraphoptError: It does not compile.
    """
    for kernel, launch in checks:
        module = EmulatedModule(mutate(kernel))
        try:
            if told := next(launch(module), None):
                return f"wrong result: {told}"
        except EmulationError as error:
            return str(error)
    return None


def run_place(place: Place, folder: Path, explanations: Explanations) -> Mutant | None:
    """Put a fault there and launch what comes out. None where it does not compile."""

    def mutate(kernel: Kernel) -> Kernel:
        source = folder / kernel.source.name
        source.write_text(kernel.source.read_text())
        (folder / place.file.name).write_text(place.mutated)  # the source, or a header that is found beside it
        return replace(kernel, source=source)

    try:
        how = run_checks(checks_of(place.file), mutate)
    except GraphoptError:
        return None
    outcome = "killed"
    if how is None:
        outcome, how = explanations.get((place.kind, place.lines[1]), UNEXPLAINED)
    return Mutant(place.kind, place.file.name, place.line, *place.lines, outcome, how)


def run_places(order: Mapping[str, Sequence[Place]], count: int) -> list[Mutant]:
    """Go through the places, as many of each kind, until ``count`` mutants are killed or survive, or no place is left.

    A kind that runs out leaves its share to the others. A mutant that crashes or hangs the emulator is killed.
    """
    explanations = read_explanations()
    left = {kind: list(reversed(places)) for kind, places in order.items()}
    mutants: list[Mutant] = []
    counted = dict.fromkeys(order, 0)
    while (missing := count - sum(counted.values())) > 0 and any(left.values()):
        batch = _next_places(left, counted, missing)

        def task(index: int, folder: Path, batch: Sequence[Place] = batch) -> Mutant | None:
            return run_place(batch[index], folder, explanations)

        results = Pool[Mutant | None](task, len(batch), timeout=TIMEOUT).results()
        for index, result in sorted(results, key=lambda item: item[0]):
            mutant = _died(batch[index], result) if isinstance(result, Died) else result
            if mutant is not None:
                mutants.append(mutant)
                counted[mutant.kind] += mutant.outcome != "equivalent"
    return mutants


def _next_places(left: Mapping[str, list[Place]], counted: Mapping[str, int], missing: int) -> list[Place]:
    """The next places of the kinds that have been counted least."""
    counts = dict(counted)
    batch: list[Place] = []
    while len(batch) < missing and any(left.values()):
        kind = min((kind for kind in left if left[kind]), key=lambda kind: counts[kind])
        counts[kind] += 1
        batch.append(left[kind].pop())
    return batch


def _died(place: Place, died: Died) -> Mutant:
    if died.kind == "exception":
        raise RuntimeError(f"{place.file.name}, {place.kind}: {died.detail}")
    how = f"{died.kind}: {died.detail}"
    return Mutant(place.kind, place.file.name, place.line, *place.lines, "killed", how)


def read_explanations() -> Explanations:
    """What a mutant that is not killed is, ``equivalent`` or ``survived``, and why, by kind and changed line."""
    return {
        (kind, line): (outcome, group["why"])
        for outcome, kinds in yaml.safe_load(EXPLANATIONS.read_text()).items()
        for kind, groups in kinds.items()
        for group in groups
        for line in group["lines"]
    }


# -- the whole ---------------------------------------------------------------------------------------------------------


def kind_of_death(mutant: Mutant) -> str:
    """How a mutant was killed, in a word or two."""
    if mutant.how.startswith("wrong result"):
        return "wrong result"
    return "crash or hang" if mutant.how.startswith(("crash", "timeout")) else "reported by the emulator"


def main() -> int:
    """Run, print, record. Exit code 1 where the kernels fail as they are, or a survivor is not explained."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--places", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    with work_folder() as folder:
        os.environ["GRAPHOPT_CACHE"] = str(folder)  # mutants are not worth keeping
        for file in sources():
            if told := run_checks(checks_of(file), lambda kernel: kernel):
                print(f"{file.name} fails as it is: {told}")
                return 1
        order = {kind: draw_places(kind, options.seed) for kind in KINDS}
        mutants = run_places(order, options.places)
    seconds = time.perf_counter() - start
    return report(mutants, {kind: len(places) for kind, places in order.items()}, options, seconds)


def report(mutants: Sequence[Mutant], places: Mapping[str, int], options: argparse.Namespace, seconds: float) -> int:
    """Print the table and what was not killed; write the result where the run is the full one."""
    counts = count_outcomes(mutants, KINDS)
    places = {**places, ALL: sum(places.values())}
    deaths = Counter(kind_of_death(mutant) for mutant in mutants if mutant.outcome == "killed")
    print_table(
        ["kind", *((heading, "right") for heading in ("places", "killed", "survived", "set aside as equivalent"))],
        [[kind, places[kind], *(found[outcome] for outcome in OUTCOMES)] for kind, found in counts.items()],
        f"{kill_rate(counts):.1%} killed; seed {options.seed}, {seconds:.0f} s",
    )
    print(", ".join(f"{how}: {count}" for how, count in deaths.most_common()))
    print_left(mutants, lambda mutant: f"{mutant.file}:{mutant.line} · {mutant.after}")
    if options.places == 200:
        common = to_json(mutants, counts)
        write_result(
            "kernel_mutations",
            {
                "seed": options.seed,
                **common,
                "by_kind": {kind: {"places": places[kind], **found} for kind, found in common["by_kind"].items()},
                "killed_by": dict(deaths),
                "seconds": round(seconds),
            },
        )
    return int(not mutants or any((mutant.outcome, mutant.how) == UNEXPLAINED for mutant in mutants))


if __name__ == "__main__":
    raise SystemExit(main())
