"""What is in a model: ops, weights, axes, control flow, custom ops. Reads no weight unless asked to scan them."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.contents import BundleContents, bundle_contents
from graphopt.files import load_model
from graphopt.files.bundle_folder import is_bundle

STANDARD_DOMAINS = frozenset({"", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview", "ai.onnx.preview.training"})
FLOAT16_MAX = 65504.0

# Elements looked at at once in a scan: a block and its temporaries stay at a few MB.
_SCAN_BLOCK = 1 << 19


@dataclass(frozen=True)
class Axes:
    """An input or output: its element type and axes, numbers where known, names where symbolic, None otherwise."""

    name: str
    type: str
    shape: tuple[int | str | None, ...] | None
    has_default: bool = False


@dataclass(frozen=True)
class Weight:
    """One weight: an initializer or the tensor of a Constant node."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str | None


@dataclass(frozen=True)
class DtypeTotal:
    """All weights of one data type together."""

    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Body:
    """A graph that a control-flow node carries, and the control flow in it."""

    attribute: str
    nodes: int
    children: tuple[ControlFlow, ...]


@dataclass(frozen=True)
class ControlFlow:
    """A node with bodies: If, Loop, Scan, SequenceMap, or a custom one."""

    op: str
    name: str
    bodies: tuple[Body, ...]


@dataclass(frozen=True)
class CustomOp:
    """An op of a domain that is not ONNX's, or a call of a function that the model carries."""

    domain: str
    op: str
    version: int | None
    count: int
    has_function: bool


@dataclass(frozen=True)
class DataFile:
    """An external data file."""

    location: str
    bytes: int
    tensors: int


@dataclass(frozen=True)
class WeightValues:
    """What the values of one weight are like.

    Attributes:
        zeros: Share of elements that are zero, 0 to 1.
        min, max: Of the finite values; None where there is none.
        constant_first, constant_last: Slices along the first and last axis that hold one value throughout (for a
            convolution, dead output channels; for a matrix product, dead inputs and outputs). 0 below two axes.
        over_float16: Finite elements of a floating-point weight that float16 cannot hold (beyond 65504 in size).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nan: int
    inf: int
    zeros: float
    min: float | None
    max: float | None
    constant_first: int
    constant_last: int
    over_float16: int


@dataclass(frozen=True)
class Inspection:
    """Everything that ``graphopt inspect`` shows."""

    path: str
    bytes: int
    ir_version: int
    producer: str
    opsets: dict[str, int]
    inputs: tuple[Axes, ...]
    outputs: tuple[Axes, ...]
    nodes: int
    ops: dict[str, int]
    parameters: int
    weight_bytes: int
    weights_by_dtype: dict[str, DtypeTotal]
    weights: tuple[Weight, ...]
    data_files: tuple[DataFile, ...]
    control_flow: tuple[ControlFlow, ...]
    custom_ops: tuple[CustomOp, ...]
    functions: dict[str, int]
    metadata: dict[str, str]
    values: tuple[WeightValues, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The inspection as JSON values; of the weights the 20 largest."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["largest_weights"] = fields.pop("weights")[:20]
        values = fields.pop("values")
        return fields if values is None else {**fields, "values": values}


def inspect(path: str | Path, *, weights: bool = False) -> Inspection | BundleContents:
    """Look into a model file, or into a bundle.

    Args:
        path: The ``.onnx`` file, or the folder of a bundle.
        weights: Also read every weight and say what its values are like (`Inspection.values`); of a bundle, whether
            all of it is as it was written (`BundleContents.changed`).

    Returns:
        Of a bundle its plan, its blocks and what was counted on it.

    Raises:
        BadInput: The file is no valid model, or the bundle no whole one.
    """
    if is_bundle(Path(path)):
        return bundle_contents(path, weights=weights)
    model = load_model(path)
    found = describe(model, Path(path))
    return replace(found, values=scan_weights(model)) if weights else found


def describe(model: ir.Model, path: Path) -> Inspection:
    """Describe a model that was loaded from ``path``. Bodies and functions are included, each function once."""
    nodes = list(graphs.all_nodes(model))
    ops = Counter(_op_name(node) for node in nodes)
    tensors = list(weights_of(model))
    weights = sorted((_weight(name, tensor) for name, tensor in tensors), key=lambda w: (-w.bytes, w.name))
    by_dtype: dict[str, DtypeTotal] = {}
    for _, tensor in tensors:
        total = by_dtype.get(tensor.dtype.name, DtypeTotal(0, 0, 0))
        size = _byte_count(tensor)
        by_dtype[tensor.dtype.name] = DtypeTotal(total.tensors + 1, total.elements + tensor.size, total.bytes + size)
    imports = model.opset_imports
    return Inspection(
        path=str(path),
        bytes=path.stat().st_size,
        ir_version=model.ir_version,
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        opsets={domain or "ai.onnx": version for domain, version in imports.items()},
        inputs=tuple(_axes(value) for value in model.graph.inputs),
        outputs=tuple(_axes(value) for value in model.graph.outputs),
        nodes=len(nodes),
        ops=dict(sorted(ops.items(), key=lambda item: (-item[1], item[0]))),
        parameters=sum(total.elements for total in by_dtype.values()),
        weight_bytes=sum(total.bytes for total in by_dtype.values()),
        weights_by_dtype=dict(sorted(by_dtype.items(), key=lambda item: (-item[1].bytes, item[0]))),
        weights=tuple(weights),
        data_files=tuple(_data_files(model)),
        control_flow=_control_flow(model.graph),
        custom_ops=_custom_ops(model, nodes),
        functions={_function_name(f): len(f.graph) for f in model.functions.values()},
        metadata=dict(model.metadata_props),
    )


def weights_of(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Every weight with its name, each tensor object once: initializers, and the tensors of Constant nodes."""
    seen: set[int] = set()
    for graph in graphs.all_graphs(model):
        for name, value in graph.initializers.items():
            if value.const_value is not None and id(value.const_value) not in seen:
                seen.add(id(value.const_value))
                yield name, value.const_value
        for node in graph:
            if node.op_type == "Constant" and node.domain == "" and "value" in node.attributes:
                attribute = node.attributes["value"]
                if not attribute.is_ref() and id(attribute.value) not in seen:
                    seen.add(id(attribute.value))
                    yield node.outputs[0].name or "", attribute.as_tensor()


