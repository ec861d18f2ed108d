"""The conditions that take more than a line of YAML, and which inputs decide shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from graphopt.engines.coverage.conditions import Findings, Looked, condition
from graphopt.targets.target import type_name

# Inputs that are read as numbers while the library works out shapes, by operator.
SHAPE_READERS: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Loop": (0,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Tile": (1,),
    "TopK": (1,),
    "Upsample": (1,),
}


def shape_inputs(at: Looked) -> Iterable[str]:
    """The network's inputs whose values decide the shape of what a node gives."""
    for index in SHAPE_READERS.get(at.node.op_type, ()):
        for value in at.known.roots(at.input(index)) & at.known.given:
            yield value.name or ""


@condition
def sizes_from(at: Looked, types: Sequence[str], input: int | None = None) -> Findings | None:
    """Sizes, positions or numbers of runs are made from values of an input of the model that is of these types."""
    for index in SHAPE_READERS.get(at.node.op_type, ()) if input is None else (input,):
        for value in at.known.roots(at.input(index)) & at.known.given:
            if (kind := at.known.dtype(value)) in types:
                return {"input": value.name or "", "type": kind or ""}
    return None


@condition
def sizes_of_runs(at: Looked) -> Findings | None:
    """Sizes or positions differ from one run of the body of a Loop or Scan to the next."""
    for index in SHAPE_READERS.get(at.node.op_type, ()):
        value = at.input(index)
        if at.known.roots(value) & at.known.of_runs:
            return {"value": (value and value.name) or ""}
    return None


@condition
def mixed_uint8(at: Looked) -> Findings | None:
    """Constants of uint8, which become int32, meet computed values of uint8."""
    kinds = {
        at.known.dtype(value) for value in at.node.inputs if value is not None and value.dtype == ir.DataType.UINT8
    }
    return {"types": " and ".join(sorted(k for k in kinds if k))} if len(kinds) > 1 else None


@condition
def cast_to(at: Looked, not_among: Sequence[str]) -> Findings | None:
    """A Cast gives a type that is not among those given."""
    to = at.attribute("to")
    found = None if to is None else type_name(ir.DataType(to))
    return {"type": found} if found is not None and found not in not_among else None


@condition
def inner_output(at: Looked, output: int) -> Findings | None:
    """An output is read by other nodes."""
    return {} if at.node.outputs[output].uses() else None


@condition
def training(at: Looked) -> Findings | None:
    """The third input of a Dropout is not a constant, or is true."""
    flag = at.known.array(at.input(2))
    return {} if flag is None or bool(flag.any()) else None


@condition
def resize_axes(at: Looked) -> Findings | None:
    """A Resize has scales, and axes that are not all axes in order."""
    axes, count = at.attribute("axes"), at.known.rank(at.input(0))
    if axes is None or count is None or at.input(2) is None or _is_empty(at, at.input(2)):
        return None
    return {"value": str(axes)} if axes != list(range(count)) else None


def _is_empty(at: Looked, value: ir.Value | None) -> bool:
    return at.known.shape(value) == [0]


@condition
def odd_nibbles(at: Looked) -> Findings | None:
    """The codes are of 4 bits, and odd in number."""
    kind, shape = at.known.dtype(at.input(0)), at.known.shape(at.input(0))
    if kind not in ("int4", "uint4", "float4e2m1") or shape is None:
        return None
    count = 1
    for axis in shape:
        if axis is None:
            return None
        count *= axis
    return {"count": str(count), "type": kind} if count % 2 else None


@condition
def branches_of_unequal_rank(at: Looked) -> Findings | None:
    """The branches of an If give different numbers of axes, and which one runs is not known before."""
    if at.known.fixed(at.input(0)):
        return None
    branches = [at.attribute(name) for name in ("then_branch", "else_branch")]
    if None in branches:
        return None
    for pair in zip(*(branch.outputs for branch in branches), strict=False):
        ranks = [at.known.rank(value) for value in pair]
        if None not in ranks and ranks[0] != ranks[1]:
            return {"ranks": f"{ranks[0]} and {ranks[1]}"}
    return None


