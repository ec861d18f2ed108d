"""Bundles built block by block: the sizes that blocks are seen with, what becomes an engine, and what does not."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.bundles import BundleRunner, read_bundle, split, write_bundle
from graphopt.bundles.plan import Plan, Port
from graphopt.cli.main import main
from graphopt.engines import BuildOptions, Profile, build_engine, read_report
from graphopt.engines.backends import BACKENDS
from graphopt.engines.bundles import building
from graphopt.engines.bundles.blocks import sources_of
from graphopt.engines.bundles.building import NothingBuilt, build_bundle
from graphopt.engines.bundles.watching import Calls, watch_blocks
from graphopt.engines.profiles import Seen
from graphopt.engines.report import BuildResult, EngineTensor, report_path
from graphopt.errors import BadInput, GraphoptError
from graphopt.files import load_model
from graphopt.runtime.session import create_session, numpy_dtype
from tests.models.nests import Nest
from tests.models.text import model_from_text

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None and importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed",
)
HEAD = '<ir_version: 10, opset_import: ["" : 18]>'
# The deepest block is never reached by itself: what is asked contradicts what led there.
NESTED = f"""
{HEAD}
g (float[n, 4] x, bool c, int64 trips) => (float[n, 4] y) <float[4, 4] w, float[1] one = {{1}}> {{
    a = MatMul(x, w)
    not_c = Not(c)
    y = If (c) <
        then_branch = t () => (float[n, 4] p) {{
            p = If (not_c) <
                then_branch = tt () => (float[n, 4] deep) {{ deep = MatMul(a, w) }},
                else_branch = te () => (float[n, 4] other) {{ other = Sub(a, one) }}
            >
        }},
        else_branch = e () => (float[n, 4] q) {{
            q = Loop (trips, , a) <body = l (int64 i, bool go, float[n, 4] s) => (bool again, float[n, 4] after) {{
                again = Identity(go)
                after = Mul(s, one)
            }}>
        }}
    >
}}
"""


def nested() -> ir.Model:
    model = model_from_text(NESTED)
    model.graph.initializers["w"].const_value = ir.tensor(np.eye(4, dtype=np.float32) * 2, name="w")
    return model


def feeds(rows: int, *, c: bool = True, trips: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.ones((rows, 4), np.float32), "c": np.array(c), "trips": np.array(trips, np.int64)}


def bundle(model: ir.Model | onnx.ModelProto, folder: Path) -> Path:
    write_bundle(split(model if isinstance(model, ir.Model) else ir.from_proto(model)), folder / "net")
    return folder / "net"


def watched(net: Path, *given: dict[str, Any]) -> tuple[Plan, dict[str, Calls]]:
    version, plan = read_bundle(net)
    return plan, watch_blocks(
        plan, lambda name: create_session(version / plan.blocks[name].file, optimized=False), given
    )


def block_that_makes(plan: Plan, value: str) -> str:
    return next(name for name, block in plan.blocks.items() if any(port.name == value for port in block.outputs))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A library that takes everything but MatMul, and what it was asked to build."""
    asked: dict[str, Any] = {}

    def build(file: Path, engine: Path, *, backend: str, seen: Seen, **how: Any) -> BuildResult:
        model = load_model(file)
        asked[engine.stem] = seen, model
        if any(node.op_type == "MatMul" for node in model.graph):
            raise GraphoptError("it refuses MatMul", where=str(file), hint="none")
        engine.write_bytes(b"vtrt")
        report_path(engine).write_text("{}")

        def tensors(values: Any) -> tuple[EngineTensor, ...]:
            return tuple(EngineTensor(v.name, v.dtype.numpy().name, (-1,) * len(v.shape or ())) for v in values)

        plain = {field.name: None for field in dataclasses.fields(BuildResult)}
        made: dict[str, Any] = {
            **plain,
            "path": engine,
            "backend": backend,
            "version": "1.0",
            "bytes": 4,
            "seconds": 0.5,
            "inputs": tensors(model.graph.inputs),
            "outputs": tensors(model.graph.outputs),
            "notes": (),
            "options": BuildOptions(),
            "status": "built, not run",
        }
        return BuildResult(**made)

    monkeypatch.setattr(building, "build_seen", build)
    monkeypatch.setattr(building, "find_backend", lambda name: BACKENDS[name])
    return asked


