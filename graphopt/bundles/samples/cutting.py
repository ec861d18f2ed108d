"""One sample of a batch: of what goes into a bundle in which samples go their own ways, and of what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from graphopt.bundles.plan import Plan


def count_samples(plan: Plan, feeds: Mapping[str, Any]) -> int:
    """How many samples there are in all inputs that have some."""
    axes = {name: plan.samples[name] for name in feeds if name in plan.samples}
    return min((np.shape(feeds[name])[axis] for name, axis in axes.items()), default=0)


def sample_of(plan: Plan, feeds: Mapping[str, Any], index: int) -> dict[str, Any]:
    """One sample as a batch of 1; inputs that are the same for all samples as they are."""
    return {
        name: np.take(np.asarray(value), [index], plan.samples[name]) if name in plan.samples else value
        for name, value in feeds.items()
    }


def result_of(
    plan: Plan, results: Mapping[str, Any], index: int, count: int, like: Mapping[str, Any]
) -> dict[str, Any]:
    """What a bundle gave for one sample of several, in the shapes that the network gives for it alone.

    Args:
        plan: Of the bundle.
        results: Its outputs for all samples.
        index: Of the sample.
        count: How many samples there were.
        like: The outputs of the network for a sample alone.
    """
    found = {}
    for name, array in like.items():
        axis, whole = plan.samples.get(plan.gives[name]), results[name]
        apart = axis is not None and np.size(whole) == count * np.size(array)
        found[name] = np.take(whole, index, axis).reshape(np.shape(array)) if apart else whole
    return found
