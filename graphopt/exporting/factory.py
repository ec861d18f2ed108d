"""The user's factory: found, called, and what it returns checked before torch sees it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from graphopt.errors import BadInput, MissingDependency, install_hint

if TYPE_CHECKING:
    import torch

EXPECTED = "a factory returns (module, example_inputs, dynamic_axes or None)"


@dataclass
class Example:
    """What a factory returned, checked.

    Attributes:
        module: The network, in evaluation mode.
        inputs: Example tensors by name, in the order of ``forward``'s parameters.
        axes: Input name → axis (0 or more) → symbol.
        notes: What was changed or is worth knowing, one sentence each.
    """

    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    axes: dict[str, dict[int, str]]
    notes: list[str]


def require_torch() -> None:
    """Raise MissingDependency where torch or what its exporter needs is not installed."""
    for name in ("torch", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise MissingDependency(f"export needs {name}", hint=install_hint("export"))


def load_factory(spec: str) -> Callable[[], Any]:
    """Import ``MODULE:FACTORY``, where MODULE is an importable name or the path of a .py file.

    Raises:
        BadInput: The spec is malformed, the module cannot be imported, or it has no such function.
    """
    module_name, separator, name = spec.rpartition(":")
    if not separator or not module_name or not name.isidentifier():
        raise BadInput(
            f"{spec!r} is not MODULE:FACTORY",
            hint="for example mypackage.models:encoder, or path/to/file.py:encoder",
        )
    module = _import_file(Path(module_name)) if _is_path(module_name) else _import_module(module_name)
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(name, functions, n=1)
        raise BadInput(f"no function {name!r}", where=module_name, hint=f"did you mean {near[0]!r}?" if near else None)
    factory = getattr(module, name)
    if not callable(factory):
        raise BadInput(f"{name!r} is a {type(factory).__name__}, not a function", where=module_name)
    return factory  # type: ignore[no-any-return]


def _is_path(module_name: str) -> bool:
    return module_name.endswith(".py") or "/" in module_name or "\\" in module_name


def _import_module(name: str) -> ModuleType:
    # A console script does not have the current folder on its path; `python -m` does. Both should work.
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise BadInput(
                "no such module", where=name, hint="give an importable name, or the path of a .py file"
            ) from error
        raise _import_failed(name, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(name, error) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadInput("no such file", where=str(path))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise BadInput("not a Python file", where=str(path), hint="its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # the file's neighbours, as if it were run as a script
        sys.path.insert(0, folder)
    # Registered, as dataclasses and pickle look their module up; put back what it may have hidden.
    hidden = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _import_failed(str(path), error) from error
    finally:
        if hidden is not None:
            sys.modules[path.stem] = hidden
    return module


def _import_failed(where: str, error: BaseException) -> BadInput:
    return BadInput(f"cannot be imported: {describe(error)}", where=where)


def describe(error: BaseException, *, here: bool = True) -> str:
    """One line: the exception's type, the first line of its text, and the user's line it came from."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    place = _user_frame(error) if here else None
    return line if place is None else f"{line}, at {place}"


