"""
Layout -> pixels, and the masks of the objects. The order of the random draws is part of a scene: with another order
every picture changes. Pictures are (3, H, W) float32 here, for numpy is slow on a last axis of 3. size, radius, reach,
left, top are in pixels; layouts, and the open grid X (1, size), Y (size, 1), in image sides.
"""
import math
from collections import namedtuple
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from toy.layout import COLORS, GROUNDS, STREETS, Key, check_key, make_layout, rotate, scene_rng, surface

MADE_OF = {"river": "water", "lake": "water", "beach": "sand", "island": "sand", "lawn": "grass", "road": "road",
           "runway": "road"}
HEIGHTS = {"storage tank": 0.03, "building": 0.035, "plane": 0.02, "ship": 0.012, "vehicle": 0.009}    # shadow lengths

# Outlines in a frame where the object is one long and one wide; x points forward. PLANE and HULL are left halves.
PLANE = np.array([(0.5, 0), (0.46, 0.045), (0.12, 0.06), (-0.1, 0.5), (-0.2, 0.5), (-0.1, 0.06), (-0.36, 0.045),
                  (-0.44, 0.19), (-0.5, 0.19), (-0.46, 0)])
HULL = np.array([(0.5, 0), (0.36, 0.32), (0.18, 0.48), (-0.42, 0.5), (-0.5, 0.36)])
ROUND = np.array([(math.cos(k * math.pi / 14) / 2, math.sin(k * math.pi / 14) / 2) for k in range(28)])

Object = namedtuple("Object", "name color box mask")        # box: x0, y0, x1, y1 in pixels, half-open; mask (H, W) bool
Scene = namedtuple("Scene", "image cover feature objects split seed index size")    # image: (H, W, 3) uint8


def make_scene(split="train", index=0, seed=0, size=256):
    """The scene with this key, drawn: pixels, boxes and masks."""
    check_key(split, index, seed, size)
    return draw_scene(make_layout(split, index, seed), Key(split, seed, index, size))


def draw_scene(layout, key, true_size=False, scale=1.0):
    """
    The layout with the pixels that the key draws. true_size: vehicles as large as the layout says, see draw_item;
    scale: of shadows and foam, for objects that are smaller or larger than those of scenes.
    """
    split, seed, index, size = key
    rng = scene_rng(key, 1)
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    X, Y = grid[None], grid[:, None]
    picture = draw_cover(rng, layout, size, X, Y)
    if layout.feature:
        draw_feature(rng, layout.feature, size, X, Y, picture)
    direction = rng.uniform(0, 2 * math.pi)
    sun, height = np.array((math.cos(direction), math.sin(direction))), rng.uniform(0.7, 1.3)   # where shadows fall
    drawn = [draw_item(item, size, sun, rng, true_size) for item in layout.items]
    for item, (left, top, alpha, _) in zip(layout.items, drawn):
        if surface(layout, item.name)[0] == "forest":               # a clearing
            reach = (item.radius + 0.035) * size
            draw_disc(picture, item.x * size, item.y * size, reach, 0.04 * size, 0.9, (112, 128, 78))
        if item.name == "ship":                                     # a short trail of foam behind it
            for step in range(1, 7):
                back = 0.45 * item.length + 0.008 * step * scale
                x, y = (item.x - math.cos(item.angle) * back) * size, (item.y - math.sin(item.angle) * back) * size
                puff = (0.012 + 0.003 * step) * size * scale
                draw_disc(picture, x, y, puff, 1, 0.3 * (1 - step / 8), (205, 220, 225))
        for part in (0.5, 1.0):                                     # of the shadow's length
            dx, dy = np.rint(sun * part * HEIGHTS[item.name] * height * size * scale).astype(int)
            blend(picture, left + dx, top + dy, 0.4 * alpha, color_planes((18, 20, 30)))
    objects = []
    for item, (left, top, alpha, color) in zip(layout.items, drawn):
        blend(picture, left, top, alpha, color)
        mask = np.zeros((size, size), bool)
        ys, xs = np.nonzero(alpha >= 0.5)
        mask[ys + top, xs + left] = True
        box = (int(xs.min()) + left, int(ys.min()) + top, int(xs.max()) + left + 1, int(ys.max()) + top + 1)
        objects.append(Object(item.name, item.color, box, mask))
    return Scene(finish(rng, picture, size), layout.cover, layout.feature.kind if layout.feature else None, objects,
                 split, seed, index, size)


def finish(rng, picture, size):
    """The camera: light, haze, sensor noise, a slight blur. (3, H, W) float32 -> (H, W, 3) uint8."""
    haze = rng.uniform(0, 0.14)
    picture *= rng.uniform(0.86, 1.1) * (1 - haze)
    picture += haze * color_planes((196, 204, 212))
    picture += rng.uniform(2, 5) * cut(rng, noise_tiles(size)[1], size)
    levels = np.clip(picture, 0, 255, out=picture).astype(np.uint8)
    side = rng.uniform(0.05, 0.15)
    kernel = ImageFilter.Kernel((3, 3), np.outer((side, 1, side), (side, 1, side)).ravel().tolist())
    return np.array(Image.merge("RGB", [Image.fromarray(level) for level in levels]).filter(kernel))


