"""A save is killed at every system call it makes: the old or the new model is there, and the next save tidies up."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.files import load_model, save_model
from tests.files import sources

CALLS = ("open", "write", "preadv", "replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "fchmod", "close")


def entries(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process; returns its exit status (negative: the signal that ended it)."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(step: int, after: bool) -> None:
    """Make this process die at its ``step``-th system call of those in CALLS, before or after it takes effect."""
    count = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == step and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **options)
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def changed(source: Path) -> ir.Model:
    model = load_model(source)
    model.graph.initializers["w"].const_value = ir.tensor(np.full((200, 200), 7, np.float32))
    return model


def prepare(folder: Path, external: bool) -> Path:
    proto = sources.model([sources.tensor("w", "FLOAT", (200, 200)), sources.tensor("v", "BFLOAT16", (500,))])
    source = sources.write(proto, folder / "source.onnx", external=external)
    target = save_model(load_model(source), folder / "m.onnx")
    for name in ("source.onnx", "source.bin"):
        (folder / name).unlink(missing_ok=True)
    return target


@pytest.mark.parametrize("external", [False, True], ids=["embedded", "external"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_system_call(tmp_path: Path, external: bool, after: bool) -> None:
    prototype = tmp_path / "prototype"
    prototype.mkdir()
    old = sources.contents(load_model(prepare(prototype, external)))
    finished = tmp_path / "finished"
    shutil.copytree(prototype, finished)
    save_model(changed(finished / "m.onnx"), finished / "m.onnx")
    new = sources.contents(load_model(finished / "m.onnx"))
    assert old != new
    outcomes = []
    for step in range(1, 500):
        folder = tmp_path / str(step)
        shutil.copytree(prototype, folder)
        target = folder / "m.onnx"
        model = changed(target)

        def work(step: int = step, target: Path = target, model: ir.Model = model) -> None:
            kill_at(step, after)
            save_model(model, target)

        status = in_child(work)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        found = sources.contents(load_model(target))
        assert found in (old, new)
        outcomes.append(found == new)
        data = {
            str(value.const_value.location)
            for value in load_model(target).graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        orphans = entries(folder) - {"m.onnx"} - data
        # One hidden folder; around the commit also a data file, the new one or the old one.
        assert len([name for name in orphans if name.startswith(".")]) <= 1
        assert len(orphans) <= 2
        save_model(load_model(target), target)
        assert [name.split(".")[-1] for name in sorted(entries(folder))] == ["data", "onnx"][not external :]
        assert sources.contents(load_model(target)) == found
        shutil.rmtree(folder)
    else:
        pytest.fail("the save never finished")
    assert len(outcomes) > 10 and outcomes == sorted(outcomes)  # old up to the commit, new from then on
    assert True in outcomes and False in outcomes


def test_a_file_size_limit_is_an_error_not_a_crash(tmp_path: Path) -> None:
    target = prepare(tmp_path, external=True)
    before = {name: (tmp_path / name).read_bytes() for name in entries(tmp_path)}
    model = changed(target)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_model(model, target)
        except Exception as error:
            os._exit(40 if "File too large (free some space" in str(error) else 41)

    assert in_child(work) == 40
    assert {name: (tmp_path / name).read_bytes() for name in entries(tmp_path)} == before


def test_a_save_that_is_going_on_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    from graphopt.files import stage_model

    target = prepare(tmp_path, external=True)
    staged = stage_model(changed(target), target)
    save_model(load_model(target), target)
    assert staged.staged_path.exists()
    staged.commit()
    assert entries(tmp_path) == {"m.onnx", *(n for n in entries(tmp_path) if n.endswith(".data"))}
    assert load_model(target).graph.initializers["w"].const_value.numpy()[0, 0] == 7  # type: ignore[union-attr]
