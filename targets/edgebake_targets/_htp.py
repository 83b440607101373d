"""What all targets for Qualcomm's NPU (HTP) take and refuse, whatever runtime feeds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgebake.scheme import parse
from edgebake.target import Asked, Option, Refusal, Support

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
WIDE = Option(
    name="wide_activations",
    default="",
    help="globs on module names, between spaces: what their operators make has 16 bits in a network of w8a8; auto: "
    "those that calibration samples show to need it; . is what belongs to no module",
    calibrated=("auto",),
)


def refusals(target: str, asked: Asked) -> Iterator[Refusal]:
    """What no target for Qualcomm's NPU takes: dimensions of several sizes, several methods that share nothing."""
    for name in asked.varying:
        what = f"the NPU takes fixed shapes only, and {name!r} varies"
        yield Refusal(
            what=what, fix=f"give it one size in this rule: dims: {{{name}: {{min: 64, max: 64}}}}", key="dims"
        )
    if len(asked.inputs) > 1 and not asked.options.get("share_weights"):
        what = f"{target} takes networks of one method, not {', '.join(asked.inputs)}"
        able = ", or options: {share_weights: true}" if "share_weights" in asked.options else ""
        yield Refusal(what=what, fix=f"make a component of each method{able}")


def refused_widths(asked: Asked, supports: Sequence[Support], floats: Sequence[str] = ()) -> Iterator[Refusal]:
    """Schemes of modules that cannot stand beside the network's, and ``wide_activations`` where there are no 8 bits.

    ``floats``: schemes without integers that modules of any network take.
    """
    width = parse(asked.scheme).activation_bits
    for scheme in dict.fromkeys(asked.module_schemes):
        fits = width is not None and parse(scheme).activation_bits == width
        if scheme == asked.scheme or scheme in floats or fits:
            continue
        or_float = f", or are {floats[0]}" if floats else ""
        what = f"{scheme} in a network of {asked.scheme}: activations have one width here{or_float}"
        able = ", ".join(r.scheme for r in supports if r.scheme in floats or _alike(r.scheme, asked.scheme))
        fix = f"beside {asked.scheme}, modules take {able}"
        if width == 8:
            fix += "; for 16 bits where 8 lose too much, options: {wide_activations: auto}"
        yield Refusal(what=what, fix=fix, key="modules")
    if asked.options["wide_activations"] and width != 8:
        what = f"wide_activations widens activations of 8 bits, and those of {asked.scheme} have not 8"
        yield Refusal(what=what, fix="scheme: w8a8, or leave it out", key="options.wide_activations")


def _alike(scheme: str, other: str) -> bool:
    return parse(scheme).activation_bits == parse(other).activation_bits
