"""Words of error messages: values a user wrote, shown safely, and the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

LONGEST = 60


def visible(text: str) -> str:
    """``text`` on one line, with control, bidirectional and unpaired characters written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def said(value: object) -> str:
    """What the user wrote, quoted, escaped and shortened."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    if isinstance(value, dict | list | tuple):
        kind = "a mapping" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}"
    text = visible(value) if isinstance(value, str) else repr(value)
    short = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return f"'{short}'" if isinstance(value, str) else short


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` most likely means."""
    names = sorted(known)
    by_case = {name.lower().replace("_", "-"): name for name in names}
    folded = word[:200].lower().replace("_", "-")
    if folded in by_case:
        return by_case[folded]
    found = difflib.get_close_matches(folded, by_case, 1, 0.6)
    return by_case[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str], most: int = 24) -> str:
    """A fix that names the nearest known name and the others: ``did you mean 'scheme'? known: modules, scheme``."""
    names = sorted(known)
    near = nearest(word, names)
    shown = f"known: {listed(names, most)}" if names else "there are none yet"
    return (f"did you mean {near!r}? " if near else "") + shown


def listed(names: Sequence[str], most: int = 24) -> str:
    """``names`` between commas, and how many more there are than ``most``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def written(value: object) -> str:
    """A fact or setting as users write it: ``24`` for 24.0, ``true`` for True."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
