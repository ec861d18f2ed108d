"""State dicts of every form into graphs of every spelling, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("safetensors")

from graphopt.errors import BadInput, GateFailed
from graphopt.files import load_model
from graphopt.importing import ImportReport, import_factors
from tests.importing.common import (
    Arrays,
    Dense,
    adapter,
    close,
    elements,
    op_types,
    pivot_state,
    random,
    run,
    save_state,
)

FC = "model.layers.0.fc1"


def factors(name: str, ending: str, m: int = 12, n: int = 8, r: int = 3) -> tuple[Arrays, np.ndarray]:
    """A state dict of a kind, and the dense matrix."""
    left, right, scale = random(m, r), random(r, n, seed=1), np.abs(random(r, seed=2)) + 1
    plain = left @ right
    scaled = (left * scale) @ right
    stem = name.rpartition(".")[0] + ".fc1"
    kinds: dict[str, tuple[Arrays, np.ndarray]] = {
        "svd-llm": ({f"{stem}_u_proj.weight": left, f"{stem}_v_proj.weight": right}, plain),
        "asvd": ({f"{name}.ALinear.weight": left, f"{name}.BLinear.weight": right}, plain),
        "welore": ({f"{name}.U.weight": left, f"{name}.V.weight": right}, plain),
        "parameters": ({f"{name}.U": left, f"{name}.V": right}, plain),
        "parameters turned": ({f"{name}.U": left, f"{name}.V": right.T}, plain),
        "sequential": ({f"{name}.1.weight": left, f"{name}.0.weight": right}, plain),
        "sst": ({f"{name}.U": left, f"{name}.S": scale, f"{name}.V": right.T}, scaled),
        "sst transposed": ({f"{name}.U": left, f"{name}.S": scale, f"{name}.Vh": right}, scaled),
        "pifa": pivot_state(name, m, n, r),
    }
    return kinds[ending]


KINDS = ("svd-llm", "asvd", "welore", "parameters", "parameters turned", "sequential", "sst", "sst transposed", "pifa")


def imported(folder: Path, dense: Dense, state: Arrays, **options: bool) -> ImportReport:
    model = dense.save(folder / "m.onnx")
    return import_factors(model, save_state(folder / "s.safetensors", state), folder / "o.onnx", **options)


def refused(folder: Path, dense: Dense, state: Arrays, **options: bool) -> str:
    with pytest.raises(BadInput) as caught:
        imported(folder, dense, state, **options)
    assert not (folder / "o.onnx").exists()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["matmul", "gemm", "conv"])
def test_every_form_in_every_spelling(tmp_path: Path, kind: str, how: str) -> None:
    state, matrix = factors(FC, kind)
    rank = 2 if how == "gemm" else 3
    dense = Dense(8, image=how == "conv", rank=rank).linear(FC, matrix, random(12), how=how).add("Relu")
    report = imported(tmp_path, dense, state)
    operator = {"matmul": "MatMul", "gemm": "Gemm", "conv": "Conv"}[how]
    tail = ["Add", "Relu"] if how == "matmul" else ["Relu"]
    pivots = ["Concat", "Gather", *(["Add"] if how != "matmul" else [])] if kind == "pifa" else []
    assert op_types(tmp_path / "o.onnx") == [operator, operator, *pivots, *tail]
    stored = 3 * (12 + 8) - (9 if kind == "pifa" else 0)
    assert elements(tmp_path / "o.onnx") == stored + 12 + (12 if kind == "pifa" else 0)
    (row,) = report.modules
    assert (row.outputs, row.inputs, row.rank, row.before, row.after) == (12, 8, 3, 96, stored)
    assert row.by == "weight name"
    assert row.difference is not None and row.difference < 1e-6
    assert report.verification.verdict == "passed"
    x = random(2, 8, 6, 6) if how == "conv" else random(*[3, 5][: rank - 1], 8)
    assert close(run(tmp_path / "o.onnx", x), run(tmp_path / "m.onnx", x))


def test_the_numbers_are_the_checkpoints(tmp_path: Path) -> None:
    state, matrix = factors(FC, "welore")
    imported(tmp_path, Dense(8).linear(FC, matrix), state)
    weights = load_model(tmp_path / "o.onnx").graph.initializers
    np.testing.assert_array_equal(weights[f"{FC}.V.weight"].const_value.numpy(), state[f"{FC}.V.weight"].T)
    np.testing.assert_array_equal(weights[f"{FC}.U.weight"].const_value.numpy(), state[f"{FC}.U.weight"].T)


def test_the_scale_goes_into_the_smaller_factor(tmp_path: Path) -> None:
    state, matrix = factors(FC, "sst")
    imported(tmp_path, Dense(8).linear(FC, matrix), state)
    weights = load_model(tmp_path / "o.onnx").graph.initializers
    np.testing.assert_array_equal(weights[f"{FC}.U"].const_value.numpy(), state[f"{FC}.U"].T)
    assert not np.array_equal(weights[f"{FC}.V"].const_value.numpy(), state[f"{FC}.V"])


def test_a_convolution_and_the_pointwise_one_behind_it(tmp_path: Path) -> None:
    left, right = random(12, 4, 1, 1), random(4, 8, 3, 3)
    matrix = np.einsum("mr,rnhw->mnhw", left[:, :, 0, 0], right)
    state = {f"{FC}.0.weight": right, f"{FC}.1.weight": left}
    report = imported(tmp_path, Dense(8, image=True).linear(FC, matrix, random(12), how="conv"), state)
    assert op_types(tmp_path / "o.onnx") == ["Conv", "Conv"]
    assert (report.modules[0].inputs, report.modules[0].after) == (72, 4 * (72 + 12))
    x = random(2, 8, 6, 6)
    assert close(run(tmp_path / "o.onnx", x), run(tmp_path / "m.onnx", x))


def test_pivots_that_come_first_need_no_index(tmp_path: Path) -> None:
    kept, rest = random(3, 8), random(9, 3)
    state = {f"{FC}.BLinear.weight": kept, f"{FC}.ALinear.weight": rest}
    state |= {f"{FC}.false_idx": np.arange(3), f"{FC}.true_idx": np.arange(3, 12)}
    imported(tmp_path, Dense(8).linear(FC, np.concatenate([kept, rest @ kept])), state)
    assert op_types(tmp_path / "o.onnx") == ["MatMul", "MatMul", "Concat"]


def test_a_network_of_several_modules_and_dense_layers(tmp_path: Path) -> None:
    one, first = pivot_state("layers.0.up", 16, 8, 4)
    two, second = pivot_state("layers.10.down", 8, 16, 4, seed=5)
    dense = Dense(8).linear("layers.0.up", first).add("Relu").linear("layers.10.down", second)
    dense.linear("head", random(6, 8))
    report = imported(tmp_path, dense, {**two, **one, "head.weight": random(6, 8), "norm.weight": random(8)})
    assert [row.name for row in report.modules] == ["layers.0.up", "layers.10.down"]
    assert report.unread == 2
    assert op_types(tmp_path / "o.onnx").count("MatMul") == 5


def test_weights_that_are_computed_when_they_are_saved(tmp_path: Path) -> None:
    state, matrix = pivot_state(FC, 320, 300, 80)
    scaled, other = factors("model.layers.1.fc1", "sst", m=300, n=320, r=80)
    imported(tmp_path, Dense(300).linear(FC, matrix).linear("model.layers.1.fc1", other), {**state, **scaled})
    x = random(2, 5, 300)
    assert close(run(tmp_path / "o.onnx", x), run(tmp_path / "m.onnx", x))


# -- finding the layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "node", "by"),
    [
        ("layers.0.fc1", "", "weight name"),
        ("module.model.layers.0.fc1", "", "weight name"),
        ("encoder.layers.0.fc1", "", "weight name"),
        ("onnx::MatMul_7", "/model/layers.0/fc1/MatMul", "node name"),
        ("onnx::MatMul_7", "/layers.0/fc1/MatMul_1", "node name"),
        ("onnx::MatMul_7", "/layers/layers.0/layers.0.fc1/MatMul", "node name"),
        ("val_12", "node_MatMul_3", "values"),
    ],
)
def test_by_name_or_by_value(tmp_path: Path, weight: str, node: str, by: str) -> None:
    state, matrix = factors(FC, "welore")
    dense = Dense(8).linear("other", random(8, 8)).add("Relu").linear(weight, matrix, node=node)
    dense.linear("a_later_one", random(12, 12))
    report = imported(tmp_path, dense, state)
    assert [row.by for row in report.modules] == [by]
    assert report.verification.verdict == "passed"


def test_by_value_among_layers_of_one_shape(tmp_path: Path) -> None:
    names = [f"layers.{i}" for i in range(4)]
    made = [pivot_state(name, 8, 8, 3, seed=10 * i) for i, name in enumerate(names)]
    dense = Dense(8)
    for i in (2, 0, 3, 1):
        dense.linear(f"onnx::MatMul_{i}", made[i][1])
    report = imported(tmp_path, dense, {key: array for state, _ in made for key, array in state.items()})
    assert [(row.name, row.by) for row in report.modules] == [(name, "values") for name in names]


def test_a_layer_that_is_used_twice(tmp_path: Path) -> None:
    state, matrix = factors(FC, "welore", m=8)
    dense = Dense(8)
    name = dense.weight(f"{FC}.weight", matrix.T)
    dense.add("MatMul", name).add("Relu").add("MatMul", name)
    report = imported(tmp_path, dense, state)
    assert report.modules[0].products == 2
    assert op_types(tmp_path / "o.onnx") == ["MatMul", "MatMul", "Relu", "MatMul", "MatMul"]
    assert elements(tmp_path / "o.onnx") == 3 * (8 + 8)


def test_a_weight_that_is_used_in_both_senses(tmp_path: Path) -> None:
    state, matrix = factors(FC, "welore", m=8)
    dense = Dense(8, rank=2)
    name = dense.weight(f"{FC}.weight", matrix)
    dense.add("Gemm", name, transB=1).add("Relu").add("Gemm", name)
    report = imported(tmp_path, dense, state)
    assert report.modules[0].products == 1
    assert report.notes == [f"1 of 1 leave the dense weight where it is, since something else reads it: {FC}"]
    assert op_types(tmp_path / "o.onnx") == ["Gemm", "Gemm", "Relu", "Gemm"]
    x = random(3, 8)
    assert close(run(tmp_path / "o.onnx", x), run(tmp_path / "m.onnx", x))


def test_square_factors_are_told_apart_by_value(tmp_path: Path) -> None:
    left, right = random(8, 8), random(8, 8, seed=1)
    for stored in (right, right.T):
        imported(tmp_path, Dense(8).linear(FC, left @ right), {f"{FC}.U": left, f"{FC}.V": stored})
        x = random(2, 5, 8)
        assert close(run(tmp_path / "o.onnx", x), run(tmp_path / "m.onnx", x))


def test_a_row_by_a_column(tmp_path: Path) -> None:
    state, matrix = factors(FC, "welore")
    dense = Dense(5).add("MatMul", "")
    dense.nodes[0].input[:] = [dense.weight(f"{FC}.weight", matrix), "x"]
    dense.input.type.tensor_type.shape.dim[1].dim_value = 8
    imported(tmp_path, dense, state)
    assert op_types(tmp_path / "o.onnx") == ["MatMul", "MatMul"]
    x = random(2, 8, 5)
    assert close(run(tmp_path / "o.onnx", x), run(tmp_path / "m.onnx", x))


def test_factors_that_the_graph_holds_already(tmp_path: Path) -> None:
    state, matrix = factors(FC, "welore")
    there, _ = factors("model.layers.1.fc1", "svd-llm", m=12, n=12)
    stem = "model.layers.1.fc1"
    dense = Dense(8).linear(FC, matrix)
    for part in ("v", "u"):
        dense.linear(f"{stem}_{part}_proj", there[f"{stem}_{part}_proj.weight"])
    report = imported(tmp_path, dense, {**state, **there})
    assert [(row.name, row.present, row.after) for row in report.modules] == [(FC, False, 60), (stem, True, 72)]
    assert report.notes == ["1 of 2 stood in the graph already: model.layers.1.fc1"]
    assert op_types(tmp_path / "o.onnx") == ["MatMul"] * 4
    (tmp_path / "o.onnx").unlink()
    assert "the graph holds all of its factors already" in refused(tmp_path, dense, there)
    there[f"{stem}_u_proj.weight"] = there[f"{stem}_u_proj.weight"] * 1.1
    assert "holds factors of this name with other numbers" in refused(tmp_path, dense, {**state, **there})


# -- dtypes ------------------------------------------------------------------------------------------------------------


def test_a_state_dict_narrower_than_the_graph(tmp_path: Path) -> None:
    state, matrix = pivot_state(FC, 12, 8, 3)
    half = {key: array.astype(np.float16) if array.dtype == np.float32 else array for key, array in state.items()}
    report = imported(tmp_path, Dense(8).linear(FC, matrix), half)
    assert 1e-5 < (report.modules[0].difference or 0) < 2e-3
    assert report.verification.verdict == "measured"
    assert report.verification.max_rel < 5e-3


# -- replace -----------------------------------------------------------------------------------------------------------


def test_the_graph_of_the_network_before_it_was_compressed(tmp_path: Path) -> None:
    state, matrix = factors(FC, "welore")
    dense = Dense(8).linear(FC, random(12, 8, seed=9), random(12))
    assert "the product of its factors is not the weight in the graph: relative difference 1" in refused(
        tmp_path, dense, state
    )
    report = imported(tmp_path, Dense(8).linear(FC, random(12, 8, seed=9), random(12)), state, replace=True)
    assert report.verification.verdict == "measured"
    assert report.verification.max_rel > 0.1
    x = random(2, 5, 8)
    assert close(run(tmp_path / "o.onnx", x), x @ matrix.T + random(12))


def test_replacing_looks_at_names_only(tmp_path: Path) -> None:
    state, matrix = factors(FC, "welore")
    told = refused(tmp_path, Dense(8).linear("onnx::MatMul_1", matrix), state, replace=True)
    assert "no product of the graph has this name (factors, 12x8)" in told
    assert "fc1" in told
    # One part of a name in common is too little, where nothing is compared.
    assert "has this name" in refused(tmp_path, Dense(8).linear("fc1", matrix), state, replace=True)


# -- what is refused ---------------------------------------------------------------------------------------------------


def without(key: str) -> Callable[[Arrays], None]:
    return lambda state: state.__delitem__(key)


def with_(key: str, array: np.ndarray) -> Callable[[Arrays], None]:
    return lambda state: state.update({key: array})


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("pifa", without(f"{FC}.true_idx"), f"has {FC}.false_idx and lacks {FC}.true_idx"),
        ("pifa", without(f"{FC}.false_idx"), f"has {FC}.true_idx and lacks {FC}.false_idx"),
        ("pifa", without(f"{FC}.ALinear.weight"), f"lacks {FC}.ALinear.weight"),
        ("pifa", with_(f"{FC}.ALinear.weight", random(9, 4)), "do not belong together"),
        ("pifa", with_(f"{FC}.true_idx", np.arange(9)), "do not name each of the 12 rows once"),
        ("pifa", with_(f"{FC}.bias", random(12)), "is not zero, and the graph's layer adds no bias (PIFA's own layer"),
        ("pifa", with_(f"{FC}.BLinear.weight", random(3, 7)), "is 12x8 in the graph, the factors give 12x7"),
        ("welore", with_(f"{FC}.U.bias", random(12)), "is not zero, and the graph's layer adds no bias"),
        ("welore", with_(f"{FC}.V.bias", random(3)), "is a bias between the factors"),
        ("welore", with_(f"{FC}.V.weight", random(4, 8)), "do not belong together"),
        ("welore", with_(f"{FC}.U.weight", random(12, 3, seed=8)), "is not the weight in the graph"),
        ("sst", with_(f"{FC}.S", random(4)), "and 4 numbers between do not belong together"),
        ("svd-llm", without("model.layers.0.fc1_v_proj.weight"), "lacks model.layers.0.fc1_v_proj.weight"),
    ],
)
def test_one_line_of_refusal(tmp_path: Path, kind: str, change: Callable[[Arrays], None], told: str) -> None:
    state, matrix = factors(FC, kind)
    change(state)
    assert told in refused(tmp_path, Dense(8).linear(FC, matrix), state)


def test_a_module_that_the_graph_does_not_have(tmp_path: Path) -> None:
    state, matrix = factors(FC, "welore")
    state |= {"another.U.weight": random(6, 2), "another.V.weight": random(2, 6)}
    told = refused(tmp_path, Dense(8).linear(FC, matrix), state)
    assert "another: no product of the graph has this name, or the numbers of this product (factors, 6x6)" in told


def test_no_factors_at_all(tmp_path: Path) -> None:
    assert "holds no factorised module" in refused(tmp_path, Dense(8).linear(FC, random(4, 8)), {"w": random(2)})


def test_a_sequential_that_the_graph_does_not_have_is_none_of_our_business(tmp_path: Path) -> None:
    state, matrix = factors(FC, "welore")
    state |= {"head.0.weight": random(6, 12), "head.1.weight": random(5, 6), "blocks.0.weight": random(3)}
    state["blocks.1.weight"] = random(3, 3)
    report = imported(tmp_path, Dense(8).linear(FC, matrix), state)
    assert [row.name for row in report.modules] == [FC]
    only_unsure = {key: array for key, array in state.items() if key.startswith("head")}
    (tmp_path / "o.onnx").unlink()
    assert "none of its modules is in the graph" in refused(tmp_path, Dense(8).linear(FC, matrix), only_unsure)


def test_two_places_with_the_same_numbers(tmp_path: Path) -> None:
    state, matrix = factors(FC, "welore", m=8)
    dense = Dense(8).linear("onnx::MatMul_1", matrix, node="one").add("Relu").linear("onnx::MatMul_2", matrix, node="b")
    assert "fits 2 places of the graph: one, b" in refused(tmp_path, dense, state)


def test_two_modules_for_one_weight(tmp_path: Path) -> None:
    state, matrix = factors(FC, "welore")
    again, _ = factors("model.layers.1.fc1", "welore")
    assert "is the same product of the graph as" in refused(tmp_path, Dense(8).linear(FC, matrix), {**state, **again})


def test_a_bias_that_is_the_graphs(tmp_path: Path) -> None:
    state, matrix = pivot_state(FC, 12, 8, 3)
    bias = random(12)
    for how in ("matmul", "gemm", "conv"):
        dense = Dense(8, image=how == "conv", rank=2 if how == "gemm" else 3).linear(FC, matrix, bias, how=how)
        report = imported(tmp_path, dense, {**state, f"{FC}.bias": bias})
        assert report.verification.verdict == "passed"
        (tmp_path / "o.onnx").unlink()
        told = refused(tmp_path, dense, {**state, f"{FC}.bias": bias + 1})
        assert "is not the bias that the graph's layer adds" in told


def test_a_result_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.importing import formats

    state, matrix = factors(FC, "welore")
    right = formats.Module.second
    calls: list[int] = []

    def wrong(self: formats.Module, *arguments: object) -> np.ndarray:
        calls.append(1)
        return right(self, *arguments) * (1.0 if len(calls) == 1 else 1.01)  # type: ignore[arg-type]

    monkeypatch.setattr(formats.Module, "second", wrong)
    with pytest.raises(GateFailed, match="with the factors the graph computes something else"):
        imported(tmp_path, Dense(8).linear(FC, matrix), state)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "s.safetensors"]


# -- adapters ----------------------------------------------------------------------------------------------------------

A, B = random(2, 8), random(12, 2, seed=1)
LORA = {"layers.0.fc1.lora_A.weight": A, "layers.0.fc1.lora_B.weight": B}


@pytest.mark.parametrize("how", ["matmul", "gemm", "conv"])
def test_an_adapter_stands_beside_its_layer(tmp_path: Path, how: str) -> None:
    matrix, bias = random(12, 8, seed=4), random(12)
    rank = 2 if how == "gemm" else 3
    dense = Dense(8, image=how == "conv", rank=rank).linear("layers.0.fc1", matrix, bias, how=how)
    tensors = {key: array[:, :, None, None] for key, array in LORA.items()} if how == "conv" else LORA
    model = dense.save(tmp_path / "m.onnx")
    report = import_factors(model, adapter(tmp_path / "lora", tensors), tmp_path / "o.onnx")
    assert (report.modules[0].form, report.modules[0].difference) == ("adapter", None)
    assert report.verification.verdict == "measured"
    operator = {"matmul": "MatMul", "gemm": "Gemm", "conv": "Conv"}[how]
    assert sorted(op_types(tmp_path / "o.onnx")) == sorted([operator] * 3 + ["Add"] * (2 if how == "matmul" else 1))
    expected = Dense(8, image=how == "conv", rank=rank).linear("layers.0.fc1", matrix + 2 * B @ A, bias, how=how)
    x = random(2, 8, 6, 6) if how == "conv" else random(*[3, 5][: rank - 1], 8)
    assert close(run(tmp_path / "o.onnx", x), run(expected.save(tmp_path / "e.onnx"), x))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 16}, 8.0),
        ({"lora_alpha": 3, "use_rslora": True}, 3 / math.sqrt(2)),
        ({"alpha_pattern": {"fc1": 2}}, 1.0),
        ({"alpha_pattern": {"layers.0.fc1": 6, "fc1": 2}}, 3.0),
        ({"alpha_pattern": {"no|fc1": 6}}, 3.0),
        ({"alpha_pattern": {r"layers\.\d+\.fc[12]": 6}}, 3.0),
        ({"alpha_pattern": {"c1": 2}, "rank_pattern": {"fc1": 2}, "r": 64}, 2.0),
        ({"fan_in_fan_out": True}, 2.0),
    ],
)
def test_the_scale_of_an_adapter(tmp_path: Path, settings: dict[str, object], scale: float) -> None:
    matrix = random(12, 8, seed=4)
    model = Dense(8).linear("layers.0.fc1", matrix).save(tmp_path / "m.onnx")
    import_factors(model, adapter(tmp_path / "lora", LORA, **settings), tmp_path / "o.onnx")
    x = random(2, 5, 8)
    assert close(run(tmp_path / "o.onnx", x), x @ (matrix + scale * B @ A).T)


def test_the_adapter_of_a_table(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    table = random(20, 6)
    dense = Dense(3)
    dense.input = helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", 4])
    dense.add("Gather", "x")
    dense.nodes[0].input[:] = [dense.weight("embed.weight", table), "x"]
    dense.linear("head", random(5, 6))
    a, b = random(2, 20), random(6, 2)
    tensors = {"embed.lora_embedding_A": a, "embed.lora_embedding_B": b}
    import_factors(dense.save(tmp_path / "m.onnx"), adapter(tmp_path / "lora", tensors), tmp_path / "o.onnx")
    assert op_types(tmp_path / "o.onnx") == ["Gather", "Gather", "MatMul", "Add", "MatMul"]
    x = np.array([[0, 19, 3, 7]])
    assert close(run(tmp_path / "o.onnx", x), (table + 2 * (b @ a).T)[x] @ random(5, 6).T)


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model.model.", ""])
def test_prefixes_and_the_name_of_the_adapter(tmp_path: Path, prefix: str) -> None:
    named = {key.replace(".weight", ".default.weight"): array for key, array in LORA.items()}
    model = Dense(8).linear("layers.0.fc1.base_layer", random(12, 8)).save(tmp_path / "m.onnx")
    report = import_factors(model, adapter(tmp_path / "lora", named, prefix=prefix), tmp_path / "o.onnx")
    assert report.modules[0].by == "weight name"


@pytest.mark.parametrize(
    ("more", "settings", "told"),
    [
        ({}, {"use_dora": True}, "use_dora: is of DoRA"),
        ({"layers.0.fc1.lora_magnitude_vector": random(12)}, {}, "lora_magnitude_vector is of DoRA"),
        ({"head.modules_to_save.weight": random(3, 3)}, {}, "replaces a whole module"),
        ({"layers.0.fc1.bias": random(12)}, {}, "is a bias that was trained beside the adapter"),
        ({}, {"modules_to_save": ["head"]}, "modules_to_save: head were trained as a whole"),
        ({}, {"r": 4}, "the adapter has rank 2, adapter_config.json says 4"),
        ({"layers.0.fc1.lora_B.weight": B * np.nan}, {}, "holds NaN or infinity"),
        ({}, {"peft_type": "LOHA"}, "is an adapter of the kind LOHA; only LORA"),
        ({}, {"lora_alpha": None}, "is no configuration of a LoRA adapter"),
        ({"layers.0.fc1.lora_A.b.weight": A, "layers.0.fc1.lora_B.b.weight": B}, {}, "holds several adapters"),
        ({"layers.0.fc2.lora_A.weight": A}, {}, "lacks lora_B"),
        ({"layers.0.fc1.lora_A.weight": random(2, 7)}, {}, "is 12x8 in the graph, the factors give 12x7"),
        ({"layers.0.fc1.lora_A.weight": random(3, 8)}, {}, "do not belong together"),
        ({"layers.0.no.lora_A.weight": A, "layers.0.no.lora_B.weight": B}, {}, "no product of the graph has this name"),
    ],
)
def test_adapters_that_are_refused(tmp_path: Path, more: Arrays, settings: dict[str, object], told: str) -> None:
    model = Dense(8).linear("layers.0.fc1", random(12, 8)).save(tmp_path / "m.onnx")
    with pytest.raises(BadInput) as caught:
        import_factors(model, adapter(tmp_path / "lora", {**LORA, **more}, **settings), tmp_path / "o.onnx")
    assert told in str(caught.value)
    assert not (tmp_path / "o.onnx").exists()


def test_an_adapter_without_its_configuration(tmp_path: Path) -> None:
    assert "there is no adapter_config.json" in refused(tmp_path, Dense(8).linear("layers.0.fc1", random(12, 8)), LORA)


def test_an_adapter_needs_more_than_one_part_of_a_name(tmp_path: Path) -> None:
    model = Dense(8).linear("decoder.fc1", random(12, 8)).save(tmp_path / "m.onnx")
    tensors = {"fc1.lora_A.weight": A, "fc1.lora_B.weight": B}
    with pytest.raises(BadInput, match="no product of the graph has this name"):
        import_factors(model, adapter(tmp_path / "lora", tensors), tmp_path / "o.onnx")


def test_the_rank_that_a_pattern_says(tmp_path: Path) -> None:
    model = Dense(8).linear("layers.0.fc1", random(12, 8)).save(tmp_path / "m.onnx")
    folder = adapter(tmp_path / "lora", LORA, r=4, rank_pattern={"fc1": 2})
    assert import_factors(model, folder, tmp_path / "o.onnx").modules[0].rank == 2


# ---- what else the checkpoint says of the graph ----------------------------------------------------------------------


def test_another_tensor_of_the_checkpoint_differs(tmp_path: Path) -> None:
    """The graph is of another network, or of another state of it: what is not imported would be silently old."""
    state, matrix = factors(FC, KINDS[0])
    head = random(4, 12)
    dense = Dense(8).linear(FC, matrix).add("Relu").linear("head", head, random(4), how="matmul")
    same = {**state, "model.head.bias": random(4)}
    imported(tmp_path, dense, same)
    (tmp_path / "o.onnx").unlink()
    other = {**state, "model.head.bias": random(4) + 1}
    assert "head.bias is another tensor in the graph" in refused(tmp_path, dense, other)
    report = imported(tmp_path, dense, other, replace=True)
    assert any("1 tensors are others in the graph" in note for note in report.notes)


def test_the_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    state, matrix = factors(FC, KINDS[0])
    model = Dense(8).linear(FC, matrix).save(tmp_path / "m.onnx")
    path = save_state(tmp_path / "s.safetensors", state)
    before = path.read_bytes()
    with pytest.raises(BadInput, match="is the checkpoint: it would be overwritten"):
        import_factors(model, path, path)
    assert path.read_bytes() == before


def test_factors_that_are_not_finite(tmp_path: Path) -> None:
    state, matrix = factors(FC, KINDS[0])
    broken = {key: array * np.float32("nan") if array.dtype.kind == "f" else array for key, array in state.items()}
    assert "holds NaN or infinity" in refused(tmp_path, Dense(8).linear(FC, matrix), broken, replace=True)