@lru_cache(maxsize=8)
def noise_tiles(size):
    """Textures of twice the image side, cut at random places: soft noise, fine noise, tree crowns; each around 0."""
    rng, side, unit = np.random.default_rng(size), 2 * size, size / 128
    soft = np.zeros((side, side), np.float32)
    for cells, weight in ((6, 0.5), (18, 0.35), (60, 0.25)):
        grid = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        soft += weight * np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))
    fine = rng.standard_normal((side, side)).astype(np.float32)
    crowns = Image.new("L", (side, side), 90)
    pencil = ImageDraw.Draw(crowns)
    for x, y, r, shade in zip(*rng.random((4, 4200))):
        x, y, r = x * side, y * side, (2 + 3 * r) * unit
        pencil.ellipse((x - r, y - r, x + r, y + r), int(60 + 40 * shade))
        pencil.ellipse((x - r, y - r, x + 0.4 * r, y + 0.4 * r), int(110 + 60 * shade))
    crowns = np.asarray(crowns.filter(ImageFilter.GaussianBlur(0.6 * unit)), np.float32) / 40 - 2.5
    return soft, fine, crowns


def cut(rng, tile, size):
    """A random window of a tile, turned and flipped; contiguous, so that whatever is computed from it is as well."""
    x, y, flip = int(rng.random() * size), int(rng.random() * size), int(rng.random() * 8)
    window = tile[y:y + size, x:x + size]
    window = window[::-1] if flip & 1 else window
    window = window[:, ::-1] if flip & 2 else window
    return np.ascontiguousarray(window.T if flip & 4 else window)


def color_planes(color, axes=2):
    """A color as (3, 1, 1), or (3, 1), float32."""
    return np.asarray(color, np.float32).reshape(3, *[1] * axes)


def varied(rng, color, axes=2):
    return color_planes(color, axes) + color_planes(rng.uniform(-6, 6, 3), axes)


def from_lines(u, pitch):
    """Distance to the nearest of the lines at whole multiples of the pitch."""
    return np.abs(u - pitch * np.rint(u / pitch))


def draw_cover(rng, layout, size, X, Y):
    """Base color and texture of the land cover: (3, size, size) float32."""
    soft, fine, crowns = (cut(rng, tile, size) for tile in noise_tiles(size))
    u, v = rotate(layout.angle, X - 0.5, Y - 0.5)
    cover, shade, color = layout.cover, 9 * soft + 3 * fine, varied(rng, GROUNDS[layout.cover])
    if cover == "farmland":
        column = np.floor(u / rng.uniform(0.25, 0.45)).astype(int)
        field = column * 3 + np.floor(v / rng.uniform(0.3, 0.6)).astype(int)
        shade += 9 * np.sin(np.where(field % 2, u, v) * (2 * math.pi / 0.033))      # furrows
        tints = color[:, 0] + rng.uniform(-1, 1, 16) * [[34], [14], [12]] + rng.uniform(-12, 12, (3, 16))
        color = tints.astype(np.float32)[:, field % 16]
    elif cover == "forest":
        shade = 22 * crowns + 6 * soft
    elif cover == "sand":
        shade += 6 * np.sin(90 * u + 5 * soft)
    elif cover == "water":
        shade = 5 * soft + 4 * np.sin(160 * u + 7 * soft) + 2 * fine
    elif cover == "concrete":
        shade -= 20 * ((from_lines(u, 0.16) < 0.004) | (from_lines(v, 0.16) < 0.004)).astype(np.float32)
    elif cover == "asphalt":
        shade += 12 * (from_lines(v, 0.5) < 0.004).astype(np.float32)
    picture = color + shade
    if cover == "suburb":
        picture -= color_planes((30, 18, 27)) * (crowns > 1.4)
        street = np.clip((0.03 - np.minimum(from_lines(u, STREETS), from_lines(v, STREETS))) * size + 0.5, 0, 1)
        picture += street * (varied(rng, GROUNDS["road"]) + 3 * fine - picture)
    return picture


