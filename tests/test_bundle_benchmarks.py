"""The programs that time and count bundles: what they compare is the same thing, and a difference is seen."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import host_overhead, silero, split_corpus
from tests.models.nests import Nest


@pytest.mark.parametrize("case", list(host_overhead.CASES))
def test_what_is_timed_runs(case: str) -> None:
    """The host's result is compared with ONNX Runtime's Loop where the case is made."""
    calls, count = host_overhead.CASES[case]()
    assert {"by hand", "host"} <= set(calls) and count >= 64
    for call in calls.values():
        call()


def test_a_nest_is_the_same_every_way_and_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    nest = Nest(3, depth=2)
    content, many = nest.model.SerializeToString(), nest.feeds(2)
    found = split_corpus.check(content, many)
    assert int(found.pop("steps")) > 0
    assert found == {"control flow left": "none", "split": "same", "split, as arrays": "same", "merged": "same"}

    def wrong(parts: Any, given: Any) -> Any:
        return [{name: value + 1 for name, value in one.items()} for one in split_corpus._run_plain(parts, given)]

    monkeypatch.setattr(split_corpus, "_run_merged", wrong)
    assert split_corpus.check(content, many)["merged"] == "different"


def test_the_corpus_is_not_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx.backend.test.case.node as node

    text = '<ir_version: 8, opset_import: ["": 17]> g (bool c, float[2] x) => (float[2] y) { y = OP }'
    sides = "then_branch = t () => (float[2] p) { p = Abs (x) }, else_branch = e () => (float[2] q) { q = Neg (x) }"
    branch = f"If (c) <{sides}>"
    cases = [
        type("Case", (), {"name": op[:3], "model": onnx.parser.parse_model(text.replace("OP", op)), "data_sets": []})
        for op in ("Abs (x)", branch)
    ]
    monkeypatch.setattr(node, "collect_testcases", lambda: cases)
    assert [name for name, _, _ in split_corpus.corpus()] == ["If "]


def test_the_sound_is_sound_like_and_every_chunk_follows_the_one_before() -> None:
    sound = silero.sound(16000, 1.0)
    assert sound.shape == (16000,) and sound.dtype == np.float32
    assert 0.05 < np.abs(sound).max() <= 1 and np.array_equal(sound, silero.sound(16000, 1.0))
    heard = [*silero.chunks(16000, 1.0)]
    assert len(heard) == 31 and {chunk.shape for chunk in heard} == {(1, 576)}
    assert not heard[0][0, :64].any()
    for one, other in pairwise(heard):
        np.testing.assert_array_equal(other[0, :64], one[0, -64:])
