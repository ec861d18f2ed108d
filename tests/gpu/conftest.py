"""What tests on a real GPU share. They are run by `make gpu`; elsewhere they are left out, not passed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from graphopt.gpu.context import Context
from graphopt.gpu.driver import find_driver


@pytest.fixture
def context() -> Iterator[Context]:
    assert not os.environ.get("GRAPHOPT_LIBCUDA"), "a stand-in for the driver proves nothing here"
    with find_driver().open() as opened:
        yield opened
