"""Every case of ONNX's own node corpus that ONNX Runtime runs correctly, through recipe ``safe``.

    python -m benchmarks.corpus [--only NAME] [--limit N] [--no-verify] [--peers]

For each case: does the result compute the same (rtol 1e-3, integers exactly, both runs with the runtime's
optimizations off), is its interface the same, did anything crash, and did verification object to a result that is
right? Where verification finds no telling inputs of its own it says so and writes nothing; the case's own inputs are
then given to it (``with data``), and where even those say nothing (every output constant), or cannot be given in a
file (optional inputs), the case counts as unverifiable. Each case runs in a worker process, so that a crash costs
one case. ``--peers`` runs the same cases through the other tools that are installed. Only a full run writes results.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.common import has, print_table, write_result
from benchmarks.pool import Died, Pool, first_line

RTOL = 1e-3
SHOWN = 40
VERIFIED, UNVERIFIED = "graphopt safe", "graphopt safe --no-verify"

# In the order of the table. "not run" and "differs" say that ONNX Runtime itself does not run the case correctly.
RIGHT = ("ok", "with data")
WRONG = ("invalid", "wrong", "interface", "exception", "crash", "timeout", "false alarm", "caught")
OUTCOMES = (*RIGHT, *WRONG, "unverifiable")


@dataclass
class Outcome:
    """What became of one case."""

    case: str
    tool: str
    kind: str
    detail: str = ""


Tool = Callable[[Path, Path], None]


class Refused(Exception):
    """graphopt wrote nothing, or undid rewrites; with the reason."""


class Unverifiable(Exception):
    """graphopt wrote nothing, as it had no inputs that tell right from wrong; with the reason."""


def graphopt_safe(source: Path, out: Path, calibration: Path | None = None) -> None:
    """Recipe ``safe``, verified. Raises Refused where verification objected, Unverifiable where it could not."""
    from graphopt import optimize
    from graphopt.errors import BadInput, GateFailed, GraphoptError

    try:
        report = optimize(source, out, calibration=calibration)
    except GraphoptError as error:
        unreadable = calibration is not None and isinstance(error, BadInput) and ".npz" in str(error)
        if unreadable or "vacuous" in error.what or "no inputs were found" in error.what:
            raise Unverifiable(str(error)) from error
        if isinstance(error, GateFailed):
            raise Refused(str(error)) from error
        raise
    if report.undone:
        raise Refused("; ".join(f"undone {key}: {reason}" for key, reason in report.undone.items()))


def graphopt_unverified(source: Path, out: Path) -> None:
    """Recipe ``safe`` with nothing but the structure checked."""
    from graphopt import optimize

    optimize(source, out, verify=False)


def ort_basic(source: Path, out: Path) -> None:
    """ONNX Runtime's offline optimization, level basic."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def onnxscript_optimize(source: Path, out: Path) -> None:
    """onnxscript.optimizer.optimize."""
    import onnxscript.optimizer

    onnx.save(onnxscript.optimizer.optimize(onnx.load(source)), out)


def onnxslim_slim(source: Path, out: Path) -> None:
    """onnxslim with its default settings."""
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), out)


def onnxsim_simplify(source: Path, out: Path) -> None:
    """onnxsim with its default settings."""
    import onnxsim

    onnx.save(onnxsim.simplify(onnx.load(source))[0], out)


TOOLS: dict[str, Tool] = {
    UNVERIFIED: graphopt_unverified,
    VERIFIED: graphopt_safe,
    "onnxruntime basic": ort_basic,
    "onnxscript": onnxscript_optimize,
    "onnxslim": onnxslim_slim,
    "onnxsim": onnxsim_simplify,
}


def collect() -> list[Any]:
    """All cases, made (not read) by ONNX's generator, expanded functions included."""
    import warnings

    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow and division by zero are what some cases are about
        return sorted(collect_testcases(None), key=lambda case: str(case.name))


