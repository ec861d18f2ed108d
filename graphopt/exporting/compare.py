"""The exported ONNX against the eager module: three inputs of different values and sizes.

The first is the example itself; the others are drawn like it, with the dynamic axes at other sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import BadInput, GateFailed, GraphoptError
from graphopt.exporting.factory import Example, describe

if TYPE_CHECKING:
    import torch

# Of the output's largest magnitude. A correct float32 export measures 1e-7 to 1e-5 here; the smallest real
# fault (a wrong epsilon, tanh for erf in Gelu) 1e-4 and more. The narrow types: some tens of their epsilon.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


_STEP = 3  # how far an integer that is drawn for another may be from it


@dataclass(frozen=True)
class OutputComparison:
    """How far one output of one case is from the eager module's.

    Attributes:
        name: The output.
        dtype: numpy's name of its type.
        max_abs: Largest absolute difference of finite elements.
        max_rel: ``max_abs`` over the largest magnitude that the eager module's output has.
        tolerance: What ``max_rel`` may be; 0 for integers and booleans.
        passed: Within the tolerance, and NaN and infinities in the same places.
        reason: Why it did not pass.
    """

    name: str
    dtype: str
    max_abs: float
    max_rel: float
    tolerance: float
    passed: bool
    reason: str | None = None


@dataclass(frozen=True)
class CaseComparison:
    """One case: the sizes of the dynamic axes, and every output's difference."""

    sizes: dict[str, int]
    outputs: list[OutputComparison]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Case:
    """Inputs of one comparison, and what the eager module makes of them."""

    sizes: dict[str, int]
    inputs: dict[str, torch.Tensor]
    expected: list[torch.Tensor]


def run_example(example: Example, name: str) -> tuple[list[torch.Tensor], list[str]]:
    """What the module makes of its own example inputs, run twice, and notes. Its buffers are as before after it.

    Raises:
        BadInput: The module fails on them, or does not end.
        GateFailed: The module does not compute the same twice from the same inputs.
    """
    import torch

    from graphopt.exporting.branches.following import Bounded

    before = {key: value.clone() for key, value in example.module.named_buffers()}
    try:
        with Bounded():
            expected = run_eager(example, example.inputs)
    except Exception as error:
        raise BadInput(f"forward fails on the example inputs: {describe(error)}", where=name) from error
    if not expected:
        raise BadInput("forward returns no tensor", where=name)
    again = run_eager(example, example.inputs)
    if not all(compare_output("", one, to_numpy(two)).passed for one, two in zip(expected, again, strict=True)):
        raise GateFailed(
            "the module gives different outputs for the same inputs, so nothing can be compared with it",
            where=name,
            hint="it uses random numbers or keeps state between calls",
        )
    notes = []
    for key, value in example.module.named_buffers():
        if key in before and not torch.equal(before[key], value):
            value.copy_(before[key])
            notes.append(f"forward changes the buffer {key!r}; the ONNX never does")
    return expected, notes


