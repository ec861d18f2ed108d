"""Faults of fixed kinds in kernels: each kind gives the places of a source where it can be, as edits of its text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """Characters ``start`` to ``end`` of a source become ``new``."""

    start: int
    end: int
    new: str

    def apply(self, text: str) -> str:
        """The text, edited."""
        return text[: self.start] + self.new + text[self.end :]


_OPERAND = r"[\w.:]+(?:<\w+>)?(?:\((?:[^()]|\([^()]*\))*\))?(?:\[[^\[\]]*\])*"
_NO_CODE = re.compile(
    r"//[^\n]*"
    r"|^[ \t]*#[^\n]*"
    r"|\bstatic_assert\([^;]*;"
    r"|\btemplate <[^\n]*"
    r"|^[ \t]*(?:static )?constexpr [^;]*;"
    r"|(?s:\bDEVICE constexpr bool .*?^\})"  # a check that the compiler makes
    r"|\b(?:SHARED|DEVICE_STATE|KERNEL)\([^\n]*"
    r"|\b(?:u32|u32x4|float|int|Sum) \(?&?\w+\)?(?:\[[^\]]*\])+(?:, \w+(?:\[[^\]]*\])+)*",  # how large an array is
    re.MULTILINE,
)
_SWAPPED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}


def code_of(text: str) -> str:
    """The source with spaces for what is no code: comments, directives, declarations of sizes."""
    return _NO_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def barrier(code: str) -> Iterator[Edit]:
    """A barrier, a wait, a commit or a release left out; one wait less; an atomic or a load that orders nothing."""
    for match in re.finditer(r"\b(?:sync_block|sync_warp|fence|async_commit)\(\);", code):
        yield Edit(*match.span(), ";")
    for match in re.finditer(r"\basync_wait<([^>]*)>\(\);", code):
        yield Edit(*match.span(), ";")
        yield Edit(*match.span(), f"async_wait<{match[1]} + 1>();")
    for match in re.finditer(r"\bstore_release\([^;]*;|\bwhile \(load_acquire\([^;]*;", code):
        yield Edit(*match.span(), ";")
    for match in re.finditer(r"(?<!\w )\batomic_add\(", code):
        yield Edit(*match.span(), "atomic_add_relaxed(")
    for match in re.finditer(r"(?<!\w )\bload16_through_l2\(", code):
        yield Edit(*match.span(), "load16(")


def bound(code: str) -> Iterator[Edit]:
    """A comparison that includes what it left out, or the other way round; one more or less; a condition dropped."""
    for match in re.finditer(r"(?<= )(<|<=|>|>=|==|!=)(?= )", code):
        yield Edit(*match.span(), _SWAPPED[match[1]])
    for match in re.finditer(r" [+-] 1\b(?!\.)", code):
        yield Edit(*match.span(), "")
    for match in re.finditer(rf"(!?{_OPERAND}(?: (?:[<>]=?|[=!]=) {_OPERAND})?) && ", code):
        yield Edit(*match.span(), "")
    for match in re.finditer(rf" && (!?{_OPERAND}(?: (?:[<>]=?|[=!]=) {_OPERAND})?)", code):
        yield Edit(*match.span(), "")


def swizzle(code: str) -> Iterator[Edit]:
    """Where a value lies in shared memory, or which lane has it: an exclusive or changed, a place not swizzled."""
    for match in re.finditer(rf" \^ (?:\((?:[^()]|\([^()]*\))*\)|{_OPERAND})", code):
        yield Edit(match.start(), match.start() + 3, " + ")
        yield Edit(*match.span(), "")
        yield Edit(match.end(), match.end(), " + 1")
    for match in re.finditer(r"\bswizzled<\w+>\(((?:[^(),]|\([^()]*\))*), ((?:[^()]|\([^()]*\))*)\)", code):
        width = re.match(r"swizzled<(\w+)>", match[0])
        assert width is not None
        yield Edit(*match.span(), f"(({match[1]}) * {width[1]} + ({match[2]}))")
        yield Edit(*match.span(), f"swizzled<{width[1]}>({match[1]}, ({match[2]}) ^ 1)")
    for match in re.finditer(r"\bshuffle_xor\(\w+, (\w+)\)", code):
        yield Edit(*match.span(1), f"{match[1]} * 2")
    for match in re.finditer(r"(?<=[*] )PITCH\b", code):
        yield Edit(*match.span(), "TILE")
        yield Edit(*match.span(), "(PITCH - 1)")


def fragment(code: str) -> Iterator[Edit]:
    """Which element a thread has: a factor halved or doubled, a term left out, another register or thread."""
    for match in re.finditer(r"(?<=[*/%] )(\d+)\b(?!\.)", code):
        yield Edit(*match.span(), str(2 * int(match[1])))
        if int(match[1]) > 1:
            yield Edit(*match.span(), str(int(match[1]) // 2))
    for match in re.finditer(r"(?<=\[)\d(?=\])", code):
        yield Edit(*match.span(), str(int(match[0]) ^ 1))
    for match in re.finditer(r"\b(lane|warp|thread)\(\)(?! \{)", code):
        if not re.search(r"for \(int \w+ = $", code[: match.start()]):  # whoever does it: all of it is done
            yield Edit(*match.span(), "(31 - lane())" if match[1] == "lane" else f"({match[0]} + 1)")
    for match in re.finditer(rf" \+ (?!1\b){_OPERAND}(?: [*/%] {_OPERAND})*", code):
        yield Edit(*match.span(), "")


def scale(code: str) -> Iterator[Edit]:
    """What is added or multiplied: a factor or a summand left out, one of another place, a sum begun anew or at 1."""
    for line in re.finditer(r"[^\n]+", code):
        if re.search(r"to_float|from_float|scale|bias|\bsums?\b|as_float", line[0]):
            for match in re.finditer(rf" [*+] ({_OPERAND})", line[0]):
                yield Edit(line.start() + match.start(), line.start() + match.end(), "")
            for match in re.finditer(r"\[(row|column|place|channel|i|k)\]", line[0]):
                yield Edit(line.start() + match.start(), line.start() + match.end(), "[0]")
    for match in re.finditer(r" \+= ", code):
        if not re.search(r"; \w+$", code[: match.start()]):  # the step of a loop
            yield Edit(*match.span(), " = ")
            yield Edit(*match.span(), " -= ")
    for match in re.finditer(r"\b(?:s|sum|sums\[i\]|of[^=;\n]*) = (0;|\{\};)", code):
        if match[1] == "0;":
            yield Edit(*match.span(1), "1;")


KINDS: dict[str, Callable[[str], Iterator[Edit]]] = {
    "barrier": barrier,
    "bound": bound,
    "swizzle": swizzle,
    "fragment index": fragment,
    "scale": scale,
}


def edits(kind: str, text: str) -> list[Edit]:
    """All the edits of a kind, each once."""
    return list(dict.fromkeys(KINDS[kind](code_of(text))))
