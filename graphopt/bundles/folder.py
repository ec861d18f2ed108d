"""Bundles on disk: versions of a split network, one of them current.

    BUNDLE/
      current              the name of the folder that holds
      3f1c.../plan.json    the plan,
              block_1.onnx the blocks,
              weights.<hash>.data   and the weights of all of them, each once

A version is written under a hidden name, renamed when it is whole, and becomes current by the rename of one small
file: a bundle that is being written is the old one or the new one at any time, and can be loaded.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import onnx_ir as ir
import xxhash
from pydantic import ValidationError

from graphopt.bundles.plan import Plan
from graphopt.bundles.split import Split
from graphopt.errors import BadInput, GraphoptError
from graphopt.files.folder import STAGING_SUFFIX, as_one_line, locked, remove_leftovers, take_lock
from graphopt.files.placement import Slot, goes_outside, tensor_slots
from graphopt.files.writing import saved_form, serialise, write_data, write_file

CURRENT, PLAN = "current", "plan.json"
_VERSION = 16
_PART = 1 << 20
_WEIGHTS = "weights"


def write_bundle(parts: Split, bundle: str | Path, *, files: Iterable[Path] = ()) -> Path:
    """Write a split network as the current version of a bundle, and take earlier versions away.

    Args:
        parts: What was split; the blocks that it holds are written as ONNX files.
        bundle: A folder; made where it is not there. Its parent must be.
        files: What else lies in the version, such as engines; copied under their own names.

    Returns:
        The folder of the version.

    Raises:
        BadInput: There is something else at that place.
        GraphoptError: It cannot be written; the bundle is as it was.
    """
    with stage_bundle(parts, bundle, files=files) as staged:
        return staged.commit()


class StagedBundle:
    """A bundle written completely but not yet in place. Made by `stage_bundle`.

    Use it as a context manager: leaving the block without `commit` discards it.

    Attributes:
        path: A bundle in a hidden folder beside the target, which can be loaded. `commit` moves its content away.
        version: The folder of its one version.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self.path = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=STAGING_SUFFIX, dir=target.absolute().parent)
        )
        # The lock lives as long as the process: a later save can tell a leftover from one that is going on.
        self._lock: int | None = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        take_lock(self._lock, wait=False)
        self.version = self.path / "version"
        self.version.mkdir()

    def __enter__(self) -> StagedBundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def write(self, parts: Split, files: Iterable[Path]) -> None:
        """Write all of it. Called once, by `stage_bundle`."""
        _write_blocks(parts, self.version, self._target)
        with as_one_line(self._target):
            for file in files:
                shutil.copyfile(file, self.version / file.name)
        write_file(self.version / PLAN, parts.plan.to_json().encode() + b"\n", self._target)
        with as_one_line(self._target):
            (self.path / CURRENT).write_text(f"{self.version.name}\n")

    def commit(self) -> Path:
        """Put the version in place, atomically, and take earlier ones away.

        Returns:
            The folder of the version.

        Raises:
            GraphoptError: The target cannot be written to; it is as it was.
        """
        if self._lock is None:
            raise GraphoptError("this bundle was committed or discarded already", where=str(self._target))
        with as_one_line(self._target), locked(self._target.absolute().parent):
            name = _digest(self.version)
            if is_bundle(self._target):
                version = _put_beside(self.version, self._target, name)
            else:
                self._rename(name)
                self.path.chmod(0o777 & ~_umask())  # a temporary folder is for its owner only
                self.path.replace(self._target)  # where there is a folder, it is empty
                version = self._target / name
            for other in self._target.iterdir():
                if other.is_dir() and other != version and (other / PLAN).exists():
                    shutil.rmtree(other, ignore_errors=True)
        self.discard()
        return version

    def _rename(self, name: str) -> None:
        self.version.replace(self.path / name)
        (self.path / CURRENT).write_text(f"{name}\n")

    def discard(self) -> None:
        """Remove everything staged; after `commit` there is nothing left to remove."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def stage_bundle(parts: Split, bundle: str | Path, *, files: Iterable[Path] = ()) -> StagedBundle:
    """Write a split network beside its target without replacing the target.

    Args:
        parts, bundle, files: As for `write_bundle`.

    Returns:
        The staged bundle: check ``path``, then ``commit()`` or ``discard()``.

    Raises:
        BadInput: The target is something else than a bundle, or its folder is not there.
        GraphoptError: Writing failed. Nothing is left behind.
    """
    target = Path(bundle)
    check_bundle_target(target)
    with as_one_line(target):
        remove_leftovers(target)
        staged = StagedBundle(target)
        try:
            staged.write(parts, files)
        except BaseException:
            staged.discard()
            raise
    return staged


def check_bundle_target(target: Path) -> None:
    """Refuse a place that a bundle cannot be written to.

    Raises:
        BadInput: There is something else than a bundle, its folder is not there, or may not be written to.
    """
    if target.exists() and not is_bundle(target) and (not target.is_dir() or any(target.iterdir())):
        raise BadInput("is no bundle, and would be replaced", where=str(target), hint="give another name")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise BadInput("no such folder", where=str(target.parent), hint=f"mkdir -p {target.parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput("no permission to write here", where=str(target.parent), hint="write to another folder")


def _put_beside(version: Path, bundle: Path, name: str) -> Path:
    """A version in a bundle, its current one from now on; what is there already stays."""
    place, count = bundle / name, 0
    while place.exists() and not _same_files(place, version):
        count += 1
        place = bundle / f"{name}-{count}"
    if not place.exists():
        version.replace(place)
    pointer = bundle / f".{CURRENT}{STAGING_SUFFIX}"
    pointer.write_text(f"{place.name}\n")
    pointer.replace(bundle / CURRENT)
    return place


def _same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle."""
    return (path / CURRENT).is_file()


