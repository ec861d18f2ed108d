"""A model appears in a repository complete or not at all, and takes nobody's place unasked."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from graphopt.errors import BadInput, GraphoptError
from graphopt.packaging import package_triton
from tests.packaging.common import saved
from tests.packaging.server import check_onnxruntime

ONE = "g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }"
OTHER = "g (float[n, 3] x) => (float[n, 3] y) { y = Neg(x) }"
LARGER = "g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_versions_beside_each_other(tmp_path: Path) -> None:
    package_triton(saved(ONE, tmp_path), tmp_path / "models")
    made = package_triton(saved(OTHER, tmp_path), tmp_path / "models", version=2)
    assert sorted(content(made.path)) == ["1/model.onnx", "2/model.onnx", "config.pbtxt"]
    check_onnxruntime(made.path, 1)
    check_onnxruntime(made.path, 2)


def test_a_version_is_not_replaced_unasked(tmp_path: Path) -> None:
    made = package_triton(saved(ONE, tmp_path), tmp_path / "models")
    before = content(made.path)
    with pytest.raises(BadInput, match="exists already \\(--version 2, or --force replaces it\\)"):
        package_triton(saved(OTHER, tmp_path), tmp_path / "models")
    assert content(made.path) == before
    package_triton(saved(OTHER, tmp_path), tmp_path / "models", force=True)
    assert content(made.path) == before | {"1/model.onnx": (tmp_path / "m.onnx").read_bytes()}


def test_a_configuration_that_differs(tmp_path: Path) -> None:
    made = package_triton(saved(ONE, tmp_path), tmp_path / "models")
    before = content(made.path)
    with pytest.raises(BadInput, match="another configuration"):
        package_triton(saved(LARGER, tmp_path), tmp_path / "models", version=2)
    assert content(made.path) == before
    package_triton(saved(LARGER, tmp_path), tmp_path / "models", version=2, force=True)
    assert check_onnxruntime(made.path, 2).input[0].dims == [4]


def test_what_is_no_place(tmp_path: Path) -> None:
    path = saved(ONE, tmp_path)
    (tmp_path / "file").write_text("")
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("models", {"name": "a/b"}, "no name"),
        ("models", {"name": ".a"}, "no name"),
        ("models", {"name": ""}, "no name"),
        ("models", {"name": "x" * 300}, "is too long a name"),
        ("models", {"version": 0}, "no version"),
        ("models", {"instances": 0}, "serve nothing"),
        ("models", {"max_batch": -1}, "no batch"),
        ("models", {"version": 1 << 63}, "no version"),
        ("models", {"instances": 1 << 31}, "too many"),
        ("models", {"max_batch": 1 << 31}, "no batch"),
        ("models", {"device": "tpu"}, "no device"),
        ("file", {}, "is no folder"),
        ("none/models", {}, "no such folder"),
    ]
    for folder, options, told in wrong:
        with pytest.raises(BadInput, match=told):
            package_triton(path, tmp_path / folder, **options)
    with pytest.raises(BadInput, match="no such file"):
        package_triton(tmp_path / "none.onnx", tmp_path / "models")
    with pytest.raises(BadInput, match="is a folder"):
        package_triton(tmp_path, tmp_path / "models")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m.onnx"]
    made = package_triton(path, tmp_path / "models", name="x" * 228)
    assert (made.path / "1" / "model.onnx").is_file()
    with pytest.raises(BadInput, match="is a model, for there is a"):
        package_triton(path, made.path)


def test_a_failed_copy_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outer").mkdir()
    made = package_triton(saved(ONE, tmp_path), tmp_path / "outer" / "models")
    before = content(tmp_path / "outer")

    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    options: dict[str, Any]
    for options in ({"name": "new"}, {"version": 2}, {"force": True}):
        with pytest.raises(GraphoptError, match="No space left"):
            package_triton(tmp_path / "m.onnx", made.path.parent, **options)
    assert content(tmp_path / "outer") == before


def test_a_failed_exchange_puts_the_old_version_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = package_triton(saved(ONE, tmp_path), tmp_path / "models")
    before = content(made.path)
    rename = Path.rename

    def stubborn(self: Path, target: Path) -> Path:
        if self.parent.parent.name == "new" and target.name == "1":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stubborn)
    with pytest.raises(GraphoptError, match="Input/output error"):
        package_triton(saved(OTHER, tmp_path), tmp_path / "models", force=True)
    assert content(made.path) == before


def test_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    left = tmp_path / ".m.abcdefgh.graphopt-save"
    other = tmp_path / ".other.abcdefgh.graphopt-save"
    for folder in (left, other):
        (folder / "new").mkdir(parents=True)
    package_triton(saved(ONE, tmp_path), models)
    assert not left.exists() and other.exists()
    assert [p.name for p in models.iterdir()] == ["m"]


def test_a_repository_whose_own_folder_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the hidden folder is inside: a mounted repository."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path.resolve() and access(path, mode))
    (tmp_path / "models").mkdir()
    prepared: list[Path | None] = []
    make = tempfile.mkdtemp

    def seen(*args: Any, **how: Any) -> str:
        prepared.append(how.get("dir"))
        return make(*args, **how)

    monkeypatch.setattr(tempfile, "mkdtemp", seen)
    made = package_triton(saved(ONE, tmp_path), tmp_path / "models")
    assert tmp_path / "models" in prepared and tmp_path not in prepared
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["m"]
    check_onnxruntime(made.path)


def test_a_model_already_in_the_repository(tmp_path: Path) -> None:
    """Packaged over itself, it is still whole."""
    made = package_triton(saved(ONE, tmp_path), tmp_path / "models")
    package_triton(made.path / "1" / "model.onnx", tmp_path / "models", name="m", force=True)
    check_onnxruntime(made.path)
