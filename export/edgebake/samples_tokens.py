"""Samples of running text for a network with a key/value cache: windows of tokens, each read from an empty cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgebake.errors import RecipeError
from edgebake.recipe import DECODER_INPUTS, Component, Samples
from edgebake.samples_checks import enough, only_method
from edgebake.samples_text import open_tokenizer, read_lines
from edgebake.types import Call, Sample

_LETTERS = 32  # that a token stands for, at most: no more text than that is looked at


def read_text(spec: Samples, component: Component, path: Path, tokenizer_path: Path | None) -> list[Sample]:
    """Windows ``skip .. skip+count`` of ``length`` tokens of the text's lines in a row, a source each.

    What the tokenizer puts before every text begins each window. A window is a sequence of calls: as many tokens in
    each as the inputs take at once, with the position of the first.
    """
    method, inputs = only_method(component, "text")
    tokens, position = DECODER_INPUTS
    size = inputs[tokens].shape[1]
    once = size if isinstance(size, int) else component.dims[size].max
    if isinstance(size, int) and spec.length % size:
        raise RecipeError(
            f"{spec.length} tokens of text cannot be read {size} at a time",
            fix=f"give samples a length of {spec.length // size * size or size}, or inputs a dimension that varies",
        )
    windows = _windows(spec, path, tokenizer_path)
    enough(spec, len(windows), f"windows of {spec.length} tokens")
    chosen = windows[spec.skip : spec.skip + spec.count]
    samples = []
    for number, window in enumerate(chosen, spec.skip):
        calls = tuple(
            Call(
                inputs={
                    tokens: np.asarray([window[start : start + once]], inputs[tokens].dtype),
                    position: np.asarray([start], inputs[position].dtype),
                },
                method=method,
            )
            for start in range(0, len(window), once)
        )
        samples.append(Sample(calls=calls, source=f"window {number}"))
    return samples


def _windows(spec: Samples, path: Path, tokenizer_path: Path | None) -> list[list[int]]:
    tokenizer = open_tokenizer(tokenizer_path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    first: list[int] = tokenizer.encode("").ids  # such as the token that begins a text
    fresh = spec.length - len(first)
    wanted = (spec.skip + spec.count) * fresh
    text = "\n".join(line for _, line in read_lines(path))[: wanted * _LETTERS]
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return [[*first, *ids[start : start + fresh]] for start in range(0, len(ids) - fresh + 1, fresh)]
