"""Plugins under several versions of TensorRT: are they registered, and is a build told the right things?

    python -m benchmarks.plugin_versions [--also PYTHON ...] [--keep FOLDER]

Each version's Python bindings are NVIDIA's, from PyPI, installed into a folder of their own. They are loaded over the
plugin registry of a lean runtime; where a version has none on PyPI, over that of a later one of the same major
version, and the table says so. Every plugin, type, form and tactic is asked what a build asks, and the answers are
held against the same asked with plain numbers: element types, shapes, combinations, grids and scalars for each of a
few sizes, and the PTX that is handed over. Needs a C compiler and no GPU; no engine is built.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
import tomllib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, print_table, work_folder, write_result
from graphopt.engines.plugins import Plugin, find_plugins
from graphopt.plugins.pivot_linear.kernels import DTYPES
from tests.engines.registry import harness
from tests.engines.registry.folder.scale_add.tensorrt import PLUGIN as TOY
from tests.engines.registry.harness import Case, ask, compare

FOLDER = Path(harness.__file__).parent / "folder"


@dataclass(frozen=True)
class Version:
    """A version of the bindings, and the lean runtime that it is loaded over."""

    bindings: str
    lean: str


VERSIONS = (
    Version("tensorrt-cu12-bindings==10.9.0.34", "tensorrt-lean-cu12-libs==10.16.1.11"),
    Version("tensorrt-cu12-bindings==10.13.3.9.post1", "tensorrt-lean-cu12-libs==10.16.1.11"),
    Version("tensorrt-cu12-bindings==10.14.*", "tensorrt-lean-cu12-libs==10.16.1.11"),
    Version("tensorrt-cu13-bindings==10.15.*", "tensorrt-lean-cu13-libs==10.16.1.11"),
    Version("tensorrt-cu13-bindings==10.16.1.11", "tensorrt-lean-cu13-libs==10.16.1.11"),
    Version("tensorrt-cu13-bindings==11.0.0.114", "tensorrt-lean-cu13-libs==11.0.0.114"),
    Version("tensorrt-cu13-bindings==11.4.0.106", "tensorrt-lean-cu13-libs==11.4.0.106"),
)
MODULES = ("graphopt.plugins.pivot_linear.tensorrt", "graphopt.plugins.scale_add.tensorrt")
SIZES = [{"b": b, "s": s} for b, s in ((1, 1), (1, 16), (3, 5), (16, 1), (64, 4))]
# A size that run time decides is a name.
ROW: list[list[int | str]] = [["b", "s", 4096], [2048, 4096], [2048, 2048], [4096], [4096]]
COLUMN: list[list[int | str]] = [["b", "s", 4095], [4097, 2047], [2047, 2048], [4097], [4095]]


def cases() -> list[Case]:
    """Every type and form of PivotLinear, and a plugin that graphopt does not know."""
    found = [
        Case("PivotLinear", "graphopt_trt", [dtype] * 4 + ["int32"], inputs, {"form": [form]}, SIZES)
        for dtype in DTYPES
        for form, inputs in ((0, ROW), (1, COLUMN))
    ]
    for dtype in ("float32", "float16"):
        for scales in ([0.1], [0.1, 2.0, -3.5]):
            attributes: dict[str, list[float]] = {"offset": [-7], "scales": scales}
            found.append(Case(TOY.name, TOY.namespace, [dtype], [["b", "s", len(scales)]], attributes, SIZES))
    return found


def install(python: str, folder: Path, *packages: str) -> Path:
    """Install packages without what they depend on into a folder of their own."""
    if not folder.exists():
        words = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
        subprocess.run(words, check=True)
    return folder


def environment(python: str, folder: Path) -> str:
    """Another Python with what graphopt depends on: that one's interpreter. graphopt itself is taken from here."""
    inside = folder / "bin" / "python"
    if not inside.exists():
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        needed = [*project["dependencies"], *project["optional-dependencies"]["plugins"]]
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(inside), "-m", "pip", "install", "--quiet", *needed], check=True)
    return str(inside)


def judge(version: Version, python: str, folder: Path) -> dict[str, Any]:
    """Ask one version everything."""
    tag = Path(python).parents[1].name if python != sys.executable else "this"
    bindings = install(python, folder / f"{tag}-{version.bindings.replace('==', '-')}", version.bindings)
    library = harness.lean_library(install(python, folder / version.lean.replace("==", "-"), version.lean))
    asked = cases()
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    harness.shims.cache_clear()
    start = time.perf_counter()
    answer = ask(scratch, library, MODULES, asked, bindings=bindings, python=python, extra_folders=[FOLDER])
    seconds = time.perf_counter() - start
    row = {
        "bindings": answer["version"],
        "registry": version.lean.replace("==", " "),
        "python": answer["python"],
        "numpy": answer["numpy"],
        "seconds": seconds,
    }
    if "error" in answer:
        return {**row, "refused": [answer["error"]], "result": "refused"}
    known: dict[str, Plugin] = {**find_plugins(), TOY.name: TOY}
    launches = tactics = nodes = 0
    refused: dict[str, None] = {}
    try:
        for case, found in zip(asked, answer["cases"], strict=True):
            if "error" in found:
                refused[found["error"]] = None
                continue
            launches += compare(known[case.name], case, found)
            tactics += len(found["tactics"])
            nodes += 1
    except AssertionError as error:
        where = f"{case.name} {case.types[0]} {dict(case.attributes)}"
        return {**row, "refused": [], "result": f"WRONG: {where}: {error}"}
    told = {"registered": answer["registered"], "lists_of_numbers": answer["lists"], "nodes": nodes}
    result = "right" if not refused else f"right; {len(asked) - nodes} refused"
    return {**row, **told, "refused": list(refused), "tactics": tactics, "launches": launches, "result": result}


def show(rows: list[dict[str, Any]]) -> None:
    """Print one row a version, and below what was refused."""
    counts = ("nodes", "tactics", "launches")
    columns: list[str | tuple[str, str]] = ["bindings", "registry of", "Python", "numpy"]
    columns += [(name, "right") for name in counts]
    shown = [
        [
            row["bindings"],
            row["registry"].removeprefix("tensorrt-"),
            row["python"],
            row["numpy"],
            *(str(row.get(name, "")) for name in counts),
            row["result"],
        ]
        for row in rows
    ]
    print_table([*columns, "result"], shown, "tensorrt.plugin, asked what a build asks")
    print("\n".join(dict.fromkeys(reason for row in rows for reason in row["refused"])))


def main() -> int:
    """Install, ask, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--also", nargs="*", default=[], metavar="PYTHON", help="other interpreters to ask too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="install into this folder, and use what is there")
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = given.keep or stack.enter_context(work_folder())
        folder.mkdir(parents=True, exist_ok=True)
        others = [environment(python, folder / f"venv-{Path(python).name}") for python in given.also]
        rows = [judge(version, python, folder) for python in (sys.executable, *others) for version in VERSIONS]
    show(rows)
    write_result("plugin_versions", {"versions": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
