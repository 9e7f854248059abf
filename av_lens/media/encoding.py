"""Arrays become files that decode back to the same frames, times and samples; and sound at another rate.

1. Frame times are written in a time base that holds them all exactly (their least common denominator), or in µs.
2. AAC's priming samples are marked by the container; the track's duration is the number of samples.
3. 4:2:0 needs even sizes: an odd edge is repeated once, and the file's comment tells `load_clip` the true size.

Rates for which torchaudio's kernel would be huge (44101 -> 16000) go through scipy's polyphase filter.
"""

import heapq
import io
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from av_lens.errors import MediaError, unknown
from av_lens.media.arrays import border

_ZERO_CROSSINGS = 64
_ROLLOFF = 0.9475937167399596
_BETA = 14.769656459379492
_MAX_TAPS = 1 << 22


def resample(waveform: Float32[np.ndarray, " sample"], orig: int, new: int) -> Float32[np.ndarray, " resampled"]:
    """Resample so that sample 0 keeps its time."""
    if orig == new:
        return waveform
    shared = math.gcd(orig, new)
    up, down = new // shared, orig // shared
    length = -(-len(waveform) * up // down)
    if up * (2 * _ZERO_CROSSINGS * max(up, down) / (up * _ROLLOFF) + down) > _MAX_TAPS:
        from scipy.signal import resample_poly

        sound = resample_poly(waveform, up, down, window=("kaiser", _BETA))
        return np.asarray(sound, dtype=np.float32)[:length]
    import torch
    from torchaudio.functional import resample as torch_resample

    sound = torch.from_numpy(np.array(waveform, dtype=np.float32))
    kernel: dict[str, Any] = {"lowpass_filter_width": _ZERO_CROSSINGS, "rolloff": _ROLLOFF, "beta": _BETA}
    with torch.inference_mode():
        return torch_resample(sound, orig, new, resampling_method="sinc_interp_kaiser", **kernel).numpy()[:length]


_AAC_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_FALLBACK_RATE = 48000
_MICROSECONDS = 1_000_000
CROP_MARK = "av_lens:crop="
SUFFIXES = (".mp4", ".wav", ".png")


def mp4_bytes(
    frames: UInt8[np.ndarray, "time height width 3"] | None,
    times: Float64[np.ndarray, " time"],
    waveform: Float32[np.ndarray, " sample"] | None,
    *,
    rate: int,
    picture_end: float,
    crf: float,
    max_side: int | None,
) -> bytes:
    """Encode a picture and a sound, either or both, as one mp4."""
    import av

    sink = io.BytesIO()
    base = time_base([*times.tolist(), picture_end])
    # Edit lists count in the movie's time scale: a common multiple keeps late starts and the last sample exact.
    scale = math.lcm(base.denominator, rate if rate in _AAC_RATES else _FALLBACK_RATE)
    options = {"fflags": "+bitexact", "movie_timescale": str(scale if scale < 1 << 31 else base.denominator)}
    with border("the clip", "write an mp4 of"), av.open(sink, "w", format="mp4", options=options) as container:
        streams: list[Iterator[tuple[float, list[Any]]]] = []
        if frames is not None:
            streams.append(_picture_packets(container, frames, times, base, picture_end, crf, max_side))
        if waveform is not None:
            streams.append(_sound_packets(container, waveform, rate))
        container.start_encoding()
        # From the stream that lags, so that a reader of any second finds both near.
        for _, packets in heapq.merge(*streams, key=lambda timed: timed[0]):
            container.mux(packets)
    return sink.getvalue()


def _picture_packets(
    container: Any, frames: np.ndarray, times: np.ndarray, base: Fraction, end: float, crf: float, max_side: int | None
) -> Iterator[tuple[float, list[Any]]]:
    import av
    from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

    height, width = frames.shape[1:3]
    shrink = min(1.0, max_side / max(height, width)) if max_side else 1.0
    target = (_even(height * shrink), _even(width * shrink))
    ticks = [round(t / base) for t in (*times.tolist(), end)]
    spacing = (ticks[-1] - ticks[0]) * base / len(frames)
    speed = Fraction(1 / spacing if spacing > 0 else 25).limit_denominator(1001)
    # No B-frames: the first picture is at its own time, without an edit list. Tags say which matrix swscale used.
    options = {"crf": f"{crf:g}", "preset": "veryfast", "bf": "0", "threads": "1", "flags": "+bitexact", "g": "250"}
    options["x264-params"] = "mbtree=0"  # with its macroblock tree, x264 gives other bytes about once in 100 encodes
    stream = container.add_stream("libx264", rate=max(speed, Fraction(1, 1000)), options=options)
    stream.width, stream.height, stream.pix_fmt = target[1], target[0], "yuv420p"
    stream.time_base = stream.codec_context.time_base = base
    stream.codec_context.thread_count = 1
    stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1
    stream.codec_context.color_primaries, stream.codec_context.color_trc = 6, 6
    padded = shrink == 1.0 and target != (height, width)
    if padded:
        container.metadata["comment"] = f"{CROP_MARK}{width}x{height}"
    reformatter = VideoReformatter()
    exact: dict[str, Any] = {"width": target[1], "height": target[0], "format": "yuv420p", "threads": 1}
    exact |= {"dst_colorspace": Colorspace.ITU601, "dst_color_range": ColorRange.MPEG}
    exact["interpolation"] = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

    def packets() -> Iterator[tuple[float, list[Any]]]:
        for k, picture in enumerate(frames):
            if padded:
                picture = np.pad(picture, ((0, target[0] - height), (0, target[1] - width), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = reformatter.reformat(frame, **exact)
            frame.pts, frame.time_base = ticks[k], base
            frame.duration = max(ticks[k + 1] - ticks[k], 1)
            yield float(times[k]), stream.encode(frame)
        yield math.inf, stream.encode(None)

    return packets()


def _even(pixels: float) -> int:
    return max(2, 2 * math.ceil(round(pixels, 6) / 2))


def _sound_packets(container: Any, waveform: np.ndarray, rate: int) -> Iterator[tuple[float, list[Any]]]:
    import av

    if rate not in _AAC_RATES:
        waveform, rate = np.clip(resample(waveform, rate, _FALLBACK_RATE), -1.0, 1.0), _FALLBACK_RATE
    stream = container.add_stream("aac", rate=rate, layout="mono")
    stream.bit_rate = min(6 * rate, 192_000)
    # The fast coder takes a tenth of the two-loop coder's time and, at this bit rate, is the more faithful of the two.
    # No noise substitution: its noise would depend on where a decoder starts.
    stream.codec_context.options = {"flags": "+bitexact", "aac_coder": "fast", "aac_pns": "0"}

    def packets() -> Iterator[tuple[float, list[Any]]]:
        for at in range(0, len(waveform), rate):
            block = np.ascontiguousarray(waveform[None, at : at + rate])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
            yield at / rate, stream.encode(frame)
        yield math.inf, stream.encode(None)

    return packets()


def time_base(seconds: list[float]) -> Fraction:
    """Find a time base in which all times are whole numbers, or microseconds where there is none."""
    scale = 1
    for t in seconds:
        near = Fraction(t).limit_denominator(90_000)
        scale = math.lcm(scale, near.denominator)
        if abs(float(near) - t) > 1e-12 * max(1.0, t) or scale > _MICROSECONDS:
            return Fraction(1, _MICROSECONDS)
    return Fraction(1, scale)


def wav_bytes(waveform: Float32[np.ndarray, " sample"], *, rate: int) -> bytes:
    """Encode a sound as a float32 wav, which loses nothing."""
    from scipy.io import wavfile

    sink = io.BytesIO()
    wavfile.write(sink, rate, waveform)
    return sink.getvalue()


def png_bytes(picture: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Encode one picture as a png, which loses nothing."""
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, format="png")
    return sink.getvalue()


def check_suffix(path: str, suffix: str, *, picture: bool, sound: bool, frames: int) -> None:
    """Refuse a kind of file that we do not write, or that would lose a stream."""
    if suffix not in SUFFIXES:
        raise MediaError(f"cannot save a clip as {path!r}: " + unknown("suffix", suffix, SUFFIXES))
    if suffix == ".wav" and (picture or not sound):
        raise MediaError(f"{path}: a wav holds a sound alone, and this clip has {frames} frames: save it as .mp4.")
    if suffix == ".png" and (sound or frames != 1):
        more = "a sound" if sound else f"{frames} frames"
        raise MediaError(f"{path}: a png holds one still frame alone, and this clip has {more}: save it as .mp4.")
