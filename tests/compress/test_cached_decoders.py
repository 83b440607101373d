"""Steps for decoders on a network whose attention keeps keys and values in buffers, as language models are built."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

import outlier_decoders as decoders
from edgebake.buffers import Snapshot
from edgebake.compress import _decoder, awq, gptq, qat, rotate, smooth, spinquant
from edgebake.llm import decoder


class Cached(torch.nn.Module):
    """As model sources wrap decoders with a cache: (tokens, input_pos) -> (logits,)."""

    def __init__(self, wrapped: torch.nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> tuple[torch.Tensor]:
        return (decoder.call(self.wrapped, {"tokens": tokens, "input_pos": input_pos})["logits"],)


def cached() -> Cached:
    return Cached(decoder.with_caches(decoders.network(tied=True).wrapped, 32))  # type: ignore[arg-type]


def run(module: torch.nn.Module) -> None:
    """Each sample in two calls, the second one on what the first left in the caches, which begin empty."""
    start = Snapshot.of([module])
    for tokens in decoders.ids():
        start.restore()
        for begin, end in ((0, 16), (16, decoders.LENGTH)):
            module(tokens[:, begin:end], torch.tensor([begin]))


def last(module: torch.nn.Module) -> torch.Tensor:
    """Logits of other text's second half."""
    with torch.no_grad():
        tokens = decoders.ids(1, seed=5)[0]
        module(tokens[:, :16], torch.tensor([0]))
        made: torch.Tensor = module(tokens[:, 16:], torch.tensor([16]))[0]
        return made


def test_only_calls_on_empty_caches_are_taken_by_themselves() -> None:
    module = cached()
    found = _decoder.calls_of(replace(decoders.request(module, {}), run_calibration=run))
    assert [int(args[1]) for args, _ in found] == [0] * len(decoders.ids())


def test_every_step_works_and_the_caches_are_as_they_were() -> None:
    plain = cached()
    wanted = last(copy.deepcopy(plain))
    for method, least in ((rotate, 100), (spinquant, 100), (awq, 100), (smooth, 100), (gptq, 12), (qat, 8)):
        module = copy.deepcopy(plain)
        options = {"steps": 2} if method in (spinquant, qat) else {}
        request = decoders.request(module, decoders.linears(module, "w8a8d" if method is smooth else "w4"), **options)
        made = method.apply(replace(request, run_calibration=run))
        assert not any(buffer.any() for name, buffer in made.named_buffers() if name.endswith(decoder.CACHES))
        assert _decoder.decibels(wanted, last(made)) > least
