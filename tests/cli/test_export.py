"""``graphopt export`` from the outside, in a process of its own: exit codes and streams."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FACTORIES = """
import sys
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x):
        print("chatter")
        return {"logits": self.linear(x)}

class Wrong(Net):
    def forward(self, x):
        return self.linear(x) * (2 if torch.compiler.is_compiling() else 1)

def net():
    print("more chatter", file=sys.stderr)
    return Net(), {"x": torch.arange(8.0).reshape(2, 4)}, {"x": {0: "batch"}}

def wrong():
    return Wrong(), {"x": torch.arange(8.0).reshape(2, 4)}, None
"""


def graphopt(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "graphopt", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(FACTORIES)
    return tmp_path


def test_a_table_and_no_chatter(folder: Path) -> None:
    done = graphopt(folder, "export", "nets.py:net", "-o", "net.onnx")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines() if line]
    assert lines[:3] == [
        ["name", "type", "axes"],
        ["input", "x", "float32", "batch×4"],
        ["output", "logits", "float32", "batch×2"],
    ]
    assert [line[0] for line in lines[4:7]] == ["batch=2", "batch=1", "batch=3"]
    assert lines[7] == ["note:", "the", "module", "was", "in", "training", "mode;", *lines[7][7:]]
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "chatter" not in done.stdout


def test_json_and_verbose(folder: Path) -> None:
    done = graphopt(folder, "export", "nets:net", "-o", "net.onnx", "--json", "--verbose", "--opset", "21")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["opset"] == 21
    assert report["bytes"] == (folder / "net.onnx").stat().st_size
    assert len(report["comparison"]) == 3
    assert "more chatter" in done.stderr


def test_a_difference_is_exit_code_1(folder: Path) -> None:
    done = graphopt(folder, "export", "nets:wrong", "-o", "net.onnx")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: nets:wrong: the ONNX does not compute what the module does: 'output':")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) in (["nets.py"], ["__pycache__", "nets.py"])


def test_bad_input_is_exit_code_2(folder: Path) -> None:
    done = graphopt(folder, "export", "nets:nett", "-o", "net.onnx")
    assert done.returncode == 2
    assert done.stderr == "error: nets: no function 'nett' (did you mean 'net'?)\n"
