"""Is the model there, may it be read, does its source take what the recipe says? No weight is read, no code runs."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

from edgebake.callables import module_file, split_callable
from edgebake.checks.case import Case, moved
from edgebake.errors import EdgebakeError, Problem
from edgebake.llm.tasks import TASKS
from edgebake.models import _paths
from edgebake.models._index import check_index
from edgebake.models._safetensors import check_whole
from edgebake.recipe import Model
from edgebake.target import MODELS
from edgebake.wording import did_you_mean, said

# Model keys that only some sources look at; a plug-in's source may look at all.
_TAKES = {
    "task": ("transformers", "gguf", "meta"),
    "context": ("transformers", "gguf", "meta"),
    "revision": ("transformers",),
    "state_dict": ("python",),
    "remote_code": ("transformers",),
    "options": ("python", "meta"),
}


def problems(case: Case, trust: bool) -> Iterator[Problem]:
    """Everything about ``model:`` that can be refused without loading it."""
    model = case.unit.spec.model
    if model.source not in MODELS.names():
        fix = did_you_mean(model.source, MODELS.names())
        what = f"there is no model source {said(model.source)}"
        yield Problem(what=what, where=case.where("model", "source"), fix=fix)
        return
    if model.source not in _SOURCES:
        return
    for key, sources in _TAKES.items():
        if getattr(model, key) and model.source not in sources:
            what = f"the source {model.source} does not look at {key}:"
            yield Problem(what=what, where=case.where("model", key), fix=f"remove it, or use {' or '.join(sources)}")
    if not case.unit.spec.inputs and not case.unit.spec.methods:
        fix = "name every input with its shape and dtype, such as pixel_values: {shape: [1, 3, 224, 224]}"
        yield Problem(what="no inputs are given", where=case.where("model"), fix=fix)
    try:
        yield from _SOURCES[model.source](case, model, trust)
    except EdgebakeError as error:
        yield from moved(error, case.where("model", "path"))


def _transformers(case: Case, model: Model, _trust: bool) -> Iterator[Problem]:
    if model.remote_code is not None and model.remote_code != model.path:
        yield Problem(
            what=f"remote_code names {said(model.remote_code)}, but the model is {said(model.path)}",
            where=case.where("model", "remote_code"),
            fix="repeat model.path there, to say whose code may run",
        )
    folder = _paths.resolve(model.path, case.unit.base)
    if isinstance(folder, _paths.HubId):
        return
    if model.revision is not None:
        what = f"revision goes with a hub id; {said(model.path)} is a folder"
        yield Problem(what=what, where=case.where("model", "revision"), fix="remove it")
    if not (folder / "config.json").is_file():
        what = f"{said(model.path)} has no config.json"
        yield Problem(what=what, where=case.where("model", "path"), fix="give the model's folder")
        return
    check_index(folder)
    yield from _weights(case, model, folder)


def _weights(case: Case, model: Model, folder: Path) -> Iterator[Problem]:
    if model.weights == "random":
        return
    if any(folder.glob("*.safetensors")):
        check_whole(folder)
    elif not any(folder.glob("*.bin")):
        what, fix = f"{said(model.path)} has no *.safetensors", "copy the weights, too, or set weights: random"
        yield Problem(what=what, where=case.where("model", "path"), fix=fix)
    elif not model.pickles:
        yield Problem(
            what=f"{said(model.path)} has its weights as pickles only",
            where=case.where("model", "path"),
            fix="convert them to safetensors, or set pickles: true (they are read with weights_only)",
        )


def _gguf(case: Case, model: Model, _trust: bool) -> Iterator[Problem]:
    _paths.resolve_file(model.path, case.unit.base, ".gguf")
    yield from _only_trained(case, model)


def _meta(case: Case, model: Model, _trust: bool) -> Iterator[Problem]:
    from edgebake.models import meta

    if model.task is not None and model.task not in TASKS:
        what = f"the source meta reads decoders that generate text, the task is {said(model.task)}"
        yield Problem(what=what, where=case.where("model", "task"), fix="remove it")
    yield from _only_trained(case, model)
    try:
        meta.found(model, case.unit.base)
    except EdgebakeError as error:
        key = "options" if error.problems[0].where == "model.options" else "path"
        yield from moved(error, case.where("model", key))


def _exported(case: Case, model: Model, trust: bool) -> Iterator[Problem]:
    _paths.resolve_file(model.path, case.unit.base, ".pt2")
    if not trust:
        yield Problem(
            what=f"{said(model.path)} is an exported program, and loading one can run code",
            where=case.where("model", "path"),
            fix="build with --trust if you know where it comes from",
        )
    yield from _only_trained(case, model)


def _only_trained(case: Case, model: Model) -> Iterator[Problem]:
    if model.weights == "random":
        what = f"{said(model.path)} brings its weights: they cannot be random"
        yield Problem(what=what, where=case.where("model", "weights"), fix="remove weights: random")


def _python(case: Case, model: Model, _trust: bool) -> Iterator[Problem]:
    yield from callable_problems(model.path, case.unit.base, case.where("model", "path"))
    if model.state_dict is None:
        return
    where = case.where("model", "state_dict")
    try:
        file = _paths.resolve(model.state_dict, case.unit.base)
    except EdgebakeError as error:
        yield from moved(error, where)
        return
    if isinstance(file, _paths.HubId) or not file.is_file():
        fix = "give a file relative to the recipe, or pkg://package/file"
        yield Problem(what=f"there is no file {said(model.state_dict)}", where=where, fix=fix)
    elif file.suffix != ".safetensors" and not model.pickles:
        fix = "save it as safetensors, or set pickles: true (it is read with weights_only)"
        yield Problem(what=f"{said(model.state_dict)} is a pickle", where=where, fix=fix)


def callable_problems(name: str, base: Path, where: str) -> Iterator[Problem]:
    """Is there a module and does it define the function of ``module:function``? It is parsed, never imported."""
    try:
        module, function = split_callable(name)
        source = module_file(module, base)
        text = source.read_text("utf-8")
        names = _defined(ast.parse(text))
    except EdgebakeError as error:
        yield from moved(error, where)
        return
    except (OSError, SyntaxError, ValueError) as error:
        yield Problem(what=f"the module of {said(name)} is not valid Python: {error}", where=where, fix="correct it")
        return
    if names is not None and function not in names:
        what = f"the module {said(module)} defines no {said(function)}"
        yield Problem(what=what, where=where, fix=did_you_mean(function, (n for n in names if not n.startswith("_"))))


def _defined(tree: ast.Module) -> set[str] | None:
    """Names that the module binds anywhere; None when a star import hides them."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return None if "*" in names or "__getattr__" in names else names


_SOURCES: dict[str, Callable[[Case, Model, bool], Iterator[Problem]]] = {
    "transformers": _transformers,
    "gguf": _gguf,
    "meta": _meta,
    "exported": _exported,
    "python": _python,
}
