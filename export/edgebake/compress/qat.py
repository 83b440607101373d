"""Quantisation-aware training with low-rank adapters: what rounding loses is learned back on calibration samples.

Numerics: the network computes with weights, and dynamic activations, as torchao's fake quantisers round them
(``torchao.quantization.qat``; straight-through gradients, Bengio, Leonard, Courville 2013, arXiv:1308.3432), and
learns to give the float network's own distribution back (LLM-QAT, Liu et al. 2023, arXiv:2305.17888, section 2.1:
cross-entropy against the teacher's logits; less the teacher's entropy, the Kullback-Leibler divergence in nats per
position), or the text's next token. What learns are adapters ``W + alpha / rank * B A`` (LoRA, Hu et al. 2021,
arXiv:2106.09685, section 4.1: A Gaussian, B zero, so that learning begins at plain rounding) by AdamW; the rate falls
linearly to zero. Calls of the calibration samples take turns, one a step.

* ``adapters: merge``: what is rounded in training is the sum, so that afterwards the sum is rounded once, to the
  integers that training saw (``edgebake.lattice``), and nothing is left beside them.
* ``adapters: keep``: the plainly rounded weight stays and the adapter computes in float beside it, as QLoRA does
  (Dettmers et al. 2023, arXiv:2305.14314, equation 5): nearer, at ``rank * (rows + columns)`` more values a layer.

Scales have a mantissa of 8 bits (bfloat16, as XNNPACK stores them). Training goes in parts of ``part`` steps, each kept
in the store as it ends: a killed build goes on from the last whole one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.buffers import untouched
from edgebake.compress import _adapters, _decoder, _options, _parts, _rounding
from edgebake.errors import RecipeError, StageFailed
from edgebake.target import ModuleRequest, Option
from edgebake.types import ActsOn

if TYPE_CHECKING:
    import torch

    from edgebake.compress._decoder import Call

ACTS_ON: ActsOn = "module"
CALIBRATED = True
LAST = True  # steps after it would take its weights off the integers that it learned
DISTRIBUTIONS = ("torch", "torchao")
SOURCES = (
    *(
        f"edgebake.compress.{name}"
        for name in ("_adapters", "_decoder", "_hadamard", "_options", "_parts", "_rounding")
    ),
    "edgebake.lattice",
    "edgebake.models._low_rank",
)
OPTIONS = (
    Option(name="steps", default=40, help="of AdamW, each on one call of the calibration samples"),
    Option(name="rate", default=3e-4, help="of the first step"),
    Option(name="rank", default=16, help="of the adapters"),
    Option(name="alpha", default=32.0, help="the adapters count alpha / rank times"),
    Option(name="adapters", default="merge", help="merge or keep", choices=("merge", "keep")),
    Option(
        name="teacher",
        default="float",
        help="float: the float network's logits; text: the next token of the text",
        choices=("float", "text"),
    ),
    Option(name="part", default=10, help="steps after which what was learned is kept"),
    Option(name="seed", default=0, help="of the adapters' first values"),
)
_STATE = "learned.safetensors"
_CURVE = 8  # points that are told
_JUDGED = 4  # calls on which before and after are compared


def apply(request: ModuleRequest) -> torch.nn.Module:
    """``request.module`` with learned integer weights, and adapters where they are kept; how the loss fell is told.

    RecipeError without integer linear layers, or where options or samples do not allow it; StageFailed where the loss
    is not finite.
    """
    options = _options.filled("qat", OPTIONS, request.options)
    chosen = _rounding.rounded_layers(request)
    _check(chosen, options)
    calls = _decoder.calls_of(request)
    if options["teacher"] == "text":
        _refuse_no_text(calls)
    layers = _adapters.of(request.module, chosen, options)
    learner = _Learner(request.module, layers, calls, text=options["teacher"] == "text")
    before = learner.judged()
    losses = _trained(request, learner, options)
    after = learner.judged()
    _tell(request, losses, before, after, options)
    if after >= before:
        layers.reset()
        request.tell("qat: rounding stays plain, since learning came no nearer: try another rate, or more samples")
    layers.finish()
    return request.module


@dataclass
class _Learner:
    """The network as it will be rounded, and what it learns from."""

    module: torch.nn.Module
    layers: _adapters.Adapted
    calls: list[Call]
    text: bool

    def judged(self) -> float:
        """Mean loss over the first calls, nothing learned from them here."""
        import torch

        losses = []
        for call in self.calls[:_JUDGED]:
            with torch.no_grad(), untouched(self.module):
                losses.append(float(self.loss(call)))
        return sum(losses) / len(losses)

    def loss(self, call: Call) -> torch.Tensor:
        """Nats per position on ``call``; the graph is the caller's to use before caches are put back."""
        import torch

        wanted = None if self.text else self._teacher(call)
        with self.layers.rounding() as parameters:
            output = torch.func.functional_call(self.module, parameters, call[0], call[1], tie_weights=False)
        logits = _decoder.first_tensor(output)
        got = torch.log_softmax(logits.reshape(-1, logits.shape[-1]), -1)
        if wanted is None:
            ids = call[0][0].reshape(-1)
            return torch.nn.functional.nll_loss(got[:-1], ids[1:])
        loss: torch.Tensor = (wanted.exp() * (wanted - got)).sum(-1).mean()
        return loss

    def _teacher(self, call: Call) -> torch.Tensor:
        import torch

        with torch.no_grad(), untouched(self.module):
            logits = _decoder.first_tensor(self.module(*call[0], **call[1]))
            return torch.log_softmax(logits.reshape(-1, logits.shape[-1]), -1)

    def learn(self, optimiser: torch.optim.Optimizer, steps: range, total: int, rate: float) -> list[float]:
        """Take ``steps`` of ``total``; the loss of each."""
        import torch

        losses = []
        for step in steps:
            for group in optimiser.param_groups:
                group["lr"] = rate * (1 - step / total)
            optimiser.zero_grad()
            with untouched(self.module):  # the graph holds what the call writes to caches
                loss = self.loss(self.calls[step % len(self.calls)])
                if not bool(torch.isfinite(loss)):
                    raise StageFailed(
                        f"qat: the loss of step {step + 1} is not finite",
                        where="compress.steps: qat",
                        fix="lower its rate, or check the calibration samples",
                    )
                loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            losses.append(float(loss.detach()))
        return losses


