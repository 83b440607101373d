"""Model source ``transformers``: a Hugging Face folder, package or hub id, as the class that its task asks for.

Attention is the eager implementation: ``scaled_dot_product_attention`` decomposes into a softmax that is safe for rows
without any visible key (logical_not, any, full_like, where: 42 operators beside XNNPACK on MiniLM against 12), ONNX and
QNN take MatMul and Softmax best, and Core ML converts both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake import mapped
from edgebake.errors import RecipeError, TrustError
from edgebake.models import _finite, _hub, _mapped, _masks, _paths, _pooling, _shared
from edgebake.models._index import check_index
from edgebake.models._random import settle_norms
from edgebake.models._request import LoadRequest
from edgebake.models._safetensors import check_whole
from edgebake.recipe import Component, Model
from edgebake.types import Described, Loaded, Tensors

if TYPE_CHECKING:
    import torch

ATTENTION = "eager"
SENTENCE = "sentence-embedding"
_LONGEST_MASK_CHECK = 1024  # tokens; attention scores of longer inputs take gigabytes


def load(request: LoadRequest) -> Loaded:
    """The model of ``request``, eval mode, float32.

    RecipeError: unknown task, an input that the model does not take, no safetensors, weights that do not fit the task.
    TrustError: the model needs its own Python code.
    """
    folder, revision = _located(request)
    return load_folder(folder, request, revision)


def describe(request: LoadRequest) -> Described:
    """The decoder with a cache of ``request`` without its weights; refuses what :func:`load` refuses of it."""
    from edgebake.models import _described

    folder, revision = _located(request)
    return _described.of_folder(folder, request, revision)


def tensors(request: LoadRequest) -> Tensors:
    """The weights of that decoder where they lie."""
    from edgebake.models import _described

    return _described.tensors(_located(request)[0], request)


def _located(request: LoadRequest) -> tuple[Path, str | None]:
    """The model's folder and, of a hub's model, its commit."""
    found = _paths.resolve(request.model.path, request.base)
    if isinstance(found, Path):
        return found, None
    commit = _hub.commit(found.repo, request.model.revision)
    folder = _hub.snapshot(
        found.repo,
        commit,
        weights=request.model.weights == "trained",
        pickles=request.model.pickles,
        code=request.model.remote_code is not None,
    )
    return folder, commit


def load_folder(folder: Path, request: LoadRequest, revision: str | None) -> Loaded:
    """Like :func:`load`, from a folder that is already here."""
    _hub.quiet()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = request.model
    check_folder(folder, model)
    config = read_config(folder, model)
    task = canonical_task(model.task) if model.task else _infer_task(folder, config)
    return load_network(_network(folder, model, config, _auto_class(task, config)), folder, request, task, revision)


def load_network(
    network: torch.nn.Module, folder: Path, request: LoadRequest, task: str, revision: str | None = None
) -> Loaded:
    """``network``, float32 and frozen, as a source gives it; ``folder`` has its config.json and what travels."""
    model, component, config = request.model, request.component, network.config
    head = _pooling.read_head(folder) if task == SENTENCE else None
    if model.context is not None:
        return _decoder(network, folder, request, model.context, facts(network, folder, model, task, revision))
    for inputs in component.all_methods.values():
        _shared.by_name(network.forward, tuple(inputs), type(network).__name__)
    constants = _constants(network)
    if model.weights == "random":
        settle_norms(network, component, constants, model.seed)
    mask = _mask_kind(network, component, config, constants)
    told = {**facts(network, folder, model, task, revision), "attention_mask": mask}
    module = network if head is None else _shared.freeze(_pooling.sentence_embedding(network, head))

    def invoke(net: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> Any:
        inputs = {**(given if mask == "own" else _masks.additive(mask, given)), **constants}
        return net(**inputs) if head is None else net(given.get("attention_mask"), **inputs)

    return _shared.finish(component, dict.fromkeys(component.all_methods, module), invoke, told)


def facts(network: torch.nn.Module, folder: Path, model: Model, task: str, revision: str | None) -> dict[str, Any]:
    """What a manifest says of the model."""
    return {
        "class": type(network).__name__,
        "task": task,
        "parameters": _shared.parameters_of(network),
        "weights": model.weights,
        "licence": model.licence or licence_of(folder),
        "revision": revision,
    }


def _decoder(
    network: torch.nn.Module, folder: Path, request: LoadRequest, context: int, told: Mapping[str, Any]
) -> Loaded:
    """``network`` with a key/value cache, and what travels with it."""
    from edgebake.llm import companions, decoder
    from edgebake.llm.operators import REGISTER

    files = companions.companions(folder)
    language = companions.language(folder, network.config, context)
    if (count := request.model.layers) is not None:
        network = decoder.first_layers(network, count)
        files |= _configuration_of(network, request)
        told = {**told, "parameters": _shared.parameters_of(network), "first_layers": count}
    module = decoder.with_caches(network, context)
    found = _shared.finish(request.component, {"forward": module}, decoder.call, told)
    signature = replace(found.signature, language=language)
    return replace(found, signature=signature, operators=(REGISTER,), companions=files)


def _configuration_of(network: torch.nn.Module, request: LoadRequest) -> dict[str, Path]:
    """A derived network's own config.json, which lowering reads; the folder's describes the whole one."""
    from edgebake.jsonfile import digest_of
    from edgebake.llm.companions import CONFIG

    text = network.config.to_json_string(use_diff=False)  # type: ignore[operator, union-attr]
    if request.keep is None:
        return {}

    def fill(folder: Path) -> None:
        (folder / CONFIG).write_text(text, "utf-8")

    return {CONFIG: request.keep(digest_of({"configuration": text}), fill) / CONFIG}


# --- tasks ----------------------------------------------------------------------------------------------------------


def canonical_task(task: str) -> str:
    """The task as optimum names it (``causal-lm`` -> ``text-generation``); RecipeError with the nearest names."""
    if task in (SENTENCE, "sentence-similarity"):
        return SENTENCE
    from optimum.exporters.tasks import TasksManager

    known = TasksManager.get_all_tasks()
    name = str(TasksManager.map_from_synonym(task))
    if name not in known:
        near = get_close_matches(task, [*known, SENTENCE], 1)
        raise RecipeError(
            f"there is no task {task!r}",
            where="model.task",
            fix=(f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(sorted([*known, SENTENCE]))}",
        )
    return name


def _infer_task(folder: Path, config: Any) -> str:
    if _pooling.is_sentence_transformer(folder):
        return SENTENCE
    import transformers
    from optimum.exporters.tasks import TasksManager

    names = [n for n in (config.architectures or []) if hasattr(transformers, n)]
    try:
        return str(TasksManager.infer_task_from_model(getattr(transformers, names[0])))
    except (IndexError, ValueError, KeyError):
        raise RecipeError(
            f"the task of {config.architectures or 'a model without architectures'} is not known",
            where="model.task",
            fix="give model.task, for example feature-extraction",
        ) from None


def _auto_class(task: str, config: Any) -> Any:
    """The class to load with: optimum's map from task to class works on transformers 5, only its exporters do not."""
    from optimum.exporters.tasks import TasksManager

    base = "feature-extraction" if task == SENTENCE else task
    try:
        return TasksManager.get_model_class_for_task(base, model_type=config.model_type, library="transformers")
    except (KeyError, ValueError) as error:
        raise RecipeError(
            f"task {task!r} has no class for {config.model_type!r}: {error}", where="model.task"
        ) from None


