"""Python control flow that depends on tensors, exported: every path compared, what is refused, nothing left behind."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

from graphopt.errors import GraphoptError  # noqa: E402
from graphopt.exporting import export  # noqa: E402
from graphopt.exporting.branches.outlining import outlined  # noqa: E402
from graphopt.exporting.branches.places import HOOKS  # noqa: E402
from tests.exporting import branching  # noqa: E402

HERE = Path(branching.__file__).name


def made(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def drawn(seed: int, *shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (1 + seed % 3)


def inputs_of(module: Any, *values: Any) -> dict[str, Any]:
    return dict(zip(inspect.signature(module.forward).parameters, values, strict=False))


def leaves(returned: Any) -> list[Any]:
    return [np.asarray(leaf) for leaf in pytree.tree_leaves(returned)]


def count(path: Path, op_type: str) -> int:
    return sum(node.op_type == op_type for node in ir.load(path).graph.all_nodes())


def exported(out: Path, module: Any, inputs: dict[str, Any], axes: Any = None) -> Any:
    result = export(lambda: (module, {key: value.clone() for key, value in inputs.items()}, axes), out)
    onnx.checker.check_model(onnx.load(out))
    return result


def agree(path: Path, module: Any, cases: list[dict[str, Any]]) -> None:
    session = ort.InferenceSession(path)
    for inputs in cases:
        with torch.no_grad():
            expected = leaves(module(**{key: value.clone() for key, value in inputs.items()}))
        found = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def check_spelling(kind: Any, out: Path) -> None:
    shape = (3, 4) if kind is branching.BatchAll else (1, 4)
    module = made(kind)
    name = next(iter(inspect.signature(module.forward).parameters))
    exported(out, module, {name: drawn(1, *shape)})
    agree(out, made(kind), [{name: drawn(seed, *shape)} for seed in range(16)])


FAST = ["SwappedState"]


@pytest.mark.parametrize("name", FAST)
def test_a_spelling(tmp_path: Path, name: str) -> None:
    check_spelling(branching.SPELLINGS[name], tmp_path / "m.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in branching.SPELLINGS if name not in FAST])
def test_each_spelling(tmp_path: Path, name: str) -> None:
    check_spelling(branching.SPELLINGS[name], tmp_path / "m.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", branching.ZOO)
def test_each_path_of_the_known_families(tmp_path: Path, name: str) -> None:
    kind, first, seconds, branches, loops = branching.ZOO[name]
    module = made(kind)
    out = tmp_path / "m.onnx"
    exported(out, module, inputs_of(module, first, seconds[len(seconds) // 2]))
    agree(out, module, [inputs_of(module, first, second) for second in seconds])
    assert (count(out, "If"), count(out, "Loop")) == (branches, loops)


def test_a_loop_with_break_is_one_loop_that_stacks_what_the_list_held(tmp_path: Path) -> None:
    kind, first, seconds, _, _ = branching.ZOO["captioner"]
    module = made(kind)
    result = exported(tmp_path / "m.onnx", module, inputs_of(module, first, seconds[2]))
    model = ir.load(tmp_path / "m.onnx")
    loop = next(node for node in model.graph if node.op_type == "Loop")
    assert loop.name == f"Loop_forward_{line_of(branching.Captioner, 'for t in')}"
    assert loop.inputs[0] is not None and loop.inputs[0].const_value is not None
    assert int(loop.inputs[0].const_value.numpy()) == 8
    assert result.notes[-1].startswith("1 decision on values, every side compared in ")
    agree(tmp_path / "m.onnx", module, [inputs_of(module, first, second) for second in seconds])


def line_of(kind: Any, text: str) -> int:
    lines, start = inspect.getsourcelines(kind)
    return start + next(index for index, line in enumerate(lines) if text in line)


@pytest.mark.slow
def test_nodes_are_named_by_the_line_they_come_from(tmp_path: Path) -> None:
    exported(tmp_path / "m.onnx", made(branching.NestedIf), {"x": drawn(1, 1, 4)})
    names = [node.name for node in ir.load(tmp_path / "m.onnx").graph.all_nodes() if node.op_type == "If"]
    lines = [line_of(branching.NestedIf, f"x[0, {index}] > 0") for index in range(3)]
    assert sorted(names) == sorted(f"If_forward_{line}" for line in lines)


@pytest.mark.slow
def test_dynamic_axes(tmp_path: Path) -> None:
    class Mixed(branching.Base):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            y = self.l1(x)
            if y.mean() > 0:
                y = torch.cat([y, x], 1)
            while y.abs().max() > 0.5:
                y = y * 0.7
            return y.mean(1), y

    module = made(Mixed)
    axes = {"x": {0: "batch", 1: "time"}}
    exported(tmp_path / "m.onnx", module, {"x": drawn(1, 2, 5, 4)}, axes)
    agree(tmp_path / "m.onnx", module, [{"x": drawn(n, 1 + n % 3, 1 + n % 7, 4)} for n in range(12)])


@pytest.mark.slow
def test_a_loop_over_a_dynamic_axis(tmp_path: Path) -> None:
    class Steps(branching.Base):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            h = x.new_zeros(4)
            for t in range(x.shape[0]):
                h = torch.tanh(self.l1(x[t] + h))
                if h.sum() > 1.0:
                    break
            return h

    module = made(Steps)
    exported(tmp_path / "m.onnx", module, {"x": drawn(1, 5, 4)}, {"x": {0: "time"}})
    assert count(tmp_path / "m.onnx", "Loop") == 1
    agree(tmp_path / "m.onnx", module, [{"x": drawn(n, 1 + n % 7, 4)} for n in range(14)])


class Operators(branching.Base):
    def forward(self, x: Any) -> Any:
        y = torch.cond(x.sum() > 0, lambda v: self.l1(v), lambda v: self.l2(v), (x,))
        turns, z = torch._higher_order_ops.while_loop(
            lambda n, v: v.abs().max() > 0.1, lambda n, v: (n + 1, v * 0.5), (torch.zeros((), dtype=torch.int64), y)
        )
        if z.sum() > 0:
            z = z + 1
        return z, turns


@pytest.mark.slow
def test_torchs_own_operators_beside_python_control_flow(tmp_path: Path) -> None:
    module = made(Operators)
    exported(tmp_path / "m.onnx", module, {"x": drawn(1, 3, 4)})
    agree(tmp_path / "m.onnx", module, [{"x": drawn(seed, 3, 4)} for seed in range(8)])
    assert (count(tmp_path / "m.onnx", "If"), count(tmp_path / "m.onnx", "Loop")) == (2, 1)


class Scripted(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            x = torch.tanh(x) * 1.5
            if bool(x.abs().max() < 0.5):
                break
        if bool(x.sum() > 0):
            return x
        return -x * 2


def test_a_scripted_module(tmp_path: Path) -> None:
    module = torch.jit.script(Scripted().eval())
    result = exported(tmp_path / "m.onnx", module, {"x": drawn(1, 3, 4)}, {"x": {0: "batch"}})
    assert result.notes[-1].startswith("a scripted module: ")
    agree(tmp_path / "m.onnx", module, [{"x": drawn(seed, 1 + seed % 4, 4) * 0.4} for seed in range(12)])
    assert count(tmp_path / "m.onnx", "Loop") == 1


def refusal(kind: Any, out: Path) -> str:
    with pytest.raises(GraphoptError) as caught:
        export(lambda: (made(kind), {"x": drawn(1, 1, 4)}, None), out)
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "what", "where"),
    [
        (
            "DtypeDiff",
            "its paths leave int64 of shape 1×4 and float32 of shape 1×4, which cannot be one value",
            "y = x",
        ),
        ("NumpyTrip", ".numpy()", "np.argmax"),
    ],
)
def test_what_has_no_form_is_refused_with_its_line(tmp_path: Path, name: str, what: str, where: str) -> None:
    kind: Any = branching.REFUSED[name]
    text = refusal(kind, tmp_path / "m.onnx")
    assert what in text
    assert f"{HERE}:{line_of(kind, where)}" in text


@pytest.mark.slow
def test_an_unbounded_loop_that_reads_its_list(tmp_path: Path) -> None:
    text = refusal(branching.ListReadInWhile, tmp_path / "m.onnx")
    line = line_of(branching.ListReadInWhile, "while")
    assert "more than 64" in text and "is no Loop: " in text and f"{HERE}:{line}" in text


class Drawn(branching.Base):
    """Differs each time that it is traced."""

    calls = 0

    def forward(self, x: Any) -> Any:
        Drawn.calls += 1
        if x.sum() > 0:
            x = x + 1 if Drawn.calls % 2 else torch.tanh(x)
        return x * (torch.sigmoid(x) if Drawn.calls % 3 else x.exp())


def test_a_module_that_is_not_the_same_twice_is_refused(tmp_path: Path) -> None:
    refusal(Drawn, tmp_path / "m.onnx")


class Keeps(branching.Base):
    """Leaves traces of itself in its attributes, and a helper of the module's globals."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Any] = []
        self.last: Any = None

    def forward(self, x: Any) -> Any:
        self.last = x
        if x.sum() > 0:
            self.history.append(x)
            self.count += 1
            self.buf.add_(1)
            x = branching.free_fn(x, self.l1)
        return x


