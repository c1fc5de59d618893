"""Published data sets -> our JSONL: LLaVA's records, one a line (Aquila Sec. 4.1; Aquila-plus's mask-text data).

    python corpora.py rsicd --root RSICD --split train --out rsicd.jsonl
    python corpora.py align --root FOLDERS --out align.jsonl           # the paper's mixes: align, instruct
    python corpora.py coco-masks --root COCO --file instances.json --out regions.jsonl

`--root` is the folder as its authors publish it; `--help` lists every corpus with the files it expects.
Captions: in train one line a caption (an image that repeats a caption keeps every copy: the papers count image-text
pairs), in val and test one line an image with all its captions in `references`. The text is the published `raw` string,
stripped at both ends. Questions: one line each with their `type`. No image is opened here: `data.py check` does that.
Regions: `masks` has one entry a region; `<region2>` means masks[1], a plain `<region>` the next one in order.
"""

import argparse
import json
import math
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

IMAGE_SLOT = "<image>\n"
SHORT = "\nAnswer the question using a single word or phrase."


def brief(*wordings: str) -> tuple[str, ...]:
    return tuple(wording + SHORT for wording in wordings)


# Every wording of every task. A record takes the one its id hashes to, so a corpus always converts to the same bytes.
# The papers print only the closing sentence of the question prompt; the caption and scene wordings are ours.
PROMPTS = {
    "caption": (
        "Describe this image in one sentence.",
        "Write a short caption for this aerial image.",
        "What does this remote sensing image show? Answer in one sentence.",
        "Summarize the content of the image in one sentence.",
        "Give a brief description of this satellite image.",
    ),
    "scene": (
        "What kind of scene is this?",
        "Name the scene class of this aerial image.",
        "Which type of land use or place does the image show?",
    ),
    "question": brief("{question}"),
    # about regions, each named once; {one} is a class with its article
    "region class": brief("What is <region>?", "What kind of object is <region>?",
                          "Which class does <region> belong to?"),
    "region caption": ("Describe <region> in one sentence.", "Write a short description of <region>.",
                       "What does <region> show? Answer in one sentence."),
    "region detail": ("Describe <region> in detail.", "Give a detailed description of <region>.",
                      "What can you tell about <region>, its size, its place and what is around it?"),
    "region position": brief("Where in the image is <region>?", "In which part of the image does <region> lie?"),
    "region count": brief("How many objects of the same kind as <region> are there, itself included?",
                          "Counting <region>, how many objects of its kind does the image show?"),
    "same kind": brief("Are <region1> and <region2> of the same kind?",
                       "Do <region1> and <region2> show the same kind of object?"),
    "larger": brief("Is <region1> larger than <region2>?", "Does <region1> cover more of the image than <region2>?"),
    "region reasoning": ("What do the surroundings of <region> say about it?",
                         "Look at what is around <region>. What follows from it?"),
    "region presence": brief("Is <region> {one}?", "Does <region> show {one}?"),
    "presence": brief("Is there {one} in the image?", "Does the image show {one}?"),
    # before the first question of an Osprey row whose answers name regions by number
    "region names": ("The image has these regions: {regions}.",),
}
SCENE_TEXT = "a remote sensing image of the scene class {name}"


@dataclass(frozen=True)
class Corpus:
    """One row of the table CORPORA, with what the command line adds."""
    read: Callable[["Corpus", Path, str], Iterator[dict]]
    file: str                   # published name; {split} and {kind} (questions, answers) stand for themselves
    splits: tuple[str, ...] = ("train",)
    images: str = ""            # put before an image's name, to give its path under --root
    type: str = ""              # of its records, where the rows do not tell
    name: str = ""
    raw_answers: bool = False
    per_image: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers

def read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; --root should be the folder as published")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}; is the download damaged?") from error


