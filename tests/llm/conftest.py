"""Recipes of decoders without weights, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from decoder_cases import TINY, Written


@pytest.fixture
def decoder_recipe(tmp_path: Path) -> Written:
    """``decoder_recipe(targets, config=..., **more)``: a recipe of a decoder with random weights."""

    def write(targets: list[Any], config: dict[str, Any] | None = None, **more: Any) -> Path:
        folder = tmp_path / "decoder"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(TINY if config is None else config))
        content = {
            "name": "tiny-lm",
            "model": {"source": "transformers", "path": "decoder", "task": "text-generation", "weights": "random"},
            "inputs": {"input_ids": {"shape": [1, "seq"], "dtype": "int64"}},
            "dims": {"seq": {"min": 2, "max": 64}},
            "samples": {"evaluation": {"noise": True, "count": 1, "high": 2048}},
            "targets": targets,
            **more,
        }
        path = tmp_path / "tiny-lm.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write
