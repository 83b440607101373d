"""Shipped python models against the packages that they come from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from edgebake import trace
from edgebake.models import python
from edgebake.models._request import LoadRequest
from edgebake.recipe import Component
from edgebake.types import Loaded


def load(name: str, inputs: dict[str, object]) -> Loaded:
    component = Component.model_validate(
        {"model": {"source": "python", "path": f"edgebake.models.zoo.{name}:model"}, "inputs": inputs}
    )
    return python.load(LoadRequest(model=component.model, component=component, base=Path("/")))


def silero() -> Loaded:
    state = {"shape": [2, 1, 128], "role": "state", "state_from": "next_state"}
    return load("silero_vad", {"input": {"shape": [1, 576]}, "state": state})


def test_the_rebuilt_silero_equals_the_packages_own_network_over_a_long_sequence() -> None:
    import silero_vad

    file = Path(str(silero_vad.__file__)).parent / "data" / "silero_vad.jit"
    theirs = torch.jit.load(file, map_location="cpu").eval()._model
    ours = silero().methods["forward"]
    generator = torch.Generator().manual_seed(0)
    state = their_state = torch.zeros(2, 1, 128)
    with torch.no_grad():
        for step in range(100):
            tone = torch.sin(torch.arange(576) * (0.01 + 0.002 * step))[None] * 0.5
            sound = tone * (step % 3 == 0) + torch.randn(1, 576, generator=generator) * 0.1
            probability, state = ours(sound, state)
            their_probability, their_state = theirs(sound, their_state)
            torch.testing.assert_close(probability, their_probability, atol=1e-5, rtol=0)
            torch.testing.assert_close(state, their_state, atol=1e-5, rtol=1e-5)


def test_silero_traces_to_named_outputs_and_leaves_the_thread_count_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    traced = trace.trace(silero())
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert [(o.name, o.shape) for o in traced.signature.methods["forward"].outputs] == [
        ("probability", (1, 1)),
        ("next_state", (2, 1, 128)),
    ]


@pytest.mark.slow
def test_efficientnet_lite0_knows_its_images_and_traces() -> None:
    import numpy as np
    from PIL import Image

    foolbox = importlib.util.find_spec("foolbox")
    if foolbox is None:
        pytest.skip("the labelled images are foolbox's, which is not installed")
    loaded = load("efficientnet_lite0", {"image": {"shape": [1, 3, 224, 224], "role": "image"}})
    right = 0
    files = sorted((Path(str(foolbox.origin)).parent / "data").glob("imagenet_*"))
    for file in files:
        pixels = np.asarray(Image.open(file).convert("RGB").resize((224, 224)), np.float32)
        image = torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)[None].contiguous()
        with torch.no_grad():
            right += int(loaded.methods["forward"](image)[0].argmax()) == int(file.stem.rpartition("_")[2])
    assert right >= 0.8 * len(files) > 0


def test_efficientnet_lite0_keeps_its_module_names_and_traces() -> None:
    loaded = load("efficientnet_lite0", {"image": {"shape": [1, 3, 224, 224], "role": "image"}})
    modules = {m.name: m for m in trace.module_inventory(loaded.methods["forward"])}
    assert modules["_conv_stem"].kind == "conv"
    assert modules["_fc"].kind == "linear"
    assert loaded.facts["parameters"] == 4_652_008
    assert [o.name for o in trace.trace(loaded).signature.methods["forward"].outputs] == ["logits"]
