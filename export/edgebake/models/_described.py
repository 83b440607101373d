"""A transformers decoder as its configuration describes it, built on the meta device: no weight is made or read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.models import _hub, _shared
from edgebake.models import transformers as hugging_face
from edgebake.models._request import LoadRequest
from edgebake.types import Described, MethodSignature, Signature, Tensors, TensorSpec

if TYPE_CHECKING:
    pass

_TASK = "text-generation"


def of_folder(folder: Path, request: LoadRequest, revision: str | None) -> Described:
    """What :func:`edgebake.models.transformers.load_folder` would load of a decoder; refuses what that refuses."""
    from edgebake import trace
    from edgebake.llm import companions, decoder

    model = request.model
    assert model.context is not None
    network = _network(folder, request)
    decoder.refuse(network.config, model.context)
    files = companions.companions(folder)
    language = companions.language(folder, network.config, model.context)
    modules = trace.module_inventory(network)
    return Described(
        signature=_signature(request, language),
        modules=modules,
        float_bytes=trace.float_bytes([network], {m.name for m in modules}, set()),
        facts=hugging_face.facts(network, folder, model, _TASK, revision),
        companions=files,
    )


def tensors(folder: Path, request: LoadRequest) -> Tensors:
    """The weights of that decoder: read from its safetensors, or seeded random ones."""
    from edgebake.llm import random_weights
    from edgebake.llm.shards import Shards

    if request.model.weights == "trained":
        return Shards(folder)
    network = _network(folder, request)
    return random_weights.of_network(network, request.model.seed, hugging_face.deviation(network.config))


def _network(folder: Path, request: LoadRequest) -> Any:
    _hub.quiet()
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    hugging_face.check_folder(folder, request.model)
    config = hugging_face.read_config(folder, request.model)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _signature(request: LoadRequest, language: Any) -> Signature:
    """Logits of every token, (1, tokens, words), as ``edgebake.llm.decoder`` gives them."""
    alone = _shared.inputs_alone(request.component, "forward")
    inputs = alone.methods["forward"].inputs
    logits = TensorSpec(name="logits", shape=(*inputs[0].shape, language.vocabulary), dtype="float32")
    method = MethodSignature(inputs=inputs, outputs=(logits,))
    return Signature(methods={"forward": method}, dims=alone.dims, language=language)
