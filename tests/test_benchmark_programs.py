"""The benchmark programs judge others: here they are judged."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from benchmarks import corpus, faults, mutants, mutations, scaling
from benchmarks.common import CommandFailed, measure
from benchmarks.pool import Died, Pool
from tests.models import RUNNABLE, many_small_nodes


def test_pool_contains_crashes_and_exceptions() -> None:
    def task(index: int, folder: Path) -> int:
        assert list(folder.iterdir()) == []
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 2:
            raise ValueError("no such thing\nsecond line")
        return index * index

    results = dict(Pool[int](task, 5).results())
    assert results.pop(1) == Died("crash", "exit code -9")
    assert results.pop(2) == Died("exception", "ValueError: no such thing")
    assert results == {0: 0, 3: 9, 4: 16}


def test_pool_kills_what_hangs() -> None:
    def task(index: int, folder: Path) -> int:
        if index == 0:
            signal.pause()
        return index

    results = dict(Pool[int](task, 3, timeout=1).results())
    assert results == {0: Died("timeout", "longer than 1 s"), 1: 1, 2: 2}


def test_measure_sees_the_child_only() -> None:
    held = np.ones(40_000_000)  # 320 MB here must not count there
    usage = measure([sys.executable, "-S", "-c", "b = bytearray(50_000_000); b[::4096] = b[::4096]"])
    assert held.size
    assert 50_000_000 < usage.peak_bytes < 150_000_000
    assert usage.wall > 0
    with pytest.raises(CommandFailed, match="it went wrong"):
        measure([sys.executable, "-S", "-c", "import sys; sys.exit('it went wrong')"])


@pytest.fixture(scope="module")
def case() -> Any:
    """The corpus case of an elementwise op, made by hand: making the corpus takes seconds."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[3] x) => (float[3] y) { y = Abs(x) }'
    )
    x = np.array([-1, 2, -3], np.float32)
    return type("Case", (), {"name": "test_abs", "model": model, "data_sets": [([x], [np.abs(x)])]})


def rewritten(text: str) -> corpus.Tool:
    """A tool that writes another model."""
    return lambda source, out: onnx.save(
        onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}'), out
    )


def fail(source: Path, out: Path) -> None:
    raise TypeError("a bug")


@pytest.mark.parametrize(
    ("tool", "kind"),
    [
        (corpus.graphopt_unverified, "ok"),
        (rewritten("g (float[3] x) => (float[3] y) { y = Abs(x) }"), "ok"),
        (rewritten("g (float[3] x) => (float[3] y) { y = Neg(x) }"), "wrong"),
        (rewritten("g (float[N] x) => (float[N] y) { y = Abs(x) }"), "interface"),
        (rewritten("g (float[3] z) => (float[3] y) { y = Abs(z) }"), "interface"),
        (rewritten("g (float[3] x) => (float[3] y) { y = Abs(missing) }"), "invalid"),
        (fail, "exception"),
    ],
)
def test_corpus_outcomes(
    tool: corpus.Tool, kind: str, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(corpus.TOOLS, "tool", tool)
    (outcome,) = corpus.run_case(case, ["tool"], tmp_path)
    assert (outcome.kind, outcome.tool) == (kind, "tool")


def test_corpus_leaves_out_what_onnxruntime_gets_wrong(case: Any, tmp_path: Path) -> None:
    ((inputs, _),) = case.data_sets
    other = type("Case", (), {"name": "n", "model": case.model, "data_sets": [(inputs, [np.zeros(3, np.float32)])]})
    (outcome,) = corpus.run_case(other, [corpus.UNVERIFIED], tmp_path)
    assert (outcome.kind, outcome.tool) == ("differs", "")


@pytest.mark.parametrize("kind", faults.KINDS)
def test_faults_change_the_file(kind: str, tmp_path: Path) -> None:
    found = 0
    for name in ("transformer_block", "opset_9", "if_on_shape"):
        path = tmp_path / f"{name}.onnx"
        ir.save(RUNNABLE[name](), path)
        original = ir.to_proto(ir.load(path)).SerializeToString(deterministic=True)
        for number in range(len(list(faults.KINDS[kind](mutations.load_inferred(path))))):
            model = mutations.load_inferred(path)
            fault = list(faults.KINDS[kind](model))[number]()
            assert fault
            assert ir.to_proto(model).SerializeToString(deterministic=True) != original
            found += 1
    assert found >= 3


def test_a_fault_is_killed_and_a_harmless_one_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "mlp.onnx"
    ir.save(RUNNABLE["mlp"](), path)
    outcomes = {}
    for number in range(len(list(faults.KINDS["drop node"](mutations.load_inferred(path))))):
        mutant = mutations.run_site("drop node", (path, number), tmp_path / "mutant.onnx")
        assert mutant is not None
        outcomes[mutant.fault] = mutant.outcome
    dropped = {fault.split()[1]: outcome for fault, outcome in outcomes.items()}
    assert dropped.pop("unused") == "equivalent"
    assert len(dropped) >= 3
    assert set(dropped.values()) == {"killed"}


def test_a_survivor_is_harmless_where_every_operator_gives_the_same_bits(tmp_path: Path) -> None:
    """Adding zeros ends a chain that the runtime computes in float32; without, another value is rounded."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float16[N, 16] x) => (float16[N, M] y)
        <float16[1] zero = {0}> { t = Transpose(x)  m = MatMul(x, t)  DROP  y = Exp(s) }"""
    original, same, other = (tmp_path / f"{name}.onnx" for name in ("original", "same", "other"))
    onnx.save(onnx.parser.parse_model(text.replace("DROP", "s = Add(m, zero)")), original)
    onnx.save(onnx.parser.parse_model(text.replace("DROP", "s = Identity(m)")), same)
    onnx.save(onnx.parser.parse_model(text.replace("DROP", "s = Neg(m)")), other)
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float16)
    assert mutations._same_by_definition(original, same, [{"x": x}])
    assert not mutations._same_by_definition(original, other, [{"x": x}])
    verdict, how = mutations.explain(original, other)
    assert not verdict and how.startswith("MISSED")


