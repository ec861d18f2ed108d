"""What a plugin kernel must keep to, checked on its PTX and its source: breaking it does not fail loudly on a GPU.

TensorRT launches a kernel with pointers to the inputs, then the int32 scalars, then pointers to the outputs, and knows
nothing of what the kernel takes. So the order, the sizes and the types are compared here, with the shared memory, the
threads of a block and the version of the instruction set. That a kernel keeps to its contract does not say that it
computes the right thing: the emulator and, in the end, a GPU do.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import GraphoptError
from graphopt.kernels.compile import PINNED_ISA, Ptx
from graphopt.kernels.kernel import SHARED_LIMIT, Kernel, Parameter

_C_TYPES = {
    "float16": ("half",),
    "bfloat16": ("bfloat16",),
    "float32": ("float",),
    "int8": ("int8", "signed char"),
    "uint8": ("u8", "unsigned char"),
    "int32": ("int",),
    "uint32": ("u32", "unsigned int"),
}
_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{")
_PARAM = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.([bsuf]\d+)\b[^,\[]*(\[\s*\d+\s*\])?")
_SHARED = re.compile(
    r"(?P<extern>\.extern\s+)?\.shared\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"(?:\.v(?P<vector>[24])\s+)?\.[bsuf](?P<bits>\d+)\s+[\w$]+(?P<counts>(?:\s*\[\s*\d*\s*\])*)"
)
_THREADS = re.compile(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
_UNDEFINED = re.compile(
    r"\.extern\s+(?:\.func\s+(?:\([^)]*\)\s*)?(?P<function>[\w$]+)|\.(?!shared|func)[^;]*?(?P<variable>[\w$]+)\s*[\[;])"
)


@dataclass(frozen=True)
class Contract:
    """What the PTX of a kernel says, all of it within the contract.

    Attributes:
        parameters: The names of the kernel's parameters, in order: inputs, int32 scalars, outputs.
        static_shared: Bytes of shared memory that it declares.
        dynamic_shared: Bytes of shared memory that the launch adds; both together are at most `SHARED_LIMIT`.
        threads: Of a block.
        isa: The PTX instruction set that it needs.
        architecture: What it was compiled for.
        local_bytes: Bytes of a thread's own memory behind its registers in the PTX: arrays indexed at run time.
    """

    parameters: tuple[str, ...]
    static_shared: int
    dynamic_shared: int
    threads: int
    isa: tuple[int, int]
    architecture: str
    local_bytes: int


@dataclass(frozen=True)
class Resources:
    """What the assembler makes of a kernel on one architecture: registers of a thread, bytes spilled, shared bytes."""

    registers: int
    spilled: int
    shared: int


def check(kernel: Kernel, ptx: Ptx, *, pin: tuple[int, int] = PINNED_ISA) -> Contract:
    """Hold a compiled kernel to the contract.

    Args:
        kernel: What the launch is made from.
        ptx: What it was compiled to.
        pin: The newest instruction set that is allowed.

    Raises:
        GraphoptError: It breaks the contract; the message names every breach.
    """
    text = _COMMENT.sub("", ptx.text)
    breaches = [*_parameter_order(kernel), *_source_order(kernel)]
    isa, architecture = _version(text, ptx, pin, breaches)
    static = _shared(text, kernel, breaches)
    undefined = [match["function"] or match["variable"] for match in _UNDEFINED.finditer(text)]
    breaches += [f"it refers to {name}, which nothing defines" for name in undefined]
    _entry(text, kernel, breaches)
    if breaches:
        raise GraphoptError(f"breaks the contract of kernels: {'; '.join(breaches)}", where=kernel.name)
    local = sum(int(size) for size in re.findall(r"\.local\s[^;]*\[(\d+)\]\s*;", text))
    names = tuple(parameter.name for parameter in kernel.parameters)
    return Contract(names, static, kernel.shared, kernel.threads, isa, architecture, local)


def assemble(ptx: Ptx, *, timeout: float = 300) -> Resources | None:
    """What the toolkit's assembler ``ptxas`` makes of it, for the architecture of the PTX; None where it is missing.

    Raises:
        GraphoptError: The assembler refuses the PTX.
    """
    program = shutil.which("ptxas")
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "kernel.ptx"
        source.write_text(ptx.text, encoding="utf-8")
        target = ptx.architecture.replace("compute_", "sm_")
        words = [program, "-v", f"--gpu-name={target}", "--output-file", str(Path(name) / "kernel.cubin"), str(source)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=timeout)
    said = done.stdout + done.stderr
    registers = re.search(r"Used (\d+) registers", said)
    if done.returncode != 0 or registers is None:
        lines = [line for line in said.splitlines() if line.strip()]
        raise GraphoptError(f"ptxas refuses it: {lines[0] if lines else 'no reason given'}", where=ptx.entry)
    spilled = sum(int(size) for size in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    shared = re.search(r"(\d+) bytes smem", said)
    return Resources(int(registers[1]), spilled, int(shared[1]) if shared else 0)


# -- what the kernel says of itself ------------------------------------------------------------------------------------


def _parameter_order(kernel: Kernel) -> list[str]:
    kinds = [parameter.kind for parameter in kernel.parameters]
    order = ("input", "scalar", "output")
    breaches = []
    if kinds != sorted(kinds, key=order.index):
        breaches.append("its parameters are not inputs, then scalars, then outputs")
    if "output" not in kinds:
        breaches.append("it has no output")
    breaches += [
        f"scalar {parameter.name} is {parameter.dtype}, not int32"
        for parameter in kernel.parameters
        if parameter.kind == "scalar" and parameter.dtype != "int32"
    ]
    return breaches


def _source_order(kernel: Kernel) -> list[str]:
    """The parameters in the source against those of the kernel: PTX has lost their names, and the types behind them."""
    text = _COMMENT.sub("", kernel.source.read_text(encoding="utf-8"))
    defines = dict(kernel.defines)
    found = [words for name, words in _entries(text) if defines.get(name, name) == kernel.name]
    if len(found) != 1:
        return [f"{kernel.source.name} has {len(found) or 'no'} kernels of that name"]
    (words,), wanted = found, kernel.parameters
    if len(words) != len(wanted):
        return [f"the source takes {len(words)} parameters, the kernel says {len(wanted)}"]
    pairs = enumerate(zip(words, wanted, strict=True))
    return [breach for i, (word, parameter) in pairs if (breach := _declared(i, word, parameter, defines))]


def _entries(text: str) -> Iterator[tuple[str, list[str]]]:
    """The kernels of a source: their names, and their parameters as they are written."""
    for macro in re.finditer(r"\bKERNEL\s*\(", text):
        _, end = _bracket(text, macro.end())
        if match := re.compile(r"\s*void\s+(\w+)\s*\(").match(text, end):
            yield match[1], _bracket(text, match.end())[0]


def _bracket(text: str, start: int) -> tuple[list[str], int]:
    """The words of a bracket opened before ``start``, split at its commas, and the place behind it."""
    depth, words, place = 1, [""], start
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            break
        if text[place] == "," and depth == 1:
            words.append("")
        else:
            words[-1] += text[place]
    return [word.strip() for word in words], place + 1


def _declared(index: int, words: str, parameter: Parameter, defines: dict[str, str]) -> str | None:
    is_scalar = parameter.kind == "scalar"
    match = re.fullmatch(r"(?:const\s+)?(int)\s+(\w+)" if is_scalar else r"GLOBAL\s*\(([^)]*)\)\s*(\w+)", words)
    if match is None:
        wanted = "int" if is_scalar else "GLOBAL(type)"
        return f"parameter {index} is written {words!r}; {parameter.kind} {parameter.name} has to be {wanted}"
    if match[2] != parameter.name:
        return f"parameter {index} is {match[2]} in the source, {parameter.name} in the kernel"
    kinds = match[1].split()
    constant, name = "const" in kinds, " ".join(word for word in kinds if word != "const")
    if not is_scalar and constant != (parameter.kind == "input"):
        return f"{parameter.kind} {parameter.name} is {'' if constant else 'not '}const in the source"
    if defines.get(name, name) not in _C_TYPES.get(parameter.dtype, (parameter.dtype,)):
        return f"{parameter.name} is {defines.get(name, name)} in the source, {parameter.dtype} in the kernel"
    return None


# -- what the PTX says -------------------------------------------------------------------------------------------------


def _version(text: str, ptx: Ptx, pin: tuple[int, int], breaches: list[str]) -> tuple[tuple[int, int], str]:
    versions = re.findall(r"^\s*\.version\s+(\d+)\.(\d+)", text, re.MULTILINE)
    isa = (int(versions[0][0]), int(versions[0][1])) if versions else (0, 0)
    if len(versions) != 1:
        breaches.append(f"the PTX has {len(versions)} .version lines")
    elif isa != ptx.isa:
        breaches.append(f"the PTX says ISA {_dotted(isa)}, its record {_dotted(ptx.isa)}")
    if isa > pin:
        breaches.append(f"it needs PTX ISA {_dotted(isa)}, newer than the pinned {_dotted(pin)}")
    targets = re.findall(r"^\s*\.target\s+([\w, ]+)", text, re.MULTILINE)
    wanted = ptx.architecture.replace("compute_", "sm_")
    if [target.strip() for target in targets] != [wanted]:
        breaches.append(f"its target is {' and '.join(targets) or 'not said'}, not {wanted}")
    if not re.search(r"^\s*\.address_size\s+64\b", text, re.MULTILINE):
        breaches.append("its addresses are not of 64 bits")
    return isa, ptx.architecture


def _dotted(isa: Sequence[int]) -> str:
    return ".".join(map(str, isa))


def _shared(text: str, kernel: Kernel, breaches: list[str]) -> int:
    static = 0
    for match in _SHARED.finditer(text):
        if match["extern"]:
            if kernel.shared == 0:
                breaches.append("it uses dynamic shared memory and asks for none")
            continue
        size = _BYTES[match["bits"]] * int(match["vector"] or 1)
        alignment = int(match["align"] or size)
        for count in re.findall(r"\d+", match["counts"]):
            size *= int(count)
        static = -(-static // alignment) * alignment + size
    if static + kernel.shared > SHARED_LIMIT:
        told = f"{static} static and {kernel.shared} dynamic" if kernel.shared else str(static)
        breaches.append(f"it needs {told} bytes of shared memory; there are {SHARED_LIMIT}")
    return static


def _entry(text: str, kernel: Kernel, breaches: list[str]) -> None:
    entries = list(_ENTRY.finditer(text))
    named = [entry for entry in entries if entry[1] == kernel.name]
    if len(entries) != 1 or len(named) != 1:
        breaches.append(f"its entry points are {', '.join(entry[1] for entry in entries) or 'none'}")
    if not named:
        return
    _, parameters, directives = named[0].groups()
    _check_parameters(parameters or "", kernel, breaches)
    threads = _THREADS.findall(directives)
    if not threads:
        breaches.append("it does not say how many threads a block has")
    for counts in threads:
        product = 1
        for count in counts:
            product *= int(count or 1)
        if product != kernel.threads or int(counts[0]) != kernel.threads:
            told = " x ".join(count for count in counts if count)
            breaches.append(f"a block is of {told} threads in the PTX, {kernel.threads} in the kernel")


def _check_parameters(text: str, kernel: Kernel, breaches: list[str]) -> None:
    found = [part for part in text.split(",") if part.strip()]
    if len(found) != len(kernel.parameters):
        breaches.append(f"it takes {len(found)} parameters, {len(kernel.parameters)} are given")
        return
    for index, (part, parameter) in enumerate(zip(found, kernel.parameters, strict=True)):
        match = _PARAM.search(part)
        kind, array = (match[1], match[2]) if match else ("?", None)
        wanted = ("u32", "s32", "b32") if parameter.kind == "scalar" else ("u64", "b64")
        if array or kind not in wanted:
            told = f".{kind}{array or ''}"
            breaches.append(f"parameter {index} is {told}; {parameter.kind} {parameter.name} needs .{wanted[0]}")
