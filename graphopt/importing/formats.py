"""What the tensors of a state dict say by their names: which modules are factorised, and how."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import BadInput
from graphopt.importing.states import State

Array = npt.NDArray[Any]


class Form(StrEnum):
    """How a module holds its matrix W."""

    FACTORS = "factors"
    """W = second first."""
    SCALED = "scaled factors"
    """W = second diag(scale) first."""
    PIVOT = "pivot"
    """The rows of W at ``kept`` are first, those at ``rest`` are second first."""
    ADAPTER = "adapter"
    """Beside a W of the graph's own: scale second first."""


@dataclass(frozen=True)
class Layout:
    """One way to read the shapes of two factors.

    Attributes:
        outputs: Rows of W.
        inputs: Columns of W; of a convolution those of one place of the kernel.
        rank: The size between the factors.
        turn_first: Whether ``first`` is stored as (inputs, rank).
        turn_second: Whether ``second`` is stored as (rank, outputs).
    """

    outputs: int
    inputs: int
    rank: int
    turn_first: bool = False
    turn_second: bool = False


@dataclass(frozen=True)
class Module:
    """A factorised module of a state dict.

    Attributes:
        names: What the dense layer may be called, the likeliest first.
        form: How it holds W.
        keys: Role -> tensor: ``first`` reads the input, ``second`` gives the output; ``scale``, ``kept``, ``rest``,
            ``bias`` (of the output) and ``middle`` (a bias between the factors) where there are such.
        layouts: Ways to read the shapes, the likeliest first.
        kernel: Of the first factor, where that is a convolution's.
        factor: What an adapter is scaled by.
        sure: Whether the names alone are proof. Otherwise a module that the graph does not have is no mistake.
        embedding: Whether W is a table whose rows are looked up.
    """

    names: tuple[str, ...]
    form: Form
    keys: Mapping[str, str]
    layouts: tuple[Layout, ...]
    kernel: tuple[int, ...] = ()
    factor: float = 1.0
    sure: bool = True
    embedding: bool = False

    @property
    def name(self) -> str:
        """Its name in the state dict."""
        return self.names[0]

    def first(self, state: State, layout: Layout) -> Array:
        """The factor that reads the input: (rank, inputs * kernel), in its own dtype."""
        array = state.read(self.keys["first"])
        return array.T if layout.turn_first else array.reshape(array.shape[0], -1)

    def second(self, state: State, layout: Layout) -> Array:
        """The factor that gives the output: (outputs or those that are no pivots, rank), in its own dtype."""
        array = state.read(self.keys["second"])
        return array.T if layout.turn_second else array.reshape(array.shape[0], -1)

    def scale(self, state: State) -> Array | None:
        """The numbers between the factors, float64 (rank,), or None."""
        key = self.keys.get("scale")
        return None if key is None else state.read(key).astype(np.float64).reshape(-1)

    def positions(self, state: State, layout: Layout) -> tuple[Array, Array]:
        """Which rows of W are kept, and which are computed from them.

        Raises:
            BadInput: The two do not name each row once.
        """
        kept, rest = (state.read(self.keys[role]).reshape(-1).astype(np.int64) for role in ("kept", "rest"))
        both = np.concatenate([kept, rest])
        if not np.array_equal(np.sort(both), np.arange(layout.outputs)):
            raise BadInput(
                f"{self.keys['kept']} and {self.keys['rest']} do not name each of the {layout.outputs} rows once",
                where=f"{state.path}: {self.name}",
            )
        return kept, rest


def recognise(state: State) -> list[Module]:
    """The factorised modules of a state dict, in the order of their names.

    Raises:
        BadInput: There is none, one is incomplete, or is of a kind that cannot be imported.
    """
    adapters = list(_adapters(state))
    found = adapters or [*_pivots(state), *_projections(state), *_named(state)]
    if not found:
        raise BadInput(
            "holds no factorised module that is known",
            where=str(state.path),
            hint="PIFA, SVD-LLM, ASVD, WeLore, SST, pairs U and V, and PEFT's LoRA are, by the names of their tensors",
        )
    return sorted(found, key=lambda module: _natural(module.name))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


