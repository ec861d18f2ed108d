from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu_driver.standin import StandIn, standing_in


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with standing_in(tmp_path, monkeypatch) as made:
        yield made
