"""libcuda through ctypes: the functions that are used, each with its types. Knows nothing but the C interface."""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from functools import cache
from typing import Any

from graphopt.gpu.errors import HINTS, NO_DEVICE, SUCCESS, CudaError, NoGpu

# A device pointer is 64 bits wide everywhere.
_PTR = c_uint64
_OUT_INT, _OUT_PTR, _OUT_HANDLE, _OUT_SIZE = POINTER(c_int), POINTER(_PTR), POINTER(c_void_p), POINTER(c_size_t)

LEGACY_STREAM = 1
"""The handle of the default stream."""
HOST_FUNCTION = ctypes.CFUNCTYPE(None, c_void_p)

# name -> the types of its arguments. The suffix _v2 is part of the exported name.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (_OUT_INT,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (_OUT_INT,),
    "cuDeviceGet": (_OUT_INT, c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceTotalMem_v2": (_OUT_SIZE, c_int),
    "cuDeviceGetAttribute": (_OUT_INT, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_OUT_HANDLE, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_OUT_HANDLE,),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (_OUT_SIZE, _OUT_SIZE),
    "cuMemAlloc_v2": (_OUT_PTR, c_size_t),
    "cuMemFree_v2": (_PTR,),
    "cuMemAllocAsync": (_OUT_PTR, c_size_t, c_void_p),
    "cuMemFreeAsync": (_PTR, c_void_p),
    "cuMemHostAlloc": (_OUT_HANDLE, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoD_v2": (_PTR, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, _PTR, c_size_t),
    "cuMemcpyHtoDAsync_v2": (_PTR, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, _PTR, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (_PTR, _PTR, c_size_t, c_void_p),
    "cuMemsetD8Async": (_PTR, c_ubyte, c_size_t, c_void_p),
    "cuStreamCreate": (_OUT_HANDLE, c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _OUT_HANDLE),
    "cuGraphInstantiateWithFlags": (_OUT_HANDLE, c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuEventCreate": (_OUT_HANDLE, c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventQuery": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuModuleLoadDataEx": (_OUT_HANDLE, c_char_p, c_uint, POINTER(c_int), POINTER(c_void_p)),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (_OUT_HANDLE, c_void_p, c_char_p),
    "cuFuncGetAttribute": (_OUT_INT, c_int, c_void_p),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
}
# Newer than CUDA 11.2: absent from a driver that is older.
_OPTIONAL = frozenset({"cuMemAllocAsync", "cuMemFreeAsync"})


class Library:
    """The functions of libcuda; each call raises CudaError for any other result than success."""

    def __init__(self, path: str) -> None:
        self.path = path
        handle = ctypes.CDLL(path)
        self._functions: dict[str, Any] = {}
        for name, types in _FUNCTIONS.items():
            try:
                function = getattr(handle, name)
            except AttributeError:
                if name in _OPTIONAL:
                    continue
                raise NoGpu(
                    f"the driver has no {name}", where=path, hint="a driver for CUDA 11.4 or newer is needed"
                ) from None
            function.argtypes = types
            function.restype = c_int
            self._functions[name] = function

    def has(self, name: str) -> bool:
        """Whether the driver has an optional function."""
        return name in self._functions

    def raw(self, name: str, *arguments: Any) -> int:
        """Call, and return the result code."""
        return int(self._functions[name](*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        """Call, and raise CudaError unless it succeeds."""
        code = self._functions[name](*arguments)
        if code != SUCCESS:
            raise self.error(code, name)

    def error(self, code: int, function: str) -> CudaError:
        """The exception for a result code."""
        name, text = self.describe(code)
        return CudaError(name, code, f"the GPU's driver: {function} failed with {name}: {text}", hint=HINTS.get(name))

    def describe(self, code: int) -> tuple[str, str]:
        """An error's name and its text in the driver's words."""
        name, text = c_char_p(), c_char_p()
        known = self.raw("cuGetErrorName", code, ctypes.byref(name)) == SUCCESS and name.value
        self.raw("cuGetErrorString", code, ctypes.byref(text))
        found = name.value.decode() if known and name.value else f"error {code}"
        return found, text.value.decode() if text.value else "no description"


def library_path() -> str:
    """The driver's library; ``GRAPHOPT_LIBCUDA`` names another one."""
    return os.environ.get("GRAPHOPT_LIBCUDA") or ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@cache
def open_library(path: str) -> Library:
    """Load and initialise the driver.

    Raises:
        NoGpu: There is no driver, it does not start, or it sees no GPU.
    """
    try:
        library = Library(path)
    except OSError as error:
        raise NoGpu(
            f"no GPU: NVIDIA's driver ({path}) is not installed", hint="nvidia-smi shows whether there is one"
        ) from error
    code = library.raw("cuInit", 0)
    if code != SUCCESS:
        name, text = library.describe(code)
        what = "no GPU: the driver sees none" if code == NO_DEVICE else f"the GPU's driver does not start: {text}"
        raise NoGpu(f"{what} ({name})", hint=HINTS.get(name))
    return library