# -- pivot form, two factors, three factors ----------------------------------------------------------------------------

_INDEX = ("false_idx", "true_idx")


def _pivots(state: State) -> Iterator[Module]:
    """PIFA: BLinear holds the pivot rows, ALinear the coefficients of the others, two buffers the positions."""
    shapes = state.shapes
    for key in shapes:
        if not key.endswith(".false_idx") and key != "false_idx" and not key.endswith("true_idx"):
            continue
        prefix = key.removesuffix("false_idx").removesuffix("true_idx")
        wanted = {
            "first": f"{prefix}BLinear.weight",
            "second": f"{prefix}ALinear.weight",
            "kept": f"{prefix}false_idx",
            "rest": f"{prefix}true_idx",
        }
        for lacking in wanted.values():
            if lacking not in shapes:
                raise BadInput(f"has {key} and lacks {lacking}", where=str(state.path), hint="the file is incomplete")
        if key != wanted["kept"]:
            continue
        rank, inputs = _matrix(state, wanted["first"])
        rest, between = _matrix(state, wanted["second"])
        if between != rank or math.prod(shapes[wanted["kept"]]) != rank or math.prod(shapes[wanted["rest"]]) != rest:
            raise BadInput(
                f"BLinear is {rank} x {inputs}, ALinear {rest} x {between}, with {math.prod(shapes[key])} pivots",
                where=f"{state.path}: {prefix.removesuffix('.')}",
                hint="these do not belong together",
            )
        yield Module(
            (prefix.removesuffix("."),),
            Form.PIVOT,
            _with_biases(shapes, wanted, [f"{prefix}bias", f"{prefix}ALinear.bias"], [f"{prefix}BLinear.bias"]),
            (Layout(rank + rest, inputs, rank),),
        )


_PROJECTION = re.compile(r"^(?P<path>(?:.*\.)?)(?P<base>\w+)_u_proj\.weight$")


def _projections(state: State) -> Iterator[Module]:
    """SVD-LLM: ``q_u_proj`` after ``q_v_proj`` is ``q_proj``, ``fc1_u_proj`` after ``fc1_v_proj`` is ``fc1``."""
    for key in state.shapes:
        match = _PROJECTION.match(key)
        if match is None:
            continue
        stem = match["path"] + match["base"]
        first = f"{stem}_v_proj.weight"
        if first not in state.shapes:
            raise BadInput(f"has {key} and lacks {first}", where=str(state.path), hint="the file is incomplete")
        names = (stem, f"{stem}_proj") if re.fullmatch(r"fc\d*", match["base"]) else (f"{stem}_proj", stem)
        keys = _with_biases(
            state.shapes, {"first": first, "second": key}, [f"{stem}_u_proj.bias"], [f"{stem}_v_proj.bias"]
        )
        yield _pair(state, names, keys, None)


@dataclass(frozen=True)
class _Names:
    """How a kind of checkpoint calls the parts of a module.

    Attributes:
        first: The factor that reads the input.
        second: The factor that gives the output.
        sure: See Module.
        scales: What stands between them, if anything does.
    """

    first: str
    second: str
    sure: bool = True
    scales: tuple[str, ...] = ()


_SINGULAR = ("S", "s", "Sigma", "sigma")
_CALLED = (
    _Names("BLinear", "ALinear"),
    *(_Names(v, "U", scales=_SINGULAR) for v in ("V", "Vt", "VT", "Vh", "V_T")),
    *(_Names(v, "u", scales=_SINGULAR) for v in ("v", "vt", "vh")),
    _Names("right", "left"),
    _Names("0", "1", sure=False),
)


def _named(state: State) -> Iterator[Module]:
    """ASVD, WeLore, SST and pairs like them: two names below the module's."""
    shapes = state.shapes
    for key in shapes:
        for called in _CALLED:
            for ending in ("", ".weight"):
                prefix = _prefix(key, f"{called.second}{ending}")
                if prefix is None or f"{prefix}false_idx" in shapes:
                    continue
                first = f"{prefix}{called.first}{ending}"
                if first not in shapes:
                    continue
                if len(shapes[key]) < 2 or len(shapes[first]) < 2:
                    continue
                scale = next(
                    (s for n in called.scales for s in (prefix + n, f"{prefix}{n}.weight") if s in shapes), None
                )
                keys = {"first": first, "second": key}
                biases = [f"{prefix}{called.second}.bias", f"{prefix}bias"]
                try:
                    yield _pair(
                        state,
                        (prefix.removesuffix("."),),
                        _with_biases(shapes, keys, biases, [f"{prefix}{called.first}.bias"]),
                        scale,
                        linear=ending != "",
                        sure=called.sure,
                    )
                except BadInput:
                    if called.sure:
                        raise


