"""Private toolchain folders: made whole or not at all, and every damage found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgebake import toolchains
from edgebake.commands import doctor
from edgebake.errors import StageFailed, StoreError, ToolchainMissing
from edgebake.store_home import default_root


def fill(folder: Path) -> None:
    (folder / "lib").mkdir()
    (folder / "lib" / "one.so").write_bytes(b"one" * 100)
    (folder / "note").write_text("hello")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    folder = tmp_path / "toolchains" / "some-1.0"
    assert toolchains.make(folder, fill)
    return folder


def test_a_folder_is_made_once_and_left_alone_when_whole(made: Path) -> None:
    assert toolchains.damage(made) is None
    before = (made / "lib" / "one.so").stat().st_ino
    assert not toolchains.make(made, fill)
    assert (made / "lib" / "one.so").stat().st_ino == before
    assert made.parent.stat().st_mode & 0o077 == 0


def longer(folder: Path) -> None:
    with (folder / "lib" / "one.so").open("ab") as file:
        file.write(b"!")


def flipped(folder: Path) -> None:
    (folder / "lib" / "one.so").write_bytes(b"eno" * 100)


def forged(folder: Path) -> None:
    record = folder / toolchains.RECORD
    told = json.loads(record.read_text())
    told["files"] = {}
    record.write_text(json.dumps(told))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file is gone": (lambda folder: (folder / "note").unlink(), "note is not there or has another size"),
    "a file is longer": (longer, "one.so is not there or has another size"),
    "a byte differs": (flipped, "one.so is not what was installed"),
    "no record": (lambda folder: (folder / toolchains.RECORD).unlink(), "toolchain.json is missing or damaged"),
    "half a record": (lambda folder: (folder / toolchains.RECORD).write_text("{"), "is missing or damaged"),
    "a record of another folder": (forged, "is missing or damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_with_the_remedy_and_mended(made: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    damage(made)
    with pytest.raises(ToolchainMissing) as caught:
        toolchains.verify(made)
    said = str(caught.value)
    assert "the private toolchain some-1.0 cannot be used" in said
    assert words in said and str(made) in said
    assert "edgebake doctor --fix" in said
    assert toolchains.make(made, fill)
    toolchains.verify(made)


def test_a_folder_of_which_others_could_change_the_libraries_is_refused(made: Path) -> None:
    made.chmod(0o777)
    with pytest.raises(StoreError, match="others can write"):
        toolchains.verify(made)


def test_what_an_interruption_leaves_is_not_taken_for_whole(tmp_path: Path) -> None:
    folder = tmp_path / "some-1.0"
    assert toolchains.fault(folder) == "it has not been made"

    def dies(making: Path) -> None:
        fill(making)
        raise StageFailed("pip was killed")

    with pytest.raises(StageFailed, match="pip was killed"):
        toolchains.make(folder, dies)
    assert not folder.exists()
    assert toolchains.fault(folder) == f"making it was interrupted, {folder}.making is what is left"
    assert toolchains.make(folder, fill)
    assert toolchains.fault(folder) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some-1.0", "some-1.0.lock"]


def test_a_damaged_folder_stays_until_the_new_one_is_whole(made: Path) -> None:
    flipped(made)

    def dies(making: Path) -> None:
        raise StageFailed("no network")

    with pytest.raises(StageFailed, match="no network"):
        toolchains.make(made, dies)
    assert toolchains.damage(made) == f"{made / 'lib' / 'one.so'} is not what was installed"


def test_doctor_makes_what_targets_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgebake_targets import _qnn_toolchain

    monkeypatch.setenv("EDGEBAKE_STORE", str(tmp_path))
    monkeypatch.delenv(_qnn_toolchain.VARIABLE, raising=False)
    monkeypatch.setattr(_qnn_toolchain, "_fill", fill)
    monkeypatch.setattr(_qnn_toolchain, "_cannot", lambda: None)
    at = default_root() / "toolchains" / _qnn_toolchain.NAME
    assert doctor._fix() == [f"executorch-qnn: made {at}"]
    assert toolchains.place(_qnn_toolchain.NAME) == at
    assert doctor._fix() == [f"executorch-qnn: whole already: {at}"]
