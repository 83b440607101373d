"""Training inside a build: its curve is in the report, and its parts are in the store for a build that goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import baking
import decoders

TEXT = "\n".join(f"{n} times a line of the text that is read, and then {n * n} of another." for n in range(40))
STEP = {"method": "qat", "options": {"steps": 4, "part": 2, "rank": 4}}
TARGET = {
    "target": "executorch-xnnpack",
    "scheme": "w4g32a8d",
    "compress": {"modules": {"model.embed_tokens": "w8", "lm_head": "w8a8d"}, "steps": [STEP]},
}


@pytest.mark.slow
def test_a_build_that_goes_on_trains_no_finished_part_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    decoders.save(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "text.txt").write_text(TEXT)
    samples = {
        "calibration": {"text": "text.txt", "length": 24, "count": 3},
        "evaluation": {"text": "text.txt", "length": 24, "count": 3, "skip": 6},
    }
    given = decoders.component(Path("../model"), samples=samples)
    place = baking.kitchen(tmp_path, [TARGET], name="trained", **given)
    done = place.build()
    assert done.code == 0, done.err + done.out
    (note,) = [note for note in done.results[0]["measurements"]["notes"] if note.startswith("qat: ")]
    assert note.startswith("qat: 4 steps, rank 4, adapters merge; divergence from the float network on the first")
    assert "(nats per position); each step: " in note
    made, entries = baking.digests(place.out), place.store / "v1" / "entries"
    parts = {file: file.stat().st_mtime_ns for file in (entries / "part").rglob("*.safetensors")}
    assert len(parts) == 2
    for stage in ("trace", "compress", "lower", "validate"):  # as a kill in training leaves it
        shutil.rmtree(entries / stage)
    shutil.rmtree(place.out)
    assert place.build().code == 0
    assert baking.digests(place.out) == made
    assert {file: file.stat().st_mtime_ns for file in (entries / "part").rglob("*.safetensors")} == parts
