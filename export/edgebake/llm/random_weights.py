"""Seeded random weights of a decoder, one stream of numbers a tensor: the same in memory and read row by row.

Matrices are normal with the configuration's ``initializer_range`` for their deviation, norms ones and biases zeros, as
transformers initialises decoders of the families that ``edgebake.llm.streaming`` streams.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgebake.errors import RecipeError
from edgebake.llm.shards import CHUNK_BYTES

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

DEVIATION = 0.02  # transformers' own where a configuration says none


class RandomTensors:
    """Tensors of ``shapes``, made anew whenever they are read."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int, deviation: float) -> None:
        self._shapes, self._seed, self._deviation = dict(shapes), seed, deviation

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor ``name``."""
        if name not in self._shapes:
            raise RecipeError(f"the network has no tensor {name!r}", where="model.path", fix="give a whole config.json")
        return self._shapes[name]

    def whole(self, name: str) -> NDArray[np.float32]:
        """All of the tensor ``name``."""
        shape = self.shape(name)
        if len(shape) == 1:
            return np.full(shape, 0.0 if name.endswith(".bias") else 1.0, np.float32)
        return np.concatenate(list(self.rows(name))).reshape(shape)

    def rows(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The matrix ``name`` from its first row to its last, some rows at a time."""
        shape = self.shape(name)
        columns = math.prod(shape[1:])
        step = max(1, CHUNK_BYTES // (4 * columns))
        digest = hashlib.sha256(name.encode()).digest()
        numbers = np.random.Generator(np.random.SFC64([self._seed, int.from_bytes(digest[:8], "little")]))
        for first in range(0, shape[0], step):
            count = min(step, shape[0] - first)
            values = numbers.standard_normal((count, *shape[1:]), dtype=np.float32)
            values *= np.float32(self._deviation)
            yield values


def of_network(network: torch.nn.Module, seed: int, deviation: float) -> RandomTensors:
    """Random weights for ``network``, which may lie on the meta device; tied ones once."""
    return RandomTensors({n: tuple(p.shape) for n, p in network.named_parameters()}, seed, deviation)


def fill(network: torch.nn.Module, seed: int, deviation: float) -> None:
    """Give the matrices of ``network`` the values of :func:`of_network`, in place; vectors stay as they are."""
    import torch

    made = of_network(network, seed, deviation)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                first = 0
                for some in made.rows(name):
                    parameter[first : first + len(some)] = torch.from_numpy(some)
                    first += len(some)
