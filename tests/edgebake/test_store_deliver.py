"""Delivery: out of the store into a folder, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgebake.errors import StoreError
from edgebake.store import Store
from storing import KEY, MODEL, flip, writes


def test_delivery_copies_what_differs_and_leaves_what_is_there(store: Store, tmp_path: Path) -> None:
    entry = store.commit("lower", KEY, MODEL)
    out = tmp_path / "dist"
    assert store.deliver(entry, out, ("model.bin", "model.mlpackage")) == ("model.bin", "model.mlpackage/Data/w.bin")
    inode = (out / "model.bin").stat().st_ino
    assert store.deliver(entry, out) == ()
    assert (out / "model.bin").stat().st_ino == inode
    flip(out / "model.bin", keep_stamp=True)
    (out / "model.mlpackage" / "stray").write_text("from an older build")
    (out / "notes.txt").write_text("the user's")
    assert store.deliver(entry, out, ("model.bin", "model.mlpackage")) == ("model.bin",)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        "model.bin",
        "model.mlpackage/Data/w.bin",
        "notes.txt",
    ]
    assert store.find("lower", KEY) is not None


def test_a_delivered_file_shares_nothing_that_could_damage_the_store(store: Store, tmp_path: Path) -> None:
    entry = store.commit("lower", KEY, MODEL)
    store.deliver(entry, tmp_path / "dist")
    with (tmp_path / "dist" / "model.bin").open("rb+") as file:
        file.write(b"overwritten")
    assert Store(store.root).find("lower", KEY) is not None


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "", "a\\..\\b", "none"])
def test_delivery_refuses_names_that_lead_out_or_nowhere(store: Store, tmp_path: Path, name: str) -> None:
    entry = store.commit("lower", KEY, MODEL)
    with pytest.raises(StoreError):
        store.deliver(entry, tmp_path / "dist", (name,))


def test_what_a_killed_delivery_left_is_removed_when_it_is_old(store: Store, tmp_path: Path) -> None:
    for name in (".model.bin.0123.part", ".other.4567.part"):
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / ".model.bin.0123.part", (1, 1))
    store.deliver(store.commit("lower", KEY, writes({"model.bin": b"x"})), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [".other.4567.part", "model.bin"]
