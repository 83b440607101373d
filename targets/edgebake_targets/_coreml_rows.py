"""What packages and ExecuTorch's parts hold alike: schemes with the reason of each, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edgebake.target import LowerRequest, Support
from edgebake.types import ModuleKind

ALL: tuple[ModuleKind, ...] = ("linear", "conv", "embedding")
IOS18 = {"minimum_os": ("iOS18", "macOS15")}

FP32 = Support(scheme="fp32", kinds=ALL, note="runs on CPU and GPU; the Neural Engine computes in float16 only")
W8 = "int8 per output channel, decompressed at load or on the fly; computes in float16"
INT4 = (
    Support(scheme="w4", kinds=ALL, needs=IOS18, note="int4 per output channel; from iOS 18, macOS 15"),
    *(
        Support(
            scheme=f"w4g{group}",
            kinds=ALL,
            needs=IOS18,
            note=f"int4, one scale per output channel and {group} input channels, which must be divisible by {group}; "
            "from iOS 18, macOS 15",
        )
        for group in (16, 32, 64, 128)
    ),
)


INT8 = tuple(
    Support(
        scheme=f"w8g{group}",
        kinds=ALL,
        needs=IOS18,
        note=f"int8, one scale per output channel and {group} input channels, which must be divisible by {group}; "
        "from iOS 18, macOS 15",
    )
    for group in (32, 64)
)


def palette(bits: int) -> str:
    """What one table per weight is."""
    return f"one table of {2**bits} values per weight"


def grouped_palettes(sizes: Iterable[tuple[int, int]]) -> tuple[Support, ...]:
    """Tables of so many bits for so many output channels each."""
    return tuple(
        Support(
            scheme=f"palette{bits}g{group}",
            kinds=ALL,
            needs=IOS18,
            note=f"one table of {2**bits} values per {group} output channels, which must be divisible by {group}; "
            "from iOS 18, macOS 15",
        )
        for bits, group in sizes
    )


def encodings(request: LowerRequest, floats: str) -> dict[str, Any]:
    """Schemes by module, precision, and the note of what stays float16 where ``floats`` says which values."""
    from edgebake_targets._coreml_options import precision_of
    from edgebake_targets._coreml_schemes import is_compressed

    schemes = request.assignment.by_scheme()
    halves = any(map(is_compressed, schemes)) and precision_of(request) == "fp16"
    notes = [f"{floats}, biases and activations are float16"] if halves else []
    return {"schemes": schemes, "compute_precision": precision_of(request), "notes": notes}


def add_states(found: dict[str, Any], states: Mapping[str, Mapping[str, str]]) -> None:
    """Name the buffers that became states, by package or method, in what ``encodings`` gave."""
    kept = {where: dict(names) for where, names in states.items() if names}
    if kept:
        found["states"] = kept
        found["notes"].append("states are float16 between predictions, whatever the operators compute in")