# --- folders and weights --------------------------------------------------------------------------------------------


def check_folder(folder: Path, model: Model) -> None:
    """RecipeError where ``folder`` does not hold a model that may be loaded."""
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{folder.name!r} has no config.json", where="model.path", fix="give the model's folder")
    check_index(folder)
    code = model.remote_code
    if code is not None and code != model.path:
        raise RecipeError(
            f"remote_code names {code!r}, but the model is {model.path!r}",
            where="model.remote_code",
            fix="repeat model.path there, to say whose code may run",
        )
    if model.weights == "random":
        return
    if any(folder.glob("*.safetensors")):
        check_whole(folder)
        return
    pickled = any(folder.glob("*.bin"))
    if not pickled:
        raise RecipeError(f"{folder.name!r} has no *.safetensors", where="model.path", fix="copy the weights, too")
    if not model.pickles:
        raise RecipeError(
            f"{folder.name!r} has its weights as pickles only",
            where="model.pickles",
            fix="convert them to safetensors, or set `pickles: true` (they are read with weights_only)",
        )


def read_config(folder: Path, model: Model) -> Any:
    """Of ``folder``; refused where transformers does not know it or the weights are quantised already."""
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = json.loads((folder / "config.json").read_text("utf-8"))
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING and model.remote_code is None:
        own = "auto_map" in raw
        error = TrustError if own else RecipeError
        raise error(
            f"transformers does not know the model type {kind!r}" + (", the model brings its own code" if own else ""),
            where="model.path",
            fix=f"read that code, then set `remote_code: {model.path}`" if own else "install a newer transformers",
        )
    if raw.get("quantization_config"):
        raise RecipeError(
            f"the checkpoint is already quantised ({raw['quantization_config'].get('quant_method', 'unknown method')})",
            where="model.path",
            fix="start from the float checkpoint; the recipe's compress section chooses the format",
        )
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=model.remote_code is not None)


