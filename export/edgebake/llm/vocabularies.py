"""Do two tokenizers mean the same by every number that both know?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgebake.errors import RecipeError
from edgebake.wording import said

FIX = "take a draft of the target's own family, or derive one: the target's model with layers: 4"


def differences(draft: Path, target: Path) -> Iterator[str]:
    """What ``draft`` and ``target``, two tokenizer.json, disagree on: a token, its number, whether it is special.

    Numbers that one side lacks at the end are padding, and no difference. RecipeError for what is no tokenizer.json.
    """
    ours, theirs = tokens(draft), tokens(target)
    shared = range(min(max(ours, default=-1), max(theirs, default=-1)) + 1)
    for number in shared:
        left, right = ours.get(number), theirs.get(number)
        if left == right:
            continue
        if left is None or right is None or left[0] != right[0]:
            yield f"the token {number} is {_named(left)} to the draft and {_named(right)} to the target"
        else:
            which = "draft" if left[1] else "target"
            yield f"the token {number}, {said(left[0])}, is special to the {which} alone"
        return


def _named(token: tuple[str, bool] | None) -> str:
    return "none" if token is None else said(token[0])


def tokens(path: Path) -> dict[int, tuple[str, bool]]:
    """Number -> (token, is it special) of all that ``path``, a tokenizer.json, knows; RecipeError where it is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
        words = content["model"]["vocab"]
        listed = words.items() if isinstance(words, Mapping) else ((word[0], n) for n, word in enumerate(words))
        found = {int(number): (str(word), False) for word, number in listed}
        added: list[Any] = content.get("added_tokens") or []
        return found | {int(token["id"]): (str(token["content"]), bool(token.get("special"))) for token in added}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise RecipeError(
            f"{path.name} cannot be read: {error}", where="model.path", fix="save the tokenizer again"
        ) from error
