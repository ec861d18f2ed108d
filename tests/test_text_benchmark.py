"""The benchmarks on text: a split that leaks nothing, tokens that spell the text again, right measures."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import densities, text
from benchmarks.densities import METHODS, arguments, gains, is_whole, linear_elements

Array = np.ndarray[Any, Any]

LONG = "A passage that is quoted elsewhere: it is long enough not to be a turn of phrase that two texts share."
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def topics(count: int = 40) -> dict[str, str]:
    return {f"t{index}": f"Topic {index}\n\n" + f"words of number {index} " * 10 for index in range(10, 10 + count)}


def sides(made: text.Split) -> list[set[str]]:
    return [set(texts) for texts in vars(made).values()]


def test_every_topic_is_on_one_side() -> None:
    made = text.split(topics())
    sizes = {name: len(texts) for name, texts in vars(made).items()}
    assert sizes == {"training": 28, "calibration": 6, "held_out": 6}
    assert set.union(*sides(made)) == {body.strip("\n") for body in topics().values()}


def test_the_seed_gives_the_split() -> None:
    assert text.split(topics()) == text.split(topics())
    assert text.split(topics(), seed=1) != text.split(topics())


def test_topics_that_quote_each_other_stay_together() -> None:
    quoting = topics()
    for name in ("t13", "t27", "t39"):
        quoting[name] += f"\n\n   {LONG.replace(': ', ':' + chr(10) + '   ')}"  # indented and wrapped anew
    held = [side for side in sides(text.split(quoting)) if any("Topic 13\n" in own for own in side)]
    assert len(held) == 1
    for number in (27, 39):
        assert any(f"Topic {number}\n" in own for own in held[0])
    everything = " ".join(" ".join(own.split()) for side in sides(text.split(quoting)) for own in side)
    assert everything.count(LONG) == 1


def test_no_passage_of_python_s_documentation_is_on_two_sides() -> None:
    made = text.split()
    passages = [
        {p for own in side for block in own.split("\n\n") if len(p := " ".join(block.split())) >= 80}
        for side in sides(made)
    ]
    assert all(len(side) > 50 for side in passages)
    for index, side in enumerate(passages):
        assert side.isdisjoint(set().union(*passages[:index]))
    facts = made.facts()
    total = sum(facts["bytes"].values())
    assert 0.1 < facts["bytes"]["held_out"] / total < 0.2
    assert 0.1 < facts["bytes"]["calibration"] / total < 0.2


@pytest.mark.parametrize("merges", [0, 1, 40])
def test_tokens_spell_the_text(merges: int) -> None:
    texts = ["aaaa aaa abab", "Zoë — “quoted”\n\n  aaa", "x"]
    vocabulary = text.learn(texts[:2], merges)
    tokens = vocabulary.encode(texts)
    assert vocabulary.decode(tokens) == texts
    assert tokens.max() < len(vocabulary)
    assert sum(vocabulary.lengths[token] for token in tokens) == sum(len(own.encode()) + 1 for own in texts)


def test_the_most_frequent_pair_is_merged_first() -> None:
    vocabulary = text.learn(["ababab ab c"], 2)
    assert vocabulary.merges[0] == (ord("a"), ord("b"))
    assert text.learn(["abc"], 5).merges == ()  # no pair comes twice
    assert text.learn(["a", "a", "a"], 5).merges == ()  # nor does one reach over the end of a text


def test_overlapping_pairs_are_taken_from_the_left() -> None:
    vocabulary = text.Vocabulary(((97, 97),))
    assert vocabulary.encode(["aaaaa", "baab"]).tolist() == [256, 256, 97, 0, 98, 256, 98, 0]


def test_windows_share_the_token_at_their_border() -> None:
    assert text.windows(np.arange(8), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    with pytest.raises(ValueError, match="do not fill"):
        text.windows(np.arange(3), 3)


def test_sentences() -> None:
    assert text.sentences(["Too short. This one has just\nenough words. This one has just enough words."]) == [
        "This one has just enough words."
    ]


@needs_torch
def test_perplexity() -> None:
    from benchmarks.decoder import n_gram_perplexity, perplexity

    rng = np.random.default_rng(0)
    rows = rng.integers(0, 8, (5, 4))
    assert perplexity(lambda tokens: np.zeros((*tokens.shape, 8)), rows, batch=2) == pytest.approx(8)
    table = rng.normal(size=(8, 8))
    chances = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    expected = np.exp(-np.log(chances[rows[:, :-1], rows[:, 1:]]).mean())
    assert perplexity(lambda tokens: 100 + table[tokens], rows) == pytest.approx(expected)
    assert n_gram_perplexity(rows.ravel(), rows, 8, (1, 0)) == pytest.approx(8)
    counts = np.bincount(rows.ravel(), minlength=8) / rows.size
    expected = np.exp(-np.log(counts[rows[:, 1:]]).mean())
    assert n_gram_perplexity(rows.ravel(), rows, 8, (0, 1)) == pytest.approx(expected)
    cycle = np.arange(64) % 8  # each token is certain once the one before is known
    assert n_gram_perplexity(cycle, cycle[None, :32], 8, (0, 0, 1)) == pytest.approx(1)


@needs_torch
@pytest.mark.slow
def test_training_lowers_the_perplexity_and_is_kept(tmp_path: Path) -> None:
    from benchmarks.decoder import Config, trained
    from benchmarks.language_model import measure

    tokens = np.tile(np.arange(1, 33), 40)
    rows = text.windows(tokens, 16)
    config = Config(64, layers=1, width=32, heads=2, hidden=48, context=16, batch=8, steps=60)
    said: list[str] = []
    path = trained(config, tokens, tmp_path, say=said.append)
    assert measure(path, rows) < 8 < 64
    again = trained(config, tokens, tmp_path, say=said.append)
    assert again == path
    assert said == [f"already trained: {path.name}"]
    assert Config(64, steps=61).key(tokens) != Config(64, steps=60).key(tokens) != Config(64, steps=60).key(tokens[1:])
    weights = 4 * 32 * 32 + 3 * 32 * 48 + 64 * 32
    assert linear_elements(path) == weights  # the embedding, as large as the head, is not counted


def test_linear_elements(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2,3] x, int64[2] i) => (float[2,3] y, float[2,3] e, float[2,2] z)
        <float[3,3] w = {1,2,3,4,5,6,7,8,9}, float[3,3] t = {1,2,3,4,5,6,7,8,9},
         float[5,3] table = {0}, float[3] b = {1,2,3}>
        { a = MatMul(x, w)  c = MatMul(a, w)  tt = Transpose(t)  y = Gemm(c, tt, b)  e = Gather(table, i)
          ey = Transpose(e)  z = MatMul(y, ey) }""")
    model.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(np.zeros((5, 3), np.float32), "table"))
    onnx.save(model, tmp_path / "m.onnx")
    assert linear_elements(tmp_path / "m.onnx") == 9 + 9


