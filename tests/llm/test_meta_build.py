"""Checkpoints as Meta publishes them, built as users build them: their integers are in the file, bit for bit."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

import baking
import meta_checkpoints as checkpoints
from edgebake_targets.inspectors import pte

TEXT = "\n".join(f"{n} times a line of the text that is read, and then {n * n} of another." for n in range(40))
INT4 = {"target": "executorch-xnnpack", "scheme": "w4g32a8d", "compress": {"modules": checkpoints.SCHEMES}}


def kitchen(folder: Path, kind: str, *targets: Any, **more: Any) -> tuple[baking.Kitchen, dict[str, torch.Tensor]]:
    (folder / "recipe").mkdir()
    (folder / "recipe" / "text.txt").write_text(TEXT)
    state = checkpoints.write(folder / "model", kind)
    samples = {"evaluation": {"text": "text.txt", "length": 24, "count": 4}}
    given = checkpoints.component(Path("../model"), context=64)
    return baking.kitchen(folder, targets, name="published", samples=samples, **{**given, **more}), state


def payloads(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Digest of what XNNPACK and ExecuTorch store of each weight of integers, those of 4 bits two in a byte plus 8."""
    integers = {name: q for name, q in state.items() if q.dtype == torch.int8}
    stored = {name: packed(name, q) if name.startswith("layers.") else q for name, q in integers.items()}
    return {name: sha256(q.contiguous().numpy().tobytes()).hexdigest() for name, q in stored.items()}


def packed(name: str, q: torch.Tensor) -> torch.Tensor:
    """Integers of 4 bits, rows of queries and keys in transformers' order."""
    half = checkpoints.DIM // checkpoints.HEADS // 2
    pairs = name.endswith(("wq.weight", "wk.weight"))
    rows = q.reshape(-1, half, 2, q.shape[1]).transpose(1, 2).reshape(q.shape) if pairs else q
    shifted = (rows + 8).to(torch.uint8)
    return shifted[:, ::2] | shifted[:, 1::2] << 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spinquant", "qlora"])
def test_the_file_holds_the_integers_of_the_checkpoint(kind: str, tmp_path: Path) -> None:
    place, state = kitchen(tmp_path, kind, INT4, limits={"language": {"kl": 0.1}})
    done = place.build("--strict")
    assert done.code == 0, done.err + done.out
    (result,) = done.results
    file = Path(result["folder"]) / "model.pte"
    found = {record.digest for record in pte.inspect(file).weights}
    wanted = payloads(state)
    assert len(wanted) == 16
    assert {name for name, digest in wanted.items() if digest not in found} == set()
    # Rounding is the checkpoint's own: what is left are 8-bit activations and scales of 8 bits.
    assert result["measurements"]["outputs"]["logits"]["sqnr_db"] > 25


@pytest.mark.slow
def test_targets_that_know_a_decoders_own_weights_alone_refuse_others(tmp_path: Path) -> None:
    genai = {"target": "onnx-genai", "scheme": "w4g32", "compress": {"modules": checkpoints.SCHEMES}}
    done = kitchen(tmp_path, "qlora", genai)[0].build()
    assert done.code == 4, done.err + done.out
    assert "the graph for onnxruntime-genai has no place for model.layers.0.mlp.down_proj.adapter.a.weight" in done.out
