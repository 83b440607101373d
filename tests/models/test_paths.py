"""Where models are found and what their fingerprints depend on."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from edgebake.errors import HubUnreachable, RecipeError
from edgebake.models import _paths
from edgebake.models._index import check_index
from edgebake.recipe import Model


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def transformers_model(path: str, **more: object) -> Model:
    return Model.model_validate({"source": "transformers", "path": path, **more})


def folder_with(root: Path, **files: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)
    return root


@pytest.fixture
def explosive_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    package = folder_with(site / "explosive_weights", __init____py="", data__txt="x")
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "model").mkdir()
    monkeypatch.syspath_prepend(str(site))
    return package


def test_a_package_folder_is_found_without_importing_the_package(explosive_package: Path, tmp_path: Path) -> None:
    assert _paths.resolve("pkg://explosive_weights/model", tmp_path) == explosive_package / "model"
    assert "explosive_weights" not in sys.modules


def test_a_package_that_is_not_installed_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="pip install --no-deps no-such-package"):
        _paths.resolve("pkg://no_such_package/model", tmp_path)


@pytest.mark.parametrize("path", ["pkg://explosive_weights/../site", "pkg://explosive_weights//etc", "pkg://a.b/c"])
def test_a_package_path_cannot_leave_its_package(path: str, explosive_package: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        _paths.resolve(path, tmp_path)


def test_a_folder_beside_the_recipe_wins_over_a_hub_id_of_that_name(tmp_path: Path) -> None:
    assert _paths.resolve("org/name", tmp_path) == _paths.HubId(repo="org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert _paths.resolve("org/name", tmp_path) == tmp_path / "org" / "name"


@pytest.mark.parametrize("path", ["./model", "../model", "/no/such/model", "weights.gguf", "a/b/c", "a b"])
def test_a_path_that_cannot_be_a_hub_id_must_exist(path: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no"):
        _paths.resolve(path, tmp_path)


@pytest.mark.parametrize("shard", ["../out.safetensors", "/etc/out.safetensors", "C:\\out", "a/../../x", "", 3])
def test_an_index_that_names_files_outside_the_folder_is_refused(shard: object, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"w": shard}})
    folder = folder_with(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(index)
    (tmp_path / "out.safetensors").write_bytes(b"x")
    with pytest.raises(RecipeError, match="outside the model's folder"):
        check_index(folder)


def test_an_index_may_not_reach_outside_through_a_link_but_a_hub_snapshot_may_link_its_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    blob = folder_with(repo / "blobs", weights="x") / "weights"
    for folder in (tmp_path / "plain", repo / "snapshots" / ("a" * 40)):
        folder_with(folder)
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "one.safetensors"}}')
        (folder / "one.safetensors").symlink_to(blob)
    check_index(repo / "snapshots" / ("a" * 40))
    with pytest.raises(RecipeError, match="outside"):
        check_index(tmp_path / "plain")


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "gone.safetensors"}}')
    with pytest.raises(RecipeError, match="missing"):
        check_index(tmp_path)


def test_a_fingerprint_depends_on_the_weights_and_not_on_the_place_or_the_readme(tmp_path: Path) -> None:
    for place in ("a", "b"):
        folder_with(tmp_path / place / "m", config__json="{}", model__safetensors="1", README__md=place)
    first = _paths.fingerprint(transformers_model("m"), tmp_path / "a", digest)
    assert first == _paths.fingerprint(transformers_model("m"), tmp_path / "b", digest)
    assert set(first) == {"config.json", "model.safetensors"}
    (tmp_path / "b" / "m" / "model.safetensors").write_text("2")
    assert first != _paths.fingerprint(transformers_model("m"), tmp_path / "b", digest)


def test_a_fingerprint_of_random_weights_leaves_the_weights_out(tmp_path: Path) -> None:
    folder_with(tmp_path / "m", config__json="{}", model__safetensors="1")
    assert set(_paths.fingerprint(transformers_model("m", weights="random"), tmp_path, digest)) == {"config.json"}


def test_pickles_and_code_count_only_where_the_recipe_allows_them(tmp_path: Path) -> None:
    folder_with(tmp_path / "m", config__json="{}", pytorch_model__bin="1", modeling__py="")
    assert set(_paths.fingerprint(transformers_model("m"), tmp_path, digest)) == {"config.json"}
    allowed = transformers_model("m", pickles=True, remote_code="m")
    assert set(_paths.fingerprint(allowed, tmp_path, digest)) == {"config.json", "pytorch_model.bin", "modeling.py"}


def test_a_python_models_fingerprint_covers_what_it_may_import_and_runs_nothing(tmp_path: Path) -> None:
    folder_with(tmp_path, net__py="raise SystemExit('imported')", layers__py="A = 1", w__safetensors="1")
    folder_with(tmp_path / "blocks", __init____py="")
    (tmp_path / "blocks" / "__init__.py").write_text("B = 1")
    model = Model(source="python", path="net:build", state_dict="w.safetensors")
    first = _paths.fingerprint(model, tmp_path, digest)
    assert {"code/net.py", "code/layers.py", "code/blocks/__init__.py", "state_dict/w.safetensors"} <= set(first)
    (tmp_path / "layers.py").write_text("A = 2")
    assert first != _paths.fingerprint(model, tmp_path, digest)


def test_a_python_model_names_the_packages_that_carry_its_weights(tmp_path: Path) -> None:
    folder_with(tmp_path, net__py="DISTRIBUTIONS = ('pytest',)", gone__py="DISTRIBUTIONS = ('no-such-thing',)")
    found = _paths.fingerprint(Model(source="python", path="net:build"), tmp_path, digest)
    assert found["distribution/pytest"] == pytest.__version__
    with pytest.raises(RecipeError, match="pip install --no-deps no-such-thing"):
        _paths.fingerprint(Model(source="python", path="gone:build"), tmp_path, digest)


def test_a_shipped_model_depends_on_its_own_folder_and_its_package() -> None:
    model = Model(source="python", path="edgebake.models.zoo.silero_vad:model")
    found = _paths.fingerprint(model, Path("/"), digest)
    assert "code/silero_vad.py" in found and "distribution/silero-vad" in found
    assert "code/trace.py" not in found


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_cached_hub_model_is_its_commit_without_network(hub_cache: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = hub_cache / "models--org--name"
    folder_with(repo / "refs", main=commit)
    folder_with(repo / "snapshots" / commit, config__json="{}")
    assert _paths.fingerprint(transformers_model("org/name"), tmp_path, digest) == {"hub": f"org/name@{commit}"}


def test_a_hub_model_that_is_not_cached_is_a_clear_error_offline(hub_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(HubUnreachable, match=r"neither a folder .* nor in the local hub cache"):
        _paths.fingerprint(transformers_model("org/absent"), tmp_path, digest)


def test_a_commit_needs_no_lookup(hub_cache: Path, tmp_path: Path) -> None:
    pinned = transformers_model("org/absent", revision="f" * 40)
    assert _paths.fingerprint(pinned, tmp_path, digest) == {"hub": f"org/absent@{'f' * 40}"}
