"""Image inputs: 8-bit pixels as apps have them, brought to what the network was trained on inside the package.

The recipe normalises ``(pixel / 255 - mean) / std`` per channel. Core ML has one scale and a bias per channel, so
channels whose ``std`` differ are scaled apart by a multiplication behind it, which is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import fsum
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.target import LowerRequest, NotMeasured, Refusal
from edgebake.types import MethodSignature, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_LAYOUTS = {1: "GRAYSCALE", 3: "RGB"}
_NEAR = 1e-3  # of a pixel's step: what float32 loses on the way to a normalised value and back

Normalisation = Mapping[str, Any]  # "mean" and "std", one number per channel


def taken_as_images(method: MethodSignature, request: LowerRequest) -> dict[str, Normalisation]:
    """The inputs that become images, with the recipe's normalisation. RecipeError for what cannot be one."""
    mean, std = request.about.mean, request.about.std
    refused = list(refusals(request.options, "forward", method.inputs, len(mean) or None))
    if refused:
        raise RecipeError([refusal.problem() for refusal in refused])
    images = [] if request.options["image_inputs"] == "array" else [s for s in method.inputs if s.role == "image"]
    return {spec.name: {"mean": list(mean), "std": list(std)} for spec in images}


def refusals(
    options: Mapping[str, Any], method: str, inputs: Iterable[TensorSpec], channels: int | None
) -> Iterator[Refusal]:
    """What keeps ``inputs`` from being images where ``options`` ask for that; ``channels`` that samples normalise."""
    if options["image_inputs"] == "array":
        return
    images = [spec for spec in inputs if spec.role == "image"]
    for spec in images:
        if wrong := _misfit(spec, channels):
            yield Refusal(what=wrong[0], fix=wrong[1], key=f"inputs.{method}.{spec.name}")
    if not images:
        what = "image_inputs: image, but no input has the role image"
        fix = "inputs: {pixels: {shape: [1, 3, 224, 224], role: image}}"
        yield Refusal(what=what, fix=fix, key="options.image_inputs")
    elif channels is None:
        what = "image_inputs: image, but no samples of images say how pixels are normalised"
        fix = "samples: {evaluation: {images: ..., mean: [...], std: [...]}}"
        yield Refusal(what=what, fix=fix, key="options.image_inputs")


def _misfit(spec: TensorSpec, channels: int | None) -> tuple[str, str] | None:
    """Why ``spec`` cannot be an image and what to do; None when it can."""
    fixed = len(spec.shape) == 4 and spec.shape[0] == 1 and all(isinstance(size, int) for size in spec.shape)
    if not fixed or spec.shape[1] not in _LAYOUTS or spec.dtype != "float32":
        what = (
            f"the input {spec.name} cannot be an image: that takes float32 of 1 x 3 (or 1) x height x width, all fixed"
        )
        return what, "give it fixed sizes, or options: {image_inputs: array}"
    if channels is not None and spec.shape[1] != channels:
        what = f"the input {spec.name} has {spec.shape[1]} channels, the recipe's mean has {channels}"
        return what, "give mean and std one number per channel"
    return None


def image_type(ct: Any, spec: TensorSpec, normalisation: Normalisation) -> Any:
    """coremltools' ImageType: pixels times one scale, plus a bias per channel."""
    common = _common(normalisation)
    bias = [-mean / common for mean in normalisation["mean"]]
    layout = _LAYOUTS[int(spec.shape[1])]
    return ct.ImageType(
        name=spec.name,
        shape=spec.shape,
        scale=1.0 / (255.0 * common),
        bias=bias if len(bias) > 1 else bias[0],
        color_layout=getattr(ct.colorlayout, layout),
    )


def _common(normalisation: Normalisation) -> float:
    return fsum(normalisation["std"]) / len(normalisation["std"])


def scale_channels(
    program: torch.export.ExportedProgram, method: MethodSignature, images: Mapping[str, Normalisation]
) -> None:
    """Multiply the image inputs of ``program``, in place, by what one scale leaves of each channel's ``std``."""
    import torch

    aten, graph = torch.ops.aten, program.graph_module.graph
    names = dict(zip(program.graph_signature.user_inputs, (spec.name for spec in method.inputs), strict=True))
    for node in [node for node in graph.nodes if node.op == "placeholder" and names.get(node.name) in images]:
        normalisation = images[names[node.name]]
        factors = [_common(normalisation) / std for std in normalisation["std"]]
        users = list(node.users)
        if len(set(factors)) == 1 or not users:
            continue
        with graph.inserting_before(users[0]):
            parts = [graph.call_function(aten.full.default, ([1, 1, 1, 1], factor)) for factor in factors]
            scaled = graph.call_function(aten.cat.default, (parts, 1))
            product = graph.call_function(aten.mul.Tensor, (node, scaled))
        for part, factor in zip(parts, factors, strict=True):
            part.meta["val"] = torch.full([1, 1, 1, 1], factor)
        scaled.meta["val"] = torch.ones(1, len(factors), 1, 1)
        product.meta["val"] = node.meta["val"]
        for user in users:
            user.replace_input_with(node, product)
    program.graph_module.recompile()


def pixels(name: str, values: NDArray[Any], normalisation: Normalisation) -> NDArray[np.uint8]:
    """(height, width, channels) of what was normalised to ``values``; NotMeasured when no 8-bit pixels were."""
    import numpy as np

    mean, std = (np.asarray(normalisation[key], np.float64)[:, None, None] for key in ("mean", "std"))
    steps = (values[0].astype(np.float64) * std + mean) * 255.0
    found = np.rint(steps)
    if not (np.abs(steps - found).max() <= _NEAR and found.min() >= 0 and found.max() <= 255):
        raise NotMeasured(f"the package takes {name} as 8-bit pixels, and the samples hold other values")
    taken: NDArray[np.uint8] = found.astype(np.uint8).transpose(1, 2, 0)
    return taken


def lowered_inputs(
    images: Mapping[str, Normalisation], specs: MethodSignature, inputs: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Inputs in the dtypes of the package; a scalar is a vector of one, one of ``images`` its 8-bit pixels."""
    given = {
        s.name: pixels(s.name, inputs[s.name], images[s.name])
        if s.name in images
        else inputs[s.name].astype(s.lowered_dtype or s.dtype)
        for s in specs.inputs
    }
    return {name: array.reshape(1) if array.ndim == 0 else array for name, array in given.items()}
