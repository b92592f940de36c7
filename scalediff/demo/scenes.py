"""Procedural landscapes with exactly one sun or moon, rendered at any resolution.

A scene is a function of its seed. The resolution only determines how many octaves of fractal detail are rendered (all up to the Nyquist
frequency). So the true high-resolution version of every picture is known, and repetition, the failure of direct high-resolution
inference, can be counted: every true picture shows exactly one disc.

Legend: N pictures, R pixels per side, K lattice cells per side of one octave. Coordinates are in picture sides, y down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TIMES = ("dawn", "day", "dusk", "night")
TERRAINS = ("hills", "mountains")
PLACES = ("left", "middle", "right")

HELD_OUT_SEED = 10_000_000  # scenes from this seed on are not used for training

# Streams of independent random numbers of a scene.
_LAYOUT, _FAR, _NEAR, _CLOUDS, _ROCK, _WATER, _CAPTION, _DISC = range(8)

_LAKE = 0.80  # y of the lake's shore
_PLACE_SPANS = {"left": (0.21, 0.31), "middle": (0.44, 0.56), "right": (0.69, 0.79)}  # x of the disc's centre
_RADII = (0.125, 0.20)
_DISC_TOP, _DISC_BOTTOM = 0.03, 0.45  # the disc lies between these y, above the highest ridge

# zenith, horizon, disc, glow, cloud, far ridge, near ridge (RGB in [0, 1])
_PALETTES = {
    "dawn": ("343a66", "c98a86", "fff2cf", "e0a070", "a98a9c", "6a5a80", "3a3450"),
    "day": ("2f6cc0", "86b4dc", "fffbe6", "a8c4d8", "b4c0cc", "5f86a0", "3f7a3c"),
    "dusk": ("3c1f4e", "c8602c", "ffeec0", "d88238", "8a4a58", "5c2c44", "2a1622"),
    "night": ("070b1e", "1c2a4c", "f8f8f0", "4a5878", "2c3654", "1c2740", "0c1120"),
}
_PALETTE_NAMES = ("zenith", "horizon", "disc", "glow", "cloud", "far", "near")
PHRASES = {
    "article": ("a", "the", "one", "a full", "a bright"),
    "left": ("on the left", "at the left", "left"),
    "middle": ("in the middle", "in the center", "centered"),
    "right": ("on the right", "at the right", "right"),
    "joint": ("over", "above", "and", "with"),
    "hills": ("hills", "rolling hills", "green hills", "low hills", "a valley with hills"),
    "mountains": ("mountains", "snowy mountains", "high mountains", "peaks", "snowy peaks"),
    "lake": ("and a lake", "by a lake", "with a lake", "and water"),
    "dawn": ("at dawn", "at sunrise", "in the morning"),
    "day": ("at noon", "by day", "on a clear day", "in daylight"),
    "dusk": ("at dusk", "at sunset", "in the evening"),
    "night": ("at night", "at midnight", "on a dark night"),
    "empty": ("a photo of", "beautiful", "a painting of", "detailed", "scenery"),
}
VOCABULARY = sorted({word for options in PHRASES.values() for phrase in options for word in phrase.split()} | {"sun", "moon", "landscape"})

_MOUNTAIN_NEAR = {"dawn": "4a4460", "day": "6b7078", "dusk": "34222e", "night": "121829"}
_SNOW = {"dawn": "a890a0", "day": "a4aeb8", "dusk": "986a72", "night": "4a5878"}


@dataclass(frozen=True)
class Scene:
    """What a caption can say about a picture, and the position of its disc (centre and radius in units of the side)."""

    seed: int
    time: str
    terrain: str
    place: str
    disc_y: float
    disc_x: float
    radius: float

    @property
    def disc(self) -> str:
        return "moon" if self.time == "night" else "sun"


def describe(seed: int) -> Scene:
    """The layout of the scene with this seed; a pure function of the seed."""
    rng = np.random.default_rng([seed, _LAYOUT])
    place = PLACES[rng.integers(3)]
    low, high = _PLACE_SPANS[place]
    radius = rng.uniform(*_RADII)
    return Scene(
        seed=seed,
        time=TIMES[rng.integers(4)],
        terrain=TERRAINS[rng.integers(2)],
        place=place,
        disc_y=float(rng.uniform(_DISC_TOP + radius, _DISC_BOTTOM - radius)),
        disc_x=float(rng.uniform(low, high)),
        radius=float(radius),
    )


def render(seed: int, n: int, resolution: int) -> Tensor:
    """Render `n` scenes with seeds `seed .. seed + n - 1`.

    Args:
        seed: First seed, >= 0. Picture i depends on `seed + i` and on the resolution alone (to fp32 rounding).
        n: Number of pictures, >= 1.
        resolution: Pixels per side, >= 16.

    Returns:
        `[N, 3, R, R]` float32 in [0, 1].

    Raises:
        ValueError: An argument is below its minimum.
    """
    if seed < 0 or n < 1 or resolution < 16:
        raise ValueError(f"render needs seed >= 0, n >= 1 and resolution >= 16, got {seed=}, {n=}, {resolution=}")
    return torch.cat([_paint([describe(s) for s in chunk], resolution) for chunk in _chunks(seed, n, resolution)])


def caption(scene: Scene, *, draw: int = 0) -> str:
    """A random caption of the scene, which mentions some of its properties in random words. Each `draw` gives another caption."""
    rng = np.random.default_rng([scene.seed, _CAPTION, draw])

    def pick(kind: str) -> str:
        return PHRASES[kind][rng.integers(len(PHRASES[kind]))]

    words = [f"{pick('article')} {scene.disc}" if rng.random() < 0.85 else "a landscape"]
    if words[0] != "a landscape" and rng.random() < 0.85:
        words.append(pick(scene.place))
    if rng.random() < 0.85:
        words.append(f"{pick('joint')} {pick(scene.terrain)}")
    if rng.random() < 0.3:
        words.append(pick("lake"))
    if rng.random() < 0.85:
        words.append(pick(scene.time))
    if rng.random() < 0.25:  # meaningless words, so that the model learns to ignore unknown ones
        words.insert(rng.integers(len(words) + 1), pick("empty") if rng.random() < 0.5 else _babble(rng))
    return " ".join(words)


def luminance(image: Tensor) -> Tensor:
    """Rec. 601 luma of `[..., 3, Y, X]` in [0, 1]: `[..., Y, X]`."""
    return torch.einsum("...cyx,c->...yx", image, image.new_tensor([0.299, 0.587, 0.114]))


def _babble(rng: np.random.Generator) -> str:
    return "".join(chr(97 + int(c)) for c in rng.integers(0, 26, size=int(rng.integers(3, 8))))


def _chunks(seed: int, n: int, resolution: int) -> list[range]:
    size = max(1, 2**22 // resolution**2)  # bounds the working set to some 100 MB
    return [range(s, min(s + size, seed + n)) for s in range(seed, seed + n, size)]


def _rgb(code: str) -> list[float]:
    return [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def _octaves(resolution: int, first: int) -> range:
    """Octave o has 2^o lattice cells per side; the last one has two pixels per cell, its Nyquist frequency."""
    return range(first, int(np.log2(resolution)))


def _basis(cells: int, resolution: int) -> Tensor:
    """`[R, K + 3]`: uniform cubic B-spline weights of every pixel centre over a lattice of `cells` cells."""
    u = (torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution * cells
    cell = u.floor().clamp(max=cells - 1)
    f = u - cell
    weights = torch.stack([(1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3], dim=-1) / 6
    basis = torch.zeros(resolution, cells + 3, dtype=torch.float64)
    return basis.scatter_(1, cell.long()[:, None] + torch.arange(4), weights).float()


def _lattice(seeds: list[int], stream: int, octave: int, shape: tuple[int, ...]) -> Tensor:
    """`[N, *shape]` of unit normals: the same for a seed, stream and octave at every resolution."""
    fields = [np.random.default_rng([s, stream, octave]).standard_normal(shape, dtype=np.float32) for s in seeds]
    return torch.from_numpy(np.stack(fields))


def _fractal_line(seeds: list[int], stream: int, resolution: int, *, first: int, persistence: float) -> Tensor:
    """`[N, R]`: sum over octaves of smooth noise along x; the amplitude falls by the factor `persistence` per octave."""
    line = torch.zeros(len(seeds), resolution)
    for o in _octaves(resolution, first):
        line += persistence ** (o - first) * _lattice(seeds, stream, o, (2**o + 3,)) @ _basis(2**o, resolution).T
    return line


def _fractal_plane(seeds: list[int], stream: int, resolution: int, *, first: int, persistence: float, flat: int = 0) -> Tensor:
    """`[N, R, R]`: fractal noise in the plane, as `_fractal_line`; features are `2^flat` times longer along x than along y."""
    plane = torch.zeros(len(seeds), resolution, resolution)
    for o in _octaves(resolution, first):
        rows, columns = 2**o, 2 ** max(0, o - flat)
        lattice = _lattice(seeds, stream, o, (rows + 3, columns + 3))
        plane += persistence ** (o - first) * (_basis(rows, resolution) @ lattice @ _basis(columns, resolution).T)
    return plane


def _paint(scenes: list[Scene], resolution: int) -> Tensor:
    """Render scenes to `[N, 3, R, R]` in [0, 1]."""
    seeds = [s.seed for s in scenes]
    pixel = 1 / resolution
    axis = (torch.arange(resolution) + 0.5) * pixel
    y, x = axis[:, None], axis[None, :]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values)[:, None, None]

    def coverage(inside: Tensor) -> Tensor:
        """Fraction of a pixel inside an edge, from the signed distance to it in picture sides; antialiases at any resolution."""
        return (inside / pixel + 0.5).clamp(0, 1)

    def over(image: Tensor, color: Tensor, alpha: Tensor) -> Tensor:
        return image + alpha[:, None] * (color - image)

    palette = {name: torch.tensor([_rgb(_PALETTES[s.time][i]) for s in scenes])[:, :, None, None] for i, name in enumerate(_PALETTE_NAMES)}
    mountains = column([float(s.terrain == "mountains") for s in scenes])
    rocky = torch.tensor([_rgb(_MOUNTAIN_NEAR[s.time]) for s in scenes])[:, :, None, None]
    snow = torch.tensor([_rgb(_SNOW[s.time]) for s in scenes])[:, :, None, None]
    disc_y, disc_x = column([s.disc_y for s in scenes]), column([s.disc_x for s in scenes])
    radius = column([s.radius for s in scenes])
    distance = ((y - disc_y) ** 2 + (x - disc_x) ** 2).sqrt()

    # Sky, clouds (thin around the disc, which is never covered), glow, disc.
    blend = (y / 0.62).clamp(max=1) ** 1.3
    sky = palette["zenith"] + blend * (palette["horizon"] - palette["zenith"])
    sky = sky.expand(-1, -1, -1, resolution)
    billows = _fractal_plane(seeds, _CLOUDS, resolution, first=2, persistence=0.62, flat=1)
    clear = ((distance - 1.1 * radius) / (0.8 * radius)).clamp(0, 1)
    sky = over(sky, palette["cloud"], 0.75 * torch.sigmoid(3.0 * (billows - 0.25)) * clear)
    sky = over(sky, palette["glow"], 0.7 * torch.exp(-((distance - radius).clamp(min=0)) / (0.4 * radius)))
    spots = torch.sigmoid(4 * (_fractal_plane(seeds, _DISC, resolution, first=4, persistence=0.7) - 0.3))
    depth_of_spots = column([0.09 if s.time == "night" else 0.03 for s in scenes])  # the moon has dark plains, the sun hardly any
    disc = palette["disc"] * (1 - depth_of_spots * spots)[:, None]
    image = over(sky, disc, coverage(radius - distance))

    # Two ridges: mountains are higher, rougher (stronger high octaves) and have snow.
    rock = _fractal_plane(seeds, _ROCK, resolution, first=3, persistence=0.75)
    for name, stream, base, height in (("far", _FAR, 0.60, 0.055), ("near", _NEAR, 0.71, 0.05)):
        smooth = _fractal_line(seeds, stream, resolution, first=1, persistence=0.38)[:, None, :]
        rough = _fractal_line(seeds, stream, resolution, first=1, persistence=0.58)[:, None, :]
        profile = (1 - mountains) * smooth * 0.8 + mountains * (rough * 1.5 + 0.4)
        top = (base - height * profile).clamp(min=0.46)
        depth = y - top
        color = palette[name] if name == "far" else palette[name] + mountains[:, None] * (rocky - palette[name])
        texture = 1 + (0.10 if name == "far" else 0.20) * rock
        shaded = color * texture[:, None]
        cap = mountains * torch.sigmoid((0.045 - depth + 0.012 * rock) / 0.006) * torch.sigmoid((base - 0.01 - y) / 0.01)
        shaded = over(shaded, snow * (1 + 0.12 * rock)[:, None], 0.85 * cap)
        image = over(image, shaded.clamp(0, 0.7), coverage(depth))

    # The lake reflects the picture above it, displaced by ripples, with the glitter of the disc, dimmer than the disc.
    ripples = _fractal_plane(seeds, _WATER, resolution, first=3, persistence=0.7, flat=3)
    mirror = 2 * _LAKE - y + 0.006 * ripples
    rows = (mirror / pixel).long().clamp(0, resolution - 1)
    reflection = torch.gather(image, 2, rows[:, None].expand(-1, 3, -1, -1))
    water = 0.62 * reflection + 0.25 * palette["zenith"] * (1 + 0.35 * ripples)[:, None]
    glitter = torch.exp(-(((x - disc_x) / (0.05 + 0.25 * (y - _LAKE).clamp(min=0))) ** 2)) * torch.sigmoid(4 * (ripples - 0.4))
    water = over(water, palette["glow"], 0.5 * glitter)
    image = over(image, water.clamp(0, 0.7), coverage((y - _LAKE).expand(len(scenes), -1, resolution)))
    return image.clamp(0, 1)
