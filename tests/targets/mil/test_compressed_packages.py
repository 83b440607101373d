"""Packages that coremltools compressed in every way it knows, against the same ones that it decompressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebake.errors import ArtifactDamaged
from edgebake_targets._coreml_constants import constants, decode
from edgebake_targets._coreml_package import open_package
from edgebake_targets.mil import MilModel
from edgebake_targets.mil.program import program_of

ct = pytest.importorskip("coremltools")
mil = pytest.importorskip("coremltools.converters.mil")
cto = pytest.importorskip("coremltools.optimize.coreml")

X = np.random.default_rng(0).standard_normal((1, 16, 4, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """A convolution and a linear layer, for the op sets of iOS 16 and iOS 18."""
    random = np.random.default_rng(1)
    filters, matrix = (random.standard_normal(shape).astype(np.float32) for shape in ((32, 16, 3, 3), (24, 32)))

    def network(x: Any) -> Any:
        hidden = mil.Builder.relu(x=mil.Builder.conv(x=x, weight=filters, pad_type="same"))
        return mil.Builder.linear(x=mil.Builder.reduce_mean(x=hidden, axes=[2, 3]), weight=matrix)

    def converted(target: Any) -> Any:
        inputs = [mil.Builder.TensorSpec(shape=X.shape)]
        program = mil.Builder.program(input_specs=inputs, opset_version=target)(network)
        return ct.convert(program, minimum_deployment_target=target)

    return {"iOS16": converted(ct.target.iOS16), "iOS18": converted(ct.target.iOS18)}


def _palettes(model: Any, **parameters: Any) -> Any:
    config = cto.OpPalettizerConfig(mode="kmeans", weight_threshold=100, **parameters)
    return cto.palettize_weights(model, cto.OptimizationConfig(global_config=config), **_joint(model))


def _integers(model: Any, mode: str = "linear_symmetric", **parameters: Any) -> Any:
    config = cto.OpLinearQuantizerConfig(mode=mode, weight_threshold=100, **parameters)
    return cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=config), **_joint(model))


def _pruned(model: Any) -> Any:
    config = cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=100)
    return cto.prune_weights(model, cto.OptimizationConfig(global_config=config))


def _operators(model: Any) -> set[str]:
    (function,) = model.get_spec().mlProgram.functions.values()
    return {op.type for block in function.block_specializations.values() for op in block.operations}


def _joint(model: Any) -> dict[str, bool]:
    """What is compressed already is compressed a second time only when that is asked for."""
    again = any(name.startswith("constexpr_") for name in _operators(model))
    return {"joint_compression": True} if again else {}


GROUPED = {"granularity": "per_grouped_channel", "group_size": 8}
BLOCKS = {"granularity": "per_block", "block_size": 8}
WAYS = {
    "iOS16 affine": ("iOS16", lambda m: _integers(m, "linear"), {"affine_dequantize"}),
    "iOS16 palette of 4 bits": ("iOS16", lambda m: _palettes(m, nbits=4), {"lut_to_dense"}),
    "iOS16 palette of 6 bits": ("iOS16", lambda m: _palettes(m, nbits=6), {"lut_to_dense"}),
    "iOS16 sparse": ("iOS16", _pruned, {"sparse_to_dense"}),
    "int8": ("iOS18", _integers, {"blockwise_shift_scale"}),
    "uint4 in blocks": ("iOS18", lambda m: _integers(m, "linear", dtype="uint4", **BLOCKS), {"blockwise_shift_scale"}),
    "palette of 3 bits": ("iOS18", lambda m: _palettes(m, nbits=3), {"lut_to_dense"}),
    "palettes of groups": ("iOS18", lambda m: _palettes(m, nbits=2, **GROUPED), {"lut_to_dense"}),
    "palettes of input groups": ("iOS18", lambda m: _palettes(m, nbits=2, channel_axis=1, **GROUPED), {"lut_to_dense"}),
    "palette of vectors": ("iOS18", lambda m: _palettes(m, nbits=4, cluster_dim=4), {"lut_to_dense"}),
    "palette with scales": (
        "iOS18",
        lambda m: _palettes(m, nbits=4, enable_per_channel_scale=True),
        {"lut_to_dense", "blockwise_shift_scale"},
    ),
    "palette of int8": (
        "iOS18",
        lambda m: _integers(_palettes(m, nbits=4), granularity="per_tensor"),
        {"lut_to_dense", "blockwise_shift_scale"},
    ),
    "sparse": ("iOS18", _pruned, {"sparse_to_dense"}),
    "sparse palette": ("iOS18", lambda m: _palettes(_pruned(m), nbits=4), {"lut_to_sparse", "sparse_to_dense"}),
    "sparse int8": ("iOS18", lambda m: _integers(_pruned(m)), {"sparse_blockwise_shift_scale", "sparse_to_dense"}),
    "sparse int4 in blocks": (
        "iOS18",
        lambda m: _integers(_pruned(m), dtype="int4", **BLOCKS),
        {"sparse_blockwise_shift_scale", "sparse_to_dense"},
    ),
    "sparse palette of int8": (
        "iOS18",
        lambda m: _integers(_palettes(_pruned(m), nbits=4), granularity="per_tensor"),
        {"lut_to_sparse", "sparse_to_dense", "blockwise_shift_scale"},
    ),
}


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # coremltools, where a block is all zeros
@pytest.mark.parametrize("way", WAYS)
def test_compressed_weights_are_those_that_coremltools_decompresses(
    models: dict[str, Any], way: str, tmp_path: Path
) -> None:
    system, compress, expected = WAYS[way]
    model = compress(models[system])
    used = {name.removeprefix("constexpr_") for name in _operators(model) if name.startswith("constexpr_")}
    assert used == expected
    model.save(str(tmp_path / "compressed.mlpackage"))
    cto.decompress_weights(model).save(str(tmp_path / "plain.mlpackage"))
    (compressed,) = MilModel(tmp_path / "compressed.mlpackage").predict({"x": X}).values()
    (plain,) = MilModel(tmp_path / "plain.mlpackage").predict({"x": X}).values()
    np.testing.assert_array_equal(compressed, plain)
    assert np.ptp(plain) > 0.1
    _compare_decoded(tmp_path)


def _compare_decoded(folder: Path) -> None:
    """The structure checks decode the same weights, also those made of others; parts of others they refuse by name."""
    package, decompressed = (open_package(folder / f"{name}.mlpackage") for name in ("compressed", "plain"))
    plain = {constant.shape: decode(decompressed, constant) for constant in constants(decompressed).values()}
    found = constants(package).values()
    assert {c.shape for c in found if c.operator.startswith("constexpr_")} >= set(plain) & {(32, 16, 3, 3), (24, 32)}
    for constant in found:
        if not constant.operator.startswith("constexpr_"):
            continue
        if constant.operator.startswith(("constexpr_lut_to_sparse", "constexpr_sparse_blockwise")):
            with pytest.raises(ValueError, match=f"{constant.name} is a {constant.operator} that feeds another"):
                decode(package, constant)
        elif constant.shape in plain:  # a palette that is decoded for another one is no weight of the plain model
            np.testing.assert_allclose(decode(package, constant), plain[constant.shape], rtol=1e-3, atol=1e-6)


def test_a_constant_with_too_many_outputs_is_damage(models: dict[str, Any], tmp_path: Path) -> None:
    package = tmp_path / "two.mlpackage"
    _pruned(models["iOS18"]).save(str(package))
    spec = package / "Data/com.apple.CoreML/model.mlmodel"
    content = ct.utils.load_spec(str(package))
    (function,) = content.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    operation = next(op for op in block.operations if op.type == "constexpr_sparse_to_dense")
    operation.outputs.add().CopyFrom(operation.outputs[0])
    operation.outputs[1].name = "second"
    spec.write_bytes(content.SerializeToString())
    assert program_of(open_package(package)).functions
    with pytest.raises(ArtifactDamaged, match=r"constexpr_sparse_to_dense .* declares 2 outputs, not 1"):
        MilModel(package).predict({"x": X})
