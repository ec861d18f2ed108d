"""Engines in a Triton repository, from the report beside them: what the tensorrt backend would ask holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graphopt.engines.options import BuildOptions
from graphopt.engines.report import EngineTensor, read_report
from graphopt.errors import BadInput
from graphopt.packaging import TritonModel, package_triton
from tests.packaging.common import engine, sizes, tensor
from tests.packaging.server import check_tensorrt, data_type

X, Y = tensor("x", -1, 3), tensor("y", -1, 5)
ONE = {"x": sizes((1, 3), (4, 3), (8, 3))}


def packaged(folder: Path, how: dict[str, Any] | None = None, **report: Any) -> tuple[TritonModel, Any]:
    """What is said of an engine in a repository, and its configuration, which a server would take."""
    path = engine(folder, **report)
    made = package_triton(path, folder / "models", **(how or {}))
    return made, check_tensorrt(made.path, read_report(path))


def test_a_batch_from_the_profile(tmp_path: Path) -> None:
    made, config = packaged(tmp_path, inputs=[X], outputs=[Y], profiles=ONE)
    assert (config.platform, config.backend, config.max_batch_size) == ("tensorrt_plan", "tensorrt", 8)
    assert list(config.input[0].dims) == [3] and list(config.output[0].dims) == [5]
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert (made.name, made.needs) == ("m", "TensorRT 10.9.0.34")
    assert (made.path / "1/model.plan").read_bytes() == (tmp_path / "m.engine").read_bytes()


def test_the_smallest_of_the_inputs(tmp_path: Path) -> None:
    both = ONE | {"z": sizes((1,), (2,), (6,))}
    _, config = packaged(tmp_path, inputs=[X, tensor("z", -1)], outputs=[Y], profiles=both)
    assert config.max_batch_size == 6 and list(config.dynamic_batching.preferred_batch_size) == [2, 6]
    assert list(config.input[1].dims) == [1] and list(config.input[1].reshape.shape) == []


def test_fewer_than_it_was_built_for(tmp_path: Path) -> None:
    _, config = packaged(tmp_path, {"max_batch": 4, "instances": 2}, inputs=[X], outputs=[Y], profiles=ONE)
    assert config.max_batch_size == 4 and list(config.dynamic_batching.preferred_batch_size) == [4]
    assert config.instance_group[0].count == 2


def test_more_than_it_was_built_for(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="built for batches up to 8"):
        packaged(tmp_path, {"max_batch": 9}, inputs=[X], outputs=[Y], profiles=ONE)


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ({"inputs": [tensor("x", 4, 3)], "outputs": [tensor("y", 4, 5)]}, "the first axis of 'x' is 4"),
        ({"inputs": [X], "outputs": [tensor("y", 5)], "profiles": ONE}, "the first axis of 'y' is 5"),
        ({"inputs": [tensor("x", -1, -1)], "outputs": [tensor("y", -1)],
          "profiles": {"x": sizes((2, 1), (4, 8), (8, 16))}}, "takes 2 rows or more"),
        ({"inputs": [X, tensor("z", -1)], "outputs": [Y], "profiles": ONE | {"z": sizes((3,), (4,), (8,))}},
         "takes 3 rows or more"),
        ({"inputs": [X, tensor("s", 2, dtype="int64")], "outputs": [Y], "profiles": ONE,
          "values": {"s": sizes((1, 1), (2, 2), (3, 3))}}, "'s' holds sizes"),
        ({"inputs": [X], "outputs": [Y], "profiles": ONE, "buckets": ({"n": 1}, {"n": 4}, {"n": 8})}, "single sizes"),
    ],
)  # fmt: skip
def test_no_batch(report: dict[str, Any], reason: str, tmp_path: Path) -> None:
    made, config = packaged(tmp_path, **report)
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching") and reason in made.why
    assert [tuple(t.dims) for t in config.input] == [t.shape for t in report["inputs"]]
    assert [t.is_shape_tensor for t in config.input] == [t.name in report.get("values", {}) for t in report["inputs"]]


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("float16", "TYPE_FP16"), ("bfloat16", "TYPE_BF16"), ("float32", "TYPE_FP32"), ("bool", "TYPE_BOOL"),
     ("int8", "TYPE_INT8"), ("uint8", "TYPE_UINT8"), ("int32", "TYPE_INT32"), ("int64", "TYPE_INT64")],
)  # fmt: skip
def test_every_type(dtype: str, wanted: str, tmp_path: Path) -> None:
    _, config = packaged(tmp_path, inputs=[tensor("x", 2, dtype=dtype)], outputs=[tensor("y", 2, dtype=dtype)])
    assert data_type(config.input[0]) == data_type(config.output[0]) == wanted


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ({"backend": "tensorrt-rtx"}, "an engine of tensorrt-rtx, and Triton has no backend for those (build it with"),
        ({"options": BuildOptions(strip_weights=True)}, "holds no weights"),
        ({"inputs": [tensor("x", 2, dtype="float8_e4m3fn")], "outputs": [Y]}, "'x': is float8_e4m3fn"),
        ({"inputs": [tensor("x")], "outputs": [Y]}, "'x' has no axes"),
        ({"inputs": [tensor("x", 0)], "outputs": [Y]}, "'x' has an axis of size 0"),
        ({"inputs": [X], "outputs": [EngineTensor("y", "float32", None)]}, "'y': has no fixed number of axes"),
        ({"hash": "other"}, "the report of another engine"),
    ],
)
def test_what_cannot_be_served(report: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        packaged(tmp_path, **report)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ({"compute_capability": "9.0"}, "TensorRT 10.9.0.34, a GPU of compute capability 9.0"),
        ({"compute_capability": "8.6", "options": BuildOptions(hardware_compatibility="ampere-plus")},
         "TensorRT 10.9.0.34, a GPU of compute capability 8.0 or higher"),
        ({"options": BuildOptions(version_compatible=True)}, "TensorRT 10.9.0.34 or newer"),
    ],
)  # fmt: skip
def test_what_the_server_needs(report: dict[str, Any], told: str, tmp_path: Path) -> None:
    assert packaged(tmp_path, inputs=[X], outputs=[Y], profiles=ONE, **report)[0].needs == told


def test_without_a_report(tmp_path: Path) -> None:
    path = engine(tmp_path)
    (tmp_path / "m.engine.json").unlink()
    with pytest.raises(BadInput, match=r"no m\.engine\.json beside it"):
        package_triton(path, tmp_path / "models")


def test_an_engine_of_rtx_without_a_report(tmp_path: Path) -> None:
    path = tmp_path / "m.engine"
    path.write_bytes(b"vtrt" + bytes(100))
    with pytest.raises(BadInput, match="Triton has no backend for those"):
        package_triton(path, tmp_path / "models")


def test_an_engine_is_for_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="runs on a GPU"):
        packaged(tmp_path, {"device": "cpu"}, inputs=[X], outputs=[Y], profiles=ONE)
