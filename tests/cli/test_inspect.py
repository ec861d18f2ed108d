from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.cli.main import main
from graphopt.files import load_model, save_model
from graphopt.inspection import inspect, scan_values, scan_weights
from tests.files import sources
from tests.models.text import model_from_text


def value(name: str, shape: list[int | str | None] | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def nested_model() -> onnx.ModelProto:
    """An If in a Loop, a function, a runtime's op, weights in three places."""
    inner = helper.make_graph([helper.make_node("Neg", ["carried"], ["n"])], "then", [], [value("n", None)])
    other = helper.make_graph(
        [helper.make_node("Mul", ["carried", "scale"], ["m"])],
        "else",
        [],
        [value("m", None)],
        [helper.make_tensor("scale", TensorProto.FLOAT, [], [2.0])],
    )
    body = helper.make_graph(
        [
            helper.make_node("If", ["go"], ["next"], name="inner", then_branch=inner, else_branch=other),
            helper.make_node("Identity", ["go"], ["still"]),
        ],
        "body",
        [value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("carried", None)],
        [value("still", [], TensorProto.BOOL), value("next", None)],
    )
    nodes = [
        helper.make_node("Twice", ["x"], ["x2"], domain="local"),
        helper.make_node("FusedMatMul", ["x2", "w"], ["p"], domain="com.microsoft"),
        helper.make_node("Loop", ["trips", "", "p"], ["y"], name="outer", body=body),
    ]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], imports[:1]
    )
    weights = [
        numpy_helper.from_array(np.ones((4, 8), np.float32), "w"),
        numpy_helper.from_array(np.array(3), "trips"),
        numpy_helper.from_array(np.zeros((2, 4), np.float32), "x"),
    ]
    inputs = [value("x", ["batch", 4])]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", ["batch", None])], weights)
    proto = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)
    proto.producer_name, proto.producer_version = "maker", "1.2"
    proto.metadata_props.add(key="task", value="none")
    return proto


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(nested_model().SerializeToString())
    return path


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_counts_bodies_and_functions(nested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, str(nested))
    assert found["ops"] == {
        "Add": 1,
        "Identity": 1,
        "If": 1,
        "Loop": 1,
        "Mul": 1,
        "Neg": 1,
        "com.microsoft::FusedMatMul": 1,
        "local::Twice": 1,
    }
    assert found["nodes"] == 8
    assert found["producer"] == "maker 1.2"
    assert found["opsets"] == {"ai.onnx": 17, "local": 1}
    assert found["inputs"] == [{"name": "x", "type": "FLOAT", "shape": ["batch", 4], "has_default": True}]
    assert found["outputs"] == [{"name": "y", "type": "FLOAT", "shape": ["batch", None], "has_default": False}]
    assert found["parameters"] == 4 * 8 + 1 + 8 + 1
    assert found["weight_bytes"] == 4 * (32 + 8 + 1) + 8
    assert found["weights_by_dtype"]["FLOAT"] == {"tensors": 3, "elements": 41, "bytes": 164}
    assert [w["name"] for w in found["largest_weights"]] == ["w", "x", "trips", "scale"]
    assert found["functions"] == {"local::Twice": 1}
    assert found["metadata"] == {"task": "none"}
    assert found["control_flow"] == [
        {
            "op": "Loop",
            "name": "outer",
            "bodies": [
                {
                    "attribute": "body",
                    "nodes": 2,
                    "children": [
                        {
                            "op": "If",
                            "name": "inner",
                            "bodies": [
                                {"attribute": "else_branch", "nodes": 1, "children": []},
                                {"attribute": "then_branch", "nodes": 1, "children": []},
                            ],
                        }
                    ],
                }
            ],
        }
    ]
    assert found["custom_ops"] == [
        {"domain": "com.microsoft", "op": "FusedMatMul", "version": None, "count": 1, "has_function": False},
        {"domain": "local", "op": "Twice", "version": 1, "count": 1, "has_function": True},
    ]
    assert "values" not in found


