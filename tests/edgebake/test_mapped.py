"""Weights in mapped files: the values of a network in memory, and none of them resident between calls."""

from __future__ import annotations

import copy
import gc
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from edgebake import mapped

WORDS = torch.arange(8)[None]


def config(layers: int = 1) -> Any:
    return LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        vocab_size=4096,
        num_attention_heads=4,
        tie_word_embeddings=True,
        use_cache=False,
    )


def network(*, large: bool, layers: int = 1) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]), mapped.weights_in_files(large=large):
        torch.manual_seed(0)
        made: torch.nn.Module = AutoModelForCausalLM.from_config(config(layers), dtype=torch.float32)
    mapped.release_after_use(made)
    return made.eval().requires_grad_(False)


def status(*names: str) -> int:
    """Bytes that Linux says of this process: VmHWM were resident at most, RssFile and RssShmem are those of files."""
    gc.collect()
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(names))


def test_values_and_outputs_are_those_of_a_network_in_memory() -> None:
    plain, filed = network(large=False), network(large=True)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, filed.state_dict()[name]), name
    assert filed.get_parameter("lm_head.weight") is filed.get_parameter("model.embed_tokens.weight")
    assert torch.equal(plain(WORDS).logits, filed(WORDS).logits)
    program = torch.export.export(filed, (WORDS,))
    assert torch.equal(program.module()(WORDS).logits, plain(WORDS).logits)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_weights_are_resident_only_while_they_are_used() -> None:
    before = status("RssFile", "RssShmem")
    made = network(large=True, layers=6)
    weights = 4 * sum(weight.numel() for weight in made.parameters())
    made(WORDS)
    assert weights > 64 << 20
    assert status("RssFile", "RssShmem") - before < weights / 4
    table = made.get_parameter("model.embed_tokens.weight")
    assert bool(table.any())
    assert status("RssFile", "RssShmem") - before >= table.nbytes
    mapped.release(table)
    assert status("RssFile", "RssShmem") - before < weights / 4
    copied = copy.deepcopy(made, {id(weight): weight for weight in made.parameters()})
    copied(WORDS)
    assert status("RssFile", "RssShmem") - before < weights / 4


def test_a_small_network_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not mapped.is_large(AutoModelForCausalLM, config(), {"dtype": torch.float32})
    monkeypatch.setattr(mapped, "LEAST", 1 << 20)
    assert mapped.is_large(AutoModelForCausalLM, config(), {"dtype": torch.float32})
    assert not any(module._forward_hooks for module in network(large=False).modules())


class _Tied(torch.nn.Module):
    """What saving has to tell apart: a weight read twice, a buffer, a constant, an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(512, 600, bias=False)
        self.second = torch.nn.Linear(512, 600)
        self.second.weight = self.first.weight
        self.register_buffer("part", torch.ones(600, 600))
        self.register_buffer("none", torch.zeros(0, 600))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.first(x) + self.second(x) @ self.part + torch.tensor([2.0])
        return torch.cat((made, self.none))


def test_a_program_is_saved_as_torch_saves_it(tmp_path: Path) -> None:
    program = torch.export.export(_Tied(), (torch.ones(2, 512),))
    for side in ("torch", "ours"):
        (tmp_path / side).mkdir()
    torch.export.save(program, tmp_path / "torch" / "forward.pt2")
    mapped.save(program, tmp_path / "ours" / "forward.pt2")
    assert (tmp_path / "ours" / "forward.pt2").read_bytes() == (tmp_path / "torch" / "forward.pt2").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory is Linux's")
def test_saving_takes_no_copy_of_a_weight(tmp_path: Path) -> None:
    module = torch.nn.Linear(8192, 8192, bias=False)
    program = torch.export.export(module, (torch.ones(1, 8192),))
    mapped.save(program, tmp_path / "first.pt2")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmHWM")
    mapped.save(program, tmp_path / "second.pt2")
    assert status("VmHWM") - before < module.weight.nbytes // 4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep little for themselves")
def test_what_was_freed_is_given_back() -> None:
    """A small block behind what is freed keeps it from going back by itself."""
    many = [torch.ones(16 << 10) for _ in range(4000)]
    del many[:-1]
    before = status("VmRSS")
    mapped.give_back()
    assert before - status("VmRSS") > 128 << 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_zeros_take_no_memory() -> None:
    before = status("VmRSS")
    cache = torch.ones(64 << 18)
    cache[5:] += 1
    assert status("VmRSS") - before > 60 << 20
    mapped.clear(cache)
    assert status("VmRSS") - before < 8 << 20
    assert not bool(cache.any())


@pytest.mark.parametrize("part", [slice(3, None), slice(0, 7), slice(0, 0), slice(None, None, 2)])
def test_zeros_are_written_into_what_was_asked_for_and_no_further(part: slice) -> None:
    whole = torch.ones(1 << 20)
    mapped.clear(whole[part])
    expected = torch.ones(1 << 20)
    expected[part] = 0
    assert torch.equal(whole, expected)


def test_zeros_are_written_into_a_mapped_tensor() -> None:
    weight = network(large=True).get_parameter("lm_head.weight").data
    mapped.clear(weight)
    assert not bool(weight.any())
