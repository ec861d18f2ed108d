"""silero-vad's network, 25 Ifs as it is published, as a bundle: the same results, no If in a block, and how fast.

    python -m benchmarks.silero [--seconds S] [--audio S]

60 s of seeded sound-like input go through in chunks, the state carried on, at both sample rates: every probability and
every state of the bundle has to be the original's. Timed are whole passes over that sound, and beside the original the
variants without Ifs that its authors wrote by hand and ship with it. One process, one thread, interleaved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import graphopt
from benchmarks.common import print_table, silero, work_folder, write_result
from graphopt import graphs
from graphopt.benchmarking import Ratio, ratio_interval
from graphopt.benchmarking.timing import Samples, time_block
from graphopt.bundles import BundleRunner, read_bundle
from graphopt.bundles.plan import walk
from graphopt.bundles.split import SPLIT
from graphopt.files import load_model
from graphopt.runtime.session import create_session, run

ORIGINAL, SAFE, BUNDLE = "original", "recipe safe", "bundle"
CHUNK, CONTEXT = {8000: 256, 16000: 512}, {8000: 32, 16000: 64}
BY_HAND = {"by hand, both rates": "silero_vad_op18_ifless.onnx", "by hand, 16 kHz": "silero_vad_openvino_16k.onnx"}
TIMED_CHUNKS = 50

Feeds = dict[str, Any]


def sound(rate: int, seconds: float) -> np.ndarray[Any, Any]:
    """Sound-like: tones whose pitch wanders and that come and go, over noise; float32[samples], within ±1."""
    rng = np.random.default_rng(rate)
    count = int(rate * seconds)
    time = np.arange(count) / rate
    pitch = 120 + 60 * np.sin(2 * np.pi * 0.3 * time) + np.cumsum(rng.standard_normal(count)) * 0.01
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    tones = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 12))
    loud = np.clip(np.sin(2 * np.pi * 0.17 * time) + 0.3 * np.sin(2 * np.pi * 3.1 * time), 0, None)
    made = 0.2 * loud * tones + 0.01 * rng.standard_normal(count)
    result: np.ndarray[Any, Any] = np.clip(made, -1, 1).astype(np.float32)
    return result


def chunks(rate: int, seconds: float) -> Iterator[np.ndarray[Any, Any]]:
    """float32[1, context + chunk]: each chunk after the end of the one before it, as the package feeds the network."""
    size, before = CHUNK[rate], CONTEXT[rate]
    samples = np.concatenate([np.zeros(before, np.float32), sound(rate, seconds)])
    for start in range(0, len(samples) - size - before + 1, size):
        yield samples[None, start : start + size + before]


def feeds_of(names: list[str], chunk: np.ndarray[Any, Any], state: np.ndarray[Any, Any], rate: int) -> Feeds:
    every = {"input": chunk, "state": state, "sr": np.array(rate, np.int64)}
    return {name: every[name] for name in names}


def listen(call: Callable[[Feeds], Mapping[str, Any]], names: list[str], rate: int, seconds: float) -> list[Any]:
    """The probability and the state after every chunk."""
    state = np.zeros((2, 1, 128), np.float32)
    heard = []
    for chunk in chunks(rate, seconds):
        found = call(feeds_of(names, chunk, state, rate))
        state = np.array(found["stateN"])
        heard.append((np.array(found["output"]), state))
    return heard


def compare(original: Path, bundle: Path, rate: int, seconds: float) -> dict[str, Any]:
    """How many chunks there are, and on how many the bundle gives the same bits; the runtime's optimizations off."""
    session = create_session(original, optimized=False, threads=1)
    runner = BundleRunner(bundle, threads=1, optimized=False)
    names = ["input", "state", "sr"]
    theirs = listen(lambda feeds: run(session, feeds), names, rate, seconds)
    ours = listen(runner.run, names, rate, seconds)
    same, apart = 0, 0.0
    for one, other in zip(theirs, ours, strict=True):
        same += all(map(np.array_equal, one, other))
        apart = max(apart, *(float(np.max(np.abs(a - b))) for a, b in zip(one, other, strict=True)))
    said = [float(probability[0, 0]) for probability, _ in theirs]
    return {"chunks": len(theirs), "same_bits": same, "max_abs": apart, "probabilities": [min(said), max(said)]}


