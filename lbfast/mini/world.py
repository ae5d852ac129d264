"""A small world seen by five senses: one shape before a wall, in motion; drawn, measured and sounded here, from a seed.

A scene is a shape of some colour and size at some place and distance, cold to hot, moving one way at some speed. Each
sense shows part of that, and its captions name only that part:

    image    everything: distance dims the shape, heat makes it glow and cold frosts it, motion leaves a trail
    video    shape, colour, size, place and motion (it shows distance and heat as pictures do)
    depth    shape, size, place and distance
    thermal  shape, size, place and heat
    audio    a tune: shape is the timbre, colour the pitch, size the loudness, direction the way each note bends or
             swells, speed how many notes there are

What a sense can be asked about is split by a hash of what it sees: a test scene's view was held out from training in
every sense, a training scene's in none. So no caption of the test split, of any sense, is ever trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PIXELS, FRAMES, RATE, SAMPLES = 96, 4, 16000, 15600
"""Pictures are PIXELS x PIXELS; clips have FRAMES of them; sounds have SAMPLES at RATE Hz (96 frames of 10 ms)."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "moon"),
    "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white"),
    "size": ("small", "medium", "large"),
    "place": (
        *("at the top left", "at the top", "at the top right"),
        *("on the left", "in the middle", "on the right"),
        *("at the bottom left", "at the bottom", "at the bottom right"),
    ),
    "distance": ("close by", "some way off", "far away"),
    "heat": ("cold", "lukewarm", "hot"),
    "direction": ("left", "right", "up", "down"),
    "speed": ("slowly", "quickly"),
}
SEES: dict[str, tuple[str, ...]] = {
    "image": tuple(ATTRIBUTES),
    "video": ("shape", "colour", "size", "place", "direction", "speed"),
    "audio": ("shape", "colour", "size", "direction", "speed"),
    "depth": ("shape", "size", "place", "distance"),
    "thermal": ("shape", "size", "place", "heat"),
}
"""What each sense shows of a scene, and what its captions name."""
CAPTIONS: dict[str, tuple[str, ...]] = {**SEES, "shape": ("shape",), "motion": ("direction", "speed")}
"""What can be said of a scene: each sense's view of it, or one aspect alone."""

_NAMES = tuple(ATTRIBUTES)
_COUNTS = np.array([len(values) for values in ATTRIBUTES.values()])
_HELD_OUT = 3  # one view in so many
BLOCK = 100
"""Each so many test scenes in a row have different captions in every sense."""

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "image": (
        "a {heat} {size} {colour} {shape} {place}, {distance}, moving {direction} {speed}",
        "{distance} {place}, a {size} {colour} {shape}, {heat}, moves {direction} {speed}",
        "{speed} moving {direction}: a {size} {heat} {colour} {shape} {place}, {distance}",
    ),
    "video": (
        "a {size} {colour} {shape} {place} moving {direction} {speed}",
        "a {size} {colour} {shape} moves {speed} {direction} {place}",
        "{place}, a {size} {colour} {shape} {speed} moving {direction}",
    ),
    "audio": (
        "the sound of a {size} {colour} {shape} moving {direction} {speed}",
        "a {size} {colour} {shape} is heard as it moves {speed} {direction}",
    ),
    "depth": (
        "a {size} {shape} {place}, {distance}",
        "{distance} {place}, a {size} {shape}",
    ),
    "shape": ("a {shape}",),
    "motion": ("moving {direction} {speed}",),
    "thermal": (
        "a {heat} {size} {shape} {place}",
        "{place}, a {size} {shape} that is {heat}",
    ),
}


@dataclass(frozen=True)
class Scene:
    """One moment of the world.

    Attributes:
        shape ... speed: values of `ATTRIBUTES`.
        seed: of all that captions don't name: the exact place, size and turn, the wall, the noise, the wording.
    """

    shape: str
    colour: str
    size: str
    place: str
    distance: str
    heat: str
    direction: str
    speed: str
    seed: int = 0

    def random(self, sense: str) -> np.random.Generator:
        """Draws of one sense; every sense has its own."""
        return np.random.default_rng([self.seed, *sense.encode()])

    def view(self, sense: str) -> tuple[str, ...]:
        """What the sense shows of it: two scenes with one view are the same to it."""
        return tuple(getattr(self, name) for name in SEES[sense])


