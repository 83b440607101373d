"""Model source ``meta``: a Llama 3 checkpoint as Meta publishes it, with integers of its own where it was quantised.

A folder with ``consolidated.00.pth``, ``params.json`` and ``tokenizer.model``. The published quantised checkpoints of
Llama 3.2 (``INT4_EO8``: linear layers of 4 bits in groups of 32, embedding and head of 8 bits per row, activations of
8 bits by token) come in two kinds: SpinQuant (Liu et al. 2024, arXiv:2405.16406), which rotates once more at run time
in front of ``down_proj`` (R4), and QLoRA (Dettmers et al. 2023, arXiv:2305.14314; here quantisation-aware training),
with low-rank adapters (Hu et al. 2021, arXiv:2106.09685) beside each layer of integers.

The network that is loaded has integers times scales as its float32 weights: what is judged against is the checkpoint
itself. Lowering to the same format finds the integers again (``edgebake.lattice``) and rounds nothing.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.llm.companions import FILES
from edgebake.models import _hub, _low_rank, _meta_params, _meta_tensors, _meta_words, _paths
from edgebake.models import transformers as hugging_face
from edgebake.models._meta_params import Params
from edgebake.models._request import LoadRequest
from edgebake.recipe import Model
from edgebake.types import Keep, Loaded

if TYPE_CHECKING:
    import torch

TASK = "text-generation"
OPTIONS = ("adapters", "spin_quant")
ADAPTERS = ("keep", "merge")


def load(request: LoadRequest) -> Loaded:
    """The decoder of ``request``, float32: ``input_ids`` -> ``logits``, or with a cache.

    ``model.options``: ``adapters`` (``keep``: float beside the integers; ``merge``: added to the weights, which are
    then rounded anew), ``spin_quant`` where params.json does not say whether R4 stands before ``down_proj``.
    RecipeError: no such checkpoint, a damaged one, one that contradicts its params.json.
    """
    folder, params = found(request.model, request.base)
    if request.keep is not None:
        return _load(folder, params, _kept(folder, params, request.keep), request)
    with tempfile.TemporaryDirectory(prefix="edgebake-meta-") as scratch:
        _describe(folder, params, Path(scratch))
        return _load(folder, params, Path(scratch), request)


def found(model: Model, base: Path) -> tuple[Path, Params]:
    """The checkpoint's folder and its parameters, no weight read; RecipeError where folder or options do not fit."""
    _check_options(model)
    folder = _paths.resolve(model.path, base)
    if not isinstance(folder, Path) or not folder.is_dir():
        raise RecipeError(
            f"{model.path!r} is no folder",
            where="model.path",
            fix=f"give the folder with {_meta_params.WEIGHTS} and {_meta_params.PARAMS}",
        )
    _meta_params.check_folder(folder)
    params = _meta_params.read(folder)
    if _rotates(params, model) and params.inner & (params.inner - 1):
        raise RecipeError(
            f"a rotation of {params.inner} values is asked for, and only powers of two are known",
            where="model.path",
            fix="give a checkpoint whose feed-forward width is a power of two",
        )
    return folder, params


def conversions(model: Model, base: Path) -> tuple[str, ...]:
    """What :func:`load` keeps of ``model``, by key: a build that checks its store looks at these, too."""
    return (_key(found(model, base)[0]),)


def tokenizer(request: LoadRequest) -> Path | None:
    """The folder with the tokenizer; None where nothing is kept and it lies beside the checkpoint, if anywhere."""
    if request.keep is None:
        return None
    folder, params = found(request.model, request.base)
    return _kept(folder, params, request.keep)


def _kept(folder: Path, params: Params, keep: Keep) -> Path:
    return keep(_key(folder), lambda into: _describe(folder, params, into))


def _describe(folder: Path, params: Params, into: Path) -> None:
    """Write configuration and tokenizer as transformers keeps them."""
    _hub.quiet()
    _meta_words.write(folder, into, params)
    tied = _meta_tensors.read(folder, params).tied
    text = json.dumps(_meta_params.configuration(params, tied=tied), indent=2, sort_keys=True)
    (into / "config.json").write_text(text + "\n", "utf-8")


