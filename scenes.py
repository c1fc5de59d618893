"""Procedural aerial scenes: pictures, captions, questions and region masks that need no download.

A scene is named "scene:SPLIT/SEED/INDEX/SIZE" and made in two steps. The *layout* says what is where, in units of the
image side, and takes well under a millisecond; every caption and every answer comes from it alone, so records() never
draws a pixel and a scene reads the same at any size. The *rendering* turns a layout into pixels, boxes and masks.
The split is part of the random key: no two splits share a scene. The classes are drawn before the ground they stand
on, so each class is equally frequent whatever the land cover is, and a yes/no question tells nothing by its text.

    python scenes.py --out DIR --split test -n 20 --size 256        # PNGs, scenes.jsonl and sheet.png
"""
import argparse
import json
import math
import os
import re
from collections import namedtuple
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SPLITS = ("train", "val", "test")
CLASSES = ("storage tank", "building", "plane", "ship", "vehicle")
COLORS = {"white": (240, 240, 236), "gray": (140, 141, 145), "red": (190, 45, 38), "blue": (36, 92, 212),
          "yellow": (232, 196, 40), "green": (25, 150, 85), "black": (32, 32, 36)}
PALETTES = {"storage tank": ("white", "red", "blue", "yellow", "green"),
            "building": ("white", "gray", "red", "blue", "yellow"),
            "plane": ("white", "gray", "red", "blue"), "ship": ("white", "gray", "red", "yellow", "black"),
            "vehicle": ("white", "red", "blue", "yellow", "black")}
GROUNDS = {"grass": (96, 126, 66), "farmland": (134, 132, 78), "forest": (50, 78, 42), "sand": (206, 182, 138),
           "water": (46, 82, 112), "concrete": (172, 170, 163), "asphalt": (97, 97, 102), "suburb": (118, 138, 90),
           "road": (96, 95, 94)}
URBAN = ("concrete", "asphalt", "suburb")
CONTRAST = 78                      # least distance in RGB between an object's color and the ground below it
STREETS = 0.3                      # from one street of a suburb to the next, in image sides

# One preposition a ground and a feature, not "on" and "near" for all: words that fit every picture are cheap to guess.
PLACES = {"grass": "amid grass", "farmland": "across farmland", "forest": "inside forest", "sand": "over sand",
          "water": "in water", "concrete": "on concrete", "asphalt": "atop asphalt", "suburb": "within suburb"}
NEAR = {"river": "near river", "lake": "by lake", "road": "beside road", "runway": "along runway",
        "lawn": "next to lawn", "beach": "off beach", "island": "around island"}
