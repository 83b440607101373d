"""SpinQuant: the rotations that rotate.py draws at random are learned, so that the rounded network loses least.

Numerics: Liu, Zhao, Fedorov, Soran, Choudhary, Krishnamoorthi, Chandra, Tian, Blankevoort 2024 (arXiv:2405.16406),
section 3.2: ``min over R in M of L(R | W, X)``, M the Stiefel manifold, with R1 for the residual stream and one R2 for
each layer's values, from random Hadamard matrices, by Cayley SGD (``edgebake.compress._cayley``), then merged as in
rotate.py. The loss is the cross-entropy of the rounded network against the float network's own distribution (their
labels are the text's next tokens; these need no labels), less what the float network's own entropy is: the
Kullback-Leibler divergence in nats per position. Weights are rounded as plain rounding does, 8-bit dynamic activations
too, both with straight-through gradients (Bengio, Leonard, Courville 2013, arXiv:1308.3432). Table and head turn, but
are not rounded while learning.

Calls of the calibration samples take turns, one a step; the rate falls linearly to zero. Calls that go on where an
earlier one left caches are not used. The matrices are kept in the store after every few steps: a killed build goes on
from the last it kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgebake.buffers import untouched
from edgebake.compress import _cayley, _decoder, _hadamard, _options, _parts, _rotation, _rounding, rotate
from edgebake.errors import RecipeError, StageFailed
from edgebake.scheme import Scheme
from edgebake.target import ModuleRequest, Option
from edgebake.types import ActsOn

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from edgebake.compress._decoder import Call

ACTS_ON: ActsOn = "module"
CALIBRATED = True
DISTRIBUTIONS = ("torch",)
SOURCES = (
    *rotate.SOURCES,
    *(f"edgebake.compress.{name}" for name in ("_cayley", "_parts", "_rounding", "rotate")),
)
OPTIONS = (
    Option(name="steps", default=24, help="of Cayley SGD, each on one call of the calibration samples"),
    Option(name="rate", default=0.2, help="of the first step: how far, in the norm of the matrix, a step turns"),
    Option(name="seed", default=0, help="of the random Hadamard matrices where learning starts"),
)
_PART = 4  # steps after which the matrices are kept
_STATE = "learned.safetensors"


@dataclass(frozen=True)
class _Part:
    """A linear layer inside the decoder layers, its parameter's name and the scheme of its weights (None: float)."""

    place: _rotation.Turned
    name: str
    scheme: Scheme | None


def apply(request: ModuleRequest) -> torch.nn.Module:
    """``request.module`` with learned rotations merged: the same function; RecipeError for other architectures."""
    import torch

    options = _options.filled("spinquant", OPTIONS, request.options)
    decoder = _decoder.decoder_of(request.module, "spinquant")
    schemes = {id(layer): scheme for layer, scheme in _rounding.rounded_layers(request).values()}
    places = list(_rotation.turned(decoder))
    if not any(id(place.linear) in schemes for place in places):
        raise RecipeError(
            "spinquant: no linear layer of the decoder gets integer weights with float or grouped dynamic activations",
            where="compress.steps: spinquant",
            fix="choose such a scheme (w4, w4g32, w4g32a8d), or the step rotate, which learns nothing",
        )
    calls = _decoder.calls_of(request)
    generator = torch.Generator().manual_seed(int(options["seed"]))
    with _decoder.same_outputs(request, "spinquant"):
        rotate.prepare(request, decoder, "spinquant", stream=True)
        names = {id(p): name for name, p in request.module.named_parameters()}
        parts = [_Part(p, names[id(p.linear.weight)], schemes.get(id(p.linear))) for p in places]
        first = _cayley.Cayley.of(_hadamard.rotation(decoder.table.embedding_dim, generator))
        seconds = [_cayley.Cayley.of(_hadamard.rotation(layer.head, generator)) for layer in decoder.layers]
        learner = _Learner(request.module, decoder, parts, first, seconds)
        before = learner.loss(calls[0])
        starts = [matrix.x for matrix in (first, *seconds)]
        _learned(request, learner, calls, int(options["steps"]), float(options["rate"]))
        after = learner.loss(calls[0])
        if after > before:
            request.tell(
                "spinquant: the random matrices stay, since learning came no nearer: try another rate or more calls"
            )
            for matrix, start in zip((first, *seconds), starts, strict=True):
                matrix.x = start
        request.tell(
            f"spinquant: {options['steps']} steps; divergence of the rounded network from the float one on the first "
            f"calibration call {before:.4f} before, {after:.4f} after (nats per position)"
        )
        _rotation.merge(decoder, first.x, [second.x for second in seconds])
    return request.module


