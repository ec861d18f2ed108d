"""Compare what two models compute: ``graphopt verify A B``."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt import gates
from graphopt.attempts import Plan, Progress
from graphopt.bundles import plan as plans
from graphopt.bundles.folder import changed_files, open_bundle, read_bundle
from graphopt.bundles.ports import port as plan_port
from graphopt.bundles.rehearsal import rehearse
from graphopt.cases import read_feeds
from graphopt.checking import WholeCheck, check_whole, coverage_of, reference_of, says_nothing
from graphopt.errors import BadInput
from graphopt.files import load_model, save_model
from graphopt.files.bundle_folder import is_bundle
from graphopt.numerics.blas import single_threaded_blas
from graphopt.report import Verification
from graphopt.shapes import infer_shapes
from graphopt.targets import load_target
from graphopt.verification.structure import Interface, Port, interface_of

if TYPE_CHECKING:
    from graphopt.verification.whole import Reference


@dataclass
class VerifyReport:
    """What ``verify`` found.

    Attributes:
        passed: Whether B counts as the same as A.
        reason: Why not, in words; empty where it does.
        verification: Distances and coverage.
        differences: Every output and case that does not count as the same.
        changed: Of a bundle, what is not as it was written, with its path.
    """

    passed: bool
    reason: str
    verification: Verification
    differences: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

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
    fail_if: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> VerifyReport:
    """Run two models on the same inputs and compare.

    A, with the runtime's optimizations off, is the reference; B is run that way and as deployed. B counts as the same
    where every output is no further from A's float64 result than four times A is, plus one eps. Where B is a bundle,
    both are also sent every way that they can go: each If both ways, loops to no, one and many turns. A bundle that was
    changed since it was written does not pass.

    Args:
        a: The reference: a model, or a bundle.
        b: The candidate: likewise.
        calibration: Inputs to use; default: synthesised for A.
        custom_ops: A shared library of ONNX Runtime custom operators.
        bitwise: Ask for the same bits with optimizations off.
        fail_if: Conditions to use instead of the rounding rule.
        progress: Told in words what is being done.

    Raises:
        BadInput: A file or option cannot be used, or B does not take A's inputs and give its outputs.
    """
    start = time.perf_counter()
    for path in (Path(a), Path(b)):
        _refuse_engines(path)
    conditions = gates.parse_conditions(fail_if)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        source = _as_model(Path(a), Path(folder) / "merged.onnx")
        original = load_model(source)
        _require_same_interface(original, Path(b))
        infer_shapes(original)
        plan = Plan(
            source,
            load_target("onnxruntime"),
            list,
            read_feeds(calibration, original),
            Path(custom_ops) if custom_ops is not None else None,
            bundle=is_bundle(Path(b)),
        )
        reference = reference_of(plan, original)
        compare = _compare_bundle if plan.bundle else _compare_model
        outcome = compare(plan, reference, Path(b), bitwise, bool(conditions), progress or (lambda text: None))
    verification = outcome.verification
    verification.coverage |= coverage_of(plan, reference)
    reason = outcome.reason or ""
    for condition in conditions:
        if condition.holds(verification):
            reason = reason or f"{condition.text} holds"
    if not reason and says_nothing(verification.coverage):
        reason = "vacuous: every output is constant, or nowhere finite, on all inputs tried"
    changed = [line for path in dict.fromkeys((Path(a), Path(b))) for line in _changed(path)]
    if not reason and changed:
        reason = f"changed since it was written: {changed[0]}"
    verification.verdict = "failed" if reason else "passed"
    verification.seconds = time.perf_counter() - start
    return VerifyReport(not reason, reason, verification, outcome.differences, changed)


def _refuse_engines(path: Path) -> None:
    engines = [block for block in read_bundle(path)[1].blocks.values() if block.backend] if is_bundle(path) else []
    if engines:
        raise BadInput(
            "its blocks are engines, which ONNX Runtime does not run",
            where=str(path),
            hint="verify the bundle that it was built from; on a GPU, graphopt bench compares outputs",
        )


def _changed(path: Path) -> list[str]:
    """What of a bundle is not as it was written."""
    if not is_bundle(path):
        return []
    opened = open_bundle(path)
    return [f"{opened.version}: {name}" for name in changed_files(opened.version)]


def _compare_model(
    plan: Plan, reference: Reference, candidate: Path, bitwise: bool, measure_only: bool, say: Progress
) -> WholeCheck:
    say("running both")
    return check_whole(plan, reference, candidate, bitwise=bitwise, measure_only=measure_only)


def _compare_bundle(
    plan: Plan, reference: Reference, candidate: Path, bitwise: bool, measure_only: bool, say: Progress
) -> WholeCheck:
    outcome = rehearse(reference, plan.load_typed, candidate, bitwise=bitwise, measure_only=measure_only, say=say)
    verification = Verification(cases=len(reference.feeds), coverage={"ways": dataclasses.asdict(outcome.ways)})
    for worst in (outcome.worst, outcome.forced):
        verification.add(**dataclasses.asdict(worst))
    return WholeCheck(verification, next(iter(outcome.differences), None), outcome.differences)


def _as_model(path: Path, merged: Path) -> Path:
    """The file of a model; of a bundle, what it is in one file."""
    if not is_bundle(path):
        return path
    from graphopt.bundles.merge import merge_bundle

    save_model(merge_bundle(path), merged)
    return merged


def _require_same_interface(original: ir.Model, candidate: Path) -> None:
    if is_bundle(candidate):
        _, plan = read_bundle(candidate)
        theirs = Interface(_ports(plan.inputs), _ports(plan.outputs))
        mine = Interface(_ports(map(plan_port, original.graph.inputs)), _ports(map(plan_port, original.graph.outputs)))
    else:
        mine, theirs = interface_of(original), interface_of(load_model(candidate))
    require_same_interface(mine, theirs, str(candidate))


def _ports(ports: Iterable[plans.Port]) -> tuple[Port, ...]:
    return tuple(Port(one.name, one.type, str(one.shape)) for one in ports)


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
