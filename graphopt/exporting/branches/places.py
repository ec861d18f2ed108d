"""Where in the user's code something happens."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

from graphopt.exporting.factory import _relative

HOOKS = "__graphopt__"  # how outlined code calls what traces it; see `outlining`
OUTLINED = "__graphopt_"  # how the names of outlined statements begin; see `outlining`
_OURS = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True)
class Place:
    """A line of the user's code and the function it stands in."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{_relative(self.file)}:{self.line}"

    def node_name(self, op_type: str) -> str:
        """The name of the If or Loop that comes from here, such as ``If_forward_123``."""
        return f"{op_type}_{self.function}_{self.line}"


def here() -> Place | None:
    """The innermost line of the user's code on the stack, or None where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code):
        frame = frame.f_back
    if frame is None:
        return None
    return Place(frame.f_code.co_filename, frame.f_lineno, _function(frame))


def somewhere() -> Place:
    """`here`, or a place that says it is unknown."""
    return here() or Place("?", 0, "forward")


def is_users(code: CodeType) -> bool:
    """Whether ``code`` is the user's: neither torch's, ours, nor the standard library's."""
    return _is_users_file(code.co_filename)


@cache
def _is_users_file(name: str) -> bool:
    import torch

    if name.startswith(("<", _OURS, str(Path(torch.__file__).parent))):
        return False
    return Path(name).parent != Path(os.__file__).parent  # nor the standard library's


def _function(frame: FrameType | None) -> str:
    """The user's name of the function that ``frame`` runs, seen through outlined statements and lambdas."""
    while frame is not None:
        name = frame.f_code.co_name
        if name.isidentifier() and not name.startswith(OUTLINED) and is_users(frame.f_code):
            return name
        frame = frame.f_back
    return "forward"