def make_cases(
    example: Example,
    expected: list[torch.Tensor],
    bounds: Mapping[str, tuple[int, int | None]],
    name: str,
    *,
    leaves: list[int] | None = None,
    sizes: list[list[dict[str, int]]] | None = None,
    seed: int = 0,
) -> tuple[list[Case], list[str]]:
    """Three cases or more that the eager module accepts, with what it returns for each, and notes.

    The first is the example itself, whose outputs are ``expected``. Where the module refuses the sizes first chosen (a
    limit that its code does not show), others are tried, the example's own last. An axis of size 1 is
    another case for each axis but the first, which has it already.

    Args:
        example: With the module.
        expected: What it gives for the example.
        bounds: Symbol → smallest and largest size.
        name: The factory's, for messages.
        leaves: As for `run_eager`.
        sizes: Sizes to try for the second and the third case, where others than the usual are wanted.
        seed: Of what is drawn.

    Raises:
        GateFailed: The module does not run on any inputs drawn like the example.
    """
    import torch

    own = {
        symbol: int(example.inputs[key].shape[axis])
        for key, axes in example.axes.items()
        for axis, symbol in axes.items()
    }
    cases = [Case(own, example.inputs, expected)]
    notes: list[str] = []
    generator = torch.Generator().manual_seed(seed)

    def drawn(chosen: dict[str, int], *, vary: bool = False) -> Case:
        inputs = {
            key: draw_like(value, key, _shape(value, example.axes.get(key, {}), chosen), generator, vary=vary)
            for key, value in example.inputs.items()
        }
        return Case(chosen, inputs, run_eager(example, inputs, leaves))

    for candidates in sizes or _sizes_to_try(own, bounds):
        refusal = ""
        for chosen in candidates:
            with suppress(Exception):  # a number that the module does not take
                cases.append(drawn(chosen, vary=True))
                break
            try:
                cases.append(drawn(chosen))
                break
            except Exception as error:
                refusal = refusal or f"the module does not run at {_sized(chosen)}: {describe(error, here=False)}"
        else:
            raise GateFailed(refusal or "the module does not run on inputs drawn like the example", where=name)
        if refusal:
            notes.append(f"{refusal}; compared at {_sized(cases[-1].sizes)} instead")
    for chosen in _ones(own, bounds) if sizes is None else []:
        with suppress(Exception):  # sizes that the module does not take
            cases.append(drawn(chosen))
    return cases, notes


