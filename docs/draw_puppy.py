"""A puppy nobody had to photograph: smooth solids, ray marched, under a coat of a hundred thousand hairs.

Head, ears and chest are one signed distance function. Every point the camera sees knows its light, its colour and
which way its fur lies; one semi-transparent stroke after another follows that, far hairs first. Eyes, nose and tongue
are bare and shaded by themselves, and a blurred meadow lies behind and in front.

So the picture needs no download and carries no licence but ours: python docs/draw_puppy.py [puppy.jpg]
"""

import sys
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

# Arrays of vectors are (3, n). Constants are single, so that an array's own precision decides: the geometry is single,
# for speed; the colours are double, so that another processor's last bit of an exponential moves no byte.
Numbers = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.int64]
Triple = tuple[float, float, float]

WIDTH, HEIGHT, SCALE = 480, 400, 2  # drawn SCALE times as large, then reduced
WIDE, TALL = WIDTH * SCALE, HEIGHT * SCALE
SEED = 20
QUALITY = 90

# Units: the skull is about 0.8 in radius and sits at the origin; x right, y up, z towards the camera.
CAMERA_DISTANCE, FOCAL_LENGTH = 8.0, 960.0 * SCALE
NEAREST, FARTHEST = CAMERA_DISTANCE - 1.7, CAMERA_DISTANCE + 1.5


# --- vectors and colours


def vector(x: float, y: float, z: float) -> Numbers:
    return np.array([[x], [y], [z]], np.float32)


def doubles(numbers: Numbers) -> Numbers:
    return numbers.astype(np.float64)


def dot(one: Numbers, other: Numbers) -> Numbers:
    return np.asarray(one[0] * other[0] + one[1] * other[1] + one[2] * other[2])


def length_of(vectors: Numbers) -> Numbers:
    return np.asarray(np.sqrt(dot(vectors, vectors) + 1e-12))


def unit(vectors: Numbers) -> Numbers:
    return np.asarray(vectors / length_of(vectors))


def mix(one: Numbers, other: Numbers, share: Numbers) -> Numbers:
    return one + (other - one) * share


def ramp(start: float, end: float, values: Numbers) -> Numbers:
    """0 at the start, 1 at the end, smooth between; the start may be the larger."""
    share = np.clip((values - start) / (end - start), 0, 1)
    return np.asarray(share * share * (3 - 2 * share))


def hill(values: Numbers) -> Numbers:
    return np.exp(-values * values)


def ink(red: int, green: int, blue: int) -> Numbers:
    """A colour as a paint program names it, in linear light."""
    return np.asarray((vector(red, green, blue).astype(np.float64) / 255) ** 2.2)


def developed(light: Numbers) -> Numbers:
    """Linear light -> display values up to 255, through the shoulder of a film curve."""
    exposed = np.clip(light, 0, None) * 0.98
    filmed = exposed * (2.51 * exposed + 0.03) / (exposed * (2.43 * exposed + 0.59) + 0.14)
    return 255 * np.clip(filmed, 0, 1) ** (1 / 2.2)


def rotation(pitch: float, yaw: float, roll: float) -> Numbers:
    about_x = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    about_y = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    about_z = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x, np.float32)


def turned(matrix: Numbers, vectors: Numbers) -> Numbers:
    return np.stack([row[0] * vectors[0] + row[1] * vectors[1] + row[2] * vectors[2] for row in matrix])


CAMERA = vector(0.03, -0.34, CAMERA_DISTANCE)
HEAD_POSE = rotation(0.05, 0.20, -0.10)  # looking a little aside, and tilted: nobody believes a symmetric dog
EAR_POSE = rotation(0.10, 0.80, 0.08)

TO_SUN = unit(vector(-0.66, 0.59, 0.46))
TO_RIM = unit(vector(0.75, 0.45, -0.48))
SUN = vector(1.0, 0.90, 0.74) * 1.55
SKY = vector(0.62, 0.74, 0.92) * 0.30
MEADOW = vector(0.46, 0.46, 0.28) * 0.30
RIM = vector(1.0, 0.93, 0.78) * 0.9

GOLD, CREAM, RUST = ink(210, 150, 92), ink(240, 209, 170), ink(172, 108, 60)
SKIN, SHADE = ink(40, 26, 22), ink(96, 60, 34)