class Fails(branching.Base):
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            return x > 0
        return x


@pytest.mark.parametrize("kind", [Keeps, Fails])
def test_nothing_is_left_behind(tmp_path: Path, kind: Any) -> None:
    module = made(kind)
    functions = [kind.forward, branching.free_fn]
    before = [function.__code__ for function in functions]
    call = torch.nn.Module.__call__
    try:
        export(lambda: (module, {"x": drawn(4, 1, 4)}, None), tmp_path / "m.onnx")
    except GraphoptError:
        assert kind is Fails
    assert [function.__code__ for function in functions] == before
    assert torch.nn.Module.__call__ is call
    assert HOOKS not in globals() and HOOKS not in vars(branching)
    assert "forward" not in vars(module)
    if kind is Keeps:
        assert (module.history, module.last, module.count, float(module.buf.sum())) == ([], None, 0, 0.0)


def test_outlined_code_runs_as_the_function_did() -> None:
    class Straight:
        """Hooks that do what Python does."""

        statement = expression = staticmethod(lambda run: run())
        truth = staticmethod(bool)
        plain = returned = staticmethod(lambda value: value)
        cast = staticmethod(lambda kind, *arguments: kind(*arguments))

        @staticmethod
        def while_loop(whole: Any, test: Any, body: Any) -> None:
            while test():
                if body():
                    break

        @staticmethod
        def for_loop(whole: Any, over: Any, target: Any, body: Any, breaks: bool) -> None:
            for value in range(*over()):
                target(value)
                if body():
                    break

    def walk(n: int, odd: bool = False) -> Any:
        seen = []
        for k in range(n):
            if k == 3:
                continue
            if k > 6 and not odd:
                break
            seen.append(k if k % 2 else -k)
        total = 0
        while total < 20:
            total += len(seen) + 1
            if total == 8 or (odd and total == 16):
                return seen, total, "early"
        else:
            seen.append(100)
        return seen, total, [last := v for v in seen if v > 1], last

    code = outlined(walk)
    assert code is not None
    expected = [walk(n, odd) for n in range(3, 12) for odd in (False, True)]
    original = walk.__code__
    globals()[HOOKS] = Straight
    try:
        walk.__code__ = code
        assert [walk(n, odd) for n in range(3, 12) for odd in (False, True)] == expected
    finally:
        walk.__code__ = original
        del globals()[HOOKS]
