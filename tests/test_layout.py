"""How the repository is laid out: one import package through symlinks, and what importing it costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("passes", "plugins", "cli")
HEAVY = ("numpy", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "torch", "scipy", "tensorrt", "pydantic", "rich")


def sources() -> list[Path]:
    """Every Python file of the project, each once."""
    places = ("graphopt", *FOLDERS, "tests", "benchmarks", "examples")
    found = [p for place in places for p in (ROOT / place).rglob("*.py")]
    return [p for p in found if not any(parent.is_symlink() for parent in p.parents if parent.is_relative_to(ROOT))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_top_folders_are_one_package(folder: str) -> None:
    link = ROOT / "graphopt" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    assert (ROOT / folder / "__init__.py").is_file()


def test_no_file_imports_a_top_folder_by_itself() -> None:
    """``import passes`` would work from the root of the checkout alone, and make a second copy of every module."""
    files = sources()
    assert len(files) > 100
    wrong = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            wrong += [f"{path.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] in FOLDERS]
    assert wrong == []


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a Python process has after running some code."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


HELP = "from graphopt.cli.main import main\nmain(['--help'])"


def test_help_imports_no_heavy_library() -> None:
    assert loaded_by(HELP).isdisjoint(HEAVY)


def test_importing_the_package_imports_no_heavy_library() -> None:
    assert loaded_by("import graphopt; graphopt.__all__").isdisjoint(HEAVY)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_help_of_a_command_imports_no_framework(command: str) -> None:
    loaded = loaded_by(f"from graphopt.cli.main import main\nmain([{command!r}, '--help'])")
    assert loaded.isdisjoint({"torch", "onnxruntime", "tensorrt", "onnx", "onnx_ir", "numpy"})


def test_optimizing_imports_no_torch(tmp_path: Path) -> None:
    code = f"""
import onnx, graphopt
text = '<ir_version: 8, opset_import: ["": 17]> g (float[N,4] x) => (float[N,4] y) {{ i = Identity(x) y = Exp(i) }}'
onnx.save(onnx.parser.parse_model(text), r"{tmp_path}/m.onnx")
graphopt.optimize(r"{tmp_path}/m.onnx")
"""
    assert loaded_by(code).isdisjoint({"torch", "tensorrt", "transformers"})


def test_the_api_and_the_commands_have_the_same_names() -> None:
    import graphopt

    commands = {name.replace("-", "_") for name in COMMANDS} - {"bundle", "passes", "profile_target", "import"} | {
        "import_factors"
    }
    assert commands | {"load"} == set(graphopt.__all__)
    for name in graphopt.__all__:
        assert callable(getattr(graphopt, name))
    with pytest.raises(AttributeError):
        _ = graphopt.no_such_function  # type: ignore[attr-defined]