EYE_RADIUS, EYE_PLACE = 0.140, (0.372, 0.055, 0.80)


# --- solids: signed distances, negative inside


def ellipsoid(point: Numbers, center: Triple, radii: Triple) -> Numbers:
    scaled = (point - vector(*center)) / vector(*radii)
    reach = length_of(scaled)
    return reach * (reach - 1) / length_of(scaled / vector(*radii))


def capsule(point: Numbers, start: Triple, end: Triple, start_radius: float, end_radius: float) -> Numbers:
    axis, offset = vector(*end) - vector(*start), point - vector(*start)
    along = np.clip(dot(offset, axis) / dot(axis, axis), 0, 1)
    return length_of(offset - axis * along) - (start_radius + (end_radius - start_radius) * along)


def joined(one: Numbers, other: Numbers, softness: float) -> Numbers:
    overlap = np.maximum(softness - np.abs(one - other), 0) / softness
    return np.minimum(one, other) - overlap * overlap * softness / 4


def carved(solid: Numbers, tool: Numbers, softness: float) -> Numbers:
    return -joined(-solid, tool, softness)


def to_head(point: Numbers) -> Numbers:
    return turned(HEAD_POSE.T, point)


def mirrored(point: Numbers) -> Numbers:
    """Both sides onto the right one, so that a pair costs one solid."""
    return np.stack([np.abs(point[0]), point[1], point[2]])


def skull(point: Numbers) -> Numbers:
    dome = ellipsoid(point, (0, 0.16, -0.05), (0.84, 0.78, 0.82))
    cheek = ellipsoid(point, (0.44, -0.24, 0.10), (0.46, 0.44, 0.48))
    brow = ellipsoid(point, (0.30, 0.34, 0.56), (0.24, 0.17, 0.20))
    bridge = capsule(point, (0, 0.00, 0.55), (0, -0.20, 1.18), 0.27, 0.23)
    furrow = capsule(point, (0, 0.75, 0.80), (0, 0.25, 0.92), 0.05, 0.06)
    socket = ellipsoid(point, (0.36, 0.06, 0.89), (0.15, 0.12, 0.13))
    whole = joined(joined(joined(dome, cheek, 0.35), brow, 0.25), bridge, 0.28)
    return carved(carved(whole, furrow, 0.22), socket, 0.16)


def muzzle(point: Numbers) -> Numbers:
    lip = ellipsoid(point, (0.16, -0.42, 0.94), (0.27, 0.25, 0.44))
    return joined(lip, capsule(point, (0, -0.16, 0.6), (0, -0.22, 1.16), 0.28, 0.21), 0.16)


def chin(point: Numbers) -> Numbers:
    return capsule(point, (0, -0.56, 0.35), (0, -0.76, 0.98), 0.28, 0.15)


def face(point: Numbers) -> Numbers:
    return joined(joined(skull(point), muzzle(point), 0.20), chin(point), 0.04)


def ear(point: Numbers) -> Numbers:
    hung = turned(EAR_POSE.T, point - vector(0.80, 0.40, 0.06))
    flap = ellipsoid(hung, (0.10, -0.50, 0.06), (0.34, 0.56, 0.11))
    tip = ellipsoid(hung, (0.04, -0.88, 0.10), (0.20, 0.26, 0.09))
    base = ellipsoid(hung, (-0.06, -0.08, -0.02), (0.28, 0.24, 0.16))
    return joined(joined(flap, tip, 0.2), base, 0.25)


def nostril(point: Numbers) -> Numbers:
    return ellipsoid(point, (0.095, -0.225, 1.49), (0.046, 0.034, 0.07))


def nose(point: Numbers) -> Numbers:
    top = ellipsoid(point, (0, -0.20, 1.36), (0.195, 0.115, 0.13))
    foot = ellipsoid(point, (0, -0.28, 1.36), (0.10, 0.09, 0.11))
    wing = ellipsoid(point, (0.115, -0.22, 1.35), (0.09, 0.09, 0.11))
    slit = capsule(point, (0.12, -0.225, 1.48), (0.19, -0.27, 1.43), 0.012, 0.008)
    groove = capsule(point, (0, -0.22, 1.52), (0, -0.42, 1.47), 0.008, 0.008)
    whole = joined(joined(top, foot, 0.10), wing, 0.06)
    return carved(carved(carved(whole, nostril(point), 0.03), slit, 0.03), groove, 0.05)


