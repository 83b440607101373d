"""What pydantic finds wrong in a recipe, in plain words, with the key it is about."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from edgebake.errors import Problem
from edgebake.recipe import RECIPE_KEYS, Component, Recipe
from edgebake.wording import LONGEST, did_you_mean, nearest, said

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Key = tuple[str | int, ...]

_KIND = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a mapping (key: value)",
    "mapping_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "tuple_type": "a list",
    "finite_number": "a finite number",
}
_BOUND = {
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "less than {lt}",
}


def problems_of(
    error: ValidationError, model: type[BaseModel], data: Any, where: Callable[[Key], str]
) -> list[Problem]:
    """One Problem per wrong key. ``where`` says file, line and key of a path into ``data``."""
    return [Problem(what=what, where=where(key), fix=fix) for key, what, fix in findings(error, model, data)]


def findings(error: ValidationError, model: type[BaseModel], data: Any) -> Iterator[tuple[Key, str, str]]:
    """Key, words and fix of each wrong key of ``data``; a missing key is found at the mapping that lacks it."""
    by_key: dict[Key, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(path_in(data, detail["loc"]), []).append(detail)
    for key, details in by_key.items():
        if any("constrained-int" in detail["loc"] for detail in details):  # the schema's one union, elements of shape
            got = said(details[0]["input"])
            yield key, f"must be a size (1 or more) or the name of a dimension, not {got}", ""
        else:
            yield from (_finding(detail, model, key) for detail in details)


def path_in(data: Any, location: tuple[str | int, ...]) -> Key:
    """The part of ``location`` that exists in ``data`` (pydantic adds the names of union members and validators)."""
    key: list[str | int] = []
    for part in location:
        there = part in data if isinstance(data, Mapping) else False
        if isinstance(data, list | tuple) and isinstance(part, int):
            there = part < len(data)
        if not there:
            continue
        data = data[part]
        key.append(part)
    return tuple(key)


def _finding(detail: ErrorDetails, model: type[BaseModel], key: Key) -> tuple[Key, str, str]:
    kind, location = detail["type"], detail["loc"]
    name = str(location[-1]) if location else ""
    if kind == "missing":
        help_ = fields_at(model, location[:-1]).get(name, "")
        return key, f"{name!r} is missing", f"{name}: {help_}" if help_ else f"add {name}:"
    if kind == "extra_forbidden":
        return key, f"unknown key {said(name)}", _fix_of_unknown(name, model, location[:-1])
    what, fix = _words(detail)
    if name == "[key]":
        return key, f"the name {said(detail['input'])} {what}", fix
    return key, what, fix


def _words(detail: ErrorDetails) -> tuple[str, str]:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    got = said(value)
    if kind in _KIND:
        fix = f"write '{got}' in quotes" if kind == "string_type" and isinstance(value, bool | int | float) else ""
        if kind == "tuple_type" and isinstance(value, str) and value.isprintable() and len(value) <= LONGEST:
            fix = f"write [{value}]"
        return f"must be {_KIND[kind]}, not {'the text ' if isinstance(value, str) else ''}{got}", fix
    if kind in _BOUND:
        return (
            f"must be {_BOUND[kind].format(**{name: f'{bound:g}' for name, bound in context.items()})}, not {got}",
            "",
        )
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        near = nearest(value, choices) if isinstance(value, str) else None
        return f"must be one of {', '.join(choices)}, not {got}", f"did you mean {near!r}?" if near else ""
    if kind == "value_error":
        return str(context["error"]), ""
    return _words_of_text(kind, value, got) or (f"is not valid here: {got}", "")


def _words_of_text(kind: str, value: Any, got: str) -> tuple[str, str] | None:
    if kind == "string_pattern_mismatch":
        slug = re.sub(r"[^a-z0-9._-]+", "-", str(value)[:100].lower()).strip("-._")
        what = f"may hold lower-case letters, digits, '.', '_' and '-', and begins with a letter or digit (got {got})"
        return what, f"for example {slug!r}" if slug else ""
    if kind in ("string_too_short", "too_short"):
        return "is empty", ""
    if kind == "too_long":
        return f"is {got}, more than edgebake takes", "split the recipe into several"
    if kind == "string_too_long":
        return "is longer than 100 characters", ""
    return None


def _fix_of_unknown(name: str, model: type[BaseModel], location: Key) -> str:
    known = RECIPE_KEYS if model is Recipe and not location else frozenset(fields_at(model, location))
    if nearest(name, known) is None:
        homes = [home for home in homes_of(name) if home]
        if len(homes) == 1:
            return f"{name!r} belongs under {homes[0]}"
    return did_you_mean(name, known)


def fields_at(model: type[BaseModel], location: Key) -> dict[str, str]:
    """Known keys (with their descriptions) of the mapping at ``location`` of a ``model``."""
    kind: Any = model
    for part in location:
        kind = _below(kind, part)
    found = next(_models_in(kind), None)
    return {name: field.description or "" for name, field in found.model_fields.items()} if found else {}


def homes_of(name: str) -> list[str]:
    """Where in a component the key ``name`` is known: ``limits.parity`` for ``cosine``."""
    return sorted(set(_homes(Component, name, ())))


def _homes(model: type[BaseModel], name: str, path: tuple[str, ...]) -> Iterator[str]:
    for field, info in model.model_fields.items():
        if field == name:
            yield ".".join(path)
        for below in _models_in(info.annotation):
            yield from _homes(below, name, (*path, field))


def _below(kind: Any, part: str | int) -> Any:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        return field.annotation if field else None
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _below(arguments[0], part)
    if origin in (Union, UnionType):
        return next((below for a in arguments if (below := _below(a, part)) is not None), None)
    if origin is tuple:
        return arguments[0]
    return arguments[1] if len(arguments) == 2 else None


def _models_in(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    elif get_origin(kind) in (Union, UnionType, Annotated):
        for argument in get_args(kind):
            yield from _models_in(argument)
