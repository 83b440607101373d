"""Device profiles: every number has a source, names are found, mistakes name the nearest."""

from __future__ import annotations

import pytest

from edgebake import devices
from edgebake.errors import RecipeError

FREE = {"name", "title", "vendor", "platform", "sources"}


@pytest.mark.parametrize("name", devices.names())
def test_every_fact_of_a_device_has_a_source(name: str) -> None:
    row = devices.find(name)
    assert set(row) - FREE == set(row["sources"])
    assert all(len(source) > 10 for source in row["sources"].values())
    assert row["vendor"] in {"apple", "qualcomm", "mediatek"}
    assert row["platform"] in {"android", "ios", "macos"}
    assert all(0 < row[key] < 1000 for key in ("ram_gib", "bandwidth_gb_s") if key in row)


def test_soc_models_are_those_of_the_sdk() -> None:
    found = {name: devices.find(name)["soc_model"] for name in ("sm8550", "sm8650", "sm8750")}
    assert found == {"sm8550": 43, "sm8650": 57, "sm8750": 69}


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'sm8650'"):
        devices.find("sm8605")
    assert devices.row(None) is None
    assert devices.row("m4") == devices.find("m4")


def test_targets_of_one_vendor_name_a_vendor_that_has_devices() -> None:
    vendors = {devices.find(name)["vendor"] for name in devices.names()}
    assert set(devices.vendor_of_targets().values()) <= vendors