AFLOAT = {"river": "on river", "lake": "in lake"}
VERBS = {"storage tank": "standing", "building": "standing", "plane": "parked", "ship": "sailing", "vehicle": "parked"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
CAPTION_PROMPTS = ("Describe the image in one sentence.", "Write a one-sentence caption.",
                   "What does the image show? Answer in one sentence.", "Caption the image in one sentence.")
SHORT = "Answer the question using a single word or phrase."
WORDINGS = {
    "presence": ("Is there a {one}?", "Are there any {many}?"),
    "count": ("How many {many} are there?", "How many {many} are in the image?"),
    "more": ("Are there more {a} than {b}?", "Do {a} outnumber {b}?"),
    "fewer": ("Are there fewer {a} than {b}?",),
    "land cover": ("What is the land cover?", "What is the main land cover?"),
    "area": ("Is it a rural or an urban area?", "Is the area rural or urban?"),
    "position one": ("Where is the {one}?", "In which part of the image is the {one}?"),
    "position many": ("Where are the {many}?", "In which part of the image are the {many}?"),
    "color one": ("What color is the {one}?", "What is the color of the {one}?"),
    "color many": ("What color are the {many}?", "What is the color of the {many}?"),
}
REGION_WORDINGS = {                          # {a} and {b} are the regions asked about
    "region class": ("What is {a}?", "What kind of object is {a}?", "Name the object in {a}.",
                     "Which class does {a} belong to?"),
    "region color": ("What color is {a}?", "Which color does {a} have?"),
    "region position": ("Where in the image is {a}?", "In which part of the image does {a} lie?"),
    "region presence": ("Is {a} a {one}?", "Does {a} show a {one}?"),
    "region count": ("How many objects of the same kind as {a} are there?",
                     "How often does the kind of object in {a} occur?"),
    "region comparison": ("Are {a} and {b} of the same kind?", "Do {a} and {b} show the same kind of object?"),
    "region caption": ("Describe {a}.", "Write a short description of {a}."),
}


@dataclass
class Object:
    name: str
    color: str
    box: tuple          # x0, y0, x1, y1 in pixels, half-open
    mask: np.ndarray    # (H, W) bool


@dataclass
class Scene:
    image: np.ndarray   # (H, W, 3) uint8
    cover: str
    feature: str        # or None
    objects: list
    split: str
    seed: int
    index: int
    size: int


# An object of the layout: centre, length, width and circumscribed radius in image sides, heading in radians.
Item = namedtuple("Item", "name color x y angle length width radius variant")
Layout = namedtuple("Layout", "cover feature angle items")         # angle: of fields, slabs and streets
Key = namedtuple("Key", "split seed index size")                    # what names a scene; enough for every text about it


class Feature(namedtuple("Feature", "kind angle x y half wave frequency phase")):
    """A river, road or runway is a band, a lake or island a blob, a beach a half plane; the rest of it is numbers."""

    def depth(self, x, y):
        """How far (x, y) lies inside, in image sides; negative outside. Floats or arrays."""
        x, y = x - self.x, y - self.y
        if self.kind in ("lake", "island"):
            turn = np.arctan2(y, x)
            bumps = np.sin(3 * turn + self.phase) + 0.8 * np.sin(2 * turn - 2 * self.phase)
            return self.half * (1 + self.wave * bumps) - np.sqrt(x * x + y * y)
        c, s = math.cos(self.angle), math.sin(self.angle)
        across = c * y - s * x
        if self.wave:
            across = across - self.wave * np.sin(self.frequency * (c * x + s * y) + self.phase)
        return across if self.kind == "beach" else self.half - abs(across)


# ---- layout: what is where ------------------------------------------------------------------------------------------

def scene_rng(scene, stream):
    """Streams: 0 layout, 1 pixels, 2 questions, 3 captions, 4 chat; so no part's draws change another's."""
    return np.random.default_rng([scene.seed, SPLITS.index(scene.split), scene.index, stream])


@lru_cache(maxsize=2048)
def layout(split, index, seed):
    """The layout of one scene. Classes are fixed first; ground and places are drawn again until every class has one."""
    rng = scene_rng(Key(split, seed, index, None), 0)
    kinds = (1, 2, 3)[int(np.searchsorted((0.4, 0.8), rng.random()))]
    names = [CLASSES[i] for i in rng.permutation(len(CLASSES))[:kinds]]
    most = (5, 4, 3)[kinds - 1]
    while True:
        ground = draw_ground(rng, names)
        for name in names:                       # only a class alone is mixed, to keep captions short
            place_class(rng, ground, name, 1 + int(rng.random() * most), may_mix=kinds == 1)
        if {item.name for item in ground.items} == set(names):
            return ground
        most = max(1, most - 1)


def pick(rng, options):
    return options[int(rng.random() * len(options))]


def draw_ground(rng, names):
    """A land cover and a feature on which all these classes make sense."""
    others = [name for name in names if name != "ship"]
    ship, plane = "ship" in names, "plane" in names
    if ship and not plane and rng.random() < (0.35 if others else 0.7):
        cover, kinds = "water", ("beach",) if others else (None, "beach", "island")
    else:
        if rng.random() < 0.5:
            homes = not plane and ("building" in names or "vehicle" in names)
            cover = "suburb" if homes and rng.random() < 0.7 else pick(rng, ("concrete", "asphalt"))
        else:
            wild = ("farmland", "farmland", "forest", "forest")      # twice, for planes never stand there
            cover = pick(rng, (() if plane else wild) + ("grass", "sand"))
        kinds = ("river", "lake") if ship else (None, "river", "lake", "road")
        if not ship and cover in URBAN:
            kinds = (None, "river", "lake") if cover == "suburb" else (None, "road", "runway" if plane else "lawn")
    kind = pick(rng, kinds)
    angle, phase = rng.random() * math.pi, rng.random() * 2 * math.pi
    u, v, w = rng.random(3).tolist()         # plain floats: they keep the arrays of the rendering in float32
    x, y = 0.5 + 0.4 * (u - 0.5), 0.5 + 0.4 * (v - 0.5)
    half, wave = {"river": (0.085 + 0.03 * w, 0.05), "road": (0.042, 0), "runway": (0.085, 0), "beach": (0, 0.02),
                  "lawn": (0.1 + 0.04 * w, 0), "lake": (0.2 + 0.06 * w, 0.1), "island": (0.15 + 0.06 * w, 0.12),
                  None: (0, 0)}[kind]
    if kind == "beach":                              # the land keeps about a third of the picture
        angle, reach = 2 * angle, (0.12 if others else 0.2) + 0.06 * w
        x, y = 0.5 - math.sin(angle) * reach, 0.5 + math.cos(angle) * reach
    feature = Feature(kind, angle, x, y, half, wave, 5 + 4 * u, phase) if kind else None
    return Layout(cover, feature, rng.random() * math.pi / 2, [])


def surface(ground, name):
    """What lies under the objects of a class: a key of GROUNDS, and whether that is inside the feature."""
    kind = ground.feature.kind if ground.feature else None
    if name == "ship":
        return "water", ground.cover != "water"
    if ground.cover == "water":
        return "sand", True
    if name == "vehicle" and kind == "road":
        return "road", True
    if name == "vehicle" and ground.cover == "suburb":
        return "road", False
    return ground.cover, False


def place_class(rng, ground, name, count, may_mix):
    under, inside = surface(ground, name)
    colors = [c for c in PALETTES[name] if math.dist(COLORS[c], GROUNDS[under]) >= CONTRAST]
    first, second = pick(rng, colors), pick(rng, colors)
    mixed = may_mix and rng.random() < 0.25
    heading = ground.angle + pick(rng, (0, math.pi / 2)) if under in URBAN else rng.random() * 2 * math.pi
    for number in range(count):
        for _ in range(30):
            color = second if mixed and number >= count - count // 2 else first
            item = propose(rng, ground, name, color, heading, under, inside)
            if fits(ground, item, under, inside):
                ground.items.append(item)
                break


def propose(rng, ground, name, color, heading, under, inside):
    """One object of the class at a random place that may do; fits() decides."""
    a, b, x, y, t, variant = rng.random(6).tolist()
    length, width = {"storage tank": (0.1 + 0.025 * a,) * 2, "plane": (0.165 + 0.035 * a,) * 2,
                     "ship": (0.155 + 0.035 * a, 0.055 + 0.013 * b), "vehicle": (0.09, 0.045),
                     "building": (0.135 + 0.075 * a, 0.105 + 0.04 * b)}[name]
    f, angle = ground.feature, heading + 0.12 * (t - 0.5)
    if ground.cover == "suburb" and name != "ship":
        if name == "building":
            length, width = 0.125 + 0.045 * a, 0.1 + 0.025 * b
        x, y, angle = suburb_place(ground, name, x, y, t)
    elif inside and f.kind in ("river", "road"):     # along the band, in one of two lanes
        along, lane = 1.3 * (x - 0.5), (0.5 if y < 0.5 else -0.5) * f.half
        lane += f.wave * math.sin(f.frequency * along + f.phase)
        slope = math.atan(f.wave * f.frequency * math.cos(f.frequency * along + f.phase))
        c, s = math.cos(f.angle), math.sin(f.angle)
        angle = f.angle + slope + (math.pi if y < 0.5 else 0)
        x, y = f.x + c * along - s * lane, f.y + s * along + c * lane
    radius = math.hypot(length, width) / 2 if name in ("building", "ship", "vehicle") else length / 2 + 0.005
    return Item(name, color, x, y, angle, length, width, radius, variant)


def suburb_place(ground, name, x, y, t):
    """The middle of a block, or for a vehicle one lane of a street: (x, y, heading)."""
    c, s = math.cos(ground.angle), math.sin(ground.angle)
    u, v = c * (x - 0.5) + s * (y - 0.5), c * (y - 0.5) - s * (x - 0.5)
    angle = ground.angle + (math.pi / 2 if t < 0.5 else 0)
    if name == "vehicle" and t < 0.5:
        u = round(u / STREETS) * STREETS + (0.012 if t < 0.25 else -0.012)
    elif name == "vehicle":
        v = round(v / STREETS) * STREETS + (0.012 if t < 0.75 else -0.012)
    else:
        slack = 0.03 if name == "building" else 0.1
        u = (math.floor(u / STREETS) + 0.5) * STREETS + slack * (t - 0.5)
        v = (math.floor(v / STREETS) + 0.5) * STREETS + slack * (0.5 - t)
    return 0.5 + c * u - s * v, 0.5 + s * u + c * v, angle


def fits(ground, item, under, inside):
    """Inside the image, on its surface with every end, and clear of the other objects and their shadows."""
    edge = item.radius + 0.02
    if not (edge < item.x < 1 - edge and edge < item.y < 1 - edge):
        return False
    if ground.feature:
        reach = 0.45 * item.length if item.name == "ship" or under == "road" else 0
        clear = item.width / 2 if reach else item.radius
        clear = 0 if inside and under == "road" else clear + 0.012
        for step in (-reach, 0, reach):
            depth = ground.feature.depth(item.x + step * math.cos(item.angle), item.y + step * math.sin(item.angle))
            if (depth if inside else -depth) < clear:
                return False
    return all(math.hypot(item.x - o.x, item.y - o.y) > item.radius + o.radius + 0.025 for o in ground.items)


# ---- rendering: layout -> pixels ------------------------------------------------------------------------------------

@lru_cache(maxsize=8)
def noise_tiles(size):
    """Textures of twice the image side, cut at random places: soft noise, fine noise, tree crowns; each around 0."""
    rng, side = np.random.default_rng(size), 2 * size
    soft = np.zeros((side, side), np.float32)
    for cells, weight in ((6, 0.5), (18, 0.35), (60, 0.25)):
        grid = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        soft += weight * np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))
    fine = rng.standard_normal((side, side)).astype(np.float32)
    crowns = Image.new("L", (side, side), 90)
    draw, unit = ImageDraw.Draw(crowns), size / 128
    for x, y, r, shade in zip(*rng.random((4, 4200))):
        x, y, r = x * side, y * side, (2 + 3 * r) * unit
        draw.ellipse((x - r, y - r, x + r, y + r), int(60 + 40 * shade))
        draw.ellipse((x - r, y - r, x + 0.4 * r, y + 0.4 * r), int(110 + 60 * shade))
    crowns = np.asarray(crowns.filter(ImageFilter.GaussianBlur(0.6 * unit)), np.float32) / 40 - 2.5
    return soft, fine, crowns


