"""Shape inference: what onnx can tell of the values in a model, filled in without touching a weight."""

from __future__ import annotations

import logging
from collections.abc import Callable

import onnx_ir as ir

logger = logging.getLogger(__name__)


def infer_shapes(model: ir.Model) -> None:
    """Fill in types and shapes that onnx can infer. What it cannot stays as it is: partial knowledge is success."""
    from onnx_ir.passes.common import ShapeInferencePass

    noisy = logging.getLogger("onnx_ir.passes.common.shape_inference")
    level = noisy.level
    noisy.setLevel(logging.CRITICAL)
    try:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    except Exception as error:  # a model that onnx's inference cannot digest is still a model
        logger.info("shape inference stopped: %s", error)
    finally:
        noisy.setLevel(level)


ShapeInference = Callable[[ir.Model], None]