def tongue(point: Numbers) -> Numbers:
    root = capsule(point, (0.04, -0.64, 0.80), (0.04, -0.72, 1.12), 0.10, 0.09)
    tip = ellipsoid(point, (0.02, -0.83, 1.15), (0.15, 0.19, 0.07))
    groove = capsule(point, (0, -0.68, 1.25), (0, -0.93, 1.235), 0.006, 0.004)
    return carved(joined(root, tip, 0.06), groove, 0.06)


def body(point: Numbers) -> Numbers:
    neck = capsule(point, (0, -0.4, -0.40), (0, -1.3, -0.35), 0.74, 0.88)
    chest = ellipsoid(point, (0, -1.35, 0.0), (0.66, 0.85, 0.62))
    leg = capsule(point, (0.60, -1.5, -0.3), (0.70, -3.2, -0.05), 0.50, 0.34)
    return joined(joined(neck, chest, 0.4), leg, 0.3)


class Part(IntEnum):
    """The rows of solids()."""

    HEAD, EAR, BODY, NOSE, TONGUE = range(5)


def solids(point: Numbers) -> Numbers:
    head = mirrored(to_head(point))
    return np.stack([face(head), ear(head), body(mirrored(point)), nose(head), tongue(head)])


def distance(point: Numbers) -> Numbers:
    each = solids(point)
    furry = joined(joined(each[Part.HEAD], each[Part.EAR], 0.03), each[Part.BODY], 0.12)
    return np.asarray(np.minimum(furry, np.minimum(each[Part.NOSE], each[Part.TONGUE])))


# --- seeing: where each pixel's ray ends, and what is known there


@dataclass
class Surface:
    """The visible points, one a pixel that the puppy covers."""

    pixel: Indices  # in the canvas, row by row
    depth: Numbers  # along the ray
    point: Numbers
    head: Numbers  # the same point, seen from the head
    normal: Numbers
    part: Indices
    ear: Numbers  # share of ear, 0 to 1: colours and fur must not jump at its root
    lip: Numbers  # share of bare lip
    sunlit: Numbers
    openness: Numbers  # share of the surroundings that is not puppy

    def view(self) -> Numbers:
        return unit(self.point - CAMERA)

    def glance(self, normal: Numbers) -> Numbers:
        """How squarely the sun is mirrored into the camera."""
        return np.clip(dot(normal, unit(TO_SUN - self.view())), 0, 1)


def rays() -> Numbers:
    row, column = np.divmod(np.arange(TALL * WIDE), WIDE)
    right, down = column + 0.5 - WIDE / 2, row + 0.5 - TALL / 2
    return unit(np.stack([right, -down, np.full(right.size, -FOCAL_LENGTH)]).astype(np.float32))


def projected(point: Numbers) -> Numbers:
    """Points -> canvas positions, (2, n)."""
    offset = point - CAMERA
    scale = -FOCAL_LENGTH / offset[2]
    return np.stack([WIDE / 2 + offset[0] * scale, TALL / 2 - offset[1] * scale])


def marched(directions: Numbers) -> Numbers:
    """How far each ray gets; beyond FARTHEST it meets nothing."""
    depth = np.full(directions.shape[1], NEAREST, np.float32)
    moving = np.arange(depth.size)
    for _ in range(40):
        step = distance(CAMERA + directions[:, moving] * depth[moving])
        depth[moving] += 0.9 * step
        moving = moving[(step > 0.002) & (depth[moving] < FARTHEST)]
    return depth


def normals(point: Numbers) -> Numbers:
    total = np.zeros_like(point)
    for corner in (vector(1, 1, 1), vector(1, -1, -1), vector(-1, 1, -1), vector(-1, -1, 1)):
        total += corner * distance(point + corner * 0.006)
    return unit(total)


def openness(point: Numbers, normal: Numbers) -> Numbers:
    reaches = (0.06, 0.14, 0.28, 0.5)
    free = [np.clip(distance(point + normal * reach) / reach, 0, 1) for reach in reaches]
    return np.asarray(np.mean(free, axis=0))


