"""Loops that a condition ends, with buffers for what they make longer, as bundles: on every way like their network."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from graphopt.bundles import read_bundle
from graphopt.bundles.plan import Loop, walk
from graphopt.cli.main import main
from graphopt.verifying import verify
from tests.passes.dynamic.test_grow_state import attending

EXAMPLE = Path(__file__).parents[3] / "examples" / "token_loop.py"
ENDS = "again = And(both, small)"
# An If in the condition, as an exporter writes `while n < limit and small`: forced, it does not end the Loop any more.
DECIDES = """again = If(both) <
    then_branch = a () => (bool a1) { a1 = Less(first, edge) },
    else_branch = b () => (bool b1) { b1 = Constant<value = bool {0}>() }
>"""


@pytest.mark.parametrize("again", [ENDS, DECIDES])
@pytest.mark.parametrize("keys", [0, 2])
def test_it_is_verified_on_every_way(again: str, keys: int, tmp_path: Path) -> None:
    source, made = tmp_path / "net.onnx", tmp_path / "net.bundle"
    text = attending(keys=keys).replace(ENDS, again).replace("float edge = {0.2}", "float edge = {1e30}")
    onnx.save(onnx.parser.parse_model(text), source)
    command = ["optimize", str(source), "--recipe", "static", "--target", "tensorrt-rtx", "-o", str(made)]
    assert main(command) == 0
    _, plan = read_bundle(made)
    (loop,) = (step for step in walk(plan.steps) if isinstance(step, Loop))
    assert loop.trips is not None
    shapes = {state.like.name: state.like.shape for state in loop.state if state.like is not None}
    assert [shapes[name] for name in ("s1/buffer", "r1/buffer")] == [[1, keys + 5, 4], [1, 7, 4]]
    found = verify(source, made)
    assert found.passed
    assert found.verification.coverage["ways"]["tried"] > 2


def test_more_turns_than_the_network_takes_would_be_found(tmp_path: Path) -> None:
    """A count that is too small is seen on the inputs, which nothing limits."""
    source, made = tmp_path / "net.onnx", tmp_path / "net.bundle"
    text = attending().replace("float edge = {0.2}", "float edge = {1e30}")
    onnx.save(onnx.parser.parse_model(text), source)
    onnx.save(onnx.parser.parse_model(text.replace("Loop(, yes", "Loop(trips, yes")), tmp_path / "short.onnx")
    command = ["optimize", str(tmp_path / "short.onnx"), "--recipe", "static", "--target", "tensorrt-rtx"]
    assert main([*command, "-o", str(made)]) == 0
    assert not verify(source, made).passed
    assert verify(tmp_path / "short.onnx", made).passed


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["for", "while"])
def test_the_caches_of_the_example_are_buffers(loop: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    text = EXAMPLE.read_text()
    if loop == "while":
        head = "        for _ in range(LONGEST):\n"
        assert head in text
        text = text.replace(head, "        while words.shape[1] < 4 + LONGEST:\n")
    (tmp_path / "nets.py").write_text(text)
    source, made = tmp_path / "net.onnx", tmp_path / "net.bundle"
    assert main(["export", f"{tmp_path / 'nets.py'}:network", "-o", str(source)]) == 0
    assert main(["optimize", str(source), "--recipe", "static", "--target", "tensorrt-rtx", "-o", str(made)]) == 0
    _, plan = read_bundle(made)
    (step,) = (step for step in walk(plan.steps) if isinstance(step, Loop))
    likes = [state.like for state in step.state if state.like is not None]
    buffers = [list(like.shape or []) for like in likes if "buffer" in like.name]
    words = [[1, 20]] if loop == "while" else []  # how many there are is asked in every turn
    assert sorted(buffers, key=len) == [*words, *[[1, 4, 19, 8]] * 4]
    assert len(step.stacks) == 1 - len(words)
