"""Plugins as TensorRT sees them: NVIDIA's own Python layer, over the registry of its lean runtime, without a GPU.

The layer, the registry and the plugin objects are real; the builder, which would call them, is stood in for
(tests/engines/registry/walk.py). That an engine built this way runs is for a machine with a GPU to say.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from graphopt.engines.plugins import Plugin, load_plugin, qdp
from graphopt.errors import BadInput, GraphoptError
from graphopt.kernels.kernel import Kernel, Launch, Parameter
from graphopt.plugins.pivot_linear.tensorrt import PLUGIN
from tests.engines.registry import harness
from tests.engines.registry.folder.scale_add.tensorrt import PLUGIN as TOY
from tests.engines.registry.harness import Case, ask, attributes_of, compare

SITE = next(
    (Path(spec.origin).parents[1] for spec in [importlib.util.find_spec("tensorrt_lean_libs")] if spec and spec.origin),
    None,
)
HAS = all(importlib.util.find_spec(name) for name in ("tensorrt_bindings", "tensorrt_lean_libs", "nvidia.cuda_nvrtc"))
needs_registry = pytest.mark.skipif(
    not HAS or harness.COMPILER is None,
    reason="needs tensorrt-cu13-bindings, tensorrt-lean-cu13-libs, NVRTC and a C compiler",
)
FOLDER = Path(harness.__file__).parent / "folder"

# A size that run time decides is a name.
ROW: list[Sequence[int | str]] = [("b", "s", 64), (24, 64), (40, 24), (64,), (64,)]
COLUMN: list[Sequence[int | str]] = [("b", 64), (50, 24), (24, 40), (50,), (64,)]
STATIC = [(3, 64), (24, 64), (41, 24), (65,), (65,)]
RUNS = [{"b": b, "s": s} for b, s in itertools.product((1, 3, 16), (1, 7))]


def pivot_case(dtype: str, form: int, inputs: Sequence[Sequence[int | str]]) -> Case:
    return Case("PivotLinear", PLUGIN.namespace, [dtype] * 4 + ["int32"], inputs, {"form": [form]}, RUNS)


PIVOT = [pivot_case("float16", 0, ROW), pivot_case("bfloat16", 1, COLUMN), pivot_case("float16", 0, STATIC)]
TOYS = [
    Case("ScaleAdd", "third_party", [dtype], [("b", "s", 3)], {"offset": [-7], "scales": [0.1, 2.0, -3.5]}, RUNS)
    for dtype in ("float32", "float16")
]


# Their kernels differ, and differ by what the attributes say alone.
BAKED = [
    Case("ScaleAdd", "third_party", ["float32"], [(2, 2)], {"offset": [offset], "scales": scales}, [{}])
    for offset, scales in ((3, [0.1, 0.2]), (4, [0.1, 0.2]), (3, [0.1, 0.25]), (-(2**31), [3.0, 4.0]))
]
WRONG = [
    Case("PivotLinear", PLUGIN.namespace, ["float16"] * 4 + ["int32"], ROW, {"form": [5]}, RUNS),
    Case("PivotLinear", PLUGIN.namespace, ["float16", "float32"] * 2 + ["int32"], ROW, {"form": [0]}, RUNS),
]
CASES = [*PIVOT, *TOYS, *BAKED, *WRONG]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the layer answers for PivotLinear and for a plugin from a folder that graphopt does not have."""
    assert SITE is not None
    found = ask(
        tmp_path_factory.mktemp("registry"),
        harness.lean_library(SITE),
        ["graphopt.plugins.pivot_linear.tensorrt", "graphopt.plugins.scale_add.tensorrt"],
        CASES,
        extra_folders=[FOLDER],
        loud=True,
    )
    assert "error" not in found, found["error"]
    assert len(found["cases"]) == len(CASES)
    return found


