"""
What is where in a scene: its layout, in units of the image side, made in well under a millisecond. Captions and answers
come from it alone, so they need no pixel and are the same at any size. The split is part of the random key: no two
splits share a scene. The classes are drawn before the ground they stand on, so each class is equally frequent whatever
the land cover is, and a yes/no question tells nothing by its text.
"""
import math
from collections import namedtuple
from functools import lru_cache

import numpy as np

SPLITS = ("train", "val", "test")
SIZES = (64, 2048)                          # the smallest side and the largest, in pixels
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
# Half width or radius: the least, and how much more; height of the waves.
FEATURES = {"river": (0.085, 0.03, 0.05), "road": (0.042, 0, 0), "runway": (0.085, 0, 0), "lawn": (0.1, 0.04, 0),
            "lake": (0.2, 0.06, 0.1), "island": (0.15, 0.06, 0.12), "beach": (0, 0, 0.02), None: (0, 0, 0)}
# Least length and how much more; the same of widths, where an object is not as wide as long.
LENGTHS = {"storage tank": (0.1, 0.025), "plane": (0.165, 0.035), "ship": (0.155, 0.035), "vehicle": (0.09, 0),
           "building": (0.135, 0.075)}
WIDTHS = {"ship": (0.055, 0.013), "vehicle": (0.045, 0), "building": (0.105, 0.04)}
CONTRAST = 78                               # least distance in RGB between an object's color and the ground below it
STREETS = 0.3                               # from one street of a suburb to the next

Key = namedtuple("Key", "split seed index size", defaults=(None,))      # what names a scene; texts need no size
# An object: center, length, width and circumscribed radius in image sides, heading in radians.
Item = namedtuple("Item", "name color x y angle length width radius variant")
Layout = namedtuple("Layout", "cover feature angle items")              # angle: of fields, slabs and streets


class Feature(namedtuple("Feature", "kind angle x y half wave frequency phase")):
    """A river, road or runway is a band, a lake or island a blob, a beach a half plane; the rest of it is numbers."""

    def depth(self, x, y):
        """How far (x, y) lies inside, in image sides; negative outside. Floats or arrays."""
        x, y = x - self.x, y - self.y
        if self.kind in ("lake", "island"):
            turn = np.arctan2(y, x)
            bumps = np.sin(3 * turn + self.phase) + 0.8 * np.sin(2 * turn - 2 * self.phase)
            return self.half * (1 + self.wave * bumps) - np.sqrt(x * x + y * y)
        along, across = rotate(self.angle, x, y)
        if self.wave:
            across = across - self.wave * np.sin(self.frequency * along + self.phase)
        return across if self.kind == "beach" else self.half - abs(across)


def rotate(angle, x, y):
    """The coordinates of (x, y) in a frame that is turned by angle."""
    c, s = math.cos(angle), math.sin(angle)
    return c * x + s * y, c * y - s * x


def check_key(split, index, seed, size):
    if split not in SPLITS:
        raise ValueError(f"scene split {split!r}: expected one of {', '.join(SPLITS)}")
    for what, value, least, most in (("index", index, 0, 2 ** 32), ("seed", seed, 0, 2 ** 32), ("size", size, *SIZES)):
        if not isinstance(value, (int, np.integer)) or not least <= value <= most:
            raise ValueError(f"scene {what} {value!r}: expected a whole number from {least} to {most}")


def scene_rng(scene, stream):
    """Streams: 0 layout, 1 pixels, from 2 on the kinds of texts in scenes.py; none changes another's draws."""
    return np.random.default_rng([scene.seed, SPLITS.index(scene.split), scene.index, stream])


def choose(rng, options):
    return options[int(rng.random() * len(options))]


@lru_cache(maxsize=2048)
def make_layout(split, index, seed):
    """The layout of one scene. Classes are fixed first; land and places are drawn again until every class has one."""
    rng = scene_rng(Key(split, seed, index), 0)
    n_classes = 1 + int(np.searchsorted((0.4, 0.8), rng.random()))
    names = [CLASSES[i] for i in rng.permutation(len(CLASSES))[:n_classes]]
    most = 6 - n_classes                    # of one class
    while True:
        layout = choose_land(rng, names)
        for name in names:                  # only a class alone is mixed, to keep captions short
            place_class(rng, layout, name, 1 + int(rng.random() * most), may_mix=n_classes == 1)
        if {item.name for item in layout.items} == set(names):
            return layout
        most = max(1, most - 1)