def _sized(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{symbol}={size}" for symbol, size in sizes.items()) or "other values"


def _sizes_to_try(own: Mapping[str, int], bounds: Mapping[str, tuple[int, int | None]]) -> list[list[dict[str, int]]]:
    """For the second and the third case: sizes to try, best first. All symbols differ from the example's."""

    def clip(symbol: str, size: int) -> int:
        low, high = bounds.get(symbol, (1, None))
        return max(low, size if high is None else min(size, high))

    order = {symbol: index for index, symbol in enumerate(own)}
    least = {symbol: bounds.get(symbol, (1, None))[0] for symbol in own}
    # The first axis (the batch, mostly) goes to 1, where broadcasting hides mistakes, and an axis with a limit to
    # it, where what torch took for granted may end; the others shrink a little.
    small = {
        s: least[s] if least[s] > 1 else clip(s, 1 if order[s] == 0 else max(2, n - 1 - order[s]))
        for s, n in own.items()
    }
    less = {s: clip(s, n - 1) for s, n in own.items()}
    large = {s: clip(s, n + 1 + 2 * order[s]) for s, n in own.items()}
    half = {s: clip(s, max(2, n // 2)) for s, n in own.items()}
    twice = {s: clip(s, 2 * n) for s, n in own.items()}
    if not own:
        return [[{}], [{}]]
    return [[small, less, half, dict(own)], [large, twice, half, dict(own)]]


def _ones(own: Mapping[str, int], bounds: Mapping[str, tuple[int, int | None]]) -> list[dict[str, int]]:
    """Sizes with one axis of 1, which torch takes for 2 or more, for each axis but the first (see `_sizes_to_try`)."""
    return [{**own, symbol: 1} for symbol in list(own)[1:] if bounds.get(symbol, (1, None))[0] == 1]


def _shape(value: torch.Tensor, axes: Mapping[int, str], sizes: Mapping[str, int]) -> list[int]:
    return [sizes[axes[axis]] if axis in axes else int(size) for axis, size in enumerate(value.shape)]


def draw_like(
    value: torch.Tensor, name: str, shape: list[int], generator: torch.Generator, *, vary: bool = False
) -> torch.Tensor:
    """A fresh tensor of ``shape`` drawn like ``value``: its dtype, its range, a mask where it is a mask.

    Floats are normal with the example's mean and deviation, inside its range (an example of one value says nothing:
    standard normal; one without axes, half to one and a half times itself). Integers are uniform over the example's
    range. A mask (bool, or 0 and 1 with two axes or more) keeps the example's side of padding and has at least one 1
    in every row. ``vary``: A single integer or bool may be another one, which the module need not take.
    """
    import torch

    if value.numel() == 0:
        return torch.zeros(shape, dtype=value.dtype)
    if vary and value.numel() == 1 and not shape and not value.dtype.is_floating_point:
        return _near(value, generator)
    if _is_mask(value, name):
        return _draw_mask(value, shape, generator).to(value.dtype)
    if not value.dtype.is_floating_point:
        low, high = int(value.min()), int(value.max())
        return torch.randint(low, high + 1, shape, generator=generator).to(value.dtype)
    known = value.double()
    known = known[known.isfinite()]
    if value.dim() == 0 and bool(value.isfinite()) and float(value) != 0:  # a threshold, a tolerance: of its order
        return (value.double() * (0.5 + torch.rand([], generator=generator, dtype=torch.float64))).to(value.dtype)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    if known.numel() > 1 and known.min() < known.max():
        drawn = (drawn * known.std() + known.mean()).clamp(float(known.min()), float(known.max()))
    return drawn.to(value.dtype)


def _near(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An integer near ``value`` of its sign, or either bool."""
    import torch

    if value.dtype == torch.bool:
        return torch.rand([], generator=generator) < 0.5
    number = int(value)
    step = int(torch.randint(-_STEP, _STEP + 1, [], generator=generator))
    near = number + (step or 1)
    sign = -1 if number < 0 else 1
    return torch.full_like(value, sign * max(sign * near, 0 if number == 0 else 1))


def _is_mask(value: torch.Tensor, name: str) -> bool:
    if not bool(((value == 0) | (value == 1)).all()) or not bool((value == 1).any()):
        return False
    return str(value.dtype) == "torch.bool" or "mask" in name or (value.dim() >= 2 and bool((value == 0).any()))


def _draw_mask(value: torch.Tensor, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    import torch

    if not shape:
        return torch.ones(shape)
    size = shape[-1]
    ones = value.to(torch.int64)
    steps = ones.diff(dim=-1) if value.dim() else ones
    rows = [*shape[:-1], 1]
    position = torch.arange(size)
    if bool((steps <= 0).all()):  # padding on the right
        return position < torch.randint(1, size + 1, rows, generator=generator)
    if bool((steps >= 0).all()):  # padding on the left
        return position >= torch.randint(0, size, rows, generator=generator)
    drawn = torch.rand(shape, generator=generator) < float(ones.double().mean())
    return drawn | (position == torch.randint(0, size, rows, generator=generator))


def run_eager(
    example: Example, inputs: Mapping[str, torch.Tensor], leaves: list[int] | None = None
) -> list[torch.Tensor]:
    """The module's outputs as a flat list of tensors. Inputs are not changed.

    Classes of data that it returns are made known to torch, which takes them for one thing otherwise.

    Args:
        example: With the module.
        inputs: By name.
        leaves: Which of what it returns are outputs, Python numbers made tensors; None: all that are tensors.
    """
    import torch
    from torch.utils import _pytree as pytree

    with torch.no_grad():
        result = example.module(**{key: value.clone() for key, value in inputs.items()})
    returned = pytree.tree_leaves(result)
    while unknown := {type(leaf) for leaf in returned if is_dataclass(leaf)}:
        for kind in unknown:
            torch.export.register_dataclass(kind)
        returned = pytree.tree_leaves(result)
    chosen = returned if leaves is None else [returned[leaf] for leaf in leaves if leaf < len(returned)]
    outputs = [leaf for leaf in chosen if leaves is not None or isinstance(leaf, torch.Tensor)]
    return [leaf.clone() if isinstance(leaf, torch.Tensor) else torch.tensor(leaf) for leaf in outputs]


def compare(
    model: Path, names: list[str], cases: list[Case], forced: Sequence[list[torch.Tensor]] = ()
) -> tuple[list[CaseComparison], list[str]]:
    """Run ``model`` on ONNX Runtime, its optimizations off, and compare. Returns notes too.

    ``forced``: What the module gave on paths that were forced, which has been compared (see `paths`).

    Raises:
        GateFailed: ONNX Runtime does not run the model, or every output is vacuous (NaN, or one value in all cases).
    """
    from graphopt.runtime.session import create_session, run

    compared = []
    try:
        session = create_session(model, optimized=False)
    except BadInput as error:
        narrow = any(str(v.dtype) == "torch.bfloat16" for case in cases for v in case.expected)
        hint = "ONNX Runtime computes little in bfloat16 on the CPU: export in float32" if narrow else None
        raise GateFailed(f"the export cannot be compared: {error.what}", hint=hint) from error
    for case in cases:
        feeds = {key: to_numpy(value) for key, value in case.inputs.items()}
        try:
            found = list(run(session, feeds, names).values())
        except GraphoptError as error:
            raise GateFailed(f"the export does not run at {_sized(case.sizes)}: {error.what}") from error
        if len(found) != len(case.expected):
            raise GateFailed(f"the ONNX has {len(found)} outputs and the module {len(case.expected)}")
        outputs = [
            compare_output(name, expected, array)
            for name, expected, array in zip(names, case.expected, found, strict=True)
        ]
        compared.append(CaseComparison(case.sizes, outputs))
    outcomes = [*(case.expected for case in cases), *forced]
    vacuous = [name for index, name in enumerate(names) if _is_vacuous([outputs[index] for outputs in outcomes])]
    if len(vacuous) == len(names):
        raise GateFailed(
            "the comparison would prove nothing: the module's outputs are NaN or one value throughout",
            hint="give example inputs that it answers differently",
        )
    return compared, [
        f"the output {name!r} is NaN or one value throughout: its comparison proves nothing" for name in vacuous
    ]


def to_numpy(value: torch.Tensor) -> np.ndarray[Any, Any]:
    """``value`` as numpy; bfloat16 through its bits, which numpy alone cannot hold."""
    import torch

    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(value.contiguous().view(torch.int16).numpy(force=True)).view(ml_dtypes.bfloat16)
    return np.asarray(value.numpy(force=True))


def _is_vacuous(values: list[torch.Tensor]) -> bool:
    import torch

    flat = torch.cat([value.reshape(-1).double() for value in values])
    finite = flat[flat.isfinite()]
    return finite.numel() == 0 or bool((finite == finite[0]).all())


def compare_output(name: str, expected: torch.Tensor, found: np.ndarray[Any, Any]) -> OutputComparison:
    """Compare one output. Shape and dtype must agree; floats to a tolerance, the rest exactly."""
    dtype = str(expected.dtype).removeprefix("torch.")
    tolerance = TOLERANCES.get(dtype, 0.0)

    def failed(reason: str) -> OutputComparison:
        return OutputComparison(name, dtype, float("inf"), float("inf"), tolerance, False, reason)

    if tuple(found.shape) != tuple(expected.shape):
        return failed(f"shape {list(found.shape)}, eager {list(expected.shape)}")
    if str(found.dtype) != dtype:
        return failed(f"type {found.dtype}, eager {dtype}")
    reference = to_numpy(expected).astype(np.float64)
    actual = found.astype(np.float64)
    if reference.size == 0:
        return OutputComparison(name, dtype, 0.0, 0.0, tolerance, True)
    finite = np.isfinite(reference)
    if not np.array_equal(reference[~finite], actual[~finite], equal_nan=True) or not np.isfinite(actual[finite]).all():
        return failed("NaN or infinity in other places")
    difference = float(np.abs(actual[finite] - reference[finite]).max(initial=0.0))
    scale = float(np.abs(reference[finite]).max(initial=0.0))
    relative = difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))
    passed = relative <= tolerance
    return OutputComparison(
        name, dtype, difference, relative, tolerance, passed, None if passed else f"differs by {relative:.1e}"
    )
