"""Buffers that a network writes to, on every target: kept and begun again, or refused with what to do."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import baking
from asking import defaults, lower_request
from coreml_cases import Wrapper, spec, traced_of
from edgebake.errors import EXIT_STAGE, StageFailed
from edgebake.trace import trace
from edgebake.types import Loaded, MethodSignature, Signature, Traced
from edgebake_targets import executorch_xnnpack, onnx_cpu
from edgebake_targets.runners import executorch_runtime

# ExecuTorch tells everybody that it keeps no start of such buffers; the target refuses those that need one.
pytestmark = pytest.mark.filterwarnings("ignore:Mutation on a buffer in the model is detected:UserWarning")
APPLE = ("coreml", "executorch-coreml")
ONES = {"x": np.ones((1, 4), np.float32)}


class Memory(nn.Module):
    """A running sum."""

    seen: torch.Tensor

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("seen", torch.full((1, 4), start))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 4)."""
        self.seen.add_(self.linear(x))
        return self.seen * 2


def traced(start: float = 0.0) -> Traced:
    torch.manual_seed(0)
    return traced_of(Memory(start).eval(), [spec("x", 1, 4)], [spec("y", 1, 4)])


def test_executorch_keeps_buffers_and_begins_again(tmp_path: Path) -> None:
    lowered = executorch_xnnpack.lower(traced(), lower_request(tmp_path, defaults(executorch_xnnpack)))
    session: Any = executorch_runtime.open(tmp_path / lowered.entry, lowered.signature)
    first, second = (session.call("forward", ONES)["y"] for _ in range(2))
    assert np.allclose(second, 2 * first)
    session.begin()
    assert np.array_equal(session.call("forward", ONES)["y"], first)


class Peek(nn.Module):
    """Reads the running sum of another method."""

    seen: torch.Tensor

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.register_buffer("seen", memory.seen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 4)."""
        return self.seen + x


def test_executorch_refuses_a_buffer_that_methods_share(tmp_path: Path) -> None:
    memory = Memory().eval()
    method = MethodSignature(inputs=(spec("x", 1, 4),), outputs=(spec("y", 1, 4),))
    networks = {"step": Wrapper(memory).eval(), "peek": Wrapper(Peek(memory)).eval()}
    signature = Signature(methods=dict.fromkeys(networks, method))
    both = trace(Loaded(methods=networks, signature=signature, facts={}))
    with pytest.raises(StageFailed) as caught:
        executorch_xnnpack.lower(both, lower_request(tmp_path, defaults(executorch_xnnpack)))
    (problem,) = caught.value.problems
    assert problem.what == "step and peek share the buffer seen, and ExecuTorch gives each method one of its own"
    assert "role: state" in problem.fix


def test_executorch_refuses_a_buffer_that_starts_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(StageFailed) as caught:
        executorch_xnnpack.lower(traced(1.0), lower_request(tmp_path, defaults(executorch_xnnpack)))
    (problem,) = caught.value.problems
    assert problem.what.startswith("the buffer seen does not start at zero, and ExecuTorch keeps no start")
    assert problem.fix == "let it start at zeros and add what it starts at where it is read"


def test_onnx_refuses_what_it_would_forget(tmp_path: Path) -> None:
    with pytest.raises(StageFailed) as caught:
        onnx_cpu.lower(traced(), lower_request(tmp_path, defaults(onnx_cpu)))
    (problem,) = caught.value.problems
    assert problem.what == "the network writes to its buffer seen, and an ONNX model keeps nothing between calls"
    assert problem.fix == "pass it as an input with role state and return its new value"


NETWORK = """
    import numpy as np
    import torch
    from torch import nn
    from edgebake.types import Call, Sample

    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("rows", torch.zeros(1, 6, 8))
            self.register_buffer("seen", torch.zeros(1, 8))
            self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x, position):
            here = (torch.arange(6) == position)[None, :, None]
            self.rows.copy_(torch.where(here, self.key(x)[:, None], self.rows))
            self.seen.add_(x)
            mask = torch.where(torch.arange(6) <= position, 0.0, -1e4)[None, :, None]
            weights = torch.softmax(self.rows @ x[..., None] + mask, 1)
            return self.out((weights * self.rows).sum(1)) + self.seen[:, :4]

    def build():
        return Cache()

    def samples(request):
        found = []
        for index in range(request.count):
            random = np.random.default_rng(index)
            xs = random.standard_normal((6, 1, 8)).astype(np.float32)
            calls = tuple(Call(inputs={"x": x, "position": np.array([n], np.int32)}) for n, x in enumerate(xs))
            found.append(Sample(calls=calls, source=str(index)))
        return found
