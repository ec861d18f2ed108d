"""Registers plugins with NVIDIA's Python layer and asks them what a build asks: ``python walk.py REQUEST.json``.

Runs in a process of its own: the bindings find their libraries by LD_LIBRARY_PATH, and a registry lives as long as the
process. The layer, the registry, the creators and the plugin objects are NVIDIA's. Ours is the part of the builder:
expressions of sizes (`Expression`), which here can be evaluated.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


class Expression:
    """A size as the builder makes it: a number, or a function of the sizes that run time knows."""

    def __init__(self, value: Any, text: str) -> None:
        self.value = value
        self.text = text

    def is_constant(self) -> bool:
        return isinstance(self.value, int)

    def get_constant_value(self) -> int:
        assert self.is_constant()
        return int(self.value)

    def at(self, sizes: dict[str, int]) -> int:
        return self.value if isinstance(self.value, int) else int(self.value(sizes))


class Builder:
    """What the layer calculates with."""

    def __init__(self, trt: Any) -> None:
        kinds = trt.DimensionOperation
        self.operations: dict[Any, Callable[[int, int], int]] = {
            kinds.SUM: lambda a, b: a + b,
            kinds.SUB: lambda a, b: a - b,
            kinds.PROD: lambda a, b: a * b,
            kinds.FLOOR_DIV: lambda a, b: a // b,
            kinds.CEIL_DIV: lambda a, b: -(-a // b),
            kinds.MAX: max,
            kinds.MIN: min,
            kinds.EQUAL: lambda a, b: int(a == b),
            kinds.LESS: lambda a, b: int(a < b),
        }
        self.alive = True

    def constant(self, value: int) -> Expression:
        assert self.alive, "an expression is made with the builder of another node"
        return Expression(int(value), str(value))

    def operation(self, kind: Any, left: Expression, right: Expression) -> Expression:
        assert self.alive, "an expression is made with the builder of another node"
        apply = self.operations[kind]
        if left.is_constant() and right.is_constant():
            return self.constant(apply(left.value, right.value))
        return Expression(
            lambda sizes: apply(left.at(sizes), right.at(sizes)), f"({left.text} {kind.name} {right.text})"
        )


def stand_in(trt: Any, layer: Any) -> None:
    """Let the layer take our expressions for the library's, which only its builder can make."""

    class Kind(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, Expression)

    class DimensionExpression(metaclass=Kind):
        pass

    class Scalar:
        def __init__(self, size: Any) -> None:
            self.kind = type(size).__name__
            self.expr = size._expr

    trt.IDimensionExpr = DimensionExpression
    trt.DimsExprs = lambda count: [None] * count
    tensor: Any = importlib.import_module(f"{trt.__name__}.plugin._tensor")
    tensor.SymExprImpl = Scalar


class Slots:
    """Where the layer puts scalars."""

    def __init__(self) -> None:
        self.nbSymExprs = 0
        self.values: dict[int, Any] = {}

    def __setitem__(self, place: int, value: Any) -> None:
        self.values[place] = value


class Launch:
    """Where the layer puts the grid."""


DATA_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int8": "INT8", "int32": "INT32"}
FIELD_TYPES = {"int32": "INT32", "float32": "FLOAT32"}


def fields(trt: Any, attributes: dict[str, list[Any]], held: list[Any]) -> Any:
    """Attributes as the ONNX parser hands them on: int32 and float32, whatever the plugin declares."""
    for name, values in attributes.items():
        dtype = "int32" if all(isinstance(value, int) for value in values) else "float32"
        array = np.array(values, dtype)
        # A field points into the array and does not keep it.
        held += [array, trt.PluginField(name, array, getattr(trt.PluginFieldType, FIELD_TYPES[dtype]))]
    return trt.PluginFieldCollection(held[1::2])


def description(trt: Any, dtype: str, shape: list[int | str], sizes: dict[str, int]) -> Any:
    """A tensor as the builder describes it, with the range of its shapes."""
    made, inner = trt.DynamicPluginTensorDesc(), trt.PluginTensorDesc()
    inner.type = getattr(trt.DataType, DATA_TYPES[dtype])
    inner.dims = trt.Dims([size if isinstance(size, int) else -1 for size in shape])
    inner.format = trt.TensorFormat.LINEAR
    made.desc = inner
    made.min = made.opt = made.max = trt.Dims([size if isinstance(size, int) else sizes[size] for size in shape])
    return made


