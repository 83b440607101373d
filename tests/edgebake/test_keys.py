"""Store keys: what could differ never shares one, what is the same does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgebake.keys import STAGES, StageKey, stage_keys
from edgebake.recipe import Component
from edgebake.store_files import sha256_file
from edgebake.target import find_target
from edgebake.units import Unit

MODEL = "import torch\n\ndef model():\n    return torch.nn.Linear(4, 2)\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(MODEL)
    return tmp_path


def _unit(base: Path, target: str = "onnx-cpu", scheme: str = "fp32", **changes: Any) -> Unit:
    spec = {
        "model": {"source": "python", "path": "net:model"},
        "inputs": {"x": {"shape": [1, 4]}},
        "samples": {"calibration": {"noise": True}, "evaluation": {"noise": True, "seed": 3}},
        "compress": {"scheme": scheme},
        **changes,
    }
    return Unit(
        recipe="r",
        component="model",
        target=target,
        name=None,
        device=None,
        scheme=scheme,
        optional=False,
        options={},
        spec=Component.model_validate(spec),
        base=base,
    )


def _keys(unit: Unit) -> dict[str, StageKey]:
    return stage_keys(unit, sha256_file, None)


def _differ(left: Unit, right: Unit) -> set[str]:
    a, b = _keys(left), _keys(right)
    return {stage for stage in STAGES if a[stage].key != b[stage].key}


def test_targets_that_change_no_module_share_reference_and_trace(base: Path) -> None:
    assert _differ(_unit(base), _unit(base, "executorch-xnnpack")) == {"lower", "validate", "locate"}
    assert _differ(_unit(base), _unit(base, "executorch-xnnpack", "w8a8")) == {
        "compress",
        "lower",
        "validate",
        "locate",
    }


def test_the_folder_of_a_recipe_is_no_part_of_a_key(base: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("elsewhere")
    (other / "net.py").write_text(MODEL)
    assert _differ(_unit(base), _unit(other)) == set()


def test_a_changed_model_file_changes_every_stage(base: Path) -> None:
    before = _keys(_unit(base))
    (base / "net.py").write_text(MODEL.replace("Linear(4, 2)", "Linear(4, 2, bias=False)"))
    after = _keys(_unit(base))
    assert all(before[stage].key != after[stage].key for stage in ("reference", "trace", "lower", "validate"))


def test_who_reads_an_artifact_is_part_of_how_it_is_judged(base: Path) -> None:
    for target, module in (("onnx-cpu", "onnx"), ("onnx-mobile", "ort"), ("executorch-xnnpack", "pte")):
        assert f"edgebake_targets.inspectors.{module}" in _keys(_unit(base, target))["validate"].parts["sources"]


def test_limits_are_judged_anew_without_running_anything(base: Path) -> None:
    assert _differ(_unit(base), _unit(base, limits={"parity": {"cosine": 0.5}, "size": {"mib": 1}})) == set()


def test_evaluation_samples_change_the_reference_and_what_is_judged_on_it(base: Path) -> None:
    samples = {"calibration": {"noise": True}, "evaluation": {"noise": True, "seed": 4}}
    assert _differ(_unit(base), _unit(base, samples=samples)) == {"reference", "validate", "locate"}


def test_calibration_samples_matter_only_where_something_is_calibrated(base: Path) -> None:
    samples = {"calibration": {"noise": True, "seed": 9}, "evaluation": {"noise": True, "seed": 3}}
    assert _differ(_unit(base), _unit(base, samples=samples)) == set()
    assert "lower" in _differ(_unit(base, scheme="w8a8"), _unit(base, scheme="w8a8", samples=samples))
    plain, other = _unit(base, "coreml", "palette4"), _unit(base, "coreml", "palette4", samples=samples)
    assert _differ(plain, other) == set()
    weighed = {"palettes": "sensitive_kmeans"}
    assert "lower" in _differ(replace(plain, options=weighed), replace(other, options=weighed))


def test_a_step_looks_at_every_modules_scheme_and_at_calibration_samples(base: Path) -> None:
    eight, four = (_unit(base, "onnx-qnn", scheme) for scheme in ("w8a16", "w4a16"))
    assert "trace" not in _differ(eight, four)
    step = {"compress": {"steps": ["correct-biases"]}}
    eight, four = (_unit(base, "onnx-qnn", scheme, **step) for scheme in ("w8a16", "w4a16"))
    assert "trace" in _differ(eight, four)
    samples = {"calibration": {"noise": True, "seed": 9}, "evaluation": {"noise": True, "seed": 3}}
    assert "trace" in _differ(eight, _unit(base, "onnx-qnn", "w8a16", **step, samples=samples))


def test_options_change_what_the_targets_quantizer_is_asked_for(base: Path) -> None:
    unit = _unit(base, "executorch-xnnpack", "w8a8")
    ranges = (replace(unit, options={"activation_range": kind}) for kind in ("minmax", "histogram"))
    assert _differ(*ranges) == {"compress", "lower", "validate", "locate"}
    assert stage_keys(unit, sha256_file, {"name": "a"})["compress"].key != _keys(unit)["compress"].key


def test_a_private_toolchain_is_part_of_what_made_an_artifact(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit, target = _unit(base, "executorch-qnn", "fp16"), find_target("executorch-qnn")
    before = _keys(unit)
    assert before["lower"].parts["versions"]["qnn"]
    monkeypatch.setattr(target, "versions", lambda: {"qnn": "another"})
    after = _keys(unit)
    assert {stage for stage in STAGES if before[stage].key != after[stage].key} == {"lower", "validate", "locate"}


def test_options_and_devices_change_the_artifact(base: Path) -> None:
    unit = _unit(base)
    assert _differ(unit, replace(unit, options={"opset": 21})) == {"lower", "validate", "locate"}
    with_device = stage_keys(unit, sha256_file, {"name": "sm8650"})
    assert with_device["lower"].key != _keys(unit)["lower"].key
