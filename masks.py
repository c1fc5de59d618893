"""
Masks as they are published -> boolean arrays: PNG files, COCO polygons, COCO run lengths (compressed or not), boxes.

A mask value is one of
    "ship.png"                                      a file of two values, or "scene:test/0/7/128#2", a built-in object
    [[x, y, x, y, ...], ...]                        polygons in pixels, their union; a flat list is one polygon
    {"size": [h, w], "counts": "..." or [...]}      run lengths, down the columns
    {"bbox": [x, y, w, h]}                          a box in pixels
    {"segmentation": polygons or run lengths, ...}  a COCO annotation
Pixel (0, 0) is the top left one and covers x from 0 to 1. Polygons are filled as COCO's own code fills them.
"""
import pathlib
import re
import struct
import zlib

import numpy as np
from PIL import Image

import scenes

MAX_PIXELS = 2 ** 28                        # of an image or a mask: 16,384 x 16,384, which Pillow holds in 1 GB
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2    # Pillow refuses twice this, by the header alone
MAX_SCENE = 2048                            # side of a built-in scene that a record may name
# What Pillow's decoders raise on damaged files.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError,
                 MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)


def decode_mask(value, size, root="."):
    """A mask value -> (h, w) bool; size is the (width, height) of the image that it lies on. ValueError in one line."""
    w, h = size
    if isinstance(value, dict) and value.get("segmentation"):
        value = value["segmentation"]
    if isinstance(value, str):
        mask = read_mask(value, size, root)
    elif isinstance(value, dict) and "counts" in value:
        mask = decode_runs(value, size)
    elif isinstance(value, dict) and "bbox" in value:
        x, y, bw, bh = numbers(value["bbox"], "bbox", 4, 4)
        mask = fill_polygon([x, y, x + bw, y, x + bw, y + bh, x, y + bh], w, h)
    elif isinstance(value, list) and value:
        flat = not isinstance(value[0], list)
        mask = np.zeros((h, w), bool)
        for polygon in [value] if flat else value:
            mask |= fill_polygon(numbers(polygon, "polygon", 6), w, h)
    else:
        raise ValueError(f"mask {str(value)[:60]!r}: expected a file, polygons, run lengths, a bbox or an annotation")
    if not mask.any():
        raise ValueError(f"mask {str(value)[:60]!r} is empty on an image of {w} x {h}")
    return mask


def tolerated(value, size):
    """What decode_mask puts up with in a mask value that it reads, in words."""
    polygons = value.get("segmentation") if isinstance(value, dict) else value
    if not isinstance(polygons, list) or not polygons:
        return []
    flat = not isinstance(polygons[0], list)
    points = [np.array(xy, np.float64).reshape(-1, 2) for xy in ([polygons] if flat else polygons)]
    outside = any((xy < 0).any() or (xy > size).any() for xy in points)
    return ["a flat list, read as one polygon"] * flat + ["a polygon partly outside its image, clipped"] * outside


def check_size(what, size, of_image):
    """ValueError unless a mask's size is its image's; asked before it is decoded: a wrong one may be huge."""
    if tuple(size) != tuple(of_image):
        raise ValueError(f"mask {str(what)[:60]!r} is {size[0]} x {size[1]} pixels, "
                         f"its image {of_image[0]} x {of_image[1]}; they must be equal")


def open_scene(name):
    """A built-in scene that a data file names; a huge one would fill the memory."""
    side = name.rpartition("/")[2]
    if len(name) > 100 or side.isdecimal() and int(side) > MAX_SCENE:
        raise ValueError(f"scene {name[:60]!r}: its side is more than {MAX_SCENE} pixels or its numbers are too long")
    return scenes.open_scene(name)


def numbers(values, what, least, most=None):
    if (not isinstance(values, list) or len(values) < least or len(values) > (most or len(values)) or len(values) % 2
            or not all(isinstance(v, (int, float)) and abs(v) < 1e6 for v in values)):
        raise ValueError(f"{what} {str(values)[:60]}: expected {least}{'' if most else ' or more'} numbers x, y, ...")
    return values


# ---------------------------------------------------------------------------------------------- files

