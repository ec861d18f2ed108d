"""The float64 reference: an interpreter of ONNX graphs in numpy, every float in double precision.

Common operators are written out here; the rest go, one node at a time, to onnx's reference evaluator. Weights are read
when they are needed and not kept, values are dropped after their last use.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.evaluate import Operation
from graphopt.evaluate import evaluate as evaluate_operation
from graphopt.verification.tolerance import is_float

Array = np.ndarray[Any, Any]
Environment = dict[ir.Value, Any]

# Beyond this many multiply-adds in one node the interpreter is too slow to be worth waiting for.
MULTIPLY_ADD_LIMIT = 4e9


class NotExact(Exception):
    """The float64 result cannot be had: an operator that numpy and onnx's reference cannot run, or too much work."""


def evaluate(model: ir.Model, feeds: Mapping[str, Array], wanted: Sequence[ir.Value] | None = None) -> list[Any]:
    """Run a model in float64.

    Args:
        model: Its main graph in topological order.
        feeds: Input name -> array; floats of any width.
        wanted: Values of the main graph; default: its outputs.

    Raises:
        NotExact: See there.
    """
    inputs = [(value, value.name or "") for value in model.graph.inputs]
    environment: Environment = {value: widen(feeds[name]) for value, name in inputs if name in feeds}
    values = list(model.graph.outputs) if wanted is None else list(wanted)
    run_nodes(_needed(model.graph, values), environment, model, keep=values)
    return [_read(value, environment) for value in values]