def cut(rng, tile, size):
    """A random window of a tile, turned and flipped; contiguous, so that whatever is computed from it is as well."""
    x, y, flip = int(rng.random() * size), int(rng.random() * size), int(rng.random() * 8)
    window = tile[y:y + size, x:x + size]
    window = window[::-1] if flip & 1 else window
    window = window[:, ::-1] if flip & 2 else window
    return np.ascontiguousarray(window.T if flip & 4 else window)


def paint(color, axes=2):
    """A color as (3, 1, 1), or (3, 1), float32. Pictures are drawn as (3, H, W): numpy is slow on a last axis of 3."""
    return np.asarray(color, np.float32).reshape(3, *[1] * axes)


def tint(rng, color, axes=2):
    return paint(color, axes) + paint(rng.uniform(-6, 6, 3), axes)


def draw_cover(rng, ground, size, X, Y):
    """Base color and texture of the land cover: (3, size, size) float32."""
    soft, fine, crowns = (cut(rng, tile, size) for tile in noise_tiles(size))
    c, s = math.cos(ground.angle), math.sin(ground.angle)
    u, v = c * (X - 0.5) + s * (Y - 0.5), c * (Y - 0.5) - s * (X - 0.5)
    cover, shade, color = ground.cover, 9 * soft + 3 * fine, tint(rng, GROUNDS[ground.cover])
    if cover == "farmland":
        fields = np.floor(u / rng.uniform(0.25, 0.45)).astype(int) * 3 + np.floor(v / rng.uniform(0.3, 0.6)).astype(int)
        shade += 9 * np.sin(np.where(fields % 2, u, v) * (2 * math.pi / 0.033))
        tints = color[:, 0] + rng.uniform(-1, 1, 16) * [[34], [14], [12]] + rng.uniform(-12, 12, (3, 16))
        color = tints.astype(np.float32)[:, fields % 16]
    elif cover == "forest":
        shade = 22 * crowns + 6 * soft
    elif cover == "sand":
        shade += 6 * np.sin(90 * u + 5 * soft)
    elif cover == "water":
        shade = 5 * soft + 4 * np.sin(160 * u + 7 * soft) + 2 * fine
    elif cover == "concrete":
        shade -= 20 * ((lines(u, 0.16) < 0.004) | (lines(v, 0.16) < 0.004)).astype(np.float32)
    elif cover == "asphalt":
        shade += 12 * (lines(v, 0.5) < 0.004).astype(np.float32)
    picture = color + shade
    if cover == "suburb":
        picture -= paint((30, 18, 27)) * (crowns > 1.4)
        street = np.clip((0.03 - np.minimum(lines(u, STREETS), lines(v, STREETS))) * size + 0.5, 0, 1)
        picture += street * (tint(rng, GROUNDS["road"]) + 3 * fine - picture)
    return picture


