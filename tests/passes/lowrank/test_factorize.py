"""factorize: how many elements are left, how good they are, what is done once, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import BadInput
from graphopt.passes.lowrank import factorize
from graphopt.passes.lowrank.factorize import Factorize
from graphopt.passes.lowrank.pivot import Pivot
from graphopt.recipes.recipe import passes_of
from graphopt.rewrite import Context
from graphopt.rewrite.manager import PassRecord, run_passes
from graphopt.shapes import infer_shapes
from graphopt.store import Store
from graphopt.targets import load_target
from tests.passes.common import applications, op_types, run_ort, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, NUMPY, G, in_body, random, reasons

D, H = 48, 80
Feeds = list[dict[str, np.ndarray]]


def spread(rows: int, columns: int, *, seed: int, power: float = 1.0) -> np.ndarray:
    """A matrix of full rank whose singular values fall like those of trained weights: 1 / k^power."""
    rank = min(rows, columns)
    u, _ = np.linalg.qr(random((rows, rank), DOUBLE, seed=seed))
    v, _ = np.linalg.qr(random((columns, rank), DOUBLE, seed=seed + 1))
    made: np.ndarray = 3 * u * np.arange(1, rank + 1) ** -power @ v.T
    return made


def chain(*, layers: int = 2, dtype: int = FLOAT, power: float = 1.0) -> onnx.ModelProto:
    """x <- x + W2 relu(W1 x), some times; weights 48 x 80 and 80 x 48."""
    g = G(17, dtype)
    x = g.input("x", "batch", 6, D)
    for layer in range(layers):
        inner = g.op("MatMul", x, g.const(spread(D, H, seed=10 * layer, power=power)))
        outer = g.op("MatMul", g.op("Relu", inner), g.const(spread(H, D, seed=10 * layer + 5, power=power)))
        x = g.op("Add", x, outer)
    g.output(x)
    return g.model()


def correlated(count: int = 6, *, dtype: int = FLOAT, seed: int = 0) -> Feeds:
    """Inputs of a few strong directions, as activations have."""
    mixing = spread(D, D, seed=77, power=1.5)
    return [{"x": (random((2, 6, D), DOUBLE, seed=seed + i) @ mixing).astype(NUMPY[dtype])} for i in range(count)]


def elements(model: ir.Model | onnx.ModelProto) -> int:
    made = ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model
    values = made.graph.initializers.values()
    return sum(int(np.prod(v.shape.numpy())) for v in values if v.shape is not None and len(v.shape) > 1)


def error(before: onnx.ModelProto, after: ir.Model, feeds: Sequence[Mapping[str, np.ndarray]]) -> float:
    """|y' - y|^2 / |y|^2 over all cases."""
    pairs = [(run_ort(before, feed)[0], run_ort(after, feed)[0]) for feed in feeds]
    lost = sum(float(np.sum((new.astype(np.float64) - old) ** 2)) for old, new in pairs)
    return lost / sum(float(np.sum(old.astype(np.float64) ** 2)) for old, _ in pairs)


def factorized(before: onnx.ModelProto, feeds: Feeds | None = None, **parameters: object) -> ir.Model:
    after, records = run_pass(before, Factorize, feeds=feeds, **parameters)
    assert applications(records) > 0, reasons(records)
    return after


# ---- how much is left ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", ["uniform", "sensitivity"])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_the_density_is_reached_and_never_exceeded(density: float, ranks: str) -> None:
    before, feeds = chain(), correlated(3)
    for method in ("svd", "weighted"):
        after = factorized(before, feeds, density=density, ranks=ranks, method=method, form="factors")
        slack = 0.5 * (D + H) * 4 if ranks == "uniform" else D + H
        assert density * elements(before) - slack <= elements(after) <= density * elements(before)


@pytest.mark.parametrize("ranks", ["uniform", "sensitivity"])
@pytest.mark.parametrize("form", ["auto", "pivot"])
@pytest.mark.parametrize("density", [0.35, 0.6])
def test_pivot_pays_what_the_density_owes(density: float, form: str, ranks: str) -> None:
    """The ranks are those of pivot forms: pivot makes them, also where the cost profile sees no gain."""
    before, feeds = chain(), correlated(3)
    made, _ = run_pass(before, Factorize, feeds=feeds, density=density, ranks=ranks, form="pivot", method="svd")
    assert elements(made) > density * elements(before)
    after, records = run_pass(
        before, Factorize, Pivot, feeds=feeds, density=density, ranks=ranks, form=form, method="svd"
    )
    assert elements(after) <= density * elements(before), reasons(records)
    assert elements(after) > (density - 0.1) * elements(before)
    assert error(before, after, feeds) == pytest.approx(error(before, made, feeds), rel=1e-3)


