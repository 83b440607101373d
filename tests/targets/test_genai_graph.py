"""Decoders written for onnxruntime-genai, held against transformers' float models: logits, caches, bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from numpy.typing import NDArray

from decoder_cases import TINY
from edgebake.errors import RecipeError
from edgebake.llm.shards import Shards
from edgebake.metrics import sqnr_db
from edgebake_targets._genai_graph import write_decoder

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.75}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied-biased": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"rope_parameters": LLAMA3},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "gemma": {"model_type": "gemma", "head_dim": 32},
    "gemma2": {"model_type": "gemma2", "head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 24},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"model_type": "phi3", "pad_token_id": 0},
    "phi3-window": {"model_type": "phi3", "pad_token_id": 0, "sliding_window": 24},
    "mistral-window": {"model_type": "mistral", "sliding_window": 24},
}
Floats = NDArray[np.float32]


class NoTensors(Shards):
    """Weights that are never asked for: what has no graph is refused before."""

    def __init__(self) -> None:
        """Without a folder."""


def checkpoint(folder: Path, more: dict[str, Any] | None = None) -> torch.nn.Module:
    """A transformers folder with random weights, biases and norms not left at their defaults, and its network."""
    raw = {**TINY, **(more or {})}
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    network.save_pretrained(folder)
    made: torch.nn.Module = network
    return made


def written(folder: Path, name: str = "made", **options: Any) -> list[str]:
    """The checkpoint in ``folder``/source as a folder beside it; its files."""
    (folder / name).mkdir()
    return write_decoder(folder / "source", Shards(folder / "source"), folder / name, **options)


def session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def called(run: onnxruntime.InferenceSession, tokens: NDArray[np.int64], past: dict[str, Floats]) -> dict[str, Floats]:
    """Logits and the grown cache of one call."""
    empty = {i.name: (1, i.shape[1], 0, i.shape[3]) for i in run.get_inputs() if i.name.startswith("past")}
    held = past or {name: np.zeros(shape, np.float32) for name, shape in empty.items()}
    total = next(iter(held.values())).shape[2] + tokens.shape[1]
    outputs = run.run(None, {"input_ids": tokens, "attention_mask": np.ones((1, total), np.int64), **held})
    return dict(zip((o.name for o in run.get_outputs()), outputs, strict=True))


def grown(found: dict[str, Floats]) -> dict[str, Floats]:
    return {name.replace("present", "past_key_values"): value for name, value in found.items() if name != "logits"}


def tokens_of(length: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, 2048, (1, length))


def float_logits(network: torch.nn.Module, tokens: NDArray[np.int64]) -> Floats:
    with torch.no_grad():
        logits: Floats = network(torch.from_numpy(tokens)).logits.numpy()
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_float_graph_computes_what_transformers_does(tmp_path: Path, variant: str) -> None:
    network = checkpoint(tmp_path / "source", VARIANTS[variant])
    written(tmp_path, context=128, scheme="fp32", embedding="fp32")
    tokens = tokens_of(100)
    run, expected = session(tmp_path / "made"), float_logits(network, tokens)
    assert sqnr_db(expected, called(run, tokens, {})["logits"]) > 100
    past: dict[str, Floats] = {}
    steps = []
    for part in (tokens[:, :60], *np.split(tokens[:, 60:], 40, axis=1)):
        found = called(run, part, past)
        past = grown(found)
        steps.append(found["logits"])
    assert sqnr_db(expected, np.concatenate(steps, axis=1)) > 100


def rounded(network: torch.nn.Module, round_rows: Callable[[str, Floats], Floats]) -> torch.nn.Module:
    """The network with each matrix replaced by what its rounded form stands for; tied ones once."""
    seen = set()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                parameter.copy_(torch.from_numpy(round_rows(name, parameter.numpy().copy())))
    return network


def as_stored(name: str, rows: Floats, scheme: str = "w4g32") -> Floats:
    """By the definition of the formats, not by the code under test: groups of 32 at -8..7, the widest at -127..127."""
    around = "embed" in name or "lm_head" in name
    if scheme == "fp16":
        return rows.astype(np.float16).astype(np.float32)
    if scheme.startswith("w4g32z") and not around:
        blocks = rows.reshape(rows.shape[0], -1, 32)
        least, step = blocks.min(-1, keepdims=True), np.ptp(blocks, axis=-1, keepdims=True) / 15
        made: Floats = (least + np.rint((blocks - least) / step) * step).reshape(rows.shape).astype(np.float32)
        return made
    widest = min(rows.shape[1] & -rows.shape[1], 256)
    block, lowest = (widest, 127) if around or scheme == "w8" else (32, 8)
    blocks = rows.reshape(rows.shape[0], -1, block)
    places = np.abs(blocks).argmax(-1)[..., None]
    peak = np.take_along_axis(blocks, places, -1)
    scale = np.abs(peak) / 127 if lowest == 127 else peak / -8
    q = np.clip(np.rint(blocks / scale), -lowest, 127 if lowest == 127 else 7)
    return (q * scale).reshape(rows.shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "least_db"),
    [("w4g32", 90.0), ("w4g32a8d", 25.0), ("w4g32z", 90.0), ("w4g32za8d", 25.0), ("w8", 90.0), ("fp16", 90.0)],
)
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_the_rounded_graph_computes_with_the_rounded_weights(
    tmp_path: Path, variant: str, scheme: str, least_db: float
) -> None:
    network = checkpoint(tmp_path / "source", VARIANTS[variant])
    written(tmp_path, context=64, scheme=scheme, embedding="fp16" if scheme == "fp16" else "w8")
    tokens = tokens_of(48)
    expected = float_logits(rounded(network, partial(as_stored, scheme=scheme)), tokens)
    assert sqnr_db(expected, called(session(tmp_path / "made"), tokens, {})["logits"]) > least_db


@pytest.mark.slow
def test_the_same_source_gives_the_same_bytes_and_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    checkpoint(tmp_path / "source")
    digests = []
    for name in ("first", "second"):
        files = written(tmp_path, name, context=64, scheme="w4g32")
        assert files == ["model.onnx", "model.onnx.data", "genai_config.json"]
        digests.append([hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]
    table = 2048 * 64 + 2048 * 4
    layers = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192) * (0.5 + 4 / 32)
    gaps = 4096 * 60
    assert table + layers < (tmp_path / "first/model.onnx.data").stat().st_size < table + layers + gaps


@pytest.mark.slow
def test_genai_config_says_how_to_run_it(tmp_path: Path) -> None:
    checkpoint(tmp_path / "source", {"eos_token_id": [2, 7]})
    written(tmp_path, context=64, scheme="w4g32")
    config = json.loads((tmp_path / "made/genai_config.json").read_text("utf-8"))
    assert config["model"]["context_length"] == config["search"]["max_length"] == 64
    assert (config["model"]["eos_token_id"], config["model"]["pad_token_id"]) == ([2, 7], 2)
    assert config["search"]["past_present_share_buffer"] is True
    inputs = {given.name for given in session(tmp_path / "made").get_inputs()}
    named = config["model"]["decoder"]["inputs"]
    assert {named["input_ids"], named["attention_mask"], named["past_key_names"] % 1} <= inputs


@pytest.mark.parametrize(
    ("more", "context", "what"),
    [
        ({"model_type": "phi"}, 64, "there is no onnxruntime-genai graph for 'phi' models"),
        ({"hidden_act": "relu"}, 64, "the activation 'relu' has no nodes here"),
        ({"model_type": "phi3", "rope_scaling": PARTIAL}, 64, "rotary embeddings of a part have no nodes here"),
        ({"rope_scaling": {"rope_type": "yarn"}}, 64, "rotary embeddings of the kind 'yarn' have no nodes here"),
        ({"num_hidden_layers": None}, 64, "config.json does not say num_hidden_layers"),
        ({}, 257, "the model knows 256 positions, the context is 257"),
    ],
)
def test_what_has_no_graph_is_refused(tmp_path: Path, more: dict[str, Any], context: int, what: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **more}))
    with pytest.raises(RecipeError) as error:
        write_decoder(tmp_path, NoTensors(), tmp_path, context=context, scheme="w4g32")
    assert error.value.problems[0].what == what
    assert error.value.problems[0].fix


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "embedding"), [("fp32", "fp32"), ("w4g32", "w8"), ("fp16", "fp16"), ("w4g32z", "w8"), ("w8", "w8")]
)
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_stock_onnxruntime_genai_generates_what_transformers_does(
    tmp_path: Path, variant: str, scheme: str, embedding: str
) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai")
    network = checkpoint(tmp_path / "source", VARIANTS[variant])
    written(tmp_path, context=128, scheme=scheme, embedding=embedding)
    network = network if scheme == "fp32" else rounded(network, partial(as_stored, scheme=scheme))
    prompt = tokens_of(20)
    model = genai.Model(str(tmp_path / "made"))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=80, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    sequence = np.array(generator.get_sequence(0), np.int64)
    greedy = float_logits(network, sequence[None])[0].argmax(-1)
    np.testing.assert_array_equal(sequence[:20], prompt[0])
    np.testing.assert_array_equal(sequence[20:], greedy[19 : len(sequence) - 1])
    assert len(sequence) == 80 or sequence[-1] == TINY["eos_token_id"]
