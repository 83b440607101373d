"""What the tests of executorch-qnn run with: the toolchain that is here, or one made for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgebake_targets import _qnn_toolchain, executorch_qnn

RUNNER = "executorch-qnn-simulator"


@contextmanager
def toolchain(folder: Path) -> Iterator[Path]:
    """The store whose toolchain can be used: the user's, or ``folder`` where it has been made."""
    with pytest.MonkeyPatch.context() as patch:
        if executorch_qnn.missing() is not None:
            patch.delenv(_qnn_toolchain.VARIABLE, raising=False)
            patch.setenv("EDGEBAKE_STORE", str(folder))
            executorch_qnn.fix(folder / "toolchains")
        assert executorch_qnn.missing() is None
        yield folder
