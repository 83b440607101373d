"""Steps whose parts a store keeps, and processes that are killed in the middle of one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import outlier_decoders
from edgebake.compress import awq, gptq, spinquant
from edgebake.store import Store
from edgebake.workbench import keeping

# What each step does once for every layer, group of layers or few steps: where it is, and how much of it there is.
WORK: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "gptq": (gptq, gptq, "found", {}),
    "awq": (awq, awq, "_factors", {}),
    "spinquant": (spinquant, spinquant._Learner, "learn", {"steps": 10}),
}


class Killed(Exception):
    """In the place of a signal."""


def keeper(root: Path, most: int | None = None) -> tuple[Callable[..., Path], list[str]]:
    """Keeps parts in ``root``, and dies before it would fill the one after ``most``; the parts that it filled."""
    filled: list[str] = []

    def keep(part: str, fill: Callable[[Path], object]) -> Path:
        folder = root / part
        if not folder.exists():
            if len(filled) == most:
                raise Killed
            made = root / "making"
            made.mkdir()
            fill(made)
            made.rename(folder)
            filled.append(part)
        return folder

    return keep, filled


@contextmanager
def _one_thread() -> Iterator[None]:
    """Two threads add in another order than one, and whoever runs the tests may have set either."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def apply(root: Path, step: str, last: int = -1) -> tuple[dict[str, torch.Tensor], list[str], int]:
    """Weights after ``step``, what it told, and how often it worked; killed in work number ``last``."""
    method, place, name, options = WORK[step]
    work, done = getattr(place, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        if len(done) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(name)
        return work(*args, **kwargs)

    network, said = outlier_decoders.network(), []  # type: ignore[var-annotated]
    request = outlier_decoders.request(network, outlier_decoders.linears(network, "w4"), said, **options)
    keep: Callable[..., Path] = keeping(SimpleNamespace(store=Store(root)), "part", "key", step)  # type: ignore[arg-type]
    with mock.patch.object(place, name, counted), _one_thread():
        made = method.apply(replace(request, keep=keep))
    return dict(made.named_parameters()), said, len(done)


if __name__ == "__main__":
    apply(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
