"""A draft from its target: a decoder's first layers under its own norm and head learn to say what all of them do.

Numerics: Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2: the small network learns the whole distribution that
the large one gives, here at temperature 1, since a draft is used at it. The loss is the Kullback-Leibler divergence of
the whole model's distribution from the draft's at each position of calibration text, in nats; Zhou et al. 2023
(DistillSpec, arXiv:2310.08461), section 4, learn drafts of speculative decoding so (their forward divergence on a fixed
data set). Of the whole model's words the KEPT likeliest count one by one and all others as one word, so that its
logits are computed once and kept small: never more than the whole divergence (data processing inequality).

AdamW (Loshchilov, Hutter 2019, arXiv:1711.05101) without decay; the rate rises over the first tenth of the steps and
falls linearly to zero. Table and head stay those of the target. Every eighth call of the calibration samples is held
back: on it the draft is measured before and after. Calls that go on where an earlier one left caches are not used.

``text: written`` learns from what the whole model writes itself (:mod:`edgebake.compress._written`): the calls are cut
into beginnings, each is gone on with greedily to a call's length, and what was written is learned. That is the text of
which a draft of greedy speculative decoding proposes the next words.

A build that was interrupted goes on after the last PART steps that were done whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.buffers import untouched
from edgebake.compress import _decoder, _options, _parts, _written
from edgebake.errors import RecipeError, StageFailed
from edgebake.llm import decoder
from edgebake.target import ModuleRequest, Option
from edgebake.types import ActsOn, Keep

if TYPE_CHECKING:
    import torch

    from edgebake.compress._decoder import Call

ACTS_ON: ActsOn = "module"
CALIBRATED = True
DISTRIBUTIONS = ("torch",)
SOURCES = (
    *(f"edgebake.compress.{name}" for name in ("_decoder", "_options", "_parts", "_written")),
    "edgebake.llm.decoder",
)
OPTIONS = (
    Option(name="layers", default=0, help="first layers that are kept; 0: half of them"),
    Option(name="steps", default=200, help="of AdamW"),
    Option(name="calls", default=4, help="calls of the calibration samples that a step learns from"),
    Option(
        name="text",
        default="given",
        help="given: the calibration samples; written: what the whole model goes on with after beginnings of them",
        choices=("given", "written"),
    ),
    Option(name="beginning", default=16, help="tokens of the calibration samples before each text: written"),
    Option(name="rate", default=0.0005, help="of AdamW where it is highest"),
    Option(name="trained", default=0, help="last of the kept layers that learn, with the norm before the head; 0: all"),
    Option(name="seed", default=0, help="of the order in which calls are taken"),
)
KEPT = 64
PART = 25  # steps
_HELD = 8  # of so many calls one is held back
_TOLD = 12  # points of the loss curve
_WARM = 0.1  # of the steps, in which the rate rises
_NORM = 1.0  # that gradients are clipped to
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FILE = "part.safetensors"


@dataclass(frozen=True)
class _Lesson:
    """A call, and of n positions the whole model's likeliest words with their log probabilities, (n, KEPT)."""

    call: Call
    words: torch.Tensor
    logs: torch.Tensor
    first: int = 0  # of the positions


def apply(request: ModuleRequest) -> torch.nn.Module:
    """The first layers of ``request.module``, distilled; RecipeError for what is no decoder with one list of layers.

    StageFailed where the loss is not finite. What was learned is told, with the loss curve.
    """
    options = _options.filled("distill", OPTIONS, request.options)
    network = _network(request.module)
    total = decoder.depth(network) or 0
    count = options["layers"] or total // 2
    if not options["calls"] or options["trained"] > count:
        wrong = "calls" if not options["calls"] else "trained"
        what = f"distill: {wrong} is {options[wrong]}, and the draft has {count} layers"
        raise RecipeError(what, where=f"compress.steps: distill: {wrong}", fix="give calls: 4 and trained: 0")
    calls = _calls(request)
    if len(calls) < 2:
        raise RecipeError(
            "distill: one call of calibration samples is held back, and there is no other to learn from",
            where="samples.calibration",
            fix="give more calibration text: thousands of tokens",
        )
    with _parts.keeping(request) as keep:
        written = options["text"] == "written"
        begun = _beginnings(request.module, calls, options["beginning"]) if written else None
        lessons = _lessons(request.module, calls, keep) if begun is None else _own(request.module, begun, calls, keep)
        decoder.first_layers(network, count, where="compress.steps: distill: layers")
        held, learned = lessons[::_HELD], [each for n, each in enumerate(lessons) if n % _HELD]
        student = _Student(request.module, learned, options, _learning(request.module, network, options["trained"]))
        before, start = _judged(request.module, held), {n: w.detach().clone() for n, w in student.weights.items()}
        losses = student.learn(keep)
        after = _judged(request.module, held)
        for name, weight in student.weights.items():
            if not after[0] <= before[0]:
                weight.copy_(start[name])
    _tell(request, f"{count} of {total} layers", options, (len(learned), len(held)), (before, after), losses)
    return request.module


