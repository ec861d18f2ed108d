"""Targets: what they support, what they call cheaper, their files, their measurement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import yaml

from graphopt.errors import BadInput, GraphoptError
from graphopt.shapes import infer_shapes
from graphopt.targets import CostProfile, Target, load_target, profiling, target_names
from tests.rewrite.toys import model, producer


def target(**costs: float) -> Target:
    return Target(name="t", backend="onnxruntime", version="1", opset=21, ir_version=10, costs=CostProfile(**costs))  # type: ignore[arg-type]


def cost(text: str, which: Target | None = None) -> float:
    made = model(text)
    infer_shapes(made)
    return (which or target()).cost(made.graph)


def test_the_shipped_targets_load() -> None:
    assert {"onnxruntime", "onnx", "tensorrt", "tensorrt-rtx"} <= set(target_names())
    for name in target_names():
        found = load_target(name)
        assert found.name == name
        assert found.costs.node > 0
        assert found.opset >= 17


# -- supports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "domain", "opset", "name", "runs"),
    [
        ("Add", "", 9, "onnxruntime", True),
        ("LayerNormalization", "", 16, "onnxruntime", False),
        ("LayerNormalization", "", 17, "onnxruntime", True),
        ("Gelu", "", 19, "onnx", False),
        ("Gelu", "", 20, "onnx", True),
        ("Gelu", "com.microsoft", 17, "onnxruntime", True),
        ("Gelu", "com.microsoft", 17, "tensorrt", False),
        ("NoSuchOp", "", 24, "onnxruntime", False),
        ("LinearClassifier", "", 24, "onnxruntime", False),  # that is ai.onnx.ml's
        ("Unique", "", 17, "tensorrt-rtx", False),
        ("Identity", "", 1, "onnx", True),
        ("Constant", "", 9, "onnx", True),
    ],
)
def test_supports(op: str, domain: str, opset: int, name: str, runs: bool) -> None:
    node = ir.Node(domain, op, [])
    assert load_target(name).supports(node, opset) is runs


def codes(dtype: ir.DataType, zeros: object = None, *, op: str = "DequantizeLinear") -> ir.Node:
    """A node that reads or writes codes of a type, with a constant zero point, one that is computed ("x"), or none."""
    narrow = ir.Value(name="q", type=ir.TensorType(dtype))
    wide = ir.Value(name="s", type=ir.TensorType(ir.DataType.FLOAT))
    inputs: list[ir.Value | None] = [narrow if op == "DequantizeLinear" else wide, wide]
    if zeros == "x":
        inputs.append(ir.Value(name="z", type=ir.TensorType(dtype)))
    elif zeros is not None:
        tensor = ir.tensor(np.asarray(zeros, dtype.numpy()), dtype=dtype)
        inputs.append(ir.Value(name="z", const_value=tensor))
    node = ir.Node("", op, inputs)
    node.outputs[0].type = ir.TensorType(dtype if op == "QuantizeLinear" else ir.DataType.FLOAT)
    return node


@pytest.mark.parametrize("op", ["QuantizeLinear", "DequantizeLinear"])
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(
    ("dtype", "zeros", "reason"),
    [
        ("INT8", None, None),
        ("INT8", [0, 0], None),
        ("INT8", [0, 1], "takes no zero points other than 0"),
        ("INT8", "x", "takes no zero points other than 0"),
        ("INT4", None, None),
        ("INT4", [0, 0], None),
        ("INT4", [0, -1], "takes no zero points other than 0"),
        ("FLOAT8E4M3FN", [0.0], None),
        ("UINT8", None, "takes no uint8 codes, only float4e2m1, float8e4m3fn, int4, int8"),
        ("UINT8", [128], "takes no uint8 codes"),
        ("UINT4", None, "takes no uint4 codes"),
        ("FLOAT8E5M2", None, "takes no float8e5m2 codes"),
    ],
)
def test_tensorrt_takes_some_codes_only(op: str, name: str, dtype: str, zeros: object, reason: str | None) -> None:
    found = load_target(name).refuses(codes(ir.DataType[dtype], zeros, op=op), 21)
    if reason is None:
        assert found is None
    else:
        assert found is not None and found.startswith(f"{name} {reason}")


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_other_targets_take_all_codes(name: str) -> None:
    for dtype, zeros in (("UINT8", [128]), ("UINT4", "x"), ("INT8", [3])):
        assert load_target(name).refuses(codes(ir.DataType[dtype], zeros), 21) is None


# Run in a process of its own: the library can abort. Prints which of its arguments, ONNX files, the parser takes.
PARSE = """
import sys
import tensorrt_rtx_bindings as trt
class Silent(trt.ILogger):
    def log(self, severity, text): pass
