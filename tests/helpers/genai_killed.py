"""A checkpoint's weights written for onnxruntime-genai by a process that may be killed in the middle of one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgebake.llm.shards import Shards
from edgebake_targets._genai_weights import WeightWriter

LAYERS, SHAPE = 6, (48, 64)


class Read:
    """The tensors of ``folder``, and which matrices were read; the process dies in the middle of ``last``."""

    def __init__(self, folder: Path, last: str = "") -> None:
        self._shards, self._last, self.done = Shards(folder), last, list[str]()

    @property
    def names(self) -> tuple[str, ...]:
        return self._shards.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shards.shape(name)

    def whole(self, name: str) -> NDArray[np.float32]:
        return self._shards.whole(name)

    def rows(self, name: str) -> Iterator[NDArray[np.float32]]:
        self.done.append(name)
        value = self.whole(name)
        yield value[:8]
        if name == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        yield value[8:]


def write(source: Path, folder: Path, last: str = "", order: int = 1) -> tuple[list[str], dict[str, bytes]]:
    """Layers in ``order``, a norm and a product each; the matrices that were read, and the initializers."""
    tensors = Read(source, last)
    with WeightWriter(tensors, folder) as writer:
        for number in range(LAYERS)[::order]:
            writer.vector(f"norm{number}", 4096)
            writer.blocks(f"layer{number}", SHAPE, 4, 32)
    return tensors.done, {name: tensor.SerializeToString() for name, tensor in writer.initializers.items()}


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
