"""The build that tests of robustness damage: each of them leaves it as whole as it found it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from baking import Kitchen, digests, kitchen


@dataclass(frozen=True)
class Baked:
    """A finished build, and the digests of what nothing had disturbed."""

    kitchen: Kitchen
    digests: dict[str, str]


@pytest.fixture(scope="session")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Baked:
    if os.name != "posix":
        pytest.skip("signals, inodes and modes")
    made = kitchen(tmp_path_factory.mktemp("baked"))
    done = made.build()
    assert done.code == 0, done.err
    return Baked(made, digests(made.out))
