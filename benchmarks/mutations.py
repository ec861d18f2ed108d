"""How many wrong rewrites verification catches: 200 faults of fixed kinds at seeded random places.

    python -m benchmarks.mutations [--places N] [--seed S]

A fault is put into a network; where the mutant loads and runs it goes to ``graphopt.verify(original, mutant)`` at the
shipped tolerances. A mutant that verification passes is run on 100 further inputs, of other values and sizes, the
floats of every fourth 100 times as large (what a fault does to overflow shows only there). With
the same bits on all of them it is set aside as equivalent (a fault in a branch not taken, a slice past the end
moved by one), listed, and another place drawn. Otherwise it is a survivor, printed with its largest difference:
harmless where that is rounding, be it by its size or because operator by operator, each rounding to its own dtype,
both give the same bits (the runtime keeps more digits within chains of float16 operators).
Where the mutant does not load, or not run on the first input, another place is drawn: anything would notice that.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.common import minilm, print_table, silero, work_folder, write_result
from benchmarks.faults import KINDS
from benchmarks.mutants import OUTCOMES, count_outcomes, kill_rate, print_left, to_json
from benchmarks.pool import Died, Pool, first_line

CORPUS_NETWORKS = 24
FURTHER_INPUTS = 100
ROUNDING = 16  # eps of the dtype: below this the inputs differ by rounding alone


@dataclass
class Mutant:
    """One fault, and what became of it: ``killed``, ``survived`` or ``equivalent``; why, or what it does."""

    kind: str
    network: str
    fault: str
    outcome: str
    how: str
    seconds: float


# -- the networks ------------------------------------------------------------------------------------------------------


def write_networks(folder: Path) -> list[Path]:
    """The networks that faults are put into: the test networks, expanded corpus cases, the demo networks."""
    from tests.models import RUNNABLE, large_transformer, many_small_nodes

    paths = []
    builders: dict[str, Callable[[], ir.Model]] = {**RUNNABLE, "many_small_nodes": partial(many_small_nodes, 400)}
    for name, builder in builders.items():
        paths.append(folder / f"{name}.onnx")
        ir.save(builder(), paths[-1])
    paths.append(large_transformer(folder / "transformer.onnx", layers=2, width=64, heads=4))
    paths += _write_corpus_networks(folder)
    if (encoder := minilm(folder)) is not None:
        paths.append(encoder)
    if (detector := silero()) is not None:
        paths.append(Path(shutil.copy(detector, folder / "silero.onnx")))
    return paths


def _write_corpus_networks(folder: Path) -> list[Path]:
    from benchmarks.corpus import collect

    usable = [
        case
        for case in collect()
        if "expanded" in case.name and len(case.model.graph.node) >= 5 and "dropout" not in case.name
    ]
    paths = []
    for case in usable[:: len(usable) // CORPUS_NETWORKS]:
        paths.append(folder / f"{case.name}.onnx")
        paths[-1].write_bytes(case.model.SerializeToString())
    return paths


# -- one place ---------------------------------------------------------------------------------------------------------


Site = tuple[Path, int]  # a network, and the number of a place in it


def draw_sites(networks: Sequence[Path], kind: str, seed: int) -> list[Site]:
    """All places for faults of one kind, each once: networks drawn alike however large, places within them alike."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    left = {path: list(rng.permutation(sum(1 for _ in KINDS[kind](load_inferred(path))))) for path in networks}
    order: list[Site] = []
    while left := {path: sites for path, sites in left.items() if sites}:
        path = list(left)[int(rng.integers(len(left)))]
        order.append((path, int(left[path].pop())))
    return order


def load_inferred(path: Path) -> ir.Model:
    """The model with the types and shapes that can be inferred: some kinds look for places by them."""
    from graphopt.shapes import infer_shapes

    model = ir.load(path)
    infer_shapes(model)
    return model


def run_site(kind: str, site: Site, mutant: Path) -> Mutant | None:
    """Put a fault there, and give it to verification. None where the mutant does not load and run."""
    from graphopt import verify
    from graphopt.errors import GraphoptError

    path, number = site
    fault = _make_mutant(path, mutant, kind, number)
    if not _runs(mutant, path):
        return None
    start = time.perf_counter()
    try:
        report = verify(path, mutant)
        outcome, how = "survived" if report.passed else "killed", report.reason
    except GraphoptError as error:
        outcome, how = "killed", first_line(error)
    seconds = time.perf_counter() - start
    if outcome == "survived":
        same, how = explain(path, mutant)
        outcome = "equivalent" if same else outcome
    return Mutant(kind, path.stem, fault, outcome, how.replace(f"{mutant.parent}/", ""), seconds)


