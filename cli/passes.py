"""``graphopt passes``: the list of passes, or one explained."""

from __future__ import annotations

import dataclasses

import click

from graphopt.cli.output import HELP, common_options, console, print_json, table


@click.command("passes", context_settings=HELP)
@click.argument("name", required=False)
@common_options
def command(name: str | None, as_json: bool, verbose: bool) -> None:
    """List the passes, or explain one: what it matches, refuses, costs, and its source."""
    from graphopt.recipes import load_recipe, recipe_names
    from graphopt.rewrite.contract import Pass, Saves, as_setting
    from graphopt.rewrite.discovery import all_passes, get_pass

    used: dict[str, list[str]] = {}
    for recipe in recipe_names():
        for step in load_recipe(recipe).passes:
            recipes = used.setdefault(step.pass_name, [])
            if recipe not in recipes:
                recipes.append(recipe)

    def describe(cls: type[Pass]) -> dict[str, object]:
        return {
            "name": cls.name,
            "kind": cls.kind.value,
            "stage": cls.stage.name.lower(),
            "saves": cls.saves.value,
            "summary": cls.summary(),
            "matches": cls.explanation.matches,
            "refuses": cls.explanation.refuses,
            "costs": cls.explanation.costs,
            "source": cls.explanation.source,
            "parameters": [dataclasses.asdict(parameter) for parameter in cls.explain_parameters()],
            "recipes": used.get(cls.name, []),
        }

    out = console()
    if name is None:
        found = [describe(cls) for cls in all_passes().values()]
        if as_json:
            print_json(found)
            return
        rows = [
            (f["name"], f["kind"], f["stage"], ", ".join(used.get(str(f["name"]), [])), f["summary"]) for f in found
        ]
        out.print(table(["pass", "kind", "stage", "recipes", "what it does"], rows))
        out.print("explain one: graphopt passes NAME", style="dim")
        return
    cls = get_pass(name)
    one = describe(cls)
    if as_json:
        print_json(one)
        return
    out.print(f"{one['name']}: {one['summary']}")
    lines: list[tuple[str, object]] = [
        (key, one[key]) for key in ("kind", "stage", "matches", "refuses", "costs", "source")
    ]
    lines.append(("recipes", ", ".join(used.get(name, [])) or "none"))
    if cls.saves is Saves.BYTES:
        lines.append(("judged by", "the bytes of constants that it saves, not by time"))
    if cls.repeatable:
        lines.append(("repeatable", f"a recipe can name it several times, with labels: {name}@first, {name}@second"))
    out.print(table(["", ""], lines))
    parameters = cls.explain_parameters()
    if parameters:
        out.print()
        settings = []
        for parameter in parameters:
            default = "required" if parameter.required else as_setting(parameter.default)
            settings.append((f"{name}.{parameter.name}", default, parameter.description.replace("``", "")))
        out.print(table(["--set", "default", "what it is"], settings))
