"""A first recipe for a model, from its configuration alone: no weight is read, no code of it runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgebake.errors import UsageError
from edgebake.models import _paths

_TEXT = {"input_ids": "[1, seq]", "attention_mask": "[1, seq]"}
_SENTENCES = "pkg://edgebake/recipes/samples/sentences.txt"
_MAX_SEQ = 128
_TASKS = (  # suffix of the architecture's class -> task
    ("ForImageClassification", "image-classification"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForMaskedLM", "fill-mask"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What the configuration says of a model."""

    name: str
    source: str
    path: str
    task: str | None
    inputs: Mapping[str, str]  # name -> "{shape: ..., dtype: ...}"
    seq: int | None  # longest sequence, None without one
    kind: str  # "text", "image", "other"
    size: int = 224
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)


def draft(path: str, base: Path) -> Draft:
    """Read the configuration of ``path`` (folder, ``pkg://``, hub id, .gguf or .pt2); UsageError when it has none."""
    found = _paths.resolve(path, base)
    if isinstance(found, Path) and found.suffix in (".gguf", ".pt2"):
        source = {".gguf": "gguf", ".pt2": "exported"}[found.suffix]
        inputs = {"input_ids": "{shape: [1, seq], dtype: int64}"} if source == "gguf" else {}
        seq = _MAX_SEQ if source == "gguf" else None
        kind = "text" if source == "gguf" else "other"
        return Draft(name=_name(found.stem), source=source, path=path, task=None, inputs=inputs, seq=seq, kind=kind)
    folder = _config_folder(found, path)
    config = _read(folder / "config.json")
    architectures = config.get("architectures") or [""]
    name = _name(found.name if isinstance(found, Path) and found.name != "model" else path.rstrip("/").split("/")[-1])
    if "vocab_size" in config or "vocab_size" in config.get("text_config", {}):
        return _text_draft(name, path, folder, config, str(architectures[0]))
    if "image_size" in config or (folder / "preprocessor_config.json").exists():
        return _image_draft(name, path, folder, config)
    raise UsageError(
        f"the inputs of a {config.get('model_type', 'model without model_type')} cannot be told from its configuration",
        where=str(folder / "config.json"),
        fix="write the recipe by hand: `edgebake schema` and the shipped recipes show how",
    )


def _config_folder(found: Path | _paths.HubId, path: str) -> Path:
    if isinstance(found, _paths.HubId):
        from edgebake.models import _hub

        return _hub.snapshot(found.repo, _hub.commit(found.repo, None), weights=False, pickles=False, code=False)
    if not (found / "config.json").is_file():
        raise UsageError(
            f"{path} has no config.json",
            where=str(found),
            fix="give a transformers folder, a .gguf, a .pt2 or a hub id",
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read it: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise UsageError("it holds no JSON object", where=str(path))
    return data


def _name(text: str) -> str:
    plain = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return plain or "model"


def _text_draft(name: str, path: str, folder: Path, config: Mapping[str, Any], architecture: str) -> Draft:
    task = next((task for suffix, task in _TASKS if architecture.endswith(suffix)), "feature-extraction")
    if (folder / "modules.json").exists() or (folder / "1_Pooling").is_dir() or "sentence" in path.lower():
        task = "sentence-embedding"
    longest = int(config.get("max_position_embeddings") or _MAX_SEQ)
    names = ["input_ids"] if task == "text-generation" else list(_TEXT)
    inputs = {n: f"{{shape: {_TEXT[n]}, dtype: int64}}" for n in names}
    return Draft(
        name=name, source="transformers", path=path, task=task, inputs=inputs, seq=min(longest, _MAX_SEQ), kind="text"
    )


def _image_draft(name: str, path: str, folder: Path, config: Mapping[str, Any]) -> Draft:
    processor = _read(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").exists() else {}
    size: Any = config.get("image_size") or processor.get("crop_size") or 224
    while isinstance(size, (dict, list)):
        size = next(iter(size.values() if isinstance(size, dict) else size))
    channels = int(config.get("num_channels", 3))
    return Draft(
        name=name,
        source="transformers",
        path=path,
        task="image-classification",
        inputs={"pixel_values": f"{{shape: [1, {channels}, {size}, {size}], role: image}}"},
        seq=None,
        kind="image",
        size=int(size),
        mean=processor.get("image_mean") or ([0.0] * 3 if processor else Draft.mean),
        std=processor.get("image_std") or ([1.0] * 3 if processor else Draft.std),
    )


def write_out(found: Draft, targets: Sequence[str], scheme: str) -> str:
    """The recipe as commented YAML."""
    lines = [f"name: {found.name}", "model:", f"  source: {found.source}", f"  path: {json.dumps(found.path)}"]
    if found.task:
        lines.append(f"  task: {found.task}")
    lines.append("  # revision: main            # hub ids: pin a branch, tag or commit")
    lines.append("  # weights: random           # the architecture alone, seeded; every number will say so")
    lines += _inputs(found)
    lines += _samples(found)
    lines += ["compress:", f"  scheme: {scheme}  # `edgebake targets` lists what each target supports"]
    lines += ["  # modules:                  # glob on module names -> scheme; the last match wins"]
    lines += ['  #   "classifier": fp32', "targets:", *(f"  - {target}" for target in targets)]
    lines += ["limits:  # a limit left out is printed and not gated"]
    lines += _limits(found)
    return "\n".join(lines) + "\n"


def _inputs(found: Draft) -> list[str]:
    if not found.inputs:
        return ["inputs: {}  # name every input of the program: {shape: [1, 3, 224, 224], dtype: float32}"]
    lines = ["inputs:", *(f"  {name}: {facts}" for name, facts in found.inputs.items())]
    return [*lines, f"dims: {{seq: {{min: 8, max: {found.seq}}}}}"] if found.seq else lines


def _samples(found: Draft) -> list[str]:
    if found.kind == "text" and found.source != "gguf":
        return [
            "samples:  # one sample a line; replace by text of your own domain",
            f"  calibration: {{text: {_SENTENCES}, count: 64}}",
            f"  evaluation: {{text: {_SENTENCES}, skip: 128, count: 512}}",
        ]
    lines = ["samples:  # seeded noise exercises the graph and says nothing about quality: replace it by real samples"]
    if found.kind == "image":
        mean, std = list(found.mean), list(found.std)
        lines.append(f"  # evaluation: {{images: photos, count: 500, size: {found.size}, mean: {mean}, std: {std}}}")
    return [*lines, "  calibration: {noise: true, count: 16, seed: 1}", "  evaluation: {noise: true, count: 32}"]


def _limits(found: Draft) -> list[str]:
    metric = {"text": "spearman", "image": "top1"}.get(found.kind)
    lines = ["  parity: {cosine: 0.98}"]
    if metric and found.task in ("sentence-embedding", "image-classification"):
        lines.append(f"  agreement: {{metric: {metric}, min: 0.95}}")
    return [*lines, "  # size: {of_float: 0.35}", "  # delegated: 95%"]
