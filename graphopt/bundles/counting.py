"""A bundle run on the user's inputs, to see where they lead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt.bundles.profile import Counts, Profile
from graphopt.bundles.running import BundleRunner
from graphopt.calibration import failing_on


def count(
    bundle: Path,
    feeds: Sequence[Mapping[str, Any]],
    *,
    custom_ops: Path | None = None,
    done: Callable[[], None] = lambda: None,
) -> Profile:
    """Run a bundle on inputs, and count how often each block ran and where decisions went.

    Args:
        bundle: Its folder.
        feeds: The inputs; each is read when it is needed.
        custom_ops: A library of custom operators.
        done: Called after each input.

    Raises:
        BadInput: It is no bundle, or does not run on one of the user's inputs, and on which.
        GraphoptError: A block fails.
    """
    counts = Counts()
    runner = BundleRunner(bundle, course=counts, custom_ops=custom_ops)
    for index in range(len(feeds)):
        feed = feeds[index]
        with failing_on(feed):
            runner.run(feed)
        counts.profile.inputs += 1
        done()
    return counts.profile
