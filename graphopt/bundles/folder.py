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

import json
import shutil
import tempfile
from pathlib import Path

import onnx_ir as ir
import xxhash
from pydantic import ValidationError

from graphopt.bundles.plan import Plan
from graphopt.bundles.split import Split
from graphopt.errors import BadInput
from graphopt.files.folder import STAGING_SUFFIX, as_one_line, locked, remove_leftovers
from graphopt.files.placement import Slot, goes_outside, tensor_slots
from graphopt.files.writing import saved_form, serialise, write_data, write_file

CURRENT, PLAN = "current", "plan.json"
_VERSION = 16
_WEIGHTS = "weights"


def write_bundle(parts: Split, bundle: str | Path) -> Path:
    """Write a split network as the current version of a bundle, and take earlier versions away.

    Args:
        parts: What was split.
        bundle: A folder; made where it is not there. Its parent must be.

    Returns:
        The folder of the version.

    Raises:
        BadInput: There is something else at that place.
        GraphoptError: It cannot be written; the bundle is as it was.
    """
    folder = Path(bundle)
    if folder.exists() and not is_bundle(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput("is no bundle, and would be replaced", where=str(folder), hint="give another name")
    if not folder.absolute().parent.is_dir():
        raise BadInput("no such folder", where=str(folder.parent), hint=f"mkdir -p {folder.parent}")
    with as_one_line(folder):
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder / _WEIGHTS)
        staging = Path(tempfile.mkdtemp(prefix=f".{_WEIGHTS}.", suffix=STAGING_SUFFIX, dir=folder))
    try:
        _write_blocks(parts, staging, folder)
        write_file(staging / PLAN, parts.plan.to_json().encode() + b"\n", folder)
        version = folder / _digest(staging)
        with as_one_line(folder), locked(folder):
            if version.exists():
                shutil.rmtree(version)  # the same content, unless somebody changed it
            staging.replace(version)
            pointer = folder / f".{CURRENT}{STAGING_SUFFIX}"
            pointer.write_text(f"{version.name}\n")
            pointer.replace(folder / CURRENT)
            for other in folder.iterdir():
                if other.is_dir() and other != version and (other / PLAN).exists():
                    shutil.rmtree(other, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return version


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
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:_VERSION]
