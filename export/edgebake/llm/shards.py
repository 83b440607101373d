"""A model's safetensors files read a few rows at a time, so that no tensor needs to fit in memory.

Files are read, not mapped: pages of mapped files would count as resident. Format: 8 bytes little-endian length of the
header, JSON header, tensors (https://github.com/huggingface/safetensors#format); ``*.safetensors.index.json`` says
which file holds which tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgebake.errors import RecipeError
from edgebake.models._index import check_index
from edgebake.wording import did_you_mean, said

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK_BYTES = 8 << 20  # of float32 rows at a time: fits caches of the second level several times over
MAX_HEADER = 100 << 20  # the format's own bound
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies: ``begin`` counts bytes from the start of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int


class Shards:
    """The tensors of the folder's safetensors files by name.

    RecipeError when there are none, an index names files outside the folder or missing ones, or a file is cut off.
    """

    def __init__(self, folder: Path) -> None:
        check_index(folder)
        files = _files(folder)
        if not files:
            pickled = any(folder.glob("*.bin"))
            what = f"{said(folder.name)} has " + ("its weights as pickles only" if pickled else "no *.safetensors")
            raise RecipeError(what, where="model.path", fix="convert them to safetensors" if pickled else "copy them")
        self._places: dict[str, Place] = {}
        for file in files:
            self._places |= _places(file)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors."""
        return tuple(self._places)

    @property
    def largest_bytes(self) -> int:
        """Of the largest tensor, as it is stored."""
        return max(math.prod(place.shape) * _WIDTHS[place.dtype] for place in self._places.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor ``name``."""
        return self._place(name).shape

    def whole(self, name: str) -> NDArray[np.float32]:
        """All of the tensor ``name`` in float32; for vectors and small matrices."""
        place = self._place(name)
        return np.concatenate(list(self.rows(name))).reshape(place.shape)

    def rows(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.float32]]:
        """The matrix ``name`` from its first row to its last, some rows at a time, in float32."""
        place = self._place(name)
        width, columns = _WIDTHS[place.dtype], math.prod(place.shape[1:])
        step = max(1, chunk_bytes // (4 * columns))
        with place.file.open("rb", buffering=0) as file:
            for first in range(0, place.shape[0], step):
                count = min(step, place.shape[0] - first)
                raw = np.empty(count * columns * width, np.uint8)
                file.seek(place.begin + first * columns * width)
                if file.readinto(raw.data) != raw.size:
                    raise RecipeError(f"the tensor {said(name)} is cut off", where=str(place.file), fix=_AGAIN)
                yield _floats(raw, place.dtype).reshape(count, *place.shape[1:])

    def _place(self, name: str) -> Place:
        if name not in self._places:
            what = f"the checkpoint has no tensor {said(name)}"
            raise RecipeError(what, where="model.path", fix=did_you_mean(name, self._places, most=4))
        return self._places[name]


_AGAIN = "copy the model again"


def _files(folder: Path) -> list[Path]:
    """Those that transformers reads: of its own names, else all; repositories may hold the weights in other forms, too.

    The index has been checked.
    """
    index, one = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if one.is_file():
        return [one]
    if index.is_file():
        return sorted({folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    return sorted(folder.glob("*.safetensors"))


def _floats(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    wide = raw.view(np.uint16).astype(np.uint32)  # bfloat16 is the upper half of float32
    wide <<= 16
    return wide.view(np.float32)


def _places(file: Path) -> Mapping[str, Place]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise RecipeError("the file is cut off or no safetensors file", where=str(file), fix=_AGAIN)
        text = opened.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = {name: _place(file, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise RecipeError("the header is not safetensors'", where=str(file), fix=_AGAIN) from None
    for name, place in found.items():
        if place.dtype not in _WIDTHS:
            what = f"the tensor {said(name)} is {said(place.dtype)}, not one of {', '.join(_WIDTHS)}"
            raise RecipeError(what, where=str(file), fix="start from the float checkpoint")
        if place.begin < 0 or place.begin + math.prod(place.shape) * _WIDTHS[place.dtype] > size:
            raise RecipeError(f"the tensor {said(name)} is cut off", where=str(file), fix=_AGAIN)
    return found


def _place(file: Path, entry: Mapping[str, object], start: int) -> Place:
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError(entry)
    sizes = tuple(int(size) for size in shape)
    return Place(file=file, dtype=str(entry["dtype"]), shape=sizes, begin=start + int(offsets[0]))
