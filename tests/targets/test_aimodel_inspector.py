"""The inspector of Core AI models: counts what is there, reads other people's files, refuses damaged ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from coreai_cases import INSTALLED
from edgebake.errors import ArtifactDamaged
from edgebake_targets._coreai_asset import HASH, METADATA, PROGRAM, open_asset
from edgebake_targets._coreai_constants import decode, weights_of
from edgebake_targets._coreai_program import open_program
from edgebake_targets._coremltools import quiet
from edgebake_targets.inspectors import aimodel

torch.manual_seed(0)
WEIGHT = torch.randn(64, 128)


class Block(nn.Module):
    """A linear layer whose weight coreai-torch unpacks, a normalisation, and a state."""

    def __init__(self, weight: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.norm = weight, nn.LayerNorm(64)
        self.register_buffer("memory", torch.zeros(1, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(torch.nn.functional.linear(x, self.weight()))
        self.memory.add_(y)
        return torch.relu(y + self.memory)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Assets written by coreai-torch itself: float, int4 in blocks, a palette whose entries are scaled."""
    with quiet():
        import coreai_torch
        from coreai.runtime import AIModelAssetMetadata
        from coreai_torch._compression.custom_layers import ScaledPalettizeModule, WeightDequantizeModule

    float_ = nn.Module()
    float_.weight = nn.Parameter(WEIGHT)
    rng = np.random.default_rng(0)
    four = torch.from_numpy(rng.integers(-8, 8, (64, 128)).astype(np.int8))
    six = torch.from_numpy(rng.integers(0, 64, (64, 128)).astype(np.uint8))
    scale = torch.from_numpy(rng.uniform(0.1, 1, (64, 8)).astype(np.float32))
    int4 = WeightDequantizeModule(four, scale, input_dtype=torch.int4)
    palette = ScaledPalettizeModule(six, torch.linspace(-1, 1, 64).reshape(1, 1, 64, 1), scale[:, :1].clone())
    folder = tmp_path_factory.mktemp("foreign")

    def kept(part: nn.Module) -> Block:
        block = Block(part) if part is not float_ else Block(lambda: float_.weight)
        block.part = part
        return block.eval()

    metadata = AIModelAssetMetadata()
    metadata.author, metadata.license, metadata.model_description = "Somebody", "MIT", "A block"
    for name, part in {"float": float_, "int4": int4, "palette": palette}.items():
        with quiet():
            program = torch.export.export(kept(part), (torch.ones(1, 128),), strict=False)
            program = program.run_decompositions(coreai_torch.get_decomp_table())
            converter = coreai_torch.TorchConverter()
            converter.add_exported_program(program, input_names=["x"], output_names=["y"], state_names=["memory"])
            converter.to_coreai().save_asset(folder / f"{name}.aimodel", metadata)
    return {path.stem: path for path in folder.iterdir()}


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "copy.aimodel"))


@INSTALLED
def test_a_float_asset_is_read_in_full(foreign: dict[str, Path]) -> None:
    found = aimodel.inspect(foreign["float"])
    assert (found.format, found.operators["layer_norm"], found.operators["relu"]) == ("aimodel", 1, 1)
    assert not {"constant", "output", "graph"} & set(found.operators)
    assert {(s.name, s.shape, s.dtype, s.role) for s in found.inputs} == {
        ("x", (1, 128), "float32", "input"),
        ("memory", (1, 64), "float32", "state"),
    }
    assert ("y", (1, 64), "float32") in [(s.name, s.shape, s.dtype) for s in found.outputs]
    (weight,) = [record for record in found.weights if record.bytes > 4096]
    assert (weight.dtype, weight.bytes, weight.scale_bytes) == ("float32", 64 * 128 * 4, 0)
    assert found.total_bytes == sum(f.stat().st_size for f in foreign["float"].rglob("*") if f.is_file())
    facts = found.facts
    assert (facts["author"], facts["license"], facts["description"]) == ("Somebody", "MIT", "A block")
    assert (facts["functions"], facts["producer"]) == (["main"], "coreai-core 1.0.0b3")


