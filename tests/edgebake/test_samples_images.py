"""Samples from image folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgebake import samples_images
from edgebake.errors import RecipeError
from edgebake.recipe import Component, Samples
from edgebake.samples import read
from edgebake.types import Image8, Sample


def component(shape: tuple[int, ...] = (1, 3, 32, 32), dtype: str = "float32") -> Component:
    inputs = {"image": {"shape": list(shape), "dtype": dtype, "role": "image"}}
    return Component.model_validate({"model": {"source": "python", "path": "m:f"}, "inputs": inputs})


def spec(**given: Any) -> Samples:
    return Samples.model_validate({"images": ".", "size": 32, "count": 1, **given})


def picture(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards; blue is constant."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 40)], -1).astype(np.uint8))


def pixels(sample: Sample) -> np.ndarray[Any, Any]:
    value = sample.calls[0].inputs["image"]
    assert isinstance(value, Image8)
    return value.pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(128, 96).save(tmp_path / "a_7.png")
    picture(64, 80).save(tmp_path / "b_12.png")
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    return tmp_path


def test_the_first_crop_is_the_centre_after_the_usual_resize(folder: Path) -> None:
    found = read(spec(pattern="a*"), component(), folder, None).samples[0]
    # the centre square of side 96 / (256 / 224) = 84 of 128 x 96: red 22..106 of 127, green 6..90 of 95
    assert pixels(found)[0].mean() == pytest.approx(127.5, abs=1.5)
    assert pixels(found)[0, 16, 0] == pytest.approx(255 * (64 - 42 + 42 / 32) / 128, abs=3)
    assert pixels(found)[1, 0, 16] == pytest.approx(255 * (48 - 42 + 42 / 32) / 96, abs=3)
    assert (pixels(found)[2] == 40).all()


def test_every_image_comes_once_before_any_comes_twice_and_only_centres_carry_labels(folder: Path) -> None:
    found = read(spec(crops=3, count=6, labels="filename"), component(), folder, None)
    assert [(s.source, s.label) for s in found] == [
        ("a_7.png", 7), ("b_12.png", 12), ("a_7.png", None), ("b_12.png", None), ("a_7.png", None), ("b_12.png", None)
    ]  # fmt: skip
    assert len({pixels(s).tobytes() for s in found}) == 6


def test_random_crops_depend_on_the_seed_and_not_on_skip_or_count(folder: Path) -> None:
    whole = read(spec(crops=5, count=10), component(), folder, None)
    part = read(spec(crops=5, count=3, skip=4), component(), folder, None)
    other = read(spec(crops=5, count=10, seed=1), component(), folder, None)
    assert [pixels(s).tobytes() for s in part] == [pixels(s).tobytes() for s in whole.samples[4:7]]
    same = [np.array_equal(pixels(a), pixels(b)) for a, b in zip(whole, other, strict=True)]
    assert same == [True, True] + [False] * 8


def test_too_few_crops_are_an_error_that_says_how_many_there_are(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"4 crops \(2 images, 2 crops each\), the recipe asks for 5"):
        read(spec(crops=2, count=5), component(), folder, None)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    picture(64, 64).save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = pixels(read(spec(), component(), tmp_path, None).samples[0])
    assert found[0, 16, 0] > found[0, 16, 31]
    assert found[1, 0, 16] > found[1, 31, 16]


def test_grey_networks_get_grey_and_uint8_inputs_the_pixels_themselves(folder: Path) -> None:
    grey = read(spec(mean=[0.5], std=[0.5]), component((1, 1, 32, 32)), folder, None)
    assert pixels(grey.samples[0]).shape == (1, 32, 32)
    raw = read(spec(), component(dtype="uint8"), folder, None).samples[0].calls[0].inputs["image"]
    assert isinstance(raw, np.ndarray)
    assert (raw.shape, raw.dtype) == ((1, 3, 32, 32), np.dtype(np.uint8))


def test_damaged_and_oversized_images_are_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (folder / "a_7.png").read_bytes()
    (folder / "c_cut.png").write_bytes(good[: len(good) // 2])
    (folder / "d_text.png").write_bytes(b"not an image")
    for name in ("c_cut.png", "d_text.png"):
        with pytest.raises(RecipeError, match=name):
            read(spec(pattern=name), component(), folder, None)
    monkeypatch.setattr(samples_images, "MAX_PIXELS", 128 * 96 - 1)
    with pytest.raises(RecipeError, match=r"a_7\.png has 128 x 96 pixels"):
        read(spec(), component(), folder, None)


def test_folders_packages_and_names_without_images_are_refused(folder: Path) -> None:
    for given, said in (
        ({"images": "nowhere"}, "no image folder"),
        ({"pattern": "z*"}, "holds no image that matches 'z"),
        ({"images": "pkg://no_such_package_here/data"}, "'no_such_package_here' .* not installed"),
        ({"images": "pkg://foolbox/../data"}, "leaves the package"),
        ({"size": 64}, r"is float32\[1, 3, 32, 32\], images come as float32 or uint8 \[1, 3, 64, 64\]"),
    ):
        with pytest.raises(RecipeError, match=said):
            read(spec(**given), component(), folder, None)
    (folder / "unnumbered.png").write_bytes((folder / "a_7.png").read_bytes())
    with pytest.raises(RecipeError, match=r"unnumbered\.png carries no number"):
        read(spec(labels="filename", pattern="unnumbered*"), component(), folder, None)


def test_images_of_an_installed_package_are_found_without_importing_it() -> None:
    import sys

    shape = component((1, 3, 224, 224))
    found = read(spec(images="pkg://foolbox/data", pattern="imagenet_*", size=224, count=2), shape, Path(), None)
    assert [s.source for s in found] == ["imagenet_00_243.jpg", "imagenet_01_559.jpg"]
    assert "foolbox" not in sys.modules
