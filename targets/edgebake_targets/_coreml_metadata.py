"""What a package says of itself: author, licence, labels, what it was made from. Deterministic, no dates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgebake.errors import Problem, RecipeError
from edgebake.target import LowerRequest
from edgebake.types import Signature

MADE_FROM = "edgebake.made_from"
COMPUTE_UNITS = "edgebake.compute_units"
LABELS = "labels"


def labels_of(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The option ``labels``: one a line, or between commas where it is one line."""
    text = str(options["labels"]).strip()
    parts = text.splitlines() if "\n" in text else text.split(",")
    return tuple(part.strip() for part in parts) if text else ()


def check_labels(options: Mapping[str, Any], signature: Signature) -> None:
    """RecipeError unless there are as many labels as classes, the last dimension of the first output."""
    labels = labels_of(options)
    if not labels:
        return
    problems = [
        Problem(
            what=f"{len(labels)} labels for the {size} classes of {method.outputs[0].name}",
            fix="options: {labels: ...} names every class in order, one a line or between commas",
        )
        for method in signature.methods.values()
        for size in method.outputs[0].shape[-1:]
        if size != len(labels)
    ]
    if wrong := empty_label(options):
        problems.append(wrong)
    if problems:
        raise RecipeError(problems)


def empty_label(options: Mapping[str, Any]) -> Problem | None:
    """The first label without a name, or None."""
    labels = labels_of(options)
    if "" not in labels:
        return None
    return Problem(what=f"label {labels.index('')} is empty", fix="give every class a name")


def write(spec: Any, request: LowerRequest, version: str) -> None:
    """Put into ``spec`` what the recipe and the options say; ``version`` is that of coremltools."""
    options, about = request.options, request.about
    metadata = spec.description.metadata
    metadata.shortDescription = str(options["description"] or about.description)
    metadata.license = str(options["licence"] or about.licence)
    metadata.author = str(options["author"])
    metadata.versionString = str(options["version"])
    facts = metadata.userDefined
    facts.clear()
    facts["com.github.apple.coremltools.version"] = version
    facts["com.github.apple.coremltools.source"] = "torch.export"
    facts[COMPUTE_UNITS] = str(options["compute_units"])
    if about.digest:
        facts[MADE_FROM] = about.digest
    labels = labels_of(options)
    if labels:
        facts[LABELS] = json.dumps(labels, ensure_ascii=False)
