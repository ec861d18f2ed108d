"""``ENGINE.json``: does it belong to the engine, and what it says about where the engine runs."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from graphopt.engines.inspector import EngineLayer, Inspection
from graphopt.engines.options import BuildOptions
from graphopt.engines.profiles import Profile
from graphopt.engines.report import (
    BuildResult,
    EngineTensor,
    check_fits,
    hash_file,
    is_report,
    read_report,
    report_path,
    write_report,
)
from graphopt.errors import BadInput, GraphoptError


@pytest.fixture
def report(tmp_path: Path) -> BuildResult:
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"an engine")
    made = BuildResult(
        path=engine,
        backend="tensorrt",
        version="10.9.0.34",
        bytes=9,
        hash=hash_file(engine),
        model={"name": "model.onnx", "sha256": "0" * 64, "data_files": []},
        seconds=1.5,
        peak_rss_bytes=None,
        layers=3,
        inputs=(EngineTensor("x", "float16", (-1, 3)),),
        outputs=(EngineTensor("y", "float32", None),),
        profiles={"x": Profile((1, 3), (2, 3), (4, 3))},
        values={"s": Profile((1,), (1,), (1,))},
        buckets=({"batch": 1},),
        options=BuildOptions(timing_cache=Path("c"), compute_capabilities=()),
        gpu="a GPU",
        compute_capability="8.6",
        coverage={"refused": []},
        plugins={},
        inspection=Inspection((EngineLayer("a", "gemm", "t", ("n",), True, ("float16",), ("",)),), ("x", "y")),
        notes=("a note",),
        status="built, not run",
    )
    write_report(made, report_path(engine))
    return made


def test_it_is_read_as_it_was_written(report: BuildResult) -> None:
    assert read_report(report.path) == report
    assert read_report(str(report.path)) == report
    assert "path" not in json.loads(report_path(report.path).read_text())


@pytest.mark.parametrize("content", [b"another one", b"AN ENGINE"])
def test_a_report_of_another_engine(report: BuildResult, content: bytes) -> None:
    report.path.write_bytes(content)
    with pytest.raises(BadInput, match="is the report of another engine"):
        read_report(report.path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99}', '{"format": 1}'])
def test_what_is_no_report(report: BuildResult, content: str) -> None:
    report_path(report.path).write_text(content)
    with pytest.raises(BadInput, match=r"model\.engine\.json: is no report of an engine"):
        read_report(report.path)


@pytest.mark.parametrize("name", ["inputs", "profiles", "values", "buckets", "options", "inspection", "notes"])
@pytest.mark.parametrize("wrong", [[1], 1, None, "x"])
def test_a_report_that_was_edited(report: BuildResult, name: str, wrong: object) -> None:
    plain = json.loads(report_path(report.path).read_text())
    report_path(report.path).write_text(json.dumps({**plain, name: wrong}))
    with contextlib.suppress(BadInput):  # a list or a text may pass for another; it is one line in any case
        read_report(report.path)


def test_what_looks_like_a_report(report: BuildResult, tmp_path: Path) -> None:
    path = report_path(report.path)
    assert is_report(path)
    path.write_bytes(path.read_bytes()[:100])
    assert is_report(path)
    path.write_text('{"model": {"format": 1}}')
    assert not is_report(path) and not is_report(tmp_path / "absent") and not is_report(tmp_path)


def test_nothing_there(report: BuildResult, tmp_path: Path) -> None:
    report_path(report.path).unlink()
    with pytest.raises(BadInput, match=r"there is no model\.engine\.json beside it"):
        read_report(report.path)
    with pytest.raises(BadInput, match="no such engine"):
        read_report(tmp_path / "absent")


def test_where_it_fits(report: BuildResult) -> None:
    check_fits(report, "10.9.0.34", "a GPU", "8.6")
    check_fits(report, "10.9.0.34", None, None)
    newer = replace(report, options=BuildOptions(version_compatible=True, hardware_compatibility="ampere-plus"))
    check_fits(newer, "11.4.0.106", "another", "12.0")
    rtx = replace(report, backend="tensorrt-rtx")
    check_fits(rtx, report.version, "any", "12.0")
    named = replace(rtx, options=BuildOptions(compute_capabilities=("sm89", "current")))
    check_fits(named, report.version, "a GPU", "8.6")
    check_fits(named, report.version, "a GPU", "8.9")


@pytest.mark.parametrize(
    ("options", "backend", "version", "capability", "line"),
    [
        (
            BuildOptions(),
            "tensorrt",
            "10.16.1.11",
            "8.6",
            "the engine was built by tensorrt 10.9.0.34, and here is 10.16.1.11"
            " (build it again here, or install 10.9.0.34)",
        ),
        (
            BuildOptions(version_compatible=True),
            "tensorrt",
            "10.8.0.1",
            "8.6",
            "the engine was built by tensorrt 10.9.0.34, and here is 10.8.0.1"
            " (build it again here, or install 10.9.0.34)",
        ),
        (
            BuildOptions(hardware_compatibility="same-compute-capability"),
            "tensorrt",
            "10.9.0.34",
            "8.9",
            "the engine was built on a GPU (compute capability 8.6), and this GPU has 8.9"
            " (build it again here, or build it with --hardware-compatibility ampere-plus)",
        ),
        (
            BuildOptions(hardware_compatibility="ampere-plus"),
            "tensorrt",
            "10.9.0.34",
            "7.5",
            "the engine was built on a GPU (compute capability 8.6), and this GPU has 7.5"
            " (build it again here, or build it with --hardware-compatibility ampere-plus)",
        ),
        (
            BuildOptions(compute_capabilities=("sm86", "sm120")),
            "tensorrt-rtx",
            "10.9.0.34",
            "8.9",
            "the engine was built for sm120, sm86, and this GPU is sm89"
            " (build it with another --compute-capability, or without)",
        ),
    ],
)
def test_where_it_does_not_fit(
    report: BuildResult, options: BuildOptions, backend: str, version: str, capability: str, line: str
) -> None:
    with pytest.raises(GraphoptError) as caught:
        check_fits(replace(report, options=options, backend=backend), version, "this GPU", capability)
    assert str(caught.value) == f"{report.path}: {line}"
