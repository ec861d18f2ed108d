"""What is known of a network when it is run on one sample: which inputs have samples, and the sizes of all values.

Inference of shapes does not look through what a loop hands from turn to turn. Here it is supposed that every turn hands
on the sizes it got, and a supposition stays where the body, given these sizes, makes them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.samples.lifted import Sizes
from graphopt.errors import BadInput
from graphopt.shapes import infer_shapes, trusted_shape

BATCH = "batch"
"""What the axis of samples is called where the network has no name for it."""

_MADE_UP = "unk__"


def sample_axes(model: ir.Model) -> tuple[dict[ir.Value, int], str]:
    """Which axis of each input has the samples, and the name of that axis.

    Where the first axis of an input has a name, that is the batch, and axes of that name have the samples. Where none
    has, a network for one sample has them along the first axis that is 1 or unknown. All other inputs are the same for
    all samples.

    Raises:
        BadInput: No input has such an axis.
    """
    shapes = {value: [_word(size) for size in value.shape] for value in model.graph.inputs if value.shape is not None}
    named = next((shape[0] for shape in shapes.values() if shape and isinstance(shape[0], str)), None)
    wanted = (named,) if named is not None else (1, None)
    axes = {
        value: next(axis for axis, size in enumerate(shape) if size in wanted)
        for value, shape in shapes.items()
        if any(size in wanted for size in shape)
    }
    if not axes:
        raise BadInput(
            "no input has an axis of samples", hint="export the network with a batch axis that is 1 or has a name"
        )
    return axes, named or BATCH


def fix_to_one_sample(model: ir.Model, axes: Mapping[ir.Value, int], name: str) -> None:
    """Make a network one for one sample, and find out the sizes that follow."""
    for value in model.graph.inputs:
        if value.shape is not None:
            sizes = [_word(size) for size in value.shape]
            value.shape = ir.Shape(
                [1 if axes.get(value) == place or size == name else size for place, size in enumerate(sizes)]
            )
    for graph in graphs.nested_graphs(model.graph):
        for node in graph:
            for output in node.outputs:
                output.shape = None
    _infer(model)


def sizes_of(value: ir.Value) -> Sizes | None:
    """The sizes of a value that are known, None for those that are not."""
    shape = trusted_shape(value)
    return None if shape is None else tuple(size if isinstance(size, int) else None for size in shape)


def _infer(model: ir.Model) -> None:
    supposed = _of_counters(model)
    given_up: set[ir.Value] = set()
    states = list(_states(model))
    while True:
        infer_shapes(model, supposed)
        changed = False
        for start, inner, after, final in states:
            shape = trusted_shape(start)
            if inner not in supposed and inner not in given_up and shape is not None:
                supposed[inner] = ir.Shape([_told(size) for size in shape])
            elif inner in supposed and (kept := _kept(supposed[inner], trusted_shape(after))) != supposed[inner]:
                if kept is None:
                    given_up.add(inner)
                    del supposed[inner]
                    supposed.pop(final, None)
                else:
                    supposed[inner] = kept
            else:
                continue
            if inner in supposed:
                supposed[final] = supposed[inner]
            changed = True
        if not changed:
            return


def _of_counters(model: ir.Model) -> dict[ir.Value, ir.Shape]:
    """A loop's counter and condition have one element, and the rank that its body says."""
    return {
        value: ir.Shape([1] * len(value.shape or ()))
        for node in graphs.all_nodes(model)
        if node.op_type == "Loop" and node.domain == ""
        for value in node.attributes["body"].as_graph().inputs[:2]
    }


def _states(model: ir.Model) -> Iterator[tuple[ir.Value, ir.Value, ir.Value, ir.Value]]:
    """Of every loop each state: its start, in the body, after a turn, and after the last."""
    for node in graphs.all_nodes(model):
        if node.op_type == "Loop" and node.domain == "":
            body = node.attributes["body"].as_graph()
            for start, inner, after, final in zip(
                node.inputs[2:], body.inputs[2:], body.outputs[1:], node.outputs, strict=False
            ):
                if start is not None:
                    yield start, inner, after, final


def _kept(supposed: ir.Shape, made: ir.Shape | None) -> ir.Shape | None:
    """What is left of the supposition that a body gives back the sizes it got; None: not even their number."""
    if made is None or len(made) != len(supposed):
        return None
    return ir.Shape([_told(a) if _told(a) == _told(b) else None for a, b in zip(supposed, made, strict=True)])


def _told(size: int | ir.SymbolicDim) -> int | str | None:
    """A size as it may be told to inference: names that it made up are none."""
    word = _word(size)
    return None if isinstance(word, str) and word.startswith(_MADE_UP) else word


def _word(size: int | ir.SymbolicDim) -> int | str | None:
    return size if isinstance(size, int) else size.value
