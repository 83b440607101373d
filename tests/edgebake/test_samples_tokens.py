"""Running text as windows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import decoders
from edgebake import samples
from edgebake.errors import RecipeError
from edgebake.recipe import Component, Samples
from edgebake.types import Sample

TEXT = "".join(f"group {n}\tline {n} of the text that is read\n" for n in range(20))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    decoders.save_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def read(base: Path, size: int | str = "seq", **more: Any) -> tuple[Sample, ...]:
    given = decoders.component(base)
    inputs = {**decoders.INPUTS, "tokens": {"shape": [1, size], "dtype": "int64"}}
    dims = {"dims": given["dims"]} if size == "seq" else {"dims": {}}
    component = Component.model_validate({**given, "inputs": inputs, **dims})
    spec = Samples.model_validate({"text": "text.txt", "length": 40, "count": 3, **more})
    return samples.read(spec, component, base, base).samples


def words(sample: Sample) -> list[int]:
    return [int(token) for call in sample.calls for token in call.tensors()["tokens"][0]]


def test_windows_follow_each_other_without_a_gap(base: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    found = read(base)
    lines = "\n".join(line.partition("\t")[2] for line in TEXT.splitlines())
    assert tokenizer.decode([t for sample in found for t in words(sample)]) == lines[:120]
    assert [sample.source for sample in found] == ["window 0", "window 1", "window 2"]
    assert words(read(base, skip=2, count=1)[0]) == words(found[2])


def test_a_window_is_read_in_calls_that_say_where_they_begin(base: Path) -> None:
    (sample,) = read(base, count=1)
    shapes = [(call.tensors()["tokens"].shape, int(call.tensors()["input_pos"][0])) for call in sample.calls]
    assert shapes == [((1, 16), 0), ((1, 16), 16), ((1, 8), 32)]


def test_too_short_a_text_is_refused(base: Path) -> None:
    with pytest.raises(RecipeError, match=r"has 16 windows of 40 tokens, the recipe asks for 99"):
        read(base, count=99)


def test_a_fixed_number_of_tokens_has_to_divide_the_text(base: Path) -> None:
    with pytest.raises(RecipeError, match="40 tokens of text cannot be read 16 at a time") as caught:
        read(base, size=16)
    assert caught.value.problems[0].fix == "give samples a length of 32, or inputs a dimension that varies"
