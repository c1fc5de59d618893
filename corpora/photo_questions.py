"""
Questions about RSICD's photographs, made from what is known of them: their scene class, and things that all five
captions name or none does. RSICD itself has captions alone. Types and wordings are RSVQA's, so that a model can be
tried on RSVQA as well; "scene" is ours.

A thing that no caption names may be there all the same. So it counts as absent only where hardly any caption of the
photograph's class names it. Yes is the answer as often as no, of each thing as nearly as the photographs allow.
"""
import re
from collections import Counter

import numpy as np

from corpora.coco import plural, with_article
from corpora.prompts import choose_prompt, stable_hash
from corpora.reading import get, listed, make_record, published_file, scene_classes
from files.text import read_json

RARE = 0.02                                 # of a class's photographs: what fewer of them show is not expected there
PER_PHOTO = 2                               # things asked for that are there, and as many that are not
SURPLUS = 20                                # by so many may a thing be there oftener than not, or the other way

THINGS = {                                  # name: the words of captions that mean it
    "tree": "tree trees", "building": "building buildings house houses", "road": "road roads street streets highway",
    "car": "car cars vehicle vehicles", "plane": "plane planes airplane airplanes aircraft",
    "boat": "boat boats ship ships", "water area": "water river rivers pond ponds lake lakes sea ocean",
    "bridge": "bridge bridges", "residential building": "residential house houses", "commercial building": "commercial",
    "grass area": "grass lawn lawns", "river": "river rivers", "pond": "pond ponds", "beach": "beach beaches",
    "desert": "desert deserts", "farmland": "farmland farmlands", "storage tank": "tank tanks",
    "stadium": "stadium stadiums", "church": "church churches", "mountain": "mountain mountains",
    "forest": "forest forests", "meadow": "meadow meadows", "swimming pool": "pool pools", "baseball field": "baseball",
    "football field": "football", "tennis court": "tennis", "basketball court": "basketball",
    "railway": "railway railways railroad", "viaduct": "viaduct viaducts", "parking lot": "parking",
    "runway": "runway runways",
}
AREAS = {                                   # area: the scene classes of it
    "rural": "bare land, beach, desert, farmland, forest, meadow, mountain",
    "urban": "center, church, commercial, dense residential, industrial, medium residential, parking, playfields, "
             "playground, railway station, school, square, stadium, storage tanks, viaduct",
    "": "airport, baseball field, bridge, park, pond, port, resort, river, sparse residential",    # either
}
# scene class, its letters alone: (what it is called, area)
SCENES = {name.replace(" ", ""): (name, area) for area, names in AREAS.items() for name in names.split(", ")}


def read_photo_questions(corpus, root, split):
    """
    One record a question. The class is that of classes.json ({file name: class}) if it is there, else of the file name
    (airport_7.jpg); a photograph without one is not asked about.
    """
    path = published_file(corpus, root, split)
    classes, photos = scene_classes(root), []
    for where, row in listed(read_json(path), "images", path):
        name = get(row, "filename", str, where)
        scene = SCENES.get(re.match("[a-z]*", classes.get(name, name).lower())[0])
        if scene and get(row, "split", str, where) == split:
            captions = [get(sentence, "raw", str, where) for sentence in get(row, "sentences", list, where)]
            named = list(map(things_in, captions)) or [set()]
            photos.append((name, scene, set.intersection(*named), set.union(*named)))
    asked = choose_things(photos)
    for name, scene, _, _ in photos:
        image_id, image = f"{corpus.name}-{name}", corpus.images + name
        for number, (kind, prompt, answer, fields) in enumerate(questions_of(scene, *asked[name])):
            record_id = f"{image_id}-{number}"
            yield make_record(record_id, image, choose_prompt(prompt, record_id, **fields), answer, type=kind)


def things_in(caption):
    words = set(re.findall(r"[a-z]+", caption.lower()))
    return {thing for thing, names in THINGS.items() if words & set(names.split())}


def choose_things(photos):
    """
    photos: (name, scene, things that every caption names, things that some name) -> {name: (present, absent), two lists
    of equal length}. What has been asked for least comes first, within SURPLUS.
    """
    size, shown = Counter(scene for _, scene, _, _ in photos), Counter()
    for _, scene, _, some in photos:
        shown.update((scene, thing) for thing in some)
    present, absent, asked = Counter(), Counter(), {}
    for number in np.random.default_rng(0).permutation(len(photos)):
        name, scene, every, some = photos[number]
        rare = [thing for thing in THINGS if thing not in some and shown[scene, thing] < RARE * size[scene]]
        there = [thing for thing in every if present[thing] < absent[thing] + SURPLUS]
        missing = [thing for thing in rare if absent[thing] < present[thing] + SURPLUS]
        n = min(len(there), len(missing), PER_PHOTO)
        there = sorted(there, key=lambda thing: (present[thing], thing))[:n]
        missing = sorted(missing, key=lambda thing: (absent[thing] - present[thing], thing))[:n]
        present.update(there)
        absent.update(missing)
        asked[name] = there, missing
    return asked


def questions_of(scene, present, absent):
    """(type, prompt, answer, fields of the prompt) of one photograph."""
    name, area = scene
    yield "scene", "scene", name, {}
    if area:
        yield "rural_urban", "rural or urban", area, {}
    for things, answer in ((present, "yes"), (absent, "no")):
        for thing in things:
            yield "presence", "thing", answer, {"one": with_article(thing)}
    for there, missing in zip(present[:1], absent):
        swap = stable_hash(there + missing + name) % 2
        many, few = plural(missing if swap else there), plural(there if swap else missing)
        yield "comp", "more", "no" if swap else "yes", {"many": many, "few": few}
