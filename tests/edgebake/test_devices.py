"""Device profiles: every number has a source, what does not fit is refused at its line, names and titles are found."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from edgebake import devices
from edgebake.devices import FACTS
from edgebake.errors import RecipeError

GOOD = """\
documents:
  brief: Qualcomm, product brief
devices:
  sm1:
    title: Snapdragon One
    vendor: qualcomm
    platform: android
    npu: hexagon-v75
    ram_gib: 24
    sources:
      npu: "brief: page 2"
      ram_gib: brief
    unknown:
      bandwidth_gb_s: the brief gives no width
      os_floor: the brief names no system
      soc_model: not in the brief
      htp_arch: not in the brief
      vtcm_mib: not in the brief
      htp_fp16: not in the brief
"""


@pytest.mark.parametrize("name", devices.names())
def test_every_fact_of_a_device_has_a_source_and_every_other_a_reason(name: str) -> None:
    device = devices.find(name)
    assert list(device.facts) == list(device.sources)
    assert all(len(text) > 10 for text in (*device.sources.values(), *device.unknown.values()))
    expected = {key for key, fact in FACTS.items() if fact.vendor in ("", device.vendor)}
    assert expected == {*device.facts, *device.unknown}
    assert not set(device.facts) & set(device.unknown)


def test_qnn_numbers_are_those_of_executorch() -> None:
    found = importlib.util.find_spec("executorch")
    if found is None or not found.submodule_search_locations:
        pytest.skip("executorch is not installed")
    path = Path(found.submodule_search_locations[0]) / "backends/qualcomm/serialization/qc_schema.py"
    table = _table_of(path)
    cited = [d for d in map(devices.find, devices.names()) if "qc_schema.py" in d.sources.get("soc_model", "")]
    assert len(cited) > 8
    for device in cited:
        row = table.get(device.name.upper()) or table[device.name.upper().removesuffix("P")]
        assert row == tuple(device.facts[key] for key in ("soc_model", "htp_arch", "vtcm_mib"))
        assert device.facts["npu"] == f"hexagon-v{device.facts['htp_arch']}"


def _table_of(path: Path) -> dict[str, tuple[int, int, int]]:
    """Name to (soc_model, htp_arch, vtcm) by ExecuTorch's own table; the file imports nothing of ExecuTorch."""
    spec = importlib.util.spec_from_file_location("qc_schema_alone", path)
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["qc_schema_alone"] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    del sys.modules["qc_schema_alone"]
    rows = module._soc_info_table.items()
    return {chip.name: (int(chip), int(i.htp_info.htp_arch), i.htp_info.vtcm_size_in_mb) for chip, i in rows}


def test_a_row_is_read_with_its_documents_written_out() -> None:
    device = devices.read(GOOD)["sm1"]
    assert device.facts == {"npu": "hexagon-v75", "ram_gib": 24.0}
    expected = {"npu": "Qualcomm, product brief: page 2", "ram_gib": "Qualcomm, product brief"}
    assert device.sources == expected
    assert device.unknown["os_floor"] == "the brief names no system"


def test_lowering_sees_what_a_device_is_and_not_who_says_so() -> None:
    row = devices.row("sm8650")
    assert row is not None
    assert (row["soc_model"], row["htp_arch"], row["vtcm_mib"]) == (57, 75, 8)
    assert set(row) == {"name", "title", "vendor", "platform", *devices.find("sm8650").facts}
    assert devices.row(None) is None


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("    npu: hexagon-v75", "    gpu: x\n    npu: hexagon-v75", "8:devices.sm1.gpu: a device has no 'gpu'"),
        ("      ram_gib: brief\n", "", "10:devices.sm1.sources: ram_gib has no source"),
        ("    ram_gib: 24\n", "", "9:devices.sm1.sources: there is a source for 'ram_gib', and no such fact"),
        ("      os_floor: the brief names no system\n", "", "4:devices.sm1: neither os_floor nor why it is unknown"),
        (
            "      os_floor",
            "      ram_gib: why\n      os_floor",
            "15:devices.sm1.unknown.ram_gib: 'ram_gib' is no fact",
        ),
        ("ram_gib: 24", "ram_gib: lots", "9:devices.sm1.ram_gib: ram_gib must be a number above 0, not 'lots'"),
        ("ram_gib: 24", "ram_gib: 0", "ram_gib must be a number above 0, not 0"),
        ("ram_gib: 24", "ram_gib: true", "ram_gib must be a number above 0, not true"),
        ("    ram_gib: 24\n", "    ram_gib: 24\n    htp_fp16: 1\n", "htp_fp16 must be true or false, not 1"),
        ("ram_gib: brief", "ram_gib: ''", "12:devices.sm1.sources.ram_gib: must be text, not ''"),
        ("npu: hexagon-v75", "npu: Hexagon V75", "npu must be written like hexagon-v75, not 'Hexagon V75'"),
        ("vendor: qualcomm", "vendor: acme", "6:devices.sm1.vendor: must be one of apple, google"),
        ("platform: android", "platform: dos", "7:devices.sm1.platform: must be one of android, ios, macos, not 'dos'"),
        ("title: Snapdragon One", "title: 1", "5:devices.sm1.title: must be the name that people know"),
        ("  sm1:", "  SM1:", "4:devices.SM1: 'SM1' cannot name a device"),
        ("title: Snapdragon One\n", "title: a\n    title: b\n", "6: 'title' stands twice (first in line 5)"),
        ("documents:\n  brief: Qualcomm, product brief\n", "", "must be a mapping of documents and devices"),
        ("    ram_gib: 24\n", "    ram_gib: 24\n    soc_model: 1\n", "'soc_model' is no fact that is left out"),
    ],
)
def test_what_does_not_fit_is_refused_at_its_line(old: str, new: str, text: str) -> None:
    assert old in GOOD
    with pytest.raises(RecipeError) as caught:
        devices.read(GOOD.replace(old, new, 1))
    assert text in str(caught.value)
    assert str(caught.value).startswith("devices.yaml:")
    assert all(problem.fix for problem in caught.value.problems)


def test_facts_of_one_vendor_are_refused_for_another() -> None:
    with pytest.raises(RecipeError, match="only chips of qualcomm have soc_model"):
        devices.read(
            GOOD.replace("vendor: qualcomm", "vendor: apple").replace("ram_gib: 24", "ram_gib: 24\n    soc_model: 5")
        )


def test_every_problem_is_told_at_once() -> None:
    broken = GOOD.replace("vendor: qualcomm", "vendor: acme").replace("ram_gib: 24", "ram_gib: -1")
    with pytest.raises(RecipeError) as caught:
        devices.read(broken)
    assert {"vendor", "ram_gib"} <= {problem.where.rsplit(".", 1)[-1] for problem in caught.value.problems}


def test_a_file_that_is_no_yaml_is_refused_at_its_line() -> None:
    with pytest.raises(RecipeError, match=r"devices\.yaml:2: "):
        devices.read("documents:\n\tbrief: x\n")


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("sm8605", "did you mean 'sm8650'"),
        ("SM8750", "did you mean 'sm8750'"),
        ("snapdragon 8 gen 3", "did you mean 'sm8650' (Snapdragon 8 Gen 3)"),
        ("Dimensity_9400", "did you mean 'mt6991' (Dimensity 9400)"),
        ("exynos-2400", "did you mean 's5e9945' (Exynos 2400)"),
        ("toaster", "known: a14"),
    ],
)
def test_an_unknown_device_names_the_nearest(written: str, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        devices.find(written)
    assert text in str(caught.value)
