"""The nine dynamic families, small: every path as eager torch takes it, through export, `safe` and `static`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")

import torch

from benchmarks.dynamic import run, tables
from benchmarks.dynamic.families import FAMILIES, Family
from benchmarks.dynamic.making import Made, make
from benchmarks.dynamic.models.dynamic import Dynamic, Exits
from benchmarks.dynamic.paths import forced_difference, natural_difference, shares
from benchmarks.dynamic.seeding import asked, calibration
from benchmarks.dynamic.timing import time_all
from graphopt.bundles.folder import read_bundle
from graphopt.bundles.split import SPLIT
from graphopt.files.load import load_model
from graphopt.graphs import all_nodes
from graphopt.runtime.loading import load

QUICK = ("vgg", "blockdrop")  # an export takes seconds
EAGER = (*QUICK, "mobilenet", "resnet", "wideresnet", "captioner_resnext")


def each(quick: tuple[str, ...]) -> Any:
    return pytest.mark.parametrize(
        "family",
        [pytest.param(one, marks=() if one.name in quick else pytest.mark.slow, id=one.name) for one in FAMILIES],
    )


Make = Callable[[Family], tuple[Dynamic, Made]]


@pytest.fixture(scope="module")
def forced(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a family's small network and its files, with thresholds as an input; each once."""
    known: dict[str, tuple[Dynamic, Made]] = {}

    def one(family: Family) -> tuple[Dynamic, Made]:
        if family.name not in known:
            network = family.network(small=True)
            folder = tmp_path_factory.mktemp(family.name) / "forced"
            known[family.name] = network, make(network, folder, forced=True)
        return known[family.name]

    return one


@each(QUICK)
def test_every_path_is_that_of_eager_torch(family: Family, forced: Make) -> None:
    network, made = forced(family)
    files = {"unsplit": made.unsplit, "bundle": made.bundle, "split": made.split}
    paths, differences = forced_difference(network, {name: load(path) for name, path in files.items()})
    assert paths >= len(network.thresholds) + 1
    assert max(differences.values()) <= run.ALLOWED, differences


@each(QUICK)
def test_the_files_are_what_they_are_called(family: Family, forced: Make) -> None:
    network, made = forced(family)
    found = [node.op_type for node in all_nodes(load_model(made.unsplit))]
    # A captioner's steps are turns of one loop; nothing is unrolled.
    decisions = 1 if family.name.startswith("captioner") else len(network.thresholds)
    assert found.count("If") + found.count("Loop") == decisions
    version, plan = read_bundle(made.split)
    assert len(plan.blocks) == made.blocks_split >= made.blocks
    left = {node.op_type for block in plan.blocks.values() for node in onnx.load(version / block.file).graph.node}
    assert left.isdisjoint(SPLIT)


@each(EAGER)
def test_each_path_gives_something_else(family: Family) -> None:
    """Otherwise a wrong path would go unnoticed."""
    network = family.network(small=True)
    image = calibration(network)[:1]
    with torch.inference_mode():
        given = [network(image, thresholds).numpy() for thresholds in network.paths()]
    if family.name.startswith("captioner"):
        # The last two stop after the same step: at <end>, and at another word because it is the last one.
        assert [words.shape[1] for words in given] == [*range(2, 12), 11]
    for place, one in enumerate(given):
        assert not any(one.shape == other.shape and np.allclose(one, other, atol=1e-3) for other in given[:place])


@each(EAGER)
def test_every_path_is_taken_by_a_tenth_of_the_images(family: Family) -> None:
    network = family.network(small=True)
    found = shares(network)
    assert min(found) >= run.LEAST_SHARE
    if isinstance(network, Exits):
        assert sum(found) == pytest.approx(1)
    again = family.network(small=True)
    assert all(torch.equal(one, other) for one, other in zip(*map(_tensors, (network, again)), strict=True))


