"""What all targets for Qualcomm's NPU (HTP) take and refuse, whatever runtime feeds it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from edgebake.errors import StageFailed
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
_ALONE = "share_weights needs several methods to share weights"
_METHODS = "leave it out, or give the component methods"
WIDE = Option(
    name="wide_activations",
    default="",
    help="globs on module names, between spaces: what their operators make has 16 bits in a network of w8a8; auto: "
    "those that calibration samples show to need it; . is what belongs to no module",
    calibrated=("auto",),
)


def refused_shapes(asked: Asked) -> Iterator[Refusal]:
    """What no target for Qualcomm's NPU takes: dimensions of several sizes."""
    for name in asked.varying:
        what = f"the NPU takes fixed shapes only, and {name!r} varies"
        yield Refusal(
            what=what, fix=f"give it one size in this rule: dims: {{{name}: {{min: 64, max: 64}}}}", key="dims"
        )


def refused_sharing(asked: Asked) -> Iterator[Refusal]:
    """Weights shared with nobody."""
    if asked.options["share_weights"] and len(asked.inputs) == 1:
        yield Refusal(what=f"{_ALONE}, and there is one", fix=_METHODS, key="options.share_weights")


def refuse_sharing_alone(methods: Collection[str]) -> None:
    """StageFailed for a network that turns out to have one method."""
    if len(methods) < 2:
        raise StageFailed(f"{_ALONE}, and there is {', '.join(methods)} alone", fix=_METHODS)


def sizes(methods: Collection[str], together: int, separate: int, without: str) -> str:
    """What reports say of one binary for ``methods``; bytes, ``separate`` ones being those of ``without``."""
    return f"one binary of {together:,} bytes for {', '.join(methods)}; {without}: {separate:,} bytes"


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
