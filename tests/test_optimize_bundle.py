"""`optimize` with a recipe that makes a bundle: files, what is undone, what is refused, the report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import optimizing
from graphopt.bundles import making
from graphopt.bundles.profile import read_profile
from graphopt.cli.output import to_plain
from graphopt.errors import BadInput, GateFailed, GraphoptError
from graphopt.rewrite import Context, Kind, Pass, Stage
from tests.models.nests import Nest
from tests.models.text import model_from_text
from tests.rewrite.toys import register

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'

NET = f"""
{HEAD}
g (float[n, 32] x, int64 trips) => (float[n, 32] y) <float[32, 32] w> {{
    a = MatMul (x, w)
    top = ReduceMax <keepdims = 0> (a)
    thousand = Constant <value = float {{1000}}> ()
    large = Greater (top, thousand)
    b = If (large) <
        then_branch = t () => (float[n, 32] p) {{ o = Exp (a) p = MatMul (o, w) }},
        else_branch = e () => (float[n, 32] q) {{ q = Neg (a) }}
    >
    y = Loop (trips, , b) <body = l (int64 i, bool go, float[n, 32] s) => (bool again, float[n, 32] after) {{
        again = Identity (go)
        after = Tanh (s)
    }}>
}}
"""


def write(text: str, path: Path) -> Path:
    ir.save(model_from_text(text), path)
    return path


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return write(NET, tmp_path / "net.onnx")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def static(path: Path, out: Path | None = None, **how: Any) -> graphopt.optimizing.Report:  # type: ignore[name-defined]
    return graphopt.optimize(path, out, **{"recipe": ["static"], "target": "onnx", **how})


def test_the_bundle_lies_beside_the_model(net: Path) -> None:
    report = static(net)
    assert sorted(path.name for path in net.parent.iterdir()) == ["net.bundle", "net.onnx"]
    assert report.output is not None and report.output.path == str(net.with_name("net.bundle"))
    facts = report.bundle
    assert facts is not None
    assert (facts.blocks, facts.steps, facts.kept) == (4, 6, {})
    (version,) = [path for path in net.with_name("net.bundle").iterdir() if path.is_dir()]
    assert facts.bytes == report.output.bytes == sum(path.stat().st_size for path in version.iterdir())
    ways = report.verification.coverage["ways"]
    assert ways["sides"] == {"If of b": {"then": "forced", "else": "inputs"}}
    assert ways["turns"]["Loop of y"]["forced"]
    assert json.loads(json.dumps(to_plain(report)))["bundle"]["blocks"] == 4
    plain = graphopt.load(net)
    runner = graphopt.load(net.with_name("net.bundle"))
    for trips in (0, 2):
        feeds = {"x": np.ones((3, 32), np.float32), "trips": np.array(trips, np.int64)}
        np.testing.assert_allclose(runner.run(feeds)["y"], plain.run(feeds)["y"], rtol=1e-5)


def test_without_control_flow_there_is_one_block(tmp_path: Path) -> None:
    path = write(f"{HEAD} g (float[2] x) => (float[2] y) {{ a = Neg (x) y = Exp (a) }}", tmp_path / "m.onnx")
    report = static(path)
    assert report.bundle is not None
    assert (report.bundle.blocks, report.bundle.steps) == (1, 1)
    assert graphopt.load(tmp_path / "m.bundle").run({"x": np.zeros(2, np.float32)})["y"].tolist() == [1, 1]


def test_the_same_twice_gives_the_same_bytes(net: Path, tmp_path: Path) -> None:
    static(net, tmp_path / "one")
    static(net, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = contents(tmp_path / "one")
    static(net, tmp_path / "one")
    assert contents(tmp_path / "one") == before


def test_recipes_compose(net: Path) -> None:
    """A bundle if any recipe asks for one."""
    assert graphopt.optimize(net, recipe=["safe", "static"]).bundle is not None
    assert graphopt.optimize(net, recipe=["static", "safe"]).bundle is not None
    assert graphopt.optimize(net, recipe=["safe"]).bundle is None
    assert (net.with_name("net.bundle") / "current").is_file()


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("out.onnx", "the result is a bundle, which is a folder"),
        ("mine", "is no bundle, and would be replaced"),
        ("no/where", "no such folder"),
        ("net.onnx/x", "net.onnx: is no folder"),
    ],
)
def test_where_a_bundle_cannot_go(out: str, said: str, net: Path) -> None:
    (net.parent / "mine").mkdir()
    (net.parent / "mine" / "thesis.tex").write_text("")
    before = contents(net.parent)
    with pytest.raises(BadInput, match=said):
        static(net, net.parent / out)
    assert contents(net.parent) == before


def test_a_network_that_cannot_be_split(tmp_path: Path) -> None:
    text = f"{HEAD} g (float[2] x, float[2] k) => (float[2] y) <float[2] k = {{1, 2}}> {{ y = Add (x, k) }}"
    path = write(text, tmp_path / "m.onnx")
    with pytest.raises(BadInput, match="the input 'k' has a default"):
        static(path)
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]


def spoiled(monkeypatch: pytest.MonkeyPatch, old: str = "Exp", new: str = "Tanh") -> None:
    """A splitter that writes another operator into a branch."""
    real = making.make_parts

    def wrong(*arguments: Any, **how: Any) -> Any:
        parts, facts = real(*arguments, **how)
        for block in parts.blocks.values():
            for node in block.graph:
                node.op_type = new if node.op_type == old else node.op_type
        return parts, facts

    monkeypatch.setattr(optimizing, "make_parts", wrong)


def test_a_bundle_that_is_wrong_where_no_input_leads_is_not_written(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    static(net)
    before = contents(net.parent)
    spoiled(monkeypatch)
    with pytest.raises(GateFailed, match="the bundle is not the same: forced If of b = 1: output y"):
        static(net)
    assert contents(net.parent) == before
    with pytest.raises(GateFailed):
        static(net, net.with_name("fresh"))
    assert contents(net.parent) == before and not net.with_name("fresh").exists()
    static(net, verify=False)  # unasked, nobody looks
    assert contents(net.parent) != before


def test_a_full_disk_leaves_the_old_bundle(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import graphopt.bundles.folder as folder

    static(net)
    before = contents(net.parent)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_data", full)
    with pytest.raises(GraphoptError, match="No space left"):
        static(net, recipe=["static", "safe"])
    assert contents(net.parent) == before


def wrong_in_branches(kind: Kind = Kind.BITWISE) -> type[Pass]:
    """A pass that is wrong in a branch that inputs do not take: Exp becomes Tanh there."""

    class Wrong(Pass):
        name = "wrong-in-branches"
        stage = Stage.FUSE

        def apply(self, ctx: Context) -> None:
            from graphopt import graphs

            for node in list(graphs.all_nodes(ctx.model)):
                if node.op_type == "Exp" and node.graph is not ctx.model.graph:
                    made = ctx.node("Tanh", [node.inputs[0]], like=node.outputs[0])
                    ctx.replace({node.outputs[0]: made.outputs[0]}, [made], rule="wrong", certain=True)

    Wrong.kind = kind
    return Wrong


def test_a_rewrite_that_is_wrong_where_no_input_leads_is_undone(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, wrong_in_branches())
    monkeypatch.setattr("graphopt.verification.replacements.Watch.judge", unjudged)
    report = static(net, settings=["wrong-in-branches.enabled=true"])
    (key, reason), *others = report.undone.items()
    assert key.startswith("wrong-in-branches:") and not others
    assert reason.startswith("forced If of b = 1")
    kinds = {
        node.op_type for path in net.with_name("net.bundle").rglob("*.onnx") for node in onnx.load(path).graph.node
    }
    assert "Exp" in kinds


def unjudged(self: Any, make_feeds: Any, **how: Any) -> Any:
    """T1 that finds nothing, as in bodies of loops."""
    from graphopt.verification.replacements import Judgement
    from graphopt.verification.whole import make_reference

    self.close()
    model = self._views[0].model
    from graphopt.verification.whole import run_case, session_for

    session = session_for(model)
    own = [value.name for value in model.graph.outputs]
    feeds = [dict(case) for case in make_feeds(model, lambda case: run_case(session, case, own))]
    return Judgement(make_reference(model, feeds))


FUNCTION = """
<ir_version: 10, opset_import: ["" : 18, "f" : 1]>
g (float[2] x, bool c) => (float[2] y) { a = f.gate (x, c) y = f.gate (a, c) }
<domain: "f", opset_import: ["" : 18]>
gate (x, c) => (y) {
    y = If (c) <then_branch = t () => (p) { p = Neg (x) }, else_branch = e () => (q) { q = Exp (x) }>
}
"""


def test_decisions_in_functions_have_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(FUNCTION), path)
    report = static(path, settings=["merge-conditions.enabled=false"])
    assert len(report.verification.coverage["ways"]["sides"]) == 2
    assert not report.verification.coverage["ways"]["free"]
    assert graphopt.verify(path, tmp_path / "m.bundle", bitwise=True).passed
    merged = static(path).verification.coverage["ways"]
    assert len(merged["sides"]) == 1 and merged["tried"] == 2 and not merged["free"]


def test_calibration_data_tell_which_way_runs_go(net: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for index, trips in enumerate((1, 2, 3, 0, 5, 6)):
        np.savez(folder / f"{index}.npz", x=np.full((1, 32), 0.01, np.float32), trips=np.array(trips, np.int64))
    static(net, calibration=folder)
    (version,) = [path for path in net.with_name("net.bundle").iterdir() if path.is_dir()]
    profile = read_profile(version)
    assert profile is not None and profile.inputs == 6
    assert (profile.branches["If of b"].then, profile.branches["If of b"].otherwise) == (0, 6)
    assert (profile.loops["Loop of y"].turns, profile.loops["Loop of y"].most) == (17, 6)
    before = contents(net.parent)
    static(net, calibration=folder)
    assert contents(net.parent) == before
    static(net)
    (version,) = [path for path in net.with_name("net.bundle").iterdir() if path.is_dir()]
    assert read_profile(version) is None


def test_a_metric_is_taken_of_the_bundle(net: Path) -> None:
    seen: list[object] = []

    def metric(run: Any) -> float:
        seen.append(run)
        return float(run({"x": np.ones((1, 32), np.float32), "trips": np.array(1, np.int64)})["y"].sum())

    report = static(net, evaluate=metric)
    assert len(seen) == 2
    assert report.verification.metric["before"] == pytest.approx(report.verification.metric["after"], rel=1e-5)
    with pytest.raises(GateFailed, match="below"):
        static(net, evaluate=metric, minimum=1e9)


def test_lossy_recipes_and_bundles(net: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.standard_normal((4, 2, 32)).astype(np.float32) * 0.1, trips=np.arange(4))
    wide = write(NET.replace("[n, 32]", "[2, 32]"), tmp_path / "wide.onnx")
    folder = tmp_path / "cases"
    folder.mkdir()
    for index in range(3):
        x = rng.standard_normal((2, 32)).astype(np.float32)
        np.savez(folder / f"{index}.npz", x=x, trips=np.array(index, np.int64))
    report = static(wide, recipe=["int8", "static"], calibration=folder, fail_if=["cosine<0.9"])
    assert report.verification.verdict == "within budget"
    assert report.verification.max_abs > 0
    assert report.bundle is not None and report.bundle.blocks == 4


def test_what_a_target_keeps_is_told(net: Path) -> None:
    report = static(net, target="onnxruntime")
    assert report.bundle is not None
    assert set(report.bundle.kept) == {"If of b", "Loop of y"}
    assert report.verification.coverage["ways"]["inside"] == ["If of b", "Loop of y"]
    assert report.verification.coverage["ways"]["tried"] == 5


@pytest.mark.parametrize("seed", [3, 8, 21])
@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
def test_random_nests(seed: int, target: str, tmp_path: Path) -> None:
    nest = Nest(seed)
    onnx.save(nest.model, tmp_path / "n.onnx")
    report = static(tmp_path / "n.onnx", target=target)
    assert not report.undone
    assert graphopt.verify(tmp_path / "n.onnx", tmp_path / "n.bundle").passed


def test_verify_finds_what_no_input_shows(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(monkeypatch)
    static(net, verify=False)
    bundle = net.with_name("net.bundle")
    report = graphopt.verify(net, bundle)
    assert not report.passed
    assert report.reason.startswith("forced If of b = 1: output y")
    assert not graphopt.verify(net, bundle, fail_if=["max_abs>1e-4"]).passed


def test_verify_wants_the_same_inputs_and_outputs(net: Path, tmp_path: Path) -> None:
    static(net)
    other = write(NET.replace("] x", "] z").replace("(x, w)", "(z, w)"), tmp_path / "other.onnx")
    with pytest.raises(BadInput, match="has no input 'z'"):
        graphopt.verify(other, net.with_name("net.bundle"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="is a folder"):
        graphopt.verify(net, tmp_path / "empty")
