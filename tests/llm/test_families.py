"""Decoders of other families than Llama's, lowered: Gemma's norms, embedding scale and windows, Phi's own parts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import decoders
import genai_cases
from asking import defaults, lower_request
from edgebake.compress import quantize_weights
from edgebake.llm.shards import Shards
from edgebake.metrics import sqnr_db
from edgebake.target import ModuleRequest
from edgebake.trace import live_modules, trace
from edgebake.types import Assignment, Loaded
from edgebake_targets import executorch_xnnpack
from edgebake_targets._genai_graph import write_decoder
from edgebake_targets.runners import executorch_runtime

# ExecuTorch tells everybody that it keeps no start of such buffers; caches have none.
pytestmark = pytest.mark.filterwarnings("ignore:Mutation on a buffer in the model is detected:UserWarning")
TOKENS = torch.randint(3, decoders.WORDS, (1, 32), generator=torch.Generator().manual_seed(1))
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": decoders.CONTEXT},
    "phi": {"pad_token_id": 0, "tie_word_embeddings": False},
    "phi3": {"pad_token_id": 0},
}


def loaded(folder: Path, family: str) -> Loaded:
    return decoders.loaded(decoders.save(folder, family, num_hidden_layers=1, **FAMILIES[family]))


def read(call: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits of TOKENS, read in three calls of which the second is one token."""
    parts = ((0, 15), (15, 16), (16, 32))
    return np.concatenate([call(TOKENS[:, a:b], torch.tensor([a])) for a, b in parts], axis=1)


def lowered_and_float(model: Loaded, folder: Path, assignment: Assignment) -> float:
    """SQNR in dB of the .pte against the network that it was lowered from."""

    def network(tokens: torch.Tensor, position: torch.Tensor) -> Any:
        with torch.no_grad():
            return model.methods["forward"](tokens, position)[0].numpy()

    wanted = read(network)
    request = lower_request(folder, defaults(executorch_xnnpack), assignment=assignment)
    lowered = executorch_xnnpack.lower(trace(model), request)
    session: Any = executorch_runtime.open(folder / lowered.entry, lowered.signature)

    def artifact(tokens: torch.Tensor, position: torch.Tensor) -> Any:
        return session.call("forward", {"tokens": tokens.numpy(), "input_pos": position.numpy()})["logits"]

    return sqnr_db(wanted, read(artifact))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lowered_decoder_says_what_the_float_one_says(tmp_path: Path, family: str) -> None:
    found = lowered_and_float(loaded(tmp_path, family), tmp_path, Assignment(schemes={}, kinds={}))
    print(family, "fp32", found)
    assert found > 100


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "phi3"])
def test_its_integers_are_computed_with(tmp_path: Path, family: str) -> None:
    model = loaded(tmp_path, family)
    kinds = {module.name: module.kind for module in live_modules(model)}
    schemes = {name: "w8" if kind == "embedding" else "w4g32a8d" for name, kind in kinds.items()}
    assignment = Assignment(schemes=schemes, kinds=kinds)
    module = model.methods["forward"]
    rounded = quantize_weights.apply(
        ModuleRequest(module=module, assignment=assignment, options={}, run_calibration=lambda _: None)
    )
    found = lowered_and_float(replace(model, methods={"forward": rounded}), tmp_path, assignment)
    print(family, "w4g32a8d", found)
    assert found > 25


WINDOWED: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 20},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"pad_token_id": 0},
}
PROMPT, NEW = "A list of words, longer than one call takes:", 12


@pytest.mark.slow
@pytest.mark.parametrize("family", WINDOWED)
def test_stock_onnxruntime_genai_says_what_transformers_does(tmp_path: Path, family: str) -> None:
    """44 tokens and 12 more: past the windows."""
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai")
    from transformers import AutoModelForCausalLM

    source, made = tmp_path / "source", tmp_path / "made"
    source.mkdir()
    made.mkdir()
    decoders.save(source, family, **WINDOWED[family])
    write_decoder(source, Shards(source), made, context=decoders.CONTEXT, scheme="fp32", embedding="fp32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, made / name)
    said = genai_cases.stock(genai, made, PROMPT, NEW)
    network = AutoModelForCausalLM.from_pretrained(source).eval()
    wanted = said[: len(PROMPT)]  # a token for each letter
    with torch.no_grad():
        while len(wanted) < len(said):
            wanted.append(int(network(torch.tensor([wanted]), use_cache=False).logits[0, -1].argmax()))
    assert len(said) > len(PROMPT) and said == wanted
