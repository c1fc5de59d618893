"""Readers of the data sets about regions, which stand in the table of corpora.py (Aquila-plus's mask-text data).

- `read_coco` makes questions and answers of any COCO instance file: every statement follows from the class names, boxes
  and areas in it, the types of records keep to SHARES, and no answer to a yes-no question comes to outweigh the other.
- `read_osprey` takes over Osprey-724K's texts, and numbers the regions anew.
- Both pass masks on as published, RLE, polygons or a box; masks.py decodes them.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from corpus import (IMAGE_SLOT, SHORT, Corpus, digest, expect, get, listed, llava_turns, plain_name, prompt, read_json,
                    record)


# ---------------------------------------------------------------------------------------------------------------------
# Regions of a COCO instance file

# Percent of the records of each type; what one image cannot give is made up for on later ones.
# ASSUMPTION: nothing is known of the mix of Aquila-plus-100K.
SHARES = {"region class": 20, "region caption": 15, "region detail": 10, "region position": 10, "region count": 10,
          "region comparison": 10, "region reasoning": 10, "region presence": 10, "presence": 5}
PER_REGION = 3                                          # records of an image at most, on the average of its regions
SAMPLINGS = ("random", "popular", "adversarial")        # POPE's three ways to name a class that is not there
COMPASS = ("to its right", "to its lower right", "below it", "to its lower left", "to its left", "to its upper left",
           "above it", "to its upper right")            # clockwise from the x axis, as y points down
AIRCRAFT = {"plane", "airplane", "helicopter"}
VEHICLES = {"vehicle", "small vehicle", "large vehicle", "car", "truck", "bus"}
FIELDS = {"baseball diamond", "basketball court", "tennis court", "ground track field", "soccer ball field"}
REASONS = (                     # classes of the region, classes near it, at least so many of them, what follows
    ({"ship", "boat"}, {"harbor"}, 1, "it is probably moored there"),
    (AIRCRAFT, AIRCRAFT, 2, "it is probably parked on an apron"),
    (VEHICLES, {"bridge"}, 1, "it is probably on the bridge or on the road that leads to it"),
    (VEHICLES, VEHICLES, 4, "it is probably in a parking lot or in a line of traffic"),
    ({"storage tank"}, {"storage tank"}, 2, "it is probably part of a tank farm"),
    (FIELDS, FIELDS, 1, "it is probably part of a sports ground"),
    ({"cup", "bowl", "fork", "knife", "spoon"}, {"dining table"}, 1, "it is probably part of a laid table"),
)
IRREGULAR = {"person": "people", "sheep": "sheep", "mouse": "mice", "knife": "knives", "aircraft": "aircraft"}


@dataclass(eq=False)
class Region:
    name: str
    mask: object                # as masks.py reads it
    area: float
    x: float                    # of the box: left, top, sides; in pixels
    y: float
    width: float
    height: float

    @property
    def center(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass
class Picture:
    id: str
    file: str
    width: float
    height: float
    rng: random.Random
    regions: list[Region] = field(default_factory=list)
    present: set[str] = field(default_factory=set)
    crowds: set[str] = field(default_factory=set)       # classes with a group that nobody counted
    asked: set[tuple] = field(default_factory=set)


class Question(NamedTuple):
    wording: str                # key of PROMPTS
    answer: str
    regions: tuple[Region, ...] = ()
    variant: str = ""           # within which yes and no are balanced
    one: str = ""


def number(value: object, where: str) -> float:
    """The value, if arithmetic cannot overflow on it; true, NaN and 10**400 are no coordinates."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e9:
        raise ValueError(f"{where}: expected a number of pixels, found {str(value)[:30]}")
    return value


def box_of(row: dict, where: str) -> list[float]:
    box = get(row, "bbox", list, where)
    if len(box) != 4:
        raise ValueError(f"{where}: 'bbox' has {len(box)} numbers, expected x, y, width, height")
    return [number(value, f"{where}: 'bbox'") for value in box]


def mask_of(row: dict, where: str) -> object:
    """The `segmentation` of an annotation as it stands, RLE or polygons. A flat list is one polygon; what has no
    polygon of three corners is its box."""
    mask = expect(row.get("segmentation") or [], (dict, list), f"{where}: 'segmentation'")
    if isinstance(mask, dict):
        get(mask, "size", list, where)
        get(mask, "counts", (str, list), where)
        return mask
    where = f"{where}: polygon"
    polygons = [mask] if mask and not isinstance(mask[0], list) else mask
    polygons = [[number(x, where) for x in expect(polygon, list, where)] for polygon in polygons]
    return [polygon for polygon in polygons if len(polygon) >= 6] or {"bbox": box_of(row, where)}


