"""A first recipe for a model, from its configuration alone: no weight is read, no code of it runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgebake.errors import UsageError
from edgebake.models import _paths, _pt2

_TEXT = ("input_ids", "attention_mask")
_SENTENCES = "pkg://edgebake/recipes/samples/sentences.txt"
_MIN_SEQ, _MAX_SEQ = 8, 128
_MAX_JSON = 16 << 20
_NAMELESS = ("model", "models", "checkpoint", "weights", "pytorch", "final", "output")  # folders, after what is in them
_SOURCES = {".gguf": "gguf", ".pt2": "exported"}
_TASKS = (  # suffix of the architecture's class -> task
    ("ForImageClassification", "image-classification"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForMaskedLM", "fill-mask"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
)
_MODELS = "give a transformers folder (with a config.json), a .gguf, a .pt2 or a hub id"
_ARTIFACTS = (".onnx", ".ort", ".pte", ".mlmodel", ".tflite")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_BY_HAND = "write the recipe by hand: `edgebake schema` and the shipped recipes (`edgebake plan minilm-l6`) show how"


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What the configuration says of a model."""

    name: str
    source: str
    path: str  # as the user wrote it
    local: Path | None = None  # where it lies, when it is a file or folder of the user's
    task: str | None = None
    inputs: Mapping[str, str]  # name -> "{shape: ..., dtype: ...}"
    dims: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # least and most of each named dimension
    kind: str  # "text", "tokens" (text without a tokenizer), "image", "other"
    vocabulary: int = 1000
    size: int = 224
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    weights: str = ""  # the line of the recipe that says so when there is no safetensors file
    notes: tuple[str, ...] = ()


def draft(path: str, base: Path) -> Draft:
    """Read the configuration of ``path`` (folder, ``pkg://``, hub id, .gguf or .pt2); UsageError when it has none."""
    found = _paths.resolve(path, base)
    local = found if isinstance(found, Path) and not path.startswith(_paths.PACKAGE) else None
    if isinstance(found, Path) and found.is_file():
        return _file_draft(path, found, local)
    folder = _config_folder(found, path)
    config = _read(folder / "config.json")
    weights, notes = _weights(folder) if isinstance(found, Path) else ("", ())
    facts: dict[str, Any] = {
        "name": _name(_called(found)),
        "source": "transformers",
        "path": path,
        "local": local,
        "weights": weights,
        "notes": notes,
    }
    _refuse_unknown(config, folder)
    if _vocabulary(config) is not None:
        return _text_draft(facts, folder, config)
    if "image_size" in config or (folder / "preprocessor_config.json").exists():
        return _image_draft(facts, folder, config)
    raise UsageError(
        f"the inputs of a {_kind(config)} cannot be told from its configuration",
        where=str(folder / "config.json"),
        fix=_BY_HAND,
    )


def _hint(suffix: str) -> str:
    if suffix in _ARTIFACTS:
        return f"a {suffix} is what edgebake makes: give the model it came from; `edgebake inspect` shows what is in it"
    if suffix in _WEIGHTS:
        return "give the folder with the config.json that these weights belong to; for code of your own, " + _BY_HAND
    if suffix in (".yaml", ".yml"):
        return "a recipe is built as it is: edgebake build, without --target and --scheme"
    return f"{_MODELS}; for a network in Python code, {_BY_HAND}" if suffix == ".py" else _MODELS


def _file_draft(path: str, found: Path, local: Path | None) -> Draft:
    source = _SOURCES.get(found.suffix)
    if source is None:
        raise UsageError(f"{path} is no model that edgebake reads", fix=_hint(found.suffix.lower()))
    facts: dict[str, Any] = {"name": _name(found.stem), "source": source, "path": path, "local": local}
    if source == "exported":
        return _program_draft(facts, found)
    inputs = {"input_ids": "{shape: [1, seq], dtype: int64}"}
    return Draft(**facts, inputs=inputs, dims={"seq": (_MIN_SEQ, _MAX_SEQ)}, kind="tokens")


def _program_draft(facts: Mapping[str, Any], found: Path) -> Draft:
    notes = ("a .pt2 program counts as code: check and build need --trust",)
    declared = _pt2.declared(found)
    if declared is None:
        return Draft(**facts, inputs={}, kind="other", notes=(*notes, "name the inputs of the program in the recipe"))
    inputs = {
        name: f"{{shape: [{', '.join(map(str, shape))}], dtype: {dtype}}}"
        for name, (shape, dtype) in declared.inputs.items()
    }
    return Draft(**facts, inputs=inputs, dims=declared.dims, kind="other", notes=notes)


