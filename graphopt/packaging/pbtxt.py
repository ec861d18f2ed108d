"""Protobuf text, written field by field: strings are escaped, and nothing is pasted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Token(str):
    """The name of an enum's value: written without quotes."""

    __slots__ = ()


Scalar = str | int | Token
Message = Sequence[tuple[str, "Field"]]
"""The fields of a message, in the order in which they are written."""
Field = Scalar | Sequence[int] | Sequence[str] | Message


def write(message: Message) -> str:
    """A message as text, one field a line, ends with a newline.

    A value is a string, an `int`, a `Token`, a list of integers or strings (a repeated scalar), or a list of pairs: a
    message. A repeated message is several pairs of one name.
    """
    return "".join(f"{line}\n" for line in _lines(message, ""))


def quoted(text: str) -> str:
    """A string in quotes. Control characters become octal escapes; all else that is not ASCII stays as it is."""
    return '"' + "".join(map(_character, text)) + '"'


def _character(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    # Octal escapes end after three digits; hexadecimal ones would swallow digits that follow.
    return f"\\{ord(character):03o}" if ord(character) < 32 or ord(character) == 127 else character


def _lines(message: Message, indent: str) -> Iterator[str]:
    for name, value in message:
        if isinstance(value, (str, int)):
            yield f"{indent}{name}: {_scalar(value)}"
        elif all(isinstance(item, (str, int)) for item in value) and (value or name in _REPEATED):
            inside = ", ".join(_scalar(item) for item in value if isinstance(item, (str, int)))
            yield f"{indent}{name}: [ {inside} ]" if inside else f"{indent}{name}: [ ]"
        else:
            yield f"{indent}{name} {{"
            yield from _lines([item for item in value if isinstance(item, tuple)], indent + "  ")
            yield f"{indent}}}"


_REPEATED = frozenset({"shape", "dims"})
"""What is a list even where it is empty: an empty message looks the same."""


def _scalar(value: Scalar) -> str:
    if isinstance(value, Token) or not isinstance(value, str):
        return str(value)
    return quoted(value)
