"""``upgrade-opset``: the model in a newer opset, however large its weights are."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, ClassVar

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field

from graphopt import graphs
from graphopt.errors import BadInput
from graphopt.rewrite import Context, Explanation, Kind, Stage
from graphopt.rewrite.contract import ForeignPass
from graphopt.rewrite.foreign import apply_proto_function, restore_metadata, transplant

if TYPE_CHECKING:
    import onnx

# onnxscript's converter starts here; it works in memory, where onnx's goes through a proto.
SCRIPT_FROM = 18


class Parameters(BaseModel):
    """To which opset.

    Attributes:
        version: The opset wanted; null: the highest that the target takes and the converter knows.
    """

    model_config = ConfigDict(extra="forbid")

    version: Annotated[int, Field(ge=8)] | None = None


class UpgradeOpset(ForeignPass):
    """Converts the model to a newer opset, which no other pass does."""

    name = "upgrade-opset"
    kind = Kind.ROUNDING
    stage = Stage.IMPORT
    explanation = Explanation(
        matches="a model whose opset is lower than the one asked for (default: the highest that the target takes)",
        refuses="opsets beyond what the target or the converter takes, and a result not valid in the new opset; "
        "an opset is never lowered",
        costs="functions are inlined; some operators become several in the new opset. Gains nothing by "
        "itself: passes that need a newer opset can run",
        source="onnx.version_converter up to opset 18, onnxscript's from there on; large weights stay outside",
    )
    Parameters: ClassVar[type[BaseModel]] = Parameters

    def rewrite_model(self, ctx: Context) -> bool:
        assert isinstance(self.parameters, Parameters)
        from onnxscript.version_converter import _version_converter as script

        wanted = self.parameters.version
        where = f"pass {self.name}"
        if wanted is not None and wanted > ctx.target.opset:
            raise BadInput(f"{ctx.target.name} takes opsets up to {ctx.target.opset}, not {wanted}", where=where)
        if wanted is not None and wanted > script.SUPPORTED_MAX_ONNX_OPSET:
            raise BadInput(
                f"the converter knows opsets up to {script.SUPPORTED_MAX_ONNX_OPSET}, not {wanted}", where=where
            )
        version = min(ctx.target.opset, script.SUPPORTED_MAX_ONNX_OPSET) if wanted is None else wanted
        if ctx.opset == 0 or ctx.opset >= version:
            return False
        new = ctx.model.clone()
        _convert(new, version, where)
        _check(new, version, where)
        new.ir_version = max(new.ir_version, _ir_version_for(version))
        if new.ir_version > ctx.target.ir_version:
            raise BadInput(
                f"opset {version} needs IR version {new.ir_version}, {ctx.target.name} takes {ctx.target.ir_version}",
                where=where,
            )
        restore_metadata(new, ctx.model)
        transplant(ctx.model, new)
        return True


def _convert(model: ir.Model, version: int, where: str) -> None:
    import onnx.version_converter
    from onnxscript.version_converter import convert_version

    logger = logging.getLogger("onnxscript.version_converter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if graphs.opset(model) < SCRIPT_FROM:
            _inline(model)
            step = min(version, SCRIPT_FROM)

            def convert(proto: onnx.ModelProto) -> onnx.ModelProto:
                return onnx.version_converter.convert_version(proto, step)

            apply_proto_function(model, convert)
        if graphs.opset(model) < version:
            convert_version(model, version)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise BadInput(f"cannot be converted to opset {version}: {first}", where=where) from error
    finally:
        logger.setLevel(level)


def _inline(model: ir.Model) -> None:
    from onnx_ir.passes.common import InlinePass

    if model.functions:
        InlinePass()(model)


def _check(model: ir.Model, version: int, where: str) -> None:
    """Raise where a node is not one of the new opset: converters leave out what they do not know."""
    import onnx.defs

    for node in graphs.all_nodes(model):
        if node.domain != "":
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, version, "")
        except onnx.defs.SchemaError:
            problem = "the opset has no such operator"
        else:
            unknown = sorted(set(node.attributes) - set(schema.attributes))
            required = {name for name, attribute in schema.attributes.items() if attribute.required}
            missing = sorted(required - set(node.attributes))
            if schema.deprecated:
                problem = "the operator is deprecated"
            elif unknown:
                problem = f"the operator has no attribute {unknown[0]}"
            elif missing:
                problem = f"the operator needs the attribute {missing[0]}"
            elif not schema.min_input <= len(node.inputs) <= schema.max_input:
                problem = f"the operator does not take {len(node.inputs)} inputs"
            else:
                continue
        raise BadInput(
            f"cannot be converted to opset {version}: {node.op_type} {node.name or ''}: {problem}", where=where
        )


def _ir_version_for(version: int) -> int:
    import onnx.helper

    return onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)])
