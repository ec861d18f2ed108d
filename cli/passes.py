"""``graphopt passes``: the list of passes, or one explained."""

from __future__ import annotations

import inspect

import click

from graphopt.cli.output import HELP, common_options, console, print_json, table


@click.command("passes", context_settings=HELP)
@click.argument("name", required=False)
@common_options
def command(name: str | None, as_json: bool, verbose: bool) -> None:
    """List the passes, or explain one: what it matches, refuses, costs, and its source."""
    from graphopt.recipes import load_recipe, recipe_names
    from graphopt.rewrite.contract import Pass
    from graphopt.rewrite.discovery import all_passes, get_pass

    used: dict[str, list[str]] = {}
    for recipe in recipe_names():
        for step in load_recipe(recipe).passes:
            used.setdefault(step.name, []).append(recipe)

    def describe(cls: type[Pass]) -> dict[str, object]:
        fields = {} if cls.Parameters is None else cls.Parameters.model_fields
        return {
            "name": cls.name,
            "kind": cls.kind.value,
            "stage": cls.stage.name.lower(),
            "summary": (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " "),
            "matches": cls.explanation.matches,
            "refuses": cls.explanation.refuses,
            "costs": cls.explanation.costs,
            "source": cls.explanation.source,
            "parameters": {
                key: f"{field.description or ''} (default {field.default})" for key, field in fields.items()
            },
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
    one = describe(get_pass(name))
    if as_json:
        print_json(one)
        return
    out.print(f"{one['name']}: {one['summary']}")
    lines: list[tuple[str, object]] = [
        (key, one[key]) for key in ("kind", "stage", "matches", "refuses", "costs", "source")
    ]
    lines.append(("recipes", ", ".join(used.get(name, [])) or "none"))
    parameters = one["parameters"]
    assert isinstance(parameters, dict)
    lines.extend((f"--set {name}.{key}", text) for key, text in parameters.items())
    out.print(table(["", ""], lines))
