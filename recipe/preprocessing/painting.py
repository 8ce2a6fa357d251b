"""The images of the demo data set: twelve textures and shapes, drawn with numpy and degraded like photographs.

Each image is a pure function of (split, class, number) and of `VERSION`. Flips and crops keep the class. Colour, light,
scale and size vary, and a few images are grey, as in the real ImageNet.
"""

import colorsys
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.float64]  # height x width
Colour = NDArray[np.float64]  # red, green, blue in 0..1
Canvas = NDArray[np.float64]  # height x width x 3
Span = tuple[float, float]  # from, to

VERSION = 1  # part of every seed and of the data set's marker: raise it when any painter changes
_GREYSCALE_SHARE = 0.03  # as in the real set: loaders have to convert them to RGB
_EDGE = 0.04  # width of a soft edge, about a pixel (the shorter side spans 2.0)


# ---- what painters share ---------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """The coordinates of an empty image: (0, 0) is the middle and the shorter side spans -1..1."""

    generator: np.random.Generator
    x: Plane
    y: Plane

    def between(self, low: float, high: float) -> float:
        return float(self.generator.uniform(low, high))

    def turned(self, most_degrees: float) -> tuple[Plane, Plane]:
        """Coordinates of a surface shifted by up to one unit and turned by up to `most_degrees`."""
        angle = np.deg2rad(self.between(-most_degrees, most_degrees))
        x, y = self.x - self.between(-1, 1), self.y - self.between(-1, 1)
        return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)

    def polar(self, most_degrees: float) -> tuple[Plane, Plane]:
        """Distance and angle around the middle of an object placed somewhere near the centre."""
        x, y = self.x - self.between(-0.25, 0.25), self.y - self.between(-0.25, 0.25)
        turn = np.deg2rad(self.between(-most_degrees, most_degrees))
        return np.hypot(x, y) / self.between(0.7, 1.0), np.arctan2(y, x) + turn

    def colour(self, hue: Span, saturation: Span, value: Span) -> Colour:
        turn = self.between(*hue) % 1.0  # red is at 0, so its spans start below
        return np.array(colorsys.hsv_to_rgb(turn, self.between(*saturation), self.between(*value)))

    def clouds(self, cells: int) -> Plane:
        """Smooth noise around 0, with about `cells` bumps a side."""
        coarse = self.generator.standard_normal((cells, cells)).astype(np.float32)
        height, width = self.x.shape
        fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(fine, dtype=np.float64)


Painter = Callable[[View], Canvas]


def _inside(distance: Plane, edge: float = _EDGE) -> Plane:
    """1 where the signed distance to a border is positive, 0 where negative, soft in between."""
    return np.clip(distance / edge + 0.5, 0.0, 1.0)


def _blend(below: Colour | Canvas, above: Colour | Canvas, cover: Plane) -> Canvas:
    return below + (above - below) * cover[..., None]


def _ground(view: View, hue: Span, saturation: Span, value: Span) -> Canvas:
    """A cluttered backdrop for an object: two related colours in patches, and some stray blobs."""
    one, other = view.colour(hue, saturation, value), view.colour(hue, saturation, value)
    picture = _blend(one, other, _inside(view.clouds(4), edge=3.0))
    for _ in range(view.generator.integers(2, 6)):
        x, y, radius = view.between(-1.4, 1.4), view.between(-1.4, 1.4), view.between(0.1, 0.3)
        blob = _inside(radius - np.hypot(view.x - x, view.y - y) + 0.08 * view.clouds(6), edge=0.15)
        picture = _blend(picture, view.colour(hue, saturation, value), 0.8 * blob)
    return picture


# ---- the twelve painters: textures first, then scenes, then objects ---------------------------------


def _zebra_stripes(view: View) -> Canvas:
    across, _ = view.turned(180)
    stripes = np.sin(2 * np.pi * (view.between(1.6, 2.8) * across + 0.28 * view.clouds(4)))
    hide = view.colour((0.05, 0.14), (0.02, 0.2), (0.85, 1.0))
    return _blend(hide, view.colour((0.0, 1.0), (0.0, 0.2), (0.02, 0.15)), _inside(stripes, edge=0.5))


def _polka_dots(view: View) -> Canvas:
    across, down = view.turned(180)
    pitch = view.between(1.5, 2.4)
    across, down = across * pitch, down * pitch
    row = np.floor(down)
    offset = np.hypot((across + 0.5 * row) % 1 - 0.5, down - row - 0.5)
    cloth = view.colour((0.75, 1.0), (0.5, 0.9), (0.4, 0.95))
    dot = view.colour((0.0, 1.0), (0.0, 0.15), (0.9, 1.0))
    return _blend(cloth, dot, _inside(view.between(0.26, 0.34) - offset, edge=_EDGE * pitch))


def _checkerboard(view: View) -> Canvas:
    across, down = view.turned(45)
    pitch = np.pi * view.between(1.5, 2.4)
    squares = np.sin(across * pitch) * np.sin(down * pitch)
    dark = view.colour((0.25, 0.5), (0.4, 0.9), (0.15, 0.5))
    light = view.colour((0.12, 0.25), (0.05, 0.35), (0.85, 1.0))
    return _blend(dark, light, _inside(squares, edge=0.2))


