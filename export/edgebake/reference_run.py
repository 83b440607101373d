"""Runs the float model on samples, carrying its states from call to call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebake.buffers import untouched
from edgebake.errors import StageFailed
from edgebake.types import Call, Loaded, ReferenceCall, Sample, TensorSpec

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


def run_float(loaded: Loaded, samples: Iterable[Sample]) -> Iterator[tuple[ReferenceCall, ...]]:
    """What the float model makes of each sample, one tuple of calls per sample, computed as it is asked for.

    Every sample starts with its states at zeros; after that a state is the latest value of the output that its
    ``state_from`` names, whichever method gave it. Buffers that the network writes to start every sample as they were
    loaded.
    """
    with untouched(*loaded.methods.values()) as start:
        for sample in samples:
            start.restore()
            carried: dict[str, NDArray[Any]] = {}
            recorded = []
            for call in sample.calls:
                seen = _run_call(loaded, call, carried)
                carried.update(seen.outputs)
                recorded.append(seen)
            yield tuple(recorded)


def _run_call(loaded: Loaded, call: Call, carried: Mapping[str, NDArray[Any]]) -> ReferenceCall:
    import torch

    signature = loaded.signature.methods[call.method]
    given = call.tensors()
    sizes = _sizes(signature.inputs, given)
    inputs = {
        spec.name: _state(spec, carried, sizes) if spec.role == "state" else given[spec.name]
        for spec in signature.inputs
        if spec.role != "constant"
    }
    with torch.inference_mode():
        # copies: a network that writes into its inputs must not change what is recorded
        results = loaded.methods[call.method](*(torch.tensor(value) for value in inputs.values()))
    outputs = {spec.name: _array(value) for spec, value in zip(signature.outputs, results, strict=True)}
    return ReferenceCall(method=call.method, inputs=inputs, outputs=outputs)


def _sizes(specs: Iterable[TensorSpec], given: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Sizes of the named dimensions in this call."""
    return {
        dim: size
        for spec in specs
        if spec.name in given
        for dim, size in zip(spec.shape, given[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }


def _state(spec: TensorSpec, carried: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]) -> NDArray[Any]:
    """The carried state, or zeros at the start."""
    if spec.state_from is not None and spec.state_from in carried:
        return carried[spec.state_from]
    unknown = [dim for dim in spec.shape if isinstance(dim, str) and dim not in sizes]
    if unknown:
        raise StageFailed(
            f"the state {spec.name!r} cannot start at zeros: no input tells the size of {unknown[0]!r}",
            fix="give the state fixed sizes",
        )
    return np.zeros([dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape], spec.dtype)


def _array(value: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = value.detach().contiguous().numpy().copy()
    return array
