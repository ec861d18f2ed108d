"""Every node case of the ONNX backend tests, as it is and with its inputs made constant: not one bit may change."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.errors import BadInput
from graphopt.passes.canonical.fold_constants import FoldConstants
from graphopt.passes.canonical.inline_functions import InlineFunctions
from graphopt.passes.canonical.merge_duplicates import MergeDuplicates
from graphopt.passes.canonical.remove_branches import RemoveBranches
from graphopt.passes.canonical.remove_dead import RemoveDead
from graphopt.passes.canonical.remove_identities import RemoveIdentities
from tests.passes.common import applications, assert_same_array, run_ort, run_pass

RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}


def _cases(constant_from: int | None) -> Iterator[tuple[str, onnx.ModelProto, dict[str, object]]]:
    from onnx.backend.test.case.node import collect_testcases

    for case in collect_testcases(None):
        if case.model is None or not case.data_sets or "training" in case.name:
            continue
        if any(node.op_type in RANDOM for node in case.model.graph.node):
            continue
        inputs, _ = case.data_sets[0]
        feeds = {i.name: v for i, v in zip(case.model.graph.input, inputs, strict=False) if v is not None}
        model = case.model
        if constant_from is not None:
            model = _with_constants(case.model, feeds, constant_from)
        yield case.name, model, feeds


def _with_constants(original: onnx.ModelProto, feeds: dict[str, object], first: int) -> onnx.ModelProto:
    """The model with the inputs from the given one on turned into constants; they leave ``feeds``."""
    model = onnx.ModelProto()
    model.CopyFrom(original)
    model.ir_version = max(model.ir_version, 4)
    for index, value in reversed(list(enumerate(original.graph.input))):
        array = feeds.get(value.name)
        if index < first or not isinstance(array, np.ndarray) or array.dtype == object:
            continue
        dtype = ir.DataType(value.type.tensor_type.elem_type)
        try:
            tensor = ir.to_proto(ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), dtype=dtype))
        except TypeError:  # 4-bit arrays that numpy holds as bytes
            continue
        tensor.name = value.name
        model.graph.initializer.append(tensor)
        del model.graph.input[index]
        del feeds[value.name]
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("constant_from", [None, 0, 1], ids=["as-it-is", "all-constant", "first-input-only"])
def test_no_bit_changes(constant_from: int | None) -> None:
    ran = changed = 0
    problems: list[str] = []
    for name, model, feeds in _cases(constant_from):
        try:
            expected = run_ort(model, feeds)  # type: ignore[arg-type]
        except (BadInput, RuntimeError):
            continue
        except Exception as error:
            if type(error).__module__.startswith("onnxruntime"):
                continue
            raise
        ran += 1
        try:
            result, records = run_pass(
                ir.from_proto(model),
                InlineFunctions,
                *(FoldConstants, MergeDuplicates, RemoveBranches, RemoveDead, RemoveIdentities),
            )
            changed += applications(records) > 0
            assert_same_array(expected, run_ort(result, feeds))  # type: ignore[arg-type]
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
        except AssertionError as error:
            problems.append(f"{name}: {error}")
    assert problems == []
    assert ran > 1000
    assert changed > 200
