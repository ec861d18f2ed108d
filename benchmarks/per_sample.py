"""Early exits for each sample of a batch: what a bundle takes beside the work that is needed.

    python -m benchmarks.per_sample [--seconds S]

A batch of 32 images of which as many leave at each exit. The work is the sum, over the runs of blocks in the bundle, of
the time that the block takes on the rows that are there, called by itself with what it read in the bundle. What the
bundle takes beyond that is asking conditions, gathering rows and putting them together. Beside it stand the same
network with an If that leaves when all images may (all or none), and the network on one image at a time. One process,
one thread, interleaved rounds.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import graphopt
from benchmarks.common import print_table, work_folder, write_result
from benchmarks.dynamic.families import FAMILIES
from benchmarks.dynamic.images import pictures
from benchmarks.dynamic.models.dynamic import example
from graphopt import graphs
from graphopt.benchmarking import ratio_interval
from graphopt.benchmarking.timing import Samples, time_block
from graphopt.bundles.folder import read_bundle
from graphopt.bundles.host import Program
from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.rows import SAMPLES
from graphopt.bundles.samples import for_samples
from graphopt.files import load_model
from graphopt.runtime.session import create_session, run

BATCH = 32
BAR = 1.25
POOL = 512
SIZES: dict[str, dict[str, Any]] = {
    "mobilenet": {"size": 64, "width": 1 / 2, "classes": 10},
    "vgg": {"size": 64, "width": 1 / 2, "classes": 10},
    "resnet": {"size": 64, "classes": 10},
    "wideresnet": {"size": 64, "width": 1 / 2, "classes": 10},
}
"""Shallow-Deep networks of `benchmarks.dynamic`, smaller than DyCL's: 32 images at once take as many times as long."""


class Exits:
    """A course that notes which way each sample goes."""

    def __init__(self) -> None:
        self.ways: dict[int, tuple[bool, ...]] = {}

    def branch(self, name: str, truth: bool) -> bool:
        """Of a bundle whose samples go together."""
        return truth

    def branch_of(self, name: str, sample: int, truth: bool) -> bool:
        """Notes where a sample goes."""
        self.ways[sample] = (*self.ways.get(sample, ()), truth)
        return truth

    def turn(self, name: str, number: int, truth: bool) -> bool:
        """There are no loops."""
        return truth

    def turn_of(self, name: str, sample: int, number: int, truth: bool) -> bool:
        """There are no loops."""
        return truth

    def run(self, block: str, makes: Sequence[str]) -> None:
        """Not asked for."""


class Noting(OrtBackend):
    """Keeps what each run of a block read."""

    def __init__(self, session: Callable[[str], Any]) -> None:
        super().__init__(session)
        self.noted: list[tuple[str, dict[str, Any], list[str]]] = []

    def action(self, calls: Sequence[Any]) -> Any:
        """A step at a time, noted before it runs."""
        made = [(call, OrtBackend.action(self, [call])) for call in calls]

        def act(places: list[Any]) -> None:
            for call, action in made:
                reads = {name: places[at] for name, at in call.reads.items()}
                self.noted.append((call.block, reads, list(call.makes)))
                action(places)

        return act


def all_or_none(model: ir.Model) -> ir.Model:
    """A network for many samples whose Ifs go to ``then`` where all samples would: what an If can do."""
    many = for_samples(model)
    for node in list(graphs.all_nodes(many)):
        if node.op_type == "If" and SAMPLES in node.metadata_props:
            number = ir.node("Cast", [node.inputs[0]], {"to": ir.DataType.INT32})
            least = ir.node("ReduceMin", number.outputs, {"keepdims": 0})
            truth = ir.node("Cast", least.outputs, {"to": ir.DataType.BOOL})
            for place, made in enumerate((number, least, truth)):
                made.outputs[0].name = f"{node.name}/all_{place}"
            assert node.graph is not None
            node.graph.insert_before(node, [number, least, truth])
            node.replace_input_with(0, truth.outputs[0])
    return many


def spread(program: Program, backend: OrtBackend, course: Exits, size: int) -> tuple[np.ndarray[Any, Any], list[int]]:
    """A batch of which as many images leave at each exit, and how many do: pictures drawn until there are enough."""
    images = pictures(POOL, size).numpy()
    groups: dict[tuple[bool, ...], list[int]] = {}
    for first in range(0, POOL, BATCH):
        course.ways = {}
        program.run({"image": backend.value(images[first : first + BATCH])})
        for sample, way in course.ways.items():
            groups.setdefault(way, []).append(first + sample)
    ways = sorted(groups, key=len)
    chosen: dict[tuple[bool, ...], list[int]] = {way: [] for way in ways}
    turn = 0
    while sum(map(len, chosen.values())) < BATCH:
        way = ways[turn % len(ways)]
        if groups[way]:
            chosen[way].append(groups[way].pop())
        turn += 1
    order = np.random.default_rng(0).permutation([sample for group in chosen.values() for sample in group])
    return images[order], [len(group) for group in chosen.values()]


