"""A rewritten model as the parts of a bundle, and what to say about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.bundles.counting import count
from graphopt.bundles.folder import StagedBundle
from graphopt.bundles.plan import walk
from graphopt.bundles.profile import PROFILE, Trial
from graphopt.bundles.samples import for_samples
from graphopt.bundles.split import Split, split
from graphopt.bundles.superblocks import super_blocks
from graphopt.files.writing import write_file
from graphopt.shapes import infer_shapes
from graphopt.targets import Target


@dataclass
class BundleFacts:
    """What a bundle is made of.

    Attributes:
        blocks: Static networks, each stored once.
        steps: Of the plan: runs of blocks, branches and loops.
        shared: How many runs take a block that an earlier one has.
        bytes: On disk: of all files beside the plan, and the plan.
        kept: If, Loop and Scan that stay inside a block, and why.
        trials: Straight lines that were tried out for paths that the user's inputs take.
    """

    blocks: int
    steps: int
    shared: int
    bytes: int = 0
    kept: dict[str, str] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)


def make_parts(model: ir.Model, target: Target, *, per_sample: bool = False) -> tuple[Split, BundleFacts]:
    """Split a model for a target.

    Args:
        model: Without functions, its control flow named (`graphs.name_control_flow`); is changed.
        target: Says which control flow stays inside a block.
        per_sample: Whether each sample goes its own way (`graphopt.bundles.samples`).

    Raises:
        BadInput: It cannot be split, see `split`, or samples not be taken apart, see `for_samples`.
    """
    if per_sample:
        model = for_samples(model)
    infer_shapes(model)
    kept = super_blocks(model, target)
    parts = split(model, keep=lambda node: node.name in kept)
    return parts, BundleFacts(len(parts.blocks), sum(1 for _ in walk(parts.plan.steps)), parts.shared, kept=kept)


def write_profile(
    staged: StagedBundle,
    feeds: Sequence[Mapping[str, Any]],
    custom_ops: Path | None = None,
    trials: Sequence[Trial] = (),
) -> None:
    """Run a bundle on all feeds, and keep beside its plan how often each block ran and where decisions went."""
    profile = count(staged.path, feeds, custom_ops=custom_ops)
    profile.trials = [*trials]
    write_file(staged.version / PROFILE, profile.to_json().encode(), staged.path)
