"""Marker operators: how decisions, joins and loops pass through torch.export and torch's ONNX exporter.

All markers are pure, in the domain ``graphopt.flow``, and gone once `sinking` has made Ifs and Loops of them:

* ``decide(condition, turn, number)``: the truth of decision ``number``, a scalar bool. ``turn``: of the innermost loop
  that decides it in each turn, if any.
* ``select(condition, one, other, join)``: ``one`` where the condition is true. Same dtype and rank.
* ``loop_begin(initial, loop, index, least)``: the value of carried variable ``index`` as a turn of the loop begins. An
  axis that changes its size from turn to turn has the least size that it can have in ``least``, any other `FIXED`.
  (Without the index, two variables that begin as one tensor would be taken for one.)
* ``loop_turn(first, loop)``: the number of turns that came before, from 0.
* ``loop_state(first, again, count, initials, news, begins, each, loop, trips)``: the loop as a whole. ``first`` and
  ``again`` say whether the first and the next turn run; ``each`` is stacked, turn by turn. It runs at most ``count``
  (a tensor) or ``trips`` times, if these are given; ``first`` and ``again`` say so too.
* ``loop_result(state, like, index, stacked, least)``: result ``index`` of the loop, carried ones first.

The pieces of a loop are tied by its number and by ``loop_state``, which consumes them all, so that nothing that
the body needs is removed as dead between tracing and sinking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from graphopt.exporting.branches.sizes import least, remember_least, same_size

DOMAIN = "graphopt.flow"
FIXED = -1  # in place of a least size: the axis has one size in all turns
_NAMESPACE = "graphopt_flow"

_OPERATORS = {
    "decide": "(Tensor condition, Tensor? turn, int number) -> Tensor",
    "select": "(Tensor condition, Tensor one, Tensor other, int join) -> Tensor",
    "loop_begin": "(Tensor initial, int loop, int index, int[] least) -> Tensor",
    "loop_turn": "(Tensor first, int loop) -> Tensor",
    "loop_state": "(Tensor first, Tensor again, Tensor? count, Tensor[] initials, Tensor[] news, Tensor[] begins,"
    " Tensor[] each, int loop, int trips) -> Tensor",
    "loop_result": "(Tensor state, Tensor like, int index, bool stacked, int[] least) -> Tensor",
}
_TYPES = "float double float16 bfloat16 bool int8 int16 int32 int64 uint8 uint16 uint32 uint64"


def differing_axes(one: Any, other: Any) -> list[bool]:
    """For each axis of two tensors of one rank: whether their sizes are not known to be the same."""

    return [not same_size(a, b) for a, b in zip(one.shape, other.shape, strict=True)]


@cache
def operators() -> Any:
    """torch's namespace of the marker operators, defined on the first call."""
    import torch

    library = torch.library.Library(_NAMESPACE, "DEF")
    for name, signature in _OPERATORS.items():
        # As if random: else torch, where all arguments are constants (`torch.tensor(0)`), wants to know the result.
        library.define(name + signature, tags=(torch.Tag.nondeterministic_seeded,))

    def new(bound: int) -> Any:
        size = torch.library.get_ctx().new_dynamic_size(min=bound)
        remember_least(size, bound)
        return size

    def like(value: Any, leasts: Sequence[int], *leading: Any) -> Any:
        # Not `empty_like`: a fake tensor that holds a known constant would give a "known" value of garbage.
        shape = [size if bound == FIXED else new(bound) for size, bound in zip(value.shape, leasts, strict=True)]
        return torch.empty([*leading, *shape], dtype=value.dtype, device=value.device)

    def either(one: Any, other: Any) -> Any:
        differ = zip(one.shape, other.shape, differing_axes(one, other), strict=True)
        return like(one, [min(least(a), least(b)) if d else FIXED for a, b, d in differ])

    def scalar(dtype: Any) -> Callable[..., Any]:
        return lambda value, *_: torch.empty((), dtype=dtype, device=value.device)

    def result(state: Any, value: Any, index: int, stacked: bool, leasts: Sequence[int]) -> Any:
        return like(value, leasts, *([torch.library.get_ctx().new_dynamic_size()] if stacked else []))

    fakes: dict[str, Callable[..., Any]] = {
        "decide": scalar(torch.bool),
        "select": lambda condition, one, other, join: either(one, other),
        "loop_begin": lambda initial, loop, index, leasts: like(initial, leasts),
        "loop_turn": scalar(torch.int64),
        "loop_state": scalar(torch.bool),
        "loop_result": result,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=library)
    namespace = getattr(torch.ops, _NAMESPACE)
    namespace.library = library  # it lives as long as the operators do
    return namespace