def _config_folder(found: Path | _paths.HubId, path: str) -> Path:
    if isinstance(found, _paths.HubId):
        from edgebake.models import _hub

        return _hub.snapshot(found.repo, _hub.commit(found.repo, None), weights=False, pickles=False, code=False)
    if not (found / "config.json").is_file():
        raise UsageError(
            f"{path} has no config.json",
            where=str(found),
            fix=_MODELS,
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise UsageError(f"it has {path.stat().st_size >> 20} MiB: no configuration is as large", where=str(path))
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read it: {error}", where=str(path)) from None
    if not isinstance(data, dict):
        raise UsageError("it holds no JSON object", where=str(path))
    return data


def _called(found: Path | _paths.HubId) -> str:
    """What people call the model: its folder, or what the folder is in where that says nothing."""
    if isinstance(found, _paths.HubId):
        return found.repo.rpartition("/")[2]
    for part in (found, *found.parents):
        if part.name.startswith("models--"):  # the hub's cache: models--<owner>--<name>/snapshots/<commit>
            return part.name.rpartition("--")[2]
    return found.parent.name if found.name.lower() in _NAMELESS and found.parent.name else found.name


def _name(text: str) -> str:
    plain = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return plain[:100] or "model"


def _kind(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    return f"model of type {kind[:60]!r}" if isinstance(kind, str) else "model without model_type"


def _refuse_unknown(config: Mapping[str, Any], folder: Path) -> None:
    """Kinds of models whose inputs would be guessed wrong."""
    processor = folder / "preprocessor_config.json"
    sounds = "conv_dim" in config or (processor.exists() and "sampling_rate" in _read(processor))
    two = isinstance(config.get("text_config"), dict) and isinstance(config.get("vision_config"), dict)
    why = (
        "has an encoder and a decoder: two components"
        if config.get("is_encoder_decoder") is True
        else "takes sound"
        if sounds
        else "takes text and images"
        if two
        else ""
    )
    if why:
        raise UsageError(f"a {_kind(config)} {why}", where=str(folder / "config.json"), fix=_BY_HAND)


def _weights(folder: Path) -> tuple[str, tuple[str, ...]]:
    """The line of the recipe that a folder without safetensors needs, and what to tell the user."""
    if any(folder.glob("*.safetensors")):
        return "", ()
    if any(folder.glob("*.bin")):
        line = "  pickles: true  # there is no safetensors file; these are read with weights_only"
        return line, ("the weights are pickles: the recipe allows them (they are read with weights_only)",)
    line = "  weights: random  # the folder has none: the architecture alone, seeded; every number will say so"
    return line, ("the folder has no weights: the recipe asks for random ones",)


def _whole(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    inner = config.get("text_config")
    for section in (config, inner if isinstance(inner, dict) else {}):
        if "vocab_size" in section:
            return max(2, _whole(section["vocab_size"], 1000))
    return None


def _text_draft(facts: Mapping[str, Any], folder: Path, config: Mapping[str, Any]) -> Draft:
    architectures = config.get("architectures")
    first = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    task = next((task for suffix, task in _TASKS if first.endswith(suffix)), "feature-extraction")
    if (folder / "modules.json").exists() or (folder / "1_Pooling").is_dir():
        task = "sentence-embedding"
    names = _TEXT[:1] if task == "text-generation" else _TEXT
    longest = min(_whole(config.get("max_position_embeddings"), _MAX_SEQ), _MAX_SEQ)
    return Draft(
        **facts,
        task=task,
        inputs=dict.fromkeys(names, "{shape: [1, seq], dtype: int64}"),
        dims={"seq": (min(_MIN_SEQ, longest), longest)},
        kind="text" if (folder / "tokenizer.json").exists() else "tokens",
        vocabulary=_vocabulary(config) or Draft.vocabulary,
    )


def _image_draft(facts: Mapping[str, Any], folder: Path, config: Mapping[str, Any]) -> Draft:
    processor = _read(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").exists() else {}
    sizes = (_side(s) for s in (config.get("image_size"), processor.get("crop_size"), processor.get("size")))
    size = next((s for s in sizes if s), Draft.size)
    channels = _whole(config.get("num_channels"), 3)
    normalised = bool(processor.get("do_normalize", "image_mean" in processor))
    mean, std = (processor.get("image_mean"), processor.get("image_std")) if normalised else (None, None)
    plain = bool(processor) and not normalised
    return Draft(
        **facts,
        task="image-classification",
        inputs={"pixel_values": f"{{shape: [1, {channels}, {size}, {size}], role: image}}"},
        kind="image",
        size=size,
        mean=_numbers(mean) or ([0.0] * channels if plain else Draft.mean),
        std=_numbers(std) or ([1.0] * channels if plain else Draft.std),
    )


def _side(value: object) -> int:
    """Pixels of a side, which configurations write as 224, [224, 224] or {height: 224, ...}; 0 for none of them."""
    if isinstance(value, dict):
        value = next(iter(value.values()), 0)
    if isinstance(value, list):
        value = value[0] if value else 0
    return min(_whole(value, 0), 4096)


def _numbers(value: object) -> list[float]:
    fine = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
    return [float(v) for v in value] if fine and isinstance(value, list) else []


def write_out(found: Draft, targets: Sequence[str], scheme: str, folder: Path) -> str:
    """The recipe as commented YAML, to lie in ``folder``: relative paths hold from there."""
    path = json.dumps(_path_from(found, folder))
    lines = [f"name: {found.name}", "model:", f"  source: {found.source}", f"  path: {path}"]
    if found.task:
        lines.append(f"  task: {found.task}")
    if found.source == "transformers" and found.local is None and not found.path.startswith(_paths.PACKAGE):
        lines.append("  # revision: main            # pin a branch, tag or commit")
    if found.weights:
        lines.append(found.weights)
    elif found.source == "transformers":
        lines.append("  # weights: random           # the architecture alone, seeded; every number will say so")
    lines += ["  # licence: Apache-2.0         # of the weights; it is kept in the manifest"]
    lines += _inputs(found)
    lines += _samples(found)
    lines += ["compress:", f"  scheme: {scheme}  # `edgebake targets` lists what each target supports"]
    lines += ["  # modules:                  # glob on module names -> scheme; the last match wins"]
    lines += ['  #   "classifier": fp32', "targets:", *(f"  - {target}" for target in targets)]
    lines += ["limits:  # a limit left out is printed and not gated"]
    lines += _limits(found)
    return "\n".join(lines) + "\n"


def _path_from(found: Draft, folder: Path) -> str:
    if found.local is None or Path(found.path).expanduser().is_absolute():
        return found.path
    relative = Path(os.path.relpath(found.local, folder.resolve())).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def _inputs(found: Draft) -> list[str]:
    if not found.inputs:
        return ["inputs: {}  # name every input of the program: {shape: [1, 3, 224, 224], dtype: float32}"]
    lines = ["inputs:", *(f"  {name}: {facts}" for name, facts in found.inputs.items())]
    dims = ", ".join(f"{name}: {{min: {low}, max: {high}}}" for name, (low, high) in found.dims.items())
    return [*lines, f"dims: {{{dims}}}"] if dims else lines


def _samples(found: Draft) -> list[str]:
    if found.kind == "text":
        return [
            "samples:  # one sample a line; replace by text of your own domain",
            f"  calibration: {{text: {_SENTENCES}, count: 64}}",
            f"  evaluation: {{text: {_SENTENCES}, skip: 128, count: 512}}",
        ]
    lines = ["samples:  # seeded noise exercises the graph and says nothing about quality: replace it by real samples"]
    if found.kind == "image":
        mean, std = list(found.mean), list(found.std)
        lines.append(f"  # evaluation: {{images: photos, count: 500, size: {found.size}, mean: {mean}, std: {std}}}")
    high = f", high: {found.vocabulary}" if found.kind == "tokens" else ""
    calibration = f"  calibration: {{noise: true, count: 16, seed: 1{high}}}"
    return [*lines, calibration, f"  evaluation: {{noise: true, count: 32{high}}}"]


def _limits(found: Draft) -> list[str]:
    lines = ["  parity: {cosine: 0.98}"]
    if found.task == "sentence-embedding":
        sure = "" if found.kind == "text" else "# "
        lines.append(f"  {sure}agreement: {{metric: spearman, min: 0.95}}")
    elif found.task == "image-classification":
        lines.append("  # agreement: {metric: top1, min: 0.95}  # with real samples")
    return [*lines, "  # size: {of_float: 0.35}", "  # delegated: 95%"]
