"""What all targets for Qualcomm's NPU (HTP) take and refuse, whatever runtime feeds it."""

from __future__ import annotations

from collections.abc import Iterator

from edgebake.target import Asked, Refusal, Support

FP16 = Support(
    scheme="fp16",
    kinds=("linear", "conv", "embedding"),
    needs_device={"htp_fp16": (True,)},
    note="half precision, which some chips' NPU lacks; needs no calibration",
)
W4A16 = Support(
    scheme="w4a16",
    kinds=("linear", "conv"),
    note="int4 weights per channel, tables of 16 bits; without training only where much may be lost",
)


def refusals(target: str, asked: Asked) -> Iterator[Refusal]:
    """What no target for Qualcomm's NPU takes: dimensions of several sizes, several methods."""
    for name in asked.varying:
        what = f"the NPU takes fixed shapes only, and {name!r} varies"
        yield Refusal(
            what=what, fix=f"give it one size in this rule: dims: {{{name}: {{min: 64, max: 64}}}}", key="dims"
        )
    if len(asked.inputs) > 1:
        what = f"{target} takes networks of one method, not {', '.join(asked.inputs)}"
        yield Refusal(what=what, fix="make a component of each method")
