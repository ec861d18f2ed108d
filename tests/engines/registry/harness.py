"""Starts `walk` over a library that has a plugin registry."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.engines.plugins import Plugin
from graphopt.kernels.compile import compile_ptx
from graphopt.kernels.contract import check

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
COMPILER = shutil.which("gcc") or shutil.which("cc")


@cache
def shims(folder: Path, major: int) -> Path:
    """The libraries that TensorRT's bindings of a major version link, compiled into a folder."""
    assert COMPILER is not None
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        library = f"lib{name}.so.{major}"
        words = [COMPILER, "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library}", str(HERE / "forward.c")]
        subprocess.run([*words, "-o", str(folder / library), "-ldl"], check=True, capture_output=True)
    return folder


def lean_library(folder: Path) -> Path:
    """The lean runtime in a wheel ``tensorrt_lean_libs``, given the folder that it was installed in."""
    return next(iter(sorted((folder / "tensorrt_lean_libs").glob("libnvinfer_lean.so.*"))))


@dataclass(frozen=True)
class Case:
    """A node to ask about.

    Attributes:
        name, namespace: Of the plugin.
        types: Of the inputs.
        inputs: Shapes; a size that run time decides is a name.
        attributes: As the node has them.
        runs: Sizes for the names, one mapping a run.
    """

    name: str
    namespace: str
    types: Sequence[str]
    inputs: Sequence[Sequence[int | str]]
    attributes: Mapping[str, Sequence[float]]
    runs: Sequence[Mapping[str, int]]


def ask(
    folder: Path,
    library: Path,
    modules: Sequence[str],
    cases: Sequence[Case],
    *,
    bindings: Path | None = None,
    python: str = sys.executable,
    paths: Sequence[Path] = (),
    extra_folders: Sequence[Path] = (),
    architecture: str = "compute_80",
    loud: bool = False,
) -> dict[str, Any]:
    """Register modules in a new process and ask what a build would.

    Args:
        folder: For the shims and the exchanged files.
        library: Has the plugin registry; its file name ends in TensorRT's major version.
        modules: That declare the plugins.
        cases: To ask about.
        bindings: A folder with ``tensorrt_bindings`` in it; where it is not given, that is installed.
        python: That runs it.
        paths: More places to import from.
        extra_folders: Taken for parts of ``graphopt.plugins``.
        architecture: To compile for.
        loud: Let what goes wrong in the process be seen.
    """
    major = int(library.suffix.removeprefix("."))
    request = {
        "modules": list(modules),
        "cases": [asdict(case) for case in cases],
        "architecture": architecture,
        "extra_folders": [str(path) for path in extra_folders],
        "answer": str(folder / "answer.json"),
        "raise": loud,
    }
    (folder / "request.json").write_text(json.dumps(request))
    (folder / "answer.json").unlink(missing_ok=True)
    places = [*([bindings] if bindings else []), *paths, ROOT]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(shims(folder, major)),
        "REGISTRY_LIBRARY": str(library),
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "OMP_NUM_THREADS": "1",
    }
    words = [python, str(HERE / "walk.py"), str(folder / "request.json")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, cwd=folder, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(f"walk.py ended with {done.returncode}: {done.stderr[-2000:] or done.stdout[-2000:]}")
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return answer


def attributes_of(plugin: Plugin, case: Case) -> dict[str, np.ndarray]:
    """What a case says, as a plugin gets it."""
    return {name: np.array(case.attributes[name], dtype) for name, dtype in plugin.attributes}


def compare(plugin: Plugin, case: Case, found: Mapping[str, Any], *, architecture: str = "compute_80") -> int:
    """Hold what a build is told of a node against the same asked with plain numbers.

    Args:
        plugin: Of the case.
        case: What was asked.
        found: What `ask` gives for it.
        architecture: The PTX is for.

    Returns:
        How many launches were compared: one for each tactic and run.

    Raises:
        AssertionError: Something differs.
    """
    attributes = attributes_of(plugin, case)
    types = plugin.types_of(case.types)
    assert found["outputs"] == len(plugin.outputs)
    assert tuple(found["types"]) == types[len(plugin.inputs) :]
    shapes = [[[run[s] if isinstance(s, str) else s for s in shape] for shape in case.inputs] for run in case.runs]
    for given, told in zip(shapes, found["shapes"], strict=True):
        assert told == [list(shape) for shape in plugin.results(given, attributes)]
    assert [tuple(combination["types"]) for combination in found["combinations"]] == list(plugin.types)
    for combination in found["combinations"]:
        assert combination["formats"] == ["LINEAR"]
        assert combination["tactics"] == sorted(plugin.kernels(tuple(combination["types"]), attributes))
    assert sorted(map(int, found["tactics"])) == sorted(plugin.kernels(types, attributes))
    launches = 0
    for number, told in found["tactics"].items():
        kernel = plugin.kernel(types, attributes, int(number))
        ptx = compile_ptx(kernel, architecture)
        check(kernel, ptx)
        assert told["kernel"] == kernel.name == ptx.entry
        assert told["ptx"] == hashlib.sha256(ptx.text.encode()).hexdigest()
        assert told["kinds"] == ["SymInt32"]
        for given, launched, scalars in zip(shapes, told["launches"], told["scalars"], strict=True):
            wanted = kernel.launch(given)
            assert launched == [*wanted.grid, kernel.threads, 1, 1, kernel.shared]
            assert scalars == list(wanted.scalars)
            launches += 1
    return launches
