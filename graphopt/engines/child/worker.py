"""The child process that builds one engine: ``python -P -m graphopt.engines.child.worker REQUEST.json``.

The libraries can abort or segfault; nothing here may be needed by the parent afterwards but the files named
in the request: the log (one line each, flushed), the progress, the answer (JSON), the engine.

Nothing of graphopt is imported before it is needed: `find_gpu` is asked by `make gpu`, before anything is installed.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

_FUNCTIONS = ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute")
_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, ..._MINOR


def main(request_path: str) -> int:
    """Build what the request says; returns 0, or 1 where the answer holds an error."""
    from graphopt.engines.backends import NotImported, import_first
    from graphopt.engines.child.building import build
    from graphopt.engines.child.requests import BuildFailed, Request

    request = Request.read(Path(request_path))
    answer: dict[str, Any]
    with Path(request.log).open("w", buffering=1) as log:
        try:
            answer = build(import_first(request.modules), request, log)
        except BuildFailed as error:
            answer = {"error": str(error), "hint": error.hint, "bad_input": error.bad_input, "refused": error.refused}
        except NotImported as error:
            answer = {"error": str(error), "not_loaded": True}
        except OSError as error:
            answer = {"error": f"cannot write {error.filename}: {error.strerror}", "hint": None}
    write_answer(request.answer, answer)
    return 1 if "error" in answer else 0


def write_answer(path: str, answer: dict[str, Any]) -> None:
    """Write the answer so that a reader finds a whole one, whenever this process ends."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(answer))
    partial.replace(path)


def peak_rss_bytes() -> int | None:
    """This process's largest resident size. (getrusage would count the parent's, which vfork shares.)"""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def find_gpu() -> str | None:
    """The name of the first GPU that the driver sees, or None."""
    found = describe_gpu()
    return None if found is None else found[0]


def describe_gpu() -> tuple[str, tuple[int, int]] | None:
    """The name and the compute capability of the first GPU that the driver sees, or None."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(os.environ.get("GRAPHOPT_LIBCUDA") or library)
        functions = [getattr(driver, name) for name in _FUNCTIONS]
    except (OSError, AttributeError):  # there is none; or it is no driver, and whoever needs one says so
        return None
    initialise, get_count, get_device, get_name, get_attribute = functions
    count, device, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if initialise(0) or get_count(ctypes.byref(count)) or count.value < 1:
        return None
    if get_device(ctypes.byref(device), 0) or get_name(name, 256, device):
        return None
    capability = [ctypes.c_int(), ctypes.c_int()]
    for value, attribute in zip(capability, _COMPUTE_CAPABILITY, strict=True):
        if get_attribute(ctypes.byref(value), attribute, device):
            return None
    return name.value.decode(errors="replace"), (capability[0].value, capability[1].value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
