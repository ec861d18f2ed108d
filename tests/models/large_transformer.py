"""A transformer encoder as an exporter writes it, of any size, streamed to disk one weight at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

VOCABULARY = 2048
POSITIONS = 512
BLOCK = 1_000_003  # a prime: tiled rows of a weight never coincide


def large_transformer(
    path: str | Path, *, layers: int = 32, width: int = 1408, heads: int = 11, seed: int = 0, rank: int | None = None
) -> Path:
    """Write a pre-LayerNorm encoder with external weights to ``path`` and return the path.

    The defaults give 3.06 GB and about 3,560 nodes: LayerNormalization and Gelu decomposed, a Constant node for
    every constant, and every reshape computing its target from Shape, Gather, Unsqueeze and Concat.
    Input ``ids``: int64 [batch, sequence] below 2048, at most 512 long.
    Output ``hidden``: float32 [batch, sequence, width]. Every weight is distinct, generated while it is written.
    With a ``rank`` each product's weight is a product of two factors of that inner size, rounded to float32.
    """
    build = _Encoder(width, heads, seed, rank)
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "sequence"]))
    hidden = build.embed(ids)
    for layer in range(layers):
        hidden = build.layer(hidden, f"layers.{layer}")
    output = build.layer_norm(hidden, "final_norm")
    output.name = "hidden"
    output.type = ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape(["batch", "sequence", width])
    graph = ir.Graph(
        [ids],
        [output],
        nodes=build.tape.nodes,
        initializers=build.weights,
        opset_imports={"": 17},
        name="encoder",
    )
    for i, node in enumerate(graph):
        node.name = f"{node.op_type.lower()}_{i}"
    path = Path(path)
    ir.save(ir.Model(graph, ir_version=10), path, external_data=f"{path.name}.data")
    return path


class _Encoder:
    def __init__(self, width: int, heads: int, seed: int, rank: int | None) -> None:
        self.width = width
        self.heads = heads
        self.rank = rank
        self.tape = tape.Tape()
        self.weights: list[ir.Value] = []
        self.block = np.random.default_rng(seed).standard_normal(BLOCK).astype(np.float32)

    def op(self, kind: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        return self.tape.op(kind, list(inputs), attributes)  # type: ignore[arg-type]

    def constant(self, value: np.generic | np.ndarray) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.asarray(value)))

    def weight(self, name: str, *shape: int, scale: float, mean: float = 0.0, rank: int | None = None) -> ir.Value:
        start = 7919 * (len(self.weights) + 1) % BLOCK  # another start in the block: another weight

        def draw() -> ir.TensorProtocol:
            if rank is None:
                values = np.resize(np.roll(self.block, -start), shape)
            else:
                rows, columns = shape
                numbers = np.resize(np.roll(self.block, -start), (rows + columns) * rank)
                left, right = np.split(numbers, [rows * rank])
                # The rows of the right one differ in length, as trained weights' columns do.
                lengths = np.exp(right[:columns])
                values = left.reshape(rows, rank) @ (right.reshape(rank, columns) * lengths)
                values *= np.float32(0.5 * rank**-0.5)
            return ir.Tensor(values * np.float32(scale) + np.float32(mean), name=name)

        tensor = ir.LazyTensor(draw, ir.DataType.FLOAT, ir.Shape(shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape), const_value=tensor)
        self.weights.append(value)
        return value

    def embed(self, ids: ir.Value) -> ir.Value:
        words = self.op("Gather", self.weight("embedding.words", VOCABULARY, self.width, scale=1.0), ids)
        length = self.op("Gather", self.op("Shape", ids), self.constant(np.int64(1)), axis=0)
        positions = self.op("Range", self.constant(np.int64(0)), length, self.constant(np.int64(1)))
        table = self.weight("embedding.positions", POSITIONS, self.width, scale=0.3)
        return self.op("Add", words, self.op("Gather", table, positions))

    def linear(self, x: ir.Value, name: str, rows: int, columns: int, *, gain: float = 1.0) -> ir.Value:
        weight = self.weight(f"{name}.weight", rows, columns, scale=gain * rows**-0.5, rank=self.rank)
        return self.op("Add", self.weight(f"{name}.bias", columns, scale=0.02), self.op("MatMul", x, weight))

    def layer_norm(self, x: ir.Value, name: str) -> ir.Value:
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes=[-1], keepdims=1))
        square = self.op("Pow", centred, self.constant(np.float32(2)))
        variance = self.op("ReduceMean", square, axes=[-1], keepdims=1)
        deviation = self.op("Sqrt", self.op("Add", variance, self.constant(np.float32(1e-5))))
        scaled = self.op(
            "Mul",
            self.op("Div", centred, deviation),
            self.weight(f"{name}.weight", self.width, scale=0.1, mean=1.0),
        )
        return self.op("Add", scaled, self.weight(f"{name}.bias", self.width, scale=0.02))

    def gelu(self, x: ir.Value) -> ir.Value:
        erf = self.op("Erf", self.op("Div", x, self.constant(np.float32(2**0.5))))
        both = self.op("Mul", x, self.op("Add", erf, self.constant(np.float32(1))))
        return self.op("Mul", both, self.constant(np.float32(0.5)))

    def reshape(self, x: ir.Value, *rest: int) -> ir.Value:
        """Reshape ``x`` to [batch, sequence, *rest], reading batch and sequence from its own shape."""
        dims = []
        for axis in (0, 1):
            dim = self.op("Gather", self.op("Shape", x), self.constant(np.int64(axis)), axis=0)
            dims.append(self.op("Unsqueeze", dim, self.constant(np.array([0], np.int64))))
        dims += [self.constant(np.array([dim], np.int64)) for dim in rest]
        return self.op("Reshape", x, self.op("Concat", *dims, axis=0))

    def split_heads(self, x: ir.Value, perm: list[int]) -> ir.Value:
        return self.op("Transpose", self.reshape(x, self.heads, self.width // self.heads), perm=perm)

    def attention(self, x: ir.Value, name: str) -> ir.Value:
        d = self.width
        query = self.split_heads(self.linear(x, f"{name}.query", d, d), [0, 2, 1, 3])
        key = self.split_heads(self.linear(x, f"{name}.key", d, d), [0, 2, 3, 1])
        value = self.split_heads(self.linear(x, f"{name}.value", d, d), [0, 2, 1, 3])
        scores = self.op("Div", self.op("MatMul", query, key), self.constant(np.float32((d // self.heads) ** 0.5)))
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), value)
        merged = self.reshape(self.op("Transpose", mixed, perm=[0, 2, 1, 3]), d)
        return self.linear(merged, f"{name}.output", d, d, gain=0.5)

    def layer(self, x: ir.Value, name: str) -> ir.Value:
        d = self.width
        normed = self.layer_norm(x, f"{name}.attention_norm")
        # Dropout leaves an Identity behind when a model is exported for inference.
        x = self.op("Add", x, self.op("Identity", self.attention(normed, f"{name}.attention")))
        normed = self.layer_norm(x, f"{name}.mlp_norm")
        wide = self.gelu(self.linear(normed, f"{name}.mlp.up", d, 4 * d))
        down = self.linear(wide, f"{name}.mlp.down", 4 * d, d, gain=0.5)
        return self.op("Add", x, self.op("Identity", down))
