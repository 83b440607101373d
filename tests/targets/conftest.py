"""The network that the tests of the Core ML target lower."""

from __future__ import annotations

import pytest

from coreml_cases import traced_network
from edgebake.types import Traced


@pytest.fixture(scope="session")
def traced() -> Traced:
    return traced_network()
