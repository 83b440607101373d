"""Weights rounded in a stream: the formats by their definition, memory bounded, and checkpoints of another model."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgebake.errors import RecipeError
from edgebake.llm.shards import Shards
from edgebake_targets import _genai_weights
from edgebake_targets._genai_config import rotary_tables
from edgebake_targets._genai_weights import DATA, WeightWriter, affine_int4_blocks, symmetric_int8_blocks


@pytest.fixture
def weight(tmp_path: Path) -> NDArray[np.float32]:
    value = np.random.default_rng(0).standard_normal((50, 64), dtype=np.float32)
    value[3] = 0
    save_file({"w": value, "b": value[0]}, tmp_path / "model.safetensors")
    return value


def stored(writer: WeightWriter, folder: Path, name: str) -> NDArray[np.generic]:
    """The bytes that the initializer ``name`` points at."""
    import onnx

    tensor = writer.initializers[name]
    at = {entry.key: entry.value for entry in tensor.external_data}
    assert at["location"] == DATA
    assert int(at["offset"]) % _genai_weights.ALIGNMENT == 0
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    data = (folder / DATA).read_bytes()[int(at["offset"]) : int(at["offset"]) + int(at["length"])]
    return np.frombuffer(data, dtype).reshape(tuple(tensor.dims))


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_what_matmulnbits_defines(tmp_path: Path, weight: NDArray[np.float32], bits: int) -> None:
    with WeightWriter(Shards(tmp_path), tmp_path) as writer:
        key, scale_key = writer.blocks("w", (50, 64), bits, 32)
        assert writer.blocks("w", (50, 64), bits, 32) == (key, scale_key)  # stored once
    packed, scales = stored(writer, tmp_path, key), stored(writer, tmp_path, scale_key)
    assert (packed.shape, scales.shape) == ((50, 2, 4 * bits), (50, 2))
    q = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(50, 2, 32)
    back = (q.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    step = np.abs(scales)[..., None]
    blocks = weight.reshape(50, 2, 32)
    whole_range = np.abs(blocks) <= step * (2 ** (bits - 1) - 1)  # only the far end of the range is clipped
    assert (np.abs(back - blocks)[whole_range] <= step.repeat(32, -1)[whole_range] * 0.5001).all()
    assert (np.abs(back - blocks) <= step * 1.0001).all()
    np.testing.assert_array_equal(back[3], 0)


def test_eight_bits_that_are_on_a_grid_already_stay_there() -> None:
    q = np.random.default_rng(1).integers(-100, 101, (20, 64)).astype(np.float32)
    weight = q * np.float32(0.0078125 * 1.5)
    packed, scales = symmetric_int8_blocks(weight, 32)
    back = (packed.astype(np.float32) - 128) * scales.reshape(20, 2, 1)
    np.testing.assert_array_equal(back.reshape(20, 64), weight)


def test_eight_bits_use_the_whole_symmetric_range() -> None:
    packed, scales = symmetric_int8_blocks(np.array([[-2.0, 1.0003, 0.0, 2.0]], np.float32), 2)
    np.testing.assert_array_equal(packed, [[[1, 192], [128, 255]]])
    np.testing.assert_allclose(scales, [2 / 127, 2 / 127])


def affine(packed: NDArray[np.generic], scale: NDArray[np.generic], offset: NDArray[np.generic]) -> NDArray[np.float32]:
    """Rows of (N, groups, bytes), (N, groups) and (N, groups) by the definition: ``(q - 8) * scale + offset``."""
    q = np.stack([packed & 15, packed >> 4], -1).reshape(*scale.shape, -1).astype(np.float32)  # type: ignore[operator]
    made: NDArray[np.float32] = ((q - 8) * scale[..., None] + offset[..., None]).reshape(len(scale), -1)
    return made


def test_groups_with_an_offset_give_q4_1_back(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    q = random.integers(0, 16, (40, 3, 32))
    q[..., 3], q[..., 17] = 0, 15  # llama.cpp takes d and m from the ends
    d = random.uniform(0.01, 0.02, (40, 3, 1)).astype(np.float16).astype(np.float32)
    m = random.uniform(-0.3, 0.1, (40, 3, 1)).astype(np.float16).astype(np.float32)
    weight = (q.astype(np.float32) * d + m).reshape(40, 96)
    weight[5], weight[6] = 0.0, 0.0123
    save_file({"w": weight}, tmp_path / "model.safetensors")
    with WeightWriter(Shards(tmp_path), tmp_path) as writer:
        keys = writer.affine("w", (40, 96), 32)
    packed, scale, offset = (stored(writer, tmp_path, key) for key in keys)
    assert (packed.shape, scale.shape, offset.shape) == ((40, 3, 16), (40, 3), (3, 40))
    np.testing.assert_array_equal(affine(packed, scale, offset.T), weight)


def test_groups_with_an_offset_are_off_by_half_a_step_at_most() -> None:
    weight = np.random.default_rng(3).standard_normal((20, 64), dtype=np.float32) + 3
    packed, scale, offset = affine_int4_blocks(weight, 32)
    off = np.abs(affine(packed, scale.reshape(20, 2), offset.reshape(20, 2)) - weight).reshape(20, 2, 32)
    width = np.ptp(weight.reshape(20, 2, 32), axis=-1)
    assert (off <= width[..., None] / 30 * 1.0001).all()


def test_matrices_for_matmul_are_transposed_and_tables_are_not(tmp_path: Path, weight: NDArray[np.float32]) -> None:
    with WeightWriter(Shards(tmp_path), tmp_path) as writer:
        across, table = writer.transposed("w", (50, 64)), writer.table("w", (50, 64))
    np.testing.assert_array_equal(stored(writer, tmp_path, across), weight.T)
    np.testing.assert_array_equal(stored(writer, tmp_path, table), weight)
    with WeightWriter(Shards(tmp_path), tmp_path) as writer:
        halves = writer.transposed("w", (50, 64), half=True), writer.table("w", (50, 64), half=True)
    np.testing.assert_array_equal(stored(writer, tmp_path, halves[0]), weight.T.astype(np.float16))
    np.testing.assert_array_equal(stored(writer, tmp_path, halves[1]), weight.astype(np.float16))
    with WeightWriter(Shards(tmp_path), tmp_path) as writer:
        vector = writer.vector("b", 64)
    assert writer.initializers[vector].raw_data == weight[0].tobytes()  # small: inside the graph


def test_weights_of_another_model_are_refused(tmp_path: Path, weight: NDArray[np.float32]) -> None:
    with WeightWriter(Shards(tmp_path), tmp_path) as writer:
        with pytest.raises(RecipeError, match=r"the tensor 'w' is \(50, 64\), where config\.json makes it \(64, 64\)"):
            writer.blocks("w", (64, 64), 4, 32)
        with pytest.raises(RecipeError, match="groups of 48 do not divide the 64 inputs of 'w'"):
            writer.blocks("w", (50, 64), 4, 48)


def test_llama3_scaling_leaves_high_frequencies_and_divides_low_ones() -> None:
    plain = {"rope_type": "default", "rope_theta": 500000.0}
    scaled = {
        **plain,
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    sines = [rotary_tables(rope, 64, 2)[1][1] for rope in (plain, scaled)]  # of position 1: the frequencies
    np.testing.assert_array_equal(sines[0][:10], sines[1][:10])
    np.testing.assert_allclose(sines[0][-4:] / sines[1][-4:], 32.0, rtol=1e-5)
    assert (np.diff(sines[0] / sines[1]) >= -1e-5).all()


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    rows, columns = 6144, 4096
    header = f'{{"w":{{"dtype":"BF16","shape":[{rows},{columns}],"data_offsets":[0,{2 * rows * columns}]}}}}'.encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * rows * columns)
    tracemalloc.start()
    with WeightWriter(Shards(tmp_path), tmp_path) as writer:
        writer.blocks("w", (rows, columns), 4, 32)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * rows * columns * 0.8  # less than the tensor in float32, of which rounding holds several copies