def _trained(request: ModuleRequest, learner: _Learner, options: dict[str, Any]) -> list[float]:
    """Train part by part, from what the store keeps; the loss of every step.

    A part always begins with what was read of the one before it, so that a build that was killed learns the same.
    """
    import torch

    total, size = int(options["steps"]), max(1, int(options["part"]))
    optimiser = torch.optim.AdamW(learner.layers.leaves, lr=float(options["rate"]), weight_decay=0.0)
    losses: list[float] = []
    with _parts.keeping(request) as keep:
        for start, end in pairwise([*range(0, total, size), total]):

            def fill(folder: Path, start: int = start, end: int = end) -> None:
                found = learner.learn(optimiser, range(start, end), total, float(options["rate"]))
                _adapters.save(folder / _STATE, learner.layers.leaves, optimiser, found)

            folder = keep(f"steps {start} to {end} of {total}", fill)
            losses += _adapters.restore(folder / _STATE, learner.layers.leaves, optimiser)
    return losses


def _tell(request: ModuleRequest, losses: list[float], before: float, after: float, options: dict[str, Any]) -> None:
    what = "cross-entropy" if options["teacher"] == "text" else "divergence from the float network"
    size = max(1, -(-len(losses) // _CURVE))
    curve = ", ".join(
        f"{sum(part) / len(part):.4f}" for part in (losses[at : at + size] for at in range(0, len(losses), size))
    )
    each = "step" if size == 1 else f"{size} steps"
    request.tell(
        f"qat: {len(losses)} steps, rank {options['rank']}, adapters {options['adapters']}; {what} on the first "
        f"calibration calls {before:.4f} before, {after:.4f} after (nats per position); each {each}: {curve}"
    )


def _check(chosen: dict[str, Any], options: dict[str, Any]) -> None:
    if not chosen:
        raise RecipeError(
            "qat: no linear layer gets integer weights with float or grouped dynamic activations",
            where="compress.steps: qat",
            fix="choose such a scheme (w4, w4g32, w4g32a8d, w8), or take the step out",
        )
    for name in ("steps", "rank"):
        if options[name] < 1:
            raise RecipeError(f"qat: {name} is {options[name]}", where="compress.steps: qat", fix=f"{name}: at least 1")
    _rounding.refuse_indivisible("qat", chosen)


def _refuse_no_text(calls: list[Call]) -> None:
    import torch

    for args, _ in calls:
        if not args or not isinstance(args[0], torch.Tensor) or args[0].is_floating_point() or args[0].numel() < 2:
            raise RecipeError(
                "qat: teacher: text learns the next token, and the network's first input is no text of two tokens",
                where="compress.steps: qat",
                fix="take teacher: text out, or give longer texts",
            )
