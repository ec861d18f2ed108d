"""Results of computations: kept, spilled, found again, and never taken for another's."""

from __future__ import annotations

import enum
import gc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import BadInput, GraphoptError
from graphopt.store import Store, digest


def _never() -> dict[str, np.ndarray]:
    raise AssertionError("it was computed again")


DTYPES = [
    *("float32", "float64", "float16", "int64", "uint8", "bool"),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_a_spilled_result_comes_back_to_the_bit(dtype: object, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = np.asarray(np.random.default_rng(0).integers(0, 8, shape)).astype(dtype)  # type: ignore[call-overload]
    Store(tmp_path).arrays("a", lambda: {"values": values, "turned": values.T})
    found = Store(tmp_path).arrays("a", _never)
    for name, wanted in (("values", values), ("turned", values.T)):
        assert (found[name].dtype, found[name].shape) == (wanted.dtype, wanted.shape)
        assert found[name].tobytes() == wanted.tobytes()


def test_what_goes_beyond_the_limit_goes_to_disk_and_is_not_computed_again() -> None:
    store = Store(limit=3000)
    wanted = {str(i): np.full(250, i, np.float32) for i in range(10)}
    for key, array in wanted.items():
        store.arrays(key, lambda array=array: {"x": array})  # type: ignore[misc]
    assert sum(a["x"].nbytes for a in store._held.values()) <= 3000
    for key, array in wanted.items():
        np.testing.assert_array_equal(store.arrays(key, _never)["x"], array)


def test_what_was_read_last_stays_in_memory() -> None:
    store = Store(limit=2000)
    for key in "ab":
        store.arrays(key, lambda: {"x": np.zeros(200, np.float32)})
    store.arrays("a", _never)
    store.arrays("c", lambda: {"x": np.zeros(200, np.float32)})
    assert list(store._held) == ["a", "c"]


def test_one_result_larger_than_the_limit_is_held() -> None:
    store = Store(limit=10)
    store.arrays("a", lambda: {"x": np.zeros(200)})
    assert store.arrays("a", _never)["x"].size == 200


def test_a_folder_of_its_own_goes_with_the_store() -> None:
    store = Store(limit=1)
    for key in "ab":
        store.arrays(key, lambda: {"x": np.zeros(20)})
    folder = store._folder
    assert folder is not None and folder.exists()
    del store
    gc.collect()
    assert not folder.exists()


def test_a_given_folder_is_made_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "one" / "two"
    Store(folder).arrays("a", lambda: {"x": np.arange(3)})
    gc.collect()
    assert [path.name for path in folder.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("size", [0, 1, 4, 30, 200, -1])
def test_half_a_file_is_computed_anew(size: int, tmp_path: Path) -> None:
    Store(tmp_path).arrays("a", lambda: {"x": np.arange(100.0)})
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[:size])
    found = Store(tmp_path).arrays("a", lambda: {"x": np.arange(5.0)})
    assert found["x"].size == 5
    assert Store(tmp_path).arrays("a", _never)["x"].size == 5


def test_a_damaged_file_is_computed_anew(tmp_path: Path) -> None:
    Store(tmp_path).arrays("a", lambda: {"x": np.arange(100.0)})
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[300] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    assert Store(tmp_path).arrays("a", lambda: {"x": np.arange(5.0)})["x"].size == 5


@pytest.mark.parametrize("content", [b"no archive", b"PK\x03\x04", b"\x93NUMPY"])
def test_another_file_of_that_name_is_no_result(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    assert Store(tmp_path).arrays("a", lambda: {"x": np.arange(5.0)})["x"].size == 5


def test_what_a_kill_left_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_bytes(b"PK")
    Store(tmp_path).arrays("a", lambda: {"x": np.arange(5.0)})
    assert Store(tmp_path).arrays("a", _never)["x"].size == 5


def test_nothing_half_written_is_left_by_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(GraphoptError, match="No space left"):
        Store(tmp_path).arrays("a", lambda: {"x": np.arange(5.0)})
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(BadInput, match="cannot make the folder"):
        Store(tmp_path / "taken")


def test_an_exception_keeps_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError):
        store.arrays("a", lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert store.arrays("a", lambda: {"x": np.zeros(1)})["x"].size == 1


def test_a_tensor_is_fetched_when_it_is_read() -> None:
    store, calls = Store(limit=1), []

    def compute() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"x": np.ones((200, 200), np.float32)}

    tensor = store.tensor("a", "x", compute, ir.DataType.FLOAT, (200, 200))
    assert calls == [] and tuple(tensor.shape.numpy()) == (200, 200)
    store.arrays("b", lambda: {"x": np.zeros(5)})
    assert tensor.numpy().sum() == 40000 and tensor.numpy().sum() == 40000
    assert calls == [1]


# ---- digests --------------------------------------------------------------------------------------------------------


class _Colour(enum.Enum):
    RED = 1
    BLUE = 2


A = np.arange(6, dtype=np.float32)


def test_computations_use_one_thread() -> None:
    """The same bytes on any number of cores."""
    from threadpoolctl import threadpool_info, threadpool_limits  # type: ignore[import-untyped]

    def threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    with threadpool_limits(2, user_api="blas"):
        found = Store().arrays("a", lambda: {"threads": np.array(threads())})
        assert set(found["threads"]) == {1}
        assert set(threads()) == {2}


DIFFERENT: list[tuple[object, ...]] = [
    (),
    (A,),
    (A.reshape(2, 3),),
    (A.reshape(3, 2),),
    (A.reshape(2, 3).T,),
    (A.astype(np.float64),),
    (A.view(np.int32),),
    (np.nextafter(A, np.float32(9)),),
    (A, A),
    ([A, A],),
    ([A], [A]),
    (np.array([0.0], np.float32),),
    (np.array([-0.0], np.float32),),
    (A[:0],),
    (A[:0].reshape(0, 3),),
    (A.astype(ml_dtypes.bfloat16),),
    (A.astype(np.float16),),
    (ir.tensor(A),),
    (ir.tensor(A.reshape(2, 3)),),
    ("ab",),
    ("a", "b"),
    ("a", ""),
    ("", "a"),
    ("a;'b'",),
    (("a", "b"),),
    (("a",), "b"),
    (1,),
    (1.0,),
    (True,),
    ("1",),
    (None,),
    (0.1,),
    (0.1 + 2**-55,),
    (_Colour.RED,),
    (_Colour.BLUE,),
    # numpy leaves out the middle of a large array when it writes it as text.
    ((np.zeros(5000),),),
    ((np.eye(1, 5000, 2500)[0],),),
]


def test_digests_differ_when_any_part_does() -> None:
    keys = [digest(*parts) for parts in DIFFERENT]
    assert len(set(keys)) == len(keys)
    assert keys == [digest(*parts) for parts in DIFFERENT]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (), (0, 2)])
def test_equal_content_has_an_equal_digest_wherever_it_is(dtype: type, shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.asarray(np.random.default_rng(1).standard_normal(shape)).astype(dtype)
    held = ir.tensor(array)
    (tmp_path / "weights").write_bytes(b"\0" * 64 + array.tobytes())
    stored = ir.ExternalTensor(
        "weights", 64, array.nbytes, held.dtype, shape=ir.Shape(shape), name="w", base_dir=str(tmp_path)
    )
    lazy = ir.LazyTensor(lambda: held, dtype=held.dtype, shape=ir.Shape(shape))
    assert digest(held) == digest(stored) == digest(lazy)
    assert digest(np.array(array, order="F")) == digest(array)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=4), max_size=4), st.lists(st.text(max_size=4), max_size=4))
def test_lists_of_settings_do_not_run_together(one: list[str], other: list[str]) -> None:
    assert (digest(*one) == digest(*other)) == (one == other)
