"""The networks on which the low-rank passes are tried are what they say they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.models import blocks, draw_feeds

BLOCKS: dict[str, Callable[..., ir.Model]] = {
    "mlp": blocks.mlp_block,
    "llama": blocks.llama_block,
    "llama_cache": lambda **options: blocks.llama_block(cache=True, **options),
    "bert": blocks.bert_block,
    "resnet": blocks.resnet_block,
    "resnet_down": lambda **options: blocks.resnet_block(outputs=32, stride=2, norm="kept", **options),
}


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[Any]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return list(onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feeds))


@pytest.mark.parametrize("opset", [13, 18, 21])
@pytest.mark.parametrize("name", BLOCKS)
def test_both_forms_of_a_block_are_one_function(name: str, opset: int) -> None:
    factors, product = (BLOCKS[name](form=form, opset=opset) for form in ("factors", "product"))
    feeds = draw_feeds(factors, size=6)
    if "mask" in feeds:
        feeds["mask"] = (feeds["mask"] > 0).astype(np.float32)
    for found, wanted in zip(run(product, feeds), run(factors, feeds), strict=True):
        assert found.shape == wanted.shape
        assert np.ptp(wanted) > 0.5
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("density", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_density_of_a_block_is_what_was_asked_for(name: str, density: float) -> None:
    def weights(form: str) -> int:
        model = BLOCKS[name](density=density, form=form)
        return sum(
            value.const_value.size
            for value in model.graph.initializers.values()
            if value.const_value is not None and len(value.const_value.shape) > 1
        )

    assert density - 0.05 <= weights("factors") / weights("product") <= density


def test_the_cache_of_the_llama_block_continues_it() -> None:
    model = blocks.llama_block(cache=True)
    x = draw_feeds(blocks.llama_block(), size=7)["x"]
    empty = np.zeros((7, 2, 0, 12), np.float32)
    whole, *_ = run(model, {"x": x, "past_k": empty, "past_v": empty})
    first, key, value = run(model, {"x": x[:, :4], "past_k": empty, "past_v": empty})
    second, key, _ = run(model, {"x": x[:, 4:], "past_k": key, "past_v": value})
    assert key.shape == (7, 2, 7, 12)
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(run(blocks.llama_block(), {"x": x})[0], whole, rtol=0, atol=1e-5)


def test_the_bert_block_does_not_see_padding() -> None:
    model = blocks.bert_block()
    feeds = draw_feeds(model, size=5)
    mask = np.ones((5, 5), np.float32)
    mask[:, 3:] = 0
    other = feeds["x"].copy()
    other[:, 3:] += 1
    a, b = (run(model, {"x": x, "mask": mask})[0] for x in (feeds["x"], other))
    np.testing.assert_allclose(a[:, :3], b[:, :3], rtol=0, atol=1e-5)
    assert np.abs(run(model, {"x": other, "mask": np.ones_like(mask)})[0] - b).max() > 0.01
