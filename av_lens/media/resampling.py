"""Sound at another rate: a windowed-sinc filter (Kaiser, 64 zero crossings), by torchaudio where its kernel is small.

The kernel of torchaudio has `orig / gcd x new / gcd` taps: 70 thousand for 44100 -> 16000, but billions for
44101 -> 16000. Such rates go through scipy's polyphase filter with a window of the same family.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float32

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
    taps = up * (2 * _ZERO_CROSSINGS * max(up, down) / (up * _ROLLOFF) + down)
    if taps <= _MAX_TAPS:
        return _with_torchaudio(waveform, orig, new)[:length]
    return _with_scipy(waveform, up, down)[:length]


def _with_torchaudio(waveform: np.ndarray, orig: int, new: int) -> np.ndarray:
    import torch
    from torchaudio.functional import resample as torch_resample

    sound = torch.from_numpy(np.array(waveform, dtype=np.float32))
    kernel: dict[str, Any] = {"lowpass_filter_width": _ZERO_CROSSINGS, "rolloff": _ROLLOFF, "beta": _BETA}
    with torch.inference_mode():
        return torch_resample(sound, orig, new, resampling_method="sinc_interp_kaiser", **kernel).numpy()


def _with_scipy(waveform: np.ndarray, up: int, down: int) -> np.ndarray:
    from scipy.signal import resample_poly

    return np.asarray(resample_poly(waveform, up, down, window=("kaiser", _BETA)), dtype=np.float32)
