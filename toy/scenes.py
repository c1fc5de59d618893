"""
The built-in aerial scenes: pictures, captions, questions and region masks that need no download. A scene is named
"scene:SPLIT/SEED/INDEX/SIZE", and the name is all that it takes: the layout, the texts and the pixels follow from it.
make_records gives the texts in LLaVA's format, in which data.py reads every data set; it draws no pixel.

    python -m toy.scenes --out DIR --split test -n 20 --size 256        # PNGs and scenes.jsonl
"""
import os
import re
from collections import Counter
from functools import lru_cache

from PIL import Image

from commands.arguments import SEEDS, Parser, whole
from corpora.prompts import IMAGE_LINE, SHORT_ANSWER
from files.text import write_json_lines
from toy.drawing import make_scene
from toy.layout import CLASSES, SIZES, SPLITS, URBAN, Key, check_key, choose, make_layout, scene_rng

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
WORDINGS = {                                # {many}: plural of {one}; {noun}: one or many, with its {be}
    "presence": ("Is there a {one}?", "Are there any {many}?"),
    "count": ("How many {many} are there?", "How many {many} are in the image?"),
    "more": ("Are there more {a} than {b}?", "Do {a} outnumber {b}?"),
    "fewer": ("Are there fewer {a} than {b}?",),
    "land cover": ("What is the land cover?", "What is the main land cover?"),
    "area": ("Is it a rural or an urban area?", "Is the area rural or urban?"),
    "position": ("Where {be} the {noun}?", "In which part of the image {be} the {noun}?"),
    "color": ("What color {be} the {noun}?", "What is the color of the {noun}?"),
}
REGION_WORDINGS = {                         # {a} and {b} are the regions asked about
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


def plural(name, count=2):
    return name if count == 1 else name + "s"


def count_objects(layout):
    """{(class, color): count} in the order of the layout."""
    return Counter((item.name, item.color) for item in layout.items)


def phrase(groups):
    """[((class, color), count), ...] in words: "two red ships with one gray plane and ..."."""
    words = [f"{NUMBERS[n]} {color} {plural(name, n)}" for (name, color), n in groups]
    return words[0] if len(words) == 1 else f"{' with '.join(words[:-1])} and {words[-1]}"


def place_in_fifths(item):
    """The center or the corner of the picture an object lies in, or None near a border between two of them."""
    dx, dy = item.x - 0.5, item.y - 0.5
    if max(abs(dx), abs(dy)) < 0.1:
        return "center"
    if min(abs(dx), abs(dy)) > 0.07 and max(abs(dx), abs(dy)) > 0.17:
        return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"
    return None


def shared_place(items):
    """The fifth that all these objects lie in, or None."""
    places = {place_in_fifths(item) for item in items}
    return places.pop() if len(places) == 1 else None


def placed_groups(layout):
    """Yields (class, color, count, place) of every group of objects that lie in one fifth."""
    for (name, color), n in count_objects(layout).items():
        place = shared_place([item for item in layout.items if (item.name, item.color) == (name, color)])
        if place:
            yield name, color, n, place


def captions(scene):
    """Five wordings of the facts of a Scene or Key, as headlines: without articles, a blind caption scores low."""
    layout = make_layout(scene.split, scene.index, scene.seed)
    kind, cover = layout.feature.kind if layout.feature else None, layout.cover
    groups = list(count_objects(layout).items())
    ships, others = [g for g in groups if g[0][0] == "ship"], [g for g in groups if g[0][0] != "ship"]
    if ships and others:
        afloat, ashore = ("in water", "on beach") if cover == "water" else (AFLOAT[kind], PLACES[cover])
        s, a, b = phrase(ships), phrase(others), phrase(others[::-1])
        return [f"{s} {afloat} and {a} {ashore}", f"{b} {ashore} and {s} {afloat}", f"{afloat} {s} and {b} {ashore}",
                f"{ashore} {a} and {s} {afloat}", f"{a} {ashore} with {s} {afloat}"]
    a, b, place = phrase(groups), phrase(groups[::-1]), shared_place(layout.items)
    spot = f" at {place}" if place else ""
    if ships and cover != "water":
        where, around = AFLOAT[kind], PLACES[cover]
        return [f"{a} sailing {where} {around}{spot}", f"{kind} {around} with {b} sailing{spot}",
                f"{where} {around} {a} sailing{spot}", f"sailing {where} {around} {b}{spot}",
                f"{around} {a} sailing {where}{spot}"]
    where, near = PLACES[cover], f" {NEAR[kind]}" if kind else ""
    verb = f" {VERBS[groups[0][0][0]]}" if len({name for (name, _), _ in groups}) == 1 else ""
    turned = f"{b}{verb}{near} {where}{spot}" if near or a != b else f"view of {a}{verb} {where}{spot}"
    return [f"{a}{verb} {where}{near}{spot}", f"{where}{near} {a}{verb}{spot}",
            f"{verb} {where}{near} {b}{spot}".strip(), turned, f"{cover}{near} with {a}{verb}{spot}"]


def draw_question(rng, wording, one="", n=2, **words):
    """One of the WORDINGS, about n of what is called {one}."""
    words |= {"one": one, "many": plural(one), "noun": plural(one, n), "be": "is" if n == 1 else "are"}
    return choose(rng, WORDINGS[wording]).format(**words)


def questions(scene):
    """[(type, question, answer)] of all that is asked about the scene, in a fixed order of types."""
    layout, rng, asked = make_layout(scene.split, scene.index, scene.seed), scene_rng(scene, 2), []
    groups, total = count_objects(layout), Counter(item.name for item in layout.items)
    present, absent = [c for c in CLASSES if total[c]], [c for c in CLASSES if not total[c]]

    def ask(kind, wording, answer, one="", n=2, **words):
        asked.append((kind, draw_question(rng, wording, one, n, **words), answer))

    presence = [(choose(rng, present), "yes"), (choose(rng, absent), "no")]
    for name, answer in presence if rng.random() < 0.5 else [choose(rng, presence)]:
        ask("presence", "presence", answer, name)
    counted = choose(rng, present if rng.random() > 0.05 else absent)
    ask("count", "count", str(total[counted]), counted)
    (name, color), n = choose(rng, list(groups.items()))
    ask("count", "count", str(n), f"{color} {name}")
    # A pair with unequal counts. Yes and no are as likely for each question, because each pair is asked either way.
    a, b = choose(rng, [(a, b) for a in present for b in present + absent if total[a] > total[b]])
    wording, yes = "fewer" if rng.random() < 0.3 else "more", rng.random() < 0.5
    if yes == (wording == "fewer"):
        a, b = b, a
    ask("comparison", wording, "yes" if yes else "no", a=plural(a), b=plural(b))
    ask("land cover", "land cover", layout.cover)
    if layout.cover != "water" and rng.random() < 0.5:
        ask("land cover", "area", "urban" if layout.cover in URBAN else "rural")
    places = list(placed_groups(layout))
    for i in rng.permutation(len(places))[:2]:
        name, color, n, place = places[i]
        ask("position", "position", place, f"{color} {name}", n)
    plain = [(name, color) for name, color in groups if total[name] == groups[name, color]]
    for i in rng.permutation(len(plain))[:2]:
        name, color = plain[i]
        ask("color", "color", color, name, total[name])
    return asked


def every_place(scene):
    """As `questions`: where each group is that lies in one fifth. Few scenes have one, and it is hard to learn."""
    rng, layout = scene_rng(scene, 7), make_layout(scene.split, scene.index, scene.seed)
    return [("position", draw_question(rng, "position", f"{color} {name}", n), place)
            for name, color, n, place in placed_groups(layout)]


def every_number(scene):
    """As `questions`: how many objects each group has; the color is left out of half the classes of one color."""
    rng, groups = scene_rng(scene, 8), count_objects(make_layout(scene.split, scene.index, scene.seed))
    colors, asked = Counter(name for name, _ in groups), []
    for (name, color), n in groups.items():
        one = name if colors[name] == 1 and rng.random() < 0.5 else f"{color} {name}"
        asked.append(("count", draw_question(rng, "count", one), str(n)))
    return asked


def region_questions(scene):
    """
    [(type, question, answer, number of an object, ...)]; the question says <region1> and <region2> for these objects.
    One of "is it a ...?" is yes and one is no for every object, and half of the pairs compared are of one class.
    """
    items, rng, asked = make_layout(scene.split, scene.index, scene.seed).items, scene_rng(scene, 5), []

    def ask(kind, answer, *objects, **words):
        text = choose(rng, REGION_WORDINGS[kind]).format(a="<region1>", b="<region2>", **words)
        asked.append((kind, text, answer, *objects))

    for i, item in enumerate(items):
        place = place_in_fifths(item)
        ask("region class", item.name, i)
        ask("region color", item.color, i)
        if place:
            ask("region position", place, i)
        ask("region presence", "yes", i, one=item.name)
        ask("region presence", "no", i, one=choose(rng, [c for c in CLASSES if c != item.name]))
        ask("region count", str(sum(other.name == item.name for other in items)), i)
        ask("region caption", f"{item.color} {item.name}" + (f" at {place}" if place else ""), i)
    pairs = [(i, j) for i in range(len(items)) for j in range(len(items)) if i != j]
    same = [(i, j) for i, j in pairs if items[i].name == items[j].name]
    if 0 < len(same) < len(pairs):
        ask("region comparison", "yes", *choose(rng, same))
        ask("region comparison", "no", *choose(rng, [pair for pair in pairs if pair not in same]))
    return asked


def scene_name(scene):
    """The name of a Scene or a Key."""
    return f"scene:{scene.split}/{scene.seed}/{scene.index}/{scene.size}"


@lru_cache(maxsize=8)
def open_scene(name):
    """"scene:SPLIT/SEED/INDEX/SIZE" -> the Scene; a ValueError where the name is no such name."""
    match = re.fullmatch(r"scene:([a-z]+)/(\d{1,10})/(\d{1,10})/(\d{1,10})", name)
    if not match:
        raise ValueError(f"scene name {name!r}: expected scene:SPLIT/SEED/INDEX/SIZE, as in scene:train/0/12/128")
    return make_scene(match[1], int(match[3]), int(match[2]), int(match[4]))


def make_records(split, n, task, seed=0, size=256, start=0):
    """LLaVA records of n scenes, from number start on; size in pixels. Images and masks are names, not drawn."""
    makers = {"caption": caption_records,
              "vqa": lambda key: question_records(key, questions(key), "q"),
              "chat": lambda key: chat_records(key, questions(key), "chat", task, scene_rng(key, 4)),
              "places": lambda key: chat_records(key, every_place(key), task, "chat", scene_rng(key, 9)),
              "numbers": lambda key: chat_records(key, every_number(key), task, "chat", scene_rng(key, 10)),
              "region": lambda key: question_records(key, region_questions(key), "r"),
              "region chat": lambda key: chat_records(key, region_questions(key), "regions", task, scene_rng(key, 6))}
    if task not in makers:
        raise ValueError(f"scene task {task!r}: expected one of {', '.join(makers)}")
    check_key(split, start, seed, size)
    return [record for index in range(start, start + n) for record in makers[task](Key(split, seed, index, size))]


def make_record(key, name, kind, texts, objects=()):
    """One record; texts are what the human and the model say in turn, objects those whose masks it names."""
    masks = {"masks": [f"{scene_name(key)}#{number}" for number in objects]} if objects else {}
    return {"id": f"{key.split}-{key.index}-{name}", "image": scene_name(key), "type": kind, **masks,
            "conversations": take_turns(texts)}


def take_turns(texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def caption_records(key):
    """Train has a record a caption; val and test have one a scene, with all five captions as references."""
    texts, rng = captions(key), scene_rng(key, 3)
    records = [make_record(key, f"c{i}", "caption", [IMAGE_LINE + choose(rng, CAPTION_PROMPTS), text])
               for i, text in enumerate(texts)]
    return records if key.split == "train" else [{**records[0], "references": texts}]


def question_records(key, asked, letter):
    """One record a question; a caption of a region has no format prompt."""
    records = []
    for i, (kind, question, answer, *objects) in enumerate(asked):
        question = question if len(objects) > 1 else question.replace("<region1>", "<region>")
        short = "" if kind == "region caption" else f"\n{SHORT_ANSWER}"
        records.append(make_record(key, f"{letter}{i}", kind, [IMAGE_LINE + question + short, answer], objects))
    return records


def chat_records(key, asked, name, kind, rng):
    """
    One conversation: up to eight questions in random order, regions numbered as they come up. The format prompt stands
    once and holds for all answers, as in LLaVA-1.5's data. A caption among them would give the later answers away.
    """
    if not asked:
        return []
    texts, numbers = [], {}                 # numbers: of an object, in the conversation
    for i in rng.permutation(len(asked))[:8]:
        _, question, answer, *objects = asked[i]
        regions = [f"<region{numbers.setdefault(n, len(numbers) + 1)}>" for n in objects]
        texts += [question.replace("<region1>", "{0}").replace("<region2>", "{1}").format(*regions), answer]
    texts[0] = f"{IMAGE_LINE}{texts[0]}\n{SHORT_ANSWER}"
    return [make_record(key, name, kind, texts, numbers)]


def write_scenes(args):
    if os.path.isfile(args.out):
        raise ValueError(f"--out {args.out} is a file; expected a directory")
    os.makedirs(args.out, exist_ok=True)
    rows = []
    for i in range(args.start, args.start + args.n):
        scene = make_scene(args.split, i, args.seed, args.size)
        picture = f"{scene.split}-{scene.index}.png"
        Image.fromarray(scene.image).save(os.path.join(args.out, picture))
        objects = [{"name": o.name, "color": o.color, "box": o.box} for o in scene.objects]
        rows.append({"name": scene_name(scene), "image": picture, "cover": scene.cover, "feature": scene.feature,
                     "captions": captions(scene), "questions": questions(scene), "objects": objects})
    write_json_lines(os.path.join(args.out, "scenes.jsonl"), rows)
    print(f"{args.n} scenes in {args.out}")


def main():
    parser = Parser(prog="python -m toy.scenes", description="Write built-in scenes as files.")
    parser.add_argument("--out", required=True, help="directory to write into; made if missing")
    parser.add_argument("--split", default="test", choices=SPLITS, help="default: test")
    parser.add_argument("-n", type=whole(1), default=20, help="number of scenes (default 20)")
    parser.add_argument("--size", type=whole(*SIZES), default=256, help="side in pixels (default 256)")
    parser.add_argument("--seed", type=whole(0, SEEDS), default=0, help="default 0")
    parser.add_argument("--start", type=whole(0), default=0, help="index of the first scene (default 0)")
    parser.run(write_scenes)


if __name__ == "__main__":
    main()