def walk(trt: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Everything that a build asks of one node."""
    name, namespace, inputs, runs = case["name"], case["namespace"], case["inputs"], case["runs"]
    creator = trt.get_plugin_registry().get_creator(name, "1", namespace)
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    held: list[Any] = []
    made = fields(trt, case["attributes"], held)
    plugin = creator.create_plugin(name, namespace, made, trt.TensorRTPhase.BUILD, request)
    data_types = [getattr(trt.DataType, DATA_TYPES[dtype]) for dtype in case["types"]]
    names = {getattr(trt.DataType, spelt): dtype for dtype, spelt in DATA_TYPES.items()}
    found = plugin.get_output_data_types(data_types, [len(shape) for shape in inputs])
    answer: dict[str, Any] = {"outputs": plugin.get_num_outputs(), "types": [names[kind] for kind in found]}

    builder = Builder(trt)
    sizes = {
        size: Expression(lambda at, size=size: at[size], size)
        for shape in inputs
        for size in shape
        if isinstance(size, str)
    }
    given = [[sizes[size] if isinstance(size, str) else builder.constant(size) for size in shape] for shape in inputs]
    shapes = plugin.get_output_shapes(given, [], builder)
    answer["shapes"] = [[[size.at(run) for size in shape] for shape in shapes] for run in runs]

    everything = [*zip(case["types"], inputs, strict=True)]
    for dtype, shape in zip(answer["types"], shapes, strict=True):
        everything.append((dtype, [size.value if size.is_constant() else size.text for size in shape]))
    texts = {text: 1 for _, shape in everything for text in shape if isinstance(text, str)}
    tensors = [description(trt, dtype, shape, texts) for dtype, shape in everything]
    combinations = plugin.get_supported_format_combinations(tensors, len(inputs))
    count = len(tensors)
    assert len(combinations) % count == 0
    answer["combinations"] = []
    for start in range(0, len(combinations), count):
        chosen = combinations[start : start + count]
        candidates = [
            description(trt, names[one.type], shape, texts) for one, (_, shape) in zip(chosen, everything, strict=True)
        ]
        plugin.configure_plugin(candidates[: len(inputs)], candidates[len(inputs) :])
        answer["combinations"].append(
            {
                "types": [names[one.type] for one in chosen],
                "formats": sorted({one.format.name for one in chosen}),
                "tactics": sorted(plugin.get_valid_tactics()),
            }
        )

    plugin.configure_plugin(tensors[: len(inputs)], tensors[len(inputs) :])
    answer["tactics"] = {}
    for tactic in plugin.get_valid_tactics():
        # The builder times tactics on clones.
        clone = plugin.clone()
        clone.set_tactic(tactic)
        launch, slots = Launch(), Slots()
        clone.get_launch_params(None, tensors, len(inputs), launch, slots, builder)
        kernel, code = clone.get_kernel(
            [one.desc for one in tensors[: len(inputs)]], [one.desc for one in tensors[len(inputs) :]]
        )
        order = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
        scalars = [slots.values[place] for place in range(slots.nbSymExprs)]
        answer["tactics"][tactic] = {
            "kernel": kernel if isinstance(kernel, str) else kernel.decode(),
            "ptx": hashlib.sha256(code).hexdigest(),
            "kinds": sorted({scalar.kind for scalar in scalars}),
            "launches": [[getattr(launch, part).expr.at(run) for part in order] for run in runs],
            "scalars": [[scalar.expr.at(run) for scalar in scalars] for run in runs],
        }
    builder.alive = False  # what is asked of the next node must not use it
    return answer


def main(path: str) -> int:
    request = json.loads(Path(path).read_text())
    trt = importlib.import_module("tensorrt_bindings")
    answer: dict[str, Any] = {"version": trt.__version__, "numpy": np.__version__}
    answer["python"] = ".".join(map(str, sys.version_info[:3]))
    from graphopt.engines.plugins import qdp
    from graphopt.errors import GraphoptError

    try:
        registry = trt.get_plugin_registry()
        answer["registry"] = type(registry).__name__
        if request["extra_folders"]:  # as if these lay in graphopt/plugins
            importlib.import_module("graphopt.plugins").__path__.extend(request["extra_folders"])
        answer["registered"] = qdp.register_modules(trt, request["modules"], request["architecture"])
        stand_in(trt, qdp.plugin_layer(trt))
        creators = {(one.name, one.plugin_version, one.plugin_namespace) for one in registry.all_creators}
        answer["creators"] = sorted(map(list, creators))
        answer["lists"] = qdp.reads_lists(trt)
        answer["cases"] = []
        for case in request["cases"]:
            try:
                answer["cases"].append(walk(trt, case))
            except GraphoptError as error:
                answer["cases"].append({"error": str(error), "kept": qdp.last_error()})
    except GraphoptError as error:
        answer["error"] = str(error)
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
        if request.get("raise"):
            raise
    Path(request["answer"]).write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
