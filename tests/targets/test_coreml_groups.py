"""Scales and tables by group: stored, executed, refused where they do not fit or gain nothing, and damage is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import WEIGHTS, ask, formats, overwrite, spec, stored_part, traced_of, verdicts
from edgebake.errors import RecipeError, StageFailed
from edgebake.metrics import sqnr_db
from edgebake.types import Traced
from edgebake_targets import coreml
from edgebake_targets._coreml_constants import constants, decode
from edgebake_targets._coreml_package import open_package
from edgebake_targets._coremltools import quiet
from edgebake_targets.inspectors import mlpackage
from edgebake_targets.runners import coreml_interpreter

MODULES = ("conv", "up", "first", "last")


class Wide(nn.Module):
    """All channels divide by 32; the linear layers by 128."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv1d(32, 64, 3, padding=1), nn.ConvTranspose1d(64, 128, 3, padding=1)
        self.first, self.last = nn.Linear(128, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 32, 10)."""
        return self.last(torch.relu(self.first(self.up(torch.relu(self.conv(x))).transpose(1, 2))))


def wide() -> Wide:
    torch.manual_seed(0)
    return Wide().eval()


@pytest.fixture(scope="module")
def traced_wide() -> Traced:
    return traced_of(wide(), [spec("x", 1, 32, 10)], [spec("y", 1, 10, 64)])


def floats() -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in wide().named_parameters() if name.endswith("weight")}


@pytest.mark.parametrize(
    ("scheme", "stored", "least", "system"),
    [
        *[("w4", "int4", 14, "iOS18"), ("w4g16", "int4", 17, "iOS18"), ("w4g32", "int4", 16, "iOS18")],
        *[("w8t", "int8", 38, "iOS16"), ("w8t", "int8", 38, "iOS18"), ("w8g32", "int8", 42, "iOS18")],
        ("w4t", "int4", 12, "iOS18"),
        *[
            ("palette2g16", "palette2", 6, "iOS18"),
            ("palette3g16", "palette3", 12, "iOS18"),
            ("palette4g8", "palette4", 18, "iOS18"),
        ],
        *[("palette4g32", "palette4", 17, "iOS18"), ("palette6g16", "palette6", 28, "iOS18")],
    ],
)
def test_a_grouped_scheme_is_stored_checked_and_executed(
    traced_wide: Traced, tmp_path: Path, scheme: str, stored: str, least: float, system: str
) -> None:
    """The interpreter decodes by itself; it is held against the float network that has the decoded weights."""
    lowered = coreml.lower(traced_wide, ask(tmp_path, dict.fromkeys(MODULES, scheme), scheme, system))
    assert {v.state for v in verdicts(tmp_path, lowered).values()} == {"pass"}
    found = formats(tmp_path / lowered.entry)
    assert {found[f"{name}_weight_{scheme}"] for name in MODULES} == {stored}
    package = open_package(tmp_path / lowered.entry)
    decoded = {name: decode(package, constants(package)[f"{name}_weight_{scheme}"]) for name in MODULES}
    rounded, exact = wide(), floats()
    for name, values in decoded.items():
        original = exact[f"{name}.weight"]
        assert sqnr_db(original, values) > least - 2, name
        getattr(rounded, name).weight.data = torch.from_numpy(values).float()
    x = np.random.default_rng(1).standard_normal((1, 32, 10)).astype(np.float32)
    session = coreml_interpreter.open(tmp_path / lowered.entry, lowered.signature)
    y = session.call("forward", {"x": x})["y"]
    assert sqnr_db(rounded(torch.from_numpy(x)).detach().numpy(), y) > 50
    assert sqnr_db(wide()(torch.from_numpy(x)).detach().numpy(), y) > least - 6


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        ("w4g64", 'w4g64 needs input channels divisible by 64, but conv has 32\n.*compress.*\n?.*"conv": w4}'),
        ("palette4g32", 'palette4g32 needs output channels divisible by 32, but odd has 40\n?.*\n?.*"odd": palette4}'),
    ],
)
def test_a_group_that_does_not_divide_names_the_module_and_a_scheme_that_fits(
    traced_wide: Traced, tmp_path: Path, scheme: str, text: str
) -> None:
    """coremltools skips such a weight with a line in its log."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.even = nn.Linear(32, 40), nn.Linear(40, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.even(self.odd(x))

    odd = scheme.startswith("palette")
    net = traced_of(Odd(), [spec("x", 1, 32)], [spec("y", 1, 64)]) if odd else traced_wide
    with pytest.raises(StageFailed, match=text) as caught:
        coreml.lower(net, ask(tmp_path, dict.fromkeys(("odd", "even") if odd else MODULES, scheme), scheme, "iOS18"))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("scheme", ["w4", "w4t", "w4g32", "w8g32", "palette3", "palette4g16"])
def test_a_scheme_that_needs_ios18_is_refused_below_it(traced_wide: Traced, tmp_path: Path, scheme: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"{scheme} with minimum_os iOS18 or macOS15, not iOS17\n.*minimum_os: iOS18"
    ):
        coreml.lower(traced_wide, ask(tmp_path, {"first": scheme}, "fp16"))


