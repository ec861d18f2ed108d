"""What TensorRT's ONNX parser hands on to a plugin: ``python record.py REQUEST.json``, on the parser of TensorRT-RTX.

A creator of ours is registered that keeps the fields it is given and makes nothing: the parser then stops with a plain
error. (A plugin that it makes would bring the process down: RTX takes none from Python.)
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(path: str) -> int:
    request = json.loads(Path(path).read_text())
    trt = importlib.import_module("tensorrt_rtx_bindings")

    class Recorder(trt.IPluginCreatorV3One):  # type: ignore
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = request["name"], request["namespace"], "1"
            kinds = {"int64": "INT64", "int32": "INT32", "float32": "FLOAT32"}
            # As NVIDIA's layer declares arrays: no data, and the declared type.
            fields = [
                trt.PluginField(name, np.array([]), getattr(trt.PluginFieldType, kinds[dtype]))
                for name, dtype in request["attributes"]
            ]
            self.field_names = trt.PluginFieldCollection(fields)
            self.seen: list[list[Any]] = []

        def create_plugin(self, name: str, fields: Any, phase: Any) -> None:
            for field in fields:
                try:
                    data = np.array(field.data)
                    self.seen.append([field.name, field.type.name, data.dtype.name, data.reshape(-1).tolist()])
                except Exception as error:
                    self.seen.append([field.name, field.type.name, None, type(error).__name__])

    recorder = Recorder()
    trt.get_plugin_registry().register_creator(recorder, request["namespace"])
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    answers = []
    for model in request["models"]:
        recorder.seen = []
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        parsed = parser.parse(Path(model).read_bytes())
        reasons = [parser.get_error(place).desc() for place in range(parser.num_errors)]
        outputs = [network.get_output(place).dtype.name for place in range(network.num_outputs)]
        answers.append({"parsed": parsed, "reasons": reasons, "fields": recorder.seen, "outputs": outputs})
    known = {name: parser.supports_operator(name) for name in request.get("operators", [])}
    Path(request["answer"]).write_text(json.dumps({"version": trt.__version__, "models": answers, "known": known}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
