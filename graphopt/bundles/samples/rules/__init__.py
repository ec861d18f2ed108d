"""What becomes of each operator when the network is for many samples: one module for each kind of operator."""

from __future__ import annotations

from graphopt.bundles.samples.rules import elementwise, movement, products, recurrent, rows, statistics
from graphopt.bundles.samples.rules.table import REASONS, RULES

__all__ = ["REASONS", "RULES", "elementwise", "movement", "products", "recurrent", "rows", "statistics"]
