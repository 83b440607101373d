"""How much faster a draft should make its target on a device: predicted from the bytes that both read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgebake.errors import EdgebakeError
from edgebake.llm import fit, fit_memory
from edgebake.units import Unit


def expected(
    draft: Unit, target: Unit, tokens: int, per_step: float, device: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Plain data: speed-up with an empty and a full cache; tokens a second where ``device`` has a bandwidth.

    ``speedup = per_step * T / (T + tokens * D)`` where T and D are the bytes that a call of target and draft read: time
    is bytes over bandwidth (:func:`edgebake.llm.fit_memory.decode_tokens_s`), reading ``tokens`` more in one call reads
    the same weights. This is theorem 3.8 of Leviathan et al. 2023 with the cost coefficient c = D / T and the measured
    ``per_step`` in the place of its expectation, (1 - alpha^(gamma + 1)) / (1 - alpha).
    """
    try:
        ours, theirs = fit.predict(draft), fit.predict(target)
    except EdgebakeError as error:
        return {"kind": "predicted", "reason": error.problems[0].what}
    found: dict[str, Any] = {"kind": "predicted", "device": device["name"] if device else None, "reason": ""}
    bandwidth = device.get("bandwidth_gb_s") if device else None
    for name, context in (("empty", 0), ("full", min(ours.context, theirs.context))):
        read, more = (fit_memory.bytes_per_token(p.decoder, p.size, p.cache, context) for p in (theirs, ours))
        step = read + tokens * more
        found[name] = {"target_bytes": read, "draft_bytes": more, "speedup": per_step * read / step}
        if bandwidth is not None:
            alone = fit_memory.decode_tokens_s(read, bandwidth)
            found[name] |= {"alone_tokens_per_s": alone, "tokens_per_s": alone * found[name]["speedup"]}
    return found
