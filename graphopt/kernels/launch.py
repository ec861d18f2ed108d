"""Launches kernels through the driver as TensorRT launches them: its PTX, the grid worked out from the shapes, and the
arguments in the order inputs, int32 scalars, outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (numpy then knows bfloat16 by its name)
import numpy as np
import numpy.typing as npt

from graphopt.errors import GraphoptError
from graphopt.gpu import arrays
from graphopt.gpu.arrays import DeviceArray
from graphopt.gpu.context import Context
from graphopt.gpu.driver import Device
from graphopt.gpu.streams import Stream
from graphopt.kernels.compile import Ptx, compile_ptx
from graphopt.kernels.kernel import ARCHITECTURES, Kernel

Array = npt.NDArray[Any]


def architecture_of(device: Device) -> str:
    """The newest architecture that kernels are compiled for and a GPU runs.

    Raises:
        GraphoptError: The GPU is older than all of them.
    """
    number = device.capability[0] * 10 + device.capability[1]
    fitting = [name for name in ARCHITECTURES if int(name.removeprefix("compute_")) <= number]
    if not fitting:
        oldest = int(ARCHITECTURES[0].removeprefix("compute_"))
        have = ".".join(map(str, device.capability))
        raise GraphoptError(
            f"{device.name} has compute capability {have}; the kernels need {oldest // 10}.{oldest % 10} or newer"
        )
    return fitting[-1]


class LoadedKernel:
    """A kernel on a GPU.

    Attributes:
        kernel: Which.
        ptx: What was loaded.
        function: Its entry on the device, with the registers and the shared memory that it takes.
    """

    def __init__(self, context: Context, kernel: Kernel, ptx: Ptx | None = None) -> None:
        """Compile and load; ``ptx`` is for the device's `architecture_of` if None.

        Raises:
            MissingDependency: The compiler is not installed.
            GraphoptError: It does not compile, the driver refuses it, or the GPU is too old.
        """
        self.kernel = kernel
        self.ptx = ptx if ptx is not None else compile_ptx(kernel, architecture_of(context.device))
        self.context = context
        self.function = context.load(self.ptx.text).function(kernel.name)

    def prepare(
        self, stream: Stream, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]
    ) -> Callable[[], None]:
        """Work out the launch for some arrays; each call of what is returned launches the kernel on them.

        Args:
            stream: Where it runs.
            inputs: One for each input parameter, in order, of its dtype.
            outputs: The same of the output parameters.

        Raises:
            GraphoptError: The arrays are not those that the kernel takes.
        """
        kernel = self.kernel
        for kind, given in (("input", inputs), ("output", outputs)):
            wanted = [parameter for parameter in kernel.parameters if parameter.kind == kind]
            if len(wanted) != len(given):
                raise GraphoptError(f"takes {len(wanted)} {kind}s, not {len(given)}", where=kernel.name)
            for parameter, array in zip(wanted, given, strict=True):
                if np.dtype(parameter.dtype) != array.dtype:
                    what = f"{kind} '{parameter.name}' is {array.dtype.name}; {parameter.dtype} is wanted"
                    raise GraphoptError(what, where=kernel.name)
        launch = kernel.launch([array.shape for array in inputs])
        scalars = [parameter for parameter in kernel.parameters if parameter.kind == "scalar"]
        if len(scalars) != len(launch.scalars):
            what = f"takes {len(scalars)} scalars, and its launch gives {len(launch.scalars)}"
            raise GraphoptError(what, where=kernel.name)
        grid = tuple(int(size) for size in launch.grid)
        arguments: list[int | np.int32] = [
            *(array.pointer for array in inputs),
            *(np.int32(int(value)) for value in launch.scalars),
            *(array.pointer for array in outputs),
        ]
        function, threads, shared = self.function, kernel.threads, kernel.shared
        held = (*inputs, *outputs)  # as long as the launches may come

        def call() -> None:
            assert held is not None
            function.launch(stream, grid, threads, arguments, shared)

        return call

    def run(self, inputs: Sequence[Array], outputs: Sequence[tuple[Sequence[int], npt.DTypeLike]]) -> list[Array]:
        """Run it once on arrays of the host.

        Args:
            inputs: One for each input parameter.
            outputs: The shape and the dtype of each output. Their memory is filled with NaN first, in every dtype
                that has it, so that what is not written shows.

        Raises:
            GraphoptError: As `prepare`; or the kernel broke down.
        """
        with self.context.stream() as stream:
            given = [arrays.upload(self.context, array) for array in inputs]
            made = [arrays.allocate(self.context, shape, dtype) for shape, dtype in outputs]
            for array in made:
                if array.nbytes:
                    self.context.library.call("cuMemsetD8Async", array.pointer, 255, array.nbytes, stream.handle)
            self.prepare(stream, given, made)()
            stream.synchronize()
            return [array.numpy() for array in made]
