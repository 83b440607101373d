"""`edgebake schema`: the JSON Schema of recipes."""

from __future__ import annotations

from edgebake.commands import _shared


def run(*, as_json: bool) -> int:  # noqa: ARG001 - it is JSON either way
    """Print it."""
    from edgebake.schema import schema

    _shared.print_json(schema())
    return 0