def _prefix(key: str, ending: str) -> str | None:
    """What stands before the last parts of a name; None where it does not end so."""
    if key == ending:
        return ""
    return key.removesuffix(ending) if key.endswith(f".{ending}") else None


def _pair(
    state: State,
    names: tuple[str, ...],
    keys: dict[str, str],
    scale: str | None,
    *,
    linear: bool = True,
    sure: bool = True,
) -> Module:
    first, second = state.shapes[keys["first"]], state.shapes[keys["second"]]
    where = f"{state.path}: {names[0]}"
    kernel = first[2:]
    if any(size != 1 for size in second[2:]) or (kernel and len(second) == 2):
        raise BadInput(
            f"factors of {list(first)} and {list(second)}: the second must be a matrix or a 1x1 convolution",
            where=where,
        )
    size = None if scale is None else math.prod(state.shapes[scale])
    layouts = []
    # A Linear layer stores (out, in). A bare parameter may be stored either way.
    turns = [False] if linear or kernel else [False, True]
    for turn_second in turns:
        outputs, rank = second[1::-1] if turn_second else second[:2]
        for turn_first in turns:
            between, inputs = first[1::-1] if turn_first else first[:2]
            if between == rank and size in (None, rank):
                layouts.append(Layout(outputs, inputs, rank, turn_first, turn_second))
    if not layouts:
        scaled = "" if size is None else f" and {size} numbers between"
        raise BadInput(f"factors of {list(first)} and {list(second)}{scaled} do not belong together", where=where)
    if scale is not None:
        keys = {**keys, "scale": scale}
    form = Form.FACTORS if scale is None else Form.SCALED
    return Module(names, form, keys, tuple(layouts), kernel=kernel, sure=sure)


def _with_biases(
    shapes: Mapping[str, tuple[int, ...]], keys: dict[str, str], outer: list[str], middle: list[str]
) -> dict[str, str]:
    found = dict(keys)
    for role, names in (("bias", outer), ("middle", middle)):
        present = next((name for name in names if name in shapes), None)
        if present is not None:
            found[role] = present
    return found


def _matrix(state: State, key: str) -> tuple[int, int]:
    shape = state.shapes[key]
    if len(shape) != 2:
        raise BadInput(f"has {len(shape)} axes; a matrix has two", where=f"{state.path}: {key}")
    return shape[0], shape[1]


# -- adapters ----------------------------------------------------------------------------------------------------------

_ADAPTER = re.compile(
    r"^(?P<name>.+)\.(?:lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|lora_embedding_(?P<table>[AB])(?:\.(?P<table_adapter>[^.]+))?)$"
)
_NOT_IMPORTED = {
    "lora_magnitude_vector": "is of DoRA, whose magnitudes divide by the norm of the merged weight",
    "modules_to_save": "replaces a whole module",
    "lora_bias": "is a bias of an adapter",
}