def draw_feature(rng, feature, size, X, Y, picture):
    """Lays the feature over the cover, with a shore or painted lines. Works on the list of its P pixels only."""
    kind, flat = feature.kind, picture.reshape(3, -1)
    depth = (feature.depth(X, Y) * size).ravel()
    here = np.flatnonzero(depth > -0.017 * size)
    depth, pixels = depth[here], flat[:, here]                      # (P,), (3, P)
    soft, fine = (cut(rng, tile, size).ravel()[here] for tile in noise_tiles(size)[:2])
    if kind not in ("road", "runway", "lawn"):
        shore = np.clip(0.7 - np.abs(depth) * (0.7 / (0.016 * size)), 0, 1)
        pixels += shore * (color_planes((224, 222, 205), 1) - pixels)
    color = varied(rng, GROUNDS[MADE_OF[kind]], 1)
    pixels += np.clip(depth + 0.5, 0, 1) * (color + (5 * soft + 2.5 * fine) - pixels)
    if kind == "island":
        pixels += np.clip((depth - 0.05 * size) / 3, 0, 1) * (color_planes(GROUNDS["grass"], 1) + 14 * soft - pixels)
    if kind in ("road", "runway"):
        along = rotate(feature.angle, X - feature.x, Y - feature.y)[0].ravel()[here]
        stripe = lambda inset: np.clip(1.1 - np.abs(depth - inset) / (0.006 * size), 0, 1)     # pixels from the edge
        dashes = stripe(feature.half * size) * (from_lines(along, 0.09) < 0.0225)
        stripes = np.maximum(dashes, stripe((0.012 if kind == "runway" else 0.004) * size))
        pixels += 0.7 * stripes * (color_planes((225, 225, 215), 1) - pixels)
    flat[:, here] = pixels


def polygons(item, sun):
    """The parts of an object, one long and one wide, as (points, brightness); later ones lie on top."""
    mirrored = lambda half: np.concatenate([half, half[::-1] * (1, -1)])
    rectangle = lambda x0, y0, x1, y1: np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    sun_x, sun_y = rotate(item.angle, *sun)                         # where the shadow falls, in this frame
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
    left, right = (1.08, 0.74) if sun_y < 0 else (0.74, 1.08)       # the two sides of a ridged roof
    if item.variant < 0.4:                                          # an L: one wing along, one across
        return [(rectangle(-0.5, 0.2, 0.5, 0.5), left), (rectangle(-0.5, -0.1, 0.5, 0.2), right),
                (rectangle(-0.5, -0.5, -0.3, -0.1), 0.82), (rectangle(-0.3, -0.5, -0.1, -0.1), 1.0)]
    return [(rectangle(-0.5, 0, 0.5, 0.5), left), (rectangle(-0.5, -0.5, 0.5, 0), right)]


def draw_item(item, size, sun, rng, true_size=False):
    """One object drawn three or four times as large and reduced: left, top, alpha (h, w), color (3, h, w)."""
    length, width = item.length * size, item.width * size
    if item.name == "vehicle" and not true_size:    # 3 to 5 pixels wide, so that it stays the hardest class at any size
        width = min(max(0.026 * size, 3.2), 4.6)
        length = 2 * width
    reach, zoom = int(math.hypot(length, width) / 2) + 3, 4 if size < 192 else 3
    left, top, side = int(item.x * size) - reach, int(item.y * size) - reach, 2 * zoom * reach
    c, s, light = math.cos(item.angle), math.sin(item.angle), rng.uniform(0.94, 1.06)
    turn = zoom * np.array(((c * length, s * length), (-s * width, c * width)))
    middle = zoom * np.array((item.x * size - left, item.y * size - top))
    shaded = lambda shade: tuple(min(255, int(light * shade * value)) for value in COLORS[item.color])
    canvas = Image.new("RGBX", (side, side), shaded(1) + (0,))                      # X collects the outline
    pencil = ImageDraw.Draw(canvas)
    for points, shade in polygons(item, sun):
        pencil.polygon((points @ turn + middle).ravel().tolist(), shaded(shade) + (255,))
    planes = np.asarray(canvas.reduce(zoom), np.float32).transpose(2, 0, 1)         # (4, h, w)
    return left, top, planes[3] / 255, planes[:3]


def blend(picture, left, top, alpha, color):
    """Lays color, (3, h, w) or (3, 1, 1), over the picture where alpha (h, w) is, clipped to the picture."""
    size, (h, w) = picture.shape[1], alpha.shape
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + w, size), min(top + h, size)
    if x0 >= x1 or y0 >= y1:
        return
    rows, columns = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
    target = picture[:, y0:y1, x0:x1]
    target += alpha[rows, columns] * (np.broadcast_to(color, (3, h, w))[:, rows, columns] - target)


def draw_disc(picture, x, y, radius, soft, strength, color):
    """A round patch with an edge `soft` pixels wide: a clearing, a puff of foam."""
    left, top, side = int(x - radius), int(y - radius), int(2 * radius) + 2
    steps = np.arange(side, dtype=np.float32) + 0.5
    far = np.sqrt((steps + (left - x)) ** 2 + (steps[:, None] + (top - y)) ** 2)
    blend(picture, left, top, strength * np.clip((radius - far) / soft, 0, 1), color_planes(color))
