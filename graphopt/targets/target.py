"""A target answers two questions: does it run this node, and is this set of nodes cheaper than that one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx_ir as ir
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from graphopt import graphs
from graphopt.errors import BadInput

BUILT_IN = Path(__file__).parent


class CostProfile(BaseModel):
    """What work costs on one machine, in microseconds. Defaults ship with a target; ``profile-target`` measures.

    Attributes:
        node: Launching one operator.
        gigaflops: Billions of multiply-adds a second in a matrix product.
        gigabytes: Billions of bytes a second through an elementwise operator, and of weights.
        scattered: Billions of bytes a second through an operator that moves single elements: Gather on the last axis.
        control_flow: Entering a body of If, Loop or Scan.
        block: Running a block of a bundle, beside what is in it, where other work has gone through the caches before.
        free: Operators that cost nothing, since the backend removes them or returns a view.
        dimension: The size that stands for an axis whose size is not known.
    """

    model_config = ConfigDict(extra="forbid")

    node: float = 3.0
    gigaflops: float = 40.0
    gigabytes: float = 8.0
    scattered: float = 2.0
    control_flow: float = 2.0
    block: float = 30.0
    free: tuple[str, ...] = ("Identity", "Constant", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
    dimension: int = 64


def type_name(dtype: ir.DataType) -> str:
    """An element type as target files spell it: ``float32``, ``float16``, ``int8``, ``uint4``, ``float8e4m3fn``."""
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def _known_type(name: str) -> str:
    if name not in map(type_name, ir.DataType):
        raise ValueError(f"there is no element type '{name}' (write int8, uint4, float8e4m3fn, ...)")
    return name


class Quantised(BaseModel):
    """Which codes a backend takes in QuantizeLinear and DequantizeLinear.

    Attributes:
        types: The element types of codes.
        zero_points: Whether a zero point may be other than 0.
    """

    model_config = ConfigDict(extra="forbid")

    types: frozenset[Annotated[str, AfterValidator(_known_type)]]
    zero_points: bool = True

    def refuses(self, codes: ir.DataType, *, zero_points: bool) -> str | None:
        """Why codes of a type, with zero points other than 0 or without, are not taken; None where they are."""
        if type_name(codes) not in self.types:
            return f"{type_name(codes)} codes, only {', '.join(sorted(self.types))}"
        if zero_points and not self.zero_points:
            return "zero points other than 0"
        return None


class ControlFlow(BaseModel):
    """What a backend's If and Loop take.

    Attributes:
        unequal_ranks: Whether the branches of an If may give values of different rank.
        growing_state: Whether what a Loop carries may have another shape after a turn.
        in_blocks: Whether a block of a bundle may hold some, where to cut there costs more than it saves.
    """

    model_config = ConfigDict(extra="forbid")

    unequal_ranks: bool = True
    growing_state: bool = True
    in_blocks: bool = False


class Target(BaseModel):
    """A backend and what it can do.

    Attributes:
        name: As given to ``--target``.
        backend: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``.
        version: The backend version that the facts below were read from.
        opset: The highest opset that a pass may raise a model to.
        ir_version: The highest ONNX IR version that a pass may raise a model to.
        unsupported: Standard operators that the backend does not run.
        extensions: Domain -> operators beyond the standard that it runs.
        quantised: The codes that it takes; None where it takes all that the standard has.
        control_flow: What its If and Loop take.
        costs: Its cost profile.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    backend: str
    version: str
    opset: int
    ir_version: int
    unsupported: frozenset[str] = frozenset()
    extensions: dict[str, frozenset[str]] = Field(default_factory=dict)
    quantised: Quantised | None = None
    control_flow: ControlFlow = ControlFlow()
    costs: CostProfile = CostProfile()

    def supports(self, node: ir.Node, opset: int) -> bool:
        """Whether the backend runs a node that a pass wants to write into a model of this opset."""
        return self.refuses(node, opset) is None

    def refuses(self, node: ir.Node, opset: int) -> str | None:
        """Why the backend does not run a node in a model of this opset; None where it does."""
        if node.domain != "":
            runs = node.op_type in self.extensions.get(node.domain, frozenset())
        else:
            runs = node.op_type not in self.unsupported and _introduced(node.op_type) <= opset
        if not runs:
            return f"{self.name} does not run {node.op_type} (opset {opset})"
        if node.domain == "" and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            codes = (node.outputs if node.op_type == "QuantizeLinear" else node.inputs)[0]
            if codes is not None and codes.dtype is not None:
                return self.refuses_codes(codes.dtype, zero_points=_has_zero_points(node))
        return None

    def refuses_codes(self, codes: ir.DataType, *, zero_points: bool) -> str | None:
        """Why the backend does not take codes of a type, with zero points other than 0 or without; None where it does.

        For passes that quantise: what can be known before any code is computed.
        """
        reason = None if self.quantised is None else self.quantised.refuses(codes, zero_points=zero_points)
        return None if reason is None else f"{self.name} takes no {reason}"

    def cost(self, nodes: Iterable[ir.Node]) -> float:
        """Estimated microseconds to run nodes one after the other, constants not counted."""
        return sum(self._cost(node) for node in nodes)

    def cheaper(self, new: Sequence[ir.Node], old: Sequence[ir.Node], *, by: float = 0.0) -> bool:
        """Whether new nodes cost less than the old ones, or as much with fewer nodes.

        Args:
            new: What takes the place of
            old: these.
            by: The fraction of the old cost that must be saved at least.
        """
        before, after = self.cost(old), self.cost(new)
        if by > 0:
            return after <= before * (1 - by)
        return after < before or (after == before and len(new) < len(old))

    def _cost(self, node: ir.Node) -> float:
        if node.op_type in self._free and node.domain == "":
            return 0.0
        moved = sum(self.bytes_of(v) for v in node.outputs) + sum(
            self.bytes_of(v) for v in node.inputs if v is not None and not _is_constant(v)
        )
        rate = self.costs.scattered if _moves_elements(node) else self.costs.gigabytes
        total = self.costs.node + moved / (rate * 1e3)
        if node.op_type in _PRODUCTS:
            # With few rows it takes longer to read the weights than to multiply by them.
            weights = sum(self.bytes_of(v) for v in node.inputs if v is not None and _is_constant(v))
            arithmetic = self._multiply_adds(node) / (self.costs.gigaflops * 1e3)
            total += max(arithmetic, weights / (self.costs.gigabytes * 1e3))
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                # One branch of an If runs, not both: half of what stands there is a fair guess.
                total += self.costs.control_flow + 0.5 * self.cost(attribute.as_graph())
        return total

    @cached_property
    def _free(self) -> frozenset[str]:
        return frozenset(self.costs.free)

    def _elements(self, value: ir.Value) -> int:
        if value.shape is None:
            return self.costs.dimension**2
        count = 1
        for axis in value.shape:
            count *= axis if isinstance(axis, int) else self.costs.dimension
        return count

    def bytes_of(self, value: ir.Value) -> float:
        """Estimated bytes of a value."""
        known = value.dtype is not None and value.dtype != ir.DataType.STRING  # how long strings are nobody says
        return self._elements(value) * (value.dtype.itemsize if known and value.dtype is not None else 4)

    def _multiply_adds(self, node: ir.Node) -> float:
        """Outputs times the length of the reduction, which the last-but-one axis of the weight gives."""
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        reduction = self.costs.dimension
        if weight is not None and weight.shape is not None and weight.shape.is_static() and len(weight.shape) > 1:
            dims = weight.shape.numpy()
            if node.op_type == "Conv":
                reduction = 1
                for axis in dims[1:]:
                    reduction *= axis
            else:
                flipped = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
                reduction = dims[-1] if flipped else dims[-2]
        return float(self._elements(node.outputs[0]) * reduction)


