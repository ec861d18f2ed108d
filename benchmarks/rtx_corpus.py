"""Small models given to TensorRT-RTX itself, and what was predicted of each beforehand.

No GPU is needed: the wheels build engines without one. Each worker process parses and builds many models, one after
the other; where the library takes the worker down, that costs one model.
"""

from __future__ import annotations

import faulthandler
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from benchmarks.pool import Died, Pool
from graphopt.engines.coverage import Coverage, predict

TARGET = "tensorrt-rtx"
# On a machine without a GPU any message may be followed by the library's own failed look for one.
NOISE = ("cudaError 35", "CUDA initialization failure", "catchCudaError")

Feeds = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """A model to build, and values of its inputs: their shapes and what they decide go into the profile."""

    name: str
    model: onnx.ModelProto
    feeds: Feeds


@dataclass(frozen=True)
class Answer:
    """What the library made of a model.

    Attributes:
        stage: "built", or where it was refused: "parse", "build"; "crash".
        said: Its first error.
        op_type: The operator that the error is about; "" where it is an input or a weight, or where it does not say.
        names: The nodes that the error names, as the parser calls them; of more than one, any may be at fault.
    """

    stage: str
    said: str = ""
    op_type: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """A prediction beside the answer.

    ``kind``: "built" and "refused" are right. "missed": predicted to build, and refused. "false": predicted to be
    refused, and built. "wrong node": refused for another node than was predicted.
    """

    name: str
    kind: str
    stage: str
    said: str
    predicted: str


RIGHT = ("built", "refused")
WRONG = ("missed", "false", "wrong node")


# -- the library ------------------------------------------------------------------------------------------------------


@cache
def _library() -> tuple[Any, Any, Any]:
    """The module, a builder, its log; once a process. The parent of workers must not call this."""
    import tensorrt_rtx_bindings as trt

    errors = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in errors and not any(noise in message for noise in NOISE):
                self.said.append(" ".join(message.split())[:600])

    logger = Logger()
    return trt, trt.Builder(logger), logger


def attempt(item: Item) -> Answer:
    """Parse and build one model, its functions inlined."""
    trt, builder, logger = _library()
    logger.said.clear()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
    if not parser.parse(item.model.SerializeToString(), None):
        return _parse_answer(item.model, [parser.get_error(index) for index in range(parser.num_errors)])
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    if _fill(profile, [network.get_input(index) for index in range(network.num_inputs)], item.feeds):
        config.add_optimization_profile(profile)
    logger.said.clear()
    if builder.build_serialized_network(network, config) is not None:
        return Answer("built")
    said = logger.said[0] if logger.said else ""
    return Answer(
        "build", said, "", tuple(dict.fromkeys(re.findall(r"node_of_[\w.]+|\(Quantized constant \([^)]+", said)))
    )


def _fill(profile: Any, tensors: Sequence[Any], feeds: Feeds) -> bool:
    """Put shapes and values into a profile; whether there was anything to put in."""
    used = False
    for tensor in tensors:
        value = np.asarray(feeds.get(tensor.name, ()))
        dynamic = any(axis < 0 for axis in tensor.shape)
        if dynamic:
            profile.set_shape(tensor.name, *[value.shape] * 3)
        if tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, *[[int(element) for element in value.reshape(-1)]] * 3)
        used = used or dynamic or tensor.is_shape_tensor
    return used


def _parse_answer(model: onnx.ModelProto, errors: Sequence[Any]) -> Answer:
    error = errors[0]
    said, op_type = " ".join(error.desc().split())[:600], error.node_operator()
    if not op_type and error.func() not in ("importInput", "importInitializers", "importInitializer"):
        # Of some errors only the importer's function is known.
        op_type = {"convMultiInput": "Conv"}.get(error.func()) or re.sub("^(import|check)", "", error.func())
    names: tuple[str, ...] = ()
    if 0 <= error.node() < len(model.graph.node):
        node = model.graph.node[error.node()]
        if node.op_type == op_type:  # else it is a node of a body, and the number is of that
            names = (node.name or f"node_of_{node.output[0]}",)
    return Answer("parse", said, op_type if "importInitializers" not in said else "", names)


