"""Options that targets with calibrated ONNX files share."""

from __future__ import annotations

from edgebake.target import Option

CALIBRATION = (
    Option(
        name="calibrate",
        default="minmax",
        help="how ranges of static activations are chosen: all that calibration samples show, a share of it, or what "
        "costs the least divergence of distributions or the least squared error",
        choices=("minmax", "percentile", "entropy", "mse"),
    ),
    Option(name="percentile", default=99.99, help="share of values inside the range, with calibrate: percentile"),
)
