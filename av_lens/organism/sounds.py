"""The sounds of the synthetic world: two seconds of a bark, a bell, rain ..., synthesised by class."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Float64

from av_lens.checks import require_choice
from av_lens.organism.anatomy import CLASSES

RATE = 16000
SECONDS = 2.0
N_SAMPLES = round(RATE * SECONDS)
TIME = np.arange(N_SAMPLES) / RATE

Wave = Float64[np.ndarray, "_"]


def _tone(pitch: Wave | float, weights: tuple[float, ...], phase: float = 0.0, rate: int = RATE) -> Wave:
    """A harmonic tone along a pitch curve (Hz per sample, or one number for the whole length)."""
    curve = np.full(N_SAMPLES, pitch) if np.isscalar(pitch) else np.asarray(pitch)
    angle = phase + 2 * np.pi * np.cumsum(curve) / rate
    return np.sum([weight * np.sin((k + 1) * angle) for k, weight in enumerate(weights)], axis=0)


def _onsets(rng: np.random.Generator, per_second: float, *, jitter: float = 0.0) -> list[int]:
    """Samples at which repeated events begin."""
    times = np.arange(rng.uniform(0, 0.6 / per_second), SECONDS - 0.05, 1 / per_second)
    times = np.clip(times + rng.uniform(-jitter, jitter, len(times)), 0, None)
    return [int(time * RATE) for time in times]


def _place(events: list[tuple[int, np.ndarray]]) -> Wave:
    """Events summed at their onsets, cut at the end."""
    out = np.zeros(N_SAMPLES)
    for start, event in events:
        kept = event[: max(N_SAMPLES - start, 0)]
        out[start : start + len(kept)] += kept
    return out


def _hump(n: int) -> Wave:
    """A smooth rise and fall."""
    return np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 0.7


def _filtered(noise: Wave, low: float, high: float) -> Wave:
    """Noise between two frequencies (Hz), at unit power."""
    spectrum = np.fft.rfft(noise)
    hertz = np.fft.rfftfreq(len(noise), 1 / RATE)
    spectrum[(hertz < low) | (hertz > high)] = 0
    out = np.fft.irfft(spectrum, len(noise))
    return out / (out.std() + 1e-9)


def _dog(rng: np.random.Generator) -> Wave:
    base, events = rng.uniform(380, 560), []
    for start in _onsets(rng, rng.uniform(1.6, 2.6), jitter=0.04):
        n = int(rng.uniform(0.14, 0.2) * RATE)
        pitch = base * np.linspace(1.25, 0.7, n)
        voice = _tone(pitch, (1.0, 0.8, 0.6, 0.45, 0.3)) + 0.7 * _filtered(rng.normal(size=n), 500, 2500)
        events.append((start, voice * _hump(n)))
    return _place(events)


def _cat(rng: np.random.Generator) -> Wave:
    n = int(rng.uniform(1.0, 1.4) * RATE)
    time = np.linspace(0, 1, n)
    pitch = rng.uniform(520, 700) * (0.8 + 0.5 * np.sin(np.pi * time) - 0.15 * time)
    pitch *= 1 + 0.015 * np.sin(2 * np.pi * 6 * time * n / RATE)
    meow = _tone(pitch, (0.5, 1.0, 0.8, 0.35, 0.2)) * _hump(n)
    return _place([(int(rng.uniform(0.05, SECONDS - n / RATE - 0.05) * RATE), meow)])


def _bird(rng: np.random.Generator) -> Wave:
    events, top = [], rng.uniform(4200, 5400)
    for start in _onsets(rng, rng.uniform(4, 6.5), jitter=0.02):
        n = int(rng.uniform(0.07, 0.11) * RATE)
        events.append((start, _tone(np.linspace(top, top * 0.6, n), (1.0,)) * _hump(n)))
    return _place(events)


def _bell(rng: np.random.Generator) -> Wave:
    base, events = rng.uniform(900, 1300), []
    for start in _onsets(rng, rng.uniform(0.9, 1.3)):
        partials = zip((1.0, 2.0, 2.76, 4.1, 5.4), (1.0, 0.6, 0.7, 0.4, 0.25), strict=True)
        ring = np.sum(
            [w * np.sin(2 * np.pi * base * r * TIME) * np.exp(-TIME * (1.2 + 0.8 * r)) for r, w in partials], axis=0
        )
        events.append((start, ring))
    return _place(events)


def _car(rng: np.random.Generator) -> Wave:
    time = np.linspace(0, 1, N_SAMPLES)
    pitch = rng.uniform(55, 80) * (1 + rng.uniform(0.3, 0.7) * time)
    engine = _tone(pitch, tuple(1 / (k + 1) ** 0.6 for k in range(14)))
    return engine * (1 + 0.3 * np.sin(np.cumsum(pitch) * np.pi / RATE)) + 0.4 * _filtered(
        rng.normal(size=N_SAMPLES), 60, 500
    )


def _train(rng: np.random.Generator) -> Wave:
    base = rng.uniform(290, 350)
    whistle = sum(_tone(base * ratio, (1.0, 0.6, 0.35), rng.uniform(0, 6)) for ratio in (1.0, 1.19, 1.5))
    start, n = rng.uniform(0, 0.25), rng.uniform(1.3, 1.7)
    gate = np.clip(np.minimum(TIME - start, start + n - TIME) / 0.08, 0, 1)
    chuff = _filtered(rng.normal(size=N_SAMPLES), 200, 1800) * np.exp(-np.mod(TIME * rng.uniform(4, 5), 1) * 5)
    return whistle * gate + 0.8 * chuff


def _drum(rng: np.random.Generator) -> Wave:
    base, events = rng.uniform(85, 130), []
    for start in _onsets(rng, rng.uniform(3.2, 4.6)):
        time = np.arange(int(0.25 * RATE)) / RATE
        thump = _tone(base * (1 + 1.2 * np.exp(-time * 40)), (1.0, 0.3)) * np.exp(-time * 14)
        click = _filtered(rng.normal(size=len(time)), 200, 3000) * np.exp(-time * 60)
        events.append((start, (1.6 * thump + 0.5 * click) * rng.uniform(0.7, 1)))
    return _place(events)


def _siren(rng: np.random.Generator) -> Wave:
    swing = np.sin(2 * np.pi * rng.uniform(0.8, 1.5) * TIME + rng.uniform(0, 6))
    return _tone(rng.uniform(850, 1050) * 2 ** (0.65 * swing), (1.0, 0.35, 0.2))


def _clock(rng: np.random.Generator) -> Wave:
    events = []
    for count, start in enumerate(_onsets(rng, rng.uniform(3.6, 4.4))):
        n = int(0.03 * RATE)
        hertz = (3100 if count % 2 else 2300) * rng.uniform(0.97, 1.03)
        time = np.arange(n) / RATE
        tick = (np.sin(2 * np.pi * hertz * time) + 0.5 * rng.normal(size=n)) * np.exp(-time * 180)
        events.append((start, 1.5 * tick))
    return _place(events)


def _rain(rng: np.random.Generator) -> Wave:
    fall = 0.7 * _filtered(rng.normal(size=N_SAMPLES), 900, 7800)
    drops = np.zeros(N_SAMPLES)
    drops[rng.integers(0, N_SAMPLES, rng.integers(40, 90))] = rng.uniform(4, 9)
    return fall + np.convolve(drops, np.exp(-np.arange(80) / 12.0), "same")


def _phone(rng: np.random.Generator) -> Wave:
    warble = np.where(np.mod(TIME * rng.uniform(18, 24), 1) < 0.5, 1.0, 1.26)
    cycle = np.mod(TIME / rng.uniform(0.85, 1.1) + rng.uniform(0, 1), 1)
    return _tone(rng.uniform(1350, 1650) * warble, (1.0, 0.3)) * np.clip((0.62 - cycle) * 40, 0, 1)


def _guitar(rng: np.random.Generator) -> Wave:
    notes, root, events = (1.0, 1.26, 1.5, 2.0, 1.5, 1.26), rng.uniform(140, 190), []
    for count, start in enumerate(_onsets(rng, rng.uniform(3.4, 4.6))):
        time = np.arange(int(0.9 * RATE)) / RATE
        pitch = root * notes[count % len(notes)]
        pluck = np.sum(
            [np.sin(2 * np.pi * pitch * k * time) * np.exp(-time * (2.5 + 0.9 * k)) / k**0.8 for k in range(1, 9)],
            axis=0,
        )
        events.append((start, 0.6 * pluck))
    return _place(events)


_PLAYERS = (_dog, _cat, _bird, _bell, _car, _train, _drum, _siren, _clock, _rain, _phone, _guitar)
_PLAYED: dict[str, Callable[[np.random.Generator], Wave]] = dict(zip(CLASSES, _PLAYERS, strict=True))


def play(name: str, *, rng: np.random.Generator) -> Float32[np.ndarray, " sample"]:
    """Synthesise two seconds of a class's sound."""
    require_choice("class", name, CLASSES)
    wave = _PLAYED[name](rng)
    wave = wave / (np.abs(wave).max() + 1e-9) * rng.uniform(0.35, 0.9)
    floor = 10 ** rng.uniform(-4, -2.3)
    return np.clip(wave + rng.normal(0, floor, N_SAMPLES), -1, 1).astype(np.float32)
