"""Pivot forms on the way to a TensorRT engine: from ``--plugins`` to what the parser is given and the report says.

The library is played; that TensorRT takes the nodes and the kernels is shown elsewhere as far as it can be without a
GPU (`test_qdp`, `test_plugin_nodes`).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

import graphopt.engines.build as build_module
import graphopt.engines.child.building as building
from graphopt.cli.main import main
from graphopt.engines import BuildOptions, build_engine, read_report
from graphopt.engines.backends import BACKENDS
from graphopt.engines.child.building import build
from graphopt.engines.child.requests import Request
from graphopt.errors import BadInput
from tests.engines.fake_backend.library import make_library
from tests.plugins.test_pivot_linear import N
from tests.plugins.test_pivot_linear_tensorrt import case_of

pytest.importorskip("onnx_graphsurgeon")
pytest.importorskip("nvidia.cuda_nvrtc")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    ir.save(case_of("batch", N), path)
    return path


class Child:
    """Builds in this process, with a fake library, and keeps what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: str = "tensorrt 11.4") -> None:
        self.requests: list[Request] = []
        self.parsed: list[onnx.ModelProto] = []
        self.registered: list[tuple[list[str], str]] = []
        self.library = make_library(version)
        monkeypatch.setattr(build_module, "run_child", self.run)
        monkeypatch.setattr(build_module, "find_backend", BACKENDS.__getitem__)
        monkeypatch.setattr("graphopt.engines.qdp.register_modules", self.register)

    def register(self, trt: Any, modules: list[str], architecture: str) -> list[str]:
        self.registered.append((modules, architecture))
        return []

    def run(self, request: Request, *_: Any) -> dict[str, Any]:
        self.requests.append(request)
        self.parsed.append(onnx.load(request.model, load_external_data=False))
        return build(self.library, request, io.StringIO())


def plugin_nodes(parsed: onnx.ModelProto) -> list[str]:
    return [node.name for node in parsed.graph.node if node.op_type == "PivotLinear"]


def test_always(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(monkeypatch)
    result = build_engine(model, tmp_path / "e", backend="tensorrt", shapes=["batch=1/1/8"], plugins="always")
    (node,) = plugin_nodes(child.parsed[0])
    assert child.registered == [(["graphopt.plugins.pivot_linear.tensorrt"], "compute_80")]
    assert [written["node"] for written in result.plugins["written"]] == [node]
    assert result.plugins["architecture"] == "compute_80"
    kernels = result.plugins["kernels"]
    assert kernels and all(kernel["plugin"] == "PivotLinear" and kernel["isa"] == "8.7" for kernel in kernels)
    assert len({kernel["sha256"] for kernel in kernels}) == len(kernels)
    assert any("4849" in note for note in result.notes)  # the sizes vary
    assert read_report(tmp_path / "e").plugins == result.plugins


def test_single_sizes_need_no_warning(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(monkeypatch)
    result = build_engine(
        model, tmp_path / "e", backend="tensorrt", shapes=["batch=1/1/8"], plugins="always", buckets=True
    )
    assert result.notes == ()
    assert [profile["x"]["max"][0] for profile in child.requests[0].profiles] == [1, 2, 4, 8]


@pytest.mark.parametrize("plugins", ["measured", "never"])
def test_not_without_a_measurement(plugins: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(monkeypatch)
    result = build_engine(model, tmp_path / "e", backend="tensorrt", shapes=["batch=1/1/8"], plugins=plugins)
    assert plugin_nodes(child.parsed[0]) == []
    assert child.registered == []
    # Nothing was rewritten: the parser reads the user's own file.
    assert child.requests[0].model == str(model.absolute())
    assert len(result.plugins.get("refused", [])) == (plugins == "measured")


def test_rtx_runs_none_and_says_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(monkeypatch, "tensorrt-rtx 1.7")
    result = build_engine(model, tmp_path / "e", backend="tensorrt-rtx", shapes=["batch=1/1/8"], plugins="always")
    assert plugin_nodes(child.parsed[0]) == []
    (refused,) = result.plugins["refused"]
    assert "TensorRT-RTX runs no plugins" in refused["reason"]


@pytest.mark.parametrize(
    ("options", "architecture"),
    [(BuildOptions(), "compute_89"), (BuildOptions(hardware_compatibility="ampere-plus"), "compute_80")],
)
def test_kernels_are_compiled_for_the_gpu_unless_others_are_to_run_them(
    options: BuildOptions, architecture: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(monkeypatch)
    monkeypatch.setattr(build_module, "describe_gpu", lambda: ("a GPU", (8, 9)))
    build_engine(model, tmp_path / "e", backend="tensorrt", shapes=["batch=1"], plugins="always", options=options)
    assert child.registered[0][1] == architecture


def test_an_unknown_way(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Child(monkeypatch)
    with pytest.raises(BadInput, match="--plugins: 'sometimes' is not a way"):
        build_engine(model, tmp_path / "e", backend="tensorrt", plugins="sometimes")


def test_what_the_command_prints(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Child(monkeypatch)
    monkeypatch.setattr(building, "describe_gpu", lambda: ("a GPU", (8, 9)))
    out = str(tmp_path / "e")
    arguments = ["build", str(model), "-o", out, "--backend", "tensorrt", "--shapes", "batch=1/1/8", "--plugins"]
    assert main([*arguments, "always", "--verbose"]) == 0
    printed = capsys.readouterr().out
    assert "On plugins: 1 PivotLinear (compute_80, PTX 8.7)." in printed
    assert "PluginV3" in next(line for line in printed.splitlines() if "plugin fake_tactic" in line)
    assert "layer in the engine, 1 plugin among them; e.json lists" in printed.replace("layers", "layer")
    assert "note: " in printed and "4849" in printed
    assert printed.splitlines()[-1] == "built, not run"
    assert main([*arguments, "measured"]) == 0
    assert "Not on a plugin: 1 node: " in capsys.readouterr().out
