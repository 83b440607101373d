"""The inspector of Core ML packages: counts what is there, reads other people's files, refuses damaged ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebake.errors import ArtifactDamaged
from edgebake.types import WeightRecord
from edgebake_targets._coremltools import quiet
from edgebake_targets.inspectors import mlpackage

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((32, 64)).astype(np.float16)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packages written by coremltools itself: float, int4 in blocks, palette, with an image and a state."""
    with quiet():
        import coremltools as ct
        import coremltools.optimize.coreml as cto
        from coremltools.converters.mil import Builder as mb

        folder = tmp_path_factory.mktemp("foreign")

        @mb.program(
            input_specs=[mb.TensorSpec(shape=(1, 64), dtype=ct.converters.mil.mil.types.fp16)],
            opset_version=ct.target.iOS18,
        )  # type: ignore[misc]
        def program(x: Any) -> Any:
            hidden = mb.linear(x=x, weight=WEIGHT, bias=np.zeros(32, np.float16), name="hidden")
            return mb.relu(x=hidden, name="y")

        model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
        model.author, model.license, model.short_description = "Somebody", "MIT", "A layer"
        block = cto.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=16, weight_threshold=0
        )
        table = cto.OpPalettizerConfig(mode="kmeans", nbits=3, weight_threshold=0)
        models = {
            "float": model,
            "int4": cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=block)),
            "palette": cto.palettize_weights(model, cto.OptimizationConfig(global_config=table)),
        }

        @mb.program(
            input_specs=[
                mb.TensorSpec(shape=(1, 3, 8, 8)),
                mb.StateTensorSpec((1, 4), dtype=ct.converters.mil.mil.types.fp16),
            ],
            opset_version=ct.target.iOS18,
        )  # type: ignore[misc]
        def stateful(image: Any, memory: Any) -> Any:
            old = mb.read_state(input=memory)
            new = mb.coreml_update_state(state=memory, value=mb.add(x=old, y=np.float16(1)))
            return mb.add(x=mb.reduce_mean(x=image), y=mb.reduce_sum(x=mb.cast(x=new, dtype="fp32")), name="mean")

        models["image"] = ct.convert(
            stateful,
            inputs=[ct.ImageType(name="image", shape=(1, 3, 8, 8))],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
        for name, entry in models.items():
            entry.save(str(folder / f"{name}.mlpackage"))
    return {name: folder / f"{name}.mlpackage" for name in models}


def largest(path: Path) -> WeightRecord:
    return max(mlpackage.inspect(path).weights, key=lambda record: record.bytes)


def test_a_float_package_is_read_in_full(foreign: dict[str, Path]) -> None:
    found = mlpackage.inspect(foreign["float"])
    assert (found.format, found.operators["linear"], found.operators["relu"]) == ("mlpackage", 1, 1)
    assert "const" not in found.operators
    assert [(s.name, s.shape, s.dtype) for s in found.inputs] == [("x", (1, 64), "float16")]
    assert [(s.name, s.shape, s.dtype) for s in found.outputs] == [("y", (1, 32), "float16")]
    weight = largest(foreign["float"])
    assert (weight.dtype, weight.shape, weight.bytes, weight.scale_bytes) == ("float16", (32, 64), 4096, 0)
    assert found.total_bytes == sum(f.stat().st_size for f in foreign["float"].rglob("*") if f.is_file())
    assert (found.facts["minimum_os"], found.facts["specification_version"]) == ("iOS18", 9)
    assert found.facts["compute_precision"] == "fp16"
    assert (found.facts["author"], found.facts["license"]) == ("Somebody", "MIT")


def test_payload_and_scales_of_compressed_weights_are_told_apart(foreign: dict[str, Path]) -> None:
    four = largest(foreign["int4"])
    assert (four.dtype, four.shape, four.bytes) == ("int4", (32, 64), 32 * 64 // 2)
    assert four.scale_bytes == 32 * 4 * 2  # one float16 scale for 16 weights
    three = largest(foreign["palette"])
    assert (three.dtype, three.bytes, three.scale_bytes) == ("palette3", 32 * 64 * 3 // 8, 8 * 2)
    assert len({four.digest, three.digest}) == 2


def test_images_and_states_are_named_as_such(foreign: dict[str, Path]) -> None:
    found = {s.name: s for s in mlpackage.inspect(foreign["image"]).inputs}
    assert (found["image"].role, found["image"].shape, found["image"].dtype) == ("image", (1, 3, 8, 8), "uint8")
    assert (found["memory"].role, found["memory"].shape, found["memory"].dtype) == ("state", (1, 4), "float16")


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "copy.mlpackage"))


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_a_truncated_specification_is_damaged(foreign: dict[str, Path], tmp_path: Path, keep: int) -> None:
    path = copied(foreign["float"], tmp_path)
    model = path / "Data/com.apple.CoreML/model.mlmodel"
    model.write_bytes(model.read_bytes()[:keep])
    with pytest.raises(ArtifactDamaged, match=r"copy\.mlpackage"):
        mlpackage.inspect(path)


@pytest.mark.parametrize("change", ["truncated", "missing", "zeros"])
def test_a_damaged_weight_file_is_damaged(foreign: dict[str, Path], tmp_path: Path, change: str) -> None:
    path = copied(foreign["int4"], tmp_path)
    weights = path / "Data/com.apple.CoreML/weights/weight.bin"
    if change == "missing":
        weights.unlink()
    else:
        size = len(weights.read_bytes())
        weights.write_bytes(weights.read_bytes()[: size // 2] if change == "truncated" else bytes(size))
    with pytest.raises(ArtifactDamaged):
        mlpackage.inspect(path)


def test_a_manifest_that_leads_outside_is_refused(foreign: dict[str, Path], tmp_path: Path) -> None:
    path = copied(foreign["float"], tmp_path)
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((path / "Manifest.json").read_text())
    for item in manifest["itemInfoEntries"].values():
        item["path"] = "../../secret"
    (path / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactDamaged, match="outside"):
        mlpackage.inspect(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rootModelIdentifier": "a", "itemInfoEntries": {}}', '{"itemInfoEntries": 3}']
)
def test_a_manifest_without_a_model_is_damaged(foreign: dict[str, Path], tmp_path: Path, text: str) -> None:
    path = copied(foreign["float"], tmp_path)
    (path / "Manifest.json").write_text(text)
    with pytest.raises(ArtifactDamaged, match="root model"):
        mlpackage.inspect(path)


def test_a_folder_that_is_none_and_a_missing_one_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "empty.mlpackage").mkdir()
    for name in ("empty.mlpackage", "nothing.mlpackage"):
        with pytest.raises(ArtifactDamaged):
            mlpackage.inspect(tmp_path / name)


def test_reading_imports_neither_torch_nor_coremltools(foreign: dict[str, Path]) -> None:
    paths = [str(Path(__file__).resolve().parents[2] / p) for p in ("export", "targets")]
    code = f"""
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from edgebake_targets.inspectors import mlpackage
mlpackage.inspect(Path({str(foreign["int4"])!r}))
print(sorted({{"torch", "coremltools"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.slow
def test_coremltools_loads_after_the_light_reader(foreign: dict[str, Path]) -> None:
    paths = [str(Path(__file__).resolve().parents[2] / p) for p in ("export", "targets")]
    code = f"""
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from edgebake_targets.inspectors import mlpackage
mlpackage.inspect(Path({str(foreign["int4"])!r}))
import coremltools
coremltools.models.MLModel({str(foreign["int4"])!r}, skip_model_load=True)
print(mlpackage.inspect(Path({str(foreign["int4"])!r})).format)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "mlpackage"
