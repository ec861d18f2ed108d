"""torch's products on memory of ours, with torch's own settings: what our kernels are timed against, beside cuBLAS.

    y = x Wᵀ      x (rows, k), W (n, k), y (rows, n), all row by row

torch writes into y, so that it allocates nothing, and can be captured in a CUDA graph as cuBLAS is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.cublas import Product
from graphopt.benchmarking.on_gpu import TorchStream
from graphopt.errors import GraphoptError
from graphopt.gpu.arrays import DeviceArray
from graphopt.gpu.driver import Context, Stream


class Torch:
    """torch.mm, in our stream.

    Attributes:
        title: The library and its version.
    """

    def __init__(self, context: Context, stream: Stream) -> None:
        """Raises MissingDependency where there is no torch for this GPU, GraphoptError where it does not run on it."""
        self._context, self._stream = context, stream
        self._torch = TorchStream(context, stream)
        self.title = f"torch {self._torch.version}"
        memory = context.allocate(3 * 16 * 16 * 2)
        stream.fill(memory)
        size = 16 * 16 * 2
        x, weight, y = (memory.pointer + index * size for index in range(3))
        self.prepare(Product("float16", 16, 16, 16, x, weight, y, 16, 16))()  # a torch of another GPU's fails here
        with self._plain_words():
            stream.synchronize()

    def prepare(self, product: Product) -> Callable[[], None]:
        """What puts the product into the stream."""
        x = self._matrix(product.dtype, product.x, product.rows, product.k, product.x_stride)
        weight = self._matrix(product.dtype, product.weight, product.n, product.k, product.k).t()
        y = self._matrix(product.dtype, product.y, product.rows, product.n, product.y_stride)

        def call() -> None:
            with self._plain_words(), self._torch.current():
                self._torch.torch.mm(x, weight, out=y)

        return call

    def _matrix(self, dtype: str, pointer: int, rows: int, columns: int, stride: int) -> Any:
        """A matrix whose rows begin ``stride`` elements apart."""
        flat = DeviceArray(self._context, pointer, ((rows - 1) * stride + columns,), dtype)
        with self._plain_words():
            return self._torch.tensor(flat).as_strided((rows, columns), (stride, 1))

    @contextmanager
    def _plain_words(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # all that torch raises of a GPU
            said = str(error).strip().partition("\n")[0]
            raise GraphoptError(f"{self.title} failed: {said}") from error
