"""A recipe of one rule, for what targets of Qualcomm's NPU refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgebake.check import check
from edgebake.errors import RecipeError
from edgebake.recipe_yaml import read

RECIPE = """\
name: one
model: {{source: python, path: "net:make"}}
inputs: {{x: {{shape: [1, seq]}}}}
dims: {{seq: {{min: 4, max: 64}}}}
samples: {{calibration: {{noise: true}}, evaluation: {{noise: true, seed: 1}}}}
targets:
  - {rule}
"""
FIXED = "dims: {seq: {min: 64}}"


def refused(folder: Path, rule: str) -> str:
    """What check says of a recipe with ``rule`` as its only target."""
    (folder / "net.py").write_text("def make(): pass\n")
    path = folder / "one.yaml"
    path.write_text(RECIPE.format(rule=rule))
    with pytest.raises(RecipeError) as caught:
        check([read(path)], trust=False)
    return str(caught.value)
