"""Strings that a regular expression matches, drawn at random: nothing else would show what it does."""

from __future__ import annotations

import re

import numpy as np

_ANY = "abcxyz019_"
_CLASSES = {"w": _ANY, "d": "0123456789", "s": " ", "W": " -", "D": "abc-", "S": "abc019"}
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
_ASSERTIONS = "bBAzZ"
_MOST_REPEATS = 4


def matching(pattern: str, rng: np.random.Generator, count: int = 4) -> list[str]:
    """Some strings that a pattern matches as a whole; fewer where it says more than can be followed.

    Understood are literals, classes, groups, alternatives, repetitions and anchors; each string is checked against
    Python's own idea of the pattern.
    """
    try:
        compiled = re.compile(pattern)
        drawn = [_Sampler(pattern, rng).alternatives() for _ in range(count)]
    except (re.error, ValueError, IndexError):
        return []
    return [text for text in drawn if compiled.fullmatch(text)]


class _Sampler:
    """Reads a pattern from left to right and writes a string that it matches."""

    def __init__(self, pattern: str, rng: np.random.Generator) -> None:
        self.pattern = pattern
        self.rng = rng
        self.at = 0

    def alternatives(self) -> str:
        """One of what stands between bars, up to the end or the closing parenthesis."""
        branches = [self._sequence()]
        while self._peek() == "|":
            self.at += 1
            branches.append(self._sequence())
        return branches[int(self.rng.integers(len(branches)))]

    def _peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def _take(self) -> str:
        self.at += 1
        return self.pattern[self.at - 1]

    def _sequence(self) -> str:
        text = ""
        while self._peek() not in ("", "|", ")"):
            start = self.at
            first = self._atom()
            low, high = self._repeats()
            after = self.at
            times = int(self.rng.integers(low, high + 1))
            text += first if times else ""
            for _ in range(times - 1):  # each time anew
                self.at = start
                text += self._atom()
            self.at = after
        return text

    def _repeats(self) -> tuple[int, int]:
        sign = self._peek()
        if sign == "{":
            end = self.pattern.index("}", self.at)
            low, _, high = self.pattern[self.at + 1 : end].partition(",")
            bounds = (int(low or 0), int(high) if high else int(low or 0) + ("," in self.pattern[self.at : end]) * 3)
            self.at = end + 1
        elif sign and sign in "*+?":
            self.at += 1
            bounds = {"*": (0, _MOST_REPEATS), "+": (1, _MOST_REPEATS), "?": (0, 1)}[sign]
        else:
            return 1, 1
        if self._peek() == "?":  # as few as possible: what matches is the same
            self.at += 1
        return bounds[0], max(bounds[0], min(bounds[1], bounds[0] + _MOST_REPEATS))

    def _atom(self) -> str:
        sign = self._take()
        if sign == "(":
            if self.pattern.startswith("?:", self.at):
                self.at += 2
            elif self._peek() == "?":
                raise ValueError("a group that looks around or has a name")
            text = self.alternatives()
            self._take()
            return text
        if sign == "[":
            return self._one_of(self._class())
        if sign in "^$":
            return ""
        if sign == ".":
            return self._one_of(_ANY)
        if sign == "\\":
            sign = self._take()
            return "" if sign in _ASSERTIONS else self._one_of(_CLASSES.get(sign) or _ESCAPED.get(sign, sign))
        return sign

    def _class(self) -> str:
        negated = self._peek() == "^"
        self.at += negated
        members = ""
        while (sign := self._take()) != "]" or not members:
            if sign == "\\":
                sign = self._take()
                members += _CLASSES.get(sign) or _ESCAPED.get(sign, sign)
            elif self._peek() == "-" and self.pattern[self.at + 1] != "]":
                last = self.pattern[self.at + 1]
                self.at += 2
                members += "".join(map(chr, range(ord(sign), ord(last) + 1)))
            else:
                members += sign
        return "".join(c for c in _ANY + " -." if c not in members) if negated else members

    def _one_of(self, characters: str) -> str:
        return characters[int(self.rng.integers(len(characters)))]