@dataclass
class _Config:
    """What ``adapter_config.json`` says of the scale."""

    alpha: float
    rank: int
    rooted: bool
    alphas: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        """The rank that a module's adapter must have."""
        return next((r for pattern, r in self.ranks.items() if _fits(pattern, name)), self.rank)

    def scale(self, name: str, rank: int) -> float:
        alpha = next((a for pattern, a in self.alphas.items() if _fits(pattern, name)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rooted else rank)


def _fits(pattern: str, name: str) -> bool:
    """Whether a key of ``alpha_pattern`` means a module: the end of its name, or a regular expression for it."""
    try:
        return re.match(rf"(?:.*\.)?(?:{pattern})$", name) is not None
    except re.error:
        return name == pattern or name.endswith(f".{pattern}")


def _adapters(state: State) -> Iterator[Module]:
    """LoRA as PEFT saves it."""
    parts: dict[tuple[str, bool], dict[str, str]] = {}
    adapters: set[str] = set()
    for key in state.shapes:
        match = _ADAPTER.match(key)
        if match is None:
            continue
        table = match["table"] is not None
        adapters.add((match["table_adapter"] if table else match["adapter"]) or "")
        part = match["table"] if table else match["part"]
        parts.setdefault((match["name"], table), {})["first" if part == "A" else "second"] = key
    if not parts:
        return
    if len(adapters) > 1:
        raise BadInput(
            f"holds several adapters: {', '.join(sorted(adapters))}",
            where=str(state.path),
            hint="save the one to import: model.save_pretrained(folder, selected_adapters=[...])",
        )
    config = _read_config(state)
    known = {key for keys in parts.values() for key in keys.values()}
    for key in state.shapes:
        reason = next((why for mark, why in _NOT_IMPORTED.items() if mark in key), None)
        if reason is None and key not in known and key.endswith(".bias"):
            reason = "is a bias that was trained beside the adapter"
        if reason is not None:
            raise BadInput(
                f"{key} {reason}: it cannot be imported as an adapter",
                where=str(state.path),
                hint="merge it in torch (merge_and_unload) and export the result",
            )
    for (name, table), keys in parts.items():
        yield _adapter(state, name, keys, config, table=table)


def _adapter(state: State, name: str, keys: dict[str, str], config: _Config, *, table: bool) -> Module:
    where = f"{state.path}: {name}"
    for role, letter in (("first", "A"), ("second", "B")):
        if role not in keys:
            raise BadInput(f"lacks lora_{letter}", where=where, hint="the file is incomplete")
    first, second = state.shapes[keys["first"]], state.shapes[keys["second"]]
    if len(first) < 2 or len(second) < 2 or first[0] != second[1] or any(size != 1 for size in second[2:]):
        raise BadInput(f"lora_A is {list(first)}, lora_B {list(second)}: these do not belong together", where=where)
    bare = re.sub(r"\.base_layer$", "", name)
    names = (bare, f"{bare}.base_layer")
    layout = Layout(second[0], first[1], first[0])
    module = re.sub(r"^base_model\.model\.", "", bare)
    if first[0] != config.rank_of(module):
        raise BadInput(
            f"the adapter has rank {first[0]}, adapter_config.json says {config.rank_of(module)}",
            where=where,
            hint="the scale is alpha / rank: is it the configuration of this adapter?",
        )
    factor = config.scale(module, first[0])
    return Module(names, Form.ADAPTER, keys, (layout,), kernel=first[2:], factor=factor, embedding=table)


def _read_config(state: State) -> _Config:
    path = state.folder / "adapter_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = str(found.get("peft_type", "LORA"))
        if kind != "LORA":
            raise BadInput(f"is an adapter of the kind {kind}; only LORA can be imported", where=str(path))
        if found.get("use_dora"):
            raise BadInput(
                f"use_dora: {_NOT_IMPORTED['lora_magnitude_vector']}",
                where=str(path),
                hint="merge it in torch (merge_and_unload) and export the result",
            )
        if found.get("modules_to_save"):
            raise BadInput(
                f"modules_to_save: {', '.join(map(str, found['modules_to_save']))} were trained as a whole",
                where=str(path),
                hint="merge it in torch (merge_and_unload) and export the result",
            )
        return _Config(
            float(found["lora_alpha"]),
            int(found["r"]),
            bool(found.get("use_rslora")),
            {str(key): float(value) for key, value in (found.get("alpha_pattern") or {}).items()},
            {str(key): int(value) for key, value in (found.get("rank_pattern") or {}).items()},
        )
    except FileNotFoundError as error:
        raise BadInput(
            "there is no adapter_config.json, which says how the adapter is scaled (lora_alpha)",
            where=str(state.folder),
            hint="put it beside the adapter: PEFT's save_pretrained writes both",
        ) from error
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput("is no configuration of a LoRA adapter (r, lora_alpha)", where=str(path)) from error
