"""Speech, noise and silence for voice activity detectors: clips of windows, made on the spot and always the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgebake.models.zoo.espeak import SAMPLE_RATE_HZ as SPOKEN_HZ
from edgebake.models.zoo.espeak import Utterance, speak
from edgebake.target import SampleRequest
from edgebake.types import Call, Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

DISTRIBUTIONS = ("espeakng-loader",)  # part of the samples' digest
SAMPLE_RATE_HZ = 16000
CONTEXT, WINDOW = 64, 512  # samples; silero-vad 5 and later take the end of the last window before each window
WINDOWS = 48  # per clip: 1.5 s
_SILENCE_S = 0.25  # before and after the speech, so that every clip has both decisions

# (language, text); 32 clips, a quarter of them without speech, use each once
_TEXTS = (
    ("en", "The weather in the north will be cold and windy until Friday."),
    ("en", "Please leave a message after the tone, and we will call you back."),
    ("de", "Sechs Schiffe segeln langsam durch den schmalen Hafen."),
    ("en", "A gentle breeze carried the smell of fresh bread through the street."),
    ("fr", "Le train pour Lyon partira du quai numéro sept à midi."),
    ("en", "Turn left at the next crossing and follow the river for two miles."),
    ("es", "El perro del vecino ladra cada mañana a las seis en punto."),
    ("en", "She counted the coins twice before she closed the drawer."),
    ("it", "La finestra della cucina guarda verso il mare aperto."),
    ("en", "Nobody knew who had painted the old bridge green."),
    ("en", "How many apples are left in the basket?"),
    ("nl", "De fiets staat al drie dagen tegen de muur van de school."),
    ("en", "Thunder rolled over the hills while the children slept."),
    ("de", "Wann fährt heute der letzte Bus zum Bahnhof?"),
    ("en", "Seven thousand four hundred and twenty-nine people signed."),
    ("fr", "Il faut ouvrir la porte avant que la pluie ne commence."),
    ("en", "Stop! There is a step behind the curtain."),
    ("es", "Mañana por la tarde iremos todos juntos al mercado."),
    ("en", "The kettle whistled, and the cat jumped off the chair."),
    ("en", "Her answer was short: yes, but not today."),
    ("de", "Der Bäcker öffnet seinen Laden jeden Morgen um fünf."),
    ("en", "Fifteen small boats crossed the bay against the wind."),
    ("it", "Domani il museo resta chiuso tutto il giorno."),
    ("en", "Could you read the second line again, a little slower?"),
)
_ENGLISH = ("en-us", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc")
_VARIANTS = ("", "+f3", "+m2", "+f2", "+m4", "+f4", "+m1")
_SIGNAL_TO_NOISE_DB = (None, 20.0, 10.0, 5.0)
_DITHER = 2.0**-15  # a silent microphone behind a 16-bit converter
_NO_SPEECH = 4  # every fourth clip holds no speech: silence, then white, pink and humming noise in turn


@dataclass(frozen=True, kw_only=True)
class Clip:
    """``utterance`` None means no speech; ``noise`` names the kind of background and ``snr_db`` its distance."""

    name: str
    utterance: Utterance | None
    noise: str
    snr_db: float | None
    level: float  # peak of the speech, or RMS of a clip without any


def speech(request: SampleRequest) -> list[Sample]:
    """Clips ``skip .. skip+count``, each a sequence of WINDOWS calls with ``input`` (1, 576) float32 at 16 kHz.

    Clip ``i`` depends on ``seed`` and ``i`` only. Texts, voices, speeds, pitches, levels and backgrounds vary; a
    quarter of the clips holds no speech. ToolchainMissing without ``espeakng-loader``.
    """
    clips = [_clip(request.seed, number) for number in range(request.skip, request.skip + request.count)]
    voiced = {clip.name: clip.utterance for clip in clips if clip.utterance is not None}
    # each in a process of its own: what eSpeak says depends on what it said before
    spoken = {name: speak([utterance])[0] for name, utterance in voiced.items()}
    return [
        _sample(clip, spoken.get(clip.name), (request.seed, index + request.skip)) for index, clip in enumerate(clips)
    ]


def _clip(seed: int, number: int) -> Clip:
    rng = np.random.default_rng((seed, number, 0))
    turn = number // _NO_SPEECH
    kinds = ("silence", "white", "pink", "hum")
    if number % _NO_SPEECH == _NO_SPEECH - 1:
        kind = kinds[turn % len(kinds)]
        level = _DITHER if kind == "silence" else rng.uniform(0.003, 0.1)
        return Clip(name=f"{number:03d}-{kind}", utterance=None, noise=kind, snr_db=None, level=level)
    spoken = number - turn
    language, text = _TEXTS[spoken % len(_TEXTS)]
    voice = _ENGLISH[spoken % len(_ENGLISH)] if language == "en" else language
    snr_db = _SIGNAL_TO_NOISE_DB[int(rng.integers(len(_SIGNAL_TO_NOISE_DB)))]
    utterance = Utterance(
        text=text,
        voice=voice + _VARIANTS[spoken % len(_VARIANTS)],
        words_per_minute=int(rng.integers(120, 230)),
        pitch=int(rng.integers(30, 75)),
    )
    noise = "none" if snr_db is None else kinds[1 + int(rng.integers(3))]
    name = f"{number:03d}-{utterance.voice}-{noise}"
    return Clip(name=name, utterance=utterance, noise=noise, snr_db=snr_db, level=rng.uniform(0.1, 0.9))


def _sample(clip: Clip, spoken: NDArray[np.int16] | None, seed: tuple[int, int]) -> Sample:
    rng = np.random.default_rng((*seed, 1))
    length = WINDOW * WINDOWS
    wave = np.zeros(length)
    power = 1.0
    if spoken is not None:
        voice = _resample(spoken.astype(np.float64))
        start = int(_SILENCE_S * SAMPLE_RATE_HZ)
        cut = voice[: length - 2 * start]
        wave[start : start + len(cut)] = cut * (clip.level / np.abs(cut).max())
        power = float(np.mean(wave[start : start + len(cut)] ** 2))
    if clip.noise != "none":
        noise = _noise(clip.noise, length, rng)
        wanted = clip.level**2 if clip.snr_db is None else power / 10 ** (clip.snr_db / 10)
        wave += noise * np.sqrt(wanted / np.mean(noise**2))
    padded = np.concatenate([np.zeros(CONTEXT), np.clip(wave, -1, 1)]).astype(np.float32)
    calls = [
        Call(inputs={"input": padded[None, t * WINDOW : t * WINDOW + CONTEXT + WINDOW].copy()}) for t in range(WINDOWS)
    ]
    return Sample(calls=tuple(calls), source=clip.name)


def _resample(wave: NDArray[np.float64]) -> NDArray[np.float64]:
    """``wave`` from eSpeak's rate at SAMPLE_RATE_HZ, by cutting its spectrum (band-limited, no filter to design)."""
    count = len(wave) * SAMPLE_RATE_HZ // SPOKEN_HZ
    spectrum = np.fft.rfft(wave)[: count // 2 + 1]
    resampled: NDArray[np.float64] = np.fft.irfft(spectrum, count) * (count / len(wave))
    return resampled


def _noise(kind: str, length: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """White, pink (power falls with 1/f), a mains hum with its overtones, or dither; any level."""
    white = rng.standard_normal(length)
    if kind == "white":
        return white
    if kind == "pink":
        frequency = np.maximum(np.fft.rfftfreq(length), 1 / length)
        pink: NDArray[np.float64] = np.fft.irfft(np.fft.rfft(white) / np.sqrt(frequency), length)
        return pink
    if kind == "silence":
        return np.clip(np.round(white), -1, 1)
    time = np.arange(length) / SAMPLE_RATE_HZ
    hum = [np.sin(2 * np.pi * 50 * k * time + rng.uniform(0, 2 * np.pi)) / k for k in range(1, 9)]
    return np.asarray(np.sum(hum, axis=0) + 0.05 * white)
