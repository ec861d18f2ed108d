"""Where the nodes of a graph go, between its control flow: each to the first block that can have it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt import graphs


def segments_of(nodes: Sequence[ir.Node], turns: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """The nodes before the first turn, between turns, and after the last, each as early as it can be."""
    segments: list[list[ir.Node]] = [[] for _ in range(len(turns) + 1)]
    place_of: dict[ir.Node, int] = {}
    turn_of = {node: index for index, node in enumerate(turns)}
    for node in nodes:
        place = 0
        for value in graphs.read_by(node):
            maker = value.producer()
            if maker is not None and maker in place_of:
                place = max(place, place_of[maker])
        if node in turn_of:
            place_of[node] = turn_of[node] + 1
        else:
            place_of[node] = place
            segments[place].append(node)
    return segments


def wanted_of(
    segments: Sequence[Sequence[ir.Node]], turns: Sequence[ir.Node], outputs: Sequence[ir.Value]
) -> list[list[ir.Value]]:
    """For each segment the values that others read: turns and what is in them, later segments, the graph's outputs.

    In the order in which they are made.
    """
    home = {output: index for index, segment in enumerate(segments) for node in segment for output in node.outputs}
    read = {value for node in turns for value in graphs.read_by(node)} | set(outputs)
    for index, segment in enumerate(segments):
        read.update(value for node in segment for value in graphs.read_by(node) if home.get(value, index) != index)
    return [[value for node in segment for value in node.outputs if value in read] for segment in segments]
