"""A pass that another package brings: found by its entry point, then used as ours are."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.errors import BadInput
from graphopt.recipes import passes_of
from graphopt.rewrite import discovery
from tests.passes.common import op_types, run_ort, run_pass

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_pass"
PACKAGE = "graphopt_merge_scales"
SCALED = """<ir_version: 9, opset_import: ["" : 18]> g (float[N] x) => (float[N] y)
<float a = {0.1}, float b = {3}, float[2] c = {1, 2}, float[2] d = {5, 6}> { s = Mul(x, a)\n y = Mul(b, s) }"""


@pytest.fixture(autouse=True)
def fresh_discovery(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    discovery.all_passes.cache_clear()
    yield
    sys.modules.pop(PACKAGE, None)
    discovery.all_passes.cache_clear()


def declare(folder: Path, entry_points: dict[str, str]) -> None:
    """What an installer leaves behind for a package: its name and its entry points."""
    info = folder / f"{PACKAGE}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: graphopt-merge-scales\nVersion: 0.1.0\n")
    lines = [f"{name} = {value}" for name, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[graphopt.passes]", *lines, ""]))


def check_it_runs() -> None:
    cls = discovery.get_pass("merge-scales")
    assert cls.__module__ == PACKAGE
    found, records = run_pass(SCALED, cls)
    assert op_types(found) == ["Mul"]
    assert records[0].applications == 1
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    exact = x.astype(np.float64) * np.float64(np.float32(0.1)) * 3
    before, after = (np.abs(run_ort(model, {"x": x})[0] - exact) for model in (SCALED, found))
    assert (after <= 4 * before.max() + np.finfo(np.float32).eps * np.abs(exact)).all()


def test_the_example_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    declare(tmp_path, project["entry-points"]["graphopt.passes"])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    check_it_runs()
    (step,) = passes_of([], ["merge-scales.enabled=true"])
    assert step.name == "merge-scales"


@pytest.mark.slow
def test_the_example_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path / "source"  # building writes into the folder
    (source / PACKAGE).mkdir(parents=True)
    for name in ("pyproject.toml", f"{PACKAGE}/__init__.py"):
        (source / name).write_bytes((EXAMPLE / name).read_bytes())
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(source)], check=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    check_it_runs()


@pytest.mark.parametrize(
    "unmatched",
    [
        "s = Mul(x, c)\n y = Mul(d, s)",
        "s = Mul(x, a)\n t = Mul(s, b)\n y = Add(t, s)",
        "s = Add(x, a)\n y = Mul(s, b)",
    ],
    ids=["vectors", "second reader", "no product"],
)
def test_what_the_example_leaves_alone(unmatched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import importlib

    cls: Any = importlib.import_module(PACKAGE).MergeScales
    _, records = run_pass(SCALED.partition("> {")[0] + "> { " + unmatched + " }", cls)
    assert records[0].applications == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:Thing", "the pass cannot be imported: No module named 'no_such_module'"),
        ("pathlib:Path", "is not a graphopt.rewrite.Pass"),
    ],
)
def test_a_broken_entry_point_is_one_line(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", value, discovery.ENTRY_POINTS)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [broken])
    with pytest.raises(BadInput, match=message):
        discovery.all_passes()


def test_a_name_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "impostor.py").write_text(
        "from graphopt.passes.quant.to_float16 import ToFloat16\nclass Impostor(ToFloat16):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = EntryPoint("impostor", "impostor:Impostor", discovery.ENTRY_POINTS)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry])
    with pytest.raises(BadInput, match="a pass called 'to-float16' exists already"):
        discovery.all_passes()
