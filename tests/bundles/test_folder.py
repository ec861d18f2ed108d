"""Bundles on disk: whole or not at all, the weights once, and loaded like models."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
import graphopt.bundles.folder as folder_module
from graphopt.bundles import BundleRunner, read_bundle, split, write_bundle
from graphopt.bundles.folder import open_bundle, stage_bundle
from graphopt.errors import BadInput, GraphoptError
from graphopt.files.folder import STAGING_SUFFIX
from graphopt.runtime.session import create_session, run
from tests.models.nests import Nest
from tests.models.text import model_from_text

MODEL = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[n, 32] x, bool c, int64 trips) => (float[n, 32] y, float[n, 32] same) <float[32, 32] w> {
    a = MatMul (x, w)
    b = If (c) <
        then_branch = t () => (float[n, 32] p) { p = MatMul (a, w) },
        else_branch = e () => (float[n, 32] q) { q = Neg (a) }
    >
    y = Loop (trips, , b) <body = l (int64 i, bool go, float[n, 32] s) => (bool again, float[n, 32] after) {
        again = Identity (go)
        after = Tanh (s)
    }>
    same = Identity (x)
}
"""


def model() -> ir.Model:
    made = model_from_text(MODEL)
    weight = made.graph.initializers["w"]
    weight.const_value = ir.tensor(np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32), name="w")
    return made


def feeds(c: bool, trips: int, rows: int = 2) -> dict[str, Any]:
    x = np.random.default_rng(rows).standard_normal((rows, 32)).astype(np.float32)
    return {"x": x, "c": np.array(c), "trips": np.array(trips, np.int64)}


def test_a_bundle_runs_like_its_network(tmp_path: Path) -> None:
    reference = create_session(ir.to_proto(model()).SerializeToString(), optimized=False)
    version = write_bundle(split(model()), tmp_path / "net")
    runner = graphopt.load(tmp_path / "net")
    assert isinstance(runner, BundleRunner)
    assert [item.name for item in runner.inputs] == ["x", "c", "trips"]
    assert [item.shape for item in runner.outputs] == [("n", 32), ("n", 32)]
    for c in (True, False):
        for trips in (0, 3):
            wanted, found = run(reference, feeds(c, trips)), runner.run(feeds(c, trips))
            for name in wanted:
                np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6)
    (data,) = version.glob("*.data")
    assert data.stat().st_size == 32 * 32 * 4  # both blocks that multiply by it
    assert sum(runner.runs.values()) == 2 * (2 + 2) + 2 * 3


def test_an_output_does_not_follow_the_callers_array(tmp_path: Path) -> None:
    write_bundle(split(model()), tmp_path / "net")
    given = feeds(True, 0)
    found = graphopt.load(tmp_path / "net").run(given)
    before = found["same"].copy()
    given["x"][:] = 7
    np.testing.assert_array_equal(found["same"], before)


def test_wrong_feeds_are_one_line(tmp_path: Path) -> None:
    write_bundle(split(model()), tmp_path / "net")
    with pytest.raises(BadInput, match="input 'x': expected float32"):
        graphopt.load(tmp_path / "net").run({**feeds(True, 1), "x": np.ones((2, 3), np.float32)})


def test_sequences_and_optionals_take_the_plain_way(tmp_path: Path) -> None:
    nest = Nest(5)
    write_bundle(split(ir.from_proto(nest.model)), tmp_path / "nest")
    reference = create_session(nest.model.SerializeToString(), optimized=False)
    runner = BundleRunner(tmp_path / "nest", optimized=False)
    for case in nest.feeds(3):
        wanted = run(reference, case)
        found = runner.run(case)
        assert all(np.array_equal(wanted[name], found[name], equal_nan=True) for name in wanted)


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    versions = [write_bundle(split(model()), tmp_path / name) for name in ("one", "two")]
    assert versions[0].name == versions[1].name
    files = [sorted(path.name for path in version.iterdir()) for version in versions]
    assert files[0] == files[1]
    for name in files[0]:
        assert (versions[0] / name).read_bytes() == (versions[1] / name).read_bytes()


def test_a_new_version_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    first = write_bundle(split(model()), tmp_path / "net")
    other = model()
    other.graph.initializers["w"].const_value = ir.tensor(np.eye(32, dtype=np.float32), name="w")
    second = write_bundle(split(other), tmp_path / "net")
    assert not first.exists() and second.exists()
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == sorted(["current", second.name])


