"""A decoder's shape read off the header of a GGUF file, without its tensors.

Format: ggml's docs/gguf.md, versions 2 and 3. Keys of a model are named after its architecture (``llama.block_count``).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgebake.errors import RecipeError

_FAMILIES = {"gemma3": "gemma3_text", "phi2": "phi"}  # where ggml's name is not transformers'
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_HEADER = 64 << 20  # vocabularies take a few MB
_KEYS = {  # of config.json, and of GGUF
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
}


def config_of(file: Path) -> dict[str, Any]:
    """What a config.json would say of the decoder in ``file``; RecipeError when it is not whole."""
    with file.open("rb") as opened:
        header = _Header(opened.read(_MAX_HEADER))
    try:
        values, tensors = header.read()
    except (struct.error, IndexError, UnicodeDecodeError, KeyError):
        what = f"{file.name} is cut off or no GGUF file"
        raise RecipeError(what, where="model.path", fix="copy the model again") from None
    name = str(values.get("general.architecture"))
    found = {ours: values.get(f"{name}.{theirs}") for ours, theirs in _KEYS.items()}
    found["vocab_size"] = found["vocab_size"] or values.get("tokenizer.ggml.tokens")
    known = {key: value for key, value in found.items() if value is not None}
    return {**known, "model_type": _FAMILIES.get(name, name), "tie_word_embeddings": "output.weight" not in tensors}


class _Header:
    """Reads from the start of the file on; of an array it keeps how long it is."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def read(self) -> tuple[Mapping[str, Any], frozenset[str]]:
        """Values by key, and the names of the tensors."""
        if self._data[:4] != b"GGUF":
            raise IndexError("no GGUF")
        self._at = 4
        _version, tensors, keys = self._number("I"), self._number("Q"), self._number("Q")
        values = {}
        for _ in range(keys):
            key = self._text()
            values[key] = self._value(self._number("I"))
        return values, frozenset(self._tensor() for _ in range(tensors))

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _text(self) -> str:
        length = self._number("Q")
        text = self._data[self._at : self._at + length]
        if len(text) != length:
            raise IndexError("cut off")
        self._at += length
        return text.decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._skip(self._number("I"), self._number("Q"))
        return self._number(_NUMBERS[kind])

    def _skip(self, kind: int, count: int) -> int:
        """Pass over an array of ``count``; strings are looked at one by one, as each has its own length."""
        if kind == _STRING:
            for _ in range(count):
                (length,) = struct.unpack_from("<Q", self._data, self._at)
                self._at += 8 + length
        elif kind == _ARRAY:
            for _ in range(count):
                self._value(_ARRAY)
        else:
            self._at += count * struct.calcsize(f"<{_NUMBERS[kind]}")
        return count

    def _tensor(self) -> str:
        name = self._text()
        for _ in range(self._number("I")):
            self._number("Q")
        self._number("I")
        self._number("Q")
        return name