def lines(u, pitch):
    """Distance to the nearest of the lines at whole multiples of the pitch."""
    return np.abs(u - pitch * np.rint(u / pitch))


MADE_OF = {"river": "water", "lake": "water", "beach": "sand", "island": "sand", "lawn": "grass",
           "road": "road", "runway": "road"}


def draw_feature(rng, ground, size, X, Y, picture):
    """Lays the feature over the cover, with a shore or painted lines. Works on the list of its pixels only."""
    f, flat = ground.feature, picture.reshape(3, -1)
    depth = (f.depth(X, Y) * size).ravel()
    here = np.flatnonzero(depth > -0.017 * size)
    depth, under = depth[here], flat[:, here]                                           # (P,), (3, P)
    soft, fine = (cut(rng, tile, size).ravel()[here] for tile in noise_tiles(size)[:2])
    if f.kind not in ("road", "runway", "lawn"):
        shore = np.clip(0.7 - np.abs(depth) * (0.7 / (0.016 * size)), 0, 1)
        under += shore * (paint((224, 222, 205), 1) - under)
    color = tint(rng, GROUNDS[MADE_OF[f.kind]], 1)
    under += np.clip(depth + 0.5, 0, 1) * (color + (5 * soft + 2.5 * fine) - under)
    if f.kind == "island":
        under += np.clip((depth - 0.05 * size) / 3, 0, 1) * (paint(GROUNDS["grass"], 1) + 14 * soft - under)
    if f.kind in ("road", "runway"):
        along = (math.cos(f.angle) * (X - f.x) + math.sin(f.angle) * (Y - f.y)).ravel()[here]
        stripes = np.clip(1.1 - np.abs(depth - f.half * size) / (0.006 * size), 0, 1) * (lines(along, 0.09) < 0.0225)
        inset = (0.012 if f.kind == "runway" else 0.004) * size
        stripes = np.maximum(stripes, np.clip(1.1 - np.abs(depth - inset) / (0.006 * size), 0, 1))
        under += 0.7 * stripes * (paint((225, 225, 215), 1) - under)
    flat[:, here] = under


# Outlines in a frame where the object is one long and one wide; x points forward. PLANE and HULL are left halves.
PLANE = np.array([(0.5, 0), (0.46, 0.045), (0.12, 0.06), (-0.1, 0.5), (-0.2, 0.5), (-0.1, 0.06), (-0.36, 0.045),
                  (-0.44, 0.19), (-0.5, 0.19), (-0.46, 0)])
HULL = np.array([(0.5, 0), (0.36, 0.32), (0.18, 0.48), (-0.42, 0.5), (-0.5, 0.36)])
ROUND = np.array([(math.cos(k * math.pi / 14) / 2, math.sin(k * math.pi / 14) / 2) for k in range(28)])
HEIGHTS = {"storage tank": 0.03, "building": 0.035, "plane": 0.02, "ship": 0.012, "vehicle": 0.009}    # shadow lengths


def mirrored(half):
    return np.concatenate([half, half[::-1] * (1, -1)])


