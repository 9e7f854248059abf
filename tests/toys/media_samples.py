"""Small media with known content, made by PyAV or by hand, never by the code under test unless a test says so."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np

from av_lens.media import Clip

RATE = 16000


def picture(n: int = 16, height: int = 84, width: int = 84) -> np.ndarray:
    """Frames whose grey level says their index: 16 + 12 k, with a coloured square that moves."""
    frames = np.zeros((n, height, width, 3), dtype=np.uint8)
    for k in range(n):
        frames[k] = 16 + 12 * k
        frames[k, 8:24, 2 * k : 2 * k + 16] = (220, 40, 60)
    return frames


def index_of(frames: np.ndarray) -> list[int]:
    """Read the index of each frame back from its grey level."""
    return [round((float(np.median(frame[-16:, -16:])) - 16) / 12) for frame in frames]


def chirp(seconds: float = 2.0, rate: int = RATE) -> np.ndarray:
    """A sound that is unlike itself under every shift: a rising tone with a click each quarter second."""
    t = np.arange(round(seconds * rate)) / rate
    sound = 0.4 * np.sin(2 * np.pi * (300 * t + 400 * t**2))
    sound[:: rate // 4] += 0.3
    return sound.astype(np.float32)


def lag(found: np.ndarray, wanted: np.ndarray, reach: int = 64) -> int:
    """Samples by which `found` comes after `wanted` (the shift of best correlation)."""
    n = min(len(found), len(wanted)) - 2 * reach
    middle = wanted[reach : reach + n]
    return int(np.argmax([np.dot(found[reach + k : reach + k + n], middle) for k in range(-reach, reach + 1)])) - reach


def clip(**changes: object) -> Clip:
    """Two seconds: 16 frames at 8 a second, 32,000 samples."""
    given: dict[str, object] = {"frames": picture(), "fps": 8, "waveform": chirp(), "rate": RATE}
    return Clip.from_arrays(**{**given, **changes})  # type: ignore[arg-type]


def write_video(
    path: Path,
    frames: np.ndarray | None,
    ticks: list[int],
    base: Fraction,
    sound: np.ndarray | None = None,
    *,
    rate: int = 44100,
    sound_start: float = 0.0,
    codecs: tuple[str, str] = ("libx264", "aac"),
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int = 0,
    full_range: bool = False,
) -> Path:
    """Write a file with PyAV alone: frames at `ticks` of `base`, sound [channel, sample] from `sound_start`."""
    import av

    with av.open(str(path), "w", options=container_options or {}) as out:
        if frames is not None:
            video = out.add_stream(codecs[0], rate=Fraction(8), options=options or {})
            video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
            video.time_base = video.codec_context.time_base = base
            video.codec_context.thread_count = 1
            if full_range:
                video.codec_context.color_range = 2
            if rotation:
                video.set_display_rotation(rotation)
        if sound is not None:
            audio = out.add_stream(codecs[1], rate=rate, layout="stereo" if len(sound) == 2 else "mono")
            audio.codec_context.options = {"aac_pns": "0"} if codecs[1] == "aac" else {}
            block = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="fltp", layout=audio.layout.name)
            block.sample_rate, block.time_base, block.pts = rate, Fraction(1, rate), round(sound_start * rate)
            resampler = av.AudioResampler(format=audio.format.name, layout=audio.layout.name, rate=rate)
        if frames is not None:
            for tick, frame in zip(ticks, frames, strict=True):
                image = av.VideoFrame.from_ndarray(frame, format="rgb24")
                if full_range:
                    image = image.reformat(format=pix_fmt, dst_color_range=2)
                image.pts, image.time_base = tick, base
                out.mux(video.encode(image))
            out.mux(video.encode(None))
        if sound is not None:
            for piece in [*resampler.resample(block), *resampler.resample(None)]:
                out.mux(audio.encode(piece))
            out.mux(audio.encode(None))
    return path


def wav(samples: np.ndarray, rate: int, kind: str = "h") -> bytes:
    """A wav by hand: samples [channel, sample] as int16 ("h"), uint8 ("B"), int32 ("i") or float32 ("f")."""
    width = struct.calcsize(kind)
    tag = 3 if kind == "f" else 1
    body = np.ascontiguousarray(samples.T).astype(f"<{ {'h': 'i2', 'B': 'u1', 'i': 'i4', 'f': 'f4'}[kind] }").tobytes()
    channels = len(samples)
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * channels * width, channels * width, 8 * width)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
