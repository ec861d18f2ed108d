"""PTX, loaded, and the kernels in it, launched."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.gpu.errors import explain_refused_ptx
from graphopt.gpu.memory import Memory
from graphopt.gpu.resources import Resource, freeing
from graphopt.gpu.streams import Stream

if TYPE_CHECKING:
    from graphopt.gpu.context import Context

_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES = 5, 6
_LOG_BYTES = 16384
_STATIC_SHARED_BYTES = 1  # of cuFuncGetAttribute
_REGISTERS = 4
_LOCAL_BYTES = 3


class Module(Resource):
    """PTX, compiled for the device and loaded."""

    def __init__(self, context: Context, ptx: str) -> None:
        context.make_current()
        library, handle = context.library, ctypes.c_void_p()
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = (ctypes.c_int * 2)(_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        code = library.raw("cuModuleLoadDataEx", ctypes.byref(handle), ptx.encode(), 2, options, values)
        if code:
            name, _ = library.describe(code)
            device, said = context.device, log.value.decode(errors="replace")
            what, hint = explain_refused_ptx(name, code, said, ptx, context.driver.cuda, device.name, device.capability)
            raise GraphoptError(what, hint=hint)
        super().__init__(context, handle.value or 0, freeing(context, "cuModuleUnload", handle.value))

    def function(self, name: str) -> Function:
        """A kernel by its entry name. Raises CudaError where there is none."""
        return Function(self, name)


class Function:
    """A kernel of a loaded module.

    Attributes:
        static_shared: Bytes of shared memory that it declares.
        registers: Registers of a thread.
        local_bytes: Bytes of a thread that spilled out of the registers.
    """

    def __init__(self, module: Module, name: str) -> None:
        self.module = module  # must outlive this
        self.name = name
        library, handle = module.context.library, ctypes.c_void_p()
        module.context.make_current()
        library.call("cuModuleGetFunction", ctypes.byref(handle), module.handle, name.encode())
        self.handle = handle.value or 0

        def attribute(which: int) -> int:
            value = ctypes.c_int()
            library.call("cuFuncGetAttribute", ctypes.byref(value), which, self.handle)
            return value.value

        self.static_shared = attribute(_STATIC_SHARED_BYTES)
        self.registers = attribute(_REGISTERS)
        self.local_bytes = attribute(_LOCAL_BYTES)

    def launch(
        self,
        stream: Stream,
        grid: Sequence[int],
        threads: int,
        arguments: Sequence[Memory | int | np.int32],
        shared: int = 0,
    ) -> None:
        """Start the kernel.

        Args:
            stream: Where.
            grid: Blocks along x, y, z.
            threads: Of a block.
            arguments: In the kernel's order: device memory (or its address, a plain int), and np.int32 for scalars.
            shared: Dynamic shared memory of a block, in bytes.
        """
        boxes: list[Any] = [
            ctypes.c_int32(int(value))
            if isinstance(value, np.int32)
            else ctypes.c_uint64(value.pointer if isinstance(value, Memory) else value)
            for value in arguments
        ]
        pointers = (ctypes.c_void_p * max(len(boxes), 1))(*(ctypes.addressof(box) for box in boxes))
        self.module.context.make_current()
        self.module.context.library.call(
            "cuLaunchKernel", self.handle, *grid, threads, 1, 1, shared, stream.handle, pointers, None
        )
