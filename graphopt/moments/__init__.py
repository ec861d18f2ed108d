"""Second moments of activations over calibration data: what low-rank approximation and reconstruction weigh by."""

from __future__ import annotations

from graphopt.moments.at_sites import tap_of
from graphopt.moments.collect import LIMIT_BYTES, Pair, Relay, Tap, cross_moments, moments, moments_in_groups, refusals
from graphopt.moments.layouts import Channels, Layout, Patches, Tokens, patches
from graphopt.moments.sums import CrossMoments, Moments

__all__ = [
    "LIMIT_BYTES",
    "Channels",
    "CrossMoments",
    "Layout",
    "Moments",
    "Pair",
    "Patches",
    "Relay",
    "Tap",
    "Tokens",
    "cross_moments",
    "moments",
    "moments_in_groups",
    "patches",
    "refusals",
    "tap_of",
]
