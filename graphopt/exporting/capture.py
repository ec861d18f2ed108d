"""torch.export and torch's ONNX exporter, with their failures told in one line."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any

from graphopt.errors import BadInput, GraphoptError
from graphopt.exporting.branches.errors import Refusal
from graphopt.exporting.branches.markers import translations
from graphopt.exporting.branches.places import Place
from graphopt.exporting.factory import Example, _relative
from graphopt.exporting.numbers import exact_numbers
from graphopt.exporting.recurrent import shapes_of_recurrent_layers
from graphopt.exporting.sizes.guards import Guard, Questions, fixes_an_axis, guards_of, questions, user_symbols

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.exporting.branches.tracing import Traced

DEFAULT_OPSET = 20
OLDEST_OPSET = 18


@dataclass
class Captured:
    """An exported model, as torch made it, with the sizes that its dynamic axes may have.

    Attributes:
        model: The ONNX model; inputs in the order of the example's, nothing folded.
        outputs: The names of the module's outputs, in the order of the model's.
        leaves: Which of the leaves of what the module returns they are.
        bounds: Symbol → smallest and largest size (None: no limit known).
        traced: Where the module branches on tensors' values: its decisions. The model then has markers for `sink`.
        guards: What the model depends on in the sizes of the dynamic axes.
    """

    model: ir.Model
    outputs: list[str]
    leaves: list[int]
    bounds: dict[str, tuple[int, int | None]]
    traced: Traced | None = None
    guards: list[Guard] = field(default_factory=list)


class FixedAxis(BadInput):
    """The export holds for one size of a dynamic axis, or for sizes tied to one another."""


@contextmanager
def quiet(enabled: bool) -> Iterator[None]:
    """Keep torch's warnings and log lines to itself while ``enabled``."""
    if not enabled:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def capture(
    example: Example, name: str, *, opset: int, verbose: bool, promote: bool = True, free: bool = False
) -> Captured:
    """Export ``example.module`` with `torch.export` and torch's exporter, nothing optimized.

    Where it branches on tensors' values, all its paths are exported (see `branches`), and the model has markers.
    ``promote``: Python numbers that differ from path to path become tensors; otherwise their paths stay apart.
    ``free``: The module may narrow its axes or fix them; `Captured.guards` say to what.

    Raises:
        BadInput: The opset is outside what the exporter writes.
        FixedAxis: An axis named dynamic is fixed by the module, or tied to another; not where ``free``.
        GraphoptError: torch could not export the module; the line says what stopped it and where.
    """
    import torch

    if opset < OLDEST_OPSET:
        raise BadInput(
            f"opset {opset} is too old for torch's exporter", where="--opset", hint=f"{OLDEST_OPSET} or newer"
        )
    with quiet(not verbose), torch.no_grad(), shapes_of_recurrent_layers():
        exported, traced = _exported(example, name, torch, promote=promote, free=free, verbose=verbose)
        program = exported.program
        _name_all_axes(program, torch)
        _drop_squeezes(program, torch)
        _refuse_random(program, name)
        try:
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,  # it would fold products of weights, which are structure that passes look for
                opset_version=opset,
                dynamic_shapes=None if free else exported.shapes,
                verbose=False,
                custom_translation_table=exact_numbers() | (translations() if traced is not None else {}),
            )
        except Exception as error:
            raise _torch_error(error, name) from error
    assert onnx_program is not None
    leaves, names = _outputs(program)
    if free:
        _name_symbols(onnx_program.model, {str(s): n for s, n in user_symbols(program, example).items()})
    guards = guards_of(program, example, exported.noted)
    return Captured(onnx_program.model, names, leaves, _bounds(program, example), traced, guards)


@dataclass
class _Exported:
    """A program of torch.export, the shapes it was told of, and what was asked about sizes meanwhile."""

    program: Any
    shapes: Any
    noted: Questions


