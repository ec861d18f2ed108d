from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import xxhash

from graphopt.errors import BadInput, GraphoptError
from graphopt.files import load_model, placement, save_model, stage_model
from tests.files import sources

SHAPE = (67, 67)  # an odd number of elements: the last byte of 4-bit types is half used


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def set_weight(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> None:
    model.graph.initializers[name].const_value = tensor


def reversed_tensor(weight: ir.TensorProtocol) -> ir.TensorProtocol:
    if isinstance(weight, ir.StringTensor):
        return ir.StringTensor(list(weight.string_data())[::-1], shape=ir.Shape(weight.shape.numpy()))
    return ir.Tensor(np.ascontiguousarray(weight.numpy()[::-1, ::-1]), dtype=weight.dtype)


@pytest.mark.parametrize("external", [False, True], ids=["embedded", "external"])
@pytest.mark.parametrize("state", ["untouched", "touched", "new", "lazy"])
@pytest.mark.parametrize("dtype", [*sources.DTYPES, sources.STRING])
def test_every_dtype_round_trips_exactly(tmp_path: Path, dtype: str, state: str, external: bool) -> None:
    proto = sources.model([sources.tensor("w", dtype, SHAPE), sources.tensor("small", dtype, (1, 3), seed=1)])
    before = sources.contents(load_model(sources.write(proto, tmp_path / "plain.onnx")))
    model = load_model(sources.write(proto, tmp_path / "in.onnx", external=external))
    if state == "touched":
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            value.const_value.numpy()
    evaluated = 0
    if state in ("new", "lazy"):
        for name, value in model.graph.initializers.items():
            weight = value.const_value
            assert weight is not None
            new = reversed_tensor(weight)

            def evaluate(new: ir.TensorProtocol = new) -> ir.TensorProtocol:
                nonlocal evaluated
                evaluated += 1
                return new

            lazy = state == "lazy" and dtype != sources.STRING
            shape = ir.Shape(new.shape.numpy())
            set_weight(model, name, ir.LazyTensor(evaluate, dtype=new.dtype, shape=shape) if lazy else new)
            data = tuple(new.string_data()) if isinstance(new, ir.StringTensor) else new.tobytes()
            before = {**before, name: (dtype, tuple(new.shape.numpy()), data)}

    saved = save_model(model, tmp_path / "out.onnx")

    assert sources.contents(load_model(saved)) == before
    assert sources.contents(model) == before
    if state == "lazy" and dtype != sources.STRING:
        assert evaluated == 4  # two weights: once each by the save, once each by the line above
    data_files = [name for name in listing(tmp_path) if name.endswith(".data")]
    assert len(data_files) == (1 if external and dtype != sources.STRING else 0)


def test_embedded_float_data_stays_as_it_is(tmp_path: Path) -> None:
    proto = sources.model([onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])])
    saved = save_model(load_model(sources.write(proto, tmp_path / "in.onnx")), tmp_path / "out.onnx")
    assert onnx.load(saved).graph.initializer[0] == proto.graph.initializer[0]


def test_data_file_is_named_by_its_content_and_aligned(tmp_path: Path) -> None:
    tensors = [sources.tensor(f"w{i}", "FLOAT", (n,), seed=i) for i, n in enumerate((300, 301, 400_000, 5))]
    model = load_model(sources.write(sources.model(tensors), tmp_path / "in.onnx", external=True))
    saved = save_model(model, tmp_path / "out.onnx")
    (name,) = [name for name in listing(tmp_path) if name.endswith(".data")]
    assert name == f"out.{xxhash.xxh3_128((tmp_path / name).read_bytes()).hexdigest()}.data"
    written = {t.name: t for t in onnx.load(saved, load_external_data=False).graph.initializer}
    places = {n: {e.key: e.value for e in t.external_data} for n, t in written.items()}
    assert places["w3"] == {} and len(written["w3"].raw_data) == 20  # small: inline
    assert {places[n]["location"] for n in ("w0", "w1", "w2")} == {name}
    assert [int(places[n]["offset"]) for n in ("w0", "w1", "w2")] == [0, 1216, 4096]
    onnx.checker.check_model(str(saved))
    loaded = onnx.load(saved).graph.initializer
    assert [t.raw_data for t in loaded] == [
        sources.tensor(t.name, "FLOAT", t.dims, i).raw_data for i, t in enumerate(loaded)
    ]


