"""What a model takes and gives, as its description says: checks what is passed in, and hands results out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgebake.errors import ArtifactDamaged, UsageError
from edgebake_targets._coreml_package import Package, proto
from edgebake_targets.mil.call import Unsupported

Sizes = tuple[tuple[int, int | None], ...]  # lowest and highest size of each axis; None: no highest
_LAYOUTS = {"GRAYSCALE": "L", "GRAYSCALE_FLOAT16": "F", "RGB": "RGB", "BGR": "BGR"}


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One input, output or state.

    ``kind``: array, image, state, label, probabilities. ``sizes``: the shapes that are allowed, none listed means any.
    ``layout``: channels of an image (L, F for float16 grey, RGB, BGR). ``default``: what fills a missing input.
    """

    name: str
    kind: str
    dtype: str = ""
    sizes: tuple[Sizes, ...] = ()
    layout: str = ""
    default: float | None = None


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Features of one function, by name."""

    inputs: Mapping[str, Feature]
    outputs: Mapping[str, Feature]
    states: Mapping[str, Feature]


def interface_of(package: Package, function: str) -> Interface:
    """The interface of ``function``; a package of one function describes it without a name."""
    description = package.spec.description
    if description.functions:
        found = next((f for f in description.functions if f.name == function), None)
        if found is None:
            raise ArtifactDamaged(f"its description has no function {function}", where=str(package.path))
        description = found
    sides = ((_feature(f) for f in side) for side in (description.input, description.output, description.state))
    inputs, outputs, states = ({feature.name: feature for feature in side} for side in sides)
    return Interface(inputs=inputs, outputs=outputs, states=states)


def _feature(found: Any) -> Feature:
    kind = found.type.WhichOneof("Type")
    name = str(found.name)
    if kind == "imageType":
        space = proto("FeatureTypes_pb2").ImageFeatureType.ColorSpace.Name(found.type.imageType.colorSpace)
        if space not in _LAYOUTS:
            raise Unsupported(f"the image {name} in the colour space {space}")
        return Feature(name=name, kind="image", layout=_LAYOUTS[space], sizes=_image_sizes(found.type.imageType))
    if kind in ("multiArrayType", "stateType"):
        array = found.type.multiArrayType if kind == "multiArrayType" else found.type.stateType.arrayType
        return Feature(
            name=name,
            kind="array" if kind == "multiArrayType" else "state",
            dtype=_dtype(array),
            sizes=_array_sizes(array),
            default=_default(array) if found.type.isOptional else None,
        )
    if kind in ("stringType", "int64Type"):
        return Feature(name=name, kind="label")
    if kind == "dictionaryType":
        return Feature(name=name, kind="probabilities")
    raise Unsupported(f"{name} is of the type {kind}")


def _dtype(array: Any) -> str:
    names = proto("FeatureTypes_pb2").ArrayFeatureType.ArrayDataType
    name = str(names.Name(array.dataType)).lower()
    return {"double": "float64", "invalid_array_data_type": "float32"}.get(name, name)


def _default(array: Any) -> float:
    given = array.WhichOneof("defaultOptionalValue")
    return float(getattr(array, given)) if given else 0.0


def _range(found: Any) -> tuple[int, int | None]:
    return int(found.lowerBound), None if found.upperBound < 0 else int(found.upperBound)


def _fixed(shape: Any) -> Sizes:
    return tuple((int(size), int(size)) for size in shape)


def _array_sizes(array: Any) -> tuple[Sizes, ...]:
    match array.WhichOneof("ShapeFlexibility"):
        case "shapeRange":
            return (tuple(_range(r) for r in array.shapeRange.sizeRanges),)
        case "enumeratedShapes":
            return tuple(_fixed(shape.shape) for shape in array.enumeratedShapes.shapes)
    return (_fixed(array.shape),) if array.shape else ()


def _image_sizes(image: Any) -> tuple[Sizes, ...]:
    match image.WhichOneof("SizeFlexibility"):
        case "imageSizeRange":
            return ((_range(image.imageSizeRange.heightRange), _range(image.imageSizeRange.widthRange)),)
        case "enumeratedSizes":
            return tuple(_fixed((size.height, size.width)) for size in image.enumeratedSizes.sizes)
    return (_fixed((image.height, image.width)),)


def described(sizes: tuple[Sizes, ...]) -> str:
    """The allowed shapes in words: ``(1, 8..128)``."""

    def one(low: int, high: int | None) -> str:
        return str(low) if low == high else f"{low}..{'' if high is None else high}"

    return " or ".join(f"({', '.join(one(*size) for size in shape)})" for shape in sizes)


def _allowed(shape: tuple[int, ...], sizes: tuple[Sizes, ...]) -> bool:
    def fits(alternative: Sizes) -> bool:
        return len(shape) == len(alternative) and all(
            low <= size and (high is None or size <= high) for size, (low, high) in zip(shape, alternative, strict=True)
        )

    return not sizes or any(map(fits, sizes))


def missing(feature: Feature) -> torch.Tensor:
    """What stands for an optional input that was not passed, in its default shape."""
    if feature.default is None or not feature.sizes:
        raise UsageError(f"the input {feature.name} is missing", fix=f"pass {feature.name}: {wanted(feature)}")
    shape = [max(low, 1) if high != 0 else 0 for low, high in feature.sizes[0]]
    return torch.from_numpy(np.full(shape, feature.default, np.dtype(feature.dtype)))


def wanted(feature: Feature) -> str:
    """What an input takes, in words."""
    if feature.kind == "image":
        return f"an image of (height, width) {described(feature.sizes)}, {feature.layout}"
    return f"{feature.dtype} {described(feature.sizes) or 'of any shape'}"


def taken(feature: Feature, value: Any) -> torch.Tensor:
    """``value`` as the program takes it. UsageError when it is of another type or shape than the description says."""
    if feature.kind == "image":
        return _pixels(feature, value)
    array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype.kind not in "biuf" or not _convertible(array, np.dtype(feature.dtype)):
        raise UsageError(f"the input {feature.name} takes {wanted(feature)}, not {array.dtype}")
    if not _allowed(array.shape, feature.sizes):
        raise UsageError(f"the input {feature.name} takes {wanted(feature)}, not the shape {array.shape}")
    if array.dtype.kind in "iu" and np.dtype(feature.dtype).kind == "i" and array.size:
        limits = np.iinfo(feature.dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise UsageError(f"the input {feature.name} holds integers that {feature.dtype} cannot")
    kept = np.float32 if feature.dtype.startswith("float") else np.dtype(feature.dtype)
    return torch.from_numpy(np.array(array, dtype=kept))


def _convertible(array: NDArray[Any], to: np.dtype[Any]) -> bool:
    """Integers may become floats; a float never becomes an integer in silence."""
    return to.kind == "f" or array.dtype.kind in "biu"


def _pixels(feature: Feature, value: Any) -> torch.Tensor:
    """(1, channels, height, width), float32 of 0..255 (a float16 grey image: as it is)."""
    array = np.asarray(value)
    mode = getattr(value, "mode", None)
    if mode is not None and mode != {"BGR": "RGB"}.get(feature.layout, feature.layout):
        raise UsageError(
            f"the input {feature.name} takes {wanted(feature)}, not an image of mode {mode}",
            fix=f"image.convert({ ({'BGR': 'RGB'}.get(feature.layout, feature.layout))!r})",
        )
    grey = feature.layout in ("L", "F")
    if grey and array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] != (1 if grey else 3) or (feature.layout != "F" and array.dtype != np.uint8):
        raise UsageError(
            f"the input {feature.name} takes {wanted(feature)}, not {array.dtype} of the shape {array.shape}",
            fix="pass a PIL image or a uint8 array (height, width, channels)",
        )
    if not _allowed(array.shape[:2], feature.sizes):
        raise UsageError(f"the input {feature.name} takes {wanted(feature)}, not {array.shape[0]} x {array.shape[1]}")
    if feature.layout == "BGR":
        array = array[..., ::-1]
    return torch.from_numpy(np.array(array.transpose(2, 0, 1)[None], np.float32))


def given(feature: Feature, value: Any) -> Any:
    """A result as ``MLModel.predict`` hands it out: a numpy array, a PIL image, a label or a dictionary."""
    if feature.kind == "image":
        return _image(feature, value)
    if not isinstance(value, torch.Tensor):
        return value
    if feature.kind == "label":
        return int(value)
    array = value.numpy()
    return np.array(array.reshape(1) if array.ndim == 0 else array, dtype=feature.dtype or array.dtype)


def _image(feature: Feature, value: torch.Tensor) -> Any:
    from PIL import Image

    channels = value.numpy().reshape(value.shape[-3:])
    if feature.layout == "F":
        return Image.fromarray(np.array(channels[0], np.float32), mode="F")
    pixels = np.rint(channels.clip(0, 255)).astype(np.uint8)
    if feature.layout == "L":
        return Image.fromarray(pixels[0])
    pixels = pixels[::-1] if feature.layout == "BGR" else pixels
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
