"""``correct_biases``: what palettes, groups and pruning add to a layer's output on average is taken off its bias.

Numerics: Nagel, van Baalen, Blankevoort, Welling 2019 (arXiv:1906.04721), section 4.2, as in the compression step
``correct-biases``, which sees the weights of modules. Here the error is that of the weight as the package stores it, a
normalisation folded in: what a table of values for a whole weight makes of it depends on that. Inputs are those of the
float network, so that one run over the samples serves all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.scheme import parse
from edgebake.target import LowerRequest
from edgebake.types import SampleSet, Traced
from edgebake_targets._coreml_options import precision_of
from edgebake_targets._coreml_rounded import rounded
from edgebake_targets._coreml_sensitivity import outputs_of
from edgebake_targets._coreml_weights import FloatWeight, Product, norm_after, product_of

if TYPE_CHECKING:
    import torch


def corrected(weights: Iterable[FloatWeight], traced: Traced, name: str, request: LowerRequest) -> dict[str, Any]:
    """New tensors of the program ``name``, by their name in it: biases, or means of normalisations that follow.

    Empty where ``request`` does not ask for it. A layer with neither, or one that shares it, stays as it is; so do
    integers with one scale per output channel, which the compression step corrects. StageFailed without samples.
    """
    chosen = {w.module: w for w in weights if _reached(w.scheme)} if request.options["correct_biases"] else {}
    if not chosen:
        return {}
    if request.calibration is None or not any(c.method == name for s in request.calibration for c in s.calls):
        raise StageFailed(
            f"correct_biases needs calibration samples for every method, and there is none for {name}",
            fix="add samples: {calibration: ...}, or options: {correct_biases: false}",
        )
    program = traced.programs[name]
    nodes = {p.module: (node, p) for node in program.graph.nodes if (p := product_of(node)) and p.module in chosen}
    places = {module: _place(program, node, product.weight + 1) for module, (node, product) in nodes.items()}
    errors = {module: _error(chosen[module], request) for module in nodes if places[module]}
    means = _means(traced, name, request.calibration, errors)
    changed = {}
    for module, mean in means.items():
        stored, sign = places[module] or ("", 0)
        changed[stored] = program.state_dict[stored].detach() + sign * mean.float()
    return changed


def _reached(scheme: str) -> bool:
    """Not those of the step ``correct-biases``: the same error would be taken off twice."""
    parsed = parse(scheme)
    per_channel = parsed.family == "integer" and not parsed.group and not parsed.whole
    return parsed.family != "float" and not per_channel


def _place(program: torch.export.ExportedProgram, node: torch.fx.Node, position: int) -> tuple[str, int] | None:
    """The tensor that takes the mean and its sign: a bias, or the mean that a normalisation behind takes off."""
    stored = program.graph_signature.inputs_to_parameters | program.graph_signature.inputs_to_buffers
    norm = norm_after(node)
    bias = node.args[position] if len(node.args) > position else None
    for holder, sign in ((bias, -1), (norm.args[3] if norm is not None else None, 1)):
        name = stored.get(getattr(holder, "name", ""), "")
        if name in program.state_dict and len(holder.users) == 1:  # type: ignore[union-attr]
            return name, sign
    return None


def _error(weight: FloatWeight, request: LowerRequest) -> torch.Tensor:
    """What the stored weight differs by from the float one, before a normalisation is folded in."""
    import numpy as np
    import torch

    dtype = np.float16 if precision_of(request) == "fp16" else np.float32
    stored = rounded(weight.scheme, weight.values, weight.axis, dtype, weight.sensitivity).astype(np.float64)
    factor = np.ones(()) if weight.factor is None else weight.factor
    error = np.divide(stored - weight.values, factor, out=np.zeros(stored.shape), where=factor != 0)
    return torch.from_numpy(error.astype(np.float32))


def _means(traced: Traced, name: str, samples: SampleSet, errors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Of what each module's error adds to its output, by output channel, over the calibration samples."""
    import torch

    module: Any = traced.programs[name].module(check_guards=False)
    taps: dict[str, _Tap] = {}
    for node in list(module.graph.nodes):
        product = product_of(node)
        if product is None or product.module not in errors or product.module in taps:
            continue
        taps[product.module] = tap = _Tap(node, product, errors[product.module])
        watched = torch.nn.Identity()
        watched.register_forward_hook(tap.watch)
        module.add_module(f"tap_{node.name}", watched)
        with module.graph.inserting_after(node):
            module.graph.call_module(f"tap_{node.name}", (node.args[product.data],))
    module.recompile()
    for _ in outputs_of(traced, name, samples, {}, module):
        pass
    return {name: tap.total / tap.count for name, tap in taps.items() if tap.count}


class _Tap:
    """Sums of what a linear layer or convolution would add with ``error`` for its weight."""

    def __init__(self, node: torch.fx.Node, product: Product, error: torch.Tensor) -> None:
        self.operator: Any = node.target
        self.before, self.error = list(node.args[: product.data]), error
        self.after = [None, *node.args[product.weight + 2 :]]  # None: no bias
        self.channel = 1 if "conv" in str(node.target) else -1
        self.total, self.count = error.new_zeros(()).double(), 0

    def watch(self, _module: Any, args: tuple[torch.Tensor, ...], _output: Any) -> None:
        """A forward hook."""
        added = self.operator(*self.before, args[0].detach(), self.error, *self.after).movedim(self.channel, -1)
        rows = added.reshape(-1, added.shape[-1]).double()
        self.total = self.total + rows.sum(0)
        self.count += len(rows)