def listening(runner: Any, rate: int) -> Callable[[], Any]:
    """A pass over the first chunks, the state carried on in arrays that are bound once, as a loop over sound would."""
    heard = [*chunks(rate, TIMED_CHUNKS * CHUNK[rate] / rate)]
    chunk, state = np.zeros_like(heard[0]), np.zeros((2, 1, 128), np.float32)
    second = runner.outputs[1].name
    call = runner.bind(feeds_of([spec.name for spec in runner.inputs], chunk, state, rate))

    def once() -> Any:
        state[:] = 0
        for part in heard:
            chunk[:] = part
            found = call()
            state[:] = found[second] if isinstance(found, dict) else found[1]
        return state

    return once


def main() -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, each sample rate")
    parser.add_argument("--audio", type=float, default=60.0, help="seconds of sound that results are compared on")
    parser.add_argument("--loads", type=int, default=8, help="how often networks are loaded anew")
    options = parser.parse_args()
    original = silero()
    if original is None:
        raise SystemExit("silero-vad is not installed")
    result: dict[str, Any] = {"audio_seconds": options.audio, "rates": {}}
    rows = []
    with work_folder() as folder:
        bundle, safe = folder / "silero.bundle", folder / "silero.safe.onnx"
        # A target that branches nowhere: on onnxruntime the choice of the rate would stay in the one block.
        graphopt.optimize(original, bundle, recipe=["static"], target="onnx")
        graphopt.optimize(original, safe)
        version, plan = read_bundle(bundle)
        blocks = [load_model(version / block.file) for block in plan.blocks.values()]
        result |= {
            "ifs_before": _ifs(load_model(original)),
            "ifs_in_blocks": sum(map(_ifs, blocks)),
            "blocks": len(blocks),
            "steps": sum(1 for _ in walk(plan.steps)),
        }
        for rate in CHUNK:
            networks = {ORIGINAL: original, SAFE: safe, BUNDLE: bundle}
            networks |= {name: original.parent / file for name, file in BY_HAND.items()}
            if rate != 16000:
                networks.pop("by hand, 16 kHz")
            timed = _time({name: path for name, path in networks.items() if path.exists()}, rate, options)
            found = {"compared": compare(original, bundle, rate, options.audio), "timed": timed}
            result["rates"][str(rate)] = found
            for name, one in timed.items():
                rows.append(
                    [
                        f"{rate // 1000} kHz, {name}",
                        f"{one['wall_us']:.1f}",
                        f"{one['cpu_us']:.1f}",
                        *("" if name == ORIGINAL else _told(one[key]) for key in ("speedup", "cpu_speedup")),
                    ]
                )
            same = found["compared"]
            print(f"{rate} Hz: the same bits on {same['same_bits']} of {same['chunks']} chunks")
    columns = ("wall µs", "CPU µs", "times as fast (95 %)", "by CPU time (95 %)")
    print_table(["a chunk", *((column, "right") for column in columns)], rows, "ONNX Runtime, CPU, one thread")
    write_result("silero", result)


def _told(ratio: Ratio) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _ifs(model: Any) -> int:
    return sum(1 for node in graphs.all_nodes(model) if node.op_type in SPLIT)


def _time(networks: Mapping[str, Path], rate: int, options: argparse.Namespace) -> dict[str, Any]:
    samples = {name: Samples() for name in networks}
    rng = np.random.default_rng(rate)
    for load in range(options.loads):
        runners = {name: graphopt.load(path, threads=1) for name, path in networks.items()}
        calls = [listening(runner, rate) for runner in runners.values()]
        ends = {name: np.array(call()) for name, call in zip(networks, calls, strict=True)}
        apart = {name: float(np.abs(end - ends[ORIGINAL]).max()) for name, end in ends.items()}
        if max(apart[SAFE], apart[BUNDLE]) > 1e-4:
            raise SystemExit(f"the state in the end differs at {rate} Hz: {apart}")
        own = [*samples.values()]
        share = options.seconds / options.loads
        time_block(calls, own, load, rng, share, 4, lambda fraction, what: None, options.seconds)
    first = samples[ORIGINAL]
    return {
        name: {
            "wall_us": float(np.median(one.wall)) / TIMED_CHUNKS * 1e6,
            "state_apart": apart[name],
            "cpu_us": float(np.median(one.cpu)) / TIMED_CHUNKS * 1e6,
            "speedup": ratio_interval(first.wall, one.wall, blocks=one.blocks),
            "cpu_speedup": ratio_interval(first.cpu, one.cpu, blocks=one.blocks),
        }
        for name, one in samples.items()
    }


if __name__ == "__main__":
    main()
