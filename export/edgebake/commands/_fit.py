"""What `edgebake plan` says of a language model's predicted sizes, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgebake.wording import listed

_GIB, _MIB = 1 << 30, 1 << 20
_SHOWN_DEVICES = 8


def lines(fit: Mapping[str, Any]) -> Iterator[str]:
    """The document of ``edgebake.llm.fit`` as lines."""
    if "unknown" in fit:
        yield f"nothing predicted: {fit['unknown']}" + (f" -> {fit['fix']}" if fit["fix"] else "")
        return
    size, cache, memory, context = fit["size"], fit["kv_cache"], fit["device_memory"], fit["context"]
    parts = [_part(name, part) for name, part in size["parts"].items() if part["bytes"]]
    yield (
        f"predicted file: {_amount(size['bytes'])}, {fit['parameters'] / 1e9:.3g} billion parameters: "
        + ", ".join([*parts, f"program {_amount(size['program'])}"])
    )
    by_context = [f"{_amount(n)} for {c}" for c, n in cache["bytes_by_context"].items() if int(c) <= 4 * context]
    yield f"predicted {cache['dtype']} cache of keys and values, by tokens of context: {', '.join(by_context)}"
    held = ", ".join(f"{name} {_amount(memory[name])}" for name in ("weights", "cache", "activations", "runtime"))
    yield f"predicted memory on a device at {context} tokens: {_amount(memory['bytes'])} ({held})"
    yield from _export(fit["export"])
    yield from _devices(fit["devices"], context)


def _part(name: str, part: Mapping[str, Any]) -> str:
    schemes = " ".join(part["schemes"])
    return f"{name} {_amount(part['bytes'])}" + (f" {schemes}" if schemes else "")


def _export(export: Mapping[str, Any]) -> Iterator[str]:
    here, peak = _amount(export["memory_here_bytes"]), export["peak_bytes"]
    verdict = "" if export["fits_here"] else ": build will refuse"
    memory = f"a peak of {_amount(peak)} of {here}{verdict}" if peak is not None else "a peak that is not known"
    yield f"predicted export here: {memory}, {_amount(export['disk_bytes'])} of disk"


def _devices(judged: Sequence[Mapping[str, Any]], context: int) -> Iterator[str]:
    if len(judged) == 1:
        yield f"predicted on {judged[0]['device']}: {_device(judged[0], context)}"
        return
    counts = Counter(one["verdict"] for one in judged)
    yield f"predicted on {len(judged)} devices: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    for verdict in ("fits with less context", "does not fit"):
        groups: dict[str, list[str]] = {}
        for one in judged:
            if one["verdict"] == verdict:
                groups.setdefault(f"{one['ram_gib']:g} GiB: {_would(one)}", []).append(one["device"])
        for what, names in groups.items():
            yield f"  {verdict}: {listed(names, _SHOWN_DEVICES)} ({what})"


def _device(one: Mapping[str, Any], context: int) -> str:
    speed = one["decode_tokens_s"]
    decode = (
        f"decodes at most {speed['empty']:.3g} tokens/s, {speed['full']:.3g} at {context} tokens of context"
        if speed
        else "no bound on its speed, as its memory bandwidth is not known"
    )
    if one["verdict"] == "unknown":
        return f"fit unknown, {one['why']}; {decode}"
    usable = f"{_amount(one['usable_bytes'])} of {one['ram_gib']:g} GiB for one application"
    most = f"up to {one['context']} tokens of context" if one["context"] else "at no context"
    ends = f"; would fit: {_would(one)}" if one["would"] else ""
    return f"{one['verdict']} ({usable}, {most}); {decode}{ends}"


def _would(one: Mapping[str, Any]) -> str:
    return " or ".join(one["would"])


def _amount(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / _MIB:.1f} MiB"
