"""A transformers decoder with a key/value cache: what it computes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import decoders
from edgebake.errors import EdgebakeError, RecipeError, StageFailed
from edgebake.llm import decoder
from edgebake.models import transformers as hugging_face
from edgebake.models._request import LoadRequest
from edgebake.recipe import Component
from edgebake.trace import live_modules, trace
from edgebake.types import Language, Loaded

TOKENS = torch.randint(3, decoders.WORDS, (1, 40), generator=torch.Generator().manual_seed(1))


def load(folder: Path, **model: Any) -> Loaded:
    given = decoders.component(folder)
    component = Component.model_validate({**given, "model": {**given["model"], **model}})
    return hugging_face.load(LoadRequest(model=component.model, component=component, base=folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder)


def in_parts(module: Any, *ends: int) -> torch.Tensor:
    """Logits of TOKENS up to the last of ``ends``, read in parts that end there."""
    with torch.no_grad():
        starts = (0, *ends[:-1])
        parts = [module(TOKENS[:, a:b], torch.tensor([a]))[0] for a, b in zip(starts, ends, strict=True)]
    return torch.cat(parts, 1)


def whole(folder: Path) -> torch.Tensor:
    """Logits of transformers' own network without a cache."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    return logits


# Sizes that differ from Llama's in what the caches and the attention see.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": decoders.CONTEXT},
    "phi3": {"pad_token_id": 0},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 12},
    "gemma2": {"head_dim": 32, "sliding_window": 12, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
    "phi": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_read_in_parts_is_what_the_network_says_at_once(kind: str, tmp_path: Path) -> None:
    folder = decoders.save(tmp_path, kind.partition("-")[0], **FAMILIES[kind])
    module = load(folder).methods["forward"]
    assert torch.allclose(in_parts(module, 7, 8, 9, 24, 40), whole(folder), atol=1e-4, rtol=1e-4)


def test_an_exported_decoder_keeps_its_caches(loaded: Loaded, folder: Path) -> None:
    traced = trace(loaded)
    written = traced.signature.methods["forward"].buffers
    assert written == tuple(sorted(f"model.layers.{n}.self_attn.{what}" for n in (0, 1) for what in decoder.CACHES))
    runnable = traced.programs["forward"].module()
    assert torch.allclose(in_parts(runnable, 5, 6, 20), whole(folder)[:, :20], atol=1e-4, rtol=1e-4)


def test_every_layer_of_a_decoder_can_be_compressed(loaded: Loaded) -> None:
    names = {module.name for module in live_modules(loaded)}
    assert {"lm_head", "model.embed_tokens", "model.layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj"} <= names


def test_a_decoder_says_what_generates_text_with_it(loaded: Loaded) -> None:
    assert loaded.signature.language == Language(
        context=decoders.CONTEXT,
        vocabulary=decoders.WORDS,
        bos=decoders.BOS,
        stop=(decoders.EOS,),
        tokens=decoders.WORDS,
    )
    assert set(loaded.companions) >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_past_the_end_of_the_cache_there_is_nothing(loaded: Loaded) -> None:
    with pytest.raises((ValueError, RuntimeError)), torch.no_grad():
        loaded.methods["forward"](TOKENS[:, :8], torch.tensor([decoders.CONTEXT - 4]))


def problem(folder: Path, **model: Any) -> Any:
    with pytest.raises((RecipeError, StageFailed)) as caught:
        load(folder, **model)
    (found,) = caught.value.problems
    return found


def test_a_context_beyond_the_networks_own_is_refused(folder: Path) -> None:
    found = problem(folder, context=128)
    assert (found.what, found.fix) == ("the model reaches over 64 tokens, not 128", "give at most context: 64")


def untraced(folder: Path) -> Any:
    """What tracing says of a network that loads: its operators know neither windows nor caps."""
    with pytest.raises(EdgebakeError) as caught:
        trace(load(folder))
    (found,) = caught.value.problems
    return found


def test_a_window_shorter_than_the_context_is_refused(tmp_path: Path) -> None:
    found = untraced(decoders.save(tmp_path, "mistral", sliding_window=32))
    assert found.what == "some layers look back over 32 tokens only, and the cache keeps all 64"
    assert found.fix.startswith("give at most context: 32") and found.fix.endswith("or use onnx-genai")


def test_capped_attention_is_refused(tmp_path: Path) -> None:
    found = untraced(decoders.save(tmp_path, "gemma2", head_dim=32, sliding_window=64))
    assert found.what == "this network caps its attention scores, which the operator of a traced network does not"
    assert found.fix.startswith("use onnx-genai, or remove context")


def test_a_network_without_the_attention_interface_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1}
    found = problem(decoders.save(tmp_path, "mamba2", **sizes, expand=2))
    assert "does not attend through transformers' attention interface" in found.what
