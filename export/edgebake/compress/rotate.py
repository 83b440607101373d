"""QuaRot's rotations without training: outliers of a decoder are spread over all channels before anything is rounded.

Numerics: Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman 2024 (arXiv:2404.00456), section
4, stages 1a and 1b: random Hadamard matrices on the residual stream (R1) and on each head's values (R2, ``H_head``),
merged into the weights (``edgebake.compress._rotation``); the weights of normalisations go into the linear layers
behind them first. What they rotate at run time (R3 on keys and queries, R4 in front of ``down_proj``) is left out: no
target here has the operator inside its delegate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgebake.compress import _decoder, _hadamard, _options, _rotation
from edgebake.errors import RecipeError
from edgebake.target import ModuleRequest, Option
from edgebake.types import ActsOn

if TYPE_CHECKING:
    import torch

ACTS_ON: ActsOn = "module"
CALIBRATED = True  # outputs before and after are compared on a calibration sample
DISTRIBUTIONS = ("torch",)
SOURCES = tuple(f"edgebake.compress.{name}" for name in ("_decoder", "_hadamard", "_options", "_rotation"))
OPTIONS = (
    Option(name="r1", default=True, help="rotate the residual stream", choices=(True, False)),
    Option(name="r2", default=True, help="rotate the values of each attention head", choices=(True, False)),
    Option(name="seed", default=0, help="of the matrices' random signs"),
)


def apply(request: ModuleRequest) -> torch.nn.Module:
    """``request.module`` with rotated weights: the same function, told in dB; RecipeError for other architectures."""
    import torch

    options = _options.filled("rotate", OPTIONS, request.options)
    if not options["r1"] and not options["r2"]:
        raise RecipeError(
            "rotate: r1 and r2 are both off", where="compress.steps: rotate", fix="take the step out, or one of them"
        )
    decoder = _decoder.decoder_of(request.module, "rotate")
    generator = torch.Generator().manual_seed(int(options["seed"]))
    with _decoder.same_outputs(request, "rotate"):
        prepare(request, decoder, "rotate", stream=bool(options["r1"]))
        r1 = _hadamard.rotation(decoder.table.embedding_dim, generator) if options["r1"] else None
        heads = [layer.head for layer in decoder.layers]
        r2 = [_hadamard.rotation(head, generator) if options["r2"] else None for head in heads]
        _rotation.merge(decoder, r1, r2)
    return request.module


def prepare(request: ModuleRequest, decoder: _decoder.Decoder, method: str, *, stream: bool) -> None:
    """Tell what is left out; where the residual ``stream`` turns, fold the normalisations and tell what that costs."""
    request.tell(f"{method}: the rotations R3 and R4, which work at run time, are left out")
    if not stream:
        return
    if decoder.tied:
        request.tell(
            f"{method}: the embedding and the head shared one weight and are two now, since the final "
            f"normalisation's weight went into the head: {decoder.head.weight.numel():,} more values to store"
        )
    _decoder.fold_norms(decoder)