def _learned(request: ModuleRequest, learner: _Learner, calls: list[Call], total: int, rate: float) -> None:
    """Take all steps part by part, from what the store keeps."""
    from safetensors.torch import load_file, save_file

    with _parts.keeping(request) as keep:
        for start in range(0, total, _PART):
            steps = range(start, min(start + _PART, total))

            def fill(folder: Path, steps: range = steps) -> None:
                learner.learn(calls, steps, total, rate)
                matrices = enumerate(learner.matrices)
                state = {f"{n}.{k}": v.contiguous() for n, m in matrices for k, v in vars(m).items()}
                save_file(state, folder / _STATE)

            found = load_file(keep(f"steps {start} to {steps.stop} of {total}", fill) / _STATE)
            for number, matrix in enumerate(learner.matrices):
                matrix.x, matrix.momentum = found[f"{number}.x"], found[f"{number}.momentum"]


@dataclass
class _Learner:
    """The network with weights that follow from rotations, which learn."""

    module: torch.nn.Module
    decoder: _decoder.Decoder
    parts: list[_Part]
    first: _cayley.Cayley
    seconds: list[_cayley.Cayley]

    @property
    def matrices(self) -> list[_cayley.Cayley]:
        """All that learn."""
        return [self.first, *self.seconds]

    def learn(self, calls: list[Call], steps: range, total: int, rate: float) -> None:
        """Take ``steps`` of ``total``; StageFailed where the loss is not finite."""
        import torch

        for step in steps:
            r1, r2 = self.first.leaf(), [second.leaf() for second in self.seconds]
            with untouched(self.module):  # the graph holds what the call writes to caches
                loss = self._divergence(calls[step % len(calls)], r1, r2)
                if not bool(torch.isfinite(loss)):
                    raise StageFailed(
                        f"spinquant: the loss of step {step + 1} is not finite",
                        where="compress.steps: spinquant",
                        fix="lower its rate, or check the calibration samples",
                    )
                gradients = torch.autograd.grad(loss, [r1, *r2])
            for matrix, gradient in zip(self.matrices, gradients, strict=True):
                matrix.step(gradient, rate * (1 - step / total))

    def loss(self, call: Call) -> float:
        """The divergence on ``call`` with the rotations as they are."""
        import torch

        with torch.no_grad(), untouched(self.module):
            return float(self._divergence(call, self.first.leaf(), [second.leaf() for second in self.seconds]))

    def _divergence(self, call: Call, r1: torch.Tensor, r2: list[torch.Tensor]) -> torch.Tensor:
        import torch

        with torch.no_grad(), untouched(self.module):
            wanted = _log_probabilities(self.module(*call[0], **call[1]))
        with self._turning(r1):
            output = torch.func.functional_call(self.module, self._parameters(r1, r2), call[0], call[1])
        got = _log_probabilities(output)
        return (wanted.exp() * (wanted - got)).sum(-1).mean()

    def _parameters(self, r1: torch.Tensor, r2: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for part in self.parts:
            linear, role, second = part.place.linear, part.place.role, r2[part.place.layer]
            weight = _rotation.weight_of(linear.weight, role, r1, second)
            made[part.name] = weight if part.scheme is None else _through(_rounding.rounded, weight, part.scheme)
            if linear.bias is not None:
                made[part.name.removesuffix("weight") + "bias"] = _rotation.bias_of(linear.bias, role, r1, second)
        return made

    @contextmanager
    def _turning(self, r1: torch.Tensor) -> Iterator[None]:
        """Hidden states turn behind the table and back in front of the head, and dynamic activations are rounded."""
        with ExitStack() as hooks:

            def add(hook: Any) -> None:
                hooks.callback(hook.remove)

            add(self.decoder.table.register_forward_hook(lambda _m, _args, output: output @ r1))
            add(self.decoder.head.register_forward_pre_hook(lambda _m, args: (args[0] @ r1.T,)))
            for part in self.parts:
                if part.scheme is not None and part.scheme.dynamic:
                    bits = part.scheme.activation_bits or 8
                    add(
                        part.place.linear.register_forward_pre_hook(
                            lambda _m, args, bits=bits: (_through(_per_token, args[0], bits),)
                        )
                    )
            yield


def _through(function: Callable[..., torch.Tensor], x: torch.Tensor, argument: object) -> torch.Tensor:
    """``function(x, argument)`` with the gradient of x."""
    return x + (function(x.detach(), argument) - x.detach())


def _per_token(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Activations after asymmetric rounding with a scale for each position, as 8da4w kernels do at run time."""
    import torch

    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(x.dtype).tiny)
    zero = torch.round(-low / scale)
    made: torch.Tensor = (torch.clamp(torch.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale
    return made


def _log_probabilities(output: Any) -> torch.Tensor:
    import torch

    logits = _decoder.first_tensor(output)
    found: torch.Tensor = torch.log_softmax(logits.reshape(-1, logits.shape[-1]), -1)
    return found
