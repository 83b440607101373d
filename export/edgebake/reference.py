"""The float model's own inputs and outputs on disk: what every artifact is held against, without the training model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged
from edgebake.jsonfile import check_signature, read_json, sign, write_json_atomic
from edgebake.store_files import sha256_file
from edgebake.types import Call, Image8, ReferenceCall, Sample, SampleSet

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgebake.tensor_file import TensorReader, TensorWriter

VERSION = 1
INPUTS, OUTPUTS, SAMPLES, MANIFEST = "inputs.safetensors", "outputs.safetensors", "samples.json", "manifest.json"
_IMAGES = "image8"  # metadata of INPUTS: which tensors are pixels, and their mean and std


def write(
    folder: Path, samples: SampleSet, calls: Iterable[tuple[ReferenceCall, ...]], facts: Mapping[str, Any]
) -> None:
    """Write a reference into ``folder`` (which exists): one tuple of ``calls`` per sample, taken one at a time.

    ``facts`` is plain JSON data: signature, whether the weights are random, digests. The same samples, calls and facts
    give the same bytes.
    """
    from edgebake.tensor_file import TensorWriter

    listed: list[dict[str, Any]] = []
    images = _Normalisations()
    with ExitStack() as stack:
        inputs = stack.enter_context(TensorWriter(folder / INPUTS))
        outputs = stack.enter_context(TensorWriter(folder / OUTPUTS))
        for index, (sample, recorded) in enumerate(zip(samples, calls, strict=True)):
            described = [
                _write_call(f"{index}.{number}", call, seen, (inputs, outputs, images))
                for number, (call, seen) in enumerate(zip(sample.calls, recorded, strict=True))
            ]
            listed.append({"source": sample.source, "label": sample.label, "calls": described})
        inputs.metadata[_IMAGES] = json.dumps({"normalisations": images.known, "tensors": images.tensors})
    write_json_atomic(folder / SAMPLES, {"version": VERSION, "samples": listed})
    manifest = {
        "version": VERSION,
        "kind": "reference",
        "noise": samples.noise,
        "description": samples.description,
        "samples": len(samples),
        "calls": sum(len(sample.calls) for sample in samples),
        "sources": len({sample.source for sample in samples}),
        "facts": dict(facts),
        "files": {name: _digest(folder / name) for name in (INPUTS, OUTPUTS, SAMPLES)},
    }
    write_json_atomic(folder / MANIFEST, sign(manifest))


@dataclass(frozen=True)
class Reference:
    """A reference in ``folder``. Nothing but the manifest is read before it is asked for; no torch is needed."""

    folder: Path

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What :func:`write` noted. ArtifactDamaged when it is missing, changed, or of a newer version."""
        path = self.folder / MANIFEST
        manifest = read_json(path)
        if not isinstance(manifest, dict) or not check_signature(manifest):
            raise ArtifactDamaged("the manifest was changed", where=str(path), fix="build again")
        if manifest["version"] > VERSION:
            raise ArtifactDamaged(
                f"version {manifest['version']} was written by a newer edgebake", where=str(path), fix="update edgebake"
            )
        return manifest

    @property
    def noise(self) -> bool:
        """Were the samples seeded noise?"""
        return bool(self.manifest["noise"])

    @property
    def facts(self) -> Mapping[str, Any]:
        """The facts given to :func:`write`."""
        found: Mapping[str, Any] = self.manifest["facts"]
        return found

    def verify(self) -> None:
        """Hash every file. ArtifactDamaged, naming the file, when one is missing or not what the manifest says."""
        for name, recorded in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise ArtifactDamaged("the file is missing", where=str(path), fix="build again")
            if _digest(path) != recorded:
                raise ArtifactDamaged("the file is not what its manifest says", where=str(path), fix="build again")

    def __len__(self) -> int:
        return int(self.manifest["samples"])

    def samples(self) -> Iterator[tuple[int, ReferenceSample]]:
        """(index, sample) of every sample, read one at a time."""
        for index in range(len(self)):
            yield index, self.sample(index)

    def sample(self, index: int) -> ReferenceSample:
        """Sample number ``index``."""
        entry = self._listed[index]
        calls = tuple(self._call(f"{index}.{number}", call) for number, call in enumerate(entry["calls"]))
        return ReferenceSample(source=entry["source"], label=entry["label"], calls=calls)

    def input_bytes(self, index: int) -> int:
        """Bytes of all inputs of sample ``index`` as the network takes them, states left out; reads no tensor."""
        return sum(
            self._inputs.count(key) * (4 if key in self._images["tensors"] else self._inputs.dtype(key).itemsize)
            for number, call in enumerate(self._listed[index]["calls"])
            for key in (f"{index}.{number}.{name}" for name in call["inputs"])
        )

    def sample_set(self) -> SampleSet:
        """The samples alone, as they went into the float model (states absent, images in 8 bits)."""
        samples = [
            Sample(
                calls=tuple(
                    Call(
                        method=call["method"],
                        inputs={name: self._input(f"{index}.{number}.{name}") for name in call["inputs"]},
                    )
                    for number, call in enumerate(entry["calls"])
                ),
                source=entry["source"],
                label=entry["label"],
            )
            for index, entry in enumerate(self._listed)
        ]
        return SampleSet(samples=tuple(samples), noise=self.noise, description=self.manifest["description"])

    @cached_property
    def _listed(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = read_json(self.folder / SAMPLES)["samples"]
        return listed

    @cached_property
    def _inputs(self) -> TensorReader:
        return _open(self.folder / INPUTS)

    @cached_property
    def _outputs(self) -> TensorReader:
        return _open(self.folder / OUTPUTS)

    @cached_property
    def _images(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = json.loads(self._inputs.metadata[_IMAGES])
        return found

    def _input(self, key: str) -> NDArray[Any] | Image8:
        value = self._inputs[key]
        which = self._images["tensors"].get(key)
        if which is None:
            return value
        mean, std = self._images["normalisations"][which]
        return Image8(pixels=value, mean=tuple(mean), std=tuple(std))

    def _call(self, key: str, entry: Mapping[str, Any]) -> ReferenceCall:
        given = Call(inputs={name: self._input(f"{key}.{name}") for name in entry["inputs"]})
        states = {name: self._outputs[f"{key}.state.{name}"] for name in entry["states"]}
        return ReferenceCall(
            method=entry["method"],
            inputs={**given.tensors(), **states},
            outputs={name: self._outputs[f"{key}.output.{name}"] for name in entry["outputs"]},
        )


@dataclass(frozen=True, kw_only=True)
class ReferenceSample:
    """One sample with what the float model made of it. All arrays are the caller's own."""

    source: str
    label: int | None
    calls: tuple[ReferenceCall, ...]


class _Normalisations:
    """Mean and std of the pixel tensors, each pair kept once."""

    def __init__(self) -> None:
        self.known: list[list[list[float]]] = []
        self.tensors: dict[str, int] = {}

    def note(self, key: str, image: Image8) -> None:
        pair = [list(image.mean), list(image.std)]
        if pair not in self.known:
            self.known.append(pair)
        self.tensors[key] = self.known.index(pair)


def _write_call(
    key: str, call: Call, seen: ReferenceCall, sinks: tuple[TensorWriter, TensorWriter, _Normalisations]
) -> dict[str, Any]:
    """Write one call's tensors under ``key``; its entry in the list of samples."""
    inputs, outputs, images = sinks
    for name, value in call.inputs.items():
        if isinstance(value, Image8):
            images.note(f"{key}.{name}", value)
        inputs.add(f"{key}.{name}", value.pixels if isinstance(value, Image8) else value)
    states = [name for name in seen.inputs if name not in call.inputs]
    for name in states:
        outputs.add(f"{key}.state.{name}", seen.inputs[name])
    for name, value in seen.outputs.items():
        outputs.add(f"{key}.output.{name}", value)
    return {"method": seen.method, "inputs": list(call.inputs), "states": states, "outputs": list(seen.outputs)}


def _open(path: Path) -> TensorReader:
    from edgebake.tensor_file import TensorReader

    return TensorReader(path)


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
