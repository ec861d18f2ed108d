"""Other tools as commands, so that they are measured as whole processes like graphopt: ``peers.py TOOL IN OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.common import has

TOOLS = ("onnxruntime", "onnxscript", "onnxsim", "onnxslim", "copy")


def installed() -> list[str]:
    """The tools that can be run here (``copy``, onnx_ir's load and save, is no peer)."""
    return [tool for tool in TOOLS if tool != "copy" and has(tool)]


def command(tool: str, source: Path, out: Path) -> list[str]:
    """What to run so that ``tool`` reads ``source`` and writes ``out``, weights outside the file where it can."""
    return [sys.executable, "-m", "benchmarks.peers", tool, str(source), str(out)]


def _onnxruntime(source: str, out: str) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = out
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", f"{Path(out).name}.data"
    )
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _onnxscript(source: str, out: str) -> None:
    import onnx_ir as ir
    import onnxscript.optimizer

    model = ir.load(source)
    onnxscript.optimizer.optimize_ir(model)
    ir.save(model, out, external_data=f"{Path(out).name}.data")


def _onnxsim(source: str, out: str) -> None:
    import onnx
    import onnxsim

    simplified, _ = onnxsim.simplify(source)
    onnx.save(simplified, out, save_as_external_data=True, location=f"{Path(out).name}.data")


def _onnxslim(source: str, out: str) -> None:
    import onnxslim

    onnxslim.slim(source, out, save_as_external_data=True)


def _copy(source: str, out: str) -> None:
    import onnx_ir as ir

    ir.save(ir.load(source), out, external_data=f"{Path(out).name}.data")


def main() -> None:
    """Run one tool."""
    tool, source, out = sys.argv[1:]
    {
        "onnxruntime": _onnxruntime,
        "onnxscript": _onnxscript,
        "onnxsim": _onnxsim,
        "onnxslim": _onnxslim,
        "copy": _copy,
    }[tool](source, out)


if __name__ == "__main__":
    main()