def _exported(
    example: Example, name: str, torch: Any, *, promote: bool, free: bool, verbose: bool
) -> tuple[_Exported, Traced | None]:
    """The module as torch.export takes it; where that stops at a decision, or a loop fixes an axis, all its paths."""
    try:
        with _printing_kept(verbose):
            exported = _export_program(example, name, torch, free)
        if not (free and fixes_an_axis(guards_of(exported.program, example, exported.noted))):
            return exported, None
    except _BranchesOnData:
        return _export_paths(example, name, torch, promote, free)
    except FixedAxis as fixed:
        try:
            return _export_paths(example, name, torch, promote, free)
        except GraphoptError:
            raise fixed from None
    try:  # a `while` that counts up to a size is one Loop there
        followed = _export_paths(example, name, torch, promote, free)
    except GraphoptError:
        return exported, None
    guards = guards_of(followed[0].program, example, followed[0].noted)
    return (exported, None) if fixes_an_axis(guards) else followed


@contextmanager
def _printing_kept(verbose: bool) -> Iterator[None]:
    """Keep what torch.export prints, the whole graph where it fails, to itself; unless ``verbose``."""
    if verbose:
        yield
        return
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


class _BranchesOnData(GraphoptError):
    """torch.export met a branch on a tensor's value."""

    at = ""  # ", at file:line" of it


def _export_paths(example: Example, name: str, torch: Any, promote: bool, free: bool) -> tuple[_Exported, Traced]:
    """Export all paths of a module that branches on tensors' values."""
    from graphopt.exporting.branches.tracing import trace_paths

    try:
        exported, traced = trace_paths(example.module, lambda: _export_program(example, name, torch, free), promote)
    except Refusal as refusal:
        what = f"the module's control flow has no ONNX form: {refusal}"
        raise GraphoptError(what, where=name, hint=refusal.hint) from refusal
    except _BranchesOnData as error:  # what is asked is no tensor, so no path answers it
        raise GraphoptError(
            f"the module's control flow has no ONNX form: a size that depends on a tensor's values decides{error.at}",
            where=name,
        ) from error
    exported.program.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
    return exported, traced


def _export_program(example: Example, name: str, torch: Any, free: bool) -> _Exported:
    from torch._dynamo.exc import UserError  # before anything is tried: an interrupt may leave torch half imported

    if free:
        shapes = {
            key: dict.fromkeys(example.axes.get(key, {}), torch.export.Dim.AUTO) or None for key in example.inputs
        }
        try:
            with questions() as noted:
                program = torch.export.export(
                    example.module, (), kwargs=example.inputs, dynamic_shapes=shapes, strict=False
                )
        except Exception as error:
            raise _torch_error(error, name) from error
        return _Exported(program, shapes, noted)
    symbols = sorted({symbol for axes in example.axes.values() for symbol in axes.values()})
    dims = {symbol: torch.export.Dim(symbol) for symbol in symbols}
    shapes = {
        key: {axis: dims[symbol] for axis, symbol in example.axes.get(key, {}).items()} or None
        for key in example.inputs
    }
    deferred = False
    # The module may bound an axis (positions: 512 at most); torch then says by what, once for each bound.
    for _ in range(len(symbols) + 2):
        try:
            with questions() as noted:
                program = torch.export.export(
                    example.module,
                    (),
                    kwargs=example.inputs,
                    dynamic_shapes=shapes,
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=deferred,
                )
            return _Exported(program, shapes, noted)
        except UserError as error:
            refined = _refine(str(error), shapes, symbols, name, noted.fixed_at())
            if refined is not None:
                shapes = refined
            elif not deferred and "Constraints violated" in str(error):
                # A size that no range can leave out (a convolution's output of 1). The comparison runs at the
                # smallest sizes, where that shows.
                deferred = True
            else:
                raise _torch_error(error, name) from error
        except Exception as error:
            raise _torch_error(error, name) from error
    raise GraphoptError("torch.export found no range that the dynamic axes may have", where=name)


