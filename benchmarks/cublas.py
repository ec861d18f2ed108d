"""cuBLAS and cuBLASLt through ctypes, from NVIDIA's wheels or the system: what our kernels are timed against.

    y = x Wᵀ      x (rows, k), W (n, k), y (rows, n), all row by row

In cuBLAS's words, which go column by column: yᵀ = W xᵀ, with W transposed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError, MissingDependency
from graphopt.gpu.context import Context
from graphopt.gpu.streams import Stream

_TYPES = {"float16": 2, "bfloat16": 14, "float32": 0}  # cudaDataType
_COMPUTE_32F = 68
_TRANSPOSED, _PLAIN = 1, 0
_DEFAULT_ALGORITHM = -1
_WORKSPACE = 32 << 20
_LT_TRANSA, _LT_TRANSB = 3, 4
_LT_PREFERENCE_WORKSPACE = 1
_LT_ALGORITHMS = 8


class Product:
    """One product, on fixed memory: the addresses of x, W and y, and how far apart the rows of x and y begin."""

    def __init__(
        self, dtype: str, rows: int, n: int, k: int, x: int, weight: int, y: int, x_stride: int, y_stride: int
    ) -> None:
        self.dtype, self.rows, self.n, self.k = dtype, rows, n, k
        self.x, self.weight, self.y = x, weight, y
        self.x_stride, self.y_stride = x_stride, y_stride


def find(name: str) -> Any:
    """Load ``cublas`` or ``cublasLt``.

    Raises:
        MissingDependency: It is nowhere.
    """
    for path in _candidates(name):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise MissingDependency(f"{name} is not installed", hint="pip install nvidia-cublas (or nvidia-cublas-cu12)")


def _candidates(name: str) -> list[Path | str]:
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    pattern = f"{name}64_*.dll" if sys.platform == "win32" else f"lib{name}.so.*"
    wheels: list[Path | str] = [path for root in roots for path in sorted(root.glob(f"*/**/{pattern}"), reverse=True)]
    return [*wheels, *(f"lib{name}.so.{major}" for major in (13, 12)), f"lib{name}.so"]


class Cublas:
    """cuBLAS's own choice of algorithm."""

    title = "cuBLAS"

    def __init__(self, context: Context, stream: Stream, library: Any = None) -> None:
        self._library = library if library is not None else find("cublas")
        self._handle = c_void_p()
        context.make_current()
        self._call("cublasCreate_v2", byref(self._handle))
        self._call("cublasSetStream_v2", self._handle, c_void_p(stream.handle))
        # Given, so that nothing is allocated while a graph is captured.
        self._workspace = context.allocate(_WORKSPACE)
        self._call(
            "cublasSetWorkspace_v2", self._handle, c_void_p(self._workspace.pointer), c_size_t(self._workspace.size)
        )

    def prepare(self, product: Product) -> Callable[[], None]:
        """What puts the product into the stream."""
        one, zero, kind = c_float(1), c_float(0), c_int(_TYPES[product.dtype])
        arguments = (
            self._handle,
            c_int(_TRANSPOSED),
            c_int(_PLAIN),
            c_int(product.n),
            c_int(product.rows),
            c_int(product.k),
            byref(one),
            c_void_p(product.weight),
            kind,
            c_int(product.k),
            c_void_p(product.x),
            kind,
            c_int(product.x_stride),
            byref(zero),
            c_void_p(product.y),
            kind,
            c_int(product.y_stride),
            c_int(_COMPUTE_32F),
            c_int(_DEFAULT_ALGORITHM),
        )

        def call() -> None:
            self._call("cublasGemmEx", *arguments)

        return call

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise GraphoptError(f"{name} failed with status {status}")


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class CublasLt:
    """cuBLASLt, with the algorithm that was fastest of those it suggests."""

    title = "cuBLASLt"

    def __init__(self, context: Context, stream: Stream, library: Any = None) -> None:
        self._library = library if library is not None else find("cublasLt")
        self._context, self._stream = context, stream
        self._handle = c_void_p()
        context.make_current()
        self._call("cublasLtCreate", byref(self._handle))
        self._workspace = context.allocate(_WORKSPACE)

    def prepare(self, product: Product) -> Callable[[], None]:
        """What puts the product into the stream; each algorithm is tried now."""
        kind = c_int(_TYPES[product.dtype])
        operation, preference = c_void_p(), c_void_p()
        self._call("cublasLtMatmulDescCreate", byref(operation), c_int(_COMPUTE_32F), c_int(_TYPES["float32"]))
        for which, value in ((_LT_TRANSA, _TRANSPOSED), (_LT_TRANSB, _PLAIN)):
            setting = c_int(value)
            self._call("cublasLtMatmulDescSetAttribute", operation, c_int(which), byref(setting), c_size_t(4))
        layouts = [
            self._layout(kind, rows, columns, stride)
            for rows, columns, stride in (
                (product.k, product.n, product.k),
                (product.k, product.rows, product.x_stride),
                (product.n, product.rows, product.y_stride),
            )
        ]
        self._call("cublasLtMatmulPreferenceCreate", byref(preference))
        size = c_size_t(_WORKSPACE)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute",
            preference,
            c_int(_LT_PREFERENCE_WORKSPACE),
            byref(size),
            c_size_t(ctypes.sizeof(size)),
        )
        found, count = (_Heuristic * _LT_ALGORITHMS)(), c_int()
        a, b, c = layouts
        self._call(
            "cublasLtMatmulAlgoGetHeuristic",
            *(self._handle, operation, a, b, c, c, preference, c_int(_LT_ALGORITHMS), found, byref(count)),
        )
        if not count.value:
            raise GraphoptError("cuBLASLt suggests no algorithm")
        one, zero = c_float(1), c_float(0)

        def call_of(heuristic: _Heuristic) -> Callable[[], None]:
            arguments = (
                *(self._handle, operation, byref(one), c_void_p(product.weight), a, c_void_p(product.x), b),
                *(byref(zero), c_void_p(product.y), c, c_void_p(product.y), c),
                *(byref(heuristic, 0), c_void_p(self._workspace.pointer), c_size_t(self._workspace.size)),
                c_void_p(self._stream.handle),
            )
            return lambda: self._call("cublasLtMatmul", *arguments)

        calls = [call_of(found[index]) for index in range(count.value) if found[index].state == 0]
        return min(calls, key=self._milliseconds)

    def _layout(self, kind: c_int, rows: int, columns: int, stride: int) -> c_void_p:
        layout = c_void_p()
        self._call(
            "cublasLtMatrixLayoutCreate", byref(layout), kind, c_uint64(rows), c_uint64(columns), c_int64(stride)
        )
        return layout

    def _milliseconds(self, call: Callable[[], None]) -> float:
        began, ended = self._context.event(), self._context.event()
        call()
        began.record(self._stream)
        for _ in range(10):
            call()
        ended.record(self._stream)
        ended.synchronize()
        return ended.since(began)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise GraphoptError(f"{name} failed with status {status}")
