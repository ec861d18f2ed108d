"""``graphopt inspect`` on a bundle, ``graphopt bundle merge``, and bundles in ``graphopt bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt.bundles import read_bundle, split, write_bundle
from graphopt.bundles.contents import bundle_bytes, bundle_contents
from graphopt.cli.main import main
from graphopt.errors import GraphoptError
from graphopt.files import save_model
from tests.models.text import model_from_text

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[n, 64] x, bool c) => (float[n, 64] y) <float[64, 64] w> {
    a = MatMul (x, w)
    y = If (c) <
        then_branch = t () => (float[n, 64] p) { m = MatMul (a, w) p = Tanh (m) },
        else_branch = e () => (float[n, 64] q) { q = Neg (a) }
    >
}
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(split(model_from_text(TEXT)), tmp_path / "net.bundle")
    return tmp_path / "net.bundle"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    file = tmp_path / "inputs.npz"
    np.savez(file, x=rng.standard_normal((4, 1, 64)).astype(np.float32), c=np.array([True, False, False, False]))
    return file


def test_inspect_draws_the_plan(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    said = capsys.readouterr().out
    assert "run block_1: x -> a" in said and "if c:" in said and "else:" in said
    assert "16.4 kB of them read by several blocks" in said
    assert "ran" not in said.split()
    assert all(len(line) <= 100 for line in said.splitlines())


def test_inspect_counts_on_inputs_of_ones_own(bundle: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle), "--calibration", str(inputs)]) == 0
    said = capsys.readouterr().out
    assert "4 inputs" in said and "1 of 4 (25%)" in said and "3 of 4 (75%)" in said


def test_inspect_shows_the_profile_of_a_bundle(bundle: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle), "--calibration", str(inputs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["profile"]["branches"] == {"If of y": {"then": 1, "otherwise": 3}}
    version, plan = read_bundle(bundle)
    (version / "profile.json").write_text(json.dumps(found["profile"]))
    assert main(["inspect", str(bundle)]) == 0
    assert "1 of 4 (25%)" in capsys.readouterr().out
    assert found["plan"]["steps"] == json.loads(plan.to_json())["steps"]
    assert found["blocks"]["block_1"] == {
        "file": "block_1.onnx",
        "nodes": 1,
        "bytes": (version / "block_1.onnx").stat().st_size + 64 * 64 * 4,
        "used": 1,
        "control_flow": {},
    }


def test_the_bytes_of_a_bundle(bundle: Path) -> None:
    found = bundle_contents(bundle)
    assert found.shared_bytes == 64 * 64 * 4
    assert (
        found.bytes
        == bundle_bytes(bundle)
        == sum(one.bytes for one in found.blocks)
        - found.shared_bytes
        + (read_bundle(bundle)[0] / "plan.json").stat().st_size
        + _padding(bundle)
    )


def _padding(bundle: Path) -> int:
    (data,) = read_bundle(bundle)[0].glob("*.data")
    return data.stat().st_size - 64 * 64 * 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "BUNDLE", "--channels"], "--channels is for .onnx files"),
        (["inspect", "MODEL", "--calibration", "INPUTS"], "--calibration is for bundles"),
        (["inspect", "EMPTY"], "is a folder"),
        (["inspect", "BUNDLE", "--calibration", "MODEL"], "MODEL"),
        (["bundle", "merge", "EMPTY", "-o", "OUT.onnx"], "is no bundle"),
        (["bundle", "merge", "BUNDLE", "-o", "OUT"], "is no name of an .onnx file"),
        (["bundle", "merge", "BUNDLE"], "Missing option"),
        (["bundle", "split", "BUNDLE"], "No such command"),
        (["bench", "EMPTY"], ""),
    ],
)
def test_what_is_refused_in_one_line(
    arguments: list[str], said: str, bundle: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(model_from_text(TEXT), tmp_path / "net.onnx")
    (tmp_path / "empty").mkdir()
    places = {"BUNDLE": bundle, "INPUTS": inputs, "MODEL": tmp_path / "net.onnx", "EMPTY": tmp_path / "empty"}
    outs = {"OUT": tmp_path / "out", "OUT.onnx": tmp_path / "out.onnx"}
    words = [str({**places, **outs}.get(word, word)) for word in arguments]
    assert main(words) == 2
    told = capsys.readouterr()
    assert not told.out and len(told.err.splitlines()) == 1
    assert str(places.get(said, said)) in told.err
    assert not (tmp_path / "out.onnx").exists()


def test_merge_writes_a_network_that_computes_the_same(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "whole.onnx"
    assert main(["bundle", "merge", str(bundle), "-o", str(out)]) == 0
    assert "the same bits on" in " ".join(capsys.readouterr().out.split())
    for c in (True, False):
        feeds = {"x": np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32), "c": np.array(c)}
        ours, theirs = graphopt.load(out).run(feeds), graphopt.load(bundle).run(feeds)
        np.testing.assert_allclose(ours["y"], theirs["y"], rtol=1e-6)
    assert main(["bundle", "merge", str(bundle), "-o", str(out), "--json", "--no-verify"]) == 0
    assert json.loads(capsys.readouterr().out)["verification"] is None


def test_merge_writes_nothing_that_computes_something_else(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same plan with the sides of its branch exchanged: only a run shows it."""
    import graphopt.bundles.merge as merging
    from graphopt.bundles.plan import Branch, Plan

    whole = merging.merge

    def wrong(plan: Plan, blocks: Any, **how: Any) -> Any:
        changed = plan.model_copy(deep=True)
        (branch,) = (step for step in changed.steps if isinstance(step, Branch))
        branch.then, branch.otherwise = branch.otherwise, branch.then
        branch.gives = {name: (other, one) for name, (one, other) in branch.gives.items()}
        return whole(changed, blocks, **how)

    monkeypatch.setattr(merging, "merge", wrong)
    before = sorted(tmp_path.iterdir())
    assert main(["bundle", "merge", str(bundle), "-o", str(tmp_path / "whole.onnx")]) == 1
    assert "does not compute what the bundle does" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_bench_takes_bundles(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(model_from_text(TEXT), tmp_path / "net.onnx")
    assert main(["bench", str(tmp_path / "net.onnx"), str(bundle), "--seconds", "0.2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, own = found["models"]
    assert own["max_abs_difference"] <= 1e-5 and own["peak_bytes"] > 0 and own["file_bytes"] == bundle_bytes(bundle)
    assert own["path"].endswith("net.bundle") and model["speedup"]["value"] == 1
    assert any(name.startswith("onnxruntime") for name in found["environment"])


def test_bench_makes_inputs_up_for_a_bundle_alone(bundle: Path) -> None:
    result = graphopt.bench([bundle, bundle], seconds=0.1, threads=2)
    assert result.timed_on["c"] == "bool[]" and result.models[1].max_abs_difference == 0


def test_a_bundle_that_fails_fails_the_benchmark(bundle: Path) -> None:
    version, plan = read_bundle(bundle)
    (version / plan.blocks["block_1"].file).write_bytes(b"no network")
    with pytest.raises(GraphoptError, match="block_1"):
        graphopt.bench([bundle], seconds=0.1)
