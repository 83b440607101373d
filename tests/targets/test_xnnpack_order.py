"""Delegates listed heaviest first: the same network, and nothing moves where nothing is heavy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgebake.types import ModuleKind, Signature
from edgebake_targets import _xnnpack_order
from edgebake_targets.runners import executorch_runtime
from xnnpack_cases import TEXT, TEXT_KINDS, build, ids, text_network

SCHEMES = dict.fromkeys(("up", "down", "head"), "w8a8d")


def weights(file: Path) -> list[int]:
    """Bytes of the weights of each delegate, in the order of ``file``."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    read = deserialize_pte_binary(file.read_bytes())
    data = read.named_data
    assert data is not None
    sizes = {key: len(data.buffers[entry.buffer_index]) for key, entry in data.pte_data.items()}
    (plan,) = read.program.execution_plan
    payloads = [read.program.backend_delegate_data[d.processed.index].data for d in plan.delegates]
    return [sum(size for key, size in sizes.items() if key.encode() in payload) for payload in payloads]


def made(folder: Path) -> Path:
    folder.mkdir()
    signature: Signature = TEXT
    kinds: dict[str, ModuleKind] = TEXT_KINDS
    lowered, _ = build(text_network(), signature, SCHEMES, kinds, [ids(12)], folder)
    return folder / lowered.entry


def scores(file: Path) -> np.ndarray:
    return executorch_runtime.open(file, TEXT).call("forward", {"ids": ids(9).numpy()})["scores"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_heaviest_are_loaded_first_and_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = made(tmp_path / "plain")
    monkeypatch.setattr(_xnnpack_order, "LEAST", 1)
    ordered = made(tmp_path / "ordered")
    before, after = weights(plain), weights(ordered)
    assert after == sorted(before, reverse=True)
    assert after != before
    assert len(set(after)) > 2
    assert torch.equal(torch.from_numpy(scores(ordered)), torch.from_numpy(scores(plain)))