def read_json(path: Path) -> object:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not whole JSON: {error.msg} at line {error.lineno} column {error.colno} (character "
                         f"{error.pos}); is the download cut off?") from error
    except (ValueError, RecursionError) as error:       # a number of thousands of digits, thousands of brackets
        raise ValueError(f"{path}: JSON that cannot be read: {error}") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) for every line; `where` is for error messages."""
    for number, line in enumerate(read_text(path).rstrip().split("\n"), start=1):
        where = f"{path}: line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not whole JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: JSON that cannot be read: {error}") from error


def expect(value: object, kind: type | tuple[type, ...], where: str):
    if not isinstance(value, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        found = "nothing" if value is None else type(value).__name__
        raise ValueError(f"{where} should be {wanted}, found {found}; this is not the published layout")
    return value


def get(row: object, key: str, kind: type | tuple[type, ...], where: str):
    """`row[key]`, or one line that says which row of which file lacks it."""
    return expect(row.get(key) if isinstance(row, dict) else None, kind, f"{where}: '{key}'")


def listed(data: object, key: str, path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) for every row of the list `data[key]`; `where` is for error messages."""
    for number, row in enumerate(get(data, key, list, str(path))):
        yield f"{path}: {key} {number}", row


def plain_name(name: str) -> str:
    """A class or folder name in plain words: "railwayStation" and "Railway_Station" -> "railway station"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[\s_-]+", " ", name).strip().lower()


def digest(text: str) -> int:
    return zlib.crc32(text.encode(errors="surrogatepass"))      # hash() differs from run to run


def prompt(task: str, record_id: str, **fields: str) -> str:
    return PROMPTS[task][digest(record_id) % len(PROMPTS[task])].format(**fields)


def record(record_id: str, image: str, question: str, answer: str, **extra: object) -> dict:
    turns = [{"from": "human", "value": IMAGE_SLOT + question}, {"from": "gpt", "value": answer}]
    return {"id": record_id, "image": image, "conversations": turns, **extra}


def caption_records(corpus: Corpus, split: str, key: str, image: str, captions: list[str]) -> Iterator[dict]:
    """Train: one record a caption. Val and test: one an image, answered by its first. Empty captions are left out."""
    captions = [caption.strip() for caption in captions]
    image_id = f"{corpus.name}-{key}"
    if split == "train":
        for number, caption in enumerate(captions):
            record_id = f"{image_id}-{number}"
            if caption:
                yield record(record_id, corpus.images + image, prompt("caption", record_id), caption)
    elif any(captions):
        references = [caption for caption in captions if caption]
        yield record(image_id, corpus.images + image, prompt("caption", image_id), references[0], references=references)


# ---------------------------------------------------------------------------------------------------------------------
# Captions and scenes

def read_karpathy(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """RSICD, UCM, Sydney, RSITMD: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}."""
    path = root / corpus.file
    for number, row in enumerate(get(read_json(path), "images", list, str(path))):
        where = f"{path}: image {number}"
        if get(row, "split", str, where) == split:
            name = get(row, "filename", str, where)
            captions = [get(sentence, "raw", str, where) for sentence in get(row, "sentences", list, where)]
            yield from caption_records(corpus, split, name, name, captions)


def read_nwpu(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """{class: [{"filename", "split", "raw", "raw_1", ..., "raw_4"}]}; images lie in a folder a class."""
    path = root / corpus.file
    for scene, rows in expect(read_json(path), dict, str(path)).items():
        for number, row in enumerate(expect(rows, list, f"{path}: '{scene}'")):
            where = f"{path}: {scene} {number}"
            if get(row, "split", str, where) == split:
                name = get(row, "filename", str, where)
                captions = [get(row, key, str, where) for key in ("raw", "raw_1", "raw_2", "raw_3", "raw_4")]
                yield from caption_records(corpus, split, name, f"{scene}/{name}", captions)


def read_capera(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """{"ERA_caption": [{"video_id", "annotation": {"English_caption": [5 strings]}}]}.

    The captions are of clips, Train/<Event>/<Event>_001.mp4 of the ERA set, and train and test use the same names.
    ASSUMPTION: the image of a clip is a still of it, saved by the user as .jpg under the clip's name.
    """
    path = root / corpus.file.replace("{split}", split)
    for number, row in enumerate(get(read_json(path), "ERA_caption", list, str(path))):
        where = f"{path}: clip {number}"
        clip = get(row, "video_id", str, where).removesuffix(".mp4")
        image = f"{split.capitalize()}/{clip.rpartition('_')[0]}/{clip}.jpg"
        captions = get(get(row, "annotation", dict, where), "English_caption", list, where)
        captions = [expect(caption, str, f"{where}: caption") for caption in captions]
        yield from caption_records(corpus, split, f"{split}-{clip}", image, captions)


def read_scene_folders(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """WHU-RS19: a folder of images a class and no text, so the class name is put into SCENE_TEXT."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".tif", ".tiff"}:
                image = f"{folder.name}/{path.name}"
                record_id = f"{corpus.name}-{image}"
                text = SCENE_TEXT.format(name=plain_name(folder.name))
                yield record(record_id, image, prompt("scene", record_id), text)