def rectangle(x0, y0, x1, y1):
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def parts(item, sun):
    """Polygons of an object, one long and one wide, as (points, brightness); later ones lie on top."""
    c, s = math.cos(item.angle), math.sin(item.angle)
    sun_x, sun_y = c * sun[0] + s * sun[1], c * sun[1] - s * sun[0]         # where the shadow falls, in this frame
    if item.name == "storage tank":
        toward = np.array((-sun_x, -sun_y))
        return [(ROUND, 0.72), (0.86 * ROUND + 0.04 * toward, 1.0), (0.4 * ROUND + 0.12 * toward, 1.12),
                (0.12 * ROUND, 0.8)]
    if item.name == "plane":
        return [(mirrored(PLANE), 1.0), (rectangle(-0.1, 0.2, 0.02, 0.26), 0.6),
                (rectangle(-0.1, -0.26, 0.02, -0.2), 0.6), (rectangle(-0.5, -0.015, -0.3, 0.015), 0.55)]
    if item.name == "ship":
        return [(mirrored(HULL), 0.85), (0.8 * mirrored(HULL), 1.12), (rectangle(-0.36, -0.3, -0.16, 0.3), 0.6),
                (rectangle(0.0, -0.2, 0.14, 0.2), 0.8)]
    if item.name == "vehicle":
        return [(rectangle(-0.5, -0.5, 0.5, 0.5), 1.0), (rectangle(0.08, -0.36, 0.24, 0.36), 0.45)]
    left, right = (1.08, 0.74) if sun_y < 0 else (0.74, 1.08)               # the two sides of a ridged roof
    if item.variant < 0.4:                                                  # an L: one wing along, one across
        return [(rectangle(-0.5, 0.2, 0.5, 0.5), left), (rectangle(-0.5, -0.1, 0.5, 0.2), right),
                (rectangle(-0.5, -0.5, -0.3, -0.1), 0.82), (rectangle(-0.3, -0.5, -0.1, -0.1), 1.0)]
    return [(rectangle(-0.5, 0, 0.5, 0.5), left), (rectangle(-0.5, -0.5, 0.5, 0), right)]


def shaded(name, light):
    return tuple(min(255, int(light * value)) for value in COLORS[name])


def draw_item(item, size, sun, rng):
    """One object drawn three or four times as large and reduced: left, top, alpha (h, w), color (3, h, w)."""
    length, width = item.length * size, item.width * size
    if item.name == "vehicle":                   # 3 to 5 pixels wide at any size, so that it stays the hardest class
        width = min(max(0.026 * size, 3.2), 4.6)
        length = 2 * width
    c, s = math.cos(item.angle), math.sin(item.angle)
    reach = int(math.hypot(length, width) / 2) + 3
    left, top = int(item.x * size) - reach, int(item.y * size) - reach
    zoom = 4 if size < 192 else 3
    side, middle = 2 * zoom * reach, zoom * np.array((item.x * size - left, item.y * size - top))
    light, turn = rng.uniform(0.94, 1.06), zoom * np.array(((c * length, s * length), (-s * width, c * width)))
    canvas = Image.new("RGBX", (side, side), shaded(item.color, light) + (0,))        # X collects the outline
    draw = ImageDraw.Draw(canvas)
    for points, shade in parts(item, sun):
        draw.polygon((points @ turn + middle).ravel().tolist(), shaded(item.color, light * shade) + (255,))
    planes = np.asarray(canvas.reduce(zoom), np.float32).transpose(2, 0, 1)                 # (4, h, w)
    return left, top, planes[3] / 255, planes[:3]


def blend(picture, left, top, alpha, color):
    """Lays color, (3, h, w) or (3, 1, 1), over the picture where alpha (h, w) is, clipped to the picture."""
    size, (h, w) = picture.shape[1], alpha.shape
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + w, size), min(top + h, size)
    if x0 >= x1 or y0 >= y1:
        return
    rows, columns = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
    if color.shape[1] > 1:
        color = color[:, rows, columns]
    target = picture[:, y0:y1, x0:x1]
    target += alpha[rows, columns] * (color - target)


def draw_disc(picture, x, y, radius, soft, strength, color):
    """A round patch with an edge `soft` pixels wide: a clearing, a puff of foam."""
    left, top, side = int(x - radius), int(y - radius), int(2 * radius) + 2
    steps = np.arange(side, dtype=np.float32) + 0.5
    far = np.sqrt((steps + (left - x)) ** 2 + (steps[:, None] + (top - y)) ** 2)
    blend(picture, left, top, strength * np.clip((radius - far) / soft, 0, 1), paint(color))


def draw_wake(picture, item, size):
    """A short trail of foam behind a ship."""
    for step in range(1, 7):
        back = 0.45 * item.length + 0.008 * step
        x, y = (item.x - math.cos(item.angle) * back) * size, (item.y - math.sin(item.angle) * back) * size
        draw_disc(picture, x, y, (0.012 + 0.003 * step) * size, 1, 0.3 * (1 - step / 8), (205, 220, 225))


