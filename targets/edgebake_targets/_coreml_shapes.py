"""Shapes of inputs that vary: ranges of sizes, or a list of the only shapes (Core ML's enumerated shapes).

A dimension with ``sizes`` in the recipe makes the shapes of its inputs a list: a shape for each size, and where several
dimensions have sizes, for each combination. Core ML may prepare itself for every listed shape, on the Neural Engine as
well, which for a range it cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

from edgebake.errors import RecipeError
from edgebake.target import Asked, LowerRequest, Refusal
from edgebake.types import DimBounds, MethodSignature, Signature, TensorSpec
from edgebake_targets._coreml_options import system_of

MOST = 128  # shapes that Core ML takes for an input (coremltools' guide, "Flexible Input Shapes")


def of_recipe(asked: Asked) -> Iterator[Refusal]:
    """What keeps the inputs of ``asked`` from being a list of shapes, where the recipe lists sizes."""
    for method, inputs in asked.inputs.items():
        yield from _refusals(method, inputs, asked.sizes, asked.varying, asked.options)


def check(signature: Signature, request: LowerRequest) -> None:
    """RecipeError for the same, of the inputs that the model told."""
    sizes = {name: bounds.sizes for name, bounds in signature.dims.items() if bounds.sizes}
    varying = [name for name, bounds in signature.dims.items() if bounds.min < bounds.max]
    found = [
        refusal.problem()
        for name, method in signature.methods.items()
        for refusal in _refusals(name, method.inputs, sizes, varying, request.options)
    ]
    if found:
        raise RecipeError(found)


def _refusals(
    method: str,
    inputs: Sequence[TensorSpec],
    sizes: Mapping[str, tuple[int, ...]],
    varying: Sequence[str],
    options: Mapping[str, Any],
) -> Iterator[Refusal]:
    listed = [spec.name for spec in inputs if any(size in sizes for size in spec.shape)]
    if not listed:
        return
    used = {size for spec in inputs for size in spec.shape}
    ranges = sorted(name for name in varying if name in used and name not in sizes)
    if ranges:
        what = f"{method}: shapes of a Core ML function are all listed or all ranges, and {ranges[0]} is a range"
        yield Refusal(key="dims", what=what, fix=f"dims: {{{ranges[0]}: {{sizes: [...]}}}}, or min and max for all")
    if (count := prod(len(sizes[name]) for name in sizes if name in used)) > MOST:
        what = f"{method}: {count} combinations of sizes, and Core ML takes {MOST} shapes of an input"
        yield Refusal(key="dims", what=what, fix="name fewer sizes, or min and max")
    if len(listed) > 1 and system_of(options) != "iOS18":
        what = f"{method}: before iOS 18 and macOS 15 one input may have listed shapes, here {', '.join(listed)} have"
        yield Refusal(key="options.minimum_os", what=what, fix="options: {minimum_os: iOS18}, or min and max for dims")


def shapes_of(ct: Any, method: MethodSignature, dims: Mapping[str, DimBounds]) -> dict[str, Any]:
    """coremltools' shape of every input of ``method``; inputs with the same dimension share its symbol."""
    ranges = {name: ct.RangeDim(bounds.min, bounds.max, symbol=f"dim_{name}") for name, bounds in dims.items()}
    used = {size for spec in method.inputs for size in spec.shape}
    listed = {name: bounds.sizes for name, bounds in dims.items() if bounds.sizes and name in used}
    points = [dict(zip(listed, sizes, strict=True)) for sizes in product(*listed.values())]
    return {spec.name: _shape(ct, spec, ranges, points) for spec in method.inputs}


def _shape(ct: Any, spec: TensorSpec, ranges: Mapping[str, Any], points: Sequence[Mapping[str, int]]) -> Any:
    if len(points) < 2 or not any(size in points[0] for size in spec.shape):
        return [ranges[size] if isinstance(size, str) else size for size in spec.shape] or [1]
    made = ct.EnumeratedShapes([[point.get(str(size), size) for size in spec.shape] for point in points])
    # Its own symbols differ from input to input, and shapes that have to be equal would not be.
    made.symbolic_shape = [ranges[size].symbol if isinstance(size, str) else size for size in spec.shape]
    return made
