"""JSON files: one text per value, signatures that break with the content, replacement in one step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgebake.errors import ArtifactDamaged, StoreError
from edgebake.jsonfile import canonical_json, check_signature, digest_of, read_json, sign, write_json_atomic


def test_equal_values_have_one_canonical_text_whatever_their_order() -> None:
    assert canonical_json({"b": (1, 2.5), "a": "ü"}) == canonical_json({"a": "ü", "b": [1, 2.5]})
    assert canonical_json({"b": [1], "a": "ü"}) == '{"a":"\\u00fc","b":[1]}'


@pytest.mark.parametrize(
    "one, other", [(1, 1.0), (1, True), (1, "1"), (None, "null"), ([], {}), (0.1, 0.1 + 1e-17 * 2)]
)
def test_values_that_differ_have_digests_that_differ(one: object, other: object) -> None:
    assert (digest_of({"x": one}) == digest_of({"x": other})) == (type(one) is type(other) and one == other)


def test_the_digest_is_sha256_of_the_canonical_text() -> None:
    # echo -n '{"a":1}' | sha256sum
    assert digest_of({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


@pytest.mark.parametrize("value", [{1: "x"}, {"a": [{2: 3}]}, {"a": {1, 2}}, Path("x")])
def test_what_json_cannot_hold_without_doubt_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest_of({"x": float("nan")})


def test_a_signature_survives_a_file_and_breaks_with_the_content(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "m.json", sign({"sqnr_db": 41.25, "names": ("a", "b")}))
    read = read_json(tmp_path / "m.json")
    assert check_signature(read)
    assert not check_signature({**read, "sqnr_db": 99.0})
    assert not check_signature({"sqnr_db": 41.25})
    assert sign(read) == read


def test_a_refused_value_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "m.json"
    write_json_atomic(path, {"old": True})
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, {"new": float("inf")})
    assert read_json(path) == {"old": True}
    assert [p.name for p in path.parent.iterdir()] == ["m.json"]


def test_the_same_value_gives_the_same_bytes(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"b": 1, "a": 2})
    write_json_atomic(tmp_path / "b.json", {"a": 2, "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_missing_and_damaged_files_are_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactDamaged, match="missing"):
        read_json(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text(json.dumps({"a": [1, 2, 3]})[:-4])
    with pytest.raises(ArtifactDamaged, match="not JSON") as raised:
        read_json(tmp_path / "cut.json")
    assert "cut.json" in raised.value.problems[0].where
    with pytest.raises(StoreError):
        read_json(tmp_path)


def test_a_folder_in_the_way_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "m.json" / "x").mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot write"):
        write_json_atomic(tmp_path / "m.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]
