"""ScaleAdd in TensorRT engines: Mul by a number for each channel, then Add of one whole number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.engines.plugins import Array, Attributes, Choice, Lowered, Meaning, Plugin, Refused, Types, Written
from graphopt.engines.plugins.nodes import check_types, write_node
from graphopt.kernels.kernel import Kernel, Launch, Parameter, Shape, ceil_div

THREADS = 128
C_TYPES = {"float32": "float", "float16": "half"}


def results(shapes: Sequence[Shape], attributes: Attributes) -> Sequence[Shape]:
    """y like x, and two numbers that the kernel tells: a size that no input has."""
    return [shapes[0], [2]]


def launch(per_thread: int, shapes: Sequence[Shape]) -> Launch:
    """As few would write it, with ints on the left, and differences."""
    (x,) = shapes
    total = 1
    for size in x:
        total = total * size
    blocks = ceil_div(total, THREADS * per_thread)
    spare = 0 - (total - THREADS * per_thread * blocks)
    return Launch((blocks, 1, 1), (total, x[-1], spare))


def kernels(types: Types, attributes: Attributes) -> Mapping[int, Kernel]:
    """One and four elements a thread."""
    scales = ", ".join(f"{float(scale)!r}f" for scale in attributes["scales"])
    return {
        tactic: Kernel(
            name="scale_add",
            source=Path(__file__).with_name("scale_add.cu"),
            parameters=(
                Parameter("x", "input", types[0]),
                Parameter("total", "scalar", "int32"),
                Parameter("n", "scalar", "int32"),
                Parameter("spare", "scalar", "int32"),
                Parameter("y", "output", types[0]),
                Parameter("told", "output", "int32"),
            ),
            threads=THREADS,
            launch=partial(launch, per_thread),
            defines=(
                ("ELEMENT", C_TYPES[types[0]]),
                ("SCALES", scales),
                ("OFFSET", f"{float(attributes['offset'][0])!r}f"),
                ("PER_THREAD", str(per_thread)),
            ),
        )
        for tactic, per_thread in ((1, 1), (2, 4))
    }


def lower(model: ir.Model, choice: Choice) -> Lowered:
    """Mul by a constant vector, then Add of a constant number."""
    written: list[Written] = []
    refused: list[Refused] = []
    names = graphs.value_names(model)
    for add in [node for node in model.graph if node.op_type == "Add"]:
        mul = add.inputs[0].producer() if add.inputs[0] is not None else None
        if mul is None or mul.op_type != "Mul":
            continue
        scales, offset = graphs.constant_array(mul.inputs[1]), graphs.scalar_of(add.inputs[1])
        if scales is None or scales.ndim != 1 or offset is None:
            continue
        name = add.name or ""
        if not offset.is_integer():
            refused.append(Refused(PLUGIN.name, name, "the offset is no whole number"))
            continue
        x, old = mul.inputs[0], add.outputs[0]
        assert x is not None
        y = ir.Value(name=old.name, type=old.type, shape=old.shape)
        told = ir.Value(name=f"{name}/told", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([2]))
        attributes = {"offset": int(offset), "scales": scales}
        node = write_node(model, model.graph, PLUGIN, [x], attributes, [y, told], name=name, names=names)
        model.graph.insert_before(add, node)
        for place, output in enumerate(model.graph.outputs):
            if output is old:
                model.graph.outputs[place] = y
        for use in tuple(old.uses()):
            use.node.replace_input_with(use.idx, y)
        for gone in (add, mul):
            graphs.detach(gone)
            model.graph.remove(gone)
        arrays: dict[str, Array] = {"offset": np.array([int(offset)], np.int64), "scales": scales.astype(np.float32)}
        written.append(Written(PLUGIN.name, name, check_types(PLUGIN, [x]), arrays, "always"))
    return Lowered(tuple(written), tuple(refused))


def meaning(node: ir.Node, attributes: Attributes, opset: int) -> Meaning:
    """Mul, then Add."""
    x = node.inputs[0]
    assert x is not None and x.dtype is not None
    dtype = x.dtype.numpy()

    def constant(array: np.ndarray) -> ir.Node:
        return ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(array.astype(dtype)))])

    scales, offset = constant(attributes["scales"]), constant(attributes["offset"][0])
    product = ir.Node("", "Mul", [x, scales.outputs[0]])
    total = ir.Node("", "Add", [product.outputs[0], offset.outputs[0]])
    return Meaning([scales, offset, product, total], [total.outputs[0], None])


PLUGIN = Plugin(
    name="ScaleAdd",
    inputs=("x",),
    outputs=("y", "told"),
    attributes=(("offset", "int64"), ("scales", "float32")),
    types=(("float32", "float32", "int32"), ("float16", "float16", "int32")),
    results=results,
    kernels=kernels,
    lower=lower,
    meaning=meaning,
    namespace="third_party",
)
