"""What a folder for onnxruntime-genai goes on with after a prompt: from the stock runtime, and from our own runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edgebake import signatures
from edgebake_targets.runners import onnxruntime_decoder


def stock(genai: Any, folder: Path, prompt: str, new: int) -> list[int]:
    """The prompt's tokens and up to ``new`` more, the likeliest each time, from the module ``genai``."""
    model = genai.Model(str(folder))
    ids = genai.Tokenizer(model).encode(prompt)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + new, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def ours(folder: Path, prompt: str, new: int) -> list[int]:
    """The same from ``onnxruntime-decoder``, the prompt read in parts; a token that ends the text is the last."""
    from tokenizers import Tokenizer

    signature = signatures.from_json(json.loads((folder / "manifest.json").read_text())["signature"])
    language = signature.language
    assert language is not None
    session = onnxruntime_decoder.open(folder / "model.onnx", signature)
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt).ids
    end, read = len(ids) + new, 0
    while len(ids) < end and (read == 0 or ids[-1] not in language.stop):
        while read < len(ids):
            part = ids[read : read + signature.dims["seq"].max]
            logits = session.call("forward", {"tokens": np.array([part]), "input_pos": np.array([read])})["logits"]
            read += len(part)
        ids.append(int(logits[0, -1].argmax()))
    return ids