@needs_registry
def test_the_creators_are_in_the_registry(answer: dict[str, Any]) -> None:
    assert answer["registered"] == ["graphopt_trt::PivotLinear", "third_party::ScaleAdd"]
    assert ["PivotLinear", "1", "graphopt_trt"] in answer["creators"]
    assert ["ScaleAdd", "1", "third_party"] in answer["creators"]


@needs_registry
@pytest.mark.parametrize("place", range(len(CASES) - len(WRONG)))
def test_what_a_build_is_told(answer: dict[str, Any], place: int) -> None:
    """Types, shapes, combinations, tactics, grid, scalars and kernel, against the same asked with plain numbers."""
    case = CASES[place]
    plugin = PLUGIN if case.name == PLUGIN.name else TOY
    tactics = len(plugin.kernels(plugin.types_of(case.types), attributes_of(plugin, case)))
    assert compare(plugin, case, answer["cases"][place]) == tactics * len(case.runs)


@needs_registry
def test_attributes_reach_the_kernel(answer: dict[str, Any]) -> None:
    """As the parser hands them on, int32 and float32: another offset is another kernel."""
    found = answer["cases"][len(PIVOT) + len(TOYS) : -len(WRONG)]
    assert len({told["tactics"]["1"]["ptx"] for told in found}) == len(BAKED)


@needs_registry
def test_what_goes_wrong_in_a_callback_is_kept(answer: dict[str, Any]) -> None:
    assert [found["kept"] for found in answer["cases"][-len(WRONG) :]] == [
        "PivotLinear: PivotLinear has no form 5",
        "PivotLinear: plugin PivotLinear: has no kernel for inputs of types float16, float32, float16, float32, int32",
    ]


@needs_registry
def test_a_name_registered_twice(tmp_path: Path) -> None:
    assert SITE is not None
    module = "graphopt.plugins.pivot_linear.tensorrt"
    answer = ask(tmp_path, harness.lean_library(SITE), [module, module], [])
    assert answer["error"].startswith("graphopt_trt::PivotLinear: TensorRT 11.4.0.106 does not register it: ")


# ---- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version", ["10.9.0.34", "10.13.3.9.post1", "10.15.1", "10.16.1.11", "11.0.0.114", "11.4.0.106"]
)
def test_versions_that_work(version: str) -> None:
    qdp.refuse_version(version)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("10.8.0.43", "TensorRT 10.8.0.43 has no plugins that are compiled ahead of time (10.9 or newer"),
        ("8.6.1", "TensorRT 8.6.1 has no plugins that are compiled ahead of time"),
        ("10.14.1.48", "TensorRT 10.14.1.48 cannot build plugins: this kind is known to fail in it (10.15 or newer"),
        ("", "'' is no version of TensorRT"),
    ],
)
def test_versions_that_do_not(version: str, reason: str) -> None:
    with pytest.raises(BadInput) as caught:
        qdp.refuse_version(version)
    assert str(caught.value).startswith(reason) and "\n" not in str(caught.value)


def test_a_tensorrt_without_the_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("tensorrt_without_plugins")
    fake.__version__ = "11.4.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", fake)
    with pytest.raises(BadInput, match=r"TensorRT 11\.4\.0 has no plugins"):
        qdp.plugin_layer(fake)


def test_arrays_are_annotated_by_a_class() -> None:
    """Python 3.13 asks whether it is a subclass, where older bindings do not look whether it is a class at all."""
    kind = qdp.array_type("int64")
    assert isinstance(kind, type) and not issubclass(kind, int)
    assert kind.__origin__ is np.ndarray  # type: ignore[attr-defined]
    assert kind.__args__[1].__args__ == (np.int64,)  # type: ignore[attr-defined]


def test_an_architecture_that_there_is_not() -> None:
    with pytest.raises(BadInput, match=r"no architecture 'sm_90a' \(there are compute_80"):
        qdp.register(TOY, ModuleType("tensorrt"), architecture="sm_90a")