def test_external_data_is_listed_and_not_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proto = sources.model([sources.tensor("w", "FLOAT", (10, 100)), sources.tensor("v", "BFLOAT16", (7,))])
    path = sources.write(proto, tmp_path / "m.onnx", external=True)
    found = as_json(capsys, str(path))
    size = (tmp_path / "m.bin").stat().st_size
    assert found["data_files"] == [{"location": "m.bin", "bytes": size, "tensors": 2}]
    assert found["largest_weights"][0] == {
        "name": "w",
        "dtype": "FLOAT",
        "shape": [10, 100],
        "bytes": 4000,
        "file": "m.bin",
    }
    assert inspect(path).weights_by_dtype["BFLOAT16"].bytes == 14
    assert inspect(path).values is None
    assert len(inspect(path, weights=True).values or ()) == 2


@pytest.mark.parametrize("options", [[], ["--weights"], ["--verbose"], ["--weights", "-v"], ["--channels"]])
def test_the_tables_fit_100_columns_and_name_everything(
    nested: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main(["inspect", str(nested), *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 100
    for text in ("maker 1.2", "[batch, 4] (has a default)", "FusedMatMul", "If inner", "else_branch: 1 node", "trips"):
        assert text in out


def test_long_names_fit_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a_very_long_module_path." * 12 + "weight"
    path = sources.write(sources.model([sources.tensor(name, "FLOAT", (10, 1000))]), tmp_path / "m.onnx")
    for options in ([], ["--weights"], ["--channels"]):
        assert main(["inspect", str(path), *options]) == 0
        assert max(len(line.rstrip()) for line in capsys.readouterr().out.splitlines()) <= 100


def test_long_lists_are_cut_and_verbose_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = [sources.tensor(f"weight_{i:02}", "FLOAT", (100 - i,)) for i in range(30)]
    path = sources.write(sources.model(tensors), tmp_path / "m.onnx")
    assert main(["inspect", str(path)]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(("weight_", "..."))]
    assert lines == [*(f"weight_{i:02}" for i in range(12)), "..."]
    assert main(["inspect", str(path), "-v"]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(("weight_", "..."))]
    assert lines == [f"weight_{i:02}" for i in range(30)]


def test_values_of_a_weight() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6) + 1
    array[1, :] = 5  # a constant slice of the first axis
    array[:, 2] = 0
    array[1, 2] = 5
    array[3, 3], array[3, 4], array[2, 5] = np.nan, -np.inf, 70_000
    found = scan_values("w", ir.tensor(array))
    assert (found.nan, found.inf, found.over_float16) == (1, 1, 1)
    assert found.zeros == 3 / 24
    assert (found.min, found.max) == (0.0, 70_000.0)
    assert (found.constant_first, found.constant_last) == (1, 0)
    column = np.arange(12, dtype=np.float64).reshape(4, 3)
    column[:, 1] = -2
    assert scan_values("w", ir.tensor(column)).constant_last == 1


def test_slices_of_a_convolution_count_over_every_other_axis() -> None:
    array = np.random.default_rng(0).standard_normal((5, 3, 3, 3)).astype(np.float32)
    array[2] = 0.25
    array[4, 0] = 0.5
    found = scan_values("w", ir.tensor(array))
    assert (found.constant_first, found.constant_last) == (1, 0)


def test_a_scan_in_blocks_is_the_scan_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    array = rng.standard_normal((37, 5, 11)).astype(np.float32)
    array[rng.random(array.shape) < 0.1] = 0
    array[7], array[:, :, 3] = 1.5, 1.5
    whole = scan_values("w", ir.tensor(array))
    assert (whole.constant_first, whole.constant_last) == (1, 1)
    for block in (1, 10, 100, 1000):
        monkeypatch.setattr("graphopt.inspection._SCAN_BLOCK", block)
        assert scan_values("w", ir.tensor(array)) == whole


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 4), np.float32),
        np.array(3.5, np.float16),
        np.array([], np.int64),
        np.array([True, False]),
        np.array([-8, 7], ml_dtypes.int4),
        np.array([0.5, 6.0], ml_dtypes.float4_e2m1fn),
        np.array([1e38, -1e38], ml_dtypes.bfloat16),
        np.full((3, 2), np.nan, np.float32),
        np.array([2**62], np.int64),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_odd_weights(array: np.ndarray[Any, Any]) -> None:
    found = scan_values("w", ir.tensor(array))
    as_float = array.astype(np.float64)
    finite = as_float[np.isfinite(as_float)]
    assert found.min == (float(finite.min()) if finite.size else None)
    assert found.max == (float(finite.max()) if finite.size else None)
    assert found.nan == int(np.isnan(as_float).sum())
    assert found.over_float16 == (2 if array.dtype == ml_dtypes.bfloat16 else 0)
    assert (found.constant_first, found.constant_last) == (0, 0)


