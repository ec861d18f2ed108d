"""The user's own conditions: ``--fail-if 'cosine<0.999'`` and ``--evaluate MODULE:FN --min X``."""

from __future__ import annotations

import importlib
import importlib.util
import math
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import BadInput, GateFailed
from graphopt.report import Verification
from graphopt.rewrite.contract import Kind
from graphopt.rewrite.manager import PassRecord

METRICS = {"cosine": "cosine_min", "max_abs": "max_abs", "max_rel": "max_rel"}
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}

Run = Callable[[Mapping[str, Any]], dict[str, Any]]
Metric = Callable[[Run], float]


@dataclass(frozen=True)
class FailIf:
    """A condition under which nothing may be written."""

    text: str
    metric: str
    comparison: str
    limit: float

    def value(self, verification: Verification) -> float:
        """The metric."""
        return float(getattr(verification, METRICS[self.metric]))

    def holds(self, verification: Verification) -> bool:
        """Whether the condition under which nothing may be written holds. A NaN counts as failing."""
        value = self.value(verification)
        return math.isnan(value) or _COMPARISONS[self.comparison](value, self.limit)

    def check(self, verification: Verification) -> None:
        """Raise GateFailed where the condition holds."""
        if self.holds(verification):
            value = self.value(verification)
            raise GateFailed(
                f"{self.metric} is {value:.6g}", where=f"--fail-if {self.text}", hint="nothing was written"
            )


def require_lossy_effect(records: Sequence[PassRecord], undone: Mapping[str, str], where: str) -> None:
    """Lossy passes are named for what they do: a file in which none of them did anything is not what was asked for.

    Args:
        records: What each pass did.
        undone: Application key -> why verification took it back.
        where: The model.

    Raises:
        GateFailed: There are lossy passes, and none changed anything.
    """
    lossy = [record for record in records if record.kind == Kind.LOSSY.value]
    if not lossy or any(record.kept for record in lossy):
        return
    record = lossy[0]
    taken_back = next((reason for key, reason in undone.items() if key.startswith(f"{record.name}:")), "")
    reason = f"undone: {taken_back}" if taken_back else record.error or record.reason
    raise GateFailed(
        f"{record.name} changed nothing: {reason or 'there is nothing that it matches'}",
        where=where,
        hint=f"nothing was written; `graphopt passes {record.name}` says what it takes",
    )


def parse_conditions(conditions: str | Sequence[str]) -> list[FailIf]:
    """Read several conditions, or one alone. Raises BadInput, see `parse_fail_if`."""
    return [parse_fail_if(text) for text in ((conditions,) if isinstance(conditions, str) else conditions)]


def parse_fail_if(text: str) -> FailIf:
    """Read ``METRIC<NUMBER`` (also ``>``, ``<=``, ``>=``).

    Raises:
        BadInput: Not of that form, or an unknown metric.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*", text)
    if match is None or match[1] not in METRICS:
        raise BadInput(f"cannot read --fail-if {text}", hint=f"write METRIC<NUMBER, METRIC one of {', '.join(METRICS)}")
    try:
        return FailIf(text.strip(), match[1], match[2], float(match[3]))
    except ValueError as error:
        raise BadInput(f"'{match[3]}' is not a number", where=f"--fail-if {text}") from error


def load_function(spec: str, option: str) -> Callable[..., Any]:
    """The function that ``MODULE:FN`` names; MODULE is importable or a path to a ``.py`` file.

    Raises:
        BadInput: Not of that form, or it cannot be imported, or there is no such function.
    """
    module_name, colon, function_name = spec.rpartition(":")
    if not colon or not module_name or not function_name:
        raise BadInput(f"cannot read {option} {spec}", hint="write MODULE:FUNCTION")
    try:
        if module_name.endswith(".py"):
            path = Path(module_name)
            found = importlib.util.spec_from_file_location(path.stem, path)
            if found is None or found.loader is None or not path.is_file():
                raise BadInput("no such file", where=module_name, hint=f"{option} takes MODULE:FUNCTION")
            module = importlib.util.module_from_spec(found)
            sys.modules.setdefault(path.stem, module)
            found.loader.exec_module(module)
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")  # the folder the user stands in, as `python -m` does
            module = importlib.import_module(module_name)
    except BadInput:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        raise BadInput(f"cannot be imported: {type(error).__name__}: {first}", where=f"{option} {spec}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise BadInput(f"module {module_name} has no function '{function_name}'", where=f"{option} {spec}")
    return function  # type: ignore[no-any-return]


def evaluate(metric: Metric, run: Run, spec: str) -> float:
    """The user's metric on a model.

    Raises:
        GateFailed: The function raised, or gave no number.
    """
    try:
        return float(metric(run))
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        raise GateFailed(
            f"{type(error).__name__}: {first}", where=f"--evaluate {spec}", hint="it takes run(feeds)"
        ) from error
