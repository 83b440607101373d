"""Verbs around a build: check, plan, build, explain, bundle, sweep, clean."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import baking
import edgebake
from edgebake.commands import _sweeping, sweep
from edgebake.commands.init import one_shot
from edgebake.commands.sweep import table
from edgebake.errors import EXIT_LIMIT, EXIT_RECIPE, EXIT_STAGE, UsageError
from edgebake.recipe import TargetRule
from edgebake.recipe_yaml import list_shipped, read
from edgebake.result import Result
from edgebake.types import Verdict
from verbs import Baked, Edgebake, Said, config, refused, resign

UNITS = ["tiny/model@onnx-cpu#fp32", "tiny/model@onnx-cpu#w8"]


def test_check_counts_what_would_be_built(edgebake: Edgebake, baked: Baked) -> None:
    said = edgebake("check", baked.recipe)
    assert (said.code, said.out) == (0, "ok: 2 artifacts would be built\n")
    assert edgebake("check", baked.recipe, "--json").json == {"artifacts": UNITS, "warnings": []}


def test_check_shows_every_problem_with_its_line(edgebake: Edgebake, baked: Baked) -> None:
    said = edgebake("check", baked.recipe, "--set", "model.path=none:build", "--set", "compress.scheme=w3a3", "--json")
    assert said.code == EXIT_RECIPE
    assert len(said.json["error"]) >= 2
    assert "problems:" in said.err


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        ("none.yaml", "there is no recipe 'none.yaml'"),
        ("", "an empty name names no recipe"),
        ("minilm-l5", "did you mean 'minilm-l6'"),
        ("no*.yaml", "matches no recipe file"),
        (".", "is a folder, not a recipe"),
        ("/dev/null", "not an ordinary file"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "plan", "build", "explain", "bundle"])
def test_a_recipe_that_is_not_there(edgebake: Edgebake, verb: str, given: str, fragment: str) -> None:
    refused(edgebake(verb, given), EXIT_RECIPE, fragment)


def test_plan_says_what_artifacts_share_once(edgebake: Edgebake, baked: Baked) -> None:
    said = edgebake("plan", baked.recipe)
    assert said.code == 0
    assert said.out.startswith("tiny/model, for all 2 artifacts\n")
    assert said.out.count("evaluation: {file: samples.npz, count: 16, skip: 8}") == 1
    assert "compress: {scheme: fp32}" in said.out
    assert "compress: {scheme: w8}" in said.out
    assert "runs with: onnxruntime-cpu (executed)" in said.out
    assert "runs code that the recipe names: tiny_net:build" in said.out
    rows = edgebake("plan", baked.recipe, "--json").json
    assert [row["unit"] for row in rows] == UNITS
    assert rows[0]["recipe"]["samples"]["evaluation"]["pattern"] == "*"


def test_only_chooses_and_says_what_there_is(edgebake: Edgebake, baked: Baked) -> None:
    assert [r["unit"] for r in edgebake("plan", baked.recipe, "--only", "*#w8", "--json").json] == UNITS[1:]
    refused(edgebake("plan", baked.recipe, "--only", "*@coreml"), EXIT_RECIPE, "matches none of the 2", UNITS[0])
    refused(edgebake("plan", baked.recipe, "--only", "ONNX"), EXIT_RECIPE, "did you mean '*onnx*'?", UNITS[0])


def test_a_glob_takes_recipes_and_nothing_else(edgebake: Edgebake, baked: Baked) -> None:
    folder = baked.recipe.parent
    assert edgebake("check", f"{folder}/*", "--json").json["artifacts"] == UNITS
    refused(
        edgebake("check", f"{folder}/*.npz"), EXIT_RECIPE, "matches no recipe file", "samples.npz", "is no .yaml file"
    )


def test_samples_that_do_not_suffice_or_fit_are_refused_before_anything_is_loaded(
    edgebake: Edgebake, baked: Baked, tmp_path: Path
) -> None:
    def with_(*settings: str) -> Said:
        return edgebake("check", baked.recipe, *(f"--set={each}" for each in settings))

    refused(with_("samples.evaluation.count=100"), EXIT_RECIPE, "tiny.yaml", "has 24 samples", "asks for 100 after")
    refused(with_("inputs.input.shape=[1, 8]"), EXIT_RECIPE, "rows of [1, 16], [1, 8] is declared")
    refused(with_("inputs={x: {shape: [1, 16]}}"), EXIT_RECIPE, "has the arrays input, the recipe's inputs are x")
    broken = tmp_path / "broken.npz"
    broken.write_bytes((baked.recipe.parent / "samples.npz").read_bytes()[:300])
    refused(with_(f"samples.evaluation.file={broken}"), EXIT_RECIPE, "broken.npz cannot be read", "numpy.savez")


def test_a_build_of_what_is_built_does_nothing_and_says_so(edgebake: Edgebake, baked: Baked) -> None:
    said = edgebake("build", baked.recipe, "--out", baked.out, "--store", baked.store, "--json")
    assert said.code == 0, said.err
    assert [r["stages"] for r in said.json["results"]] == [{"deliver": "unchanged"}] * 2
    assert said.json["bundles"] == [str(baked.out / "tiny/tiny.zip")]


def test_an_interrupted_build_says_what_is_kept(baked: Baked, tmp_path: Path) -> None:
    def end_at_reference(event: Mapping[str, Any]) -> None:
        if event.get("stage") == "reference":
            raise KeyboardInterrupt

    def build(store: Path, *settings: str) -> None:
        edgebake.build(str(baked.recipe), settings=settings, out=tmp_path, store=store, observe=end_at_reference)

    with pytest.raises(KeyboardInterrupt) as end:  # other samples leave the programs and artifacts of the build before
        build(baked.store, "samples.evaluation.count=15")
    assert str(end.value) == f"kept in {baked.store}: trace, 2 lower; the same command goes on from there"
    with pytest.raises(KeyboardInterrupt, match=r"^no stage has finished: the same command begins anew$"):
        build(tmp_path / "store")


def test_a_build_is_refused_before_work_that_could_not_be_delivered(
    edgebake: Edgebake, baked: Baked, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    refused(edgebake("build", baked.recipe, "--out", tmp_path / "file"), EXIT_RECIPE, "--out", "is not a folder")
    refused(edgebake("build", baked.recipe, "--report", tmp_path / "a.doc"), EXIT_RECIPE, "by suffix")
    refused(edgebake("build", baked.recipe, "--report", tmp_path / "file/a.md"), EXIT_RECIPE, "is not a folder")
    refused(edgebake("build", baked.recipe, "--store", tmp_path / "file"), EXIT_STAGE, "cannot use the store")


def test_target_and_scheme_are_for_models_without_a_recipe(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    refused(edgebake("build", "minilm-l6", "--target", "onnx-cpu"), EXIT_RECIPE, "minilm-l6 is a recipe", "--only")
    refused(edgebake("build", baked.recipe, "--scheme", "w8"), EXIT_RECIPE, "is a recipe", "edgebake sweep")
    model = config(tmp_path / "bert", {"vocab_size": 30, "model_type": "bert"})
    refused(edgebake("build", model), EXIT_RECIPE, "is a model, not a recipe", f"edgebake init {model}")
    both = edgebake("build", model, baked.recipe, "--target", "onnx-cpu")
    refused(both, EXIT_RECIPE, "build one model without a recipe, here are 2")


@pytest.mark.parametrize(
    ("target", "scheme", "fragment"),
    [
        ("onnx-gpu", "w8", "there is no target 'onnx-gpu'"),
        ("onnx-cpu", "palette4", "onnx-cpu does not support the scheme palette4"),
        ("onnx-cpu", "zzz", "onnx-cpu does not support the scheme zzz"),
    ],
)
def test_a_one_shot_build_that_cannot_work_writes_no_recipe(
    edgebake: Edgebake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, scheme: str, fragment: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config(tmp_path / "bert", {"vocab_size": 30, "model_type": "bert"})
    refused(edgebake("build", "bert", "--target", target, "--scheme", scheme), EXIT_RECIPE, fragment)
    assert not list(tmp_path.glob("*.yaml"))


def test_a_one_shot_build_writes_the_recipe_it_stands_for(
    edgebake: Edgebake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = config(tmp_path / "own/bert", {"vocab_size": 30, "model_type": "bert"})
    assert one_shot("own/bert", ["onnx-cpu"], "8da8w") == Path("bert.yaml")
    text = Path("bert.yaml").read_text()
    assert "scheme: w8a8d" in text
    assert 'path: "./own/bert"' in text
    assert edgebake("check", "bert.yaml", "--json").json["artifacts"] == ["bert/model@onnx-cpu#w8a8d"]
    assert one_shot("own/bert", ["onnx-cpu"], "8da8w") == Path("bert.yaml"), "the same recipe is written again"
    assert one_shot(str(model), ["coreml"], "w8") == Path("bert-w8.yaml"), "another is not lost"
    Path("bert-w8.yaml").write_text("mine")
    with pytest.raises(UsageError, match="is not what would be written"):
        one_shot(str(model), ["coreml"], "w8")


def test_a_program_that_counts_as_code_needs_trust(edgebake: Edgebake, tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(b"")
    recipe = tmp_path / "net.yaml"
    recipe.write_text(
        "name: net\nmodel: {source: exported, path: net.pt2}\ninputs: {x: {shape: [1, 4]}}\n"
        "samples: {evaluation: {noise: true, count: 4}}\ntargets: [onnx-cpu]\n"
    )
    for verb in ("check", "plan", "build"):
        refused(edgebake(verb, recipe), EXIT_RECIPE, "net.yaml:2", "can run code", "--trust")
    assert edgebake("check", recipe, "--trust").code == 0


def test_a_network_may_change_the_folder_that_its_process_works_in(
    edgebake: Edgebake, baked: Baked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shutil.copytree(baked.recipe.parent, tmp_path / "recipe")
    net = place / "tiny_net.py"
    net.write_text(
        net.read_text().replace("    torch.manual_seed(0)", '    import os; os.chdir("/"); torch.manual_seed(0)')
    )
    monkeypatch.chdir(place)
    said = edgebake("build", "tiny.yaml", "--out", "dist", "--only", UNITS[0], "-q")
    assert said.code == 0, said.out + said.err


def test_explain_knows_what_is_stored_and_what_changed(edgebake: Edgebake, baked: Baked) -> None:
    where = ("--out", baked.out, "--store", baked.store)
    same = edgebake("explain", baked.recipe, *where)
    assert same.code == 0
    assert "  lower: stored\n" in same.out
    changed = edgebake("explain", baked.recipe, *where, "--set", "model.seed=3", "--only", UNITS[0], "--json").json
    assert changed[UNITS[0]]["reference"] == {"state": "would run", "why": ["model.model.seed: 0 -> 3"]}
    assert changed[UNITS[0]]["lower"] == {
        "state": "would run",
        "why": ["what it reads from the stages before it changes (compress)"],
    }


def test_explain_names_the_file_that_changed(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    """Built from a copy, whose network then changes; what is not of the model is not blamed."""
    place = shutil.copytree(baked.recipe.parent, tmp_path / "recipe")
    where = (place / "tiny.yaml", "--out", tmp_path / "dist", "--only", UNITS[0])
    assert edgebake("build", *where, "-q").code == 0
    with (place / "tiny_net.py").open("a") as file:
        file.write("# changed\n")
    why = edgebake("explain", *where, "--json").json[UNITS[0]]["trace"]["why"]
    assert len(why) == 1
    assert "tiny_net" in why[0]
    assert why[0].endswith(": changed")


def test_explain_can_do_without_a_damaged_note(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    store = tmp_path / "store"
    said = edgebake("explain", baked.recipe, "--store", store, "--out", baked.out)
    assert "it never ran for this output folder" in said.out
    (store / "last").mkdir()
    for note in (baked.store / "last").iterdir():
        (store / "last" / note.name).write_bytes(b"{")
    assert edgebake("explain", baked.recipe, "--store", store, "--out", baked.out).out == said.out


def test_the_bundle_holds_the_artifacts_their_manifests_and_an_index(baked: Baked) -> None:
    with zipfile.ZipFile(baked.out / "tiny/tiny.zip") as archive:
        names = archive.namelist()
        index = json.loads(archive.read("tiny/index.json"))
        for name in names[1:]:
            assert archive.read(name) == (baked.out / name).read_bytes()
        assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    folders = [f"tiny/model/onnx-cpu/any/{scheme}" for scheme in ("fp32", "w8")]
    assert names == ["tiny/index.json", *(f"{f}/{n}" for f in folders for n in ("manifest.json", "model.onnx"))]
    assert [row["unit"] for row in index["artifacts"]] == UNITS
    assert [row["entry"] for row in index["artifacts"]] == [f"{f}/model.onnx" for f in folders]


def test_the_bundle_has_the_same_bytes_each_time_and_verifies_with_its_reference(
    edgebake: Edgebake, baked: Baked, tmp_path: Path
) -> None:
    more = ("--set", "bundle={formats: [zip], include_reference: true}")
    made = []
    for place in ("here", "there"):
        copied = baked.copied(tmp_path / place)
        said = edgebake("bundle", baked.recipe, "--out", copied.out, *more, "--json")
        assert said.code == 0, said.err
        (bundle,) = said.json["bundles"]
        made.append(hashlib.sha256(Path(bundle["path"]).read_bytes()).hexdigest())
    assert made[0] == made[1]
    with zipfile.ZipFile(tmp_path / "here/dist/tiny/tiny.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    assert edgebake("verify", tmp_path / "unpacked").code == 0


def test_bundle_says_how_to_build_what_is_missing_and_looks_at_the_format_first(
    edgebake: Edgebake, baked: Baked, tmp_path: Path
) -> None:
    refused(edgebake("bundle", baked.recipe, "--out", tmp_path), EXIT_RECIPE, f"-> edgebake build {baked.recipe}, with")
    said = edgebake("bundle", "silero-vad", "--format", "zip", "--out", tmp_path)
    refused(said, EXIT_RECIPE, "-> edgebake build silero-vad, with")
    said = edgebake("bundle", baked.recipe, "--out", tmp_path, "--format", "rar")
    refused(said, EXIT_RECIPE, "there is no bundle format 'rar'")
    assert "not built" not in said.err


@pytest.mark.parametrize("formats", [["--format", "tar"], ["--set", "bundle=tar"]], ids=" ".join)
def test_an_unknown_bundle_format_is_refused_with_the_known_ones(
    edgebake: Edgebake, baked: Baked, formats: list[str]
) -> None:
    said = edgebake("bundle", baked.recipe, "--out", baked.out, *formats)
    refused(said, EXIT_RECIPE, "there is no bundle format 'tar'", "known: zip")


def test_bundle_refuses_what_is_not_built_or_old(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    refused(edgebake("bundle", baked.recipe, "--out", tmp_path), EXIT_RECIPE, f"{UNITS[0]} is not built", UNITS[1])
    old = edgebake("bundle", baked.recipe, "--out", baked.out, "--set", "limits.parity.cosine=0.8")
    refused(old, EXIT_RECIPE, "was built from an earlier version of the recipe")
    none = edgebake("bundle", baked.recipe, "--out", baked.out, "--set", "bundle=[]")
    refused(none, EXIT_RECIPE, "asks for no bundle", "--format zip")


def test_bundle_refuses_what_was_changed_or_fails_its_limits(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    harmed = baked.copied(tmp_path)
    baking.flip(harmed.artifact / "model.onnx")
    said = edgebake("bundle", baked.recipe, "--out", harmed.out)
    refused(said, EXIT_STAGE, "fp32/model.onnx", "not what its manifest says")
    baking.flip(harmed.artifact / "model.onnx")
    resign(harmed.artifact / "manifest.json", limits={"parity": {"sqnr_db": 500.0}})
    said = edgebake("bundle", baked.recipe, "--out", harmed.out)
    refused(said, EXIT_LIMIT, "parity.sqnr_db is", "the limit 500", "is not packed")


def test_a_build_that_fails_a_limit_packs_nothing(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    said = edgebake(
        "build", baked.recipe, "--out", tmp_path, "--store", baked.store, "--set", "limits.size.mib=0.001", "--json"
    )
    assert said.code == EXIT_LIMIT, said.err
    assert said.json["bundles"] == []
    assert not list(tmp_path.rglob("*.zip"))


def test_sweep_shows_which_schemes_meet_the_limits(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    where = ("--out", tmp_path, "--store", baked.store)
    said = edgebake("sweep", baked.recipe, *where, "--scheme", "fp32", "--scheme", "int8wo", "--json")
    assert said.code == 0, said.err
    assert [(row["scheme"], row["state"], row["pareto"]) for row in said.json] == [
        ("w8", "pass", True),
        ("fp32", "pass", True),
    ]
    table = edgebake("sweep", baked.recipe, *where, "--scheme", "fp32", "-q").out
    assert "onnx-cpu" in table
    assert "Pareto" in table
    missed = edgebake("sweep", baked.recipe, *where, "--scheme", "fp32", "--set", "limits.size.mib=0.001", "-q").out
    assert " MiB, limit at most 0.001 MiB (" in missed


def test_a_sweep_rounds_no_number_up_to_perfection() -> None:
    row = {"target": "t", "scheme": "s", "state": "pass", "bytes": None, "of_float": None, "pareto": False}
    assert sweep._cells({**row, "agreement": 0.99999, "cosine": 0.999999})[5:7] == ("0.9999", "0.99999")


def test_a_sweep_says_what_was_missed_and_ranks_only_what_was_measured() -> None:
    def result(scheme: str, measured: dict[str, Any], *verdicts: Verdict) -> Result:
        place = {"unit": f"a/model@coreml#{scheme}", "recipe": "a", "component": "model", "target": "coreml"}
        return Result(**place, scheme=scheme, measurements=measured, verdicts=verdicts)

    size = {"size": {"bytes": 9}}
    missed = Verdict(limit="parity.sqnr_db", subject="y", state="fail", value=18.24412345678, bound=25.0)
    unmeasured = Verdict(limit="parity.cosine", state="not measured", bound=0.9)
    fp16, w8 = table(
        [
            result("fp16", {**size, "outputs": {"y": {"cosine": 0.5}}}, missed),
            result("w8", size, unmeasured, Verdict(limit="structure.loads", state="pass")),
        ]
    )
    assert fp16["why"] == "missed: parity.sqnr_db of y: 18.2441 dB, limit at least 25 dB"
    assert w8["why"] == "not measured: parity.cosine"
    assert (fp16["pareto"], w8["pareto"]) == (True, False)


def test_sweep_refuses_schemes_that_nothing_can_do(edgebake: Edgebake, baked: Baked) -> None:
    refused(edgebake("sweep", baked.recipe, "--scheme", "nonsense"), EXIT_RECIPE, "'nonsense' is not a scheme")
    refused(edgebake("sweep", baked.recipe, "--scheme", "palette4"), EXIT_RECIPE, "palette4 is supported by none")
    refused(edgebake("sweep", baked.recipe, "--target", "onnx"), EXIT_RECIPE, "there is no target 'onnx'")


def test_a_sweep_tries_the_schemes_that_the_options_allow() -> None:
    component = read(list_shipped()["minilm-l6"]).recipe.components["model"]

    def swept(*schemes: str, **options: str) -> list[str]:
        targets = (TargetRule(target="coreml", options=options),)
        rules = _sweeping.rules(component.model_copy(update={"targets": targets}), schemes, ())
        return [rule.scheme for rule in rules if rule.scheme]

    assert swept(minimum_os="iOS15") == ["fp32", "fp16"]
    assert "palette4" in swept() and not {"palette3", "w4g32"} & set(swept())
    assert {"palette3", "w4g32", "palette4g16"} < set(swept(minimum_os="iOS18"))
    assert swept("w4g32") == ["w4g32"]  # the check refuses it and says what it needs


def test_clean_says_what_it_freed_and_what_is_left(edgebake: Edgebake, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert edgebake("explain", "minilm-l6", "--only", "*coreml#w8", "--store", tmp_path / "store").code == 0
    said = edgebake("clean", "--store", tmp_path / "store")
    assert said.code == 0
    assert said.out.startswith("0 entries removed, 0.0 MiB freed;")
    (tmp_path / "store/log").mkdir()
    (tmp_path / "store/log/old.log").write_bytes(b"x")
    found = edgebake("clean", "--all", "--store", tmp_path / "store", "--json").json
    assert (found["entries"], found["logs"], found["store"]) == (0, 1, str(tmp_path / "store"))
    refused(edgebake("clean", "--all", "--max-gib", "1"), EXIT_RECIPE, "--all empties the store")
    refused(edgebake("clean", "--max-gib", "inf"), EXIT_RECIPE, "--max-gib inf is no limit", "1e+09")
    refused(edgebake("clean", "--older-than-days", "1e300"), EXIT_RECIPE, "--older-than-days 1e+300 is no limit")


def test_clean_leaves_a_folder_alone_that_is_no_store(edgebake: Edgebake, tmp_path: Path) -> None:
    for name in ("log/mine.log", "last/mine.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine")
    refused(
        edgebake("clean", "--all", "--store", tmp_path), EXIT_RECIPE, "is no store of edgebake", "nothing was removed"
    )
    refused(edgebake("clean", "--store", tmp_path / "none"), EXIT_RECIPE, "is no store of edgebake")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["last", "log", "mine.json", "mine.log"]
