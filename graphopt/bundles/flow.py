"""Where values of a plan come from and go to: what its steps read and make, and what reaches whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphopt.bundles.plan import Branch, Loop, Plan, Run, Step, lists_in, walk


def reads(step: Run | Branch | Loop) -> Iterator[str]:
    """The values that a step reads by itself, without those that steps in it do."""
    if isinstance(step, Run):
        yield from step.reads.values()
    elif isinstance(step, Branch):
        yield step.condition
    else:
        yield from (name for name in (step.trips, step.condition) if name is not None)
        yield from (state.start for state in step.state)
        yield from (part.of for part in step.slices)


def makes(step: Run | Branch | Loop) -> Iterator[str]:
    """The values that stand after a step, for the steps that follow it."""
    if isinstance(step, Run):
        yield from step.makes.values()
    elif isinstance(step, Branch):
        yield from step.gives
    else:
        yield from (state.gives for state in step.state if state.gives is not None)
        yield from (stack.gives for stack in step.stacks)


def results(step: Run | Branch | Loop, inner: int) -> Iterator[str]:
    """The values that one of a step's lists is run for: those of ``lists_in(step)[inner]``."""
    if isinstance(step, Branch):
        yield from (pair[inner] for pair in step.gives.values())
    elif isinstance(step, Loop):
        yield from (state.next for state in step.state)
        yield from (stack.each for stack in step.stacks)
        if step.again is not None:
            yield step.again


def begun_with(loop: Loop) -> Iterator[str]:
    """The values that a loop itself puts into its body before a turn."""
    yield from (port.name for port in (loop.counter, loop.goes) if port is not None)
    yield from (state.name for state in loop.state)
    yield from (part.name for part in loop.slices)


def made_in(steps: Sequence[Step]) -> list[str]:
    """The values that stand after the last of some steps."""
    return list(dict.fromkeys(name for step in steps for name in makes(step)))


def all_reads(step: Run | Branch | Loop) -> Iterator[str]:
    """The values that a step reads, with all that is in it, those that its lists are run for included."""
    yield from reads(step)
    for inner, steps in enumerate(lists_in(step)):
        yield from results(step, inner)
        for nested in steps:
            yield from all_reads(nested)


def from_around(steps: Sequence[Step]) -> list[str]:
    """The values that some steps read, with all that is in them, and do not make: they are around them."""
    made = {name for step in walk(steps) for name in makes(step)}
    made.update(name for step in walk(steps) if isinstance(step, Loop) for name in begun_with(step))
    return [name for name in dict.fromkeys(name for step in steps for name in all_reads(step)) if name not in made]


def origins(plan: Plan) -> dict[str, set[str]]:
    """For each value that branches and loops hand on the values that it may be: inputs, and what blocks have made."""
    handed: list[tuple[str, tuple[str, ...]]] = []
    for step in walk(plan.steps):
        if isinstance(step, Branch):
            handed += step.gives.items()
        elif isinstance(step, Loop):
            for state in step.state:
                handed.append((state.name, (state.start, state.next)))
                handed += [(state.gives, (state.name,))] if state.gives is not None else []
    found: dict[str, set[str]] = {name: set() for name, _ in handed}
    changed = True
    while changed:
        changed = False
        for name, sources in handed:
            reached = found[name].union(*(found.get(source, {source}) for source in sources))
            changed |= len(reached) > len(found[name])
            found[name] = reached
    return found


def shared_outputs(plan: Plan) -> list[str]:
    """The outputs that somebody else may have too: the caller as an input, a later run, or another output."""
    taken = {port.name for port in plan.inputs}
    loops = [step for step in walk(plan.steps) if isinstance(step, Loop)]
    taken.update(port.name for step in loops for port in (step.counter, step.goes) if port is not None)
    known, shared = origins(plan), []
    for output, name in plan.gives.items():
        may_be = known.get(name, {name})
        if not taken.isdisjoint(may_be):
            shared.append(output)
        taken |= may_be
    return shared


def asked_by_host(plan: Plan) -> set[str]:
    """The values that the host itself asks for: conditions and counts, wherever they go through."""
    asked: set[str] = set()
    count = -1
    while count != len(asked):
        count = len(asked)
        for step in walk(plan.steps):
            if isinstance(step, Branch):
                asked.add(step.condition)
                asked.update(name for given, pair in step.gives.items() if given in asked for name in pair)
            elif isinstance(step, Loop):
                asked.update(name for name in (step.trips, step.condition, step.again) if name is not None)
                for state in step.state:
                    if state.name in asked or state.gives in asked:
                        asked.update((state.start, state.next))
    return asked
