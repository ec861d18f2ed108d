"""What the parent asks of the child that builds an engine, and how the child refuses."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


class BuildFailed(Exception):
    """The library refused. The text is one line for the user; the hint says what to do.

    Args:
        what: What is wrong.
        hint: What to do about it.
        bad_input: Whether the user's options are at fault, not the model or the library.
        refused: Every node that the parser refused: node, op_type, reason.
    """

    def __init__(
        self,
        what: str,
        hint: str | None = None,
        *,
        bad_input: bool = False,
        refused: list[dict[str, str]] | None = None,
    ) -> None:
        super().__init__(what)
        self.hint = hint
        self.bad_input = bad_input
        self.refused = refused or []


@dataclass(frozen=True)
class Request:
    """One build.

    Attributes:
        title: What messages call the library.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        modules: Import names of the library, first choice first.
        oldest: The oldest version that is supported.
        model: The ONNX file to parse; external data lies beside it.
        runtime_operators: Types of ONNX Runtime's own operators in it; the parser's errors do not tell domains.
        profiles: One a profile: input → min, opt, max, its shapes.
        values: Input that decides shapes → min, opt, max, its values.
        options: `BuildOptions` as JSON.
        plugins: The modules whose ops are registered, and the architecture that their kernels are compiled for.
        engine: Where the engine is written.
        log: Where the library's log is written, a line each.
        progress: Where the phases are written, a JSON object a line.
        answer: Where the answer is written.
    """

    title: str
    backend: str
    modules: list[str]
    oldest: list[int]
    model: str
    engine: str
    log: str
    progress: str
    answer: str
    options: dict[str, Any]
    runtime_operators: list[str] = field(default_factory=list)
    profiles: list[dict[str, dict[str, list[int]]]] = field(default_factory=list)
    values: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    plugins: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Request:
        return cls(**json.loads(path.read_text()))
