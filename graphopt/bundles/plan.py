"""The plan of a bundle: which block runs when, and where its values come from and go to.

A plan is structured as the network was: a list of steps, of which some hold lists of steps. Every value has one name
and is made in one place, so a plan can be followed by hand. Blocks are static networks; all that a plan does itself is
to ask a condition, to count, to cut and to stack.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from graphopt.bundles.schema import STRICT

Size = int | str | None


class _Part(BaseModel):
    model_config = STRICT


class Port(_Part):
    """A value that goes in or out.

    Attributes:
        name: Of the value.
        type: As ONNX Runtime spells it: ``tensor(float)``, ``seq(tensor(int64))``, ``optional(tensor(float))``.
        shape: Sizes; a word where an axis is symbolic, None where nothing is known of it. None: not even the rank is.
    """

    name: str
    type: str
    shape: list[Size] | None = None


class Block(_Part):
    """A static network.

    Attributes:
        file: In the bundle's folder.
        inputs, outputs: As the network names them.
        nodes: How many operators it has.
        backend: Whose engine the file is, ``tensorrt`` or ``tensorrt-rtx``; None: an ONNX file, for ONNX Runtime.
        reason: Of a block that stayed an ONNX file where others became engines: why.
    """

    file: str
    inputs: list[Port]
    outputs: list[Port]
    nodes: int
    backend: str | None = None
    reason: str | None = None


class Run(_Part):
    """Run a block.

    Attributes:
        run: Which.
        reads: Input of the block -> value.
        makes: Output of the block -> value.
    """

    run: str
    reads: dict[str, str] = {}
    makes: dict[str, str] = {}


class Branch(_Part):
    """Run one of two lists of steps.

    Attributes:
        branch: A name to call it by.
        condition: A value with one boolean, asked as ``if``.
        then, otherwise: What to do.
        gives: Value -> what it is after ``then``, and after ``otherwise``.
        decides: Branches that the network had and that went the same way (true) or the opposite one.
        path: Where ``then`` is a straight line for a path: the branches on it, and whether they go to ``then``. They
            are in ``otherwise``.
        each: Whether the condition has one boolean for each sample, and samples go apart.
    """

    branch: str
    condition: str = Field(alias="if")
    then: list[Step] = []
    otherwise: list[Step] = Field(default=[], alias="else")
    gives: dict[str, tuple[str, str]] = {}
    decides: dict[str, bool] = {}
    path: dict[str, bool] = {}
    each: bool = False


class State(_Part):
    """What one turn of a loop hands to the next.

    Attributes:
        name: In the body.
        start: The value of the first turn.
        next: The value after a turn.
        gives: The value after the last turn; None where nobody asks.
        like: What the network says of it; None where it does not say its shape.
    """

    name: str
    start: str
    next: str
    gives: str | None = None
    like: Port | None = None


class Slice(_Part):
    """A value of which each turn gets a part.

    Attributes:
        name: In the body.
        of: What is cut.
        axis: Along which; each turn gets one index, and the axis is gone.
        backwards: Whether from the last index to the first.
    """

    name: str
    of: str
    axis: int = 0
    backwards: bool = False


class Stack(_Part):
    """A value of which each turn makes a part.

    Attributes:
        each: What a turn makes.
        gives: All of it, along a new axis.
        axis: That axis.
        backwards: Whether later turns come first.
        part: What a turn makes, for a loop that takes none.
    """

    each: str
    gives: str
    axis: int = 0
    backwards: bool = False
    part: Port


class Loop(_Part):
    """Run steps again and again.

    Attributes:
        loop: A name to call it by.
        trips: A value with the most turns; None: there is no such limit but that of the slices.
        condition: A value with one boolean, whether to begin; None: yes.
        counter: In the body, the number of the turn from 0 (int64); None where nobody asks.
        goes: In the body, what was said about going on before this turn; None where nobody asks.
        state, slices, stacks: What turns hand on, get and make.
        body: What a turn does.
        again: A value of the body with one boolean, whether there is a next turn; None: yes.
        each: Whether samples leave after their own last turn: trips, condition or again have one element for each.
    """

    loop: str
    trips: str | None = None
    condition: str | None = None
    counter: Port | None = None
    goes: Port | None = None
    state: list[State] = []
    slices: list[Slice] = []
    stacks: list[Stack] = []
    body: list[Step] = []
    again: str | None = None
    each: bool = False


def _kind(step: object) -> str:
    if isinstance(step, Run | Branch | Loop):
        return {Run: "run", Branch: "branch", Loop: "loop"}[type(step)]
    return next((key for key in ("run", "branch", "loop") if isinstance(step, dict) and key in step), "")


Step = Annotated[
    Annotated[Run, Tag("run")] | Annotated[Branch, Tag("branch")] | Annotated[Loop, Tag("loop")], Discriminator(_kind)
]


class Plan(_Part):
    """What a host does to run a network.

    Attributes:
        version: Of this schema.
        inputs: Of the network.
        outputs: Of the network, under their own names.
        gives: Output -> the value that it is.
        blocks: Name -> static network.
        steps: What to do, in this order.
        samples: Where samples go their own ways: value -> the axis along which it has them. Others are the same for
            all samples.
    """

    version: Literal[1] = 1
    inputs: list[Port]
    outputs: list[Port]
    gives: dict[str, str]
    blocks: dict[str, Block] = {}
    steps: list[Step] = []
    samples: dict[str, int] = {}

    def to_json(self) -> str:
        """As it is written to a file: two spaces, keys in the order of the schema, no default but the version."""
        content = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return json.dumps({"version": self.version, **content}, indent=2, ensure_ascii=False)


def lists_in(step: Run | Branch | Loop) -> Sequence[list[Step]]:
    """The lists of steps that a step holds."""
    if isinstance(step, Branch):
        return step.then, step.otherwise
    return (step.body,) if isinstance(step, Loop) else ()


def walk(steps: Sequence[Step]) -> Iterator[Run | Branch | Loop]:
    """Every step, outer before inner."""
    for step in steps:
        yield step
        for inner in lists_in(step):
            yield from walk(inner)
