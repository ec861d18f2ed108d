"""Linear sites: every spelling of y = W x with a constant W, and of W as a product of two factors."""

from graphopt.sites.linear import ROOTS, Linear, Spelling, is_channel_vector, linear_at, resized
from graphopt.sites.pair import Pair, Step, channel_vector, pair_at, pairs
from graphopt.sites.weight import Weight, weight_of

__all__ = [
    "ROOTS",
    "Linear",
    "Pair",
    "Spelling",
    "Step",
    "Weight",
    "channel_vector",
    "is_channel_vector",
    "linear_at",
    "pair_at",
    "pairs",
    "resized",
    "weight_of",
]
