"""Binaries for a Snapdragon's NPU that compute something else: `verify` fails them by the numbers alone.

They were compiled from a wrong network or from wrong ranges, or their weights were changed where they lie.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tampering import EXIT_LIMIT, assert_unharmed_passes, judged, tampered

from asking import defaults
from baking import finish, start
from edgebake import devices
from edgebake_targets import onnx_qnn
from edgebake_targets._onnx_qnn_compile import compile_context
from executorch_qnn_cases import toolchain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(onnx_qnn.missing() is not None, reason="onnxruntime-qnn is not installed"),
]
TARGETS = {"onnx-qnn": ("model.onnx", "model.plain.onnx"), "executorch-qnn": ("model.pte",)}
DEFECTS = ("gates", "bias", "channels")
BLOCK, BLOCKS = 4096, 16  # bytes, and how many blocks are changed
IN_PLACE = {"signs": lambda block: block ^ 0x80, "zeros": np.zeros_like}
IN_RANGES = {"scale": (1, lambda scale: scale * 4), "zero": (2, lambda zero: zero - zero.dtype.type(1 << 13))}
NETWORK = """
import torch
from edgebake.models.zoo import silero_vad

def model(defect=""):
    network = silero_vad.model()
    weights = network.state_dict()
    if defect == "gates":  # the gate that writes to the cell and the one that keeps it change places
        for name in ("from_input.weight", "from_input.bias", "from_state.weight", "from_state.bias"):
            write, keep, *rest = weights[name].chunk(4)
            weights[name] = torch.cat([keep, write, *rest])
    elif defect == "bias":
        weights["encoder.2.bias"] = torch.zeros_like(weights["encoder.2.bias"])
    elif defect == "channels":  # two halves of one convolution's output
        weights["encoder.1.weight"] = weights["encoder.1.weight"].roll(32, 0)
    network.load_state_dict(weights)
    return network
"""
RECIPE = """
name: vad
model: {{source: python, path: "vad_net:model", licence: MIT, options: {{defect: "{defect}"}}}}
inputs:
  input: {{shape: [1, 576]}}
  memory: {{shape: [2, 1, 128], role: state, state_from: next_state}}
samples:
  calibration: {{python: "edgebake.models.zoo.speech:speech", skip: 24, count: 2}}
  evaluation: {{python: "edgebake.models.zoo.speech:speech", count: 1}}
limits:
  parity: {{cosine: 0.95, sqnr_db: 10}}
  agreement: {{metric: binary, min: 0.8, output: probability}}
targets:
  - {{target: {target}, device: {device}, scheme: w8a16}}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Builds the detector for a target and chip, with a defect or without; the folder of the artifact."""
    folder = tmp_path_factory.mktemp("vad")
    (folder / "vad_net.py").write_text(NETWORK)

    def build(target: str, defect: str = "", device: str = "sm8650") -> Path:
        recipe, out = folder / "vad.yaml", folder / f"dist-{defect}"
        recipe.write_text(RECIPE.format(target=target, defect=defect, device=device))
        done = finish(start("build", recipe, "--out", out, "--store", folder / "store"), 1200)
        # 16 bits may hold a harmed network's own outputs badly; only the sound one has to pass by itself.
        assert done.code in ((0, EXIT_LIMIT) if defect else (0,)), done.out + done.err
        return out / "vad" / "model" / target / device / "w8a16"

    with toolchain(tmp_path_factory.mktemp("toolchain")):
        yield cache(build)


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_binary_of_a_wrong_network_fails(built: Callable[..., Path], target: str, defect: str) -> None:
    sound, wrong = built(target), built(target, defect)

    def exchange(folder: Path) -> None:
        for name in TARGETS[target]:
            shutil.copyfile(wrong / name, folder / name)

    assert_fails(tampered(sound, defect, exchange, {}), f"{target} {defect}")


def assert_fails(folder: Path, said: str) -> None:
    """By the numbers, not because it could not be run."""
    result, code, failed = judged(folder)
    worst = min(found["sqnr_db"] for found in result.measurements["outputs"].values())
    print(f"\nMUTATION {said}: {worst:.1f} dB, {sorted(failed)}")
    assert (result.state, code) == ("fail", EXIT_LIMIT), result.verdicts
    assert "parity.sqnr_db" in failed


def weights_in(data: np.ndarray) -> slice:
    """The blocks in a row whose bytes are spread most evenly, which those of integer weights are."""
    blocks = data[: len(data) // BLOCK * BLOCK].reshape(-1, BLOCK)
    unevenness = np.array([np.square(np.bincount(block, minlength=256) / BLOCK).sum() for block in blocks])
    first = int(np.argmin(np.convolve(unevenness, np.ones(BLOCKS), "valid")))
    return slice(first * BLOCK, (first + BLOCKS) * BLOCK)


@pytest.mark.parametrize("defect", IN_PLACE)
@pytest.mark.parametrize("target", TARGETS)
def test_weights_changed_in_the_compiled_binary_fail(built: Callable[..., Path], target: str, defect: str) -> None:
    def change(folder: Path) -> None:
        path = folder / TARGETS[target][0]
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        where = weights_in(data)
        data[where] = IN_PLACE[defect](data[where])
        path.write_bytes(data.tobytes())

    assert_fails(tampered(built(target), defect, change, {}), f"{target} {defect} in the binary")


@pytest.mark.parametrize("defect", IN_RANGES)
def test_a_binary_compiled_from_wrong_ranges_fails(built: Callable[..., Path], defect: str) -> None:
    """Of half the values inside the plain graph that the binary is compiled from."""
    place, change = IN_RANGES[defect]

    def recompile(folder: Path) -> None:
        import onnx
        from onnx import numpy_helper

        model = onnx.load_model(folder / "model.plain.onnx")
        held = {tensor.name: tensor for tensor in model.graph.initializer}
        inner = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        names = {node.input[place] for node in inner[len(inner) // 4 : 3 * len(inner) // 4]}
        for name in sorted(names & held.keys()):
            value = numpy_helper.to_array(held[name])
            if value.size == 1 and value.dtype in (np.float32, np.uint16):
                held[name].CopyFrom(numpy_helper.from_array(np.asarray(change(value), value.dtype), name))
        onnx.save_model(model, folder / "model.plain.onnx")
        options = onnx_qnn.provider_options(defaults(onnx_qnn), devices.row("sm8650"))
        compile_context(model, folder / "model.onnx", options, "sm8650", cpu_fallback=False)

    assert_fails(tampered(built("onnx-qnn"), defect, recompile, {}), f"onnx-qnn {defect} of the plain graph")


@pytest.mark.parametrize("target", TARGETS)
def test_the_unharmed_control_signed_again_passes(built: Callable[..., Path], target: str) -> None:
    assert_unharmed_passes(built(target))


@pytest.mark.parametrize("target", TARGETS)
def test_a_binary_of_another_chip_fails_though_the_simulator_runs_it(built: Callable[..., Path], target: str) -> None:
    sound, other = built(target), built(target, device="sm8750")

    def exchange(folder: Path) -> None:
        for name in TARGETS[target]:
            shutil.copyfile(other / name, folder / name)

    result, code, _ = judged(tampered(sound, "chip", exchange, {}))
    assert (result.state, code) == ("fail", EXIT_LIMIT), result.verdicts
    (said,) = (verdict.reason for verdict in result.verdicts if verdict.limit == "structure.chip")
    assert said == "compiled for the chip that its vendor numbers 69, not 57"
