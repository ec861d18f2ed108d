"""What tracing several paths runs into. Only `Refusal` leaves the package.

None is an `Exception`: the user's ``except Exception`` must not catch them.
"""

from __future__ import annotations

from typing import Any

from graphopt.exporting.branches.places import Place


class Refusal(BaseException):
    """The module's control flow has no ONNX form; ``place`` is the user's line that says so, ``hint`` what to do."""

    def __init__(self, what: str, place: Place | None, hint: str | None = None) -> None:
        self.what = what
        self.place = place
        self.hint = hint
        super().__init__(what if place is None else f"{what}, at {place}")


class Unjoinable(BaseException):
    """What two paths leave behind cannot be one value; their decisions go to the enclosing region."""

    def __init__(self, what: str, place: Place) -> None:
        self.what = what
        self.place = place
        super().__init__(what)


class Unstageable(BaseException):
    """A Python loop cannot be one ONNX Loop; it is traced turn by turn instead.

    Attributes:
        loop: The loop's key, where it is not the innermost one that is being traced.
        hint: What to write instead.
        first_differs: The first turn makes what the others begin with of something else (None): they may be a Loop.
    """

    first_differs = False

    def __init__(self, what: str, place: Place, loop: Any = None, hint: str | None = None) -> None:
        self.what = what
        self.place = place
        self.loop = loop
        self.hint = hint
        super().__init__(what)


class Retrace(BaseException):
    """Something learned while tracing changes how the trace has to begin."""