def make_scene(split="train", index=0, seed=0, size=256):
    """The scene with this key, drawn: pixels, boxes and masks."""
    check_key(split, index, seed, size)
    ground = layout(split, index, seed)
    rng = scene_rng(Key(split, seed, index, size), 1)
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    X, Y = grid[None], grid[:, None]             # an open grid: (1, size) and (size, 1)
    picture = draw_cover(rng, ground, size, X, Y)
    if ground.feature:
        draw_feature(rng, ground, size, X, Y, picture)
    direction = rng.uniform(0, 2 * math.pi)
    sun, height = np.array((math.cos(direction), math.sin(direction))), rng.uniform(0.7, 1.3)
    drawn = [draw_item(item, size, sun, rng) for item in ground.items]
    for item, (left, top, alpha, _) in zip(ground.items, drawn):
        if ground.cover == "forest" and surface(ground, item.name)[0] == "forest":
            reach = (item.radius + 0.035) * size
            draw_disc(picture, item.x * size, item.y * size, reach, 0.04 * size, 0.9, (112, 128, 78))
        if item.name == "ship":
            draw_wake(picture, item, size)
        for part in (0.5, 1.0):
            dx, dy = np.rint(sun * part * HEIGHTS[item.name] * height * size).astype(int)
            blend(picture, left + dx, top + dy, 0.4 * alpha, paint((18, 20, 30)))
    objects = []
    for item, (left, top, alpha, color) in zip(ground.items, drawn):
        blend(picture, left, top, alpha, color)
        mask = np.zeros((size, size), bool)
        ys, xs = np.nonzero(alpha >= 0.5)
        mask[ys + top, xs + left] = True
        box = (int(xs.min()) + left, int(ys.min()) + top, int(xs.max()) + left + 1, int(ys.max()) + top + 1)
        objects.append(Object(item.name, item.color, box, mask))
    return Scene(finish(rng, picture, size), ground.cover, ground.feature.kind if ground.feature else None, objects,
                 split, seed, index, size)


def finish(rng, picture, size):
    """The camera: light, haze, sensor noise, a slight blur. (3, H, W) float32 -> (H, W, 3) uint8."""
    haze = rng.uniform(0, 0.14)
    picture *= rng.uniform(0.86, 1.1) * (1 - haze)
    picture += haze * paint((196, 204, 212))
    picture += rng.uniform(2, 5) * cut(rng, noise_tiles(size)[1], size)
    levels = np.clip(picture, 0, 255, out=picture).astype(np.uint8)
    side = rng.uniform(0.05, 0.15)
    kernel = ImageFilter.Kernel((3, 3), [a * b for a in (side, 1, side) for b in (side, 1, side)])
    return np.array(Image.merge("RGB", [Image.fromarray(level) for level in levels]).filter(kernel))


# ---- names ----------------------------------------------------------------------------------------------------------

def check_key(split, index, seed, size):
    if split not in SPLITS:
        raise ValueError(f"scene split {split!r}: expected one of {', '.join(SPLITS)}")
    for what, value, least in (("index", index, 0), ("seed", seed, 0), ("size", size, 64)):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"scene {what} {value!r}: expected a whole number of at least {least}")


def scene_name(scene=None, *, split="train", seed=0, index=0, size=256):
    if scene is not None:
        split, seed, index, size = scene.split, scene.seed, scene.index, scene.size
    return f"scene:{split}/{seed}/{index}/{size}"


@lru_cache(maxsize=64)
def open_scene(name):
    match = re.fullmatch(r"scene:([a-z]+)/(\d+)/(\d+)/(\d+)", name)
    if not match:
        raise ValueError(f"scene name {name!r}: expected scene:SPLIT/SEED/INDEX/SIZE, as in scene:train/0/12/128")
    return make_scene(match[1], int(match[3]), int(match[2]), int(match[4]))


# ---- text -----------------------------------------------------------------------------------------------------------

def plural(name, count=2):
    return name if count == 1 else name + "s"


def count_objects(ground):
    """{(class, color): count} in the order of the layout."""
    groups = {}
    for item in ground.items:
        groups[item.name, item.color] = groups.get((item.name, item.color), 0) + 1
    return groups


def phrase(groups):
    words = [f"{NUMBERS[n]} {color} {plural(name, n)}" for (name, color), n in groups]
    return words[0] if len(words) == 1 else f"{' with '.join(words[:-1])} and {words[-1]}"


def cell(item):
    """The fifth of the picture an object lies in, or None near a border between two of them."""
    dx, dy = item.x - 0.5, item.y - 0.5
    if max(abs(dx), abs(dy)) < 0.1:
        return "center"
    if min(abs(dx), abs(dy)) > 0.07 and max(abs(dx), abs(dy)) > 0.17:
        return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"
    return None


def captions(scene):
    """Five wordings of the same facts. Takes a Scene or any object with its split, seed and index.

    The style is a headline's, without articles: a caption that never looks at the picture then scores low.
    """
    ground = layout(scene.split, scene.index, scene.seed)
    groups = list(count_objects(ground).items())
    kind, cover = ground.feature.kind if ground.feature else None, ground.cover
    ships, land = [g for g in groups if g[0][0] == "ship"], [g for g in groups if g[0][0] != "ship"]
    cells = {cell(item) for item in ground.items}
    spot = f" at {cells.pop()}" if len(cells) == 1 and None not in cells else ""
    if ships and land:
        s, a, b = phrase(ships), phrase(land), phrase(land[::-1])
        afloat, ashore = ("in water", "on beach") if cover == "water" else (AFLOAT[kind], PLACES[cover])
        return [f"{s} {afloat} and {a} {ashore}", f"{b} {ashore} and {s} {afloat}", f"{afloat} {s} and {b} {ashore}",
                f"{ashore} {a} and {s} {afloat}", f"{a} {ashore} with {s} {afloat}"]
    a, b = phrase(groups), phrase(groups[::-1])
    if ships and cover != "water":
        where, around = AFLOAT[kind], PLACES[cover]
        return [f"{a} sailing {where} {around}{spot}", f"{kind} {around} with {b} sailing{spot}",
                f"{where} {around} {a} sailing{spot}", f"sailing {where} {around} {b}{spot}",
                f"{around} {a} sailing {where}{spot}"]
    place, near = PLACES[cover], f" {NEAR[kind]}" if kind else ""
    verb = " " + VERBS[groups[0][0][0]] if len({name for (name, _), _ in groups}) == 1 else ""
    turned = f"{b}{verb}{near} {place}{spot}" if near or a != b else f"view of {a}{verb} {place}{spot}"
    return [f"{a}{verb} {place}{near}{spot}", f"{place}{near} {a}{verb}{spot}",
            f"{verb} {place}{near} {b}{spot}".strip(), turned, f"{cover}{near} with {a}{verb}{spot}"]


