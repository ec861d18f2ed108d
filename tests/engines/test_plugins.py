"""Plugins as they are declared and found, where models get their nodes, and what was measured of them."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
from onnx import helper

from graphopt.engines.plugins import Choice, Lowered, Plugin, Written, find_plugins, finding, lower, module_of
from graphopt.engines.plugins.measured import load_measurements
from graphopt.errors import BadInput
from graphopt.plugins.pivot_linear.tensorrt import PLUGIN as PIVOT
from tests.engines.registry import harness
from tests.engines.registry.folder.scale_add.tensorrt import PLUGIN as TOY

FOLDER = Path(harness.__file__).parent / "folder"


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """What was found is looked for again."""
    finding._found.cache_clear()
    yield
    finding._found.cache_clear()


def entries(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    found = [SimpleNamespace(name=f"entry{place}", value=value) for place, value in enumerate(values)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found if group == "graphopt.plugins" else [])


# ---- finding them ----------------------------------------------------------------------------------------------------


def test_folders_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.import_module("graphopt.plugins")
    assert list(find_plugins()) == ["PivotLinear"]
    finding._found.cache_clear()
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(FOLDER)])
    found = find_plugins()
    assert list(found) == ["PivotLinear", "ScaleAdd"]
    assert module_of("ScaleAdd") == "graphopt.plugins.scale_add.tensorrt"
    assert found["ScaleAdd"].namespace == "third_party"


def test_a_folder_without_a_tensorrt_module_is_no_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = importlib.import_module("graphopt.plugins")
    (tmp_path / "only_onnx").mkdir()
    (tmp_path / "only_onnx" / "__init__.py").write_text("")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert list(find_plugins()) == ["PivotLinear"]


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, "tests.engines.registry.folder.scale_add.tensorrt")
    assert find_plugins()["ScaleAdd"] is TOY
    assert module_of("ScaleAdd") == "tests.engines.registry.folder.scale_add.tensorrt"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("no_such_module.tensorrt", "entry point entry0: the plugin cannot be imported: No module named"),
        ("json", "entry point entry0: json has no PLUGIN"),
        ("same_name_plugin", "entry point entry0: a plugin called 'PivotLinear' exists already"),
        ("broken_plugin", "entry point entry0: the plugin cannot be imported: division by zero"),
    ],
)
def test_entry_points_that_do_not_work(
    module: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken_plugin.py").write_text("1 / 0")
    (tmp_path / "same_name_plugin.py").write_text(
        "from dataclasses import replace\n"
        "from graphopt.plugins.pivot_linear.tensorrt import PLUGIN as OURS\n"
        "PLUGIN = replace(OURS, namespace='theirs')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entries(monkeypatch, module)
    with pytest.raises(BadInput) as caught:
        find_plugins()
    assert str(caught.value).startswith(reason)


def test_a_name_that_no_plugin_has() -> None:
    with pytest.raises(BadInput, match=r"no plugin 'Nothing' \(there are PivotLinear\)"):
        module_of("Nothing")


# ---- declaring them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"name": "Gelu"}, "an ONNX operator has this name"),
        ({"name": "MatMul"}, "an ONNX operator has this name"),
        ({"name": "Scale.Add"}, "none that TensorRT takes"),
        ({"namespace": "trt"}, "none that TensorRT takes"),
        ({"namespace": "a.b"}, "none that TensorRT takes"),
        ({"inputs": ("outputs",)}, "'outputs' is no name that TensorRT takes"),
        ({"inputs": ("lambda",)}, "'lambda' is no name that TensorRT takes"),
        ({"attributes": (("tactic", "int64"),)}, "'tactic' is no name that TensorRT takes"),
        ({"attributes": (("aot", "int64"),)}, "'aot' is no name that TensorRT takes"),
        ({"attributes": (("x", "int64"),)}, "a name is used twice"),
        ({"attributes": (("a", "float64"),)}, "the attribute 'a' is float64; only int32, int64, float32 arrive"),
        ({"attributes": (("a", "uint8"),)}, "the attribute 'a' is uint8"),
        ({"types": ()}, "it has no inputs, no outputs or no types"),
        ({"types": (("float32", "float32"),)}, "are not 1 + 2 types of tensors"),
        ({"types": (("float32", "float32", "complex64"),)}, "are not 1 + 2 types of tensors"),
        ({"types": (("float32", "float32", "int32"), ("float32", "float16", "int32"))}, "two combinations of types"),
    ],
)
def test_declarations_that_would_fail_later(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadInput, match=re.escape(reason)) as caught:
        replace(TOY, **changed)
    assert str(caught.value).startswith("plugin ")


def test_what_is_declared_is_there() -> None:
    assert TOY.types_of(["float16"]) == ("float16", "float16", "int32")
    assert PIVOT.types_of(["bfloat16"] * 4 + ["int32"]) == ("bfloat16",) * 4 + ("int32",) + ("bfloat16",) * 2


# ---- models ----------------------------------------------------------------------------------------------------------


def never_lowers(result: Lowered) -> Plugin:
    return replace(TOY, lower=lambda model, choice: result)


def calling() -> ir.Model:
    """A model with a function that has the name of a plugin, and a node that calls it."""
    value = helper.make_tensor_value_info
    body = helper.make_function(
        "local", "ScaleAdd", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    graph = helper.make_graph(
        [helper.make_node("ScaleAdd", ["x"], ["y"], domain="local", name="call")],
        "g",
        [value("x", 1, [2])],
        [value("y", 1, [2])],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return ir.from_proto(helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=8))


def test_no_function_keeps_the_name_of_a_plugin() -> None:
    written = Written("ScaleAdd", "n", TOY.types[0], {}, "always")
    model = calling()
    with pytest.raises(BadInput, match=r"calls a function local::ScaleAdd, .* \(inline the model's functions first\)"):
        lower(model, Choice("always"), {"ScaleAdd": never_lowers(Lowered((written,)))})
    assert len(lower(model, Choice("always"), {"ScaleAdd": never_lowers(Lowered())}).written) == 0
    assert len(model.functions) == 1  # nothing was written, so it does no harm
    model.graph.remove(model.graph[0], safe=False)
    lower(model, Choice("always"), {"ScaleAdd": never_lowers(Lowered((written,)))})
    assert not model.functions


@pytest.mark.parametrize(
    ("shape", "sizes", "rows"),
    [
        ([3, 5, 7], {}, (15, 15)),
        ([7], {}, (1, 1)),
        (["b", 5, 7], {"b": (1, 4)}, (5, 20)),
        (["b", "s", 7], {"b": (1, 4), "s": (2, 8)}, (2, 32)),
        (["b", "s", 7], {"b": (1, 4)}, None),
        ([None, 7], {}, None),
        ([], {}, None),
        (None, {}, None),
    ],
)
def test_rows(shape: list[Any] | None, sizes: dict[str, tuple[int, int]], rows: tuple[int, int] | None) -> None:
    assert Choice(sizes=sizes).rows(None if shape is None else ir.Shape(shape)) == rows


# ---- what was measured -----------------------------------------------------------------------------------------------

GOOD = {
    "gpu": "G1",
    "date": "2026-11-21",
    "library": "TensorRT 11.4",
    "variant": "row",
    "dtype": "float16",
    "rows": 1,
    "sizes": {"inputs": 4096},
    "tactic": 1,
    "plugin": {"low": 1.0, "median": 2.0, "high": 3.0},
    "other": {"low": 4.0, "median": 5.0, "high": 6.0},
}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "the file: Invalid JSON"),
        ('{"format": 2}', "format: Input should be 1"),
        ('{"format": 1, "more": 1}', "more: Extra inputs are not permitted"),
        (json.dumps({"format": 1, "measurements": [{**GOOD, "rows": 0}]}), "measurements.0.rows: Input should be"),
        (
            json.dumps({"format": 1, "measurements": [{**GOOD, "plugin": {"low": 3, "median": 2, "high": 4}}]}),
            "measurements.0.plugin: Value error, low ≤ median ≤ high does not hold",
        ),
    ],
)
def test_files_of_measurements_that_say_something_else(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        load_measurements(path)
    assert str(caught.value).startswith(f"{path}: {reason}")


def test_a_file_of_measurements(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"format": 1, "measurements": [GOOD]}))
    (measurement,) = load_measurements(path).measurements
    assert measurement.faster
    path.write_text(
        json.dumps({"format": 1, "measurements": [{**GOOD, "other": {"low": 2.9, "median": 5, "high": 6}}]})
    )
    (measurement,) = load_measurements(path).measurements
    assert not measurement.faster
    with pytest.raises(BadInput, match="cannot be read"):
        load_measurements(tmp_path / "nothing.json")
