"""The file that the parser is given: which weights are copied, and which are not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.engines.preparing import describe_model, write_for_parser
from graphopt.files.load import load_model
from graphopt.inlining import inline_all


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with a function and a weight outside of the file, in a folder below it."""
    folder = tmp_path / "source"
    (folder / "weights").mkdir(parents=True)
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20, "own" : 1]> g (float[2, 3] x) => (float[2, 2] y)'
        " <float[3, 2] w = {1,2,3,4,5,6}> { y = own.Twice(x, w) }"
        ' <domain: "own", opset_import: ["" : 20]> Twice (a, w) => (b) { c = MatMul(a, w) b = Add(c, c) }'
    )
    ir.save(model, folder / "model.onnx", external_data="weights/w.data", size_threshold_bytes=0)
    return folder / "model.onnx"


def test_weights_in_files_stay_where_they_are(source: Path, tmp_path: Path) -> None:
    model = load_model(source)
    assert inline_all(model)
    content = ir.tensor(np.full((32, 32), 2, np.float32), name="added")
    added = ir.Value(name="added", const_value=content)
    small = ir.Value(name="small", const_value=ir.tensor(np.ones(2, np.int64), name="small"))
    model.graph.register_initializer(added)
    model.graph.register_initializer(small)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    written = write_for_parser(model, scratch)
    link = scratch / "weights" / "w.data"
    assert link.is_symlink() and link.samefile(source.parent / "weights" / "w.data")
    plain = onnx.load(written, load_external_data=False)
    assert not plain.functions
    assert {one.name: bool(one.external_data) for one in plain.graph.initializer} == {
        "w": True,
        "added": True,
        "small": False,
    }
    assert link.read_bytes() == np.arange(1, 7, dtype=np.float32).tobytes()
    assert (scratch / "graphopt-weights.data").read_bytes() == content.tobytes()


def test_the_hash_covers_the_data(source: Path) -> None:
    told = describe_model(load_model(source), source)
    data = source.parent / "weights" / "w.data"
    assert told == {
        "name": "model.onnx",
        "sha256": hashlib.sha256(source.read_bytes() + data.read_bytes()).hexdigest(),
        "data_files": ["weights/w.data"],
    }


@pytest.mark.slow
def test_more_weights_than_a_file_can_hold(tmp_path: Path) -> None:
    """2.2 GB in a data file (of holes), and a graph that has to be rewritten: nothing of them is copied or read."""
    count, size = 17, 8192
    bytes_each = size * size * 2
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(count * bytes_each)
    calls = " ".join(f"x{index + 1} = own.Block(x{index}, w{index})" for index in range(count))
    weights = ", ".join(f"float16[{size}, {size}] w{index}" for index in range(count))
    text = f"""<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
        g (float16[1, {size}] x0, {weights}) => (float16[1, {size}] x{count}) {{ {calls} }}
        <domain: "own", opset_import: ["" : 20]> Block (a, w) => (b) {{ c = MatMul(a, w)  b = Relu(c) }}"""
    model = ir.from_onnx_text(text)
    for index, value in enumerate(list(model.graph.inputs)[1:]):
        value.const_value = ir.ExternalTensor(
            "w.data",
            index * bytes_each,
            bytes_each,
            ir.DataType.FLOAT16,
            shape=ir.Shape([size, size]),
            name=f"w{index}",
            base_dir=tmp_path,
        )
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    (tmp_path / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    loaded = load_model(tmp_path / "model.onnx")
    assert inline_all(loaded)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    written = write_for_parser(loaded, scratch)
    assert sum(path.lstat().st_size for path in scratch.iterdir()) < 1 << 20
    assert (scratch / "w.data").stat().st_size == count * bytes_each > 2**31
    plain = onnx.load(written, load_external_data=False)
    assert len(plain.graph.node) == 2 * count and not plain.functions
