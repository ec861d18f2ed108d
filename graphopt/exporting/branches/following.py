"""The module on real values, decided as a table says: what the ONNX model is compared with.

`Follower` runs the outlined code and finds each decision by its address, as the trace did. `Dictated` runs the user's
own code and gives the same answers in the same order, which shows that outlining did not change the module.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.overrides import TorchFunctionMode

from graphopt.exporting.branches import numbers
from graphopt.exporting.branches.deciding import MOST_TURNS, TURNS
from graphopt.exporting.branches.decisions import Address, Choice, Course, Decision, Run, Stack
from graphopt.exporting.branches.patching import calls_through
from graphopt.exporting.branches.places import Place, here, somewhere
from graphopt.exporting.branches.questions import Questions, is_tensor

Table = np.ndarray[Any, np.dtype[np.int8]]


class Misaligned(BaseException):
    """A run on real values does not take the decisions that the trace took."""

    def __init__(self, place: Place) -> None:
        self.place = place
        super().__init__(str(place))


class Endless(BaseException):
    """A loop does not end the way that it is forced."""


@dataclass
class Followed:
    """How one run went.

    Attributes:
        taken: The decisions taken, in order, and how.
        answers: What tensors were answered, in order: bools, and ints where a Python int was wanted.
        faithful: Whether the user's own code can be given the same answers: no Python number was overruled.
    """

    taken: list[tuple[int, bool]] = field(default_factory=list)
    answers: list[bool | int] = field(default_factory=list)
    faithful: bool = True


class Follower(Questions):
    """The hooks of outlined code for a run on real values.

    Args:
        course: What the trace found.
    """

    def __init__(self, course: Course) -> None:
        super().__init__()
        self.course = course
        self.table: Table | None = None
        self.begin(None)

    def begin(self, table: Table | None, most: int = MOST_TURNS) -> None:
        """Get ready for a run that is decided as ``table`` says (see `deciding`); None: nothing is forced.

        Its ``while`` loops may turn ``most`` times, all together.
        """
        self.table, self.most = table, most
        self.stack = Stack()
        self.turns: list[int] = []
        self.turned = 0
        self.followed = Followed()

    def follow(self, run: Callable[[], Any], arguments: Any) -> Any:
        """What ``run``, the module's forward, returns."""
        from torch._export.non_strict_utils import _override_builtin_ops

        # torch.export has `max` and `min` of its own, which ask no tensor for its truth: so that both runs ask alike.
        with self, calls_through(self), _override_builtin_ops(), self.stack.entered(Run(("top",), ())):
            return run()

    # Decisions.

    def decide(self, tensor: Any, *, of_value: bool = False) -> bool:
        known = self.stack.known_truth(tensor)
        if known is not None:
            self.followed.answers.append(known)
            return known
        return self._logged(tensor, natural_truth(tensor), of_value=of_value)

    def truth(self, value: Any) -> bool:
        if is_tensor(value):
            return self.decide(value)
        return self._logged(None, bool(value))

    def value(self, tensor: Any) -> int:
        before = len(self.followed.answers)
        chosen = super().value(tensor)
        self.followed.answers[before:] = [chosen]
        if numbers.is_number(tensor):  # the user's own code asks for it before it computes with it
            self.followed.faithful = False
        return chosen

    def cast(self, kind: Any, *arguments: Any) -> Any:
        made = super().cast(kind, *arguments)
        asked = [value for value in arguments if is_tensor(value) and not numbers.is_number(value)]
        if kind in (bool, int) and len(arguments) == len(asked) == 1:
            # The user's own code asks the tensor here, for what it is; what is decided on the number comes later.
            self.followed.answers.append(natural_truth(asked[0]) if kind is bool else _natural_int(asked[0]))
        return made

    def _logged(self, asked: Any, natural: bool, *, of_value: bool = False) -> bool:
        """The truth of the next decision of this region."""
        address = self.stack.top.next_decision()
        if of_value and address not in self.course.decisions:
            raise IndexError("the trace found that no such index is in range")
        truth = self._decided(asked, natural, address, of_value=of_value)
        self.stack.top.log.append(Choice(asked, truth, self.course.decisions[address]))
        return truth

    def _decided(self, asked: Any, natural: bool, address: Address, *, of_value: bool = False) -> bool:
        """The truth at ``address``: forced, or as it is."""
        decision = self.course.decisions.get(address)
        if decision is None:
            raise Misaligned(somewhere())
        forced = self._forced(decision)
        truth = natural if forced is None else forced
        if is_tensor(asked) and not numbers.is_number(asked):
            if not of_value:
                self.followed.answers.append(truth)
        elif truth != natural:
            self.followed.faithful = False
        if decision.number is not None:
            self.followed.taken.append((decision.number, truth))
        return truth

    def _forced(self, decision: Decision) -> bool | None:
        if self.table is None or decision.number is None:
            return None
        column = min(self.turns[-1], TURNS - 1) if self.turns else 0
        entry = int(self.table[decision.number, column])
        return None if entry < 0 else entry == 1

    # What outlined code calls.

    def region(self, run: Callable[[], Any], at: Address | None = None) -> Any:
        address = self.stack.next_child() if at is None else at
        if address in self.course.transparent:
            return run()
        with self.stack.entered(Run(address, ())):
            return run()

    def statement(self, run: Callable[[], Any]) -> Any:
        return self.region(run)

    expression = statement

    def call(self, module: Any, run: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        return self.region(run)

    def while_loop(self, whole: Callable[[], Any], test: Callable[[], Any], body: Callable[[], Any]) -> None:
        address = self.stack.next_child()
        if address not in self.course.staged:
            self.statement(whole)
            return
        goes_on = self._loop_truth(address, "first", test)
        turn = 0
        if address in self.course.peeled:
            if self.region(body, (address, "peeled body")):
                return
            goes_on = self._loop_truth(address, "peeled again", test)
        while goes_on:
            self._count_turn()
            with self._turn(turn):
                if self.region(body, (address, "body")):
                    return
                goes_on = self._loop_truth(address, "again", test)
            turn += 1

    def for_loop(
        self,
        whole: Callable[[], Any],
        over: Callable[[], tuple[Any, ...]],
        target: Callable[[Any], Any],
        body: Callable[[], Any],
        breaks: bool,
    ) -> None:
        address = self.stack.next_child()
        if address not in self.course.staged:
            self.statement(whole)
            return
        values = range(*map(_natural_int, self.region(over, (address, "range"))))
        turn, before, goes_on = 0, 0, self._reaches(address, "first", bool(values))
        if address in self.course.peeled:
            target(values.start)
            if self.region(body, (address, "peeled body")):
                return
            before, goes_on = 1, self._reaches(address, "peeled again", len(values) > 1)
        while goes_on:
            if (address, "first", "condition") in self.course.decisions:
                self._count_turn()
            with self._turn(turn):
                target(values.start + (turn + before) * values.step)
                if self.region(body, (address, "body")):
                    return
                goes_on = self._reaches(address, "again", len(values) > turn + before + 1)
            turn += 1

    def _reaches(self, address: Address, name: str, natural: bool) -> bool:
        """Whether a ``for`` goes on: as its range says, or, where that is of tensors, as is forced."""
        at = (address, name, "condition")
        return self._decided(None, natural, at) if at in self.course.decisions else natural

    def _count_turn(self) -> None:
        self.turned += 1
        if self.turned > self.most:
            raise Endless

    @contextmanager
    def _turn(self, turn: int) -> Iterator[None]:
        self.turns.append(turn)
        try:
            yield
        finally:
            self.turns.pop()

    def _loop_truth(self, address: Address, name: str, test: Callable[[], Any]) -> bool:
        asked = self.region(test, (address, name))
        at = (address, name, "condition")
        if at not in self.course.decisions:  # of a `while True`
            return natural_truth(asked) if is_tensor(asked) else bool(asked)
        return self._decided(asked, natural_truth(asked) if is_tensor(asked) else bool(asked), at)


def _natural_int(value: Any) -> int:
    """What Python makes of a bound of a range when no mode is asked."""
    import torch

    with torch._C.DisableTorchFunction():
        return int(value)


def natural_truth(tensor: Any) -> bool:
    """What torch answers when no mode is asked."""
    import torch

    with torch._C.DisableTorchFunction():
        return bool(tensor)


class Bounded(TorchFunctionMode):  # type: ignore[misc]
    """Ends a run that asks tensors for their truth or value more often than any module that ends."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import torch

        if function in (torch.Tensor.__bool__, torch.Tensor.item):
            self.asked += 1
            if self.asked > MOST_TURNS:
                raise RuntimeError(f"a loop does not end: tensors were asked more than {MOST_TURNS:,} times")
        return function(*args, **(kwargs or {}))


class Dictated(TorchFunctionMode):  # type: ignore[misc]
    """Answers tensors that are asked for their truth from a list, in order."""

    def __init__(self, answers: list[bool | int]) -> None:
        super().__init__()
        self.answers = deque(answers)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import torch

        if function in (torch.Tensor.__bool__, torch.is_nonzero, torch.Tensor.is_nonzero):
            return self._next(bool)
        if function in (torch.Tensor.__int__, torch.Tensor.__index__):
            return self._next(int)
        return function(*args, **(kwargs or {}))

    def _next(self, kind: type) -> Any:
        if not self.answers or type(self.answers[0]) is not kind:
            raise Misaligned(here() or somewhere())
        return self.answers.popleft()
