"""A decoder lowered from its files: nothing loaded or traced for it, and the artifact that a loaded one gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import baking
import decoders
import edgebake
import edgebake_targets
import streamed_killed
from edgebake import trace
from edgebake.check import check
from edgebake.llm import fit_memory, random_weights
from edgebake.llm.streaming import streams
from edgebake.models import transformers as hugging_face
from edgebake.models._request import LoadRequest
from edgebake.recipe import Component
from edgebake.recipe_yaml import read
from edgebake.reports import _language
from storing import POSIX

TEXT = "\n".join(f"{n} times a line of the text that is read, and then {n * n} of another." for n in range(40))
SMALL = {"model.embed_tokens": "w8", "lm_head": "w8a8d"}
W4 = {"target": "onnx-genai", "scheme": "w4g32", "compress": {"modules": SMALL}}
LIMITS = {"language": {"top1": 0.3, "stepwise_db": 60}, "parity": {"sqnr_db": 1}}


def kitchen(folder: Path, targets: Sequence[Any] = (W4,), **model: Any) -> baking.Kitchen:
    (folder / "model").mkdir()
    decoders.save(folder / "model")
    (folder / "recipe").mkdir()
    (folder / "recipe" / "text.txt").write_text(TEXT)
    samples = {"evaluation": {"text": "text.txt", "length": 40, "skip": 4, "count": 6}}
    given = decoders.component(Path("../model"))
    given["model"] |= model
    return baking.kitchen(folder, targets, name="decoder", samples=samples, limits=LIMITS, **given)


def request(folder: Path, **model: Any) -> LoadRequest:
    given = decoders.component(folder)
    asked = Component.model_validate({**given, "model": {**given["model"], **model}})
    return LoadRequest(model=asked.model, component=asked, base=folder)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_description_says_what_loading_would(tmp_path: Path, kind: str) -> None:
    decoders.save(tmp_path, kind)
    described, loaded = hugging_face.describe(request(tmp_path)), hugging_face.load(request(tmp_path))
    modules = trace.live_modules(loaded)
    states = {name for name, _ in loaded.methods["forward"].named_buffers() if name.endswith("_cache")}
    inside = {name.removeprefix("wrapped.") for name in states}
    assert described.signature == loaded.signature
    assert described.modules == modules
    assert described.facts == loaded.facts
    assert described.companions == loaded.companions
    assert described.float_bytes == trace.float_bytes(loaded.methods.values(), {m.name for m in modules}, inside)


def test_random_weights_are_the_same_loaded_and_streamed(tmp_path: Path) -> None:
    decoders.save(tmp_path)
    given = request(tmp_path, weights="random", seed=3)
    tensors, network = hugging_face.tensors(given), hugging_face.load(given).methods["forward"]
    held = {name.removeprefix("wrapped."): weight for name, weight in network.named_parameters()}
    assert set(tensors.names) == set(held)
    for name in tensors.names:
        np.testing.assert_array_equal(tensors.whole(name), held[name].detach().numpy())
    other = hugging_face.tensors(request(tmp_path, weights="random", seed=4))
    assert not np.array_equal(tensors.whole("model.embed_tokens.weight"), other.whole("model.embed_tokens.weight"))


def test_random_matrices_do_not_depend_on_how_many_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_weights.RandomTensors({"a.weight": (50, 7)}, 0, 0.5)
    whole = made.whole("a.weight")
    monkeypatch.setattr(random_weights, "CHUNK_BYTES", 3 * 7 * 4)
    assert len(list(made.rows("a.weight"))) == 17
    np.testing.assert_array_equal(made.whole("a.weight"), whole)
    assert whole.std() == pytest.approx(0.5, rel=0.2)
    torch.testing.assert_close(torch.from_numpy(whole).mean(), torch.tensor(0.0), atol=0.1, rtol=0)


@pytest.mark.parametrize(("model", "wanted"), [({}, True), ({"layers": 1}, False), ({"pickles": True}, False)])
def test_what_has_to_be_loaded_is_not_streamed(tmp_path: Path, model: dict[str, Any], wanted: bool) -> None:
    made = kitchen(tmp_path, **model)
    (unit,), _ = check([read(made.recipe)], trust=True)
    assert streams(unit) is wanted


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> baking.Kitchen:
    return kitchen(tmp_path_factory.mktemp("streamed"))


@pytest.mark.slow
def test_a_build_neither_traces_nor_needs_the_float_network_to_lower(place: baking.Kitchen) -> None:
    done = place.build("--strict")
    assert done.code == 0, done.err + done.out
    (result,) = done.results
    assert list(result["measurements"]["stages"]) == ["describe", "lower", "load", "reference", "validate"]
    stages = result["measurements"]["stages"]
    assert max(stages[name]["peak_mib"] for name in ("describe", "lower")) * 2**20 < 1.15 * fit_memory.STREAM_BASE
    language = result["measurements"]["language"]
    assert language["stepwise"]["sqnr_db"] > 60
    assert 0 < language["kl"] < 2
    assert place.build().stages == [{"deliver": "unchanged"}]
    explained = baking.finish(baking.start("explain", place.recipe, "--store", place.store, "--out", place.out))
    assert [line.split(":")[0].strip() for line in explained.out.splitlines()[1:]] == STAGES_EXPLAINED


STAGES_EXPLAINED = ["reference", "describe", "lower", "validate"]


@pytest.mark.slow
def test_a_network_larger_than_memory_is_lowered_and_its_outputs_not_measured(
    place: baking.Kitchen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_memory, "float_peak_bytes", lambda *_: 1 << 50)
    (result,), _ = baking.rebuild(place)
    assert (result.state, result.unmeasured) == ("pass", 2)
    reason = "running the float model takes 1048576.00 GiB of memory (predicted), and this machine has "
    unmeasured = [v for v in result.verdicts if v.state == "not measured"]
    assert {v.limit for v in unmeasured} == {"language.top1", "parity.sqnr_db"}
    assert all(v.reason.startswith(reason) for v in unmeasured)
    (alone,) = (v for v in result.verdicts if v.limit == "language.stepwise_db")
    assert alone.state == "pass"
    assert "load" not in result.measurements["stages"]
    assert next(_language.lines(result.measurements))[1].startswith("token by token against at once: ")
    assert not _language.cell(result.measurements)
    assert result.folder is not None
    judged = baking.finish(baking.start("verify", result.folder, "--json"))
    assert judged.code == 0, judged.err
    assert json.loads(judged.out)["results"][0]["state"] == "pass"


@pytest.mark.slow
def test_an_artifact_larger_than_memory_is_written_and_not_run(
    place: baking.Kitchen, monkeypatch: pytest.MonkeyPatch
) -> None:
    for peak in ("float_peak_bytes", "run_peak_bytes"):
        monkeypatch.setattr(fit_memory, peak, lambda *_: 1 << 50)
    (result,), _ = baking.rebuild(place)
    assert result.state == "not measured"
    assert {v.state for v in result.verdicts} == {"not measured"}
    assert result.measurements["runner"] is None
    reason = "running the artifact takes 1048576.00 GiB of memory (predicted), and this machine has "
    assert result.measurements["not_measured"].startswith(reason)
    assert result.measurements["size"]["bytes"] > 0


@POSIX
def test_what_a_killed_build_wrote_is_not_written_again(tmp_path: Path) -> None:
    recipe, store = kitchen(tmp_path).recipe, tmp_path / "killed"
    whole, everything = streamed_killed.lower(recipe, tmp_path / "whole")
    roots = [str(Path(package.__file__ or "").parents[1]) for package in (edgebake, edgebake_targets)]
    killed = [sys.executable, streamed_killed.__file__, str(recipe), str(store), "15"]
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    assert subprocess.run(killed, check=False, capture_output=True, env=path).returncode == -signal.SIGKILL
    assert not list((store / "v1" / "entries").glob("lower/*"))
    again, written = streamed_killed.lower(recipe, store)
    assert again == whole
    assert 15 < everything
    assert everything - written in (13, 14)  # the tensor that was being written, and its scales where it has some
    assert not list((store / "v1" / "begun").iterdir())
