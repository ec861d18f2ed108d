"""A Python loop as one ONNX Loop: its body traced once, for any turn.

What a turn changes is found by tracing one: variables, attributes, entries of lists and dicts (`Slot`), tensors
changed in place, lists that grow. The body is then traced again with a marker in each of these places, until a turn
changes nothing that has no marker. A list that grows by the same number of tensors in each turn becomes a tensor
stacked over the turns; only ``torch.stack`` and ``torch.cat`` may read it after the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from graphopt.exporting.branches import numbers
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
    """

    def __init__(
        self,
        tracer: Tracer,
        body: Callable[[], Any],
        *,
        test: Callable[[], Any] | None = None,
        over: Callable[[], tuple[Any, ...]] | None = None,
        target: Callable[[Any], Any] | None = None,
    ) -> None:
        self.tracer, self.body, self.test, self.over, self.target = tracer, body, test, over, target
        functions = [f for f in (body, test, target) if f is not None]
        self.cells = {
            name: cell
            for function in functions
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        }
        self.key: Any = None

    def trace(self, address: Address) -> bool:
        """Trace the loop as one Loop; False where its turns do not depend on the data, and nothing is changed.

        Raises:
            Unstageable: It cannot be one Loop.
        """
        place = somewhere()
        self.address = address
        self.turns = self._turns()
        if isinstance(self.turns, range) and len(self.turns) < 2:
            return False
        before = state = LoopState(self, place)
        if self.test is not None:
            first = self.piece("first", self.test)
            state = LoopState(self, place)  # the test itself may assign
        else:
            first = True if self.count is None else derived(self.count > 0)
        if not is_tensor(first) and not first:
            before.restore()
            return False
        again = self.turn(0)
        if not is_tensor(again) and not is_tensor(first):
            before.restore()
            return False
        self.emit(state, first if self.count is not None else self.as_truth(first, "first"))
        return True

    def _turns(self) -> range | None:
        """The range of a ``for``; its number of turns where that is a size that is not known."""
        self.count: Any = None
        if self.over is None:
            return None
        arguments = self.over()
        if not any(isinstance(value, _symbolic()) for value in arguments):
            return range(*arguments)
        start, stop = (0, *arguments) if len(arguments) == 1 else arguments[:2]
        if len(arguments) > 2 or not isinstance(start, int):
            raise Unstageable("its range has a step or a start that is not known", somewhere())
        import torch

        self.count = torch.full((), 1, dtype=torch.int64) * (stop - start)
        return range(start, start + 2)

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

    def turn(self, counter: Any) -> Any:
        """Run one turn; whether there may be another: a tensor, or a Python bool."""
        if self.turns is not None and self.target is not None:
            step, start = self.turns.step, self.turns.start
            value = counter if step == 1 and start == 0 else counter * step + start
            self.target(numbers.mark(value, turn=True) if is_tensor(value) else value)
        broke = self.piece("body", self.body)
        again = self.piece("again", self.test) if self.test is not None else True
        if not is_tensor(broke) and broke:
            return False
        if self.count is not None:
            again = self.count > counter + 1
        elif is_tensor(again):
            again = self.as_truth(again, "again")
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
            len(self.turns) if self.turns is not None and self.count is None else -1,
        )


def _symbolic() -> Any:
    import torch

    return torch.SymInt