def test_a_shared_tensor_is_written_once(tmp_path: Path) -> None:
    model = load_model(
        sources.write(
            sources.model([sources.tensor(n, "FLOAT", (1000,)) for n in ("a", "b", "c")]),
            tmp_path / "in.onnx",
            external=True,
        )
    )
    shared = ir.tensor(np.arange(1000, dtype=np.float32))
    set_weight(model, "a", shared)
    set_weight(model, "b", shared)
    saved = save_model(model, tmp_path / "out.onnx")
    (data,) = tmp_path.glob("out.*.data")
    assert data.stat().st_size == 2 * 4000 + 32  # one padding to 64 bytes
    again = save_model(load_model(saved), tmp_path / "again.onnx")
    (data,) = tmp_path.glob("again.*.data")
    assert data.stat().st_size == 2 * 4000 + 32
    assert sources.contents(load_model(again)) == sources.contents(model)
    assert list(load_model(again).graph.initializers) == ["a", "b", "c"]


@pytest.mark.parametrize("external", [False, True], ids=["embedded", "external"])
def test_saving_in_place_twice_keeps_size_bytes_and_tensors(tmp_path: Path, external: bool) -> None:
    proto = sources.model([sources.tensor("w", "FLOAT", (100, 100)), sources.tensor("v", "INT4", (33, 77))])
    expected = sources.contents(load_model(sources.write(proto, tmp_path / "plain.onnx")))
    (tmp_path / "plain.onnx").unlink()
    target = sources.write(proto, tmp_path / "m.onnx", external=external)
    save_model(load_model(target), target)
    first = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}
    model = load_model(target)
    for _ in range(3):
        save_model(model, target)
        assert {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)} == first
        assert sources.contents(model) == expected
    assert len(first) == (3 if external else 1)  # the user's own data file is never removed


def test_saving_a_changed_model_in_place_removes_its_old_data_and_keeps_its_tensors_usable(tmp_path: Path) -> None:
    proto = sources.model([sources.tensor("w", "FLOAT", (100, 100)), sources.tensor("v", "INT4", (33, 77))])
    source = sources.write(proto, tmp_path / "source.onnx", external=True)
    target = save_model(load_model(source), tmp_path / "m.onnx")
    model = load_model(target)
    (old,) = tmp_path.glob("m.*.data")
    set_weight(model, "w", ir.tensor(np.ones((100, 100), np.float32)))
    save_model(model, target)
    (new,) = tmp_path.glob("m.*.data")
    assert new != old
    assert sources.contents(model) == sources.contents(load_model(target))  # "v" was still mapped from the old file
    assert sources.contents(model)["v"] == sources.contents(load_model(source))["v"]


def test_old_data_that_another_model_refers_to_is_kept(tmp_path: Path) -> None:
    source = sources.write(
        sources.model([sources.tensor("w", "FLOAT", (1000,))]), tmp_path / "source.onnx", external=True
    )
    target = save_model(load_model(source), tmp_path / "m.onnx")
    (tmp_path / "copy.onnx").write_bytes(target.read_bytes())
    model = load_model(target)
    set_weight(model, "w", ir.tensor(np.ones(1000, np.float32)))
    save_model(model, target)
    assert sources.contents(load_model(tmp_path / "copy.onnx")) == sources.contents(load_model(source))
    (tmp_path / "copy.onnx").unlink()
    save_model(model, target)
    assert len(list(tmp_path.glob("m.*.data"))) == 1


def test_other_targets_data_is_not_taken_for_ours(tmp_path: Path) -> None:
    source = sources.write(
        sources.model([sources.tensor("w", "FLOAT", (1000,))]), tmp_path / "source.onnx", external=True
    )
    save_model(load_model(source), tmp_path / "m.opt.onnx")
    (tmp_path / "m.notes.data").write_text("mine")
    before = listing(tmp_path)
    save_model(load_model(source), tmp_path / "m.onnx")
    assert set(before) < set(listing(tmp_path))


def test_an_external_model_stays_external_when_every_weight_is_new(tmp_path: Path) -> None:
    source = sources.write(sources.model([sources.tensor("w", "FLOAT", (1000,))]), tmp_path / "in.onnx", external=True)
    model = load_model(source).clone()
    set_weight(model, "w", ir.tensor(np.ones(1000, np.float32)))
    save_model(model, tmp_path / "out.onnx")
    assert len(list(tmp_path.glob("out.*.data"))) == 1


def test_too_much_for_one_protobuf_goes_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "EMBED_LIMIT", 3999)
    source = sources.write(sources.model([sources.tensor("w", "FLOAT", (1000,))]), tmp_path / "in.onnx")
    saved = save_model(load_model(source), tmp_path / "out.onnx")
    assert len(list(tmp_path.glob("out.*.data"))) == 1
    assert sources.contents(load_model(saved)) == sources.contents(load_model(source))


