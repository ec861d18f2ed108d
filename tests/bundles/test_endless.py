"""Bundles whose loops have no end: the host's own, where Python goes on and on, and those in blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import graphs
from graphopt.bundles import Split, split, write_bundle
from graphopt.bundles.plan import Loop, walk
from graphopt.bundles.rehearsal import rehearse
from graphopt.bundles.running import BundleRunner
from graphopt.bundles.sending import Rehearsal
from graphopt.runtime import ending
from graphopt.runtime.ending import Endless, Limit, limit_of, under
from graphopt.shapes import infer_shapes
from graphopt.verification.whole import make_reference
from tests.models.endless import BARE, IF_POSITIVE, INNER, NEVER, endless

DOWN = {"x": np.array([-0.5, 0.25], np.float32)}
UP = {"x": np.array([0.5, 0.25], np.float32)}
WORDS = NEVER.replace("(float[2] x)", "(float[2] x, string word)").replace(
    "=> (float[2] y) {", "=> (float[2] y, string z) { z = Identity (word)", 1
)
"""As `NEVER`, with a string, for which the host takes numpy arrays."""


def network(text: str) -> ir.Model:
    made = ir.from_proto(endless(text))
    graphs.name_control_flow(made)
    infer_shapes(made)
    return made


def bundle_of(
    text: str,
    folder: Path,
    *,
    keep: Callable[[ir.Node], bool] = lambda node: False,
    spoil: Callable[[Split], object] = lambda parts: None,
) -> Path:
    parts = split(network(text), keep=keep)
    spoil(parts)
    write_bundle(parts, folder)
    return folder


def watched(bundle: Path) -> Rehearsal:
    return Rehearsal(bundle, optimized=False)


def deployed(bundle: Path) -> BundleRunner:
    return BundleRunner(bundle, 1)


@pytest.mark.parametrize("runner", [watched, deployed])
@pytest.mark.parametrize(
    ("text", "feeds", "named"),
    [
        (NEVER, DOWN, "'spin'"),
        (INNER, DOWN, "'outer', 'inner'"),
        (BARE, {**DOWN, "go": np.array(True)}, "'still'"),
        (WORDS, {**DOWN, "word": np.array("yes", object)}, "'spin'"),
    ],
)
def test_a_loop_of_the_host_is_ended(
    text: str, feeds: dict[str, Any], named: str, runner: Callable[[Path], Any], tmp_path: Path
) -> None:
    made = runner(bundle_of(text, tmp_path / "b"))
    with pytest.raises(Endless) as error, under(Limit([], True, 0.1)):
        made.run(feeds)
    # What runs a block without being watched does not tell where it is.
    assert named in error.value.what or (runner is deployed and "in a loop" in error.value.what)


@pytest.mark.parametrize("runner", [watched, deployed])
@pytest.mark.parametrize("kept", [False, True])
def test_it_runs_on_other_inputs_afterwards(runner: Callable[[Path], Any], kept: bool, tmp_path: Path) -> None:
    made = runner(bundle_of(IF_POSITIVE, tmp_path / "b", keep=lambda node: kept))
    with under(Limit([], True, 0.1)):
        with pytest.raises(Endless):
            made.run(DOWN)
        np.testing.assert_allclose(made.run(UP)["y"], np.tanh(UP["x"]), rtol=1e-6)
    np.testing.assert_allclose(made.run(UP)["y"], np.tanh(UP["x"]), rtol=1e-6)


def test_a_bundle_that_goes_on_where_its_network_ends_is_not_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_and_on(parts: Split) -> None:
        for step in walk(parts.plan.steps):
            if isinstance(step, Loop):
                step.again = None

    monkeypatch.setattr(ending, "PATIENCE", 0.1)
    model = network(IF_POSITIVE)
    with under(limit_of(model, made_up=True)):
        reference = make_reference(model, [dict(UP)])
    bundle = bundle_of(IF_POSITIVE, tmp_path / "b", spoil=on_and_on)
    found = rehearse(reference, lambda: network(IF_POSITIVE), bundle, bitwise=True)
    assert found.differences[0].startswith("the bundle fails: no end after 0.")
    assert found.differences[0].endswith("in loop 'climb'")  # the network ended: no blame on the inputs
