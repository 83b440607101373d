"""A decoder lowered for MLX: its operators, that it still computes what the network does, and what the runner asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

import decoders
from asking import defaults, lower_request
from edgebake.compress import quantize_weights
from edgebake.target import ModuleRequest
from edgebake.trace import trace
from edgebake.types import Assignment, Loaded, Lowered, Traced, canonical_module_name
from edgebake_targets import _executorch, _mlx, _mlx_llm, _mlx_weights
from edgebake_targets import executorch_mlx as target
from edgebake_targets.inspectors import pte

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
TOKENS = torch.randint(3, decoders.WORDS, (1, 40), generator=torch.Generator().manual_seed(1))
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": decoders.CONTEXT, "query_pre_attn_scalar": 50},
    "phi3": {"pad_token_id": 0},
}


@cache
def decoder(kind: str) -> tuple[Loaded, Traced]:
    loaded = decoders.loaded(decoders.save(Path(mkdtemp()), kind, **FAMILIES[kind]))
    return loaded, trace(loaded)


def read(call: Callable[..., Any], *ends: int) -> torch.Tensor:
    """Logits of TOKENS up to the last of ``ends``, read in parts that end there."""
    starts = (0, *ends[:-1])
    with torch.no_grad():
        return torch.cat([call(TOKENS[:, a:b], torch.tensor([a]))[0] for a, b in zip(starts, ends, strict=True)], 1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_with_its_operators_every_division_into_calls_says_what_the_float_model_says(kind: str) -> None:
    """torch computes MLX's operators as MLX's authors define them."""
    loaded, traced = decoder(kind)
    _mlx.prepare()
    found = _mlx_llm.with_own_operators(traced)
    want = read(loaded.methods["forward"], 16, 32)
    for ends in ((16, 32), (5, 6, 7, 20, 32), tuple(range(1, 33))):
        given = read(found.programs["forward"].module(check_guards=False), *ends)
        assert torch.allclose(given, want, atol=1e-4, rtol=1e-4)
    assert found.signature.methods["forward"].buffers == ()


def test_the_passes_that_run_before_the_backend_change_nothing_that_is_computed() -> None:
    loaded, traced = decoder("llama")
    _mlx.prepare()
    programs = _mlx_llm.with_own_operators(traced).programs
    program = programs["forward"].run_decompositions({})
    edge = _executorch.to_edge({"forward": program}, (), None, _mlx.passes())
    after = edge.exported_program("forward")
    assert any("rms_norm" in str(node.target) for node in after.graph.nodes)
    want = read(loaded.methods["forward"], 16, 32)
    assert torch.allclose(read(after.module(check_guards=False), 16, 32), want, atol=1e-4, rtol=1e-4)


def lower(kind: str, folder: Path) -> Lowered:
    return target.lower(decoder(kind)[1], lower_request(folder, defaults(target)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_all_of_a_decoder_is_one_part_with_mlxs_own_attention_norms_and_cache(kind: str, tmp_path: Path) -> None:
    lowered = lower(kind, tmp_path)
    assert (lowered.delegation.share, lowered.delegation.partitions) == (1.0, 1)
    operators = pte.inspect(tmp_path / lowered.entry).facts["delegate_operators"]
    layers = decoders.SIZES["num_hidden_layers"]
    assert (operators["sdpa"], operators["slice_update"]) == (layers, 2 * layers)
    assert operators["rms_norm"] > 2 * layers
    assert "mean" not in operators
    verdicts = target.structure(tmp_path / lowered.entry, lowered.signature, {})
    assert {verdict.state for verdict in verdicts} == {"pass"}
    assert _mlx_weights.refuse_changed(tmp_path / lowered.entry, decoder(kind)[1]) > 4 * layers


@pytest.mark.slow
def test_executorchs_own_runner_finds_what_it_asks_a_decoder(tmp_path: Path) -> None:
    lowered = lower("llama", tmp_path)
    constants = pte.inspect(tmp_path / lowered.entry).facts["constants"]
    assert constants["get_max_context_len"] == decoders.CONTEXT
    assert constants["get_max_seq_len"] == decoders.ONCE
    assert constants["use_kv_cache"] is True


@pytest.mark.slow
def test_four_bit_weights_stay_four_bits(tmp_path: Path) -> None:
    loaded = decoders.loaded(decoders.save(tmp_path))
    network = loaded.methods["forward"]
    layers = (n for n, m in network.named_modules() if type(m) is torch.nn.Linear and "lm_head" not in n)
    linear = [canonical_module_name(name) for name in layers]
    schemes, kinds = dict.fromkeys(linear, "w4g32"), dict.fromkeys(linear, "linear")
    assignment = Assignment(schemes=schemes, kinds=kinds)
    asked = ModuleRequest(module=network, assignment=assignment, options={}, run_calibration=lambda _: None)
    compressed = replace(loaded, methods={"forward": quantize_weights.apply(asked)})
    lowered = target.lower(trace(compressed), lower_request(tmp_path, defaults(target), assignment=assignment))
    packed = [w for w in pte.inspect(tmp_path / lowered.entry).weights if w.dtype == "int4"]
    assert len(packed) == len(schemes) == 14
    assert lowered.delegation.share == 1.0
