"""Each sample goes its own way: networks for one sample as networks for many."""

from __future__ import annotations

from graphopt.bundles.samples.rewrite import for_samples

__all__ = ["for_samples"]
