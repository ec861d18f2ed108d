"""Measures what work costs on this machine with ONNX Runtime, for a target's cost profile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from graphopt.errors import BadInput, GraphoptError
from graphopt.targets.target import CostProfile, Target

ROUNDS = 30
OTHER_WORK = 32 << 20
"""Bytes that go through the caches between two calls, as the weights of other blocks do."""


def measure(target: Target, *, threads: int = 1) -> CostProfile:
    """Measure the cost profile of a target on this machine.

    Each figure is the slope between a small and a large model of the same kind, so that what a run costs in any case
    cancels out; but that of a block, which is what a run costs in any case.

    Args:
        target: Its backend must be ``onnxruntime``.
        threads: Threads within an operator.

    Raises:
        BadInput: The backend cannot be measured here.
    """
    if target.backend != "onnxruntime":
        raise BadInput(f"the backend {target.backend} cannot be measured here", hint="measure where its engines run")
    few, many = 10, 200
    short = _seconds(_chain(few, "Neg"), {"x": np.ones((1, 8), np.float32)}, threads)
    long = _seconds(_chain(many, "Neg"), {"x": np.ones((1, 8), np.float32)}, threads)
    node = max((long - short) / (many - few), 1e-8)

    wide = np.ones((1024, 1024), np.float32)
    base = _seconds(_chain(2, "Neg"), {"x": wide}, threads)
    more = _seconds(_chain(12, "Neg"), {"x": wide}, threads)
    bytes_per_second = 10 * 2 * wide.nbytes / max(more - base, 1e-9)

    moved = _seconds(_chain(2, "Reversed"), {"x": wide}, threads)
    more = _seconds(_chain(6, "Reversed"), {"x": wide}, threads)
    scattered_per_second = 4 * 2 * wide.nbytes / max(more - moved, 1e-9)

    size = 512
    product = _seconds(_product(size), {"x": np.ones((size, size), np.float32)}, threads)
    multiply_adds = size**3 / max(product - node, 1e-9)

    branch = _seconds(_branch(), {"x": np.ones((1, 8), np.float32), "c": np.array(True)}, threads)
    straight = _seconds(_chain(1, "Neg"), {"x": np.ones((1, 8), np.float32)}, threads)
    call = _seconds_of_a_call(_chain(1, "Neg"), {"x": np.ones((1, 8), np.float32)}, threads)
    return CostProfile(
        node=round(node * 1e6, 3),
        gigaflops=round(multiply_adds / 1e9, 3),
        gigabytes=round(bytes_per_second / 1e9, 3),
        scattered=round(scattered_per_second / 1e9, 3),
        control_flow=round(max(branch - straight, 0.0) * 1e6, 3),
        block=round(max(call - 2 * node, 0.0) * 1e6, 3),
    )


def write_target(target: Target, profile: CostProfile, path: Path) -> None:
    """Write a target with this cost profile as YAML, to be given to ``--target``.

    Raises:
        GraphoptError: The file cannot be written.
    """
    data = target.model_dump(mode="json")
    data["costs"] = profile.model_dump(mode="json")
    data["unsupported"] = sorted(data["unsupported"])
    data["extensions"] = {domain: sorted(ops) for domain, ops in data["extensions"].items()}
    if target.quantised is None:
        del data["quantised"]
    else:
        data["quantised"]["types"] = sorted(target.quantised.types)
    try:
        path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise GraphoptError(f"cannot be written: {error.strerror}", where=str(path)) from error


def _seconds(model: bytes, feeds: dict[str, Any], threads: int) -> float:
    """The median time of one run."""
    from graphopt.runtime.session import create_session

    session = create_session(model, optimized=False, threads=threads)
    run: Callable[[], object] = lambda: session.run(None, feeds)  # noqa: E731
    run()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _seconds_of_a_call(model: bytes, feeds: dict[str, Any], threads: int) -> float:
    """The median time of a run as the host of a bundle does it: the runtime's own values in and out, caches cold."""
    from graphopt.runtime.session import create_session, to_ort_value

    session = create_session(model, optimized=False, threads=threads)
    held = {name: to_ort_value(array) for name, array in feeds.items()}
    values = {name: value._ortvalue for name, value in held.items()}
    names = [output.name for output in session.get_outputs()]
    call = session._sess.run_with_ort_values
    other = np.ones(OTHER_WORK // 4, np.float32)
    times = []
    for _ in range(ROUNDS):
        other.sum()
        start = time.perf_counter()
        call(values, names, None)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _model(text: str) -> bytes:
    import onnx.parser

    return bytes(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}').SerializeToString())


def _chain(length: int, op: str) -> bytes:
    """Operators in a row; ``Reversed`` is a Gather that turns the last of 1,024 channels into the first."""
    if op == "Reversed":
        order = ", ".join(map(str, range(1023, -1, -1)))
        steps = f"order = Constant<value_ints = [{order}]>()\n"
        steps += "\n".join(f"v{i + 1} = Gather<axis = 1>(v{i}, order)" for i in range(length))
    else:
        steps = "\n".join(f"v{i + 1} = {op}(v{i})" for i in range(length))
    return _model(f"agraph (float[a,b] x) => (float[a,b] v{length}) {{\nv0 = Identity(x)\n{steps}\n}}")


def _product(size: int) -> bytes:
    return _model(f"agraph (float[{size},{size}] x) => (float[{size},{size}] y) {{ y = MatMul(x, x) }}")


def _branch() -> bytes:
    return _model(
        "agraph (float[a,b] x, bool c) => (float[a,b] y) { y = If(c) <"
        "then_branch = t () => (float[a,b] u) { u = Neg(x) }, else_branch = e () => (float[a,b] w) { w = Abs(x) }> }"
    )