def _network(module: torch.nn.Module) -> Any:
    found = decoder.configured(module)
    if found is None or decoder.depth(found) is None:
        raise RecipeError(
            f"distill works on decoders of transformers, and {type(module).__name__} has no configuration of one",
            where="compress.steps: distill",
            fix="take the step out",
        )
    return found


def _calls(request: ModuleRequest) -> list[Call]:
    """What the network is given on calibration samples, without running it; those that start at position 0."""
    import torch

    class Recorder(torch.nn.Module):
        """Takes what the network would be called with."""

        def forward(self, *args: torch.Tensor) -> None:
            if not any(tuple(value.shape) == (1,) and bool(value.any()) for value in args[1:]):
                found.append((args, {}))

    found: list[Call] = []
    request.run_calibration(Recorder())
    return found


def _lessons(module: torch.nn.Module, calls: Sequence[Call], keep: Keep) -> list[_Lesson]:
    """What the whole model says of ``calls``, computed once."""
    import torch
    from safetensors.torch import load_file, save_file

    def fill(folder: Path) -> None:
        made: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for number, call in enumerate(calls):
                logs = _log_probabilities(module, call)
                top = logs.topk(min(KEPT, logs.shape[-1]), dim=-1)
                made |= {f"{number}.words": top.indices.int(), f"{number}.logs": top.values}
        save_file(made, folder / _FILE)

    found = load_file(keep("what the whole model says", fill) / _FILE)
    return [_Lesson(c, found[f"{n}.words"].long(), found[f"{n}.logs"]) for n, c in enumerate(calls)]


def _beginnings(module: torch.nn.Module, calls: Sequence[Call], size: int) -> torch.Tensor:
    """(texts, size); RecipeError where ``module`` keeps no cache to write with, or calls are no longer than that."""
    if not _written.writes(module):
        raise RecipeError(
            "distill: text: written is for a network with a key/value cache, and this one has none",
            where="compress.steps: distill: text",
            fix="give model: {context: 2048}, or text: given",
        )
    longest = max(call[0][0].shape[-1] for call in calls)
    if not 0 < size < longest:
        raise RecipeError(
            f"distill: beginnings of {size} tokens leave nothing to write in calls of {longest}",
            where="compress.steps: distill: beginning",
            fix="give beginning: 16, and calibration samples of a greater length",
        )
    return _written.beginnings(calls, size)


def _own(module: torch.nn.Module, begun: torch.Tensor, calls: Sequence[Call], keep: Keep) -> list[_Lesson]:
    """What the whole model writes after ``begun``, to the length of the longest of ``calls``, computed once."""
    import torch
    from safetensors.torch import load_file, save_file

    longest = max(call[0][0].shape[-1] for call in calls)
    made: list[_Lesson] = []
    for number, some in enumerate(torch.split(begun, _written.AT_ONCE)):

        def fill(folder: Path, some: torch.Tensor = some) -> None:
            found = _written.gone_on_with(module, some, longest, KEPT)
            save_file(found._asdict(), folder / _FILE)

        found = load_file(keep(f"what the whole model writes, {number}", fill) / _FILE)
        for row in range(len(some)):
            call: Call = ((found["tokens"][row : row + 1], torch.tensor([0])), {})
            made.append(_Lesson(call, found["words"][row], found["logs"][row], first=some.shape[1] - 1))
    return made


def _log_probabilities(module: torch.nn.Module, call: Call) -> torch.Tensor:
    import torch

    logits = _decoder.first_tensor(module(*call[0], **call[1]))
    found: torch.Tensor = torch.log_softmax(logits.reshape(-1, logits.shape[-1]), -1)
    return found


def _learning(module: torch.nn.Module, network: Any, trained: int) -> dict[str, torch.nn.Parameter]:
    """Parameters of their own in ``module``, by name, for the ``trained`` last layers and the norms outside layers."""
    import torch

    (layers,) = [
        m for m in network.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == decoder.depth(network)
    ]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    chosen = {id(p) for layer in list(layers)[-trained:] for p in layer.parameters()}
    made: dict[str, torch.nn.Parameter] = {}
    for path, owner in list(module.named_modules()):
        tables = isinstance(owner, torch.nn.Embedding | torch.nn.Linear)
        for name, weight in list(owner.named_parameters(recurse=False)):
            if id(weight) in chosen or (id(weight) not in inside and not tables):
                own = torch.nn.Parameter(weight.detach().clone())
                setattr(owner, name, own)
                made[f"{path}.{name}"] = own
    return made