@cache
def translations() -> dict[Any, Callable[..., Any]]:
    """What torch's ONNX exporter makes of each marker: one node of the domain `DOMAIN`."""
    from onnxscript.values import Opset

    _register_schemas()
    flow = Opset(DOMAIN, 1)

    def decide(condition: Any, turn: Any, number: int) -> Any:
        return flow.Decide(condition, turn, number=number)

    def select(condition: Any, one: Any, other: Any, join: int) -> Any:
        return flow.Select(condition, one, other, number=join)

    def loop_begin(initial: Any, loop: int, index: int, least: Sequence[int] = ()) -> Any:
        return flow.LoopBegin(initial, number=loop, index=index)

    def loop_turn(first: Any, loop: int) -> Any:
        return flow.LoopTurn(first, number=loop)

    def loop_state(
        first: Any,
        again: Any,
        count: Any,
        initials: Sequence[Any] = (),
        news: Sequence[Any] = (),
        begins: Sequence[Any] = (),
        each: Sequence[Any] = (),
        loop: int = 0,
        trips: int = -1,
    ) -> Any:
        counts = [] if count is None else [count]
        return flow.LoopState(
            first,
            again,
            *initials,
            *news,
            *begins,
            *each,
            *counts,
            number=loop,
            trips=trips,
            carried=len(news),
            counted=len(counts),
        )

    def loop_result(state: Any, like: Any, index: int, stacked: bool = False, least: Sequence[int] = ()) -> Any:
        return flow.LoopResult(state, like, number=index)

    space = operators()
    table: dict[str, Callable[..., Any]] = {
        "decide": decide,
        "select": select,
        "loop_begin": loop_begin,
        "loop_turn": loop_turn,
        "loop_state": loop_state,
        "loop_result": loop_result,
    }
    return {getattr(space, name).default: function for name, function in table.items()}


def _register_schemas() -> None:
    """Schemas of the marker nodes: the exporter looks them up to place inputs and attributes."""
    import onnx.defs as defs

    parameter, schema = defs.OpSchema.FormalParameter, defs.OpSchema
    variadic, optional = schema.FormalParameterOption.Variadic, schema.FormalParameterOption.Optional
    every = [f"tensor({name})" for name in _TYPES.split()]
    same, free, truth, count = "T", "U", "tensor(bool)", "tensor(int64)"
    shapes: dict[str, tuple[list[Any], str, list[str]]] = {
        "Decide": (
            [parameter("condition", truth), parameter("turn", count, param_option=optional)],
            truth,
            ["number"],
        ),
        "Select": (
            [parameter("condition", truth), parameter("one", same), parameter("other", same)],
            same,
            ["number"],
        ),
        "LoopBegin": ([parameter("initial", same)], same, ["number", "index"]),
        "LoopTurn": ([parameter("first", truth)], count, ["number"]),
        "LoopState": (
            [parameter("values", free, param_option=variadic, is_homogeneous=False)],
            truth,
            ["number", "trips", "carried", "counted"],
        ),
        "LoopResult": ([parameter("state", truth), parameter("like", same)], same, ["number"]),
    }
    for name, (inputs, output, attributes) in shapes.items():
        used = {p.type_str for p in inputs} | {output}
        defs.register_schema(
            schema(
                name,
                DOMAIN,
                1,
                "",
                inputs=inputs,
                outputs=[parameter("output", output)],
                type_constraints=[(letter, every, "") for letter in (same, free) if letter in used],
                attributes=[schema.Attribute(key, schema.AttrType.INT, "") for key in attributes],
            )
        )
