"""The CUDA kernels of PivotLinear for few rows: both products in one launch, each weight read once.

Kernel arguments, in their order; dtype is ``float16``, ``bfloat16`` or ``float32``, the same for all but positions:

=============  ========  ===========  ====================================================================
x              input     (..., n)     rows: the product of its leading axes
kept           input     (r, n)       column form: (m, r)
coefficients   input     (m - r, r)   column form: (r, n - r)
bias           input     (m,)         in the order of y; zeros where there is none
positions      input     (m,) int32   column form: (n,); see `positions_of`
rows, n, r, m  scalars   int32
y              output    (..., m)
inner          output    (..., r)     what the second product multiplies: K x, or x_p + C x_np; of no use to others
=============  ========  ===========  ====================================================================

So both forms have two outputs, of the same meaning. Sums are in float32. ``inner`` is rounded to the dtype before it is
multiplied, as it is between two products in the function body; y is rounded once, behind the bias. In the row form the
pivots in y come from the sums before they were rounded for ``inner``.

They are meant for 1 to 16 rows and right for any number: more are worked on 16 at a time, and the weights read anew.
No rows at all are no error: nothing is written, though the grid is the same. Sizes need not be multiples of anything;
where a row of a matrix is not a multiple of 16 bytes, it is read element by element, which is slow. So is x in the
column form, and the weights with it less far ahead, unless the others of its channels follow each other in memory.
Where the permutation is not folded into what makes x, a Gather before the op and none in it may be faster.

Launches at the same time, on different streams, do not disturb each other as long as they write to different y. Each y
that a loaded kernel ever wrote to keeps one of its `SLOTS`; where a launch finds none, it computes the first product
once for every tile of the second: right, and slow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from graphopt.errors import BadInput
from graphopt.kernels.kernel import WARP, Kernel, Launch, Parameter, Shape, Size, ceil_div
from graphopt.plugins.pivot_linear.function import Form

FORMS: tuple[Form, ...] = ("row", "column")
DTYPES = ("float16", "bfloat16", "float32")
SOURCE = Path(__file__).parent / "few_rows.cu"
NAMES: Mapping[Form, str] = {"row": "graphopt_pivot_rows", "column": "graphopt_pivot_columns"}
SLOTS = 4096
"""Addresses of y that launches of one loaded kernel can tell apart; 16 bytes of GPU memory each."""

_C_TYPES = {"float16": "half", "bfloat16": "bfloat16", "float32": "float"}


class Tactic(NamedTuple):
    """How the work is cut.

    Attributes:
        warps: Of a block; they split the sum.
        unroll: Vectors of 16 bytes of a row of weights that a lane reads before it multiplies.
        tile: Channels that a block makes; a multiple of 16.
        ahead: Bytes of each row of a tile that are asked for before a block knows which tile is its own.
    """

    warps: int
    unroll: int
    tile: int
    ahead: int


TACTICS: Mapping[str, Mapping[int, Tactic]] = {
    "16 bits": {
        1: Tactic(8, 4, 16, 4096),
        2: Tactic(4, 4, 16, 4096),
        3: Tactic(16, 1, 16, 4096),  # short sums
        4: Tactic(8, 2, 32, 2048),  # large matrices: x is read half as often
    },
    "32 bits": {1: Tactic(4, 2, 16, 4096), 2: Tactic(8, 1, 16, 4096), 3: Tactic(16, 1, 16, 4096)},
}
"""By TensorRT's numbers. Which one is fastest has not been measured: a build times them."""


def kernels_for(form: Form, dtype: str) -> Mapping[int, Kernel]:
    """The kernels of one form and dtype, by tactic.

    Args:
        form: ``row`` or ``column``.
        dtype: One of `DTYPES`.

    Raises:
        BadInput: There is no such form or dtype.
    """
    if form not in FORMS:
        raise BadInput(f"PivotLinear has no form {form!r}", hint="row or column")
    if dtype not in DTYPES:
        raise BadInput(f"PivotLinear has no kernel for {dtype}", hint=f"there are {', '.join(DTYPES)}")
    return {number: kernel_of(form, dtype, tactic) for number, tactic in tactics_for(dtype).items()}


def kernel_of(form: Form, dtype: str, tactic: Tactic, *, slots: int = SLOTS) -> Kernel:
    """One kernel.

    Args:
        form: ``row`` or ``column``.
        dtype: One of `DTYPES`.
        tactic: How the work is cut.
        slots: See `SLOTS`.
    """
    return Kernel(
        name=NAMES[form],
        source=SOURCE,
        parameters=(
            *(Parameter(name, "input", dtype) for name in ("x", "kept", "coefficients", "bias")),
            Parameter("positions", "input", "int32"),
            *(Parameter(name, "scalar", "int32") for name in ("rows", "n", "r", "m")),
            *(Parameter(name, "output", dtype) for name in ("y", "inner")),
        ),
        threads=WARP * tactic.warps,
        launch=partial(_launch, form, tactic.tile),
        defines=(
            ("NAME", NAMES[form]),
            ("REAL", _C_TYPES[dtype]),
            ("COLUMN", str(int(form == "column"))),
            *((field.upper(), str(value)) for field, value in tactic._asdict().items()),
            ("SLOTS", str(slots)),
        ),
    )


def tactics_for(dtype: str) -> Mapping[int, Tactic]:
    """The tactics of a dtype, by number."""
    return TACTICS["32 bits" if dtype == "float32" else "16 bits"]


def kernels() -> Sequence[Kernel]:
    """All of them: every form, dtype and tactic."""
    return [kernel for form in FORMS for dtype in DTYPES for kernel in kernels_for(form, dtype).values()]


def positions_of(order: npt.ArrayLike | None, form: Form, channels: int) -> npt.NDArray[np.int32]:
    """The kernels' ``positions`` from the ``order`` of a PivotLinear node.

    Args:
        order: As the node has it: a permutation, (channels,); None where it has none.
        form: Of the node.
        channels: m for the row form, n for the column form.

    Returns:
        (channels,). Row form: where in y each channel of [K; C K] x goes. Column form: which channel of x each of the
        pivots is, then each of the others.

    Raises:
        BadInput: It is not a permutation of the channels.
    """
    if order is None:
        return np.arange(channels, dtype=np.int32)
    given = np.asarray(order)
    if given.shape != (channels,) or not np.array_equal(np.sort(given), np.arange(channels)):
        raise BadInput(f"order is not a permutation of {channels} channels")
    # The node gathers by the order. The row form's kernel scatters, so it needs the inverse.
    return (np.argsort(given) if form == "row" else given).astype(np.int32)


def _launch(form: Form, tile: int, shapes: Sequence[Shape]) -> Launch:
    x, kept, coefficients, bias = shapes[:4]
    rows: Size = math.prod(x[1:-1], start=x[0]) if len(x) > 1 else 1
    others = coefficients[0] if form == "row" else kept[0]
    r = kept[0] if form == "row" else kept[1]
    return Launch((ceil_div(r, tile) + ceil_div(others, tile), 1, 1), (rows, x[-1], r, bias[0]))
