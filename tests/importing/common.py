"""Networks as they are exported dense, and the state dicts that they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from graphopt import graphs
from graphopt.files import load_model

Arrays = dict[str, np.ndarray]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32) * np.float32(0.4)


class Dense:
    """A graph of linear layers in a row, Relu between: the network as it is exported dense.

    Args:
        inputs: Channels of the input, of shape [batch, 5, inputs]; of a convolution [batch, inputs, 6, 6].
        image: Whether the input is an image.
        rank: Axes of the input, where it is no image.
    """

    def __init__(self, inputs: int, *, image: bool = False, rank: int = 3) -> None:
        shape: list[int | str] = ["batch", inputs, 6, 6] if image else ["batch", *[5] * (rank - 2), inputs]
        self.input = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        self.last = "x"
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, op_type: str, *inputs: str, name: str = "", **attributes: object) -> Dense:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, [self.last, *inputs], [output], name=name or output, **attributes))
        self.last = output
        return self

    def weight(self, name: str, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def linear(
        self, name: str, matrix: np.ndarray, bias: np.ndarray | None = None, *, how: str = "matmul", node: str = ""
    ) -> Dense:
        """y = W x + b; ``how`` is matmul (W stored transposed, as ``name.weight.T``), gemm or conv."""
        if how == "gemm":
            extra = [] if bias is None else [self.weight(f"{name}.bias", bias)]
            return self.add("Gemm", self.weight(f"{name}.weight", matrix), *extra, name=node, transB=1)
        if how == "conv":
            extra = [] if bias is None else [self.weight(f"{name}.bias", bias)]
            kernel = matrix if matrix.ndim == 4 else matrix[:, :, None, None]
            pads = [kernel.shape[2] // 2] * 4
            return self.add("Conv", self.weight(f"{name}.weight", kernel), *extra, name=node, pads=pads)
        self.add("MatMul", self.weight(f"{name}.weight.T", matrix.T), name=node)
        return self if bias is None else self.add("Add", self.weight(f"{name}.bias", bias))

    def save(self, path: Path) -> Path:
        output = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "g", [self.input], [output], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def save_state(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """A .safetensors file."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)
    return path


def pivot_state(name: str, outputs: int, inputs: int, rank: int, *, seed: int = 0) -> tuple[Arrays, np.ndarray]:
    """A PIFA layer, and its dense matrix."""
    kept_rows, coefficients = random(rank, inputs, seed=seed), random(outputs - rank, rank, seed=seed + 1)
    order = np.random.default_rng(seed).permutation(outputs)
    kept, rest = np.sort(order[:rank]), np.sort(order[rank:])
    dense = np.empty((outputs, inputs), np.float32)
    dense[kept], dense[rest] = kept_rows, coefficients @ kept_rows
    return {
        f"{name}.BLinear.weight": kept_rows,
        f"{name}.ALinear.weight": coefficients,
        f"{name}.false_idx": kept,
        f"{name}.true_idx": rest,
    }, dense


def adapter(
    folder: Path, tensors: Mapping[str, np.ndarray], *, prefix: str = "base_model.model.", **settings: object
) -> Path:
    """A LoRA adapter as PEFT saves it; returns the folder."""
    folder.mkdir(exist_ok=True)
    save_state(folder / "adapter_model.safetensors", {f"{prefix}{name}": array for name, array in tensors.items()})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def op_types(path: Path) -> list[str]:
    """The operators of a file's nodes, in order, those of Constant left out."""
    return [node.op_type for node in load_model(path).graph if node.op_type != "Constant"]


def elements(path: Path) -> int:
    return graphs.parameters(load_model(path))[0]


def run(path: Path, x: np.ndarray) -> np.ndarray:
    """The first output, on ONNX Runtime with its optimizations off."""
    from graphopt.runtime.session import create_session

    proto = ir.to_proto(load_model(path))
    session = create_session(proto.SerializeToString(), optimized=False, threads=1)
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() <= 2e-5 * np.abs(other).max())