def choose_land(rng, names):
    """A land cover and a feature on which all these classes make sense, without objects yet."""
    ship, plane, ashore = "ship" in names, "plane" in names, names != ["ship"]
    kinds = (None, "river", "lake", "road")
    if ship and not plane and rng.random() < (0.35 if ashore else 0.7):
        cover, kinds = "water", ("beach",) if ashore else (None, "beach", "island")
    elif rng.random() < 0.5:
        homes = not plane and ("building" in names or "vehicle" in names)
        cover = "suburb" if homes and rng.random() < 0.7 else choose(rng, ("concrete", "asphalt"))
        kinds = (None, "river", "lake") if cover == "suburb" else (None, "road", "runway" if plane else "lawn")
    else:
        wild = () if plane else ("farmland", "farmland", "forest", "forest")       # twice, for planes never stand there
        cover = choose(rng, (*wild, "grass", "sand"))
    if ship and cover != "water":
        kinds = ("river", "lake")
    kind, angle, phase = choose(rng, kinds), rng.random() * math.pi, rng.random() * 2 * math.pi
    u, v, w = rng.random(3).tolist()        # plain floats: they keep the arrays of the drawing in float32
    x, y = 0.5 + 0.4 * (u - 0.5), 0.5 + 0.4 * (v - 0.5)
    if kind == "beach":                     # the land keeps about a third of the picture
        angle, reach = 2 * angle, (0.12 if ashore else 0.2) + 0.06 * w
        x, y = 0.5 - math.sin(angle) * reach, 0.5 + math.cos(angle) * reach
    least, more, wave = FEATURES[kind]
    feature = Feature(kind, angle, x, y, least + more * w, wave, 5 + 4 * u, phase) if kind else None
    return Layout(cover, feature, rng.random() * math.pi / 2, [])


def surface(layout, name):
    """What lies under the objects of a class: a key of GROUNDS, and whether that is inside the feature."""
    kind = layout.feature.kind if layout.feature else None
    if name == "ship":
        return "water", layout.cover != "water"
    if layout.cover == "water":
        return "sand", True
    if name == "vehicle" and (kind == "road" or layout.cover == "suburb"):
        return "road", kind == "road"
    return layout.cover, False


def place_class(rng, layout, name, count, may_mix):
    """Adds up to count objects of a class to the layout; where 30 places in a row do not fit, one less."""
    under, inside = surface(layout, name)
    colors = [c for c in PALETTES[name] if math.dist(COLORS[c], GROUNDS[under]) >= CONTRAST]
    first, second = choose(rng, colors), choose(rng, colors)
    mixed = may_mix and rng.random() < 0.25
    heading = layout.angle + choose(rng, (0, math.pi / 2)) if under in URBAN else rng.random() * 2 * math.pi
    for number in range(count):
        color = second if mixed and number >= count - count // 2 else first
        for _ in range(30):
            item = propose(rng, layout, name, color, heading, under, inside)
            if fits(layout, item, under, inside):
                layout.items.append(item)
                break


def propose(rng, layout, name, color, heading, under, inside):
    """One object of the class at a random place; fits() says whether it may stay."""
    a, b, x, y, t, variant = rng.random(6).tolist()
    length = LENGTHS[name][0] + LENGTHS[name][1] * a
    width = WIDTHS[name][0] + WIDTHS[name][1] * b if name in WIDTHS else length
    f, angle = layout.feature, heading + 0.12 * (t - 0.5)
    if layout.cover == "suburb" and name != "ship":
        if name == "building":
            length, width = 0.125 + 0.045 * a, 0.1 + 0.025 * b
        x, y, angle = place_in_suburb(layout, name, x, y, t)
    elif inside and f.kind in ("river", "road"):    # along the band, in one of two lanes
        along, lane = 1.3 * (x - 0.5), (0.5 if y < 0.5 else -0.5) * f.half
        lane += f.wave * math.sin(f.frequency * along + f.phase)
        slope = math.atan(f.wave * f.frequency * math.cos(f.frequency * along + f.phase))
        angle = f.angle + slope + (math.pi if y < 0.5 else 0)
        c, s = math.cos(f.angle), math.sin(f.angle)
        x, y = f.x + c * along - s * lane, f.y + s * along + c * lane
    radius = math.hypot(length, width) / 2 if name in ("building", "ship", "vehicle") else length / 2 + 0.005
    return Item(name, color, x, y, angle, length, width, radius, variant)


def place_in_suburb(layout, name, x, y, t):
    """The middle of a block, or for a vehicle one lane of a street: (x, y, heading)."""
    u, v = rotate(layout.angle, x - 0.5, y - 0.5)
    angle = layout.angle + (math.pi / 2 if t < 0.5 else 0)
    if name == "vehicle" and t < 0.5:
        u = round(u / STREETS) * STREETS + (0.012 if t < 0.25 else -0.012)
    elif name == "vehicle":
        v = round(v / STREETS) * STREETS + (0.012 if t < 0.75 else -0.012)
    else:
        slack = 0.03 if name == "building" else 0.1
        u = (math.floor(u / STREETS) + 0.5) * STREETS + slack * (t - 0.5)
        v = (math.floor(v / STREETS) + 0.5) * STREETS + slack * (0.5 - t)
    c, s = math.cos(layout.angle), math.sin(layout.angle)
    return 0.5 + c * u - s * v, 0.5 + s * u + c * v, angle


def fits(layout, item, under, inside):
    """Inside the image, on its surface with every end, and clear of the other objects."""
    edge = item.radius + 0.02
    if not (edge < item.x < 1 - edge and edge < item.y < 1 - edge):
        return False
    if layout.feature:
        reach = 0.45 * item.length if item.name == "ship" or under == "road" else 0         # long: its ends, no circle
        clear = 0 if inside and under == "road" else (item.width / 2 if reach else item.radius) + 0.012
        for step in {-reach, 0, reach}:
            depth = layout.feature.depth(item.x + step * math.cos(item.angle), item.y + step * math.sin(item.angle))
            if (depth if inside else -depth) < clear:
                return False
    return all(math.hypot(item.x - o.x, item.y - o.y) > item.radius + o.radius + 0.025 for o in layout.items)
