"""Every build feature against a library that has exactly what each version of TensorRT has (`fake_backend`).

Shown is that the calls exist, come in an order that the library takes and keep alive what it needs; not that an
engine comes of them: that takes the libraries, and for TensorRT a GPU.
"""

from __future__ import annotations

import importlib.util
import io
import json
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

import graphopt.engines.child.building as building
from graphopt.engines.backends import BACKENDS
from graphopt.engines.child.building import build
from graphopt.engines.child.requests import BuildFailed, Request
from graphopt.engines.inspector import parse_inspection
from graphopt.engines.options import BuildOptions, check_options
from graphopt.engines.spawning import run_child
from graphopt.errors import BadInput
from tests.engines.fake_backend import read_api
from tests.engines.fake_backend.facts import Breach, versions
from tests.engines.fake_backend.library import MAGIC, make_library

MODEL = """
<ir_version: 10, opset_import: ["" : 20]>
g (float16[batch, 3] x) => (float16[batch, 3] y) { [first] z = Relu(x) [second] y = Sigmoid(z) }
"""
DECIDING = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[2, 3] x, int64[2] s) => (float[a, b] y) { y = Reshape(x, s) }
"""
X = {"x": {"min": [1, 3], "opt": [2, 3], "max": [4, 3]}}
FULL = [version for version in versions() if not version.startswith("tensorrt-rtx")]


class Run:
    """One build with a fake library."""

    def __init__(self, folder: Path, version: str, *, gpu: bool = True, text: str = MODEL, **given: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.version = version
        faults = given.pop("faults", ())
        options = given.pop("options", BuildOptions())
        model = folder / "model.onnx"
        ir.save(ir.from_onnx_text(text), model)
        backend = BACKENDS[version.split()[0]]
        self.module: types.ModuleType = make_library(version, faults=faults)
        self.log = io.StringIO()
        self.request = Request(
            title=backend.title,
            backend=backend.name,
            modules=list(backend.modules),
            oldest=list(backend.oldest),
            model=str(model),
            engine=str(folder / "engine"),
            log=str(folder / "log"),
            progress=str(folder / "progress"),
            answer=str(folder / "answer"),
            options=options.to_json(),
            **{"profiles": [X], **given},
        )

    def __call__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the worker answers, and what the library was told when it built."""
        answer = build(self.module, self.request, self.log)
        content = (self.folder / "engine").read_bytes()
        return answer, json.loads(content.removeprefix(MAGIC))


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "describe_gpu", lambda: ("fake GPU", (8, 9)))


@pytest.mark.parametrize("version", versions())
def test_a_plain_build(version: str, tmp_path: Path) -> None:
    run = Run(tmp_path, version)
    answer, plan = run()
    assert answer["version"] == plan["version"] == run.module.__version__
    assert answer["inputs"] == [{"name": "x", "dtype": "float16", "shape": [-1, 3]}]
    assert answer["outputs"] == [{"name": "y", "dtype": "float16", "shape": [-1, 3]}]
    assert answer["bytes"] == (tmp_path / "engine").stat().st_size
    assert (answer["layers"], answer["gpu"], answer["compute_capability"]) == (2, "fake GPU", "8.9")
    assert plan["profiles"] == [{"shapes": {"x": [[1, 3], [2, 3], [4, 3]]}, "values": {}}]
    assert plan["flags"] == [] and plan["pools"] == {}
    assert plan["settings"]["profiling_verbosity"] == "DETAILED"
    kinds: Any = run.module.NetworkDefinitionCreationFlag
    assert plan["network_flags"] == 1 << int(kinds.STRONGLY_TYPED)
    assert "warning" not in run.log.getvalue() and "error" not in run.log.getvalue()
    # The engine was opened and asked, in the dialect of its version.
    inspection = parse_inspection(answer["inspection"])
    assert [(layer.nodes, layer.tactic) for layer in inspection.layers] == [
        (("first",), "fake_tactic"),
        (("second",), "fake_tactic"),
    ]
    assert inspection.tensors == ("x", "y")
    # Stock plugins are there in TensorRT alone.
    assert ("init plugins", ("",)) in run.module.calls


