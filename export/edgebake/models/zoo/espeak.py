"""Speaks sentences with eSpeak NG (PyPI ``espeakng-loader``); run as a program, one process per list of sentences.

The library keeps state from one sentence to the next that nothing resets, and it is GPL-3.0 code: a process of its own
makes the same list sound the same every time and keeps the library out of the caller.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAMPLE_RATE_HZ = 22050  # eSpeak NG's own
# speak_lib.h of eSpeak NG 1.52
_AUDIO_OUTPUT_SYNCHRONOUS, _PARAMETER_RATE, _PARAMETER_PITCH, _POSITION_CHARACTER, _UTF8 = 2, 1, 3, 1, 1


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """``voice`` as eSpeak names it (``en-us+f3``), ``words_per_minute`` 80..450, ``pitch`` 0..99."""

    text: str
    voice: str
    words_per_minute: int = 170
    pitch: int = 50


def speak(utterances: Sequence[Utterance]) -> list[NDArray[np.int16]]:
    """Sound of each utterance, (n,) int16 at SAMPLE_RATE_HZ. The same list gives the same sounds.

    ToolchainMissing when ``espeakng-loader`` is not installed, StageFailed when eSpeak fails.
    """
    from importlib.util import find_spec

    import numpy as np

    from edgebake.errors import StageFailed, ToolchainMissing

    if find_spec("espeakng_loader") is None:
        raise ToolchainMissing("the speech samples need eSpeak NG", fix="pip install espeakng-loader==0.2.4")
    asked = json.dumps([asdict(utterance) for utterance in utterances])
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=asked.encode(), capture_output=True, check=False, timeout=300)
    if done.returncode != 0:
        raise StageFailed(f"eSpeak NG failed: {done.stderr.decode(errors='replace').strip()[-500:]}")
    sounds, data = [], done.stdout
    while data:
        length = int.from_bytes(data[:8], "little")
        sounds.append(np.frombuffer(data[8 : 8 + length], "<i2").astype(np.int16))
        data = data[8 + length :]
    return sounds


def _open() -> Any:
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path().encode()
    if library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, 0) != SAMPLE_RATE_HZ:
        raise SystemExit("espeak_Initialize failed")
    library.espeak_ng_SetRandSeed(1)  # else the clock seeds the breath of some voices
    return library


def _say(library: Any, utterance: Utterance, sound: bytearray) -> None:
    """Have ``sound`` filled by the library's callback."""
    sound.clear()
    text = utterance.text.encode()
    codes = (
        library.espeak_SetVoiceByName(utterance.voice.encode()),
        library.espeak_SetParameter(_PARAMETER_RATE, utterance.words_per_minute, 0),
        library.espeak_SetParameter(_PARAMETER_PITCH, utterance.pitch, 0),
        library.espeak_Synth(text, len(text) + 1, 0, _POSITION_CHARACTER, 0, _UTF8, None, None),
    )
    if any(codes):
        raise SystemExit(f"cannot speak with the voice {utterance.voice!r}: codes {codes}")


def main() -> None:
    """Read utterances as JSON, write each sound as 8 bytes of length and little-endian int16."""
    library = _open()
    sound = bytearray()

    def collect(wave: Any, count: int, _events: Any) -> int:
        if count > 0:
            sound.extend(ctypes.string_at(wave, 2 * count))
        return 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    callback = kind(collect)  # named: the library keeps only its address
    library.espeak_SetSynthCallback(callback)
    for entry in json.load(sys.stdin):
        _say(library, Utterance(**entry), sound)
        sys.stdout.buffer.write(len(sound).to_bytes(8, "little") + sound)


if __name__ == "__main__":
    main()
