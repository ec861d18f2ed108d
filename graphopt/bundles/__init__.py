"""Bundles: networks with control flow as static blocks, a plan, and the host that follows it."""

from __future__ import annotations

from graphopt.bundles.folder import read_bundle, write_bundle
from graphopt.bundles.running import BundleRunner, load_bundle
from graphopt.bundles.split import Split, split

__all__ = ["BundleRunner", "Split", "load_bundle", "read_bundle", "split", "write_bundle"]
