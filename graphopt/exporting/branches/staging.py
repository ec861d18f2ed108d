"""A Python loop as one ONNX Loop: its body traced once, for any turn.

What a turn changes is found by tracing one: variables, attributes, entries of lists and dicts (`Slot`), tensors
changed in place, lists that grow. The body is then traced again with a marker in each of these places, until a turn
changes nothing that has no marker, and no size otherwise than the marker allows. A list that grows by the same number
of tensors in each turn becomes a tensor stacked over the turns (`loop_lists`). Where the first turn alone begins with
something else (None), it is traced before the loop, and the others are the Loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from graphopt.exporting.branches import numbers
from graphopt.exporting.branches.counting import Counted, counted
from graphopt.exporting.branches.errors import Refusal, Unstageable
from graphopt.exporting.branches.joining import derived
from graphopt.exporting.branches.loop_state import LoopState
from graphopt.exporting.branches.markers import operators
from graphopt.exporting.branches.places import somewhere
from graphopt.exporting.branches.questions import is_tensor

if TYPE_CHECKING:
    from graphopt.exporting.branches.decisions import Address
    from graphopt.exporting.branches.tracer import Tracer

_ROUNDS = 8  # of finding what a turn changes


class StagedLoop:
    """One loop of outlined code.

    Args:
        tracer: The tracer it runs under.
        body: Runs the body; whether it broke.
        test: Of a ``while``.
        over: What the range is called with that a ``for`` runs over.
        target: Assigns a ``for``'s variable.
        breaks: Whether the body of a ``for`` may break.
    """

    def __init__(
        self,
        tracer: Tracer,
        body: Callable[[], Any],
        *,
        test: Callable[[], Any] | None = None,
        over: Callable[[], tuple[Any, ...]] | None = None,
        target: Callable[[Any], Any] | None = None,
        breaks: bool = True,
    ) -> None:
        self.tracer, self.body, self.test, self.over, self.target = tracer, body, test, over, target
        self.breaks = breaks
        functions = [f for f in (body, test, target) if f is not None]
        self.cells = {
            name: cell
            for function in functions
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        }
        self.key: Any = None
        self.before = 0  # how many turns stand before the Loop

    def trace(self, address: Address, *, peeled: Unstageable | None = None) -> bool:
        """Trace the loop as one Loop; False where its turns do not depend on the data, and nothing is changed.

        Args:
            address: The loop's.
            peeled: What the first turn begins with otherwise than the others: it stands before the Loop.

        Raises:
            Unstageable: It cannot be one Loop.
        """
        place = somewhere()
        self.address = address
        self.counted = self._counted() if self.over is not None else None
        if self.counted is not None and self.counted.known is not None and (self.counted.known < 2 or not self.breaks):
            return False
        before = state = LoopState(self, place)
        if self.test is not None:
            first = self.piece("first", self.test)
            state = LoopState(self, place)  # the test itself may assign
        else:
            first = self.reaches(0, "first")
        if not is_tensor(first) and not first:
            before.restore()
            return False
        if peeled is not None:
            if is_tensor(first):
                instead = "begin with a tensor in place of None, such as one of size 0"
                raise Unstageable(f"{peeled.what}, and there may be no turn", peeled.place, hint=instead)
            self.tracer.course.peeled.add(address)
            first = self.turn(0, "peeled ")
            if not is_tensor(first) and not first:
                return True
            state = LoopState(self, place)
            self.before = 1
        again = self.turn(0)
        if not is_tensor(again) and not is_tensor(first):
            before.restore()
            return False
        if peeled is not None:
            self.emit(state, first if is_tensor(first) else numbers.as_number(True))
            return True
        self.emit(state, first if self.counted is not None and is_tensor(first) else self.as_truth(first, "first"))
        return True

    def _counted(self) -> Counted:
        """How the range of a ``for`` counts."""
        assert self.over is not None
        return counted(self.piece("range", self.over))

    def reaches(self, turn: Any, name: str) -> Any:
        """Whether the range of a ``for`` holds one more number than ``turn``."""
        if self.counted is None or self.counted.known is not None:
            return True
        more = self.counted.count > turn
        if not self.counted.of_values:
            return derived(more)
        return self.tracer.loop_decision(more, (self.address, name, "condition"))

    def piece(self, name: str, run: Callable[[], Any]) -> Any:
        """Run a piece of the loop as a region of its own."""
        try:
            return self.tracer.region(
                run,
                [*self.cells.values(), self.tracer.module],
                (name, self.key),
                last_resort=True,
                at=(self.address, name),
            )
        except Refusal as reason:
            raise Unstageable(reason.what, reason.place or somewhere()) from reason

    def turn(self, counter: Any, kind: str = "") -> Any:
        """Run one turn; whether there may be another: a tensor, or a Python bool.

        Args:
            counter: How many turns of the Loop came before.
            kind: Of the addresses of its pieces.
        """
        if self.before:
            counter = counter + self.before
        if self.counted is not None and self.target is not None:
            value = self.counted.at(counter)
            self.target(numbers.mark(value, turn=True) if is_tensor(value) else value)
        broke = self.piece(f"{kind}body", self.body)
        again = self.piece(f"{kind}again", self.test) if self.test is not None else True
        if not is_tensor(broke) and broke:
            return False
        if self.counted is not None:
            again = self.reaches(counter + 1, f"{kind}again")
        elif is_tensor(again):
            again = self.as_truth(again, f"{kind}again")
        if not is_tensor(broke):
            return again
        import torch

        stays = torch.logical_not(broke)
        if not is_tensor(again):
            return stays if again else False
        return torch.logical_and(stays, again)

    def as_truth(self, condition: Any, name: str) -> Any:
        """The loop's condition as a scalar bool tensor, with its decision's number."""
        if not is_tensor(condition):
            return numbers.as_number(bool(condition))
        return self.tracer.loop_decision(condition, (self.address, name, "condition"))

    def emit(self, state: LoopState, first: Any) -> None:
        """Trace the body with markers until they are complete, then put what the loop leaves in their places."""
        number = next(self.tracer.loops)
        self.tracer.places["Loop", number] = state.place
        state.note_changes()
        for _ in range(_ROUNDS):
            state.restore()
            turn = numbers.mark(operators().loop_turn(first, number), turn=True)
            state.begin(first, number)
            self.tracer.turns.append(turn)
            try:
                again = self.turn(turn)
            finally:
                self.tracer.turns.pop()
            if not state.note_changes():
                break
            number = next(self.tracer.loops)
            self.tracer.places["Loop", number] = state.place
        else:
            raise Unstageable("what it changes differs from turn to turn", state.place)
        state.end(
            first,
            again if is_tensor(again) else numbers.as_number(bool(again)),
            number,
            self.counted.after(self.before) if self.counted is not None else None,
        )
