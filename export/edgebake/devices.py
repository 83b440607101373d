"""Device profiles: data about real hardware, read from ``edgebake_targets/devices.yaml`` when first asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

from edgebake import yaml_lines
from edgebake.errors import RecipeError
from edgebake.wording import did_you_mean, said


@lru_cache
def _data() -> Mapping[str, Any]:
    text = (files("edgebake_targets") / "devices.yaml").read_text("utf-8")
    data: Mapping[str, Any] = yaml_lines.parse(text).value
    return data


def names() -> tuple[str, ...]:
    """All device names, as in the file."""
    return tuple(_data()["devices"])


def find(name: str) -> Mapping[str, Any]:
    """The row of ``name``, with ``name`` in it; RecipeError with the nearest names when there is none.

    ``title`` ``vendor`` ``platform`` ``npu`` ``os_floor`` are text; ``ram_gib`` is the most that a device with this
    chip has; ``bandwidth_gb_s`` is 10^9 bytes a second. A row leaves out what is not known for certain.
    ``sources`` says where each fact comes from.
    """
    rows = _data()["devices"]
    if name not in rows:
        raise RecipeError(f"there is no device {said(name)}", fix=did_you_mean(name, rows))
    return {"name": name, **rows[name]}


def row(name: str | None) -> Mapping[str, Any] | None:
    """Like :func:`find`; None for no device."""
    return None if name is None else find(name)


def vendor_of_targets() -> Mapping[str, str]:
    """Globs on target names -> the only vendor whose chips they run on; targets not named run on any."""
    found: Mapping[str, str] = _data()["targets"]
    return found
