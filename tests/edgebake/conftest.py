"""What tests of several modules are given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebake.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store")
    yield made
    made.close()
