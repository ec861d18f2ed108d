from __future__ import annotations

import gc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.errors import BadInput, GraphoptError
from graphopt.runtime.session import bind, create_session, run
from graphopt.runtime.split import split_weights

LINEAR = """
<ir_version: 9, opset_import: ["" : 18]>
linear (float[batch, 3] x, int64[2] pick) => (float[batch, 4] y, float[2, 3] rows)
<float[3, 4] weight = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
{
    y = MatMul(x, weight)
    columns = Transpose<perm = [1, 0]>(weight)
    rows = Gather(columns, pick)
}
"""
X = np.array([[1, 0, 0], [0, 2, 0]], np.float32)
PICK = np.array([3, 0])


def parsed(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize("optimized", [False, True])
def test_runs_a_file_and_bytes(tmp_path: Path, optimized: bool) -> None:
    proto = parsed(LINEAR)
    onnx.save(proto, tmp_path / "linear.onnx")
    for model in (tmp_path / "linear.onnx", proto.SerializeToString()):
        got = run(create_session(model, optimized=optimized, threads=1), {"x": X, "pick": PICK})
        np.testing.assert_array_equal(got["y"], [[1, 2, 3, 4], [10, 12, 14, 16]])
        np.testing.assert_array_equal(got["rows"], [[4, 8, 12], [1, 5, 9]])


def test_only_the_outputs_asked_for() -> None:
    session = create_session(parsed(LINEAR).SerializeToString(), optimized=True)
    assert list(run(session, {"x": X, "pick": PICK}, ["rows"])) == ["rows"]


@pytest.mark.parametrize("optimized", [False, True])
def test_weights_handed_over_are_not_in_the_bytes_and_outlive_the_caller(optimized: bool) -> None:
    rng = np.random.default_rng(0)
    model = ir.from_proto(parsed(LINEAR))
    weight = rng.standard_normal((3, 4)).astype(np.float32)
    model.graph.initializers["weight"].const_value = ir.tensor(weight, name="weight")
    data, weights = split_weights(model, threshold=0)
    assert list(weights) == ["weight"]
    assert weight.tobytes() not in data
    assert model.graph.initializers["weight"].const_value is not None
    np.testing.assert_array_equal(model.graph.initializers["weight"].const_value.numpy(), weight)
    session = create_session(data, optimized=optimized, initializers=weights)
    del weights, model
    gc.collect()
    got = run(session, {"x": X, "pick": PICK})
    np.testing.assert_allclose(got["y"], X @ weight, rtol=1e-6)
    np.testing.assert_array_equal(got["rows"], weight.T[PICK])


def test_the_reference_shares_memory_with_the_arrays() -> None:
    model = ir.from_proto(parsed(LINEAR))
    data, weights = split_weights(model, threshold=0)
    shared = np.array(weights["weight"])
    session = create_session(data, optimized=False, initializers={"weight": shared})
    shared *= 2
    np.testing.assert_array_equal(run(session, {"x": X, "pick": PICK})["y"][0], [2, 4, 6, 8])


def test_small_and_string_weights_stay_in_the_bytes() -> None:
    _, weights = split_weights(ir.from_proto(parsed(LINEAR)))
    assert weights == {}


def test_types_that_numpy_cannot_name() -> None:
    text = """<ir_version: 9, opset_import: ["" : 19]>
    g (bfloat16[n] x, float8e4m3fn[n] q) => (float[n] wide, bfloat16[n] same, float8e4m3fn[n] kept)
    { wide = Cast<to = 1>(x)  same = Identity(x)  kept = Identity(q) }"""
    session = create_session(parsed(text).SerializeToString(), optimized=False)
    feeds = {"x": np.array([1, 2.5], ml_dtypes.bfloat16), "q": np.array([1, -3], ml_dtypes.float8_e4m3fn)}
    got = run(session, feeds)
    assert got["same"].dtype == ml_dtypes.bfloat16
    assert got["kept"].dtype == ml_dtypes.float8_e4m3fn
    for name, expected in (("wide", feeds["x"]), ("same", feeds["x"]), ("kept", feeds["q"])):
        np.testing.assert_array_equal(got[name].astype(np.float32), expected.astype(np.float32))
    bind(session, feeds)()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pick": None}, "input 'pick': no value was given (expected int64[2])"),
        ({"pikc": PICK}, "input 'pikc': the model has no such input (did you mean 'pick'?)"),
        ({"zz": PICK}, "input 'zz': the model has no such input (inputs: x, pick)"),
        (
            {"x": X.astype(np.float64)},
            "input 'x': expected float32[batch, 3], got float64[2, 3] (the dtype differs)",
        ),
        ({"x": X[0]}, "input 'x': expected float32[batch, 3], got float32[3] (the rank differs)"),
        ({"x": X[:, :2]}, "input 'x': expected float32[batch, 3], got float32[2, 2] (axis 1 differs)"),
    ],
)
def test_wrong_feeds_are_named(change: dict[str, np.ndarray | None], message: str) -> None:
    session = create_session(parsed(LINEAR).SerializeToString(), optimized=True)
    feeds = {name: value for name, value in ({"x": X, "pick": PICK} | change).items() if value is not None}
    for call in (run, bind):
        with pytest.raises(BadInput) as caught:
            call(session, feeds)
        assert str(caught.value) == message


def test_a_failure_while_running_gives_the_runtimes_reason(capfd: pytest.CaptureFixture[str]) -> None:
    session = create_session(parsed(LINEAR).SerializeToString(), optimized=False)
    with pytest.raises(GraphoptError, match=r"onnxruntime failed: .*out of data bounds, idx=9") as caught:
        run(session, {"x": X, "pick": np.array([9, 0])})
    assert not isinstance(caught.value, BadInput)
    assert capfd.readouterr() == ("", "")  # nothing of the runtime's own log


def test_a_model_that_the_runtime_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (
        '<ir_version: 9, opset_import: ["" : 18, "nobody" : 1]> g (float[2] x) => (float[2] y) { y = nobody.What(x) }'
    )
    path = tmp_path / "odd.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    with pytest.raises(BadInput, match=r"odd\.onnx: onnxruntime refuses the model: .*What"):
        create_session(path, optimized=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": Path("absent.onnx")}, "absent.onnx: no such file"),
        ({"custom_ops": Path("absent.so")}, "absent.so: no such file (--custom-ops takes a shared library)"),
        ({"providers": ["MagicExecutionProvider"]}, "execution provider MagicExecutionProvider is not available"),
    ],
)
def test_what_is_not_there_is_named(arguments: dict[str, object], message: str) -> None:
    given = {"model": parsed(LINEAR).SerializeToString(), "optimized": True} | arguments
    with pytest.raises(BadInput) as caught:
        create_session(**given)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_a_file_that_is_no_custom_operator_library(tmp_path: Path) -> None:
    library = tmp_path / "ops.so"
    library.write_text("not a library")
    with pytest.raises(BadInput, match=r"ops\.so: onnxruntime cannot load this library"):
        create_session(parsed(LINEAR).SerializeToString(), optimized=True, custom_ops=library)
