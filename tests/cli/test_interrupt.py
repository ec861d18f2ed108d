"""Ctrl-C and SIGTERM end a command while ONNX Runtime holds the main thread, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.models.endless import NEVER, endless

ROOT = Path(__file__).resolve().parents[2]
COMMAND = """
import signal
import sys

import onnxruntime

from graphopt.cli.main import run

# Where a shell runs the tests in the background, Ctrl-C is ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
plain = onnxruntime.InferenceSession.run


def told(self, *how):
    print("running", file=sys.stderr, flush=True)
    return plain(self, *how)


onnxruntime.InferenceSession.run = told
sys.argv = ["graphopt", *sys.argv[1:]]
run()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)])
@pytest.mark.parametrize(
    "arguments",
    [
        ["optimize", "net.onnx", "--recipe", "static", "-o", "net.bundle"],
        # Inputs of the user's: a run with no bound. And the calls of `bench`, which are in the main thread.
        ["optimize", "net.onnx", "--calibration", "real.npz"],
        ["bench", "net.onnx", "net.onnx", "--calibration", "real.npz"],
    ],
)
def test_a_signal_ends_a_run_without_an_end(
    arguments: list[str], number: signal.Signals, code: int, tmp_path: Path
) -> None:
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    onnx.save(endless(NEVER), work / "net.onnx")
    np.savez(work / "real.npz", x=np.full((1, 2), 0.5, np.float32))
    before = sorted(work.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
    )
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        while said and "running" not in said:
            said = process.stderr.readline()
        assert said, "it never ran"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)  # it is in the loop by now, and does not come out
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in errors
    assert "error" not in errors
    assert ("interrupted" in errors) == (number == signal.SIGINT)
    assert sorted(work.iterdir()) == before
    assert list(temporary.glob("*graphopt*")) == []


def test_what_waits_in_the_background_is_not_begun() -> None:
    """A process waits at its end for what it has begun there."""
    code = """
import threading
from graphopt.background import in_background
from graphopt.interrupts import end_all, is_ended

gate = threading.Event()
first, second = in_background(gate.wait, 10), in_background(print, "begun")
assert not is_ended()
end_all()
gate.set()
print(first.result(), type(second.exception()).__name__, is_ended())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["True", "RuntimeError", "True"]
