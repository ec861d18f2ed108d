"""Finding passes: ours, and third parties' by entry point."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import pytest

from graphopt.errors import BadInput
from graphopt.recipes import load_recipe, recipe_names
from graphopt.rewrite import Kind, Pass, Stage
from graphopt.rewrite.contract import ForeignPass
from graphopt.rewrite.discovery import ENTRY_POINTS, all_passes, get_pass
from tests.rewrite.toys import bypass

Theirs = bypass("Identity", name="theirs")
NotAPass = object
Taken = bypass("Identity", name="remove-dead")


@pytest.fixture
def entry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package with one entry point."""
    found = [importlib.metadata.EntryPoint("theirs", request.param, ENTRY_POINTS)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: found if group == ENTRY_POINTS else [])
    all_passes.cache_clear()
    yield
    all_passes.cache_clear()


def test_every_pass_of_ours_is_described() -> None:
    passes = all_passes()
    assert passes
    for name, cls in passes.items():
        assert cls.name == name == name.lower()
        assert " " not in name
        assert "_" not in name
        assert isinstance(cls.kind, Kind)
        assert isinstance(cls.stage, Stage)
        assert (cls.__doc__ or "").strip()
        explanation = cls.explanation
        for text in (explanation.matches, explanation.refuses, explanation.costs, explanation.source):
            assert text.strip(), name
        assert issubclass(cls, Pass)
        assert cls not in (Pass, ForeignPass)


def test_passes_come_by_stage_then_name() -> None:
    order = [(cls.stage, name) for name, cls in all_passes().items()]
    assert order == sorted(order)


def test_recipes_name_passes_that_exist() -> None:
    for recipe in recipe_names():
        for step in load_recipe(recipe).passes:
            assert get_pass(step.name).name == step.name


def test_an_unknown_pass_and_its_nearest() -> None:
    with pytest.raises(BadInput, match=r"no pass 'remove-ded' \(did you mean remove-dead\?\)"):
        get_pass("remove-ded")
    with pytest.raises(BadInput, match=r"see: graphopt passes"):
        get_pass("xyzzy")


@pytest.mark.parametrize("entry", ["tests.rewrite.test_discovery:Theirs"], indirect=True)
def test_a_third_partys_pass_is_found(entry: None) -> None:
    assert get_pass("theirs") is Theirs
    assert "remove-dead" in all_passes()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("tests.rewrite.nowhere:Theirs", "cannot be imported: No module named 'tests.rewrite.nowhere'"),
        ("tests.rewrite.test_discovery:Missing", "cannot be imported"),
        ("tests.rewrite.test_discovery:NotAPass", "is not a graphopt.rewrite.Pass"),
        ("tests.rewrite.test_discovery:Taken", "a pass called 'remove-dead' exists already"),
    ],
    indirect=["entry"],
)
def test_a_third_partys_mistake_is_the_users_to_know(entry: None, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        all_passes()
    assert message in str(caught.value)
    assert "entry point theirs" in str(caught.value)
