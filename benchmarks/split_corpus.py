"""Every If, Loop and Scan of ONNX's node corpus, and random nests, split into bundles and merged again: the same bits?

    python -m benchmarks.split_corpus [--nests N]

Each network is run as it is, split on both backends of the host, and merged, with the runtime's optimizations off, and
what comes out is compared bit for bit. What ONNX Runtime does not run is listed with its reason and does not count;
that it has not released an opset yet is no reason.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from benchmarks.common import print_table, write_result
from graphopt import graphs
from graphopt.bundles.host import Program
from graphopt.bundles.merge import merge
from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.plain import PlainBackend
from graphopt.bundles.plan import Branch, Loop, walk
from graphopt.bundles.running import backend_for
from graphopt.bundles.split import SPLIT, Split, split
from graphopt.errors import GraphoptError
from graphopt.runtime.session import create_session, run

Feeds = Mapping[str, Any]
Many = Sequence[Feeds]


def corpus() -> Iterator[tuple[str, onnx.ModelProto, Many]]:
    """The cases of the node corpus that hold control flow."""
    from onnx.backend.test.case.node import collect_testcases

    with np.errstate(all="ignore"):
        cases = [case for case in collect_testcases() if case.model is not None]
    for case in cases:
        held = {node.op_type for node in graphs.all_nodes(ir.from_proto(case.model)) if node.domain == ""}
        if held & SPLIT:
            names = [value.name for value in case.model.graph.input]
            yield case.name, case.model, [dict(zip(names, inputs, strict=True)) for inputs, _ in case.data_sets]


def nests(count: int) -> Iterator[tuple[str, onnx.ModelProto, Many]]:
    """Random nests: captures at any depth, no turns, stacked outputs, sequences."""
    from tests.models.nests import Nest

    for seed in range(count):
        nest = Nest(seed, depth=2 + seed % 3)
        yield f"nest {seed}", nest.model, nest.feeds(4)


def same(one: Any, other: Any) -> bool:
    """Bit for bit, but for which NaN it is."""
    if isinstance(one, list) or isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def check(content: bytes, many: Many) -> dict[str, str]:
    """For each way to run a network what became of it: ``same``, ``different``, or an error's first line."""
    session = create_session(content, optimized=False)
    wanted = [run(session, feeds) for feeds in many]
    parts = split(ir.from_proto(onnx.load_model_from_string(content)))
    left = {node.op_type for block in parts.blocks.values() for node in graphs.all_nodes(block)} & SPLIT
    ways = {"split": _run_split, "split, as arrays": _run_plain, "merged": _run_merged}
    found = {"control flow left": ", ".join(sorted(left)) or "none", "steps": str(_steps(parts))}
    for name, way in ways.items():
        try:
            got = way(parts, many)
        except GraphoptError as error:
            found[name] = str(error)
            continue
        equal = all(
            list(one) == list(other) and all(same(one[key], other[key]) for key in one)
            for one, other in zip(wanted, got, strict=True)
        )
        found[name] = "same" if equal else "different"
    return found


def _steps(parts: Split) -> int:
    return sum(1 for step in walk(parts.plan.steps) if isinstance(step, Branch | Loop))


def _session(parts: Split, name: str) -> Any:
    return create_session(ir.to_proto(parts.blocks[name]).SerializeToString(), optimized=False)


def _run_split(parts: Split, many: Many) -> Many:
    backend = backend_for(parts.plan, lambda name: _session(parts, name))
    program = Program(parts.plan, backend)
    if not isinstance(backend, OrtBackend):
        return [program.run(feeds) for feeds in many]
    found = []
    for feeds in many:
        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        made = program.run({name: backend.value(array) for name, array in arrays.items()})
        found.append({name: backend.array(value) for name, value in made.items()})
    return found


def _run_plain(parts: Split, many: Many) -> Many:
    program = Program(parts.plan, PlainBackend(lambda name: _session(parts, name)))
    return [program.run(feeds) for feeds in many]


def _run_merged(parts: Split, many: Many) -> Many:
    content = ir.to_proto(merge(parts.plan, parts.blocks)).SerializeToString()
    session = create_session(content, optimized=False)
    return [run(session, feeds) for feeds in many]


def main() -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--nests", type=int, default=500)
    options = parser.parse_args()
    os.environ["ALLOW_RELEASED_ONNX_OPSET_ONLY"] = "0"
    rows, result = [], {}
    for title, cases in (("node corpus", corpus()), ("random nests", nests(options.nests))):
        counts: dict[str, Counter[str]] = {}
        refused: dict[str, str] = {}
        steps = runs = networks = 0
        wrong: dict[str, dict[str, str]] = {}
        for name, model, many in cases:
            try:
                found = check(model.SerializeToString(), many)
            except GraphoptError as error:
                refused[name] = str(error)
                continue
            networks, runs, steps = networks + 1, runs + len(many), steps + int(found.pop("steps"))
            for way, outcome in found.items():
                known = outcome in ("same", "different", "none")
                counts.setdefault(way, Counter())[outcome if known else "failed"] += 1
            if {*found.values()} - {"same", "none"}:
                wrong[name] = found
        rows.append(
            [
                title,
                networks,
                steps,
                runs,
                *(counts[way]["same"] for way in ("split", "split, as arrays", "merged")),
                counts["control flow left"]["none"],
                len(refused),
            ]
        )
        result[title] = {
            "networks": networks,
            "control_flow": steps,
            "inputs": runs,
            "counts": counts,
            "wrong": wrong,
            "not_run_by_onnxruntime": refused,
        }
    columns = ("networks", "If/Loop/Scan", "inputs", "split", "as arrays", "merged", "none left", "not run")
    print_table(["", *((column, "right") for column in columns)], rows, "Networks that give the same bits")
    write_result("split_corpus", result)


if __name__ == "__main__":
    main()
