"""Bundles made one network again: the same bits, the same plan, every weight once."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphopt import graphs
from graphopt.bundles import split, write_bundle
from graphopt.bundles.merge import merge, merge_bundle
from graphopt.bundles.plan import Branch, Plan
from graphopt.errors import BadInput
from graphopt.files import load_model, save_model
from graphopt.runtime.session import create_session, run
from tests.bundles.test_split import CONSTANTS, HEAD, LATE, TWICE, runs_of_the_corpus, same
from tests.models.nests import Nest
from tests.models.text import model_from_text


def shape_of(plan: Plan) -> Any:
    """A plan with its names replaced by numbers, in the order in which they come."""
    numbers: dict[str, int] = {}

    def plain(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            named = key in ("reads", "makes", "gives", "blocks")
            return {(plain(name) if named else name): plain(inner, name) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        if isinstance(value, str) and key != "type":
            return numbers.setdefault(value, len(numbers))
        return value

    return plain(plan.model_dump(by_alias=True))


def merged_proto(model: ir.Model) -> onnx.ModelProto:
    parts = split(model)
    return ir.to_proto(merge(parts.plan, parts.blocks))


def check(model: onnx.ModelProto, *many: Mapping[str, Any]) -> onnx.ModelProto:
    """Split and merge a network, and compare the two."""
    reference = create_session(model.SerializeToString(), optimized=False)
    whole = merged_proto(ir.from_proto(model))
    session = create_session(whole.SerializeToString(), optimized=False)
    for feeds in many:
        theirs, ours = run(reference, feeds), run(session, feeds)
        assert list(ours) == list(theirs)
        for name in theirs:
            assert same(theirs[name], ours[name]), (name, theirs[name], ours[name])
    return whole


def check_nest(seed: int) -> None:
    nest = Nest(seed, depth=2 + seed % 3)
    model = check(nest.model, *nest.feeds(4))
    # What nobody reads is left out each time: a nest has much of that. After that the plan stays what it is.
    shapes: list[Any] = []
    for _ in range(9):
        held = ir.from_proto(model)
        RemoveUnusedNodesPass()(held)
        parts = split(held)
        shapes.append(shape_of(parts.plan))
        if shapes[-1] in shapes[:-1]:
            break
        model = ir.to_proto(merge(parts.plan, parts.blocks))
    assert shapes[-1] == shapes[-2]


@pytest.mark.parametrize("seed", range(4))
def test_random_nests(seed: int) -> None:
    check_nest(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(4, 504, 50))
def test_more_random_nests(first: int) -> None:
    for seed in range(first, first + 50):
        check_nest(seed)


@pytest.mark.slow
def test_the_node_corpus() -> None:
    checked = 0
    for model, feeds, theirs, name in runs_of_the_corpus():
        session = create_session(merged_proto(ir.from_proto(model)).SerializeToString(), optimized=False)
        ours = run(session, feeds)
        assert all(same(theirs[output], ours[output]) for output in theirs), name
        checked += 1
    assert checked >= 20


@pytest.mark.parametrize("text", [LATE, TWICE], ids=["late", "twice"])
def test_the_plan_stays_what_it_is(text: str) -> None:
    first = split(model_from_text(text))
    again = split(merge(first.plan, first.blocks))
    assert shape_of(again.plan) == shape_of(first.plan)
    assert again.shared == first.shared


def test_a_block_that_runs_twice_in_one_graph() -> None:
    text = f"""{HEAD} g (float[2] x, bool c) => (float[2] y) {{
        [first] a = Neg (x)
        [one] b = If (c) <
            then_branch = t () => (float[2] p) {{ [tanh] p = Tanh (a) }},
            else_branch = e () => (float[2] q) {{ [exp] q = Exp (a) }}>
        [second] d = Neg (b)
        [two] y = If (c) <
            then_branch = t2 () => (float[2] r) {{ r = Abs (d) }},
            else_branch = e2 () => (float[2] s) {{ s = Exp (d) }}>
    }}"""
    model = model_from_text(text)
    assert split(model_from_text(text)).shared == 2
    whole = check(ir.to_proto(model), *({"x": np.array([1, -2], np.float32), "c": np.array(c)} for c in (True, False)))
    names = [node.name for node in graphs.all_nodes(ir.from_proto(whole))]
    assert len(set(names)) == len(names)


def test_names_of_control_flow_stay(tmp_path: Path) -> None:
    model = model_from_text(LATE)
    for node, name in zip((n for n in model.graph if n.op_type == "If"), ("first exit", "second exit"), strict=True):
        node.name = name
    write_bundle(split(model), tmp_path / "net")
    whole = merge_bundle(tmp_path / "net")
    assert [node.name for node in graphs.all_nodes(whole) if node.op_type == "If"] == ["first exit", "second exit"]


def test_decisions_that_became_one_are_remembered() -> None:
    parts = split(model_from_text(LATE))
    branch = next(step for step in parts.plan.steps if isinstance(step, Branch))
    branch.decides = {"another": True, "the opposite": False}
    again = split(ir.from_proto(ir.to_proto(merge(parts.plan, parts.blocks))))
    assert next(step for step in again.plan.steps if isinstance(step, Branch)).decides == branch.decides


@pytest.mark.parametrize("trips", [0, 1, 3])
def test_constants_that_the_host_hands_on(trips: int) -> None:
    feeds = {"x": np.array([1, 2], np.float32), "n": np.array(trips, np.int64)}
    check(ir.to_proto(model_from_text(CONSTANTS)), feeds)


PASSED_ON = f"""
{HEAD}
g (float[2] x, bool c) => (float[2] y, float[2] z, float[2] again) {{
    again = Identity (x)
    y, z = If (c) <
        then_branch = t () => (float[2] p, float[2] q) {{ p = Neg (x) q = Abs (x) }},
        else_branch = e () => (float[2] r, float[2] s) {{ r = Tanh (x) s = Exp (x) }}>
}}
"""


def test_values_that_go_through_unchanged_and_twice() -> None:
    """What a plan may say and an ONNX body may not: a result that is a value from outside, or the same twice."""
    parts = split(model_from_text(PASSED_ON))
    (branch,) = (step for step in parts.plan.steps if isinstance(step, Branch))
    (y, z) = branch.gives
    branch.gives[y] = ("x", branch.gives[y][1])
    branch.gives[z] = ("x", branch.gives[y][1])
    parts.plan.gives["again"] = "x"
    session = create_session(ir.to_proto(merge(parts.plan, parts.blocks)).SerializeToString(), optimized=False)
    x = np.array([1, -2], np.float32)
    for c in (True, False):
        found = run(session, {"x": x, "c": np.array(c)})
        wanted = x if c else np.tanh(x)
        np.testing.assert_allclose(found["y"], wanted, rtol=1e-6)
        np.testing.assert_array_equal(found["y"], found["z"])
        np.testing.assert_array_equal(found["again"], x)


def test_a_weight_that_several_blocks_read_is_one_and_stays_in_its_file(tmp_path: Path) -> None:
    text = f"""{HEAD} g (float[n, 64] x, bool c) => (float[n, 64] y) <float[64, 64] w> {{
        a = MatMul (x, w)
        b = If (c) <
            then_branch = t () => (float[n, 64] p) {{ p = MatMul (a, w) }},
            else_branch = e () => (float[n, 64] q) {{ q = Neg (a) }}>
        y = MatMul (b, w)
    }}"""
    write_bundle(split(model_from_text(text)), tmp_path / "net")
    whole = merge_bundle(tmp_path / "net")
    (weight,) = whole.graph.initializers.values()
    assert isinstance(weight.const_value, ir.ExternalTensor)
    assert weight.const_value.raw is None  # nobody has read it
    save_model(whole, tmp_path / "whole.onnx")
    (data,) = tmp_path.glob("whole.*.data")
    assert data.stat().st_size == 64 * 64 * 4
    assert len(load_model(tmp_path / "whole.onnx").graph.initializers) == 1


def test_weights_of_one_name_and_different_content_stay_apart() -> None:
    parts = split(model_from_text(TWICE))
    for block in parts.blocks.values():
        for value in list(block.graph.initializers.values()):
            value.name = "weight"
    whole = merge(parts.plan, parts.blocks)
    assert len(whole.graph.initializers) == 2
    session = create_session(ir.to_proto(whole).SerializeToString(), optimized=False)
    reference = create_session(ir.to_proto(model_from_text(TWICE)).SerializeToString(), optimized=False)
    for c in (True, False):
        feeds = {"x": np.eye(2, dtype=np.float32), "c": np.array(c)}
        assert same(run(session, feeds)["y"], run(reference, feeds)["y"])


def test_what_is_no_network_again(tmp_path: Path) -> None:
    parts = split(model_from_text(LATE))
    next(iter(parts.plan.blocks.values())).file = "block_1.engine"
    (tmp_path / "block_1.engine").write_bytes(b"engine")
    parts.blocks.pop("block_1")
    write_bundle(parts, tmp_path / "net", files=[tmp_path / "block_1.engine"])
    with pytest.raises(BadInput, match=r"block_1\.engine is an engine"):
        merge_bundle(tmp_path / "net")
    each = split(model_from_text(LATE))
    next(step for step in each.plan.steps if isinstance(step, Branch)).each = True
    with pytest.raises(BadInput, match="samples go their own ways at 'If of b'"):
        merge(each.plan, each.blocks)


def test_what_is_merged_holds_its_version(tmp_path: Path) -> None:
    """Its weights lie there until somebody asks for them."""
    first = write_bundle(split(model_from_text(LATE)), tmp_path / "net")
    whole = merge_bundle(tmp_path / "net")
    copy = whole.clone()
    second = write_bundle(split(model_from_text(TWICE)), tmp_path / "net")
    del whole
    gc.collect()
    assert first.is_dir() and second != first
    del copy
    gc.collect()
    write_bundle(split(model_from_text(TWICE)), tmp_path / "net")
    assert not first.exists() and second.is_dir()


def test_an_input_that_is_an_output_under_its_own_name() -> None:
    text = f"""{HEAD} g (float[2] x, bool c) => (float[2] x, float[2] y) {{
        y = If (c) <then_branch = t () => (float[2] p) {{ p = Identity (x) }},
                    else_branch = e () => (float[2] q) {{ q = Neg (x) }}>
    }}"""
    x = np.array([1, 2], np.float32)
    check(ir.to_proto(model_from_text(text)), *({"x": x, "c": np.array(c)} for c in (True, False)))


def test_a_loop_that_nobody_reads() -> None:
    """All that it makes is stacked: without that it has no output, which no Loop of ONNX may."""
    text = f"""{HEAD} g (float[2] x, int64 n) => (float[2] y) <bool yes = {{1}}> {{
        y = Neg (x)
        all = Loop (n, yes) <body = b (int64 i, bool on) => (bool more, float[2] part) {{
            more = Identity (on) part = Add (x, y)
        }}>
    }}"""
    check(ir.to_proto(model_from_text(text)), {"x": np.array([1, 2], np.float32), "n": np.array(2)})


def test_a_condition_of_one_axis_that_nobody_hears_of() -> None:
    text = f"""{HEAD} g (float[2] x, int64[1] n, bool[1] c) => (float[2] y) {{
        y = Loop (n, c, x) <body = b (int64[1] i, bool[1] on, float[2] s) => (bool[1] more, float[2] t) {{
            more = Identity (on) number = Cast <to = 1> (i) t = Add (s, number)
        }}>
    }}"""
    x = np.array([1, 2], np.float32)
    check(
        ir.to_proto(model_from_text(text)),
        *({"x": x, "n": np.array([n]), "c": np.array([c])} for n in (-1, 0, 3) for c in (True, False)),
    )
