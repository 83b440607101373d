"""Seeded noise for every declared input: it exercises a graph and says nothing about quality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgebake.recipe import Component, Dim, Input, Samples
from edgebake.types import Call, Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

STATEFUL_CALLS = 8  # enough calls that a state carried wrongly shows


def make_noise(spec: Samples, component: Component) -> list[Sample]:
    """``spec.count`` samples; sample ``i`` is the same whatever ``skip`` and ``count`` are around it.

    Floats are normal, integers uniform in 0..high-1, masks one, token types and a call's place in a text zero,
    positions counted up; every named dimension is drawn once per sample from its sizes. A sample calls each method
    once in order, and STATEFUL_CALLS times when the component carries state.
    """
    return [_sample(spec, component, index) for index in range(spec.skip, spec.skip + spec.count)]


def _sample(spec: Samples, component: Component, index: int) -> Sample:
    rng = np.random.default_rng((spec.seed, index))
    sizes = {name: _drawn(dim, rng) for name, dim in component.dims.items()}
    stateful = any(i.role == "state" for inputs in component.all_methods.values() for i in inputs.values())
    calls = [
        Call(
            method=method,
            inputs={n: _tensor(n, i, sizes, spec.high, rng) for n, i in inputs.items() if i.role != "state"},
        )
        for _ in range(STATEFUL_CALLS if stateful else 1)
        for method, inputs in component.all_methods.items()
    ]
    return Sample(calls=tuple(calls), source=str(index))


def _drawn(dim: Dim, rng: np.random.Generator) -> int:
    return int(rng.choice(dim.sizes) if dim.sizes else rng.integers(dim.min, dim.max + 1))


def _tensor(name: str, spec: Input, sizes: dict[str, int], high: int, rng: np.random.Generator) -> NDArray[Any]:
    shape = tuple(size if isinstance(size, int) else sizes[size] for size in spec.shape)
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return np.ones(shape, dtype) if "mask" in name else rng.standard_normal(shape, np.float32).astype(dtype)
    if "mask" in name:
        return np.ones(shape, dtype)
    if "token_type" in name or "segment" in name or name.endswith("_pos"):
        return np.zeros(shape, dtype)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    top = 2 if dtype.kind == "b" else min(high, int(np.iinfo(dtype).max) + 1)
    return rng.integers(0, top, shape).astype(dtype)
