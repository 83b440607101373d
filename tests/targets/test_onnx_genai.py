"""The target onnx-genai: what it refuses, what it writes of a loaded network, and that its runner computes the same."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import decoders
from asking import defaults, lower_request
from edgebake.compress import gptq
from edgebake.errors import ArtifactDamaged, EdgebakeError, Problem, RecipeError, StageFailed
from edgebake.llm.shards import Shards
from edgebake.metrics import sqnr_db
from edgebake.target import Asked, Missing, ModuleRequest, runners_of
from edgebake.trace import trace
from edgebake.types import Assignment, Language, Loaded, Lowered, ModuleKind, Signature, Streamed, TensorSpec, Traced
from edgebake_targets import onnx_genai
from edgebake_targets._genai_graph import _known
from edgebake_targets._genai_state import NotedTensors, StateTensors, tied
from edgebake_targets._onnx_graph import attribute
from edgebake_targets.inspectors import onnx as inspector
from edgebake_targets.runners import onnxruntime_decoder

TOKENS = torch.randint(3, decoders.WORDS, (1, 40), generator=torch.Generator().manual_seed(1))
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def only(error: pytest.ExceptionInfo[Any]) -> Problem:
    (problem,) = error.value.problems
    made: Problem = problem
    return made


# --- what is refused ------------------------------------------------------------------------------------------------


def asked(*names: str) -> Asked:
    inputs = tuple(TensorSpec(name=name, shape=(1, "seq"), dtype="int64") for name in names)
    given = {"forward": inputs} if inputs else {}
    return Asked(
        scheme="w4g32", module_schemes=(), options={}, device=None, inputs=given, varying=("seq",), channels=None
    )


def test_a_network_that_keeps_no_cache_is_refused_before_it_is_loaded() -> None:
    (refusal,) = onnx_genai.refusals(asked("input_ids", "attention_mask"))
    assert refusal.what == "onnx-genai writes decoders that generate text with a key/value cache, and nothing else"
    assert refusal.fix.startswith(
        "give model: {task: text-generation, context: 2048}, with inputs tokens and input_pos"
    )
    assert not list(onnx_genai.refusals(asked("tokens", "input_pos")))
    assert not list(onnx_genai.refusals(asked()))  # the model tells them


def test_such_a_network_is_refused_where_only_loading_shows_it(tmp_path: Path) -> None:
    traced = Traced(programs={}, signature=Signature(methods={}))
    with pytest.raises(StageFailed) as error:
        onnx_genai.lower(traced, lower_request(tmp_path, {}))
    assert only(error).what.startswith("onnx-genai writes decoders")


@pytest.mark.parametrize(
    ("scheme", "columns", "what", "fix"),
    [
        ("w4", 64, "MatMulNBits has no w4", "use fp32, w4g32, w4g32a8d or w8a8d"),
        ("w8a8", 64, "MatMulNBits has no w8a8", "use fp32, w4g32, w4g32a8d or w8a8d"),
        ("w8g32z", 64, "MatMulNBits has no w8g32z", "use fp32, w4g32, w4g32a8d or w8a8d"),
        (
            "w4g128",
            576,
            "w4g128 needs an input width that is a multiple of 128; module 'up' has 576",
            'compress: {modules: {"up": fp32}}, or a scheme with smaller groups',
        ),
        (
            "w8a8d",
            24,
            "no group of 16 or more, a power of two, divides the 24 inputs of 'up'",
            'compress: {modules: {"up": fp32}}',
        ),
    ],
)
def test_what_matmulnbits_cannot_hold_is_refused(scheme: str, columns: int, what: str, fix: str) -> None:
    with pytest.raises(RecipeError) as error:
        _known("up", scheme, columns)
    assert (only(error).what, only(error).fix) == (what, fix)


def test_a_weight_without_a_place_in_the_graph_is_refused() -> None:
    held = {"wrapped.a.weight": torch.zeros(2, 2), "wrapped.more.bias": torch.zeros(2)}
    tensors = NotedTensors(StateTensors(held))
    assert tensors.shape("a.weight") == (2, 2)
    np.testing.assert_array_equal(next(tensors.rows("a.weight")), np.zeros((2, 2)))
    with pytest.raises(StageFailed) as error:
        tensors.refuse_unread(tied=False)
    assert only(error).what == "the graph for onnxruntime-genai has no place for more.bias"
    assert only(error).fix.startswith("use executorch-xnnpack")


def test_a_weight_that_the_network_lacks_is_named() -> None:
    with pytest.raises(RecipeError) as error:
        StateTensors({}).whole("model.norm.weight")
    assert only(error).what == "the network has no tensor 'model.norm.weight', which config.json makes the graph want"


def test_a_head_is_tied_while_it_holds_what_the_embedding_holds() -> None:
    table = torch.randn(4, 4)
    names = [f"wrapped.{name}.weight" for name in (EMBEDDING, HEAD)]
    assert tied(StateTensors(dict(zip(names, (table, table), strict=True))))
    assert tied(StateTensors(dict(zip(names, (table, table.clone()), strict=True))))
    assert tied(StateTensors({names[0]: table}))
    assert not tied(StateTensors({names[0]: table}), without_head=False)
    assert not tied(StateTensors(dict(zip(names, (table, table + 1), strict=True))))


def test_the_runner_is_found_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(name, runner.KIND) for name, runner in runners_of("onnx-genai")] == [("onnxruntime-decoder", "executed")]
    assert onnx_genai.missing() is None
    monkeypatch.setattr(onnx_genai, "find_spec", lambda _name: None)
    assert onnx_genai.missing() == Missing(reason="not installed: onnx", remedy="pip install onnx")


def test_a_file_that_is_absent_or_damaged_is_said_so(tmp_path: Path) -> None:
    told = Signature(methods={}, language=Language(context=64, vocabulary=96, bos=None, stop=(2,)))
    path = tmp_path / "model.onnx"
    with pytest.raises(ArtifactDamaged) as error:
        onnxruntime_decoder.open(path, told)
    assert (only(error).what, only(error).fix) == ("the artifact's file is not there", "build it again")
    path.write_bytes(b"no graph")
    with pytest.raises(ArtifactDamaged) as error:
        onnxruntime_decoder.open(path, told)
    assert only(error).what.startswith("ONNX Runtime cannot load the file")


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return decoders.loaded(folder)


Lower = Callable[..., Lowered]


@pytest.fixture(scope="module")
def lower(loaded: Loaded, folder: Path) -> Lower:
    """``lower(into, **schemes of modules)``, the network traced once."""
    traced = trace(loaded)
    kinds: dict[str, ModuleKind] = {EMBEDDING: "embedding", HEAD: "linear"}

    def made(into: Path, schemes: dict[str, str]) -> Lowered:
        into.mkdir()
        assignment = Assignment(schemes=schemes, kinds=kinds | dict.fromkeys(schemes.keys() - kinds, "linear"))
        request = lower_request(into, defaults(onnx_genai), scheme="w4g32", assignment=assignment)
        return onnx_genai.lower(traced, replace(request, beside=folder))

    return made


def in_parts(session: Any, *ends: int) -> Any:
    calls = [
        session.call("forward", {"tokens": TOKENS[:, a:b].numpy(), "input_pos": np.array([a])})["logits"]
        for a, b in zip((0, *ends[:-1]), ends, strict=True)
    ]
    return np.concatenate(calls, 1)


@pytest.mark.slow
def test_every_division_into_calls_says_what_the_float_model_says(loaded: Loaded, lower: Lower, tmp_path: Path) -> None:
    lowered = lower(tmp_path / "made", {})
    module = loaded.methods["forward"]
    with torch.no_grad():
        want = torch.cat([module(TOKENS[:, a : a + 16], torch.tensor([a]))[0] for a in (0, 16)], 1).numpy()
    session = onnxruntime_decoder.open(tmp_path / "made" / lowered.entry, lowered.signature)
    for ends in ((16, 32), (5, 6, 7, 20, 32), tuple(range(1, 33))):  # the caches hold another text before
        assert sqnr_db(want, in_parts(session, *ends)) > 100
    session.begin()
    assert sqnr_db(want, in_parts(session, 32)) > 100
    assert lowered.signature.methods["forward"].buffers == ()
    assert lowered.encodings["float_modules"] == [HEAD, EMBEDDING]
    assert lowered.encodings["runtime"]["name"] == "onnxruntime-genai"
    assert version("onnxruntime-genai").startswith(lowered.encodings["runtime"]["written_for"])


@pytest.mark.slow
def test_the_last_row_of_the_cache_is_the_last(lower: Lower, tmp_path: Path) -> None:
    lowered = lower(tmp_path / "made", {})
    session = onnxruntime_decoder.open(tmp_path / "made" / lowered.entry, lowered.signature)
    last = {"tokens": TOKENS[:, :8].numpy(), "input_pos": np.array([decoders.CONTEXT - 8])}
    assert np.isfinite(session.call("forward", last)["logits"]).all()
    with pytest.raises(StageFailed) as error:
        session.call("forward", {**last, "input_pos": np.array([decoders.CONTEXT - 7])})
    assert only(error).what.startswith("8 tokens from position 57 on do not fit")


@pytest.mark.slow
def test_each_module_is_stored_in_its_own_scheme(lower: Lower, tmp_path: Path) -> None:
    first, second = (f"model.layers.{n}.mlp.up_proj" for n in (0, 1))
    rules = {EMBEDDING: "w8", HEAD: "w8a8d", first: "w4g32", second: "w4g64a8d"}
    lowered = lower(tmp_path / "made", rules)
    found = inspector.inspect(tmp_path / "made" / lowered.entry)
    by_name = {record.name: record for record in found.weights}
    assert by_name[f"{first}.weight.w4g32"].dtype == by_name[f"{second}.weight.w4g64"].dtype == "int4"
    table = by_name[f"{EMBEDDING}.weight.w8g64"]
    assert (table.shape, table.dtype) == ((decoders.WORDS, 64), "int8")  # one copy, which the head reads
    assert not any("lm_head" in name for name in by_name)
    assert found.operators["com.microsoft.MatMulNBits"] == 3
    (work,) = lowered.delegation.units
    layers = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    attention = 2 * 2 * 4 * 16 * decoders.CONTEXT
    assert work.macs == decoders.ONCE * (layers + decoders.WORDS * 64 + attention)
    graph = onnx.load_model(tmp_path / "made" / lowered.entry, load_external_data=False).graph
    levels = {node.name: attribute(node, "accuracy_level", 0) for node in graph.node if node.op_type == "MatMulNBits"}
    assert levels == {first: 1, second: 4, "logits": 4}  # 4: activations are rounded to int8
    session = onnxruntime_decoder.open(tmp_path / "made" / lowered.entry, lowered.signature)
    assert np.isfinite(in_parts(session, 16, 17)).all()


@pytest.mark.slow
def test_the_same_network_gives_the_same_bytes(lower: Lower, tmp_path: Path) -> None:
    digests = []
    for name in ("first", "second"):
        lowered = lower(tmp_path / name, {EMBEDDING: "w8"})
        digests.append([hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest() for file in lowered.files])
    assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.parametrize("rules", [{}, {EMBEDDING: "w8", HEAD: "w8a8d"}])
def test_weights_read_from_files_give_what_the_traced_network_gives(
    lower: Lower, loaded: Loaded, folder: Path, tmp_path: Path, rules: dict[str, str]
) -> None:
    lowered = lower(tmp_path / "traced", rules)
    (tmp_path / "streamed").mkdir()
    kinds: dict[str, ModuleKind] = {EMBEDDING: "embedding", HEAD: "linear"}
    request = lower_request(
        tmp_path / "streamed", defaults(onnx_genai), assignment=Assignment(schemes=rules, kinds=kinds)
    )
    read = Streamed(tensors=Shards(folder), signature=loaded.signature)
    assert onnx_genai.stream(read, replace(request, beside=folder)) == lowered
    for file in lowered.files:
        assert (tmp_path / "streamed" / file).read_bytes() == (tmp_path / "traced" / file).read_bytes()


def test_a_checkpoint_that_says_less_or_more_than_its_configuration_is_refused(
    loaded: Loaded, folder: Path, tmp_path: Path
) -> None:
    weights = load_file(folder / "model.safetensors")
    (tmp_path / "source").mkdir()
    shutil.copyfile(folder / "config.json", tmp_path / "source" / "config.json")
    request = replace(lower_request(tmp_path, defaults(onnx_genai)), beside=folder)

    def refused(held: dict[str, torch.Tensor]) -> Problem:
        save_file(held, tmp_path / "source" / "model.safetensors")
        with pytest.raises(EdgebakeError) as error:
            onnx_genai.stream(Streamed(tensors=Shards(tmp_path / "source"), signature=loaded.signature), request)
        return only(error)

    more = refused({**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    assert "has no place for model.layers.0.self_attn.q_proj.bias" in more.what
    less = refused({name: weight for name, weight in weights.items() if name != "model.norm.weight"})
    assert less.what == "the checkpoint has no tensor 'model.norm.weight'"


@pytest.mark.slow
def test_a_folder_without_its_weights_is_said_so(lower: Lower, tmp_path: Path) -> None:
    lowered = lower(tmp_path / "made", {})
    apart = tmp_path / "apart"
    apart.mkdir()
    shutil.copyfile(tmp_path / "made" / lowered.entry, apart / lowered.entry)
    with pytest.raises(ArtifactDamaged) as error:
        onnxruntime_decoder.open(apart / lowered.entry, lowered.signature)
    assert "model.onnx.data" in only(error).what


@pytest.mark.slow
def test_a_half_table_is_stored_once_where_the_head_is_half_too(lower: Lower, loaded: Loaded, tmp_path: Path) -> None:
    up = "model.layers.0.mlp.up_proj"
    lowered = lower(tmp_path / "made", dict.fromkeys((EMBEDDING, HEAD, up), "fp16"))
    found = {record.name: record for record in inspector.inspect(tmp_path / "made" / lowered.entry).weights}
    assert found[f"{EMBEDDING}.weight.half"].dtype == found[f"{up}.weight.T.half"].dtype == "float16"
    assert [name for name in found if EMBEDDING in name or HEAD in name] == [f"{EMBEDDING}.weight.half"]
    session = onnxruntime_decoder.open(tmp_path / "made" / lowered.entry, lowered.signature)
    with torch.no_grad():
        want = loaded.methods["forward"](TOKENS[:, :16], torch.tensor([0]))[0].numpy()
    assert 45 < sqnr_db(want, in_parts(session, 16)) < 90


@pytest.mark.slow
def test_offsets_of_groups_count_as_scales(lower: Lower, tmp_path: Path) -> None:
    up = "model.layers.0.mlp.up_proj"
    lowered = lower(tmp_path / "made", {up: "w4g32z"})
    found = {record.name: record for record in inspector.inspect(tmp_path / "made" / lowered.entry).weights}
    record = found[f"{up}.weight.w4g32z"]
    assert (record.shape, record.dtype, record.bytes) == ((96, 64), "int4", 96 * 32)
    assert record.scale_bytes == 96 * 2 * (4 + 4)
    assert not any(name.endswith((".scale", ".offset")) for name in found)


@pytest.mark.slow
def test_integers_that_gptq_chose_are_those_of_the_artifact(folder: Path, tmp_path: Path) -> None:
    loaded = decoders.loaded(folder)
    module = loaded.methods["forward"]
    up = "model.layers.0.mlp.up_proj"
    before = dict(module.named_modules())[f"wrapped.{up}"].weight.clone()  # type: ignore[operator]
    assignment = Assignment(schemes={up: "w4g32"}, kinds={up: "linear"})
    request = ModuleRequest(
        module=module,
        assignment=assignment,
        options={},
        run_calibration=lambda network: network(TOKENS[:, :16], torch.tensor([0])),
    )
    weight = dict(gptq.apply(request).named_modules())[f"wrapped.{up}"].weight
    request_ = lower_request(tmp_path, defaults(onnx_genai), scheme="w4g32", assignment=assignment)
    lowered = onnx_genai.lower(trace(loaded), replace(request_, beside=folder))
    model = onnx.load_model(tmp_path / lowered.entry)
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    packed, scale = stored[f"{up}.weight.w4g32"], stored[f"{up}.weight.w4g32.scale"]
    q = np.stack([packed & 15, packed >> 4], -1).reshape(96, 2, 32).astype(np.float32) - 8
    np.testing.assert_array_equal((q * scale[..., None]).reshape(96, 64), weight.numpy())  # type: ignore[operator]
    assert not torch.equal(before, weight)  # type: ignore[arg-type]
