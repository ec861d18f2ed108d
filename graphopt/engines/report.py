"""What is known about an engine: the result of a build, and the file beside the engine that holds it.

An engine file says nothing about itself that can be read without the very library and GPU that it was built for;
``ENGINE.json`` does. It is written with the engine, and names it by its content: after anything but a whole build
the two do not fit, and the reader says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from graphopt.engines.inspector import Inspection
from graphopt.engines.options import BuildOptions
from graphopt.engines.profiles import Profile
from graphopt.errors import BadInput, GraphoptError

FORMAT = 1
_BLOCK = 1 << 20


@dataclass(frozen=True)
class EngineTensor:
    """An input or an output of an engine: its element type in numpy's words, its shape (-1 where it varies).

    The shape is None where not even the number of axes is fixed.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class BuildResult:
    """An engine that was built.

    Attributes:
        path: The engine.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        version: The library's version; engines are bound to it.
        bytes: The engine's size.
        hash: xxh3_128 of the engine.
        model: The name of the ONNX file, its sha256, and whether that covers data files.
        seconds: Parsing and building, without the start of the child process.
        peak_rss_bytes: The child's largest resident size; None where the system does not tell.
        layers: Layers of the parsed network, before the library fuses them.
        inputs: The engine's inputs.
        outputs: The engine's outputs.
        profiles: The shapes of each dynamic input, over all profiles.
        values: The values of each input that decides shapes.
        buckets: Symbol → size, one assignment a profile; empty where one profile serves every size.
        options: How it was built.
        gpu: The GPU of the machine that built it, or None.
        compute_capability: That GPU's, such as ``8.9``, or None.
        coverage: What was predicted before the build (`graphopt.engines.coverage`).
        plugins: What of the model runs on plugins, whether it was compared with what it was, the kernels and the PTX
            ISA versions of those; empty where there are none.
        inspection: The engine's own layers, or why they are not known.
        notes: What the user should know.
        status: What was done with the engine, said honestly.
    """

    path: Path
    backend: str
    version: str
    bytes: int
    hash: str
    model: dict[str, Any]
    seconds: float
    peak_rss_bytes: int | None
    layers: int
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    profiles: dict[str, Profile]
    values: dict[str, Profile]
    buckets: tuple[dict[str, int], ...]
    options: BuildOptions
    gpu: str | None
    compute_capability: str | None
    coverage: dict[str, Any]
    plugins: dict[str, Any]
    inspection: Inspection
    notes: tuple[str, ...]
    status: str = field(default="")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "options": self.options.to_json()}


def report_path(engine: Path) -> Path:
    """Where the report of an engine lies."""
    return engine.with_name(f"{engine.name}.json")


def write_report(result: BuildResult, path: Path) -> None:
    """Write a report; the engine's own path, which may change, is left out. Raises OSError."""
    plain = {"format": FORMAT, **result.to_json()}
    del plain["path"]
    path.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def is_report(path: Path) -> bool:
    """Whether a file looks like the report of an engine, of any format, whole or not."""
    try:
        with path.open("rb") as file:
            return re.match(rb"\s*\{\s*\"format\":", file.read(64)) is not None
    except OSError:
        return False


def read_report(engine: str | Path) -> BuildResult:
    """The report that lies beside an engine.

    Raises:
        BadInput: There is none, it cannot be read, or it is of another engine.
    """
    engine = Path(engine)
    path = report_path(engine)
    hint = "build it with graphopt build, and keep the two together"
    if not engine.is_file():
        raise BadInput("no such engine", where=str(engine))
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        result = _from_json(engine, plain)
    except FileNotFoundError:
        raise BadInput(f"there is no {path.name} beside it", where=str(engine), hint=hint) from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise BadInput("is no report of an engine", where=str(path), hint=hint) from error
    if result.bytes != engine.stat().st_size or result.hash != hash_file(engine):
        raise BadInput("is the report of another engine, or the engine is damaged", where=str(path), hint=hint)
    return result


def _from_json(engine: Path, plain: Mapping[str, Any]) -> BuildResult:
    if plain["format"] != FORMAT:
        raise ValueError(f"format {plain['format']}")
    known = {name: value for name, value in plain.items() if name in BuildResult.__dataclass_fields__}
    converted = {
        "inputs": tuple(_tensor(one) for one in plain["inputs"]),
        "outputs": tuple(_tensor(one) for one in plain["outputs"]),
        "profiles": {name: _profile(one) for name, one in plain["profiles"].items()},
        "values": {name: _profile(one) for name, one in plain["values"].items()},
        "buckets": tuple(plain["buckets"]),
        "options": BuildOptions.from_json(plain["options"]),
        "inspection": Inspection.from_json(plain["inspection"]),
        "notes": tuple(plain["notes"]),
    }
    return BuildResult(**{**known, "path": engine, **converted})


def _tensor(plain: Mapping[str, Any]) -> EngineTensor:
    shape = plain["shape"]
    return EngineTensor(plain["name"], plain["dtype"], None if shape is None else tuple(shape))


def _profile(plain: Mapping[str, Any]) -> Profile:
    return Profile(*(tuple(plain[level]) for level in ("min", "opt", "max")))


def check_fits(report: BuildResult, version: str, gpu: str | None, capability: str | None) -> None:
    """Refuse in plain words what the library would refuse in its own, before it is asked.

    Args:
        report: The engine's report.
        version: Of the library that is to run it.
        gpu: The name of the GPU that is to run it.
        capability: Its compute capability, such as ``8.9``.

    Raises:
        GraphoptError: The engine was built for another version, or for other GPUs.
    """
    where = str(report.path)
    again = "build it again here"
    if report.version != version and not _newer_runs(report, version):
        what = f"the engine was built by {report.backend} {report.version}, and here is {version}"
        raise GraphoptError(what, where=where, hint=f"{again}, or install {report.version}")
    if capability is None:
        return
    wanted = report.options.compute_capabilities
    if report.backend == "tensorrt-rtx":
        built_for = {name.removeprefix("sm") for name in wanted if name != "current"}
        if "current" in wanted and report.compute_capability:
            built_for.add(report.compute_capability.replace(".", ""))
        if built_for and capability.replace(".", "") not in built_for:
            listed = ", ".join(f"sm{name}" for name in sorted(built_for))
            raise GraphoptError(
                f"the engine was built for {listed}, and {gpu or 'the GPU'} is sm{capability.replace('.', '')}",
                where=where,
                hint="build it with another --compute-capability, or without",
            )
        return
    level, made = report.options.hardware_compatibility, report.compute_capability
    if made is None or made == capability:
        return
    if level == "ampere-plus" and float(capability) >= 8:
        return
    raise GraphoptError(
        f"the engine was built on {report.gpu} (compute capability {made}), and {gpu or 'the GPU'} has {capability}",
        where=where,
        hint=f"{again}, or build it with --hardware-compatibility ampere-plus",
    )


def _newer_runs(report: BuildResult, version: str) -> bool:
    """Whether a newer version of the library was promised to run the engine."""
    if not report.options.version_compatible:
        return False
    return _numbers(version) >= _numbers(report.version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def hash_file(path: Path) -> str:
    """xxh3_128 of a file's content, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
