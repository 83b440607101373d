"""ExecuTorch with OpenVINO: lowered whole, executed in ExecuTorch's own runtime, and the same bytes again."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asking import defaults, lower_request
from baking import SOURCES, finish, kitchen, start
from edgebake import devices
from edgebake.compress import cast, pt2e
from edgebake.errors import StageFailed
from edgebake.fitting import target_misfit
from edgebake.target import Asked, GraphRequest, ModuleRequest
from edgebake.types import Assignment, Lowered, Traced
from edgebake_targets import _openvino
from edgebake_targets import executorch_openvino as target
from edgebake_targets.inspectors import pte
from xnnpack_cases import VISION, VISION_KINDS, images, vision_network

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
installed = pytest.mark.skipif(target.missing() is not None, reason="OpenVINO is not installed")


def traced(scheme: str, folder: Path) -> tuple[Traced, Any]:
    """The test network as the stages hand it on, and the request that lowers it."""
    schemes = {} if scheme == "fp32" else dict.fromkeys(VISION_KINDS, scheme)
    assignment = Assignment(schemes=schemes, kinds=VISION_KINDS)
    request = lower_request(folder, defaults(target), scheme=scheme, assignment=assignment)
    network: torch.nn.Module = vision_network()
    if scheme == "fp16":
        asked = ModuleRequest(module=network, assignment=assignment, options={}, run_calibration=lambda _: None)
        network = cast.apply(asked)
    program = torch.export.export(network, (images(1)[0],), strict=False)
    if scheme == "w8a8":
        calls = [[(image,)] for image in images(8)]
        quantizer = target.quantizer(request)
        program = pt2e.apply(
            GraphRequest(program=program, dynamic_shapes=None, quantizer=quantizer, calibration=calls, options={})
        )
    return Traced(programs={"forward": program}, signature=VISION), request


def built(scheme: str, folder: Path) -> Lowered:
    return target.lower(*traced(scheme, folder))


@installed
@pytest.mark.slow
def test_lowering_again_gives_the_same_bytes_all_in_one_part(tmp_path: Path) -> None:
    program, request = traced("w8a8", tmp_path)
    written = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        lowered = target.lower(program, replace(request, folder=tmp_path / name))
        assert lowered.delegation.share == 1.0 and not lowered.delegation.left_out
        written.append((tmp_path / name / lowered.entry).read_bytes())
    assert written[0] == written[1]
    entry = tmp_path / "first" / lowered.entry
    assert pte.inspect(entry).delegates == {"OpenvinoBackend": 1}
    assert [v.state for v in target.structure(entry, VISION, {})] == ["pass"] * 3


@installed
@pytest.mark.slow
def test_weights_that_the_compiler_did_not_get_as_integers_are_named(tmp_path: Path) -> None:
    program, request = traced("w8a8", tmp_path)
    held = Counter({("int8", count): 1 for count in (432, 256, 144)})
    with pytest.raises(StageFailed, match="integer weights came out of lowering as floats: head") as failed:
        target._refuse_lost_integers(program, request, held)
    assert "give these modules fp32" in failed.value.problems[0].fix


@installed
@pytest.mark.slow
def test_whole_builds_execute_it(tmp_path: Path) -> None:
    wanted = [("executorch-openvino", scheme) for scheme in ("fp32", "w8a8")] + [("executorch-xnnpack", "w8a8")]
    made = kitchen(tmp_path, [{"target": name, "scheme": scheme} for name, scheme in wanted])
    roots = [str(Path(place).parent) for place in find_spec("openvino").submodule_search_locations or ()]  # type: ignore[union-attr]
    done = finish(start(*made.arguments(), PYTHONPATH=os.pathsep.join([*SOURCES, *roots])))
    assert done.code == 0, done.err
    assert [one["measurements"]["runner"]["kind"] for one in done.results] == ["executed"] * 3
    exact, rounded, other = (one["measurements"]["outputs"]["output"]["sqnr_db"] for one in done.results)
    assert exact > 40  # bfloat16 on CPUs that have it
    assert rounded == pytest.approx(other, abs=0.5)  # the same scales
    assert not [verdict for one in done.results for verdict in one["verdicts"] if verdict["state"] == "not measured"]


@installed
@pytest.mark.slow
def test_half_precision_weights_take_half_the_size(tmp_path: Path) -> None:
    sizes = []
    for scheme in ("fp32", "fp16"):
        (tmp_path / scheme).mkdir()
        lowered = built(scheme, tmp_path / scheme)
        sizes.append((tmp_path / scheme / lowered.entry).stat().st_size)
    weights = 16 * 27 + 16 * 16 + 16 * 9 + 10 * 16
    assert sizes[0] - sizes[1] > weights  # two bytes less for each, and two casts more


@installed
def test_what_openvino_does_not_compile_is_passed_on() -> None:
    from openvino import Model, opset1

    value = opset1.parameter([2], np.float32)
    with pytest.raises(StageFailed, match=r"OpenVINO did not compile a part of the network \(exit code 1\)") as failed:
        _openvino._compile(Model([value], [value], "part"), "NOWHERE")
    assert "executorch-xnnpack" in failed.value.problems[0].fix


def test_what_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_openvino, "find_spec", lambda _: None)
    found = _openvino.missing()
    assert found is not None and found.reason == "the Python package 'openvino' is not installed"
    assert found.remedy == "pip install --no-deps openvino==2025.4.1 openvino-telemetry==2025.2.0"
    monkeypatch.setattr(_openvino, "find_spec", lambda _: find_spec("json"))
    found = _openvino.missing()
    assert found is not None and found.reason == "the Python package 'openvino' has no libopenvino_c"
    assert _openvino.environment() == {}


def test_dimensions_that_vary_and_phones_are_refused() -> None:
    asked = Asked(
        scheme="fp32",
        module_schemes=(),
        options=defaults(target),
        device=None,
        inputs={},
        varying=("seq",),
        channels=None,
    )
    (refusal,) = target.refusals(asked)
    assert refusal.what == "executorch-openvino takes fixed shapes only, and 'seq' varies"
    assert (refusal.fix, refusal.key) == ("give it one size in this rule: dims: {seq: {min: 64, max: 64}}", "dims")
    assert "intel" in target_misfit("executorch-openvino", target, devices.find("mt6991"))
