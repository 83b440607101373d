"""One decoder layer of a Llama with its cache outside, for graphs that take several positions at once, or one.

A phone's NPU has fixed shapes, so a language model is two graphs there over the same weights: one reads the prompt,
many positions at a time, one writes a word. The cache goes in as tensors, and the new keys and values come out; the
positions' angles and their mask go in as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgebake.models.zoo.llama_block import initialise, layer

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from edgebake.target import SampleRequest
    from edgebake.types import Sample

DISTRIBUTIONS = ("transformers",)
CONTEXT = 64
AT_ONCE = {"prefill": 32, "decode": 1}
_HIDES = -100.0  # exp(-100) is 0 beside any score that is shown
_BASE = 10000.0  # of the rotary angles: Su et al. 2021, https://arxiv.org/abs/2104.09864


class Past:
    """What transformers' attention asks of a cache, over tensors: the new keys and values behind the old ones."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.old, self.new = (keys, values), (keys, values)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, _layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values (1, heads, old + new, width); the new ones are kept."""
        import torch

        self.new = (keys, values)
        return torch.cat((self.old[0], keys), 2), torch.cat((self.old[1], values), 2)


def model(hidden: int = 2048, intermediate: int = 8192, heads: int = 32, key_value_heads: int = 8) -> torch.nn.Module:
    """The layer over n new positions and a cache of ``CONTEXT`` - n, all float32 -> a dictionary of three tensors.

    ``hidden`` (1, n, hidden), ``keys`` and ``values`` (1, key_value_heads, CONTEXT - n, width), ``cosine`` and ``sine``
    (1, n, width), ``mask`` (1, 1, n, CONTEXT), added to scores -> ``hidden_out`` as ``hidden``, ``new_keys`` and
    ``new_values`` (1, key_value_heads, n, width).
    """
    import torch

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = layer(hidden, intermediate, heads, key_value_heads, CONTEXT)

        def forward(
            self,
            hidden: torch.Tensor,
            keys: torch.Tensor,
            values: torch.Tensor,
            cosine: torch.Tensor,
            sine: torch.Tensor,
            mask: torch.Tensor,
        ) -> dict[str, torch.Tensor]:
            past = Past(keys, values)
            # By position: transformers 5.24 calls the fourth `cache`, those before it `past_key_values`.
            out = self.wrapped(hidden, mask, None, past, True, position_embeddings=(cosine, sine))
            return {"hidden_out": out, "new_keys": past.new[0], "new_values": past.new[1]}

    return initialise(Block())


def calls(request: SampleRequest) -> list[Sample]:
    """A prompt of 32 positions behind an empty cache, and a word behind 32 to 63 positions of one; seeded noise.

    ``options``: ``hidden``, ``heads`` and ``key_value_heads`` of a layer that is not of Llama 3.2 1B's size.
    """
    import numpy as np

    from edgebake.types import Call, Sample

    made = []
    for number in range(request.skip, request.skip + request.count):
        random = np.random.default_rng([request.seed, number])
        filled = {"prefill": 0, "decode": int(random.integers(AT_ONCE["prefill"], CONTEXT))}
        taken = [
            Call(method=method, inputs=_inputs(random, rows, filled[method], **request.options))
            for method, rows in AT_ONCE.items()
        ]
        made.append(Sample(calls=tuple(taken), source=f"noise {number}"))
    return made


def _inputs(
    random: np.random.Generator, rows: int, filled: int, hidden: int = 2048, heads: int = 32, key_value_heads: int = 8
) -> dict[str, NDArray[Any]]:
    """Inputs of ``rows`` positions from ``filled`` on; the filled part of the cache is its beginning."""
    import numpy as np

    width = hidden // heads
    angles = np.outer(np.arange(filled, filled + rows), _BASE ** (-np.arange(0, width, 2) / width))
    angles = np.concatenate((angles, angles), 1)[None]
    cache = np.zeros((2, 1, key_value_heads, CONTEXT - rows, width))
    cache[:, :, :, :filled] = random.normal(size=(2, 1, key_value_heads, filled, width))
    old = np.where(np.arange(CONTEXT - rows) < filled, 0, _HIDES)
    mask = np.concatenate((np.tile(old, (rows, 1)), np.triu(np.full((rows, rows), _HIDES), 1)), 1)
    given = {
        "hidden": random.normal(size=(1, rows, hidden)),
        "keys": cache[0],
        "values": cache[1],
        "cosine": np.cos(angles),
        "sine": np.sin(angles),
        "mask": mask[None, None],
    }
    return {name: value.astype(np.float32) for name, value in given.items()}
