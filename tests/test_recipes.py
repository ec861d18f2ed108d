"""Recipes: names, files, composition, parameters, and what is said of mistakes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from graphopt.errors import BadInput
from graphopt.recipes import load_recipe, load_recipes, passes_of, recipe_names
from graphopt.rewrite import Kind
from tests.rewrite.toys import bypass, register


class Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid")

    density: float = Field(0.25, gt=0, le=1)
    names: list[str] = []
    strict: bool = False


Tunable = bypass("Abs", name="tunable")
Tunable.Parameters = Parameters
Plain = bypass("Neg", name="plain")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Tunable, Plain)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., str]:
    def write(text: str, name: str = "mine.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_the_shipped_recipes_load() -> None:
    assert "safe" in recipe_names()
    for name in recipe_names():
        found = load_recipe(name)
        assert found.name == name
        assert found.description
        assert passes_of([found])


def test_safe_changes_nothing_but_rounding() -> None:
    assert {p.kind for p in passes_of([load_recipe("safe")])} <= {Kind.BITWISE, Kind.ROUNDING}


def test_passes_with_parameters(recipe: Callable[..., str]) -> None:
    path = recipe("name: mine\npasses:\n  - plain\n  - pass: tunable\n    density: 0.5\n    names: [a, b]\n")
    plain, tunable = passes_of([load_recipe(path)])
    assert plain.parameters is None
    assert isinstance(tunable.parameters, Parameters)
    assert (tunable.parameters.density, tunable.parameters.names) == (0.5, ["a", "b"])


def test_recipes_compose_and_settings_win(recipe: Callable[..., str]) -> None:
    one = recipe("name: one\npasses:\n  - pass: tunable\n    density: 0.5\n    strict: true\n  - plain\n", "one.yaml")
    two = recipe("name: two\npasses:\n  - pass: tunable\n    density: 0.75\n", "two.yml")
    both = load_recipes([one, two])
    tunable, plain = passes_of(both)
    assert (tunable.name, plain.name) == ("tunable", "plain")
    assert isinstance(tunable.parameters, Parameters)
    assert (tunable.parameters.density, tunable.parameters.strict) == (0.75, True)
    tunable, _ = passes_of(list(reversed(both)))
    assert isinstance(tunable.parameters, Parameters)
    assert tunable.parameters.density == 0.5
    tunable, _ = passes_of(both, ["tunable.density=1", "tunable.names=[x]", "tunable.strict=false"])
    assert isinstance(tunable.parameters, Parameters)
    assert tunable.parameters == Parameters(density=1, names=["x"], strict=False)


def test_a_pass_can_be_left_out_and_added(recipe: Callable[..., str]) -> None:
    mine = load_recipe(recipe("name: mine\npasses: [plain]\n"))
    assert passes_of([mine], ["plain.enabled=false"]) == []
    assert [p.name for p in passes_of([mine], ["tunable.density=0.5"])] == ["plain", "tunable"]
    off = load_recipe(recipe("name: without\npasses:\n  - pass: plain\n    enabled: false\n", "off.yaml"))
    assert passes_of([off]) == []
    assert [p.name for p in passes_of([off], ["plain.enabled=true"])] == ["plain"]


def test_a_repeatable_pass_is_named_several_times(recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tunable, "repeatable", True)
    text = (
        "name: mine\npasses:\n  - {pass: tunable@b, density: 0.5}\n  - tunable\n  - {pass: tunable@a, strict: true}\n"
    )
    mine = load_recipe(recipe(text))
    assert [step.pass_name for step in mine.passes] == ["tunable"] * 3
    made = passes_of([mine], ["tunable@a.density=0.75"])
    assert [p.name for p in made] == ["tunable@b", "tunable", "tunable@a"]
    assert [p.parameters for p in made] == [
        Parameters(density=0.5),
        Parameters(),
        Parameters(density=0.75, strict=True),
    ]
    assert [p.name for p in passes_of([mine], ["tunable@b.enabled=false"])] == ["tunable", "tunable@a"]
    assert Tunable.name == "tunable"


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("[plain, plain]", "recipe mine: names plain twice (a pass runs once; put its parameters into one entry)"),
        ("[tunable, tunable]", "names tunable twice (tell them apart by labels: tunable@first, tunable@second)"),
        ("[tunable@a, tunable@a]", "names tunable@a twice (tell them apart by labels: "),
        ("[plain@a]", "recipe mine: pass plain runs once and takes no label (write plain)"),
        ("['tunable@']", "recipe mine: '' is no label (letters, digits, - and _)"),
        ("['tunable@a.b']", "recipe mine: 'a.b' is no label"),
        ("[tunabel@a]", "recipe mine: no pass 'tunabel' (did you mean tunable?)"),
    ],
)
def test_mistakes_in_labels(
    passes: str, message: str, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tunable, "repeatable", True)
    with pytest.raises(BadInput) as caught:
        passes_of([load_recipe(recipe(f"name: mine\npasses: {passes}\n"))])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_passes_are_made_anew_each_time(recipe: Callable[..., str]) -> None:
    mine = [load_recipe(recipe("name: mine\npasses:\n  - pass: tunable\n    density: 0.5\n"))]
    (one,), (two,) = passes_of(mine, ["tunable.strict=true"]), passes_of(mine, ["tunable.strict=true"])
    assert one is not two
    assert one.parameters == two.parameters


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "saef",
            "no recipe 'saef' (did you mean safe? there are fp16, int4, int8, lowrank, safe, static; or give a .yaml ",
        ),
        ("xyzzy", "no recipe 'xyzzy' (there are fp16, int4, int8, lowrank, safe, static; or give a .yaml file)"),
        ("", "no recipe ''"),
        ("nowhere.yaml", "nowhere.yaml: no such file (--recipe takes a name or a .yaml file)"),
    ],
)
def test_unknown_recipes(name: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_recipe(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [plain]\n", "name: Field required (see docs/recipes.md)"),
        ("name: mine\n", "passes: Field required"),
        ("name: mine\npasses: plain\n", "passes: Input should be a valid list"),
        ("name: mine\npasses: [plain]\nextra: 1\n", "extra: Extra inputs are not permitted"),
        ("name: mine\npasses:\n  - density: 1\n", "passes.0.pass: Field required"),
        ("name: mine\npasses: [1]\n", "passes.0: "),
        ("- plain\n", "the file: Input should be a valid dictionary"),
        ("", "the file: Input should be a valid dictionary"),
        ("name: [\n", "not YAML: "),
        ("name: mine\n\tpasses: x\n", "not YAML: "),
    ],
)
def test_a_file_that_is_no_recipe(recipe: Callable[..., str], text: str, message: str) -> None:
    path = recipe(text)
    with pytest.raises(BadInput) as caught:
        load_recipe(path)
    line = str(caught.value)
    assert line.startswith(path)
    assert message in line
    assert "\n" not in line


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(BadInput, match="not YAML"):
        load_recipe(str(tmp_path / "m.yaml"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tunable", "cannot read --set tunable (write --set PASS.KEY=VALUE)"),
        ("tunable=1", "cannot read --set tunable=1"),
        ("tunable.=1", "cannot read --set tunable.=1"),
        ("tunabel.density=1", "--set tunabel.density=1: no pass 'tunabel' (did you mean tunable?)"),
        (
            "tunable.densty=1",
            "--set tunable.densty=1: pass tunable takes no parameter 'densty' (it takes: density, names",
        ),
        ("tunable.density=x", "--set tunable.density=x: tunable.density: Input should be a valid number"),
        ("tunable.density=0", "tunable.density: Input should be greater than 0"),
        ("tunable.density=[", "cannot read the value of --set tunable.density=["),
        ("plain.density=1", "pass plain takes no parameter 'density'"),
    ],
)
def test_mistakes_in_settings(setting: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        passes_of([], [setting])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_in_a_recipe_name_the_recipe(recipe: Callable[..., str]) -> None:
    for text, message in (
        ("name: mine\npasses:\n  - pass: tunable\n    density: x\n", r"recipe mine: tunable\.density: .*number"),
        ("name: mine\npasses: [plian]\n", r"recipe mine: no pass 'plian' \(did you mean plain\?\)"),
    ):
        with pytest.raises(BadInput, match=re.compile(message)):
            passes_of([load_recipe(recipe(text))])