def _network(folder: Path, model: Model, config: Any, auto: Any) -> torch.nn.Module:
    import torch

    from edgebake.llm import random_weights

    code = model.remote_code is not None
    more = {"dtype": torch.float32, "attn_implementation": ATTENTION, "trust_remote_code": code}
    if model.weights == "random":
        large = model.context is not None and mapped.is_large(auto, config, more)
        with torch.random.fork_rng(devices=[]), mapped.weights_in_files(large=large):
            torch.manual_seed(model.seed)
            made = auto.from_config(config, **more)
            if model.context is not None:
                random_weights.fill(made, model.seed, deviation(config))
        mapped.release_after_use(made)
        return _shared.freeze(made)
    if model.context is not None and (made := _mapped.trained(auto, config, folder, more)) is not None:
        return _shared.freeze(made)
    network, info = _from_pretrained(auto, folder, model, config)
    missing = sorted(info["missing_keys"])
    if missing and all(k.startswith("pooler.") for k in missing):
        # Sentence encoders are often saved without BERT's pooler; a random one must not become an output.
        network, info = _from_pretrained(auto, folder, model, config, add_pooling_layer=False)
        missing = sorted(info["missing_keys"])
    wrong = missing or sorted(str(k) for k in info["mismatched_keys"])
    if wrong:
        raise RecipeError(
            f"the checkpoint has no fitting weights for {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''} "
            f"of {type(network).__name__}",
            where="model.task",
            fix=f"choose the task it was trained for (config.json: {config.architectures}), or copy the model again",
        )
    _finite.refuse_infinite(network)
    return _shared.freeze(network)


def deviation(config: Any) -> float:
    """Of random weights."""
    from edgebake.llm.random_weights import DEVIATION

    return float(getattr(config.get_text_config(), "initializer_range", DEVIATION))


def _from_pretrained(auto: Any, folder: Path, model: Model, config: Any, **extra: Any) -> tuple[torch.nn.Module, Any]:
    import torch

    loaded: tuple[torch.nn.Module, Any] = auto.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation=ATTENTION,
        use_safetensors=not model.pickles or any(folder.glob("*.safetensors")),
        weights_only=True,
        local_files_only=True,
        trust_remote_code=model.remote_code is not None,
        output_loading_info=True,
        **extra,
    )
    return loaded


def licence_of(folder: Path) -> str | None:
    """The licence that the model card's front matter states."""
    card = folder / "README.md"
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    stated = re.search(r"^license:\s*['\"]?([\w.+-]+)", front.group(1), re.MULTILINE) if front else None
    return stated.group(1) if stated else None


# --- calling --------------------------------------------------------------------------------------------------------


def _constants(network: torch.nn.Module) -> dict[str, Any]:
    """Arguments baked in: no cache (a decoder returns logits only), outputs by name."""
    import inspect

    known = inspect.signature(network.forward).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in known.values())
    constants: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    return {**constants, "return_dict": True} if "return_dict" in known or takes_more else constants


def _mask_kind(
    network: torch.nn.Module, component: Component, config: Any, constants: Mapping[str, Any]
) -> _masks.Kind:
    """One kind for all methods; the network's own masks as soon as one method needs them."""
    from edgebake import trace

    longest = max((d.max for d in component.dims.values()), default=0)
    windows = ("sliding_window", "attention_chunk_size", "local_attention")
    if longest > _LONGEST_MASK_CHECK and any(getattr(config, name, None) for name in windows):
        return "own"  # a window could begin to matter beyond what is compared here
    size = {n: max(d.min, min(d.max, _LONGEST_MASK_CHECK)) for n, d in component.dims.items()}
    kinds: set[_masks.Kind] = set()
    for method in component.all_methods:
        signature = _shared.inputs_alone(component, method)
        specs = signature.methods[method].inputs
        trace.varying(signature.methods[method], signature.dims)
        examples = trace.example_inputs(signature, method, 0, size)
        kinds.add(_masks.choose(network, dict(zip((s.name for s in specs), examples, strict=True)), constants))
    return kinds.pop() if len(kinds) == 1 else "own"
