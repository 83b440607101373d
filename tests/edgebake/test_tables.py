"""The README's table: made from SUPPORTS, put between its markers, and refused when they are gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgebake import tables
from edgebake.errors import UsageError
from edgebake.target import TARGETS, Support, find_target

PAGE = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"


def test_every_scheme_of_every_target_has_its_cell_and_its_note() -> None:
    lines = tables.table().splitlines()
    names = [cell.strip().strip("`") for cell in lines[0].split("|")[2:-1]]
    cells = {row.split("|")[1].split()[0]: row.split("|")[2:-1] for row in lines[2:] if row.startswith("|")}
    assert names == list(TARGETS.names())
    for place, name in enumerate(names):
        rows = {row.scheme: row for row in find_target(name).SUPPORTS}
        for scheme, row in cells.items():
            assert (row[place].strip() == "-") == (scheme not in rows)
            note = tables.note_of(rows[scheme]) if scheme in rows else ""
            if note:
                number = row[place].rpartition("[")[2].strip(" ]")
                assert f"{number}. {note}" in lines


def test_schemes_of_one_kind_share_a_note() -> None:
    rows = [Support(scheme=f"w4g{g}", kinds=("linear",), note=f"groups of {g}; from iOS 16") for g in (16, 32)]
    assert {tables.note_of(row) for row in rows} == {"groups of g; from iOS 16"}
    wide = Support(scheme="palette4g16", kinds=("linear",), note="one table of 16 values per 16 output channels")
    assert tables.note_of(wide) == "one table of 2^b values per g output channels"


def test_only_what_stands_between_the_markers_changes() -> None:
    assert tables.between_markers(PAGE, "new") == PAGE.replace("old", "new")
    with pytest.raises(UsageError, match="lost the markers"):
        tables.between_markers("before\nafter\n", "new")


def test_a_page_behind_the_targets_is_told_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    monkeypatch.setattr(tables, "README", readme)
    assert tables.main(["--check"]) == 1
    assert readme.read_text() == PAGE
    assert tables.main(["--write"]) == 0
    assert tables.main(["--check"]) == 0
    with pytest.raises(UsageError, match="cannot read"):
        tables.main(["--wrte"])
