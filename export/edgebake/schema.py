"""The JSON Schema of recipe files, for editors, made from the recipe's own definition.

It admits what a file may hold: the short form of one component, ``extends``, the short forms of targets, steps and
bundles. ``edgebake check`` remains the judge: it also knows targets, files and arithmetic.
"""

from __future__ import annotations

from typing import Any

from edgebake.recipe import Recipe

TITLE = "edgebake recipe"


def schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a recipe file as it is written."""
    written = Recipe.model_json_schema(by_alias=False)
    defs: dict[str, Any] = written["$defs"]
    for definition in defs.values():
        _admit_short_forms(definition)
    for name in set(defs) - {"TargetRule", "Step"}:  # an extending recipe writes only what it changes; lists are whole
        defs[name].pop("required", None)
    _admit_nothing(written)
    own = defs["Component"]["properties"]
    whole = written["properties"]
    whole["bundle"] = _or_text_or_list(whole["bundle"])
    properties = {
        "name": whole["name"],
        "description": whole["description"],
        "extends": {
            "type": "string",
            "description": "a recipe file in this folder or below, or a shipped recipe; what is written here wins",
        },
        **own,
        **{key: value for key, value in whole.items() if key not in ("name", "description")},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": TITLE,
        "description": "What model, how to compress it, for which targets, and what it must still be able to do.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "anyOf": [{"required": ["name", "model"]}, {"required": ["name", "components"]}, {"required": ["extends"]}],
        "not": {"allOf": [{"required": ["components"]}, {"anyOf": [{"required": [key]} for key in own]}]},
        "$defs": defs,
    }


def _admit_short_forms(definition: dict[str, Any]) -> None:
    properties = definition.get("properties", {})
    if "targets" in properties:
        rule = {"anyOf": [{"type": "string", "description": "a target's name"}, properties["targets"]["items"]]}
        properties["targets"] = {**properties["targets"], "items": rule}
    if "steps" in properties:
        step = {"anyOf": [{"type": "string", "description": "a method's name"}, properties["steps"]["items"]]}
        properties["steps"] = {**properties["steps"], "items": step}
    if "delegated" in properties:
        share = {"type": "string", "pattern": r"^\s*[0-9.]+\s*%\s*$"}
        properties["delegated"] = {**properties["delegated"], "anyOf": [share, *properties["delegated"]["anyOf"]]}
    _admit_nothing(definition)


def _admit_nothing(definition: dict[str, Any]) -> None:
    """A key without a value means "not given", except where a value is required."""
    required = definition.get("required", [])
    for key, kind in definition.get("properties", {}).items():
        if key not in required and {"type": "null"} not in kind.get("anyOf", []):
            described = {k: kind[k] for k in ("description", "default", "title") if k in kind}
            rest = {k: v for k, v in kind.items() if k not in described}
            definition["properties"][key] = {"anyOf": [rest, {"type": "null"}], **described}


def _or_text_or_list(kind: dict[str, Any]) -> dict[str, Any]:
    short = [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    return {**kind, "anyOf": [*short, *kind["anyOf"]]}