FLAGS = [
    (BuildOptions(sparsity=True), ["SPARSE_WEIGHTS"]),
    (BuildOptions(strip_weights=True), ["REFIT_IDENTICAL", "STRIP_PLAN"]),
    (BuildOptions(refit=True), ["REFIT"]),
    (BuildOptions(strip_weights=True, refit=True), ["REFIT", "STRIP_PLAN"]),
    (BuildOptions(weight_streaming=True), ["WEIGHT_STREAMING"]),
]


@pytest.mark.parametrize("version", versions())
@pytest.mark.parametrize(("options", "flags"), FLAGS)
def test_flags(version: str, options: BuildOptions, flags: list[str], tmp_path: Path) -> None:
    assert Run(tmp_path, version, options=options)()[1]["flags"] == flags


@pytest.mark.parametrize("version", versions())
def test_limits_and_levels(version: str, tmp_path: Path) -> None:
    _, plan = Run(tmp_path, version, options=BuildOptions(workspace=1 << 30, optimization_level=5))()
    assert plan["pools"] == {"WORKSPACE": 1 << 30}
    assert plan["settings"]["builder_optimization_level"] == 5


@pytest.mark.parametrize("version", FULL)
@pytest.mark.parametrize("level", ["ampere-plus", "same-compute-capability"])
def test_where_an_engine_of_tensorrt_runs(version: str, level: str, tmp_path: Path) -> None:
    options = BuildOptions(hardware_compatibility=level, version_compatible=True)
    answer, plan = Run(tmp_path, version, options=options)()
    assert plan["settings"]["hardware_compatibility_level"] == level.upper().replace("-", "_")
    assert plan["flags"] == ["VERSION_COMPATIBLE"]
    # An engine that brings its runtime is opened only by one who allows that.
    assert answer["inspection"] is not None


def test_where_an_engine_of_rtx_runs(tmp_path: Path) -> None:
    options = BuildOptions(compute_capabilities=("sm86", "current", "sm120"))
    assert Run(tmp_path, "tensorrt-rtx 1.7", options=options)()[1]["capabilities"] == ["SM86", "CURRENT", "SM120"]


@pytest.mark.parametrize(
    ("capabilities", "faults", "line"),
    [
        (("sm90",), (), "--compute-capability: TensorRT-RTX 1.7.1.116 does not build for sm90"),
        (("sm89",), ("capability",), "--compute-capability: TensorRT-RTX 1.7.1.116 does not build for sm89"),
    ],
)
def test_a_gpu_that_rtx_does_not_know(
    capabilities: tuple[str, ...], faults: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    options = BuildOptions(compute_capabilities=capabilities)
    with pytest.raises(BuildFailed) as caught:
        Run(tmp_path, "tensorrt-rtx 1.7", options=options, faults=faults)()
    assert str(caught.value) == line
    assert caught.value.hint == "it builds for current, sm75, sm80, sm86, sm89, sm120, sm121"
    assert caught.value.bad_input


@pytest.mark.parametrize("options", [BuildOptions(strip_weights=True), BuildOptions(refit=True)])
def test_rtx_needs_a_gpu_for_some(options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "describe_gpu", lambda: None)
    with pytest.raises(BuildFailed, match="TensorRT-RTX needs a GPU to build such an engine") as caught:
        Run(tmp_path, "tensorrt-rtx 1.7", options=options)()
    assert caught.value.bad_input
    with pytest.raises(BuildFailed, match="there is no GPU here to be the current one"):
        Run(tmp_path, "tensorrt-rtx 1.7", options=BuildOptions(compute_capabilities=("current",)))()


@pytest.mark.parametrize(
    ("backend", "options", "option"),
    [
        ("tensorrt-rtx", BuildOptions(timing_cache=Path("c")), "--timing-cache"),
        ("tensorrt-rtx", BuildOptions(hardware_compatibility="ampere-plus"), "--hardware-compatibility"),
        ("tensorrt-rtx", BuildOptions(version_compatible=True), "--version-compatible"),
        ("tensorrt", BuildOptions(compute_capabilities=("sm89",)), "--compute-capability"),
    ],
)
def test_what_a_library_never_has_is_refused_by_name(backend: str, options: BuildOptions, option: str) -> None:
    with pytest.raises(BadInput) as caught:
        check_options(options, BACKENDS[backend])
    assert caught.value.where == option
    other = "tensorrt" if backend == "tensorrt-rtx" else "tensorrt-rtx"
    check_options(options, BACKENDS[other])


def test_a_member_that_a_version_lacks_is_refused_by_its_option(tmp_path: Path) -> None:
    """No supported version lacks one today; the next may."""
    run = Run(tmp_path, "tensorrt 11.4", options=BuildOptions(sparsity=True))
    kinds = {name: member.value for name, member in run.module.BuilderFlag.__members__.items()}
    del kinds["SPARSE_WEIGHTS"]
    run.module.__dict__["BuilderFlag"] = types.SimpleNamespace(**kinds)
    with pytest.raises(BuildFailed) as caught:
        run()
    assert str(caught.value) == "--sparsity: TensorRT 11.4.0.106 has no such option"
    assert caught.value.bad_input


@pytest.mark.parametrize("version", FULL)
def test_the_timing_cache_is_read_and_written(version: str, tmp_path: Path) -> None:
    cache = tmp_path / "timings"
    options = BuildOptions(timing_cache=cache)
    answer, _ = Run(tmp_path / "a", version, options=options)()
    first = cache.read_bytes()
    assert answer["notes"] == [] and b"first" in first
    text = MODEL.replace("[first]", "[third]")
    answer, _ = Run(tmp_path / "b", version, options=options, text=text)()
    assert answer["notes"] == []
    assert b"first" in cache.read_bytes() and b"third" in cache.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "timings"]