def _moves_elements(node: ir.Node) -> bool:
    """Whether a node looks every element up by itself, and has no longer stretch to copy."""
    if node.op_type != "Gather" or node.domain != "":
        return node.op_type == "GatherElements" and node.domain == ""
    data = node.inputs[0]
    rank = None if data is None or data.shape is None else len(data.shape)
    axis = node.attributes.get_int("axis", 0)
    return axis == -1 or (rank is not None and axis == rank - 1)


def _is_constant(value: ir.Value) -> bool:
    """Whether a value is a weight: in a graph, in a Constant node, or new and on its way into a graph."""
    return value.is_initializer() or value.const_value is not None or graphs.is_constant(value)


def _has_zero_points(node: ir.Node) -> bool:
    """Whether the zero point of a Quantize- or DequantizeLinear is another than 0, or computed: then it may be."""
    zeros = node.inputs[2] if len(node.inputs) > 2 else None
    if zeros is None:
        return False
    tensor = None if zeros.is_graph_input() else zeros.const_value or graphs.constant_tensor(zeros)
    # As float64: not every narrow type compares with 0.
    return tensor is None or bool(np.any(tensor.numpy().astype(np.float64) != 0))


_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "FusedMatMul"})


def _introduced(op_type: str) -> int:
    """The first opset that has an operator; a very high number for one the standard does not know."""
    version = _INTRODUCED.get(op_type)
    if version is None:
        import onnx.defs

        versions = [
            s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == op_type and not s.domain
        ]
        version = _INTRODUCED[op_type] = min(versions, default=10**6)
    return version


_INTRODUCED: dict[str, int] = {"Identity": 1, "Constant": 1}


def target_names() -> list[str]:
    """The targets that ship with graphopt."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def load_target(name: str) -> Target:
    """A target by its name, or from a YAML file that ``profile-target`` wrote.

    Raises:
        BadInput: No such target or file, or the file does not describe one.
    """
    path = BUILT_IN / f"{name}.yaml"
    if not path.exists():
        path = Path(name)
        if path.suffix not in (".yaml", ".yml") or not path.exists():
            raise BadInput(f"no target '{name}'", hint=f"one of: {', '.join(target_names())}, or a .yaml file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Target.model_validate(data)
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError, OSError) as error:
        raise BadInput(f"not a target description: {_first_problem(error)}", where=str(path)) from error


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg'].removeprefix('Value error, ')}"
    return str(error).splitlines()[0]
