"""Writes the parts of the documentation that follow from the code: ``python -m docs.generate`` [--check].

``passes.md`` and ``cli.md`` are written whole. In the other pages and in the README, what stands between
``<!-- generated: NAME -->`` and ``<!-- end -->`` is written anew.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

import graphopt
from graphopt.rewrite.contract import Saves, as_setting

if TYPE_CHECKING:
    from graphopt.bundles.plan import Plan
    from graphopt.rewrite import Pass

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
NOTE = "<!-- Written by `python -m docs.generate`: edit the code, not this page. -->"
STAGES = {
    "import": "what the file came with is brought into one form",
    "eliminate": "what need not be there goes; run again at the end where a later stage changed something",
    "quantise": "numbers in fewer bits",
    "fuse": "several operators become one",
}


def pages() -> dict[Path, str]:
    """Every page that holds something generated, with what it should hold."""
    found = {DOCS / "passes.md": passes_page(), DOCS / "cli.md": cli_page(), DOCS / "plan.schema.json": plan_schema()}
    for path in (*sorted(DOCS.glob("*.md")), ROOT / "README.md"):
        if path not in found and path.exists():
            text = path.read_text(encoding="utf-8")
            found[path] = fill(text, SECTIONS)
    return found


def fill(text: str, sections: dict[str, Callable[[], str]], marker: str = "generated") -> str:
    """Replace what stands between ``<!-- MARKER: NAME -->`` and ``<!-- end -->`` by the section of that name."""

    def one(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{sections[match[2]]().strip()}\n\n{match[3]}"

    return re.sub(rf"(<!-- {marker}: (\w+) -->)\n.*?\n?(<!-- end -->)", one, text, flags=re.DOTALL)


def md_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: int = -1) -> str:
    """A Markdown table.

    Args:
        columns: Headings.
        rows: One sequence a row; None is an empty cell.
        right: From which column on numbers are set to the right; -1: nowhere.
    """
    rules = ["---:" if 0 <= right <= index else "---" for index in range(len(columns))]
    cells = [["" if cell is None else str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ([*columns], rules, *cells))


# -- passes.md ---------------------------------------------------------------------------------------------------------


def passes_page() -> str:
    """Every pass that graphopt carries: from its docstring, its ``explanation`` and its parameters."""
    from graphopt.recipes import load_recipe, recipe_names

    recipes: dict[str, list[str]] = {}
    for recipe in recipe_names():
        for step in load_recipe(recipe).passes:
            named = recipes.setdefault(step.pass_name, [])
            if recipe not in named:
                named.append(recipe)
    passes = own_passes()

    def used(cls: type[Pass]) -> str:
        return ", ".join(f"`{name}`" for name in recipes.get(cls.name, [])) or "none"

    parts = [
        NOTE,
        "# Passes",
        "The same is printed by `graphopt passes` and `graphopt passes NAME`. "
        "What *bitwise*, *rounding* and *lossy* promise is in [verification.md](verification.md); "
        "how recipes name passes is in [recipes.md](recipes.md).",
        md_table(
            ["pass", "kind", "stage", "in recipes"],
            [(f"[{p.name}](#{p.name})", p.kind.value, p.stage.name.lower(), used(p)) for p in passes],
        ),
        "Passes run in the order of their stages, whatever the order in a recipe. A stage is repeated while it finds "
        "something, at most twelve times; the import stage runs once.",
    ]
    stage = ""
    for cls in passes:
        if cls.stage.name.lower() != stage:
            stage = cls.stage.name.lower()
            told = STAGES.get(stage)
            parts.append(f"## Stage: {stage}" + (f"\n\n{told[0].upper()}{told[1:]}." if told else ""))
        parts.append(_pass_section(cls, used(cls)))
    return "\n\n".join(parts) + "\n"


def own_passes() -> list[type[Pass]]:
    """The passes that graphopt carries itself, without those of other packages that are installed."""
    from graphopt.rewrite.discovery import all_passes

    return [cls for cls in all_passes().values() if cls.__module__.startswith("graphopt.passes.")]


def _pass_section(cls: type[Pass], used: str) -> str:
    lines = [f"### {cls.name}", _markdown(inspect.getdoc(cls) or "")]
    explained = cls.explanation
    rows = [
        ("matches", _sentence(explained.matches)),
        ("refuses", _sentence(explained.refuses)),
        ("costs", _sentence(explained.costs)),
        ("source", _sentence(explained.source)),
        ("kind, stage", f"{cls.kind.value}, {cls.stage.name.lower()}"),
        ("recipes", used),
    ]
    if cls.saves is Saves.BYTES:
        rows.append(("judged by", "the bytes of constants that it saves, not by time"))
    if cls.repeatable:
        rows.append(
            ("repeatable", f"a recipe can name it several times, with labels: `{cls.name}@first`, `{cls.name}@second`")
        )
    lines.append("\n".join(f"- **{key}**: {text}" for key, text in rows))
    parameters = cls.explain_parameters()
    if parameters:
        lines.append(
            md_table(
                ["parameter", "default", "what it is"],
                [
                    (
                        f"`--set {cls.name}.{p.name}=`",
                        "must be given" if p.required else f"`{as_setting(p.default)}`",
                        _markdown(p.description),
                    )
                    for p in parameters
                ],
            )
        )
    return "\n\n".join(lines)


def _markdown(text: str) -> str:
    """A docstring as Markdown: code in single backticks, paragraphs on one line each."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text).replace("``", "`"))
    # A paragraph of a list keeps its lines.
    return "\n\n".join(p if p.lstrip().startswith(("* ", "- ")) else _sentence(p) for p in paragraphs)


def _sentence(text: str) -> str:
    return " ".join(text.split())


# -- cli.md ------------------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Every command with its options, as ``--help`` gives them."""
    from graphopt.cli.main import COMMANDS
    from graphopt.cli.main import graphopt as group

    context = click.Context(group, info_name="graphopt", help_option_names=["-h", "--help"])
    parts = [
        NOTE,
        "# Commands",
        "Every command takes `--json` (one JSON document on standard output, no table), `--verbose` and `--help`. "
        "Tables fit 100 columns. Progress goes to standard error, and only to a terminal.",
        md_table(
            ["command", "what it does"],
            [(f"[graphopt {name}](#graphopt-{name})", text) for name, (_, text) in COMMANDS.items()],
        ),
        "## Exit codes\n\n"
        + md_table(
            ["code", "meaning"],
            [
                (0, "done; what was written was verified, unless `--no-verify` was given"),
                (
                    1,
                    "nothing was written, or a check failed (`verify`: different; `bisect`: a culprit was found; "
                    "`optimize`: no pass that loses accuracy changed anything)",
                ),
                (2, "bad input: a file, an option or a missing library; nothing was written"),
            ],
        )
        + "\n\nAn error is one line on standard error: where, what, and what to do about it. "
        "`--verbose` shows the traceback as well.",
    ]
    for name in COMMANDS:
        command = group.get_command(context, name)
        assert command is not None
        parts.append(_command_section(name, command, context))
        if isinstance(command, click.Group):
            inside = click.Context(command, info_name=name, parent=context)
            parts += [_command_section(f"{name} {word}", inner, inside) for word, inner in command.commands.items()]
    return "\n\n".join(parts) + "\n"


def _command_section(name: str, command: click.Command, parent: click.Context) -> str:
    context = click.Context(command, info_name=name, parent=parent)
    usage = " ".join(["graphopt", name, *command.collect_usage_pieces(context)])
    rows = []
    for parameter in command.params:
        if not isinstance(parameter, click.Option):
            continue
        names, told = parameter.get_help_record(context) or ("", "")
        value = "" if parameter.is_flag else names.rpartition(" ")[2]
        options = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
        rows.append((f"{options}{f' `{value}`' if value else ''}", _sentence(told)))
    return "\n\n".join(
        [
            f"## graphopt {name}",
            f"```\n{usage}\n```",
            _markdown(command.help or ""),
            *([md_table(["option", "meaning"], rows)] if rows else []),
        ]
    )


# -- plan.schema.json --------------------------------------------------------------------------------------------------


def plan_schema() -> str:
    """The JSON schema of a bundle's plan."""
    from graphopt.bundles.plan import Plan

    return json.dumps(Plan.model_json_schema(by_alias=True), indent=2) + "\n"


# -- bundles.md --------------------------------------------------------------------------------------------------------

EXAMPLE = """\
<ir_version: 10, opset_import: ["" : 18]>
classifier (float[1, 8] x, int64 turns) => (float[1, 2] y)
  <float[8, 8] w = {WEIGHT}, float[8, 2] head = {HEAD}, float limit = {0.9}> {
    h = MatMul (x, w)
    guess = MatMul (h, head)
    chance = Softmax (guess)
    top = ReduceMax <keepdims = 0> (chance)
    sure = Greater (top, limit)
    y = If (sure) <
        then_branch = exit () => (float[1, 2] early) { early = Identity (guess) },
        else_branch = go_on () => (float[1, 2] late) {
            last = Loop (turns, , h) <body = step (int64 i, bool on, float[1, 8] s) => (bool again, float[1, 8] t) {
                again = Identity (on)
                p = MatMul (s, w)
                t = Tanh (p)
            }>
            late = MatMul (last, head)
        }>
}
"""


def example_network() -> str:
    """The network of the page, as ONNX's own text."""
    shown = re.sub(r" = \{(WEIGHT|HEAD)\}", "", EXAMPLE)
    return f"```text\n{shown}```"


def _example_plan() -> Plan:
    import onnx.parser
    import onnx_ir as ir

    from graphopt.bundles import split

    text = EXAMPLE.replace("WEIGHT", ", ".join(["0.5"] * 64)).replace("HEAD", ", ".join(["1"] * 16))
    model = ir.from_proto(onnx.parser.parse_model(text))
    names = iter(("exit", "steps"))
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in ("If", "Loop"):
            node.name = next(names)
    return split(model).plan


def example_plan() -> str:
    """Its plan, with short lists on one line."""
    text = _example_plan().to_json()
    for kind in (r"\[[^\[\]{}]*\]", r"\{[^\[\]{}]*(?:\[[^\[\]{}]*\])?[^\[\]{}]*\}"):
        text = re.sub(kind, lambda match: one if len(one := " ".join(match[0].split())) <= 90 else match[0], text)
    return f"```json\n{text}\n```"


def example_drawing() -> str:
    """Its plan drawn."""
    from graphopt.bundles.drawing import draw

    lines = "\n".join("  " * line.depth + line.text for line in draw(_example_plan()))
    return f"```text\n{lines}\n```"


# -- sections of other pages -------------------------------------------------------------------------------------------


def recipes_section() -> str:
    """The recipes that ship."""
    from graphopt.recipes import load_recipe, recipe_names

    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        passes = ", ".join(
            f"[{step.name}](passes.md#{step.pass_name})"
            + (f" ({', '.join(f'{k}={as_setting(v)}' for k, v in step.parameters.items())})" if step.parameters else "")
            for step in recipe.passes
        )
        rows.append((f"`{name}`", recipe.description, passes))
    return md_table(["recipe", "what for", "passes"], rows)


def targets_section() -> str:
    """The targets that ship."""
    from graphopt.targets import load_target, target_names

    rows = []
    for name in target_names():
        target = load_target(name)
        extensions = "; ".join(f"{domain}: {', '.join(sorted(ops))}" for domain, ops in target.extensions.items())
        without = f"{len(target.unsupported)} standard operators" if target.unsupported else "nothing known"
        version = target.version
        rows.append((f"`{name}`", target.backend, version, target.opset, extensions or "none", without))
    return md_table(["target", "backend", "version", "opset up to", "beyond the standard", "does not run"], rows)


def quantised_section() -> str:
    """The codes that the targets that ship take."""
    from graphopt.targets import load_target, target_names

    rows = []
    for name in target_names():
        facts = load_target(name).quantised
        if facts is None:
            rows.append((f"`{name}`", "all of the standard", "any"))
        else:
            rows.append((f"`{name}`", ", ".join(sorted(facts.types)), "any" if facts.zero_points else "0 only"))
    return md_table(["target", "codes", "zero points"], rows)


def costs_section() -> str:
    """The cost profiles of the targets that ship."""
    from graphopt.targets import load_target, target_names

    rows = []
    for name in target_names():
        costs = load_target(name).costs
        rows.append(
            (
                f"`{name}`",
                *(
                    f"{v:g}"
                    for v in (
                        costs.node,
                        costs.gigaflops,
                        costs.gigabytes,
                        costs.scattered,
                        costs.control_flow,
                        costs.block,
                    )
                ),
            )
        )
    return md_table(["target", "node", "gigaflops", "gigabytes", "scattered", "control_flow", "block"], rows, right=1)


def signature(name: str) -> str:
    """A function of the package as it is called, one parameter a line."""
    function = getattr(graphopt, name)
    found = inspect.signature(function)
    lines = []
    keyword_only = False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("*")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"{parameter.name}: {parameter.annotation}{default}")
    body = "".join(f"    {line},\n" for line in lines)
    return f"```\ngraphopt.{name}(\n{body}) -> {found.return_annotation}\n```"


SECTIONS: dict[str, Callable[[], str]] = {
    "recipes": recipes_section,
    "targets": targets_section,
    "quantised": quantised_section,
    "costs": costs_section,
    "example_network": example_network,
    "example_plan": example_plan,
    "example_drawing": example_drawing,
    **{f"signature_{name}": partial(signature, name) for name in graphopt.__all__},
}


def main() -> int:
    """Write the pages; with ``--check`` only say which are out of date (exit code 1)."""
    stale = [p for p, text in pages().items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date' if '--check' in sys.argv else 'written'}")
    if "--check" in sys.argv:
        return int(bool(stale))
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
