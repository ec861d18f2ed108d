"""T2 and T3: the whole model against the original, what is vacuous, random, optional, a sequence, only as deployed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.shapes import infer_shapes
from graphopt.verification import exact
from graphopt.verification.whole import Reference, compare, make_reference, run_case, session_for
from tests import models
from tests.models import draw_feeds
from tests.rewrite.toys import model, value

Array = np.ndarray[Any, Any]


def reference_of(made: ir.Model, feeds: Sequence[Mapping[str, Any]] | None = None, cases: int = 2) -> Reference:
    infer_shapes(made)
    given = feeds if feeds is not None else [draw_feeds(made, seed=seed) for seed in range(cases)]
    return make_reference(made, [dict(case) for case in given])


def results_of(made: ir.Model, reference: Reference, *, optimized: bool = False) -> list[dict[str, Any]]:
    infer_shapes(made)
    session = session_for(made, optimized=optimized)
    return [run_case(session, case) for case in reference.feeds]


# -- the same, and not -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.RUNNABLE)
def test_a_model_is_the_same_as_itself(name: str) -> None:
    reference = reference_of(models.RUNNABLE[name]())
    differences, worst = compare(reference, reference.results, bitwise=True)
    assert differences == []
    assert (worst.max_abs, worst.max_rel, worst.cosine_min) == (0.0, 0.0, 1.0)


NET = """g (float[N,8] x) => (float[N,8] y, float[N,8] z) {{
    a = {a}(x) b = Softmax<axis = {axis}>(a) y = Mul(b, x) z = Exp(a)
}}"""


def net(a: str = "Neg", axis: int = -1) -> ir.Model:
    return model(NET.format(a=a, axis=axis))


def test_each_wrong_output_of_each_case_is_named() -> None:
    reference = reference_of(net())
    differences, worst = compare(reference, results_of(net(axis=0), reference), bitwise=False)
    assert [(d.output, d.case) for d in differences] == [("y", 0), ("y", 1)]
    assert "from the float64 result" in str(differences[0])
    assert worst.max_abs > 0.01
    differences, _ = compare(reference, results_of(net(a="Abs"), reference), bitwise=False)
    assert {d.output for d in differences} == {"y", "z"}


def test_a_missing_output_and_another_dtype_or_shape_are_differences() -> None:
    reference = reference_of(net(), cases=1)
    (good,) = reference.results
    for wrong, reason in (
        ({"y": good["y"]}, "is missing"),
        ({**good, "z": good["z"].astype(np.float64)}, "dtype float64 where the original has float32"),
        ({**good, "z": good["z"].T}, "shape [8, 3] where the original has [3, 8]"),
    ):
        ((difference,), _) = compare(reference, [wrong], bitwise=False)
        assert difference.output == "z"
        assert reason in difference.reason


def test_bitwise_sees_the_last_bit() -> None:
    reference = reference_of(net(), cases=1)
    (good,) = reference.results
    off = {**good, "y": np.nextafter(good["y"], np.float32(1))}
    assert compare(reference, [off], bitwise=False)[0] == []
    ((difference,), worst) = compare(reference, [off], bitwise=True)
    assert "bits differ" in difference.reason
    assert worst.max_abs > 0


# -- what says nothing -------------------------------------------------------------------------------------------------

VACUOUS = {
    "all zeros": "y = Sub(x, x)",
    "dead Relu": "e = Exp(x) n = Neg(e) y = Relu(n)",
    "saturated": "c = Abs(x) d = Add(c, big) y = Sigmoid(d)",
    "all NaN": "a = Abs(x) n = Neg(a) e = Sub(n, one) y = Sqrt(e)",
    "all infinite": "a = Abs(x) d = Add(a, big) m = Mul(d, big) y = Exp(m)",
}


@pytest.mark.parametrize("case", list(VACUOUS))
def test_an_output_that_never_changes_is_vacuous(case: str) -> None:
    text = f"g (float[N,4] x) => (float[N,4] y) <float big = {{1000}}, float one = {{1}}> {{ {VACUOUS[case]} }}"
    assert reference_of(model(text)).vacuous() == ["y"]


def test_outputs_that_change_are_not_vacuous() -> None:
    text = "g (float[N,4] x) => (float[N,4] y, float[4] w, float s, int64[2] n) <float[4] w0 = {1, 1, 1, 1}> {" \
           " y = Relu(x) w = Identity(w0) s = ReduceSum<keepdims = 0>(x) n = Shape(x) }"  # fmt: skip
    assert reference_of(model(text)).vacuous() == []


def test_a_constant_whose_shape_is_the_input_is_not_vacuous() -> None:
    assert reference_of(model("g (int64[2] x) => (float[A,B] y) { y = ConstantOfShape(x) }")).vacuous() == []


def test_only_the_outputs_that_say_nothing_are_named() -> None:
    made = model("g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Sub(x, x) z = Neg(x) }")
    assert reference_of(made).vacuous() == ["y"]


def test_a_constant_that_changes_from_case_to_case_says_something() -> None:
    made = model("g (float[4] x) => (float[4] y) { m = ReduceMean<axes = [0]>(x) z = Sub(x, x) y = Add(z, m) }")
    assert reference_of(made).vacuous() == []


# -- random numbers ----------------------------------------------------------------------------------------------------


def test_random_models_are_compared_by_type_and_shape() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { n = RandomNormalLike(x) y = Add(x, n) }"
    reference = reference_of(model(text))
    assert reference.random
    assert compare(reference, results_of(model(text), reference), bitwise=True)[0] == []
    wrong = [{"y": result["y"].T} for result in reference.results]
    assert len(compare(reference, wrong, bitwise=False)[0]) == 2


def test_an_operator_that_could_be_random_and_is_not() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) <float r = {0.5}, bool t = {0}> { y = Dropout(x, r, t) }"
    reference = reference_of(model(text))
    assert not reference.random
    assert reference_of(model(text.replace("bool t = {0}", "bool t = {1}"))).random


# -- sequences, optionals ----------------------------------------------------------------------------------------------


def test_sequences_are_compared_element_by_element() -> None:
    text = "g (float[N,4] x) => (seq(float[N,4]) y) { a = Neg(x) y = SequenceConstruct(x, a) }"
    reference = reference_of(model(text), cases=1)
    (good,) = reference.results
    assert compare(reference, [good], bitwise=True)[0] == []
    for wrong, reason in (
        ([good["y"][0]], "sequences differ in length"),
        ([good["y"][0], good["y"][1] * 1.01], "element 1 "),
        ([good["y"][0], good["y"][1][:1]], "element 1 shape"),
        (good["y"][0], "sequences differ in length"),
    ):
        ((difference,), _) = compare(reference, [{"y": wrong}], bitwise=False)
        assert difference.reason.startswith(reason)


def test_an_absent_optional_is_not_a_present_one() -> None:
    reference = reference_of(net(), cases=1)
    (good,) = reference.results
    reference.results = [{"y": None, "z": good["z"]}]
    assert compare(reference, [{"y": None, "z": good["z"]}], bitwise=True)[0] == []
    ((difference,), _) = compare(reference, [good], bitwise=False)
    assert difference.reason == "one is absent"


# -- without a float64 result ------------------------------------------------------------------------------------------


def test_the_noise_of_the_original_is_the_yardstick_where_there_is_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(*args: object) -> None:
        raise exact.NotExact("not today")

    monkeypatch.setattr(exact, "evaluate", give_up)
    reference = reference_of(net(), cases=1)
    (good,) = reference.results
    near = {**good, "z": good["z"] * np.float32(1 + 2**-21)}
    far = {**good, "z": good["z"] * np.float32(1.001)}
    assert compare(reference, [near], bitwise=False)[0] == []
    ((difference,), _) = compare(reference, [far], bitwise=False)
    assert "no float64 result" in difference.reason
    assert reference.yardstick == "none: not today"


def test_noise_is_how_far_the_output_moves_with_the_last_bit_of_the_inputs() -> None:
    reference = reference_of(model("g (float[64] x) => (float[64] y, float[64] z) "
                                   "<float k = {1000}> { m = Mul(x, k) y = Sin(m) z = Neg(x) }"), cases=1)  # fmt: skip
    assert reference.noise(0, "y") > 50 * reference.noise(0, "z") > 0


# -- as deployed -------------------------------------------------------------------------------------------------------


def test_as_deployed_the_runtimes_own_rounding_is_allowed() -> None:
    reference = reference_of(net(), cases=1)
    (good,) = reference.results
    off = {**good, "z": good["z"] * np.float32(1.001)}
    ((difference,), _) = compare(reference, [off], bitwise=False, deployed=True)
    assert "only with the runtime's optimizations on" in str(difference)
    # The original is as far off, as deployed.
    reference._deployed = [{**good, "z": good["z"] * np.float32(0.9995)}]
    assert compare(reference, [off], bitwise=False, deployed=True)[0] == []
    assert compare(reference, [off], bitwise=False, deployed=False)[0] != []


def test_the_original_as_deployed_is_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed over in memory is optimized otherwise: int4 weights stay behind DequantizeLinear."""
    made = models.RUNNABLE["int4_weights"]()
    ir.save(made, tmp_path / "m.onnx")
    infer_shapes(made)
    feeds = [draw_feeds(made)]
    reference = make_reference(made, feeds, source=tmp_path / "m.onnx")
    from graphopt.runtime.session import create_session

    session = create_session(tmp_path / "m.onnx", optimized=True, threads=1)
    np.testing.assert_array_equal(reference.deployed(0)["y"], run_case(session, feeds[0])["y"])


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_a_session_returns_inner_values_and_leaves_the_model_alone() -> None:
    made = net()
    infer_shapes(made)
    session = session_for(made, outputs=[value(made, "a"), value(made, "y"), value(made, "a")])
    assert len(made.graph.outputs) == 2
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    found = run_case(session, {"x": x, "no such input": x}, ["a"])
    assert list(found) == ["a"]
    np.testing.assert_array_equal(found["a"], -x)
    assert run_case(session, {"x": x}, []) == {}


def test_the_float64_result_is_of_the_original_only() -> None:
    """Nodes that verification put beside the original are not run, whatever they are."""
    made = model("g (float[N,4] x) => (float[N,4] y) { y = Exp(x) beside = com.microsoft.Gelu(x) }",
                 imports=', "com.microsoft": 1')  # fmt: skip
    reference = reference_of(made, cases=1)
    values = reference.exact(0)
    assert values is not None
    np.testing.assert_allclose(values["y"], np.exp(reference.feeds[0]["x"].astype(np.float64)))
    assert reference.yardstick == "float64"
