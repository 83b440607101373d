"""Layers of a recipe: one file's data in full form with the line of every key, laid over each other and set by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgebake import yaml_lines
from edgebake.errors import Problem, RecipeError
from edgebake.merging import merged
from edgebake.recipe import COMPONENT_KEYS, RECIPE_KEYS, SHORTHAND_COMPONENT, Recipe
from edgebake.recipe_words import Key
from edgebake.wording import did_you_mean, said, visible

_SEGMENT = re.compile(r'"([^"]+)"|([^."]+)')


@dataclass(frozen=True)
class Mark:
    """Where a key was written: ``line`` counts from 1 (0: on the command line), ``key`` as the user wrote it."""

    file: str
    line: int
    key: Key

    def where(self, rest: Key = ()) -> str:
        """``file:line:key``."""
        dotted = visible(".".join(str(part) for part in (*self.key, *rest)))
        if not self.line:
            return f"{self.file} {dotted}"
        return f"{visible(self.file)}:{self.line}" + (f":{dotted}" if dotted else "")


@dataclass(frozen=True)
class Layer:
    """Recipe data with ``components`` written out, and the mark of each key."""

    data: Mapping[str, Any]
    marks: Mapping[Key, Mark]

    def where(self, key: Key) -> str:
        """``file:line:key`` of the nearest key that was written."""
        for length in range(len(key), -1, -1):
            if mark := self.marks.get(key[:length]):
                return mark.where(key[length:])
        return ""


def layer_of(text: str, shown: str, problems: list[Problem]) -> Layer:
    """Parse one file. RecipeError when it is no YAML mapping; lesser faults go to ``problems``."""
    try:
        document = yaml_lines.parse(text)
    except yaml_lines.YamlError as error:
        fault = error.fault
        raise RecipeError(fault.what, where=Mark(shown, fault.line, fault.key).where(), fix=fault.fix) from None
    if not isinstance(document.value, dict):
        what = "is empty" if document.value is None else f"is not a recipe but {said(document.value)}"
        line = document.lines[()]
        raise RecipeError(what, where=f"{visible(shown)}:{line}", fix="write keys such as name:, model:, targets:")
    for fault in document.faults:
        where = Mark(shown, fault.line, fault.key).where()
        problems.append(Problem(what=fault.what, where=where, fix=fault.fix))
    marks = {key: Mark(shown, line, key) for key, line in document.lines.items()}
    return _written_out(Layer(document.value, marks), problems)


def _written_out(layer: Layer, problems: list[Problem]) -> Layer:
    """The short form of a recipe with one component, as ``components: {model: ...}``."""
    short = [key for key in layer.data if key in COMPONENT_KEYS]
    if not short:
        return layer
    if layer.data.get("components") is not None:
        for key in short:
            what = f"{key!r} stands beside components: it belongs to one of them"
            fix = f"move it under one of: {_names(layer.data['components'])}"
            problems.append(Problem(what=what, where=layer.where((key,)), fix=fix))
        return Layer({key: value for key, value in layer.data.items() if key not in short}, layer.marks)
    data = {key: value for key, value in layer.data.items() if key not in short and key != "components"}
    data["components"] = {SHORTHAND_COMPONENT: {key: layer.data[key] for key in short}}
    moved: dict[Key, Mark] = {("components",): layer.marks[()]}
    moved["components", SHORTHAND_COMPONENT] = layer.marks[()]
    for place, mark in layer.marks.items():
        moved[("components", SHORTHAND_COMPONENT, *place) if place and place[0] in short else place] = mark
    return Layer(data, moved)


def laid_over(under: Layer, over: Layer, problems: list[Problem]) -> Layer:
    """``over`` (a recipe that extends) on ``under`` (the extended one)."""
    known, given = under.data.get("components"), over.data.get("components")
    if isinstance(known, Mapping) and isinstance(given, Mapping):
        short = over.marks.get(("components", SHORTHAND_COMPONENT)) is over.marks[()]
        if short and SHORTHAND_COMPONENT not in known:
            what = f"the extended recipe has several components: {_names(known)}"
            where = over.where(("components", SHORTHAND_COMPONENT, next(iter(given[SHORTHAND_COMPONENT]))))
            problems.append(Problem(what=what, where=where, fix="write components: {<one of them>: ...}"))
    kept = {key: mark for key, mark in under.marks.items() if not _replaced(over.data, key)}
    return Layer(merged(under.data, over.data), {**kept, **over.marks})


def _replaced(data: Any, key: Key) -> bool:
    for part in key:
        if not isinstance(data, Mapping):
            return True
        if part not in data:
            return False
        data = data[part]
    return not isinstance(data, Mapping)


def with_settings(layer: Layer, settings: Iterable[str], problems: list[Problem]) -> Layer:
    """``layer`` after each ``a.b.c=value``; the value is YAML, a segment with dots stands in double quotes."""
    for setting in settings:
        dotted, equals, text = setting.partition("=")
        where = f"--set {visible(dotted)}"
        try:
            if not equals or not text.strip():
                fix = f"write key=value, such as compress.scheme=w8; {visible(dotted)}=null takes the key away"
                raise ValueError("says no value", fix if equals else fix.partition(";")[0])
            written = _segments(dotted)
            key = _full_key(written, layer.data)
            layer = _set(layer, key, _value(text), Mark("--set", 0, written))
        except ValueError as error:
            problems.append(Problem(what=str(error.args[0]), where=where, fix="".join(error.args[1:])))
    return layer


def _segments(dotted: str) -> Key:
    segments = tuple(quoted or plain for quoted, plain in _SEGMENT.findall(dotted))
    rebuilt = _SEGMENT.sub("x", dotted)
    if not segments or rebuilt != ".".join("x" for _ in segments):
        raise ValueError(f"{said(dotted)} is not a key", "write a.b.c=value; put a part with dots in double quotes")
    if segments[0] == "extends" or len(segments) > yaml_lines.MAX_DEPTH:
        raise ValueError(f"{said(dotted)} cannot be set", "write it into the recipe")
    return segments


def _full_key(written: Key, data: Mapping[str, Any]) -> Key:
    first = str(written[0])
    if first in Recipe.model_fields:
        return written
    if first not in COMPONENT_KEYS:
        raise ValueError(f"unknown key {said(first)}", did_you_mean(first, RECIPE_KEYS - {"extends"}))
    components = data.get("components")
    if isinstance(components, Mapping) and len(components) > 1:
        dotted = ".".join(map(str, written))
        raise ValueError("which component?", f"write components.<one of {_names(components)}>.{dotted}")
    only = next(iter(components), SHORTHAND_COMPONENT) if isinstance(components, Mapping) else SHORTHAND_COMPONENT
    return ("components", only, *written)


def _value(text: str) -> Any:
    try:
        document = yaml_lines.parse(text)
    except yaml_lines.YamlError as error:
        raise ValueError(f"its value is wrong: {error.fault.what}", error.fault.fix) from None
    if document.faults:
        raise ValueError(document.faults[0].what)
    return document.value


def _set(layer: Layer, key: Key, value: Any, mark: Mark) -> Layer:
    place, data = _set_in(layer.data, key, value, "")
    kept = {known: old for known, old in layer.marks.items() if known[: len(place)] != place}
    return Layer(data, {**kept, place: mark})


def _set_in(data: Any, key: Key, value: Any, under: str | int) -> tuple[Key, Any]:
    """The path that was set (list positions as numbers) and the changed copy of ``data``."""
    if not key:
        return (), value
    part: str | int = key[0]
    if isinstance(data, list):
        part = _position(str(part), len(data))
        short = under == "targets" and isinstance(data[part], str) and len(key) > 1
        rest, changed = _set_in({"target": data[part]} if short else data[part], key[1:], value, part)
        return (part, *rest), [*data[:part], changed, *data[part + 1 :]]
    if data is not None and not isinstance(data, Mapping):
        raise ValueError(f"there is no key {said(part)} in {said(data)}")
    known = data or {}
    rest, changed = _set_in(known.get(part), key[1:], value, part)
    return (part, *rest), {**known, part: changed}


def _position(part: str, count: int) -> int:
    if part.isdecimal() and len(part) < 6 and int(part) < count:
        return int(part)
    raise ValueError(f"{said(part)} is no position in a list of {count}", f"write 0 to {count - 1}" if count else "")


def _names(components: Any) -> str:
    return ", ".join(visible(str(name))[:40] for name in components) if isinstance(components, Mapping) else "them"