# -- what blocks are given ---------------------------------------------------------------------------------------------


def test_blocks_that_no_input_leads_to_are_seen_with_every_size(tmp_path: Path) -> None:
    plan, calls = watched(bundle(nested(), tmp_path), feeds(2), feeds(5), feeds(2), feeds(3, c=False))
    for value in ("a", "deep", "other", "after"):
        block = block_that_makes(plan, value)
        at = next(index for index, port in enumerate(plan.blocks[block].inputs) if port.name in ("x", "a", "s"))
        assert {shapes[at] for shapes in calls[block].shapes} == {(2, 4), (3, 4), (5, 4)}, value


def test_the_profile_is_smallest_most_frequent_and_largest() -> None:
    calls = Calls()
    for rows in (7, 2, 2, 2, 9):
        calls.add(["x", "k"], [np.zeros((rows, 3), np.float32), np.array([rows, 1])])
    ports = [
        Port(name="x", type="tensor(float)", shape=["n", 3]),
        Port(name="k", type="tensor(int64)", shape=[2]),
    ]
    seen = calls.seen(ports)
    assert seen.symbols == {"n": ((2,), (2,), (9,))}
    assert seen.inputs["x"] == ((2, 3), (2, 3), (9, 3))
    assert seen.values == {"k": Profile((2, 1), (2, 1), (9, 1))}


def test_values_of_changing_length_and_rank_are_told_as_unknown() -> None:
    calls = Calls()
    calls.add(["x", "k"], [np.zeros((2, 3), np.float32), np.array([1])])
    calls.add(["x", "k"], [np.zeros((2, 3, 1), np.float32), np.array([1, 2])])
    calls.add(["x", "k"], [[np.zeros(2)], np.array([1])])  # a sequence: no call of an engine
    seen = calls.seen([Port(name="x", type="tensor(float)"), Port(name="k", type="tensor(int64)", shape=["m"])])
    assert calls.rank(0) is None and calls.rank(1) == 1
    assert "x" not in seen.inputs and "k" not in seen.values
    assert sum(calls.shapes.values()) == 2


def test_a_forced_loop_that_would_never_end_ends(tmp_path: Path) -> None:
    text = f"""
    {HEAD}
    g (float[4] x, bool c) => (float[4] y) <bool yes = {{1}}> {{
        y = If (c) < then_branch = t () => (float[4] p) {{
                p = Loop (, c, x) <body = l (int64 i, bool go, float[4] s) => (bool again, float[4] after) {{
                    after = Neg(s)
                    again = Not(c)
                }}>
            }},
            else_branch = e () => (float[4] q) {{ q = Neg(x) }} >
    }}
    """
    plan, calls = watched(bundle(model_from_text(text), tmp_path), {"x": np.ones(4, np.float32), "c": np.array(False)})
    assert set(calls) >= {block_that_makes(plan, "after"), block_that_makes(plan, "q")}


@pytest.mark.parametrize("seed", range(3))
def test_every_block_of_a_random_nest_is_reached(tmp_path: Path, seed: int) -> None:
    nest = Nest(seed, sequences=False)
    plan, calls = watched(bundle(nest.model, tmp_path), *nest.feeds(2))
    assert set(calls) == set(plan.blocks)


# -- what becomes an engine --------------------------------------------------------------------------------------------