def _name_all_axes(program: Any, torch: Any) -> None:
    """``amax()`` and ``amin()`` over all axes say so in the program: torch's exporter wants to be told which."""
    for node in list(program.graph.nodes):
        if node.target in (torch.ops.aten.amax.default, torch.ops.aten.amin.default) and len(node.args) == 1:
            axes = node.kwargs.get("dim") or list(range(node.args[0].meta["val"].dim()))
            node.kwargs = {**node.kwargs, "dim": axes}
            if not axes:
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)


def _drop_squeezes(program: Any, torch: Any) -> None:
    """Take out squeezes of axes that are not 1: torch leaves those as they are, ONNX's Squeeze raises."""
    for node in list(program.graph.nodes):
        if node.target is not torch.ops.aten.squeeze.dim:
            continue
        source, axis = node.args
        shape = source.meta["val"].shape
        if shape and not (isinstance(shape[axis], int) and shape[axis] == 1):
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)


def _refuse_random(program: Any, name: str) -> None:
    """Refuse random numbers: ONNX draws other ones, and nothing can be compared with them."""
    for node in program.graph.nodes:
        drawn = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if re.sub("(_functional|_like|_)$", "", drawn) in _RANDOM:
            frames = [f for f in _USER_FRAME.findall(node.meta.get("stack_trace") or "") if "/torch/" not in f[0]]
            at = f", at {_relative(frames[-1][0])}:{frames[-1][1]}" if frames else ""
            raise GraphoptError(
                f"the module draws random numbers ({drawn}){at}",
                where=name,
                hint="ONNX would draw others: make them an input",
            )


def _name_symbols(model: ir.Model, names: dict[str, str]) -> None:
    """Torch's symbols in the shapes of ``model`` as the user's."""
    import onnx_ir as ir

    def renamed(size: Any) -> Any:
        if isinstance(size, int) or size.value is None:
            return size
        return ir.SymbolicDim(re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), size.value))

    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([renamed(size) for size in value.shape])


def _refine(text: str, shapes: Any, symbols: list[str], name: str, place: Place | None) -> Any | None:
    """The shapes that torch suggests, or None where it suggests none. Raises where it would fix an axis."""
    from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

    if "Suggested fixes:" not in text:
        return None
    # What follows the fixes is advice for people; torch's own parser of its text trips over it.
    head, fixes = text.split("Suggested fixes:", 1)
    lines = [line.strip() for line in fixes.strip().splitlines()]
    block = lines[: lines.index("")] if "" in lines else lines
    at = f", at {place}" if place is not None else ""
    for line in block:
        symbol, _, value = line.partition(" = ")
        if value.isdigit():
            raise FixedAxis(
                f"the module fixes the dynamic axis {symbol!r} at {value}{at}",
                where=name,
                hint=f"take {symbol!r} out of dynamic_axes, or remove what depends on its size from forward",
            )
        tied = set(re.findall(r"[A-Za-z_]\w*", value)) & set(symbols) - {symbol}
        if tied and not value.startswith("Dim("):
            raise FixedAxis(
                f"the module ties the dynamic axis {symbol!r} to {value}{at}",
                where=name,
                hint="give axes of the same size one symbol; other ties cannot be said in dynamic_axes",
            )
    try:
        return refine_dynamic_shapes_from_suggested_fixes(f"{head}Suggested fixes:\n" + "\n".join(block), shapes)
    except Exception:  # a text it cannot read: then the user gets torch's own first line
        return None