def read_coco(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """{"images", "annotations", "categories"}: questions about the instances of every image, `per_image` at most.

    A crowd (iscrowd) is no region, as one mask holds many things: it counts as present, its class is not counted, and
    nothing is said of what is near. Paths are `file_name` as it stands.
    """
    pictures, classes = read_pictures(root / corpus.file.replace("{split}", split))
    counts = Counter()
    for present in (picture.present for picture in pictures):
        counts.update(("seen", one) for one in present)
        counts.update(("seen", one, other) for one in present for other in present - {one})
    for picture in pictures:
        yield from picture_records(corpus, split, picture, classes, counts)


def read_pictures(path: Path) -> tuple[list[Picture], list[str]]:
    """Every image of the file with its regions, and the names of all classes."""
    data, pictures, key = read_json(path), {}, (int, str)
    names = {get(row, "id", key, where): plain_name(get(row, "name", str, where))
             for where, row in listed(data, "categories", path)}
    for where, row in listed(data, "images", path):
        image, file = get(row, "id", key, where), get(row, "file_name", str, where)
        sides = [number(row.get(side), f"{where}: '{side}'") for side in ("width", "height")]
        if image in pictures or min(sides) < 1:
            raise ValueError(f"{where}: id {image} with sides {sides}; expected every id once and sides of 1 or more")
        pictures[image] = Picture(str(image), file, *sides, random.Random(digest(str(image))))
    for where, row in listed(data, "annotations", path):
        image, category = get(row, "image_id", key, where), get(row, "category_id", key, where)
        if image not in pictures or category not in names:
            raise ValueError(f"{where}: image {image} or category {category} is not in the file; is it whole?")
        picture, name = pictures[image], names[category]
        picture.present.add(name)
        if row.get("iscrowd"):
            picture.crowds.add(name)
            continue
        box = box_of(row, where)
        area = number(row.get("area", box[2] * box[3]), f"{where}: 'area'")
        if min(*box[2:], area) > 0:
            picture.regions.append(Region(name, mask_of(row, where), area, *box))
    return list(pictures.values()), sorted(set(names.values()))


# ---------------------------------------------------------------------------------------------------------------------
# What is asked about a picture

def picture_records(corpus: Corpus, split: str, picture: Picture, classes: list, counts: Counter) -> Iterator[dict]:
    """Always the type that is furthest behind its share. `counts`: images that show a class, or two of them; records,
    of each type, and of each answer of a balanced question."""
    for n in range(min(corpus.per_image, PER_REGION * len(picture.regions))):
        behind = sorted(SHARES, key=lambda kind: counts[kind] - SHARES[kind] / 100 * (counts["all"] + 1))
        found = ((kind, question) for kind in behind if (question := new_question(kind, picture, classes, counts)))
        kind, question = next(found, ("", None))
        if question is None:
            return
        counts.update(["all", kind, (kind, question.variant, question.answer)])
        record_id = f"{corpus.name}-{split}-{picture.id}-{n}"
        extra = {"sampling": question.variant} if kind.endswith("presence") else {}
        if question.regions:
            extra["masks"] = [region.mask for region in question.regions]
        text = prompt(question.wording, record_id, one=question.one)
        yield record(record_id, corpus.images + picture.file, text, question.answer, type=kind, **extra)


def new_question(kind: str, picture: Picture, classes: list, counts: Counter) -> Question | None:
    """One of this type that was not yet asked about the picture."""
    for region in picture.rng.sample(picture.regions, len(picture.regions)):
        for question in questions(kind, picture, region, classes, counts):
            key = (question.wording, question.one, *map(id, question.regions))
            if key not in picture.asked:
                picture.asked.add(key)
                return question
    return None


def questions(kind: str, picture: Picture, region: Region, classes: list, counts: Counter) -> Iterator[Question]:
    others = [other for other in picture.regions if other is not region]
    if kind == "region class":
        yield Question(kind, region.name, (region,))
    elif kind == "region caption":
        text = f"This is {a(region.name)} at the {cell(picture, region)} of the image."
        yield Question(kind, text, (region,))
    elif kind == "region detail":
        yield Question(kind, detail(picture, region, others), (region,))
    elif kind == "region position":
        yield Question(kind, cell(picture, region), (region,))
    elif kind == "region count" and region.name not in picture.crowds:
        yield Question(kind, str(1 + sum(other.name == region.name for other in others)), (region,))
    elif kind == "region comparison":
        for wording, answer in open_answers(counts, kind, ("same kind", "larger")):
            for other in others:
                big, small = (region, other) if answer == "yes" else (other, region)
                if wording == "same kind" and (region.name == other.name) == (answer == "yes"):
                    yield Question(wording, answer, (region, other), wording)
                if wording == "larger" and big.area > 1.25 * small.area:        # near ties are not asked
                    yield Question(wording, answer, (region, other), wording)
    elif kind == "region reasoning" and not picture.crowds:
        yield Question(kind, reasoning(region, others), (region,))
    elif kind in ("region presence", "presence"):
        here, asked = ({region.name}, (region,)) if kind == "region presence" else (picture.present, ())
        for sampling, answer in open_answers(counts, kind, SAMPLINGS):
            for name in [region.name] if answer == "yes" else absent(classes, picture, sampling, here, counts):
                yield Question(kind, answer, asked, sampling, a(name))


def open_answers(counts: Counter, kind: str, variants: tuple[str, ...]) -> list[tuple[str, str]]:
    """(variant, answer), the rarest first, that keep yes and no within one of each other in every variant."""
    pairs = [(variant, *answers) for variant in variants for answers in (("yes", "no"), ("no", "yes"))]
    pairs = [(v, this) for v, this, other in pairs if counts[kind, v, this] <= counts[kind, v, other]]
    return sorted(pairs, key=lambda pair: counts[kind, *pair])


def absent(names: list[str], picture: Picture, sampling: str, here: set[str], counts: Counter) -> list[str]:
    """Classes not in `here`, the first to ask about first: any, the most frequent in the file (popular), or those seen
    most often beside the classes of the picture (adversarial)."""
    names = [name for name in names if name not in here]
    picture.rng.shuffle(names)          # decides between equals
    if sampling == "popular":
        names.sort(key=lambda name: -counts["seen", name])
    if sampling == "adversarial":
        names.sort(key=lambda name: -sum(counts["seen", name, other] for other in picture.present))
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Its words

def detail(picture: Picture, region: Region, others: list[Region]) -> str:
    share = min(100 * region.area / (picture.width * picture.height), 100)
    covers = f"about {share:.2g}" if share >= 0.01 else "less than 0.01"
    long, short = max(region.width, region.height), min(region.width, region.height)
    shape = "about as wide as tall"
    if long >= 1.25 * short:
        sides = ("wide", "tall") if long == region.width else ("tall", "wide")
        shape = f"about {long / short:.1f} times as {sides[0]} as {sides[1]}"
    same = [other.area for other in others if other.name == region.name]
    rank = f"one of {len(same) + 1} {plural(region.name)}" if same else f"the only {region.name}"
    if region.name in picture.crowds:
        rank = f"one of many {plural(region.name)}"
    elif same and not min(same) <= region.area <= max(same):
        rank = rank.replace("one", "the largest" if region.area > max(same) else "the smallest", 1)
    return (f"This is {a(region.name)} at the {cell(picture, region)} of the image. It covers {covers} percent of the "
            f"image and is {shape}. It is {rank} there." + ("" if picture.crowds else f" {nearest(region, others)}"))


def nearest(region: Region, others: list[Region]) -> str:
    if not others:
        return "No other object is labeled."
    other = min(others, key=lambda other: (gap(region, other), math.dist(region.center, other.center)))
    (x, y), (other_x, other_y), space = region.center, other.center, gap(region, other)
    direction = COMPASS[round(math.atan2(other_y - y, other_x - x) / (math.pi / 4)) % 8]
    distance = "some way off" if space > max(region.width, region.height) else "close by"
    return f"The nearest other object is {a(other.name)} {direction}, {distance}."


def reasoning(region: Region, others: list[Region]) -> str:
    """A rule of REASONS on what lies within the region's own length, else what most of that is."""
    reach = max(region.width, region.height)
    near = Counter(other.name for other in others if gap(region, other) <= reach)
    if not near:
        return f"No other labeled object is near this {region.name}, so it stands alone."
    reasons = [reason for names, beside, least, reason in REASONS
               if region.name in names and sum(near[name] for name in beside) >= least]
    common = near.most_common(1)[0][0]
    rest = f"it belongs to a group of {plural(common)}" if common == region.name else f"it lies beside {plural(common)}"
    things = [a(name) if count == 1 else f"{count} {plural(name)}" for name, count in near.most_common()]
    listing = " and ".join([", ".join(things[:-1]), things[-1]] if things[1:] else things)
    return f"Near this {region.name} there {'is' if near.total() == 1 else 'are'} {listing}, so {[*reasons, rest][0]}."


def plural(name: str) -> str:
    if name in IRREGULAR or re.search("[^su]s$", name):     # scissors, skis
        return IRREGULAR.get(name, name)
    return re.sub("(?<=[^aeiou])y$", "ie", name) + ("es" if re.search("(s|x|ch|sh)$", name) else "s")


def a(name: str) -> str:
    if plural(name) == name and name.endswith("s"):
        return name
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def cell(picture: Picture, region: Region) -> str:
    """The ninth of the image in which the middle of the box lies."""
    x, y = region.center
    column = ("left", "", "right")[min(max(int(3 * x / picture.width), 0), 2)]
    line = ("top", "", "bottom")[min(max(int(3 * y / picture.height), 0), 2)]
    return f"{line} {column}".strip() or "center"


def gap(one: Region, two: Region) -> float:
    """Pixels between two boxes, 0 where they touch."""
    return math.hypot(max(two.x - one.x - one.width, one.x - two.x - two.width, 0),
                      max(two.y - one.y - one.height, one.y - two.y - two.height, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Osprey-724K

REGION = re.compile(r"<region(\d{1,4})>")


def read_osprey(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """Training rows: {"file_name", "annotation": [{"segmentation"}], "conversations" or "description"}. Rows of its
    evaluation: {"image", "annotation": {"segmentation"}, "text"}, without answers, so that these are "unknown" here.

    Only regions that the text mentions are kept, and numbered anew without holes. In questions `<region2>` is a slot.
    Answers name a region by its number, which a slot does not show: in such a row, as in Osprey's own prompt, the first
    question begins with a list of names and slots, and the rest of the text has the names only.
    """
    path = root / corpus.file
    for row_number, row in enumerate(expect(read_json(path), list, str(path))):
        where, record_id = f"{path}: row {row_number}", f"{corpus.name}-{row_number}"
        annotations = get(row, "annotation", (list, dict), where)
        annotations = [annotations] if isinstance(annotations, dict) else annotations
        # COCO_train2014_000000057870.jpg lies in COCO's 2017 folder, under the number alone.
        image = get(row, "image" if "text" in row else "file_name", str, where).split("_")[-1]
        turns = osprey_turns(row, record_id, where)
        if not turns:
            continue            # Osprey passes over these too
        mentions = sorted({int(n) for turn in turns for n in REGION.findall(turn["value"])})
        if not all(1 <= n <= len(annotations) for n in mentions):
            raise ValueError(f"{where}: the text mentions regions {mentions}, but the row has {len(annotations)}")
        named = any(REGION.search(turn["value"]) for turn in turns if turn["from"] == "gpt")
        form = "region{}" if named else "<region{}>"
        for turn in turns:
            text = turn["value"].replace("<image>", "").strip()
            turn["value"] = REGION.sub(lambda match: form.format(mentions.index(int(match[1])) + 1), text)
            if corpus.name in ("osprey-short", "osprey-parts") and turn["from"] == "human":
                turn["value"] += SHORT
        if named:
            names = ", ".join(f"region{i} <region{i}>" for i in range(1, len(mentions) + 1))
            turns[0]["value"] = prompt("region names", record_id, regions=names) + " " + turns[0]["value"]
        turns[0]["value"] = IMAGE_SLOT + turns[0]["value"]
        masks = [mask_of(expect(annotations[n - 1], dict, where), f"{where}: region {n}") for n in mentions]
        yield {"id": record_id, "image": corpus.images + image, "conversations": turns, "masks": masks,
               "type": corpus.type}


def osprey_turns(row: dict, record_id: str, where: str) -> list[dict]:
    if "conversations" in row:
        return llava_turns(row, where)
    texts = []
    if "text" in row:
        texts = [get(row, "text", str, where).replace("<region>", "<region1>"), "unknown"]
    else:
        for text in get(row, "description", list, where):
            match = re.fullmatch(r"\s*(<region\d+>):\s*(.*)", expect(text, str, f"{where}: description"), re.DOTALL)
            if match is None:
                raise ValueError(f"{where}: description {text[:40]!r}, expected '<region1>: text'")
            question = prompt("region detail", record_id + match[1]).replace("<region>", match[1])
            texts += [question, match[2].strip()]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