@pytest.mark.parametrize("version", FULL)
@pytest.mark.parametrize(
    "content",
    [b"no cache at all", b'FAKECACHE["1.0", "fake GPU", {"old": "timed"}]', None],
    ids=["garbage", "another version", "another GPU"],
)
def test_a_timing_cache_that_does_not_fit_is_started_anew(version: str, content: bytes | None, tmp_path: Path) -> None:
    cache = tmp_path / "timings"
    number = make_library(version).__version__
    cache.write_bytes(content or b'FAKECACHE["%s", "other GPU", {"old": "timed"}]' % number.encode())
    answer, _ = Run(tmp_path, version, options=BuildOptions(timing_cache=cache))()
    assert answer["notes"] == ["timings is of another GPU or another version: started anew"]
    assert b"first" in cache.read_bytes() and b"old" not in cache.read_bytes()


def test_timings_that_others_wrote_meanwhile_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "timings"
    run = Run(tmp_path / "a", "tensorrt 11.4", options=BuildOptions(timing_cache=cache))
    parse = building.parse

    def other_build_ends(*given: Any) -> Any:
        cache.write_bytes(b'FAKECACHE["11.4.0.106", "fake GPU", {"others": "timed"}]')
        return parse(*given)

    monkeypatch.setattr(building, "parse", other_build_ends)
    run()
    assert b"others" in cache.read_bytes() and b"first" in cache.read_bytes()


@pytest.mark.parametrize("version", versions())
def test_several_profiles_in_their_order(version: str, tmp_path: Path) -> None:
    profiles = [{"x": {"min": [n, 3], "opt": [n, 3], "max": [n, 3]}} for n in (1, 4)]
    _, plan = Run(tmp_path, version, profiles=profiles)()
    assert [one["shapes"]["x"][0] for one in plan["profiles"]] == [[1, 3], [4, 3]]


@pytest.mark.parametrize("version", versions())
def test_inputs_that_decide_shapes(version: str, tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="the input 's' decides a shape") as caught:
        Run(tmp_path, version, text=DECIDING, profiles=[])()
    assert caught.value.bad_input
    values = {"s": {"min": [1, 1], "opt": [2, 3], "max": [6, 6]}}
    _, plan = Run(tmp_path, version, text=DECIDING, profiles=[], values=values)()
    assert plan["profiles"] == [{"shapes": {}, "values": {"s": [[1, 1], [2, 3], [6, 6]]}}]


@pytest.mark.parametrize("version", versions())
def test_shapes_that_the_library_refuses(version: str, tmp_path: Path) -> None:
    wrong = [{"x": {"min": [4, 3], "opt": [2, 3], "max": [4, 3]}}]
    with pytest.raises(BuildFailed, match="refuses the shapes"):
        Run(tmp_path, version, profiles=wrong)()
    contradicting = [{"x": {"min": [1, 4], "opt": [2, 4], "max": [4, 4]}}]
    with pytest.raises(BuildFailed, match="the profile contradicts the shape of x"):
        Run(tmp_path, version, profiles=contradicting)()


