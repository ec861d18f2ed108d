"""What operators of the standard domain take and give, as the onnx package declares it, and those that runtimes add."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import onnx

# ONNX Runtime and TensorRT register ops of their own in the standard domain, and their optimisers write them into
# files; the onnx package does not know these.
RUNTIME_OPS = frozenset(
    {
        "Affine",
        "ATen",
        "Crop",
        "DynamicSlice",
        "GRUUnit",
        "GivenTensorFill",
        "ImageScaler",
        "LayerNormalization",
        "MemcpyFromHost",
        "MemcpyToHost",
        "ParametricSoftplus",
        "Scale",
        "ScaledTanh",
        "SimplifiedLayerNormalization",
    }
)


def is_runtime_op(op_type: str) -> bool:
    """Whether an op that onnx does not know in the standard domain belongs to a runtime (ORT, TensorRT plugins)."""
    return op_type in RUNTIME_OPS or op_type.endswith("_TRT") or op_type.startswith("TRT_") or "Plugin" in op_type


@dataclass(frozen=True, slots=True)
class Signature:
    """What a standard op takes: counts, required input positions, attributes and their types."""

    required: tuple[int, ...]
    max_inputs: int
    min_outputs: int
    max_outputs: int
    needed_attributes: tuple[str, ...]
    attribute_types: dict[str, int]


@lru_cache(maxsize=4096)
def signature(op_type: str, version: int) -> Signature | None:
    """The signature of a standard op in an opset, or None where the opset has no such op."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    options = onnx.defs.OpSchema.FormalParameterOption
    required = [i for i, p in enumerate(schema.inputs) if p.option is options.Single]
    required += [i for i, p in enumerate(schema.inputs) if p.option is options.Variadic and p.min_arity > 0]
    return Signature(
        required=tuple(required),
        max_inputs=schema.max_input,
        min_outputs=schema.min_output,
        max_outputs=schema.max_output,
        needed_attributes=tuple(name for name, a in schema.attributes.items() if a.required),
        attribute_types={name: int(a.type.value) for name, a in schema.attributes.items()},  # type: ignore[attr-defined]
    )
