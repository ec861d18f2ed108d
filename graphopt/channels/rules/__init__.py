"""How each standard operator ties the axes of what it reads and makes, for each group."""

from graphopt.channels.rules import elementwise, movement, products, statistics
from graphopt.channels.rules.table import RULES, Rule

__all__ = ["RULES", "Rule", "elementwise", "movement", "products", "statistics"]
