"""Decoders for Core ML: their graph rewritten, the two functions, and texts read through both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import decoders
from asking import defaults, lower_request
from edgebake.errors import EdgebakeError, RecipeError, StageFailed
from edgebake.trace import trace
from edgebake.types import Loaded, Traced
from edgebake_targets import _coreml_decoder, coreml
from edgebake_targets._coreml_decoder_graph import rewritten
from edgebake_targets._decoder_session import DecoderSession

TOKENS = torch.randint(3, decoders.WORDS, (1, 64), generator=torch.Generator().manual_seed(1))
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": decoders.CONTEXT, "query_pre_attn_scalar": 50},
    "phi3": {"pad_token_id": 0},
}


def asked(tmp_path: Path, **options: Any) -> Any:
    return lower_request(tmp_path, {**defaults(coreml), "minimum_os": "iOS18", **options})


@cache
def decoder(kind: str) -> tuple[Loaded, Traced]:
    folder = decoders.save(Path(mkdtemp()), kind, **{"num_hidden_layers": 1, **FAMILIES[kind]})
    loaded = decoders.loaded(folder)
    return loaded, trace(loaded)


def float_logits(kind: str) -> torch.Tensor:
    """Of all TOKENS, which fill the context, as the network itself reads them."""
    module = decoder(kind)[0].methods["forward"]
    with torch.no_grad():
        return torch.cat([module(TOKENS[:, a : a + 16], torch.tensor([a]))[0] for a in range(0, 64, 16)], 1)


def functions_of(traced: Traced, tmp_path: Path) -> Traced:
    (split,) = _coreml_decoder.split(traced, asked(tmp_path)).values()
    return split


class Programs:
    """A session of the functions, run by torch."""

    def __init__(self, traced: Traced) -> None:
        self.calls: list[str] = []
        self._methods = traced.signature.methods
        runnable = {name: program.module(check_guards=False) for name, program in traced.programs.items()}
        self._run: Mapping[str, Callable[..., Any]] = runnable
        first, *others = runnable.values()
        for name, buffer in first.named_buffers():  # functions of a package share their states
            owner, _, last = name.rpartition(".")
            for other in others:
                other.get_submodule(owner)._buffers[last] = buffer

    def begin(self) -> None: ...

    def call(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.calls.append(name)
        with torch.no_grad():
            (given,) = self._run[name](*(torch.from_numpy(inputs[spec.name]) for spec in self._methods[name].inputs))
        return {self._methods[name].outputs[0].name: given.numpy()}


def read(session: Any, *ends: int) -> NDArray[Any]:
    """Logits of TOKENS up to the last of ``ends``, read in parts that end there."""
    starts = (0, *ends[:-1])
    parts = [
        session.call("forward", {"tokens": TOKENS[:, a:b].numpy(), "input_pos": np.array([a])})["logits"]
        for a, b in zip(starts, ends, strict=True)
    ]
    return np.concatenate(parts, 1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_functions_compute_what_the_network_does(kind: str, tmp_path: Path) -> None:
    _, traced = decoder(kind)
    inner = Programs(functions_of(traced, tmp_path))
    session = DecoderSession(inner, traced.signature)
    ends = (7, 8, 9, 24, 40, 52, 64)
    assert np.allclose(read(session, *ends), float_logits(kind), atol=2e-4, rtol=1e-4)
    # Sixteen rows from 52 on would go past the end: decode reads the last twelve tokens.
    assert inner.calls == ["prefill", "decode", "decode", *["prefill"] * 3, *["decode"] * 12]


@pytest.mark.parametrize(("mib", "layers"), [(0.18, [[0], [1]]), (0.12, [[], [0], [1], []])])
def test_a_decoder_is_cut_between_layers(mib: float, layers: list[list[int]], tmp_path: Path) -> None:
    _, traced = decoder("llama")
    parts = _coreml_decoder.split(traced, asked(tmp_path, chunk_mib=mib))
    assert list(parts) == [f"part-{number}" for number in range(1, len(layers) + 1)]
    for part, expected in zip(parts.values(), layers, strict=True):
        for method in part.signature.methods.values():
            assert sorted({int(name.split(".")[2]) for name in method.buffers}) == expected
    session = DecoderSession(_coreml_decoder.Chain([*map(Programs, parts.values())]), traced.signature)
    assert np.allclose(read(session, 7, 8, 24, 40), float_logits("llama")[:, :40], atol=2e-4, rtol=1e-4)


def test_a_head_larger_than_a_package_may_be_is_said_so(tmp_path: Path) -> None:
    _, traced = decoder("llama")
    with pytest.raises(StageFailed) as caught:
        _coreml_decoder.split(traced, asked(tmp_path, chunk_mib=0.03))
    (problem,) = caught.value.problems
    assert problem.what == "layer 0 alone takes 0.1 MiB, and a package may take 0.03"
    assert problem.fix.startswith("options: {chunk_mib: 1}")


def test_the_record_tells_parts_as_they_were(tmp_path: Path) -> None:
    _, traced = decoder("llama")
    parts = _coreml_decoder.split(traced, asked(tmp_path, chunk_mib=0.12))
    facts = _coreml_decoder.facts_of_parts({name: part.signature for name, part in parts.items()})
    told = _coreml_decoder.parts_of(tmp_path / "part-1.mlpackage", traced.signature, facts)
    assert [path.name for path, _ in told] == [f"{name}.mlpackage" for name in parts]
    for (_, signature), part in zip(told, parts.values(), strict=True):
        for name, method in signature.methods.items():
            assert (method.inputs, method.outputs) == (
                part.signature.methods[name].inputs,
                part.signature.methods[name].outputs,
            )


def test_a_text_past_the_end_is_refused(tmp_path: Path) -> None:
    _, traced = decoder("llama")
    session = DecoderSession(Programs(functions_of(traced, tmp_path)), traced.signature)
    with pytest.raises(StageFailed, match="5 tokens from position 60 on do not fit the context of 64"):
        session.call("forward", {"tokens": np.zeros((1, 5), np.int64), "input_pos": np.array([60])})


def test_what_is_written_is_what_core_ml_has_operators_for() -> None:
    _, traced = decoder("llama")
    module = rewritten(traced.programs["forward"])
    names = {getattr(node.target, "__name__", str(node.target)) for node in module.graph.nodes}
    assert not {name for name in names if name.startswith(("cos", "sin", "rsqrt", "pow", "item", "_assert"))}
    tables = {name: buffer for name, buffer in module.named_buffers() if name.startswith("position_table")}
    assert [tuple(table.shape) for table in tables.values()] == [(1, 64, 16)] * 2
    assert {buffer.dtype for buffer in tables.values()} == {torch.float32}
    caches = {tuple(b.shape) for name, b in module.named_buffers() if name.endswith("_cache")}
    assert caches == {(1, 2, 64, 16)}  # heads before rows: nothing is turned around for attention


def test_positions_that_float16_does_not_tell_apart_have_rows_of_their_own(tmp_path: Path) -> None:
    folder = decoders.save(tmp_path, num_hidden_layers=1, max_position_embeddings=4096)
    given = decoders.component(folder)
    from edgebake.models import transformers as hugging_face
    from edgebake.models._request import LoadRequest
    from edgebake.recipe import Component

    component = Component.model_validate({**given, "model": {**given["model"], "context": 4096}})
    loaded = hugging_face.load(LoadRequest(model=component.model, component=component, base=folder))
    module = rewritten(trace(loaded).programs["forward"])
    cosines = next(table for name, table in module.named_buffers() if name == "position_table_0")
    assert torch.allclose(cosines[0, 4093, 0], torch.cos(torch.tensor(4093.0)), atol=1e-6)


def test_large_values_stay_in_the_range_of_float16() -> None:
    from edgebake_targets._coreml_decoder_graph import _normalised

    x = torch.tensor([[3000.0, -4000.0, 5.0, 0.0]])
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.allclose(_normalised(x, 1e-5), expected, rtol=1e-5)


def test_lower_refuses_what_needs_samples_of_each_function(tmp_path: Path) -> None:
    _, traced = decoder("llama")
    with pytest.raises(RecipeError) as caught:
        _coreml_decoder.split(traced, asked(tmp_path, correct_biases=True))
    assert "correct_biases is not there for language models yet" in caught.value.problems[0].what


def test_before_ios_18_there_are_no_states(tmp_path: Path) -> None:
    _, traced = decoder("llama")
    with pytest.raises(EdgebakeError, match="which packages have since iOS 18"):
        coreml.lower(traced, asked(tmp_path, minimum_os="iOS17"))
