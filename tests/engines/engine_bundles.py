"""Bundles whose engines are played: the fake runtime runs each block's ONNX file in place of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.bundles import read_bundle, split, write_bundle
from graphopt.bundles.plan import Block, Port
from graphopt.bundles.split import Split
from graphopt.engines.bundles.blocks import sources_of
from graphopt.engines.bundles.watching import watch_blocks
from graphopt.runtime.session import create_session, numpy_dtype
from tests.engines import fake_runtime
from tests.engines.fake_runtime import write_engine

_MEMBERS = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64", "tensor(bool)": "BOOL"}
LARGEST = 64
HANDS_ON = "it hands values on"


def play(
    model: onnx.ModelProto | ir.Model,
    folder: Path,
    *feeds: Mapping[str, Any],
    stays: Callable[[str], bool] = lambda name: False,
    rtx: bool = False,
    **plan: Any,
) -> tuple[Path, Path]:
    """Split a network and write it as a bundle of ONNX files and as one of played engines.

    Args:
        model: The network.
        folder: Where both go.
        feeds: Inputs that show how many axes inputs of blocks have that do not tell.
        stays: Which blocks stay ONNX files in the second, beside those with types that engines do not take.
        rtx: Whose engines.
        plan: More for `write_engine`.

    Returns:
        The two bundles.
    """
    parts = split(model if isinstance(model, ir.Model) else ir.from_proto(model))
    plain = folder / "net"
    version = write_bundle(parts, plain)
    sessions = {
        name: create_session(version / block.file, optimized=False) for name, block in parts.plan.blocks.items()
    }
    calls = watch_blocks(parts.plan, sessions.__getitem__, feeds)
    engines = []
    for name, block in parts.plan.blocks.items():
        seen = list(calls[name].shapes) if name in calls else []
        if parts.plan.samples:  # there may be as many as there like
            seen += [[tuple(size + 1 for size in shape) for shape in shapes] for shapes in seen]
        inputs = {
            port.name: _sizes(port, [shapes[index] for shapes in seen]) for index, port in enumerate(block.inputs)
        }
        made = _made(sessions[name], block, seen[0]) if len(seen) == 1 else {}
        ports = [*block.inputs, *block.outputs]
        if sources_of(parts.blocks[name]) is not None:
            block.reason = HANDS_ON
            continue
        if stays(name) or None in inputs.values() or any(port.type not in _MEMBERS for port in ports):
            block.reason = "played to stay"
            continue
        key = str(folder / name)
        fake_runtime.FUNCTIONS[key] = _function(sessions[name], block.inputs)
        path = write_engine(
            folder / f"{name}.engine",
            key,
            {port.name: (_MEMBERS[port.type], inputs[port.name] or []) for port in block.inputs},
            {port.name: (_MEMBERS[port.type], _sizes(port, made.get(port.name, [(-1,)]))) for port in block.outputs},
            [{input: _profile(sizes) for input, sizes in inputs.items() if sizes is not None and -1 in sizes}],
            magic="vtrt" if rtx else "ftrt",
            **plan,
        )
        block.file, block.backend = path.name, "tensorrt-rtx" if rtx else "tensorrt"
        engines.append(path)
    kept = {name: made for name, made in parts.blocks.items() if parts.plan.blocks[name].backend is None}
    written = folder / "net.engines"
    write_bundle(Split(parts.plan, kept, parts.shared), written, files=engines)
    assert read_bundle(written)[1] == parts.plan
    return plain, written


def _function(session: Any, inputs: Sequence[Port]) -> Callable[..., Sequence[np.ndarray]]:
    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        return session.run(None, dict(zip((port.name for port in inputs), arrays, strict=True)))

    return run


def _made(session: Any, block: Block, shapes: Sequence[Sequence[int]]) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of what a block makes of inputs of these shapes."""
    inputs = zip(block.inputs, shapes, strict=True)
    feeds = {port.name: np.zeros(shape, numpy_dtype(port.type)) for port, shape in inputs}
    outputs = session.run([port.name for port in block.outputs], feeds)
    return {port.name: [np.shape(output)] for port, output in zip(block.outputs, outputs, strict=True)}


def _sizes(port: Port, seen: Sequence[Sequence[int]]) -> list[int] | None:
    """As it is declared; else as it was seen, where it has as many axes each time."""
    if port.shape is not None:
        return [size if isinstance(size, int) else -1 for size in port.shape]
    if len({len(shape) for shape in seen}) != 1:
        return None
    return [sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*seen, strict=True)]


def _profile(sizes: Sequence[int]) -> list[list[int]]:
    return [[low if size < 0 else size for size in sizes] for low in (0, 4, LARGEST)]
