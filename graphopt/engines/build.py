"""`build_engine`: prepare the model, build in a child process, put the engine in place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.engines.backends import Backend, find_backend
from graphopt.engines.profiles import Profile, make_profiles, parse_shapes
from graphopt.errors import BadInput, GraphoptError

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class BuildResult:
    """An engine that was built.

    Attributes:
        path: The engine.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        version: The library's version; engines are bound to it.
        bytes: The engine's size.
        seconds: Parsing and building, without the start of the child process.
        peak_rss_bytes: The child's largest resident size; None where the system does not tell.
        layers: Layers of the parsed network, before the library fuses them.
        profiles: The shapes of each dynamic input.
        gpu: The GPU of this machine, or None.
        status: What was done with the engine, said honestly.
    """

    path: Path
    backend: str
    version: str
    bytes: int
    seconds: float
    peak_rss_bytes: int | None
    layers: int
    profiles: dict[str, Profile]
    gpu: str | None
    status: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def build_engine(
    model: str | Path,
    out: str | Path,
    *,
    backend: str,
    shapes: Iterable[str] = (),
    on_log: Callable[[str], None] | None = None,
) -> BuildResult:
    """Build an engine from an ONNX file; needs no GPU with TensorRT-RTX.

    Args:
        model: The ONNX file. Its functions are inlined first: the parser miscompiles legal uses of them.
        out: Where the engine goes; replaced only by a complete one. Its folder must exist.
        backend: ``tensorrt`` (10.9 or newer) or ``tensorrt-rtx``.
        shapes: ``NAME=MIN/OPT/MAX`` for dynamic inputs (``x=1x16/4x64/8x128``) or symbolic axes
            (``batch=1/4/8``).
        on_log: Called with each line of the library's log while it builds.

    Raises:
        BadInput: The model, ``out`` or the shapes cannot be used.
        MissingDependency: The library is not installed.
        GraphoptError: The library refuses the model, or crashed; nothing was written.
    """
    from graphopt.files.load import load_model

    library = find_backend(backend)
    source, target = Path(model), Path(out)
    if not target.parent.is_dir():
        raise BadInput(f"the folder {str(target.parent)!r} does not exist", where=str(target))
    if target.is_dir():
        raise BadInput("is a folder", where=str(target), hint="give the name of the engine to write")
    if target.exists() and source.exists() and target.samefile(source):
        raise BadInput("is the model itself", where=str(target), hint="give the engine another name")
    parsed_shapes = parse_shapes(shapes)
    network = load_model(source)
    inputs = [value for value in network.graph.inputs if not value.is_initializer()]
    profiles = make_profiles(inputs, parsed_shapes)
    # One fixed name: what a killed build leaves, the next one overwrites.
    partial = target.with_name(f".{target.name}.partial")
    try:
        with tempfile.TemporaryDirectory(prefix="graphopt-build-") as scratch:
            folder = Path(scratch)
            request = {
                "runtime_operators": _runtime_operators(network),
                "title": library.title,
                "target": library.name,
                "modules": library.modules,
                "oldest": library.oldest,
                "model": str(_inlined(network, source, folder)),
                "beside": str(source.resolve()),
                "profiles": {name: asdict(profile) for name, profile in profiles.items()},
                "engine": str(partial.absolute()),
                "log": str(folder / "log.txt"),
                "answer": str(folder / "answer.json"),
            }
            del network
            answer = _run_child(library, request, folder, source, on_log)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return BuildResult(
        path=target,
        backend=library.name,
        version=answer["version"],
        bytes=answer["bytes"],
        seconds=answer["seconds"],
        peak_rss_bytes=answer["peak_rss_bytes"],
        layers=answer["layers"],
        profiles=profiles,
        gpu=answer["gpu"],
        status="built, not run" if answer["gpu"] else "built, not run: no GPU here",
    )


def _inlined(model: ir.Model, source: Path, folder: Path) -> Path:
    """The file to parse: ``source``, or where it has functions a copy without them.

    The copy names the same external data; the parser is told to look for it beside the original.
    """
    if not model.functions:
        return source.resolve()
    from onnx_ir.passes.common import InlinePass

    InlinePass()(model)
    copy = folder / "inlined.onnx"
    copy.write_bytes(ir.to_proto(model).SerializeToString())
    return copy


def _runtime_operators(model: ir.Model) -> list[str]:
    """The types of ONNX Runtime's own operators in a model; the parser's errors do not tell domains."""
    nodes = [
        *model.graph.all_nodes(),
        *(node for function in model.functions.values() for node in function.all_nodes()),
    ]
    return sorted({node.op_type for node in nodes if node.domain == "com.microsoft"})


def _run_child(
    library: Backend,
    request: dict[str, Any],
    folder: Path,
    source: Path,
    on_log: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Run the worker and return its answer. Raises GraphoptError for a refusal or a crash."""
    request_path, printed = folder / "request.json", folder / "printed.txt"
    request_path.write_text(json.dumps(request))
    log, answer_path = Path(request["log"]), Path(request["answer"])
    log.touch()
    with printed.open("wb") as output, log.open(errors="replace") as lines:
        child = subprocess.Popen(
            # By its path, and with -P so that its neighbours shadow nothing: importing graphopt would only cost.
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), str(request_path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # The child may import from where this process does, and from nowhere else.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
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
                if code is not None:
                    break
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if answer_path.exists():
        answer: dict[str, Any] = json.loads(answer_path.read_text())
        if "error" in answer:
            raise GraphoptError(answer["error"], where=str(source), hint=answer["hint"])
        return answer
    raise _crash(library, code, log, printed, source)


def _crash(library: Backend, code: int, log: Path, printed: Path, source: Path) -> GraphoptError:
    said = _last_line(log) or _last_line(printed)
    if code >= 0:
        reason = _last_line(printed) or said or "no reason given"
        what = f"the {library.title} build stopped with exit code {code}: {reason}"
        return GraphoptError(what, where=str(source))
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    last = f"; its last words: {said}" if said else ""
    hint = "out of memory?" if name == "SIGKILL" else "a fault of the library; --verbose shows its log"
    return GraphoptError(f"{library.title} crashed ({name}){last}", where=str(source), hint=hint)


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
