"""What the host of a bundle adds to the calls it makes: a chain of tiny blocks, and loops of a 256-wide step.

    python -m benchmarks.host_overhead [--seconds S]

The references are written by hand with ONNX Runtime's bindings: sessions whose inputs and outputs were bound once, and
for loops two bindings that hand the state to and fro. ONNX Runtime's own Loop is timed beside them. One process, one
thread, interleaved; the ratios are of processor time and of wall time, within rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from benchmarks.common import print_table, write_result
from graphopt.benchmarking import ratio_interval
from graphopt.benchmarking.timing import Samples, time_block
from graphopt.bundles.host import Program
from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.plan import Block, Plan, Port, Run
from graphopt.bundles.split import Split, split
from graphopt.runtime.flavour import import_onnxruntime
from graphopt.runtime.session import create_session

BLOCKS = 64
TURNS = 100
WIDTH = 256
BAR = 1.5
HEAD = '<ir_version: 10, opset_import: ["" : 18]>'
TINY = f"{HEAD} g (float[1, 8] x) => (float[1, 8] y) {{ y = Relu (x) }}"
STEP = f"""{HEAD} g (float[1, 256] s) => (float[1, 256] after) <float[256, 256] w>
    {{ h = MatMul (s, w) after = Tanh (h) }}"""
ASKING_STEP = f"""{HEAD} g (float[1, 256] s, int64 i, int64 last) => (float[1, 256] after, bool more)
    <float[256, 256] w> {{ h = MatMul (s, w) after = Tanh (h) more = Less (i, last) }}"""
COUNTED = f"""{HEAD} g (float[1, 256] x, int64 n) => (float[1, 256] y) <float[256, 256] w> {{
    y = Loop (n, , x) <body = b (int64 i, bool go, float[1, 256] s) => (bool more, float[1, 256] after) {{
        more = Identity (go)
        h = MatMul (s, w)
        after = Tanh (h)
    }}>
}}"""
ASKED = f"""{HEAD} g (float[1, 256] x, int64 n) => (float[1, 256] y) <float[256, 256] w> {{
    y = Loop (, , x) <body = b (int64 i, bool go, float[1, 256] s) => (bool more, float[1, 256] after) {{
        more = Less (i, n)
        h = MatMul (s, w)
        after = Tanh (h)
    }}>
}}"""

Call = Callable[[], object]


def weight() -> np.ndarray[Any, Any]:
    """A step's matrix, the same every time."""
    drawn: np.ndarray[Any, Any] = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    return drawn / np.float32(16)


def model_of(text: str) -> bytes:
    """A network written as text; ``w`` in angle brackets is the step's matrix."""
    model = onnx.parser.parse_model(text)
    if any(info.name == "w" for info in model.graph.value_info):
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight(), "w"))
        del model.graph.value_info[:]
    content: bytes = model.SerializeToString()
    return content


def session_of(content: bytes) -> Any:
    return create_session(content, optimized=True, threads=1)


def program_of(parts: Split) -> tuple[Program, OrtBackend]:
    """A split network on the host's own backend."""

    def session(name: str) -> Any:
        return session_of(ir.to_proto(parts.blocks[name]).SerializeToString())

    backend = OrtBackend(session)
    return Program(parts.plan, backend), backend


