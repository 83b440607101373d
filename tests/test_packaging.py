"""The wheel: everything it needs is in it, nothing else is, and it works where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"export": "edgebake", "targets": "edgebake_targets"}

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wheel_of(source: Path, folder: Path) -> Path:
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def sources(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel_of(ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_both_packages_and_the_recipes_and_nothing_else(wheel: Path) -> None:
    expected = {f"edgebake/recipes/{name}" for name in sources(ROOT / "recipes")}
    for root, package in PACKAGES.items():
        expected |= {f"{package}/{name}" for name in sources(ROOT / root / package)}
    assert names_in(wheel) == expected
    assert {"edgebake_targets/devices.yaml", "edgebake/recipes/text/minilm-l6.yaml"} <= expected


def test_a_wheel_built_from_the_sdist_is_the_same(wheel: Path, tmp_path: Path) -> None:
    run("-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path), cwd=ROOT)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert {"README.md", "CHANGELOG.md", "LICENSE", "Makefile"} <= {p.name for p in unpacked.iterdir()}
    assert not (unpacked / ".venv").exists()
    (tmp_path / "again").mkdir()
    assert names_in(wheel_of(unpacked, tmp_path / "again")) == names_in(wheel)


def test_an_installed_wheel_finds_its_targets_and_recipes(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel), cwd=tmp_path)
    script = "import edgebake; print(edgebake.__file__); from edgebake.cli import main; main()"
    said = run("-c", script, "plan", "minilm-l6", "--json", cwd=tmp_path, PYTHONPATH=str(site))
    assert said.startswith(str(site))
    assert "minilm-l6/model@coreml#fp16" in said
    targets = run("-c", script, "targets", cwd=tmp_path, PYTHONPATH=str(site))
    files = (ROOT / "targets/edgebake_targets").glob("[!_]*.py")
    assert all(f"\n{path.stem.replace('_', '-')}  " in targets for path in files)
