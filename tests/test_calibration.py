from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt import calibration
from graphopt.calibration import read_calibration
from graphopt.errors import BadInput

MODEL = """<ir_version: 9, opset_import: ["" : 18]>
g (float[batch, 3] x, int64[batch] label, float scale) => (float[batch, 3] y) { y = Mul(x, scale) }"""
X = np.arange(12, dtype=np.float32).reshape(4, 3)
LABEL = np.arange(4)
SCALE = np.array([1, 2, 3, 4], np.float32)


@pytest.fixture
def inputs() -> list[ir.Value]:
    return list(ir.from_proto(onnx.parser.parse_model(MODEL)).graph.inputs)


def saved(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_samples_along_the_batch_axis_become_batches_of_one(
    tmp_path: Path, inputs: list[ir.Value], save: object
) -> None:
    save(tmp_path / "c.npz", x=X, label=LABEL, scale=SCALE)  # type: ignore[operator]
    feeds = read_calibration(tmp_path / "c.npz", inputs)
    assert len(feeds) == 4
    for index, feed in enumerate(feeds):
        np.testing.assert_array_equal(feed["x"], X[index : index + 1])
        np.testing.assert_array_equal(feed["label"], [index])
        assert feed["scale"].shape == () and feed["scale"] == SCALE[index]
    np.testing.assert_array_equal(feeds[-1]["x"], X[3:])
    assert [feed["label"][0] for feed in feeds[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        feeds[4]


def test_one_axis_more_makes_each_sample_a_whole_input(tmp_path: Path, inputs: list[ir.Value]) -> None:
    whole = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    path = saved(tmp_path / "c.npz", x=whole, label=np.zeros((2, 5), np.int64), scale=SCALE[:2])
    feeds = read_calibration(path, inputs)
    assert len(feeds) == 2
    np.testing.assert_array_equal(feeds[1]["x"], whole[1])


def test_fortran_order_reads_the_same(tmp_path: Path, inputs: list[ir.Value]) -> None:
    path = saved(tmp_path / "c.npz", x=np.asfortranarray(X), label=LABEL, scale=SCALE)
    np.testing.assert_array_equal(read_calibration(path, inputs)[2]["x"], X[2:3])


def test_a_folder_holds_one_feed_a_file_in_name_order(tmp_path: Path, inputs: list[ir.Value]) -> None:
    for name, value in (("b", 2), ("a", 1), ("c", 3)):
        saved(tmp_path / f"{name}.npz", x=X[:value], label=LABEL[:value], scale=np.float32(value))
    (tmp_path / "readme.txt").write_text("not data")
    feeds = read_calibration(tmp_path, inputs)
    assert [float(feed["scale"]) for feed in feeds] == [1, 2, 3]
    assert [len(feed["x"]) for feed in feeds] == [1, 2, 3]


def test_types_that_numpy_writes_without_a_name(tmp_path: Path) -> None:
    text = '<ir_version: 9, opset_import: ["" : 18]> g (bfloat16[n] x) => (bfloat16[n] y) { y = Identity(x) }'
    inputs = list(ir.from_proto(onnx.parser.parse_model(text)).graph.inputs)
    data = np.array([1, 2.5], ml_dtypes.bfloat16)
    feeds = read_calibration(saved(tmp_path / "c.npz", x=data), inputs)
    assert feeds[1]["x"].dtype == ml_dtypes.bfloat16
    assert float(feeds[1]["x"][0]) == 2.5


def test_feeds_are_read_one_at_a_time(tmp_path: Path, inputs: list[ir.Value], monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "c.npz", x=X, label=LABEL, scale=SCALE)
    rows: list[int] = []
    original = calibration._row
    monkeypatch.setattr(calibration, "_row", lambda member, at: (rows.append(at), original(member, at))[1])
    feeds = iter(read_calibration(path, inputs))
    assert rows == []
    next(feeds)
    assert rows == [0, 0, 0]


GOOD = {"x": X, "label": LABEL, "scale": SCALE}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "there is no array for input 'label' (it holds x, scale)"),
        ({"lable": LABEL}, "array 'lable' is not an input of the model (did you mean 'label'?)"),
        ({"zzz": LABEL}, "array 'zzz' is not an input of the model (inputs: x, label, scale)"),
        ({"x": X.astype(np.float64)}, "input 'x': the dtype is float64, the model takes float32"),
        ({"x": X[:, :2]}, "input 'x': a sample has shape [1, 2], the model takes [batch, 3]"),
        ({"x": X[:, :, None, None]}, "input 'x': a sample has shape [3, 1, 1], the model takes [batch, 3]"),
        ({"label": LABEL[:3]}, "the inputs differ in their number of samples: 'x' 4, 'label' 3, 'scale' 4"),
        ({"scale": np.float32(1)}, "input 'scale': a single number holds no samples (first axis: the samples)"),
        ({"x": X[:0], "label": LABEL[:0], "scale": SCALE[:0]}, "no samples"),
        ({"label": LABEL.astype(object)}, "'label': object arrays are not read"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, inputs: list[ir.Value], change: dict[str, object], message: str
) -> None:
    arrays = {name: value for name, value in (GOOD | change).items() if value is not None}
    path = saved(tmp_path / "c.npz", **arrays)
    with pytest.raises(BadInput) as caught:
        read_calibration(path, inputs)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith(message)


def test_a_file_in_a_folder_that_does_not_fit_is_named(tmp_path: Path, inputs: list[ir.Value]) -> None:
    saved(tmp_path / "a.npz", x=X, label=LABEL, scale=np.float32(1))
    saved(tmp_path / "b.npz", x=X, label=LABEL.astype(np.int32), scale=np.float32(1))
    with pytest.raises(BadInput, match=r"b\.npz: input 'label': the dtype is int32, the model takes int64"):
        read_calibration(tmp_path, inputs)


def test_paths_that_hold_no_data(tmp_path: Path, inputs: list[ir.Value]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"empty: the folder holds no \.npz file"):
        read_calibration(tmp_path / "empty", inputs)
    with pytest.raises(BadInput, match=r"absent\.npz: no such file"):
        read_calibration(tmp_path / "absent.npz", inputs)
    np.save(tmp_path / "plain.npy", X)
    with pytest.raises(BadInput, match=r"plain\.npy: not an \.npz file"):
        read_calibration(tmp_path / "plain.npy", inputs)
    whole = saved(tmp_path / "cut.npz", **GOOD).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"cut\.npz: not an \.npz file"):
        read_calibration(tmp_path / "cut.npz", inputs)
