"""The grammar of scheme names."""

from __future__ import annotations

import pytest

from edgebake.scheme import ALIASES, aliases_of, canonical, parse, shown


@pytest.mark.parametrize(
    ("name", "bits", "group", "activations", "dynamic"),
    [
        ("w8", 8, None, None, False),
        ("w8a8", 8, None, 8, False),
        ("w8a8d", 8, None, 8, True),
        ("w4g32a8d", 4, 32, 8, True),
        ("w4g32", 4, 32, None, False),
        ("palette4", 4, None, None, False),
        ("palette4g16", 4, 16, None, False),
    ],
)
def test_a_name_is_decoded(name: str, bits: int, group: int | None, activations: int | None, dynamic: bool) -> None:
    scheme = parse(name)
    assert (scheme.weight_bits, scheme.group, scheme.activation_bits, scheme.dynamic) == (
        bits,
        group,
        activations,
        dynamic,
    )


def test_one_scale_for_the_whole_weight() -> None:
    assert [parse(name).whole for name in ("w8", "w8t", "w4ta8", "w8g32")] == [False, True, True, False]
    assert parse("w8").floor_bytes(100, 10) - parse("w8t").floor_bytes(100, 10) == 9 * 4


def test_groups_may_have_zero_points() -> None:
    names = ("w4g32", "w4g32z", "w4g64za8d", "q4_1")
    assert [parse(name).zero_points for name in names] == [False, True, True, True]
    assert (parse("w4g64za8d").group, parse("w4g64za8d").activation_bits) == (64, 8)
    assert parse("w4g32z").floor_bytes(3200, 10) - parse("w4g32").floor_bytes(3200, 10) == 100 * 4


def test_only_static_activations_need_calibration() -> None:
    assert [n for n in ("fp16", "w8", "w8a8", "w8a8d", "palette4") if parse(n).needs_calibration] == ["w8a8"]


def test_every_alias_leads_to_a_scheme_of_the_grammar() -> None:
    assert all(parse(alias).name == name for alias, name in ALIASES.items())


def test_aliases_are_printed_beside_the_canonical_name() -> None:
    assert canonical("8DA4W") == "w4g32a8d"
    assert shown("w4g32a8d") == "w4g32a8d (8da4w)"
    assert "int4wo" in aliases_of("w4g32")


@pytest.mark.parametrize(
    "name",
    [
        *[
            "",
            "w5",
            "int8",
            "w8g0",
            "w8tg32",
            "w8g32t",
            "w4z",
            "w8tz",
            "w4zg32",
            "palette9",
            "palette4g0",
            "palette4a8",
            "palette4sg8",
            "palette4v1",
            "palette4v2g8",
            "palette4v2s",
            "fp8",
            "w8a8x",
            "a8w8",
        ],
        *["sparse0", "sparse100", "sparse4of4", "sparse0of4", "sparse2of", "sparse50-", "sparse50-fp16"],
        *[
            "sparse50-w8a8",
            "sparse50-w4g32",
            "sparse50-w8t",
            "sparse50-palette4s",
            "sparse50-palette4v2",
            "sparse50-int8wo",
            "sparse50-sparse50",
        ],
    ],
)
def test_what_is_no_scheme_is_refused_with_the_grammar(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not a scheme; write fp32, fp16, palette4, or w<bits>"):
        parse(name)


def test_the_floor_is_payload_and_scales() -> None:
    assert parse("fp16").floor_bytes(1000, 10) == 2000
    assert parse("w8").floor_bytes(1000, 10) == 1000 + 4 * 10
    assert parse("w4g32a8d").floor_bytes(3200, 10) == 1600 + 4 * 100
    assert parse("palette4").floor_bytes(1000, 10) == 500 + 2 * 16
    assert parse("sparse75").floor_bytes(1001, 10) == 2 * 251 + 126
    assert parse("palette4g16").floor_bytes(3200, 32) == 1600 + 2 * 2 * 16
    assert parse("palette4s").floor_bytes(1000, 10) == 500 + 2 * 16 + 2 * 10
    assert parse("palette6v2").floor_bytes(1000, 10) == 375 + 2 * 2 * 64
    assert parse("sparse2of4").floor_bytes(1000, 10) == 2 * 500 + 125
    assert parse("sparse50-w8").floor_bytes(1000, 10) == 500 + 125 + 4 * 10
    assert parse("sparse75-palette4").floor_bytes(1000, 10) == 125 + 125 + 2 * 16


def test_a_sparse_scheme_says_what_stays_and_how_it_is_stored() -> None:
    joint = parse("sparse50-palette4")
    assert (joint.family, joint.weight_bits, joint.kept(1001), joint.stay) == ("sparse", 4, 501, None)
    assert joint.palette == joint.inner == parse("palette4")
    grouped = parse("2:4")
    assert (grouped.name, grouped.stay, grouped.kept(1000), grouped.inner) == ("sparse2of4", (2, 4), 500, None)
    assert parse("sparse2of4-w8").palette is None and parse("palette4s").scaled and not joint.inner.scaled