@condition
def negative_last_part(at: Looked) -> Findings | None:
    """A Split into a number of parts leaves less than nothing for the last."""
    shape, parts = at.known.shape(at.input(0)), at.attribute("num_outputs")
    axis = at.attribute("axis", 0)
    if shape is None or parts is None or at.input(1) is not None or not -len(shape) <= axis < len(shape):
        return None
    size = shape[axis]
    if size is None or -(-size // parts) * (parts - 1) <= size:
        return None
    return {"size": str(size), "parts": str(parts)}


@condition
def bare_codes(at: Looked) -> Findings | None:
    """A constant of narrow codes is read by a node that does not dequantise."""
    for value in at.node.inputs:
        kind = at.known.dtype(value)
        if value is not None and kind in _CODES and at.known.is_weight(value):
            return {"type": kind or "", "value": at.known.weight(value).name or ""}
    return None


@condition
def uint8_read(at: Looked) -> Findings | None:
    """A computed value or an input of the model of uint8 is read, where that is not one of the few places for it."""
    for index, value in enumerate(at.node.inputs):
        if value is None or at.known.dtype(value) != "uint8" or at.known.is_weight(value):
            continue
        alone = at.node.op_type in ("Max", "Min") and len(at.node.inputs) == 1
        if not alone and (at.node.op_type, index) != ("Pow", 1):
            return {"value": value.name or ""}
    return None


@condition
def quantised_axis_dynamic(at: Looked) -> Findings | None:
    """Scales are one for each slice of an axis, or block, whose number is not known beforehand."""
    scales, codes = at.known.shape(at.input(1)), at.known.shape(at.input(0))
    if scales is None or scales in ([], [1]) or codes is None:
        return None
    axis = at.attribute("axis", 1)
    if None in scales or (-len(codes) <= axis < len(codes) and codes[axis] is None):
        return {"axis": str(axis)}
    return None


@condition
def resize_beside_dynamic(at: Looked) -> Findings | None:
    """A Resize gives some axes constant sizes, and another axis is not known beforehand."""
    axes, shape = at.attribute("axes"), at.known.shape(at.input(0))
    if axes is None or shape is None or at.input(3) is None or not at.known.fixed(at.input(3)):
        return None
    kept = set(range(len(shape))) - {axis % len(shape) for axis in axes}
    left = sorted(axis for axis in kept if shape[axis] is None)
    return {"axis": str(left[0])} if left else None


@condition
def condition_read(at: Looked) -> Findings | None:
    """A Loop is given no condition, and its body reads one."""
    body = at.attribute("body")
    if at.input(1) is not None or body is None or len(body.inputs) < 2:
        return None
    return {} if body.inputs[1].uses() or body.inputs[1].is_graph_output() else None


@condition
def collects(at: Looked) -> Findings | None:
    """A Loop collects values of its runs."""
    return {} if len(at.node.outputs) > max(len(at.node.inputs) - 2, 0) else None


@condition
def growing_state(at: Looked) -> Findings | None:
    """A value that a Loop or Scan carries from run to run gets longer by a Concat in each."""
    body = at.attribute("body")
    if body is None:
        return None
    skipped_in, skipped_out = (2, 1) if at.node.op_type == "Loop" else (0, 0)
    carried = len(at.node.inputs) - 2 if at.node.op_type == "Loop" else _scan_states(at)
    for state, result in zip(body.inputs[skipped_in:], body.outputs[skipped_out : skipped_out + carried], strict=False):
        node = result.producer()
        while node is not None and node.op_type in ("Identity", "Cast") and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        if node is not None and node.op_type == "Concat" and state in node.inputs:
            return {"value": state.name or ""}
    return None


def _scan_states(at: Looked) -> int:
    return len(at.node.inputs) - int(at.attribute("num_scan_inputs", 0))


@condition
def same_as_keys(at: Looked) -> Findings | None:
    """The queries are the keys: one tensor, or two that the library makes one, as it takes nodes away."""
    queries, keys = at.input(0), at.input(1)
    if queries is None or keys is None or _origin(at, queries) != _origin(at, keys):
        return None
    return {"value": queries.name or ""}


_DEEPEST = 16


def _origin(at: Looked, value: ir.Value) -> tuple[object, ...]:
    """A value as what it is made from: equal for values that the library finds to be the same.

    As was seen: it leaves out Identity, products with 1, Reshapes to the same shape and Casts there and back, and
    takes equal nodes of one input for one. It does not compare nodes of two.
    """
    steps: list[object] = []
    for _ in range(_DEEPEST):
        node = value.producer()
        inputs = [] if node is None else [v for v in node.inputs if v is not None]
        moving = [v for v in inputs if not at.known.is_weight(v)]
        if node is None or node.domain != "" or len(moving) != 1 or len(node.outputs) != 1:
            break
        source = moving[0]
        if not _is_left_out(at, node, source):
            if len(inputs) > 1 and node.op_type != "Reshape":
                break
            steps.append((node.op_type, str(sorted((name, str(a.value)) for name, a in node.attributes.items()))))
        value = source
    # Casts there and back: the type at the end tells what is left of them.
    kept = [step for step in steps if not (isinstance(step, tuple) and step[0] == "Cast")]
    return (id(value), at.known.dtype(value), *kept)


def _is_left_out(at: Looked, node: ir.Node, source: ir.Value) -> bool:
    if node.op_type == "Mul":
        factor = next((at.known.array(v) for v in node.inputs if v is not source), None)
        return factor is not None and bool((factor.astype(float) == 1).all())
    if node.op_type == "Reshape":
        return at.known.shape(source) == at.known.shape(node.outputs[0])
    return node.op_type == "Identity"


@condition
def one_query_one_head(at: Looked) -> Findings | None:
    """A MultiHeadAttention of one query and one head, in a batch of less than 4, without a bias."""
    query = at.known.shape(at.input(0))
    if query is None or len(query) != 3 or query[1] != 1 or at.input(5) is not None:
        return None
    heads = at.attribute("num_heads", 0)
    return {"heads": str(heads * query[0])} if query[0] is not None and heads * query[0] < 4 else None


_CODES = frozenset({"int8", "int4", "float8e4m3fn", "float4e2m1"})


@condition
def shape_of_unknown_length(at: Looked) -> Findings | None:
    """A tensor of sizes, axes or bounds, made from the model's inputs, may be shorter or longer in another run."""
    for index in SHAPE_READERS.get(at.node.op_type, ()):
        value = at.input(index)
        if value is not None and at.known.shape(value) == [None] and at.known.roots(value):
            return {"value": value.name or "", "input": str(index)}
    return None


# -- Attention --------------------------------------------------------------------------------------------------------


@condition
def key_and_value_differ(at: Looked) -> Findings | None:
    """The keys and the values of an Attention have different sizes on an axis."""
    keys, values = (at.known.shape(at.input(index)) for index in (1, 2))
    for a, b in zip(keys or (), values or (), strict=False):
        if a is not None and b is not None and a != b:
            return {"sizes": f"{a} and {b}"}
    return None


@condition
def one_width_unknown(at: Looked) -> Findings | None:
    """Of the widths of queries and keys one is known beforehand and the other is not."""
    queries, keys = (at.known.shape(at.input(index)) for index in (0, 1))
    if not queries or not keys or (queries[-1] is None) == (keys[-1] is None):
        return None
    return {}


@condition
def attention_without_kernel(at: Looked) -> Findings | None:
    """No kernel was found for such types, heads and numbers of queries when this was tried, on grids of them."""
    query = at.known.shape(at.input(0))
    kind = at.known.dtype(at.input(0))
    if query is None or len(query) not in (3, 4):
        return None
    flat = len(query) == 3
    heads, keys = at.attribute("q_num_heads"), at.attribute("kv_num_heads")
    width = query[-1]
    if flat:
        width = None if width is None or not heads else width // heads
    else:
        heads, keys = query[1], (at.known.shape(at.input(1)) or [None, None])[1]
    batch, count = query[0], query[-2]
    mask = at.input(3)
    plain = mask is None and at.attribute("is_causal", 0) == 0
    if count == 1:
        if width is not None and (width % 8 or not 8 <= width <= 256):
            return _no_kernel(f"one query, heads of {width} elements; a multiple of 8 up to 256 is needed", "attention")
        if batch is not None and heads is not None and batch * heads < 4:
            return _no_kernel(f"one query, {batch * heads} heads in the batch; 4 are needed", "attention")
        return None
    if flat and plain and heads == keys and not any(at.known.fixed(at.input(index)) for index in range(3)):
        return None
    if query[-1] is None:
        return _no_kernel("heads of a size that is not known beforehand", "static axis")
    if kind == "float32":
        return _no_kernel("float32 and more than one query", "half attention")
    if width is not None and not 8 < width <= 256:
        return _no_kernel(f"heads of {width} elements; 9 to 256 are needed", "attention")
    if width is not None and width % 8 and at.known.dtype(mask) == "bool":
        return _no_kernel(f"heads of {width} elements with a mask of bool; a multiple of 8 is needed", "attention")
    if heads == 1 and mask is not None:
        return _no_kernel("a mask and one head", "attention")
    if heads == 1 and batch == 1:
        return _no_kernel("one head and a batch of 1", "attention")
    return None


def _no_kernel(why: str, hint: str) -> Findings:
    return {"why": why, "hint": hint}
