"""What is in a bundle: its plan, its blocks and their sizes. Reads no weight unless asked to, and runs nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.drawing import used_by
from graphopt.bundles.folder import changed_files, open_bundle
from graphopt.bundles.plan import Block, Plan
from graphopt.bundles.profile import Profile, read_profile
from graphopt.bundles.split import SPLIT
from graphopt.files.folder import bytes_in
from graphopt.files.load import load_model
from graphopt.files.placement import storage_key, tensor_slots


@dataclass(frozen=True)
class BlockContents:
    """A block.

    Attributes:
        name: In the plan.
        block: As the plan describes it.
        bytes: Of its file, with the weights that it reads from a data file.
        used: How many runs of the plan take it.
        control_flow: The If, Loop and Scan that it holds: operator -> how many.
    """

    name: str
    block: Block
    bytes: int
    used: int
    control_flow: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class BundleContents:
    """What is in a bundle.

    Attributes:
        path: The bundle.
        version: The name of its current version.
        plan: The version's plan.
        profile: What was counted on it; None where nothing was.
        blocks: In the order of the plan.
        bytes: Of all files of the version.
        shared_bytes: Of weights that several blocks read, each counted once.
        changed: What is not as it was written; None where nobody looked.
    """

    path: Path
    version: str
    plan: Plan
    profile: Profile | None
    blocks: tuple[BlockContents, ...]
    bytes: int
    shared_bytes: int
    changed: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; the plan and the profile as in their files."""
        return {
            "path": self.path,
            "version": self.version,
            "bytes": self.bytes,
            "shared_bytes": self.shared_bytes,
            **({} if self.changed is None else {"changed": list(self.changed)}),
            "blocks": {
                one.name: {
                    "file": one.block.file,
                    "nodes": one.block.nodes,
                    "bytes": one.bytes,
                    "used": one.used,
                    "control_flow": one.control_flow,
                }
                for one in self.blocks
            },
            "profile": None if self.profile is None else self.profile.model_dump(),
            "plan": self.plan.model_dump(by_alias=True, exclude_defaults=True),
        }


def bundle_contents(bundle: str | Path, *, weights: bool = False) -> BundleContents:
    """Look into a bundle.

    Args:
        bundle: Its folder.
        weights: Whether to read all of it, and say what is not as it was written.

    Raises:
        BadInput: It is no bundle, or one of its files is not what it should be.
    """
    opened = open_bundle(bundle)  # which stays there until all of it was looked at
    version, plan = opened.version, opened.plan
    used = used_by(plan)
    blocks: list[BlockContents] = []
    readers: dict[object, set[str]] = {}
    sizes: dict[object, int] = {}
    for name, block in plan.blocks.items():
        file = version / block.file
        outside = 0
        model = load_model(file) if file.suffix == ".onnx" else None
        for key, size in () if model is None else _outside(model):
            outside += size if name not in readers.setdefault(key, set()) else 0
            readers[key].add(name)
            sizes[key] = size
        held = Counter(node.op_type for node in graphs.all_nodes(model) if node.op_type in SPLIT) if model else {}
        blocks.append(BlockContents(name, block, file.stat().st_size + outside, used[name], dict(held)))
    return BundleContents(
        path=Path(bundle),
        version=version.name,
        plan=plan,
        profile=read_profile(version),
        blocks=tuple(blocks),
        bytes=bytes_in(version),
        shared_bytes=sum(size for key, size in sizes.items() if len(readers[key]) > 1),
        changed=tuple(changed_files(version)) if weights else None,
    )


def bundle_bytes(bundle: str | Path) -> int:
    """The size of all files of a bundle's current version."""
    opened = open_bundle(bundle)
    return bytes_in(opened.version)


def _outside(model: ir.Model) -> list[tuple[object, int]]:
    """The tensors that a network has in its data file: where each lies, and its size in bytes."""
    return [
        (storage_key(slot.tensor), slot.tensor.nbytes)
        for slot in tensor_slots(model)
        if isinstance(slot.tensor, ir.ExternalTensor)
    ]
