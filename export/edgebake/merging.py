"""Plain recipe data laid over other recipe data: mappings key by key, everything else as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merged(under: Any, over: Any) -> Any:
    """``over`` laid on ``under``; both stay as they are."""
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return over
    return {**under, **{key: merged(under[key], value) if key in under else value for key, value in over.items()}}


def without_nulls(value: Any) -> Any:
    """``value`` without keys that hold nothing, which mean "not given"; what stands under ``options`` stays."""
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if item is not None}
        return {key: item if key == "options" else without_nulls(item) for key, item in kept.items()}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def component_without_nulls(component: Any) -> Any:
    """Like ``without_nulls``, but a target's overrides keep theirs: there they take something away."""
    if not isinstance(component, Mapping):
        return component
    plain: dict[str, Any] = without_nulls({key: value for key, value in component.items() if key != "targets"})
    rules = component.get("targets")
    if isinstance(rules, list | tuple):
        plain["targets"] = [_given(rule) if isinstance(rule, Mapping) else rule for rule in rules]
    elif rules is not None:
        plain["targets"] = rules
    return plain


def _given(rule: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rule.items() if value is not None}


OVERRIDES = ("compress", "limits", "samples", "dims", "inputs", "model")


def with_overrides(component: Mapping[str, Any], rule: Mapping[str, Any]) -> dict[str, Any]:
    """Data of ``component`` as a target rule changes it; a rule's ``scheme`` is short for ``compress.scheme``."""
    changes = {key: rule[key] for key in OVERRIDES if rule.get(key)}
    result = merged({**component, "targets": []}, changes)
    if rule.get("scheme") is not None:
        result = merged(result, {"compress": {"scheme": rule["scheme"]}})
    plain: dict[str, Any] = without_nulls(result)
    return plain
