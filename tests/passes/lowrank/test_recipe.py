"""The recipe lowrank on whole blocks, as a user runs it: what is left of the weights, of index operators, and why."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.cli.main import main
from graphopt.errors import BadInput, GateFailed
from graphopt.report import Report
from tests.models import blocks, draw_feeds
from tests.passes.fuse.common import G
from tests.passes.fuse.common import random as numbers

BLOCKS: dict[str, Callable[..., ir.Model]] = {
    "mlp": blocks.mlp_block,
    "llama": blocks.llama_block,
    "llama with a cache": lambda **options: blocks.llama_block(cache=True, **options),
    "bert": blocks.bert_block,
    "resnet": blocks.resnet_block,
    "resnet, smaller": lambda **options: blocks.resnet_block(outputs=32, stride=2, norm="kept", **options),
}
PINNED = {
    # Query, key and value are split into heads; what follows them adds to the input of the block.
    "mlp": [],
    "llama": ["k.v", "o.v", "q.v", "v.v"],
    "llama with a cache": ["k.v", "o.v", "q.v", "v.v"],
    "bert": ["key.v", "output.v", "query.v", "value.v"],
    "resnet": ["conv2.v"],
    "resnet, smaller": ["conv2.v", "downsample.v"],
}
"""The factors whose channels cannot be permuted: of them a Gather remains."""


def saved(model: ir.Model, folder: Path, name: str = "block.onnx") -> Path:
    ir.save(model, folder / name)
    return folder / name


def optimized(path: Path, target: str, *settings: str, out: str = "out.onnx") -> tuple[Report, ir.Model]:
    """The report and the result; every check was passed, and no pass raised."""
    made = path.with_name(out)
    report = graphopt.optimize(path, made, recipe=["lowrank"], settings=settings, target=target)
    assert report.verification.verdict == "passed"
    assert [record.error for record in report.passes if record.error] == []
    return report, ir.load(made)


def elements(model: ir.Model) -> int:
    """Of the matrices and kernels."""
    shapes = [v.shape.numpy() for v in model.graph.initializers.values() if v.shape is not None]
    return sum(int(np.prod(shape)) for shape in shapes if len(shape) > 1 and shape[0] > 1)


def ranks(model: ir.Model) -> list[int]:
    """Of the pairs of factors in a block."""
    found = {name: v.shape.numpy() for name, v in model.graph.initializers.items() if v.shape is not None}
    return [found[name][0 if len(found[name]) == 4 else 1] for name in found if name.endswith(".v")]


def permuted(model: ir.Model) -> list[str]:
    """What a Gather reorders: the pivots of these factors."""
    names = []
    for node in model.graph:
        places = node.inputs[1] if node.op_type == "Gather" else None
        if places is not None and (places.name or "").endswith("_places"):
            source = node.inputs[0]
            while source is not None and (producer := source.producer()) is not None:
                read = [v.name for v in producer.inputs if v is not None and v.name and v.name.partition("_kept")[1]]
                if read:
                    names.append(re.split("_kept|_relabelled", read[0])[0])
                    break
                source = producer.inputs[0]
    return sorted(names)


def record(report: Report, name: str) -> str:
    return "; ".join(next(r for r in report.passes if r.name == name).near_misses.values())


@pytest.mark.parametrize("opset", [18, pytest.param(21, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_pair_becomes_pivots(name: str, opset: int, tmp_path: Path, arithmetic: str) -> None:
    """r^2 elements fewer each; index operators only where the channels are pinned; the same function."""
    before = BLOCKS[name](opset=opset)
    report, after = optimized(saved(before, tmp_path), arithmetic)
    assert elements(before) - elements(after) == sum(rank * rank for rank in ranks(before))
    assert permuted(after) == PINNED[name]
    assert report.undone == {}
    assert graphopt.verify(tmp_path / "block.onnx", tmp_path / "out.onnx").passed


@pytest.mark.parametrize("name", ["llama", "bert", "resnet"])
def test_each_refusal_has_its_reason(name: str, tmp_path: Path, arithmetic: str) -> None:
    before = BLOCKS[name]()
    report, after = optimized(saved(before, tmp_path), arithmetic, "pivot.gather=never")
    assert permuted(after) == []
    told = record(report, "pivot")
    assert told.count("the permutation cannot be folded") == len(PINNED[name])
    assert "graph input 'x'" in told or "graph output 'y'" in told
    assert name == "resnet" or told.count("its channels are labelled in parts") == 3


@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_what_was_multiplied_out_becomes_the_same(name: str, tmp_path: Path, arithmetic: str) -> None:
    """Dense weights that hide their rank are no reason for a larger result than factors are."""
    sizes = []
    for form in ("factors", "product"):
        _, after = optimized(saved(BLOCKS[name](form=form, opset=18), tmp_path), arithmetic)
        sizes.append(elements(after))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["mlp", "llama with a cache", "bert", "resnet, smaller"])
def test_nothing_is_left_to_do(name: str, tmp_path: Path, arithmetic: str) -> None:
    first, once = optimized(saved(BLOCKS[name](opset=18), tmp_path), arithmetic, out="once.onnx")
    second, twice = optimized(tmp_path / "once.onnx", arithmetic, out="twice.onnx")
    assert first.output is not None and second.output is not None
    assert (second.output.nodes, second.output.parameters) == (first.output.nodes, first.output.parameters)
    assert [node.op_type for node in once.graph] == [node.op_type for node in twice.graph]


@pytest.mark.parametrize("name", ["llama", "resnet, smaller"])
def test_the_same_bytes(name: str, tmp_path: Path, arithmetic: str) -> None:
    source = saved(BLOCKS[name](), tmp_path)
    for out in ("one.onnx", "two.onnx"):
        optimized(source, arithmetic, out=out)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


@pytest.mark.parametrize("name", BLOCKS)
def test_an_old_opset(name: str, tmp_path: Path) -> None:
    optimized(saved(BLOCKS[name](opset=13), tmp_path), "onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["factors", "product"])
@pytest.mark.parametrize("name", BLOCKS)
def test_sizes_at_which_it_pays(name: str, form: str, tmp_path: Path) -> None:
    """On the target that ships: smaller, correct, and all but done when done again."""
    size = {"channels": 96} if "resnet" in name else {"width": 192, "hidden": 512}
    if name == "resnet, smaller":
        before = blocks.resnet_block(outputs=128, stride=2, norm="kept", form=form, density=0.9, **size)
    else:
        before = BLOCKS[name](form=form, opset=18, density=0.9, **size)
    first, after = optimized(saved(before, tmp_path), "onnxruntime", out="once.onnx")
    assert elements(after) < (0.97 if form == "factors" else 0.85) * elements(before)
    second, _ = optimized(tmp_path / "once.onnx", "onnxruntime", out="twice.onnx")
    assert first.output is not None and second.output is not None
    # What was pivoted can free a permutation that was pinned before: its indices go, and nothing else.
    assert 0.999 * first.output.parameters < second.output.parameters <= first.output.parameters


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_networks_drawn_at_random(seed: int, tmp_path: Path, arithmetic: str) -> None:
    """Dense weights, factors of any rank, weights that hide theirs, in any order: what is written is right."""
    source = tmp_path / "random.onnx"
    onnx.save(_random(seed), source)
    optimized(source, arithmetic if seed % 2 else "onnxruntime")


def _random(seed: int) -> onnx.ModelProto:
    draw = random.Random(seed)
    g = G(draw.choice([17, 18, 21]))
    width, hidden = 50, 64
    x = g.input("x", 2, "length", width)
    for _ in range(draw.randint(2, 4)):
        kind = draw.choice(["mlp", "gated", "residual", "norm", "joined", "two readers"])
        if kind == "mlp":
            x = _linear(g, draw, g.op(draw.choice(["Relu", "Tanh"]), _linear(g, draw, x, width, hidden)), hidden, width)
        elif kind == "gated":
            gate, up = _linear(g, draw, x, width, hidden), _linear(g, draw, x, width, hidden)
            x = g.op("Add", _linear(g, draw, g.op("Mul", g.op("Sigmoid", gate), up), hidden, width), x)
        elif kind == "residual":
            x = g.op("Add", _linear(g, draw, x, width, width), x)
        elif kind == "norm":
            scale, shift = (g.const(numbers((width,), seed=draw.getrandbits(32)) + 1) for _ in range(2))
            x = g.op("LayerNormalization", x, scale, shift, axis=-1)
        elif kind == "joined":
            both = g.op("Concat", _linear(g, draw, x, width, width), x, axis=-1)
            x = g.op("Relu", _linear(g, draw, both, 2 * width, width))
        else:
            y = _linear(g, draw, x, width, hidden)
            parts = [_linear(g, draw, part, hidden, width) for part in (y, g.op("Softmax", y, axis=-1))]
            x = g.op("Add", *parts)
    g.output(_linear(g, draw, x, width, 5) if draw.random() < 0.5 else x)
    return g.model()


def _linear(g: G, draw: random.Random, x: str, inputs: int, outputs: int) -> str:
    def weight(*shape: int) -> np.ndarray:
        return numbers(shape, seed=draw.getrandbits(32), scale=shape[0] ** -0.5)

    kind = draw.choice(["dense", "factors", "factors", "scaled", "hidden"])
    rank = draw.randint(1, 20 if kind == "hidden" else min(inputs, outputs) + 2)
    if kind == "dense":
        y = g.op("MatMul", x, g.const(weight(inputs, outputs)))
    elif kind == "hidden":
        product = weight(inputs, rank).astype(np.float64) @ weight(rank, outputs).astype(np.float64)
        y = g.op("MatMul", x, g.const(product))
    else:
        middle = g.op("MatMul", x, g.const(weight(inputs, rank)))
        if kind == "scaled":
            middle = g.op("Mul", middle, g.const(weight(rank) + 1))
            middle = g.op("Add", middle, g.const(weight(rank))) if draw.random() < 0.5 else middle
        y = g.op("MatMul", middle, g.const(weight(rank, outputs)))
    return g.op("Add", g.const(weight(outputs)), y) if draw.random() < 0.4 else y


def test_a_network_without_low_rank_is_left_alone(tmp_path: Path) -> None:
    before = blocks.mlp_block(density=2.0, form="product")
    report, after = optimized(saved(before, tmp_path), "onnxruntime")
    assert elements(after) == elements(before)
    assert all(r.kept == 0 for r in report.passes if r.name in ("pivot", "reveal-rank", "factorize", "slice-rank"))
    assert not {"factorize", "slice-rank", "pivot-lossy"} & {r.name for r in report.passes}


# ---- compression -----------------------------------------------------------------------------------------------------


def test_dense_weights_are_compressed_to_a_density(tmp_path: Path) -> None:
    before = blocks.bert_block(density=2.0, form="product")
    source, data = saved(before, tmp_path), tmp_path / "data.npz"
    feeds = [draw_feeds(before, size=4, seed=seed) for seed in range(4)]
    arrays = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    arrays["mask"] = (arrays["mask"] > -1).astype(np.float32)
    np.savez(data, **arrays)
    with pytest.raises(BadInput, match="needs data"):
        graphopt.optimize(source, recipe=["lowrank"], settings=["factorize.density=0.6"])
    with pytest.raises(BadInput, match="no budget is given"):
        graphopt.optimize(source, recipe=["lowrank"], settings=["factorize.density=0.6"], calibration=data)
    out = tmp_path / "out.onnx"

    def run(condition: str) -> Report:
        return graphopt.optimize(
            source,
            out,
            recipe=["lowrank"],
            settings=["factorize.density=0.6"],
            calibration=data,
            fail_if=[condition],
        )

    with pytest.raises(GateFailed):
        run("cosine<0.99999")
    assert not out.exists()
    report = run("cosine<0.5")
    assert report.verification.verdict == "within budget"
    assert 0.5 * elements(before) < elements(ir.load(out)) <= 0.6 * elements(before)


def test_sixteen_bits_are_pivoted_where_the_user_says_so(tmp_path: Path, arithmetic: str) -> None:
    """By the rounding rule they are not, and the model is left as it was."""
    before = blocks.mlp_block(opset=18)
    data = tmp_path / "data.npz"
    np.savez(data, **draw_feeds(before, size=6))
    source, half = saved(before, tmp_path), tmp_path / "half.onnx"
    budget: dict[str, Any] = {"calibration": data, "fail_if": ["cosine<0.999"], "target": arithmetic}
    graphopt.optimize(source, half, recipe=["fp16"], **budget)
    _, left = optimized(half, arithmetic)
    assert elements(left) == elements(before)
    out = tmp_path / "out.onnx"
    report = graphopt.optimize(half, out, recipe=["lowrank"], settings=["pivot-lossy.enabled=true"], **budget)
    assert report.verification.verdict == "within budget"
    assert elements(before) - elements(ir.load(out)) == sum(rank * rank for rank in ranks(before))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_table(tmp_path: Path, arithmetic: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(blocks.mlp_block(opset=18), tmp_path)
    command = ["optimize", str(source), "-o", str(tmp_path / "o.onnx"), "--recipe", "lowrank"]
    assert main([*command, "--target", arithmetic]) == 0
    lines = capsys.readouterr().out.splitlines()
    (pivot,) = [line for line in lines if line.startswith("pivot ")]
    assert pivot.split()[:4] == ["pivot", "rounding", "1", "0"]
    assert any(line.startswith("verified: passed") for line in lines)
    assert not any(line.startswith(("factorize", "slice-rank", "pivot-lossy")) for line in lines)
    assert max(map(len, lines[:-1])) <= 100


def test_the_refusals_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(blocks.mlp_block(), tmp_path)
    command = ["optimize", str(source), "-o", str(tmp_path / "o.onnx"), "--recipe", "lowrank"]
    for setting, told in [
        ("factorize.density=1.5", "factorize.density"),
        ("factorize.form=best", "factorize.form"),
        ("pivot.gather=sometimes", "pivot.gather"),
        ("slice-rank.rank=0", "slice-rank.rank"),
        ("factorize.desity=0.5", "desity"),
    ]:
        assert main([*command, "--set", setting]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "o.onnx").exists()