def _load(folder: Path, params: Params, described: Path, request: LoadRequest) -> Loaded:
    checkpoint = _meta_tensors.read(folder, params)
    rotates = _rotates(params, request.model)
    if params.quantization_args is not None and rotates is None and params.lora_args is None:
        raise RecipeError(
            "params.json does not say whether SpinQuant's rotation stands before down_proj",
            where="model.options",
            fix="set options: {spin_quant: true} for a SpinQuant checkpoint, {spin_quant: false} for others",
        )
    network = _network(described, checkpoint, merge=request.model.options.get("adapters") == "merge")
    if rotates:
        _low_rank.rotate_before_down(network)
    loaded = hugging_face.load_network(network, described, request, TASK)
    said = _said(checkpoint, rotates=bool(rotates))
    return replace(loaded, facts={**loaded.facts, "checkpoint": said})


def _said(checkpoint: _meta_tensors.Checkpoint, *, rotates: bool) -> str:
    """What a manifest says of the checkpoint's kind."""
    quantised = checkpoint.params.quantization_args
    if not checkpoint.integers or quantised is None:
        return "float"
    kind = f"int4 in groups of {quantised.group_size}, embedding and head int8 by row"
    return kind + (", rotated before down_proj" if rotates else "") + (", with adapters" if checkpoint.adapters else "")


def _network(described: Path, checkpoint: _meta_tensors.Checkpoint, *, merge: bool) -> torch.nn.Module:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(described, local_files_only=True)
    with torch.device("meta"):
        network: Any = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=hugging_face.ATTENTION
        )
    adapters = {}
    for own, name in checkpoint.modules().items():
        weight, adapter = checkpoint.weight(own), checkpoint.adapter(own)
        if adapter is not None and merge:
            weight += adapter[1] @ adapter[0]
        elif adapter is not None:
            adapters[name] = adapter
        network.get_submodule(name).weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    network.tie_weights()
    for name, (a, b) in adapters.items():
        owner, _, leaf = name.rpartition(".")
        parent = network.get_submodule(owner)
        setattr(parent, leaf, _low_rank.adapt(getattr(parent, leaf), a, b))
    inner = network.model
    inner.rotary_emb = type(inner.rotary_emb)(config=config)  # its frequencies are no weights
    return network.eval()  # type: ignore[no-any-return]


def _rotates(params: Params, model: Model) -> bool | None:
    asked = model.options.get("spin_quant")
    stated = None if params.quantization_args is None else params.quantization_args.rotates
    if asked is not None and stated is not None and asked != stated:
        raise RecipeError(
            f"params.json says spin_quant: {str(stated).lower()}, the recipe {str(asked).lower()}",
            where="model.options",
            fix="take spin_quant out of the recipe",
        )
    return stated if asked is None else bool(asked)


def _check_options(model: Model) -> None:
    for name, value in model.options.items():
        if name not in OPTIONS:
            raise RecipeError(
                f"the source meta has no option {name!r}", where="model.options", fix=f"it has: {', '.join(OPTIONS)}"
            )
        fits = value in ADAPTERS if name == "adapters" else isinstance(value, bool)
        if not fits:
            words = " or ".join(ADAPTERS) if name == "adapters" else "true or false"
            raise RecipeError(f"{name} is {value!r}", where="model.options", fix=f"{name} takes {words}")


def _key(folder: Path) -> str:
    """SHA-256 of what configuration and tokenizer are made of, and of the libraries that make them.

    Of the weights, their names alone say whether the head is tied; their digest stands for these.
    """
    made = hashlib.sha256(b"meta to transformers\n")
    names = (_meta_params.WEIGHTS, _meta_params.PARAMS, _meta_params.WORDS, *FILES)
    for name in names:
        if (folder / name).is_file():
            with (folder / name).open("rb") as stream:
                made.update(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    for name in ("transformers", "tokenizers"):
        made.update(f"{name} {metadata.version(name)}\n".encode())
    return made.hexdigest()
