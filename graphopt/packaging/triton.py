"""A model repository of Triton Inference Server: ``config.pbtxt`` and the model, for the backend that loads it.

What a server checks when it loads a model is followed from Triton's documentation and the checks of its onnxruntime and
tensorrt backends. Nothing is run on a server here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import BadInput
from graphopt.files.bundle_folder import is_bundle, not_one_file
from graphopt.packaging.engine import served_engine
from graphopt.packaging.onnx_model import served_model
from graphopt.packaging.pbtxt import Message, Token, write
from graphopt.packaging.repository import check_place, put
from graphopt.packaging.signature import Served, Tensor

DEFAULT_MAX_BATCH = 4
"""What Triton itself fills in for an ONNX model that can be batched and whose configuration does not say."""
KINDS = {"auto": "KIND_AUTO", "gpu": "KIND_GPU", "cpu": "KIND_CPU"}
_ENGINES = (b"ptrt", b"ftrt", b"vtrt")
_INT32 = (1 << 31) - 1  # what a configuration counts with
_HEADER = "# Written by graphopt package. Not run on a server there.\n"


@dataclass(frozen=True)
class TritonModel:
    """A model in a repository.

    Attributes:
        path: Its folder.
        name: What clients call it.
        version: The version that was written.
        backend: The Triton backend that loads it.
        needs: What an engine is bound to, in words; None for ONNX.
        max_batch: The largest batch that the server makes of requests; 0: none, clients send the whole shape.
        why: Where that comes from.
        optional: Optional inputs that a batched model is served without, at their defaults.
        bytes: What was copied.
        status: What was done with it, said honestly.
    """

    path: Path
    name: str
    version: int
    backend: str
    needs: str | None
    max_batch: int
    why: str
    optional: tuple[str, ...]
    bytes: int
    status: str = "written, not loaded by a server"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def package_triton(
    model: str | Path,
    repository: str | Path,
    *,
    name: str | None = None,
    version: int = 1,
    max_batch: int | None = None,
    instances: int = 1,
    device: str = "auto",
    verify: bool = True,
    force: bool = False,
) -> TritonModel:
    """Write a model or an engine into a Triton model repository.

    Args:
        model: An ONNX file, or a TensorRT engine with the report that ``graphopt build`` wrote beside it.
        repository: The folder of all models; made where it is missing. Its own folder must exist.
        name: What clients call the model; by default the name of the file without ``.onnx`` or its last suffix.
        version: Of the model. Others stay; a server by default serves the highest.
        max_batch: The largest batch that the server makes of requests. 0: it makes none. None: what the engine was
            built for; of an ONNX file `DEFAULT_MAX_BATCH`; 0 where the rows of a batch are not independent.
        instances: How often the server loads the model, on each GPU.
        device: ``gpu``, ``cpu`` or ``auto``: a GPU where the server has one. An engine is for a GPU.
        verify: Load an ONNX file as the server does, and run it before it is batched: a row must be the same alone and
            among others.
        force: Replace the version, and a ``config.pbtxt`` that differs.

    Raises:
        BadInput: The model cannot be served, or not like that; or the place is taken.
        GraphoptError: Writing failed; what was there is as it was.
    """
    source, folder = Path(model), Path(repository)
    if name is None:
        name = source.name.removesuffix(".onnx") if source.suffix == ".onnx" else source.stem
    if not source.exists():
        raise BadInput("no such file", where=str(source), hint="check the path")
    if is_bundle(source):
        raise not_one_file(source)
    if source.is_dir():
        raise BadInput("is a folder", where=str(source), hint="give an .onnx file or an engine")
    if not 1 <= instances <= _INT32:
        what = f"{instances} instances serve nothing" if instances < 1 else f"{instances} are too many"
        raise BadInput(what, where="--instances", hint="1 is a beginning")
    if max_batch is not None and not 0 <= max_batch <= _INT32:
        raise BadInput(f"{max_batch} is no batch", where="--max-batch", hint=f"0: none, or 1 to {_INT32}")
    if device not in KINDS:
        raise BadInput(f"no device {device!r}", where="--device", hint=f"there are {', '.join(KINDS)}")
    check_place(folder, name, version, force=force)
    served = (
        served_engine(source) if _is_engine(source) else served_model(source, verify=verify, batched=max_batch != 0)
    )
    if served.platform == "tensorrt_plan" and device == "cpu":
        raise BadInput("an engine runs on a GPU", where=str(source), hint="leave --device out")
    largest, why = _max_batch(served, max_batch, source)
    kind = "gpu" if served.platform == "tensorrt_plan" else device
    config = _HEADER + write(configuration(served, name, largest, instances, kind))
    path, copied = put(folder, name, version, served.files, config, force=force)
    left_out = tuple(tensor.name for tensor in served.inputs if tensor.optional and largest)
    return TritonModel(path, name, version, served.backend, served.needs, largest, why, left_out, copied)


def configuration(served: Served, name: str, max_batch: int, instances: int, kind: str) -> Message:
    """The fields of ``config.pbtxt``, a ``ModelConfig`` message.

    Args:
        served: The model.
        name: What clients call it.
        max_batch: 0: the shapes are whole; else they leave the first axis out.
        instances: For each device.
        kind: A key of `KINDS`.
    """
    # Triton's onnxruntime backend refuses optional inputs of models that are batched.
    inputs = [tensor for tensor in served.inputs if not (tensor.optional and max_batch)]
    group: list[tuple[str, Any]] = [("count", instances), ("kind", Token(KINDS[kind]))]
    if served.profiles > 1:
        # Without names the server takes the first alone.
        group.append(("profile", [str(index) for index in range(served.profiles)]))
    fields: list[tuple[str, Any]] = [
        ("name", name),
        ("platform", served.platform),
        ("backend", served.backend),
        ("max_batch_size", max_batch),
        *(("input", _tensor(tensor, max_batch)) for tensor in inputs),
        *(("output", _tensor(tensor, max_batch)) for tensor in served.outputs),
        ("instance_group", group),
    ]
    if max_batch > 1:
        preferred = [size for size in served.preferred if 1 < size <= max_batch]
        fields.append(("dynamic_batching", [("preferred_batch_size", preferred)] if preferred else []))
    return fields


def _tensor(tensor: Tensor, max_batch: int) -> Message:
    dims = tensor.dims[1:] if max_batch else tensor.dims
    fields: list[tuple[str, Any]] = [
        ("name", tensor.name),
        ("data_type", Token(tensor.data_type)),
        # No shape is empty for a client; the server drops the axis of 1. Of a model that is not batched it drops it
        # without being told, and refuses to be told.
        ("dims", dims or [1]),
    ]
    if not dims and max_batch:
        fields.append(("reshape", [("shape", [])]))
    if tensor.is_shape:
        fields.append(("is_shape_tensor", Token("true")))
    if tensor.optional:
        fields.append(("optional", Token("true")))
    return fields


def _max_batch(served: Served, wanted: int | None, source: Path) -> tuple[int, str]:
    """The largest batch, and where that comes from."""
    if wanted == 0:
        return 0, "as asked"
    if served.unbatched is not None:
        if wanted is not None:
            raise BadInput(
                f"requests cannot be batched: {served.unbatched}",
                where=str(source),
                hint="leave --max-batch out: clients then send the whole shape",
            )
        return 0, served.unbatched
    if served.most is not None:
        if wanted is not None and wanted > served.most:
            raise BadInput(
                f"the engine was built for batches up to {served.most}",
                where="--max-batch",
                hint="build it with larger --shapes",
            )
        return wanted or served.most, "as asked" if wanted else "the largest that the engine was built for"
    return wanted or DEFAULT_MAX_BATCH, "as asked" if wanted else "Triton's default; --max-batch sets another"


def _is_engine(path: Path) -> bool:
    """Whether a file is an engine: it says so itself, or has a report beside it."""
    if path.suffix == ".onnx":
        return False
    if path.with_name(f"{path.name}.json").is_file():
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(4) in _ENGINES
    except OSError:
        return False  # what is wrong with it, the loader of models says
