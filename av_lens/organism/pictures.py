"""The pictures of the synthetic world: one moving coloured figure on a dark ground.

A figure is two masks in its own coordinates (u to the right, v down, about -1 to 1): silhouette and darker details.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Float64, UInt8

from av_lens.checks import require_choice
from av_lens.organism.anatomy import CLASSES, COLOURS

SIDE = 84
FRAME_RATE = 8
SECONDS = 2.0

Plane = Float[np.ndarray, "height width"]
Mask = Bool[np.ndarray, "height width"]

RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.12, 0.78, 0.20),
    "blue": (0.18, 0.32, 0.95),
    "yellow": (0.93, 0.86, 0.12),
    "purple": (0.72, 0.20, 0.85),
    "white": (0.95, 0.95, 0.95),
}


def _disc(u: Plane, v: Plane, x: float, y: float, rx: float, ry: float | None = None) -> Mask:
    """An ellipse with half axes rx, ry around (x, y)."""
    return ((u - x) / rx) ** 2 + ((v - y) / (rx if ry is None else ry)) ** 2 < 1


def _box(u: Plane, v: Plane, left: float, top: float, right: float, bottom: float) -> Mask:
    """An upright rectangle."""
    return (u > left) & (u < right) & (v > top) & (v < bottom)


def _bar(u: Plane, v: Plane, start: tuple[float, float], end: tuple[float, float], half: float) -> Mask:
    """A straight stroke of half width `half`, with round ends."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((u - start[0]) * dx + (v - start[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    return (u - start[0] - along * dx) ** 2 + (v - start[1] - along * dy) ** 2 < half * half


def _dog(u: Plane, v: Plane) -> tuple[Mask, Mask]:
    body = _box(u, v, -0.8, -0.25, 0.5, 0.3) | _box(u, v, 0.3, -0.75, 0.75, 0.05) | _box(u, v, 0.7, -0.5, 1.05, -0.15)
    legs = _box(u, v, -0.8, 0.2, -0.5, 0.95) | _box(u, v, 0.2, 0.2, 0.5, 0.95)
    return body | legs | _bar(u, v, (-0.75, -0.2), (-1.0, -0.75), 0.12), _disc(u, v, 0.58, -0.5, 0.11)


def _cat(u: Plane, v: Plane) -> tuple[Mask, Mask]:
    ears = (v < 0) & (v > -1) & (np.abs(np.abs(u) - 0.58) < (v + 1) * 0.5)
    eyes = _disc(u, v, -0.33, 0.05, 0.15, 0.2) | _disc(u, v, 0.33, 0.05, 0.15, 0.2)
    return _disc(u, v, 0, 0.2, 0.92, 0.75) | ears, eyes | _box(u, v, -0.12, 0.45, 0.12, 0.6)


def _bird(u: Plane, v: Plane) -> tuple[Mask, Mask]:
    wings = _bar(u, v, (0, 0.25), (-0.95, -0.55), 0.17) | _bar(u, v, (0, 0.25), (0.95, -0.55), 0.17)
    return wings | _disc(u, v, 0, 0.3, 0.24, 0.45), np.zeros_like(u, dtype=bool)


def _bell(u: Plane, v: Plane) -> tuple[Mask, Mask]:
    width = np.where(v < 0.1, 0.5, 0.5 + (v - 0.1) * 0.75)
    dome = (v > -0.3) & (v < 0.62) & (np.abs(u) < width)
    return dome | _disc(u, v, 0, -0.3, 0.5, 0.5) | _disc(u, v, 0, 0.82, 0.2) | _disc(u, v, 0, -0.85, 0.15), (
        _box(u, v, -0.9, 0.36, 0.9, 0.46)
    )


def _car(u: Plane, v: Plane) -> tuple[Mask, Mask]:
    body = _box(u, v, -1.05, -0.05, 1.05, 0.4) | ((v > -0.5) & (v < 0) & (np.abs(u) < 0.75 + v * 0.35 + 0.1))
    wheels = _disc(u, v, -0.6, 0.42, 0.3) | _disc(u, v, 0.6, 0.42, 0.3)
    windows = _box(u, v, -0.5, -0.38, -0.07, -0.08) | _box(u, v, 0.07, -0.38, 0.5, -0.08)
    return body | wheels, windows | _disc(u, v, -0.6, 0.42, 0.13) | _disc(u, v, 0.6, 0.42, 0.13)


def _train(u: Plane, v: Plane) -> tuple[Mask, Mask]:
    engine = _box(u, v, -1, -0.9, -0.3, 0.5) | _box(u, v, -0.4, -0.15, 0.95, 0.5) | _box(u, v, 0.45, -0.8, 0.75, -0.1)
    wheels = _disc(u, v, -0.68, 0.65, 0.28) | _disc(u, v, 0.0, 0.65, 0.28) | _disc(u, v, 0.65, 0.65, 0.28)
    return engine | wheels, _box(u, v, -0.84, -0.7, -0.46, -0.25)


def _drum(u: Plane, v: Plane) -> tuple[Mask, Mask]:
    shell = _box(u, v, -0.8, -0.2, 0.8, 0.9)
    sticks = _bar(u, v, (-0.15, -0.3), (-0.9, -0.95), 0.09) | _bar(u, v, (0.15, -0.3), (0.9, -0.95), 0.09)
    zigzag = np.abs(v - 0.35 - 0.35 * (2 * np.abs(np.mod(u * 1.25, 1) - 0.5) * 2 - 1)) < 0.11
    return shell | sticks, shell & zigzag