def sunlight(point: Numbers, normal: Numbers) -> Numbers:
    """1 in the sun, 0 in shadow: the nearest miss on the way to the sun decides, which makes the edge soft."""
    lit, travelled = np.ones_like(point[0]), np.full_like(point[0], 0.05)
    start = point + normal * 0.03
    for _ in range(18):
        miss = distance(start + TO_SUN * travelled)
        lit = np.minimum(lit, np.clip(0.5 + 0.5 * miss / (0.16 * travelled), 0, 1))
        travelled += np.clip(miss, 0.03, 0.2)
    return ramp(0, 1, lit)


def lip_share(head: Numbers, normal: Numbers) -> Numbers:
    """The dark skin between muzzle and chin, and the edge that the upper lip turns down."""
    upper, lower = muzzle(mirrored(head)), chin(mirrored(head))
    gap = np.abs(upper - lower + 0.01) + 0.3 * np.maximum(np.minimum(upper, lower), 0)
    edge = ramp(-0.74, -0.96, turned(HEAD_POSE.T, normal)[1]) * ramp(0.10, 0.02, upper)
    return np.maximum(ramp(0.10, 0.05, gap), edge) * ramp(0.40, 0.60, head[2]) * ramp(-0.40, -0.46, head[1])


def seen() -> Surface:
    directions = rays()
    depth = marched(directions)
    pixel = np.nonzero(depth < FARTHEST)[0]
    point = CAMERA + directions[:, pixel] * depth[pixel]
    head, normal, each = to_head(point), normals(point), solids(point)
    ear_share = ramp(-0.02, 0.07, each[Part.HEAD] - each[Part.EAR]) * ramp(-0.02, 0.1, each[Part.BODY] - each[Part.EAR])
    # Through a nostril the ray reaches the muzzle behind the nose, which must not show as fur.
    each[Part.NOSE] = np.minimum(each[Part.NOSE] - 0.008, nostril(mirrored(head)) - 0.05)
    return Surface(
        pixel=pixel,
        depth=doubles(depth[pixel]),
        point=doubles(point),
        head=doubles(head),
        normal=doubles(normal),
        part=np.argmin(each, axis=0),
        ear=doubles(ear_share),
        lip=doubles(lip_share(head, normal)),
        sunlit=doubles(sunlight(point, normal)),
        openness=doubles(openness(point, normal)),
    )


def lighting(surface: Surface, normal: Numbers) -> Numbers:
    """Sun from the upper left, sky above, meadow below, and a low light from behind that rims the right side."""
    sun = np.clip(0.85 * dot(normal, TO_SUN) + 0.15, 0, 1) * surface.sunlit
    around = mix(MEADOW, SKY, 0.5 * normal[1] + 0.5) * (0.12 + 0.88 * surface.openness**1.3)
    rim = np.clip(dot(normal, TO_RIM), 0, 1) ** 1.5 * surface.openness
    return np.asarray(SUN * sun + around + RIM * rim)


# --- the canvas