def test_a_write_that_fails_leaves_the_bundle_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import graphopt.bundles.folder as folder

    write_bundle(split(model()), tmp_path / "net")
    before = {path: path.read_bytes() for path in (tmp_path / "net").rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise GraphoptError("cannot be written: no space left on device")

    monkeypatch.setattr(folder, "write_file", full)
    other = model()
    other.graph.initializers["w"].const_value = ir.tensor(np.eye(32, dtype=np.float32), name="w")
    with pytest.raises(GraphoptError, match="no space"):
        write_bundle(split(other), tmp_path / "net")
    assert {path: path.read_bytes() for path in (tmp_path / "net").rglob("*") if path.is_file()} == before


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(BadInput, match="is no bundle, and would be replaced"):
        write_bundle(split(model()), tmp_path / "mine")
    with pytest.raises(BadInput, match="is no bundle"):
        graphopt.load(tmp_path / "mine")
    with pytest.raises(BadInput, match="no such folder"):
        write_bundle(split(model()), tmp_path / "not" / "there")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: plan.pop("steps") and plan.update(version=2), "is of version 2"),
        (lambda plan: plan.update(version=-1), "is of version -1"),
        (lambda plan: plan.update(version="x"), "does not say its version"),
        (lambda plan: plan.update(version=True), "does not say its version"),
        (lambda plan: plan.pop("version"), "does not say its version"),
        (lambda plan: plan.update(more=1), "is no plan: more"),
        (lambda plan: plan["steps"][0].update(run="nope"), "is no plan: steps.0: there is no block 'nope'"),
        (lambda plan: plan["steps"][0].update(run=3), "is no plan: steps"),
        (lambda plan: plan["blocks"]["block_1"].update(file="../../secret.onnx"), "is not there"),
        (lambda plan: plan["blocks"]["block_1"].update(file="gone.onnx"), "is not there"),
        (lambda plan: plan["blocks"]["block_1"].update(file="block_2.onnx"), "is not the block that the plan says"),
    ],
)
def test_a_plan_that_was_changed(change: Any, said: str, tmp_path: Path) -> None:
    version = write_bundle(split(model()), tmp_path / "net")
    plan = json.loads((version / "plan.json").read_text())
    change(plan)
    (version / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(BadInput, match=said):
        read_bundle(tmp_path / "net")


def test_a_pointer_that_leads_elsewhere(tmp_path: Path) -> None:
    write_bundle(split(model()), tmp_path / "net")
    (tmp_path / "net" / "current").write_text("../other\n")
    with pytest.raises(BadInput, match="is not there"):
        graphopt.load(tmp_path / "net")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"\0", b"."])
def test_a_pointer_that_is_none(content: bytes, tmp_path: Path) -> None:
    write_bundle(split(model()), tmp_path / "net")
    (tmp_path / "net" / "current").write_bytes(content)
    with pytest.raises(BadInput, match=r"current: (cannot be read as the name|names a version .* that is not there)"):
        graphopt.load(tmp_path / "net")


def test_weights_that_are_gone_or_cut_off_are_told_at_once(tmp_path: Path) -> None:
    version = write_bundle(split(model()), tmp_path / "net")
    (data,) = version.glob("*.data")
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(BadInput, match=r"has 4095 bytes, and the blocks ask for 4096 \(copy the bundle again"):
        graphopt.load(tmp_path / "net")
    data.unlink()
    with pytest.raises(BadInput, match=r"the weights .* are not there \(copy the bundle again"):
        graphopt.load(tmp_path / "net")


def test_a_block_that_is_cut_off_is_told_at_once(tmp_path: Path) -> None:
    version = write_bundle(split(model()), tmp_path / "net")
    os.truncate(version / "block_3.onnx", 40)
    with pytest.raises(BadInput, match=r"block_3\.onnx: cannot be read as a block"):
        graphopt.load(tmp_path / "net")


def other_model() -> ir.Model:
    other = model()
    other.graph.initializers["w"].const_value = ir.tensor(np.eye(32, dtype=np.float32), name="w")
    return other


def versions_in(bundle: Path) -> set[str]:
    return {path.name for path in bundle.iterdir() if path.is_dir()}


def test_a_version_that_somebody_runs_stays(tmp_path: Path) -> None:
    first = write_bundle(split(model()), tmp_path / "net")
    runner = BundleRunner(tmp_path / "net")
    runner.run(feeds(True, 1))
    second = write_bundle(split(other_model()), tmp_path / "net")
    assert versions_in(tmp_path / "net") == {first.name, second.name}
    x = feeds(False, 0)  # the other side, whose block was not loaded before
    np.testing.assert_allclose(runner.run(x)["y"], -(x["x"] @ weight_of(model())), rtol=1e-4)
    np.testing.assert_allclose(graphopt.load(tmp_path / "net").run(x)["y"], -x["x"], rtol=1e-6)
    bound = runner.bind(x)
    del runner
    assert write_bundle(split(other_model()), tmp_path / "net") == second
    assert versions_in(tmp_path / "net") == {first.name, second.name}
    np.testing.assert_allclose(bound()["y"], -(x["x"] @ weight_of(model())), rtol=1e-4)
    del bound
    assert write_bundle(split(other_model()), tmp_path / "net") == second
    assert versions_in(tmp_path / "net") == {second.name}


def weight_of(network: ir.Model) -> Any:
    tensor = network.graph.initializers["w"].const_value
    assert tensor is not None
    return tensor.numpy()


