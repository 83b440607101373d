"""A decoder lowered for XNNPACK: its caches, what ExecuTorch's own runner reads, and that this runner generates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import decoders
from asking import defaults, lower_request
from edgebake.errors import StageFailed
from edgebake.trace import trace
from edgebake.types import DimBounds, Language, Loaded, Lowered, MethodSignature, Signature, TensorSpec
from edgebake_targets import executorch_xnnpack
from edgebake_targets._decoders import refuse_past_the_end
from edgebake_targets._executorch_llm import metadata
from edgebake_targets.runners import executorch_runtime

# ExecuTorch tells everybody that it keeps no start of such buffers; caches have none.
pytestmark = pytest.mark.filterwarnings("ignore:Mutation on a buffer in the model is detected:UserWarning")
TOKENS = torch.randint(3, decoders.WORDS, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return decoders.loaded(folder)


@pytest.fixture(scope="module")
def lowered(loaded: Loaded, folder: Path) -> Lowered:
    return executorch_xnnpack.lower(trace(loaded), lower_request(folder, defaults(executorch_xnnpack)))


def in_parts(session: Any, *ends: int) -> Any:
    starts = (0, *ends[:-1])
    calls = [
        session.call("forward", {"tokens": TOKENS[:, a:b].numpy(), "input_pos": np.array([a])})["logits"]
        for a, b in zip(starts, ends, strict=True)
    ]
    return np.concatenate(calls, 1)


@pytest.mark.slow
def test_every_division_into_calls_says_what_the_float_model_says(
    loaded: Loaded, lowered: Lowered, folder: Path
) -> None:
    with torch.no_grad():
        float_module = loaded.methods["forward"]
        want = [float_module(TOKENS[:, a : a + 16], torch.tensor([a]))[0] for a in (0, 16)]
    session: Any = executorch_runtime.open(folder / lowered.entry, lowered.signature)
    for ends in ((16, 32), (5, 6, 7, 20, 32), tuple(range(1, 33))):  # the caches hold another text before
        assert np.allclose(in_parts(session, *ends), torch.cat(want, 1).numpy(), atol=1e-4, rtol=1e-4)
    assert lowered.signature.methods["forward"].buffers == ()


@pytest.mark.slow
def test_the_last_row_of_the_cache_is_the_last(lowered: Lowered, folder: Path) -> None:
    session: Any = executorch_runtime.open(folder / lowered.entry, lowered.signature)
    last = {"tokens": TOKENS[:, :8].numpy(), "input_pos": np.array([decoders.CONTEXT - 8])}
    assert np.isfinite(session.call("forward", last)["logits"]).all()
    with pytest.raises(StageFailed) as caught:
        session.call("forward", {**last, "input_pos": np.array([decoders.CONTEXT - 7])})
    assert caught.value.problems[0].what.startswith("8 tokens from position 57 on do not fit")


@pytest.mark.slow
def test_executorchs_own_runner_generates_the_same(lowered: Lowered, folder: Path) -> None:
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    prompt, count = "A list of words, longer than one call takes:", 12
    letters: list[str] = []
    runner = TextLLMRunner(str(folder / lowered.entry), str(folder / "tokenizer.json"))
    runner.generate(prompt, GenerationConfig(max_new_tokens=count, temperature=0.0, echo=False), letters.append)

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session: Any = executorch_runtime.open(folder / lowered.entry, lowered.signature)
    ids = tokenizer.encode(prompt).ids
    for at in range(0, len(ids), decoders.ONCE):
        part = {"tokens": np.array([ids[at : at + decoders.ONCE]]), "input_pos": np.array([at])}
        logits = session.call("forward", part)["logits"]
    new: list[int] = []
    while len(new) < count and decoders.EOS not in new:
        new.append(int(logits[0, -1].argmax()))
        step = {"tokens": np.array([new[-1:]]), "input_pos": np.array([len(ids) + len(new) - 1])}
        logits = session.call("forward", step)["logits"]
    assert "".join(letters) == tokenizer.decode(new)


@pytest.mark.slow
def test_executorchs_own_runner_stops_at_the_end_of_the_cache(
    lowered: Lowered, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    def told(length: int) -> tuple[int, str]:
        letters: list[str] = []
        runner = TextLLMRunner(str(folder / lowered.entry), str(folder / "tokenizer.json"))
        with pytest.raises(RuntimeError, match="Generation failed"):
            given = GenerationConfig(max_new_tokens=500, temperature=0.0, echo=False)
            runner.generate("a" * length, given, letters.append)
        return len(letters), capfd.readouterr().err

    count, log = told(decoders.CONTEXT - 4)
    assert count == 5  # four rows are left, and a token comes after the last
    assert "start_pos: 64 must be less than cache size at dim 1: 64" in log
    count, log = told(decoders.CONTEXT)
    assert count == 0
    assert "num_prompt_tokens 64 >= max_context_len 64, Prompt exceeds KV cache capacity" in log


def test_past_the_end_of_the_cache_is_an_error_in_words() -> None:
    refuse_past_the_end(64, np.zeros((1, 8)), np.array([56]))
    with pytest.raises(StageFailed) as caught:
        refuse_past_the_end(64, np.zeros((1, 8)), np.array([57]))
    (problem,) = caught.value.problems
    assert problem.what == "8 tokens from position 57 on do not fit the context of 64"
    assert problem.fix == "begin a new text, or build with a larger context"


def test_executorchs_runner_is_told_what_it_asks() -> None:
    inputs = (TensorSpec(name="tokens", shape=(1, "seq"), dtype="int64"),)
    method = MethodSignature(inputs=inputs, outputs=())
    told = Language(context=64, vocabulary=96, bos=None, stop=(2, 7))
    signature = Signature(methods={"forward": method}, dims={"seq": DimBounds(min=1, max=16)}, language=told)
    assert metadata(signature) == {
        "get_max_context_len": 64,
        "get_max_seq_len": 16,
        "get_vocab_size": 96,
        "get_eos_ids": [2, 7],
        "enable_dynamic_shape": True,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
    }
    assert metadata(replace(signature, language=replace(told, bos=1)))["get_bos_id"] == 1  # type: ignore[index]
    assert metadata(replace(signature, language=None)) is None