def noise(random: np.random.Generator, cell: int) -> Numbers:
    """Smooth noise over the canvas, one value a pixel; features are `cell` canvas pixels large."""
    coarse = random.standard_normal((TALL // cell + 2, WIDE // cell + 2)).astype(np.float32)
    smooth = Image.fromarray(coarse).resize((WIDE, TALL), Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float64).ravel()


def blurred(image: Image.Image, radius: float) -> Image.Image:
    """Radius in pixels of the finished picture."""
    return image.filter(ImageFilter.GaussianBlur(radius * SCALE))


def image_of(colours: Numbers) -> Image.Image:
    """Display values for every canvas pixel, (3, n) or (n,) -> an image."""
    shape = (TALL, WIDE, 3) if colours.ndim == 2 else (TALL, WIDE)
    return Image.fromarray(np.clip(colours.T.reshape(shape), 0, 255).astype(np.uint8))


def painted(canvas: Image.Image, surface: Surface, colours: Numbers, opacity: Numbers) -> None:
    """Lay colours over the pixels of the surface."""
    layer, mask = np.zeros((3, TALL * WIDE)), np.zeros(TALL * WIDE)
    layer[:, surface.pixel], mask[surface.pixel] = colours, 255 * opacity
    canvas.paste(image_of(layer), (0, 0), blurred(image_of(mask), 0.6))


# --- fur


def bump(head: Numbers, center: Triple, size: float) -> Numbers:
    """1 at a place of the head, fading with the distance."""
    return hill(length_of(head - vector(*center)) / size)


def eye_position(head: Numbers) -> tuple[Numbers, Numbers]:
    """Outwards and upwards from the center of the nearer eye, in its radii; the outer corner hangs a little."""
    outwards = (np.abs(head[0]) - EYE_PLACE[0]) / EYE_RADIUS
    return outwards, (head[1] - EYE_PLACE[1]) / EYE_RADIUS + 0.10 * outwards


def eye_reach(head: Numbers) -> Numbers:
    """An almond around each eye: below 1 between the lids, growing outside."""
    outwards, upwards = eye_position(head)
    height = np.where(upwards > 0, 0.86, 0.80)
    reach = np.sqrt(np.abs(outwards / 1.16) ** 1.6 + (upwards / height) ** 2)
    return np.where(head[2] > 0.3, reach, 9.0)


def fur_colour(surface: Surface) -> Numbers:
    half = mirrored(surface.head)
    pale = bump(half, (0.12, -0.45, 1.0), 0.42) + 0.6 * bump(half, (0.26, 0.30, 0.75), 0.15)
    pale += 0.55 * bump(half, (0, 0.15, 0.85), 0.25) + 0.5 * bump(half, (0.5, -0.4, 0.4), 0.35)
    pale = 0.85 * np.clip(pale, 0, 1)
    pale = np.where(surface.part == Part.BODY, 0.85 * pale + 0.5 * hill(surface.point[0] / 0.5), pale)
    colour = mix(mix(GOLD, CREAM, pale), RUST, (0.55 + 0.2 * ramp(0.2, -0.6, surface.head[1])) * surface.ear)
    fold = 4 * surface.ear * (1 - surface.ear) * ramp(0.4, 0.1, surface.head[1])
    colour = mix(colour, SHADE, 0.45 * fold)
    colour = mix(colour, SHADE, 0.34 * hill((eye_reach(surface.head) - 1) / 0.42))
    return mix(colour, SKIN, 0.85 * surface.lip)


def fur_flow(surface: Surface) -> Numbers:
    """Which way the hair lies: away from nose and eyes on the face, down on ears and chest."""
    head = surface.head
    on_face = unit(head - vector(0, -0.12, 1.25)) + vector(0, -0.25, 0)
    for side in (-1, 1):
        eye = (side * EYE_PLACE[0], *EYE_PLACE[1:])
        on_face = on_face + 0.8 * unit(head - vector(*eye)) * bump(head, eye, 0.28)
    flat = np.ones_like(head[0])
    on_ear = np.stack([0.25 * np.sign(head[0]), -flat, 0.1 * flat])
    on_body = np.stack([0.25 * surface.point[0], -flat, 0.15 * flat])
    on_head = turned(HEAD_POSE, mix(unit(on_face), unit(on_ear), surface.ear))
    flow = np.where(surface.part == Part.BODY, on_body, on_head)
    return unit(flow - surface.normal * dot(flow, surface.normal))


def fur_length(surface: Surface) -> Numbers:
    from_nose = length_of(surface.head - vector(0, -0.2, 1.2))
    on_face = 0.035 + 0.13 * ramp(0.3, 1.4, from_nose) + 0.07 * ramp(0.55, 0.95, surface.head[1])
    return np.where(surface.part == Part.BODY, 0.26, mix(on_face, np.full(1, 0.18), surface.ear))


def rooted(surface: Surface, random: np.random.Generator) -> Indices:
    """The points that grow a hair, far ones first: nearer hair lies over them."""
    furry = (surface.part <= Part.BODY) & (eye_reach(surface.head) > 1.15)
    density = 0.42 * (1 - 0.8 * surface.lip)
    chosen = np.nonzero(furry & (random.random(surface.pixel.size) < density))[0]
    return chosen[np.argsort(-surface.depth[chosen], kind="stable")]


def scattered(random: np.random.Generator, count: int, middle: float, spread: float) -> Numbers:
    return middle + spread * np.clip(random.standard_normal(count), -2, 2)


def hair_knots(surface: Surface, roots: Indices, flow: Numbers, random: np.random.Generator) -> Numbers:
    """Four canvas positions a hair, (hair, knot, 2): neighbours bend alike, which makes locks, and tips hang."""
    normal = surface.normal[:, roots]
    aside = np.cross(normal, flow, axis=0)
    lock, tuft = (noise(random, cell * SCALE)[surface.pixel[roots]] for cell in (5, 16))
    direction = unit(flow + aside * (0.34 * lock + 0.28 * tuft + scattered(random, roots.size, 0, 0.18)))
    reach = fur_length(surface)[roots] * scattered(random, roots.size, 1, 0.3)
    lift = np.maximum(scattered(random, roots.size, 0.35, 0.15), 0.05)
    curl = 0.5 * (0.3 * lock + scattered(random, roots.size, 0, 0.25))
    knots = []
    for along in (0, 1 / 3, 2 / 3, 1):
        raised = normal * lift * along * (1 - along / 2)
        drooped = (aside * curl - vector(0, 0.25, 0)) * along**2
        knots.append(projected(surface.point[:, roots] + reach * (direction * along + raised + drooped)))
    return np.stack(knots).transpose(2, 0, 1)


def hair_inks(surface: Surface, roots: Indices, colour: Numbers, flow: Numbers, random: np.random.Generator) -> Indices:
    """Three display colours a hair, (hair, piece, 3): dark at the root, light and a little glossy at the tip."""
    uneven = (0.20 + 0.6 * fur_length(surface)[roots]) * scattered(random, roots.size, 0, 1)
    uneven += 0.18 * noise(random, 4 * SCALE)[surface.pixel[roots]]
    lit = (colour * lighting(surface, surface.normal))[:, roots] * np.exp(uneven)
    across = dot(flow, unit(TO_SUN - surface.view()[:, roots]))
    facing = np.clip(dot(surface.normal[:, roots], TO_SUN) + 0.3, 0, 1)
    gloss = vector(1, 0.92, 0.8) * np.clip(1 - across**2, 0, 1) ** 12 * facing * surface.sunlit[roots]
    pieces = [developed(lit * bright + gloss * shine) for bright, shine in ((0.62, 0), (1.0, 0.06), (1.2, 0.14))]
    return np.stack(pieces).transpose(2, 0, 1).astype(np.int64)


def stroked(canvas: Image.Image, knots: Numbers, inks: Indices) -> None:
    draw = ImageDraw.Draw(canvas, "RGBA")
    pieces = ((0, 120, 2), (1, 190, 2), (2, 120, 1))  # opacity and width: full in the middle, thin at the tip
    for hair, shades in zip(knots.tolist(), inks.tolist(), strict=True):
        for piece, opacity, width in pieces:
            draw.line([*hair[piece], *hair[piece + 1]], (*shades[piece], opacity), width)


def draw_fur(canvas: Image.Image, surface: Surface, random: np.random.Generator) -> None:
    """Undercoat, then the hairs behind the tongue, the tongue, and the hairs before it."""
    colour = fur_colour(surface)
    undercoat = developed(0.45 * colour * lighting(surface, surface.normal))
    painted(canvas, surface, undercoat, np.ones(surface.pixel.size))
    roots = rooted(surface, random)
    flow = fur_flow(surface)[:, roots]
    knots = hair_knots(surface, roots, flow, random)
    inks = hair_inks(surface, roots, colour, flow, random)
    is_tongue = surface.part == Part.TONGUE
    behind = int(np.sum(surface.depth[roots] > surface.depth[is_tongue].min()))
    stroked(canvas, knots[:behind], inks[:behind])
    painted(canvas, surface, tongue_colour(surface, random), is_tongue.astype(np.float64))
    stroked(canvas, knots[behind:], inks[behind:])


def draw_whiskers(canvas: Image.Image, random: np.random.Generator) -> None:
    draw = ImageDraw.Draw(canvas, "RGBA")
    along = np.linspace(0, 1, 9)
    for side in (-1, 1) * 11:
        root = vector(side * random.uniform(0.26, 0.38), random.uniform(-0.50, -0.30), random.uniform(1.0, 1.2))
        aim = vector(side * random.uniform(0.45, 0.75), random.uniform(-0.25, 0.12), random.uniform(-0.15, 0.1))
        knots = projected(turned(HEAD_POSE, root + aim * along - vector(0, 0.22, 0) * along**2)).T.tolist()
        for piece in range(8):
            draw.line([*knots[piece], *knots[piece + 1]], (250, 240, 220, 95 - 9 * piece), 1)


# --- what is bare


def tongue_colour(surface: Surface, random: np.random.Generator) -> Numbers:
    uneven = np.exp(0.05 * noise(random, 3)[surface.pixel])
    wet = 0.35 * surface.glance(surface.normal) ** 40 * uneven**4
    deep = mix(ink(150, 58, 64), ink(232, 128, 128), ramp(-0.62, -0.78, surface.head[1]))
    return developed(deep * uneven * lighting(surface, surface.normal) + wet)


def nose_colour(surface: Surface, random: np.random.Generator) -> Numbers:
    """Wet leather: grainy, nearly black, the sky on its top and the sun on its left."""
    grain = np.stack([noise(random, 3)[surface.pixel] for _ in range(3)])
    normal = unit(surface.normal + 0.05 * grain)
    glance = surface.glance(normal)
    sun = vector(1, 0.97, 0.92) * (0.20 * glance**14 + 0.55 * glance**90) * surface.sunlit
    sky = vector(0.8, 0.88, 1.0) * 0.12 * ramp(0.1, 0.95, normal[1]) * surface.openness
    leather = ink(44, 34, 32) * np.exp(0.12 * grain[0]) * lighting(surface, normal)
    inside = ramp(0.022, -0.012, nostril(mirrored(surface.head)))
    return developed((leather + sky + sun) * ramp(0.15, 0.6, surface.openness) * (1 - 0.95 * inside))


def mirrored_world(direction: Numbers) -> Numbers:
    """What a wet eye mirrors: dark grass, pale sky, the sun's soft window."""
    sky = mix(vector(0.03, 0.04, 0.02), vector(0.55, 0.68, 0.85), ramp(-0.1, 0.7, direction[1]))
    return sky + vector(11, 10.7, 9.9) * ramp(0.90, 0.955, dot(direction, unit(vector(-0.45, 0.62, 0.62))))


def iris_colour(outwards: Numbers, upwards: Numbers, side: Numbers) -> Numbers:
    """Pupil and iris, turned towards the camera; light that enters above leaves the iris at the far side below."""
    gaze = turned(HEAD_POSE.T, vector(0, 0.05, 1))
    right, above = side * outwards - 0.6 * gaze[0], upwards - 0.6 * gaze[1]
    radius = np.hypot(right, above)
    iris = mix(ink(26, 16, 10), ink(80, 52, 33), np.clip(0.35 - 0.7 * above + 0.45 * right, 0, 1))
    return mix(mix(ink(5, 4, 4), iris, ramp(0.42, 0.62, radius)), ink(10, 7, 6), ramp(0.80, 1.0, radius))


def eye_colour(surface: Surface) -> Numbers:
    """An eyeball drawn where the lids open: iris, mirrored world, the upper lid's shadow, dark rims."""
    outwards, upwards = eye_position(surface.head)
    reach, side = eye_reach(surface.head), np.sign(surface.head[0])
    forwards = np.sqrt(np.clip(1 - (outwards**2 + upwards**2) / 1.35, 0.02, 1))
    normal = unit(turned(HEAD_POSE, np.stack([side * outwards / 1.16, upwards / 1.16, forwards])))
    view = surface.view()
    mirror = mirrored_world(view - 2 * normal * dot(view, normal)) * (0.07 + 0.35 * (1 - forwards) ** 3)
    under_lid = ramp(0.95, 0.35, upwards)
    ball = iris_colour(outwards, upwards, side) * (0.25 + 0.75 * under_lid) + mirror * (0.2 + 0.8 * under_lid)
    tear = 0.11 * hill((reach - 1) / 0.05) * ramp(-0.3, -0.7, upwards)
    return developed(mix(ball, ink(14, 10, 9), ramp(0.88, 1.0, reach)) + tear)


def eye_opacity(surface: Surface, random: np.random.Generator) -> Numbers:
    """Full inside the lids; the rim frays into the fur."""
    return ramp(1.20, 1.04, eye_reach(surface.head) + 0.02 * noise(random, 3)[surface.pixel])


# --- the meadow


def background(random: np.random.Generator) -> Image.Image:
    row, column = np.divmod(np.arange(TALL * WIDE), WIDE)
    down, right = row / TALL, column / WIDE
    fall = down + 0.03 * noise(random, 80 * SCALE)
    trees = mix(ink(88, 112, 70), ink(128, 156, 84), ramp(0.0, 0.5, fall))
    colours = mix(trees, ink(92, 126, 52), ramp(0.5, 0.95, fall))
    uneven = 0.40 * noise(random, 46 * SCALE) * (1 - down) + 0.12 * noise(random, 14 * SCALE)
    haze = vector(1, 0.92, 0.62) * 0.30 * hill(np.hypot(right + 0.05, down + 0.1) / 0.55)
    display = 255 * np.clip(colours * np.exp(uneven) + haze, 0, 1) ** (1 / 2.2)
    image = blurred(image_of(display), 6)
    draw_lights(image, random)
    return blurred(image, 1.6)


def draw_lights(image: Image.Image, random: np.random.Generator) -> None:
    """Sunny leaves, so far out of focus that each is a disc."""
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(60):
        x, y = random.uniform(0, WIDE), random.triangular(-0.1, 0.1, 0.6) * TALL
        radius, warmth = random.uniform(7, 20) * SCALE, random.random()
        shade = (int(225 + 25 * warmth), int(240 - 10 * warmth), int(180 - 40 * warmth), int(random.uniform(10, 60)))
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], shade)


