"""What ONNX Runtime says when a run fails, without what tells a user nothing."""

from __future__ import annotations

import re

_NODE = re.compile(r"Non-zero status code returned while running (\S+) node\. Name:'(.*?)' Status Message: ")
_LOADING = re.compile(r"^Load model from .*? failed:\s*")
# A line of the runtime's source, and the signature of the function it is in, whose parentheses may hold others.
_SOURCE = re.compile(r"/\S+\.(?:h|hpp|cc|cpp):\d+ [^()]*\((?:[^()]|\([^()]*\))*\)(?: const)? ")


def innermost(text: str) -> str:
    """The node that failed, in bodies of whatever other nodes, and what went wrong there."""
    text = _LOADING.sub("", text)
    found = [*_NODE.finditer(text)]
    if not found:
        return text
    last = found[-1]
    message = _SOURCE.sub("", text[last.end() :]).strip()
    name = f" '{last[2]}'" if last[2] else ""
    return f"{last[1]}{name}: {message}"
