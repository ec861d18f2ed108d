"""Write down what the bindings of TensorRT have, version by version: ``api.json`` beside this file.

The fake library refuses whatever is not in there, so a call that some version lacks fails a test and not a user's
build. Needs the bindings' wheels (``tensorrt-cu12-bindings`` of each version, unpacked) and a C compiler, no GPU and
no ``libnvinfer``: the nine C functions that the bindings import are given by empty ones, which is enough to load them
and to read their classes.

    python -m tests.engines.fake_backend.read_api DIR...      # each DIR holds tensorrt_bindings of one version
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

API = Path(__file__).with_name("api.json")
FUNCTIONS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "nvonnxparser": ("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
}
# Whose signatures are kept; of the other classes, what they have is enough.
SIGNED = (
    "Builder",
    "DataType",
    "EngineInspector",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "OnnxParser",
    "ParserError",
    "Runtime",
)


def read(module: Any) -> dict[str, Any]:
    """What a loaded library has: classes with methods, properties and enum members; functions; its version."""
    classes: dict[str, Any] = {}
    functions: list[str] = []
    for name in sorted(dir(module)):
        thing = getattr(module, name)
        if name.startswith("_") or not _own(thing, module):
            continue
        if isinstance(thing, type):
            classes[name] = _read_class(thing, signed=name in SIGNED)
            for inner, nested in vars(thing).items():
                if isinstance(nested, type) and not inner.startswith("_"):
                    classes[f"{name}.{inner}"] = _read_class(nested, signed=False)
        elif callable(thing):
            functions.append(name)
    return {"version": str(module.__version__), "classes": classes, "functions": functions}


def _own(thing: Any, module: Any) -> bool:
    return str(getattr(thing, "__module__", "") or "").split(".")[0] == module.__name__.split(".")[0]


def _read_class(cls: type, *, signed: bool) -> dict[str, Any]:
    if members := getattr(cls, "__members__", None):
        return {"members": {name: int(member) for name, member in members.items()}}
    methods: dict[str, list[str]] = {}
    properties: dict[str, bool] = {}
    for ancestor in reversed(cls.__mro__):
        for name, value in vars(ancestor).items():
            if name.startswith("_") and name != "__init__":
                continue
            if isinstance(value, property):
                properties[name] = value.fset is not None
            elif callable(value) and not isinstance(value, type) and ancestor is not object:
                methods[name] = _signatures(name, value.__doc__ or "") if signed else []
    return {"methods": methods, "properties": properties}


def _signatures(name: str, text: str) -> list[str]:
    """The signatures that pybind11 writes at the head of a docstring, without the names of modules."""
    lines = [re.sub(r"^\d+\. ", "", line.strip()) for line in text.splitlines()]
    found = [line for line in lines if re.match(rf"{re.escape(name)}\(.*\)( -> |$)", line) and "*args" not in line]
    return [_plain(line.removeprefix(name)) for line in found]


def _plain(signature: str) -> str:
    for long, short in (
        (r"tensorrt\w*\.tensorrt\w*\.", ""),
        (r"\btensorrt\w*\.|nvonnxparser::", ""),
        (r"typing\.SupportsInt( \| typing\.SupportsIndex)?", "int"),
        (r"typing\.SupportsFloat( \| typing\.SupportsIndex)?", "float"),
        (r"collections\.abc\.|typing_extensions\.|typing\.", ""),
        (r"\bbuffer\b", "Buffer"),
        (r"\bList\[", "list["),
        (r"\bTuple\[", "tuple["),
        (r"<(\w+\.\w+): -?\d+>", r"\1"),
    ):
        signature = re.sub(long, short, signature)
    return signature


def _child(module: str) -> None:
    """In a process of its own: two versions of one library do not fit into one."""
    import importlib

    json.dump(read(importlib.import_module(module)), sys.stdout)


def run(module: str, environment: dict[str, str]) -> dict[str, Any]:
    """What `read` says of a library, which a process of its own imports."""
    done = subprocess.run(
        [sys.executable, __file__, "--module", module],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def read_bindings(folder: Path, scratch: Path) -> dict[str, Any]:
    """What `read` says of the ``tensorrt_bindings`` in a folder."""
    native = next((folder / "tensorrt_bindings").glob("tensorrt*.so"))
    major = 11 if b"libnvinfer.so.11" in native.read_bytes() else 10
    environment = {"LD_LIBRARY_PATH": str(_stubs(scratch, major)), "PYTHONPATH": str(folder)}
    return run("tensorrt_bindings", environment)


def _stubs(folder: Path, major: int) -> Path:
    place = folder / str(major)
    place.mkdir(exist_ok=True)
    for library, names in FUNCTIONS.items():
        file = f"lib{library}.so.{major}"
        source = "\n".join(f"void *{name}(void) {{ return 0; }}" for name in names)
        command = ["cc", "-shared", "-fPIC", "-xc", "-", f"-Wl,-soname,{file}", "-o", str(place / file)]
        subprocess.run(command, input=source, text=True, check=True)
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="each holds one tensorrt_bindings")
    parser.add_argument("--module", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.module:
        _child(options.module)
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for folder in options.folders:
            _keep(found, read_bindings(folder, Path(scratch)), "tensorrt")
        _keep(found, run("tensorrt_rtx_bindings", {}), "tensorrt-rtx")
    API.write_text(_text(merged({name: found[name] for name in sorted(found, key=_order)})))


def _keep(found: dict[str, Any], api: dict[str, Any], backend: str) -> None:
    short = ".".join(api["version"].split(".")[:2])
    found[f"{backend} {short}"] = api


def _order(name: str) -> tuple[str, list[int]]:
    backend, version = name.split()
    return backend, [int(part) for part in version.split(".")]


def _text(merged: dict[str, Any]) -> str:
    """JSON with one class a line, so that a new version shows as the lines that it changes."""
    compact = {"separators": (",", ":"), "sort_keys": True}
    lines = [f"{json.dumps(name)}:{json.dumps(facts, **compact)}" for name, facts in merged["classes"].items()]
    return '{"versions":' + json.dumps(merged["versions"]) + ',\n"classes":{\n' + ",\n".join(sorted(lines)) + "\n}}\n"


def merged(found: dict[str, Any]) -> dict[str, Any]:
    """The same facts, each said once: entry -> the versions that have it."""
    versions = {name: api["version"] for name, api in found.items()}
    facts: dict[str, dict[str, list[str]]] = {}
    for name, api in found.items():
        for function in api["functions"]:
            facts.setdefault("functions", {}).setdefault(function, []).append(name)
        for cls, what in api["classes"].items():
            group = facts.setdefault(cls, {})
            for member, value in what.get("members", {}).items():
                group.setdefault(f"{member} = {value}", []).append(name)
            for method, signatures in what.get("methods", {}).items():
                for signature in signatures or ["(...)"]:
                    group.setdefault(f"{method}{signature}", []).append(name)
            for prop, writable in what.get("properties", {}).items():
                group.setdefault(f"{prop}: {'read-write' if writable else 'read-only'}", []).append(name)
            group.setdefault("class", []).append(name)
    everywhere = list(versions)
    index = {name: position for position, name in enumerate(everywhere)}
    return {
        "versions": versions,
        "classes": {
            cls: {fact: sorted(index[name] for name in names) for fact, names in group.items()}
            for cls, group in facts.items()
        },
    }


if __name__ == "__main__":
    main()
