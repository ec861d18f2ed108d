"""Tracing every path of a module in one run of torch.export.

`Tracer` stands between Python and torch while the module runs on fake tensors. Where Python asks a tensor for its
truth, the region around is run again for the other answer, and what the two runs leave behind is joined (`joining`).
A region is a statement, an expression or a call of a module: paths multiply inside one region only. Where the results
of a region cannot be joined, it becomes transparent: its decisions belong to the region around it. An early exit thus
ends up at the level of ``forward``, and n exits are n + 1 paths.

The second run of a region repeats the first up to the decision that differs; what operators gave until then is
replayed from a tape, so that nothing is traced twice.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from graphopt.exporting.branches import numbers, sizes
from graphopt.exporting.branches.decisions import Address, Choice, Course, Decision, Run, Stack
from graphopt.exporting.branches.errors import Refusal, Retrace, Unjoinable, Unstageable
from graphopt.exporting.branches.joining import is_derived, join
from graphopt.exporting.branches.loop_lists import StackedList, stacked_result
from graphopt.exporting.branches.markers import operators
from graphopt.exporting.branches.patching import calls_through
from graphopt.exporting.branches.places import Place, somewhere
from graphopt.exporting.branches.questions import LIMIT, Questions, computed, is_tensor
from graphopt.exporting.branches.staging import StagedLoop
from graphopt.exporting.branches.state import contents, reach, write
from graphopt.exporting.factory import describe

TOP: Address = ("top",)  # of the module's own call
DEAD = type("Dead", (), {"__repr__": lambda self: "a path that raises"})()
_RAISED_BY_PATHS = (AssertionError, ValueError, IndexError, KeyError, NameError)

_INSTEAD_OF_VALUES = (
    "leave out int() and index a tensor with it (torch.stack the choices), or compare it: `if k == 0: … elif k == 1: …`"
)
_INSTEAD_OF_PATHS = (
    "choose between values by torch.where; put each `if` into a function or module that returns before the next"
)

Key = tuple[Any, ...]  # of a region: the same for every time that its code runs


@dataclass
class Knowledge:
    """What earlier traces of a module found out, for the next.

    Attributes:
        restored: Regions that change tensors in place on some path: they are put back before the next one.
        unrolled: Loops that cannot be one Loop, with the reason.
        peeled: Loops whose first turn differs from the others, with what differs: it stands before the Loop.
        promote: Whether Python numbers that differ from path to path become tensors.
    """

    restored: set[Key] = field(default_factory=set)
    unrolled: dict[Key, Unstageable] = field(default_factory=dict)
    peeled: dict[Key, Unstageable] = field(default_factory=dict)
    promote: bool = True


class TracedRun(Run):
    """A run of a region, with the tape of what operators gave.

    Args:
        address: Of the region.
        path: What had been decided when it was entered.
        forced: The first decisions.
        base: The tape of an earlier run.
        replayed: How many entries of it this run repeats.
    """

    def __init__(
        self, address: Address, path: Any, forced: Sequence[bool], base: list[tuple[Any, Any]], replayed: int
    ) -> None:
        super().__init__(address, path)
        self.forced, self.base, self.replayed = forced, base, replayed
        self.tape: list[tuple[Any, Any]] = []


class Tracer(Questions):
    """The hooks of outlined code, and the mode that answers when tensors are asked for their truth.

    Args:
        module: The module that is traced.
        knowledge: What earlier traces found out; this one adds to it.
    """

    def __init__(self, module: Any, knowledge: Knowledge) -> None:
        super().__init__()
        self.module = module
        self.knowledge = knowledge
        self.begin()

    def begin(self) -> None:
        """Forget what an earlier trace left."""
        self.course = Course()
        self.stack = Stack()
        self.unjoinable: dict[Key, Unjoinable] = {}
        self.joins = itertools.count()
        self.loops = itertools.count()
        self.testing = False  # whether the condition of a loop is traced
        self.turns: list[Any] = []  # of the loops whose turn is traced, the innermost last
        self.places: dict[tuple[str, int], Place] = {}  # ("If", number of the join) or ("Loop", of the loop) → line

    def trace(self, run: Callable[[], Any], arguments: Any) -> Any:
        """Run the module on fake tensors; what it returns is joined over all paths."""
        from torch.utils import _pytree as pytree

        self.begin()
        try:
            with self, calls_through(self):
                result = self.region(run, [arguments, self.module], TOP, last_resort=True)
        except TypeError as error:  # a number that became a tensor, perhaps, where Python's own was wanted
            if not self.knowledge.promote:
                raise
            self.knowledge.promote = False
            raise Retrace from error
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, StackedList):
                raise leaf.returned()
        return pytree.tree_map(lambda leaf: sizes.as_tensor(leaf) if sizes.is_unknown(leaf) else leaf, result)

    def operator(self, function: Any, args: Any, kwargs: Any) -> Any:
        import torch

        if any(isinstance(argument, StackedList) for argument in (*args, *kwargs.values())):
            return stacked_result(function, args, kwargs)
        if function is torch.Tensor.__getitem__:
            args = _without_number_indices(args[0], args[1])
        replayed = self._replayed(function)
        result = replayed[0] if replayed is not None else computed(function, args, kwargs)
        for run in self.stack.runs:
            run.tape.append((function, result))  # type: ignore[attr-defined]
        return result

    def _replayed(self, function: Any) -> list[Any] | None:
        """What the outermost run that still replays got from this operator, in a list; None where none replays."""
        for run in self.stack.runs:
            assert isinstance(run, TracedRun)
            position = len(run.tape)
            if position < run.replayed:
                before, result = run.base[position]
                if before != function:
                    raise Refusal("the module does not compute the same when it is run again", somewhere())
                return [result]
        return None

    # Decisions.

    def decide(self, tensor: Any, *, of_value: bool = False) -> bool:
        """The truth of ``tensor`` on this path."""
        if tensor.numel() != 1:
            raise Refusal(f"it asks for the truth of a tensor of {tensor.numel()} elements", somewhere())
        known = self.stack.known_truth(tensor)
        if known is not None:
            return known
        constant = getattr(tensor, "constant", None)
        if constant is not None:
            return self._settled(tensor, bool(constant))
        run = self.stack.top
        assert isinstance(run, TracedRun)
        index = len(run.log)
        truth = run.forced[index] if index < len(run.forced) else of_value
        run.log.append(Choice(tensor, truth, self._decision(tensor), len(run.tape), of_value))
        self._refuse_too_many(run)
        return truth

    def _settled(self, condition: Any, truth: bool) -> bool:
        """Log a decision that is the same on all paths, so that addresses agree with those of a real run."""
        run = self.stack.top
        assert isinstance(run, TracedRun)
        index = len(run.log)
        if index < len(run.forced) and run.forced[index] != truth:
            raise Refusal("the module does not decide the same when it is run again", somewhere())
        decision = self._decision(condition, settled=True)
        run.log.append(Choice(condition, truth, decision, len(run.tape), settled=True))
        return truth

    def loop_decision(self, condition: Any, address: Address) -> Any:
        """The condition of a loop as a scalar bool tensor that carries the number of its decision."""
        decision = self.course.decisions.get(address)
        if decision is None:
            number = None if is_derived(condition) else self.course.new_number()
            decision = self.course.decisions[address] = Decision(number, somewhere(), self.stack.path(), ends=True)
            if number is not None:
                self.course.numbered.append(decision)
        return self.decided(condition, decision)

    def decided(self, condition: Any, decision: Decision) -> Any:
        """``condition`` as a scalar bool tensor that carries the decision's number."""
        import torch

        truth = (condition if condition.dtype == torch.bool else condition != 0).reshape(())
        turn = self.turns[-1] if self.turns else None
        return truth if decision.number is None else operators().decide(truth, turn, decision.number)

    def _refuse_too_many(self, run: Run) -> None:
        if sum(not choice.settled for choice in run.log) > LIMIT:
            raise self.too_many("decisions", run.log)

    def too_many(self, what: str, log: list[Choice]) -> Refusal:
        """The refusal of a region that decided ``log`` last."""
        place = log[-1].decision.place if log else somewhere()
        loops = "".join(_no_loop(key, reason) for key, reason in self.knowledge.unrolled.items())
        hint = next((reason.hint for reason in self.knowledge.unrolled.values() if reason.hint), None)
        if hint is None and loops:
            hint = "a loop becomes one Loop where a turn changes only tensors and numbers of one dtype and rank"
        elif hint is None:
            hint = _INSTEAD_OF_VALUES if any(choice.of_value for choice in log) else _INSTEAD_OF_PATHS
        return Refusal(f"more than {LIMIT} {what} depend on each other, at {place}{loops}", None, hint)

    def unjoined(self, reason: Unjoinable) -> Refusal:
        """The refusal of paths that cannot be joined, by the loop whose turns they are."""
        loops = "".join(_no_loop(key, loop) for key, loop in self.knowledge.unrolled.items())
        hint = next((loop.hint for loop in self.knowledge.unrolled.values() if loop.hint), None)
        if not loops:
            return Refusal(reason.what, reason.place)
        return Refusal(f"{reason.what}, at {reason.place}{loops}", None, hint)

    def _decision(self, condition: Any, *, settled: bool = False) -> Decision:
        address = self.stack.top.next_decision()
        decision = self.course.decisions.get(address)
        if decision is None:
            free = not settled and not is_derived(condition)
            number = self.course.new_number() if free else None
            decision = Decision(number, somewhere(), self.stack.path())
            self.course.decisions[address] = decision
            if free:
                self.course.numbered.append(decision)
        elif decision.number is None and not settled and not is_derived(condition):
            # In the first turn of a loop it was the same on all paths; in any turn it is not.
            decision.number = self.course.new_number()
            self.course.numbered.append(decision)
        return decision

    def returned(self, value: Any) -> Any:
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, StackedList):
                part.returned_at = somewhere()
        return value

    def cast(self, kind: Any, *arguments: Any) -> Any:
        if kind is len and isinstance(arguments[0], StackedList):
            return arguments[0].length()
        return super().cast(kind, *arguments)

    def value(self, tensor: Any) -> int:
        if numbers.is_turn(tensor):
            raise Unstageable("its counter is used as a Python number", somewhere())
        return super().value(tensor)

    # Regions.

    def region(
        self, run: Callable[[], Any], roots: Sequence[Any], key: Key, *, last_resort: bool = False, at: Any = None
    ) -> Any:
        """What ``run`` returns, joined over its paths; the boxes that ``roots`` reach are joined too.

        Args:
            run: The code.
            roots: What it can change.
            key: The same each time that this code runs.
            last_resort: Refuse where paths cannot be joined.
            at: The region's address, where it is not the next one.
        """
        address = at if at is not None else self.stack.next_child()
        course = self.course
        if (
            not last_resort
            and address not in course.joined
            and (address in course.transparent or key in self.unjoinable)
        ):
            course.transparent.add(address)
            return run()
        exploration = _Exploration(self, run, roots, key, address)
        try:
            with self._in_test(address):
                result = exploration.joined()
        except Unjoinable as reason:
            if last_resort:
                raise self.unjoined(reason) from reason
            exploration.undo()
            self.unjoinable[key] = reason
            course.transparent.add(address)
            return run()
        course.joined.add(address)
        return result

    @contextmanager
    def _in_test(self, address: Address) -> Iterator[None]:
        """In the condition of a loop, sizes are asked as tensors are: each turn has an answer of its own."""
        before = self.testing
        self.testing = before or (len(address) == 2 and address[1] in ("first", "again"))
        try:
            yield
        finally:
            self.testing = before

    # What outlined code calls.

    def statement(self, run: Callable[[], Any]) -> Any:
        return self.region(run, _cells(run), ("code", *_identity(run)))

    expression = statement

    def truth(self, value: Any) -> bool:
        if is_tensor(value):
            return self.decide(value)
        if isinstance(value, StackedList):
            sure = value.appended() or not is_tensor(value.some)
            return self._settled(None, True) if sure else self.decide(value.some)
        if self.testing and sizes.is_truth(value):
            return self.decide(sizes.as_tensor(value))
        if sizes.is_unknown(value):
            known = sizes.settled(value)
            return self.decide(sizes.as_tensor(value)) if known is None else self._settled(None, known)
        return self._settled(None, bool(value))

    def call(self, module: Any, run: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        return self.region(run, [arguments, self.module], ("call", type(module)))

    def while_loop(self, whole: Callable[[], Any], test: Callable[[], Any], body: Callable[[], Any]) -> None:
        self._loop(whole, StagedLoop(self, body, test=test))

    def for_loop(
        self,
        whole: Callable[[], Any],
        over: Callable[[], tuple[Any, ...]],
        target: Callable[[Any], Any],
        body: Callable[[], Any],
        breaks: bool,
    ) -> None:
        self._loop(whole, StagedLoop(self, body, over=over, target=target, breaks=breaks))

    def _loop(self, whole: Callable[[], Any], staged: StagedLoop) -> None:
        """One ONNX Loop where its number of turns depends on the data, else the loop as Python runs it."""
        address, key = self.stack.next_child(), _identity(whole)
        if key not in self.knowledge.unrolled:
            staged.key = key
            try:
                done = staged.trace(address, peeled=self.knowledge.peeled.get(key))
            except Unstageable as reason:
                if reason.first_differs and reason.loop is None and key not in self.knowledge.peeled:
                    self.knowledge.peeled[key] = reason
                    raise Retrace from reason
                self.knowledge.unrolled[reason.loop or key] = reason
                raise Retrace from reason
            except Exception as error:  # of torch, or of the user's code, which meets tensors where numbers were
                self.knowledge.unrolled[key] = Unstageable(_told(error), somewhere())
                raise Retrace from error
            if done:
                self.course.staged.add(address)
                return
        self.statement(whole)


_INNER = re.compile(r"graphopt_flow|aten[:.]|[Dd]ispatch|\bkernel\b|FakeTensor|OpOverload|proxy|SymInt|u\d+\b")


def _no_loop(key: Key, reason: Unstageable) -> str:
    """Why the loop at ``key`` is traced turn by turn."""
    loop = Place(key[0], key[1], "")
    at = "" if str(reason.place) == str(loop) else f", at {reason.place}"
    return f"; the loop at {loop} is no Loop: {reason.what}{at}"


def _told(error: Exception) -> str:
    """What stopped a loop's trace; where the text is about torch's inside, that alone."""
    text = describe(error, here=False)
    return "torch cannot trace a turn that stands for all of them" if _INNER.search(text) else text


def _cells(function: Any) -> tuple[Any, ...]:
    return function.__closure__ or ()


def _identity(function: Any) -> Key:
    code: CodeType = function.__code__
    return (code.co_filename, code.co_firstlineno, code.co_qualname)


class _Exploration:
    """All paths of one region, from one state of what it can reach."""

    def __init__(
        self, tracer: Tracer, run: Callable[[], Any], roots: Sequence[Any], key: Key, address: Address
    ) -> None:
        self.tracer, self.code, self.key, self.address = tracer, run, key, address
        self.path = tracer.stack.path()
        reached = reach(roots)
        self.boxes, self.tensors = reached.boxes, reached.tensors
        self.versions = [tensor._version for tensor in self.tensors]
        restored = key in tracer.knowledge.restored
        self.kept = [tensor.clone() for tensor in self.tensors] if restored else None
        self.tapes = [(run, len(run.tape)) for run in tracer.stack.runs]  # type: ignore[attr-defined]
        self.changed: set[int] = set()  # tensors changed in place on some path
        self.count = 0
        self.latest: list[Choice] = []  # what the latest path decided

    def joined(self) -> Any:
        """Run all paths and leave their joined state behind."""
        first, result = self.run((), [], 0)
        if not any(not choice.settled for choice in first.log):
            if result is DEAD:
                raise Unjoinable("every path raises", first.log[-1].decision.place)
            return result
        tree = self.explored(first, result, 0)
        if tree is DEAD:
            raise Unjoinable("every path raises", first.log[-1].decision.place)
        result, held, values = tree
        for (box, _), content in zip(self.boxes, held, strict=self.address != TOP):
            write(box, content)
        for index in sorted(self.changed):
            self.tensors[index].copy_(values[index])
        return result

    def run(self, forced: Sequence[bool], base: list[tuple[Any, Any]], replayed: int) -> tuple[TracedRun, Any]:
        """One path: the first decisions as ``forced``, the others false."""
        self.count += 1
        if self.count > LIMIT:
            raise self.tracer.too_many("paths", self.latest)
        run = TracedRun(self.address, self.path, forced, base, 0 if self.kept else replayed)
        self.latest = run.log
        with self.tracer.stack.entered(run):
            try:
                return run, self.code()
            except _RAISED_BY_PATHS:
                if not run.log:
                    raise
                last = run.log[-1]
                last.decision.raises.add(last.truth)
                return run, DEAD

    def explored(self, run: TracedRun, result: Any, settled: int) -> Any:
        """What ``run``, whose first decisions are settled, and the paths that leave it later, leave behind."""
        tree = self.left_behind(result) if result is not DEAD else DEAD
        for index in reversed(range(settled, len(run.log))):
            choice = run.log[index]
            if choice.settled or (choice.of_value and tree is DEAD):
                continue  # where an index is out of range, larger ones are too
            self.reset()
            forced = [c.truth for c in run.log[:index]] + [not choice.truth]
            other_run, other_result = self.run(forced, run.tape, choice.tape)
            other = self.explored(other_run, other_result, index + 1)
            tree = self.joined_pair(choice, tree, other) if choice.truth else self.joined_pair(choice, other, tree)
        return tree

    def left_behind(self, result: Any) -> Any:
        versions = [tensor._version for tensor in self.tensors]
        self.changed |= {index for index, version in enumerate(versions) if version != self.versions[index]}
        if self.changed and self.kept is None:
            self.tracer.knowledge.restored.add(self.key)
            raise Retrace
        values = [tensor.clone() for tensor in self.tensors] if self.kept is not None else []
        # Once the module has returned, no one reads what it keeps: a list of its own may be longer on one path.
        held = [contents(box) for box, _ in self.boxes] if self.address != TOP else []
        return result, held, values

    def joined_pair(self, choice: Choice, one: Any, other: Any) -> Any:
        if one is DEAD or other is DEAD:
            return other if one is DEAD else one
        tracer, number = self.tracer, next(self.tracer.joins)
        place = choice.decision.place
        tracer.places["If", number] = place
        condition = tracer.decided(choice.condition, choice.decision)
        return join(condition, one, other, place, number, tracer.knowledge.promote)

    def reset(self) -> None:
        """Put everything back as it was when the region was entered."""
        for box, held in self.boxes:
            write(box, held)
        for index, value in enumerate(self.kept or []):
            if self.tensors[index]._version != self.versions[index]:
                self.tensors[index].copy_(value)
                self.versions[index] = self.tensors[index]._version

    def undo(self) -> None:
        """`reset`, and take what the region called off the tapes of the runs around it."""
        self.reset()
        for run, length in self.tapes:
            del run.tape[length:]  # type: ignore[attr-defined]


def _without_number_indices(tensor: Any, key: Any) -> tuple[Any, Any]:
    """``tensor[key]`` with numbers in ``key`` taken as tensors: torch would ask them for a Python int."""
    import torch

    parts = list(key) if isinstance(key, tuple) else [key]
    if not any(is_tensor(part) and numbers.is_number(part) and part.dtype == torch.int64 for part in parts):
        return tensor, key
    if any(part is Ellipsis for part in parts):
        position = next(i for i, part in enumerate(parts) if part is Ellipsis)
        taken = sum(part is not None and part is not Ellipsis for part in parts)
        parts[position : position + 1] = [slice(None)] * (tensor.dim() - taken)
    axis = 0
    for index, part in enumerate(parts):
        if is_tensor(part) and numbers.is_number(part) and part.dtype == torch.int64:
            tensor = tensor.index_select(axis, part.reshape(1))
            parts[index] = 0
        axis += part is not None
    return tensor, tuple(parts)