def blade(x: float, reach: float, lean: float, breadth: float) -> list[float]:
    """The outline of one blade of grass that stands on the lower border."""
    elbow_x, elbow_y = x + 0.35 * lean, TALL - 0.6 * reach
    outline = [(x - breadth, TALL), (elbow_x - 0.6 * breadth, elbow_y), (x + lean, TALL - reach)]
    outline += [(elbow_x + 0.6 * breadth, elbow_y), (x + breadth, TALL)]
    return [coordinate for corner in outline for coordinate in corner]


def draw_grass(canvas: Image.Image, random: np.random.Generator) -> None:
    """Blades before the puppy, too near to be sharp, higher towards the sides."""
    layer = Image.new("RGBA", canvas.size, (96, 134, 52, 0))
    draw = ImageDraw.Draw(layer)
    for _ in range(170):
        x = random.uniform(-0.05, 1.05) * WIDE
        reach = TALL * (0.06 + 0.24 * abs(x / WIDE - 0.5)) * random.uniform(0.3, 1.3)
        outline = blade(x, reach, random.normal(0, 0.3) * reach, random.uniform(1.5, 4) * SCALE)
        bright = random.uniform(0.6, 1.3)
        draw.polygon(outline, (int(104 * bright), int(146 * bright), int(54 * bright), 230))
    layer = blurred(layer, 3.2)
    canvas.paste(layer.convert("RGB"), (0, 0), layer.getchannel("A"))