def run_case(case: Any, tools: Sequence[str], folder: Path) -> list[Outcome]:
    """One case through all tools; a single outcome "not run" or "differs" where ONNX Runtime fails already."""
    source = folder / "case.onnx"
    source.write_bytes(case.model.SerializeToString())
    try:
        expected = [_run(source, feeds) for feeds in _feeds(case)]
    except Exception as error:
        return [Outcome(case.name, "", "not run", first_line(error))]
    for (_, outputs), mine in zip(case.data_sets, expected, strict=True):
        reason = next(filter(None, map(_why_apart, mine, outputs)), None)
        if reason is not None:
            return [Outcome(case.name, "", "differs", reason)]
    outcomes = []
    for tool in tools:
        out = folder / "result.onnx"
        out.unlink(missing_ok=True)
        kind, detail = _judge(case, expected, TOOLS[tool], source, out)
        outcomes.append(Outcome(case.name, tool, kind, detail.replace(f"{folder}/", "")))
    return outcomes


def _judge(case: Any, expected: Sequence[list[Any]], tool: Tool, source: Path, out: Path) -> tuple[str, str]:
    right = "ok"
    try:
        try:
            tool(source, out)
        except Unverifiable:
            right = "with data"
            graphopt_safe(source, out, _own_inputs(case, source.parent))
    except Unverifiable as reason:
        return "unverifiable", str(reason)
    except Refused as refusal:
        # Verification objected. It was right to, if the same rewrites, unverified, give a wrong result.
        graphopt_unverified(source, out)
        kind, detail = _compare(case, expected, source, out)
        return ("false alarm", str(refusal)) if kind == "ok" else ("caught", f"{refusal}; {kind}: {detail}")
    except Exception as error:
        return "exception", f"{type(error).__name__}: {first_line(error)}"
    kind, detail = _compare(case, expected, source, out)
    return (right if kind == "ok" else kind), detail


def _own_inputs(case: Any, folder: Path) -> Path:
    calibration = folder / "inputs"
    calibration.mkdir()
    for i, feeds in enumerate(_feeds(case)):
        arrays = {name: np.asarray(value) for name, value in feeds.items() if value is not None}
        strings = {name: array.astype(str) for name, array in arrays.items() if array.dtype.kind == "O"}
        np.savez(calibration / f"{i}.npz", **(arrays | strings))  # type: ignore[arg-type]
    return calibration


def _compare(case: Any, expected: Sequence[list[Any]], source: Path, out: Path) -> tuple[str, str]:
    before, after = interface(onnx.load(source)), interface(onnx.load(out))
    if before != after:
        return "interface", f"{before} became {after}"
    for feeds, outputs in zip(_feeds(case), expected, strict=True):
        try:
            found = _run(out, feeds)
        except Exception as error:
            return "invalid", first_line(error)
        reason = next(filter(None, map(_why_apart, found, outputs)), None)
        if reason is not None:
            return "wrong", reason
    return "ok", ""


def interface(model: onnx.ModelProto) -> str:
    """The inputs (weights left out) and outputs of a model with their types and dims, in ONNX's text syntax."""
    held = {initializer.name for initializer in model.graph.initializer}
    graph = onnx.GraphProto(name="model", output=model.graph.output)
    graph.input.extend(value for value in model.graph.input if value.name not in held)
    return " ".join(onnx.printer.to_text(graph).split())


def _feeds(case: Any) -> Iterator[dict[str, Any]]:
    names = [value.name for value in case.model.graph.input]
    for inputs, _ in case.data_sets:
        # A case may leave out optional inputs at the end; they are not inputs of its graph either.
        yield dict(zip(names, (_plain(value) for value in inputs), strict=True))


