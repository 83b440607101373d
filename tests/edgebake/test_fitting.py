"""What fits a device: vendors, NPU versions, facts that must be known, systems; the check refuses in the same words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import edgebake_targets
from edgebake import devices, fitting, target
from edgebake.check import check
from edgebake.checks.targets import targets_with
from edgebake.devices import FACTS
from edgebake.errors import RecipeError
from edgebake.fitting import Fit, SchemeFit
from edgebake.recipe_yaml import read
from edgebake.target import TARGETS, find_target

PROBE = '''"""A target for Hexagon NPUs."""
from edgebake.target import Option, Support

FORMAT = "onnx"
DISTRIBUTIONS = SOURCES = ()
DEVICES = {"vendor": ("qualcomm",), "soc_model": (), "htp_arch": ()}
OPTIONS = (Option(name="opset", default=21, help="opset"),)
SUPPORTS = (
    Support(scheme="fp32", kinds=("linear",)),
    Support(scheme="fp16", kinds=("linear",), needs_device={"htp_fp16": (True,)}, note="some chips have none"),
    Support(scheme="w4", kinds=("linear",), needs={"opset": (23,)}),
)


def missing():
    return None
'''
RECIPE = "name: one\nmodel: {{source: python, path: 'net:make'}}\ninputs: {{x: {{shape: [1, 4]}}}}\ntargets: [{}]\n"


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A target that asks something of devices, found by its file's name like any other."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/probe_npu.py").write_text(PROBE)
    monkeypatch.setattr(edgebake_targets, "__path__", [*edgebake_targets.__path__, str(tmp_path / "lib")])
    monkeypatch.setattr(target, "_names_in", target._names_in.__wrapped__)
    yield "probe-npu"
    targets_with.cache_clear()


def on(device: str, name: str) -> Fit:
    """The target ``name`` on ``device``."""
    return next(fit for fit in fitting.fits(devices.find(device)) if fit.target == name)


def scheme(fit: Fit, name: str) -> SchemeFit:
    """The scheme ``name`` of ``fit``."""
    return next(found for found in fit.schemes if found.scheme == name)


def refused(folder: Path, rule: str) -> str:
    """The problems of a recipe with the target ``rule``, as printed."""
    with pytest.raises(RecipeError) as caught:
        accepted(folder, rule)
    return str(caught.value)


def accepted(folder: Path, rule: str) -> list[str]:
    """The warnings of a recipe with the target ``rule``."""
    (folder / "net.py").write_text("def make(): pass\n")
    (folder / "one.yaml").write_text(RECIPE.format(rule))
    return [str(warning) for warning in check([read(folder / "one.yaml")], trust=False)[1]]


def test_a_target_of_one_vendor_does_not_fit_anothers_chip() -> None:
    assert (
        on("sm8650", "coreml").why_not
        == "coreml does not run on sm8650 (Snapdragon 8 Gen 3): its vendor is qualcomm, not apple"
    )
    assert not on("sm8650", "coreml").schemes
    assert not on("m4", "coreml").why_not
    assert not on("sm8650", "onnx-cpu").why_not


def test_a_scheme_fits_the_chips_that_can_do_it(probe: str) -> None:
    assert not scheme(on("sm8650", probe), "fp16").why_not
    s_phone = on("sm8635", probe)
    assert not s_phone.why_not
    assert not scheme(s_phone, "fp32").why_not
    why = "probe-npu does not take fp16 on sm8635 (Snapdragon 8s Gen 3): its htp_fp16 is false, not true"
    assert scheme(s_phone, "fp16").why_not == why


def test_a_fact_that_is_not_known_does_not_fit_and_says_why(probe: str) -> None:
    unknown = next(d for d in map(devices.find, devices.names()) if "htp_arch" in d.unknown)
    assert f"its htp_arch is not known ({unknown.unknown['htp_arch']})" in on(unknown.name, probe).why_not


def test_options_that_a_scheme_asks_for_are_named(probe: str) -> None:
    assert scheme(on("sm8650", probe), "w4").settings == {"opset": (23,)}
    assert scheme(on("a17-pro", "coreml"), "w8").settings == {}
    assert scheme(on("a17-pro", "coreml"), "w4").settings == {"minimum_os": ("iOS18", "macOS15")}


def test_a_scheme_that_asks_for_a_newer_system_than_the_device_came_with_says_so() -> None:
    old, new = scheme(on("a17-pro", "coreml"), "w4"), scheme(on("m4", "coreml"), "w4")
    assert "a17-pro (Apple A17 Pro) came with iOS17; the artifact asks for iOS18 or newer" in old.aside
    assert new.aside == ""  # macOS 15 came with iOS 18


@pytest.mark.parametrize(
    ("device", "asked", "newer"),
    [
        ("m4", "iOS18", False),
        ("m1", "macOS12", True),
        ("m1", "iOS14", False),
        ("a19", "iOS18", False),
        ("m5", "iOS26", False),
        ("a18", "iOS26", True),
        ("sm8650", None, False),
        ("sm8650", "iOS18", False),
        ("sm8650", "Android15", True),
        ("a18", "newest", False),
    ],
)
def test_systems_of_phones_and_macs_are_counted_together(device: str, asked: str | None, newer: bool) -> None:
    options = {} if asked is None else {"minimum_os": asked}
    assert bool(fitting.newer_system(options, devices.find(device))) == newer


def test_the_check_refuses_a_device_in_the_same_words(tmp_path: Path) -> None:
    text = refused(tmp_path, "{target: coreml, device: mt6989}")
    assert on("mt6989", "coreml").why_not in text
    assert "one.yaml:4:targets.0.device: " in text
    assert "-> devices that fit: a14, a15, a16, a17-pro" in text and " more" in text


def test_the_check_refuses_a_scheme_that_the_chip_cannot_do(probe: str, tmp_path: Path) -> None:
    text = refused(tmp_path, f"{{target: {probe}, device: sm8635, scheme: fp16}}")
    assert scheme(on("sm8635", probe), "fp16").why_not + " (some chips have none)" in text
    assert "one.yaml:4:targets.0.scheme: " in text
    assert "-> schemes on sm8635: fp32, w4; devices that fit: sm8450, " in text
    named = refused(tmp_path, f"{{target: {probe}, device: sm8635, compress: {{modules: {{a: fp16}}}}}}")
    assert "does not take fp16 on sm8635" in named and "compress.modules.a: " in named
    assert accepted(tmp_path, f"{{target: {probe}, device: sm8650, scheme: fp16}}") == []


def test_a_target_that_lowers_for_one_chip_needs_a_device(probe: str, tmp_path: Path) -> None:
    text = refused(tmp_path, probe)
    assert "probe-npu lowers for one chip, and no device is named\n    -> devices that fit: sm8450, " in text
    assert accepted(tmp_path, "coreml") == []


def test_the_check_warns_where_devices_came_with_an_older_system(tmp_path: Path) -> None:
    rule = "{{target: coreml, device: {}, options: {{minimum_os: iOS18}}}}"
    (warning,) = accepted(tmp_path, rule.format("a17-pro"))
    assert "one.yaml:4:targets.0.device: a17-pro (Apple A17 Pro) came with iOS17" in warning
    assert "a lower minimum_os under options" in warning
    assert accepted(tmp_path, rule.format("m4-max")) == []


# They run on boards and PCs, of which devices.yaml has none; whoever names a phone for them is told so.
NO_PHONES = {"executorch-ethos-u", "executorch-openvino"}


def test_what_targets_ask_of_devices_can_be_met() -> None:
    for name in NO_PHONES:
        assert not fitting.fitting(fitting.of_target(find_target(name)))
    for name in set(TARGETS.names()) - NO_PHONES:
        found = find_target(name)
        every = (fitting.of_target(found), *(row.needs_device for row in found.SUPPORTS))
        assert {key for needs in every for key in needs} <= {"vendor", "platform", *FACTS}
        for needs in every:
            assert fitting.fitting(needs), f"no device meets {needs} of {name}"


VENDORS = {"coreml": "apple", "mlx": "apple", "mps": "apple", "qnn": "qualcomm", "mediatek": "mediatek"}


def test_a_target_named_after_a_vendors_stack_says_whose_chips_it_runs_on() -> None:
    for name in TARGETS.names():
        if vendor := VENDORS.get(name.rpartition("-")[2]):
            assert fitting.of_target(find_target(name))["vendor"] == (vendor,)
