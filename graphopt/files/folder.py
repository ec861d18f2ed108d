"""The folder that a model is saved into: what a killed save left there, locks, whose a data file is, and its errors."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphopt.errors import BadInput, GraphoptError
from graphopt.files.bundle_folder import refuse_inside

STAGING_SUFFIX = ".graphopt-save"
_STAGING = r"\.[a-z0-9_]{8}\.graphopt-save"


def data_stem(target: Path) -> str:
    """The beginning of the names of a target's data files."""
    return target.stem if target.suffix == ".onnx" else target.name


def check_target(target: Path) -> None:
    """Refuse a target that cannot be written to.

    Raises:
        BadInput: It is a folder, its folder is not there, or may not be written to.
    """
    if target.is_dir():
        raise BadInput("is a folder", where=str(target), hint="give the name of the file to write")
    check_folder(target.parent)


def check_folder(folder: Path) -> None:
    """Refuse a folder that nothing can be written into.

    Raises:
        BadInput: It is not there, is none, belongs to a bundle, or may not be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise BadInput("is no folder", where=str(folder), hint="write into a folder")
    if not folder.is_dir():
        raise BadInput("no such folder", where=str(folder), hint=f"mkdir -p {folder}")
    refuse_inside(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput("no permission to write here", where=str(folder), hint="write to another folder")


def make_staging(target: Path) -> tuple[Path, int]:
    """A hidden folder beside a target, and the descriptor that holds its lock; what killed saves left goes.

    The lock lives as long as the process: a later save can tell a leftover from a save that is going on. Until it is
    taken the folder looks like a leftover, so that all of it is done under the parent's lock.
    """
    with locked(target.absolute().parent):
        remove_leftovers(target)
        folder = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=STAGING_SUFFIX, dir=target.absolute().parent)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        take_lock(descriptor, wait=False)
    return Path(folder), descriptor


def remove_leftovers(target: Path) -> None:
    """Remove the hidden folders of saves to this target that were killed."""
    pattern = re.compile(re.escape(f".{target.name}") + _STAGING)
    with os.scandir(target.parent) as entries:
        found = [e.path for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    for path in found:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # another save removed it, or it belongs to someone else
        try:
            if take_lock(descriptor, wait=False):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def take_lock(descriptor: int, *, wait: bool) -> bool:
    """Take the lock of a folder; False where someone else has it or the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one save at a time commits in a folder: one must not take another's new data for stale."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        take_lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def mentions(file: Path, name: str) -> bool:
    """Whether a file holds a name anywhere; True where it cannot be read."""
    try:
        with file.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                return False
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(name.encode()) >= 0
    except (OSError, ValueError):
        return True


def bytes_in(folder: Path) -> int:
    """The size of all files in a folder and those below it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def as_one_line(target: Path) -> Iterator[None]:
    """Turn errors of the operating system into one line about the target.

    Raises:
        GraphoptError: For any `OSError` of the block.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise GraphoptError(
            f"cannot be written: {error.strerror or error}",
            where=str(target),
            hint="free some space; what was there is as it was" if full else "what was there is as it was",
        ) from error
