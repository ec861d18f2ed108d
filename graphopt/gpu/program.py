"""Work on fixed arrays of a GPU that can be put into a stream again and again, whoever does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from graphopt.gpu.arrays import DeviceArray
from graphopt.gpu.context import Context
from graphopt.gpu.streams import Stream


@dataclass(frozen=True)
class Program:
    """An engine, a session or a module on inputs and outputs that stay where they are.

    Attributes:
        context: Of the GPU.
        stream: Where `enqueue` puts the work.
        inputs: By name; the work reads them.
        outputs: By name; the work writes them.
        enqueue: Puts the work into the stream once and does not wait for it.
        is_graph: Whether that replays a CUDA graph of ours.
        held: What must live as long as this.
    """

    context: Context
    stream: Stream
    inputs: Mapping[str, DeviceArray]
    outputs: Mapping[str, DeviceArray]
    enqueue: Callable[[], object]
    is_graph: bool = False
    held: object = None
