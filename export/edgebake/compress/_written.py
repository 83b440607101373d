"""What a decoder itself writes after the beginnings of calibration text: the likeliest token each time, many at once.

Sequence-level knowledge distillation (Kim, Rush 2016, arXiv:1606.07947) teaches a small network the text that the large
one decodes; greedy decoding stands here for their beam search, since it is what a draft of greedy speculative decoding
has to foretell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from edgebake.llm.decoder import CACHES

if TYPE_CHECKING:
    import torch

    from edgebake.compress._decoder import Call

AT_ONCE = 32  # texts that are written side by side: a call reads every weight once for all of them


class Written(NamedTuple):
    """``tokens``, (texts, length) int64, and of each written one, (texts, length - n, kept), the likeliest words.

    With their log probabilities.
    """

    tokens: torch.Tensor
    words: torch.Tensor
    logs: torch.Tensor


def writes(module: torch.nn.Module) -> bool:
    """Has ``module`` caches to go on with a text?"""
    return bool(_held(module))


def beginnings(calls: Sequence[Call], size: int) -> torch.Tensor:
    """The tokens of ``calls``, (1, n) each, cut into beginnings of ``size``: (texts, size); rests are left out."""
    import torch

    tokens = [call[0][0][0] for call in calls]
    return torch.stack([part for text in tokens for part in text.split(size) if len(part) == size])


def gone_on_with(module: torch.nn.Module, begun: torch.Tensor, length: int, kept: int) -> Written:
    """``begun``, (texts, n) int64, gone on with by ``module`` to ``length`` tokens each.

    ``module`` takes tokens and the position of the first, and has caches of :mod:`edgebake.llm.decoder`, which stay as
    they are. Nothing ends a text: every decision counts, as in what a draft is judged by.
    """
    import torch

    texts, words, logs = begun, [], []
    with torch.no_grad(), _caches(module, len(begun), length):
        unread, start = begun, 0
        while texts.shape[1] < length:
            logits = module(unread, torch.tensor([start]))[0][:, -1]
            top = logits.log_softmax(-1).topk(min(kept, logits.shape[-1]), dim=-1)
            start += unread.shape[1]
            unread = top.indices[:, :1]
            texts = torch.cat([texts, unread], 1)
            words.append(top.indices)
            logs.append(top.values)
    return Written(texts, torch.stack(words, 1), torch.stack(logs, 1))


@contextmanager
def _caches(module: torch.nn.Module, texts: int, length: int) -> Iterator[None]:
    """Empty caches for as many ``texts`` of ``length`` tokens in the place of those of ``module``."""
    import torch

    held = _held(module)
    try:
        for owner, name, cache in held:
            owner._buffers[name] = torch.zeros(texts, length, *cache.shape[2:])
        yield
    finally:
        for owner, name, cache in held:
            owner._buffers[name] = cache


def _held(module: torch.nn.Module) -> list[tuple[Any, str, torch.Tensor]]:
    """Owner, name and tensor of each cache."""
    found = ((owner, name, owner._buffers.get(name)) for owner in module.modules() for name in CACHES)
    return [(owner, name, cache) for owner, name, cache in found if cache is not None]
