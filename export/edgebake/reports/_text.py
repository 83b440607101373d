"""Strings that a model, a recipe or a tool chose, made harmless; numbers made short without flattering them."""

from __future__ import annotations

import math
import re

# CSI sequences such as colours go whole; of any other escape only the introducer, for an unterminated title string
# (OSC) would otherwise swallow the text that follows it, a missed limit's number for one
_ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-9;:?]*[A-Za-z]|\x1b[ -/]*[0-~]?")
_BREAKS = re.compile(r"[\s\x85\u2028\u2029]+")
# C0, DEL, C1, bidirectional overrides (they reorder what a reader sees), surrogates, and what XML 1.0 forbids
_ILLEGAL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_ASCII = str.maketrans({"×": "x", "–": "-", "…": "...", "─": "-", "→": "->", "≥": ">=", "≤": "<=", "·": "|"})


def plain(text: object) -> str:
    """One line without terminal escapes, control characters or direction overrides; legal in XML."""
    return " ".join(_ILLEGAL.sub("", _BREAKS.sub(" ", _ESCAPES.sub("", str(text)))).split())


def for_encoding(text: str, encoding: str) -> str:
    """``text`` in characters that ``encoding`` has; the report's own signs get ASCII stand-ins."""
    if encoding.lower().replace("-", "").startswith("utf"):
        return text
    return text.translate(_ASCII).encode(encoding, "replace").decode(encoding)


def number(value: float | None, digits: int = 6) -> str:
    """``digits`` significant digits, ``NaN`` for none; more where a number that is not whole would read as one.

    0.9999999 never reads 1, and a limit of that much never as a limit of 1.
    """
    if value is None or math.isnan(value):
        return "NaN"
    texts = (f"{value:.{count}g}" for count in range(digits, 18))
    whole = float(value).is_integer()
    return next((text for text in texts if whole or not float(text).is_integer()), repr(value))


def floored(value: float | None, digits: int) -> str:
    """``digits`` decimals, rounded down so that 99.96 never reads 100.0; ``NaN`` for none."""
    if value is None or math.isnan(value):
        return "NaN"
    scale = 10**digits
    # 0.29 * 100 is 28.999...: the tiny step up undoes what binary fractions took
    return f"{math.floor(value * scale + 1e-9) / scale:.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """``98.8 %``, rounded down."""
    return "NaN" if share is None or math.isnan(share) else f"{floored(100 * share, digits)} %"


def mib(size: float | None) -> str:
    """Bytes as MiB without the unit: ``21.9``, ``0.03``, ``<0.01``; ``-`` for none."""
    if size is None:
        return "-"
    value = size / 2**20
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}" if value >= 0.005 or not size else "<0.01"


def decibels(value: float | None) -> str:
    """``31.2 dB``; ``exact`` at the cap that measurements use for no difference at all."""
    if value is not None and value >= 200:
        return "exact"
    return f"{floored(value, 1)} dB" if value is not None else "NaN"


def counted(count: int, noun: str) -> str:
    """``1 limit``, ``2 limits``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