def read_bundle(bundle: str | Path) -> tuple[Path, Plan]:
    """The folder of a bundle's current version, and its plan.

    Raises:
        BadInput: It is no bundle, or not a whole one.
    """
    folder = Path(bundle)
    if not is_bundle(folder):
        raise BadInput("is no bundle", where=str(folder), hint=f"a bundle is a folder with a file '{CURRENT}'")
    name = (folder / CURRENT).read_text(encoding="utf-8").strip()
    version = folder / name
    if not name or Path(name).name != name or not version.is_dir():
        raise BadInput(f"names a version {name!r} that is not there", where=str(folder / CURRENT))
    path = version / PLAN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput("cannot be read as a plan", where=str(path), hint="write the bundle anew") from error
    if isinstance(content, dict) and content.get("version", 1) != 1:
        raise BadInput(f"is of version {content['version']}", where=str(path), hint="a newer graphopt reads it")
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise BadInput(f"is no plan: {place}: {problem['msg']}", where=str(path)) from error
    for block in plan.blocks.values():
        file = version / block.file
        if Path(block.file).name != block.file or not file.is_file():
            raise BadInput(f"the block {block.file!r} is not there", where=str(path), hint="write the bundle anew")
    return version, plan


def _write_blocks(parts: Split, staging: Path, target: Path) -> None:
    slots = [(name, slot) for name, block in parts.blocks.items() for slot in tensor_slots(block)]
    outside = [slot for _, slot in slots if goes_outside(slot)]
    written = write_data(staging, outside, target / _WEIGHTS) if outside else None
    replaced: list[Slot] = []
    try:
        for _, slot in slots:
            new = saved_form(slot, written, staging)
            if new is not None:
                slot.put(new)
                replaced.append(slot)
        for name, block in parts.blocks.items():
            write_file(staging / parts.plan.blocks[name].file, _content(block, target), target)
    finally:
        for slot in replaced:
            slot.put(slot.tensor)


def _content(block: ir.Model, target: Path) -> bytes:
    return serialise(block, target)


def _digest(folder: Path) -> str:
    """Of all that is in a folder: weights by their names, which tell their content."""
    digest = xxhash.xxh3_128()
    for name in sorted(path.name for path in folder.iterdir()):
        digest.update(name.encode())
        if not name.endswith(".data"):
            with (folder / name).open("rb") as file:
                while part := file.read(_PART):
                    digest.update(part)
    return digest.hexdigest()[:_VERSION]
