"""Reads the samples that a recipe names: array files, images, text, a Python callable, or seeded noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from edgebake.errors import RecipeError
from edgebake.recipe import Component, Samples
from edgebake.samples_checks import check, describe
from edgebake.samples_paths import list_images, resolve
from edgebake.types import Sample, SampleSet

DISTRIBUTIONS = ("numpy", "pillow", "safetensors", "tokenizers")  # what the values of samples depend on


def read(spec: Samples, component: Component, base: Path, tokenizer_path: Path | None) -> SampleSet:
    """``spec.count`` samples after the first ``spec.skip``, checked against the inputs that ``component`` declares.

    ``base`` is the folder that relative paths start from; ``tokenizer_path`` the model's folder or its
    ``tokenizer.json``, needed for text only. State inputs are absent: every sample starts at zeros. RecipeError, naming
    the file, when one is missing, unreadable or too large, when there are fewer samples than asked for, or when a
    sample does not fit the inputs.
    """
    kind = spec.kind
    samples: list[Sample] = []
    if kind == "file":
        from edgebake.samples_files import read_arrays

        samples = read_arrays(spec, component, resolve(str(spec.file), base))
    elif kind == "images":
        from edgebake.samples_images import read_images

        samples = read_images(spec, component, resolve(str(spec.images), base))
    elif kind == "text":
        from edgebake import samples_text, samples_tokens

        read_text = samples_text.read_text if component.model.context is None else samples_tokens.read_text
        samples = read_text(spec, component, resolve(str(spec.text), base), tokenizer_path)
    elif kind == "python":
        from edgebake.samples_python import read_python

        samples = read_python(spec, base)
    else:
        from edgebake.samples_noise import make_noise

        samples = make_noise(spec, component)
    for index, sample in enumerate(samples):
        check(sample, component, f"sample {spec.skip + index} of {describe(spec)}")
    return SampleSet(samples=tuple(samples), noise=spec.noise, description=describe(spec))


def fingerprint(spec: Samples, base: Path, file_digest: Callable[[Path], str]) -> Mapping[str, str]:
    """``{name: digest}`` of every file that ``spec`` reads, by names that are the same on every machine.

    A Python callable counts with the Python files of its module's folder and the versions of its DISTRIBUTIONS.
    """
    kind = spec.kind
    if kind == "noise":
        return {}
    if kind == "images":
        files = list_images(resolve(str(spec.images), base), spec.pattern)
        return {file.name: file_digest(file) for file in files}
    if kind == "python":
        from edgebake.samples_python import fingerprint_python

        return fingerprint_python(spec, base, file_digest)
    file = resolve(str(getattr(spec, kind)), base)
    if not file.is_file():
        raise RecipeError(f"there is no file {file}", fix=f"correct `samples: {kind}`")
    return {file.name: file_digest(file)}
