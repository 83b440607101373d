"""What a file of samples says it holds, read from its headers alone: names, shapes, how many."""

from __future__ import annotations

import ast
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import IO

from edgebake.errors import RecipeError
from edgebake.recipe import Component, Input, Samples
from edgebake.samples_checks import enough

EXTRAS = ("label", "source")
MAX_HEADER = 1 << 20  # bytes; what numpy writes has about a hundred
Shapes = Mapping[str, tuple[int, ...]]


def shapes(path: Path) -> Shapes:
    """The shape of every array in ``path`` (.npz or .safetensors). RecipeError when the file is damaged."""
    try:
        return _npz(path) if path.suffix == ".npz" else _safetensors(path)
    except (OSError, ValueError, TypeError, KeyError, SyntaxError, RecursionError, struct.error) as error:
        raise unreadable(path, error) from error
    except (EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> RecipeError:
    """What is said of a file that is damaged, or not what its suffix says."""
    if isinstance(error, PermissionError):
        return RecipeError(f"{path} cannot be read: {error.strerror}", fix="give yourself permission to read it")
    save = "numpy.savez, without objects" if path.suffix == ".npz" else "safetensors, in dtypes that numpy has"
    return RecipeError(f"{path} cannot be read: {error}", fix=f"save it again, with {save}")


def check(found: Shapes, inputs: Mapping[str, Input], spec: Samples, path: Path) -> None:
    """RecipeError when the arrays are not those of ``inputs``, differ in their first axis, or are too few."""
    missing = [name for name in inputs if name not in found]
    unknown = [name for name in found if name not in inputs and name not in EXTRAS]
    if missing or unknown:
        raise RecipeError(
            f"{path} has the arrays {', '.join(found) or 'none'}, the recipe's inputs are {', '.join(inputs)}",
            fix="name the arrays as the inputs; `label` and `source` may be added",
        )
    counts = {shape[0] if shape else 0 for shape in found.values()}
    if len(counts) != 1:
        raise RecipeError(f"the arrays of {path} differ in their first axis: {sorted(counts)}", fix="one row a sample")
    enough(spec, counts.pop(), "samples")


def misfit(shape: Sequence[int], spec: Input, component: Component) -> str:
    """What keeps rows of an array of ``shape`` from being the input ``spec``, or nothing."""
    row, rank = tuple(shape[1:]), len(spec.shape)
    call = row[1:] if len(row) == rank + 1 else row if len(row) == rank else (1, *row)
    if len(call) == rank and all(_fits(size, wanted, component) for size, wanted in zip(call, spec.shape, strict=True)):
        return ""
    return f"holds rows of {_short(row)}, {_short(spec.shape)} is declared"


def _short(shape: Sequence[int | str]) -> str:
    text = ", ".join(map(str, shape))
    return f"[{text}]" if len(text) <= 60 else f"[{text[:57]}...]"


def _fits(size: int, wanted: int | str, component: Component) -> bool:
    if isinstance(wanted, int):
        return size == wanted
    bounds = component.dims.get(wanted)
    return bounds is None or bounds.takes(size)


def _npz(path: Path) -> Shapes:
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                shape = _npy_shape(file)
            if prod(shape) > member.file_size:
                raise ValueError(f"{member.filename} claims {prod(shape)} values in {member.file_size} bytes")
            found[member.filename.removesuffix(".npy")] = shape
    return found


def _npy_shape(file: IO[bytes]) -> tuple[int, ...]:
    """The header of numpy's format: mark, version, length, a Python literal."""
    mark = file.read(8)
    if mark[:6] != b"\x93NUMPY":
        raise ValueError("an array in it is not in numpy's format")
    (length,) = struct.unpack("<H", file.read(2)) if mark[6] == 1 else struct.unpack("<I", file.read(4))
    if length > MAX_HEADER:
        raise ValueError(f"a header claims {length} bytes")
    header = ast.literal_eval(file.read(length).decode("latin1"))
    return _shape(header["shape"])


def _safetensors(path: Path) -> Shapes:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER:
            raise ValueError(f"its header claims {length} bytes")
        header = json.loads(file.read(length))
    return {name: _shape(each["shape"]) for name, each in header.items() if name != "__metadata__"}


def _shape(given: Sequence[int]) -> tuple[int, ...]:
    if not all(isinstance(size, int) and size >= 0 for size in given):
        raise ValueError("a shape in it is none")
    return tuple(given)