# -- judging ----------------------------------------------------------------------------------------------------------


def judge(item: Item, answer: Answer, coverage: Coverage) -> Judged:
    """Whether what was predicted is what came, and of the right node."""
    built = answer.stage == "built"
    if built or coverage.ok:
        kind = {(True, True): "built", (True, False): "false", (False, True): "missed"}[built, coverage.ok]
    else:
        kind = "refused" if _named(item.model, answer, coverage) else "wrong node"
    predicted = "" if coverage.ok else str(coverage.refused[0])
    return Judged(item.name, kind, answer.stage, answer.said, predicted)


def _named(model: onnx.ModelProto, answer: Answer, coverage: Coverage) -> bool:
    if answer.stage == "crash":
        return True  # it says nothing
    if answer.stage == "parse":
        return any(
            (refusal.op_type == answer.op_type and (not answer.names or refusal.node in answer.names))
            # The parser names a node of a body where what is wrong is how the body is called.
            or (refusal.op_type in ("If", "Loop", "Scan") and not answer.names and answer.op_type != "")
            for refusal in coverage.refused
        )
    constants = [name.split("(")[-1] for name in answer.names if "Quantized" in name]
    if constants:
        return any(repr(constants[0]) in refusal.reason for refusal in coverage.refused)
    if not answer.names:
        return len(model.graph.node) == 1 or any(refusal.stage == "build" for refusal in coverage.refused)
    # Layers are called after their node, some with something behind it.
    named = any(name.startswith(refusal.node) for refusal in coverage.refused for name in answer.names)
    return named or len(model.graph.node) == 1


def run(items: Sequence[Item | None], *, workers: int = 2) -> Iterator[Judged]:
    """Build and judge all models that are there, in worker processes; in the order they are done."""
    chosen = [item for item in items if item is not None]

    def task(index: int, _: Path) -> Judged:
        faulthandler.disable()  # where it is on: crashes are what this looks for
        item = chosen[index]
        return judge(item, attempt(item), _predict(item))

    for index, result in Pool(task, len(chosen), workers=workers, timeout=120.0).results():
        item = chosen[index]
        if isinstance(result, Died) and result.kind == "exception":
            raise RuntimeError(f"{item.name}: {result.detail}")
        if isinstance(result, Died):
            yield judge(item, Answer("crash", result.detail), _predict(item))
        else:
            yield result


def _predict(item: Item) -> Coverage:
    sizes = {
        axis.dim_param: size
        for value in item.model.graph.input
        if isinstance(array := item.feeds.get(value.name), np.ndarray)
        for axis, size in zip(value.type.tensor_type.shape.dim, array.shape, strict=False)
        if axis.dim_param
    }
    return predict(ir.from_proto(item.model), TARGET, sizes=sizes)


def summarise(judged: Sequence[Judged]) -> dict[str, Any]:
    """Counts of each kind and stage, and everything that was not predicted rightly."""
    kinds, stages = Counter(one.kind for one in judged), Counter(one.stage for one in judged)
    return {
        "models": len(judged),
        **{kind: kinds[kind] for kind in (*RIGHT, *WRONG)},
        "stages": {stage: stages[stage] for stage in ("built", "parse", "build", "crash")},
        "not_right": [asdict(one) for one in sorted(judged, key=lambda one: one.name) if one.kind in WRONG],
    }


# -- the corpus, and what can be made of it ---------------------------------------------------------------------------


def items(cases: Sequence[Any], variant: str) -> list[Item | None]:
    """The cases of ONNX's node corpus in one variant; None for those that it cannot be made of."""
    return [make_item(case, variant) for case in cases]


