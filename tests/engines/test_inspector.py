"""What the engine inspector says, in each of its dialects.

The samples are written after NVIDIA's documentation (the Engine Inspector chapter, and the page on migrating from
TensorRT 10 to 11); none was taken from an engine here, since opening one takes a GPU.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from graphopt.engines.inspector import EngineLayer, Inspection, parse_inspection
from graphopt.errors import GraphoptError

SEPARATOR = "\x1f"
TEN = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to node_conv + node_relu",
            "LayerType": "Reformat",
            "Inputs": [
                {
                    "Name": "x",
                    "Location": "Device",
                    "Dimensions": [1, 3, 224, 224],
                    "Format/Datatype": "Row major linear FP16 format",
                }
            ],
            "Outputs": [
                {
                    "Name": "Reformatted Input Tensor 0",
                    "Location": "Device",
                    "Dimensions": [1, 3, 224, 224],
                    "Format/Datatype": "Channel major FP16 format where channel % 4 == 0",
                }
            ],
            "ParameterType": "Reformat",
            "Origin": "REFORMAT",
            "TacticValue": "0x00000000000003ea",
            "StreamId": 0,
            "Metadata": "",
        },
        {
            "Name": "node_conv + node_relu",
            "LayerType": "CaskConvolution",
            "Inputs": [
                {
                    "Name": "Reformatted Input Tensor 0",
                    "Dimensions": [16, 512, 28, 28],
                    "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format",
                }
            ],
            "Outputs": [{"Name": "y", "Dimensions": [-1, 256], "Format/Datatype": "N/A due to dynamic shapes"}],
            "ParameterType": "Convolution",
            "Weights": {"Type": "Int8", "Count": 131072},
            "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32",
            "TacticValue": "0x11bde0e1d9f2f35d",
            "StreamId": 0,
            "Metadata": f"[ONNX Layer: node_conv]{SEPARATOR}[ONNX Layer: node_relu]",
        },
        {
            "Name": "pivot",
            "LayerType": "PluginV3",
            "PluginType": "PivotLinear",
            "Inputs": [{"Name": "a", "Format/Datatype": "Half"}, {"Name": "p", "Format/Datatype": "Int32"}],
            "Outputs": [{"Name": "b", "Format/Datatype": "BFloat16"}],
            "TacticValue": "0x0000000000000002",
            "Metadata": "[ONNX Layer: layer_3/pivot | call_of_it (Block)]",
        },
        {"Name": "shuffle", "LayerType": "NoOp", "Inputs": [], "Outputs": [], "TacticValue": "0x0000000000000000"},
    ],
    "Bindings": ["x", "y"],
}
ELEVEN = {
    "Layers": [
        {
            "Name": "node_of_y",
            "LayerType": "gemm",
            "Inputs": [
                {
                    "Name": "x",
                    "Dimensions": [8, 16],
                    "Location": "Device",
                    "Format": "Row major linear FP32 format (kLINEAR)",
                    "DataType": "Float",
                },
                {"Name": "w", "Format": "Row major linear UInt8 format", "DataType": "UInt8"},
            ],
            "Outputs": [{"Name": "y", "Format": "Row major linear FP8 format", "DataType": "FP8"}],
            "TacticName": "sm89_gemm",
            "Metadata": "[ONNX Layer: node_of_y]",
        }
    ],
    "I/O Tensors": [
        {
            "Name": "x",
            "IOMode": "Input",
            "DataType": "Float",
            "Dimensions": [-1, 16],
            "Location": "Device",
            "IsShapeInferenceIO": False,
            "ProfileInfo": [{"MinShape": [1, 16], "OptShape": [4, 16], "MaxShape": [8, 16], "Format": "kLINEAR"}],
        },
        {"Name": "y", "IOMode": "Output", "DataType": "FP8", "Dimensions": [-1, 16], "Location": "Device"},
    ],
}


def test_the_dialect_of_tensorrt_10() -> None:
    found = parse_inspection(json.dumps(TEN))
    assert found.tensors == ("x", "y")
    assert found.layers == (
        EngineLayer(
            "Reformatting CopyNode for Input Tensor 0 to node_conv + node_relu",
            "Reformat",
            "0x00000000000003ea",
            inputs=("float16",),
            outputs=("float16",),
        ),
        EngineLayer(
            "node_conv + node_relu",
            "CaskConvolution",
            "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32",
            ("node_conv", "node_relu"),
            inputs=("int8",),
            outputs=("",),
        ),
        EngineLayer(
            "pivot",
            "PluginV3",
            "0x0000000000000002",
            ("layer_3/pivot | call_of_it (Block)",),
            plugin=True,
            inputs=("float16", "int32"),
            outputs=("bfloat16",),
        ),
        EngineLayer("shuffle", "NoOp"),
    )


def test_the_dialect_of_tensorrt_11() -> None:
    found = parse_inspection(json.dumps(ELEVEN))
    assert found.tensors == ("x", "y")
    (layer,) = found.layers
    assert (layer.nodes, layer.tactic) == (("node_of_y",), "sm89_gemm")
    assert (layer.inputs, layer.outputs) == (("float32", "uint8"), ("float8",))


def test_names_alone() -> None:
    """What an engine tells that was not built to tell more."""
    text = '{"Layers": ["a + b"\n,"[ONNX Layer: c]"\n],\n"Bindings": ["x:0"\n,"z:0"\n]}'
    found = parse_inspection(text)
    assert found.layers == (EngineLayer("a + b"), EngineLayer("[ONNX Layer: c]", nodes=("c",)))
    assert found.tensors == ("x:0", "z:0")


def test_separators_may_stand_as_they_are() -> None:
    text = json.dumps(TEN).replace("\\u001f", SEPARATOR)
    assert SEPARATOR in text
    assert parse_inspection(text).layers[1].nodes == ("node_conv", "node_relu")


def test_it_goes_through_a_report() -> None:
    found = parse_inspection(json.dumps(TEN))
    assert Inspection.from_json(json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": 3}', '{"Layers": [{"Inputs": [4]}]}', "[]"])
def test_anything_else_is_an_error(text: str) -> None:
    with pytest.raises(GraphoptError, match="what the engine inspector says cannot be read"):
        parse_inspection(text)