@INSTALLED
def test_payload_and_scales_of_compressed_weights_are_told_apart(foreign: dict[str, Path]) -> None:
    four, six = (max(aimodel.inspect(foreign[n]).weights, key=lambda r: r.bytes) for n in ("int4", "palette"))
    assert (four.dtype, four.shape, four.bytes) == ("int4", (64, 128), 64 * 128 // 2)
    assert 64 * 8 * 4 <= four.scale_bytes < 64 * 8 * 4 + 16  # and zero points, of which one stands for all
    assert (six.dtype, six.shape, six.bytes) == ("palette6", (64, 128), 64 * 128 * 6 // 8)
    assert 64 * 4 + 64 * 4 <= six.scale_bytes < 64 * 4 + 64 * 4 + 16
    assert len({four.digest, six.digest}) == 2


@INSTALLED
def test_compressed_weights_decode_as_coreai_torch_does(foreign: dict[str, Path]) -> None:
    rng = np.random.default_rng(0)
    four = rng.integers(-8, 8, (64, 128))
    six = rng.integers(0, 64, (64, 128))
    scale = rng.uniform(0.1, 1, (64, 8)).astype(np.float32)
    expected = {
        "int4": four * np.repeat(scale, 16, 1),
        "palette": torch.linspace(-1, 1, 64).numpy()[six] * scale[:, :1],
    }
    for name, values in expected.items():
        (weight,) = [w for w in weights_of(open_program(foreign[name])) if w.operation is not None]
        decoded = decode(weight)
        assert decoded is not None
        np.testing.assert_allclose(decoded, values, rtol=1e-6)


@INSTALLED
def test_reading_imports_no_torch(foreign: dict[str, Path]) -> None:
    paths = [str(Path(__file__).resolve().parents[2] / p) for p in ("export", "targets")]
    code = f"""
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from edgebake_targets.inspectors import aimodel
aimodel.inspect(Path({str(foreign["int4"])!r}))
print(sorted({{"torch", "coreai_torch"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def said(path: Path) -> str:
    with pytest.raises(ArtifactDamaged) as damaged:
        open_asset(path)
    problem = damaged.value.problems[0]
    assert (problem.where, len(damaged.value.problems)) == (str(path), 1)
    return str(problem.what)


def written(folder: Path, program: bytes, metadata: Any = "{}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROGRAM).write_bytes(program)
    (folder / METADATA).write_text(metadata)
    return folder


def test_what_is_no_asset_is_refused_in_one_sentence(tmp_path: Path) -> None:
    assert said(tmp_path / "nothing.aimodel") == "there is no such folder"
    (tmp_path / "file.aimodel").write_text("x")
    assert said(tmp_path / "file.aimodel") == "it is a file; a Core AI model is a folder"
    (tmp_path / "empty.aimodel").mkdir()
    assert said(tmp_path / "empty.aimodel") == "main.mlirb is missing"
    assert said(written(tmp_path / "a", b"")) == "main.mlirb is damaged at byte 0"
    assert said(written(tmp_path / "b", b"PK\x03\x04" * 9)) == "main.mlirb is no MLIR bytecode"
    assert said(written(tmp_path / "c", b"ML\xefR\x0dMLIR")) == "main.mlirb is damaged at byte 9"


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '"x"'])
def test_metadata_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    assert said(written(tmp_path / "a", b"ML\xefR\x0dMLIR\x00", text)).startswith("metadata.json ")


def test_sizes_that_lead_outside_are_refused(tmp_path: Path) -> None:
    start = b"ML\xefR\x0dMLIR\x00"
    assert said(written(tmp_path / "a", start + b"\x00\x00" + b"\xff" * 8)).startswith("main.mlirb is damaged")
    assert said(written(tmp_path / "b", start + b"\x00\x09\xff")).startswith("main.mlirb is damaged")
    assert said(written(tmp_path / "c", start + b"\x7f\x01")).startswith("main.mlirb is damaged")


@INSTALLED
def test_links_that_lead_outside_are_refused(foreign: dict[str, Path], tmp_path: Path) -> None:
    path = copied(foreign["float"], tmp_path)
    secret = tmp_path / "secret.mlirb"
    (path / PROGRAM).rename(secret)
    (path / PROGRAM).symlink_to(secret)
    assert said(path) == "main.mlirb leads outside of it"


@INSTALLED
@pytest.mark.parametrize("keep", [0, 3, 40, 2000, -1])
def test_a_truncated_program_is_damaged(foreign: dict[str, Path], tmp_path: Path, keep: int) -> None:
    path = copied(foreign["int4"], tmp_path)
    (path / PROGRAM).write_bytes((path / PROGRAM).read_bytes()[:keep])
    assert said(path) == "main.mlirb is not the program that main.hash names"
    (path / HASH).unlink()
    with pytest.raises(ArtifactDamaged, match=r"copy\.aimodel: (main\.mlirb is|Core AI cannot read it)"):
        aimodel.inspect(path)


@INSTALLED
@pytest.mark.slow
def test_no_damage_ends_the_process(foreign: dict[str, Path], tmp_path: Path) -> None:
    """Random damage under a hash that fits: an answer or one sentence, never a crash."""
    data, random = (foreign["int4"] / PROGRAM).read_bytes(), np.random.default_rng(7)
    path = copied(foreign["int4"], tmp_path)
    (path / HASH).unlink()
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), int(random.integers(1, 9))):
            damaged[place] = int(random.integers(0, 256))
        (path / PROGRAM).write_bytes(damaged)
        try:
            aimodel.inspect(path)
        except ArtifactDamaged as error:
            refused += 1
            assert len(error.problems) == 1
    assert refused > 20


@INSTALLED
def test_metadata_of_another_kind_is_refused_in_core_ais_words(foreign: dict[str, Path], tmp_path: Path) -> None:
    path = copied(foreign["float"], tmp_path)
    assert aimodel.inspect(path).facts["author"] == "Somebody"
    (path / METADATA).write_text(json.dumps({"author": 3}))
    with pytest.raises(ArtifactDamaged, match="Core AI cannot read it: RuntimeError"):
        aimodel.inspect(path)