def external_constant(folder: Path) -> Path:
    """A model whose weights are in a body of an If and in Constant nodes, all external."""
    helper, kind = onnx.helper, onnx.TensorProto
    blob = b"".join(sources.payload("FLOAT", 500, seed) for seed in range(3))
    (folder / "in.bin").write_bytes(blob)
    tensors = []
    for index, name in enumerate(("in_body", "constant", "in_function")):
        proto = kind(name=name, data_type=kind.FLOAT, dims=[500])
        sources.make_external(proto, "in.bin", index * 2000, 2000)
        tensors.append(proto)
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["in_body"], ["t"])], "then", [], [value("t", 1, [500])], [tensors[0]]
    )
    other = helper.make_graph(
        [helper.make_node("Constant", [], ["e"], value=tensors[1])], "else", [], [value("e", 1, [500])]
    )
    nodes = [
        helper.make_node("If", ["c"], ["x"], then_branch=body, else_branch=other),
        helper.make_node("F", ["x"], ["y"], domain="local"),
    ]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    function = helper.make_function(
        "local",
        "F",
        ["a"],
        ["b"],
        [helper.make_node("Constant", [], ["k"], value=tensors[2]), helper.make_node("Add", ["a", "k"], ["b"])],
        imports[:1],
    )
    graph = helper.make_graph(nodes, "g", [value("c", kind.BOOL, [])], [value("y", 1, [500])])
    proto = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)
    (folder / "in.onnx").write_bytes(proto.SerializeToString())
    return folder / "in.onnx"


def attribute_bytes(model: ir.Model) -> list[bytes]:
    from graphopt.graphs import all_graphs

    found = []
    for graph in all_graphs(model):
        found += [v.const_value.tobytes() for v in graph.initializers.values() if v.const_value is not None]
        found += [n.attributes["value"].as_tensor().tobytes() for n in graph if n.op_type == "Constant"]
    return sorted(found)


def test_external_tensors_in_bodies_constants_and_functions_round_trip(tmp_path: Path) -> None:
    source = external_constant(tmp_path)
    expected = sorted(sources.payload("FLOAT", 500, seed) for seed in range(3))
    target = save_model(load_model(source), tmp_path / "out.onnx")
    assert attribute_bytes(load_model(target)) == expected
    (old,) = tmp_path.glob("out.*.data")
    model = load_model(target)  # mapped nowhere yet: what is not found in the new file is lost
    body = model.graph.node(0).attributes["then_branch"].as_graph()
    body.initializers["in_body"].const_value = ir.tensor(np.zeros(500, np.float32))
    save_model(model, target)
    (new,) = tmp_path.glob("out.*.data")
    assert new != old
    changed = sorted([bytes(2000), *(sources.payload("FLOAT", 500, seed) for seed in (1, 2))])
    assert attribute_bytes(model) == changed
    assert attribute_bytes(load_model(target)) == changed


def test_names_docs_and_metadata_are_kept(tmp_path: Path) -> None:
    proto = sources.model([sources.tensor("w", "FLOAT", (3,))])
    proto.doc_string, proto.domain, proto.model_version = "about", "org", 7
    proto.metadata_props.add(key="k", value="v")
    proto.graph.doc_string = "graph"
    proto.graph.node[0].doc_string = "node"
    proto.graph.node[0].metadata_props.add(key="nk", value="nv")
    saved = save_model(load_model(sources.write(proto, tmp_path / "in.onnx")), tmp_path / "out.onnx")
    found = onnx.load(saved)
    found.graph.ClearField("value_info")  # onnx_ir adds the types of weights
    assert found == proto


def test_staged_save_is_loadable_and_leaves_the_target_alone(tmp_path: Path) -> None:
    source = sources.write(sources.model([sources.tensor("w", "FLOAT", (1000,))]), tmp_path / "in.onnx", external=True)
    before = listing(tmp_path)
    content = source.read_bytes()
    with stage_model(load_model(source), source) as staged:
        assert sources.contents(load_model(staged.staged_path)) == sources.contents(load_model(source))
        assert source.read_bytes() == content
        onnx.checker.check_model(str(staged.staged_path))
    assert listing(tmp_path) == before
    staged = stage_model(load_model(source), tmp_path / "out.onnx")
    staged.discard()
    staged.discard()
    assert listing(tmp_path) == before
    with pytest.raises(GraphoptError, match="committed or discarded"):
        staged.commit()


def test_permissions_of_the_replaced_file_are_kept_and_a_link_is_replaced(tmp_path: Path) -> None:
    source = sources.write(sources.model([sources.tensor("w", "FLOAT", (1000,))]), tmp_path / "in.onnx", external=True)
    source.chmod(0o640)
    save_model(load_model(source), source)
    (data,) = tmp_path.glob("in.*.data")
    assert stat.S_IMODE(source.stat().st_mode) == stat.S_IMODE(data.stat().st_mode) == 0o640
    (tmp_path / "link.onnx").symlink_to(source)
    before = source.read_bytes()
    save_model(load_model(source), tmp_path / "link.onnx")
    assert source.read_bytes() == before and not (tmp_path / "link.onnx").is_symlink()


