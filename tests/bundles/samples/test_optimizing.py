"""``graphopt optimize --per-sample`` from a file to a bundle that runs, and what its verification sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.bundles.folder import read_bundle
from graphopt.bundles.merge import merge_bundle
from graphopt.cli.main import main
from graphopt.engines.bundles.feeding import feeds_for
from graphopt.errors import BadInput, GateFailed
from graphopt.runtime.session import create_session, run
from graphopt.verifying import verify
from tests.bundles.samples.compare import close
from tests.bundles.samples.test_control import EXITS, TURNS, some
from tests.models.text import model_from_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    folder = tmp_path_factory.mktemp("net")
    path, bundle = folder / "net.onnx", folder / "net.bundle"
    onnx.save(ir.to_proto(model_from_text(EXITS)), path)
    report = graphopt.optimize(path, bundle, recipe=["static"], per_sample=True)
    return path, bundle, report


def test_from_a_file_to_a_bundle(made: tuple[Path, Path, Any]) -> None:
    path, bundle, report = made
    assert report.verification.verdict == "passed"
    runner, one = graphopt.load(bundle), create_session(path, optimized=False)
    for count in (0, 1, 5, 32):
        x = some(count, count)
        got = runner.run({"x": x})
        for name, array in got.items():
            assert len(array) == count, name
        for index in range(count):
            for name, array in run(one, {"x": x[index : index + 1]}).items():
                close(got[name][index].reshape(array.shape), array)


def test_every_side_is_forced(made: tuple[Path, Path, Any]) -> None:
    _, _, report = made
    sides = report.verification.coverage["ways"]["sides"]
    assert len(sides) == 2
    assert all(how in ("inputs", "forced") for found in sides.values() for how in found.values())


def test_verification_sees_a_changed_block(made: tuple[Path, Path, Any], tmp_path: Path) -> None:
    """Of any block: each is reached, by the inputs or by force."""
    path, bundle, _ = made
    assert verify(path, bundle).passed
    version, plan = read_bundle(bundle)
    for block in plan.blocks.values():
        file = version / block.file
        before = file.read_bytes()
        model = onnx.load(file)
        node = next((node for node in model.graph.node if node.op_type in ("Add", "Mul", "Neg", "Sin")), None)
        if node is None:
            continue
        node.op_type = {"Add": "Sub", "Mul": "Add", "Neg": "Abs", "Sin": "Cos"}[node.op_type]
        onnx.save(model, file)
        try:
            assert verify(path, bundle).differences, block.file
        finally:
            file.write_bytes(before)


def test_bench_compares_each_sample_alone(made: tuple[Path, Path, Any], tmp_path: Path) -> None:
    """The network gives a number where the bundle gives one for each sample; as a batch it would be all or none."""
    path, bundle, _ = made
    np.savez(tmp_path / "x.npz", x=some(5, 3)[:, None])
    for models in ((path, bundle), (bundle, path)):
        result = graphopt.bench(models, seconds=0.1)
        assert [model.one_by_one for model in result.models] == [False, True]
        assert result.models[1].max_abs_difference < 1e-5 < result.models[1].max_abs_output
    alone = graphopt.bench([bundle, bundle], seconds=0.1, calibration=tmp_path / "x.npz")
    assert not alone.models[1].one_by_one and alone.models[1].max_abs_difference == 0


def test_its_blocks_can_be_looked_at_as_one_network(made: tuple[Path, Path, Any]) -> None:
    """For what the inputs mean, and the sizes that engines are built for."""
    _, bundle, _ = made
    _, plan = read_bundle(bundle)
    whole = merge_bundle(bundle, runs=False)
    assert [value.name for value in whole.graph.inputs] == ["x"]
    version = read_bundle(bundle)[0]

    def session(name: str) -> Any:
        return create_session(version / plan.blocks[name].file, optimized=False)

    sizes = [np.shape(feeds["x"]) for feeds in feeds_for(plan, session, ("x=1x4/5x4/7x4",), None, bundle)]
    assert sorted(sizes) == [(1, 4), (5, 4), (7, 4)]


def test_bench_sees_samples_that_are_mixed_up(made: tuple[Path, Path, Any]) -> None:
    from graphopt.benchmarking.comparing import compare

    path, bundle, _ = made
    runner = graphopt.load(bundle)

    class Turned:
        inputs, outputs = runner.inputs, runner.outputs

        def run(self, feeds: Any) -> dict[str, Any]:
            return {name: array[::-1] for name, array in runner.run(feeds).items()}

    class OneByOne:
        """The network, which takes one sample."""

        session = create_session(path, optimized=False)
        inputs, outputs = runner.inputs, runner.outputs

        def run(self, feeds: Any) -> dict[str, Any]:
            x = feeds["x"]
            return run(self.session, {"x": x if len(x) == 1 else x[:1]})

    feeds = [{"x": some(4, 7)}]
    (_, (good, _)) = compare([path, bundle], [OneByOne(), runner], feeds)
    (_, (bad, _)) = compare([path, bundle], [OneByOne(), Turned()], feeds)
    assert good < 1e-5 < bad


def test_a_merge_that_is_refused_says_of_which_bundle(made: tuple[Path, Path, Any]) -> None:
    _, bundle, _ = made
    with pytest.raises(BadInput, match=r"net\.bundle: samples go their own ways at '.+', and no ONNX operator"):
        merge_bundle(bundle)


def test_a_bundle_of_samples_that_are_mixed_up_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is of the bundle as it runs, host and all."""
    from graphopt.bundles.ort import OrtBackend

    path = tmp_path / "net.onnx"
    onnx.save(ir.to_proto(model_from_text(TURNS)), path)
    took = OrtBackend.take
    monkeypatch.setattr(OrtBackend, "take", lambda self, value, axis, rows: took(self, value, axis, rows[::-1]))
    with pytest.raises(GateFailed, match="the bundle is not the same: sample"):
        graphopt.optimize(path, tmp_path / "net.bundle", recipe=["static"], per_sample=True)
    assert not (tmp_path / "net.bundle").exists()


