"""Decoded video frames become an array and their times: those inside the window, thinned to a rate, in one pass."""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from av_lens.errors import MediaError
from av_lens.media.arrays import TOLERANCE, Budget
from av_lens.media.header import MediaFacts, is_cover

_SLACK = Fraction(1, 1_000_000)
_GROWTH = 256 << 20
_HDR = {16: "PQ", 18: "HLG"}
_ORIENTATIONS = {
    (False, True, True): "turned by 180 degrees",
    (True, False, True): "turned by 90 degrees",
    (True, True, False): "turned by 270 degrees",
    (False, True, False): "mirrored left to right",
    (False, False, True): "mirrored top to bottom",
    (True, False, False): "mirrored along the diagonal from the top left",
    (True, True, True): "mirrored along the diagonal from the top right",
}


class Pictures:
    """Takes frames in presentation order, keeps the wanted ones, and knows when the window is full.

    With `fps`, the nearest source frame of each start + k / fps, at its true time, none twice; only these become RGB.
    """

    def __init__(
        self, stream: Any, *, facts: MediaFacts, start: float, end: float | None, fps: float | None, budget: Budget
    ):
        """Prepare for a stream."""
        from av.video.reformatter import Interpolation, VideoReformatter

        self.facts, self.start, self.budget = facts, Fraction(str(start)), budget
        self._still = facts.is_image or is_cover(stream)
        self.end = None if end is None else Fraction(str(end))
        self.step = None if fps is None else 1 / Fraction(str(fps))
        rate = stream.average_rate or stream.guessed_rate
        self.spacing = float(1 / rate) if rate else 0.0
        self.done = False
        self.first_time: Fraction | None = None
        self.last_end = 0.0
        self.notes: list[str] = []
        if (shape := stream.sample_aspect_ratio) and shape != 1:
            self.notes.append(f"its pixels are not square ({shape}); kept as stored")
        self.orientation = (False, False, False)
        self.restart = ""
        self._reformatter = VideoReformatter()
        # Full chroma, exact rounding: the same colours on every machine.
        exact = Interpolation.ACCURATE_RND | Interpolation.BITEXACT
        self._interpolation = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | exact
        self._buffer: np.ndarray | None = None
        self._times: list[float] = []
        self._before: Any = None
        self._held: tuple[Fraction, Any] | None = None
        self._wanted = 0
        self._last: Fraction | None = None
        self._odd = 0
        self._scarce = self._transparent = False

    def add(self, frame: Any) -> None:
        """Take the next frame."""
        time = self._time(frame)
        if self._last is not None and time <= self._last:
            if time < self._last and not self.restart:
                self.restart = (
                    f"the picture's time stamps run back from {float(self._last):.3f} to {float(time):.3f} s "
                    "(recordings joined, or frames that are not in the order of display)"
                )
            self._odd += 1
            return
        self._last = time
        self.first_time = time if self.first_time is None else self.first_time
        self.last_end = max(self.last_end, float(time if self.end is None else min(time, self.end)))
        if self.end is not None and time >= self.end - _SLACK:
            self.done = True
            return
        length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
        self.last_end = float(time) + (length if length > 0 else self.spacing)
        if time < self.start - _SLACK:
            self._before = frame
        elif self.step is None:
            self._keep(time, frame)
        else:
            if self._held is not None:
                # Wanted times up to the middle between the held frame and this one are nearest to the held one.
                self._settle(((self._held[0] + time) / 2 - self.start) // self.step + 1)
            self._held = (time, frame)

    def _time(self, frame: Any) -> Fraction:
        stamp = frame.pts if frame.pts is not None else frame.dts
        if stamp is not None and frame.time_base:
            return stamp * Fraction(frame.time_base) - self.facts.zero
        if self._last is not None:
            return self._last + Fraction(self.spacing)
        if self._still:
            return Fraction(0)
        raise MediaError(
            f"{self.facts.path}: nothing says when its frames are shown: the picture has no time stamps. Write it anew "
            "at its own rate (`ffmpeg -r RATE -i IN OUT.mp4`)."
        )

    def _settle(self, reached: int) -> None:
        if self._held is not None and reached > self._wanted:
            self._keep(*self._held)
            self._scarce = self._scarce or reached > self._wanted + 1
            self._wanted = reached

    def _keep(self, time: Fraction, frame: Any) -> None:
        height, width = (frame.height, frame.width) if self._buffer is None else self._buffer.shape[1:3]
        count = len(self._times)
        self.budget.take(height * width * 3, f"{count + 1} frames of {width}x{height}")
        if self._buffer is None:
            self._look(frame)
        picture = self._rgb(frame, height, width)
        if self._buffer is None:
            self._buffer = np.empty((1, *picture.shape), dtype=np.uint8)
        if count == len(self._buffer):
            grown = min(2 * count, count + max(8, _GROWTH // picture.nbytes))
            self._buffer.resize((grown, *picture.shape), refcheck=False)
        self._buffer[count] = picture
        self._times.append(max(0.0, float(time - self.start)))

    def _rgb(self, frame: Any, height: int, width: int) -> np.ndarray:
        if (height, width) != (frame.height, frame.width):
            self._note(f"the picture changes size; scaled to its first, {width}x{height}")
        look: dict[str, Any] = {"format": "rgba" if self._transparent else "rgb24", "threads": 1}
        look |= {"width": width, "height": height, "interpolation": self._interpolation}
        picture = self._reformatter.reformat(frame, **look).to_ndarray()
        if self._transparent and picture[..., 3].min() < 255:
            self._note("its transparency is left out; the colours below it are shown")
        return picture[..., :3]

    def _look(self, frame: Any) -> None:
        """Note what the first kept frame says of all."""
        self.orientation = self._orientation(frame)
        parts, palette = frame.format.components, frame.format.has_palette
        self._transparent = palette or any(part.is_alpha for part in parts)
        if (depth := max(part.bits for part in parts)) > 8 and not palette:
            self._note(f"its {depth} bits a colour are rounded to 8")
        if frame.color_trc in _HDR:
            self._note(f"its colours are HDR ({_HDR[frame.color_trc]}); kept without tone mapping")
        if frame.interlaced_frame:
            self._note("it is interlaced; both fields are kept, woven")

    def _orientation(self, frame: Any) -> tuple[bool, bool, bool]:
        """Read from the display matrix whether rows become columns, and then which axes are mirrored: (x, y)."""
        if (matrix := _display_matrix(frame)) is None:
            return False, False, False
        (a, b), (c, d) = matrix[:2, :2].tolist()
        straight, across = abs(a) + abs(d), abs(b) + abs(c)
        if min(straight, across) > 0.01 * max(straight, across):
            self._note(f"it asks to be turned by {frame.rotation} degrees; kept at the nearest right angle")
        return (False, a < 0, d < 0) if straight >= across else (True, c < 0, b < 0)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def finish(self) -> tuple[np.ndarray | None, np.ndarray]:
        """Close the window."""
        if self._held is not None and self.step is not None:
            stop = Fraction(self.last_end) if self.end is None else min(self.end, Fraction(self.last_end))
            self._settle(math.ceil((stop - _SLACK - self.start) / self.step))
            self._held = None
        if self._scarce:
            self.notes.append("the source has fewer frames than fps= asks for in places; each is taken once")
        if not self._times and self._before is not None and self.last_end > float(self.start) + TOLERANCE:
            self.notes.append("no frame begins inside the window; the one on display at its start is kept, at time 0")
            self._keep(self.start, self._before)
        self._before = None
        if self._odd:
            self.notes.append(f"{self._odd} frames without an increasing time were left out")
        if (frames := self._buffer) is None:
            return None, np.zeros(0)
        if len(frames) != len(self._times):
            frames.resize((len(self._times), *frames.shape[1:]), refcheck=False)
        if any(self.orientation):
            across, by_x, by_y = self.orientation
            self.notes.append(f"{_ORIENTATIONS[self.orientation]}, as the file asks")
            frames = frames.swapaxes(1, 2) if across else frames
            frames = np.ascontiguousarray(frames[:, :: -1 if by_y else 1, :: -1 if by_x else 1])
        return frames, np.array(self._times, dtype=np.float64)


def _display_matrix(frame: Any) -> np.ndarray | None:
    """Read a frame's display matrix; PyAV trips over kinds of side data that it does not know, so those go first."""
    from av.filter import Graph

    while True:
        try:
            side = frame.side_data.get("DISPLAYMATRIX")
            return None if side is None else np.frombuffer(bytes(side), dtype=np.int32).reshape(3, 3)
        except ValueError as error:
            kind = int(str(error).split()[0])  # "31 is not a valid Type": EXIF
        graph = Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format.name, time_base=frame.time_base or Fraction(1)
        )
        graph.link_nodes(source, graph.add("sidedata", f"mode=delete:type={kind}"), graph.add("buffersink")).configure()
        graph.push(frame)
        frame = graph.vpull()
