"""Options of a build: how they are written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt.engines.backends import BACKENDS
from graphopt.engines.options import BuildOptions, check_options, parse_compute_capabilities, parse_size
from graphopt.errors import BadInput


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("512MiB", 512 << 20), ("2GiB", 2 << 30), ("2g", 2 << 30), ("1.5GB", 3 << 29), (" 64 KiB ", 64 << 10)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "2TiB", "GiB", "2 G i B", "1e9", "9999999999G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_size(text)
    assert str(caught.value) == f"--workspace: {text!r} is not a size (for example 2GiB or 512MiB)"


def test_compute_capabilities() -> None:
    assert parse_compute_capabilities("sm86, 8.9,SM_120,current,12.0") == ("sm86", "sm89", "sm120", "current")


@pytest.mark.parametrize("text", ["", "ada", "sm", "8", "sm86,,sm89"])
def test_what_is_no_compute_capability(text: str) -> None:
    with pytest.raises(BadInput, match="is not a compute capability"):
        parse_compute_capabilities(text)


def test_they_go_through_a_report() -> None:
    options = BuildOptions(timing_cache=Path("c"), compute_capabilities=("sm86",), workspace=5, refit=True)
    assert BuildOptions.from_json(json.loads(json.dumps(options.to_json()))) == options


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            BuildOptions(hardware_compatibility="ampere"),
            "--hardware-compatibility: 'ampere' is not a level (there are none, ampere-plus, same-compute-capability)",
        ),
        (BuildOptions(optimization_level=6), "--optimization-level: 6 is not a level (there are 0 to 5)"),
        (BuildOptions(workspace=0), "--workspace: 0 bytes are none (for example 2GiB)"),
    ],
)
def test_values_that_there_are_not(options: BuildOptions, line: str) -> None:
    for backend in BACKENDS.values():
        with pytest.raises(BadInput) as caught:
            check_options(options, backend)
        assert str(caught.value) == line