@pytest.mark.parametrize("version", versions())
def test_the_phases_are_written_down(version: str, tmp_path: Path) -> None:
    Run(tmp_path, version)()
    said = [json.loads(line) for line in (tmp_path / "progress").read_text().splitlines()]
    assert said[0] == {"start": "Building engine", "within": "", "steps": 2}
    assert {"start": "Optimizing", "within": "Building engine", "steps": 2} in said
    assert {"step": 1, "of": "Optimizing"} in said
    assert said[-1] == {"finish": "Building engine"}


def test_a_build_ends_when_its_parent_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([100, 100, 1, 1, 1])
    monkeypatch.setattr(building.os, "getppid", lambda: next(parents))
    with pytest.raises(BuildFailed, match="the build was cancelled"):
        Run(tmp_path, "tensorrt 11.4")()


@pytest.mark.parametrize("version", versions())
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("builder", "does not start: error: pybind11|does not start: pybind11"),
        ("build", "could not build the engine: no tactics to implement the operation within workspace limit"),
    ],
)
def test_what_the_library_cannot_do(version: str, fault: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=line) as caught:
        Run(tmp_path, version, faults=[fault], options=BuildOptions(workspace=1))()
    assert fault != "build" or caught.value.hint == "give more --workspace"
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("version", versions())
def test_an_engine_that_does_not_open_is_there_all_the_same(version: str, tmp_path: Path) -> None:
    answer, _ = Run(tmp_path, version, faults=["deserialize"])()
    assert answer["inspection"] is None
    assert answer["not_inspected"] == "the engine does not open here: cannot deserialize"


@pytest.mark.parametrize("version", versions())
def test_every_node_that_the_parser_refuses_is_told(version: str, tmp_path: Path) -> None:
    text = MODEL.replace("Relu(x)", "Unsupported(x)").replace("Sigmoid(z)", "Unsupported(z)")
    with pytest.raises(BuildFailed) as caught:
        Run(tmp_path, version, text=text)()
    title = BACKENDS[version.split()[0]].title
    assert str(caught.value) == f"node 'first': {title} has no operator 'Unsupported' (and 1 more node)"
    assert [refused["node"] for refused in caught.value.refused] == ["first", "second"]


@pytest.mark.parametrize("version", versions())
def test_external_data_is_looked_for_beside_the_file(version: str, tmp_path: Path) -> None:
    run = Run(tmp_path, version)
    run()
    assert ("OnnxParser.parse_from_file", (str(tmp_path / "model.onnx"),)) in run.module.calls
    assert not any(what == "OnnxParser.parse" for what, _ in run.module.calls)