# --- the photograph


def soften_far(canvas: Image.Image, surface: Surface) -> None:
    """The lens is focused on the face; the chest and the back of the ears are a little behind."""
    mask = np.zeros(TALL * WIDE)
    mask[surface.pixel] = 255 * ramp(0.25, -0.5, surface.point[2])
    canvas.paste(blurred(canvas, 1), (0, 0), blurred(image_of(mask), 3))


def photographed(canvas: Image.Image, random: np.random.Generator) -> Image.Image:
    """Reduced, with what a lens and a sensor add: a glow, darker corners, grain."""
    small = canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    sharp, glow = (np.asarray(image, np.float64) for image in (small, small.filter(ImageFilter.GaussianBlur(12))))
    screened = 255 - (255 - sharp) * (1 - 0.10 * glow / 255)
    across, down = np.linspace(-1, 1, WIDTH)[None, :, None], np.linspace(-1, 1, HEIGHT)[:, None, None]
    grained = screened * (1 - 0.10 * (across**2 + down**2) ** 1.2) + random.normal(0, 1.6, (HEIGHT, WIDTH, 1))
    return Image.fromarray(np.clip(grained, 0, 255).astype(np.uint8))


def puppy() -> Image.Image:
    random = np.random.default_rng(SEED)
    canvas, surface = background(random), seen()
    draw_fur(canvas, surface, random)
    painted(canvas, surface, eye_colour(surface), eye_opacity(surface, random))
    painted(canvas, surface, nose_colour(surface, random), (surface.part == Part.NOSE).astype(np.float64))
    soften_far(canvas, surface)
    draw_whiskers(canvas, random)
    draw_grass(canvas, random)
    return photographed(canvas, random)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "puppy.jpg"
    puppy().save(target, "JPEG", quality=QUALITY)
