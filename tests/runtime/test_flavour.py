from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

import pytest

from graphopt.errors import MissingDependency
from graphopt.runtime import flavour


@pytest.fixture(autouse=True)
def _forget_the_import() -> Iterator[None]:
    flavour.import_onnxruntime.cache_clear()
    yield
    flavour.import_onnxruntime.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    names = {name.replace("_", "-"): version for name, version in installed.items()}

    def version(name: str) -> str:
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return names[name]

    monkeypatch.setattr(flavour.metadata, "version", version)


def test_the_one_that_is_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, onnxruntime_gpu="1.31.0")
    assert flavour.onnxruntime_flavour() == ("onnxruntime-gpu", "1.31.0")


def test_none_says_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with pytest.raises(MissingDependency) as caught:
        flavour.import_onnxruntime()
    assert str(caught.value).endswith("(in graphopt's folder: pip install '.[cpu]' or pip install '.[gpu]')")


def test_two_are_refused_by_name_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, onnxruntime="1.31.0", onnxruntime_gpu="1.30.0")
    with pytest.raises(MissingDependency) as caught:
        flavour.import_onnxruntime()
    assert "onnxruntime and onnxruntime-gpu are installed together" in str(caught.value)
    assert "pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu" in str(caught.value)
    assert caught.value.exit_code == 2
