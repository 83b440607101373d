"""Headers of a model's safetensors files: which there are, and whether each tensor is whole. No weight is read.

Format: 8 bytes little-endian length of the header, JSON header, tensors
(https://github.com/huggingface/safetensors#format); ``*.safetensors.index.json`` says which file holds which tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgebake.errors import RecipeError
from edgebake.models._index import check_index
from edgebake.wording import said

AGAIN = "copy the model again"
INDEX, ALONE = "model.safetensors.index.json", "model.safetensors"
_MAX_HEADER = 100 << 20  # the format's own bound
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_POINTER = b"version https://git-lfs"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor: ``begin`` counts bytes from the start of ``file``."""

    file: Path
    dtype: str  # as the format names it: F32, BF16
    shape: tuple[int, ...]
    begin: int


def files(folder: Path) -> list[Path]:
    """The files that transformers reads: of its own names, else all; a folder may hold weights in other forms, too.

    RecipeError for an index that names files outside ``folder`` or missing ones, and for parts without their index.
    """
    check_index(folder)
    index, alone = folder / INDEX, folder / ALONE
    if alone.is_file():
        return [alone]
    if index.is_file():
        return sorted({folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    found = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    part = next(filter(None, (_PART.fullmatch(file.name) for file in found)), None)
    if part is not None:
        what = f"{part[0]} is one of {int(part[3])} parts, and there is no {part[1]}.safetensors.index.json"
        raise RecipeError(what, where=str(folder), fix=AGAIN)
    return found


def check_whole(folder: Path) -> None:
    """RecipeError where one of the :func:`files` of ``folder`` is damaged."""
    for file in files(folder):
        entries(file)


def entries(file: Path) -> Mapping[str, Entry]:
    """The tensors of ``file`` by name; RecipeError where it is no safetensors file or not all of it is there."""
    try:
        size, text = file.stat().st_size, _header(file)
    except OSError as error:
        raise RecipeError(f"{file.name} cannot be read: {error.strerror}", where=str(file), fix=AGAIN) from None
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = {name: _entry(file, entry, 8 + len(text)) for name, entry in header.items()}
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        raise RecipeError(f"the header of {file.name} is not safetensors'", where=str(file), fix=AGAIN) from None
    for name, entry in found.items():
        end = entry.begin + math.prod(entry.shape) * _BITS.get(entry.dtype, 0) // 8
        if entry.begin < 0 or end > size:
            what = f"{file.name} is cut off: the tensor {said(name)} ends at byte {end} of {size}"
            raise RecipeError(what, where=str(file), fix=AGAIN)
    return found


def _header(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(len(_POINTER))
        length = int.from_bytes(start[:8], "little")
        if start == _POINTER:
            what = f"{file.name} is a pointer of Git LFS and not the weights themselves"
            raise RecipeError(what, where=str(file), fix="git lfs pull, or download the file")
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            raise RecipeError(f"{file.name} is cut off or no safetensors file", where=str(file), fix=AGAIN)
        opened.seek(8)
        return opened.read(length)


def _entry(file: Path, entry: Mapping[str, object], start: int) -> Entry:
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError(entry)
    sizes = tuple(int(size) for size in shape)
    return Entry(file=file, dtype=str(entry["dtype"]), shape=sizes, begin=start + int(offsets[0]))
