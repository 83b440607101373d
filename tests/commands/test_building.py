"""Verbs around a build: check, plan, build, explain, bundle, sweep, clean."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import baking
import edgebake
from edgebake.commands import sweep
from edgebake.commands.init import one_shot
from edgebake.errors import EXIT_LIMIT, EXIT_RECIPE, EXIT_STAGE, UsageError
from verbs import Baked, Edgebake, config, refused, resign

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


def test_explain_knows_what_is_stored_and_what_changed(edgebake: Edgebake, baked: Baked) -> None:
    where = ("--out", baked.out, "--store", baked.store)
    same = edgebake("explain", baked.recipe, *where)
    assert same.code == 0
    assert "  lower: stored\n" in same.out
    changed = edgebake("explain", baked.recipe, *where, "--set", "model.seed=3", "--only", UNITS[0], "--json").json
    assert changed[UNITS[0]]["lower"]["state"] == "would run"
    assert any("seed" in line or "->" in line for line in changed[UNITS[0]]["lower"]["why"])


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


def test_sweep_refuses_schemes_that_nothing_can_do(edgebake: Edgebake, baked: Baked) -> None:
    refused(edgebake("sweep", baked.recipe, "--scheme", "nonsense"), EXIT_RECIPE, "'nonsense' is not a scheme")
    refused(edgebake("sweep", baked.recipe, "--scheme", "palette4"), EXIT_RECIPE, "palette4 is supported by none")
    refused(edgebake("sweep", baked.recipe, "--target", "onnx"), EXIT_RECIPE, "there is no target 'onnx'")


def test_clean_says_what_it_freed_and_what_is_left(edgebake: Edgebake, tmp_path: Path) -> None:
    said = edgebake("clean", "--store", tmp_path / "store")
    assert said.code == 0
    assert said.out.startswith("0 entries removed, 0.0 MiB freed;")
    (tmp_path / "store/log").mkdir()
    (tmp_path / "store/log/old.log").write_bytes(b"x")
    found = edgebake("clean", "--all", "--store", tmp_path / "store", "--json").json
    assert (found["entries"], found["logs"], found["store"]) == (0, 1, str(tmp_path / "store"))
    refused(edgebake("clean", "--all", "--max-gib", "1"), EXIT_RECIPE, "--all empties the store")
