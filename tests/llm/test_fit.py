"""`edgebake plan` of language models: what fits where, and builds that this machine cannot hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import baking
from decoder_cases import TINY, Written
from edgebake import devices
from edgebake.errors import EXIT_STAGE
from edgebake.llm import fit
from edgebake.llm.fit_memory import GIB, MIB
from edgebake.recipe_yaml import read
from edgebake.units import Unit, units_of

RECIPES = Path(__file__).resolve().parents[2] / "recipes/llm"


def units(path: Path) -> tuple[Unit, ...]:
    file = read(str(path), ())
    return units_of(file.recipe, file.base)


def published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((RECIPES / "configs" / name / "config.json").read_text("utf-8"))
    return config


def test_the_document_adds_up(decoder_recipe: Written) -> None:
    (unit,) = units(decoder_recipe([{"target": "onnx-cpu", "scheme": "w8"}]))
    found = fit.document(unit, [devices.find("m4-max")])
    assert found["size"]["bytes"] == found["size"]["program"] + sum(
        part["bytes"] for part in found["size"]["parts"].values()
    )
    assert found["size"]["parts"]["mlp"]["values"] == 2 * 3 * 64 * 192
    assert found["size"]["parts"]["mlp"]["scales"] == 2 * (192 + 192 + 64) * 4
    assert found["size"]["parts"]["head"]["bytes"] == 0  # the embedding's own copy
    assert found["kv_cache"] == {
        "dtype": "float32",
        "bytes_per_token": 2 * 2 * 2 * 16 * 4,
        "bytes_by_context": {"64": 64 * 2 * 2 * 2 * 16 * 4},
    }
    memory = found["device_memory"]
    assert memory["bytes"] == sum(memory[part] for part in ("weights", "cache", "activations", "runtime"))
    (judged,) = found["devices"]
    assert (judged["verdict"], judged["kind"], found["kind"]) == ("fits", "predicted", "predicted")
    assert judged["decode_tokens_s"]["full"] < judged["decode_tokens_s"]["empty"]


def test_an_int8_cache_takes_a_third(decoder_recipe: Written) -> None:
    model = {"source": "transformers", "path": "decoder", "task": "text-generation", "context": 64}
    target = {"target": "executorch-xnnpack", "options": {"cache": "int8"}}
    whole, small = (
        fit.document(u, [])
        for u in units(decoder_recipe(["executorch-xnnpack", {**target, "name": "int8"}], model=model))
    )
    assert whole["kv_cache"]["bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert (small["kv_cache"]["dtype"], small["kv_cache"]["bytes_per_token"]) == ("int8", 2 * 2 * 2 * (16 + 5))
    saved = whole["device_memory"]["cache"] - small["device_memory"]["cache"]
    assert saved == whole["device_memory"]["bytes"] - small["device_memory"]["bytes"] == 64 * 2 * 2 * 2 * (3 * 16 - 5)


def test_rules_of_the_recipe_count(decoder_recipe: Written) -> None:
    rules = {"modules": {"*embed_tokens": "w8", "*.mlp.*": "fp32"}}
    (unit,) = units(decoder_recipe([{"target": "executorch-xnnpack", "scheme": "w4g32a8d", "compress": rules}]))
    parts = fit.document(unit, [])["size"]["parts"]
    assert parts["embedding"]["bytes"] == 2048 * 64 + 2048 * 4
    assert parts["mlp"]["bytes"] == 2 * 3 * 64 * 192 * 4
    assert parts["head"]["bytes"] == 2048 * 64 // 2 + 2048 * 2 * 2


def test_a_head_in_groups_is_the_embeddings_copy_for_core_ml(decoder_recipe: Written) -> None:
    (unit,) = units(decoder_recipe([{"target": "coreml", "scheme": "w4g32", "options": {"minimum_os": "iOS18"}}]))
    found = fit.document(unit, [])
    assert found["size"]["parts"]["embedding"]["bytes"] == 2048 * 64 // 2 + 2048 * 2 * 2
    assert found["size"]["parts"]["head"]["bytes"] == 0
    assert found["kv_cache"]["dtype"] == "float16"


@pytest.mark.parametrize(
    ("name", "device", "scheme", "verdict", "would"),
    [
        ("llama-3.2-1b", "sm8650", "w4g32", "fits", ()),
        ("llama-3.2-3b", "tensor-g3", "fp32", "does not fit", ("scheme w8 with context",)),
        ("qwq-32b", "m2", "w4g32", "does not fit", ("serve it from a server with",)),
        ("qwq-32b", "m4-max", "w4g32", "fits", ()),
        ("qwq-32b", "m3-pro", "w4g32", "fits with less context", ("context",)),
    ],
)
def test_devices_are_judged(
    decoder_recipe: Written, name: str, device: str, scheme: str, verdict: str, would: tuple[str, ...]
) -> None:
    rule = {"target": "onnx-cpu", "scheme": scheme, "device": device}
    (unit,) = units(decoder_recipe([rule], published(name), dims={"seq": {"min": 1, "max": 8192}}))
    predicted = fit.predict(unit)
    judged = fit.judge(unit, predicted, devices.find(device))
    assert (judged.verdict, judged.why) == (verdict, "")
    assert [re.sub(r" [\d.]+( GiB free)?$", "", said) for said in judged.would] == list(would)
    assert judged.context is not None
    assert judged.usable_bytes is not None
    assert (judged.context >= predicted.context) == (verdict == "fits")
    assert (predicted.memory.total <= judged.usable_bytes) == (verdict == "fits")


def test_a_device_whose_memory_nobody_publishes(decoder_recipe: Written) -> None:
    (unit,) = units(decoder_recipe([{"target": "onnx-cpu", "device": "a18"}]))
    judged = fit.judge(unit, fit.predict(unit), devices.find("a18"))
    assert (judged.verdict, judged.why) == ("unknown", "Apple does not publish how much memory its phones have")


def test_a_mac_of_24_gib_holds_qwq_with_8192_tokens() -> None:
    for unit in units(RECIPES / "qwq-32b.yaml"):
        predicted = fit.predict(unit)
        assert (predicted.context, predicted.prompt) == (8192, 128)
        assert predicted.memory.total < 24 * GIB
        assert predicted.memory.cache == 2 * 64 * 8 * 128 * 8192 * 4


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.2-3b", "qwen3-0.6b", "qwq-32b"])
def test_the_random_variant_of_a_recipe_has_its_size(name: str) -> None:
    pairs = list(zip(*(units(RECIPES / f"{name}{suffix}.yaml") for suffix in ("", "-random")), strict=True))
    assert [hub.target for hub, _ in pairs] == ["executorch-xnnpack", "onnx-genai"]
    for hub, random in pairs:
        assert fit.predict(hub).size == fit.predict(random).size
        assert (random.spec.model.weights, random.device) == ("random", hub.device)


def test_what_is_lowered_from_its_files_takes_the_same_memory_at_any_size() -> None:
    peaks = {}
    for name in ("llama-3.2-1b", "qwq-32b"):
        loaded, streamed = (fit.predict(unit) for unit in units(RECIPES / f"{name}-random.yaml"))
        peaks[name] = streamed.export_peak_bytes
        assert (loaded.streamed, loaded.mapped, streamed.streamed) == (False, True, True)
        assert loaded.export_peak_bytes > 8 * peaks[name]
    assert len(set(peaks.values())) == 1


def test_what_does_not_fit_beside_a_streamed_build_is_not_run_and_said_so() -> None:
    _, unit = units(RECIPES / "llama-3.2-1b-random.yaml")
    plenty, some, little = (fit.within_memory(unit, mib) for mib in (16_000, 6000, 1000))
    assert (plenty.without_float, plenty.without_run) == ("", "")
    assert re.fullmatch(
        r"running the float model takes \d\.\d\d GiB of memory \(predicted\), and --memory allows 5\.86 GiB",
        some.without_float,
    )
    assert some.without_run == ""
    assert little.without_run.startswith("running the artifact takes ")
    assert little.without_run.endswith("(predicted), and --memory allows 0.98 GiB")
    assert fit.refusal(unit, 1000) is None
    traced, _ = units(RECIPES / "llama-3.2-1b-random.yaml")
    assert fit.within_memory(traced, 1000) is traced


def test_a_gguf_file_is_predicted_from_its_header() -> None:
    found = [(unit.target, fit.predict(unit).size.total) for unit in units(RECIPES / "smollm2-135m.yaml")]
    for target in {target for target, _ in found}:
        sizes = [size for name, size in found if name == target]
        assert sizes == sorted(sizes, reverse=True)
    largest = {target: max(size for name, size in found if name == target) for target, _ in found}
    copied = 4 * (134_515_008 + 49152 * 576)  # the head is a copy of its own
    assert largest["executorch-xnnpack"] == pytest.approx(copied, rel=0.01)
    # What builds for onnxruntime-genai and Core ML measured.
    assert largest["onnx-genai"] == pytest.approx(111_784_202, rel=0.05)
    assert largest["coreml"] == pytest.approx(275_000_000, rel=0.05)


def test_plan_says_it_to_people(decoder_recipe: Written) -> None:
    targets = [{"target": "onnx-cpu", "scheme": "w4g32", "device": "m4-max"}, {"target": "onnx-cpu"}]
    said = baking.finish(baking.start("plan", decoder_recipe(targets, published("qwq-32b"))))
    assert said.code == 0, said.err
    assert "predicted file: 21.52 GiB, 32.8 billion parameters: embedding 2.90 GiB fp32, attention 2.3" in said.out
    assert "predicted float32 cache of keys and values, by tokens of context: 32.0 MiB for 64" in said.out
    assert "tokens: 22." in said.out
    assert "predicted on m4-max: fits (96.00 GiB of 128 GiB for one application, up to 40960 tokens" in said.out
    assert "decodes at most 27.3 tokens/s" in said.out
    assert "  does not fit: sm8650, sm8735" in said.out
    assert "24 GiB: serve it from a server with 12" in said.out


def test_what_plan_cannot_predict_it_says(decoder_recipe: Written) -> None:
    (unit,) = units(decoder_recipe([{"target": "onnx-cpu"}], {**TINY, "model_type": "mamba"}))
    assert fit.document(unit, [])["unknown"] == "sizes of 'mamba' models cannot be predicted"
    (unit,) = units(decoder_recipe([{"target": "coreai"}]))
    assert fit.document(unit, [])["unknown"] == "sizes of .aimodel files cannot be predicted"
    (unit,) = units(decoder_recipe([{"target": "onnx-cpu", "model": {"path": "meta-llama/Llama-3.2-1B-Instruct"}}]))
    found = fit.document(unit, [])
    assert found["unknown"] == "the configuration of 'meta-llama/Llama-3.2-1B-Instruct' is not here"
    assert "put its config.json into configs/llama-3.2-1b/ beside the recipe" in found["fix"]


def test_a_peak_that_was_not_fitted_to_a_backend_is_not_told(decoder_recipe: Written) -> None:
    """Core ML's and Qualcomm's copies of SmolLM2 took two and three times what XNNPACK's do."""
    for target in ("executorch-mlx", {"target": "executorch-coreml", "options": {"minimum_os": "iOS18"}}):
        (unit,) = units(decoder_recipe([target]))
        found = fit.document(unit, [])
        assert (found["export"]["peak_bytes"], found["export"]["fits_here"]) == (None, None)
    assert found["kv_cache"]["dtype"] == "float16"
    (unit,) = units(decoder_recipe(["executorch-xnnpack"]))
    assert fit.document(unit, [])["export"]["peak_bytes"] > 0


def test_a_build_beyond_this_machine_is_refused_with_the_number(decoder_recipe: Written, tmp_path: Path) -> None:
    recipe = decoder_recipe([{"target": "onnx-cpu", "scheme": "w4g32"}], published("qwq-32b"))
    began = baking.start("build", recipe, "--store", tmp_path / "store", "--out", tmp_path / "dist")
    said = baking.finish(began)
    assert said.code == EXIT_STAGE, said.err
    assert "building it takes" in said.out + said.err
    assert "GiB of memory (predicted), and this machine has" in said.out + said.err
    assert not (tmp_path / "dist").exists()


def test_a_build_beyond_what_is_allowed_is_refused(decoder_recipe: Written) -> None:
    (unit,) = units(decoder_recipe([{"target": "onnx-cpu"}]))
    problem = fit.refusal(unit, 100)
    assert problem is not None
    assert "(predicted), and --memory allows 0.10 GiB" in problem.what
    assert problem.fix.startswith("raise --memory, or")
    assert problem.where == unit.id
    assert fit.refusal(unit, 100_000) is None
    peak = fit.predict(unit).export_peak_bytes
    assert GIB > peak > 500 * MIB
