"""Sizes that fit: what a node's declared output says about the input that its size comes from."""

from __future__ import annotations

import itertools
import math

import onnx_ir as ir

_LARGEST_IMAGE = 4096  # beyond it no block is looked for


def suggestion(node: ir.Node, index: int) -> tuple[int, ...] | None:
    """The sizes that a node's declared outputs imply for its size input, or None."""
    if node.op_type == "Col2Im":
        return _image(node) if index == 1 else _block(node)
    if node.op_type not in ("Split", "SplitToSequence"):
        return static_sizes(node.outputs[0])
    axis = node.attributes.get_int("axis", 0)
    shapes = [static_sizes(output) for output in node.outputs]
    return tuple(shape[axis or 0] for shape in shapes if shape)


def _image(node: ir.Node) -> tuple[int, ...] | None:
    shape = static_sizes(node.outputs[0])
    return None if shape is None else shape[2:]


def _block(node: ir.Node) -> tuple[int, ...] | None:
    """The block of a Col2Im that gives as many columns of as many elements as its input has."""
    image = _image(node)
    columns = None if node.inputs[0] is None else static_sizes(node.inputs[0])
    output = static_sizes(node.outputs[0])
    if image is None or columns is None or output is None or len(columns) != 3 or math.prod(image) > _LARGEST_IMAGE:
        return None
    axes = len(image)
    pads = list(node.attributes.get_ints("pads", ()) or ()) or [0] * (2 * axes)
    strides = list(node.attributes.get_ints("strides", ()) or ()) or [1] * axes
    dilations = list(node.attributes.get_ints("dilations", ()) or ()) or [1] * axes

    def steps(axis: int, size: int) -> int:
        room = image[axis] + pads[axis] + pads[axis + axes] - dilations[axis] * (size - 1) - 1
        return room // strides[axis] + 1 if room >= 0 else 0

    for block in itertools.product(*(range(1, size + 1) for size in image)):
        count = math.prod(steps(axis, size) for axis, size in enumerate(block))
        if output[1] * math.prod(block) == columns[1] and count == columns[2]:
            return block
    return None


def static_sizes(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of a value where every size is a number, else None."""
    return value.shape.numpy() if value.shape is not None and value.shape.is_static() else None
