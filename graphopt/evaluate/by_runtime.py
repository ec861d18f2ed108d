"""Computes nodes by ONNX Runtime, its optimizations off: every deterministic operator that numpy does not define."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.evaluate.operation import Array


@dataclass
class Job:
    """A node for ONNX Runtime to compute.

    Attributes:
        node: Standard, without bodies. It stays in its graph.
        inputs: One entry an input: an array, a value that an earlier job makes, or None for an input left out.
    """

    node: ir.Node
    inputs: list[Array | ir.Value | None]


def run_jobs(jobs: Sequence[Job], opset: int) -> dict[ir.Value, Array]:
    """Compute nodes in one ONNX Runtime session with its optimizations off.

    Args:
        jobs: In topological order.
        opset: The version of the standard operator set.

    Returns:
        Output -> array, for every output that was computed. Empty where no onnxruntime is installed; where the
        runtime refuses a node, that node and what reads it are missing.
    """
    from graphopt.errors import MissingDependency

    if not jobs:
        return {}
    try:
        return _run_session(jobs, opset)
    except MissingDependency:
        return {}
    except Exception:
        # One node that the runtime does not take spoils the session: find it by halves.
        if len(jobs) == 1:
            return {}
    middle = len(jobs) // 2
    known = run_jobs(jobs[:middle], opset)
    rest: list[Job] = []
    missing = {v for job in jobs[:middle] for v in job.node.outputs if v not in known}
    for job in jobs[middle:]:
        if any(isinstance(x, ir.Value) and x in missing for x in job.inputs):
            missing.update(job.node.outputs)
            continue
        rest.append(Job(job.node, [known.get(x, x) if isinstance(x, ir.Value) else x for x in job.inputs]))
    return known | run_jobs(rest, opset)


def _run_session(jobs: Sequence[Job], opset: int) -> dict[ir.Value, Array]:
    import onnx

    from graphopt.runtime.session import create_session

    proto = onnx.ModelProto(ir_version=8)
    proto.opset_import.add(domain="", version=opset)
    graph = proto.graph
    graph.name = "fold"
    names: dict[ir.Value, str] = {}
    feeds: dict[str, Array] = {}
    for job in jobs:
        made = graph.node.add(op_type=job.node.op_type)
        for operand in job.inputs:
            if operand is None:
                made.input.append("")
            elif isinstance(operand, ir.Value):
                made.input.append(names[operand])
            else:
                name = f"i{len(feeds)}"
                feeds[name] = operand
                made.input.append(name)
                dtype = ir.DataType.from_numpy(operand.dtype)
                graph.input.append(onnx.helper.make_tensor_value_info(name, int(dtype), operand.shape))
        for output in job.node.outputs:
            if output.name == "":
                made.output.append("")
                continue
            names[output] = f"o{len(names)}"
            made.output.append(names[output])
        for attribute in job.node.attributes.values():
            ir.serde.serialize_attribute_into(made.attribute.add(), attribute)
    wanted = list(names)
    graph.output.extend(onnx.ValueInfoProto(name=names[value]) for value in wanted)
    session = create_session(proto.SerializeToString(), optimized=False)
    return dict(zip(wanted, session.run([names[v] for v in wanted], feeds), strict=True))
