"""Which onnxruntime distribution is installed.

The flavours (``onnxruntime``, ``onnxruntime-gpu``, ...) install files of the same names over each other, so
two at once is an undefined mixture of both. The base of graphopt depends on none of them: the user picks one.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

from graphopt.errors import MissingDependency, install_hint

if TYPE_CHECKING:
    from types import ModuleType

FLAVOURS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-training",
    "onnxruntime-silicon",
    "ort-nightly",
    "ort-nightly-gpu",
)


def installed_flavours() -> dict[str, str]:
    """The onnxruntime distributions that are installed, each with its version. Imports none of them."""
    found: dict[str, str] = {}
    for name in FLAVOURS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def onnxruntime_flavour() -> tuple[str, str]:
    """The name and version of the one onnxruntime distribution that is installed.

    Raises:
        MissingDependency: None is installed, or more than one is.
    """
    found = installed_flavours()
    if not found:
        raise MissingDependency("onnxruntime is not installed", hint=install_hint("cpu", "gpu"))
    if len(found) > 1:
        raise MissingDependency(
            f"{' and '.join(found)} are installed together and overwrite each other",
            hint=f"pip uninstall -y {' '.join(found)}; pip install {list(found)[-1]}, or whichever you want",
        )
    return next(iter(found.items()))


@cache
def import_onnxruntime() -> ModuleType:
    """Import onnxruntime, or say what to install. Once: looking for what is installed takes longer than a session.

    Raises:
        MissingDependency: None or more than one flavour is installed, or the installed one does not load.
    """
    name, version = onnxruntime_flavour()
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingDependency(
            f"{name} {version} is installed but does not load: {reason}",
            hint=f"pip install --force-reinstall {name}",
        ) from error
    module: ModuleType = onnxruntime
    return module