def sessions_of(bundle: Path) -> Callable[[str], Any]:
    version, plan = read_bundle(bundle)
    known: dict[str, Any] = {}

    def session(name: str) -> Any:
        if name not in known:
            known[name] = create_session(version / plan.blocks[name].file, optimized=True, threads=1)
        return known[name]

    return session


def one_family(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Export, optimize, time."""
    network = _network(name)
    exported, unsplit, bundle = (folder / part for part in ("exported.onnx", "unsplit.onnx", "per_sample.bundle"))
    graphopt.export(lambda: example(network), exported)
    graphopt.optimize(exported, unsplit, verify=False)
    graphopt.optimize(exported, bundle, recipe=["static"], per_sample=True, verify=False)
    plan, session = read_bundle(bundle)[1], sessions_of(bundle)
    course = Exits()
    watched = OrtBackend(session)
    images, leaving = spread(Program(plan, watched, course), watched, course, network.size)

    noting = Noting(session)
    Program(plan, noting).run({"image": noting.value(images)})
    backend = OrtBackend(session)
    program, value = Program(plan, backend), backend.value(images)
    stages = [(session(block)._sess.run_with_ort_values, reads, makes) for block, reads, makes in noting.noted]
    whole = create_session(ir.to_proto(all_or_none(load_model(unsplit))).SerializeToString(), optimized=True, threads=1)
    single = create_session(unsplit, optimized=True, threads=1)
    one_image = [backend.value(images[index : index + 1]) for index in range(BATCH)]
    output = plan.outputs[0].name

    def work() -> None:
        for call, reads, makes in stages:
            call(reads, makes, None)

    calls: dict[str, Callable[[], object]] = {
        "per sample": lambda: program.run({"image": value}),
        "work": work,
        "all or none": lambda: whole._sess.run_with_ort_values({"image": value}, [output], None),
        "one at a time": lambda: [single._sess.run_with_ort_values({"image": v}, [output], None) for v in one_image],
    }
    mine = backend.array(program.run({"image": value})[output])
    theirs = np.concatenate([run(single, {"image": images[index : index + 1]})[output] for index in range(BATCH)])
    samples = {kind: Samples() for kind in calls}
    rng = np.random.default_rng(0)
    time_block([*calls.values()], [*samples.values()], 0, rng, seconds, 10, lambda *_: None, seconds)
    return {
        "family": next(family.title for family in FAMILIES if family.name == name),
        "size": network.size,
        "leaving": leaving,
        "rows": [int(_rows(reads)) for _, reads, _ in stages],
        "max_abs": float(np.abs(mine - theirs).max()),
        "largest": float(np.abs(theirs).max()),
        "ms": {kind: 1e3 * float(np.median(taken.wall)) for kind, taken in samples.items()},
        "cpu_ms": {kind: 1e3 * float(np.median(taken.cpu)) for kind, taken in samples.items()},
        "ratio": {
            "wall": _interval(samples["per sample"].wall, samples["work"].wall),
            "cpu": _interval(samples["per sample"].cpu, samples["work"].cpu),
        },
        "speedup": {
            kind: _interval(samples[kind].wall, samples["per sample"].wall) for kind in ("all or none", "one at a time")
        },
    }


def _network(name: str) -> Any:
    return importlib.import_module(f"benchmarks.dynamic.models.{name}").network(**SIZES[name])


def _rows(reads: Mapping[str, Any]) -> int:
    return max((value.shape()[0] for value in reads.values() if value.shape()), default=0)


def _interval(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    found = ratio_interval(above, below)
    return {"value": found.value, "low": found.low, "high": found.high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing for each network")
    parser.add_argument("--only", choices=sorted(SIZES), action="append", help="which networks; default: all")
    given = parser.parse_args()
    found = []
    for name in given.only or SIZES:
        with work_folder() as folder:
            found.append(one_family(name, folder, given.seconds))
        print_table(
            ["", ("ms", "right"), ("CPU ms", "right")],
            [(kind, f"{ms:.1f}", f"{found[-1]['cpu_ms'][kind]:.1f}") for kind, ms in found[-1]["ms"].items()],
            found[-1]["family"],
        )
    if not given.only:
        write_result("per_sample", {"batch": BATCH, "bar": BAR, "families": found})


if __name__ == "__main__":
    main()
