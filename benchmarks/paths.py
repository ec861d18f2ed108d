"""Straight lines for the paths that images often take: when they pay, and what trying them takes.

    python -m benchmarks.paths [--small] [FAMILY ...]

Networks of `benchmarks.dynamic`, each with two sets of thresholds: its own, by which the images spread over all paths,
and others by which nine in ten of them take one path. `graphopt.optimize` is given the images as calibration data,
tries straight lines and times each against the bundle without it: one process, one thread, interleaved, by processor
time. What it found is recorded, and how long it took beside a run without the images. ``--small`` tries the program on
small variants and records nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

import graphopt
from benchmarks.common import work_folder, write_result
from benchmarks.dynamic.families import FAMILIES, Family
from benchmarks.dynamic.models.dynamic import FAR, Dynamic, Exits, example
from benchmarks.dynamic.seeding import asked, calibration
from benchmarks.dynamic_tables import paths
from graphopt.specialising import LEAST_GAIN

NAME = "paths"
MEASURED = ("skipnet_feedforward", "skipnet_recurrent", "blockdrop", "mobilenet")
USUAL = 0.9


def one_usual_path(network: Dynamic) -> None:
    """Let nine images in ten take one path, by other thresholds.

    Of gates each goes where it goes for the first image, but one in the middle, which lets a tenth go elsewhere. Of
    exits the first one is for a tenth, and the others for none.
    """
    images = calibration(network).split(1)
    if isinstance(network, Exits):
        values = torch.stack([asked(network, image, network.paths()[-1])[0] for image in images])
        network.thresholds.fill_(FAR)
        network.thresholds[0] = values.quantile(USUAL)
        return
    opened = asked(network, images[0], network.thresholds) > network.thresholds
    network.thresholds.copy_(torch.where(opened, -FAR, FAR))
    odd = len(opened) // 2
    values = torch.stack([asked(network, image, network.thresholds)[odd] for image in images])
    network.thresholds[odd] = values.quantile(1 - USUAL if opened[odd] else USUAL)


def measure(family: Family, folder: Path, *, usual: bool, small: bool) -> dict[str, Any]:
    """Optimize one network with its images and without."""
    torch.set_num_threads(1)
    network = family.network(small=small)
    if usual:
        one_usual_path(network)
    exported, bundle, data = folder / "net.onnx", folder / "net.bundle", folder / "images.npz"
    graphopt.export(lambda: example(network), exported)
    np.savez(data, image=calibration(network).numpy()[:, None])
    plain = graphopt.optimize(exported, bundle, recipe=["static"])
    found = graphopt.optimize(exported, bundle, recipe=["static"], calibration=data)
    assert found.bundle is not None
    return {
        "title": family.title,
        "usual": usual,
        "images": len(calibration(network)),
        "seconds": {"without images": plain.seconds, "with images": found.seconds},
        "trials": [trial.to_json() for trial in found.bundle.trials],
    }


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("families", nargs="*", choices=[[], *MEASURED], metavar="FAMILY")
    parser.add_argument("--small", action="store_true", help="small variants; nothing is recorded")
    options = parser.parse_args()
    found = []
    for family in FAMILIES:
        for usual in (False, True) if family.name in (options.families or MEASURED) else ():
            with work_folder() as folder:
                found.append(measure(family, folder, usual=usual, small=options.small))
            print(f"{family.title}: {found[-1]['seconds']['with images']:.0f} s", flush=True)
    print(paths({"networks": found}))
    if not (options.families or options.small):
        write_result(NAME, {"least_gain": LEAST_GAIN, "networks": found})


if __name__ == "__main__":
    main()
