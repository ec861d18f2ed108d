"""Seeded builders of test networks.

``RUNNABLE`` holds the small networks that ONNX Runtime's CPU runs, by name; ``OPAQUE`` those that it cannot
(an unknown op, arithmetic in bfloat16). ``many_small_nodes``, ``deep_chain`` and ``large_transformer`` are sized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from tests.models import control_flow, dtypes, nets
from tests.models.large_transformer import large_transformer
from tests.models.many_small_nodes import deep_chain, many_small_nodes

__all__ = ["OPAQUE", "RUNNABLE", "deep_chain", "draw_feeds", "large_transformer", "many_small_nodes"]

Builder = Callable[[], ir.Model]

RUNNABLE: Mapping[str, Builder] = {
    builder.__name__: builder
    for builder in (
        nets.mlp,
        nets.convnet,
        nets.transformer_block,
        nets.recurrent,
        nets.unet,
        nets.tied_embeddings,
        nets.shared_weights,
        nets.zero_dims,
        nets.opset_9,
        nets.overridable_weight,
        nets.layout_transposes,
        control_flow.if_on_input,
        control_flow.if_constant,
        control_flow.if_on_shape,
        control_flow.loop,
        control_flow.loop_constant_trips,
        control_flow.loop_sequence,
        control_flow.scan,
        control_flow.functions,
        control_flow.function_with_if,
        dtypes.qdq_int8,
        dtypes.float16,
        dtypes.bfloat16_weights,
        dtypes.float8_weights,
        dtypes.int4_weights,
        dtypes.contrib_ops,
    )
}

OPAQUE: Mapping[str, Builder] = {builder.__name__: builder for builder in (dtypes.unknown_op, dtypes.bfloat16_compute)}


def draw_feeds(model: ir.Model, *, size: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded inputs: floats from N(0, 1), integers from 1 to 4, booleans by coin; symbolic dims get ``size``."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        assert value.shape is not None and value.dtype is not None and value.name is not None
        shape = [dim if isinstance(dim, int) else size for dim in value.shape]
        drawn: np.ndarray
        if value.dtype == ir.DataType.BOOL:
            drawn = rng.integers(0, 2, shape)
        elif value.dtype.is_integer():
            drawn = rng.integers(1, 5, shape)
        else:
            drawn = rng.standard_normal(shape)
        feeds[value.name] = np.asarray(drawn).astype(value.dtype.numpy())
    return feeds
