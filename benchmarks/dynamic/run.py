"""The nine families that DyCL evaluated: every path against eager torch, and the time beside it.

    python -m benchmarks.dynamic [--seconds S] [--small] [FAMILY ...]

Three contenders in one process, one thread, interleaved image by image: eager torch, the ONNX with If and Loop by
recipe ``safe``, and the bundle by recipe ``static``, both on ONNX Runtime. Processor time is what is judged, since
other work on the machine does not add to it; wall time is recorded beside. With names, the rows of the other families
stay as they were recorded. ``--small`` tries the program on small variants and records nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import graphopt
from benchmarks.common import RESULTS, print_table, work_folder, write_result
from benchmarks.dynamic.families import FAMILIES, Family
from benchmarks.dynamic.making import make
from benchmarks.dynamic.paths import forced_difference, natural_difference, shares
from benchmarks.dynamic.seeding import calibration
from benchmarks.dynamic.tables import HEADINGS, row, worst_difference
from benchmarks.dynamic.timing import time_all
from graphopt.cli.output import to_plain

NAME = "dynamic"
ALLOWED = 1e-4  # of difference to eager
LEAST_SHARE = 0.1
LEAST_SPEED = 0.97  # times that of the unsplit network, the interval's lower end


def measure(family: Family, folder: Path, seconds: float, *, small: bool = False) -> dict[str, Any]:
    """Make, compare and time one family."""
    torch.set_num_threads(1)
    network = family.network(small=small)
    forced = make(network, folder / "forced", forced=True)
    files = {"unsplit": forced.unsplit, "bundle": forced.bundle, "split": forced.split}
    paths, differences = forced_difference(network, _load(files))
    own = make(network, folder / "own")
    files = {"unsplit": own.unsplit, "bundle": own.bundle}
    natural = natural_difference(network, _load(files))
    return {
        "title": family.title,
        "dycl": family.dycl,
        "decisions": len(network.thresholds),
        "images": len(calibration(network)),
        "shares": shares(network),
        "paths": paths,
        "differences": differences,
        "own_differences": natural,
        **{key: value for key, value in asdict(own).items() if not isinstance(value, Path)},
        **time_all(network, files, seconds),
    }


def _load(files: Mapping[str, Path]) -> dict[str, Any]:
    return {name: graphopt.load(path, threads=1) for name, path in files.items()}


def faults(found: Mapping[str, Any]) -> list[str]:
    """What of a family is not as it should be."""
    worst = worst_difference(found)
    slowest = found["cpu"]["bundle_over_unsplit"]["low"]
    return [
        *([f"{worst:.1e} from eager"] if not worst <= ALLOWED else []),
        *([f"a path has {min(found['shares']):.0%} of the images"] if min(found["shares"]) < LEAST_SHARE else []),
        *([f"{slowest:.3f} of the unsplit network's speed"] if slowest < LEAST_SPEED else []),
    ]


def main() -> int:
    """Measure, print, record; exit code 1 where a family is not as it should be."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("families", nargs="*", choices=[[], *(family.name for family in FAMILIES)], metavar="FAMILY")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing, each family")
    parser.add_argument("--small", action="store_true", help="small variants; nothing is recorded")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for family in FAMILIES:
        if not options.families or family.name in options.families:
            with work_folder() as folder:
                found[family.name] = to_plain(measure(family, folder, options.seconds, small=options.small))
            print(f"{family.title}: {', '.join(faults(found[family.name])) or 'as it should be'}", flush=True)
    recorded = RESULTS / f"{NAME}.json"
    if options.families and not options.small and recorded.exists():
        found = {**json.loads(recorded.read_text())["families"], **found}
    found = {family.name: found[family.name] for family in FAMILIES if family.name in found}
    print_table([HEADINGS[0], *((name, "right") for name in HEADINGS[1:])], [row(one) for one in found.values()], NAME)
    if not options.small:
        write_result(NAME, {"seconds": options.seconds, "allowed": ALLOWED, "families": found})
    return int(any(map(faults, found.values())))


if __name__ == "__main__":
    raise SystemExit(main())