@dataclass
class _Student:
    """The draft in ``module``, whose ``weights`` learn."""

    module: torch.nn.Module
    lessons: list[_Lesson]
    options: dict[str, Any]
    weights: dict[str, torch.nn.Parameter]

    def learn(self, keep: Keep) -> list[float]:
        """All steps, part by part; the loss of each. Weights are what the last part left."""
        from safetensors.torch import load_file

        losses: list[float] = []
        last: Path | None = None
        for start in range(0, int(self.options["steps"]), PART):
            last = keep(f"steps from {start} on", lambda folder, a=start, b=last: self._part(folder, a, b))  # type: ignore[misc]
            losses += load_file(last / _FILE)["losses"].tolist()
        if last is not None:
            found = load_file(last / _FILE)
            for name, weight in self.weights.items():
                weight.data.copy_(found[f"{name}.weight"])
        for weight in self.weights.values():
            weight.requires_grad_(False)
        return losses

    def _part(self, folder: Path, start: int, before: Path | None) -> None:
        """Steps from ``start`` on, from what the part in ``before`` left, into ``folder``."""
        import torch
        from safetensors.torch import load_file, save_file

        optimizer = torch.optim.AdamW(self.weights.values(), betas=(0.9, 0.95), weight_decay=0.0)
        if before is not None:
            found = load_file(before / _FILE)
            for name, weight in self.weights.items():
                weight.data.copy_(found[f"{name}.weight"])
                moments = {moment: found[f"{name}.{moment}"] for moment in _MOMENTS}
                optimizer.state[weight] = {"step": torch.tensor(float(start)), **moments}
        end = min(start + PART, int(self.options["steps"]))
        losses = torch.tensor([self._step(optimizer, step) for step in range(start, end)])
        made = {"losses": losses}
        for name, weight in self.weights.items():
            made[f"{name}.weight"] = weight.detach()
            made |= {f"{name}.{moment}": optimizer.state[weight][moment] for moment in _MOMENTS}
        save_file(made, folder / _FILE)

    def _step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        import torch

        steps, calls = int(self.options["steps"]), int(self.options["calls"])
        rising = min(1.0, (step + 1) / max(1.0, _WARM * steps))
        optimizer.param_groups[0]["lr"] = self.options["rate"] * min(rising, (steps - step) / steps)
        optimizer.zero_grad()
        total = 0.0
        for turn in range(step * calls, (step + 1) * calls):
            with torch.enable_grad(), untouched(self.module):  # the graph holds what the call writes to caches
                loss = _divergence(self.module, self._lesson(turn)).mean() / calls
                torch.autograd.backward(loss)
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), _NORM)
        if not bool(torch.isfinite(norm)):
            raise StageFailed(
                f"distill: the loss of step {step + 1}, or its gradient, is not finite",
                where="compress.steps: distill",
                fix="lower its rate, or check the calibration samples",
            )
        optimizer.step()
        return total

    def _lesson(self, turn: int) -> _Lesson:
        """Each round takes all calls once, in an order of its own."""
        import torch

        around, place = divmod(turn, len(self.lessons))
        generator = torch.Generator().manual_seed(int(self.options["seed"]) * 100_003 + around)
        return self.lessons[int(torch.randperm(len(self.lessons), generator=generator)[place])]


def _divergence(module: torch.nn.Module, lesson: _Lesson) -> torch.Tensor:
    """(positions,) nats."""
    return _of(_said(module, lesson), lesson)


def _said(module: torch.nn.Module, lesson: _Lesson) -> torch.Tensor:
    """Log probabilities at the positions of ``lesson``, (n, words)."""
    return _log_probabilities(module, lesson.call)[lesson.first : lesson.first + len(lesson.words)]


def _of(got: torch.Tensor, lesson: _Lesson) -> torch.Tensor:
    least = 1e-6
    chosen, shares = got.gather(1, lesson.words), lesson.logs.exp()
    rest = (1 - shares.sum(1)).clamp(min=least)
    others = (1 - chosen.exp().sum(1)).clamp(min=least)
    found: torch.Tensor = (shares * (lesson.logs - chosen)).sum(1) + rest * (rest.log() - others.log())
    return found


def _judged(module: torch.nn.Module, lessons: Sequence[_Lesson]) -> tuple[float, float]:
    """Divergence in nats per position, and the share of positions with the whole model's first word."""
    import torch

    divergence, same = [], []
    with torch.no_grad(), untouched(module):
        for lesson in lessons:
            got = _said(module, lesson)
            divergence.append(_of(got, lesson))
            same.append(got.argmax(-1) == lesson.words[:, 0])
    return float(torch.cat(divergence).mean()), float(torch.cat(same).float().mean())


def _tell(
    request: ModuleRequest,
    depth: str,
    options: dict[str, Any],
    calls: tuple[int, int],
    judged: tuple[tuple[float, float], tuple[float, float]],
    losses: Sequence[float],
) -> None:
    (before, same_before), (after, same_after) = judged
    own = " that the whole model wrote" if options["text"] == "written" else ""
    request.tell(
        f"distill: {depth}, {options['steps']} steps of {options['calls']} calls out of {calls[0]}{own}; on {calls[1]} "
        f"held calibration calls the divergence from the whole model is {before:.3f} before, {after:.3f} after "
        f"(nats per position), its next word said in {same_before:.1%} before, {same_after:.1%} after"
    )
    if losses:
        every = max(1, len(losses) // _TOLD)
        means = [losses[at : at + every] for at in range(0, len(losses), every)]
        curve = ", ".join(f"{sum(part) / len(part):.2f}" for part in means)
        request.tell(f"distill: mean divergence of every {every} steps: {curve}")
    if not after <= before:
        request.tell("distill: the untrained layers stay: try a lower rate, or more calibration text")
