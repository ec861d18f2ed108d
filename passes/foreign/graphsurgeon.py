"""``graphsurgeon``: a user's function on an onnx-graphsurgeon graph, as a pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from graphopt.gates import load_function
from graphopt.rewrite import Context, Explanation, Kind, Stage
from graphopt.rewrite.contract import ForeignPass
from graphopt.rewrite.foreign import apply_graphsurgeon


class Parameters(BaseModel):
    """Which function, and what it may do.

    Attributes:
        function: ``MODULE:FN`` or ``path/to/file.py:FN``; FN(graph) returns the graph, or None where it changed the
            graph that it got.
        kind: What the function does to the numbers: bitwise, rounding or lossy. Verification holds it to that.
    """

    model_config = ConfigDict(extra="forbid")

    function: str
    kind: Kind = Kind.ROUNDING


class Graphsurgeon(ForeignPass):
    """Runs a function of yours on the model as an onnx-graphsurgeon graph.

    It runs once, before the other stages: surgery need not be something that can be repeated. For several functions, a
    recipe names the pass several times, with labels (``graphsurgeon@first``, ``graphsurgeon@second``); they run in the
    recipe's order.
    """

    name = "graphsurgeon"
    kind = Kind.ROUNDING
    stage = Stage.IMPORT
    repeatable = True
    explanation = Explanation(
        matches="the whole model, handed to your function as an onnx_graphsurgeon.Graph. Large weights stay outside "
        "and are loaded where the function reads their values",
        refuses="models with what graphsurgeon drops: types of less than a byte, float8e4m3fnuz, optional inputs, "
        "overloaded functions, some attributes. A function that changes the model's inputs or outputs",
        costs="the import and export of the graph without its weights; what it gains is up to the function",
        source="onnx-graphsurgeon, which the extra [graphsurgeon] installs",
    )
    Parameters: ClassVar[type[BaseModel]] = Parameters

    def __init__(self, parameters: Mapping[str, object] | None = None) -> None:
        super().__init__(parameters)
        assert isinstance(self.parameters, Parameters)
        # The user's word on an object, where other passes have it on the class.
        self.kind = self.parameters.kind  # type: ignore[misc]

    def rewrite_model(self, ctx: Context) -> bool:
        assert isinstance(self.parameters, Parameters)
        spec = self.parameters.function
        return apply_graphsurgeon(ctx.model, load_function(spec, f"{self.name}.function"), f"graphsurgeon {spec}")