def _tensors(network: Dynamic) -> list[torch.Tensor]:
    return list(network.state_dict().values())


def test_what_decides_is_what_the_path_follows_from() -> None:
    (vgg,) = (family for family in FAMILIES if family.name == "vgg")
    network = vgg.network(small=True)
    image = calibration(network)[:1]
    values = asked(network, image, network.paths()[-1])
    assert len(values) == len(network.thresholds)
    for exit in range(len(values)):
        just = torch.full_like(values, 2)
        just[exit] = values[exit]
        assert len(asked(network, image, just)) == exit + 1, "a number that reaches its threshold is enough"
        just[exit] += 1e-3
        assert len(asked(network, image, just)) == len(values)


def test_a_branch_the_wrong_way_round_is_noticed(forced: Make, tmp_path: Path) -> None:
    (blockdrop,) = (family for family in FAMILIES if family.name == "blockdrop")
    network, made = forced(blockdrop)
    model = onnx.load(made.unsplit)
    branches = [node for node in model.graph.node if node.op_type == "If"]
    first, second = branches[len(branches) // 2].attribute
    first.name, second.name = second.name, first.name
    onnx.save(model, tmp_path / "wrong.onnx")
    _, differences = forced_difference(network, {"wrong": load(tmp_path / "wrong.onnx")})
    assert differences["wrong"] > run.ALLOWED


@pytest.mark.slow
@each(())
def test_the_own_thresholds_stay_inside(family: Family, tmp_path: Path) -> None:
    network = family.network(small=True)
    made = make(network, tmp_path / "own", verify=True)
    files = {"unsplit": made.unsplit, "bundle": made.bundle}
    assert [spec.name for spec in load(made.bundle).inputs] == ["image"]
    differences = natural_difference(network, {name: load(path) for name, path in files.items()})
    assert max(differences.values()) <= run.ALLOWED


@pytest.mark.slow
def test_timing_takes_the_paths_in_turn(forced: Make, tmp_path: Path) -> None:
    (captioner,) = (family for family in FAMILIES if family.name == "captioner_resnext")
    network = captioner.network(small=True)
    made = make(network, tmp_path / "own")
    timed = time_all(network, {"unsplit": made.unsplit, "bundle": made.bundle}, seconds=0)
    assert timed["rounds"] >= 16
    assert set(timed["cpu"]["ms"]) == {"eager", "unsplit", "bundle"}


RATIO = {"value": 1.0, "low": 0.98, "high": 1.02}
FOUND = {
    "title": "a network",
    "dycl": [2.0, 3.0],
    "paths": 7,
    "differences": {"bundle": 2e-6},
    "own_differences": {"bundle": 1e-6},
    "shares": [0.125, 0.5],
    "rounds": 12,
    "blocks": 4,
    "blocks_split": 9,
    "bundle_bytes": 2_000_000,
    "cpu": {"bundle_over_unsplit": RATIO, "bundle_over_eager": {"value": 12.34, "low": 12.0, "high": 13.0}},
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"differences": {"bundle": 2e-4}}, ["2.0e-04 from eager"]),
        ({"own_differences": {"bundle": float("nan")}}, ["nan from eager"]),
        ({"shares": [0.05, 0.5]}, ["a path has 5% of the images"]),
        ({"cpu": {**FOUND["cpu"], "bundle_over_unsplit": {**RATIO, "low": 0.96}}}, ["0.960 of the unsplit"]),
    ],
)
def test_faults_are_named(changed: dict[str, Any], said: list[str]) -> None:
    faults = run.faults({**FOUND, **changed})
    assert len(faults) == len(said)
    assert all(text in fault for text, fault in zip(said, faults, strict=True))


def test_rows_fit_a_page() -> None:
    for family in FAMILIES:
        lines = tables.dynamic({"allowed": 1e-4, "families": {"x": {**FOUND, "title": family.title}}}).splitlines()
        assert max(map(len, lines[2:])) <= 100
