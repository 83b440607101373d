"""Samples from image folders: decoded under a pixel cap, turned upright, cropped, kept as 8 bits."""

from __future__ import annotations

import math
import re
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgebake.errors import RecipeError
from edgebake.recipe import Component, Input, Samples
from edgebake.samples_checks import enough, only_method
from edgebake.samples_paths import list_images
from edgebake.types import Call, Image8, Sample

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 64_000_000
MAX_BYTES = 256 << 20
MARGIN = 256 / 224  # short side over crop, the usual ImageNet evaluation (Krizhevsky et al. 2012, 256 and 224)
SMALLEST_AREA = 0.5  # random crops: share of the largest square's area, so that most of the object stays in sight


def read_images(spec: Samples, component: Component, folder: Path) -> list[Sample]:
    """Crops number ``skip .. skip+count``: first the centre crop of every image, then a random crop of each, and so on.

    The centre crop follows a resize of the short side to size*256/224; a random crop is a square of 50..100 % of the
    largest square's area, somewhere, mirrored or not, drawn from (seed, file name, crop number). Only centre crops
    carry the label: a random crop need not show what the label says.
    """
    method, name, input_spec = _image_input(spec, component)
    files = list_images(folder, spec.pattern)
    enough(spec, len(files) * spec.crops, f"crops ({len(files)} images, {spec.crops} crops each)")
    wanted = range(spec.skip, spec.skip + spec.count)
    samples: dict[int, Sample] = {}
    for position, file in enumerate(files):
        numbers = [n for n in wanted if n % len(files) == position]
        if not numbers:
            continue
        image = _open(file, len(spec.mean))  # once per file, all its crops
        for number in numbers:
            crop = number // len(files)
            pixels = _pixels(_crop(image, file.name, crop, spec))
            value = pixels[None] if input_spec.dtype == "uint8" else Image8(pixels=pixels, mean=spec.mean, std=spec.std)
            label = _label(file) if spec.labels == "filename" and crop == 0 else None
            samples[number] = Sample(calls=(Call(inputs={name: value}, method=method),), source=file.name, label=label)
    return [samples[number] for number in wanted]


def _image_input(spec: Samples, component: Component) -> tuple[str, str, Input]:
    """Method, name and declaration of the one input that takes the image."""
    method, inputs = only_method(component, "images")
    marked = {name: i for name, i in inputs.items() if i.role == "image"}
    if len(inputs) != 1 and len(marked) != len(inputs):
        raise RecipeError(
            f"images feed one input, the recipe declares {', '.join(inputs)}", fix="write a samples callable instead"
        )
    name, found = next(iter(inputs.items()))
    channels = len(spec.mean)
    if channels not in (1, 3) or len(spec.std) != channels:
        raise RecipeError("mean and std need the same length: 3 for colour, 1 for grey", fix="correct `samples: mean`")
    expected = (1, channels, spec.size, spec.size)
    wrong = len(found.shape) != 4 or any(
        isinstance(a, int) and a != b for a, b in zip(found.shape, expected, strict=True)
    )
    if wrong or found.dtype not in ("float32", "uint8"):
        raise RecipeError(
            f"input {name!r} is {found.dtype}{list(found.shape)}, images come as float32 or uint8 {list(expected)}",
            fix="change the input, or `size`, `mean` and `std` of the samples",
        )
    return method, name, found


def _open(file: Path, channels: int) -> Image.Image:
    """Upright RGB or grey image."""
    from PIL import Image, ImageOps

    if file.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{file} has more than {MAX_BYTES >> 20} MiB", fix="leave it out or make it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap below is tighter
            with Image.open(file) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise RecipeError(
                        f"{file} has {image.width} x {image.height} pixels, more than {MAX_PIXELS // 10**6} million",
                        fix="leave it out or make it smaller",
                    )
                return ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise RecipeError(f"{file} cannot be decoded: {error}", fix="leave it out or save it again") from error


def _crop(image: Image.Image, name: str, number: int, spec: Samples) -> Image.Image:
    from PIL import Image

    side = min(image.size)
    mirrored = False
    if number == 0:
        square = side / MARGIN
        left, top = (image.width - square) / 2, (image.height - square) / 2
    else:
        # crc32, not hash(): Python salts the hash of a string per process
        rng = np.random.default_rng((spec.seed, zlib.crc32(name.encode()), number))
        square = side * math.sqrt(rng.uniform(SMALLEST_AREA, 1.0))
        left, top = rng.uniform(0, image.width - square), rng.uniform(0, image.height - square)
        mirrored = bool(rng.integers(2))
    box = (left, top, min(left + square, image.width), min(top + square, image.height))
    cut = image.resize((spec.size, spec.size), Image.Resampling.BILINEAR, box=box)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else cut


def _pixels(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(C, H, W) uint8."""
    array = np.asarray(image, np.uint8)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _label(file: Path) -> int:
    numbers = re.findall(r"\d+", file.stem)
    if not numbers:
        raise RecipeError(f"{file.name} carries no number to take as label", fix="rename it or set `labels: none`")
    return int(numbers[-1])
