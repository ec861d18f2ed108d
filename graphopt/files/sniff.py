"""Say what a file is that is not an ONNX model, from its first bytes."""

from __future__ import annotations

import json

# (offset, magic bytes) -> (what it is, what to do about it)
_EXPORT = "export the model to ONNX first: graphopt export"
_ENGINE = "graphopt bench runs it, graphopt package serves it; here give the .onnx file that it was built from"
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"PK\x03\x04", "a zip archive, perhaps a torch checkpoint", _EXPORT),
    (0, b"\x80\x02", "a Python pickle, perhaps a torch checkpoint", _EXPORT),
    (0, b"\x80\x04", "a Python pickle, perhaps a torch checkpoint", _EXPORT),
    (0, b"\x89HDF", "an HDF5 file, perhaps a Keras model", "convert it to ONNX first, for example with tf2onnx"),
    (4, b"TFL3", "a TensorFlow Lite model", "convert it to ONNX first, for example with tf2onnx"),
    (4, b"ORTM", "an ONNX Runtime .ort file", "give the .onnx file that it was made from"),
    (0, b"GGUF", "a GGUF file", _EXPORT),
    (0, b"vtrt", "a TensorRT-RTX engine", _ENGINE),
    (1, b"trt", "a TensorRT engine", _ENGINE),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (0, b"BZh", "a bzip2 archive", "unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive", "unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it first"),
    (0, b"\x93NUMPY", "a numpy array", "give the .onnx file"),
    (0, b"version https://git-lfs", "a Git LFS pointer", "fetch it: git lfs pull"),
    (0, b"<!DOCTYPE", "an HTML page, perhaps a download that failed", "download the model again"),
    (0, b"<!doctype", "an HTML page, perhaps a download that failed", "download the model again"),
    (0, b"<html", "an HTML page, perhaps a download that failed", "download the model again"),
    (0, b"<ir_version", "ONNX text", "write it as a binary file: onnx.save(onnx.parser.parse_model(text), path)"),
    (0, b"<\n", "ONNX text", "write it as a binary file: onnx.save(onnx.parser.parse_model(text), path)"),
    (0, b"ir_version:", "ONNX as protobuf text", "write it as a binary file: onnx.save(onnx.load(path), 'm.onnx')"),
)


def recognise(head: bytes) -> tuple[str, str] | None:
    """Recognise a file that is not an ONNX model.

    Args:
        head: The first bytes of the file; 4096 are enough.

    Returns:
        What the file is and what to do about it, or None where it may be an ONNX model or anything unknown.
    """
    for offset, magic, what, hint in _SIGNATURES:
        if head.startswith(magic, offset):
            return what, hint
    # safetensors: the length of a JSON header as 8 bytes, then the header.
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file", _EXPORT
    if head[:1] == b"{" and _is_json_start(head):
        return "JSON", "write it as a binary file: onnx.save(onnx.load(path), 'm.onnx')"
    return None


def _is_json_start(head: bytes) -> bool:
    try:
        json.loads(head)
    except UnicodeDecodeError:
        return False
    except json.JSONDecodeError as error:
        return error.pos > 1  # cut off after some valid JSON
    return True