"""


@pytest.mark.slow
def test_a_network_with_a_cache_in_buffers_is_built_and_judged(tmp_path: Path) -> None:
    kitchen = baking.kitchen(
        tmp_path,
        [{"target": "coreml", "scheme": "fp16", "options": {"minimum_os": "iOS18"}}, "executorch-xnnpack", "onnx-cpu"],
        model={"source": "python", "path": "cache_net:build"},
        inputs={"x": {"shape": [1, 8]}, "position": {"shape": [1], "dtype": "int32"}},
        samples={"evaluation": {"python": "cache_net:samples", "count": 4}},
        limits={"parity": {"sqnr_db": 40}},
    )
    (kitchen.recipe.parent / "cache_net.py").write_text(textwrap.dedent(NETWORK))
    done = kitchen.build()
    assert done.code == EXIT_STAGE, done.err  # onnx-cpu
    by_target = {result["target"]: result for result in done.results}
    for target, calls in (("coreml", 24), ("executorch-xnnpack", 24)):
        assert [v["state"] for v in by_target[target]["verdicts"] if v["limit"].startswith("parity")] == ["pass"]
        assert by_target[target]["measurements"]["samples"]["calls"] == calls
    assert "an ONNX model keeps nothing between calls" in str(by_target["onnx-cpu"]["failure"])


LLAMA = """
    import numpy as np
    from torch import nn
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache
    from edgebake.types import Call, Sample

    LENGTH, WORDS = 32, 96

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            config = LlamaConfig(
                vocab_size=WORDS,
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=LENGTH,
                attn_implementation="eager",
            )
            network = LlamaForCausalLM(config)
            network.generation_config = GenerationConfig(use_cache=True, cache_implementation="static")
            self.cached = TorchExportableModuleWithStaticCache(network, batch_size=1, max_cache_len=LENGTH)

        def forward(self, token, position):
            return self.cached(input_ids=token, cache_position=position)

    def build():
        return Decoder()

    def samples(request):
        found = []
        for index in range(request.count):
            tokens = np.random.default_rng(index).integers(0, WORDS, (24, 1, 1))
            calls = tuple(Call(inputs={"token": t, "position": np.array([n])}) for n, t in enumerate(tokens))
            found.append(Sample(calls=calls, source=str(index)))
        return found
"""


@pytest.mark.slow
def test_a_llama_with_the_cache_of_transformers_decodes_on_core_ml(tmp_path: Path) -> None:
    """24 calls each from a zero state: its keys and values are states, of the package and of the part in the .pte."""
    kitchen = baking.kitchen(
        tmp_path,
        [{"target": name, "scheme": "fp16", "options": {"minimum_os": "iOS18"}} for name in APPLE],
        model={"source": "python", "path": "llama_net:build"},
        inputs={"token": {"shape": [1, 1], "dtype": "int64"}, "position": {"shape": [1], "dtype": "int64"}},
        samples={"evaluation": {"python": "llama_net:samples", "count": 2}},
        limits={"parity": {"sqnr_db": 55}},
    )
    (kitchen.recipe.parent / "llama_net.py").write_text(textwrap.dedent(LLAMA))
    done = kitchen.build("--strict")
    assert done.code == 0, done.err
    for result in done.results:
        assert result["measurements"]["samples"]["calls"] == 48
        assert [v["state"] for v in result["verdicts"] if v["limit"].startswith("parity")] == ["pass"]
        kept = json.loads((Path(result["folder"]) / "manifest.json").read_text())["encodings"]["states"]
        (named,) = kept.values()
        assert sorted(named.values()) == [
            f"cached.{what}_cache_{layer}" for what in ("key", "value") for layer in range(2)
        ]
