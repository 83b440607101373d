"""GPTQ: less is lost than by plain rounding, what it chose survives every quantiser, and memory stays bounded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import outlier_decoders
from edgebake.compress import _blocks, _rounding, gptq, quantize_weights
from edgebake.errors import RecipeError, StageFailed
from edgebake.scheme import parse
from edgebake_targets._onnx_quantize import symmetric_int4_blocks, symmetric_int8

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the second moment of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def quantised(module: torch.nn.Module, scheme: str) -> torch.nn.Module:
    """As torchao stores it."""
    made = copy.deepcopy(module)
    return quantize_weights.apply(outlier_decoders.request(made, outlier_decoders.linears(made, scheme)))


@pytest.mark.parametrize("scheme", ["w4", "w4g32", "w8", "w3g16"])
@pytest.mark.parametrize("activation_order", [True, False])
def test_outputs_lose_less_than_half_of_what_plain_rounding_costs(scheme: str, activation_order: bool) -> None:
    weight, moment = correlated(24, 160)
    form = parse(scheme)
    made = gptq.rounded(weight, moment, form, damping=0.01, activation_order=activation_order)
    plain = _rounding.squared_error(_rounding.rounded(weight, form) - weight, moment)
    assert _rounding.squared_error(made - weight, moment) < 0.5 * plain


def test_one_row_of_two_columns_is_rounded_as_the_paper_says() -> None:
    # Equations 2 and 3 by hand: column 0 goes first, its error moves column 1 by -e * [H^-1]_01 / [H^-1]_00.
    weight, moment = torch.tensor([[0.9, 4.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    scheme = parse("w4")
    scale = gptq.scales(weight, moment.diagonal(), scheme)[0, 0]
    inverse = torch.linalg.inv(moment.double())
    first = torch.round(weight[0, 0] / scale)
    moved = weight[0, 1] - (weight[0, 0] - first * scale) * (inverse[0, 1] / inverse[0, 0])
    made = gptq.rounded(weight, moment, scheme, damping=0.0, activation_order=False)
    assert made.tolist() == [[float(first * scale), float(torch.clamp(torch.round(moved / scale), -8, 7) * scale)]]


def test_plain_rounding_is_what_torchao_does() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 16)})
    weight = module["a"].weight.detach().clone()
    for scheme in ("w4", "w4g32", "w8"):
        made = quantize_weights.apply(outlier_decoders.request(copy.deepcopy(module), {"a": scheme}))
        off = (made["a"].weight.dequantize() - _rounding.rounded(weight, parse(scheme))).abs() > 1e-6
        assert off.float().mean() < 0.01  # halves between two integers go to either, and torchao has -128


@pytest.mark.parametrize("scheme", ["w4", "w4g32", "w8"])
def test_torchao_keeps_every_integer_and_scale(scheme: str) -> None:
    plain = outlier_decoders.network()
    made, said = outlier_decoders.after(gptq, plain, scheme)
    stored = quantised(made, scheme)
    layers = [name for name, part in made.named_modules() if name in _wrapped(outlier_decoders.linears(made, scheme))]
    assert len(layers) == 14
    for name in layers:
        weight = stored.get_submodule(name).weight
        assert torch.equal(weight.dequantize(), made.get_submodule(name).weight)  # type: ignore[operator]
    assert outlier_decoders.decibels(plain, stored) > outlier_decoders.decibels(plain, quantised(plain, scheme)) + 1
    assert said[0].startswith("gptq: 14 linear layers rounded; the squared error of their outputs on calibration")


def _wrapped(names: dict[str, str]) -> set[str]:
    return {f"wrapped.{name}" for name in names}


def test_onnx_blocks_and_channels_keep_every_integer_and_scale() -> None:
    weight, moment = correlated(24, 96)
    four = gptq.rounded(weight, moment, parse("w4g32"), damping=0.01, activation_order=True).numpy()
    packed, scale = symmetric_int4_blocks(four, 32)
    values = np.stack([packed & 15, packed >> 4], -1).reshape(24, 3, 32).astype(np.float32) - 8
    assert np.array_equal((values * scale.reshape(24, 3, 1)).reshape(24, 96), four)
    eight = gptq.rounded(weight, moment, parse("w8"), damping=0.01, activation_order=True).numpy()
    for axis, given in ((0, eight), (1, np.ascontiguousarray(eight.T))):
        q, scales = symmetric_int8(given, axis)
        assert np.array_equal(q * scales.reshape((-1, 1) if axis == 0 else (1, -1)), given)


def test_core_ml_blocks_keep_every_integer_and_scale_in_float16() -> None:
    from edgebake_targets._coreml_compress import quantise

    weight, moment = correlated(24, 96)
    for scheme, counts in (("w4g32", (24, 3)), ("w4", (24, 1))):
        made = gptq.rounded(weight, moment, parse(scheme), damping=0.01, activation_order=True).numpy()
        q, scale = quantise(made, counts, 4, np.float16)
        assert np.array_equal(q * np.repeat(scale.astype(np.float32), 96 // counts[1], axis=1), made)


def test_groups_with_zero_points_are_refused() -> None:
    plain = outlier_decoders.network()
    with pytest.raises(RecipeError) as error:
        gptq.apply(outlier_decoders.request(plain, {"model.layers.1.mlp.up_proj": "w4g32z"}))
    (problem,) = error.value.problems
    assert problem.what == (
        "methods that choose integers round symmetrically, and w4g32z of model.layers.1.mlp.up_proj has zero points"
    )
    assert problem.fix == "take the step out, or give the module w4g32"


def test_layers_outside_the_decoder_layers_and_networks_without_layers_are_rounded_too() -> None:
    plain = outlier_decoders.network()
    made = gptq.apply(outlier_decoders.request(copy.deepcopy(plain), {"lm_head": "w8"}))
    assert not torch.equal(made.get_parameter("wrapped.lm_head.weight"), plain.get_parameter("wrapped.lm_head.weight"))
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    net[0].weight.data[:, 3] *= 20
    x, said = torch.randn(64, 16), []
    wanted = net(x)
    request = outlier_decoders.request(copy.deepcopy(net), {"0": "w4", "2": "w4"}, said, [x])
    made = gptq.apply(request)
    rough = quantize_weights.apply(outlier_decoders.request(copy.deepcopy(net), {"0": "w4", "2": "w4"}))
    assert (made(x) - wanted).square().sum() < (rough(x) - wanted).square().sum()
    assert said[0].startswith("gptq: 2 linear layers")


def noting(seen: list[_blocks.Moments]) -> Callable[[_blocks.Moments], _blocks.Found]:
    """Finds nothing, and keeps what it was shown."""

    def find(moments: _blocks.Moments) -> _blocks.Found:
        seen.append(moments)
        return {}

    return find


def test_a_block_sees_what_the_rounded_blocks_before_it_give() -> None:
    plain = outlier_decoders.network()
    made, _ = outlier_decoders.after(gptq, plain)
    name = "wrapped.model.layers.1.mlp.down_proj"
    given: list[torch.Tensor] = []
    calls: list[_blocks.Moments] = []

    # The last layer again by itself, on what the network gives it once all before it is rounded.
    mixed = copy.deepcopy(plain)
    for path, part in made.named_modules():
        if isinstance(part, torch.nn.Linear) and "layers.1" not in path:
            mixed.get_submodule(path).weight = part.weight
    mixed.get_submodule(name).register_forward_pre_hook(lambda _m, args: given.append(args[0].reshape(-1, 192)))
    for call in outlier_decoders.ids():
        mixed(call)
    x = torch.cat(given)
    request = outlier_decoders.request(mixed, {})
    _blocks.walk(request, {"down": mixed.get_submodule(name)}, noting(calls), str)  # type: ignore[dict-item]
    assert torch.allclose(calls[0]["down"], x.T @ x / len(x), rtol=1e-3, atol=1e-5)
    wanted = gptq.rounded(plain.get_parameter(f"{name}.weight"), calls[0]["down"], parse("w4"), **outlier_decoders.GPTQ)
    assert torch.equal(made.get_parameter(f"{name}.weight"), wanted)


def test_layers_with_one_input_share_one_moment_and_hooks_are_gone() -> None:
    plain, seen = outlier_decoders.network(), []
    layers = {n: plain.get_submodule(f"wrapped.{n}") for n in outlier_decoders.linears(plain, "w4")}
    _blocks.walk(outlier_decoders.request(plain, {}), layers, noting(seen), str)  # type: ignore[arg-type]
    assert [len({id(m) for m in part.values()}) for part in seen] == [4, 4]  # q k v, o, gate up, down
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in plain.modules())


def test_the_float_network_keeps_its_weights_and_the_result_is_the_same_each_time() -> None:
    plain = outlier_decoders.network()
    before = outlier_decoders.logits(plain)
    first, second = (outlier_decoders.after(gptq, plain)[0] for _ in range(2))
    assert torch.equal(outlier_decoders.logits(plain), before)
    assert torch.equal(outlier_decoders.logits(first), outlier_decoders.logits(second))


# --- what users are told ----------------------------------------------------------------------------------------------


def test_a_step_that_rounds_nothing_says_so() -> None:
    with pytest.raises(RecipeError, match="gptq: no linear layer gets integer weights") as caught:
        outlier_decoders.after(gptq, outlier_decoders.network(), "w8a8d")
    assert "choose such a scheme (w4, w4g32, w4g32a8d, w8)" in str(caught.value)


def test_a_group_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"divisible by 64, but model.layers.0.self_attn.q_proj has 96") as caught:
        outlier_decoders.after(gptq, outlier_decoders.network(), "w4g64")
    assert 'modules: {"model.layers.0.self_attn.q_proj": w8}' in str(caught.value)


def test_inputs_that_are_not_finite_are_refused_by_layer() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(StageFailed, match="the inputs of 0 on calibration samples are not finite") as caught:
        gptq.apply(outlier_decoders.request(net, {"0": "w4"}, calls=[torch.full((1, 4), 1e30)]))
    assert "check the calibration samples" in str(caught.value)


def test_too_few_samples_without_damping_are_refused_by_layer() -> None:
    with pytest.raises(
        StageFailed, match=r"inputs of model\S+ on calibration samples span too few directions"
    ) as caught:
        outlier_decoders.after(gptq, outlier_decoders.network(), calls=outlier_decoders.ids(1), damping=0)
    assert "raise its damping (0.01), or give more calibration samples" in str(caught.value)


def test_a_layer_that_no_sample_reaches_is_told_and_stays() -> None:
    net, said = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 4), "idle": torch.nn.Linear(4, 4)}), []
    net.forward = net["used"].__call__  # type: ignore[method-assign]
    before = net["idle"].weight
    gptq.apply(outlier_decoders.request(net, {"used": "w4", "idle": "w4"}, said, [torch.randn(9, 4)]))
    assert net["idle"].weight is before
    assert said[1] == "gptq: no calibration sample reaches idle: rounded plainly"


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        ({"dampling": 0.1}, "the step gptq has no option 'dampling'", "did you mean 'damping'?"),
        ({"damping": "much"}, "gptq: damping must be a number, not 'much'", "share of the mean"),
        ({"damping": -1}, "gptq: damping must not be negative, and is -1", "share of the mean"),
        ({"activation_order": 1}, "gptq: activation_order must be true or false, not 1", "largest inputs first"),
    ],
)
def test_options_are_checked(options: dict[str, object], what: str, fix: str) -> None:
    with pytest.raises(RecipeError) as caught:
        outlier_decoders.after(gptq, outlier_decoders.network(), **options)
    assert what in str(caught.value) and fix in str(caught.value)


# --- whole lowerings --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_gptq_chose_is_what_xnnpack_and_onnx_files_hold(tmp_path: Path) -> None:
    import onnx_cases
    import xnnpack_cases
    from edgebake.types import Traced
    from edgebake_targets.inspectors import pte

    network = xnnpack_cases.text_network()
    schemes = dict.fromkeys(("up", "down", "head"), "w4g32a8d")
    samples = [xnnpack_cases.ids(20, seed) for seed in range(8)]
    made = gptq.apply(outlier_decoders.request(copy.deepcopy(network), schemes, calls=samples))
    built = xnnpack_cases.build(
        made, xnnpack_cases.TEXT, schemes, dict.fromkeys(schemes, "linear"), samples[:1], tmp_path
    )
    exact = quantize_weights.apply(outlier_decoders.request(copy.deepcopy(made), schemes))
    lowered, folder = built
    session = xnnpack_cases.executorch_runtime.open(folder / lowered.entry, xnnpack_cases.TEXT)
    given = xnnpack_cases.ids(25, seed=9)
    got = session.call("forward", {"ids": given.numpy()})["scores"]
    assert xnnpack_cases.sqnr_db(exact(given)[0], got) > 60  # the same integers; activations round at run time
    assert sum(r.dtype == "int4" for r in pte.inspect(folder / "model.pte").weights) == 3

    text = onnx_cases.seeded(onnx_cases.TinyText)
    names = dict.fromkeys(("query", "key", "value", "dense"), "w4g32")

    def run(module: torch.nn.Module) -> None:
        for given in onnx_cases.text_inputs(6):
            module(*map(torch.from_numpy, given.values()))

    request = replace(outlier_decoders.request(copy.deepcopy(text), names), run_calibration=run)
    made_text = gptq.apply(request)
    program = onnx_cases.export_text(made_text)
    out = tmp_path / "onnx"
    out.mkdir()
    onnx_cases.lower(Traced(programs={"forward": program}, signature=onnx_cases.TEXT), made_text, out, names)
    feed = onnx_cases.text_inputs(1, seed=5)[0]
    session = onnx_cases.onnxruntime_cpu.open(out / "model.onnx", onnx_cases.TEXT)
    wanted = made_text(*map(torch.from_numpy, feed.values()))[0]
    assert xnnpack_cases.sqnr_db(wanted, session.call("forward", feed)["hidden"]) > 100
