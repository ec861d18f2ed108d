"""``graphopt passes``: the list, and one explained."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, Field

from graphopt.cli.main import main
from graphopt.rewrite import Pass
from graphopt.rewrite.contract import Parameter, as_setting
from graphopt.rewrite.discovery import all_passes
from tests.rewrite.toys import bypass

# Not those of other packages that are installed here.
OWN = [cls for cls in all_passes().values() if cls.__module__.startswith("graphopt.passes.")]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["passes", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    for name in all_passes():
        assert name in out
    assert "explain one: graphopt passes NAME" in out


@pytest.mark.parametrize("name", list(all_passes()))
def test_one_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, name)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith(f"{name}: ")
    for heading in ("kind", "stage", "matches", "refuses", "costs", "source", "recipes"):
        assert any(line.strip().startswith(heading) for line in lines), heading


@pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.name)
def test_every_pass_says_what_it_does(cls: type[Pass]) -> None:
    """In a sentence that begins with a verb; what else it says of itself is more than a word."""
    first, *_ = cls.summary().split()
    assert first.endswith("s") and first[0].isupper(), cls.summary()
    assert cls.summary().endswith(".")
    assert len(cls.summary()) <= 120
    told = cls.explanation
    assert all(len(text.split()) > 2 for text in (told.matches, told.refuses, told.costs, told.source))


@pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.name)
def test_every_parameter_is_described(cls: type[Pass], capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, cls.name)
    assert "Undefined" not in out
    text = " ".join(out.split())
    for parameter in cls.explain_parameters():
        assert len(parameter.description.split()) > 2, parameter.name
        assert f"{cls.name}.{parameter.name}" in text
        default = "required" if parameter.required else as_setting(parameter.default)
        assert f"{cls.name}.{parameter.name} {default} {parameter.description.split()[0].strip('`')}" in text


def test_descriptions_come_from_the_field_or_the_docstring() -> None:
    class Parameters(BaseModel):
        """Of a toy.

        Attributes:
            density: The share of weights
                that stay.
            also: Something else.
        """

        density: float
        names: list[str] = Field(default_factory=lambda: ["a"], description="Which ones.")
        also: bool = True

    toy = bypass("Abs", name="toy")
    assert toy.explain_parameters() == []
    toy.Parameters = Parameters
    assert toy.explain_parameters() == [
        Parameter("density", True, None, "The share of weights that stay."),
        Parameter("names", False, ["a"], "Which ones."),
        Parameter("also", False, True, "Something else."),
    ]
    assert [as_setting(p.default) for p in toy.explain_parameters()] == ["null", "[a]", "true"]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--json")
    assert (code, err) == (0, "")
    listed = json.loads(out)
    assert [p["name"] for p in listed] == list(all_passes())
    _, out, _ = run(capsys, "remove-dead", "--json")
    assert json.loads(out) == next(p for p in listed if p["name"] == "remove-dead")
    assert {"kind", "stage", "matches", "refuses", "costs", "source", "parameters", "recipes"} <= set(json.loads(out))
    assert "safe" in json.loads(out)["recipes"]
    _, out, _ = run(capsys, "graphsurgeon", "--json")
    function = json.loads(out)["parameters"][0]
    assert (function["name"], function["required"], function["default"]) == ("function", True, None)
    _, out, _ = run(capsys, "quantise-weights", "--json")
    assert json.loads(out)["saves"] == "bytes"


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "remove-deed")
    assert (code, out) == (2, "")
    assert err == "error: no pass 'remove-deed' (did you mean remove-dead?)\n"
