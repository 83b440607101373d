"""The JSON Schema for editors: committed as generated, and of one mind with the reader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgebake.recipe_files import recipes_folder
from edgebake.recipe_yaml import list_shipped
from edgebake.schema import schema

TABLES = Path(__file__).with_name("bad_recipes")
GOOD = (TABLES / "good.yaml").read_text()
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
KNOWN = {
    *("$ref", "type", "anyOf", "allOf", "not", "enum", "const", "required", "properties", "additionalProperties"),
    *(
        "items",
        "maxItems",
        "pattern",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "minLength",
        "maxLength",
        "minProperties",
    ),
    *("description", "title", "default", "$schema", "$defs", "propertyNames", "patternProperties"),
}
SCHEMA = schema()


def fits(kind: Any, value: Any) -> bool:
    """Does ``value`` fit, by the keywords that our schema uses; a keyword that this does not know fails."""
    if kind is True or kind is False:
        return bool(kind)
    assert set(kind) <= KNOWN, set(kind) - KNOWN
    if "$ref" in kind:
        return fits(SCHEMA["$defs"][kind["$ref"].rpartition("/")[2]], value)
    return (
        _fits_scalar(kind, value)
        and all(fits(part, value) for part in kind.get("allOf", ()))
        and ("anyOf" not in kind or any(fits(part, value) for part in kind["anyOf"]))
        and not ("not" in kind and fits(kind["not"], value))
        and (not isinstance(value, dict) or _fits_object(kind, value))
        and (not isinstance(value, list) or all(fits(kind.get("items", True), item) for item in value))
        and (not isinstance(value, list) or len(value) <= kind.get("maxItems", len(value)))
    )


def _fits_scalar(kind: dict[str, Any], value: Any) -> bool:
    if "type" in kind and not (
        isinstance(value, TYPES[kind["type"]]) and (value is not True or kind["type"] == "boolean")
    ):
        return False
    if "enum" in kind and value not in kind["enum"]:
        return False
    if isinstance(value, str):
        return bool(re.search(kind.get("pattern", ""), value)) and len(value) >= kind.get("minLength", 0)
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = kind.get("minimum", float("-inf")), kind.get("maximum", float("inf"))
        return bool(low <= value <= high and value > kind.get("exclusiveMinimum", float("-inf")))
    return True


def _fits_object(kind: dict[str, Any], value: dict[str, Any]) -> bool:
    known, extra, by_pattern = (
        kind.get("properties", {}),
        kind.get("additionalProperties", True),
        kind.get("patternProperties", {}),
    )
    for key, item in value.items():
        matching = [part for pattern, part in by_pattern.items() if re.search(pattern, key)]
        if not all(fits(part, item) for part in matching or [known.get(key, extra)]):
            return False
    return set(kind.get("required", ())) <= set(value)


def test_the_committed_schema_is_the_generated_one() -> None:
    committed = json.loads((recipes_folder() / "recipe.schema.json").read_text())
    assert committed == SCHEMA, "run `edgebake schema > recipes/recipe.schema.json`"


@pytest.mark.parametrize("name", sorted(list_shipped()))
def test_shipped_recipes_fit_the_schema(name: str) -> None:
    assert fits(SCHEMA, yaml.safe_load(list_shipped()[name].read_text()))


def test_short_forms_extends_and_empty_keys_fit() -> None:
    for text in (
        GOOD,
        "extends: minilm-l6\nlimits: {parity: {cosine: 0.9}}\n",
        "name: a\ncomponents: {one: {model: {source: python, path: 'a:b'}, targets: [coreml]}}\nbundle: [android]\n",
        GOOD.replace("scheme: w8a8d", "scheme: w8a8d\n  steps: [gptq, {method: awq, options: {a: 1}}]"),
        GOOD.replace("  parity: {cosine: 0.99, sqnr_db: 25}", "  parity:"),
    ):
        assert fits(SCHEMA, yaml.safe_load(text)), text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: good", "name: Good Name"),
        ("name: good", "title: good"),
        ("int64}\n  att", "int46}\n  att"),
        ("cosine: 0.99", "cosine: 1.01"),
        ("cosine: 0.99", "cosin: 0.99"),
        ("shape: [1, seq], dtype: int64}\n  att", "shape: 5}\n  att"),
        ("executorch-xnnpack", "{scheme: w8}"),
        ("executorch-xnnpack", "5"),
        ("delegated: 95%", "delegated: most"),
        ("name: good", "name: good\ncomponents: {}"),
    ],
)
def test_what_the_reader_refuses_by_shape_the_schema_refuses(old: str, new: str) -> None:
    assert GOOD.count(old) == 1 and fits(SCHEMA, yaml.safe_load(GOOD))
    assert not fits(SCHEMA, yaml.safe_load(GOOD.replace(old, new)))


def test_every_key_that_needs_words_has_a_description() -> None:
    for name in ("Model", "Samples", "TargetRule", "Compress"):
        described = [key for key, kind in SCHEMA["$defs"][name]["properties"].items() if "description" in kind]
        assert len(described) * 2 > len(SCHEMA["$defs"][name]["properties"]), name