def scenes(split: str, count: int, seed: int = 0) -> list[Scene]:
    """Draws scenes; the same for the same arguments, and the first of a longer list.

    Args:
        split: "train", or "test", where each BLOCK in a row have different captions in every sense.
        count: how many, at least 1.
        seed: another draw.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected train or test, got {split!r}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    found: list[Scene] = []
    for row, own in _draws(split, seed):
        scene = Scene(**{name: ATTRIBUTES[name][i] for name, i in zip(_NAMES, row)}, seed=own)
        if split == "test" and _repeats(scene, found[len(found) // BLOCK * BLOCK :]):
            continue
        found.append(scene)
        if len(found) == count:
            break
    return found


def _repeats(scene: Scene, others: list[Scene]) -> bool:
    """Whether some sense sees the same in another scene."""
    return any(scene.view(sense) == other.view(sense) for sense in SEES for other in others)


def _draws(split: str, seed: int) -> Iterator[tuple[list[int], int]]:
    """Endless rows of attribute indices of a split, each with a seed of its own."""
    random = np.random.default_rng([seed, split == "test"])
    while True:
        rows = random.integers(0, _COUNTS, (1 << 14, len(_COUNTS)))
        held = np.stack([_held_out(rows, sense) for sense in SEES])
        kept = rows[held.all(0) if split == "test" else ~held.any(0)]
        yield from zip(kept.tolist(), random.integers(0, 1 << 31, len(kept)).tolist())


def _held_out(rows: np.ndarray, sense: str) -> np.ndarray:
    """Whether what the sense sees of each row (N, attributes) is for testing: one view in _HELD_OUT, by its hash."""
    columns = [_NAMES.index(name) for name in SEES[sense]]
    code = np.ravel_multi_index(tuple(rows[:, columns].T), tuple(_COUNTS[columns])).astype(np.uint64)
    code += np.uint64(len(sense)) << np.uint64(32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        code = (code + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(factor)
        code ^= code >> np.uint64(shift)
    return (code >> np.uint64(20)) % np.uint64(_HELD_OUT) == 0


def held_out(scene: Scene, sense: str) -> bool:
    """Whether what the sense sees of the scene is kept from training."""
    row = [ATTRIBUTES[name].index(getattr(scene, name)) for name in _NAMES]
    return bool(_held_out(np.array([row]), sense)[0])


def caption(scene: Scene, view: str, wording: int | None = None) -> str:
    """A sentence that names what a view of `CAPTIONS` has; wording: which of its templates, drawn if None."""
    templates = _TEMPLATES[view]
    chosen = int(scene.random(view + "-caption").integers(len(templates))) if wording is None else wording
    return templates[chosen].format(**{name: getattr(scene, name) for name in CAPTIONS[view]})


# What is seen. Coordinates: x to the right and y down, -1 to 1 over the picture.

_Y, _X = (np.mgrid[0:PIXELS, 0:PIXELS] + 0.5) / (PIXELS / 2) - 1
_RADIUS = {"small": 0.3, "medium": 0.42, "large": 0.58}
_COLOURS = {
    "red": (0.95, 0.08, 0.08),
    "orange": (1.0, 0.5, 0.0),
    "yellow": (1.0, 0.95, 0.1),
    "green": (0.1, 0.8, 0.15),
    "cyan": (0.1, 0.9, 0.9),
    "blue": (0.12, 0.2, 1.0),
    "purple": (0.7, 0.1, 0.85),
    "white": (1.0, 1.0, 1.0),
}
_LIGHT = {"close by": 1.0, "some way off": 0.68, "far away": 0.42}
_METRES = {"close by": 1.0, "some way off": 2.2, "far away": 3.8}
_WARMTH = {"cold": 0.06, "lukewarm": 0.62, "hot": 0.97}
_STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_TRAVEL = {"slowly": 0.36, "quickly": 1.0}  # over a clip


@dataclass(frozen=True)
class _Body:
    """The shape of a scene with its drawn particulars: centre, radius, turn in radians."""

    x: float
    y: float
    radius: float
    turn: float
    shape: str

    def distance(self, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
        """(PIXELS, PIXELS): how far each pixel is outside the outline (negative: inside), the body moved by dx, dy."""
        u, v = (_X - self.x - dx) / self.radius, (_Y - self.y - dy) / self.radius
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        return _outline(self.shape, u * cos + v * sin, v * cos - u * sin) * self.radius


def _outline(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """About the distance from the outline of a shape of radius 1, negative inside."""
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.85
    if shape == "triangle":
        return np.maximum(v - 0.6, abs(u) * 0.866 - v * 0.5 - 0.55)
    if shape == "diamond":
        return (abs(u) / 0.7 + abs(v) - 1) * 0.57
    if shape == "cross":
        return np.minimum(np.maximum(abs(u) - 0.3, abs(v) - 1), np.maximum(abs(u) - 1, abs(v) - 0.3))
    r = np.hypot(u, v)
    if shape == "ring":
        return abs(r - 0.78) - 0.22
    if shape == "star":
        angle = np.abs((np.arctan2(u, -v) / (2 * np.pi) * 5) % 1 - 0.5) * 2  # 1 at a tip, 0 between two
        return (r - 0.42 - 0.68 * angle**1.5) * 0.7
    if shape == "moon":
        return np.maximum(r - 1, 0.8 - np.hypot(u - 0.5, v))
    return r - 1


def _body(scene: Scene) -> _Body:
    """The same for every sense that sees it."""
    random = scene.random("body")
    place = ATTRIBUTES["place"].index(scene.place)
    x, y = 0.42 * (place % 3 - 1), 0.42 * (place // 3 - 1)
    dx, dy, grow, turn = random.uniform(-1, 1, 4)
    return _Body(x + 0.05 * dx, y + 0.05 * dy, _RADIUS[scene.size] * (1 + 0.05 * grow), 0.12 * turn, scene.shape)


def _cover(distance: np.ndarray, softness: float = 0.02) -> np.ndarray:
    """1 inside, 0 outside, smooth between."""
    return np.clip(0.5 - distance / (2 * softness), 0, 1)[..., None]


def _bytes(picture: np.ndarray) -> np.ndarray:
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)


def _wall(random: np.random.Generator) -> np.ndarray:
    """A dark wall, lighter on one side."""
    shade, tilt_x, tilt_y = random.uniform(-1, 1, 3)
    grey = 0.13 + 0.04 * shade + 0.03 * (tilt_x * _X + tilt_y * _Y)
    return grey[..., None] * np.array([0.9, 0.95, 1.15])


def _paint(below: np.ndarray, distance: np.ndarray, scene: Scene, strength: float = 1.0) -> np.ndarray:
    """The shape over a picture, with its glow or frost."""
    light = strength * _LIGHT[scene.distance]
    if scene.heat == "hot":
        below = below + light * (np.exp(-np.maximum(distance, 0) / 0.1) * 0.75)[..., None] * np.array([1.0, 0.3, 0.05])
    elif scene.heat == "cold":
        rim = _cover(abs(distance - 0.07) - 0.03)
        below = below + light * rim * (np.array([0.65, 0.85, 1.0]) - below)
    return below + strength * _cover(distance) * (_LIGHT[scene.distance] * np.array(_COLOURS[scene.colour]) - below)


def picture(scene: Scene) -> np.ndarray:
    """uint8 (PIXELS, PIXELS, 3): the scene at one moment, with a fading trail."""
    random, body = scene.random("image"), _body(scene)
    (sx, sy), travel = _STEP[scene.direction], _TRAVEL[scene.speed]
    shown = _wall(random)
    light = _LIGHT[scene.distance] * np.array(_COLOURS[scene.colour])
    for lag, strength in ((3, 0.3), (2, 0.45), (1, 0.6)):
        back = -lag * travel / 3
        shown = shown + strength * _cover(body.distance(back * sx, back * sy)) * (light - shown)
    shown = _paint(shown, body.distance(), scene)
    return _bytes(shown + 0.015 * random.standard_normal(shown.shape))


def clip(scene: Scene) -> np.ndarray:
    """uint8 (FRAMES, PIXELS, PIXELS, 3): the shape crossing its place."""
    random, body = scene.random("video"), _body(scene)
    (sx, sy), travel = _STEP[scene.direction], _TRAVEL[scene.speed]
    wall = _wall(random)
    frames = []
    for i in range(FRAMES):
        on = travel * (i / (FRAMES - 1) - 0.5)
        shown = _paint(wall, body.distance(on * sx, on * sy), scene)
        frames.append(_bytes(shown + 0.015 * random.standard_normal(shown.shape)))
    return np.stack(frames)


def depth_map(scene: Scene) -> np.ndarray:
    """uint16 (PIXELS, PIXELS), millimetres: a wall some 5 m away, and the shape before it."""
    random = scene.random("depth")
    away, tilt_x, tilt_y, nearer = random.uniform(-1, 1, 4)
    wall = 5 + 0.3 * away + 0.25 * (tilt_x * _X + tilt_y * _Y)
    front = _METRES[scene.distance] * (1 + 0.06 * nearer)
    metres = np.where(_body(scene).distance() < 0, front, wall) * (1 + 0.004 * random.standard_normal(wall.shape))
    return (metres * 1000).round().astype(np.uint16)


def thermal_picture(scene: Scene) -> np.ndarray:
    """uint8 (PIXELS, PIXELS, 3): heat in a thermal camera's palette, outlines soft."""
    random = scene.random("thermal")
    level, tilt_x, tilt_y, warmer = random.uniform(-1, 1, 4)
    wall = 0.34 + 0.03 * level + 0.03 * (tilt_x * _X + tilt_y * _Y)
    cover = _cover(_body(scene).distance(), 0.04)[..., 0]
    heat = wall + cover * (_WARMTH[scene.heat] + 0.03 * warmer - wall)
    return _bytes(_palette(heat + 0.01 * random.standard_normal(heat.shape)))


