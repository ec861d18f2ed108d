"""State dicts in files: every dtype, every container, and what is refused in one line."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from graphopt.errors import BadInput
from graphopt.importing.states import open_state


def write(path: Path, header: object, content: bytes) -> Path:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


def test_safetensors_dtypes_without_torch(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([1.5, -2.0], ml_dtypes.bfloat16),
        "c": np.array([3, 4], np.int64),
        "d": np.array(0.5, np.float16),
        "e": np.array([True, False]),
    }
    names = {"a": "F32", "b": "BF16", "c": "I64", "d": "F16", "e": "BOOL"}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    content = b""
    for name, array in arrays.items():
        data = array.tobytes()
        header[name] = {
            "dtype": names[name],
            "shape": list(array.shape),
            "data_offsets": [len(content), len(content) + len(data)],
        }
        content += data
    state = open_state(write(tmp_path / "s.safetensors", header, content))
    assert dict(state.shapes) == {name: array.shape for name, array in arrays.items()}
    for name, array in arrays.items():
        found = state.read(name)
        assert found.dtype == array.dtype == state.dtype(name)
        np.testing.assert_array_equal(found, array)


def test_what_the_library_writes(tmp_path: Path) -> None:
    numpy_of = pytest.importorskip("safetensors.numpy")
    numpy_of.save_file({"w": np.arange(6.0).reshape(2, 3)}, tmp_path / "s.safetensors")
    np.testing.assert_array_equal(open_state(tmp_path / "s.safetensors").read("w"), np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    ("header", "content"),
    [
        (b"no json", b""),
        ([1, 2], b""),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"too short"),
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}, bytes(16)),
        ({"w": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16)),
        ({"w": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}, bytes(16)),
    ],
)
def test_a_damaged_safetensors_file(tmp_path: Path, header: object, content: bytes) -> None:
    with pytest.raises(BadInput, match="is no safetensors file, or cut off"):
        open_state(write(tmp_path / "s.safetensors", header, content))


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").write_bytes(struct.pack("<Q", 1 << 60))
    with pytest.raises(BadInput, match="cut off"):
        open_state(tmp_path / "s.safetensors")
    (tmp_path / "s.safetensors").write_bytes(b"abc")
    with pytest.raises(BadInput, match="cut off"):
        open_state(tmp_path / "s.safetensors")


def test_a_dtype_that_is_not_known_says_so_when_it_is_read(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}
    state = open_state(write(tmp_path / "s.safetensors", {"w": entry}, bytes(2)))
    assert state.shapes == {"w": (4,)}
    with pytest.raises(BadInput, match="w: has the dtype F4"):
        state.read("w")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_torch_files(tmp_path: Path, old: bool, wrapped: bool) -> None:
    torch = pytest.importorskip("torch")
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5]).bfloat16(), "n": torch.tensor(2)}
    content = {"state_dict": {**tensors}, "epoch": 3} if wrapped else tensors
    torch.save(content, tmp_path / "s.pt", _use_new_zipfile_serialization=not old)
    state = open_state(tmp_path / "s.pt")
    assert dict(state.shapes) == {"a.weight": (2, 3), "b": (1,), "n": ()}
    np.testing.assert_array_equal(state.read("a.weight"), np.arange(6, dtype=np.float32).reshape(2, 3))
    assert state.read("b").dtype == state.dtype("b") == ml_dtypes.bfloat16
    assert float(state.read("b")[0]) == 1.5
    assert state.dtype("n") == np.int64


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("was-run"),))


def test_code_in_a_torch_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Code()}, tmp_path / "s.pt")
    with pytest.raises(BadInput, match="holds more than tensors, and its code is not run"):
        open_state(tmp_path / "s.pt")
    (tmp_path / "t.bin").write_bytes(pickle.dumps({"w": Code()}))
    with pytest.raises(BadInput, match=r"code is not run|cannot read it"):
        open_state(tmp_path / "t.bin")
    assert not (tmp_path / "was-run").exists()


def test_other_torch_files(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.zeros(2), tmp_path / "s.pt")
    with pytest.raises(BadInput, match="holds a Tensor, not a state dict"):
        open_state(tmp_path / "s.pt")
    (tmp_path / "s.pt").write_bytes((tmp_path / "s.pt").read_bytes()[:40])
    with pytest.raises(BadInput, match="torch cannot read it"):
        open_state(tmp_path / "s.pt")


@pytest.mark.parametrize("content", [b"abc" * 50, b"hello", b"", b"\x80\x02.", b"PK\x03\x04" + bytes(60)])
def test_files_that_are_no_torch_files(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "s.pt").write_bytes(content)
    with pytest.raises(BadInput, match="torch cannot read it"):
        open_state(tmp_path / "s.pt")


@pytest.mark.parametrize("old", [False, True])
def test_damaged_torch_files(old: bool, tmp_path: Path) -> None:
    """Wherever a byte is wrong, or the end is missing: it is read, or refused in one line."""
    torch = pytest.importorskip("torch")
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "s.pt", _use_new_zipfile_serialization=not old)
    whole = (tmp_path / "s.pt").read_bytes()
    refused = 0
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0xA5
        for content in (damaged, whole[:place]):
            (tmp_path / "s.pt").write_bytes(content)
            try:
                open_state(tmp_path / "s.pt")
            except BadInput:
                refused += 1
    assert refused > len(whole) // 7  # all that are cut off, and some of the others


def test_a_folder_of_shards(tmp_path: Path) -> None:
    numpy_of = pytest.importorskip("safetensors.numpy")
    numpy_of.save_file({"a": np.zeros(2)}, tmp_path / "1.safetensors")
    numpy_of.save_file({"b": np.ones(3)}, tmp_path / "2.safetensors")
    state = open_state(tmp_path)
    assert dict(state.shapes) == {"a": (2,), "b": (3,)}
    np.testing.assert_array_equal(state.read("b"), np.ones(3))
    assert state.dtype("b") == np.float64
    numpy_of.save_file({"a": np.zeros(2)}, tmp_path / "3.safetensors")
    with pytest.raises(BadInput, match=r"1\.safetensors and 3\.safetensors both hold a"):
        open_state(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        open_state(tmp_path / "s.safetensors")
    with pytest.raises(BadInput, match=r"holds no \.safetensors"):
        open_state(tmp_path)
    (tmp_path / "s.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"is no state dict by its name \(\.gguf\)"):
        open_state(tmp_path / "s.gguf")
