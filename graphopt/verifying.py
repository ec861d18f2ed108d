"""Compare what two models compute: ``graphopt verify A B``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt import gates
from graphopt.attempts import Plan
from graphopt.cases import read_feeds
from graphopt.checking import check_whole, coverage_of, reference_of, says_nothing
from graphopt.errors import BadInput
from graphopt.files import load_model
from graphopt.numerics.blas import single_threaded_blas
from graphopt.report import Verification
from graphopt.shapes import infer_shapes
from graphopt.targets import load_target
from graphopt.verification.structure import Interface, Port, interface_of


@dataclass
class VerifyReport:
    """What ``verify`` found.

    Attributes:
        passed: Whether B counts as the same as A.
        reason: Why not, in words; empty where it does.
        verification: Distances and coverage.
        differences: Every output and case that does not count as the same.
    """

    passed: bool
    reason: str
    verification: Verification
    differences: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for ``json.dumps``."""
        return dataclasses.asdict(self)


@single_threaded_blas()
def verify(
    a: str | Path,
    b: str | Path,
    *,
    calibration: str | Path | None = None,
    custom_ops: str | Path | None = None,
    bitwise: bool = False,
    fail_if: Sequence[str] = (),
) -> VerifyReport:
    """Run two models on the same inputs and compare.

    A, with the runtime's optimizations off, is the reference; B is run that way and as deployed. B counts as the same
    where every output is no further from A's float64 result than four times A is, plus one eps.

    Args:
        a: The reference.
        b: The candidate.
        calibration: Inputs to use; default: synthesised for A.
        custom_ops: A shared library of ONNX Runtime custom operators.
        bitwise: Ask for the same bits with optimizations off.
        fail_if: Conditions to use instead of the rounding rule.

    Raises:
        BadInput: A file or option cannot be used, or B does not take A's inputs and give its outputs.
    """
    start = time.perf_counter()
    conditions = [gates.parse_fail_if(text) for text in fail_if]
    original, candidate = load_model(a), load_model(b)
    require_same_interface(interface_of(original), interface_of(candidate), str(b))
    infer_shapes(original)
    plan = Plan(
        Path(a),
        load_target("onnxruntime"),
        list,
        read_feeds(calibration, original),
        Path(custom_ops) if custom_ops is not None else None,
    )
    reference = reference_of(plan, original)
    outcome = check_whole(plan, reference, Path(b), bitwise=bitwise, measure_only=bool(conditions))
    verification = outcome.verification
    verification.coverage = coverage_of(plan, reference)
    reason = outcome.reason or ""
    for condition in conditions:
        if condition.holds(verification):
            reason = reason or f"{condition.text} holds"
    if not reason and says_nothing(verification.coverage):
        reason = "vacuous: every output is constant, or nowhere finite, on all inputs tried"
    verification.verdict = "failed" if reason else "passed"
    verification.seconds = time.perf_counter() - start
    return VerifyReport(not reason, reason, verification, outcome.differences)


def require_same_interface(a: Interface, b: Interface, where: str) -> None:
    """Refuse to compare models that do not take the same inputs and give the same outputs (names and dtypes).

    Raises:
        BadInput: With the first input or output that differs.
    """
    for side, expected, found in (("input", a.inputs, b.inputs), ("output", a.outputs, b.outputs)):
        theirs: dict[str, Port] = {port.name: port for port in found}
        for port in expected:
            other = theirs.pop(port.name, None)
            if other is None:
                raise BadInput(f"has no {side} '{port.name}'", where=where, hint=f"it has: {_names(found)}")
            if other.type != port.type:
                raise BadInput(f"{side} '{port.name}' is {other.type}, the other model has {port.type}", where=where)
        if theirs and side == "input":
            raise BadInput(f"takes a further input '{next(iter(theirs))}'", where=where)


def _names(ports: Sequence[Port]) -> str:
    return ", ".join(port.name for port in ports)
