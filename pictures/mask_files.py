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
import numpy as np

from files.text import naming, path_inside
from pictures.image_files import open_picture
from toy.scenes import open_scene

MAX_OUTLINE = 2 ** 20                       # pixels along all polygons of a mask


@naming()
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
        x, y, bw, bh = coordinates(value["bbox"], "bbox", 4, 4)
        mask = fill_polygons([[x, y, x + bw, y, x + bw, y + bh, x, y + bh]], w, h)
    elif isinstance(value, list) and value:
        polygons = value if isinstance(value[0], list) else [value]
        mask = fill_polygons([coordinates(polygon, "polygon", 6) for polygon in polygons], w, h)
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
    points = np.concatenate([np.reshape(xy, (-1, 2)) for xy in ([polygons] if flat else polygons)])
    outside = (points < 0).any() or (points > size).any()
    notes = {"a flat list, read as one polygon": flat, "a polygon partly outside its image, clipped": outside}
    return [words for words, applies in notes.items() if applies]


def check_size(what, size, of_image):
    """ValueError unless a mask's size is its image's; asked before it is decoded: a wrong one may be huge."""
    if tuple(size) != tuple(of_image):
        raise ValueError(f"mask {str(what)[:60]!r} is {size[0]} x {size[1]} pixels, "
                         f"its image {of_image[0]} x {of_image[1]}; they must be equal")


def coordinates(values, what, least, most=None):
    """The values, if they are so many numbers x, y, ..., each less than a million; else a ValueError."""
    right = isinstance(values, list) and len(values) % 2 == 0 and least <= len(values) <= (most or len(values))
    if not right or not all(type(v) in (int, float) and abs(v) < 1e6 for v in values):
        raise ValueError(f"{what} {str(values)[:60]!r}: expected {least}{'' if most else ' or more'} numbers x, y, ...")
    return values


def read_mask(name, size, root):
    """A file under root of two values, 0 outside and another inside, or an object of a built-in scene."""
    if name.startswith("scene:"):
        scene, _, number = name.partition("#")
        objects = open_scene(scene).objects
        if not number.isdecimal() or int(number) >= len(objects):
            raise ValueError(f"mask {name!r}: expected a scene, # and one of its objects, 0 to {len(objects) - 1}")
        mask = objects[int(number)].mask
        check_size(name, mask.shape[::-1], size)
        return mask
    with open_picture(path_inside(name, root, "mask"), "mask") as (image, _):
        given, pixels = image.size, None
        if given == tuple(size):
            pixels = np.asarray(image.convert("I") if image.mode.startswith("I") else image)
    check_size(name, given, size)
    if pixels.ndim == 3:                    # RGB whose channels are equal; an alpha channel does not count
        color = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1]
        if (color != color[..., :1]).any():
            raise ValueError(f"mask {name}: its channels differ; expected a picture of two values, one of them 0")
        pixels = color[..., 0]
    values = np.unique(pixels)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0) or not np.isfinite(values).all():
        raise ValueError(f"mask {name}: {len(values)} values from {values[0]} to {values[-1]}; "
                         "expected two, 0 outside and another inside")
    return pixels != 0


def decode_runs(value, image_size):
    """COCO's run lengths, zeros first, down the columns -> (h, w) bool."""
    size, counts = value.get("size"), value["counts"]
    if not (isinstance(size, list) and len(size) == 2 and all(type(v) is int and 0 < v < 1e5 for v in size)):
        raise ValueError(f"run lengths with size {str(size)[:60]!r}: expected [height, width] in pixels")
    h, w = size
    check_size(value, (w, h), image_size)
    runs = decompress(counts) if isinstance(counts, str) else counts
    whole = isinstance(runs, list) and all(type(n) is int for n in runs)
    if not whole or min(runs, default=0) < 0 or sum(runs) != h * w:
        raise ValueError(f"run lengths add up to {str(sum(runs))[:30] if whole else 'no number'}, "
                         f"expected {h} x {w} = {h * w}, and none below zero")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(w, h).T


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


def fill_polygons(polygons, w, h):
    """
    The union of polygons [x, y, x, y, ...], filled as COCO's maskApi.c (rleFrPoly) does -> (h, w) bool. Outlines are
    walked on a grid five times as fine; down a column, each row where one crosses the middle is a switch: in or out.
    """
    corners = [(5 * np.array(xy, np.float64).reshape(-1, 2) + 0.5).astype(np.int64) for xy in polygons]  # as C rounds
    starts, ends = np.concatenate(corners), np.concatenate([np.roll(xy, -1, axis=0) for xy in corners])
    if np.abs(starts - ends).max(1).sum() > 5 * MAX_OUTLINE:
        raise ValueError(f"polygons {str(polygons)[:60]}: their outline is longer than {MAX_OUTLINE:,} pixels")
    line, grid = walk(starts, ends)
    moved = np.flatnonzero((line[1:] == line[:-1]) & (grid[1:, 0] != grid[:-1, 0]))            # to another column
    x, y = (np.minimum(grid[moved], grid[moved + 1]).T + 0.5) / 5 - 0.5            # in pixels; x is whole in the middle
    kept = (x == np.floor(x)) & (x >= 0) & (x <= w - 1)
    polygon = np.repeat(np.arange(len(corners)), [len(xy) for xy in corners])[line[moved[kept]]]
    # Counted down the columns. Row h, below the image, is row 0 of the next column: outside again.
    places = (x[kept] * h + np.ceil(np.clip(y[kept], 0, h))).astype(np.int64)
    # Of each polygon, every second switch leads in: it counts one up, the next one down.
    places, depth = places[np.lexsort((places, polygon))], 1 - 2 * (np.arange(len(places)) % 2)
    order = np.argsort(places, kind="stable")
    runs = np.diff(places[order], prepend=0, append=h * w)
    return np.repeat(np.cumsum(np.append(0, depth[order])) > 0, runs).reshape(w, h).T


def walk(starts, ends):
    """Grid points of lines, both ends too, one a step along the longer axis -> line of each (n,), x and y (n, 2)."""
    size = np.abs(ends - starts)
    steps, upright = size.max(1), size[:, 1:] > size[:, :1]
    a, b = (np.where(upright, xy[:, ::-1], xy) for xy in (starts, ends))           # the longer axis first
    # From the end where the longer axis is smaller: a line and its reverse agree.
    first, last = np.where(a[:, :1] > b[:, :1], (b, a), (a, b))
    line = np.repeat(np.arange(len(steps)), steps + 1)
    step = np.arange(len(line)) - (np.cumsum(steps + 1) - steps - 1)[line]
    slope = (last - first)[:, 1] / np.maximum(steps, 1)
    points = np.stack([first[line, 0] + step, (first[line, 1] + slope[line] * step + 0.5).astype(np.int64)], 1)
    return line, np.where(upright[line], points[:, ::-1], points)
