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
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import onnx
import xxhash
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from graphopt.bundles.checks import ANEW, check_plan
from graphopt.bundles.holding import Hold, remove_if_free
from graphopt.bundles.plan import Block, Plan
from graphopt.bundles.schema import read_json
from graphopt.bundles.split import Split
from graphopt.errors import BadInput, GraphoptError
from graphopt.files.bundle_folder import CURRENT, PLAN, is_bundle
from graphopt.files.external import external_sizes
from graphopt.files.folder import STAGING_SUFFIX, as_one_line, check_folder, locked, make_staging
from graphopt.files.placement import Slot, goes_outside, tensor_slots
from graphopt.files.writing import saved_form, serialise, write_data, write_file

_VERSION = 16
_PART = 1 << 20
_WEIGHTS = "weights"
_DATA = ".data"
_FILES = (".onnx", ".ort", ".engine", ".plan", ".trt")  # what is called so is taken for a model, not for a folder


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
        self._lock: int | None
        self.path, self._lock = make_staging(target)
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
                    remove_if_free(other)
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
        BadInput: There is something else than a bundle, the name is one of a file, its folder is not there, is that of
            another bundle, or may not be written to.
    """
    if target.suffix in _FILES:
        what = "the result is a bundle, which is a folder"
        raise BadInput(what, where=str(target), hint=f"give a name without {target.suffix}")
    if target.exists() and not is_bundle(target) and (not target.is_dir() or any(target.iterdir())):
        raise BadInput("is no bundle, and would be replaced", where=str(target), hint="give another name")
    check_folder(target.parent)


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


class OpenBundle:
    """The current version of a bundle, which stays as long as somebody has this, whatever is written meanwhile.

    Attributes:
        version: Its folder.
        plan: Its plan, which a host can follow.
    """

    def __init__(self, version: Path, plan: Plan, hold: Hold | None) -> None:
        self.version = version
        self.plan = plan
        self._hold = hold

    def close(self) -> None:
        """Let it go before nobody has this any more."""
        if self._hold is not None:
            self._hold.close()


def open_bundle(bundle: str | Path) -> OpenBundle:
    """Open the current version of a bundle: its plan is checked, and that its blocks and their weights are there.

    Raises:
        BadInput: It is no bundle, not a whole one, or its plan cannot be followed.
    """
    folder = Path(bundle)
    if not is_bundle(folder):
        raise BadInput("is no bundle", where=str(folder), hint=f"a bundle is a folder with a file '{CURRENT}'")
    version, hold = _hold_current(folder)
    path = version / PLAN
    plan = read_json(path, Plan, "plan", ANEW)
    check_plan(plan, path)
    needed: dict[str, int] = {}
    for block in plan.blocks.values():
        file = version / block.file
        if Path(block.file).name != block.file or not file.is_file():
            raise BadInput(f"the block {block.file!r} is not there", where=str(path), hint=ANEW)
        for name, size in _data_of(file, block) if file.suffix == ".onnx" else ():
            needed[name] = max(size, needed.get(name, 0))
    for name, size in needed.items():
        _check_data(version, name, size)
    return OpenBundle(version, plan, hold)


def read_bundle(bundle: str | Path) -> tuple[Path, Plan]:
    """The folder of a bundle's current version, and its plan. The version may go when a new one is written.

    Raises:
        BadInput: As `open_bundle`.
    """
    opened = open_bundle(bundle)
    return opened.version, opened.plan


def _hold_current(bundle: Path) -> tuple[Path, Hold | None]:
    """The folder of the current version, held; one that is taken away meanwhile is no longer the current one."""
    name = _current(bundle)
    while True:
        version, hold = bundle / name, None
        try:
            hold = Hold(version)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a NUL in it
            there = False
        except OSError:  # it may be read by its name only, as one that was given to all may
            there = version.is_dir()
        else:
            there = hold.is_there
        if there:
            return version, hold
        before, name = name, _current(bundle)
        if name == before:
            raise BadInput(f"names a version {name!r} that is not there", where=str(bundle / CURRENT), hint=ANEW)


def _current(bundle: Path) -> str:
    path = bundle / CURRENT
    try:
        name = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise BadInput("cannot be read as the name of a version", where=str(path), hint=ANEW) from error
    if not name or Path(name).name != name:
        raise BadInput(f"names a version {name!r} that is not there", where=str(path), hint=ANEW)
    return name


def _data_of(file: Path, block: Block) -> Iterable[tuple[str, int]]:
    """The data files of a block, and how many bytes of each it asks for. Reads no weight."""
    try:
        model = onnx.load(file, format="protobuf", load_external_data=False)
        sizes = external_sizes(model)
    except (OSError, ValueError, KeyError, DecodeError) as error:
        raise BadInput("cannot be read as a block", where=str(file), hint=ANEW) from error
    for ports, values in ((block.inputs, model.graph.input), (block.outputs, model.graph.output)):
        if {port.name for port in ports} != {value.name for value in values}:
            raise BadInput("is not the block that the plan says", where=str(file), hint=ANEW)
    return sizes.items()


def _check_data(version: Path, name: str, size: int) -> None:
    path = version / name
    if Path(name).name != name or not path.is_file():
        raise BadInput(f"the weights {name!r} are not there", where=str(version), hint=ANEW)
    found = path.stat().st_size
    if found < size:
        raise BadInput(f"has {found} bytes, and the blocks ask for {size}", where=str(path), hint=ANEW)


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
            write_file(staging / parts.plan.blocks[name].file, serialise(block, target), target)
    finally:
        for slot in replaced:
            slot.put(slot.tensor)


def changed_files(version: Path) -> list[str]:
    """What in a version is not as it was written, in words. Reads all of it, in parts.

    The name of a file of weights ends with a hash of its content, and the version is called by a hash of all else.
    """
    found = []
    for data in sorted(version.glob(f"*{_DATA}")):
        digest = xxhash.xxh3_128()
        _add(digest, data)
        if digest.hexdigest() != data.stem.rpartition(".")[2]:
            found.append(data.name)
    # A name that was taken got a number behind it.
    if _digest(version) != version.name.partition("-")[0]:
        found.append("a file beside the weights")
    return found


def _digest(folder: Path) -> str:
    """Of all that is in a folder: weights by their names, which tell their content."""
    digest = xxhash.xxh3_128()
    for name in sorted(path.name for path in folder.iterdir()):
        digest.update(name.encode())
        if not name.endswith(_DATA):
            _add(digest, folder / name)
    return digest.hexdigest()[:_VERSION]


def _add(digest: xxhash.xxh3_128, path: Path) -> None:
    with path.open("rb") as file:
        while part := file.read(_PART):
            digest.update(part)
