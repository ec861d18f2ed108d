"""Test networks written in ONNX's own text syntax, with seeded weights."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir


def model_from_text(text: str, *, weights: Mapping[str, np.ndarray] | None = None, seed: int = 0) -> ir.Model:
    """Parse ``text`` and give every weight that it only declares a value.

    A weight is declared in the angle brackets after the graph's outputs: ``<float[8,4] w>``. It takes its value
    from ``weights`` or, for floats, from a normal distribution scaled by 1/sqrt(fan-in) (vectors by 0.1), seeded
    by ``seed`` and its own name, so that adding one weight leaves the others as they are.

    Raises:
        ValueError: A declared weight is not a float and has no value.
    """
    model = onnx.parser.parse_model(text)
    given = dict(weights or {})
    produced = {name for node in model.graph.node for name in node.output}
    held = {initializer.name for initializer in model.graph.initializer}
    for declared in model.graph.value_info:
        if declared.name not in produced | held:
            value = given.pop(declared.name, None)
            value = _random_weight(declared, seed) if value is None else value
            model.graph.initializer.append(onnx.numpy_helper.from_array(value, declared.name))
    if given:
        raise ValueError(f"the text declares no weights named {sorted(given)}")
    _drop_initializer_types(model.graph)
    onnx.checker.check_model(model)
    return ir.from_proto(model)


def _random_weight(declared: onnx.ValueInfoProto, seed: int) -> np.ndarray:
    kind = declared.type.tensor_type
    if kind.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
        raise ValueError(f"weight {declared.name!r} needs a value: only floats are drawn")
    shape = tuple(dim.dim_value for dim in kind.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return random_weight(declared.name, shape, seed).astype(dtype)


def random_weight(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A float32 weight of this shape, determined by its name and the seed."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    # Conv weights are [out, in, *kernel]; MatMul weights [in, out]: the fan-in is what one output sums over.
    fan_in = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
    scale = fan_in**-0.5 if len(shape) > 1 else 0.1
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def _drop_initializer_types(graph: onnx.GraphProto) -> None:
    """Types of weights are in the weights; a real exporter does not write them twice."""
    held = {initializer.name for initializer in graph.initializer}
    kept = [info for info in graph.value_info if info.name not in held]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def nested_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """This graph and every graph inside its nodes, outermost first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.g.node else attribute.graphs:
                yield from nested_graphs(inner)