def scan_weights(model: ir.Model, seen: Callable[[str], None] = lambda name: None) -> tuple[WeightValues, ...]:
    """Look at every value of every weight, one weight at a time.

    Args:
        model: The model.
        seen: Called with the name of each weight after it was scanned.

    Returns:
        One entry a weight, in the order of `weights_of`; strings and complex numbers are left out.
    """
    found = []
    for name, tensor in weights_of(model):
        if tensor.dtype is not ir.DataType.STRING and not tensor.dtype.name.startswith("COMPLEX"):
            found.append(scan_values(name, tensor))
            _forget_pages(tensor)
        seen(name)
    return tuple(found)


def scan_values(name: str, tensor: ir.TensorProtocol) -> WeightValues:
    """Look at the values of one weight, in blocks: memory stays at a few MB where the weight is mapped from a file."""
    array = tensor.numpy()
    shape = array.shape
    columns = shape[-1] if len(shape) > 1 else 1
    table = array.reshape(-1, columns) if array.size else array.reshape(0, 1)
    floating = tensor.dtype.is_floating_point()
    nan = inf = zero = over = 0
    low, high = np.inf, -np.inf
    row_low, row_high = np.empty(len(table)), np.empty(len(table))
    column_low, column_high = np.full(columns, np.inf), np.full(columns, -np.inf)
    step = max(1, _SCAN_BLOCK // max(1, columns))
    for start in range(0, len(table), step):
        # float64 holds every value of the other types but large int64, of which it keeps the size.
        with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN
            block = table[start : start + step].astype(np.float64)
        finite = np.isfinite(block)
        if not finite.all():
            nan_here = int(np.isnan(block).sum())
            nan += nan_here
            inf += int(finite.size - finite.sum()) - nan_here
            values = block[finite]
        else:
            values = block
        zero += int(values.size - np.count_nonzero(values))
        if values.size:
            here_low, here_high = float(values.min()), float(values.max())
            low, high = min(low, here_low), max(high, here_high)
            if floating and max(-here_low, here_high) > FLOAT16_MAX:
                over += int((np.abs(values) > FLOAT16_MAX).sum())
        row_low[start : start + step], row_high[start : start + step] = block.min(axis=1), block.max(axis=1)
        np.minimum(column_low, block.min(axis=0), out=column_low)
        np.maximum(column_high, block.max(axis=0), out=column_high)
    matrix = len(shape) > 1 and array.size > 0
    first = 0
    if matrix and array.size > shape[0]:
        slices = (shape[0], -1)
        first = int((row_low.reshape(slices).min(axis=1) == row_high.reshape(slices).max(axis=1)).sum())
    last = int((column_low == column_high).sum()) if matrix and array.size > columns else 0
    return WeightValues(
        name=name,
        dtype=tensor.dtype.name,
        shape=tuple(shape),
        nan=nan,
        inf=inf,
        zeros=zero / array.size if array.size else 0.0,
        min=low if low <= high else None,
        max=high if low <= high else None,
        constant_first=first,
        constant_last=last,
        over_float16=over,
    )


def _forget_pages(tensor: ir.TensorProtocol) -> None:
    """Give back the memory that a mapped weight took while it was read; it can be read again."""
    if isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None:
        tensor.raw.madvise(mmap.MADV_DONTNEED)


def _op_name(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _function_name(function: ir.Function) -> str:
    return f"{function.domain}::{function.name}" + (f":{function.overload}" if function.overload else "")


def _byte_count(tensor: ir.TensorProtocol) -> int:
    if isinstance(tensor, ir.StringTensor):
        return sum(len(text) for text in tensor.string_data())
    return tensor.nbytes


def _weight(name: str, tensor: ir.TensorProtocol) -> Weight:
    file = str(tensor.location) if isinstance(tensor, ir.ExternalTensor) else None
    return Weight(name, tensor.dtype.name, tuple(tensor.shape.numpy()), _byte_count(tensor), file)


def _axes(value: ir.Value) -> Axes:
    shape: tuple[int | str | None, ...] | None = None
    if value.shape is not None:
        shape = tuple(axis if isinstance(axis, int) else axis.value for axis in value.shape)
    return Axes(value.name or "", _type_name(value.type), shape, value.is_initializer())


def _type_name(kind: ir.TypeProtocol | None) -> str:
    if kind is None:
        return "unknown"
    if isinstance(kind, ir.SequenceType):
        return f"sequence of {_type_name(kind.elem_type)}"
    if isinstance(kind, ir.OptionalType):
        return f"optional {_type_name(kind.elem_type)}"
    if isinstance(kind, ir.SparseTensorType):
        return f"sparse {kind.dtype.name}"
    return kind.dtype.name


def _data_files(model: ir.Model) -> Iterator[DataFile]:
    counts: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    for _, tensor in weights_of(model):
        if isinstance(tensor, ir.ExternalTensor):
            location = str(tensor.location)
            counts[location] += 1
            if location not in sizes:
                sizes[location] = Path(tensor.path).stat().st_size
    for location in sorted(counts):
        yield DataFile(location, sizes[location], counts[location])


def _control_flow(graph: ir.Graph) -> tuple[ControlFlow, ...]:
    found = []
    for node in graph:
        if not graphs.has_subgraphs(node):
            continue
        bodies: list[Body] = []
        for name, attribute in node.attributes.items():
            if attribute.is_ref() or attribute.type not in graphs.GRAPH_ATTRIBUTES:
                continue
            single = attribute.type is ir.AttributeType.GRAPH
            inner = [attribute.as_graph()] if single else attribute.as_graphs()
            bodies.extend(Body(name, len(body), _control_flow(body)) for body in inner)
        found.append(ControlFlow(_op_name(node), node.name or "", tuple(bodies)))
    return tuple(found)


def _custom_ops(model: ir.Model, nodes: list[ir.Node]) -> tuple[CustomOp, ...]:
    functions = set(model.functions)
    counts = Counter(
        node.op_identifier()
        for node in nodes
        if node.domain not in STANDARD_DOMAINS or (functions and node.op_identifier() in functions)
    )
    return tuple(
        CustomOp(key[0], key[1], model.opset_imports.get(key[0]), count, key in functions)
        for key, count in sorted(counts.items())
    )
