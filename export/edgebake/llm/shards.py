"""A model's safetensors files read a few rows at a time, so that no tensor needs to fit in memory.

Files are read, not mapped: pages of mapped files would count as resident.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgebake.errors import RecipeError
from edgebake.models._safetensors import AGAIN, Entry, entries, files
from edgebake.wording import did_you_mean, said

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK_BYTES = 8 << 20  # of float32 rows at a time: fits caches of the second level several times over
INFINITE = f"{AGAIN}; a training that diverged leaves such values, too"
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


class Shards:
    """The tensors of the folder's safetensors files by name.

    RecipeError when there are none, an index names files outside the folder or missing ones, or a file is cut off;
    later, when it is read, where a tensor holds NaN or infinity.
    """

    def __init__(self, folder: Path) -> None:
        found = files(folder)
        if not found:
            pickled = any(folder.glob("*.bin"))
            what = f"{said(folder.name)} has " + ("its weights as pickles only" if pickled else "no *.safetensors")
            raise RecipeError(what, where="model.path", fix="convert them to safetensors" if pickled else "copy them")
        self._places: dict[str, Entry] = {}
        for file in found:
            self._places |= entries(file)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors."""
        return tuple(self._places)

    @property
    def largest_bytes(self) -> int:
        """Of the largest tensor of floats, as it is stored."""
        sizes = (math.prod(place.shape) * _WIDTHS.get(place.dtype, 0) for place in self._places.values())
        return max(sizes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor ``name``."""
        return self._place(name).shape

    def whole(self, name: str) -> NDArray[np.float32]:
        """All of the tensor ``name`` in float32; for vectors and small matrices."""
        place = self._place(name)
        return np.concatenate(list(self.rows(name))).reshape(place.shape)

    def rows(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.float32]]:
        """The matrix ``name`` from its first row to its last, some rows at a time, in float32."""
        place = self._floats(name)
        width, columns = _WIDTHS[place.dtype], math.prod(place.shape[1:])
        step = max(1, chunk_bytes // (4 * columns))
        with place.file.open("rb", buffering=0) as file:
            for first in range(0, place.shape[0], step):
                count = min(step, place.shape[0] - first)
                raw = np.empty(count * columns * width, np.uint8)
                file.seek(place.begin + first * columns * width)
                if file.readinto(raw.data) != raw.size:
                    raise RecipeError(
                        f"{place.file.name} is cut off in the tensor {said(name)}", where=str(place.file), fix=AGAIN
                    )
                floats = _floats(raw, place.dtype)
                if not np.isfinite(floats).all():
                    what = f"{said(name)} of {place.file.name} holds values that are NaN or infinite"
                    raise RecipeError(what, where=str(place.file), fix=INFINITE)
                yield floats.reshape(count, *place.shape[1:])

    def _floats(self, name: str) -> Entry:
        """A checkpoint may hold masks or positions that no network of today reads; weights in integers are refused."""
        place = self._place(name)
        if place.dtype not in _WIDTHS:
            what = f"the tensor {said(name)} is {said(place.dtype)}, not one of {', '.join(_WIDTHS)}"
            raise RecipeError(what, where=str(place.file), fix="start from the float checkpoint")
        return place

    def _place(self, name: str) -> Entry:
        if name not in self._places:
            what = f"the checkpoint has no tensor {said(name)}"
            raise RecipeError(what, where="model.path", fix=did_you_mean(name, self._places, most=4))
        return self._places[name]


def _floats(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    wide = raw.view(np.uint16).astype(np.uint32)  # bfloat16 is the upper half of float32
    wide <<= 16
    return wide.view(np.float32)