# Not what torch tags so: attention and dropout draw nothing where their probability is 0.
_RANDOM = frozenset(
    ["rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "uniform", "exponential", "poisson"]
)
_UNSUPPORTED = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")
_USER_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')


def _torch_error(error: BaseException, name: str) -> GraphoptError:
    """One line out of torch's report: what stopped it, and the user's line that it names."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if found := _UNSUPPORTED.search(str(link)):
            return GraphoptError(
                f"torch's exporter has no ONNX form of {found[1]}{_place(chain)}",
                where=name,
                hint="write it with other operators in forward",
            )
    text = str(error)
    if "data-dependent" in text:
        branches = _BranchesOnData(
            f"the module branches on a tensor's value, which torch.export cannot follow{_place(chain)}",
            where=name,
            hint="use torch.where or torch.cond; --verbose shows torch's report",
        )
        branches.at = _place(chain)
        return branches
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = re.sub(r"\s*For more information.*$", "", lines[0]) if lines else type(error).__name__
    if first.startswith("Constraints violated") and len(lines) > 1:
        first = lines[1].removeprefix("- ")
    if first.startswith("Failed to ") and chain[-1] is not error:
        root = next((str(link) for link in reversed(chain) if str(link)), "")
        first = root.splitlines()[0] if root else first
    return GraphoptError(
        f"torch could not export the module: {first[:300]}{_place(chain)}",
        where=name,
        hint="--verbose shows torch's report",
    )


def _place(chain: list[BaseException]) -> str:
    """``, at file:line`` of the innermost line of the user's code that torch's report names."""
    for error in chain:
        frames = [f for f in _USER_FRAME.findall(str(error)) if "/torch/" not in f[0]]
        if frames:
            return f", at {_relative(frames[-1][0])}:{frames[-1][1]}"
    for error in chain:
        trace = error.__traceback__
        place = None
        while trace is not None:
            code = trace.tb_frame.f_code
            if code.co_name == "forward" and "/torch/" not in code.co_filename:
                place = f", at {_relative(code.co_filename)}:{trace.tb_lineno}"
            trace = trace.tb_next
        if place is not None:
            return place
    return ""


def _outputs(program: Any) -> tuple[list[int], list[str]]:
    """Which leaves of what the module returns are outputs, and names for them.

    A name is a dict's key, otherwise ``output`` or ``output_0``, ``output_1``…
    """
    from torch.utils import _pytree as pytree

    spec = program.call_spec.out_spec
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths, _ = pytree.tree_flatten_with_path(leaves)
    # What is no tensor (None, a number) has no output in ONNX; what is written to a buffer is none of the module's.
    returned = [out for out in program.graph_signature.output_specs if out.kind.name == "USER_OUTPUT"]
    named = [
        (index, "_".join(_key(entry) for entry in path))
        for index, ((path, _), out) in enumerate(zip(paths, returned, strict=True))
        if type(out.arg).__name__ == "TensorArgument"
    ]
    if [name for _, name in named] == [""]:
        return [0], ["output"]
    return [index for index, _ in named], [
        f"output_{name}" if name.replace("_", "").isdigit() else name for _, name in named
    ]


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _bounds(program: Any, example: Example) -> dict[str, tuple[int, int | None]]:
    """Symbol → range, out of the exported program's constraints on the shapes of its inputs."""
    ranges = {str(symbol): limits for symbol, limits in program.range_constraints.items()}
    placeholders = {
        node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and "val" in node.meta
    }
    bounds: dict[str, tuple[int, int | None]] = {}
    for placeholder, key in zip(program.graph_signature.user_inputs, example.inputs, strict=True):
        for axis, symbol in example.axes.get(key, {}).items():
            limits = ranges.get(str(placeholders[placeholder].shape[axis]))
            if limits is None:
                bounds.setdefault(symbol, (1, None))
                continue
            # torch traces sizes from 2 up, and says that 0 and 1 are not excluded by "2 or more".
            low = 1 if int(limits.lower) <= 2 else int(limits.lower)
            unlimited = "oo" in str(limits.upper) or int(limits.upper) >= 2**31
            bounds[symbol] = (low, None if unlimited else int(limits.upper))
    return bounds
