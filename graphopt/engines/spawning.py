"""Starts the child that builds, hands on what it says while it does, and reads its answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphopt.engines.child.requests import Request
from graphopt.engines.phases import Phases
from graphopt.errors import BadInput, GraphoptError

_POLL_SECONDS = 0.1

OnLog = Callable[[str], None]
OnProgress = Callable[[str, float], None]


class Refused(GraphoptError):
    """The library's parser does not take some nodes.

    Attributes:
        nodes: Every one of them: node, op_type, reason, hint.
    """

    def __init__(self, what: str, *, where: str, hint: str | None, nodes: list[dict[str, str]]) -> None:
        super().__init__(what, where=where, hint=hint)
        self.nodes = nodes


class NotLoaded(GraphoptError):
    """The library is there, and does not load: something that it needs is missing."""


def run_child(
    request: Request, folder: Path, source: Path, on_log: OnLog | None, on_progress: OnProgress | None
) -> dict[str, Any]:
    """Run the worker and return its answer.

    Args:
        request: What to build.
        folder: A scratch folder.
        source: The user's model, which errors name.
        on_log: Called with each line of the library's log.
        on_progress: Called with the phase that is going on and how much is done, 0 to 1.

    Raises:
        GraphoptError: The library refuses or crashed. BadInput where an option is at fault, Refused where nodes are,
            NotLoaded where the library does not load.
    """
    request_path, printed = folder / "request.json", folder / "printed.txt"
    request.write(request_path)
    log, answer_path = Path(request.log), Path(request.answer)
    log.touch()
    Path(request.progress).touch()
    phases = Phases()
    with (
        printed.open("wb") as output,
        log.open(errors="replace") as lines,
        Path(request.progress).open(errors="replace") as steps,
    ):
        child = subprocess.Popen(
            # With -P, so that what lies in the current folder shadows nothing.
            [sys.executable, "-P", "-m", "graphopt.engines.child.worker", str(request_path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_import_path())},
        )
        try:
            while True:
                try:
                    code = child.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    code = None
                if on_log is not None:
                    for line in lines:
                        on_log(line.rstrip("\n"))
                if on_progress is not None:
                    for line in steps:
                        phases.read(line)
                    on_progress(phases.now, phases.fraction)
                if code is not None:
                    break
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if answer_path.exists():
        answer: dict[str, Any] = json.loads(answer_path.read_text())
        if "error" not in answer:
            return answer
        if answer.get("not_loaded"):
            raise NotLoaded(f"cannot load {request.title}: {answer['error']}")
        if answer.get("bad_input"):
            raise BadInput(answer["error"], where=str(source), hint=answer["hint"])
        raise Refused(answer["error"], where=str(source), hint=answer["hint"], nodes=answer.get("refused") or [])
    raise _crash(request.title, code, log, printed, source)


def _import_path() -> list[str]:
    """Where the child may import from: where this process does, and no current folder; graphopt in any case."""
    return [*(path for path in sys.path if path), str(Path(__file__).absolute().parents[2])]


def _crash(title: str, code: int, log: Path, printed: Path, source: Path) -> GraphoptError:
    said = _last_line(log) or _last_line(printed)
    if code >= 0:
        reason = _last_line(printed) or said or "no reason given"
        what = f"the {title} build stopped with exit code {code}: {reason}"
        return GraphoptError(what, where=str(source))
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    last = f"; its last words: {said}" if said else ""
    hint = "out of memory?" if name == "SIGKILL" else "a fault of the library; --verbose shows its log"
    return GraphoptError(f"{title} crashed ({name}){last}", where=str(source), hint=hint)


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
