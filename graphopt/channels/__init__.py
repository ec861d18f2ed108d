"""Channel classes: which axes of a model must be relabelled together, by what, and how to relabel them."""

from graphopt.channels.classes import ChannelClass, Channels, Segment, Slot, channel_classes
from graphopt.channels.relabel import Override, is_current, region_of, relabel, rescale
from graphopt.channels.summary import ClassSummary, summarise
from graphopt.channels.tying import Group

__all__ = [
    "ChannelClass",
    "Channels",
    "ClassSummary",
    "Group",
    "Override",
    "Segment",
    "Slot",
    "channel_classes",
    "is_current",
    "region_of",
    "relabel",
    "rescale",
    "summarise",
]
