"""Puts a model into a Triton model repository: complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from graphopt.errors import BadInput
from graphopt.files.bundle_folder import refuse_inside
from graphopt.files.folder import STAGING_SUFFIX, as_one_line, make_staging

CONFIG = "config.pbtxt"
# File systems end at 255 bytes; the folder in which a model is prepared has a longer name than the model.
_LONGEST = 255 - len(f"..{'x' * 8}{STAGING_SUFFIX}")


def check_place(repository: Path, name: str, version: int, *, force: bool) -> None:
    """Refuse a place in a repository before anything is copied.

    Raises:
        BadInput: The repository cannot be written to, the name is none that a folder can have, or the version exists
            and is not to be replaced.
    """
    if not name or name.startswith(".") or "/" in name or any(ord(character) < 32 for character in name):
        raise BadInput(f"{name!r} is no name of a model", hint="--name takes the name of a folder")
    if len(name.encode()) > _LONGEST:
        raise BadInput(f"{name[:20]!r}... is too long a name of a model", hint="--name takes a shorter one")
    if not 1 <= version < 1 << 63:
        raise BadInput(f"{version} is no version", where="--version", hint="they count from 1")
    if repository.exists() and not repository.is_dir():
        raise BadInput("is no folder", where=str(repository), hint="--triton takes the folder of the models")
    if (repository / CONFIG).exists():
        raise BadInput(
            f"is a model, for there is a {CONFIG} in it",
            where=str(repository),
            hint=f"--triton takes the folder of the models: {repository.parent}",
        )
    refuse_inside(repository)
    folder = repository if repository.is_dir() else repository.parent
    if not folder.is_dir():
        raise BadInput("no such folder", where=str(folder), hint=f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput("no permission to write here", where=str(folder), hint="write to another folder")
    place = repository / name
    if place.exists() and not place.is_dir():
        raise BadInput("is no folder", where=str(place), hint="--name takes another name")
    if (place / str(version)).exists() and not force:
        raise BadInput(
            "exists already", where=str(place / str(version)), hint=f"--version {_next(place)}, or --force replaces it"
        )


def put(
    repository: Path, name: str, version: int, files: Mapping[str, Path], config: str, *, force: bool
) -> tuple[Path, int]:
    """Copy a model's files and write its configuration, in a hidden folder; then rename.

    A new model appears at once, and so does a new version of one whose configuration stays. ``force`` first replaces
    the configuration, then moves the old version away: killed between, a server would find no such version.

    Data files are copied, not linked: what onnx and graphopt read may have no second name.

    Args:
        repository: Of the models; made where it is missing.
        name: Of the model.
        version: Of the model.
        files: Where they go, relative to the folder of the version -> what is copied.
        config: What ``config.pbtxt`` holds.
        force: Replace the version, and a configuration that differs, where they exist.

    Returns:
        The folder of the model, and the bytes that were copied.

    Raises:
        BadInput: The model has a configuration that differs, and it is not to be replaced.
        GraphoptError: Writing failed; what was there is as it was.
    """
    place = repository / name
    existing = place / CONFIG
    with as_one_line(place):
        # As bytes: whatever an editor has written there, it is another configuration.
        differs = existing.exists() and existing.read_bytes() != config.encode()
    if differs and not force:
        raise BadInput(
            "is another configuration, and all versions of a model share one",
            where=str(existing),
            hint="--force replaces it, --name takes another name",
        )
    with as_one_line(place):
        repository.mkdir(exist_ok=True)
        with _staging(repository, name) as staged:
            # A name like 1 must not meet the folder of the version.
            new = staged / "new" / name
            copied = _copy(files, new / str(version))
            (new / CONFIG).write_text(config, encoding="utf-8", newline="\n")
            if place.exists():
                _add(place, new, version, staged)
            else:
                new.rename(place)
    return place, copied


def _add(place: Path, new: Path, version: int, staged: Path) -> None:
    (new / CONFIG).replace(place / CONFIG)
    target = place / str(version)
    if not target.exists():
        (new / str(version)).rename(target)
        return
    old = staged / "old"
    target.rename(old)
    try:
        (new / str(version)).rename(target)
    except OSError:
        old.rename(target)
        raise


def _copy(files: Mapping[str, Path], folder: Path) -> int:
    copied = 0
    folder.mkdir(parents=True)
    for name, source in files.items():
        target = Path(os.path.normpath(folder / name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        copied += target.stat().st_size
    return copied


@contextmanager
def _staging(repository: Path, name: str) -> Iterator[Path]:
    """A hidden folder on the file system of the repository: beside it where that goes, since a server polls inside."""
    parent = repository.resolve().parent
    beside = parent.stat().st_dev == repository.stat().st_dev and os.access(parent, os.W_OK | os.X_OK)
    staged, lock = make_staging((parent if beside else repository) / name)
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        os.close(lock)


def _next(place: Path) -> int:
    return max((int(entry.name) for entry in place.iterdir() if entry.name.isdecimal()), default=0) + 1
