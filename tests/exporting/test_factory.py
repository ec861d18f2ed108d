"""Factories that cannot be used: one exact line for each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from graphopt.errors import BadInput  # noqa: E402
from graphopt.exporting.factory import call_factory, check_example, load_factory  # noqa: E402

EXPECTED = "(a factory returns (module, example_inputs, dynamic_axes or None))"


class Scale(torch.nn.Module):
    def forward(self, x: Any, factor: Any, bias: Any = None) -> Any:
        return x * factor if bias is None else x * factor + bias


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(BadInput) as caught:
        action()
    return str(caught.value)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("spec", ["nets", "nets:", ":encoder", "nets:a b", "nets.py", ""])
def test_a_malformed_spec(spec: str) -> None:
    assert refused(lambda: load_factory(spec)) == (
        f"{spec!r} is not MODULE:FACTORY (for example mypackage.models:encoder, or path/to/file.py:encoder)"
    )


def test_a_module_that_is_not_there(here: Path) -> None:
    assert refused(lambda: load_factory("no_such.nets:encoder")) == (
        "no_such.nets: no such module (give an importable name, or the path of a .py file)"
    )
    assert refused(lambda: load_factory("no/such.py:encoder")) == "no/such.py: no such file"


def test_a_module_that_does_not_import(here: Path) -> None:
    (here / "broken_a.py").write_text("import sys\nimport no_such_library\n")
    line = "cannot be imported: ModuleNotFoundError: No module named 'no_such_library', at broken_a.py:2"
    assert refused(lambda: load_factory("broken_a:encoder")) == f"broken_a: {line}"
    assert refused(lambda: load_factory("broken_a.py:encoder")) == f"broken_a.py: {line}"
    (here / "broken_b.py").write_text("def f(:\n")
    assert refused(lambda: load_factory("broken_b.py:f")).startswith(
        "broken_b.py: cannot be imported: SyntaxError: invalid syntax"
    )
    (here / "broken_c.py").write_text("raise SystemExit(3)\n")
    assert refused(lambda: load_factory("broken_c.py:f")) == (
        "broken_c.py: cannot be imported: SystemExit: 3, at broken_c.py:1"
    )


def test_a_factory_that_is_not_there(here: Path) -> None:
    (here / "nets_a.py").write_text("size = 3\ndef encoder(): ...\n")
    assert refused(lambda: load_factory("nets_a:encodr")) == ("nets_a: no function 'encodr' (did you mean 'encoder'?)")
    assert refused(lambda: load_factory("nets_a:zzz")) == "nets_a: no function 'zzz'"
    assert refused(lambda: load_factory("nets_a:size")) == "nets_a: 'size' is a int, not a function"


def test_a_file_imports_its_neighbours_and_hides_no_module(here: Path) -> None:
    (here / "neighbour_of_it.py").write_text("value = 7\n")
    (here / "json.py").write_text("import neighbour_of_it\ndef f(): return neighbour_of_it.value\n")
    assert load_factory("json.py:f")() == 7
    import json

    assert json.loads("[1]") == [1]


def test_a_factory_that_raises(here: Path) -> None:
    (here / "nets_b.py").write_text("def f():\n    raise ValueError('no weights\\nat all')\n")
    assert refused(lambda: call_factory(load_factory("nets_b.py:f"), "nets_b.py:f")) == (
        "nets_b.py:f: the factory failed: ValueError: no weights, at nets_b.py:2"
    )


X = torch.zeros(2, 3)
FACTOR = torch.ones(2, 3)
BOTH = {"x": X, "factor": FACTOR}


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        (None, f"returned None {EXPECTED}"),
        (Scale(), f"returned a Scale {EXPECTED}"),
        ((Scale(), BOTH), f"returned a tuple of 2 {EXPECTED}"),
        ((BOTH, Scale(), None), f"the first thing returned is a dict, not a torch module {EXPECTED}"),
        ((Scale(), [X, FACTOR], None), "example_inputs is a list, not a dict (give {input name: tensor})"),
        ((Scale(), {}, None), "example_inputs is empty"),
        (
            (Scale(), {"x": X, "factor": 2.0}, None),
            "example input 'factor' is a float, not a tensor (bind what is not a tensor inside the module)",
        ),
        (
            (Scale(), {"x": X, "factor": FACTOR.to_sparse()}, None),
            "example input 'factor' is sparse, quantised or complex; ONNX has no such input",
        ),
        (
            (Scale(), {**BOTH, "factr": X.clone()}, None),
            "example input 'factr' is not a parameter of Scale.forward (did you mean 'factor'?)",
        ),
        (
            (Scale(), {**BOTH, "zzz": X.clone()}, None),
            "example input 'zzz' is not a parameter of Scale.forward (it names x, factor, bias)",
        ),
        ((Scale(), {"x": X}, None), "Scale.forward needs 'factor', which example_inputs lacks"),
        (
            (Scale(), {"x": X, "factor": X}, None),
            "example inputs 'x' and 'factor' share their memory; torch.export would merge them into one input"
            " (give each its own tensor, for example with .clone())",
        ),
        (
            (Scale(), {"x": X, "factor": X.view(3, 2).T}, None),
            "example inputs 'x' and 'factor' share their memory; torch.export would merge them into one input"
            " (give each its own tensor, for example with .clone())",
        ),
        (
            (Scale(), {"x": X, "factor": torch.ones(1, 3).expand(2, 3)}, None),
            "example input 'factor' is an expanded tensor, whose elements share memory (give it .clone())",
        ),
        (
            (Scale(), BOTH, [0]),
            "dynamic_axes is a list, not a dict (give {input name: {axis: symbol}})",
        ),
        (
            (Scale(), BOTH, {"fctor": {0: "batch"}}),
            "dynamic_axes names 'fctor', which is no example input (did you mean 'factor'?)",
        ),
        ((Scale(), BOTH, {"x": [0]}), "dynamic_axes of 'x' is a list, not a dict (give {axis: symbol})"),
        (
            (Scale(), BOTH, {"x": {2: "batch"}}),
            "dynamic_axes of 'x' names axis 2; its example has 2 axes",
        ),
        ((Scale(), BOTH, {"x": {0: "the batch"}}), "dynamic_axes of 'x', axis 0: 'the batch' is not a symbol's name"),
        (
            (Scale(), {"x": X[:1].clone(), "factor": FACTOR}, {"x": {0: "batch"}}),
            "the example has size 1 on axis 0 of 'x', which is dynamic ('batch');"
            " torch.export would fix it at that size (give an example of size 2 or more)",
        ),
        (
            (Scale(), BOTH, {"x": {0: "n", 1: "n"}}),
            "'n' is 2 on axis 0 of 'x' and 3 on axis 1 of 'x' (axes of one symbol have one size)",
        ),
    ],
)
def test_what_a_factory_may_not_return(returned: Any, line: str) -> None:
    assert refused(lambda: check_example(returned, "nets:f")) == f"nets:f: {line}"


def test_what_is_accepted_is_put_in_order() -> None:
    module = Scale()
    module.train()
    example = check_example((module, {"factor": FACTOR, "x": X}, {"x": {-2: "batch"}}), "nets:f")
    assert list(example.inputs) == ["x", "factor"]
    assert example.axes == {"x": {0: "batch"}}
    assert example.notes == ["the module was in training mode; it was exported in evaluation mode"]
    assert not module.training


def test_torch_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from graphopt.errors import MissingDependency
    from graphopt.exporting import export

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    with pytest.raises(MissingDependency) as caught:
        export("nets:f", tmp_path / "m.onnx")
    assert str(caught.value) == "export needs torch (in graphopt's folder: pip install '.[export]')"
