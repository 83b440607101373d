"""Where a step keeps the parts of its work, so that a killed build goes on from the last one that was finished."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgebake.target import ModuleRequest

if TYPE_CHECKING:
    from edgebake.types import Keep


@contextmanager
def keeping(request: ModuleRequest) -> Iterator[Keep]:
    """The store's place for parts, or where ``request`` has none a folder that goes with them."""
    if request.keep is not None:
        yield request.keep
        return
    with tempfile.TemporaryDirectory(prefix="edgebake-parts-") as scratch:

        def keep(part: str, fill: Callable[[Path], object]) -> Path:
            folder = Path(scratch) / part
            if not folder.exists():
                folder.mkdir()
                fill(folder)
            return folder

        yield keep