def run_sites(order: dict[str, list[Site]], places: int, folder: Path) -> tuple[list[Mutant], list[str]]:
    """Go through the sites, as many of each kind, until ``places`` mutants count or there are no sites left.

    A kind that runs out leaves its share to the others.

    Returns:
        The mutants, those set aside included, and what died.
    """
    quota = dict.fromkeys(order, places // len(order))
    counted = dict.fromkeys(order, 0)
    left = {kind: list(reversed(sites)) for kind, sites in order.items()}
    mutants: list[Mutant] = []
    died: list[str] = []
    while (missing := places - sum(counted.values())) > 0 and any(left.values()):
        if all(counted[kind] >= quota[kind] or not left[kind] for kind in order):
            open_ = itertools.cycle([kind for kind in order if left[kind]])
            for kind in itertools.islice(open_, missing):
                quota[kind] += 1
        batch = [
            (kind, left[kind].pop()) for kind in order for _ in range(min(quota[kind] - counted[kind], len(left[kind])))
        ]

        def task(index: int, _: Path, batch: Sequence[tuple[str, Site]] = batch) -> Mutant | None:
            kind, site = batch[index]
            # Beside the original: external weights are found relative to the file.
            mutant = site[0].with_name(f"mutant-{index}.onnx")
            try:
                return run_site(kind, site, mutant)
            finally:
                mutant.unlink(missing_ok=True)

        for index, result in sorted(Pool[Mutant | None](task, len(batch), timeout=300).results(), key=lambda r: r[0]):
            if isinstance(result, Died):
                kind, (path, number) = batch[index]
                died.append(f"{kind} {number} of {path.stem}: {result.kind}: {result.detail}")
            elif result is not None:
                mutants.append(result)
                counted[result.kind] += result.outcome != "equivalent"
    return mutants, died


def _make_mutant(path: Path, out: Path, kind: str, site: int) -> str:
    model = load_inferred(path)
    fault = next(itertools.islice(KINDS[kind](model), site, None))()
    ir.save(model, out)
    return fault


def _runs(mutant: Path, original: Path) -> bool:
    from graphopt.runtime.session import create_session, run

    try:
        feeds = _feeds(original, 1, 0)[0]
        run(create_session(mutant, optimized=False, threads=1), feeds)
    except Exception:
        return False
    return True


def _feeds(path: Path, cases: int, seed: int) -> list[dict[str, Any]]:
    from graphopt.feeds import feeds_that_run
    from graphopt.runtime.session import create_session, run

    session = create_session(path, optimized=False, threads=1)
    return feeds_that_run(ir.load(path), partial(run, session), cases=cases, seed=seed)


def _stretch(case: dict[str, Any]) -> dict[str, Any]:
    def larger(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            return value * value.dtype.type(100)
        return value

    return {name: larger(value) for name, value in case.items()}


def explain(original: Path, mutant: Path) -> tuple[bool, str]:
    """What a mutant that verification passed does on further inputs: nothing (True), rounding, or more; in words."""
    from graphopt.errors import GraphoptError
    from graphopt.runtime.session import create_session, run
    from graphopt.verification.tolerance import distance, eps_of, is_float, same_bits

    before, after = (create_session(path, optimized=False, threads=1) for path in (original, mutant))
    feeds = [_stretch(case) if i % 4 == 3 else case for i, case in enumerate(_feeds(original, FURTHER_INPUTS, 1))]
    worst, exact = 0.0, True
    apart: list[dict[str, Any]] = []
    for case in feeds:
        wanted = run(before, case)
        try:
            found = run(after, case)
        except GraphoptError as error:
            return False, f"MISSED, fails on a further input: {first_line(error)}"
        largest = 0.0
        for a, b in zip(wanted.values(), found.values(), strict=True):
            for x, y in zip(*(v if isinstance(v, list) else [v] for v in (a, b)), strict=True):
                if not same_bits(x, y):
                    exact = False
                    # Relative to the largest magnitude, in eps of the dtype; anything else than a float is exact.
                    largest = max(largest, distance(y, x).max_rel / eps_of(x.dtype) if is_float(x) else np.inf)
        worst = max(worst, largest)
        if largest > ROUNDING:
            apart.append(case)
    if exact:
        return True, f"the same bits on {len(feeds)} further inputs"
    verdict = "MISSED"
    if not apart:
        verdict = "harmless: rounding"
    elif _same_by_definition(original, mutant, apart):
        verdict = "harmless: the same bits operator by operator, which the runtime rounds elsewhere"
    far = f"at most {worst:.3g} eps apart" if np.isfinite(worst) else "one overflows where the other does not"
    return False, f"{verdict}; on {len(feeds)} further inputs {far}"


def _same_by_definition(original: Path, mutant: Path, cases: Sequence[dict[str, Any]]) -> bool:
    """Whether two models give the same bits operator by operator, each rounding to its own dtype.

    ONNX Runtime's CPU computes chains of float16 operators in float32; where a chain ends changes what it gives.
    """
    from onnx.reference import ReferenceEvaluator

    from graphopt.verification.tolerance import same_bits

    before, after = ReferenceEvaluator(str(original)), ReferenceEvaluator(str(mutant))
    with np.errstate(all="ignore"):
        for case in cases:
            try:
                results = before.run(None, case), after.run(None, case)
            except Exception:  # whatever it cannot run
                return False
            if not all(same_bits(np.asarray(a), np.asarray(b)) for a, b in zip(*results, strict=True)):
                return False
    return True


def main() -> int:
    """Run, print, record. Exit code 1 where a survivor is not harmless or too few mutants were killed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--places", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    with work_folder() as folder:
        networks = write_networks(folder)
        order = {kind: draw_sites(networks, kind, options.seed) for kind in KINDS}
        mutants, died = run_sites(order, options.places, folder)
    seconds = time.perf_counter() - start
    counts = count_outcomes(mutants, KINDS)
    print_table(
        ["kind", *((heading, "right") for heading in ("killed", "survived", "set aside as equivalent"))],
        [[kind, *(found[outcome] for outcome in OUTCOMES)] for kind, found in counts.items()],
        f"{kill_rate(counts):.1%} killed; {len(networks)} networks, seed {options.seed}, {seconds:.0f} s",
    )
    print_left(mutants, lambda mutant: f"{mutant.network} · {mutant.fault}")
    print(*died, sep="\n")
    if options.places == parser.get_default("places"):
        write_result(
            "mutations",
            {
                "seed": options.seed,
                "networks": [path.stem for path in networks],
                **to_json(mutants, counts),
                "died": died,
                "seconds": round(seconds),
            },
        )
    return int(bool(died) or not mutants or any("MISSED" in mutant.how for mutant in mutants))


if __name__ == "__main__":
    raise SystemExit(main())
