"""The errors a user can cause. Each is one line: what is wrong, where, and what to do about it.

The command line prints ``str(error)`` and exits with ``error.exit_code``; the Python API raises.
"""

from __future__ import annotations


class GraphoptError(Exception):
    """Base of every error that graphopt raises on purpose.

    Args:
        what: What is wrong, in a few words and without a full stop.
        where: The file, node, tensor or option it is wrong in; omitted where there is none.
        hint: What the user can do about it; omitted where nothing can be done.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        line = self.what if self.where is None else f"{self.where}: {self.what}"
        return line if self.hint is None else f"{line} ({self.hint})"


class BadInput(GraphoptError):
    """The user's files or options cannot be used as they are; nothing was written (exit code 2)."""

    exit_code = 2


class MissingDependency(BadInput):
    """A library that only some commands need is not installed, or two that exclude each other are."""


def install_hint(*extras: str) -> str:
    """What to do about a missing library: install one of graphopt's extras, as a clone of the repository can."""
    commands = " or ".join(f"pip install '.[{extra}]'" for extra in extras)
    return f"in graphopt's folder: {commands}"


class GateFailed(GraphoptError):
    """A check that guards the output failed; nothing was written (exit code 1)."""
