"""Pivot forms on the way to a TensorRT engine: from ``--plugins`` to what the parser is given and the report says.

The library is played; that TensorRT takes the nodes and the kernels is shown elsewhere as far as it can be without a
GPU (`test_qdp`, `test_plugin_nodes`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt.engines.build as build_module
import graphopt.engines.child.building as building
import graphopt.engines.plugins as plugins_module
import graphopt.plugins.pivot_linear.tensorrt as lowering
from graphopt.cli.main import main
from graphopt.engines import BuildOptions, build_engine, read_report
from graphopt.engines.backends import BACKENDS
from graphopt.engines.child.building import build
from graphopt.engines.child.requests import Request
from graphopt.errors import BadInput, GateFailed, MissingDependency
from tests.engines.fake_backend.library import make_library
from tests.plugins.test_pivot_linear import M, N, R
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
        monkeypatch.setattr("graphopt.engines.plugins.qdp.register_modules", self.register)

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


@pytest.mark.parametrize(
    ("gpu", "times", "wanted"),
    [
        ("a GPU", (1.0, 2.0), "measured faster on a GPU"),
        ("a GPU", (3.0, 2.0), "at 1 rows it takes 3 µs, the products 2 µs"),
        ("another", (1.0, 2.0), "the plugin has not been measured on a GPU"),
    ],
)
def test_a_measurement_decides(
    gpu: str, times: tuple[float, float], wanted: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file of measurements, through the name that the driver gives, to the node that the parser reads."""
    plugin, other = ({"low": time, "median": time, "high": time} for time in times)
    place = {"variant": "row", "dtype": "float32", "sizes": {"inputs": N, "outputs": M, "rank": R}}
    one = {"gpu": gpu, "date": "2026-11-21", "library": "none", **place, "tactic": 1, "plugin": plugin, "other": other}
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"format": 1, "measurements": [{**one, "rows": rows} for rows in (1, 8)]}))
    monkeypatch.setattr(lowering, "MEASURED", file)
    monkeypatch.setattr(build_module, "describe_gpu", lambda: ("a GPU", (8, 9)))
    child = Child(monkeypatch)
    result = build_engine(model, tmp_path / "e", backend="tensorrt", shapes=["batch=1/1/8"])
    taken = wanted.startswith("measured")
    assert len(plugin_nodes(child.parsed[0])) == len(child.registered) == taken
    (told,) = result.plugins["written" if taken else "refused"]
    assert told["reason"] == wanted


def test_what_is_written_is_compared_with_what_was_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Child(monkeypatch)

    def build_it(**more: Any) -> dict[str, Any]:
        result = build_engine(
            model, tmp_path / "e", backend="tensorrt", shapes=["batch=1/1/8"], plugins="always", **more
        )
        verification: dict[str, Any] = result.plugins["verification"]
        return verification

    found = build_it()
    assert found["verdict"] == "passed" and found["cases"] > 0 and found["feeds"] == "synthesised"
    np.savez(tmp_path / "mine.npz", x=np.ones((2, N), np.float32))
    assert build_it(calibration=tmp_path / "mine.npz")["feeds"] == "calibration"
    assert build_it(verify=False) == {"verdict": "skipped"}

    def absent(*_: Any, **__: Any) -> None:
        raise MissingDependency("onnxruntime is not installed")

    monkeypatch.setattr("graphopt.checking.reference_of", absent)
    assert build_it() == {"verdict": "not run", "reason": "onnxruntime is not installed"}


def _swap_pivots(node: ir.Node) -> None:
    positions = node.inputs[4]
    assert positions is not None and positions.const_value is not None
    positions.const_value = ir.tensor(np.roll(positions.const_value.numpy(), 1), name=positions.name)


def _other_form(node: ir.Node) -> None:
    node.attributes["form"] = ir.AttrInt64("form", 1)


def _scaled_bias(node: ir.Node) -> None:
    bias = node.inputs[3]
    assert bias is not None and bias.const_value is not None
    bias.const_value = ir.tensor(bias.const_value.numpy() * np.float32(1.001), name=bias.name)


@pytest.mark.parametrize("fault", [_swap_pivots, _scaled_bias, _other_form])
def test_a_wrong_node_is_found_before_the_build(
    fault: Callable[[ir.Node], None], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(monkeypatch)
    right = plugins_module.lower

    def wrong(model: ir.Model, *given: Any) -> plugins_module.Lowered:
        done = right(model, *given)
        fault(next(node for node in model.graph if node.op_type == "PivotLinear"))
        return done

    monkeypatch.setattr(plugins_module, "lower", wrong)
    with pytest.raises(GateFailed, match="with plugin nodes it does not compute the same") as caught:
        build_engine(model, tmp_path / "e", backend="tensorrt", shapes=["batch=1/1/8"], plugins="always")
    assert caught.value.hint is not None and "--plugins never" in caught.value.hint
    assert child.requests == [] and not (tmp_path / "e").exists()


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
    assert "The plugin nodes mean what was there: the same on 3 made-up inputs, by ONNX Runtime." in printed
    assert "PluginV3" in next(line for line in printed.splitlines() if "plugin fake_tactic" in line)
    assert "layer in the engine, 1 plugin among them; e.json lists" in printed.replace("layers", "layer")
    assert "note: " in printed and "4849" in printed
    assert printed.splitlines()[-1] == "built, not run"
    assert main([*arguments, "always", "--no-verify"]) == 0
    assert "Not verified that the plugin nodes mean what was there (--no-verify)." in capsys.readouterr().out
    assert main([*arguments, "measured"]) == 0
    assert "Not on a plugin: 1 node: " in capsys.readouterr().out
