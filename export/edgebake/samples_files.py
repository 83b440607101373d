"""Samples from ``.npz`` and ``.safetensors`` files: one array per input, the first axis counts samples."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebake.errors import RecipeError
from edgebake.recipe import Component, Input, Samples
from edgebake.samples_checks import only_method
from edgebake.samples_headers import check, misfit, unreadable
from edgebake.types import Call, Sample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

MAX_BYTES = 16 << 30  # unpacked; a few kilobytes of npz can claim terabytes


def read_arrays(spec: Samples, component: Component, path: Path) -> list[Sample]:
    """Samples ``skip .. skip+count`` of the arrays in ``path``.

    For a declared input of shape (1, ...) an array is (N, ...) or (N, 1, ...), or (N, T, 1, ...) for sequences of T
    calls. The optional arrays ``label`` (N,) of ints and ``source`` (N,) of strings or ints name what they say.
    """
    method, inputs = only_method(component, "file")
    arrays = _load(path)
    check({name: array.shape for name, array in arrays.items()}, inputs, spec, path)
    return [_sample(method, inputs, arrays, index) for index in range(spec.skip, spec.skip + spec.count)]


def read_with(
    spec: Samples, component: Component, path: Path, outputs: Sequence[str]
) -> tuple[list[Sample], dict[str, NDArray[Any]]]:
    """As :func:`read_arrays` of all rows, and beside them the arrays called ``outputs``."""
    method, inputs = only_method(component, "file")
    arrays = _load(path)
    beside = {name: arrays.pop(name) for name in outputs}
    check({name: array.shape for name, array in arrays.items()}, inputs, spec, path)
    for name, array in arrays.items():
        if name in inputs and (wrong := misfit(array.shape, inputs[name], component)):
            raise RecipeError(f"{path}: {name} {wrong}", fix="`edgebake inspect` shows the shapes that the model takes")
    return [_sample(method, inputs, arrays, index) for index in range(spec.count)], beside


def _sample(method: str, inputs: Mapping[str, Input], arrays: Mapping[str, NDArray[Any]], index: int) -> Sample:
    steps = {name: _steps(arrays[name][index], inputs[name]) for name in inputs}
    length = max((len(calls) for calls in steps.values()), default=1)
    lengths = {name: len(calls) for name, calls in steps.items()}
    if set(lengths.values()) - {1, length}:
        raise RecipeError(
            f"the sequences of a sample differ in length: {lengths}", fix="give every input as many calls"
        )
    calls = tuple(
        Call(method=method, inputs={name: values[min(t, len(values) - 1)] for name, values in steps.items()})
        for t in range(length)
    )
    source = str(arrays["source"][index]) if "source" in arrays else str(index)
    return Sample(calls=calls, source=source, label=int(arrays["label"][index]) if "label" in arrays else None)


def _steps(row: NDArray[Any], spec: Input) -> list[NDArray[Any]]:
    """The calls that one row holds; an input without a time axis is the same in every call."""
    rank = len(spec.shape)
    if row.ndim == rank + 1:
        return [_cast(step, spec) for step in row]
    return [_cast(row if row.ndim == rank else row[None], spec)]


def _cast(value: NDArray[Any], spec: Input) -> NDArray[Any]:
    """``value`` in the declared dtype where that loses nothing but float precision; the check refuses the rest."""
    wanted = np.dtype(spec.dtype)
    same_kind = value.dtype.kind == wanted.kind and wanted.kind == "f"
    integers = value.dtype.kind in "iu" and wanted.kind in "iu"
    fits = integers and (not value.size or np.array_equal(value.astype(wanted).astype(value.dtype), value))
    return np.ascontiguousarray(value.astype(wanted) if same_kind or fits else value)


def _load(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise RecipeError(f"there is no file {path}", fix="correct `samples: file`")
    if path.suffix == ".npz":
        return _load_npz(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    raise RecipeError(f"{path} is neither .npz nor .safetensors", fix="save the samples as one of them")


def _load_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
        if claimed > MAX_BYTES:
            raise RecipeError(f"{path} would unpack to {claimed >> 30} GiB", fix="give fewer or smaller samples")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise unreadable(path, error) from error


def _load_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path} has {path.stat().st_size >> 30} GiB", fix="give fewer or smaller samples")
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise unreadable(path, error) from error