@pytest.mark.parametrize("version", FULL)
def test_plugins_are_registered_before_the_model_is_parsed(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import graphopt.engines.plugins.qdp as qdp

    seen: list[Any] = []
    run = Run(tmp_path, version, plugins={"modules": ["m"], "architecture": "compute_80"})

    def register(trt: Any, modules: list[str], architecture: str) -> list[str]:
        seen.append((trt is run.module, modules, architecture, [what for what, _ in trt.calls]))
        return []

    monkeypatch.setattr(qdp, "register_modules", register)
    _, plan = run()
    assert seen == [(True, ["m"], "compute_80", ["init plugins"])]
    kinds: Any = run.module.NetworkDefinitionCreationFlag
    assert plan["network_flags"] == (1 << int(kinds.STRONGLY_TYPED)) | (1 << int(kinds.PREFER_AOT_PYTHON_PLUGINS))


def _same_facts(found: dict[str, Any], version: str) -> None:
    recorded = json.loads(read_api.API.read_text())
    if recorded["versions"].get(version) != found["version"]:
        pytest.skip(f"{found['version']} is installed, and not the one that was written down")
    index = list(recorded["versions"]).index(version)
    theirs = read_api.merged({version: found})["classes"]
    ours = {
        name: {fact for fact, where in facts.items() if index in where} for name, facts in recorded["classes"].items()
    }
    assert {name: set(facts) for name, facts in theirs.items()} == {
        name: facts for name, facts in ours.items() if facts
    }


def test_the_facts_are_those_of_the_real_rtx() -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    _same_facts(read_api.run("tensorrt_rtx_bindings", {}), "tensorrt-rtx 1.7")


def test_the_facts_are_those_of_the_real_bindings(tmp_path: Path) -> None:
    found = importlib.util.find_spec("tensorrt_bindings")
    if found is None or found.origin is None:
        pytest.skip("the bindings of TensorRT are not installed")
    folder = Path(found.origin).parents[1]
    _same_facts(read_api.read_bindings(folder, tmp_path), "tensorrt 11.4")


def test_the_fake_answers_as_the_real_library_does(tmp_path: Path) -> None:
    """The same request to both: what comes back differs in figures alone."""
    pytest.importorskip("tensorrt_rtx_bindings")
    request = Run(tmp_path, "tensorrt-rtx 1.7").request
    (tmp_path / "played_rtx.py").write_text(
        "import sys\nfrom tests.engines.fake_backend.library import make_library\n"
        "sys.modules[__name__] = make_library('tensorrt-rtx 1.7')\n"
    )
    answers = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        patch.syspath_prepend(Path(__file__).parents[2])
        for name in ("played_rtx", "tensorrt_rtx_bindings"):
            (tmp_path / "answer").unlink(missing_ok=True)
            answers[name] = run_child(replace(request, modules=[name]), tmp_path, Path("m"), None, None)
    for figure in ("bytes", "seconds", "peak_rss_bytes"):
        assert all(answer.pop(figure) > 0 for answer in answers.values())
    for said in ("inspection", "not_inspected"):  # on a GPU the real engine has layers of its own
        assert all(said in answer and answer.pop(said) is not answer for answer in answers.values())
    assert answers["played_rtx"] == answers["tensorrt_rtx_bindings"]


def test_a_version_whose_plugins_do_not_work_is_refused_by_name(tmp_path: Path) -> None:
    modules = ["graphopt.plugins.pivot_linear.tensorrt"]
    run = Run(tmp_path, "tensorrt 10.13", plugins={"modules": modules, "architecture": "compute_80"})
    run.module.__dict__["__version__"] = "10.14.1.48"
    with pytest.raises(BuildFailed, match=r"10\.14") as caught:
        run()
    assert caught.value.bad_input


def test_the_fake_refuses_what_it_should() -> None:
    """What the suite rests on: absent members, wrong arguments, dead parsers."""
    old, new, rtx = (make_library(name) for name in ("tensorrt 10.9", "tensorrt 11.4", "tensorrt-rtx 1.7"))
    assert hasattr(old.BuilderFlag, "FP16") and not hasattr(new.BuilderFlag, "FP16")
    assert hasattr(rtx, "ComputeCapability") and not hasattr(new, "ComputeCapability")
    assert not hasattr(rtx.NetworkDefinitionCreationFlag, "PREFER_AOT_PYTHON_PLUGINS")
    assert not hasattr(new.IBuilderConfig, "set_compute_capability")

    class Unmade(new.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called when overriding"):
        new.Builder(Unmade())
    with pytest.raises(TypeError, match="incompatible function arguments"):
        new.Builder("no logger")
    builder = new.Builder(_quiet(new))
    config = builder.create_builder_config()
    with pytest.raises(TypeError, match="incompatible function arguments"):
        config.set_flag(7)
    with pytest.raises(AttributeError):
        config.set_flags(new.BuilderFlag.TF32)
    with pytest.raises(AttributeError):
        config.workspace = 1
    with pytest.raises(AttributeError):
        config.num_optimization_profiles = 1
    with pytest.raises(Breach, match="does not play"):
        config.set_preview_feature(None, True)
    with pytest.raises(Breach, match="network creation flags"):
        rtx_flags = 1 << int(new.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
        rtx.Builder(_quiet(rtx)).create_network(rtx_flags)
    network = builder.create_network(0)
    new.OnnxParser(network, _quiet(new))
    with pytest.raises(Breach, match="the parser must live"):
        builder.build_serialized_network(network, config)


def _quiet(module: types.ModuleType) -> Any:
    class Quiet(module.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            pass

    return Quiet()
