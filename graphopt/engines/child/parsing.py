"""The parser's part of a build, and what its refusals are called. Runs in the child."""

from __future__ import annotations

from typing import Any

from graphopt.engines.child.requests import BuildFailed, Request

# On a machine without a GPU every message may be followed by the library's own failed look for one.
NOISE = ("cudaError 35", "CUDA initialization failure", "catchCudaError")

_HINTS = {
    "MatMulInteger": "int8 for TensorRT is written with QuantizeLinear and DequantizeLinear pairs",
    "ConvInteger": "int8 for TensorRT is written with QuantizeLinear and DequantizeLinear pairs",
    "QLinearMatMul": "int8 for TensorRT is written with QuantizeLinear and DequantizeLinear pairs",
    "QLinearConv": "int8 for TensorRT is written with QuantizeLinear and DequantizeLinear pairs",
    "DynamicQuantizeLinear": "TensorRT quantises with fixed scales: QuantizeLinear and DequantizeLinear pairs",
    "Non-zero zero point": "quantise symmetrically: all zero points 0",
    "same input types": "types do not mix: insert Cast",
    "int32": "MatMul takes floating-point inputs: insert Cast",
}


def parse(trt: Any, network: Any, logger: Any, request: Request) -> Any:
    """Read the model into the network; returns the parser, which must outlive the build: it holds the weights.

    Raises:
        BuildFailed: The parser refuses the model; every node that it names is in ``refused``.
    """
    parser = trt.OnnxParser(network, logger)
    if hasattr(trt.OnnxParserFlag, "NATIVE_INSTANCENORM"):
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
    # From the file, not from bytes: the library maps what it wants, and this process holds no copy.
    if not parser.parse_from_file(request.model):
        raise _failure(parser, request, logger)
    return parser


def _failure(parser: Any, request: Request, logger: Any) -> BuildFailed:
    title = request.title
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    # Parsers name a node once for each level it fails at; the first is the one with the reason.
    first_of = {(error.node_name(), error.node_operator()): error for error in reversed(errors)}
    real = [error for error in reversed(first_of.values()) if _described(error)]
    if not real:
        return BuildFailed(f"{title} cannot read the model: {logger.last_error or 'no reason given'}")
    told = [_tell(error, request) for error in real]
    what, hint = told[0]
    name, others = real[0].node_name(), len(real) - 1
    more = f" (and {others} more node{'s' if others > 1 else ''})" if others else ""
    place = f"node {name!r}: " if name else ""
    refused = [
        {"node": error.node_name(), "op_type": error.node_operator(), "reason": reason, "hint": tip or ""}
        for error, (reason, tip) in zip(real, told, strict=True)
    ]
    return BuildFailed(f"{place}{what}{more}", hint, refused=refused)


def _described(error: Any) -> str:
    """What the parser says of an error, in one line, without the noise that may lie among it; empty: noise alone."""
    said = error.desc()
    if said in ("", "false"):
        return "false"
    return " ".join(" ".join(line for line in said.splitlines() if not any(noise in line for noise in NOISE)).split())


def _tell(error: Any, request: Request) -> tuple[str, str | None]:
    """Why a node was refused, and what to do about it."""
    operator, text = error.node_operator(), _described(error)
    hint = next((tip for key, tip in _HINTS.items() if key in (operator, text) or key in text), None)
    if operator in request.runtime_operators:
        hint = f"{operator} is ONNX Runtime's own: optimize with --target {request.backend}, which uses none of those"
    if "Plugin not found" in text:
        what = f"{request.title} has no operator {operator!r}"
        return what, hint or "a custom operator needs a plugin, or a function body of standard operators"
    if text in ("", "false"):
        return f"{request.title} does not support {operator}", hint
    text = text.removeprefix("Assertion failed: ").removeprefix("In node ")
    return f"{request.title} refuses {operator or 'the model'}: {text[:300]}", hint
