"""What tests of the verbs share: what a verb said, the build they look at, and ways to harm it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from edgebake.jsonfile import read_json, sign, write_json_atomic

NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
"""


def recipe(folder: Path, targets: Sequence[Any], **more: Any) -> Path:
    """A recipe of three linear layers in ``folder``, with the network and its samples beside it."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny_net.py").write_text(NETWORK)
    np.savez(folder / "samples.npz", input=np.random.default_rng(3).standard_normal((24, 1, 16), dtype=np.float32))
    content = {
        "name": "tiny",
        "model": {"source": "python", "path": "tiny_net:build"},
        "inputs": {"input": {"shape": [1, 16]}},
        "samples": {
            "calibration": {"file": "samples.npz", "count": 8},
            "evaluation": {"file": "samples.npz", "skip": 8, "count": 16},
        },
        "limits": {"parity": {"cosine": 0.9}},
        "targets": list(targets),
        **more,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@dataclass(frozen=True)
class Said:
    """How a verb ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as strict JSON."""

        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is no JSON")

        return json.loads(self.out, parse_constant=refuse)


Edgebake = Callable[..., Said]


@dataclass(frozen=True)
class Baked:
    """A finished build: its recipe, its store, its output folder."""

    recipe: Path
    store: Path
    out: Path

    @property
    def artifact(self) -> Path:
        """The folder of the float32 artifact."""
        return self.out / "tiny/model/onnx-cpu/any/fp32"

    def copied(self, to: Path) -> Baked:
        """A copy whose artifacts may be harmed."""
        shutil.copytree(self.out, to / "dist")
        return Baked(self.recipe, self.store, to / "dist")


def resign(path: Path, **changes: Any) -> None:
    """Change what the signed JSON at ``path`` says, and sign it again."""
    write_json_atomic(path, sign({**read_json(path), **changes}))


def refused(said: Said, code: int, *fragments: str) -> None:
    """The verb refused with ``code`` and a message that holds every fragment."""
    assert said.code == code, said.err
    for fragment in fragments:
        assert fragment in said.err, said.err


def config(folder: Path, content: Mapping[str, Any], *files: str) -> Path:
    """A model's folder: its config.json and some empty files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))
    for name in files:
        (folder / name).write_bytes(b"")
    return folder