def _plain(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _run(path: Path, feeds: dict[str, Any]) -> list[Any]:
    from graphopt.runtime.session import create_session, run

    session = create_session(path, optimized=False, threads=1)
    return list(run(session, feeds).values())


def _why_apart(found: Any, expected: Any) -> str | None:
    """Why two outputs (arrays, lists of arrays, None) are not the same; None where they are."""
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return "sequences of different lengths"
        return next(filter(None, map(_why_apart, found, expected)), None)
    if found is None or expected is None:
        return None if found is expected else "one is absent"
    a, b = np.asarray(found), np.asarray(_plain(expected))
    if a.dtype != b.dtype and "O" not in (a.dtype.kind, b.dtype.kind):
        return f"dtype {a.dtype}, expected {b.dtype}"
    if a.shape != b.shape:
        return f"shape {a.shape}, expected {b.shape}"
    if a.dtype.kind in "iubOUS":
        different = int(np.sum(a.astype(object) != b.astype(object)))
        return f"{different} of {a.size} values differ" if different else None
    from graphopt.verification.tolerance import eps_of

    # Narrow dtypes have fewer digits than rtol asks for.
    rtol = max(RTOL, 4 * eps_of(b.dtype))
    a, b = a.astype(np.complex128), b.astype(np.complex128)
    with np.errstate(invalid="ignore"):
        close = np.isclose(a, b, rtol=rtol, atol=1e-6, equal_nan=True)
    return None if close.all() else f"{int((~close).sum())} of {close.size} values differ"


def run_all(cases: Sequence[Any], tools: Sequence[str]) -> Iterator[Outcome]:
    """All cases through all tools in worker processes."""

    def task(index: int, folder: Path) -> list[Outcome]:
        return run_case(cases[index], tools, folder)

    # The cases are handed over by forking: they take seconds to make.
    for index, result in Pool(task, len(cases)).results():
        if isinstance(result, Died) and result.kind == "exception":  # the tools' own are caught: this is ours
            raise RuntimeError(f"{cases[index].name}: {result.detail}")
        if isinstance(result, Died):
            yield from (Outcome(cases[index].name, tool, result.kind, result.detail) for tool in tools)
        else:
            yield from result


def summarise(outcomes: Iterable[Outcome], tools: Sequence[str]) -> dict[str, dict[str, int]]:
    """How many cases had which outcome, by tool."""
    counts = {tool: Counter[str]() for tool in tools}
    for outcome in outcomes:
        if outcome.tool:
            counts[outcome.tool][outcome.kind] += 1
    return {tool: {kind: count[kind] for kind in OUTCOMES} for tool, count in counts.items()}


def main() -> int:
    """Run the corpus and print the table. Exit code 1 where graphopt did anything wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="cases whose name contains this")
    parser.add_argument("--limit", type=int, metavar="N", help="only so many cases, spread over all")
    parser.add_argument("--no-verify", action="store_true", help="leave graphopt's verification out")
    parser.add_argument("--peers", action="store_true", help="the other tools that are installed, too")
    options = parser.parse_args()

    tools = [UNVERIFIED] if options.no_verify else [UNVERIFIED, VERIFIED]
    if options.peers:
        tools += ["onnxruntime basic", *filter(has, ("onnxscript", "onnxslim", "onnxsim"))]
    cases = collect()
    if options.only:
        cases = [case for case in cases if options.only in case.name]
    if options.limit and options.limit < len(cases):
        cases = cases[:: len(cases) // options.limit][: options.limit]

    # One pool a tool where peers take part: a crash then names the tool that crashed.
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    pools = [[tool] for tool in tools] if options.peers else [tools]
    for pool in pools:
        outcomes += run_all(cases, pool)
    seconds = time.perf_counter() - start

    unusable = {outcome.case: outcome for outcome in outcomes if not outcome.tool}
    counts = summarise(outcomes, tools)
    shown = [kind for kind in OUTCOMES if any(count[kind] for count in counts.values())]
    print_table(
        ["tool", *((kind, "right") for kind in shown)],
        [[tool, *(counts[tool][kind] for kind in shown)] for tool in tools],
        f"{len(cases) - len(unusable)} cases that ONNX Runtime runs correctly, of {len(cases)}; {seconds:.0f} s",
    )
    bad = [outcome for outcome in outcomes if outcome.tool and outcome.kind not in RIGHT]
    for outcome in bad[:SHOWN]:
        print(f"{outcome.tool} · {outcome.case} · {outcome.kind}: {outcome.detail}")
    if len(bad) > SHOWN:
        print(f"... and {len(bad) - SHOWN} more")
    if not (options.only or options.limit or options.no_verify):
        write_result(
            "corpus",
            {
                "cases": len(cases) - len(unusable),
                "not_run_by_onnxruntime": sum(outcome.kind == "not run" for outcome in unusable.values()),
                "onnxruntime_differs": sum(outcome.kind == "differs" for outcome in unusable.values()),
                "rtol": RTOL,
                "tools": counts,
                "not_ok": bad,
                "seconds": round(seconds),
            },
        )
    return int(any(outcome.tool in (VERIFIED, UNVERIFIED) and outcome.kind in WRONG for outcome in bad))


if __name__ == "__main__":
    raise SystemExit(main())
