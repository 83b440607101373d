"""Scaled palettes and pruned weights whose rest is rounded, which take two operators; vectors; pruning by groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import ask, formats, overwrite, spec, stored_part, traced_of, verdicts
from edgebake.errors import RecipeError, StageFailed
from edgebake.metrics import sqnr_db
from edgebake.scheme import parse
from edgebake.types import Traced
from edgebake_targets import coreml
from edgebake_targets._coreml_constants import constants, decode
from edgebake_targets._coreml_package import open_package
from edgebake_targets.inspectors import mlpackage
from edgebake_targets.runners import coreml_interpreter

MODULES = ("embed", "conv", "up", "last")
SCHEMES = {
    "palette3s": "palette3-scaled",
    "palette4s": "palette4-scaled",
    "palette6s": "palette6-scaled",
    "palette8v2": "palette8-vector2",
    "palette8v4": "palette8-vector4",
    "palette6v2": "palette6-vector2",
    "palette4v2": "palette4-vector2",
    "sparse1of4": "sparse-float16",
    "sparse2of4": "sparse-float16",
    "sparse4of8": "sparse-float16",
    "sparse50-w8": "sparse-int8",
    "sparse75-w8": "sparse-int8",
    "sparse75-palette4": "sparse-palette4",
    "sparse2of4-w8": "sparse-int8",
    "sparse2of4-palette6": "sparse-palette6",
    "sparse4of8-w8": "sparse-int8",
}


class Net(nn.Module):
    """One weight of each kind, the output channels of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.conv, self.up = nn.Conv1d(32, 48, 3, padding=1), nn.ConvTranspose1d(48, 64, 3, padding=1)
        self.last = nn.Linear(64, 40)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (1, 10)."""
        return self.last(torch.relu(self.up(torch.relu(self.conv(self.embed(ids).transpose(1, 2))))).transpose(1, 2))


def network() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for weight, axis in ((net.embed.weight, 0), (net.conv.weight, 0), (net.up.weight, 1), (net.last.weight, 0)):
            sizes = torch.logspace(-1, 1, weight.shape[axis])
            weight.mul_(sizes.reshape([-1 if i == axis else 1 for i in range(weight.ndim)]))
        net.last.weight[7] = 0  # its scale would be 0
    return net


@pytest.fixture(scope="module")
def traced_net() -> Traced:
    return traced_of(network(), [spec("ids", 1, 10, dtype="int64")], [spec("y", 1, 10, 40)])


def axis_of(module: str) -> int:
    """Of the output channels."""
    return 1 if module == "up" else 0


def expected(scheme: str, module: str) -> tuple[np.ndarray, np.ndarray]:
    """The weight in ``scheme`` as torch works it out, but for palettes, and where values stay."""
    values = getattr(network(), module).weight.detach().double()
    parsed = parse(scheme)
    if parsed.stay:
        by_group = values.movedim(1 - axis_of(module), -1).unflatten(-1, (-1, parsed.stay[1]))
        kept = torch.zeros_like(by_group).scatter(-1, by_group.abs().topk(parsed.stay[0]).indices, 1)
        mask = kept.flatten(-2).movedim(-1, 1 - axis_of(module))
    else:
        count = values.numel() - values.numel() * parsed.zero_percent // 100
        mask = (values.abs() >= values.abs().flatten().topk(count).values[-1]).double()
    values = values * mask
    if parsed.inner and parsed.inner.family == "integer":
        others = [i for i in range(values.ndim) if i != axis_of(module)]
        step = values.abs().amax(others, keepdim=True) / 127
        values = (values / step.clamp_min(1e-12)).round() * step
    return values.numpy(), mask.numpy()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_is_stored_checked_and_executed(traced_net: Traced, tmp_path: Path, scheme: str) -> None:
    lowered = coreml.lower(traced_net, ask(tmp_path, dict.fromkeys(MODULES, scheme), scheme, "iOS18"))
    assert {v.state for v in verdicts(tmp_path, lowered).values()} == {"pass"}
    names = {module: f"{module}_weight_{scheme.replace('-', '_')}" for module in MODULES}
    found = formats(tmp_path / lowered.entry)
    assert {name: found[name] for name in names.values()} == dict.fromkeys(names.values(), SCHEMES[scheme])
    package, rounded = open_package(tmp_path / lowered.entry), network()
    for module, name in names.items():
        values = decode(package, constants(package)[name])
        getattr(rounded, module).weight.data = torch.from_numpy(values).float()
        _judge(scheme, module, values)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 40, (1, 10)))
    session = coreml_interpreter.open(tmp_path / lowered.entry, lowered.signature)
    y = session.call("forward", {"ids": ids.numpy()})["y"]
    assert sqnr_db(rounded(ids).detach().numpy(), y) > 50
    assert sqnr_db(network()(ids).detach().numpy(), y) < 40
    _judge_size(tmp_path / lowered.entry, scheme, names)


def _judge(scheme: str, module: str, values: np.ndarray) -> None:
    parsed, exact = parse(scheme), getattr(network(), module).weight.detach().double().numpy()
    if parsed.scaled:
        others = tuple(i for i in range(exact.ndim) if i != axis_of(module))
        largest = abs(exact).max(axis=others, keepdims=True)
        shares = np.unique((values / np.where(largest == 0, 1, largest)).round(3))
        assert len(shares) <= 2 * 2**parsed.weight_bits  # scales are rounded to float16
        assert (values[exact == 0] == 0).all()
        assert sqnr_db(exact, values) > 6 * parsed.weight_bits - 6
        return
    if parsed.vector > 1:
        rows = np.moveaxis(values, axis_of(module), -1).reshape(-1, parsed.vector)
        assert len(np.unique(rows, axis=0)) <= 2**parsed.weight_bits < len(np.unique(values)) ** parsed.vector
        assert sqnr_db(exact, values) > 3 * parsed.weight_bits / parsed.vector  # half of what a bit gives a value
        return
    wanted, stays = expected(scheme, module)
    assert (values[(stays == 0) & (exact != 0)] == 0).all()  # of equal values any may stay
    assert np.count_nonzero(values) >= 0.9 * np.count_nonzero(wanted)
    if parsed.palette:
        assert len(np.unique(values[(stays == 1) & (exact != 0)])) <= 2**parsed.weight_bits
        assert sqnr_db(wanted, values) > 3 * parsed.weight_bits
    else:
        assert sqnr_db(wanted, values) > (40 if parsed.inner else 70)


def _judge_size(package: Path, scheme: str, names: dict[str, str]) -> None:
    """Values, tables, scales and masks of all weights, each weight once: between the floor and half precision."""
    records = {record.name: record for record in mlpackage.inspect(package).weights}
    net, parsed = network(), parse(scheme)
    assert not [name for name in records if name.endswith(("_divided", "_stored"))]
    for module, name in names.items():
        weight = getattr(net, module).weight
        size, count = records[name].bytes + records[name].scale_bytes, weight.numel()
        masks = (count + 7) // 8 if parsed.family == "sparse" else 0
        tables = 2 * parsed.vector * 2**parsed.weight_bits
        beside = 2 * weight.shape[axis_of(module)] + tables if parsed.weight_bits < 16 else 0
        assert parsed.payload_bytes(count) + masks <= size <= parsed.payload_bytes(count) + masks + beside
        assert (
            size - (tables if parsed.vector > 1 else 0) < 0.65 * 2 * count
        )  # tables are large beside such small weights


def test_a_scaled_palette_serves_channels_of_different_size(traced_net: Traced, tmp_path: Path) -> None:
    errors = {}
    for scheme in ("palette4", "palette4s"):
        lowered = coreml.lower(traced_net, ask(tmp_path / scheme, {"last": scheme}, scheme, "iOS18"))
        package = open_package(tmp_path / scheme / lowered.entry)
        exact = network().last.weight.detach().numpy()
        rows = abs(decode(package, constants(package)[f"last_weight_{scheme}"]) - exact).max(axis=1)
        errors[scheme] = rows / np.where(abs(exact).max(axis=1) == 0, 1, abs(exact).max(axis=1))
    assert errors["palette4s"].max() < 0.15 < 0.5 < errors["palette4"].max()


def test_groups_of_channels_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    net = traced_of(nn.Linear(30, 63), [spec("x", 1, 30)], [spec("y", 1, 63)])
    cases = {"sparse2of4": ("input", 4, 30, "fp16"), "sparse2of4-w8": ("input", 4, 30, "w8")}
    for scheme, (side, group, size, instead) in (cases | {"palette6v2": ("output", 2, 63, "palette6")}).items():
        text = f"{scheme} needs {side} channels divisible by {group}, but  has {size}\n?.*\n?.*groups: .*: {instead}}}"
        with pytest.raises(StageFailed, match=text):
            coreml.lower(net, ask(tmp_path / scheme, {"": scheme}, scheme, "iOS18"))


@pytest.mark.parametrize("scheme", ["palette4s", "palette4v2", "sparse50-w8", "sparse2of4-palette4"])
def test_joint_schemes_need_ios18(traced_net: Traced, tmp_path: Path, scheme: str) -> None:
    with pytest.raises(RecipeError, match=f"{scheme} with minimum_os iOS18 or macOS15, not iOS17\n.*: iOS18"):
        coreml.lower(traced_net, ask(tmp_path, {"last": scheme}, "fp16"))


def test_pruning_by_groups_serves_ios16(traced_net: Traced, tmp_path: Path) -> None:
    lowered = coreml.lower(traced_net, ask(tmp_path, {"last": "sparse2of4"}, "fp16", "iOS16"))
    assert {v.state for v in verdicts(tmp_path, lowered).values()} == {"pass"}
    package = open_package(tmp_path / lowered.entry)
    values = decode(package, constants(package)["last_weight_sparse2of4"])
    assert sqnr_db(expected("sparse2of4", "last")[0], values) > 70


@pytest.mark.parametrize(
    ("scheme", "constant", "part"),
    [
        ("palette4s", "last_weight_palette4s", "scale"),
        ("palette6v2", "last_weight_palette6v2", "lut"),
        ("palette4s", "last_weight_palette4s_divided", "lut"),
        ("sparse50-w8", "last_weight_sparse50_w8_stored_1", "scale"),
        ("sparse50-palette4", "last_weight_sparse50_palette4_stored_1", "lut"),
    ],
)
def test_damage_to_a_part_of_a_weight_is_found(
    traced_net: Traced, tmp_path: Path, scheme: str, constant: str, part: str
) -> None:
    lowered = coreml.lower(traced_net, ask(tmp_path, dict.fromkeys(MODULES, scheme), scheme, "iOS18"))
    stored = constants(open_package(tmp_path / lowered.entry))
    name = next(n for n in stored if n.startswith(constant.removesuffix("_1")) and part in stored[n].parts)
    at, values = stored_part(tmp_path / lowered.entry, name, part)
    flat = values.reshape(-1)
    flat[-1 if part == "scale" else abs(flat).argmax()] /= 2  # the largest scale is that of the channel of zeros
    overwrite(tmp_path / lowered.entry, at, values)
    verdict = verdicts(tmp_path, lowered)["structure.weights"]
    assert (verdict.state, "last" in verdict.reason) == ("fail", True)
