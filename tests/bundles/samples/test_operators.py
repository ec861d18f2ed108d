"""Every operator that has a rule: its results for many samples are those for one sample at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.bundles.samples.rules import RULES
from tests.bundles.samples.compare import Samples, uniform

INT = TensorProto.INT64
KINDS = {"f": TensorProto.FLOAT, "i": INT, "s": TensorProto.INT32, "b": TensorProto.BOOL}
SAMPLES = 5


@dataclass
class Case:
    """One operator on inputs that have samples (shapes) and on constants (arrays), in the order of its inputs.

    Attributes:
        least, most: Integer inputs that have samples are not below, and below.
        kinds: Of the inputs: float, int64 (i), int32 (s), bool.
        positive: Whether floats are above 1.
    """

    op: str
    inputs: Sequence[Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 18
    least: int = 0
    most: int = 3
    kinds: str = ""
    domain: str = ""
    positive: bool = False


def c(values: Any, kind: Any = np.int64) -> np.ndarray[Any, Any]:
    return np.array(values, kind)


def w(*shape: int) -> np.ndarray[Any, Any]:
    return uniform(shape, 7)


V = (1, 3, 4)
MAP = (1, 2, 6, 6)
CASES = [
    *(
        Case(op, [V])
        for op in ("Abs", "Neg", "Relu", "Sigmoid", "Tanh", "Exp", "Floor", "Identity", "Softplus", "Sign")
    ),
    Case("Cast", [V], {"to": INT}),
    Case("Clip", [V, w().reshape(()) * 0 - 1, w().reshape(()) * 0 + 1]),
    Case("Dropout", [V]),
    Case("IsNaN", [V]),
    *(
        Case("Add", shapes)
        for shapes in ([V, V], [V, w(4)], [V, w(3, 1)], [V, w(2, 1, 4)], [V, w(5, 1, 1, 1)], [V, ()], [(3, 1), V])
    ),
    *(
        Case("Mul", shapes)
        for shapes in ([V, (1, 4)], [(1, 4), V], [(4,), w(3, 4)], [(), w()], [(), (2, 3)], [(3, 1, 4), (1, 4)])
    ),
    Case("Where", [V, V, w(4)], kinds="bff"),
    Case("Where", [(1, 1), V, (4,)], kinds="bff"),
    Case("Max", [V, w(4), (1, 1, 4)]),
    Case("Mod", [(1, 4), (1, 4)], {"fmod": 1}),
    Case("Greater", [V, ()]),
    Case("PRelu", [V, w(4)]),
    Case("CastLike", [V, c([1])]),
    # sums, norms
    *(
        Case("ReduceSum", [V, c(axes)], {"keepdims": keep})
        for axes in ([0], [1], [-1], [0, 2], [0, 1, 2], [1, 2])
        for keep in (0, 1)
    ),
    *(
        Case(op, [V])
        for op in (
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceL1",
            "ReduceL2",
            "ReduceSumSquare",
            "ReduceLogSumExp",
        )
    ),
    Case("ReduceLogSum", [V], positive=True),
    Case("ReduceL2", [()], {"keepdims": 0}),
    Case("ReduceMean", [V], {"axes": [1], "keepdims": 0}, opset=13),
    Case("ReduceMean", [V], {"axes": [0, 1]}, opset=13),
    Case("ReduceMean", [V], opset=13),
    Case("ReduceSum", [V], opset=11),
    Case("ReduceSum", [V], {"noop_with_empty_axes": 1}),
    *(Case("Softmax", [V], {"axis": axis}, opset=opset) for axis in (0, 1, 2, -1) for opset in (11, 18)),
    Case("LogSoftmax", [V]),
    Case("Softmax", [V]),
    Case("Hardmax", [V]),
    *(Case("LayerNormalization", [V, w(*V[axis:])], {"axis": axis}) for axis in (0, 1, 2)),
    Case("LpNormalization", [V], {"axis": 1}),
    Case("LpNormalization", [V], {"axis": 0}),
    Case("MeanVarianceNormalization", [MAP]),
    Case("MeanVarianceNormalization", [MAP], {"axes": [2, 3]}),
    *(Case("ArgMax", [V], {"axis": axis, "keepdims": keep}) for axis in (0, 1, -1) for keep in (0, 1)),
    Case("ArgMin", [V]),
    *(Case("TopK", [V, c([1 if axis == 0 else 2])], {"axis": axis}, outputs=2) for axis in (0, 1, -1)),
    *(Case("CumSum", [V, c(axis)], {"reverse": axis % 2}) for axis in (0, 1, -1)),
    # products
    *(
        Case("MatMul", [left, right])
        for left, right in (
            ((1, 4), w(4, 2)),
            (V, w(4, 2)),
            (V, w(1, 4, 2)),
            (V, w(5, 4, 2)),
            ((4,), w(4, 2)),
            (w(2, 4), (4,)),
            ((4,), (4,)),
            (w(2, 3), V),
            (V, (1, 4, 2)),
            ((2, 1, 3, 4), (1, 4, 2)),
            ((1, 4), (1, 4, 2)),
            (w(1, 3), V),
            ((3, 1), w(1, 4)),
            (w(3, 4), (4, 1)),
            ((4,), (2, 4, 3)),
            ((2, 3, 4), (4,)),
            (w(4), (*V[:1], 4, 3)),
            (V, w(4)),
        )
    ),
    Case("Gemm", [(1, 4), w(4, 2), w(2)], {"alpha": 0.5, "beta": 2.0}),
    Case("Gemm", [(1, 4), w(2, 4), w(1, 2)], {"transB": 1}),
    Case("Gemm", [(4, 1), w(4, 2)], {"transA": 1}),
    Case("Gemm", [(1, 4), w(4, 2), (2,)]),
    Case("Gemm", [(1, 4), w(4, 2), (1, 2)]),
    Case("Gemm", [(1, 4), w(4, 2), ()]),
    Case("Gemm", [(3, 4), w(4, 2), w(2)], {"alpha": 0.5, "beta": 2.0}),
    Case("Gemm", [w(3, 4), (2, 4), (3, 1)], {"transB": 1, "beta": 0.5}),
    Case("Gemm", [(4, 3), (4, 2)], {"transA": 1}),
    Case("Einsum", [V, w(4, 2)], {"equation": "bij,jk->bik"}),
    Case("Einsum", [V, V], {"equation": "bij,bkj->ik"}),
    # maps
    Case("Conv", [MAP, w(3, 2, 3, 3), w(3)], {"pads": [1, 1, 1, 1]}),
    Case("ConvTranspose", [MAP, w(2, 3, 2, 2)]),
    Case("MaxPool", [MAP], {"kernel_shape": [2, 2]}),
    Case("AveragePool", [MAP], {"kernel_shape": [2, 2]}),
    Case("LpPool", [MAP], {"kernel_shape": [2, 2]}),
    Case("GlobalAveragePool", [MAP]),
    Case("GlobalMaxPool", [MAP]),
    Case("LRN", [MAP], {"size": 3}),
    Case("BatchNormalization", [MAP, w(2), w(2), w(2), np.abs(w(2))]),
    Case("InstanceNormalization", [MAP, w(2), w(2)]),
    Case("DepthToSpace", [(1, 4, 3, 3)], {"blocksize": 2}),
    Case("SpaceToDepth", [MAP], {"blocksize": 2}),
    Case("Resize", [MAP, None, c([1, 1, 2, 2], np.float32)]),
    Case("Resize", [MAP, None, None, c([1, 2, 3, 9])], {"mode": "linear"}),
    Case("Resize", [MAP, None, None, c([3, 9])], {"axes": [2, 3]}),
    Case("GridSample", [MAP, (1, 3, 3, 2)]),
    # movement
    Case("Transpose", [V]),
    Case("Transpose", [V], {"perm": [1, 0, 2]}),
    *(
        Case("Reshape", [V, c(target)])
        for target in (
            [1, 12],
            [-1, 12],
            [0, -1],
            [1, 4, 3],
            [12],
            [-1],
            [3, 4],
            [4, 1, 3],
            [*[0, 2, 0, -1][:2], 6],
            [2, 6],
        )
    ),
    Case("Reshape", [V, c([1, 3, 2, 2])], {"allowzero": 1}),
    Case("Reshape", [(1, 1), c([])]),
    *(Case("Flatten", [(1, 2, 3, 4)], {"axis": axis}) for axis in (0, 1, 2, 3, 4, -1)),
    *(Case("Squeeze", [(1, 1, 4), c(axes)]) for axes in ([0], [1], [0, 1], [-2])),
    Case("Squeeze", [(3, 1, 4), c([1])]),
    Case("Squeeze", [(1, 1, 4)]),
    Case("Squeeze", [(1, 1, 4)], {"axes": [1]}, opset=11),
    *(Case("Unsqueeze", [V, c(axes)]) for axes in ([0], [1], [0, -1], [3])),
    Case("Unsqueeze", [V], {"axes": [0, 2]}, opset=11),
    *(
        Case("Concat", inputs, {"axis": axis})
        for inputs, axis in (
            ([V, V], 0),
            ([V, V], 1),
            ([V, w(1, 2, 4)], 1),
            ([w(2, 3, 4), V], 0),
            ([V, w(1, 3, 4)], -1),
        )
    ),
    *(Case("Split", [(1, 4, 6), c([2, 2] if axis == 1 else [1, 5])], {"axis": axis}, outputs=2) for axis in (1, 2)),
    Case("Split", [(1, 4, 6), c([1])], {"axis": 0}),
    Case("Slice", [V, c([1]), c([3]), c([1])]),
    Case("Slice", [V, c([0, 0]), c([1, 2])]),
    Case("Slice", [V, c([0], np.int32), c([1], np.int32), c([0], np.int32)]),
    Case("Slice", [V, c([-1]), c([-9]), c([-1]), c([-1])]),
    *(
        Case("Gather", [V, indices], {"axis": axis})
        for axis, indices in ((1, c(0)), (1, c([2, -1])), (2, c([[0, 1], [2, 3]])), (0, c([0, 0])), (0, c(0)))
    ),
    *(
        Case("Gather", [w(5, 3, 2), shape], {"axis": axis}, kinds="fi")
        for axis in (0, 1)
        for shape in ((1, 4), (), (2, 1), (2,))
    ),
    *(Case("Gather", [V, shape], {"axis": axis}, kinds="fi") for axis in (1, 2) for shape in ((1, 4), (), (2, 3))),
    Case("Gather", [(3, 2), (2,)], {"axis": 0}, kinds="fi"),
    *(Case("GatherElements", [V, V], {"axis": axis}, kinds="fi") for axis in (1, 2)),
    Case("GatherElements", [w(3, 2), (2, 2)], {"axis": 0}, kinds="fi", most=2),
    Case("GatherElements", [V, V], {"axis": 0}, kinds="fi", most=1),
    *(Case("ScatterElements", [V, V, V], {"axis": axis, "reduction": "add"}, kinds="fif") for axis in (1, 2)),
    Case("GatherND", [w(3, 4), (5, 1)], kinds="fi"),
    Case("GatherND", [V, (1, 2, 1)], {"batch_dims": 1}, kinds="fi"),
    Case("GatherND", [(3, 4), (2, 2)], kinds="fi"),
    Case("ScatterND", [(4, 2), (2, 1), (2, 2)], {"reduction": "add"}, kinds="fif"),
    Case("ScatterND", [w(4, 2), c([[1], [-1]]), (2, 2)]),
    Case("ScatterND", [V, c([[0, 1]]), (1, 4)]),
    Case("Expand", [V, c([1, 3, 4])]),
    Case("Expand", [V, c([2, 1, 1])]),
    Case("Expand", [V, c([2, 1, 1, 1])]),
    Case("Expand", [(), c([2, 2])]),
    Case("Tile", [V, c([1, 2, 1])]),
    Case("Tile", [V, c([2, 1, 1])]),
    Case("Pad", [V, c([0, 1, 0, 0, 0, 2])]),
    Case("Pad", [V, c([1, 0, 0, 0, 0, 2]), w().reshape(())]),
    Case("Pad", [V, c([1, 2]), None, c([-1])], {"mode": "reflect"}),
    *(
        Case("OneHot", [shape, c(3), c([0, 1], np.float32)], {"axis": axis}, kinds="iff")
        for shape in ((1, 4), (4,))
        for axis in (0, 1, -1)
    ),
    Case("Trilu", [(1, 3, 4)]),
    Case("Trilu", [(3, 1), c(-1)], {"upper": 0}),
    Case("ReverseSequence", [(4, 1, 2), (1,)], {"batch_axis": 1, "time_axis": 0}, kinds="fi", least=1),
    Case("Shape", [V]),
    Case("Size", [V]),
    # quantized
    Case("QuantizeLinear", [V, c(0.1, np.float32), c(3, np.uint8)]),
    Case("DequantizeLinear", [(1, 2, 3), c(0.1, np.float32), c(3, np.int32)], kinds="s"),
    Case("QuantizeLinear", [V, c([0.1, 0.2, 0.3], np.float32)], {"axis": 1}),
    Case("MultiHeadAttention", [(1, 3, 4), (1, 5, 4), w(1, 5, 4)], {"num_heads": 2}, domain="com.microsoft"),
    # recurrent
    *(
        Case(op, [(3, 1, 4), w(1, gates * 2, 4), w(1, gates * 2, 2), w(1, gates * 4)], {"hidden_size": 2}, outputs=2)
        for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
    ),
    Case(
        "LSTM",
        [(3, 1, 4), w(1, 8, 4), w(1, 8, 2), None, (1,), (1, 1, 2), w(1, 1, 2)],
        {"hidden_size": 2},
        outputs=3,
        kinds="ffffsff",
        least=1,
    ),
]


class Net:
    """A network of operators that do not wait for each other, and inputs of it for some samples."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.infos: list[onnx.ValueInfoProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.outputs: list[str] = []
        self.feeds: dict[str, np.ndarray[Any, Any]] = {}

    def constant(self, array: np.ndarray[Any, Any]) -> str:
        self.constants.append(numpy_helper.from_array(array, f"c{len(self.constants)}"))
        return self.constants[-1].name

    def add(self, case: Case, *, stacked: bool) -> None:
        """An operator, and inputs for it.

        Args:
            case: The operator.
            stacked: Whether what it reads has no batch axis: inputs have one in front, which is taken away first.
        """
        names = []
        for index, given in enumerate(case.inputs):
            if isinstance(given, tuple):
                names.append(self.input(case, index, given, stacked=stacked))
            else:
                names.append("" if given is None else self.constant(given))
        outputs = [f"{case.op}{len(self.outputs) + index}" for index in range(case.outputs)]
        self.nodes.append(helper.make_node(case.op, names, outputs, domain=case.domain, **case.attributes))
        self.outputs += outputs

    def input(self, case: Case, index: int, shape: tuple[int, ...], *, stacked: bool) -> str:
        name = f"x{len(self.infos)}"
        kind = case.kinds[index] if case.kinds else "f"
        declared = [1, *shape] if stacked else list(shape)
        self.infos.append(helper.make_tensor_value_info(name, KINDS[kind], declared))
        many = [*declared]
        many[declared.index(1)] = SAMPLES
        floats = uniform(tuple(many), len(self.infos))
        whole = np.random.default_rng(index).integers(case.least, case.most, many)
        numbers = np.abs(floats) + 1 if case.positive else floats
        self.feeds[name] = {"f": numbers, "i": whole, "s": whole.astype(np.int32), "b": floats > 0}[kind]
        if not stacked:
            return name
        if self.opset >= 13:
            self.nodes.append(helper.make_node("Squeeze", [name, self.constant(c([0]))], [f"{name}/s"]))
        else:
            self.nodes.append(helper.make_node("Squeeze", [name], [f"{name}/s"], axes=[0]))
        return f"{name}/s"

    def model(self) -> onnx.ModelProto:
        outputs = [onnx.ValueInfoProto(name=name) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "g", self.infos, outputs, self.constants)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)],
            ir_version=10,
        )
        inferred = onnx.shape_inference.infer_shapes(model)
        for old, new in zip(model.graph.output, inferred.graph.output, strict=True):
            old.type.CopyFrom(new.type)
            if not old.type.HasField("tensor_type"):  # of an operator that onnx does not know
                old.type.tensor_type.elem_type = TensorProto.FLOAT
        return model


GROUPS: dict[tuple[str, int], list[Case]] = {}
for _case in CASES:
    GROUPS.setdefault((_case.op, _case.opset), []).append(_case)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"{group[0]}-{group[1]}")
def test_operator(group: tuple[str, int]) -> None:
    """With the samples along an axis of what it reads, where they have one, and with none."""
    net = Net(group[1])
    for case in GROUPS[group]:
        net.add(case, stacked=True)
        if all(1 in given for given in case.inputs if isinstance(given, tuple)):
            net.add(case, stacked=False)
    Samples(net.model()).check(net.feeds)


def test_every_rule_is_tried() -> None:
    alike = {RULES["", "Relu"], RULES["", "Add"], RULES["", "Conv"], RULES["", "LayerNormalization"]}
    untried = {key for key, made in RULES.items() if key[1] not in {case.op for case in CASES} and made not in alike}
    assert not untried