# ---------------------------------------------------------------------------------------------------------------------
# Questions

def bucket(answer: str, counts: bool) -> str:
    """RSVQA's answer classes, as its authors make them: areas always, counts in the low-resolution set only.

    0 stays; then "between 0 and 10" (1 to 10), "between 10 and 100" (11 to 100), "between 100 and 1000" and "more than
    1000"; areas alike, with m2 behind every number. Any other answer comes back as it is.
    """
    match = re.fullmatch(r"([0-9]+)(m2)?", answer)
    if match is None or not (match[2] or counts):
        return answer
    value, unit = int(match[1]), match[2] or ""
    if value == 0:
        return f"0{unit}"
    for low, high in ((0, 10), (10, 100), (100, 1000)):
        if value <= high:
            return f"between {low}{unit} and {high}{unit}"
    return f"more than 1000{unit}"


def active_rows(path: Path, kind: str) -> dict[int, dict]:
    """Rows of one split by id. The lists hold {"id", "active": false} in the places of other splits' rows.

    Some copies of the split files carry flags only; the text then comes from all_questions.json, all_answers.json.
    """
    def load(path: Path) -> dict[int, dict]:
        rows = listed(read_json(path), kind, path)
        return {get(row, "id", int, where): row for where, row in rows if get(row, "active", bool, where)}

    rows = load(path)
    if all(kind.removesuffix("s") in row for row in rows.values()):
        return rows
    all_path = path.with_name(f"all_{kind}.json")
    all_rows = load(all_path)
    return {key: active_row(all_rows, key, all_path) for key in rows}


def active_row(rows: dict[int, dict], key: object, path: Path) -> dict:
    if not isinstance(key, int) or key not in rows:
        raise ValueError(f"{path}: no active row with id {key}; do the files belong together?")
    return rows[key]