def test_refused_blocks_stay_and_the_bundle_computes_the_same(tmp_path: Path, builds: dict[str, Any]) -> None:
    net = bundle(nested(), tmp_path)
    progress: list[float] = []
    result = build_bundle(
        net,
        tmp_path / "out",
        backend="tensorrt-rtx",
        shapes=["n=1/2/8"],
        on_progress=lambda what, done: progress.append(done),
    )
    version, plan = read_bundle(tmp_path / "out")
    assert progress == sorted(progress)
    for block in result.blocks:
        described = plan.blocks[block.name]
        assert (version / described.file).is_file()
        if block.engine is None:
            assert described.backend is None and described.reason == block.reason == "it refuses MatMul"
            assert described.file.endswith(".onnx")
        else:
            assert described.backend == "tensorrt-rtx" and described.file.endswith(".engine")
            assert block.engine.path == version / described.file and report_path(block.engine.path).is_file()
            seen, _ = builds[block.name]
            assert all(sizes[0][0] == 1 and sizes[2][0] == 8 for sizes in seen.symbols.values()), block.name
    assert Counter(block.engine is None for block in result.blocks) == {True: 2, False: len(result.blocks) - 2}
    assert not [file for file in version.glob("*.onnx") if plan.blocks[file.stem].backend is not None]
    assert sum(file.stat().st_size for file in version.glob("*.data")) <= 4 * 4 * 4  # of refused blocks, once
    assert BundleRunner(net).run(feeds(2))["y"].shape == (2, 4)


def test_each_kind_of_block_that_stays(tmp_path: Path, builds: dict[str, Any]) -> None:
    text = f"""
    {HEAD}
    g (float[4] x, double[4] d, bool c, bool never) => (float[4] y, double[4] z, float[4] same)
        <float[4] none = {{0, 0, 0, 0}}> {{
        halves = SplitToSequence (x)
        total = Cast<to = 11>(x)
        z = Add(d, total)
        y = If (c) < then_branch = t () => (float[4] p) {{ p = ConcatFromSequence<axis = 0>(halves) }},
                     else_branch = e () => (float[4] q) {{ q = Neg(x) }} >
        same = If (c) < then_branch = t2 () => (float[4] p2) {{ p2 = Identity(none) }},
                        else_branch = e2 () => (float[4] q2) {{ q2 = Abs(x) }} >
    }}
    """
    result = build_bundle(bundle(model_from_text(text), tmp_path), tmp_path / "out", backend="tensorrt-rtx")
    reasons = {block.reason for block in result.blocks}
    assert any("seq(tensor(float))" in reason or "tensor(double)" in reason for reason in reasons)
    assert "it only hands values on, and the host does that" in reasons
    assert "" in reasons