def read_mask(name, size, root):
    """A mask file under root, two values of which the larger is inside, or an object of a built-in scene."""
    if name.startswith("scene:"):
        scene, _, number = name.partition("#")
        objects = open_scene(scene).objects
        if not number.isdecimal() or int(number) >= len(objects):
            raise ValueError(f"mask {name!r}: expected a scene, # and one of its objects, 0 to {len(objects) - 1}")
        mask = objects[int(number)].mask
        check_size(name, mask.shape[::-1], size)
        return mask
    path, root = pathlib.Path(root, name), pathlib.Path(root)
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as e:                               # too long, a NUL, a ring of links
        raise ValueError(f"mask {name[:200]!r}: not a path ({e})") from None
    if not inside:
        raise ValueError(f"mask {name}: the path leaves the image folder {root}")
    try:
        with Image.open(path) as image:
            given, pixels = image.size, None
            if given == tuple(size):
                pixels = np.asarray(image.convert("I") if image.mode.startswith("I") else image)
    except FileNotFoundError:
        raise FileNotFoundError(f"mask {name}: no such file in {root}") from None
    except PILLOW_ERRORS as e:
        raise ValueError(f"mask {name}: not an image that Pillow can read ({e})") from None
    check_size(name, given, size)
    if pixels.ndim == 3:                    # RGB whose channels are equal; a full alpha channel does not count
        color = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1]
        if (color != color[..., :1]).any():
            raise ValueError(f"mask {name}: its channels differ; expected a picture of two values, one of them 0")
        pixels = color[..., 0]
    values = np.unique(pixels)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        raise ValueError(f"mask {name}: {len(values)} values from {values[0]} to {values[-1]}; "
                         "expected two, 0 outside and another inside")
    return pixels != 0


# ---------------------------------------------------------------------------------------------- COCO

def decode_runs(value, image_size):
    """COCO's run lengths, zeros first, down the columns -> (h, w) bool."""
    size, counts = value.get("size"), value["counts"]
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(v, int) and 0 < v < 1e5 for v in size)):
        raise ValueError(f"run lengths with size {str(size)[:60]}: expected [height, width] in pixels")
    check_size(value, size[::-1], image_size)
    runs = decompress(counts) if isinstance(counts, str) else counts
    whole = isinstance(runs, list) and all(isinstance(n, int) for n in runs)
    if not whole or min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        raise ValueError(f"run lengths add up to {str(sum(runs))[:30] if whole else 'no number'}, "
                         f"expected {size[0]} x {size[1]} = {size[0] * size[1]}, and none below zero")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(size[1], size[0]).T


def decompress(text):
    """
    The characters of a compressed run list: six bits each from code 48 on, five of a number's digits, low ones first,
    and one for "more follows"; from the fourth number on the difference to the one two places before.
    """
    runs, value, shift = [], 0, 0
    for ch in text:
        bits = ord(ch) - 48
        if not 0 <= bits < 64 or shift > 40:
            raise ValueError(f"run lengths {text[:30]!r}: not COCO's compressed form")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:                   # the sign
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    if shift:
        raise ValueError(f"run lengths {text[:30]!r} end in the middle of a number")
    return runs


def fill_polygon(xy, w, h):
    """
    One polygon as COCO's maskApi.c (rleFrPoly) fills it: the outline is walked on a grid five times as fine, each step
    to another column notes the row it crosses at, and down every column each crossing switches between out and in.
    Parts outside the image are cut off.
    """
    points = (5 * np.array(xy, np.float64).reshape(-1, 2) + 0.5).astype(np.int64)  # towards zero, as in C
    if np.abs(points - np.roll(points, -1, axis=0)).max(1).sum() > 2e7:
        raise ValueError(f"polygon {str(xy)[:60]}: its outline is longer than four million pixels")
    walked = []
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0)):
        dx, dy = abs(x1 - x0), abs(y1 - y0)
        n = max(dx, dy)
        # The lesser coordinate grows from the end where the greater one is smaller: a line and its reverse agree.
        back = x0 > x1 if dx >= dy else y0 > y1
        ax, ay, bx, by = (x1, y1, x0, y0) if back else (x0, y0, x1, y1)
        t = np.arange(n, -1, -1) if back else np.arange(n + 1)
        if dx >= dy:
            line = np.stack((ax + t, (ay + (by - ay) / max(n, 1) * t + 0.5).astype(np.int64)), 1)
        else:
            line = np.stack(((ax + (bx - ax) / n * t + 0.5).astype(np.int64), ay + t), 1)
        walked.append(line)
    u, v = np.concatenate(walked).T
    moved = np.flatnonzero(u[1:] != u[:-1])
    left = u[moved + 1] < u[moved]
    x = (np.where(left, u[moved + 1], u[moved + 1] - 1) + 0.5) / 5 - 0.5
    y = np.ceil(np.clip((np.where(v[moved + 1] < v[moved], v[moved + 1], v[moved]) + 0.5) / 5 - 0.5, 0, h))
    kept = (x == np.floor(x)) & (x >= 0) & (x <= w - 1)
    switches = np.bincount((x[kept] * h + y[kept]).astype(np.int64), minlength=h * w + 1)[:h * w]
    return (np.cumsum(switches) % 2 == 1).reshape(w, h).T