def read_rsvqa(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """Questions and answers in a file each, joined by id; every question has exactly one answer."""
    questions_path = root / corpus.file.replace("{split}", split).replace("{kind}", "questions")
    answers_path = root / corpus.file.replace("{split}", split).replace("{kind}", "answers")
    questions = active_rows(questions_path, "questions")
    answers = active_rows(answers_path, "answers")
    for number, row in questions.items():
        where = f"{questions_path}: question {number}"
        answer_ids = get(row, "answers_ids", list, where)
        if len(answer_ids) != 1:
            raise ValueError(f"{where}: expected one answer, found {len(answer_ids)}; this is not the published layout")
        answer = get(active_row(answers, answer_ids[0], answers_path), "answer", str, where).strip()
        if not corpus.raw_answers:
            answer = bucket(answer, counts=corpus.name == "rsvqa-lr")
        record_id = f"{corpus.name}-{split}-{number}"
        text = prompt("question", record_id, question=get(row, "question", str, where).strip())
        image = f"{corpus.images}{get(row, 'img_id', int, where)}.tif"
        yield record(record_id, image, text, answer, type=get(row, "type", str, where))


def read_fit_benchmark(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """FIT-RSFG lines. Captions: `question`, one reference. Questions: `text` with its answer format, `category`."""
    captions = corpus.name == "fit-rsfg-captions"
    for number, (where, row) in enumerate(read_json_lines(root / corpus.file)):
        text = get(row, "question" if captions else "text", str, where).removeprefix("<image>").strip()
        answer = get(row, "ground_truth", str, where).strip()
        extra = {"references": [answer]} if captions else {"type": get(row, "category", str, where)}
        yield record(f"{corpus.name}-{number}", corpus.images + get(row, "image", str, where), text, answer, **extra)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations

def llava_turns(row: object, where: str) -> list[dict]:
    return [{key: get(turn, key, str, where) for key in ("from", "value")}
            for turn in get(row, "conversations", list, where)]


def read_llava(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """A list of {"image", "conversations"}; rows without "image" are text only and stay so.

    Ids are row numbers, as published ids may repeat. `<image>` moves to the front of the first turn.
    """
    path = root / corpus.file
    for number, row in enumerate(expect(read_json(path), list, str(path))):
        where = f"{path}: row {number}"
        turns = llava_turns(row, where)
        out = {"id": f"{corpus.name}-{number}"}
        if row.get("image") is not None:
            out["image"] = corpus.images + get(row, "image", str, where)
            for turn in turns[:1]:      # none at all is for data.py check to report
                turn["value"] = IMAGE_SLOT + turn["value"].replace("<image>", "").strip()
        yield {**out, "conversations": turns}


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
    mask: object                # as data.py reads it
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
    nothing is said of what is near. Paths are `file_name` as it stands. Every statement follows from the class names,
    boxes and areas in the file.
    """
    path, key = root / corpus.file.replace("{split}", split), (int, str)
    data, pictures, counts = read_json(path), {}, Counter()
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
    for present in (picture.present for picture in pictures.values()):
        counts.update(("seen", one) for one in present)
        counts.update(("seen", one, other) for one in present for other in present - {one})
    classes = sorted(set(names.values()))
    for picture in pictures.values():
        yield from picture_records(corpus, split, picture, classes, counts)


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


ALL = ("train", "val", "test")
FIT = "FIT-RS_Instruction/"
FIT_TASK = FIT + "train_data_of_each_individual_task/train_instruction_"
FIT_BENCH = "FIT-RSFG/FIT-RSFG-Bench/test_FITRS_"
FIT_IMAGES = "imgv2_split_512_100_vaild/"       # sic
OSPREY = "Osprey-724K/osprey_"
COCO_IMAGES = "coco/imgs/"

CORPORA = {
    "rsicd": Corpus(read_karpathy, "dataset_rsicd.json", ALL, "RSICD_images/"),
    "ucm": Corpus(read_karpathy, "dataset.json", ALL, "imgs/"),
    "sydney": Corpus(read_karpathy, "dataset.json", ALL, "imgs/"),
    "rsitmd": Corpus(read_karpathy, "dataset_RSITMD.json", ("train", "test"), "images/"),
    "nwpu": Corpus(read_nwpu, "dataset_nwpu.json", ALL, "NWPU_images/"),
    "capera": Corpus(read_capera, "CapERA_DATASET_{split}.json", ("train", "test")),
    "whu-rs19": Corpus(read_scene_folders, "<Class>/*.jpg"),
    "rsvqa-lr": Corpus(read_rsvqa, "LR_split_{split}_{kind}.json", ALL, "Images_LR/"),
    "rsvqa-hr": Corpus(read_rsvqa, "USGS_split_{split}_{kind}.json", (*ALL, "test_phili"), "Data/"),
    "fit-rs": Corpus(read_llava, FIT + "FIT-RS-train-1415k.json", images=FIT_IMAGES),
    "fit-rs-captions": Corpus(read_llava, FIT_TASK + "imagecaption_65k.json", images=FIT_IMAGES),
    "fit-rs-classes": Corpus(read_llava, FIT_TASK + "imageclassification_130k.json", images=FIT_IMAGES),
    "fit-rs-multiturn": Corpus(read_llava, FIT_TASK + "multiturn_50k.json", images=FIT_IMAGES),
    "fit-rs-regions": Corpus(read_llava, FIT_TASK + "regioncaption_72k.json", images=FIT_IMAGES),
    "fit-rs-vqa": Corpus(read_llava, FIT_TASK + "vqa_400k.json", images=FIT_IMAGES),
    "fit-rsfg-captions": Corpus(read_fit_benchmark, FIT_BENCH + "image_caption_eval.jsonl", ("val",), FIT_IMAGES),
    "fit-rsfg-vqa": Corpus(read_fit_benchmark, FIT_BENCH + "vqa_eval.jsonl", ("val",), FIT_IMAGES),
    "geochat": Corpus(read_llava, "GeoChat_Instruct.json"),
    "llava": Corpus(read_llava, "llava_v1_5_mix665k.json"),
    "coco-masks": Corpus(read_coco, "annotations/instances_{split}2017.json", ("train", "val")),
    "osprey": Corpus(read_osprey, OSPREY + "conversations.json", images=COCO_IMAGES, type="region conversation"),
    "osprey-details": Corpus(read_osprey, OSPREY + "detail_description.json", images=COCO_IMAGES, type="region detail"),
    "osprey-short": Corpus(read_osprey, OSPREY + "short_form.json", images=COCO_IMAGES, type="region short answer"),
    "osprey-parts": Corpus(read_osprey, OSPREY + "part_level.json", images=COCO_IMAGES, type="region part"),
    "osprey-presence": Corpus(read_osprey, OSPREY + "lvis_positive_negative.json", images=COCO_IMAGES,
                              type="region presence"),
    "osprey-questions": Corpus(read_osprey, "description/questions.json", ("test",), COCO_IMAGES,
                               "region detail"),
}

# The papers' mixes: train splits only, from a sub-folder of --root a corpus, in a seeded order.
FIT_PARTS = ("fit-rs-captions", "fit-rs-classes", "fit-rs-multiturn", "fit-rs-regions", "fit-rs-vqa")
MIXES = {
    # Aquila Sec. 4.1.1, about 1 M image-text pairs.
    "align": ("capera", "ucm", "sydney", "nwpu", "rsicd", "rsitmd", "rsvqa-hr", "rsvqa-lr", "whu-rs19"),
    # Sec. 4.1.1 says "up to 1.8 million" of FIT-RS; the published training file has 1,415 k.
    # ASSUMPTION: the files of single tasks are parts of that file, so they are read only where it is absent.
    "instruct": ("fit-rs", *FIT_PARTS),
}
# Benchmarks over the pictures of another corpus, in the same folder; besides these a corpus's own val and test count.
BENCHMARKS = dict.fromkeys(MIXES["instruct"], ("fit-rsfg-captions", "fit-rsfg-vqa"))


# ---------------------------------------------------------------------------------------------------------------------
# The whole of a corpus, and mixes

def records(name: str, root: str | Path, split: str = "train", file: str | None = None,
            raw_answers: bool = False, per_image: int = 20) -> Iterator[dict]:
    """Records of one split, in the published order. The last three are the command line's flags."""
    if name not in CORPORA:
        raise ValueError(f"unknown corpus '{name}'; known: {', '.join([*CORPORA, *MIXES])}")
    corpus = replace(CORPORA[name], name=name, raw_answers=raw_answers, per_image=per_image)
    if split not in corpus.splits:
        raise ValueError(f"{name} has no split '{split}'; it has: {', '.join(corpus.splits)}")
    if file is not None:
        if "{kind}" in corpus.file or "*" in corpus.file:
            raise ValueError(f"--file {file}: {name} is read from several files, {corpus.file}; leave the flag out")
        corpus = replace(corpus, file=file)
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"--root {root}: no such folder")
    return corpus.read(corpus, root, split)


def mix_records(mix: str, root: Path, raw_answers: bool) -> Iterator[dict]:
    """Train records of every corpus of the mix that is under root; prints a row of the table as each one ends.

    Records whose image also occurs in a val or test split, or in a benchmark over the same pictures, are dropped. Only
    paths can be compared here: a picture that two corpora hold under different names goes unseen.
    """
    print(f"{'corpus':19}{'records':>10}{'images':>10}{'dropped':>9}  (their image is in val or test) checked against")
    read = set()
    for name in MIXES[mix]:
        folder = "fit-rs" if name in MIXES["instruct"] else name
        if name in FIT_PARTS and "fit-rs" in read:
            print(f"{name:19}{'-':>10}  part of fit-rs")
            continue
        count, dropped, images = 0, 0, set()
        held_out, checked = held_out_images(name, root / folder)
        try:
            for row in records(name, root / folder, raw_answers=raw_answers):
                if row.get("image") in held_out:
                    dropped += 1
                    continue
                if "image" in row:
                    row["image"] = f"{folder}/{row['image']}"
                    images.add(row["image"])
                count += 1
                yield row
        except FileNotFoundError as error:
            print(f"{name:19}{'absent':>10}  {error}")
            continue
        read.add(name)
        print(f"{name:19}{count:>10,}{len(images):>10,}{dropped:>9,}  {', '.join(checked) or 'nothing'}")


def held_out_images(name: str, root: Path) -> tuple[set[str], list[str]]:
    """Images of the splits and benchmarks on which nothing may be trained, and which of these were there to read."""
    images, checked = set(), []
    for other in (name, *BENCHMARKS.get(name, ())):
        for split in CORPORA[other].splits:
            try:
                found = {row["image"] for row in records(other, root, split)} if split != "train" else set()
            except FileNotFoundError:
                continue
            if found:
                images |= found
                checked.append(split if other == name else other)
    return images, checked


def write(rows: Iterator[dict], out: Path, label: str, shuffle: bool = False) -> tuple[Counter, int]:
    """Write all or nothing; returns how many records have each type, and the number of different images."""
    if not out.parent.is_dir() or out.is_dir():
        raise FileNotFoundError(f"--out {out}: expected a file name in a folder that exists")
    ids, images, types = set(), set(), Counter()
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                if row["id"] in ids:
                    raise ValueError(f"{label}: record {row['id']} comes twice; are two copies merged in one file?")
                ids.add(row["id"])
                images.add(row.get("image"))
                types[" ".join([row.get("type", ""), row.get("sampling", "")]).strip()] += 1
                file.write(json.dumps(row) + "\n")
        if not ids:
            raise ValueError(f"{label}: no record of this split in the files under --root; nothing was written")
        if shuffle:
            lines = temporary.read_text(encoding="utf-8").splitlines(keepends=True)
            random.Random(0).shuffle(lines)
            temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return types, len(images - {None})


def build_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:19}{', '.join(c.splits):30}{c.file}" for name, c in CORPORA.items())
    mixes = "\n".join(f"  {name:19}{', '.join(names)}" for name, names in MIXES.items())
    shares = "\n".join(f"  {kind:19}{share:3} %" for kind, share in SHARES.items())
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog="corpora, their splits, and their files under --root ({kind}: questions and answers):\n" + listing
        + "\n\nmixes of train splits; --root holds a sub-folder a corpus, under its name here (FIT-RS and its "
        "benchmarks: fit-rs/),\nimage paths then start from --root; corpora that are not there are listed as absent:\n"
        + mixes
        + "\n\ncoco-masks, any COCO instance file; share of each type of record:\n" + shares)
    parser.add_argument("name", metavar="NAME", help="corpus or mix, from the lists below")
    parser.add_argument("--root", required=True, metavar="DIR", help="folder of the data set as published (required)")
    parser.add_argument("--split", default="train", help="one of the corpus's splits; test_phili is RSVQA-HR's second "
                        "test set, a city unseen in training, on which GeoChat and others report (default: train)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl", help="the file to write (required)")
    parser.add_argument("--file", help="read this file under --root, not the published one (default: see the list)")
    parser.add_argument("--raw-answers", action="store_true", help="RSVQA: keep counts and areas as written, \"37\" or "
                        "\"512m2\", instead of the authors' classes such as \"between 10 and 100\" (default: off)")
    parser.add_argument("--limit-per-image", type=int, default=20, metavar="N", help="coco-masks: records of an image, "
                        f"at most; never more than {PER_REGION} times its regions (default: 20)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    label = f"{args.name} {args.split}"
    try:
        if args.name not in MIXES:
            rows = records(args.name, args.root, args.split, args.file, args.raw_answers, args.limit_per_image)
        elif args.split != "train" or args.file:
            raise ValueError(f"{args.name} takes the train splits as published; leave --split and --file out")
        else:
            rows = mix_records(args.name, Path(args.root), args.raw_answers)
        types, images = write(rows, args.out, label, shuffle=args.name in MIXES)
    except (ValueError, OSError) as error:
        parser.exit(2, f"corpora.py: {error}\n")
    print(f"{label}: {types.total():,} records, {images:,} images -> {args.out}")
    for name, count in sorted(types.items()) if "" not in types else ():
        print(f"  {name:30}{count:>10,}{100 * count / types.total():7.1f} %")


if __name__ == "__main__":
    main()