def bound_to(session: Any, inputs: dict[str, Any], outputs: dict[str, Any]) -> Any:
    """A binding of a session, made once."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    return binding


def values_of(*arrays: np.ndarray[Any, Any]) -> list[Any]:
    kind = import_onnxruntime().OrtValue
    return [kind.ortvalue_from_numpy(array) for array in arrays]


def chain() -> tuple[dict[str, Call], int]:
    """Tiny blocks one after the other."""
    x = np.ones((1, 8), np.float32)
    ports = [Port(name=name, type="tensor(float)", shape=[1, 8]) for name in ("x", "y")]
    names = [f"v{index}" for index in range(BLOCKS)]
    plan = Plan(
        inputs=[ports[0]],
        outputs=[ports[1]],
        gives={"y": names[-1]},
        blocks={"tiny": Block(file="tiny.onnx", inputs=[ports[0]], outputs=[ports[1]], nodes=1)},
        steps=[
            Run(run="tiny", reads={"x": one}, makes={"y": other})
            for one, other in zip(["x", *names], names, strict=False)
        ],
    )
    program, backend = program_of(Split(plan, {"tiny": ir.from_proto(onnx.parser.parse_model(TINY))}, 0))
    given = {"x": backend.value(x)}
    session = session_of(model_of(TINY))
    held = values_of(*(x.copy() for _ in range(BLOCKS + 1)))
    bindings = [bound_to(session, {"x": one}, {"y": other}) for one, other in pairwise(held)]

    def by_hand() -> None:
        for binding in bindings:
            session.run_with_iobinding(binding)

    return {"by hand": by_hand, "host": lambda: program.run(given)}, BLOCKS


def counted() -> tuple[dict[str, Call], int]:
    """A loop of a known number of turns."""
    x, n = np.ones((1, WIDTH), np.float32), np.array(TURNS, np.int64)
    session = session_of(model_of(STEP))
    one, other = values_of(x.copy(), x.copy())
    there, back = bound_to(session, {"s": one}, {"after": other}), bound_to(session, {"s": other}, {"after": one})

    def by_hand() -> None:
        for turn in range(TURNS):
            session.run_with_iobinding(back if turn % 2 else there)

    return {"by hand": by_hand, **_loops(COUNTED, x, n)}, TURNS


def asked() -> tuple[dict[str, Call], int]:
    """A loop whose step says whether there is another turn."""
    x, n = np.ones((1, WIDTH), np.float32), np.array(TURNS - 1, np.int64)
    session = session_of(model_of(ASKING_STEP))
    one, other, number, last, more = values_of(x.copy(), x.copy(), np.array(0, np.int64), n, np.array(True))
    fixed = {"i": number, "last": last}
    there = bound_to(session, {"s": one, **fixed}, {"after": other, "more": more})
    back = bound_to(session, {"s": other, **fixed}, {"after": one, "more": more})
    counter, truth = number.numpy(), more.numpy()

    def by_hand() -> None:
        turn, going = 0, True
        while going:
            counter[()] = turn
            session.run_with_iobinding(back if turn % 2 else there)
            going = bool(truth)
            turn += 1

    return {"by hand": by_hand, **_loops(ASKED, x, n)}, TURNS


def _loops(text: str, x: np.ndarray[Any, Any], n: np.ndarray[Any, Any]) -> dict[str, Call]:
    """The host's loop, and ONNX Runtime's own."""
    content = model_of(text)
    whole = session_of(content)
    program, backend = program_of(split(ir.from_proto(onnx.load_model_from_string(content))))
    given = {"x": backend.value(x), "n": backend.value(n)}
    ours = backend.array(program.run(given)["y"])
    np.testing.assert_array_equal(ours, whole.run(None, {"x": x, "n": n})[0])
    return {"host": lambda: program.run(given), "ONNX Loop": lambda: whole.run(None, {"x": x, "n": n})}


CASES: dict[str, Callable[[], tuple[dict[str, Call], int]]] = {
    "a block call, in a chain of 64": chain,
    "a turn of a loop of 100 turns": counted,
    "a turn of a loop that asks a condition": asked,
}


def main() -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, each case")
    parser.add_argument("--loads", type=int, default=5, help="how often sessions are made anew")
    options = parser.parse_args()
    rows, result = [], {}
    rng = np.random.default_rng(0)
    for name, make in CASES.items():
        samples: dict[str, Samples] = {}
        for load in range(options.loads):
            calls, count = make()
            for kind in calls:
                samples.setdefault(kind, Samples())
            time_block(
                [*calls.values()],
                [samples[kind] for kind in calls],
                load,
                rng,
                options.seconds / options.loads,
                10,
                lambda fraction, what: None,
                options.seconds,
            )
        by_hand = samples["by hand"]
        ratios = {
            clock: ratio_interval(getattr(samples["host"], clock), getattr(by_hand, clock), blocks=by_hand.blocks)
            for clock in ("cpu", "wall")
        }
        each = {kind: float(np.median(own.cpu)) / count * 1e6 for kind, own in samples.items()}
        ratio = ratios["cpu"]
        rows.append(
            [
                name,
                *(f"{each[kind]:.2f}" if kind in each else "" for kind in ("by hand", "host", "ONNX Loop")),
                f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
            ]
        )
        result[name] = {"cpu_us": each, "ratio": ratios, "rounds": len(by_hand.cpu), "bar": BAR}
    columns = ("by hand µs", "host µs", "ONNX Loop µs", "times by hand (95 %)")
    print_table(["", *((column, "right") for column in columns)], rows, "Processor time, ONNX Runtime, one thread")
    write_result("host_overhead", {"seconds": options.seconds, "loads": options.loads, "cases": result})


if __name__ == "__main__":
    main()