_STOPS = np.array([(0, 0, 0.1), (0.35, 0.05, 0.55), (0.85, 0.25, 0.3), (1.0, 0.7, 0.1), (1.0, 1.0, 0.9)])


def _palette(heat: np.ndarray) -> np.ndarray:
    """0..1 -> black, violet, orange, yellow, white."""
    at = np.linspace(0, 1, len(_STOPS))
    return np.stack([np.interp(np.clip(heat, 0, 1), at, _STOPS[:, c]) for c in range(3)], axis=-1)


# What is heard.

_PARTIALS: dict[str, tuple[tuple[float, float], ...]] = {  # timbre: (multiple of the pitch, amplitude)
    "circle": ((1, 1.0),),
    "square": ((1, 1.0), (3, 0.6), (5, 0.45), (7, 0.35)),
    "triangle": ((1, 1.0), (2, 0.7), (4, 0.5), (8, 0.35)),
    "diamond": ((1, 0.4), (2, 0.5), (3, 0.6), (4, 0.7), (5, 0.8)),
    "cross": ((1, 1.0), (1.41, 0.9), (2.76, 0.6)),
    "ring": ((1, 1.0), (6, 0.8)),
    "star": ((1, 0.8),),  # and noise
    "moon": ((1, 1.0),),  # fluttering
}
_LOUDNESS = {"small": 0.04, "medium": 0.16, "large": 0.6}
_NOTES = {"slowly": 2, "quickly": 5}
_LOWEST, _STEP_RATIO, _BEND = 260.0, 1.24, 1.35


