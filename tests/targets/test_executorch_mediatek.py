"""ExecuTorch with NeuroPilot: what MediaTek's compiler is asked for, and what is said where it is not installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from asking import defaults, lower_request
from baking import Done, kitchen, recipe
from edgebake import devices, fitting
from edgebake.compress import pt2e
from edgebake.errors import StageFailed
from edgebake.target import Asked, GraphRequest, find_target
from edgebake.types import Assignment, Lowered, Traced
from edgebake_targets import _mediatek
from edgebake_targets import executorch_mediatek as target
from edgebake_targets.inspectors import _pte_file, pte
from neuropilot_cases import neuropilot
from xnnpack_cases import VISION, VISION_KINDS, images, vision_network

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
WEIGHTS = "quantized_decomposed.quantize_per_channel.default "
needs_none = pytest.mark.skipif(find_spec("mtk_neuron") is not None, reason="MediaTek's packages are installed")


@pytest.fixture
def packages(tmp_path: Path) -> Iterator[None]:
    with neuropilot(tmp_path / "packages"):
        yield


def lowered(schemes: Mapping[str, str], folder: Path) -> Lowered:
    assignment = Assignment(schemes=schemes, kinds=VISION_KINDS)
    request = lower_request(folder, defaults(target), assignment=assignment)
    request = replace(request, device=devices.find("mt6991").row)
    program = torch.export.export(vision_network(), (images(1)[0],), strict=False)
    if set(schemes.values()) != {"fp16"}:
        calibration = [[(image,)] for image in images(2)]
        program = pt2e.apply(
            GraphRequest(
                program=program,
                dynamic_shapes=None,
                quantizer=target.quantizer(request),
                calibration=calibration,
                options={},
            )
        )
    return target.lower(Traced(programs={"forward": program}, signature=VISION), request)


def asked_of_the_compiler(folder: Path) -> tuple[str, list[str]]:
    """Options of the one NPU part, behind ExecuTorch's header of 13 bytes, and each operator with its result's type."""
    program = _pte_file.opened(_pte_file.mapped(folder / "model.pte"))
    (delegate,) = program.table.tables(1)[0].tables(7)
    options, *operators = bytes(_pte_file.blob_of(program, delegate))[13:].decode().splitlines()
    return options, operators


@needs_none
def test_what_is_missing_is_told_with_version_and_source() -> None:
    found = target.missing()
    assert found is not None
    assert found.reason == "MediaTek's mtk_converter and mtk_neuron are not installed"
    assert "https://neuropilot.mediatek.com/" in found.remedy
    assert "pip install its wheels of mtk_converter 8.13.0 and mtk_neuron 8.2.23 or newer for Python 3." in found.remedy


def test_nothing_is_missing_where_the_packages_are(packages: None) -> None:
    assert target.missing() is None


def test_it_lowers_for_the_chips_that_executorch_knows_and_wants_one_named() -> None:
    found = find_target("executorch-mediatek")
    assert fitting.fitting(fitting.of_target(found)) == ["mt6989", "mt6991", "mt6993"]
    assert fitting.needs_one(found)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "widths"), [("w8a8", {"torch.int8"}), ("w8a16", {"torch.int8", "torch.int16"})])
def test_the_chip_and_the_quantised_network_reach_the_compiler(
    scheme: str, widths: set[str], packages: None, tmp_path: Path
) -> None:
    made = lowered(dict.fromkeys(VISION_KINDS, scheme), tmp_path)
    options, operators = asked_of_the_compiler(tmp_path)
    assert options == "--relax-fp32 --opt=3 --platform-config=mt6991"
    assert sum(name.startswith("aten.convolution") for name in operators) == 4
    assert sum(name.startswith(WEIGHTS) for name in operators) == 4  # float weights with their scales, unfolded
    assert {name.split()[1] for name in operators if ".quantize_" in name} == widths
    assert made.delegation.share == 1.0
    assert made.encodings == {"schemes": {scheme: sorted(VISION_KINDS)}, "platform": "mt6991"}
    assert pte.inspect(tmp_path / "model.pte").delegates == {"NeuropilotBackend": 1}


@pytest.mark.slow
def test_a_float_network_asks_for_no_scales_and_a_kept_module_has_none(packages: None, tmp_path: Path) -> None:
    lowered(dict.fromkeys(VISION_KINDS, "fp16"), tmp_path)
    assert not [name for name in asked_of_the_compiler(tmp_path)[1] if "quantize" in name]
    kept = {**dict.fromkeys(VISION_KINDS, "w8a8"), "head": "fp16"}
    counts = []
    for schemes in (dict.fromkeys(VISION_KINDS, "w8a8"), kept):
        lowered(schemes, tmp_path)
        counts.append(sum(name.startswith(WEIGHTS) for name in asked_of_the_compiler(tmp_path)[1]))
    assert counts[0] - counts[1] == 1


def test_two_integer_schemes_in_one_network_are_refused() -> None:
    both = Assignment(schemes={"stem": "w8a8", "head": "w8a16"}, kinds=VISION_KINDS)
    with pytest.raises(StageFailed, match="takes one integer scheme for a network, not w8a16 and w8a8"):
        _mediatek.quantizer(both)


def test_what_the_recipe_alone_shows_is_refused_before_anything_is_loaded() -> None:
    asked = Asked(
        scheme="w8a8",
        module_schemes=("fp16", "w8a16"),
        options={},
        device=devices.find("mt6989").row,
        inputs={},
        varying=("seq",),
        channels=None,
    )
    assert [(refusal.key, refusal.what) for refusal in target.refusals(asked)] == [
        ("dims", "the NPU takes fixed shapes only, and 'seq' varies"),
        ("modules", "w8a16 in a network of w8a8: NeuroPilot's quantizer takes one integer scheme"),
    ]


def dimensity(optional: bool) -> list[Any]:
    npu: dict[str, Any] = {"target": "executorch-mediatek", "device": "mt6989", "scheme": "w8a8"}
    return [*({"target": name, "device": "mt6989"} for name in OTHERS), {**npu, "optional": optional}]


# Of Vulkan's only the structure passes, which is no limit: nothing here executes it.
OTHERS = {"executorch-xnnpack": "pass", "executorch-vulkan": "not measured", "onnx-cpu": "pass"}


@needs_none
@pytest.mark.slow
def test_a_dimensity_recipe_builds_what_it_can_and_tells_the_rest(tmp_path: Path) -> None:
    made = kitchen(tmp_path, dimensity(optional=False))
    done = made.build()
    assert done.code == 3, done.err
    assert states(done) == {**OTHERS, "executorch-mediatek": "toolchain missing"}
    (vulkan,) = (result for result in done.results if result["target"] == "executorch-vulkan")
    assert vulkan["measurements"]["runner"] == {"name": "executorch-vulkan-graph", "kind": "stand-in"}
    assert vulkan["measurements"]["outputs"]["output"]["sqnr_db"] > 100
    assert "stands in for what executes the artifact" in vulkan["measurements"]["latency"]["reason"]
    told = [verdict["reason"] for verdict in vulkan["verdicts"] if verdict["state"] == "not measured"]
    assert told == [
        "executorch-vulkan-graph stands in for a runtime that is not here: its numbers are information only"
    ]
    recipe(made.recipe.parent, dimensity(optional=True))
    again = made.build()
    assert again.code == 0, again.err
    assert states(again) == states(done)


def states(done: Done) -> dict[str, str]:
    """State by target."""
    return {result["target"]: result["state"] for result in done.results}
