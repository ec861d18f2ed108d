"""The JSON files of a bundle: their schemas are strict, and what is wrong with one is told in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from graphopt.errors import BadInput

_VERSION = 1


STRICT = ConfigDict(extra="forbid", populate_by_name=True)

Whole = TypeVar("Whole", bound=BaseModel)


def read_json(path: Path, kind: type[Whole], name: str, hint: str) -> Whole:
    """Read a file.

    Args:
        path: The file.
        kind: What is in it.
        name: What that is called.
        hint: What helps where it cannot be read.

    Raises:
        BadInput: It cannot be read, says no version or another one, or is not what it should be.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot be read as a {name}", where=str(path), hint=hint) from error
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is not int:
        raise BadInput(f"is no {name}: it does not say its version", where=str(path), hint=hint)
    if version != _VERSION:
        newer = "a newer graphopt reads it" if version > _VERSION else hint
        raise BadInput(f"is of version {version}", where=str(path), hint=newer)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise BadInput(f"is no {name}: {place}: {problem['msg']}", where=str(path), hint=hint) from error
