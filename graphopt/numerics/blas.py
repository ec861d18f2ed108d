"""How many threads numpy multiplies matrices with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """One thread for numpy's matrix products meanwhile.

    The float64 reference multiplies many small matrices, for which the threads of a BLAS wait for each other: MiniLM
    takes 0.02 s with one and up to 0.8 s with two.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(limits=1, user_api="blas"):
        yield
