"""JSON that can be digested, signed, and put in place in one step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgebake.errors import ArtifactDamaged
from edgebake.store_files import replace_bytes, storage_errors

DIGEST = "digest"


def _refuse_ambiguous_keys(value: Any) -> None:
    """``json`` writes the keys 1, "1" and (for true) "true" alike; two such values must not share a digest."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a JSON object takes text as keys, not {key!r}")
            _refuse_ambiguous_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_ambiguous_keys(item)


def canonical_json(value: Any) -> str:
    """One text per value: keys sorted, no spaces, ASCII only, shortest floats.

    TypeError for what JSON cannot hold (and for keys that are not text), ValueError for nan and infinities.
    """
    _refuse_ambiguous_keys(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(value: Any) -> str:
    """SHA-256 of ``canonical_json(value)``, in hex."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def sign(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """``mapping`` with ``digest``: the digest of everything else in it. Against damage, not against forgery."""
    rest = {key: value for key, value in mapping.items() if key != DIGEST}
    return {**rest, DIGEST: digest_of(rest)}


def check_signature(mapping: Mapping[str, Any]) -> bool:
    """Does ``mapping["digest"]`` fit the rest?"""
    return DIGEST in mapping and sign(mapping)[DIGEST] == mapping[DIGEST]


def write_json_atomic(path: Path, value: Any) -> None:
    """Put ``value`` at ``path``, indented, keys sorted; a reader sees the old file or the new one.

    StoreError when the disk refuses, TypeError and ValueError as ``canonical_json``.
    """
    _refuse_ambiguous_keys(value)
    text = json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n"
    replace_bytes(path, text.encode("ascii"))


def read_json(path: Path) -> Any:
    """The value at ``path``. ArtifactDamaged when it is missing or not JSON, StoreError when it cannot be read."""
    with storage_errors("read", path):
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ArtifactDamaged("the file is missing", where=str(path), fix="build again") from None
        except (ValueError, RecursionError) as error:
            raise ArtifactDamaged(f"this is not JSON: {error}", where=str(path), fix="build again") from error
