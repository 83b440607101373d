"""Samples from text: one line a sample, through the model's own tokenizer, without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebake.errors import RecipeError
from edgebake.recipe import Component, Samples
from edgebake.samples_checks import enough, only_method
from edgebake.types import Call, Sample

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

MAX_BYTES = 256 << 20
FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
PAD_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")


def read_text(spec: Samples, component: Component, path: Path, tokenizer_path: Path | None) -> list[Sample]:
    """Lines ``skip .. skip+count`` that are not blank, as (1, length) tensors.

    A line is cut to the largest size of its dimension and padded up to the smallest only, or, where just some sizes are
    taken, to the next of them. ``group<TAB>line`` makes ``group`` the sample's source; without a group every line is a
    source of its own.
    """
    method, inputs = only_method(component, "text")
    unknown = [name for name in inputs if name not in FIELDS]
    if unknown or "input_ids" not in inputs:
        raise RecipeError(
            f"text gives {', '.join(FIELDS)}; the recipe declares {', '.join(inputs)}",
            fix="rename the inputs or write a samples callable",
        )
    lengths = _lengths(component, inputs["input_ids"].shape)
    lines = read_lines(path)
    enough(spec, len(lines), "lines")
    chosen = lines[spec.skip : spec.skip + spec.count]
    tokenizer, (pad_id, pad_token) = _tokenizer(tokenizer_path, lengths[-1])
    encoded = tokenizer.encode_batch([text for _, text in chosen])
    for encoding in encoded:
        encoding.pad(next(n for n in lengths if n >= len(encoding)), pad_id=pad_id, pad_token=pad_token)
    return [
        Sample(calls=(Call(inputs=_tensors(encoding, inputs), method=method),), source=group)
        for (group, _), encoding in zip(chosen, encoded, strict=True)
    ]


def _tensors(encoding: Encoding, inputs: Any) -> dict[str, Any]:
    return {name: np.asarray([getattr(encoding, FIELDS[name])], spec.dtype) for name, spec in inputs.items()}


def _lengths(component: Component, shape: tuple[int | str, ...]) -> Sequence[int]:
    """How many tokens there may be, ascending."""
    if len(shape) != 2 or shape[0] != 1:
        raise RecipeError(f"text comes as [1, length], `input_ids` is {list(shape)}", fix="declare batch size 1")
    length = shape[1]
    if isinstance(length, int):
        return (length,)
    bounds = component.dims.get(length)
    if bounds is None:
        raise RecipeError(f"the dimension {length!r} has no bounds", fix=f"add `dims: {{{length}: {{max: 128}}}}`")
    return sorted(bounds.sizes) or range(bounds.min, bounds.max + 1)


def read_lines(path: Path) -> list[tuple[str, str]]:
    """(source, text) of each line that is not blank."""
    if not path.is_file():
        raise RecipeError(f"there is no text file {path}", fix="correct `samples: text`")
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path} has more than {MAX_BYTES >> 20} MiB", fix="give the lines that are needed only")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8: {error}", fix="save it as UTF-8") from error
    lines = []
    for number, line in enumerate(content.split("\n"), 1):
        group, tab, text = line.strip("\r").partition("\t")
        if (text if tab else group).strip():
            lines.append((group, text.strip()) if tab else (f"line {number}", group.strip()))
    return lines


def _tokenizer(path: Path | None, longest: int) -> tuple[Tokenizer, tuple[int, str]]:
    """The model's fast tokenizer, cutting at ``longest`` tokens, and id and text of the token that pads."""
    tokenizer = open_tokenizer(path)
    assert path is not None
    pad = _pad_token(tokenizer, path / "tokenizer.json" if path.is_dir() else path)
    tokenizer.enable_truncation(max_length=longest)
    tokenizer.no_padding()
    return tokenizer, pad


def open_tokenizer(path: Path | None) -> Tokenizer:
    """The fast tokenizer in ``path``, the model's folder or a tokenizer.json."""
    from tokenizers import Tokenizer

    if path is None:
        raise RecipeError(
            "text samples need the model's tokenizer, and this model source has none",
            fix="use the transformers source, or give samples of another kind",
        )
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise RecipeError(
            f"there is no {file}",
            fix="save the model's fast tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust binding raises bare Exception
        raise RecipeError(f"{file} cannot be read: {error}", fix="save the tokenizer again") from error
    return tokenizer


def _pad_token(tokenizer: Tokenizer, file: Path) -> tuple[int, str]:
    """Id and text of the token that fills up: the tokenizer's own, its configuration's, or a well-known one."""
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"]), str(tokenizer.padding["pad_token"])
    config = file.with_name("tokenizer_config.json")
    named = json.loads(config.read_text(encoding="utf-8")).get("pad_token") if config.is_file() else None
    named = named.get("content") if isinstance(named, dict) else named
    for token in (named, *PAD_TOKENS):
        found = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if found is not None:
            return found, str(token)
    return 0, ""