def test_sites_are_drawn_once_each_and_the_same_every_time(tmp_path: Path) -> None:
    paths = [tmp_path / "small.onnx", tmp_path / "mlp.onnx"]
    ir.save(many_small_nodes(100), paths[0])
    ir.save(RUNNABLE["mlp"](), paths[1])
    first, second = (mutations.draw_sites(paths, "wrong scale", seed=3) for _ in range(2))
    assert first == second
    assert len(set(first)) == len(first)
    assert {path for path, _ in first} == set(paths)
    assert first != mutations.draw_sites(paths, "wrong scale", seed=4)


def test_exponent_of_a_power_law() -> None:
    times = {
        size: [0.5 + 1e-4 * size**1.3 * (1 + noise) for noise in (-0.01, 0, 0.01)] for size in (1000, 10_000, 100_000)
    }
    found = scaling.exponent(times, [0.5, 0.5, 0.5])
    assert found is not None
    assert abs(found["value"] - 1.3) < 0.01
    assert found["low"] <= found["value"] <= found["high"]
    assert scaling.exponent({100: [1.0], 200: [2.0]}, [0.1]) is None


def test_what_became_of_faults_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    def mutant(kind: str, outcome: str) -> mutations.Mutant:
        return mutations.Mutant(kind, "net", f"{outcome} one", outcome, "because", 0.1)

    made = [mutant("a", "killed"), mutant("a", "killed"), mutant("a", "survived"), mutant("b", "equivalent")]
    counts = mutants.count_outcomes(made, ["a", "b", "c"])
    assert mutants.kill_rate(counts) == 2 / 3
    found = mutants.to_json(made, counts)
    assert found["by_kind"] == {
        "a": {"killed": 2, "mutants": 3, "equivalent": 0},
        "b": {"killed": 0, "mutants": 0, "equivalent": 1},
        "c": {"killed": 0, "mutants": 0, "equivalent": 0},
        "all": {"killed": 2, "mutants": 3, "equivalent": 1},
    }
    assert (found["survivors"], found["equivalent"]) == ([made[2]], [made[3]])
    mutants.print_left(made, lambda one: one.fault)
    assert capsys.readouterr().out.splitlines() == [
        "equivalent · b · equivalent one · because",
        "survived · a · survived one · because",
    ]


def test_nothing_was_put_in() -> None:
    assert mutants.kill_rate(mutants.count_outcomes([], ["a"])) == 0