def _honeycomb(view: View) -> Canvas:
    across, down = view.turned(30)
    pitch, step = view.between(1.6, 2.5), np.sqrt(3)
    border = np.zeros_like(across)
    for shift in (0.0, 0.5):  # the middles of the cells form two rectangular grids, one inside the other
        x = abs((across * pitch + shift) % 1 - 0.5)
        y = abs((down * pitch / step + shift) % 1 - 0.5) * step
        border = np.maximum(border, 0.5 - np.maximum(x, 0.5 * x + 0.5 * step * y))
    wax = view.colour((0.09, 0.14), (0.75, 1.0), (0.75, 1.0))
    cell = view.colour((0.05, 0.1), (0.8, 1.0), (0.25, 0.5))
    return _blend(wax, cell, _inside(border - 0.09 + 0.02 * view.clouds(5), edge=0.12))


def _brick_wall(view: View) -> Canvas:
    across, down = view.turned(8)
    pitch = view.between(2.0, 3.4)
    row = np.floor(down * pitch)
    along, within = across * pitch / 2.2 + 0.5 * row, down * pitch - row
    column = np.floor(along)
    border = np.minimum(0.5 - abs(within - 0.5), 2.2 * (0.5 - abs(along - column - 0.5)))
    shades = view.generator.uniform(0.65, 1.1, (16, 16))[row.astype(int) % 16, column.astype(int) % 16]
    brick = view.colour((0.0, 0.05), (0.55, 0.8), (0.5, 0.8)) * shades[..., None]
    mortar = view.colour((0.05, 0.15), (0.0, 0.2), (0.65, 0.9))
    return _blend(mortar, brick, _inside(border - 0.09, edge=0.1))


def _tartan(view: View) -> Canvas:
    hue, pitch = view.between(0, 1), view.between(0.7, 1.2)
    wool = view.colour((hue, hue), (0.6, 0.9), (0.35, 0.7))
    bands = [
        (0.17, 0.15, view.colour((hue + 0.3, hue + 0.6), (0.5, 0.9), (0.05, 0.25))),
        (0.6, 0.035, view.colour((0.08, 0.18), (0.3, 0.9), (0.9, 1.0))),
    ]
    picture = np.broadcast_to(wool, (*view.x.shape, 3))
    for axis in view.turned(20):
        for place, half_width, colour in bands:
            away = abs((axis * pitch - place + 0.5) % 1 - 0.5)
            picture = _blend(picture, colour, 0.65 * _inside(half_width - away))
    return picture


def _sunset(view: View) -> Canvas:
    down = view.y + view.between(-0.12, 0.12) * view.x
    horizon = view.between(0.15, 0.6)
    glow = np.clip((down + 1.2) / (horizon + 1.2), 0, 1) ** view.between(1.0, 1.8)
    dusk = view.colour((0.65, 0.9), (0.5, 0.8), (0.25, 0.5))
    fire = view.colour((0.02, 0.1), (0.75, 1.0), (0.9, 1.0))
    sky = _blend(dusk, fire, np.clip(glow + 0.07 * view.clouds(3), 0, 1))
    away = np.hypot(view.x - view.between(-0.6, 0.6), down - horizon + view.between(0.0, 0.4))
    sun = view.colour((0.12, 0.16), (0.2, 0.6), (1.0, 1.0))
    sky = _blend(sky, sun, _inside(view.between(0.18, 0.32) - away, edge=0.08))
    land = view.colour((0.6, 0.95), (0.2, 0.7), (0.03, 0.15))
    return _blend(sky, land, _inside(down - horizon + 0.05 * view.clouds(6)))


def _ocean_waves(view: View) -> Canvas:
    across, down = view.turned(12)
    swell = view.between(0.08, 0.16) * np.sin(view.between(3, 6) * across) + 0.05 * view.clouds(5)
    phase = (view.between(1.8, 3.0) * (down + swell)) % 1
    crest = np.minimum(phase, 8 * (1 - phase))  # rises slowly, breaks quickly
    deep = view.colour((0.5, 0.62), (0.7, 1.0), (0.25, 0.5))
    water = _blend(deep, view.colour((0.45, 0.55), (0.5, 0.8), (0.6, 0.9)), crest)
    foam = view.colour((0.5, 0.6), (0.0, 0.15), (0.9, 1.0))
    return _blend(water, foam, _inside(crest - 0.72 + 0.05 * view.clouds(9), edge=0.2))


def _bullseye(view: View) -> Canvas:
    radius, _ = view.polar(0)
    hue = view.between(-0.05, 0.05) + view.generator.choice([0.0, 0.62])
    rings = np.sin(np.pi * radius * view.generator.choice([4, 5, 6]))
    white = view.colour((0.1, 0.15), (0.0, 0.15), (0.9, 1.0))
    target = _blend(white, view.colour((hue, hue), (0.75, 1.0), (0.6, 0.95)), _inside(rings, edge=0.3))
    return _blend(_ground(view, (0.1, 0.35), (0.2, 0.5), (0.3, 0.7)), target, _inside(1.0 - radius))


