"""Cleaning: by size, by age, never what is pinned or in use."""

from __future__ import annotations

import os
import time

from edgebake.jsonfile import digest_of
from edgebake.store import Store
from storing import KEY, MODEL, flip, writes


def fill(store: Store, count: int) -> list[str]:
    """``count`` entries of 1000 bytes and more, each used an hour after the one before, the last an hour ago."""
    keys = [digest_of(i) for i in range(count)]
    for i, key in enumerate(keys):
        entry = store.commit("lower", key, writes({"f": bytes(1000)}))
        used = time.time() - 3600 * (count - i)
        os.utime(entry.folder, (used, used))
    return keys


def kept(store: Store) -> set[str]:
    return {row.key for row in store.entries()}


def test_cleaning_removes_the_oldest_beyond_the_cap_and_keeps_pins(store: Store) -> None:
    keys = fill(store, 4)
    store.pin(keys[0])
    one = store.entries()[0].bytes
    cleaned = store.clean(max_bytes=2 * one)
    assert kept(store) == {keys[0], keys[3]}
    assert (cleaned.entries, cleaned.bytes) == (2, 2 * one)
    assert str(cleaned) == "2 entries removed, 0.0 MiB freed"
    store.unpin(keys[0])
    store.clean(max_bytes=0)
    assert kept(store) == set()


def test_cleaning_by_age_counts_from_the_last_use(store: Store) -> None:
    keys = fill(store, 4)
    later = Store(store.root)
    assert later.find("lower", keys[0]) is not None  # used just now
    later.close()
    store.clean(older_than_s=2.5 * 3600)
    assert kept(store) == {keys[0], keys[2], keys[3]}


def test_cleaning_leaves_what_another_process_has_used_since_it_began(store: Store) -> None:
    keys = fill(store, 3)
    other = Store(store.root)
    assert other.find("lower", keys[0]) is not None
    assert store.clean(max_bytes=0).in_use == 1
    assert kept(store) == {keys[0]}
    other.close()
    store.clean(max_bytes=0)
    assert kept(store) == set()


def test_cleaning_removes_damaged_entries(store: Store) -> None:
    entry = store.commit("lower", KEY, MODEL)
    flip(entry.folder / "model.bin", keep_stamp=False)
    assert store.find("lower", KEY) is None
    assert store.clean().bytes > 7000
    assert not store.damaged[0].moved_to.exists()