def test_a_version_is_let_go_by_hand_too(tmp_path: Path) -> None:
    first = write_bundle(split(model()), tmp_path / "net")
    opened = open_bundle(tmp_path / "net")
    assert opened.version == first
    opened.close()
    opened.close()
    write_bundle(split(other_model()), tmp_path / "net")
    assert not first.exists()


def test_a_version_that_went_after_its_name_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between that and the lock: the reader looks again."""
    first = write_bundle(split(model()), tmp_path / "net")
    read: list[str] = []
    current = folder_module._current

    def slow(bundle: Path) -> str:
        name = current(bundle)
        if not read:
            write_bundle(split(other_model()), bundle)
        read.append(name)
        return name

    monkeypatch.setattr(folder_module, "_current", slow)
    version = open_bundle(tmp_path / "net").version
    assert read == [first.name, version.name] and version.is_dir() and not first.exists()


def test_a_version_that_went_before_the_lock_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is open already when it is removed."""
    first = write_bundle(split(model()), tmp_path / "net")
    flock = fcntl.flock

    def slow(descriptor: int, how: int) -> None:
        if how == fcntl.LOCK_SH:
            monkeypatch.setattr(fcntl, "flock", flock)
            write_bundle(split(other_model()), tmp_path / "net")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    version = open_bundle(tmp_path / "net").version
    assert version != first and version.is_dir() and not first.exists()


def test_without_locks_a_version_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    first = write_bundle(split(model()), tmp_path / "net")
    opened = open_bundle(tmp_path / "net")
    assert opened.version == first
    write_bundle(split(other_model()), tmp_path / "net")
    assert not first.exists()


WRITER = """
import sys
from pathlib import Path
from graphopt.bundles import split, write_bundle
from tests.bundles.test_folder import model, other_model

bundle, count, turn = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(count):
    write_bundle(split((model, other_model)[(number + turn) % 2]()), bundle)
"""


def test_who_loads_while_two_write_always_gets_a_whole_version(tmp_path: Path) -> None:
    bundle = tmp_path / "net"
    write_bundle(split(model()), bundle)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(bundle), "40", str(turn)], cwd=Path(__file__).parents[2])
        for turn in range(2)
    ]
    loads, versions = 0, set()
    try:
        while loads < 5 or any(writer.poll() is None for writer in writers):
            runner = graphopt.load(bundle, threads=1)
            versions.add(tuple(runner.run(feeds(True, 1))["y"][0, :3]))
            runner.run(feeds(False, 1))  # a block that was not loaded yet
            loads += 1
    finally:
        for writer in writers:
            if writer.poll() is None:
                writer.kill()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(versions) == 2
    del runner
    version = write_bundle(split(model()), bundle)
    assert versions_in(bundle) == {version.name}


def test_a_staged_bundle_can_be_run_and_leaves_nothing(tmp_path: Path) -> None:
    """Before it is in place; and what is not put in place is gone."""
    with stage_bundle(split(model()), tmp_path / "net") as staged:
        assert not (tmp_path / "net").exists()
        runner = graphopt.load(staged.path)
        assert runner.run(feeds(True, 1))["y"].shape == (2, 32)
    assert list(tmp_path.iterdir()) == []
    with stage_bundle(split(model()), tmp_path / "net") as staged:
        version = staged.commit()
        with pytest.raises(GraphoptError, match="committed or discarded already"):
            staged.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert read_bundle(tmp_path / "net")[0] == version


def test_what_a_killed_write_left_goes_with_the_next_one(tmp_path: Path) -> None:
    left = tmp_path / f".net.abcdefgh{STAGING_SUFFIX}"
    (left / "version").mkdir(parents=True)
    (left / "version" / "block_1.onnx").write_bytes(b"half")
    others = tmp_path / f".other.abcdefgh{STAGING_SUFFIX}"
    others.mkdir()
    write_bundle(split(model()), tmp_path / "net")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["net", others.name])


def test_a_save_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    with stage_bundle(split(model()), tmp_path / "net") as first:
        write_bundle(split(model()), tmp_path / "net")
        assert first.path.exists()
        first.commit()
    assert graphopt.load(tmp_path / "net").run(feeds(True, 1))["y"].shape == (2, 32)


def test_a_version_that_somebody_changed_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    first = write_bundle(split(model()), tmp_path / "net")
    (first / "plan.json").write_text("{}")
    second = write_bundle(split(model()), tmp_path / "net")
    assert second != first and not first.exists()
    assert graphopt.load(tmp_path / "net").run(feeds(True, 1))["y"].shape == (2, 32)
    assert write_bundle(split(model()), tmp_path / "net").exists()


def test_others_may_read_a_bundle_as_they_may_read_what_else_the_user_makes(tmp_path: Path) -> None:
    write_bundle(split(model()), tmp_path / "net")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "net").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (version,) = [path for path in (tmp_path / "net").iterdir() if path.is_dir()]
    assert version.stat().st_mode == (tmp_path / "plain").stat().st_mode