def test_a_scan_covers_external_weights_and_leaves_strings_out(tmp_path: Path) -> None:
    tensors = [
        sources.tensor("w", "INT8", (100, 20)),
        sources.tensor("s", sources.STRING, (3,)),
        sources.tensor("f", "FLOAT4E2M1", (99, 7)),
    ]
    path = sources.write(sources.model(tensors), tmp_path / "m.onnx", external=True)
    model = load_model(path)
    seen: list[str] = []
    values = {found.name: found for found in scan_weights(model, seen.append)}
    assert seen == ["w", "s", "f"] and list(values) == ["w", "f"]
    expected = np.frombuffer(sources.payload("INT8", 2000), np.int8)
    assert (values["w"].min, values["w"].max) == (expected.min(), expected.max())
    weight = model.graph.initializers["w"].const_value
    assert weight is not None and weight.tobytes() == expected.tobytes()  # still readable after its pages were dropped


@pytest.fixture
def gated(tmp_path: Path) -> Path:
    """silu(x Wg) * (x Wu) Wd: the hidden channels can be permuted together, and those of Wu and Wd scaled."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n,4] x) => (float[n,4] y) {
        g = MatMul(x, wg) s = Sigmoid(g) a = Mul(g, s) u = MatMul(x, wu) h = Mul(a, u) y = MatMul(h, wd) }"""
    proto = onnx.parser.parse_model(text)
    for name, shape in (("wg", (4, 6)), ("wu", (4, 6)), ("wd", (6, 4))):
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    path = tmp_path / "gated.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_channels_as_json(gated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, str(gated), "--channels")["channels"]
    assert list(found) == ["permutation", "scale", "orthogonal", "linear"]
    assert found["permutation"][0] == {
        "size": 6,
        "weights": ["wg[1]", "wu[1]", "wd[0]"],
        "values": 5,
        "pinned": [],
    }
    assert [one["weights"] for one in found["scale"] if not one["pinned"]] == [["wu[1]", "wd[0]"]]
    assert [one for one in found["linear"] if not one["pinned"]] == []
    reasons = {why for one in found["permutation"] for why in one["pinned"]}
    assert reasons == {"graph input 'x'", "graph output 'y'"}
    assert "channels" not in as_json(capsys, str(gated))


def test_channels_of_weights_in_bodies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are not looked at, and that is said instead of a table of nothing."""
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[2, 4] x, bool c) => (float[2, 4] y) {
        y = If (c) <
            then_branch = t () => (float[2, 4] p) <float[4, 4] w = {1,2,3,4,1,2,3,4,1,2,3,4,1,2,3,4}>
                { h = MatMul (x, w) p = Tanh (h) },
            else_branch = e () => (float[2, 4] q) { q = Neg (x) }
        >
    }"""
    save_model(model_from_text(text), tmp_path / "m.onnx")
    assert main(["inspect", str(tmp_path / "m.onnx"), "--channels"]) == 0
    said = capsys.readouterr().out
    assert "first and last weight" not in said
    assert "channel classes: permutation: none" in said
    assert "1 weights are in bodies" not in said and "1 weight is in a body of If, Loop or Scan" in said


def test_channels_as_tables(gated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(gated), "--channels"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("wg[1] wd[0]"))
    assert row.split() == ["wg[1]", "wd[0]", "6", "3", "5", "free"]
    for group in ("permutation", "scale", "orthogonal", "linear"):
        assert f"channel classes: {group}" in out
    assert "graph input 'x'" in out
