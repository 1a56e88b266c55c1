"""The built-in scenes: small images of known attributes; integer arithmetic makes them the same on every machine."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent", "diamond", "arrow")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
TEXTURES = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = ("grass", "sand", "water", "brick", "night sky", "snow", "wood", "leaves")
SIZES = ("small", "medium", "large")
PLACES = ("left", "right", "top", "bottom", "centre")
# Names of every attribute's values, in the order of the codes in a `SceneTable`.
ATTRIBUTES: dict[str, tuple[str, ...]] = {"shape": SHAPES, "color": COLORS, "texture": TEXTURES}
ATTRIBUTES |= {"background": BACKGROUNDS, "size": SIZES, "place": PLACES}

_PAINT = {"red": (214, 32, 32), "orange": (242, 134, 22), "yellow": (246, 222, 40), "green": (30, 170, 62)}
_PAINT |= {"blue": (34, 72, 220), "purple": (132, 42, 180), "pink": (250, 140, 190), "black": (24, 24, 24)}
_RADIUS = (12, 16, 21)
_OFFSET = ((-13, 0), (13, 0), (0, -13), (0, 13), (0, 0))
# (cos, sin) · 1024 of the tilts a shape may have, about -20 to 20 degrees.
_COSINES = (962, 989, 1008, 1020, 1024, 1020, 1008, 989, 962)
_SINES = (-350, -265, -178, -89, 0, 89, 178, 265, 350)
_SIDE = 64


def _hash(seed: int, counter: np.ndarray) -> np.ndarray:
    """splitmix64 of (seed, counter): uint64 of any shape, the same everywhere."""
    with np.errstate(over="ignore"):
        x = counter.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(seed % 2**64) * np.uint64(0xD1B54A32D192ED03)
        x += np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class SceneTable:
    """N scenes as codes (N,) into `ATTRIBUTES[name]`, by attribute, and words (N, 4) for the jitter."""

    seed: int
    codes: dict[str, np.ndarray]
    noise: np.ndarray

    def __len__(self) -> int:
        return len(self.noise)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all codes and noise."""
        codes = b"".join(self.codes[name].astype("<i8").tobytes() for name in ATTRIBUTES)
        return hashlib.sha256(b"scenes-1" + codes + self.noise.astype("<u8").tobytes()).hexdigest()


def sample_scenes(count: int, *, seed: int, background_bias: float = 0.0) -> SceneTable:
    """Draw N scenes, attributes uniform; with probability `background_bias` the background is the shape's own."""
    words = np.arange(count, dtype=np.uint64)[:, None] * np.uint64(16) + np.arange(16, dtype=np.uint64)
    draws = _hash(seed, words)
    sizes = {name: np.uint64(len(values)) for name, values in ATTRIBUTES.items()}
    codes = {name: (draws[:, i] % size).astype(np.int64) for i, (name, size) in enumerate(sizes.items())}
    tied = (draws[:, 6] >> np.uint64(11)) < np.uint64(round(background_bias * 2**53))
    codes["background"] = np.where(tied, codes["shape"] % len(BACKGROUNDS), codes["background"])
    return SceneTable(seed, codes, draws[:, 8:12].copy())


def render_scene(table: SceneTable, index: int) -> np.ndarray:
    """Draw one scene, (64, 64, 3) uint8."""
    code = {name: int(table.codes[name][index]) for name in ATTRIBUTES}
    noise = [int(word) for word in table.noise[index]]
    image: np.ndarray = _background(BACKGROUNDS[code["background"]], noise[0])
    _paint_shape(image, code, noise[1])
    grain = _hash(noise[2], np.arange(_SIDE * _SIDE * 3, dtype=np.uint64)) % np.uint64(25)
    image = image + grain.astype(np.int64).reshape(image.shape) - 12
    return image.clip(0, 255).astype(np.uint8)


