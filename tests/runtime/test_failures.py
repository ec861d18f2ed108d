"""What is told of a failing run."""

from __future__ import annotations

from graphopt.runtime.failures import innermost

RUNNING = "Non-zero status code returned while running {} node. Name:'{}' Status Message: "


def test_the_innermost_node_is_told() -> None:
    text = RUNNING.format("If", "outer") + RUNNING.format("LSTM", "a/LSTM") + "Input X must have 3 dimensions only"
    assert innermost(text) == "LSTM 'a/LSTM': Input X must have 3 dimensions only"
    assert innermost(RUNNING.format("Add", "") + "what") == "Add: what"


def test_source_lines_are_left_out() -> None:
    source = "/onnxruntime_src/core/squeeze.h:53 static Shape Op::Compute(const Fn(int)&) const "
    assert (
        innermost(RUNNING.format("Squeeze", "s") + source + "size == 1 was false") == "Squeeze 's': size == 1 was false"
    )


def test_what_is_no_failing_node_stays() -> None:
    assert innermost("out of memory") == "out of memory"
    assert innermost("Load model from a b.onnx failed:Fatal error: my:Op is unknown") == "Fatal error: my:Op is unknown"