def test_an_engine_with_other_types_is_not_taken(
    tmp_path: Path, builds: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = building.build_seen

    def other(*arguments: Any, **how: Any) -> BuildResult:
        made = build(*arguments, **how)
        return dataclasses.replace(made, outputs=tuple(EngineTensor(one.name, "float16", ()) for one in made.outputs))

    monkeypatch.setattr(building, "build_seen", other)
    with pytest.raises(NothingBuilt) as caught:
        build_bundle(bundle(nested(), tmp_path), tmp_path / "out", backend="tensorrt-rtx", shapes=["n=1"])
    assert any("as float16, the network as float32" in block.reason for block in caught.value.blocks)
    assert not (tmp_path / "out").exists()


def test_the_number_of_axes_is_taken_from_the_runs(tmp_path: Path, builds: dict[str, Any]) -> None:
    text = f"""
    {HEAD}
    g (float[2, 3] x, bool c) => (float[k] y) <int64[1] minus = {{-1}}, int64[2] shape = {{3, 2}}> {{
        h = If (c) < then_branch = t () => (float[6] p) {{ p = Reshape(x, minus) }},
                     else_branch = e () => (float[3, 2] q) {{ q = Reshape(x, shape) }} >
        y = Neg(h)
    }}
    """
    net = bundle(model_from_text(text), tmp_path)
    result = build_bundle(net, tmp_path / "out", backend="tensorrt-rtx")
    last = result.blocks[-1]
    assert last.reason == "'h' has another number of axes in some runs"


def test_an_input_that_does_not_tell_its_axes_gets_those_of_the_runs(tmp_path: Path, builds: dict[str, Any]) -> None:
    net = bundle(nested(), tmp_path)
    _, plan = read_bundle(net)
    turn = block_that_makes(plan, "after")
    assert [port.shape for port in plan.blocks[turn].inputs if port.name == "s"] == [None]
    result = build_bundle(net, tmp_path / "out", backend="tensorrt-rtx", shapes=["n=1/2/8"])
    assert next(block.reason for block in result.blocks if block.name == turn) == ""
    seen, _ = builds[turn]
    assert seen.inputs["s"] == ((1, 4), (2, 4), (8, 4))


def test_what_is_refused_before_anything_is_built(tmp_path: Path, builds: dict[str, Any]) -> None:
    net = bundle(nested(), tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: build_bundle(net, net, backend="tensorrt-rtx"), "is the bundle itself"),
        (lambda: build_bundle(net, tmp_path / "mine", backend="tensorrt-rtx"), "is no bundle, and would be replaced"),
        (lambda: build_bundle(net, tmp_path / "no" / "x", backend="tensorrt-rtx"), "no such folder"),
        (lambda: build_bundle(net, tmp_path / "out", backend="tensorrt-rtx"), "dynamic inputs without sizes"),
        (
            lambda: build_bundle(
                net, tmp_path / "out", backend="tensorrt-rtx", options=BuildOptions(strip_weights=True)
            ),
            "--strip-weights",
        ),
        (
            lambda: build_bundle(net, tmp_path / "out", backend="tensorrt-rtx", shapes=["m=1"]),
            "'m' is neither an input nor a symbolic axis",
        ),
        (lambda: build_bundle(net, tmp_path / "out", backend="tensorrt-rtx", plugins="some"), "'some' is not a way"),
        (lambda: build_engine(net, tmp_path / "out", backend="tensorrt-rtx"), "is a bundle"),
    ]
    for call, message in cases:
        with pytest.raises(BadInput, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not builds and not (tmp_path / "out").exists()
    build_bundle(net, tmp_path / "out", backend="tensorrt-rtx", shapes=["n=1"])
    with pytest.raises(BadInput, match="its blocks are engines already"):
        build_bundle(tmp_path / "out", tmp_path / "again", backend="tensorrt-rtx", shapes=["n=1"])


def test_what_is_handed_on() -> None:
    def sources(body: str, inputs: str = "float[2] x, float[2] z") -> dict[str, Any] | None:
        return sources_of(model_from_text(f"{HEAD} g ({inputs}) => (float[2] y) <float[2] c = {{1, 2}}> {{ {body} }}"))

    assert sources("a = Identity(x) y = Identity(a)") == {"y": "x"}
    constant = sources("y = Identity(c)")
    assert constant is not None
    np.testing.assert_array_equal(constant["y"], [1, 2])
    assert sources("y = Neg(x)") is None
    assert sources("a = Neg(x) y = Identity(a)") is None


def test_the_command_prints_a_table(tmp_path: Path, builds: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    net = bundle(nested(), tmp_path)
    words = ["build", str(net), "--target", "tensorrt-rtx", "-o", str(tmp_path / "out"), "--shapes", "n=1/2/4"]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "none: it refuses MatMul" in said and "built" in said
    assert "blocks on tensorrt-rtx 1.0" in said and "built, not run" in said
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["blocks"]) == set(read_bundle(net)[1].blocks)
    assert main([*words, "--buckets"]) == 2
    assert capsys.readouterr().err.startswith("error: --buckets: blocks get the sizes that they are seen with")


@pytest.mark.parametrize("op", ["Neg", "MatMul"])
def test_blocks_that_branch_are_told(
    op: str, tmp_path: Path, builds: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a bundle that was made for ONNX Runtime; whether the library takes them or not."""
    left = {"Neg": "Neg(x)", "MatMul": "MatMul(x, x)"}[op]
    model = model_from_text(
        f"""
        {HEAD}
        g (float[4, 4] x, bool c) => (float[4, 4] y) {{
            z = {left}
            y = If(c) <then_branch = t () => (float[4, 4] p) {{ p = Exp(z) }},
                       else_branch = e () => (float[4, 4] q) {{ q = Abs(z) }}>
        }}
        """
    )
    (node,) = (node for node in model.graph if node.op_type == "If")
    node.name = "which"
    write_bundle(split(model, keep=lambda node: True), tmp_path / "net")
    words = ["build", str(tmp_path / "net"), "--target", "tensorrt-rtx", "-o", str(tmp_path / "out")]
    assert main(words) == (0 if op == "Neg" else 2)
    said = capsys.readouterr()
    todo = "graphopt optimize IN.onnx --recipe static --target tensorrt-rtx makes a bundle whose blocks hold none"
    if op == "Neg":
        told = " ".join(said.out.split())
        assert "note: block_1 holds which, and TensorRT-RTX runs both sides of an If" in told and todo in told
        assert main([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["blocks"]["block_1"]["control_flow"] == ["which"]
    else:
        assert f"it holds which: {todo}" in said.err and len(said.err.splitlines()) == 1


def test_nothing_built_is_told_block_by_block(
    tmp_path: Path, builds: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"""
    {HEAD}
    g (float[4, 4] x) => (float[4, 4] y) {{ y = MatMul(x, x) }}
    """
    net = bundle(model_from_text(text), tmp_path)
    words = ["build", str(net), "--target", "tensorrt-rtx", "-o", str(tmp_path / "out")]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "it refuses MatMul" in said.out
    assert (
        said.err
        == f"error: {net}: TensorRT-RTX takes none of its blocks: it refuses MatMul (it runs on ONNX Runtime)\n"
    )
    assert main([*words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["refused"] == {"block_1": "it refuses MatMul"}


@needs_rtx
def test_the_real_library_builds_a_block_with_weights_whose_input_does_not_tell_its_axes(tmp_path: Path) -> None:
    text = f"""
    {HEAD}
    g (float[32, 32] x, int64 trips, bool c) => (float[32, 32] y) <float[32, 32] w> {{
        start = If (c) < then_branch = t () => (p) {{ p = Neg(x) }}, else_branch = e () => (q) {{ q = MatMul(x, w) }} >
        y = Loop (trips, , start) <body = l (int64 i, bool go, float[32, 32] s) => (bool again, float[32, 32] after) {{
            again = Identity(go)
            after = MatMul(s, w)
        }}>
    }}
    """
    model = model_from_text(text)
    model.graph.initializers["w"].const_value = ir.tensor(np.eye(32, dtype=np.float32), name="w")
    net = bundle(model, tmp_path)
    version, plan = read_bundle(net)
    assert list(version.glob("*.data"))
    result = build_bundle(net, tmp_path / "out", backend="tensorrt-rtx")
    assert [block.reason for block in result.blocks] == [""] * len(plan.blocks)
    turn = read_report(
        next(block.engine.path for block in result.blocks if block.name == block_that_makes(plan, "after"))
    )
    assert [tensor.shape for tensor in turn.inputs] in ([(-1, -1)], [(32, 32)])


@needs_rtx
def test_the_real_library_builds_every_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = bundle(nested(), tmp_path)
    np.savez(tmp_path / "data.npz", x=np.ones((3, 2, 4), np.float32), c=np.array([True, False, True]), trips=[1, 2, 0])
    out = tmp_path / "out"
    words = [
        "build",
        str(net),
        "--backend",
        "tensorrt-rtx",
        "-o",
        str(out),
        "--calibration",
        str(tmp_path / "data.npz"),
    ]
    assert main(words) == 0
    version, plan = read_bundle(out)
    built = [block for block in plan.blocks.values() if block.backend is not None]
    assert len(built) == len(plan.blocks)
    for block in built:
        report = read_report(version / block.file)
        assert {tensor.name for tensor in report.inputs} == {port.name for port in block.inputs}
        assert all(profile.min == profile.max for profile in report.profiles.values())
        assert {tensor.dtype for tensor in report.outputs} <= {
            dtype.name for port in block.outputs if (dtype := numpy_dtype(port.type)) is not None
        }


def test_the_table_of_the_benchmark_tells_what_was_built_and_what_was_not() -> None:
    pytest.importorskip("torch")
    from benchmarks.dynamic_tables import rtx_dynamic

    built = {
        "family": "vgg",
        "blocks": 7,
        "built": 5,
        "handed_on": 1,
        "refused": {"it refuses MatMul": 1},
        "wall": 12.4,
        "bytes": 5_000_000,
    }
    told = rtx_dynamic({"version": "1.7", "families": [built, {"family": "resnet", "status": "not built: why"}]})
    assert "| VGG-16 | 7 | 5 | 1 | 1 (it refuses MatMul) | 12 | 5.0 |" in told
    assert "| ResNet-56 | not built: why |" in told
