"""A decoder's folder: do tokenizer, stop tokens and reach go with its configuration? JSON is read, no weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from edgebake.checks.case import Case, moved
from edgebake.errors import EdgebakeError, Problem, RecipeError
from edgebake.llm import companions, decoder, vocabularies
from edgebake.llm.streaming import streams
from edgebake.models import _paths
from edgebake.target import TARGETS


def problems(case: Case) -> Iterator[Problem]:
    """Of a decoder with a cache whose folder is here; models of the hub and GGUF files are looked at when built.

    What classes fill in where config.json is silent, and whether a chat template renders, is for ``load``.
    """
    folder = _folder(case)
    if folder is None:
        return
    where = case.where("model", "path")
    try:
        config = configuration(folder)
    except RecipeError as error:
        yield from moved(error, where)
        return
    for look, place in ((_reach, "context"), (_words, "path")):
        try:
            look(case, folder, config)
        except EdgebakeError as error:
            yield from moved(error, case.where("model", place))


def configuration(folder: Path) -> Mapping[str, Any]:
    """The parsed config.json of ``folder``, of its language model where it has several; RecipeError if it is none."""
    try:
        raw = json.loads((folder / companions.CONFIG).read_text("utf-8"))
        text: Mapping[str, Any] = raw.get("text_config") or raw
        return {**text}
    except (ValueError, AttributeError, TypeError) as error:
        what = f"{companions.CONFIG} is not a model's: {error}"
        raise RecipeError(what, where="model.path", fix="save it again, or copy the model again") from None


def _folder(case: Case) -> Path | None:
    model = case.unit.spec.model
    if model.context is None or model.source != "transformers":
        return None
    try:
        found = _paths.resolve(model.path, case.unit.base)
    except EdgebakeError:  # told by the model's own check, and so is a folder without config.json
        return None
    return found if isinstance(found, Path) and (found / companions.CONFIG).is_file() else None


def _reach(case: Case, _folder: Path, config: Mapping[str, Any]) -> None:
    context = case.unit.spec.model.context
    assert context is not None
    about = SimpleNamespace(**{"model_type": None, **config})
    decoder.refuse(about, context)
    if case.unit.target in TARGETS.names() and not streams(case.unit):
        decoder.refuse_traced(about, context)


def _words(_case: Case, folder: Path, config: Mapping[str, Any]) -> None:
    file = companions.companions(folder)[companions.TOKENIZER]
    words = config.get("vocab_size")
    if isinstance(words, int):
        about = file.stat()
        companions.refuse_other_words(*_largest(file, about.st_mtime_ns, about.st_size), words)
        companions.refuse_other_ends(companions.ends(folder, SimpleNamespace(**config)), words)


@lru_cache
def _largest(file: Path, _changed: int, _size: int) -> tuple[str, int]:
    """The token with the largest number: read once for all targets of a recipe, megabytes as it may be."""
    ids = vocabularies.tokens(file)
    number = max(ids, default=-1)
    return (ids[number][0] if ids else "", number)
