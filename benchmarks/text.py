"""Real text without a download: Python's own documentation, out of ``pydoc_data.topics``, split by topic.

Topics quote each other at length (``for`` is a part of ``compound``), so that topics alone are no split: those that
share a passage stay together, and what a passage says is only ever on one side. The text differs between versions of
Python; results name its checksum.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

PER_CENT = {"held_out": 15, "calibration": 15}  # of the text; the rest is for training
_QUOTED = 80  # characters: a shorter paragraph that two topics have in common is a turn of phrase
_BYTES = 256


@dataclass(frozen=True)
class Split:
    """Texts, one a topic, without the passages that an earlier topic had."""

    training: tuple[str, ...]
    calibration: tuple[str, ...]
    held_out: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """What a result has to say about its text."""
        everything = "\0".join((*self.training, *self.calibration, *self.held_out))
        return {
            "source": "pydoc_data.topics",
            "python": ".".join(map(str, sys.version_info[:3])),
            "sha256": hashlib.sha256(everything.encode()).hexdigest()[:16],
            "topics": {name: len(texts) for name, texts in vars(self).items()},
            "bytes": {name: sum(len(text.encode()) for text in texts) for name, texts in vars(self).items()},
        }


def split(topics: Mapping[str, str] | None = None, *, seed: int = 0) -> Split:
    """Split text by topic.

    Args:
        topics: Text by topic; default: the documentation that comes with Python.
        seed: Which topics go where.

    Returns:
        Training, calibration and held-out texts, no passage in two of them. A group of topics goes to the first of
        held-out and calibration that still has room for it, in an order that the seed gives, else to training.
    """
    if topics is None:
        from pydoc_data import topics as documentation

        topics = dict(documentation.topics)
    groups = _groups(topics)
    texts = [["\n\n".join(own) for own in _texts(topics, names)] for names in groups]
    sizes = [sum(map(len, own)) for own in texts]
    room = {name: share * sum(sizes) // 100 for name, share in PER_CENT.items()}
    chosen: dict[str, list[str]] = {"training": [], "calibration": [], "held_out": []}
    for index in sorted(range(len(texts)), key=lambda index: _rank(texts[index][0], seed)):
        part = next((name for name, left in room.items() if sizes[index] <= left), "training")
        if part in room:
            room[part] -= sizes[index]
        chosen[part] += filter(None, texts[index])
    return Split(**{name: tuple(found) for name, found in chosen.items()})


def _rank(text: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest()


def _groups(topics: Mapping[str, str]) -> list[list[str]]:
    """Topics that share a passage, directly or through others."""
    group = {name: [name] for name in sorted(topics)}
    first: dict[str, str] = {}
    for name in sorted(topics):
        for passage in _passages([topics[name]]):
            if len(passage) < _QUOTED:
                continue
            one, other = group[first.setdefault(passage, name)], group[name]
            if one is not other:
                one += other
                group.update(dict.fromkeys(other, one))
    return list({id(names): names for names in group.values()}.values())


def _texts(topics: Mapping[str, str], names: Sequence[str]) -> Iterator[list[str]]:
    """The paragraphs of each topic of a group, as they stand, without those that were there before."""
    seen: set[str] = set()
    for name in sorted(names, key=lambda name: (-len(topics[name]), name)):
        own = []
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            passage = " ".join(paragraph.split())
            if len(passage) >= _QUOTED and passage in seen:
                continue
            seen.add(passage)
            own.append(paragraph.strip("\n"))
        yield own


def _passages(texts: Iterable[str]) -> Iterator[str]:
    """Paragraphs with their white space evened out: quotations are indented anew."""
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            if passage := " ".join(paragraph.split()):
                yield passage


def sentences(texts: Iterable[str], *, fewest: int = 4, most: int = 60) -> list[str]:
    """The sentences of running text in ``texts`` that have so many words, each once, in order."""
    found: dict[str, None] = {}
    for text in texts:
        for sentence in re.split(r"(?<=[.?!])\s+", " ".join(text.split())):
            words = re.findall(r"[A-Za-z]+[,.?!]?", sentence)
            if fewest <= len(words) <= most:
                found[" ".join(words)] = None
    return list(found)


# -- tokens for the language model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """Byte pairs: token 0 ends a text, tokens below 256 are bytes, each later one is a pair of earlier tokens."""

    merges: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        lengths = [1] * _BYTES
        for left, right in self.merges:
            lengths.append(lengths[left] + lengths[right])
        object.__setattr__(self, "lengths", tuple(lengths))

    def __len__(self) -> int:
        return _BYTES + len(self.merges)

    def encode(self, texts: Iterable[str]) -> Array:
        """int64 [tokens]: the texts in turn, token 0 after each."""
        tokens = _to_bytes(texts)
        for number, pair in enumerate(self.merges):
            tokens = _merge(tokens, pair, _BYTES + number)
        return tokens

    def decode(self, tokens: Array) -> list[str]:
        """The texts of what `encode` made of them."""
        spelled = [bytes([byte]) for byte in range(_BYTES)]
        for left, right in self.merges:
            spelled.append(spelled[left] + spelled[right])
        return b"".join(spelled[token] for token in tokens).decode().split("\0")[:-1]


def learn(texts: Iterable[str], merges: int) -> Vocabulary:
    """The vocabulary of the ``merges`` pairs that are most frequent when their turn comes.

    The end of a text is in no pair. Ties go to the pair of the lowest tokens. Fewer merges are made where no pair
    comes twice.
    """
    tokens = _to_bytes(texts)
    made: list[tuple[int, int]] = []
    size = _BYTES + merges
    while len(made) < merges:
        inside = (tokens[:-1] != 0) & (tokens[1:] != 0)
        counts = np.bincount((tokens[:-1] * size + tokens[1:])[inside], minlength=1)
        if counts.max() < 2:
            break
        left, right = divmod(int(counts.argmax()), size)
        tokens = _merge(tokens, (left, right), _BYTES + len(made))
        made.append((left, right))
    return Vocabulary(tuple(made))


def _to_bytes(texts: Iterable[str]) -> Array:
    return np.frombuffer(b"".join(text.encode() + b"\0" for text in texts), np.uint8).astype(np.int64)


def _merge(tokens: Array, pair: tuple[int, int], merged: int) -> Array:
    """``tokens`` with ``merged`` in place of the pair; of pairs that overlap (aaa), the left one."""
    found = (tokens[:-1] == pair[0]) & (tokens[1:] == pair[1])
    places = np.flatnonzero(found)
    if pair[0] == pair[1] and places.size:
        starts = np.concatenate([[True], np.diff(places) > 1])
        in_run = np.arange(places.size) - np.flatnonzero(starts)[np.cumsum(starts) - 1]
        places = places[in_run % 2 == 0]
    tokens = tokens.copy()
    tokens[places] = merged
    return np.delete(tokens, places + 1)


def windows(tokens: Array, length: int) -> Array:
    """[count, length + 1]: windows of ``length`` tokens and the one after, which the next window begins with."""
    count = (len(tokens) - 1) // length
    if count < 1:
        raise ValueError(f"{len(tokens)} tokens do not fill a window of {length} and the one after")
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[: count * length : length].copy()
