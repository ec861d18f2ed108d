"""LSTM and GRU layers while torch.export traces: one operator each, of which only the shapes are computed.

They become one node of the ONNX model. torch computes their shapes by running the layer step by step, which fixes the
number of steps at the example's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def shapes_of_recurrent_layers() -> Iterator[None]:
    """`lstm` and `gru` give tensors of the right shapes, of any content, to what traces."""
    import torch
    from torch._decomp import decomposition_table

    lstm, gru = torch.ops.aten.lstm.input, torch.ops.aten.gru.input
    with _replaced(lstm, _lstm, decomposition_table), _replaced(gru, _gru, decomposition_table):
        yield


@contextmanager
def _replaced(operator: Any, shapes: Any, table: dict[Any, Any]) -> Iterator[None]:
    """Where Python computes ``operator``, of fake tensors alone, ``shapes`` does: in its kernels and in ``table``."""
    kernels, entry = dict(operator.py_kernels), table[operator]
    try:
        operator.py_kernels.update(dict.fromkeys(kernels, shapes))
        operator._dispatch_cache.clear()
        table[operator] = shapes
        yield
    finally:
        operator.py_kernels.update(kernels)
        operator._dispatch_cache.clear()
        table[operator] = entry


def _lstm(inputs: Any, states: Any, *rest: Any) -> tuple[Any, Any, Any]:
    """Arguments and results as `torch.ops.aten.lstm.input` has them: output, hidden state, cell state."""
    hidden, cell = states
    return _output(inputs, hidden, *rest), hidden.new_empty(hidden.shape), cell.new_empty(cell.shape)


def _gru(inputs: Any, hidden: Any, *rest: Any) -> tuple[Any, Any]:
    """Arguments and results as `torch.ops.aten.gru.input` has them: output, hidden state."""
    return _output(inputs, hidden, *rest), hidden.new_empty(hidden.shape)


def _output(
    inputs: Any,
    hidden: Any,
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """The output of all steps: the two leading axes of ``inputs``, and the hidden state of each direction."""
    return inputs.new_empty([*inputs.shape[:2], hidden.shape[2] * (2 if bidirectional else 1)])
