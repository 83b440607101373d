"""Large trained decoders: the weights that transformers loads, in files that are mapped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import decoders
from edgebake import mapped
from edgebake.errors import RecipeError
from edgebake.models import transformers as hugging_face
from edgebake.models._request import LoadRequest
from edgebake.recipe import Component


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "LEAST", 1 << 10)
    monkeypatch.setattr(mapped, "_WEIGHT", 1 << 12)


def load(folder: Path) -> torch.nn.Module:
    asked = Component.model_validate(decoders.component(folder))
    return hugging_face.load(LoadRequest(model=asked.model, component=asked, base=folder)).methods["forward"]


def in_files(network: torch.nn.Module) -> int:
    return sum(weight.data_ptr() in mapped._MAPS for weight in network.parameters())


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def cast(folder: Path, dtype: torch.dtype) -> None:
    file = folder / "model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, {"format": "pt"})


def split(folder: Path) -> None:
    """Into two files and an index."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    places = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
    for part in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == part}, folder / part, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    file.unlink()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mapped_weights_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    decoders.save(tmp_path, kind, tie_word_embeddings=kind == "llama")
    cast(tmp_path, dtype)
    split(tmp_path)
    made = load(tmp_path)
    monkeypatch.setattr(mapped, "LEAST", 1 << 40)
    plain = load(tmp_path)
    assert in_files(made) > 10
    assert in_files(plain) == 0
    ours, theirs = weights(made), weights(plain)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert value.dtype == ours[name].dtype
        assert torch.equal(value, ours[name]), name
        assert value.requires_grad == ours[name].requires_grad
    given = torch.arange(3, 9)[None], torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(made(*given)[0], plain(*given)[0])


def test_a_checkpoint_of_other_names_is_left_to_transformers(tmp_path: Path) -> None:
    decoders.save(tmp_path)
    before = weights(load(tmp_path))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    made = load(tmp_path)
    assert in_files(made) == 0
    assert all(torch.equal(value, weights(made)[name]) for name, value in before.items())


def test_integers_that_no_weight_is_made_of_do_not_matter(tmp_path: Path) -> None:
    decoders.save(tmp_path)
    before = weights(load(tmp_path))
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.position_ids": torch.arange(8)}, file, {"format": "pt"})
    assert all(torch.equal(value, weights(load(tmp_path))[name]) for name, value in before.items())


def test_weights_in_integers_are_refused(tmp_path: Path) -> None:
    decoders.save(tmp_path)
    cast(tmp_path, torch.int8)
    with pytest.raises(RecipeError, match=r"the tensor 'model\.embed_tokens\.weight' is 'I8', not one of") as caught:
        load(tmp_path)
    assert "start from the float checkpoint" in str(caught.value)


def test_a_checkpoint_that_is_cut_off_says_so(tmp_path: Path) -> None:
    decoders.save(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RecipeError, match="cut off"):
        load(tmp_path)