def questions(scene):
    """(type, question, answer) of every question asked about the scene, in a fixed order of types."""
    ground, rng = layout(scene.split, scene.index, scene.seed), scene_rng(scene, 2)
    groups = count_objects(ground)
    total = {name: sum(n for (other, _), n in groups.items() if other == name) for name in CLASSES}
    present, absent = [c for c in CLASSES if total[c]], [c for c in CLASSES if not total[c]]
    found = []

    def ask(kind, wording, answer, **words):
        found.append((kind, pick(rng, WORDINGS[wording]).format(**words), answer))

    presence = [(pick(rng, present), "yes"), (pick(rng, absent), "no")]
    for name, answer in presence if rng.random() < 0.5 else [pick(rng, presence)]:
        ask("presence", "presence", answer, one=name, many=plural(name))
    counted = pick(rng, present) if rng.random() > 0.05 else pick(rng, absent)
    ask("count", "count", str(total[counted]), many=plural(counted))
    (name, color), n = pick(rng, list(groups.items()))
    ask("count", "count", str(n), many=f"{color} {plural(name)}")
    ask_comparison(rng, ask, total, present, absent)
    ask("land cover", "land cover", ground.cover)
    if ground.cover != "water" and rng.random() < 0.5:
        ask("land cover", "area", "urban" if ground.cover in URBAN else "rural")
    cells = {key: {cell(item) for item in ground.items if (item.name, item.color) == key} for key in groups}
    placed = [key for key in groups if len(cells[key]) == 1 and None not in cells[key]]
    for i in rng.permutation(len(placed))[:2]:
        (name, color), wording = placed[i], "position one" if groups[placed[i]] == 1 else "position many"
        ask("position", wording, *cells[placed[i]], one=f"{color} {name}", many=f"{color} {plural(name)}")
    plain = [key for key in groups if total[key[0]] == groups[key]]
    for i in rng.permutation(len(plain))[:2]:
        name, color = plain[i]
        ask("color", "color one" if total[name] == 1 else "color many", color, one=name, many=plural(name))
    return found


def ask_comparison(rng, ask, total, present, absent):
    """A pair with unequal counts. Yes and no are as likely for each question, because each pair is asked either way."""
    pairs = [(a, b) for a in present for b in present + absent if total[a] > total[b]]
    a, b = pick(rng, pairs)
    wording, yes = ("more", "fewer")[int(rng.random() < 0.3)], rng.random() < 0.5
    if yes == (wording == "fewer"):
        a, b = b, a
    ask("comparison", wording, "yes" if yes else "no", a=plural(a), b=plural(b))


def region_questions(scene):
    """
    (type, question, answer, object indices) about the objects; the question says <region1> and <region2> for them. One
    of "is it a ...?" is yes and one is no for every object, and half of the pairs compared are of one class.
    """
    items, rng, found = layout(scene.split, scene.index, scene.seed).items, scene_rng(scene, 5), []

    def ask(kind, answer, *objects, **words):
        text = pick(rng, REGION_WORDINGS[kind]).format(a="<region1>", b="<region2>", **words)
        found.append((kind, text, answer, objects))

    for i, item in enumerate(items):
        where = cell(item)
        ask("region class", item.name, i)
        ask("region color", item.color, i)
        if where:
            ask("region position", where, i)
        ask("region presence", "yes", i, one=item.name)
        ask("region presence", "no", i, one=pick(rng, [c for c in CLASSES if c != item.name]))
        ask("region count", str(sum(other.name == item.name for other in items)), i)
        ask("region caption", f"{item.color} {item.name}" + (f" at {where}" if where else ""), i)
    pairs = [(i, j) for i in range(len(items)) for j in range(len(items)) if i != j]
    same = [(i, j) for i, j in pairs if items[i].name == items[j].name]
    for answer, some in (("yes", same), ("no", [p for p in pairs if p not in same])):
        if same and len(same) < len(pairs):
            ask("region comparison", answer, *pick(rng, some))
    return found


# ---- records: LLaVA's format ----------------------------------------------------------------------------------------

def turn(who, value):
    return {"from": who, "value": value}


def records(split, n, task, seed=0, size=256, start=0):
    """
    LLaVA records of n scenes for a task: "caption", "vqa", "chat", "region" or "region chat". No pixel is drawn; images
    and masks are names.
    """
    makers = {"caption": caption_records, "vqa": vqa_records, "chat": chat_records, "region": region_records,
              "region chat": region_chat_records}
    if task not in makers:
        raise ValueError(f"scene task {task!r}: expected one of {', '.join(makers)}")
    check_key(split, start, seed, size)
    return [record for index in range(start, start + n) for record in makers[task](Key(split, seed, index, size))]