logger = Silent()
for path in sys.argv[1:]:
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    print(int(trt.OnnxParser(network, logger).parse_from_file(path)))
"""


@pytest.mark.slow
def test_what_is_said_of_tensorrt_rtx_is_what_its_parser_does(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    cases = [
        (dtype, zero)
        for dtype in ("INT8", "UINT8", "INT16", "UINT16", "INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT8E5M2")
        for zero in (None, 0, 1)
        if not (dtype.startswith("FLOAT") and zero)  # floats have no zero point
    ]
    paths = []
    for number, (name, zero) in enumerate(cases):
        dtype = int(ir.DataType[name])
        weights = [
            onnx.helper.make_tensor("w", dtype, [16, 8], [1] * 128),
            onnx.helper.make_tensor("s", onnx.TensorProto.FLOAT, [8], [0.5] * 8),
        ]
        if zero is not None:
            weights.append(onnx.helper.make_tensor("z", dtype, [8], [zero] * 8))
        nodes = [
            onnx.helper.make_node("DequantizeLinear", [w.name for w in weights], ["f"], axis=1),
            onnx.helper.make_node("MatMul", ["x", "f"], ["y"]),
        ]
        x, y = (onnx.helper.make_tensor_value_info(v, 1, [2, axis]) for v, axis in (("x", 16), ("y", 8)))
        graph = onnx.helper.make_graph(nodes, "g", [x], [y], weights)
        made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
        paths.append(tmp_path / f"{number}.onnx")
        onnx.save(made, paths[-1])
    done = subprocess.run([sys.executable, "-c", PARSE, *map(str, paths)], capture_output=True, text=True, check=False)
    taken = [line == "1" for line in done.stdout.split()]
    rtx = load_target("tensorrt-rtx")
    assert taken == [rtx.refuses_codes(ir.DataType[name], zero_points=bool(zero)) is None for name, zero in cases]


# -- costs -------------------------------------------------------------------------------------------------------------


def test_more_nodes_cost_more() -> None:
    one = cost("g (float[8,8] x) => (float[8,8] y) { y = Neg(x) }")
    assert 0 < one < cost("g (float[8,8] x) => (float[8,8] y) { a = Neg(x) y = Neg(a) }")


def test_larger_tensors_cost_more_and_weights_are_not_moved() -> None:
    small = cost("g (float[8,8] x) => (float[8,8] y) { y = Neg(x) }")
    assert small < cost("g (float[800,800] x) => (float[800,800] y) { y = Neg(x) }")
    with_input = cost("g (float[8] x, float[8] w) => (float[8] y) { y = Mul(x, w) }")
    assert cost("g (float[8] x) => (float[8] y) <float[8] w = {1,1,1,1,1,1,1,1}> { y = Mul(x, w) }") < with_input


def test_new_constants_are_weights_too() -> None:
    """A constant that no graph holds yet is not moved at run time either, nor is one in a Constant node."""
    t = target()
    shape = ir.Shape([800, 800])
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    data = ir.tensor(np.ones((800, 800), np.float32))
    new = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=shape, const_value=data)
    kept = ir.Node("", "Constant", [], [ir.AttrTensor("value", data)])
    kept.outputs[0].shape, kept.outputs[0].type = shape, x.type

    def mul(w: ir.Value) -> float:
        node = ir.Node("", "Mul", [x, w])
        node.outputs[0].shape, node.outputs[0].type = shape, x.type
        return t.cost([node])

    assert mul(new) == mul(kept.outputs[0]) == pytest.approx(mul(x) - 800 * 800 * 4 / 8e3)


def test_products_cost_by_their_multiply_adds() -> None:
    slow = target(gigaflops=1.0)
    short = cost("g (float[32,8] a, float[8,32] b) => (float[32,32] y) { y = MatMul(a, b) }", slow)
    long = cost("g (float[32,512] a, float[512,32] b) => (float[32,32] y) { y = MatMul(a, b) }", slow)
    assert long - short > 0.5 * (32 * 32 * (512 - 8)) / 1e3
    flipped = cost("g (float[32,512] a, float[32,512] b) => (float[32,32] y) { y = Gemm<transB=1>(a, b) }", slow)
    assert flipped == pytest.approx(long)
    conv = "g (float[1,{c},8,8] x, float[4,{c},3,3] w) => (float[1,4,6,6] y) {{ y = Conv(x, w) }}"
    assert cost(conv.format(c=16), slow) > 4 * cost(conv.format(c=1), slow)


def test_what_is_free_is_free() -> None:
    assert cost("g (float[8,8] x) => (float[8,8] y) { y = Identity(x) }") == 0
    assert cost("g (float[8,8] x) => (float[8,8] y) { y = com.microsoft.Identity(x) }") > 0
    view = "g (float[8,8] x) => (float[64] y) { s = Constant<value_ints=[-1]>() y = Reshape(x, s) }"
    assert cost(view) == 0
    assert cost(view, target(free=())) > 0


def test_branches_cost_half_of_what_stands_in_them() -> None:
    text = ("g (float[8] x, bool c) => (float[8] y) { y = If(c) <then_branch = t () => (float[8] u) { u = Neg(x) },"
            " else_branch = e () => (float[8] v) { v = Abs(x) }> }")  # fmt: skip
    assert cost(text, target(control_flow=100.0)) > cost(text, target(control_flow=1.0)) > 0


def test_single_elements_are_dear_to_move() -> None:
    """On the last axis a Gather looks each element up; before it there are rows to copy."""
    gather = "g (float[64,8] x, int64[{n}] i) => (float[{s}] y) {{ y = Gather<axis = {a}>(x, i) }}"
    last, first = (cost(gather.format(n=n, s=s, a=a)) for n, s, a in ((8, "64,8", 1), (64, "64,8", 0)))
    negative = cost(gather.format(n=8, s="64,8", a=-1))
    assert last == pytest.approx(negative)
    assert last - target().costs.node > 3 * (first - target().costs.node)


def test_few_rows_cost_the_reading_of_the_weights() -> None:
    product = "g (float[{rows},64] x) => (float[{rows},64] y) <float[64,64] w = {{{w}}}> {{ y = MatMul(x, w) }}"
    slow, fast = target(gigabytes=1.0), target(gigabytes=1000.0)
    text = product.format(rows=1, w=",".join(["1"] * 4096))
    assert cost(text, slow) - cost(text, fast) > 0.9 * 64 * 64 * 4 / 1e3


def test_cheaper_by_a_share() -> None:
    made = model("g (float[8,8] x) => (float[8,8] y) { a = Neg(x) b = Abs(a) y = Neg(b) }")
    infer_shapes(made)
    a, b, c = made.graph
    assert target().cheaper([a, b], [a, b, c], by=0.3)
    assert not target().cheaper([a, b], [a, b, c], by=0.4)
    assert not target().cheaper([a], [b], by=0.01)


def test_cheaper() -> None:
    made = model("g (float[8,8] x) => (float[8,8] y) { a = Neg(x) b = Abs(a) i = Identity(b) y = Identity(i) }")
    infer_shapes(made)
    a, b, i, y = made.graph
    t = target()
    assert t.cheaper([a], [a, b])
    assert not t.cheaper([a, b], [a])
    assert not t.cheaper([a], [a])
    assert t.cheaper([i], [i, y])  # as cheap, and one node less
    assert not t.cheaper([i, y], [i])
    assert t.cheaper([], [a])
    assert not t.cheaper([i], [])


def test_sizes_that_are_not_known_are_guessed() -> None:
    made = model("g (float[N,8] x) => (float[N,8] y) { y = Neg(x) }")
    infer_shapes(made)
    few, many = target(dimension=2), target(dimension=2000)
    assert few.cost(made.graph) < many.cost(made.graph)
    producer(made, "y").outputs[0].shape = None
    assert few.cost(made.graph) > 0


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_target_from_a_file(tmp_path: Path) -> None:
    written = CostProfile(node=1.5, gigaflops=10, gigabytes=3, control_flow=4)
    profiling.write_target(load_target("onnxruntime"), written, tmp_path / "here.yaml")
    found = load_target(str(tmp_path / "here.yaml"))
    assert found.costs == written
    assert found.extensions == load_target("onnxruntime").extensions
    first = (tmp_path / "here.yaml").read_bytes()
    profiling.write_target(found, written, tmp_path / "here.yaml")
    assert (tmp_path / "here.yaml").read_bytes() == first


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt-rtx"])
def test_a_target_that_is_written_is_the_same(name: str, tmp_path: Path) -> None:
    found = load_target(name)
    profiling.write_target(found, found.costs, tmp_path / "t.yaml")
    assert load_target(str(tmp_path / "t.yaml")) == found


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="cannot be written: No such file"):
        profiling.write_target(load_target("onnx"), CostProfile(), tmp_path / "nowhere" / "t.yaml")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tensort", None, "no target 'tensort' (one of: onnx, onnxruntime, tensorrt"),
        ("nowhere.yaml", None, "no target 'nowhere.yaml'"),
        ("t.yaml", "name: [", "not a target description: "),
        ("t.yaml", "name: t\n", "not a target description: backend: Field required"),
        ("t.yaml", "just text", "not a target description: "),
        ("t.yaml", {"costs": {"node": "much"}}, "costs.node: Input should be a valid number"),
        ("t.yaml", {"costs": {"nod": 1.0}}, "costs.nod: Extra inputs are not permitted"),
        (
            "t.yaml",
            {"quantised": {"types": ["int7"]}},
            "quantised.types.0: there is no element type 'int7' (",
        ),
        ("t.yaml", {"quantised": {"zero_points": True}}, "quantised.types: Field required"),
        ("t.yaml", {"colour": "blue"}, "colour: Extra inputs are not permitted"),
    ],
)
def test_mistakes_in_targets(
    name: str, content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(content, dict):
        base = {"name": "t", "backend": "onnxruntime", "version": "1", "opset": 21, "ir_version": 10}
        content = yaml.safe_dump({**base, **content})
    if content is not None:
        (tmp_path / name).write_text(str(content))
    with pytest.raises(BadInput) as caught:
        load_target(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_a_profile_follows_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invented times: of a machine of 2 us a node, 10 GB/s, 2.5 GB/s scattered, 50 G multiply-adds/s, 5 us a branch."""

    def seconds(content: bytes, feeds: dict[str, np.ndarray], threads: int) -> float:
        nodes = ir.from_proto(__import__("onnx").load_from_string(content)).graph
        total = 0.0
        for node in nodes:
            size = feeds["x"].nbytes
            total += 2e-6
            total += {"MatMul": feeds["x"].shape[0] ** 3 / 50e9, "If": 5e-6}.get(node.op_type, 0.0)
            total += 2 * size / 10e9 if size > 1e6 and node.op_type == "Neg" else 0.0
            total += 2 * size / 2.5e9 if node.op_type == "Gather" else 0.0
        return total

    monkeypatch.setattr(profiling, "_seconds", seconds)
    monkeypatch.setattr(profiling, "_seconds_of_a_call", lambda *given: 3e-6 + seconds(*given))
    profile = profiling.measure(load_target("onnxruntime"))
    assert profile.node == pytest.approx(2.0, rel=0.05)
    assert profile.gigaflops == pytest.approx(50, rel=0.05)
    assert profile.gigabytes == pytest.approx(10, rel=0.2)
    assert profile.scattered == pytest.approx(2.5, rel=0.2)
    assert profile.control_flow == pytest.approx(3.0, abs=2.1)
    assert profile.block == pytest.approx(3.0, rel=0.05)  # without what the operators take


def test_a_backend_that_is_not_here_cannot_be_measured() -> None:
    with pytest.raises(BadInput, match="the backend tensorrt cannot be measured here"):
        profiling.measure(load_target("tensorrt"))


def test_measuring_gives_positive_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "ROUNDS", 2)
    profile = profiling.measure(load_target("onnxruntime"))
    assert profile.node > 0
    assert profile.gigaflops > 0
    assert profile.gigabytes > 0
    assert profile.scattered > 0
    assert profile.control_flow >= 0
    assert profile.block >= 0
