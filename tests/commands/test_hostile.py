"""Artifact folders and files that somebody made to do harm: refused in plain words, nothing outside is touched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import baking
from edgebake.artifacts import manifest_of
from edgebake.commands import _isolated
from edgebake.errors import EXIT_STAGE, ArtifactDamaged, StageFailed
from edgebake.jsonfile import read_json
from edgebake.verify import verify
from verbs import Baked, Edgebake, resign

MANIFEST = "manifest.json"
READERS = ("inspect", "verify", "bench", "report")


@pytest.fixture
def harmed(baked: Baked, tmp_path: Path) -> Baked:
    copied = baked.copied(tmp_path)
    shutil.rmtree(copied.artifact.with_name("w8"))
    return copied


def said_by(edgebake: Edgebake, verb: str, folder: Path, *fragments: str) -> None:
    """``verb`` refuses ``folder``: what verify and bench found is in their answer, not on standard error."""
    said = edgebake(verb, folder)
    assert said.code == EXIT_STAGE, said.err
    text = " ".join((said.out + said.err).split())
    for fragment in fragments:
        assert fragment in text, text


def not_taken(folder: Path, *fragments: str) -> None:
    """The manifest in ``folder`` is refused before anything that it names is touched."""
    with pytest.raises(ArtifactDamaged) as refusal:
        manifest_of(folder)
    for fragment in fragments:
        assert fragment in str(refusal.value)


@pytest.mark.parametrize("verb", READERS)
def test_every_reader_refuses_a_manifest_that_leaves_its_folder(edgebake: Edgebake, harmed: Baked, verb: str) -> None:
    resign(harmed.artifact / MANIFEST, entry="../../../../../../etc/passwd")
    said_by(edgebake, verb, harmed.artifact, "leaves the artifact folder")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"entry": "../../../../../../etc/passwd"}, "leaves the artifact folder"),
        ({"files": [{"path": "../w8/model.onnx", "sha256": "0" * 64}]}, "leaves the artifact folder"),
        ({"reference": {"path": "/etc", "digest": "0"}}, "is not beside the artifact"),
        ({"files": 3}, "files is not a list of paths and digests"),
        ({"limits": {"nonsense": 1}}, "its limits are not what edgebake writes (ValidationError)"),
    ],
    ids=lambda found: next(iter(found)) if isinstance(found, dict) else "",
)
def test_verify_needs_no_verb_to_refuse_them(harmed: Baked, changes: dict[str, Any], said: str) -> None:
    resign(harmed.artifact / MANIFEST, **changes)
    result = verify(harmed.artifact)
    assert result.failure is not None
    assert (result.state, result.failure.stage, result.failure.exit_code) == ("failed", "verify", EXIT_STAGE)
    assert said in str(result.failure.problems[0])


@pytest.mark.parametrize("entry", ["/etc/passwd", "..\\up.onnx", "C:up.onnx", "", "a\0b", "sub/../../up.onnx"])
def test_an_entry_outside_of_the_folder(harmed: Baked, entry: str) -> None:
    resign(harmed.artifact / MANIFEST, entry=entry)
    not_taken(harmed.artifact, "leaves the artifact folder")


def test_an_entry_that_is_none_of_the_files(harmed: Baked) -> None:
    resign(harmed.artifact / MANIFEST, entry="other.onnx")
    not_taken(harmed.artifact, "none of its files")


def test_a_file_outside_of_the_folder(harmed: Baked) -> None:
    resign(harmed.artifact / MANIFEST, files=[{"path": "../fp32/model.onnx", "sha256": "0" * 64, "bytes": 1}])
    not_taken(harmed.artifact, "'../fp32/model.onnx' leaves the artifact folder")


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_out_of_the_folder(harmed: Baked, tmp_path: Path) -> None:
    secret = tmp_path / "secret.onnx"
    (harmed.artifact / "model.onnx").rename(secret)
    (harmed.artifact / "model.onnx").symlink_to(secret)
    not_taken(harmed.artifact, "leaves the artifact folder")


@pytest.mark.parametrize(
    "reference", ["/etc", "../../../../../../etc/reference", "../reference/../../x", "reference", 3]
)
def test_a_reference_elsewhere(harmed: Baked, reference: object) -> None:
    digest = read_json(harmed.artifact / MANIFEST)["reference"]["digest"]
    resign(harmed.artifact / MANIFEST, reference={"path": reference, "digest": digest})
    not_taken(harmed.artifact, "is not beside the artifact")


def test_a_manifest_of_a_newer_edgebake(edgebake: Edgebake, harmed: Baked) -> None:
    resign(harmed.artifact / MANIFEST, version=99)
    said_by(edgebake, "report", harmed.artifact, "it has version 99", "install a newer edgebake")


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "one"},
        {"files": 3},
        {"files": []},
        {"files": [{"path": 7, "sha256": "x"}]},
        {"unit": None},
        {"limits": []},
        {"signature": "x"},
        {"entry": ["model.onnx"]},
    ],
    ids=str,
)
def test_a_signed_manifest_of_wrong_types(harmed: Baked, changes: dict[str, Any]) -> None:
    resign(harmed.artifact / MANIFEST, **changes)
    not_taken(harmed.artifact, "no manifest of edgebake")


@pytest.mark.parametrize("changes", [{"limits": {"parity": {"cosine": "high"}}}, {"limits": {"nonsense": 1}}], ids=str)
def test_limits_that_are_none(edgebake: Edgebake, harmed: Baked, changes: dict[str, Any]) -> None:
    resign(harmed.artifact / MANIFEST, **changes)
    said_by(edgebake, "report", harmed.artifact, "not what edgebake writes")


@pytest.mark.parametrize("changes", [{"outputs": 3}, {"structure": [{"x": 1}]}, {"stages": [1]}], ids=str)
def test_measurements_of_wrong_types(edgebake: Edgebake, harmed: Baked, changes: dict[str, Any]) -> None:
    resign(harmed.artifact / "measurements.json", **changes)
    said_by(edgebake, "report", harmed.artifact, "not what edgebake writes")


def test_what_nobody_foresaw_in_a_manifest_is_that_manifest_s_fault(edgebake: Edgebake, harmed: Baked) -> None:
    resign(harmed.artifact / MANIFEST, model={}, assignment={"a": {}})
    said_by(edgebake, "verify", harmed.artifact, "it is not what edgebake can read: KeyError")


def test_an_unsigned_change(edgebake: Edgebake, harmed: Baked) -> None:
    path = harmed.artifact / MANIFEST
    path.write_text(path.read_text().replace('"onnx-cpu"', '"coreml"'))
    said_by(edgebake, "report", harmed.artifact, "its digest does not match")


def test_a_manifest_without_bounds(edgebake: Edgebake, harmed: Baked) -> None:
    with (harmed.artifact / MANIFEST).open("r+b") as file:
        file.truncate(200 << 20)
    said_by(edgebake, "report", harmed.artifact, "it has 200 MiB")
    said_by(edgebake, "verify", harmed.artifact, "it has 200 MiB")


def test_terminal_escapes_in_names(edgebake: Edgebake, harmed: Baked) -> None:
    evil = "tiny\x1b]0;owned\x07\x1b[31m\u202e"
    resign(harmed.artifact / MANIFEST, unit=evil, recipe=evil, edgebake=evil)
    for verb in ("inspect", "report", "verify", "bench"):
        said = edgebake(verb, harmed.artifact)
        assert not set("\x1b\x07\u202e") & set(said.out + said.err), verb


def test_a_file_name_with_escapes(edgebake: Edgebake, tmp_path: Path) -> None:
    said = edgebake("inspect", tmp_path / "a\x1b[31m.onnx")
    assert "\\x1b[31m" in said.err
    assert "\x1b" not in said.err


def test_what_a_foreign_file_makes_a_parser_take_is_bounded(tmp_path: Path) -> None:
    """1900 MiB of zeros, which the parser reads whole: its process ends, this one does not."""
    promise = tmp_path / "promise.onnx"
    with promise.open("wb") as file:
        file.truncate(1900 << 20)
    (answer,) = _isolated.run("inspect", [{"path": str(promise)}], timeout_s=60, memory_mib=1000)
    assert isinstance(answer, StageFailed)
    assert "MemoryError" in str(answer) or "more than 1000 MiB" in str(answer)


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_a_parser_that_never_ends_is_stopped_and_the_next_file_is_read(
    baked: Baked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANG)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *baking.SOURCES]))
    whole, hang = {"path": str(baked.artifact)}, {"path": str(tmp_path / "hang")}
    answers = _isolated.run("inspect", [whole, hang, whole], timeout_s=5, memory_mib=4096)
    assert answers[0]["format"] == answers[2]["format"] == "onnx"
    assert isinstance(answers[1], StageFailed)
    assert "took longer than 5 s" in str(answers[1])


HANG = """
import pathlib, time
is_dir = pathlib.Path.is_dir
pathlib.Path.is_dir = lambda self: time.sleep(60) if self.name == "hang" else is_dir(self)
"""
