"""The command line in this process, and one small build that the tests of all verbs look at."""

from __future__ import annotations

import sys

import pytest

import baking
from edgebake.cli import main
from verbs import Baked, Edgebake, Said, recipe


@pytest.fixture
def edgebake(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Edgebake:
    """``edgebake("verify", folder)``: the verb run as by the console script, with a store of the test's own."""
    monkeypatch.setenv("EDGEBAKE_STORE", str(tmp_path_factory.mktemp("store")))

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["edgebake", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Said(int(end.value.code or 0), out, err)

    return run


@pytest.fixture(scope="session")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Baked:
    """Two ONNX artifacts of a network of three layers, packed; limits that they meet."""
    folder = tmp_path_factory.mktemp("verbs")
    targets = ["onnx-cpu", {"target": "onnx-cpu", "scheme": "w8"}]
    path = recipe(folder / "recipe", targets, bundle=["zip"])
    made = Baked(path, folder / "store", folder / "dist")
    done = baking.finish(baking.start("build", path, "--store", made.store, "--out", made.out))
    assert done.code == 0, done.err
    return made
