"""`build_engine`: prepare the model, build in a child process, put the engine and its report in place."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graphopt.engines.backends import Backend, find_backend
from graphopt.engines.child.requests import Request
from graphopt.engines.child.worker import describe_gpu
from graphopt.engines.coverage import Coverage, predict
from graphopt.engines.inspector import Inspection, parse_inspection
from graphopt.engines.options import PLUGINS, BuildOptions, check_options
from graphopt.engines.preparing import describe_model, runtime_operators, write_for_parser
from graphopt.engines.profiles import (
    Profile,
    Seen,
    best_sizes,
    fix_profiles,
    make_profiles,
    observe,
    parse_shapes,
    symbol_sizes,
)
from graphopt.engines.report import BuildResult, EngineTensor, hash_file, is_report, report_path, write_report
from graphopt.engines.spawning import NotLoaded, OnLog, OnProgress, run_child
from graphopt.errors import BadInput, GraphoptError, MissingDependency, install_hint
from graphopt.files.bundle_folder import is_bundle
from graphopt.files.folder import check_target
from graphopt.inlining import inline_all

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.engines.plugins import Lowered, Mode


class NotCovered(BadInput):
    """Nodes of the model do not run in such an engine; known before anything was built.

    Attributes:
        coverage: Every one of them, with the reason and what to do.
    """

    def __init__(self, coverage: Coverage, where: str) -> None:
        error = coverage.error(where)
        super().__init__(error.what, where=error.where, hint=error.hint)
        self.coverage = coverage


@dataclass(frozen=True)
class _Prepared:
    """A model that is ready to be parsed, and what was found out about it."""

    file: Path
    runtime_operators: list[str]
    profiles: dict[str, Profile]
    all_profiles: list[dict[str, Profile]]
    values: dict[str, Profile]
    buckets: tuple[dict[str, int], ...]
    coverage: Coverage
    lowered: Lowered
    verification: dict[str, Any]
    model: dict[str, Any]
    kernels: list[dict[str, Any]] = field(default_factory=list)
    architecture: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Sizes:
    """What sizes an engine is built for, as the caller says: see `build_engine`."""

    shapes: tuple[str, ...]
    calibration: str | Path | None
    seen: Seen
    buckets: bool


def build_engine(
    model: str | Path,
    out: str | Path,
    *,
    backend: str,
    shapes: Iterable[str] = (),
    calibration: str | Path | None = None,
    buckets: bool = False,
    options: BuildOptions | None = None,
    plugins: str = "measured",
    verify: bool = True,
    on_log: OnLog | None = None,
    on_progress: OnProgress | None = None,
) -> BuildResult:
    """Build an engine from an ONNX file; needs no GPU with TensorRT-RTX.

    Args:
        model: The ONNX file. Its functions are inlined first: the parser miscompiles legal uses of them.
        out: Where the engine goes, with its report as ``OUT.json`` beside it; both are replaced only by complete
            ones. Its folder must exist.
        backend: ``tensorrt`` (10.9 or newer) or ``tensorrt-rtx``.
        shapes: ``NAME=MIN/OPT/MAX`` for dynamic inputs (``x=1x16/4x64/8x128``) or symbolic axes
            (``batch=1/4/8``).
        calibration: Inputs of the user's, as for ``optimize``: sizes that ``shapes`` does not name are the smallest,
            the middle one and the largest in there, and so are the values of inputs that decide shapes.
        buckets: Build for single sizes (1, 2, 4, 8, 16, the best and the largest) instead of a range.
        options: How to build.
        plugins: ``measured`` (where a measurement on this GPU says that they are faster), ``always`` or ``never``.
        verify: Whether a model that gets plugin nodes is compared, on ONNX Runtime, with what it was.
        on_log: Called with each line of the library's log while it builds.
        on_progress: Called with the phase that is going on and how much is done, 0 to 1.

    Raises:
        BadInput: The model, ``out``, the shapes or the options cannot be used, or nodes of the model do not run in
            such an engine (`NotCovered`).
        MissingDependency: The library is not installed.
        GateFailed: With its plugin nodes the model does not compute the same.
        GraphoptError: The library refuses the model, or crashed; nothing was written.
    """
    if is_bundle(Path(model)):
        raise BadInput("is a bundle", where=str(model), hint="graphopt.engines.build_bundle builds its blocks")
    sizes = _Sizes(tuple(shapes), calibration, Seen(), buckets)
    options = options or BuildOptions()
    return _build(Path(model), Path(out), backend, sizes, options, plugins, verify, on_log, on_progress)


def build_seen(
    model: Path,
    out: Path,
    *,
    backend: str,
    seen: Seen,
    options: BuildOptions,
    plugins: str,
    verify: bool,
    on_log: OnLog | None,
    on_progress: OnProgress | None,
) -> BuildResult:
    """As `build_engine`, of a model whose sizes were seen where it runs: also how many axes inputs have."""
    sizes = _Sizes((), None, seen, False)
    return _build(model, out, backend, sizes, options, plugins, verify, on_log, on_progress)


def _build(
    source: Path,
    target: Path,
    backend: str,
    sizes: _Sizes,
    options: BuildOptions,
    plugins: str,
    verify: bool,
    on_log: OnLog | None,
    on_progress: OnProgress | None,
) -> BuildResult:
    library = find_backend(backend)
    check_how(options, plugins, library)
    _check_paths(source, target, sizes.calibration, options)
    # One fixed name: what a killed build leaves, the next one overwrites.
    partial = target.with_name(f".{target.name}.partial")
    partial_report = report_path(partial)
    try:
        with _reserved(partial, target), tempfile.TemporaryDirectory(prefix="graphopt-build-") as scratch:
            folder = Path(scratch)
            prepared = _prepare(source, library, folder, sizes, options, plugins, verify)
            for name in prepared.model["data_files"]:
                _spare(target, {"a data file of the model": source.parent / name})
            request = Request(
                title=library.title,
                backend=library.name,
                modules=list(library.modules),
                oldest=list(library.oldest),
                model=str(prepared.file),
                runtime_operators=prepared.runtime_operators,
                profiles=[_plain(profiles) for profiles in prepared.all_profiles if profiles],
                values=_plain(prepared.values),
                options=options.to_json(),
                plugins=_plugins_request(prepared),
                engine=str(partial.absolute()),
                log=str(folder / "log.txt"),
                progress=str(folder / "progress.txt"),
                answer=str(folder / "answer.json"),
            )
            answer = run_child(request, folder, source, on_log, on_progress)
            result = _result(target, library, options, prepared, answer, partial)
            write_report(result, partial_report)
            partial.replace(target)
            partial_report.replace(report_path(target))
    except NotLoaded as error:
        raise MissingDependency(error.what, hint=install_hint(library.extra)) from error
    except OSError as error:
        raise GraphoptError(f"cannot be written: {error.strerror}", where=str(target)) from error
    return result


@contextmanager
def _reserved(partial: Path, target: Path) -> Iterator[None]:
    """Make sure, before hours of building, that the engine can be written, and that no other build writes it.

    Raises:
        BadInput: One of the two.
    """
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror}", where=str(target), hint="give another name") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not _is_open_as(descriptor, partial)  # the other one has just put it in place
        except BlockingIOError:
            taken = True
        except OSError:
            taken = False  # a file system without locks
        if taken:
            what, hint = "another build is writing it", "wait for it, or give another name"
            raise BadInput(what, where=str(target), hint=hint)
        try:
            yield
        finally:
            if _is_open_as(descriptor, partial):
                partial.unlink(missing_ok=True)
                report_path(partial).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _is_open_as(descriptor: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))


def check_how(options: BuildOptions, plugins: str, library: Backend) -> None:
    """Refuse what no build of the library can be told. Raises BadInput."""
    check_options(options, library)
    if plugins not in PLUGINS:
        raise BadInput(f"{plugins!r} is not a way", where="--plugins", hint=f"there are {', '.join(PLUGINS)}")
    cache = options.timing_cache
    if cache is not None and (cache.is_dir() or not cache.parent.is_dir()):
        raise BadInput("cannot be a file", where=f"--timing-cache {cache}", hint="its folder must exist")


def _check_paths(source: Path, target: Path, calibration: str | Path | None, options: BuildOptions) -> None:
    """Refuse to write where something else would be lost, or nothing can be written: builds may take hours."""
    check_target(target)
    if target.exists() and not target.is_file():
        raise BadInput("is no ordinary file", where=str(target), hint="give the name of the engine to write")
    report, cache = report_path(target), options.timing_cache
    _spare(target, {"the model itself": source, "the timing cache": cache})
    given = [] if calibration is None else [Path(calibration), *Path(calibration).glob("*.npz")]
    for file in given:
        _spare(target, {"what --calibration names": file})
    if report.exists() and not is_report(report):
        raise BadInput(
            f"the report would be written to {report.name}, and something else is there",
            where=str(target),
            hint="give the engine another name",
        )


def _spare(target: Path, others: Mapping[str, Path | None]) -> None:
    """Refuse a target that, itself or by its report, would replace a file that the build reads."""
    for written, prefix in ((target, ""), (report_path(target), "its report ")):
        for what, other in others.items():
            if other is not None and written.exists() and other.exists() and written.samefile(other):
                raise BadInput(f"{prefix}is {what}", where=str(written), hint="give the engine another name")


def _prepare(
    source: Path,
    library: Backend,
    folder: Path,
    wanted: _Sizes,
    options: BuildOptions,
    plugins: str,
    verify: bool,
) -> _Prepared:
    """Everything that can be found out and refused before the library is loaded.

    Raises:
        BadInput: See `build_engine`.
    """
    from graphopt.calibration import read_calibration
    from graphopt.engines.plugins import Choice, lower
    from graphopt.files.load import load_model

    parsed_shapes, calibration = parse_shapes(wanted.shapes), wanted.calibration
    model = load_model(source)
    described = describe_model(model, source)
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    _refuse_inputs_given_out(model, source, library)
    operators = runtime_operators(model)
    ranked = _declare_ranks(inputs, wanted.seen)
    changed = inline_all(model) or ranked  # the parser miscompiles legal uses of functions
    coverage = predict(model, library.name)
    deciding = coverage.shape_inputs
    seen, data = wanted.seen, None
    if calibration is not None:
        data = read_calibration(Path(calibration), inputs)
        # In a single file all samples are of one shape: only where values count are they looked at one by one.
        seen = observe(inputs, data if deciding or Path(calibration).is_dir() else data[:1], deciding)
    try:
        profiles = make_profiles(inputs, parsed_shapes, seen)
    except BadInput:
        if coverage.certain and not parsed_shapes:  # nobody shall look for sizes in vain
            raise NotCovered(coverage, str(source)) from None
        raise
    if wanted.buckets and not profiles:
        raise BadInput("every input has one size", where="--buckets", hint="leave it out")
    sizes = symbol_sizes(inputs, profiles)
    lowered = lower(model, Choice(mode=cast("Mode", plugins), backend=library.name, gpu=_gpu_name(), sizes=sizes))
    known = {symbol: low for symbol, (low, high) in sizes.items() if low == high}
    if lowered.written or known:
        coverage = predict(model, library.name, plugins=lowered.op_types, sizes=known)
    if coverage.certain:
        raise NotCovered(coverage, str(source))
    for name in coverage.shape_inputs:
        if name not in seen.values:
            raise BadInput(
                f"the input {name!r} decides a shape; {library.title} needs its range of values",
                where=str(source),
                hint="give --calibration with inputs of yours, or make it a constant of the model",
            )
    assignments = _buckets(sizes, best_sizes(inputs, profiles)) if wanted.buckets else ()
    kernels, architecture, notes = _prepare_plugins(lowered, options, sizes, bool(assignments))
    if not coverage.ok:  # as documented, and not seen: the library has the last word
        notes = (f"this may be refused: {coverage.error()}", *notes)
    file = write_for_parser(model, folder) if changed or lowered.written else source.absolute()
    verification: dict[str, Any] = {}
    if lowered.written and verify:
        from graphopt.engines.verifying import verify_lowered

        verification = verify_lowered(source, model, data)
    elif lowered.written:
        verification = {"verdict": "skipped"}
    return _Prepared(
        file=file,
        runtime_operators=operators,
        profiles=profiles,
        all_profiles=[fix_profiles(inputs, profiles, chosen) for chosen in assignments] or [profiles],
        values={name: values for name, values in seen.values.items() if name in coverage.shape_inputs},
        buckets=assignments,
        coverage=coverage,
        lowered=lowered,
        verification=verification,
        model=described,
        kernels=kernels,
        architecture=architecture,
        notes=notes,
    )


def _declare_ranks(inputs: Sequence[ir.Value], seen: Seen) -> bool:
    """Say of inputs that do not tell how many axes they have as many as were seen; whether there were any."""
    import onnx_ir as ir

    found = [value for value in inputs if value.shape is None and value.name in seen.inputs]
    for value in found:
        value.shape = ir.Shape([None] * len(seen.inputs[value.name or ""][0]))
    return bool(found)


def _refuse_inputs_given_out(model: ir.Model, source: Path, library: Backend) -> None:
    """The parsers give the name to the output, and the input another one: nobody could run such an engine by names."""
    for value in model.graph.outputs:
        if value.is_graph_input():
            raise BadInput(
                f"{value.name!r} is an input and an output; {library.title} needs two names",
                where=str(source),
                hint="leave the output out, or give it out through an Identity",
            )


def _gpu_name() -> str | None:
    found = describe_gpu()
    return None if found is None else found[0]


def _buckets(sizes: Mapping[str, tuple[int, int]], best: Mapping[str, int]) -> tuple[dict[str, int], ...]:
    from graphopt.engines.plugins.qdp import buckets

    varying = {symbol: limits for symbol, limits in sizes.items() if limits[0] != limits[1]}
    return tuple({**{s: low for s, (low, _) in sizes.items()}, **chosen} for chosen in buckets(varying, also=best))


def _prepare_plugins(
    lowered: Lowered, options: BuildOptions, sizes: Mapping[str, tuple[int, int]], bucketed: bool
) -> tuple[list[dict[str, Any]], str, tuple[str, ...]]:
    """The kernels that the engine may take, what they are compiled for, and what the user should know."""
    if not lowered.written:
        return [], "", ()
    from graphopt.engines.plugins.qdp import LEAK, architecture_for, prepare

    gpu = describe_gpu()
    # PTX for an older GPU runs on newer ones, and not the other way round.
    one = gpu is not None and options.hardware_compatibility != "ampere-plus"
    architecture = architecture_for(gpu[1] if gpu is not None and one else None)
    kernels = [kernel.to_json() for kernel in prepare(lowered, architecture=architecture)]
    varies = any(low != high for low, high in sizes.values())
    return kernels, architecture, ((LEAK,) if varies and not bucketed else ())


def _plugins_request(prepared: _Prepared) -> dict[str, Any]:
    if not prepared.lowered.written:
        return {}
    return {"modules": list(prepared.lowered.modules), "architecture": prepared.architecture}


def _plain(profiles: Mapping[str, Profile]) -> dict[str, dict[str, list[int]]]:
    return {
        name: {level: list(sizes) for level, sizes in asdict(profile).items()} for name, profile in profiles.items()
    }


def _result(
    target: Path,
    library: Backend,
    options: BuildOptions,
    prepared: _Prepared,
    answer: Mapping[str, Any],
    engine: Path,
) -> BuildResult:
    plugins = {}
    if prepared.lowered.written or prepared.lowered.refused:
        plugins = {
            **prepared.lowered.to_json(),
            "verification": prepared.verification,
            "architecture": prepared.architecture,
            "kernels": prepared.kernels,
        }
    return BuildResult(
        path=target,
        backend=library.name,
        version=answer["version"],
        bytes=answer["bytes"],
        hash=hash_file(engine),
        model=prepared.model,
        seconds=answer["seconds"],
        peak_rss_bytes=answer["peak_rss_bytes"],
        layers=answer["layers"],
        inputs=_tensors(answer["inputs"]),
        outputs=_tensors(answer["outputs"]),
        profiles=prepared.profiles,
        values=prepared.values,
        buckets=prepared.buckets,
        options=options,
        gpu=answer["gpu"],
        compute_capability=answer["compute_capability"],
        coverage=_as_read(prepared.coverage.to_json()),
        plugins=_as_read(plugins),
        inspection=_inspection(answer),
        notes=(*prepared.notes, *answer["notes"]),
        status="built, not run" if answer["gpu"] else "built, not run: no GPU here",
    )


def _as_read(plain: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file: lists for tuples."""
    read: dict[str, Any] = json.loads(json.dumps(plain))
    return read


def _tensors(plain: Iterable[Mapping[str, Any]]) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(one["name"], one["dtype"], None if one["shape"] is None else tuple(one["shape"])) for one in plain
    )


def _inspection(answer: Mapping[str, Any]) -> Inspection:
    if answer["inspection"] is None:
        return Inspection(reason=answer["not_inspected"])
    try:
        return parse_inspection(answer["inspection"])
    except GraphoptError as error:
        return Inspection(reason=error.what)
