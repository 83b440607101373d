"""The reference on disk: exact, the same bytes each time, quick to read, and it notices damage."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.reference import Reference, write
from edgebake.reference_run import run_float
from edgebake.tensor_file import TensorWriter
from edgebake.types import (
    Call,
    Image8,
    Loaded,
    MethodSignature,
    ReferenceCall,
    Sample,
    SampleSet,
    Signature,
    TensorSpec,
)

FACTS = {"model": {"weights": "random", "seed": 3}, "signature": {"methods": {}}}


def image(seed: int) -> Image8:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 5, 7)).astype(np.uint8)
    return Image8(pixels=pixels, mean=(127 / 255, 0.5, 0.1), std=(0.2, 0.3, 0.4))


def some_samples(count: int = 4) -> SampleSet:
    """Images beside tensors of sizes that differ from sample to sample."""
    return SampleSet(
        samples=tuple(
            Sample(
                calls=(Call(inputs={"image": image(i), "ids": np.arange(3 + i, dtype=np.int64)[None]}),),
                source=f"clip {i // 2}",
                label=i if i % 2 else None,
            )
            for i in range(count)
        ),
        description="pictures",
    )


def some_calls(samples: SampleSet) -> Iterator[tuple[ReferenceCall, ...]]:
    for i, sample in enumerate(samples):
        yield tuple(
            ReferenceCall(
                method=call.method,
                inputs={**call.tensors(), "state": np.full((2, 1), i, np.float32)},
                outputs={"y": np.full((1, 3 + i), i / 3, np.float32), "flag": np.array([i % 2 == 0])},
            )
            for call in sample.calls
        )


@pytest.fixture
def written(tmp_path: Path) -> Path:
    samples = some_samples()
    write(tmp_path, samples, some_calls(samples), FACTS)
    return tmp_path


def test_everything_comes_back_exactly(written: Path) -> None:
    reference, samples = Reference(written), some_samples()
    reference.verify()
    assert len(reference) == 4
    for (index, found), sample, calls in zip(reference.samples(), samples, some_calls(samples), strict=True):
        assert (found.source, found.label) == (sample.source, sample.label)
        for call, expected in zip(found.calls, calls, strict=True):
            assert list(call.inputs) == ["image", "ids", "state"]
            for name, value in expected.inputs.items():
                np.testing.assert_array_equal(call.inputs[name], value, strict=True)
            for name, value in expected.outputs.items():
                np.testing.assert_array_equal(call.outputs[name], value, strict=True)
        assert reference.input_bytes(index) == 3 * 5 * 7 * 4 + (3 + index) * 8


def test_images_stay_eight_bits_on_disk_and_in_the_samples_read_back(written: Path) -> None:
    stored = load_file(written / "inputs.safetensors")  # the public library reads what is written here
    assert stored["2.0.image"].dtype == np.uint8
    back = Reference(written).sample_set()
    assert back.description == "pictures"
    first = back.samples[0].calls[0].inputs["image"]
    assert isinstance(first, Image8)
    assert (first.mean, first.std) == (image(0).mean, image(0).std)
    assert set(back.samples[0].calls[0].inputs) == {"image", "ids"}


def test_the_manifest_counts_and_keeps_the_facts(written: Path) -> None:
    reference = Reference(written)
    counted = {name: reference.manifest[name] for name in ("samples", "calls", "sources", "noise")}
    assert counted == {"samples": 4, "calls": 4, "sources": 2, "noise": False}
    assert reference.facts == FACTS
    assert not reference.noise
    assert str(written) not in (written / "manifest.json").read_text(encoding="utf-8")
    assert sorted(p.name for p in written.iterdir()) == [
        "inputs.safetensors", "manifest.json", "outputs.safetensors", "samples.json"
    ]  # fmt: skip


def test_the_same_reference_has_the_same_bytes(written: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write(other, some_samples(), some_calls(some_samples()), FACTS)
    for file in written.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()


@pytest.mark.parametrize("name", ["inputs.safetensors", "outputs.safetensors", "samples.json"])
def test_a_changed_file_is_named(written: Path, name: str) -> None:
    data = bytearray((written / name).read_bytes())
    data[-3] ^= 1
    (written / name).write_bytes(data)
    with pytest.raises(ArtifactDamaged, match=name):
        Reference(written).verify()
    (written / name).unlink()
    with pytest.raises(ArtifactDamaged, match=f"{name}: the file is missing"):
        Reference(written).verify()


def test_a_changed_manifest_and_a_newer_version_are_refused(written: Path) -> None:
    path = written / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**manifest, "noise": True}), encoding="utf-8")
    with pytest.raises(ArtifactDamaged, match=r"manifest\.json: the manifest was changed"):
        Reference(written).verify()


def test_a_cut_off_tensor_file_is_damage_and_no_traceback(written: Path) -> None:
    path = written / "outputs.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtifactDamaged, match=r"outputs\.safetensors: the tensor .* is cut off"):
        list(Reference(written).samples())


def test_512_samples_of_different_lengths_are_read_in_under_a_second(tmp_path: Path) -> None:
    samples = some_samples(512)
    write(tmp_path, samples, some_calls(samples), FACTS)
    start = time.perf_counter()
    assert sum(len(sample.calls) for _, sample in Reference(tmp_path).samples()) == 512
    assert time.perf_counter() - start < 1.0


def test_a_failed_write_leaves_no_tensor_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TensorWriter(tmp_path / "a.safetensors") as writer:
        writer.add("x", np.zeros(3, np.float32))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


# --- running the float model ----------------------------------------------------------------------------------------


def accumulator(state_shape: tuple[int | str, ...] = (1, "n")) -> Loaded:
    """Adds its input to its state, in place: the recorded state must not change with it."""
    import torch

    class Accumulate(torch.nn.Module):
        def forward(self, x: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            total += x
            return total * 2, total

    signature = MethodSignature(
        inputs=(
            TensorSpec(name="x", shape=(1, "n"), dtype="float32"),
            TensorSpec(name="total", shape=state_shape, dtype="float32", role="state", state_from="new_total"),
        ),
        outputs=(
            TensorSpec(name="doubled", shape=(1, "n"), dtype="float32"),
            TensorSpec(name="new_total", shape=(1, "n"), dtype="float32"),
        ),
    )
    return Loaded(
        methods={"forward": Accumulate().eval()}, signature=Signature(methods={"forward": signature}), facts={}
    )


def sequence(*rows: list[float]) -> Sample:
    return Sample(calls=tuple(Call(inputs={"x": np.array([r], np.float32)}) for r in rows), source="s")


def values(calls: tuple[ReferenceCall, ...], group: str, name: str) -> list[list[Any]]:
    return [getattr(call, group)[name].tolist() for call in calls]


def test_states_start_at_zero_in_every_sample_and_carry_on_within_it() -> None:
    samples = [sequence([1, 2], [3, 4], [5, 6]), sequence([7])]
    first, second = run_float(accumulator(), samples)
    assert values(first, "inputs", "total") == [[[0, 0]], [[1, 2]], [[4, 6]]]
    assert values(first, "outputs", "new_total") == [[[1, 2]], [[4, 6]], [[9, 12]]]
    assert values(first, "outputs", "doubled") == [[[2, 4]], [[8, 12]], [[18, 24]]]
    assert values(second, "inputs", "total") == [[[0]]]


def test_recorded_states_come_back_for_teacher_forcing(tmp_path: Path) -> None:
    samples = SampleSet(samples=(sequence([1, 2], [3, 4]),), noise=True)
    write(tmp_path, samples, run_float(accumulator(), samples), {})
    calls = Reference(tmp_path).sample(0).calls
    assert values(calls, "inputs", "total") == [[[0, 0]], [[1, 2]]]
    assert Reference(tmp_path).noise


def test_a_state_of_unknown_size_is_said() -> None:
    with pytest.raises(StageFailed, match="'total' cannot start at zeros: no input tells the size of 'width'"):
        list(run_float(accumulator((1, "width")), [sequence([1])]))


def test_a_dtype_that_artifacts_lack_is_named(tmp_path: Path) -> None:
    refused = pytest.raises(StageFailed, match=r"spectrum is complex64, which no artifact(.|\n)*return one of")
    with refused, TensorWriter(tmp_path / "a.safetensors") as writer:
        writer.add("spectrum", np.zeros(3, np.complex64))
    assert list(tmp_path.iterdir()) == []