def test_what_is_refused_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    text = '<ir_version: 10, opset_import: ["" : 18]> g (float[1, 3] x) => (int64[2, n] y) { y = NonZero (x) }'
    onnx.save(ir.to_proto(model_from_text(text)), path)
    with pytest.raises(BadInput, match=r"NonZero .*: cannot run on many samples") as found:
        graphopt.optimize(path, tmp_path / "net.bundle", recipe=["static"], per_sample=True)
    assert "\n" not in str(found.value)
    with pytest.raises(BadInput, match=r"--per-sample makes a bundle.*--recipe static"):
        graphopt.optimize(path, tmp_path / "net.opt.onnx", per_sample=True)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(ir.to_proto(model_from_text(TURNS)), path)
    assert main(["optimize", str(path), "--per-sample"]) == 2
    assert capsys.readouterr().err == "error: --per-sample makes a bundle (add --recipe static)\n"
    assert main(["optimize", str(path), "--per-sample", "-r", "static", "-o", str(tmp_path / "net.bundle")]) == 0
    assert "verified: passed" in capsys.readouterr().out


def test_a_dynamic_batch_is_one_sample_at_a_time(tmp_path: Path) -> None:
    """An `If` that asks for the least sure sample of a batch asks each by itself."""
    text = EXITS.replace("float[1, 4]", "float[n, 4]")
    onnx.save(ir.to_proto(model_from_text(text)), tmp_path / "net.onnx")
    graphopt.optimize(tmp_path / "net.onnx", tmp_path / "net.bundle", recipe=["static"], per_sample=True)
    runner = graphopt.load(tmp_path / "net.bundle")
    assert runner.inputs[0].shape == ("n", 4)
    one = create_session(tmp_path / "net.onnx", optimized=False)
    x = some(6, 1)
    got = runner.run({"x": x})
    want = np.concatenate([run(one, {"x": x[index : index + 1]})["y"] for index in range(6)])
    close(got["y"], want)
