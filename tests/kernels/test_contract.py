"""The contract of kernels: PTX that keeps it passes, and each way of breaking it is named."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import GraphoptError
from graphopt.kernels.catalogue import all_kernels, describe
from graphopt.kernels.compile import Ptx, compile_ptx
from graphopt.kernels.contract import assemble, check
from graphopt.kernels.gemm import half_gemm, int8_gemm, kernels
from graphopt.kernels.kernel import ARCHITECTURES, SHARED_LIMIT, Kernel, Parameter

HALF, INT8 = half_gemm("float16")[1], int8_gemm("float32")[1]
PARAMETERS = ("x", "weight", "bias", "M", "N", "K", "y")


@pytest.fixture(scope="module")
def half() -> Ptx:
    pytest.importorskip("nvidia.cuda_nvrtc", reason="nvidia-cuda-nvrtc-cu12 is not installed")
    return compile_ptx(HALF)


@pytest.fixture(scope="module")
def int8(half: Ptx) -> Ptx:
    return compile_ptx(INT8)


def test_what_keeps_it(half: Ptx, int8: Ptx) -> None:
    contract = check(HALF, half)
    assert contract.parameters == PARAMETERS
    assert (contract.static_shared, contract.dynamic_shared, contract.threads) == (32768, 0, 128)
    assert (contract.isa, contract.architecture) == ((8, 7), "compute_80")
    assert contract.local_bytes == 0
    assert len(check(INT8, int8).parameters) == 8


@pytest.mark.parametrize("kernel", kernels(), ids=describe)
def test_the_products_keep_it_in_registers(kernel: Kernel, half: Ptx) -> None:
    contract = check(kernel, compile_ptx(kernel))
    assert contract.local_bytes == 0, "arrays are indexed at run time"
    assert contract.static_shared >= 16 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_keeps_it(architecture: str, half: Ptx) -> None:
    for kernel in all_kernels():
        ptx = compile_ptx(kernel, architecture)
        assert check(kernel, ptx).architecture == architecture
        resources = assemble(ptx)
        if resources is not None:
            assert resources.registers * kernel.threads <= 65536, describe(kernel)


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is not installed")
def test_shared_memory_as_the_assembler_counts_it(half: Ptx) -> None:
    resources = assemble(half)
    assert resources is not None
    assert resources.shared == check(HALF, half).static_shared
    assert resources.spilled == 0
    assert 0 < resources.registers <= 255
    with pytest.raises(GraphoptError, match=r"graphopt_gemm_half: ptxas refuses it: .*Unsupported \.version 99\.0"):
        assemble(replace(half, text=half.text.replace(".version 8.7", ".version 99.0")))


def test_without_the_assembler(half: Ptx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert assemble(half) is None


def sub(pattern: str, new: str) -> Callable[[str], str]:
    """Replace the first match of a pattern, which has to be there."""

    def edit(text: str) -> str:
        changed, count = re.subn(pattern, new, text, count=1, flags=re.MULTILINE)
        assert count == 1, pattern
        return changed

    return edit


def param(index: int, new: str) -> Callable[[str], str]:
    """Rewrite one parameter of the entry point; the PTX type of parameter i is in front of its name."""
    return sub(rf"^\s*\.param [^\n]*_param_{index}\b(,?)$", rf"\t.param {new} graphopt_gemm_half_param_{index}\1")


TAIL = "\n.visible .entry "
BREACHES: dict[str, tuple[Callable[[str], str], str]] = {
    "a pointer of 32 bits": (param(0, ".u32"), r"parameter 0 is \.u32; input x needs \.u64"),
    "a scalar of 64 bits": (param(3, ".u64"), r"parameter 3 is \.u64; scalar M needs \.u32"),
    "a scalar that is a float": (param(5, ".f32"), r"parameter 5 is \.f32; scalar K needs \.u32"),
    "a struct": (
        sub(r"^\s*\.param [^\n]*_param_6\b", "\t.param .align 8 .b8 graphopt_gemm_half_param_6[16]"),
        r"parameter 6 is \.b8\[16\]; output y needs \.u64",
    ),
    "a parameter less": (sub(r"^[^\n]*_param_2,\n", ""), "it takes 6 parameters, 7 are given"),
    "a parameter more": (
        sub(r"_param_6$", "_param_6,\n\t.param .u64 scratch"),
        "it takes 8 parameters, 7 are given",
    ),
    "no parameters": (sub(r"graphopt_gemm_half\([^)]*\)", "graphopt_gemm_half()"), "it takes 0 parameters"),
    "scalars behind the output": (
        lambda text: param(6, ".u32")(param(3, ".u64")(text)),
        r"parameter 3 is \.u64.*parameter 6 is \.u32",
    ),
    "more shared memory, of the module": (
        sub(r"^\.visible \.entry ", ".shared .align 16 .b8 more[16400];" + TAIL),
        "it needs 49168 bytes of shared memory; there are 49152",
    ),
    "more shared memory, of the kernel": (sub(r"^\{", "{\n\t.shared .v2 .f32 more[4][600];"), "it needs 51968 bytes"),
    "shared memory, aligned apart": (
        sub(r"^\{", "{\n\t.shared .b8 one;\n\t.shared .align 16384 .b8 more[16];"),
        "it needs 49168 bytes",
    ),
    "dynamic shared memory that nobody asks for": (
        sub(r"^\.visible \.entry ", ".extern .shared .align 16 .b8 dynamic[];" + TAIL),
        "it uses dynamic shared memory and asks for none",
    ),
    "a function from elsewhere": (
        sub(
            r"^\.visible \.entry ",
            ".extern .func (.param .b32 r) vprintf\n(\n.param .b64 a,\n.param .b64 b\n)\n;" + TAIL,
        ),
        "it refers to vprintf, which nothing defines",
    ),
    "a function without a result": (
        sub(r"^\.visible \.entry ", ".extern .func __assertfail(.param .b64 a) .noreturn;" + TAIL),
        "it refers to __assertfail, which nothing defines",
    ),
    "a variable from elsewhere": (
        sub(r"^\.visible \.entry ", ".extern .global .align 4 .b8 table[64];" + TAIL),
        "it refers to table, which nothing defines",
    ),
    "a constant from elsewhere": (
        sub(r"^\.visible \.entry ", ".extern .const .f32 scale;" + TAIL),
        "it refers to scale, which nothing defines",
    ),
    "a newer instruction set": (
        sub(r"^\.version 8\.7", ".version 8.8"),
        r"it needs PTX ISA 8\.8, newer than the pinned 8\.7",
    ),
    "another instruction set than recorded": (
        sub(r"^\.version 8\.7", ".version 7.8"),
        r"the PTX says ISA 7\.8, its record 8\.7",
    ),
    "no version": (sub(r"^\.version 8\.7\n", ""), r"the PTX has 0 \.version lines"),
    "another target": (sub(r"^\.target sm_80", ".target sm_90"), "its target is sm_90, not sm_80"),
    "a target of one architecture alone": (sub(r"^\.target sm_80", ".target sm_90a"), "its target is sm_90a"),
    "a target for debugging": (sub(r"^\.target sm_80", ".target sm_80, debug"), "its target is sm_80, debug"),
    "short addresses": (sub(r"^\.address_size 64", ".address_size 32"), "its addresses are not of 64 bits"),
    "fewer threads": (sub(r"^\.maxntid 128", ".maxntid 64"), "a block is of 64(?: x 1 x 1)? threads .*, 128 in the"),
    "threads in two directions": (
        sub(r"^\.maxntid [^\n]*", ".reqntid 32, 4, 1"),
        "a block is of 32 x 4 x 1 threads in the PTX, 128 in the kernel",
    ),
    "no word of threads": (sub(r"^\.maxntid [^\n]*\n", ""), "does not say how many threads"),
    "another name": (
        lambda text: text.replace("graphopt_gemm_half", "_Z18graphopt_gemm_half"),
        "its entry points are _Z18graphopt_gemm_half",
    ),
    "two entry points": (
        sub(r"^\.visible \.entry ", ".visible .entry second()\n.maxntid 128\n{\n\tret;\n}\n" + TAIL),
        "its entry points are second, graphopt_gemm_half",
    ),
    "no entry point": (sub(r"^\.visible \.entry ", ".visible .func "), "its entry points are none"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_in_the_ptx(name: str, half: Ptx) -> None:
    edit, message = BREACHES[name]
    text = edit(half.text)
    assert text != half.text
    with pytest.raises(
        GraphoptError, match=f"^graphopt_gemm_half: breaks the contract of kernels: .*{message}"
    ) as caught:
        check(HALF, replace(half, text=text))
    assert "\n" not in str(caught.value)


def test_a_comment_breaks_nothing(half: Ptx) -> None:
    note = "// .extern .func printf; .shared .b8 more[99999];\n/* .version 9.9\n.extern .global .b8 t[4]; */\n"
    assert check(HALF, replace(half, text=note + half.text)) == check(HALF, half)


def test_dynamic_shared_memory_counts(half: Ptx) -> None:
    declared = sub(r"^\.visible \.entry ", ".extern .shared .align 16 .b8 dynamic[];" + TAIL)(half.text)
    room = SHARED_LIMIT - 32768
    kernel, ptx = replace(HALF, shared=room), replace(half, text=declared)
    assert check(kernel, ptx).dynamic_shared == room
    with pytest.raises(GraphoptError, match="it needs 32768 static and 16385 dynamic bytes of shared memory"):
        check(replace(HALF, shared=room + 1), ptx)


def test_every_breach_is_named(half: Ptx) -> None:
    text = half.text
    for name in ("a pointer of 32 bits", "another target", "fewer threads", "a function without a result"):
        text = BREACHES[name][0](text)
    with pytest.raises(GraphoptError) as caught:
        check(HALF, replace(half, text=text))
    assert str(caught.value).count(";") == 4  # four breaches, and one more sign inside the first


@pytest.mark.parametrize("order", list(permutations(range(4)))[1:])
def test_inputs_in_another_order(order: tuple[int, ...], int8: Ptx) -> None:
    """In the PTX they are all alike: pointers. Only the source tells them apart."""
    parameters = tuple(INT8.parameters[i] for i in order) + INT8.parameters[4:]
    with pytest.raises(GraphoptError, match=r"parameter \d is \w+ in the source, \w+ in the kernel"):
        check(replace(INT8, parameters=parameters), int8)


@given(order=st.permutations(range(len(PARAMETERS))))
def test_only_one_order_passes(order: list[int]) -> None:
    pytest.importorskip("nvidia.cuda_nvrtc", reason="nvidia-cuda-nvrtc-cu12 is not installed")
    ptx = compile_ptx(HALF)
    kernel = replace(HALF, parameters=tuple(HALF.parameters[i] for i in order))
    if order == sorted(order):
        check(kernel, ptx)
        return
    with pytest.raises(GraphoptError, match="breaks the contract of kernels"):
        check(kernel, ptx)


def with_parameter(index: int, **changes: str) -> Kernel:
    parameters = list(HALF.parameters)
    parameters[index] = replace(parameters[index], **changes)  # type: ignore[arg-type]
    return replace(HALF, parameters=tuple(parameters))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (with_parameter(0, dtype="float32"), "x is half in the source, float32 in the kernel"),
        (with_parameter(6, dtype="bfloat16"), "y is half in the source, bfloat16 in the kernel"),
        (with_parameter(3, dtype="int64"), "scalar M is int64, not int32"),
        (
            with_parameter(0, kind="scalar"),
            r"parameters are not inputs, then scalars, then outputs.*'GLOBAL\(const REAL\) x'",
        ),
        (with_parameter(6, kind="input"), "it has no output.*input y is not const in the source"),
        (with_parameter(2, kind="output"), "not inputs, then scalars.*output bias is const in the source"),
        (replace(HALF, parameters=(*HALF.parameters, Parameter("z", "output", "float16"))), "takes 7 .* says 8"),
        (replace(HALF, defines=(("REAL", "bfloat16"),)), "x is bfloat16 in the source, float16 in the kernel"),
        (replace(HALF, name="graphopt_gemm"), r"half_gemm\.cu has no kernels of that name"),
        (replace(HALF, threads=256), "a block is of 128(?: x 1 x 1)? threads in the PTX, 256 in the kernel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_kernel_that_its_source_belies(kernel: Kernel, message: str, half: Ptx) -> None:
    with pytest.raises(GraphoptError, match=message):
        check(kernel, half)


@pytest.mark.parametrize(
    "written",
    [
        "GLOBAL(const REAL) x, GLOBAL(const REAL) weight, GLOBAL(const REAL) bias, int M, int N, int K, GLOBAL(REAL) y",
        "GLOBAL(REAL const)x,GLOBAL( const REAL ) weight, // of y\n  GLOBAL(const half) bias /* (N,) */, int M, "
        "const int N,\nint K,GLOBAL(half) y",
    ],
)
def test_how_a_source_may_be_written(written: str, tmp_path: Path, half: Ptx) -> None:
    source = tmp_path / "written.cu"
    source.write_text(f"// KERNEL(1) void graphopt_gemm_half(int x)\nKERNEL(2 * (3))\nvoid ENTRY({written}) {{}}\n")
    kernel = replace(HALF, source=source, defines=(*HALF.defines, ("ENTRY", "graphopt_gemm_half")))
    assert check(kernel, half).parameters == PARAMETERS