def sound(scene: Scene) -> np.ndarray:
    """float32 (SAMPLES,) in [-1, 1] at RATE Hz: the scene's notes, over faint noise."""
    random = scene.random("audio")
    tune, offset, breath = random.uniform(-1, 1, 3)
    pitch = _LOWEST * _STEP_RATIO ** ATTRIBUTES["colour"].index(scene.colour) * 1.02**tune
    t = (np.arange(SAMPLES) / SAMPLES * _NOTES[scene.speed] + 0.04 * offset) % 1  # 0 to 1 within each note
    bend = {"up": 2 * t - 1, "down": 1 - 2 * t}.get(scene.direction, np.zeros_like(t))
    phase = 2 * np.pi * np.cumsum(pitch * _BEND**bend) / RATE
    wave = sum(gain * np.sin(ratio * phase) for ratio, gain in _PARTIALS[scene.shape] if ratio * pitch < RATE / 2.8)
    if scene.shape == "star":
        wave = wave + 0.5 * random.standard_normal(SAMPLES)
    if scene.shape == "moon":
        wave = wave * (0.5 + 0.5 * np.sin(2 * np.pi * 30 * np.arange(SAMPLES) / RATE))
    swell = {"left": t**2, "right": (1 - t) ** 2}.get(scene.direction, np.ones_like(t) * 0.6)
    edges = np.clip(np.minimum(t, 1 - t) / 0.04, 0, 1)
    loud = _LOUDNESS[scene.size] * (1 + 0.1 * breath) / np.sqrt(sum(g * g for _, g in _PARTIALS[scene.shape]))
    noisy = loud * swell * edges * wave + 0.002 * random.standard_normal(SAMPLES)
    return np.clip(noisy, -1, 1).astype(np.float32)
