"""What the tests of packaging share: models as text, and engines that a report describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from graphopt.engines.inspector import Inspection
from graphopt.engines.options import BuildOptions
from graphopt.engines.profiles import Profile
from graphopt.engines.report import BuildResult, EngineTensor, hash_file, report_path, write_report

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'


def saved(text: str, folder: Path, name: str = "m.onnx") -> Path:
    """A model of the given text (with the usual header, where it has none) in a file."""
    model = onnx.parser.parse_model(text if text.startswith("<") else f"{HEADER} {text}")
    path = folder / name
    onnx.save(model, path)
    return path


def engine(
    folder: Path,
    name: str = "m.engine",
    *,
    inputs: Sequence[EngineTensor] = (),
    outputs: Sequence[EngineTensor] = (),
    profiles: Mapping[str, Profile] | None = None,
    **more: Any,
) -> Path:
    """A file that stands for an engine, with the report of it beside it."""
    path = folder / name
    path.write_bytes(b"ftrt" + bytes(60))
    told: dict[str, Any] = {
        "path": path,
        "backend": "tensorrt",
        "version": "10.9.0.34",
        "bytes": 64,
        "hash": hash_file(path),
        "model": {},
        "seconds": 1.0,
        "peak_rss_bytes": None,
        "layers": 3,
        "inputs": tuple(inputs),
        "outputs": tuple(outputs),
        "profiles": dict(profiles or {}),
        "values": {},
        "buckets": (),
        "options": BuildOptions(),
        "gpu": None,
        "compute_capability": None,
        "coverage": {},
        "plugins": {},
        "inspection": Inspection(reason="nobody looked"),
        "notes": (),
    }
    write_report(BuildResult(**{**told, **more}), report_path(path))
    return path


def tensor(name: str, *shape: int, dtype: str = "float32") -> EngineTensor:
    """A tensor as a report describes it."""
    return EngineTensor(name, dtype, shape)


def sizes(*shapes: tuple[int, ...]) -> Profile:
    """The smallest, best and largest shape of an input."""
    return Profile(*shapes)
