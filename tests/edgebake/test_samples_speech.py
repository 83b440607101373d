"""The speech samples: always the same, varied, and with something to detect."""

from __future__ import annotations

import numpy as np

from edgebake.models.zoo.speech import CONTEXT, WINDOW, speech
from edgebake.target import SampleRequest
from edgebake.types import Sample


def made(count: int, skip: int = 0, seed: int = 0) -> list[Sample]:
    return speech(SampleRequest(count=count, skip=skip, seed=seed, options={}))


def wave(sample: Sample) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.stack([call.tensors()["input"][0] for call in sample.calls])


def test_clips_are_the_same_in_every_process_and_whatever_is_skipped() -> None:
    whole = made(9)
    for sample, again in zip(whole[4:9], made(5, skip=4), strict=True):
        assert sample.source == again.source
        np.testing.assert_array_equal(wave(sample), wave(again))
    assert not np.array_equal(wave(whole[0]), wave(made(1, seed=1)[0]))


def test_twenty_four_distinct_clips_hold_speech_and_silence() -> None:
    clips = made(24)
    assert len({clip.source for clip in clips}) == 24
    assert len({wave(clip).tobytes() for clip in clips}) == 24
    assert sum(len(clip.calls) for clip in clips) >= 500
    assert min(len(clip.calls) for clip in clips) >= 30
    without = [clip for clip in clips if clip.source.endswith(("silence", "-007-white"))]
    assert all(np.abs(wave(clip)).max() < 1e-3 for clip in without if clip.source.endswith("silence"))
    loud = [clip for clip in clips if np.abs(wave(clip)).max() > 0.08]
    assert len(loud) >= 16


def test_windows_carry_the_end_of_the_last_one_as_context() -> None:
    windows = wave(made(1)[0])
    assert windows.shape[1] == CONTEXT + WINDOW
    assert windows.dtype == np.float32
    np.testing.assert_array_equal(windows[1:, :CONTEXT], windows[:-1, -CONTEXT:])
    assert np.abs(windows).max() <= 1