def make_item(case: Any, variant: str) -> Item | None:
    """One case in one variant."""
    values = dict(zip((value.name for value in case.model.graph.input), case.data_sets[0][0], strict=True))
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    if not VARIANTS[variant](model, values):
        return None
    feeds = {
        name: onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
        for name, value in values.items()
        if value is not None
    }
    return Item(str(case.name), _inlined(model), feeds)


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    from graphopt.inlining import inline_all

    if not model.functions:
        return model
    made = ir.from_proto(model)
    inline_all(made)
    return ir.to_proto(made)


def _as_it_is(model: onnx.ModelProto, values: Feeds) -> bool:
    return True


def _constants(model: onnx.ModelProto, values: Feeds) -> bool:
    """All inputs but the first become constants, as weights, axes and sizes are in real models."""
    held = {initializer.name for initializer in model.graph.initializer}
    rest = [value for value in model.graph.input if value.name not in held][1:]
    chosen = [value for value in rest if isinstance(values.get(value.name), (np.ndarray, onnx.TensorProto))]
    for value in chosen:
        array = values[value.name]
        tensor = array if isinstance(array, onnx.TensorProto) else onnx.numpy_helper.from_array(array)
        if tensor.data_type != value.type.tensor_type.elem_type:
            return False
        made = model.graph.initializer.add()
        made.CopyFrom(tensor)
        made.name = value.name
        model.graph.input.remove(value)
    return bool(chosen)


def _symbolic(model: onnx.ModelProto, values: Feeds) -> bool:
    """Every axis of every input gets a name of its own; the profile has the sizes that it had."""
    found = False
    for value in model.graph.input:
        if value.type.HasField("tensor_type"):
            for number, axis in enumerate(value.type.tensor_type.shape.dim):
                if axis.HasField("dim_value"):
                    axis.dim_param = f"{value.name}_{number}"
                    found = True
    return found


def _symbolic_constants(model: onnx.ModelProto, values: Feeds) -> bool:
    return _constants(model, values) and _symbolic(model, values)


def _retyped(to: int) -> Callable[[onnx.ModelProto, Feeds], bool]:
    """float32 becomes another type, wherever that makes a model that ONNX's checker takes."""

    def change(model: onnx.ModelProto, values: Feeds) -> bool:
        graph = model.graph
        changed = [value for value in graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        if not changed or any(a.type == onnx.AttributeProto.GRAPH or a.name in ("to", "dtype") for a in attributes):
            return False
        for value in changed:
            value.type.tensor_type.elem_type = to
        for tensor in [*graph.initializer, *(a.t for a in attributes if a.type == onnx.AttributeProto.TENSOR)]:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                _retype(tensor, to)
        del graph.value_info[:]
        for value in graph.output:
            value.type.Clear()
        try:
            inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
            del inferred.graph.value_info[:]
            onnx.checker.check_model(inferred, full_check=True)
        except Exception:  # the operator does not have the type, or its shape cannot be inferred
            return False
        model.CopyFrom(inferred)
        return True

    return change


def _retype(tensor: onnx.TensorProto, to: int) -> None:
    with np.errstate(all="ignore"):
        array = onnx.numpy_helper.to_array(tensor).astype(np.float64).astype(onnx.helper.tensor_dtype_to_np_dtype(to))
    tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, to, array.shape, array.flatten().tolist()))


VARIANTS: Mapping[str, Callable[[onnx.ModelProto, Feeds], bool]] = {
    "as it is": _as_it_is,
    "parameters constant": _constants,
    "all axes symbolic": _symbolic,
    "both": _symbolic_constants,
    "float16": _retyped(onnx.TensorProto.FLOAT16),
    "bfloat16": _retyped(onnx.TensorProto.BFLOAT16),
    "float64": _retyped(onnx.TensorProto.DOUBLE),
    "int64": _retyped(onnx.TensorProto.INT64),
    "int32": _retyped(onnx.TensorProto.INT32),
    "int8": _retyped(onnx.TensorProto.INT8),
    "uint8": _retyped(onnx.TensorProto.UINT8),
    "bool": _retyped(onnx.TensorProto.BOOL),
}