def test_a_relative_target_and_another_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources.write(sources.model([sources.tensor("w", "FLOAT", (1000,))]), tmp_path / "in.onnx", external=True)
    monkeypatch.chdir(tmp_path)
    model = load_model("in.onnx")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert save_model(model, "out.onnx") == tmp_path / "sub" / "out.onnx"
    assert sources.contents(load_model("out.onnx")) == sources.contents(load_model("../in.onnx"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("missing/out.onnx", "missing: no such folder (mkdir -p"),
        ("folder", "folder: is a folder (give the name of the file to write)"),
    ],
)
def test_impossible_targets(tmp_path: Path, target: str, message: str) -> None:
    model = load_model(sources.write(sources.model([sources.tensor("w", "FLOAT", (3,))]), tmp_path / "in.onnx"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInput) as caught:
        save_model(model, tmp_path / target)
    assert message in str(caught.value)


def test_a_lazy_weight_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    source = sources.write(sources.model([sources.tensor("w", "FLOAT", (1000,))]), tmp_path / "in.onnx", external=True)
    model = load_model(source)
    wrong = ir.LazyTensor(lambda: ir.tensor(np.ones(999, np.float32)), dtype=ir.DataType.FLOAT, shape=ir.Shape([1000]))
    set_weight(model, "w", wrong)
    before = listing(tmp_path)
    with pytest.raises(GraphoptError, match="gives 3996 bytes, but its type and shape take 4000"):
        save_model(model, tmp_path / "out.onnx")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("external", [False, True], ids=["embedded", "external"])
def test_a_lazy_weight_that_fails_leaves_nothing(tmp_path: Path, external: bool) -> None:
    proto = sources.model([sources.tensor("w", "FLOAT", (1000,))])
    source = sources.write(proto, tmp_path / "in.onnx", external=external)
    model = load_model(source)

    def fail() -> ir.TensorProtocol:
        raise ZeroDivisionError("no scale")

    set_weight(model, "w", ir.LazyTensor(fail, dtype=ir.DataType.FLOAT, shape=ir.Shape([1000])))
    before = listing(tmp_path)
    with pytest.raises((GraphoptError, ZeroDivisionError), match="no scale"):
        save_model(model, tmp_path / "out.onnx")
    assert listing(tmp_path) == before


def test_a_source_that_was_cut_off_after_loading_is_one_line(tmp_path: Path) -> None:
    source = sources.write(sources.model([sources.tensor("w", "FLOAT", (1000,))]), tmp_path / "in.onnx", external=True)
    model = load_model(source)
    os.truncate(tmp_path / "in.bin", 100)
    with pytest.raises(GraphoptError, match="the data file ends early"):
        save_model(model, tmp_path / "out.onnx")
    (tmp_path / "in.bin").unlink()
    with pytest.raises(GraphoptError, match="the weights cannot be read: No such file"):
        save_model(model, tmp_path / "out.onnx")
    assert listing(tmp_path) == ["in.onnx"]


def run_with_hash_seed(seed: str, source: Path, target: Path) -> None:
    code = (
        "import sys; from graphopt.files import load_model, save_model;"
        "m = load_model(sys.argv[1]); m.metadata_props.update({k: k for k in 'abc'}); save_model(m, sys.argv[2])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, "-c", code, str(source), str(target)], check=True, env=environment)


def test_hash_seeds_do_not_change_the_bytes(tmp_path: Path) -> None:
    source = external_constant(tmp_path)
    found = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        run_with_hash_seed(seed, source, folder / "out.onnx")
        found.append({name: (folder / name).read_bytes() for name in listing(folder)})
    assert found[0] == found[1] and len(found[0]) == 2


Failure = Callable[[Path], None]


@pytest.mark.parametrize("external", [False, True], ids=["embedded", "external"])
@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_full_disk_is_one_line_and_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, allowed: int
) -> None:
    proto = sources.model([sources.tensor("w", "FLOAT", (60_000,))])
    source = sources.write(proto, tmp_path / "in.onnx", external=external)
    model = load_model(source)
    before = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}
    written = 0
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal written
        written += 1
        if written > allowed:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:1000])  # a partial write, as the kernel does when little is left

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(GraphoptError) as caught:
        save_model(model, source)
    monkeypatch.undo()
    assert caught.value.exit_code == 1
    expected = f"{source}: cannot be written: No space left on device (free some space; what was there is as it was)"
    assert str(caught.value) == expected
    assert {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)} == before
    save_model(model, source)
    assert sources.contents(load_model(source)) == sources.contents(model)
