"""``--shapes name=2x128,other=2``: sizes for inputs, as a user writes them."""

from __future__ import annotations

import re

from graphopt.errors import BadInput

_SHAPE = re.compile(r"\d+(x\d+)*")
_EXAMPLE = "such as --shapes input_ids=2x128,attention_mask=2x128"


def parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Read ``name=2x128,name2=2x3x4``. An empty shape (``name=``) is a scalar's.

    Raises:
        BadInput: Something is no ``name=sizes``, or a name comes twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part in (piece.strip() for piece in text.split(",")):
        name, equals, sizes = part.rpartition("=")  # names may hold '=': sizes never do
        if not equals or not name:
            raise BadInput(f"'{part}' is not name=sizes", where="--shapes", hint=_EXAMPLE)
        if sizes and not _SHAPE.fullmatch(sizes):
            raise BadInput(f"'{sizes}' is no shape", where=f"--shapes {name}", hint=_EXAMPLE)
        if name in shapes:
            raise BadInput(f"'{name}' is given twice", where="--shapes")
        shapes[name] = tuple(int(size) for size in sizes.split("x")) if sizes else ()
    return shapes