def test_gains_are_differences_between_stages() -> None:
    values = {"svd": {0.5: 1.0}, "m": {0.5: 1.25}, "m-pifa": {0.5: 1.0}}
    assert gains(values) == {"m": {0.5: 0.25}, "m-pifa": {0.5: -0.25}}


def test_a_part_is_no_result() -> None:
    parser = arguments("Doc.")
    assert is_whole(parser.parse_args([]))
    assert not is_whole(parser.parse_args(["--densities", "0.7"]))
    assert not is_whole(parser.parse_args(["--methods", "svd"]))
    assert set(densities.TITLES) == set(METHODS)


def test_another_density_than_was_asked_for_is_no_result() -> None:
    made = densities.Compressed("m", 0.5, Path("m.onnx"), 0.501, 1, 1, 1.0)
    made.require_density()
    for density in (0.56, 0.46):
        with pytest.raises(SystemExit, match=rf"M: density {density}00 where 0\.5 was asked for"):
            dataclasses.replace(made, density=density).require_density()


def test_cosine_is_by_row() -> None:
    from benchmarks.minilm_density import cosine

    one = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]], np.float32)
    other = np.array([[3.0, 0.0], [-1.0, -1.0], [0.0, 5.0]], np.float32)
    np.testing.assert_allclose(cosine(one, other), [1, -1, 0], atol=1e-12)


def test_plots_are_the_same_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    monkeypatch.setattr(plots, "IMAGES", tmp_path)
    monkeypatch.setattr(plots, "ROOT", tmp_path)
    drawn = []
    for _ in range(2):
        path = plots.lines("p", [0.9, 0.5], {"a": [1, 2], "b": [3, 40]}, labels=("x", "y"), reference=("r", 1.5))
        assert path is not None
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1]
    assert b"<svg" in drawn[0]