@pytest.mark.parametrize(("passes", "skip"), [((), ()), ((Pivot,), ("pivot:",))])
@pytest.mark.parametrize("density", [0.6, 0.9])
def test_where_pivot_does_not_run_factors_are_counted(
    density: float, passes: Sequence[type[Pivot]], skip: Sequence[str]
) -> None:
    before, feeds = chain(), correlated(3)
    after, _ = run_pass(before, Factorize, *passes, skip=skip, feeds=feeds, density=density, method="svd")
    assert elements(after) <= density * elements(before)


def test_factors_that_pivots_were_to_make_small_become_one_weight_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every pivot form is refused, what is left may not be larger than the model was."""
    monkeypatch.setattr("graphopt.passes.lowrank.pivot.MOST_AMPLIFIED", 0.0)
    before, feeds = chain(), correlated(3)
    made, _ = run_pass(before, Factorize, feeds=feeds, density=0.9, form="pivot", method="svd")
    after, _ = run_pass(before, Factorize, Pivot, feeds=feeds, density=0.9, form="auto", method="svd")
    assert elements(after) <= elements(before) < elements(made)
    assert error(before, after, feeds) == pytest.approx(error(before, made, feeds), rel=1e-3)


def test_a_density_that_is_missed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before, feeds = chain(), correlated(3)
    for passes in ((Factorize,), (Factorize, Pivot)):  # what is met is no news
        after, records = run_pass(before, *passes, feeds=feeds, density=0.6, method="svd")
        assert elements(after) <= 0.6 * elements(before)
        assert records[0].reason == ""
    monkeypatch.setattr("graphopt.passes.lowrank.pivot.MOST_AMPLIFIED", 0.0)
    after, records = run_pass(before, Factorize, Pivot, feeds=feeds, density=0.6, method="svd")
    reached = elements(after) / elements(before)
    assert reached > 0.61
    assert records[0].reason.startswith("a density of 0.") and "above the 0.6 that was asked for" in records[0].reason
    assert float(records[0].reason.split()[3].rstrip(",")) == pytest.approx(reached, abs=0.01)


def test_the_form_for_which_no_class_is_free() -> None:
    """Between a graph input and a graph output no permutation vanishes: auto counts the factors."""
    g = G(17)
    g.output(g.op("MatMul", g.input("x", "batch", 6, D), g.const(spread(D, H, seed=1))))
    before = g.model()
    ranks = {}
    for form in ("auto", "factors", "pivot"):
        after = factorized(before, density=0.5, form=form, method="svd", ranks="uniform")
        ranks[form] = elements(after) // (D + H)
    assert ranks["auto"] == ranks["factors"] < ranks["pivot"]


def test_rank_and_energy() -> None:
    before = chain(layers=1)
    after = factorized(before, rank=7, method="svd")
    assert elements(after) == 2 * 7 * (D + H)
    values = np.linalg.svd(spread(D, H, seed=0), compute_uv=False) ** 2
    for energy in (0.7, 0.95):
        wanted = int(np.searchsorted(np.cumsum(values) / values.sum(), energy)) + 1
        after = factorized(before, energy=energy, method="svd")
        assert elements(after) == 2 * wanted * (D + H)


def test_a_rank_that_saves_nothing_is_left_dense() -> None:
    before = chain(layers=1)
    after, records = run_pass(before, Factorize, rank=47, method="svd", form="factors")
    assert applications(records) == 0 and elements(after) == elements(before)


def test_the_best_factors_of_a_rank() -> None:
    g = G(17, DOUBLE)
    weight = spread(D, H, seed=1)
    g.output(g.op("MatMul", g.input("x", "batch", D), g.const(weight)))
    after = factorized(g.model(), rank=9, method="svd")
    found = run_ort(after, {"x": np.eye(D)})[0]
    u, s, v = np.linalg.svd(weight)
    np.testing.assert_allclose(found, u[:, :9] * s[:9] @ v[:9], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT16, DOUBLE])
def test_dtypes(dtype: int) -> None:
    before, feeds = chain(layers=1, dtype=dtype), correlated(2, dtype=dtype)
    for method in ("svd", "weighted", "m"):
        after = factorized(before, feeds, density=0.6, method=method)
        assert {v.dtype for v in after.graph.initializers.values()} == {ir.DataType(dtype)}
        assert error(before, after, feeds) < 0.05


def test_auto_counts_factors_of_sixteen_bits() -> None:
    """Their pivots would be taken back by the rounding rule, and the density be exceeded."""
    before, feeds = chain(layers=1, dtype=FLOAT16), correlated(2, dtype=FLOAT16)
    after = factorized(before, feeds, density=0.5, method="svd")
    assert elements(after) <= 0.5 * elements(before)


def test_a_convolution() -> None:
    n, m = 6, 48
    g = G(17)
    kernel = spread(m, n * 9, seed=1).reshape(m, n, 3, 3)
    y = g.op("Conv", g.input("x", 1, n, 6, 5), g.const(kernel), g.const(random((m,), seed=3)), pads=[1] * 4)
    g.output(y)
    before = g.model()
    feeds = [{"x": random((1, n, 6, 5), seed=i)} for i in range(6)]
    errors = []
    for method in ("svd", "weighted", "m"):
        after = factorized(before, feeds, density=0.5, method=method)
        assert op_types(after) == ["Conv", "Conv"] and elements(after) <= elements(before) / 2
        errors.append(error(before, after, feeds))
    assert errors[1] < errors[0] < 0.2 and errors[2] < errors[0]


def test_gemm_with_alpha_and_a_bias() -> None:
    g = G(17)
    bias = g.const(random((H,), seed=2))
    g.output(g.op("Gemm", g.input("x", "batch", D), g.const(spread(H, D, seed=1)), bias, transB=1, alpha=-2.0))
    before = g.model()
    feeds = [{"x": random((5, D), seed=i)} for i in range(3)]
    after = factorized(before, feeds, density=0.5, method="weighted")
    assert op_types(after) == ["Gemm", "Gemm"]
    assert error(before, after, feeds) < 0.1


# ---- how good it is --------------------------------------------------------------------------------------------------


def test_weighted_is_better_than_svd_on_its_data_and_beyond() -> None:
    before, feeds, unseen = chain(layers=1), correlated(8), correlated(4, seed=100)
    svd, weighted = (
        factorized(before, feeds, density=0.4, ranks="uniform", method=method) for method in ("svd", "weighted")
    )
    assert error(before, weighted, feeds) < 0.5 * error(before, svd, feeds)
    assert error(before, weighted, unseen) < error(before, svd, unseen)


def test_m_makes_up_for_what_earlier_weights_lost() -> None:
    before, feeds, unseen = chain(layers=4, power=0.6), correlated(12), correlated(4, seed=100)
    weighted, m = (
        factorized(before, feeds, density=0.4, ranks="uniform", method=method) for method in ("weighted", "m")
    )
    assert error(before, m, feeds) < 0.95 * error(before, weighted, feeds)
    assert error(before, m, unseen) < error(before, weighted, unseen)


def test_ranks_by_sensitivity_spend_the_budget_where_it_counts() -> None:
    """One of two weights hardly reaches the output."""
    g = G(17)
    x = g.input("x", "batch", 6, D)
    loud, quiet = (g.op("MatMul", x, g.const(spread(D, D, seed=seed, power=0.7))) for seed in (1, 4))
    g.output(g.op("Add", loud, g.op("Mul", quiet, g.const(0.01))))
    before, feeds = g.model(), correlated(4)
    errors = {}
    for ranks in ("uniform", "sensitivity"):
        after = factorized(before, feeds, density=0.5, ranks=ranks, method="weighted", form="factors")
        assert elements(after) <= 0.5 * elements(before)
        errors[ranks] = error(before, after, feeds)
    assert errors["sensitivity"] < 0.5 * errors["uniform"]


# ---- what shares, what is left ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "weighted", "m"])
def test_one_behind_the_other(method: str) -> None:
    g = G(17)
    y = g.input("x", "batch", 6, D)
    for seed in (1, 4, 7):
        y = g.op("MatMul", y, g.const(spread(D, D, seed=seed, power=1.5)))
    g.output(y)
    before, feeds = g.model(), correlated(3)
    after = factorized(before, feeds, density=0.6, method=method, form="factors", ranks="uniform")
    assert op_types(after) == ["MatMul"] * 6 and elements(after) <= 0.6 * elements(before)
    assert error(before, after, feeds) < 0.05


def test_a_shared_weight_is_factorized_once() -> None:
    g = G(17)
    x, weight = g.input("x", "batch", 6, D), g.const(spread(D, D, seed=1))
    g.output(g.op("MatMul", g.op("Relu", g.op("MatMul", x, weight)), weight))
    before, feeds = g.model(), correlated(3)
    for method in ("svd", "weighted", "m"):
        after = factorized(before, feeds, density=0.5, method=method, form="pivot")
        assert op_types(after) == ["MatMul", "MatMul", "Relu", "MatMul", "MatMul"]
        assert elements(after) <= 0.5 * elements(before)
        assert len(after.graph.initializers) == 2


def test_skip(tmp_path: Path) -> None:
    before = chain(layers=2)
    names = [tensor.name for tensor in before.graph.initializer]
    left_out = [names[0], "*_" + names[3].removeprefix("c_")]
    after, records = in_folder(before, tmp_path, [], rank=5, method="svd", skip=left_out)
    kept = {name for name in names if name in after.graph.initializers}
    assert kept == {names[0], names[3]}
    assert "left out by the parameter skip" in reasons(records)


def test_left_alone() -> None:
    tied, small, body = G(17), G(17), G(17)
    weight = tied.const(spread(D, D, seed=1))
    tied.output(tied.op("MatMul", tied.input("x", 3, D), weight))
    tied.output(tied.op("Gather", weight, tied.input("ids", 2, dtype=onnx.TensorProto.INT64)))
    small.output(small.op("MatMul", small.input("x", 3, 40), small.const(spread(40, 90, seed=1))))
    body.output(body.op("Relu", body.op("MatMul", body.input("x", 3, D), body.const(spread(D, D, seed=1)))))
    cases = [(tied.model(), "something else reads it too"), (small.model(), "a side of fewer than 48")]
    for before, why in [*cases, (in_body(body.model()), "in a body")]:
        _, records = run_pass(before, Factorize, rank=5, method="svd")
        assert applications(records) == 0 and why in reasons(records)


def test_factors_are_not_factorized_again() -> None:
    after = factorized(chain(layers=1), density=0.5, method="svd", form="factors")
    again, records = run_pass(after, Factorize, density=0.5, method="svd", form="factors")
    assert applications(records) == 0 and elements(again) == elements(after)


# ---- what the user must say ------------------------------------------------------------------------------------------


def test_without_parameters_it_is_not_run() -> None:
    assert not Factorize({}).asked and not Factorize({"method": "svd"}).asked
    assert passes_of([], ["factorize.method=svd"]) == []
    assert [p.name for p in passes_of([], ["factorize.density=0.5"])] == ["factorize"]


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"density": 0.5, "rank": 4}, "give one of density, energy and rank"),
        ({"density": 0.5}, "the method m looks at data"),
        ({"density": 0.5, "method": "weighted"}, "the method weighted looks at data"),
        ({"density": 0.001, "method": "svd"}, "a density of 0.001"),
    ],
)
def test_refusals(parameters: dict[str, object], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        run_pass(chain(layers=1), Factorize, **parameters)


def test_a_weight_that_is_not_finite() -> None:
    g = G(17)
    weight = spread(D, D, seed=1)
    weight[3, 4] = np.nan
    g.output(g.op("MatMul", g.input("x", 3, D), g.const(weight)))
    with pytest.raises(BadInput, match="cannot be factorised"):
        run_pass(g.model(), Factorize, rank=5, method="svd")


# ---- what is computed once -------------------------------------------------------------------------------------------


def in_folder(
    before: onnx.ModelProto, folder: Path, feeds: Feeds, **parameters: object
) -> tuple[ir.Model, list[PassRecord]]:
    model = ir.from_proto(before)
    infer_shapes(model)
    ctx = Context(model, load_target("onnxruntime"), feeds=feeds, store=Store(folder))
    records = run_passes(ctx, [Factorize(parameters)])
    assert [r.error for r in records if r.error] == []
    return model, records


class Counted:
    """Functions of the pass, counted; one of them fails at its n-th call, as if the run had been killed."""

    def __init__(self, patch: pytest.MonkeyPatch, fail: str = "", at: int = 0) -> None:
        self.calls = dict.fromkeys(("weighted_truncated_svd", "reconstruct"), 0)
        for name in self.calls:
            patch.setattr(factorize, name, self._counting(name, getattr(factorize, name), at if name == fail else 0))

    def _counting(self, name: str, function: Any, at: int) -> Any:
        def counting(*args: Any, **options: Any) -> Any:
            self.calls[name] += 1
            if self.calls[name] == at:
                raise KeyboardInterrupt
            return function(*args, **options)

        return counting

    @property
    def total(self) -> tuple[int, int]:
        return self.calls["weighted_truncated_svd"], self.calls["reconstruct"]


@pytest.mark.parametrize("method", ["svd", "weighted", "m"])
def test_a_second_run_finds_everything(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, feeds = chain(), correlated(3)
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        first, _ = in_folder(before, tmp_path, feeds, density=0.5, method=method)
        assert counted.total == (4, 4 if method == "m" else 0)
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        second, _ = in_folder(before, tmp_path, feeds, density=0.5, method=method)
        assert counted.total == (0, 0)
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()


@pytest.mark.parametrize(("fail", "at"), [("weighted_truncated_svd", 3), ("reconstruct", 3)])
def test_an_interrupted_run_goes_on(fail: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, feeds = chain(), correlated(3)
    whole, _ = in_folder(before, tmp_path / "whole", feeds, density=0.5)
    with monkeypatch.context() as patch:
        Counted(patch, fail, at)
        with pytest.raises(KeyboardInterrupt):
            in_folder(before, tmp_path / "parts", feeds, density=0.5)
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        resumed, _ = in_folder(before, tmp_path / "parts", feeds, density=0.5)
        svds, fits = counted.total
        assert (svds, fits) == ((2, 4) if fail == "weighted_truncated_svd" else (0, 2))
    assert ir.to_proto(resumed).SerializeToString() == ir.to_proto(whole).SerializeToString()


def test_other_data_are_looked_at_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = chain(layers=1)
    in_folder(before, tmp_path, correlated(3), density=0.5, method="weighted")
    counted = Counted(monkeypatch)
    in_folder(before, tmp_path, correlated(3, seed=50), density=0.5, method="weighted")
    assert counted.total[0] == 2
    in_folder(before, tmp_path, correlated(3), density=0.3, method="weighted")
    assert counted.total[0] == 2  # another density needs no other decomposition


def test_a_folder_of_the_users(tmp_path: Path) -> None:
    """Through the main job: the results lie in the folder of --work, and give the same file again."""
    source, data = tmp_path / "m.onnx", tmp_path / "data.npz"
    onnx.save(chain(layers=1), source)
    np.savez(data, x=np.concatenate([case["x"] for case in correlated(4)]))
    files = []
    for number in range(2):
        out = tmp_path / f"o{number}.onnx"
        report = graphopt.optimize(
            source,
            out,
            recipe=["lowrank"],
            settings=["factorize.density=0.5"],
            calibration=data,
            fail_if=["cosine<0.9"],
            work=tmp_path / "work",
        )
        assert report.output is not None and report.output.parameters <= 0.5 * 2 * D * H + 1
        files.append(out.read_bytes())
    assert files[0] == files[1]
    assert list((tmp_path / "work").glob("*.npz"))


# ---- few samples, and parameters that mean nothing -------------------------------------------------------------------


def two_layers() -> onnx.ModelProto:
    g = G(17)
    x = g.input("x", "batch", 96)
    inner = g.op("Relu", g.op("MatMul", x, g.const(random((96, 128), seed=1))))
    g.output(g.op("MatMul", inner, g.const(random((128, 96), seed=2))))
    return g.model()


@pytest.mark.parametrize("samples", [4, 20, 40, 64])
@pytest.mark.parametrize("density", [0.5, 0.8])
def test_few_samples_do_not_make_a_weight_worthless(samples: int, density: float) -> None:
    """Below the rank of the data there is no error to measure, and it does not follow that one is enough."""
    before = two_layers()
    feeds = [{"x": random((1, 96), seed=i)} for i in range(samples)]
    after = factorized(before, feeds, density=density, method="weighted", form="factors")
    inner = [min(v.shape.numpy()) for v in after.graph.initializers.values() if v.shape is not None and v.name]
    assert min(inner) > 10
    unseen = [{"x": random((1, 96), seed=1000 + i)} for i in range(8)]
    assert error(before, after, unseen) < 0.9


def test_too_few_samples_are_told() -> None:
    _, records = run_pass(two_layers(), Factorize, feeds=[{"x": random((1, 96))}], density=0.5, method="weighted")
    assert "the data show 1 rows for 96 inputs" in reasons(records)


def test_a_pattern_that_names_nothing() -> None:
    model = ir.from_proto(two_layers())
    infer_shapes(model)
    ctx = Context(model, load_target("onnxruntime"))
    with pytest.raises(BadInput, match=r"skip: no constant is named like 'nothing\*'"):
        run_passes(ctx, [Factorize({"density": 0.5, "method": "svd", "skip": ["nothing*"]})])


def test_a_rank_that_saves_nothing() -> None:
    _, records = run_pass(two_layers(), Factorize, rank=90, method="svd", form="factors")
    assert "of rank 90 it would hold no fewer elements than its 128 x 96" in reasons(records)
