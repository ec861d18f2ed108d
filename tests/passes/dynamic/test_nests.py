"""Random nests through all passes for dynamic networks: the same bits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.passes.canonical.merge_duplicates import MergeDuplicates
from graphopt.passes.canonical.remove_branches import RemoveBranches
from graphopt.passes.canonical.remove_dead import RemoveDead
from graphopt.passes.dynamic.grow_state import GrowState
from graphopt.passes.dynamic.merge_conditions import MergeConditions
from graphopt.passes.dynamic.select_branches import SelectBranches
from graphopt.passes.dynamic.split_ranks import SplitRanks
from tests.models.nests import Nest, RepairNest
from tests.passes.common import assert_same_bits, run_ort, run_pass

EXACT = (MergeConditions, MergeDuplicates, RemoveBranches, RemoveDead, SplitRanks, GrowState)


def check(nest: Nest) -> Counter[str]:
    feeds = nest.feeds(4)
    file = nest.model.SerializeToString()  # passes rename tensors, which a proto shares with what is made of it
    done: Counter[str] = Counter()
    for target in ("onnxruntime", "tensorrt-rtx"):
        result, records = run_pass(ir.from_proto(onnx.load_from_string(file)), *EXACT, target=target)
        done.update({record.name: record.applications for record in records})
        assert_same_bits(nest.model, result, *feeds)
    result, records = run_pass(
        ir.from_proto(onnx.load_from_string(file)), SelectBranches, *EXACT, target="tensorrt-rtx"
    )
    done.update({record.name: record.applications for record in records})
    for feed in feeds:
        for before, after in zip(run_ort(nest.model, feed), run_ort(result, feed), strict=True):
            np.testing.assert_array_equal(before, after, strict=True)
    return done


def test_nests_of_what_the_passes_look_for() -> None:
    done: Counter[str] = Counter()
    for seed in range(12):
        done.update(check(RepairNest(seed, depth=2)))
    for cls in (MergeConditions, SplitRanks, GrowState, SelectBranches, RemoveBranches):
        assert done[cls.name] > 0, cls.name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(150))
def test_many_nests(seed: int) -> None:
    check(RepairNest(1000 + seed, depth=1 + seed % 3))
    check(Nest(1000 + seed, depth=1 + seed % 3))
