"""One torch.export of all paths of a module, tried again where a trace learns something."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from graphopt.exporting.branches.decisions import Course
from graphopt.exporting.branches.errors import Refusal, Retrace, Unstageable
from graphopt.exporting.branches.patching import patched
from graphopt.exporting.branches.places import Place
from graphopt.exporting.branches.state import preserved
from graphopt.exporting.branches.tracer import Knowledge, Tracer

_ATTEMPTS = 40  # each adds to what is known: a loop that is unrolled, a region that is restored

T = TypeVar("T")


@dataclass
class Traced:
    """What is known about a module whose paths were traced.

    Attributes:
        course: Its decisions and how its loops were taken.
        places: ("If", join) or ("Loop", loop) → the line that it comes from.
        knowledge: What its traces found out; loops that were unrolled, with the reason.
    """

    course: Course
    places: dict[tuple[str, int], Place]
    knowledge: Knowledge


def trace_paths(module: Any, export: Callable[[], T], promote: bool = True) -> tuple[T, Traced]:
    """What ``export`` returns, which exports ``module`` with torch.export, while all paths are traced.

    The module is as before afterwards: its attributes, its buffers, the code of its classes.

    Raises:
        Refusal: Its control flow has no ONNX form.
    """
    knowledge = Knowledge(promote=promote)
    for _ in range(_ATTEMPTS):
        tracer = Tracer(module, knowledge)
        try:
            with preserved(module), patched(module, tracer), forward_through(module, tracer.trace):
                result = export()
            return result, Traced(tracer.course, tracer.places, knowledge)
        except Retrace:
            continue
        except Unstageable as reason:
            if reason.loop is None:
                raise Refusal(reason.what, reason.place) from reason
            knowledge.unrolled[reason.loop] = reason
    raise Refusal("its paths differ each time that they are traced", None)


@contextmanager
def forward_through(module: Any, around: Callable[[Callable[[], Any], Any], Any]) -> Iterator[None]:
    """Calls of ``module.forward`` go through ``around(call, arguments)``."""
    original = module.forward
    own = "forward" in vars(module)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(lambda: original(*args, **kwargs), [args, kwargs])

    module.forward = forward
    try:
        yield
    finally:
        if own:
            module.forward = original
        else:
            del module.forward
