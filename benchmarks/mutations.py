"""How many wrong rewrites verification catches: 200 faults of fixed kinds at seeded random places.

    python -m benchmarks.mutations [--places N] [--seed S]

A fault is put into a network; where the mutant loads and runs it goes to ``graphopt.verify(original, mutant)`` at the
shipped tolerances. A mutant that verification passes is run on 100 further inputs, of other values and sizes. With
the same bits on all of them it is set aside as equivalent (a fault in a branch not taken, a slice past the end
moved by one), listed, and the place drawn again. Otherwise it is a survivor, printed with its largest difference.
Where the mutant does not load, or not run on the first input, another place is drawn: anything would notice that.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.common import minilm, print_table, silero, work_folder, write_result
from benchmarks.pool import Died, Pool, first_line
from graphopt import graphs

DRAWS = 300  # tries for one place before it counts as impossible
CORPUS_NETWORKS = 24
FURTHER_INPUTS = 100
ROUNDING = 16  # eps of the dtype: below this the inputs differ by rounding alone

Mutate = Callable[[], str]


@dataclass
class Mutant:
    """One fault, and what became of it."""

    place: int
    kind: str
    network: str
    fault: str
    killed: bool
    how: str
    seconds: float


@dataclass
class Place:
    """What a place gave: a mutant that counts (None where none was found), and those set aside as equivalent."""

    mutant: Mutant | None
    equivalent: list[Mutant]


# -- the kinds: each gives the places of a model where such a fault can be, as functions that make it ------------------

_ORDERED = {"Sub": 0, "Div": 0, "Pow": 0, "Mod": 0, "MatMul": 0, "Gemm": 0, "PRelu": 0, "Concat": 0, "Where": 1} | {
    "Less": 0,
    "Greater": 0,
    "LessOrEqual": 0,
    "GreaterOrEqual": 0,
}
_AXES_INPUT = {"Squeeze": 1, "Unsqueeze": 1, "Slice": 3} | {
    f"Reduce{name}": 1 for name in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
}
_SHAPE_INPUT = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Tile": 1, "Resize": 3}
_SLICES = {"Slice": (1, 2), "Split": (1,), "Gather": (1,)}
_FACTORS = (1.01, 0.5, 2.0)


def drop_node(model: ir.Model, rng: np.random.Generator) -> Iterator[Mutate]:
    """A node replaced by its first input that has the dtype, and as far as known the shape, of its output."""
    for node in graphs.all_nodes(model):
        if len(node.outputs) != 1 or node.op_type in ("Identity", "Constant"):
            continue
        for value in node.inputs:
            if value is not None and not graphs.is_constant(value) and _alike(value, node.outputs[0]):
                yield partial(_drop, node, value)
                break


def _alike(value: ir.Value, output: ir.Value) -> bool:
    if value.type is None or value.type != output.type:
        return False
    return value.shape is None or output.shape is None or value.shape == output.shape


def _drop(node: ir.Node, value: ir.Value) -> str:
    told = f"{_name(node)} dropped"
    node.op_type, node.domain = "Identity", ""
    node.attributes.clear()
    for i in range(len(node.inputs)):
        node.replace_input_with(i, value if i == 0 else None)
    node.resize_inputs(1)
    return told


def swap_inputs(model: ir.Model, rng: np.random.Generator) -> Iterator[Mutate]:
    """Two neighbouring inputs of an op whose order matters."""
    for node in graphs.all_nodes(model):
        first = _ORDERED.get(node.op_type)
        if first is not None and len(node.inputs) > first + 1 and node.inputs[first] is not node.inputs[first + 1]:
            yield partial(_swap, node, first)


def _swap(node: ir.Node, first: int) -> str:
    a, b = node.inputs[first], node.inputs[first + 1]
    node.replace_input_with(first, b)
    node.replace_input_with(first + 1, a)
    return f"{_name(node)}: inputs {first} and {first + 1} swapped"


def move_axis(model: ir.Model, rng: np.random.Generator) -> Iterator[Mutate]:
    """An axis, as an attribute or a constant input, one further or one nearer."""
    for node in graphs.all_nodes(model):
        step = int(rng.choice((-1, 1)))
        for attribute in ("axis", "axes"):
            if attribute in node.attributes:
                yield partial(_shift_attribute, node, attribute, step, rng)
        axes = _AXES_INPUT.get(node.op_type)
        if axes is not None and _integers(node, axes) is not None:
            yield partial(_shift_input, node, axes, step, rng)


def stale_shape(model: ir.Model, rng: np.random.Generator) -> Iterator[Mutate]:
    """A shape that no longer fits: one size of a constant target changed, or a Shape frozen to other sizes."""
    for node in graphs.all_nodes(model):
        position = _SHAPE_INPUT.get(node.op_type)
        if position is not None and (sizes := _integers(node, position)) is not None:
            yield partial(_change_size, node, position, sizes, rng)
        if node.op_type == "Shape" and node.inputs[0] is not None:
            shape = node.inputs[0].shape
            if shape is not None and not shape.is_static() and not {"start", "end"} & set(node.attributes):
                yield partial(_freeze, node, [dim if isinstance(dim, int) else 2 for dim in shape])


def _change_size(node: ir.Node, position: int, sizes: np.ndarray, rng: np.random.Generator) -> str:
    changed = sizes.copy()
    unequal = np.flatnonzero(np.diff(sizes.reshape(-1)))
    if unequal.size and rng.random() < 0.5:
        i = int(rng.choice(unequal))
        changed[[i, i + 1]] = changed[[i + 1, i]]
    else:
        changed[rng.integers(sizes.size)] += rng.choice((-1, 1))
    _put(node, position, changed)
    return f"{_name(node)}: target {sizes.tolist()} became {changed.tolist()}"


def _freeze(node: ir.Node, sizes: Sequence[int]) -> str:
    told = f"{_name(node)} frozen to {list(sizes)}"
    frozen = ir.tensor(np.array(sizes, np.int64))
    node.op_type, node.domain = "Constant", ""
    node.replace_input_with(0, None)
    node.resize_inputs(0)
    node.attributes.clear()
    node.attributes["value"] = ir.AttrTensor("value", frozen)
    return told


def wrong_scale(model: ir.Model, rng: np.random.Generator) -> Iterator[Mutate]:
    """A constant or weight, as one node reads it, times 1.01, 0.5 or 2."""
    for node in graphs.all_nodes(model):
        for position, value in enumerate(node.inputs):
            tensor = graphs.constant_tensor(value)
            if tensor is not None and tensor.dtype.is_floating_point() and tensor.size:
                yield partial(_scale, node, position, float(rng.choice(_FACTORS)))


def _scale(node: ir.Node, position: int, factor: float) -> str:
    array = graphs.constant_array(node.inputs[position])
    assert array is not None
    _put(node, position, (array.astype(np.float64) * factor).astype(array.dtype))
    return f"{_name(node)}: constant input {position} {list(array.shape)} times {factor:g}"


def shift_slice(model: ir.Model, rng: np.random.Generator) -> Iterator[Mutate]:
    """A start or end of Slice, a size of Split, a constant index of Gather off by one."""
    for node in graphs.all_nodes(model):
        step = int(rng.choice((-1, 1)))
        for position in _SLICES.get(node.op_type, ()):
            if _integers(node, position) is not None:
                yield partial(_shift_input, node, position, step, rng)
        if node.op_type in ("Slice", "Split"):
            for attribute in {"starts", "ends", "split"} & set(node.attributes):
                yield partial(_shift_attribute, node, attribute, step, rng)


def _integers(node: ir.Node, position: int) -> np.ndarray | None:
    if position >= len(node.inputs):
        return None
    array = graphs.constant_array(node.inputs[position], limit=64)
    return array if array is not None and array.size and array.dtype.kind == "i" else None


def _shift(values: np.ndarray, step: int, rng: np.random.Generator, *, keep_sum: bool) -> np.ndarray:
    moved = values.copy().reshape(-1)
    i = int(rng.integers(moved.size))
    moved[i] += step
    if keep_sum and moved.size > 1:  # the sizes of a Split must still add up
        moved[(i + 1) % moved.size] -= step
    return moved.reshape(values.shape)


def _shift_input(node: ir.Node, position: int, step: int, rng: np.random.Generator) -> str:
    before = _integers(node, position)
    assert before is not None
    after = _shift(before, step, rng, keep_sum=node.op_type == "Split")
    _put(node, position, after)
    return f"{_name(node)}: constant input {position} {before.tolist()} became {after.tolist()}"


def _shift_attribute(node: ir.Node, name: str, step: int, rng: np.random.Generator) -> str:
    before = node.attributes[name].value
    if isinstance(before, int):
        after: int | list[int] = before + step
        node.attributes[name] = ir.AttrInt64(name, before + step)
    else:
        after = _shift(np.array(before), step, rng, keep_sum=name == "split").tolist()
        node.attributes[name] = ir.AttrInt64s(name, after)
    return f"{_name(node)}: {name} {before} became {after}"


def _put(node: ir.Node, position: int, array: np.ndarray) -> None:
    """Give one input of one node another constant; whoever else reads the old one keeps it."""
    constant = ir.node("Constant", [], {"value": ir.tensor(array)})
    assert node.graph is not None
    constant.outputs[0].name = f"mutant_{id(constant)}"
    node.graph.insert_before(node, constant)
    node.replace_input_with(position, constant.outputs[0])


def _name(node: ir.Node) -> str:
    return f"{node.op_type} {node.name or node.outputs[0].name}"


KINDS: dict[str, Callable[[ir.Model, np.random.Generator], Iterator[Mutate]]] = {
    "drop node": drop_node,
    "swap inputs": swap_inputs,
    "axis ±1": move_axis,
    "stale shape": stale_shape,
    "wrong scale": wrong_scale,
    "off-by-one slice": shift_slice,
}


# -- the networks ------------------------------------------------------------------------------------------------------


def write_networks(folder: Path) -> list[Path]:
    """The networks that faults are put into: the test networks, expanded corpus cases, the demo networks."""
    from tests.models import RUNNABLE, large_transformer, many_small_nodes

    paths = []
    for name, builder in [*RUNNABLE.items(), ("many_small_nodes", partial(many_small_nodes, 400))]:
        paths.append(folder / f"{name}.onnx")
        ir.save(builder(), paths[-1])
    paths.append(large_transformer(folder / "transformer.onnx", layers=2, width=64, heads=4))
    paths += _write_corpus_networks(folder)
    if (encoder := minilm(folder)) is not None:
        paths.append(encoder)
    if (detector := silero()) is not None:
        paths.append(Path(shutil.copy(detector, folder / "silero.onnx")))
    return paths


def _write_corpus_networks(folder: Path) -> list[Path]:
    from benchmarks.corpus import collect

    usable = [
        case
        for case in collect()
        if "expanded" in case.name and len(case.model.graph.node) >= 5 and "dropout" not in case.name
    ]
    paths = []
    for case in usable[:: len(usable) // CORPUS_NETWORKS]:
        paths.append(folder / f"{case.name}.onnx")
        paths[-1].write_bytes(case.model.SerializeToString())
    return paths


# -- one place ---------------------------------------------------------------------------------------------------------


def run_place(place: int, networks: Sequence[Path], seed: int) -> Place:
    """Draw networks and places in them until a mutant loads, runs and computes something else."""
    from graphopt import verify
    from graphopt.errors import GraphoptError

    kind = list(KINDS)[place % len(KINDS)]
    rng = np.random.default_rng([seed, place])
    equivalent: list[Mutant] = []
    for _ in range(DRAWS):
        path = networks[rng.integers(len(networks))]
        mutant = path.with_name(f"mutant-{place}.onnx")
        fault = _make_mutant(path, mutant, kind, rng)
        if fault is None or not _runs(mutant, path):
            mutant.unlink(missing_ok=True)
            continue
        start = time.perf_counter()
        try:
            report = verify(path, mutant)
            killed, how = not report.passed, report.reason
        except GraphoptError as error:
            killed, how = True, first_line(error)
        seconds = time.perf_counter() - start
        same = False
        if not killed:
            same, how = explain(path, mutant)
        mutant.unlink()
        found = Mutant(place, kind, path.stem, fault, killed, how, seconds)
        if not same:
            return Place(found, equivalent)
        equivalent.append(found)
    return Place(None, equivalent)


def _make_mutant(path: Path, out: Path, kind: str, rng: np.random.Generator) -> str | None:
    from graphopt.shapes import infer_shapes

    model = ir.load(path)
    infer_shapes(model)
    places = list(KINDS[kind](model, rng))
    if not places:
        return None
    fault = places[rng.integers(len(places))]()
    ir.save(model, out)
    return fault


def _runs(mutant: Path, original: Path) -> bool:
    from graphopt.runtime.session import create_session, run

    try:
        feeds = _feeds(original, 1, 0)[0]
        run(create_session(mutant, optimized=False, threads=1), feeds)
    except Exception:
        return False
    return True


def _feeds(path: Path, cases: int, seed: int) -> list[dict[str, Any]]:
    from graphopt.feeds import feeds_that_run
    from graphopt.runtime.session import create_session, run

    session = create_session(path, optimized=False, threads=1)
    return feeds_that_run(ir.load(path), partial(run, session), cases=cases, seed=seed)


def explain(original: Path, mutant: Path) -> tuple[bool, str]:
    """What a mutant that verification passed does on further inputs: nothing (True), rounding, or more; in words."""
    from graphopt.runtime.session import create_session, run
    from graphopt.verification.tolerance import distance, eps_of, is_float, same_bits

    before, after = (create_session(path, optimized=False, threads=1) for path in (original, mutant))
    feeds = _feeds(original, FURTHER_INPUTS, 1)
    worst, exact = 0.0, True
    for case in feeds:
        for a, b in zip(run(before, case).values(), run(after, case).values(), strict=True):
            for x, y in zip(*(v if isinstance(v, list) else [v] for v in (a, b)), strict=True):
                if not same_bits(x, y):
                    exact = False
                    # Relative to the largest magnitude, in eps of the dtype; anything else than a float is exact.
                    worst = max(worst, distance(y, x).max_rel / eps_of(x.dtype) if is_float(x) else np.inf)
    if exact:
        return True, f"the same bits on {len(feeds)} further inputs"
    verdict = "harmless: rounding" if worst <= ROUNDING else "MISSED"
    return False, f"{verdict}, at most {worst:.3g} eps on {len(feeds)} further inputs"


def main() -> int:
    """Run, print, record. Exit code 1 where a survivor is not harmless or too few mutants were killed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--places", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with work_folder() as folder:
        networks = write_networks(folder)

        def task(index: int, _: Path) -> Place:
            return run_place(index, networks, options.seed)

        start = time.perf_counter()
        found = dict(sorted(Pool[Place](task, options.places, timeout=600).results()))
        seconds = time.perf_counter() - start
    died = {place: result for place, result in found.items() if isinstance(result, Died)}
    places = [result for result in found.values() if isinstance(result, Place)]
    mutants = [place.mutant for place in places if place.mutant is not None]
    equivalent = [mutant for place in places for mutant in place.equivalent]
    rows: list[list[Any]] = []
    for kind in [*KINDS, "all"]:
        own = [mutant for mutant in mutants if kind in (mutant.kind, "all")]
        aside = sum(kind in (mutant.kind, "all") for mutant in equivalent)
        rows.append([kind, sum(mutant.killed for mutant in own), len(own), aside])
    print_table(
        ["kind", ("killed", "right"), ("mutants", "right"), ("set aside as equivalent", "right")],
        rows,
        f"{len(networks)} networks, {options.places} places, seed {options.seed}, {seconds:.0f} s",
    )
    survivors = [mutant for mutant in mutants if not mutant.killed]
    for title, listed in (("equivalent", equivalent), ("survivor", survivors)):
        for mutant in listed:
            print(f"{title} · {mutant.kind} · {mutant.network} · {mutant.fault} · {mutant.how}")
    for place, death in died.items():
        print(f"place {place} · {death.kind}: {death.detail}")
    if options.places == parser.get_default("places"):
        write_result(
            "mutations",
            {
                "seed": options.seed,
                "networks": [path.stem for path in networks],
                "places": options.places,
                "by_kind": {
                    kind: {"killed": killed, "mutants": total, "equivalent": aside}
                    for kind, killed, total, aside in rows
                },
                "kill_rate": rows[-1][1] / len(mutants) if mutants else None,
                "survivors": survivors,
                "equivalent": equivalent,
                "no_result": died,
                "seconds": round(seconds),
            },
        )
    return int(bool(died) or not mutants or any("MISSED" in mutant.how for mutant in survivors))


if __name__ == "__main__":
    raise SystemExit(main())
