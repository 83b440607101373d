"""Options that targets with calibrated ONNX files share."""

from __future__ import annotations

from edgebake.target import Option
from edgebake_targets._ranges import METHODS, PERCENTILE

CALIBRATION = (
    Option(
        name="calibrate",
        default="minmax",
        help="how ranges of static activations are chosen: all that calibration samples show, a share of it, or what "
        "costs the least divergence of distributions or the least squared error",
        choices=METHODS,
    ),
    PERCENTILE,
)
