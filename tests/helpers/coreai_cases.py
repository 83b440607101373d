"""What is asked of the Core AI target, for the network that the tests of the Core ML target lower, too."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from asking import defaults, lower_request
from coreml_cases import KINDS, network
from edgebake.target import LowerRequest
from edgebake.types import Assignment, Lowered, Verdict
from edgebake_targets import coreai
from edgebake_targets._coreai_asset import HASH, PROGRAM

INSTALLED = pytest.mark.skipif(
    find_spec("coreai") is None or find_spec("coreai_torch") is None,
    reason="Core AI's packages are not installed: pip install 'edgebake[coreai]'",
)
IDS = np.arange(3, 15)[None]


def ask(folder: Path, schemes: Mapping[str, str], scheme: str = "fp32", **options: str) -> LowerRequest:
    folder.mkdir(parents=True, exist_ok=True)
    assignment = Assignment(schemes=schemes, kinds=KINDS)
    return lower_request(folder, {**defaults(coreai), **options}, scheme=scheme, assignment=assignment)


def verdicts(folder: Path, lowered: Lowered) -> dict[str, Verdict]:
    found = coreai.structure(folder / lowered.entry, lowered.signature, coreai.read_checks(folder))
    return {verdict.limit: verdict for verdict in found}


def float_outputs() -> dict[str, NDArray[np.float32]]:
    """What the network gives for ``IDS``."""
    import torch

    with torch.no_grad():
        hidden, logits = network()(torch.from_numpy(IDS))
    return {"hidden": hidden.numpy(), "logits": logits.numpy()}


def decibels(exact: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    noise = float(np.square(exact.astype(np.float64) - found).sum())
    return float("inf") if not noise else 10 * float(np.log10(np.square(exact.astype(np.float64)).sum() / noise))


def changed(asset: Path, folder: Path, before: bytes, after: bytes, *, sign: bool = True) -> Path:
    """A copy whose program holds ``after`` in the place of ``before``, with a hash that fits when ``sign``."""
    path = Path(shutil.copytree(asset, folder / "changed.aimodel"))
    program = (path / PROGRAM).read_bytes()
    assert program.count(before) == 1 and len(before) == len(after)
    (path / PROGRAM).write_bytes(program.replace(before, after))
    if sign:
        (path / HASH).write_bytes(sha256((path / PROGRAM).read_bytes()).digest())
    return path
