"""Keys and values in int8: as large as predicted, near the float model, the same by steps, in ExecuTorch's runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import decoders
from asking import defaults, lower_request
from edgebake.errors import StageFailed
from edgebake.llm import fit_memory, fit_shape
from edgebake.metrics import sqnr_db
from edgebake.trace import trace
from edgebake.types import Loaded, Lowered, Traced
from edgebake_targets import _executorch_llm, executorch_xnnpack
from edgebake_targets.runners import executorch_runtime

# ExecuTorch tells everybody that it keeps no start of such buffers; caches have none.
pytestmark = pytest.mark.filterwarnings("ignore:Mutation on a buffer in the model is detected:UserWarning")
TOKENS = torch.randint(3, decoders.WORDS, (1, 40), generator=torch.Generator().manual_seed(1))
INT8 = {**defaults(executorch_xnnpack), "cache": "int8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.save(tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return decoders.loaded(folder)


@pytest.fixture(scope="module")
def traced(loaded: Loaded) -> Traced:
    return trace(loaded)


@pytest.fixture(scope="module")
def lowered(traced: Traced, folder: Path) -> Lowered:
    return executorch_xnnpack.lower(traced, lower_request(folder, INT8))


def cache_bytes(program: torch.export.ExportedProgram) -> int:
    held = (t for name, t in program.constants.items() if "_cache" in name and isinstance(t, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def test_the_caches_are_as_large_as_predicted(traced: Traced, folder: Path) -> None:
    decoder = fit_shape.read_config(folder)
    for cache, key in (("fp32", "pte"), ("int8", "pte int8")):
        program = _executorch_llm.with_own_operators(traced, cache).programs["forward"]
        wanted = fit_memory.cache_bytes(decoder, decoders.CONTEXT, fit_memory.CACHES[key])
        assert cache_bytes(program) == wanted
    assert cache_bytes(traced.programs["forward"]) == 4 * 16 / (16 + 5) * wanted  # heads of 16; the trace is unchanged


def logits(entry: Path, lowered: Lowered, ends: tuple[int, ...]) -> Any:
    session: Any = executorch_runtime.open(entry, lowered.signature)
    calls = [
        session.call("forward", {"tokens": TOKENS[:, a:b].numpy(), "input_pos": np.array([a])})["logits"]
        for a, b in zip((0, *ends[:-1]), ends, strict=True)
    ]
    return np.concatenate(calls, 1)


@pytest.mark.slow
def test_text_is_near_the_float_models_and_the_same_by_steps(loaded: Loaded, lowered: Lowered, folder: Path) -> None:
    with torch.no_grad():
        want = torch.cat([loaded.methods["forward"](TOKENS[:, a : a + 16], torch.tensor([a]))[0] for a in (0, 16)], 1)
    whole = logits(folder / lowered.entry, lowered, (16, 32))
    assert 25 < sqnr_db(want.numpy(), whole) < 60
    assert sqnr_db(whole, logits(folder / lowered.entry, lowered, tuple(range(1, 33)))) > 100


@pytest.mark.slow
def test_executorchs_own_runner_generates_the_same_from_int8(lowered: Lowered, folder: Path) -> None:
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
    from tokenizers import Tokenizer

    prompt, count = "A list of words, longer than one call takes:", 12
    letters: list[str] = []
    runner = TextLLMRunner(str(folder / lowered.entry), str(folder / "tokenizer.json"))
    runner.generate(prompt, GenerationConfig(max_new_tokens=count, temperature=0.0, echo=False), letters.append)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session: Any = executorch_runtime.open(folder / lowered.entry, lowered.signature)
    ids, new = tokenizer.encode(prompt).ids, list[int]()
    at = 0
    while len(new) < count and decoders.EOS not in new:
        part = (ids + new)[at : at + decoders.ONCE]
        found = session.call("forward", {"tokens": np.array([part]), "input_pos": np.array([at])})["logits"]
        at += len(part)
        if at == len(ids) + len(new):
            new.append(int(found[0, -1].argmax()))
    assert "".join(letters) == tokenizer.decode(new) and len(new) > 1


@pytest.mark.slow
def test_the_last_row_of_an_int8_cache_is_the_last(lowered: Lowered, folder: Path) -> None:
    session: Any = executorch_runtime.open(folder / lowered.entry, lowered.signature)
    last = {"tokens": TOKENS[:, :8].numpy(), "input_pos": np.array([decoders.CONTEXT - 8])}
    assert np.isfinite(session.call("forward", last)["logits"]).all()
    with pytest.raises(StageFailed, match="8 tokens from position 57 on do not fit the context of 64"):
        session.call("forward", {**last, "input_pos": np.array([decoders.CONTEXT - 7])})
