"""What every kind of samples is held against: how many there are and whether they fit the declared inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.recipe import Component, Input, Samples
from edgebake.types import Image8, Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray


def describe(spec: Samples) -> str:
    """One phrase for reports: the kind and where the samples come from."""
    where = "" if spec.noise else f" {getattr(spec, spec.kind)}"
    return f"{spec.kind}{where}"


def only_method(component: Component, kind: str) -> tuple[str, Mapping[str, Input]]:
    """Name and inputs (states left out) of the one method; RecipeError when there are several."""
    if len(component.all_methods) != 1:
        raise RecipeError(
            f"samples of kind {kind!r} fit components with one method, this one has {', '.join(component.all_methods)}",
            fix="write a callable and name it with `samples: {python: module:function}`",
        )
    name, inputs = next(iter(component.all_methods.items()))
    return name, {key: spec for key, spec in inputs.items() if spec.role != "state"}


def enough(spec: Samples, there: int, what: str) -> None:
    """RecipeError when ``skip + count`` samples are more than ``there``."""
    if spec.skip + spec.count > there:
        skipped = f" after skipping {spec.skip}" if spec.skip else ""
        raise RecipeError(
            f"{describe(spec)} has {there} {what}, the recipe asks for {spec.count}{skipped}",
            fix=f"set count to {max(there - spec.skip, 0)} or less, or give more samples",
        )


def check(sample: Sample, component: Component, where: str) -> None:
    """RecipeError when a call of ``sample`` does not fit the method it names."""
    if not sample.calls:
        raise RecipeError("a sample without calls", where=where)
    for call in sample.calls:
        inputs = component.all_methods.get(call.method)
        if inputs is None:
            raise RecipeError(f"there is no method {call.method!r}", where=where, fix=_known(component.all_methods))
        wanted = {name: spec for name, spec in inputs.items() if spec.role != "state"}
        if set(call.inputs) != set(wanted):
            raise RecipeError(
                f"the sample has the inputs {_names(call.inputs)}, the recipe declares {_names(wanted)}",
                where=where,
                fix="make both the same; states start at zeros and are never part of a sample",
            )
        bound: dict[str, int] = {}
        for name, spec in wanted.items():
            problem = _misfit(call.inputs[name], spec, component, bound)
            if problem:
                raise RecipeError(
                    f"input {name!r} is {problem}",
                    where=where,
                    fix="change the samples or the declared shape, dtype or bounds",
                )


def _misfit(value: NDArray[Any] | Image8, spec: Input, component: Component, bound: dict[str, int]) -> str:
    """What is wrong with ``value``, or nothing; ``bound`` collects the sizes of the call's named dimensions."""
    import numpy as np

    if not isinstance(value, Image8 | np.ndarray):
        return f"a {type(value).__name__}, not an array"
    shape = (1, *value.pixels.shape) if isinstance(value, Image8) else value.shape
    dtype = "float32" if isinstance(value, Image8) else str(value.dtype)
    wrong = dtype != spec.dtype or len(shape) != len(spec.shape)
    for size, wanted in zip(shape, spec.shape, strict=False):
        if isinstance(wanted, int):
            wrong = wrong or size != wanted
            continue
        limits = component.dims.get(wanted)
        outside = limits is not None and not limits.takes(size)
        wrong = wrong or outside or bound.setdefault(wanted, size) != size
    if not wrong:
        return ""
    bounds = "".join(f", {d} = {b}" for d, b in component.dims.items() if d in spec.shape)
    return f"{dtype}{list(shape)}, the recipe declares {spec.dtype}{_shape(spec)}{bounds}"


def _shape(spec: Input) -> str:
    return "[" + ", ".join(str(size) for size in spec.shape) + "]"


def _names(mapping: Mapping[str, object]) -> str:
    return ", ".join(mapping) or "none"


def _known(mapping: Mapping[str, object]) -> str:
    return f"known: {_names(mapping)}"
