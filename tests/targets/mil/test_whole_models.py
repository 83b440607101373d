"""Whole networks, lowered at fp32: the interpreter computes what the float model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgebake.metrics import sqnr_db
from edgebake_targets import _coreml, _coreml_rewrites
from edgebake_targets._coremltools import quiet
from edgebake_targets.mil import MilModel, Mode
from whole_models import Decoder, Whole, shipped, unet, whisper

pytestmark = pytest.mark.slow

NETWORKS: dict[str, Callable[[], Whole]] = {
    **{
        name: lambda name=name: shipped(name)
        for name in (
            "minilm-l6",
            "efficientnet-lite0",
            "silero-vad",
            "mobilevit-xxs-random",
            "mobilevit-s-random",
            "mobilenet-v2-random",
        )
    },
    "unet": unet,
    "whisper": whisper,
}
LEAST_DB = 100.0


@pytest.mark.parametrize("name", NETWORKS)
def test_a_float_package_computes_what_the_float_network_does(name: str, tmp_path: Path) -> None:
    whole = NETWORKS[name]()
    model = MilModel(whole.package(tmp_path), mode=Mode.FP32)
    for inputs in whole.calls():
        expected = whole.outputs(inputs)
        found = model.predict(inputs)
        for output, value in expected.items():
            decibels = sqnr_db(value, found[output])
            print(f"{name} {output}: {decibels:.1f} dB")
            assert decibels >= LEAST_DB, output


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose key-value cache became states; Core ML's states are float16 always."""
    with quiet():
        import coremltools as ct

    example = (torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    program = torch.export.export(Decoder(torch.float16), example, strict=False)
    program = program.run_decompositions(next(_coreml._tables())[1])
    _coreml_rewrites.rewrite_attention(program)
    _coreml_rewrites.state_sizes(program)
    with _coreml_rewrites.translations(), quiet():
        converted = ct.convert(
            program,
            inputs=[
                ct.TensorType(name="token", shape=(1, 1), dtype=np.int32),
                ct.TensorType(name="position", shape=(1,), dtype=np.int32),
            ],
            outputs=[ct.TensorType(name="logits", dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
    path = tmp_path_factory.mktemp("decoder") / "m.mlpackage"
    converted.save(str(path))
    return path


@pytest.mark.parametrize(("mode", "cache"), [(Mode.FP32, torch.float32), (Mode.DECLARED, torch.float16)])
def test_a_stateful_decoder_follows_torch_token_by_token(decoder: Path, mode: Mode, cache: torch.dtype) -> None:
    """Unrounded against a float32 cache, and rounded as declared against a float16 one."""
    model = MilModel(decoder, mode=mode)
    state, floating = model.make_state(), Decoder(cache)
    generator = torch.Generator().manual_seed(1)
    expected, found = [], []
    for step in range(24):
        token = torch.randint(0, 96, (1, 1), generator=generator, dtype=torch.int32)
        position = torch.tensor([step], dtype=torch.int32)
        with torch.inference_mode():
            expected.append(floating(token, position).numpy())
        found.append(model.predict({"token": token, "position": position}, state=state)["logits"])
    assert sqnr_db(np.stack(expected), np.stack(found)) > 120
    fresh = model.predict({"token": token, "position": position}, state=model.make_state())["logits"]
    assert sqnr_db(expected[-1], fresh) < 60  # without what it remembers the last token gives something else
    kept = state.read_state("keys_0")
    assert np.abs(kept[:, :, :24]).min() > 0
    assert (kept[:, :, 24:] == 0).all()