def bindings(reads: Sequence[int]) -> Any:
    """Bindings whose fields read back as this."""
    field = SimpleNamespace(data=np.array(reads, np.int32))
    return SimpleNamespace(
        PluginField=lambda *_: field, PluginFieldType=SimpleNamespace(INT32=0), __version__="10.13.0"
    )


def test_bindings_that_read_lists_wrong_are_told_from_others() -> None:
    """Those before 10.16 give the first number again and again with numpy 2: what such a node says is not known."""
    assert qdp.reads_lists(bindings([1, 2, 3])) and not qdp.reads_lists(bindings([1, 1, 1]))
    callbacks = qdp._Callbacks(TOY, bindings([1, 1, 1]), None, "compute_80")
    with pytest.raises(
        GraphoptError, match=r"TensorRT 10\.13\.0 reads 'scales', .* wrong with numpy 2 \(10\.16 or newer"
    ):
        callbacks.describe(offset=np.array([1]), scales=np.array([2.0, 2.0]))


def test_architectures() -> None:
    assert qdp.architecture_for(None) == "compute_80"
    wanted = {(8, 0): 80, (8, 6): 80, (8, 9): 89, (9, 0): 90, (10, 0): 100, (10, 3): 100, (12, 0): 100}
    assert {pair: qdp.architecture_for(pair) for pair in wanted} == {
        pair: f"compute_{number}" for pair, number in wanted.items()
    }
    with pytest.raises(BadInput, match=r"8\.0 or newer; the GPU has 7\.5"):
        qdp.architecture_for((7, 5))


# ---- sizes -----------------------------------------------------------------------------------------------------------


class Text:
    """An expression as tensorrt.plugin has them: an int may stand on its right only."""

    is_fake = False

    def __init__(self, text: object) -> None:
        self.text: str = text.text if isinstance(text, Text) else str(text)

    def _with(self, sign: str, other: object) -> Text:
        return Text(f"({self.text} {sign} {Text(other).text})")

    def __add__(self, other: object) -> Text:
        return self._with("+", other)

    def __sub__(self, other: object) -> Text:
        return self._with("-", other)

    def __mul__(self, other: object) -> Text:
        return self._with("*", other)

    def __floordiv__(self, other: object) -> Text:
        return self._with("//", other)


def size(name: str) -> Any:
    return qdp.SymbolicSize(Text(name), SimpleNamespace(ShapeExpr=Text))


