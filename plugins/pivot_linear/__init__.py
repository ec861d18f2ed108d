"""PivotLinear: a matrix of low rank as some of its own rows (or columns), and what makes the others of them."""

from graphopt.plugins.pivot_linear.collapse import collapse, expand
from graphopt.plugins.pivot_linear.function import Signature, attach, function, pivot_linear, standard_nodes
from graphopt.plugins.pivot_linear.match import PivotSite, pivot_at
from graphopt.plugins.pivot_linear.nodes import Side, column_nodes, row_nodes
from graphopt.plugins.pivot_linear.reference import column_form, row_form

__all__ = [
    "PivotSite",
    "Side",
    "Signature",
    "attach",
    "collapse",
    "column_form",
    "column_nodes",
    "expand",
    "function",
    "pivot_at",
    "pivot_linear",
    "row_form",
    "row_nodes",
    "standard_nodes",
]