def _background(name: str, noise: int) -> np.ndarray:
    """(64, 64, 3) int64: a base colour with the pattern that goes with its name, moved and shaded by the noise."""
    y, x = np.mgrid[0:_SIDE, 0:_SIDE]
    x, y, shade = x + noise % 16, y + (noise >> 8) % 16, (noise >> 16) % 31 - 15
    speck = (_hash(noise & 0xFFFF, (y * 512 + x).astype(np.uint64)) % np.uint64(100)).astype(np.int64)
    if name == "grass":
        mark, base, ink = (x * 5 + (y // 6) * 7) % 9 < 2, (88, 172, 62), (52, 128, 40)
    elif name == "sand":
        mark, base, ink = speck < 22, (226, 202, 148), (196, 166, 108)
    elif name == "water":
        mark, base, ink = (y * 2 + np.abs((x % 16) - 8)) % 12 < 3, (70, 160, 214), (190, 226, 244)
    elif name == "brick":
        mark, base, ink = (y % 8 == 0) | ((x + (y // 8 % 2) * 8) % 16 == 0), (168, 76, 56), (216, 206, 196)
    elif name == "night sky":
        mark, base, ink = speck < 4, (14, 16, 56), (250, 250, 214)
    elif name == "snow":
        mark, base, ink = speck < 8, (240, 244, 250), (206, 216, 232)
    elif name == "wood":
        mark, base, ink = (x + (y // 16) % 3) % 7 < 2, (164, 112, 62), (118, 74, 36)
    else:
        mark, base, ink = ((x + y) % 12 < 5) & ((x - y) % 12 < 5), (24, 84, 44), (112, 150, 32)
    return np.where(mark[..., None], np.array(ink), np.array(base)) + shade


def _paint_shape(image: np.ndarray, code: dict[str, int], noise: int) -> None:
    """Draw the shape into (64, 64, 3), edges averaged over 2 x 2; a white rim lets its colour stand out everywhere."""
    left, top = _OFFSET[code["place"]]
    # Quarter pixels from here on: the sub-pixel centres are then whole numbers.
    centre = (4 * (32 + left) + noise % 17 - 8, 4 * (32 + top) + (noise >> 8) % 17 - 8)
    radius = 4 * _RADIUS[code["size"]] + (noise >> 16) % 5 - 2
    tilt = (noise >> 24) % len(_SINES)
    cos, sin = _COSINES[tilt], _SINES[tilt]
    reach = radius * 5 // 4 + 8
    (x0, x1), (y0, y1) = ((max(0, (c - reach) // 4), min(_SIDE, (c + reach) // 4 + 1)) for c in centre)
    y, x = np.meshgrid(np.arange(4 * y0 + 1, 4 * y1, 2), np.arange(4 * x0 + 1, 4 * x1, 2), indexing="ij")
    dx, dy = x - centre[0], y - centre[1]
    # Into the shape's own frame, 256 units to the radius.
    u, v = (dx * cos + dy * sin) // (4 * radius), (dy * cos - dx * sin) // (4 * radius)
    rim = 256 * (radius + 7) // radius
    name, color = SHAPES[code["shape"]], np.array(_PAINT[COLORS[code["color"]]], dtype=np.int64)
    patch = image[y0:y1, x0:x1].repeat(2, 0).repeat(2, 1)
    patch[_inside(name, u * 256 // rim, v * 256 // rim)] = 250
    inside = _inside(name, u, v)
    patch[inside] = color
    patch[inside & _texture(TEXTURES[code["texture"]], x // 4, y // 4)] = (color * 2 + 255 * 3) // 5
    image[y0:y1, x0:x1] = patch.reshape(y1 - y0, 2, x1 - x0, 2, 3).sum((1, 3)) // 4


def _texture(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the lighter second tone goes: bool from pixel coordinates."""
    tones: dict[str, np.ndarray] = {"plain": np.zeros(x.shape, dtype=bool), "striped": (x + y) % 8 < 3}
    tones |= {"dotted": (x % 7 - 3) ** 2 + (y % 7 - 3) ** 2 <= 3, "checked": (x // 4 + y // 4) % 2 == 0}
    return tones[name]


# Corners x y, x y, ...
_POLYGONS = {
    "square": "-200 -200, 200 -200, 200 200, -200 200",
    "diamond": "0 -262, 190 0, 0 262, -190 0",
    "triangle": "0 -250, 240 190, -240 190",
    "star": "0 -262, 65 -88, 249 -81, 104 34, 154 212, 0 109, -154 212, -104 34, -249 -81, -65 -88",
    "cross": "-80 -240, 80 -240, 80 -80, 240 -80, 240 80, 80 80, 80 240, -80 240, -80 80, -240 80, -240 -80, -80 -80",
    "arrow": "-250 -72, 20 -72, 20 -210, 260 0, 20 210, 20 72, -250 72",
}


def _inside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points (u, v), 256 to the radius, are in the shape: bool."""
    squared: np.ndarray = u * u + v * v
    inside: np.ndarray = np.zeros(u.shape, dtype=bool)
    if name == "circle":
        inside = squared <= 230**2
    elif name == "ring":
        inside = (squared <= 250**2) & (squared >= 140**2)
    elif name == "crescent":
        inside = (squared <= 250**2) & ((u - 120) ** 2 + (v + 20) ** 2 >= 205**2)
    elif name == "heart":
        a, b = u * 5 // 4 // 4, -(v * 5 // 4) // 4 + 10
        inside = (a * a + b * b - 58**2) ** 3 <= 58 * a * a * b**3
    else:
        points = [tuple(int(word) for word in corner.split()) for corner in _POLYGONS[name].split(",")]
        for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):  # the even-odd rule
            side = (x2 - x1) * (v - y1) - (u - x1) * (y2 - y1)
            inside ^= ((y1 > v) != (y2 > v)) & ((side > 0) == (y2 > y1))
    return inside