@pytest.mark.parametrize(("percent", "system"), [(50, "iOS16"), (75, "iOS18")])
def test_a_pruned_weight_stores_its_largest_values_alone(
    traced_wide: Traced, tmp_path: Path, percent: int, system: str
) -> None:
    scheme = f"sparse{percent}"
    lowered = coreml.lower(traced_wide, ask(tmp_path, dict.fromkeys(MODULES, scheme), scheme, system))
    assert {v.state for v in verdicts(tmp_path, lowered).values()} == {"pass"}
    assert {formats(tmp_path / lowered.entry)[f"{name}_weight_{scheme}"] for name in MODULES} == {"sparse-float16"}
    package = open_package(tmp_path / lowered.entry)
    rounded = wide()
    for name in MODULES:
        values = decode(package, constants(package)[f"{name}_weight_{scheme}"])
        exact = floats()[f"{name}.weight"]
        assert np.count_nonzero(values) == values.size - values.size * percent // 100
        assert abs(exact[values == 0]).max() <= abs(exact[values != 0]).min()
        assert np.allclose(values[values != 0], exact[values != 0], rtol=2**-10)
        getattr(rounded, name).weight.data = torch.from_numpy(values).float()
    x = np.random.default_rng(1).standard_normal((1, 32, 10)).astype(np.float32)
    y = coreml_interpreter.open(tmp_path / lowered.entry, lowered.signature).call("forward", {"x": x})["y"]
    assert sqnr_db(rounded(torch.from_numpy(x)).detach().numpy(), y) > 50
    at, stored = stored_part(tmp_path / lowered.entry, f"first_weight_{scheme}", "nonzero_data")
    overwrite(tmp_path / lowered.entry, at, np.roll(stored, 1))
    verdict = verdicts(tmp_path, lowered)["structure.weights"]
    assert (verdict.state, "first" in verdict.reason) == ("fail", True)


def test_a_scheme_that_gains_nothing_is_an_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = traced_of(nn.Linear(8, 16), [spec("x", 1, 8)], [spec("y", 1, 16)])
    with pytest.raises(StageFailed, match=r"palette8 compresses nothing: .* take 640 bytes, as floats 256.*\n.*fp16"):
        coreml.lower(net, ask(tmp_path, {"": "palette8"}, "palette8"))


@pytest.mark.parametrize(
    ("scheme", "part"),
    [("w4", "scale"), ("w4g32", "scale"), ("palette3g16", "lut"), ("palette4g16", "lut")],
)
def test_one_damaged_scale_or_table_entry_of_a_group_is_found(
    traced_wide: Traced, tmp_path: Path, scheme: str, part: str
) -> None:
    lowered = coreml.lower(traced_wide, ask(tmp_path, dict.fromkeys(MODULES, scheme), scheme, "iOS18"))
    at, values = stored_part(tmp_path / lowered.entry, f"first_weight_{scheme}", part)
    values.reshape(-1)[values.size // 3] *= 2
    overwrite(tmp_path / lowered.entry, at, values)
    found = verdicts(tmp_path, lowered)
    assert (found["structure.loads"].state, found["structure.weights"].state) == ("pass", "fail")
    assert "first" in found["structure.weights"].reason


def test_weights_that_a_compressor_skipped_or_left_divided_are_found(traced_wide: Traced, tmp_path: Path) -> None:
    """What coremltools does in silence where groups do not divide: the weight stays float, divided by its scales."""
    lowered = coreml.lower(traced_wide, ask(tmp_path, {"first": "fp16"}, "fp16", "iOS18"))
    with quiet():
        import coremltools as ct
        from coremltools.optimize import coreml as cto

        model = ct.models.MLModel(str(tmp_path / lowered.entry), skip_model_load=True)
        settings = cto.OpPalettizerConfig(
            nbits=4, granularity="per_grouped_channel", group_size=48, enable_per_channel_scale=True, weight_threshold=9
        )
        harmed = cto.palettize_weights(model, cto.OptimizationConfig(global_config=settings))
        assert "constexpr_lut_to_dense" not in {
            c.operator for c in constants(open_package(tmp_path / lowered.entry)).values()
        }
    blob = (Path(harmed.weights_dir) / "weight.bin").read_bytes()
    assert blob != (tmp_path / lowered.entry / WEIGHTS).read_bytes()
    (tmp_path / lowered.entry / WEIGHTS).write_bytes(blob)
    verdict = verdicts(tmp_path, lowered)["structure.weights"]
    assert (verdict.state, verdict.reason) == (
        "fail",
        "first (fp16) decodes to other values than those it was built from",
    )
    assert verdict.value is not None and verdict.value > 1
    checks = tmp_path / "weights.check.json"
    record = json.loads(checks.read_text())
    record["packages"]["model.mlpackage"]["first_weight_fp16"]["scheme"] = "palette4g32"
    checks.write_text(json.dumps(record))
    assert verdicts(tmp_path, lowered)["structure.weights"].reason == "first (palette4g32) is stored as float16"


def test_sizes_fall_with_the_bits_of_a_weight(traced_wide: Traced, tmp_path: Path) -> None:
    sizes = {}
    for scheme in ("fp16", "w4g32", "palette2"):
        lowered = coreml.lower(traced_wide, ask(tmp_path / scheme, dict.fromkeys(MODULES, scheme), scheme, "iOS18"))
        found = mlpackage.inspect(tmp_path / scheme / lowered.entry)
        sizes[scheme] = sum(r.bytes for r in found.weights if r.name.endswith(f"_weight_{scheme}"))
    assert sizes["fp16"] == 4 * sizes["w4g32"] == 8 * sizes["palette2"]
