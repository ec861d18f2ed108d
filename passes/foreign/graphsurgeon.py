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
        function: ``MODULE:FN`` or ``path/to/file.py:FN``; FN(graph) -> graph or None.
        kind: What the function does to the numbers. Verification holds it to that.
    """

    model_config = ConfigDict(extra="forbid")

    function: str
    kind: Kind = Kind.ROUNDING


class Graphsurgeon(ForeignPass):
    """A function of the user changes the model as an onnx-graphsurgeon graph.

    It runs once, before every other pass: a user's surgery need not be one that can be repeated.
    """

    name = "graphsurgeon"
    kind = Kind.ROUNDING
    stage = Stage.IMPORT
    explanation = Explanation(
        matches="the whole model, handed to a function of the user as an onnx_graphsurgeon.Graph. Large weights stay "
        "outside and are loaded where the function reads their values",
        refuses="types of less than a byte, float8e4m3fnuz, optional inputs, overloaded functions and attributes that "
        "graphsurgeon drops; a function that changes the interface of the model",
        costs="the import and export of the graph without its weights",
        source="onnx-graphsurgeon; extra: graphopt[graphsurgeon]",
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
