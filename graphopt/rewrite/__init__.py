"""Rewriting: what a pass is, what it may do to a graph, and the manager that runs them in order."""

from graphopt.rewrite.application import Application
from graphopt.rewrite.context import Context
from graphopt.rewrite.contract import Explanation, Kind, Pass, Saves, Stage
from graphopt.rewrite.rules import RulePass

__all__ = ["Application", "Context", "Explanation", "Kind", "Pass", "RulePass", "Saves", "Stage"]