def test_sizes_count_with_numbers_on_either_side() -> None:
    a, b = size("a"), size("b")
    made = {
        "(a + 2)": [a + 2, 2 + a],
        "(a * 2)": [a * 2, 2 * a],
        "(a - 2)": [a - 2],
        "(2 - a)": [2 - a],
        "(2 // a)": [2 // a],
        "((a * b) // 3)": [a * b // 3],
        "(a - (b + 1))": [a - (b + 1)],
    }
    assert {text: [found.expression.text for found in values] for text, values in made.items()} == {
        text: [text] * len(values) for text, values in made.items()
    }


def test_what_sizes_cannot_do_is_an_error_and_no_answer() -> None:
    a = size("a")
    for wrong in (
        lambda: a < 3,
        lambda: a == 3,
        lambda: a != a,
        lambda: max(a, 1),
        lambda: bool(a),
        lambda: int(a),
        lambda: [1, 2][a],
        lambda: range(a),
        lambda: {a: 1},
        lambda: a * 0.5,
        lambda: a / 2,
    ):
        with pytest.raises(TypeError):
            wrong()


def kernel_with(*parameters: tuple[str, str], scalars: int = 1) -> Kernel:
    made = [Parameter(f"p{place}", kind, dtype) for place, (kind, dtype) in enumerate(parameters)]  # type: ignore[arg-type]
    return Kernel("k", Path("k.cu"), tuple(made), 32, lambda shapes: Launch((1, 1, 1), (0,) * scalars))


@pytest.mark.parametrize(
    "parameters",
    [
        [("input", "float32"), ("output", "float32"), ("output", "int32")],
        [("input", "float32"), ("scalar", "int32"), ("output", "int32"), ("output", "float32")],
        [("input", "float16"), ("scalar", "int32"), ("output", "float32"), ("output", "int32")],
        [("scalar", "int32"), ("input", "float32"), ("output", "float32"), ("output", "int32")],
        [("input", "float32"), ("input", "float32"), ("output", "float32"), ("output", "int32")],
        [("input", "float32"), ("output", "float32"), ("scalar", "int32"), ("output", "int32")],
        [("input", "float32"), ("scalar", "int32"), ("output", "float32")],
    ],
)
def test_a_kernel_with_other_parameters_is_refused(parameters: list[tuple[str, str]]) -> None:
    kernel = kernel_with(*parameters)
    plugin = Plugin(
        "Toy",
        ("x",),
        ("y", "told"),
        (("float32", "float32", "int32"),),
        TOY.results,
        lambda types, attributes: {1: kernel},
        TOY.lower,
        TOY.meaning,
    )
    if parameters[0] == ("input", "float32") and len(parameters) == 3 and parameters[1][0] == "output":
        assert plugin.kernel(plugin.types[0], {}, 1) is kernel  # no scalars are fine, here; the launch is checked later
        with pytest.raises(GraphoptError, match="k takes 0 scalars, and its launch gives 1"):
            qdp._check_launch(kernel, (1, 1, 1), (0,))
        return
    with pytest.raises(GraphoptError, match="it has to take input float32, output float32, output int32"):
        plugin.kernel(plugin.types[0], {}, 1)


def test_tactics_and_sizes_that_do_not_exist() -> None:
    with pytest.raises(GraphoptError, match="there is no such tactic for float32, float32, int32: 1, 2"):
        TOY.kernel(TOY.types[0], {"offset": np.array([1]), "scales": np.array([1.0])}, 3)
    kernel = kernel_with(("input", "float32"), ("scalar", "int32"), ("output", "float32"))
    with pytest.raises(GraphoptError, match="a size needs more than 32 bits"):
        qdp._check_launch(kernel, (1, 1, 1), (2**31,))
    with pytest.raises(GraphoptError, match="a size needs more than 32 bits"):
        qdp._check_launch(kernel, (-1, 1, 1), (1,))


# ---- buckets ---------------------------------------------------------------------------------------------------------


def test_buckets() -> None:
    assert qdp.buckets({}) == [{}]
    assert qdp.buckets({"b": (1, 16)}) == [{"b": size} for size in (1, 2, 4, 8, 16)]
    assert qdp.buckets({"b": (3, 20)}) == [{"b": size} for size in (3, 4, 8, 16, 20)]
    assert qdp.buckets({"b": (5, 5)}) == [{"b": 5}]
    assert qdp.buckets({"b": (1, 2), "s": (64, 128)}) == [
        {"b": 1, "s": 64},
        {"b": 1, "s": 128},
        {"b": 2, "s": 64},
        {"b": 2, "s": 128},
    ]
    assert qdp.buckets({"s": (1, 128)}, (32, 64)) == [{"s": size} for size in (1, 32, 64, 128)]
    assert qdp.buckets({"b": (1, 40)}, also={"b": 32, "other": 5}) == [{"b": size} for size in (1, 2, 4, 8, 16, 32, 40)]
    with pytest.raises(BadInput, match=r"36 shapes \(6 of b, 6 of s\) are more than 32 profiles"):
        qdp.buckets({"b": (1, 17), "s": (1, 17)})
    with pytest.raises(BadInput, match="no range"):
        qdp.buckets({"b": (4, 3)})


def test_a_module_that_declares_no_plugin() -> None:
    with pytest.raises(BadInput, match="json has no PLUGIN"):
        load_plugin("json")
    with pytest.raises(BadInput, match="the plugin cannot be imported"):
        load_plugin("graphopt.plugins.nothing.tensorrt")