def _needed(graph: ir.Graph, wanted: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes of a graph that some values depend on, in the graph's order."""
    needed: set[ir.Node] = set()
    pending = [node for value in wanted if (node := value.producer()) is not None]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(p for value in _reads(node) if (p := value.producer()) is not None)
    return [node for node in graph if node in needed]


def evaluate_between(model: ir.Model, known: Mapping[ir.Value, Array], wanted: ir.Value, *, limit: int = 200) -> Array:
    """The float64 value of ``wanted`` from the values of some others.

    Args:
        model: The model that both are in.
        known: Where to start: value -> what it holds.
        wanted: Where to end.
        limit: How many nodes may lie between.

    Raises:
        NotExact: ``known`` does not determine ``wanted`` within ``limit`` nodes, or see there.
    """
    region: list[ir.Node] = []
    seen: set[ir.Node] = set()
    pending = [wanted]
    while pending:
        value = pending.pop()
        if value in known or graphs.is_constant(value):
            continue
        node = value.producer()
        if node is None or len(region) >= limit:
            raise NotExact(f"{wanted.name} depends on more than the region's inputs")
        if node not in seen:
            seen.add(node)
            region.append(node)
            pending.extend(v for v in node.inputs if v is not None)
            for body in graphs.subgraphs(node):
                pending.extend(graphs.captured_values(body))
    environment: Environment = {value: widen(array) for value, array in known.items()}
    run_nodes(_in_order(region), environment, model, keep=[wanted])
    return np.asarray(_read(wanted, environment))


def _in_order(region: Sequence[ir.Node]) -> list[ir.Node]:
    """Nodes in an order in which each comes after those it reads from, in its bodies too."""
    members = set(region)
    order: dict[ir.Node, None] = {}
    for start in region:
        stack = [start]
        while stack:
            node = stack[-1]
            producers = [value.producer() for value in _reads(node)]
            waiting = [p for p in producers if p is not None and p in members and p not in order]
            if waiting and node not in order:
                stack.extend(waiting)
            else:
                order[node] = None
                stack.pop()
    return list(order)


def widen(value: Any) -> Any:
    """Floats to float64; everything else as it is; sequences element by element."""
    if isinstance(value, list):
        return [widen(item) for item in value]
    if isinstance(value, np.ndarray) and is_float(value) and value.dtype.kind != "c":
        return value.astype(np.float64)
    return value


def run_nodes(nodes: Sequence[ir.Node], environment: Environment, model: ir.Model, *, keep: Sequence[ir.Value]) -> None:
    """Run nodes in order, reading from and writing to ``environment``; forget values after their last use."""
    remaining: Counter[ir.Value] = Counter(value for node in nodes for value in _reads(node))
    kept = set(keep)
    for node in nodes:
        if node.op_type == "Constant" and graphs.is_constant(node.outputs[0]):
            continue  # read where it is used
        for value, array in zip(node.outputs, run_node(node, environment, model), strict=False):
            environment[value] = array
        for value in _reads(node):
            remaining[value] -= 1
            if remaining[value] <= 0 and value not in kept and value.producer() is not None:
                environment.pop(value, None)


def run_node(node: ir.Node, environment: Environment, model: ir.Model) -> list[Any]:
    """The outputs of one node in float64."""
    if node.domain == "" and node.op_type == "Gather" and graphs.is_constant(node.inputs[0]):
        return [_gather_constant(node, environment)]
    inputs = [None if value is None else _read(value, environment) for value in node.inputs]
    if node.domain == "" and node.op_type == "If":
        body = node.attributes["then_branch" if bool(np.asarray(inputs[0]).reshape(())) else "else_branch"].as_graph()
        return _run_body(body, [], environment, model)
    if node.domain == "" and node.op_type == "Loop":
        return _run_loop(node, inputs, environment, model)
    if graphs.has_subgraphs(node):
        raise NotExact(f"{node.op_type} is not run in float64")
    if node.domain == "":
        operator = OPERATORS.get(node.op_type)
        try:
            with np.errstate(all="ignore"):
                result = None if operator is None else operator(node, inputs, graphs.opset(model))
        except (IndexError, ValueError, TypeError, KeyError, MemoryError) as error:
            raise NotExact(f"{node.op_type} {node.name}: {error}") from error
        if result is not None:
            return result if isinstance(result, list) else [result]
        if node.op_type != "Cast" and not any(isinstance(array, list) for array in inputs):
            exactly = evaluate_operation(Operation.of(node, graphs.opset(model)), inputs)
            if exactly is not None:
                return [widen(array) for array in exactly]
    return _by_onnx(node, inputs, model)


def _gather_constant(node: ir.Node, environment: Environment) -> Any:
    """Gather from a constant: only the rows that are taken are widened (an embedding table is large)."""
    data, indices = graphs.constant_array(node.inputs[0]), node.inputs[1]
    assert data is not None and indices is not None
    try:
        return widen(np.take(data, _read(indices, environment), node.attributes.get_int("axis", 0)))
    except (IndexError, ValueError) as error:
        raise NotExact(f"Gather {node.name}: {error}") from error


def _reads(node: ir.Node) -> list[ir.Value]:
    values = [value for value in node.inputs if value is not None]
    for body in graphs.subgraphs(node):
        values.extend(graphs.captured_values(body))
    return values


def _read(value: ir.Value, environment: Environment) -> Any:
    if value in environment:
        return environment[value]
    tensor = graphs.constant_tensor(value) or (value.const_value if value.is_initializer() else None)
    if tensor is None:
        raise NotExact(f"{value.name} has no value")
    return widen(tensor.numpy())


def _run_body(body: ir.Graph, arguments: Sequence[Any], environment: Environment, model: ir.Model) -> list[Any]:
    inner = dict(environment)
    inner.update(zip(body.inputs, arguments, strict=True))
    run_nodes(list(body), inner, model, keep=list(body.outputs))
    return [_read(value, inner) for value in body.outputs]


def _run_loop(node: ir.Node, inputs: Sequence[Any], environment: Environment, model: ir.Model) -> list[Any]:
    body = node.attributes["body"].as_graph()
    trips = int(np.asarray(inputs[0]).reshape(())) if inputs and inputs[0] is not None else None
    go = bool(np.asarray(inputs[1]).reshape(())) if len(inputs) > 1 and inputs[1] is not None else True
    state = list(inputs[2:])
    collected: list[list[Any]] = [[] for _ in range(len(body.outputs) - 1 - len(state))]
    for step in itertools.count():
        if not go or (trips is not None and step >= trips):
            break
        if step > 10_000:
            raise NotExact("a Loop runs for more than 10,000 turns")
        results = _run_body(body, [np.array(step, np.int64), np.array(go), *state], environment, model)
        go = bool(np.asarray(results[0]).reshape(()))
        for scan, result in zip(collected, results[1 + len(state) :], strict=True):
            scan.append(result)
        state = results[1 : 1 + len(state)]
    if any(not scan for scan in collected):
        raise NotExact("a Loop with scan outputs takes no turn")
    return [*state, *(np.stack(scan) for scan in collected)]


def _by_onnx(node: ir.Node, inputs: Sequence[Any], model: ir.Model) -> list[Any]:
    """Run one node with onnx's reference evaluator."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    try:
        names = ["" if array is None else f"i{index}" for index, array in enumerate(inputs)]
        outputs = [f"o{index}" if value.name or value.uses() else "" for index, value in enumerate(node.outputs)]
        proto = ir.to_proto(node)
        del proto.input[:], proto.output[:]
        proto.input.extend(names)
        proto.output.extend(outputs)
        graph = onnx.helper.make_graph(
            [proto],
            "one",
            [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UNDEFINED, None) for n in names if n],
            [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UNDEFINED, None) for n in outputs if n],
        )
        imports = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
        functions = [ir.to_proto(function) for function in model.functions.values()]
        wrapped = onnx.helper.make_model(graph, opset_imports=imports, functions=functions)
        given = {n: a for n, a in zip(names, inputs, strict=True) if n}
        results = iter(ReferenceEvaluator(wrapped).run(None, given))
        return [widen(next(results)) if name else None for name in outputs]
    except Exception as error:  # the reference evaluator raises whatever its operators do
        raise NotExact(f"{node.op_type} {node.name}: {error}") from error


# -- operators in float64 ---------------------------------------------------------------------------------------------

Operator = Callable[[ir.Node, list[Any], int], Any]


def _axes(node: ir.Node, inputs: list[Any], default: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
    if len(inputs) > 1 and inputs[1] is not None:
        axes = tuple(int(axis) for axis in np.asarray(inputs[1]).ravel())
        return axes or default
    attribute = node.attributes.get("axes")
    return (tuple(attribute.as_ints()) or default) if attribute is not None else default


def _reduce(function: Callable[..., Array]) -> Operator:
    def run(node: ir.Node, inputs: list[Any], opset: int) -> Any:
        if inputs[0].dtype.kind != "f" and function in (np.mean, np.sum):
            return None  # numpy's results have other types
        axes = _axes(node, inputs)
        if axes is None and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
            return inputs[0]
        keep = bool(node.attributes.get_int("keepdims", 1))
        return np.asarray(function(inputs[0], axis=axes, keepdims=keep))

    return run


def _unary(function: Callable[[Array], Array]) -> Operator:
    return lambda node, inputs, opset: function(inputs[0])


def _binary(function: Callable[[Array, Array], Array]) -> Operator:
    return lambda node, inputs, opset: np.asarray(function(inputs[0], inputs[1]))


def _erf(x: Array) -> Array:
    from scipy.special import erf

    return np.asarray(erf(x))


def _gelu(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    x = inputs[0]
    approximate = node.attributes.get("approximate")
    if approximate is not None and approximate.as_string() == "tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / np.sqrt(2.0)))


def _softmax(node: ir.Node, inputs: list[Any], opset: int, *, log: bool = False) -> Any:
    x = inputs[0]
    if x.size == 0:
        return x
    axis = node.attributes.get_int("axis", -1 if opset >= 13 else 1)
    shape = x.shape
    if opset < 13:
        axis = axis % max(x.ndim, 1)
        x = x.reshape(int(np.prod(shape[:axis])), -1)
        axis = 1
    shifted = x - np.max(x, axis=axis, keepdims=True)
    total = np.sum(np.exp(shifted), axis=axis, keepdims=True)
    return (shifted - np.log(total) if log else np.exp(shifted) / total).reshape(shape)


def _layer_norm(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    x, scale = inputs[0], inputs[1]
    axis = node.attributes.get_int("axis", -1) % x.ndim
    axes = tuple(range(axis, x.ndim))
    mean = x.mean(axis=axes, keepdims=True)
    inverse = 1 / np.sqrt(((x - mean) ** 2).mean(axis=axes, keepdims=True) + node.attributes.get_float("epsilon", 1e-5))
    y = (x - mean) * inverse * scale
    if len(inputs) > 2 and inputs[2] is not None:
        y = y + inputs[2]
    return [y, mean, inverse]


def _gemm(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    if inputs[0].dtype.kind != "f":
        return None
    _limit_work(inputs[0].size * inputs[1].size / max(inputs[1].shape[node.attributes.get_int("transB", 0)], 1))
    a = inputs[0].T if node.attributes.get_int("transA", 0) else inputs[0]
    b = inputs[1].T if node.attributes.get_int("transB", 0) else inputs[1]
    y = node.attributes.get_float("alpha", 1.0) * (a @ b)
    if len(inputs) > 2 and inputs[2] is not None:
        y = y + node.attributes.get_float("beta", 1.0) * inputs[2]
    return y


def _matmul(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    _limit_work(inputs[0].size * (inputs[1].shape[-1] if inputs[1].ndim > 1 else 1))
    return np.asarray(inputs[0] @ inputs[1])


def _conv(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    """Convolution of any rank by one product a kernel position: slices of the padded input times that tap's weights."""
    x, w = inputs[0], inputs[1]
    spatial = x.ndim - 2
    attributes = node.attributes
    group = attributes.get_int("group", 1)
    strides = attributes.get_ints("strides", (1,) * spatial)
    dilations = attributes.get_ints("dilations", (1,) * spatial)
    kernel = w.shape[2:]
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    mode = attributes.get_string("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for size, stride, reach in zip(x.shape[2:], strides, span, strict=True):
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            small, large = total // 2, total - total // 2
            before.append(small if mode == "SAME_UPPER" else large)
            after.append(large if mode == "SAME_UPPER" else small)
    elif mode == "VALID":
        before, after = [0] * spatial, [0] * spatial
    else:
        pads = attributes.get_ints("pads", (0,) * (2 * spatial))
        before, after = list(pads[:spatial]), list(pads[spatial:])
    x = np.pad(x, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    sizes = [(n - reach) // s + 1 for n, reach, s in zip(x.shape[2:], span, strides, strict=True)]
    batch, channels, filters = x.shape[0], x.shape[1] // group, w.shape[0] // group
    _limit_work(float(np.prod(w.shape)) * float(np.prod(sizes)) * batch)
    y = np.zeros((batch, group, filters, int(np.prod(sizes))))
    taps = w.reshape(group, filters, channels, *kernel)
    for tap in itertools.product(*(range(k) for k in kernel)):
        window = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilations, sizes, strides, strict=True)
        )
        piece = x[(slice(None), slice(None), *window)].reshape(batch, group, channels, -1)
        y += np.matmul(taps[(slice(None), slice(None), slice(None), *tap)], piece)
    y = y.reshape(batch, group * filters, *sizes)
    if len(inputs) > 2 and inputs[2] is not None:
        y = y + inputs[2].reshape(1, -1, *(1,) * spatial)
    return y


def _batch_norm(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    if node.attributes.get_int("training_mode", 0) or len([v for v in node.outputs if v.uses()]) > 1:
        return None
    x, scale, bias, mean, variance = inputs
    shape = (1, -1, *(1,) * (x.ndim - 2))
    factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)


def _cast(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    to = ir.DataType(node.attributes["to"].as_int())
    x = inputs[0]
    if to.is_floating_point():
        # Exact arithmetic has one float type: rounding to a narrower one is what the original does wrong, if anything.
        return x.astype(np.float64) if x.dtype.kind in "fiub" else None
    if to is ir.DataType.STRING or x.dtype.kind not in "fiub":
        return None
    return x.astype(to.numpy())


def _divide(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    a, b = inputs
    if a.dtype.kind == "f":
        return a / b
    quotient = np.floor_divide(np.abs(a), np.abs(b))
    return (quotient * np.sign(a) * np.sign(b)).astype(a.dtype)


def _along(value: Array, x: Array, axis: int) -> Array:
    """A scale or zero point, one for the tensor or one for each index along an axis, ready to broadcast."""
    return (
        value if value.ndim == 0 or value.size == 1 else value.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    )


def _quantise(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    if opset >= 19:
        return None  # onnx's reference knows the newer ones alone
    x, scale = inputs[0], inputs[1]
    zero = inputs[2] if len(inputs) > 2 and inputs[2] is not None else np.array(0, np.uint8)
    axis = node.attributes.get_int("axis", 1) % max(x.ndim, 1)
    limits = np.iinfo(zero.dtype)
    shifted = np.rint(x / _along(scale, x, axis)) + _along(zero.astype(np.float64), x, axis)
    return np.clip(shifted, limits.min, limits.max).astype(zero.dtype)


def _dequantise(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    if opset >= 19:
        return None
    x, scale = inputs[0].astype(np.float64), inputs[1]
    axis = node.attributes.get_int("axis", 1) % max(x.ndim, 1)
    if len(inputs) > 2 and inputs[2] is not None:
        x = x - _along(inputs[2].astype(np.float64), x, axis)
    return x * _along(scale, x, axis)


def _limit_work(multiply_adds: float) -> None:
    if multiply_adds > MULTIPLY_ADD_LIMIT:
        raise NotExact("too much work for the float64 interpreter")


def _variadic(function: Callable[[Array, Array], Array]) -> Operator:
    def run(node: ir.Node, inputs: list[Any], opset: int) -> Any:
        total = inputs[0]
        for other in inputs[1:]:
            total = function(total, other)
        return np.asarray(total)

    return run


OPERATORS: dict[str, Operator] = {
    "Identity": lambda node, inputs, opset: inputs[0],
    "Add": _binary(np.add),
    "Sub": _binary(np.subtract),
    "Mul": _binary(np.multiply),
    "Div": _divide,
    "Pow": lambda node, inputs, opset: np.power(inputs[0], inputs[1]) if inputs[0].dtype.kind == "f" else None,
    "Equal": _binary(np.equal),
    "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal),
    "Less": _binary(np.less),
    "LessOrEqual": _binary(np.less_equal),
    "And": _binary(np.logical_and),
    "Or": _binary(np.logical_or),
    "Not": _unary(np.logical_not),
    "Neg": _unary(np.negative),
    "Abs": _unary(np.abs),
    "Sqrt": _unary(np.sqrt),
    "Exp": _unary(np.exp),
    "Log": _unary(np.log),
    "Sin": _unary(np.sin),
    "Cos": _unary(np.cos),
    "Tanh": _unary(np.tanh),
    "Erf": _unary(_erf),
    "Floor": _unary(np.floor),
    "Ceil": _unary(np.ceil),
    "Reciprocal": _unary(lambda x: 1.0 / x),
    "Sigmoid": _unary(lambda x: 1 / (1 + np.exp(-x))),
    "Relu": _unary(lambda x: np.maximum(x, 0)),
    "Sum": _variadic(np.add),
    "Max": _variadic(np.maximum),
    "Min": _variadic(np.minimum),
    "Where": lambda node, inputs, opset: np.where(inputs[0], inputs[1], inputs[2]),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Gelu": _gelu,
    "Softmax": _softmax,
    "LogSoftmax": lambda node, inputs, opset: _softmax(node, inputs, opset, log=True),
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _batch_norm,
    "ReduceMean": _reduce(np.mean),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "Cast": _cast,
    "QuantizeLinear": _quantise,
    "DequantizeLinear": _dequantise,
    "CastLike": lambda node, inputs, opset: (
        inputs[0] if inputs[0].dtype.kind == "f" and inputs[1].dtype.kind == "f" else None
    ),
    "Shape": lambda node, inputs, opset: np.array(
        inputs[0].shape[slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", None))],
        np.int64,
    ),
    "Transpose": lambda node, inputs, opset: np.transpose(
        inputs[0], node.attributes["perm"].as_ints() if "perm" in node.attributes else None
    ),
    "Concat": lambda node, inputs, opset: np.concatenate(inputs, node.attributes.get_int("axis", 1)),
    "Gather": lambda node, inputs, opset: np.take(inputs[0], inputs[1], node.attributes.get_int("axis", 0)),
    "Unsqueeze": lambda node, inputs, opset: np.expand_dims(inputs[0], tuple(_axes(node, inputs) or ())),
    "Squeeze": lambda node, inputs, opset: np.squeeze(inputs[0], _axes(node, inputs)),
    "Expand": lambda node, inputs, opset: (
        inputs[0] * np.ones([int(n) for n in inputs[1]], inputs[0].dtype) if inputs[0].dtype.kind in "fiu" else None
    ),
}
