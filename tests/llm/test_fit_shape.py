"""Parameters read off configurations: published totals, and transformers' own modules on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgebake.errors import RecipeError
from edgebake.llm.fit_shape import FAMILIES, Weight, decoder_of, read_config
from edgebake.llm.fit_size import FORMATS, weight_bytes

CONFIGS = Path(__file__).resolve().parents[2] / "recipes/llm/configs"
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((family, {}) for family in FAMILIES),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    ("llama", {"num_key_value_heads": None}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 16, "attention_bias": True}),
    ("gemma", {"tie_word_embeddings": False}),
    ("phi", {"qk_layernorm": True}),
)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # counted in the published safetensors
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("qwq-32b", 32_763_876_352),
        ("qwen3-0.6b", 596_049_920),
    ],
)
def test_shipped_configurations_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert read_config(CONFIGS / name).parameters == parameters


def test_groups_with_zero_points_take_a_float_more_each() -> None:
    matrix = Weight(name="up", part="mlp", kind="linear", shape=(160, 64))
    plain, affine = (weight_bytes(matrix, scheme, FORMATS["onnx-genai"]) for scheme in ("w4g32", "w4g32z"))
    assert plain == (160 * 32, 160 * 2 * 4)
    assert affine == (160 * 32, 160 * 2 * 8)


def test_a_tied_head_counts_once() -> None:
    tied, apart = (decoder_of({**SMALL, "model_type": "llama", "tie_word_embeddings": tied}) for tied in (True, False))
    assert apart.parameters - tied.parameters == 320 * 64
    assert (tied.tied, apart.tied) == (True, False)


def test_the_language_model_of_several_modalities_is_read() -> None:
    inner = {**SMALL, "model_type": "gemma3_text"}
    assert decoder_of({"model_type": "gemma3", "text_config": inner}) == decoder_of(inner)


@pytest.mark.parametrize(
    ("raw", "what", "fix"),
    [
        ({**SMALL, "model_type": "mamba"}, "sizes of 'mamba' models cannot be predicted", "llama, mistral"),
        ({"model_type": "llama", "hidden_size": 0}, "hidden_size, intermediate_size, num_attention_heads", "decoder"),
        ([1], "describes no decoder: it missing or of the wrong kind", "decoder"),
    ],
)
def test_what_cannot_be_predicted_says_why(raw: object, what: str, fix: str) -> None:
    with pytest.raises(RecipeError) as error:
        decoder_of(raw)
    assert what in error.value.problems[0].what
    assert fix in error.value.problems[0].fix


def test_a_configuration_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"'config\.json' of .* cannot be read"):
        read_config(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "more"), VARIANTS, ids=str)
def test_parameters_are_those_of_transformers(family: str, more: dict[str, Any]) -> None:
    import torch
    import transformers

    raw = {**SMALL, **more}
    config = transformers.AutoConfig.for_model(family, **raw)
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(config)
    decoder = decoder_of({"model_type": family, **raw})
    assert decoder.parameters == sum(p.numel() for p in network.parameters())
    linear = {n: tuple(m.weight.shape) for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {w.name: w.shape for w in decoder.weights if w.kind == "linear"} == linear
    norms = sum(p.numel() for n, p in network.named_parameters() if "norm" in n)
    assert sum(w.values + w.bias for w in decoder.weights if w.part == "norms") == norms