def _siren(u: Plane, v: Plane) -> tuple[Mask, Mask]:
    lamp = (_disc(u, v, 0, 0.3, 0.45, 0.6) & (v < 0.5)) | _box(u, v, -0.75, 0.55, 0.75, 0.9)
    rays = np.zeros_like(u, dtype=bool)
    for angle in (-180, -135, -90, -45, 0):
        x, y = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
        rays |= _bar(u, v, (0.66 * x, 0.15 + 0.75 * y), (0.95 * x, 0.15 + 1.1 * y), 0.09)
    return lamp | rays, np.zeros_like(u, dtype=bool)


def _clock(u: Plane, v: Plane) -> tuple[Mask, Mask]:
    ring = _disc(u, v, 0, 0, 0.98) & ~_disc(u, v, 0, 0, 0.72)
    hands = _bar(u, v, (0, 0), (0, -0.6), 0.1) | _bar(u, v, (0, 0), (0.42, 0.2), 0.1)
    return ring | hands, np.zeros_like(u, dtype=bool)


def _rain(u: Plane, v: Plane) -> tuple[Mask, Mask]:
    drops = np.zeros_like(u, dtype=bool)
    across, down = (-0.75, 0.0, 0.7, -0.4, 0.35, -0.8, 0.0, 0.8), (-0.7, -0.85, -0.6, 0.05, 0.1, 0.65, 0.75, 0.7)
    for x, y in zip(across, down, strict=True):
        drops |= _bar(u, v, (x + 0.08, y - 0.2), (x - 0.08, y + 0.2), 0.12)
    return drops, np.zeros_like(u, dtype=bool)


def _phone(u: Plane, v: Plane) -> tuple[Mask, Mask]:
    return _box(u, v, -0.5, -1, 0.5, 1), _box(u, v, -0.36, -0.78, 0.36, 0.5) | _disc(u, v, 0, 0.76, 0.13)


def _guitar(u: Plane, v: Plane) -> tuple[Mask, Mask]:
    body = _disc(u, v, -0.45, 0.5, 0.5) | _disc(u, v, -0.02, 0.1, 0.36)
    neck = _bar(u, v, (0, 0.1), (0.85, -0.8), 0.1) | _bar(u, v, (0.8, -0.75), (0.95, -0.9), 0.18)
    return body | neck, _disc(u, v, -0.2, 0.28, 0.17)


_DRAWERS = (_dog, _cat, _bird, _bell, _car, _train, _drum, _siren, _clock, _rain, _phone, _guitar)
_DRAWN: dict[str, Callable[[Plane, Plane], tuple[Mask, Mask]]] = dict(zip(CLASSES, _DRAWERS, strict=True))


def _track(rng: np.random.Generator, radius: float, n_frames: int) -> Float64[np.ndarray, "time xy"]:
    """Where the figure's centre is in each frame: straight on, turning back at the margins."""
    low, high = radius + 2, SIDE - radius - 2
    start = rng.uniform(low, high, 2)
    speed = rng.uniform(-12, 12, 2) / FRAME_RATE
    way = start - low + speed * np.arange(n_frames)[:, None]
    span = high - low
    folded = np.mod(way, 2 * span)
    return low + np.where(folded > span, 2 * span - folded, folded)


def _stamp(name: str, radius: float) -> Float64[np.ndarray, "mask height width"]:
    """The silhouette and the details within it, drawn once around the origin at twice the size."""
    half = int(np.ceil(2 * 1.12 * radius))
    grid = (np.arange(2 * half) - half + 0.5) / (2 * radius)
    u, v = np.meshgrid(grid, grid)
    silhouette, details = _DRAWN[name](u, v)
    return np.stack([silhouette, silhouette & details]).astype(np.float64)


def _placed(
    masks: Float64[np.ndarray, "mask height width"], place: Float64[np.ndarray, " xy"]
) -> Float64[np.ndarray, "mask side side 1"]:
    """How much of each pixel the masks cover when the figure stands at `place` (to half a pixel)."""
    size = masks.shape[1]
    left, top = (np.rint(2 * place).astype(int) - size // 2).tolist()
    canvas = np.zeros((2, 2 * SIDE, 2 * SIDE))
    rows = slice(max(top, 0), min(top + size, 2 * SIDE))
    columns = slice(max(left, 0), min(left + size, 2 * SIDE))
    canvas[:, rows, columns] = masks[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return canvas.reshape(2, SIDE, 2, SIDE, 2).mean((2, 4))[..., None]


def draw(name: str, *, colour: str, rng: np.random.Generator) -> UInt8[np.ndarray, "time height width rgb"]:
    """Draw two seconds of a class's figure."""
    require_choice("class", name, CLASSES)
    require_choice("colour", colour, COLOURS)
    n_frames = round(SECONDS * FRAME_RATE)
    radius = rng.uniform(19, 28)
    centre = _track(rng, radius, n_frames)
    tint = np.clip(np.array(RGB[colour]) + rng.uniform(-0.05, 0.05, 3), 0, 1)
    ground = rng.uniform(0.02, 0.2, 3)
    slope = rng.uniform(-0.05, 0.05, 2)
    grain = rng.normal(0, rng.uniform(0, 0.02), (SIDE, SIDE, 1))
    x, y = np.meshgrid(np.arange(SIDE) / SIDE - 0.5, np.arange(SIDE) / SIDE - 0.5)
    behind = ground + (slope[0] * x + slope[1] * y)[..., None]
    masks = _stamp(name, radius)
    frames = np.empty((n_frames, SIDE, SIDE, 3), np.uint8)
    for time, place in enumerate(centre):
        covered, darkened = _placed(masks, place)
        picture = behind * (1 - covered) + tint * (covered - 0.75 * darkened) + grain
        frames[time] = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
    return frames