def _starfish(view: View) -> Canvas:
    radius, angle = view.polar(180)
    spike = abs((angle * 5 / (2 * np.pi)) % 1 - 0.5) * 2  # 1 along an arm, 0 between two arms
    outline = 0.34 + 0.72 * spike**2
    skin = view.colour((-0.06, 0.07), (0.7, 0.95), (0.65, 0.95))
    arm = _blend(skin, 0.6 * skin + 0.4, _inside(0.6 * outline - radius, edge=0.5))
    sand = _ground(view, (0.09, 0.14), (0.2, 0.45), (0.7, 0.95))
    return _blend(sand, arm, _inside(outline - radius))


def _sunflower(view: View) -> Canvas:
    radius, angle = view.polar(180)
    petals = view.generator.integers(6, 10)  # |cos| doubles them
    outline = 0.72 + 0.28 * abs(np.cos(petals * angle))
    petal = view.colour((0.12, 0.155), (0.85, 1.0), (0.9, 1.0))
    flower = _blend(0.75 * petal, petal, _inside(outline - 0.15 - radius, edge=0.4))
    seeds = view.colour((0.03, 0.08), (0.6, 0.9), (0.15, 0.3))
    flower = _blend(flower, seeds, _inside(view.between(0.35, 0.45) - radius + 0.03 * view.clouds(12)))
    return _blend(_ground(view, (0.25, 0.4), (0.4, 0.8), (0.2, 0.55)), flower, _inside(outline - radius))


def _snowflake(view: View) -> Canvas:
    radius, angle = view.polar(180)
    folded = abs((angle / (np.pi / 3)) % 1 - 0.5) * np.pi / 3  # one twelfth, mirrored to the full circle
    along, aside = radius * np.cos(folded), radius * np.sin(folded)
    thickness = view.between(0.05, 0.08)
    ice = _inside(thickness - aside) * _inside(1.0 - along)
    for start in (0.35, 0.62):  # pairs of twigs, leaving the arm at 60 degrees
        reach = aside / np.sin(np.pi / 3)
        twig = _inside(0.8 * thickness - 0.8 * abs(along - start - reach / 2))
        ice = np.maximum(ice, twig * _inside(view.between(0.25, 0.38) - reach))
    night = _ground(view, (0.55, 0.7), (0.5, 0.9), (0.2, 0.6))
    return _blend(night, view.colour((0.5, 0.6), (0.0, 0.12), (0.92, 1.0)), ice)


_PAINTERS: dict[str, Painter] = {
    "zebra stripes": _zebra_stripes,
    "polka dots": _polka_dots,
    "checkerboard": _checkerboard,
    "honeycomb": _honeycomb,
    "brick wall": _brick_wall,
    "tartan": _tartan,
    "sunset": _sunset,
    "ocean waves": _ocean_waves,
    "bullseye": _bullseye,
    "starfish": _starfish,
    "sunflower": _sunflower,
    "snowflake": _snowflake,
}
CLASS_NAMES: tuple[str, ...] = tuple(_PAINTERS)


# ---- from a painting to a JPEG ---------------------------------------------------------------------


def _empty_view(generator: np.random.Generator) -> View:
    """A picture 72..200 pixels a side. Most are landscape or portrait, like photographs."""
    shorter = int(generator.integers(72, 133))
    longer = int(shorter * generator.uniform(1.0, 1.5))
    width, height = (longer, shorter) if generator.random() < 0.65 else (shorter, longer)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    half = shorter / 2
    return View(generator, (x + 0.5 - width / 2) / half, (y + 0.5 - height / 2) / half)


def _photographed(picture: Canvas, view: View) -> NDArray[np.uint8]:
    """Uneven light, exposure, a slight colour cast, some haze and sensor noise."""
    direction = view.between(0, 2 * np.pi)
    light = 1 + view.between(0, 0.25) * (view.x * np.cos(direction) + view.y * np.sin(direction))
    light = (light + 0.05 * view.clouds(3)) * view.between(0.75, 1.15)
    cast = view.generator.uniform(0.92, 1.08, 3)
    haze = view.between(0, 0.12)
    exposed = haze + (1 - haze) * picture * light[..., None] * cast
    noisy = exposed + view.between(0.005, 0.035) * view.generator.standard_normal(picture.shape)
    levels: NDArray[np.uint8] = np.rint(255 * np.clip(noisy, 0, 1)).astype(np.uint8)
    return levels


def jpeg(split: int, class_index: int, number: int) -> bytes:
    generator = np.random.default_rng([VERSION, split, class_index, number])
    view = _empty_view(generator)
    image = Image.fromarray(_photographed(_PAINTERS[CLASS_NAMES[class_index]](view), view))
    if generator.random() < _GREYSCALE_SHARE:
        image = image.convert("L")
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(generator.integers(85, 93)))
    return stream.getvalue()
