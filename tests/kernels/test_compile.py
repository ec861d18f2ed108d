"""Compiling to PTX: what comes out, what is kept, and what users are told."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from graphopt.errors import BadInput, GraphoptError, MissingDependency
from graphopt.kernels import compile as compiling
from graphopt.kernels.compile import cache_folder, compile_ptx, find_nvrtc, read_sources
from graphopt.kernels.kernel import ARCHITECTURES, Kernel, Launch, Parameter

SOURCE = """#include "kit.h"

KERNEL(32)
void scaled(GLOBAL(const float) x, int count, GLOBAL(float) y) {
    if (thread() < count) y[thread()] = x[thread()] * FACTOR;
}
"""
PACKAGE = "nvidia-cuda-nvrtc-cu12"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "_kept", {})


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """A kernel as small as they come, in a file of its own."""
    source = tmp_path / "scaled.cu"
    source.write_text(SOURCE)
    parameters = (
        Parameter("x", "input", "float32"),
        Parameter("count", "scalar", "int32"),
        Parameter("y", "output", "float32"),
    )
    return Kernel(
        name="scaled",
        source=source,
        parameters=parameters,
        threads=32,
        launch=lambda shapes: Launch((1, 1, 1), (shapes[0][0],)),
        defines=(("FACTOR", "2.0f"),),
    )


needs_nvrtc = pytest.mark.skipif(find_nvrtc(PACKAGE) is None, reason=f"{PACKAGE} is not installed")


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_for_every_architecture(kernel: Kernel, architecture: str) -> None:
    ptx = compile_ptx(kernel, architecture)
    assert f".target {architecture.replace('compute', 'sm')}\n" in ptx.text
    assert ".visible .entry scaled(" in ptx.text
    assert (ptx.entry, ptx.architecture, ptx.isa) == ("scaled", architecture, (8, 7))
    assert ptx.compiler == "NVRTC 12.8"
    assert ptx.seconds > 0


@needs_nvrtc
def test_kept_by_content(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compile_ = compiling._Nvrtc.compile
    monkeypatch.setattr(compiling._Nvrtc, "compile", lambda *given: (calls.append(given[1:]), compile_(*given))[1])
    first = compile_ptx(kernel)
    assert compile_ptx(kernel) is first
    compiling._kept.clear()  # as in another process
    assert compile_ptx(kernel) == first
    assert len(calls) == 1
    assert compile_ptx(kernel, fresh=True).text == first.text
    changed = replace(kernel, defines=(("FACTOR", "3.0f"),))
    assert compile_ptx(changed).text != first.text
    compile_ptx(kernel, "compute_90")
    kernel.source.write_text(SOURCE.replace("* FACTOR", "+ FACTOR"))
    assert compile_ptx(kernel).text != first.text
    assert len(calls) == 5


@needs_nvrtc
def test_a_damaged_or_forbidden_cache_is_no_obstacle(kernel: Kernel, tmp_path: Path) -> None:
    first = compile_ptx(kernel)
    (kept,) = cache_folder().iterdir()
    for damage in ("", "{", "[]", json.dumps({"text": "", "isa": 3})):
        kept.write_text(damage)
        compiling._kept.clear()
        assert compile_ptx(kernel).text == first.text
    shutil.rmtree(cache_folder())
    cache_folder().write_text("a file, where the folder should be")
    compiling._kept.clear()
    assert compile_ptx(kernel).text == first.text


@needs_nvrtc
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("missing(count);\n", r'scaled\.cu:5: NVRTC 12\.8 does not compile scaled: identifier "missing" is undefined'),
        ("\n#error no such dtype\n", r"scaled\.cu:6: .*no such dtype"),
        ("sync_block(1);", r"scaled\.cu:5: .*argument"),
    ],
)
def test_errors_say_file_and_line(kernel: Kernel, wrong: str, message: str) -> None:
    kernel.source.write_text(SOURCE.replace("    if (thread", f"    {wrong}    if (thread"))
    with pytest.raises(GraphoptError, match=f"^{message}") as caught:
        compile_ptx(kernel)
    assert "\n" not in str(caught.value)


@needs_nvrtc
def test_errors_about_options_are_one_line_too(kernel: Kernel) -> None:
    with pytest.raises(GraphoptError, match=r"^scaled\.cu: NVRTC 12\.8 does not compile it: .*error"):
        compile_ptx(replace(kernel, defines=(("2", "3"),)))


def test_what_cannot_be_compiled_at_all(kernel: Kernel, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no architecture .sm_80. \(there are compute_80, "):
        compile_ptx(kernel, "sm_80")
    with pytest.raises(GraphoptError, match=r"none\.cu: cannot be read"):
        compile_ptx(replace(kernel, source=tmp_path / "none.cu"))
    kernel.source.write_text('#include "cuda_fp16.h"\n' + SOURCE)
    with pytest.raises(GraphoptError, match=r"scaled\.cu: includes 'cuda_fp16\.h', which the kernel kit does not have"):
        compile_ptx(kernel)


def test_sources_are_what_is_included(kernel: Kernel) -> None:
    sources = read_sources(kernel)
    assert next(iter(sources)) == "scaled.cu"
    assert {"kit.h"} <= set(sources)
    assert "tile_product.h" not in sources


@pytest.mark.parametrize(
    ("package", "files", "found"),
    [
        (PACKAGE, ["cuda_nvrtc/lib/libnvrtc.alt.so.12", "cuda_nvrtc/lib/libnvrtc-builtins.so.12.8"], None),
        (PACKAGE, ["cuda_nvrtc/lib/libnvrtc.alt.so.12", "cuda_nvrtc/lib/libnvrtc.so.12"], 1),
        (PACKAGE, ["cuda_nvrtc/bin/nvrtc-builtins64_128.dll", "cuda_nvrtc/bin/nvrtc64_120_0.dll"], 1),
        (PACKAGE, ["cuda_nvrtc/bin/nvrtc64_120_0.alt.dll"], None),
        ("nvidia-cuda-nvrtc", ["cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc.so.13"], 1),
        ("nvidia-cuda-nvrtc", ["cu13/bin/x86_64/nvrtc64_130_0.dll"], 0),
        (PACKAGE, ["cu13/lib/libnvrtc.so.13"], None),
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_the_library_is_found(
    package: str, files: list[str], found: int | None, listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata
    import importlib.util
    from types import SimpleNamespace

    for file in files:
        (tmp_path / "nvidia" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nvidia" / file).touch()

    def distribution(name: str) -> object:
        if not listed:
            raise importlib.metadata.PackageNotFoundError(name)
        paths = [SimpleNamespace(locate=lambda file=file: tmp_path / "nvidia" / file) for file in files]
        return SimpleNamespace(files=paths)

    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if listed else spec)
    assert find_nvrtc(package) == (None if found is None else tmp_path / "nvidia" / files[found])


@pytest.mark.parametrize(
    ("compiler", "hint"),
    [("nvrtc", r"pip install '\.\[plugins\]'"), ("nvrtc-13", "pip install nvidia-cuda-nvrtc"), ("nvcc", "NVRTC does")],
)
def test_a_missing_compiler(kernel: Kernel, compiler: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "find_nvrtc", lambda package: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    compiling._nvrtc.cache_clear()
    compiling._nvcc.cache_clear()
    with pytest.raises(MissingDependency, match=hint):
        compile_ptx(kernel, compiler=compiler)  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_nvcc_where_asked_for(kernel: Kernel) -> None:
    ptx = compile_ptx(kernel, compiler="nvcc")
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    assert ptx.compiler.removeprefix("nvcc ") in said
    assert ".visible .entry scaled(" in ptx.text
    kernel.source.write_text(SOURCE.replace("thread() <", "missing() <"))
    with pytest.raises(GraphoptError, match=r"^scaled\.cu:5: nvcc .* does not compile scaled: identifier"):
        compile_ptx(kernel, compiler="nvcc")
