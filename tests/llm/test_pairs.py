"""What a recipe with ``speculative`` may not say, which artifacts are paired, limits on drafts and what reports say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import decoders
from edgebake.artifacts import target_of
from edgebake.bundles.zip import index_of
from edgebake.check import check
from edgebake.errors import ArtifactDamaged, Problem, RecipeError, StageFailed
from edgebake.keys import stage_keys
from edgebake.limits import judge
from edgebake.llm import fit, fit_speculative, generation, vocabularies
from edgebake.recipe import Bundle, Limits
from edgebake.recipe_yaml import read
from edgebake.reports import _language
from edgebake.speculating import refuse_other_words
from edgebake.store_files import sha256_file
from edgebake.types import Artifact
from edgebake.unit import unit_from_json, unit_to_json
from edgebake.units import Unit, units_of

SIZES = {**decoders.SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
PAIR = {"target": "big", "draft": "small"}


def save(folder: Path, letters: int = decoders.WORDS - 3) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIZES))
    (folder / "model.safetensors").write_bytes(decoders.NO_WEIGHTS)
    decoders.save_tokenizer(folder, letters=letters)


def written(folder: Path, speculative: Any = PAIR, **small: Any) -> Path:
    """A recipe whose draft is the first layer of its target; ``small`` replaces keys of the draft."""
    for name in ("big", "other"):
        if not (folder / name).exists():
            save(folder / name)
    (folder / "text.txt").write_text("some text\n")
    big = {**decoders.component(Path("big")), "samples": {"evaluation": {"text": "text.txt", "length": 32}}}
    derived = {**big, "model": {**big["model"], "layers": 1}}
    targets = ["executorch-xnnpack"]
    components = {"small": {**derived, "targets": targets, **small}, "big": {**big, "targets": targets}}
    content = {"name": "pair", "components": components, "speculative": speculative}
    path = folder / "pair.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    return path


def units(folder: Path, *more: Any, **small: Any) -> tuple[Unit, ...]:
    return check([read(str(written(folder, *more, **small)))], trust=False)[0]


def only(folder: Path, *more: Any, **small: Any) -> Problem:
    path = written(folder, *more, **small)
    with pytest.raises(RecipeError) as caught:
        check([read(str(path))], trust=False)
    (problem,) = caught.value.problems
    assert problem.where.startswith(f"{path}:")
    return problem


def line_of(folder: Path, text: str) -> int:
    return next(n for n, line in enumerate((folder / "pair.yaml").read_text().splitlines(), 1) if text in line)


def test_a_draft_is_paired_with_its_targets_artifact(tmp_path: Path) -> None:
    small, big = units(tmp_path, {**PAIR, "tokens": 6})
    assert small.pair is not None and big.pair is None
    assert (small.pair.unit, small.pair.tokens) == (big, 6)
    assert unit_from_json(json.loads(json.dumps(unit_to_json(small)))).pair == small.pair
    keys = stage_keys(small, sha256_file, None)["speculate"].parts
    assert keys["beside"]["lower"] == stage_keys(big, sha256_file, None)["lower"].key
    assert "speculate" not in stage_keys(big, sha256_file, None)


def test_of_several_artifacts_the_namesake_is_paired(tmp_path: Path) -> None:
    eight = {"target": "executorch-xnnpack", "scheme": "w8a8d"}
    path = written(tmp_path, targets=["executorch-xnnpack", eight])
    content = yaml.safe_load(path.read_text())
    content["components"]["big"]["targets"] = [eight, "executorch-xnnpack"]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    found = check([read(str(path))], trust=False)[0]
    assert [unit.pair.unit.scheme for unit in found if unit.pair] == ["fp32", "w8a8d"]
    content["components"]["small"]["targets"] = [{"target": "executorch-xnnpack", "scheme": "w8"}]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(RecipeError, match="the draft could propose to any of w8a8d, fp32") as caught:
        check([read(str(path))], trust=False)
    assert caught.value.problems[0].fix == "give the draft's rule and its target's the same name:"


def test_a_component_that_is_not_there_is_refused(tmp_path: Path) -> None:
    problem = only(tmp_path, {"target": "bigg", "draft": "small"})
    assert problem.what == "'bigg' names no component of this recipe"
    assert problem.fix.startswith("did you mean 'big'?")
    assert f":{line_of(tmp_path, 'target: bigg')}:" in problem.where


def test_a_component_cannot_draft_for_itself(tmp_path: Path) -> None:
    problem = only(tmp_path, {"target": "big", "draft": "big"})
    assert (problem.what, problem.fix) == ("'big' cannot draft for itself", "name two components")


def test_what_keeps_no_cache_is_no_draft(tmp_path: Path) -> None:
    model = {"source": "transformers", "path": "big", "task": "text-generation"}
    given = {"inputs": {"input_ids": {"shape": [1, 8], "dtype": "int64"}}, "dims": {}, "samples": {}}
    problem = only(tmp_path, model=model, **given)
    assert problem.what == "the draft 'small' is no decoder with a key/value cache"
    assert problem.fix.startswith("give it task: text-generation, context: 2048")


def test_a_draft_with_less_context_is_refused(tmp_path: Path) -> None:
    problem = only(tmp_path, model={**decoders.component(Path("big"))["model"], "context": 48})
    assert problem.what == "the draft's context of 48 tokens is shorter than its target's of 64"
    assert problem.fix == "give context: 64"
    assert f":{line_of(tmp_path, 'context: 48')}:" in problem.where


def test_a_draft_without_a_target_on_its_runtime_is_refused(tmp_path: Path) -> None:
    problem = only(tmp_path, targets=["onnx-genai"])
    assert problem.what == "the draft has nothing to propose to: 'big' is not built with onnx-genai"
    assert problem.fix == "add that target to big, or take it out here"


def test_more_proposals_than_a_call_takes_are_refused(tmp_path: Path) -> None:
    problem = only(tmp_path, {**PAIR, "tokens": 16})
    assert problem.what == "the target reads 16 tokens at once: 16 proposals and the token before them are more"
    assert problem.fix == "give tokens: 15, or a larger max"


def test_limits_on_a_draft_belong_to_a_draft(tmp_path: Path) -> None:
    limits = {"speculative": {"acceptance": 0.5}}
    problem = only(tmp_path, None, limits=limits)
    assert problem.what == "speculative.acceptance is a limit for a draft, which 'small' is not"
    assert problem.fix == "add speculative: {target: <component>, draft: <component>}"
    problem = only(tmp_path, {"target": "small", "draft": "big"}, limits=limits)
    assert problem.fix == "put it into the draft's limits"


def test_layers_are_those_of_a_decoder_with_a_cache(tmp_path: Path) -> None:
    model = {"source": "transformers", "path": "big", "task": "text-generation", "layers": 1}
    given = {"inputs": {"input_ids": {"shape": [1, 8], "dtype": "int64"}}, "dims": {}, "samples": {}}
    problem = only(tmp_path, None, model=model, **given)
    assert problem.what == "layers: takes the first layers of a decoder with a key/value cache"
    assert problem.fix == "give context:, or take layers: out"


def test_a_cache_in_int8_belongs_to_a_language_model(tmp_path: Path) -> None:
    model = {"source": "transformers", "path": "big", "task": "text-generation"}
    given = {"inputs": {"input_ids": {"shape": [1, 8], "dtype": "int64"}}, "dims": {}, "samples": {}}
    targets = [{"target": "executorch-xnnpack", "options": {"cache": "int8"}}]
    problem = only(tmp_path, None, model=model, targets=targets, **given)
    assert problem.what == "cache: int8 is how a language model keeps keys and values, and this one keeps none"
    assert problem.fix == "take it out, or give the model task: text-generation and context:"
    assert problem.where.endswith("options.cache")


# --- tokenizers ---


def test_another_tokenizer_is_refused_before_and_while_building(tmp_path: Path) -> None:
    save(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"A":', '"~~":'))
    model = {**decoders.component(Path("other"))["model"]}
    problem = only(tmp_path, model=model)
    assert problem.what.startswith(
        "draft and target have different tokenizers: the token 37 is '~~' to the draft and 'A'"
    )
    assert problem.fix == vocabularies.FIX
    assert f":{line_of(tmp_path, 'path: other')}:" in problem.where
    with pytest.raises(StageFailed, match="draft and target have different tokenizers: the token 37 is '~~'"):
        refuse_other_words(tmp_path / "other", tmp_path / "big")


def test_a_token_that_is_special_to_one_alone_is_a_difference(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(tmp_path / name)
    file = tmp_path / "two" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"][1]["special"] = False
    file.write_text(json.dumps(content))
    (told,) = vocabularies.differences(tmp_path / "one" / "tokenizer.json", file)
    assert told == "the token 1, '<s>', is special to the draft alone"


def test_a_padded_vocabulary_is_no_difference(tmp_path: Path) -> None:
    save(tmp_path / "one")
    save(tmp_path / "two", letters=decoders.WORDS - 9)
    files = [tmp_path / name / "tokenizer.json" for name in ("one", "two")]
    assert not list(vocabularies.differences(*files))
    assert not list(vocabularies.differences(*reversed(files)))


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(RecipeError, match=r"tokenizer.json cannot be read: .model"):
        list(vocabularies.differences(file, file))


# --- predicted, limited, told ---


def test_the_predicted_speed_is_bytes_over_bandwidth(tmp_path: Path) -> None:
    small, big = units(tmp_path)
    found = fit_speculative.expected(small, big, 4, 3.0, {"name": "chip", "bandwidth_gb_s": 50.0})
    ours, theirs = fit.predict(small), fit.predict(big)
    assert (ours.decoder.layers, theirs.decoder.layers) == (1, 2)
    empty = found["empty"]
    assert ours.size.total < theirs.size.total
    assert empty["speedup"] == pytest.approx(
        3 * empty["target_bytes"] / (empty["target_bytes"] + 4 * empty["draft_bytes"])
    )
    assert empty["tokens_per_s"] == pytest.approx(3 * 50e9 / (empty["target_bytes"] + 4 * empty["draft_bytes"]))
    assert found["kind"] == "predicted" and found["full"]["target_bytes"] > empty["target_bytes"]
    nowhere = fit_speculative.expected(small, big, 4, 3.0, None)
    assert nowhere["empty"]["speedup"] == empty["speedup"] and "tokens_per_s" not in nowhere["empty"]
    assert nowhere["device"] is None


def test_a_distilled_draft_is_as_large_as_its_layers(tmp_path: Path) -> None:
    whole = {"source": "transformers", "path": "big", "task": "text-generation", "context": decoders.CONTEXT}
    for options in ({"layers": 1}, {}):  # half of two
        compress = {"steps": [{"method": "distill", "options": options}]}
        text = {"text": "text.txt", "length": 32, "count": 2}
        samples = {"calibration": {**text, "skip": 2}, "evaluation": text}
        small, big = units(tmp_path, model=whole, compress=compress, samples=samples)
        ours, theirs = fit.predict(small), fit.predict(big)
        assert (ours.decoder.layers, theirs.decoder.layers) == (1, 2)
        assert ours.size.total < theirs.size.total


FOUND: dict[str, Any] = {
    "target": "pair/big@executorch-xnnpack#fp32",
    "prompts": 24,
    "tokens": 4,
    "steps": 300,
    "proposed": 1200,
    "accepted": 400,
    "acceptance": 0.5714,
    "tokens_per_step": 2.333,
    "identical": {"value": 1.0, "same": 23, "near_ties": 1, "texts": 24},
    "here": {"tokens_per_s": 30.0, "alone_tokens_per_s": 20.0},
    "expected": {
        "kind": "predicted",
        "device": "sm8650",
        "reason": "",
        "empty": {"speedup": 1.4, "alone_tokens_per_s": 100.0, "tokens_per_s": 140.0},
        "full": {"speedup": 1.3, "alone_tokens_per_s": 90.0, "tokens_per_s": 117.0},
    },
}
RUNNER = {"name": "executorch-runtime", "kind": "executed"}


@pytest.mark.parametrize(
    ("name", "met", "missed"),
    [("acceptance", 0.5714, 0.58), ("tokens_per_step", 2.333, 2.334), ("identical", 1.0, None)],
)
def test_a_limit_on_a_draft_holds_to_the_last_digit(name: str, met: float, missed: float | None) -> None:
    for bound, state in ((met, "pass"), (missed, "fail")):
        if bound is not None:
            limits = Limits.model_validate({"speculative": {name: bound}})
            (verdict,) = judge(limits, {"runner": RUNNER, "speculative": FOUND})
            assert (verdict.limit, verdict.state, verdict.bound) == (f"speculative.{name}", state, bound)


def test_what_was_not_measured_of_a_draft_says_why() -> None:
    limits = Limits.model_validate({"speculative": {"acceptance": 0.5}})
    (verdict,) = judge(limits, {"runner": RUNNER, "speculative": {"not_measured": "no runner here"}})
    assert (verdict.state, verdict.reason) == ("not measured", "no runner here")
    (verdict,) = judge(limits, {"runner": RUNNER})
    assert (verdict.state, verdict.reason) == ("not measured", "the draft beside its target was not measured")


def test_reports_say_what_a_draft_does() -> None:
    told = dict(_language.lines({"speculative": FOUND}))
    assert told["draft"] == (
        "for pair/big@executorch-xnnpack#fp32: 57.1 % of tested proposals accepted, 2.33 tokens a step of the target "
        "(4 proposed at a time, 24 prompts); the target's own text in 23 of 24, 1 near-tie apart"
    )
    assert told["speed-up"] == (
        "predicted ×1.40 on sm8650, ×1.30 with a full cache (at most 100 to 140 tokens/s); "
        "here ×1.50: 30.0 tokens/s, 20.0 without it"
    )
    nowhere = {**FOUND, "expected": {"kind": "predicted", "reason": "sizes of 'x' models cannot be predicted"}}
    told = dict(_language.lines({"speculative": nowhere}))
    assert told["speed-up"].startswith("not predicted: sizes of 'x' models cannot be predicted; here")
    told = dict(_language.lines({"speculative": {"target": "t", "not_measured": "no runner"}}))
    assert told == {"draft": "for t: no runner"}


def test_a_bundle_says_which_artifact_drafts_for_which(tmp_path: Path) -> None:
    manifest = {"unit": "pair/small@x", "entry": "m.pte", "format": "pte", "target": "x", "device": None}
    manifest |= {"scheme": "fp32", "files": [], "model": {}, "digest": "d"}
    draft = {**manifest, "speculative": {"target": "pair/big@x", "path": "../big", "tokens": 4}}
    rows = [Artifact(folder=tmp_path / "pair" / name, manifest=m) for name, m in (("a", draft), ("b", manifest))]
    first, second = index_of(rows, tmp_path / "pair", Bundle())["artifacts"]
    assert first["speculative"] == {"target": "pair/big@x", "tokens": 4}
    assert "speculative" not in second


@pytest.mark.parametrize(
    "path", ["../../../../../etc", "/etc", "../../../../big/x/any", "../../../../../big/x/any/fp32", None]
)
def test_a_manifest_cannot_send_a_verification_elsewhere(tmp_path: Path, path: str | None) -> None:
    with pytest.raises(ArtifactDamaged, match="is no artifact beside it") as caught:
        target_of(tmp_path, {"speculative": {"path": path, "tokens": 4}})
    assert caught.value.problems[0].fix == "do not trust this file"
    good = {"speculative": {"path": "../../../../big/executorch-xnnpack/any/fp32", "tokens": 4}}
    folder = tmp_path / "small/executorch-xnnpack/any/w8a8d"
    assert target_of(folder, good) == (tmp_path.resolve() / "big/executorch-xnnpack/any/fp32", 4)
    assert target_of(folder, {}) is None


def test_the_shipped_draft_learns_from_other_text_than_it_is_judged_by() -> None:
    file = read("smollm2-135m-speculative")
    draft, target = (
        next(u for u in units_of(file.recipe, file.base) if u.component == name) for name in ("draft", "target")
    )
    learned, judged = draft.spec.samples.calibration, draft.spec.samples.evaluation
    assert learned is not None and judged is not None
    assert (learned.text, judged) == (judged.text, target.spec.samples.evaluation)
    assert learned.skip * learned.length >= judged.count * judged.length  # tokens of one text
    assert judged.count >= generation.PROMPTS
    assert fit.predict(draft).size.total < 0.5 * fit.predict(target).size.total
