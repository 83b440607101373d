"""Memory, speed and context: held against what others measured, and against each other."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from edgebake.llm import fit_memory
from edgebake.llm.fit_memory import CACHES, FLOAT, GIB, MIB, device_memory
from edgebake.llm.fit_shape import Decoder, read_config
from edgebake.llm.fit_size import file_size

CONFIGS = Path(__file__).resolve().parents[2] / "recipes/llm/configs"
LINEAR = ("attention", "mlp")


def meta_scheme(decoder: Decoder) -> dict[str, str]:
    """4 bits in groups of 32 inside the layers, 8 bits per channel in embedding and head."""
    inside = {w.name: "w4g32a8d" for w in decoder.weights if w.part in LINEAR and w.kind == "linear"}
    return {**inside, "model.embed_tokens": "w8", "lm_head": "w8a8d"}


@pytest.mark.parametrize(
    ("name", "file_mib", "rss_mib"),
    [  # Llama 3.2's model card, "Quantized models": ExecuTorch, OnePlus 12, 2048 tokens
        ("llama-3.2-1b", 2358, 3185),
        ("llama-3.2-1b", 1083, 1921),
        ("llama-3.2-3b", 6129, 7419),
        ("llama-3.2-3b", 2435, 3726),
    ],
)
def test_memory_on_a_device_is_near_what_was_published(name: str, file_mib: int, rss_mib: int) -> None:
    decoder = read_config(CONFIGS / name)
    predicted = device_memory(decoder, file_mib * MIB, CACHES["pte"], 2048, 2048).total
    assert predicted == pytest.approx(rss_mib * MIB, rel=0.03)


@pytest.mark.parametrize(
    ("name", "scheme", "published"),
    [("llama-3.2-1b", True, 50.2), ("llama-3.2-1b", False, 19.2), ("llama-3.2-3b", True, 19.7)],
)
def test_published_speeds_stay_below_the_bound_of_the_memory(name: str, scheme: bool, published: float) -> None:
    """The same card: a Snapdragon 8 Gen 3 at 76.8 GB/s reaches between a third of the bound and all of it."""
    decoder = read_config(CONFIGS / name)
    schemes = meta_scheme(decoder) if scheme else {w.name: "fp16" for w in decoder.weights}
    size = file_size(decoder, schemes, "pte")
    bound = fit_memory.decode_tokens_s(fit_memory.bytes_per_token(decoder, size, CACHES["pte"], 64), 76.8)
    assert bound / 3 < published < bound


def test_the_cache_of_llama_is_two_heads_groups_and_layers() -> None:
    decoder = read_config(CONFIGS / "llama-3.2-1b")
    assert fit_memory.cache_bytes(decoder, 8192, CACHES["mlpackage"]) == 2 * 16 * 8 * 64 * 8192 * 2 == 256 * MIB


def test_the_longest_context_is_the_last_that_fits() -> None:
    decoder = read_config(CONFIGS / "qwen3-0.6b")
    budget = 3 * GIB
    longest = fit_memory.longest_context(decoder, GIB, FLOAT, 64, budget)
    assert 0 < longest < decoder.positions
    assert device_memory(decoder, GIB, FLOAT, longest, 64).total <= budget
    assert device_memory(decoder, GIB, FLOAT, longest + 1, 64).total > budget
    assert fit_memory.longest_context(decoder, 4 * GIB, FLOAT, 64, budget) == 0
    assert fit_memory.longest_context(decoder, 4 * GIB, FLOAT, 64, 1000 * GIB) == decoder.positions


def test_a_tied_head_is_read_once_and_an_embedding_by_the_row() -> None:
    decoder = read_config(CONFIGS / "llama-3.2-1b")
    shared = file_size(decoder, {}, "onnx")
    copied = file_size(decoder, {}, "pte")
    table = 4 * 128256 * 2048
    assert copied.parts["head"].total - shared.parts["head"].total == table
    read = [fit_memory.bytes_per_token(decoder, size, FLOAT, 0) for size in (shared, copied)]
    assert read[1] - read[0] == 4 * 2048  # the copy's own row


def test_memory_here_is_bound_by_what_is_asked() -> None:
    assert fit_memory.host_memory_bytes(None) <= psutil.virtual_memory().total
    assert fit_memory.host_memory_bytes(64) == 64 * MIB


def test_a_large_network_of_integers_takes_little_more_than_they_do() -> None:
    """A whole build of this recipe took 4,236 MiB at its most."""
    decoder = read_config(CONFIGS / "llama-3.2-1b")
    schemes = meta_scheme(decoder)
    size = file_size(decoder, schemes, "pte")
    assert fit_memory.is_mapped(decoder, "pte", schemes)
    assert fit_memory.mapped_peak_bytes(decoder, size.total) == pytest.approx(4236 * MIB, rel=0.15)


@pytest.mark.parametrize("change", [{"model.embed_tokens": "fp32"}, {"model.layers.0.mlp.up_proj": "w8a8d"}])
def test_what_was_not_measured_from_mapped_files_is_predicted_as_if_all_were_in_memory(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    decoder = read_config(CONFIGS / "llama-3.2-1b")
    assert not fit_memory.is_mapped(decoder, "pte", {**meta_scheme(decoder), **change})
    assert not fit_memory.is_mapped(decoder, "onnx", meta_scheme(decoder))
    monkeypatch.setattr(fit_memory, "LEAST", 5 * GIB)
    assert not fit_memory.is_mapped(decoder, "pte", meta_scheme(decoder))
