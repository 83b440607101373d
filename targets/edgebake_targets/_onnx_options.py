"""Options that targets with calibrated ONNX files share."""

from __future__ import annotations

from edgebake.target import Option

CALIBRATION = (
    Option(
        name="calibrate",
        default="minmax",
        help="how the ranges of static activations are chosen",
        choices=("minmax", "percentile", "entropy"),
    ),
    Option(name="percentile", default=99.99, help="share of values inside the range, with calibrate: percentile"),
)
