"""Model source ``gguf``: a GGUF file, converted once to safetensors and then loaded like any transformers folder."""

from __future__ import annotations

import hashlib
import tempfile
from importlib import metadata
from pathlib import Path

from edgebake.errors import RecipeError
from edgebake.models import _hub, _paths
from edgebake.models import transformers as hugging_face
from edgebake.models._request import LoadRequest
from edgebake.recipe import Model
from edgebake.types import Keep, Loaded


def load(request: LoadRequest) -> Loaded:
    """The decoder in ``request``'s file, dequantised to float32: ``input_ids`` -> ``logits``, or with a cache.

    The conversion (about a minute for 135 M parameters) goes through ``request.keep`` where there is one.
    """
    model = request.model
    if model.task is None:
        request = _with_task(request, "text-generation")
    _paths.resolve_file(model.path, request.base, ".gguf")
    if request.keep is not None:
        return hugging_face.load_folder(_kept(request, request.keep), request, revision=None)
    with tempfile.TemporaryDirectory(prefix="edgebake-gguf-") as scratch:
        convert(model, request.base, Path(scratch))
        return hugging_face.load_folder(Path(scratch), request, revision=None)


def conversions(model: Model, base: Path) -> tuple[str, ...]:
    """What :func:`load` keeps of ``model``, by key: a build that checks its store looks at these, too."""
    return (_key(_paths.resolve_file(model.path, base, ".gguf"), model),)


def tokenizer(request: LoadRequest) -> Path | None:
    """The folder with the tokenizer of a network with a cache; None where it lies beside the file, if anywhere."""
    if request.model.context is None or request.keep is None:
        return None
    return _kept(request, request.keep)


def _kept(request: LoadRequest, keep: Keep) -> Path:
    (key,) = conversions(request.model, request.base)
    return keep(key, lambda into: convert(request.model, request.base, into))


def convert(model: Model, base: Path, folder: Path) -> None:
    """Write the GGUF file of ``model`` into ``folder`` as config.json and float32 safetensors.

    Values are the dequantised ones of GGUF's block formats, exactly as transformers' reader gives them. A network with
    a cache generates text: its tokenizer and chat template are written, too.
    """
    _hub.quiet()
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    source = _paths.resolve_file(model.path, base, ".gguf")
    try:
        network = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            local_files_only=True,
            # Without this, weights stay packed and kernels are fetched from the hub.
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        if model.context is not None:
            words = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            words.save_pretrained(folder)
    except Exception as error:  # the reader raises struct, value, key and index errors on damaged files
        raise RecipeError(
            f"{source.name} cannot be read: {next(iter(str(error).splitlines()), type(error).__name__)}",
            where="model.path",
            fix="transformers reads GGUF of the architectures it lists under `GGUF`; the file may also be damaged",
        ) from error
    network.save_pretrained(folder)


def _with_task(request: LoadRequest, task: str) -> LoadRequest:
    from dataclasses import replace

    return replace(request, model=request.model.model_copy(update={"task": task}))


def _key(file: Path, model: Model) -> str:
    """SHA-256 of all that the conversion depends on: the file, what is taken from it, the libraries that read it."""
    with file.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    versions = [f"{name} {metadata.version(name)}" for name in ("transformers", "gguf")]
    what = "gguf to safetensors" if model.context is None else "gguf to safetensors and tokenizer"
    return hashlib.sha256("\n".join([what, content, *versions]).encode()).hexdigest()
