"""``graphopt optimize``: what it prints, its exit codes, its report file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.cli.main import main
from graphopt.recipes import recipe_names
from graphopt.rewrite import Context, Kind
from tests.rewrite.toys import model, ops, register, rule, swap
from tests.verification.test_shadow import once

NET = """g (float[N,8] x) => (float[N,8] y) {
    i = Identity(x) s = Sub(i, x) a = Abs(s) b = Add(a, x) k = Identity(b) y = Tanh(k)
}"""
WRONG = once(swap("Add", "Sub", name="a-pass-with-quite-a-long-name-that-is-wrong", kind=Kind.ROUNDING))


@pytest.fixture
def net(tmp_path: Path) -> Path:
    ir.save(model(NET), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["optimize", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", ["optimize", "bisect"])
def test_help_names_the_recipes_that_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    named = text.partition("--recipe R ")[2].partition(" or a YAML file")[0].replace(" (default)", "")
    assert sorted(named.split(", ")) == recipe_names()


def test_the_table(net: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (setting,) = register(monkeypatch, WRONG)
    code, out, err = run(capsys, net, "--set", setting)
    assert code == 0
    assert err == ""
    assert max(map(len, out.splitlines())) <= 100
    text = " ".join(out.split())
    assert "before 6 0 0.00" in text
    assert "after 4 0 0.00" in text
    assert "remove-identities bitwise 2 0 -2" in text
    assert "1 undone: is " in text
    assert "verified: passed, on 3 made-up inputs largest difference" in text
    assert "2 of 2 rewrites one by one; all together with" in text
    assert f"wrote {net.with_name('m.opt.onnx')}".replace(" ", "") in "".join(out.split())
    assert "more found nothing to do (--verbose lists them)" in text


QUANTISE = ["--set", "quantise-weights.bits=4", "--fail-if", "cosine<0.5", "--calibration"]


@pytest.fixture
def product(tmp_path: Path) -> tuple[Path, Path]:
    """A matrix product whose opset has no int4, and data for it."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    text = "g (float[N,64] x) => (float[N,64] y) { i = Identity(x) m = MatMul(i, w) y = Tanh(m) }"
    ir.save(model(text, opset=18, weights={"w": weight}), tmp_path / "product.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32))
    return tmp_path / "product.onnx", tmp_path / "data.npz"


def test_a_lossy_pass_that_changes_nothing_is_a_failure(
    product: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = product
    code, out, err = run(capsys, source, *QUANTISE, data)
    assert (code, out) == (1, "")
    assert "quantise-weights changed nothing: needs opset 21, the model has 18" in err
    assert "nothing was written" in err
    assert not source.with_name("product.opt.onnx").exists()
    (fix,) = re.findall(r"add (--set \S+)", err)
    code, out, _ = run(capsys, source, *QUANTISE, data, *fix.split())
    assert code == 0
    assert "verified: within budget, on 4 inputs of yours" in out


def test_a_lossy_pass_that_changes_nothing_beside_one_that_does_is_named(
    product: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = product
    code, out, _ = run(capsys, source, *QUANTISE, data, "--recipe", "fp16")
    assert code == 0
    text = " ".join(out.split())
    assert "quantise-weights was asked for and changed nothing: needs opset 21, the model has 18" in text
    assert max(map(len, out.splitlines())) <= 100


def test_a_pass_asked_for_by_name_has_its_row(
    net: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(node: ir.Node, ctx: Context) -> bool:
        if node.op_type == "Abs":
            ctx.refuse(node, "w: too small for it")
        return False

    settings = register(monkeypatch, rule(refuse, name="shy"), rule(lambda node, ctx: False, name="blind"))
    own = net.parent / "own.yaml"
    own.write_text("name: own\npasses: [fuse-gelu]\n")
    code, out, _ = run(capsys, net, "--recipe", "safe", "--recipe", own, *(f"--set={text}" for text in settings))
    assert code == 0
    text = " ".join(out.split())
    assert "shy bitwise 0 0 0.00 too small for it" in text
    assert "blind bitwise 0 0 0.00 found nothing to do" in text
    assert "fuse-gelu rounding 0 0 0.00 found nothing to do" in text
    assert "fuse-layer-norm" not in text


def test_verbose_lists_every_pass_and_near_misses(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, short, _ = run(capsys, net)
    code, out, _ = run(capsys, net, "--verbose")
    assert code == 0
    assert len(out.splitlines()) > len(short.splitlines())
    for name in ("fold-constants", "merge-duplicates", "remove-dead"):
        assert name in out
        assert name not in short or name == "merge-duplicates"
    assert max(map(len, out.splitlines())) <= 100


def test_json_is_all_there_is(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, net, "--json")
    assert code == 0
    assert err == ""
    report = json.loads(out)
    assert report["output"]["nodes"] == 4
    assert report["verification"]["verdict"] == "passed"


def test_the_report_file_says_what_json_says(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = net.parent / "report.json"
    _, out, _ = run(capsys, net, "--json", "--report", path)
    assert json.loads(out) == json.loads(path.read_text())


def test_a_report_that_cannot_be_written_is_found_out_first(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, net, "--report", net.parent / "nowhere" / "r.json")
    assert code == 2
    assert out == ""
    assert "no such folder" in err
    assert not net.with_name("m.opt.onnx").exists()


def test_no_verify_says_so(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, net, "--no-verify", "-o", net.parent / "out.onnx")
    assert code == 0
    assert "not verified (--no-verify)" in out
    assert "Identity" not in ops(ir.load(net.parent / "out.onnx"))


def test_options_reach_the_core(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = net.parent / "mine.yaml"
    recipe.write_text("name: mine\npasses: [remove-dead]\n")
    np.savez(net.parent / "data.npz", x=np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32))
    code, out, _ = run(
        capsys, net, "-o", net.parent / "out.onnx", "-r", recipe, "--recipe", "safe", "--set",
        "remove-identities.enabled=false", "--target", "onnx", "--calibration", net.parent / "data.npz",
        "--fail-if", "max_abs>1", "--evaluate", "tests.cli.test_optimize:metric", "--min", "-5", "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(out)
    assert report["recipe"] == ["mine", "safe"]
    assert report["target"] == "onnx"
    assert "remove-identities" not in {p["name"] for p in report["passes"]}
    assert report["verification"]["coverage"]["feeds"] == "calibration"
    assert set(report["verification"]["metric"]) == {"before", "after"}
    assert Path(report["output"]["path"]) == net.parent / "out.onnx"


def metric(run: object) -> float:
    assert callable(run)
    return float(run({"x": np.ones((1, 8), np.float32)})["y"].mean())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--fail-if", "max_abs>=0"], 1, "--fail-if max_abs>=0: max_abs is 0 (nothing was written)"),
        (["--evaluate", "tests.cli.test_optimize:metric", "--min", "5"], 1, "below 5"),
        (["--fail-if", "nonsense"], 2, "cannot read --fail-if nonsense"),
        (["--evaluate", "nonsense"], 2, "cannot read --evaluate nonsense"),
        (["--min", "1"], 2, "--min needs --evaluate MODULE:FN"),
        (["--recipe", "saef"], 2, "did you mean safe?"),
        (["--set", "remove-dead.colour=1"], 2, "pass remove-dead takes no parameter 'colour'"),
        (["--target", "abacus"], 2, "no target 'abacus'"),
        (["--no-verify", "--fail-if", "cosine<1"], 2, "has nothing to go by with --no-verify"),
        (["--calibration", "nowhere.npz"], 2, "nowhere.npz"),
        (["--custom-ops", "nowhere.so"], 2, "nowhere.so"),
    ],
)
def test_exit_codes(
    net: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    before = net.read_bytes()
    found, out, err = run(capsys, net, *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1
    assert [p.name for p in net.parent.iterdir()] == ["m.onnx"]
    assert net.read_bytes() == before


def test_what_was_not_checked_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.models import OPAQUE

    for name, words in (
        ("unknown_op", "carried through unchecked: Mystery (unknown to ONNX Runtime), and 2 nodes behind them"),
        ("bfloat16_compute", "were checked in float32, not as deployed"),
    ):
        ir.save(OPAQUE[name](), tmp_path / f"{name}.onnx")
        code, out, _ = run(capsys, tmp_path / f"{name}.onnx")
        assert code == 0
        assert words in " ".join(out.split())
        assert max(map(len, out.splitlines())) <= 100
    text = "g (float[N,4] x) => (float[N,4] y, float[N,4] z) { n = RandomNormalLike(x) y = Add(x, n) z = Sub(x, x) }"
    ir.save(model(text), tmp_path / "random.onnx")
    _, out, _ = run(capsys, tmp_path / "random.onnx")
    assert "the model draws random numbers" in out
    assert "says nothing (constant on every input tried): z" in out
