"""
Questions and answers about the regions of any COCO instance file, for Aquila-plus's mask-text data.

Every answer follows from the class names, boxes and areas of the file. The types of records keep to SHARES, and no
answer to a yes-no question comes to outweigh the other. Masks are passed on as published: RLE, polygons or a box.
"""
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import NamedTuple

from corpora.prompts import choose_prompt, stable_hash
from corpora.reading import box_of, get, listed, make_record, mask_of, pixels, plain_name, published_file
from files.text import read_json

# Percent of the records of each type; what one image cannot give is made up for on later ones.
# ASSUMPTION: nothing is known of the mix of Aquila-plus-100K.
SHARES = {"region class": 20, "region caption": 15, "region detail": 10, "region position": 10, "region count": 10,
          "region comparison": 10, "region reasoning": 10, "region presence": 10, "presence": 5}
PER_REGION = 3                              # records of an image at most, on the average of its regions
SAMPLINGS = ("random", "popular", "adversarial")                                   # POPE's ways to name what is absent
COMPASS = ("to its right", "to its lower right", "below it", "to its lower left", "to its left", "to its upper left",
           "above it", "to its upper right")                                       # clockwise, as y points down
AIRCRAFT = {"plane", "airplane", "helicopter"}
VEHICLES = {"vehicle", "small vehicle", "large vehicle", "car", "truck", "bus"}
FIELDS = {"baseball diamond", "basketball court", "tennis court", "ground track field", "soccer ball field"}
REASONS = (                                 # classes of the region, classes near it, at least so many, what follows
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
    name: str                               # its class
    mask: object                            # as published
    area: float
    x: float                                # of the box: left, top, sides; in pixels
    y: float
    width: float
    height: float

    @property
    def center(self):
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass
class Picture:
    id: str
    file: str
    width: float
    height: float
    rng: random.Random
    regions: list = field(default_factory=list)
    present: set = field(default_factory=set)                                      # classes
    crowds: set = field(default_factory=set)                                       # classes with an uncounted group
    asked: set = field(default_factory=set)


class Survey(NamedTuple):
    classes: list                           # of the whole file
    seen: Counter                           # {class, or pair of classes: images that show it}
    made: Counter                           # records so far: {"all", type, or (type, variant, answer): so many}


class Question(NamedTuple):
    wording: str                            # key of PROMPTS
    answer: str
    regions: tuple = ()                     # that it is about
    variant: str = ""                       # yes and no are balanced among the questions of one
    one: str = ""                           # the class that is asked for, with its article


def read_coco(corpus, root, split):
    """
    {"images", "annotations", "categories"}: questions about the instances of every image, `per_image` at most.

    A crowd (iscrowd) is no region, as one mask holds many things: it counts as present, its class is not counted, and
    nothing is said of what is near.
    """
    pictures, classes = read_pictures(published_file(corpus, root, split))
    survey = Survey(classes, Counter(), Counter())
    for picture in pictures:
        survey.seen.update([*picture.present, *permutations(picture.present, 2)])
    for picture in pictures:
        yield from picture_records(corpus, split, picture, survey)


def read_pictures(path):
    """-> every image of the file with its regions, and the names of all classes."""
    data, pictures, names, key = read_json(path), {}, {}, (int, str)
    for where, row in listed(data, "categories", path):
        names[get(row, "id", key, where)] = plain_name(get(row, "name", str, where))
    for where, row in listed(data, "images", path):
        image, file = get(row, "id", key, where), get(row, "file_name", str, where)
        sides = [pixels(row.get(side), f"{where}: '{side}'") for side in ("width", "height")]
        if image in pictures or min(sides) < 1:
            raise ValueError(f"{where}: id {image} with sides {sides}; expected every id once and sides of 1 or more")
        pictures[image] = Picture(str(image), file, *sides, random.Random(stable_hash(str(image))))
    for where, row in listed(data, "annotations", path):
        image, category = get(row, "image_id", key, where), get(row, "category_id", key, where)
        if image not in pictures or category not in names:
            raise ValueError(f"{where}: image {image} or category {category} is not in the file; is it whole?")
        picture, name = pictures[image], names[category]
        picture.present.add(name)
        if row.get("iscrowd"):
            picture.crowds.add(name)
            continue
        x, y, width, height = box_of(row, where)
        area = pixels(row.get("area", width * height), f"{where}: 'area'")
        if min(width, height, area) > 0:
            picture.regions.append(Region(name, mask_of(row, where), area, x, y, width, height))
    return list(pictures.values()), sorted(set(names.values()))


def picture_records(corpus, split, picture, survey):
    for n in range(min(corpus.per_image, PER_REGION * len(picture.regions))):
        kind, question = next_question(picture, survey)
        if question is None:
            return
        survey.made.update(["all", kind, (kind, question.variant, question.answer)])
        more = {"sampling": question.variant} if kind.endswith("presence") else {}
        if question.regions:
            more["masks"] = [region.mask for region in question.regions]
        record_id = f"{corpus.name}-{split}-{picture.id}-{n}"
        text = choose_prompt(question.wording, record_id, one=question.one)
        yield make_record(record_id, corpus.images + picture.file, text, question.answer, type=kind, **more)


def next_question(picture, survey):
    """(type, question), of the type furthest behind its share that has a new one; (None, None) if none has."""
    made = survey.made
    for kind in sorted(SHARES, key=lambda kind: made[kind] - SHARES[kind] / 100 * (made["all"] + 1)):
        for region in picture.rng.sample(picture.regions, len(picture.regions)):
            for question in possible_questions(kind, picture, region, survey):
                key = (question.wording, question.one, *map(id, question.regions))
                if key not in picture.asked:
                    picture.asked.add(key)
                    return kind, question
    return None, None


def possible_questions(kind, picture, region, survey):
    """Every question of this type that starts from this region. What a crowd leaves open is not asked."""
    others = [other for other in picture.regions if other is not region]
    if kind == "region class":
        yield Question(kind, region.name, (region,))
    elif kind == "region caption":
        yield Question(kind, caption(picture, region), (region,))
    elif kind == "region detail":
        yield Question(kind, detail(picture, region, others), (region,))
    elif kind == "region position":
        yield Question(kind, place_in_ninths(picture, region), (region,))
    elif kind == "region count" and region.name not in picture.crowds:
        yield Question(kind, str(1 + sum(other.name == region.name for other in others)), (region,))
    elif kind == "region reasoning" and not picture.crowds:
        yield Question(kind, reasoning(region, others), (region,))
    elif kind == "region comparison":
        for (wording, answer), other in product(open_answers(kind, ("same kind", "larger"), survey), others):
            big, small = (region, other) if answer == "yes" else (other, region)
            fits = big.area > 1.25 * small.area                                    # near ties are not asked
            if wording == "same kind":
                fits = (region.name == other.name) == (answer == "yes")
            if fits:
                yield Question(wording, answer, (region, other), wording)
    elif kind in ("region presence", "presence"):
        here, asked = ({region.name}, (region,)) if kind == "region presence" else (picture.present, ())
        for sampling, answer in open_answers(kind, SAMPLINGS, survey):
            for name in [region.name] if answer == "yes" else absent_classes(picture, here, sampling, survey):
                yield Question(kind, answer, asked, sampling, with_article(name))


def open_answers(kind, variants, survey):
    """(variant, answer), the rarest first, that keep yes and no within one of each other in every variant."""
    other = {"yes": "no", "no": "yes"}
    pairs = [(variant, answer) for variant, answer in product(variants, other)
             if survey.made[kind, variant, answer] <= survey.made[kind, variant, other[answer]]]
    return sorted(pairs, key=lambda pair: survey.made[kind, *pair])


def absent_classes(picture, here, sampling, survey):
    """
    Classes that are not here, the first to ask about first: any (random), the most frequent in the file (popular), or
    those seen most often beside the classes of the picture (adversarial).
    """
    names = [name for name in survey.classes if name not in here]
    picture.rng.shuffle(names)              # decides between equals
    if sampling == "popular":
        names.sort(key=lambda name: -survey.seen[name])
    if sampling == "adversarial":
        names.sort(key=lambda name: -sum(survey.seen[name, other] for other in picture.present))
    return names


def caption(picture, region):
    return f"This is {with_article(region.name)} at the {place_in_ninths(picture, region)} of the image."


def detail(picture, region, others):
    """Place, size, shape, rank among its kind, and the nearest other region."""
    share = min(100 * region.area / (picture.width * picture.height), 100)
    covers = f"about {share:.2g}" if share >= 0.01 else "less than 0.01"
    long, short = max(region.width, region.height), min(region.width, region.height)
    shape = "about as wide as tall"
    if long >= 1.25 * short:
        sides = "wide as tall" if long == region.width else "tall as wide"
        shape = f"about {long / short:.1f} times as {sides}"
    areas = [other.area for other in others if other.name == region.name]
    kind, n = plural(region.name), len(areas) + 1
    rank = f"one of {n} {kind}"
    if region.name in picture.crowds:
        rank = f"one of many {kind}"
    elif not areas:
        rank = f"the only {region.name}"
    elif region.area > max(areas):
        rank = f"the largest of {n} {kind}"
    elif region.area < min(areas):
        rank = f"the smallest of {n} {kind}"
    text = f"{caption(picture, region)} It covers {covers} percent of the image and is {shape}. It is {rank} there."
    return text if picture.crowds else f"{text} {nearest(region, others)}"


def nearest(region, others):
    """The other region with the least gap, of several the one whose middle is nearest."""
    if not others:
        return "No other object is labeled."
    other = min(others, key=lambda other: (gap(region, other), math.dist(region.center, other.center)))
    (x, y), (other_x, other_y) = region.center, other.center
    direction = COMPASS[round(math.atan2(other_y - y, other_x - x) / (math.pi / 4)) % 8]
    distance = "some way off" if gap(region, other) > max(region.width, region.height) else "close by"
    return f"The nearest other object is {with_article(other.name)} {direction}, {distance}."


def reasoning(region, others):
    """What lies within the region's own length, and what follows: the first rule of REASONS that fits."""
    reach = max(region.width, region.height)
    near = Counter(other.name for other in others if gap(region, other) <= reach)
    if not near:
        return f"No other labeled object is near this {region.name}, so it stands alone."
    things = [with_article(name) if count == 1 else f"{count} {plural(name)}" for name, count in near.most_common()]
    listing = f"{', '.join(things[:-1])} and {things[-1]}" if len(things) > 1 else things[0]
    reasons = [reason for names, beside, least, reason in REASONS
               if region.name in names and sum(near[name] for name in beside) >= least]
    common = near.most_common(1)[0][0]
    rest = f"it belongs to a group of {plural(common)}" if common == region.name else f"it lies beside {plural(common)}"
    verb = "is" if near.total() == 1 else "are"
    return f"Near this {region.name} there {verb} {listing}, so {[*reasons, rest][0]}."


def plural(name):
    if name in IRREGULAR or re.search("[^su]s$", name):                            # scissors, skis
        return IRREGULAR.get(name, name)
    return re.sub("(?<=[^aeiou])y$", "ie", name) + ("es" if re.search("(s|x|ch|sh)$", name) else "s")


def with_article(name):
    if plural(name) == name and name.endswith("s"):
        return name
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def place_in_ninths(picture, region):
    """The ninth of the image in which the middle of the box lies, as "top left"."""
    x, y = region.center
    column = ("left", "", "right")[min(max(int(3 * x / picture.width), 0), 2)]
    row = ("top", "", "bottom")[min(max(int(3 * y / picture.height), 0), 2)]
    return f"{row} {column}".strip() or "center"


def gap(one, two):
    """Pixels between two boxes, 0 where they touch."""
    return math.hypot(max(two.x - one.x - one.width, one.x - two.x - two.width, 0),
                      max(two.y - one.y - one.height, one.y - two.y - two.height, 0))