def caption_records(key):
    texts, rng, found = captions(key), scene_rng(key, 3), []
    for i, text in enumerate(texts if key.split == "train" else texts[:1]):
        prompt = f"<image>\n{pick(rng, CAPTION_PROMPTS)}"
        found.append({"id": f"{key.split}-{key.index}-c{i}", "image": scene_name(key), "type": "caption",
                      "conversations": [turn("human", prompt), turn("gpt", text)]})
    if key.split != "train":
        found[0]["references"] = texts
    return found


def vqa_records(key):
    return [{"id": f"{key.split}-{key.index}-q{i}", "image": scene_name(key), "type": kind,
             "conversations": [turn("human", f"<image>\n{question}\n{SHORT}"), turn("gpt", answer)]}
            for i, (kind, question, answer) in enumerate(questions(key))]


def chat_records(key):
    """
    One conversation: up to eight questions in random order. The format prompt stands where short answers begin and
    holds for all that follow, as in LLaVA-1.5's conversations. A caption among them would give the later answers away.
    """
    asked, rng = questions(key), scene_rng(key, 4)
    pairs = [asked[i][1:] for i in rng.permutation(len(asked))[:8]]
    turns = [turn(who, text) for pair in pairs for who, text in zip(("human", "gpt"), pair)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}\n{SHORT}"
    return [{"id": f"{key.split}-{key.index}-chat", "image": scene_name(key), "type": "chat", "conversations": turns}]


def mask_name(key, number):
    """The mask of an object, as a record names it."""
    return f"{scene_name(key)}#{number}"


def region_records(key):
    """One record a region question; a caption of a region has no format prompt."""
    found = []
    for i, (kind, question, answer, objects) in enumerate(region_questions(key)):
        short = "" if kind == "region caption" else f"\n{SHORT}"
        text = question if len(objects) > 1 else question.replace("<region1>", "<region>")
        found.append({"id": f"{key.split}-{key.index}-r{i}", "image": scene_name(key), "type": kind,
                      "masks": [mask_name(key, n) for n in objects],
                      "conversations": [turn("human", f"<image>\n{text}{short}"), turn("gpt", answer)]})
    return found


def region_chat_records(key):
    """One conversation: up to eight region questions in random order, the regions numbered as they come up."""
    asked, rng = region_questions(key), scene_rng(key, 6)
    turns, numbers = [], {}                      # object: its number in the conversation
    for i in rng.permutation(len(asked))[:8]:
        _, question, answer, objects = asked[i]
        named = [numbers.setdefault(n, len(numbers) + 1) for n in objects]
        question = re.sub(r"<region(\d)>", lambda m: f"<region{named[int(m[1]) - 1]}>", question)
        turns += [turn("human", question), turn("gpt", answer)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}\n{SHORT}"
    return [{"id": f"{key.split}-{key.index}-regions", "image": scene_name(key), "type": "region chat",
             "masks": [mask_name(key, n) for n in numbers], "conversations": turns}]


# ---- command line ---------------------------------------------------------------------------------------------------

def contact_sheet(scenes, columns=5):
    """The pictures in rows, each with its first caption and some answers under it."""
    side, foot = max(scenes[0].size, 256), 76
    rows = -(-len(scenes) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + foot)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, scene in enumerate(scenes):
        x, y = i % columns * (side + 8), i // columns * (side + foot)
        sheet.paste(Image.fromarray(scene.image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        text = f"{scene.index}: {captions(scene)[0]}; " + "; ".join(f"{q} {a}" for _, q, a in questions(scene)[4:])
        for line in range(5):
            draw.text((x + 2, y + side + 2 + 13 * line), text[line * 42:line * 42 + 42], "black")
    return sheet


def main():
    parser = argparse.ArgumentParser(description="Write built-in scenes as PNGs, scenes.jsonl and a contact sheet.")
    parser.add_argument("--out", required=True, help="directory to write into; made if missing")
    parser.add_argument("--split", default="test", choices=SPLITS, help="default: test")
    parser.add_argument("-n", type=int, default=20, help="number of scenes (default 20)")
    parser.add_argument("--size", type=int, default=256, help="side in pixels, at least 64 (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--start", type=int, default=0, help="index of the first scene (default 0)")
    args = parser.parse_args()
    if args.n < 1:
        parser.exit(2, f"scenes.py: -n {args.n}: expected at least 1\n")
    try:
        check_key(args.split, args.start, args.seed, args.size)
        os.makedirs(args.out, exist_ok=True)
        scenes = [make_scene(args.split, args.start + i, args.seed, args.size) for i in range(args.n)]
        with open(os.path.join(args.out, "scenes.jsonl"), "w") as file:
            for scene in scenes:
                picture = f"{scene.split}-{scene.index}.png"
                Image.fromarray(scene.image).save(os.path.join(args.out, picture))
                objects = [{"name": o.name, "color": o.color, "box": o.box} for o in scene.objects]
                file.write(json.dumps({"name": scene_name(scene), "image": picture, "cover": scene.cover,
                                       "feature": scene.feature, "captions": captions(scene),
                                       "questions": questions(scene), "objects": objects}) + "\n")
        contact_sheet(scenes).save(os.path.join(args.out, "sheet.png"))
    except FileExistsError:
        parser.exit(2, f"scenes.py: --out {args.out} is a file; expected a directory\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"scenes.py: {error}\n")
    print(f"{len(scenes)} scenes in {args.out}")


if __name__ == "__main__":
    main()
