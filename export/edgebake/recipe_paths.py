"""Relative paths of an extended recipe, rewritten so that they hold from the recipe that extends it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MODEL = ("path", "state_dict")
_SAMPLES = ("file", "images", "text")


def rebased(data: Mapping[str, Any], old: Path, new: Path) -> Mapping[str, Any]:
    """``data`` with every path that exists relative to ``old`` written relative to ``new``, or in full.

    In full (absolute) where the file does not lie below ``new``: that is so for shipped recipes.
    """
    if old.resolve() == new.resolve():
        return data
    components = data.get("components")
    if not isinstance(components, Mapping):
        return data
    return {**data, "components": {name: _component(value, old, new) for name, value in components.items()}}


def _component(component: Any, old: Path, new: Path) -> Any:
    if not isinstance(component, Mapping):
        return component
    changed = dict(component)
    changed["model"] = _paths(component.get("model"), _MODEL, old, new)
    samples = component.get("samples")
    if isinstance(samples, Mapping):
        changed["samples"] = {purpose: _paths(value, _SAMPLES, old, new) for purpose, value in samples.items()}
    rules = component.get("targets")
    if isinstance(rules, list):
        changed["targets"] = [_component(rule, old, new) for rule in rules]
    return {key: value for key, value in changed.items() if key in component}


def _paths(section: Any, keys: tuple[str, ...], old: Path, new: Path) -> Any:
    if not isinstance(section, Mapping):
        return section
    return {key: _path(value, old, new) if key in keys else value for key, value in section.items()}


def _path(value: Any, old: Path, new: Path) -> Any:
    if not isinstance(value, str) or "://" in value or "\0" in value or len(value) > 1000:
        return value
    found = old / value
    if not value or found == Path(value) or not found.exists():
        return value
    full, root = found.resolve(), new.resolve()
    return full.relative_to(root).as_posix() if full.is_relative_to(root) else full.as_posix()
