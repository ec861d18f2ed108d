"""Inputs for a model whose user gave none: of the right types, in the right ranges, telling.

What the inputs are for is read off the graph (`graphopt.runtime.roles`): indices stay inside what they index,
masks are ones with padding on the right, switches take every value that the model compares them with, sizes
that go by different names differ. Everything follows from the model and the seed.
"""

from __future__ import annotations

from graphopt.feeds.search import feeds_that_run, synthesise_feeds
from graphopt.feeds.synthesis import Feeds

__all__ = ["Feeds", "feeds_that_run", "synthesise_feeds"]