def _user_frame(error: BaseException) -> str | None:
    """``file:line`` of the innermost frame that is neither ours, the standard library's nor a package's."""
    ours = str(Path(__file__).resolve().parent.parent)
    standard = str(Path(traceback.__file__).resolve().parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        name = frame.filename
        if name.startswith(("<", ours, standard)) or "site-packages" in name or "dist-packages" in name:
            continue
        if "/cli/" in name and Path(name).parent == Path(sys.modules["graphopt"].__file__ or "").parent.parent:
            continue
        return f"{_relative(name)}:{frame.lineno}"
    return None


def _relative(name: str) -> str:
    path = Path(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name


def call_factory(factory: Callable[[], Any], name: str) -> Example:
    """Call ``factory`` and check what it returns.

    Raises:
        BadInput: It raises, or what it returns is not (module, example inputs, dynamic axes), does not fit
            the module's ``forward``, or would be exported as something else than it looks like.
    """
    try:
        returned = factory()
    except (Exception, SystemExit) as error:
        raise BadInput(f"the factory failed: {describe(error)}", where=name) from error
    return check_example(returned, name)


def check_example(returned: Any, name: str) -> Example:
    """Check a factory's return value; see `call_factory`."""
    import torch

    if not isinstance(returned, tuple) or len(returned) != 3:
        shape = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else _kind(returned)
        raise BadInput(f"returned {shape}", where=name, hint=EXPECTED)
    module, inputs, axes = returned
    if not isinstance(module, torch.nn.Module):
        raise BadInput(f"the first thing returned is {_kind(module)}, not a torch module", where=name, hint=EXPECTED)
    if not isinstance(inputs, Mapping):
        raise BadInput(f"example_inputs is {_kind(inputs)}, not a dict", where=name, hint="give {input name: tensor}")
    if not inputs:
        raise BadInput("example_inputs is empty", where=name)
    for key, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise BadInput(
                f"example input {key!r} is {_kind(value)}, not a tensor",
                where=name,
                hint="bind what is not a tensor inside the module",
            )
        if value.layout != torch.strided or value.is_complex() or value.is_quantized:
            raise BadInput(f"example input {key!r} is sparse, quantised or complex; ONNX has no such input", where=name)
    ordered = _in_forward_order(module, dict(inputs), name)
    _refuse_aliases(ordered, name)
    notes = []
    if any(part.training for part in module.modules()):
        module.eval()
        notes.append("the module was in training mode; it was exported in evaluation mode")
    return Example(module, ordered, _check_axes(axes, ordered, name), notes)


def _kind(value: object) -> str:
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def _in_forward_order(module: torch.nn.Module, inputs: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    parameters = inspect.signature(module.forward).parameters
    forward = f"{type(module).__name__}.forward"
    named = {key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters.values()):
        raise BadInput(f"{forward} has a positional-only parameter", where=name, hint="wrap the module")
    unknown = [key for key in inputs if key not in named]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), named, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it names {', '.join(named) or 'none'}"
        raise BadInput(f"example input {unknown[0]!r} is not a parameter of {forward}", where=name, hint=hint)
    missing = [key for key, p in named.items() if p.default is p.empty and key not in inputs]
    if missing:
        raise BadInput(f"{forward} needs {_listed(missing)}, which example_inputs lacks", where=name)
    return {key: inputs[key] for key in named if key in inputs}


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _refuse_aliases(inputs: dict[str, torch.Tensor], name: str) -> None:
    """torch.export takes two inputs that share memory for one, and the graph silently loses an input."""
    seen: dict[int, str] = {}
    for key, value in inputs.items():
        if value.numel() == 0:
            continue
        if any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)):
            raise BadInput(
                f"example input {key!r} is an expanded tensor, whose elements share memory",
                where=name,
                hint="give it .clone()",
            )
        storage = value.untyped_storage().data_ptr()
        if storage in seen:
            raise BadInput(
                f"example inputs {seen[storage]!r} and {key!r} share their memory;"
                " torch.export would merge them into one input",
                where=name,
                hint="give each its own tensor, for example with .clone()",
            )
        seen[storage] = key


def _check_axes(axes: Any, inputs: dict[str, torch.Tensor], name: str) -> dict[str, dict[int, str]]:
    if axes is None:
        return {}
    if not isinstance(axes, Mapping):
        raise BadInput(
            f"dynamic_axes is {_kind(axes)}, not a dict", where=name, hint="give {input name: {axis: symbol}}"
        )
    checked: dict[str, dict[int, str]] = {}
    sizes: dict[str, tuple[int, str]] = {}
    for key, named in axes.items():
        if key not in inputs:
            near = difflib.get_close_matches(str(key), inputs, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the inputs are {', '.join(inputs)}"
            raise BadInput(f"dynamic_axes names {key!r}, which is no example input", where=name, hint=hint)
        if not isinstance(named, Mapping):
            raise BadInput(
                f"dynamic_axes of {key!r} is {_kind(named)}, not a dict", where=name, hint="give {axis: symbol}"
            )
        rank = inputs[key].dim()
        for axis, symbol in named.items():
            if isinstance(axis, bool) or not isinstance(axis, int) or not -rank <= axis < rank:
                raise BadInput(f"dynamic_axes of {key!r} names axis {axis!r}; its example has {rank} axes", where=name)
            if not isinstance(symbol, str) or not symbol.isidentifier():
                raise BadInput(f"dynamic_axes of {key!r}, axis {axis}: {symbol!r} is not a symbol's name", where=name)
            axis %= rank
            size = inputs[key].shape[axis]
            place = f"axis {axis} of {key!r}"
            if size < 2:
                raise BadInput(
                    f"the example has size {size} on {place}, which is dynamic ({symbol!r});"
                    " torch.export would fix it at that size",
                    where=name,
                    hint="give an example of size 2 or more",
                )
            if symbol in sizes and sizes[symbol][0] != size:
                raise BadInput(
                    f"{symbol!r} is {sizes[symbol][0]} on {sizes[symbol][1]} and {size} on {place}",
                    where=name,
                    hint="axes of one symbol have one size",
                )
            sizes.setdefault(symbol, (size, place))
            checked.setdefault(key, {})[axis] = symbol
    return checked
