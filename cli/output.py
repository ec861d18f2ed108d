"""What every command prints with: a console, JSON, a compact table, a progress bar, the common options.

Tables and JSON go to standard output; progress goes to standard error, and only to a terminal.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from graphopt.report import Verification

MAX_WIDTH = 100
MOST_NAMES = 4
# On every command, not only on the group: click remembers a command's help option from its first use.
HELP = {"help_option_names": ["-h", "--help"]}

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Advance(Protocol):
    """What `progress` yields: say that ``steps`` are done, and what is being done now."""

    def __call__(self, steps: float = 1, now: str | None = None) -> None: ...


def console() -> Console:
    """The console for results: standard output, at most 100 columns, plain text when not a terminal.

    Square brackets are printed as they are (shapes and dtypes are full of them); style with
    ``rich.text.Text`` or the ``style=`` argument.
    """
    return _console(stderr=False)


def err_console() -> Console:
    """The console for progress and warnings: standard error, otherwise like `console`."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    found = Console(file=stream, markup=False, highlight=False, emoji=False)
    # Off a terminal rich assumes 80 columns; the tables are made for 100 wherever they go.
    found.width = min(found.width, MAX_WIDTH) if stream.isatty() else MAX_WIDTH
    return found


def print_json(value: object) -> None:
    """Print ``value`` as JSON on standard output, keys in the order given.

    Takes what reports are made of: dataclasses, objects with ``to_json()``, mappings, sequences, sets
    (sorted), paths, numpy scalars and arrays. Infinities and NaN, which JSON cannot write, become null.
    """
    click.echo(json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def to_plain(value: object) -> Any:
    """Turn ``value`` into dicts, lists, strings, numbers, booleans and None. Raises TypeError otherwise."""
    if value is None or isinstance(value, (str, bool)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "to_json"):
        return to_plain(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return [to_plain(item) for item in sorted(value, key=str)]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # a numpy scalar or array
        return to_plain(value.tolist())
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        return [to_plain(item) for item in value]
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def table(
    columns: Sequence[str | tuple[str, str]], rows: Iterable[Sequence[object]], title: str | None = None
) -> Table:
    """A compact table that fits 100 columns; print it with ``console().print(table(...))``.

    Args:
        columns: Headings; a pair ``(heading, "right")`` also says how the column is justified. Text wraps
            in left-justified columns; right-justified ones (numbers) keep to one line.
        rows: One sequence a row, as long as ``columns``; None is an empty cell, text is never markup.
        title: Printed above the table, left-justified.
    """
    from rich.table import Table
    from rich.text import Text

    gap = 2 if len(columns) <= 7 else 1
    made = Table(box=None, title=title, title_justify="left", header_style="bold", padding=(0, gap, 0, 0))
    made.title_style = "bold"
    made.pad_edge = False
    for column in columns:
        heading, justify = (column, "left") if isinstance(column, str) else column
        if justify == "right":
            made.add_column(Text(heading), justify="right", no_wrap=True)
        else:
            made.add_column(Text(heading), overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in row))
    return made


def tell_inputs(found: Verification) -> str:
    """How many inputs a verification ran on, and whose they are."""
    count, own = found.cases, found.coverage["feeds"] == "calibration"
    noun = "input" if count == 1 else "inputs"
    if own:
        return f"{count} {noun} of yours"
    left_out = found.coverage.get("endless", 0)
    others = f" (not on {left_out} more, on which a loop had no end)" if left_out else ""
    return f"{count} made-up {noun}{others}"


def tell_bytes(size: int) -> str:
    """The size of a file: ``12.3 MB``, and of a small one ``9.8 kB``."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def tell_distance(found: Verification) -> str:
    """How far the outputs lie apart."""
    return f"largest difference {found.max_abs:.2g} (relative {found.max_rel:.2g}), cosine {found.cosine_min:.7f}"


def tell_ways(coverage: Mapping[str, Any], verbose: bool) -> list[str]:
    """Which ways of a network with control flow were checked, a line each; none where there was but one."""
    found = coverage.get("ways")
    if found is None or not (found["sides"] or found["turns"] or found["inside"] or found["free"]):
        return []
    if found["refused"]:
        return [f"no decision was forced: {found['refused']}"]
    lines = [f"{_count(found['tried'], 'way')} forced, each decision on its own and all alike"]
    sides = [(f"{name} {side}", how) for name, both in found["sides"].items() for side, how in both.items()]
    if sides:
        count = {how: sum(1 for _, its in sides if its == how) for how in ("inputs", "forced", "never")}
        lines.append(
            f"{len(sides)} sides of branches: {count['inputs']} taken by the inputs, {count['forced']} only by force,"
            f" {count['never']} not at all"
        )
    for what, names in (
        ("never reached", [name for name, how in sides if how == "never"]),
        ("inside a block, forced there", found["inside"]),
        ("not in the bundle any more, and checked as the inputs take them", found["free"]),
        ("the original itself fails when", [*found["failing"]]),
    ):
        if names:
            lines.append(f"{what}: {_some(names, len(names) if verbose else MOST_NAMES)}")
    if verbose:
        lines += [
            f"{name} turned {_numbers(counts['inputs'])} times by the inputs, {_numbers(counts['forced'])} by force"
            for name, counts in found["turns"].items()
        ]
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _numbers(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts)) or "no"


def _some(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def progress(what: str, total: float | None = None, *, enabled: bool = True) -> Iterator[Advance]:
    """Show on standard error, if that is a terminal, that something longer than a second is going on.

    Args:
        what: What is being done, in a few words.
        total: How many steps there are; None where nobody knows (a spinner instead of a bar).
        enabled: False shows nothing (``--json``).

    Yields:
        ``advance(steps=1, now=None)``: that many steps more are done, and what is being done now.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda steps=1, now=None: None
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar = [] if total is None else [BarColumn(bar_width=30)]
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), *bar, TimeElapsedColumn())
    with Progress(*columns, console=err_console(), transient=True) as shown:
        task = shown.add_task(what, total=total)

        def advance(steps: float = 1, now: str | None = None) -> None:
            shown.update(task, advance=steps, description=what if now is None else f"{what}: {now}")

        yield advance


def common_options(function: _Function) -> _Function:
    """Add ``--json`` (passed as ``as_json``) and ``--verbose/-v`` (passed as ``verbose``) to a command."""
    function = click.option("--verbose", "-v", is_flag=True, help="Say more; show where an error arose.")(function)
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(function)


def recipe_options(function: _Function) -> _Function:
    """Add what says which passes run: ``--recipe``, ``--set`` (as ``settings``), ``--calibration`` and ``--target``."""
    for option in (
        click.option(
            "--target",
            default="onnxruntime",
            metavar="T",
            help="What the result is for: onnxruntime (default), onnx, tensorrt, tensorrt-rtx or a YAML file.",
        ),
        click.option("--calibration", metavar="F.npz|DIR", help="Inputs of your own: an .npz, or a folder of them."),
        click.option(
            "--set", "settings", multiple=True, metavar="PASS.KEY=VALUE", help="A pass's parameter; PASS.enabled=false."
        ),
        click.option(
            "--recipe",
            "-r",
            multiple=True,
            metavar="R",
            help="safe (default), fp16, int8, int4, lowrank, static or a YAML file; repeatable.",
        ),
    ):
        function = option(function)
    return function
