"""
Proves that the built-in scenes are what their words say: one key gives one scene in any process and order, boxes are
the extents of masks, objects neither overlap nor melt into the ground, and captions and answers agree with a recount
from the drawn objects alone.

    pytest tests/data/test_scenes.py
"""
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from corpora.prompts import SHORT_ANSWER
from toy import drawing, scenes
from toy.layout import CLASSES, COLORS, Key
from toy.scenes import (NUMBERS, captions, every_number, every_place, make_records, make_scene, open_scene,
                        questions, region_questions, scene_name)

ROOT = Path(__file__).resolve().parents[2]
SIZE = 128


@pytest.fixture(scope="module")
def drawn():
    return [make_scene("val", i, 3, SIZE) for i in range(60)]


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "toy.scenes", *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True)


def test_another_process_and_another_order_give_the_same_scene():
    code = ("import hashlib\n"
            "from toy import scenes\n"
            "for i in (5, 2, 9):\n"
            "    s = scenes.make_scene('val', i, 3, 96)\n"
            "    print(hashlib.sha256(s.image.tobytes()).hexdigest(), scenes.captions(s), scenes.questions(s))")
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {}
    for i in (2, 5, 9):
        s = make_scene("val", i, 3, 96)
        ours[i] = f"{hashlib.sha256(s.image.tobytes()).hexdigest()} {captions(s)} {questions(s)}"
    assert other.stdout.splitlines() == [ours[5], ours[2], ours[9]]


def test_split_seed_and_index_each_change_the_scene():
    base = make_scene("train", 4, 0, 64).image
    for key in (("val", 4, 0), ("test", 4, 0), ("train", 5, 0), ("train", 4, 1)):
        assert not np.array_equal(base, make_scene(*key, 64).image), key


def test_boxes_are_the_extents_of_masks_and_masks_are_apart(drawn):
    for scene in drawn:
        taken = np.zeros((SIZE, SIZE), bool)
        for o in scene.objects:
            ys, xs = np.nonzero(o.mask)
            assert o.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            x0, y0, x1, y1 = o.box
            assert 0 < x0 < x1 < SIZE and 0 < y0 < y1 < SIZE, "an object is cut off by the border"
            grown = np.any([o.mask] + [np.roll(o.mask, step, axis) for step in (1, -1) for axis in (0, 1)], 0)
            assert not (grown & taken).any(), f"{scene_name(scene)}: objects touch"
            taken |= o.mask


def test_objects_stand_out_from_the_ground_around_them(drawn):
    for scene in drawn:
        anything = np.any([o.mask for o in scene.objects], 0)
        for o in scene.objects:
            x0, y0, x1, y1 = o.box
            window = np.s_[max(y0 - 4, 0):y1 + 4, max(x0 - 4, 0):x1 + 4]
            inside, around = scene.image[o.mask].astype(float), scene.image[window][~anything[window]].astype(float)
            gap = np.abs(np.median(inside, 0) - np.median(around, 0)).max()
            assert gap > 20, f"{scene_name(scene)}: {o.color} {o.name} differs by {gap:.0f} levels only"


def test_vehicles_keep_their_pixels_and_planes_their_share_at_any_size():
    """A vehicle is 3 to 5 pixels wide at 128 and at 256; half a pixel of play for reading a rotated mask."""
    for size, plane in ((128, (17, 28)), (256, (34, 56))):
        for i in range(18):
            for o in make_scene("test", i, 0, size).objects:
                ys, xs = np.nonzero(o.mask)
                points = np.stack([xs, ys]) - np.array([[xs.mean()], [ys.mean()]])
                spread = np.sqrt(12 * np.linalg.eigvalsh(points @ points.T / len(xs)))    # sides of a solid rectangle
                if o.name == "vehicle":
                    assert 2.5 <= spread[0] <= 5.5 and 5 <= spread[1] <= 11, (i, size, spread)
                if o.name == "plane":
                    assert plane[0] <= max(o.box[2] - o.box[0], o.box[3] - o.box[1]) <= plane[1]


@pytest.mark.parametrize("size", [64, 97, 130, 333])
def test_any_size_shows_the_same_scene(size):
    scene = make_scene("train", 7, 0, size)
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert all(o.mask.shape == (size, size) and o.mask.any() for o in scene.objects)
    other = make_scene("train", 7, 0, 128)
    assert captions(scene) == captions(other) and questions(scene) == questions(other)
    assert [(o.name, o.color) for o in scene.objects] == [(o.name, o.color) for o in other.objects]


def test_captions_are_five_and_name_every_group_and_the_land(drawn):
    for scene in drawn:
        groups = Counter((o.name, o.color) for o in scene.objects)
        facts = {f"{NUMBERS[n]} {color} {name}{'s' * (n > 1)}" for (name, color), n in groups.items()}
        texts = captions(scene)
        assert len(set(texts)) == 5
        for text in texts:
            found = re.findall(rf"\b(?:{'|'.join(NUMBERS)}) \w+ (?:{'|'.join(CLASSES)})s?\b", text)
            assert sorted(found) == sorted(facts), text
            assert 6 <= len(text.split()) <= 16 and text == text.lower() and not text.endswith(".")
            assert scene.cover in text
            assert scene.feature is None or scene.feature in text


def answer(question, objects, cover):
    """The answer recounted from drawn objects: an independent reading of the question's words."""
    many = {name: sum(o.name == name for o in objects) for name in CLASSES}
    named = sorted((name for name in CLASSES if name in question), key=question.index)
    color = next((c for c in COLORS if f" {c} " in question), None)
    chosen = [o for o in objects if o.name == named[0] and color in (None, o.color)] if named else []
    if question.startswith("How many"):
        return str(len(chosen))
    if len(named) == 2:
        a, b = many[named[0]], many[named[1]]
        return "yes" if (a < b if "fewer" in question else a > b) else "no"
    if "rural" in question:
        return "urban" if cover in ("concrete", "asphalt", "suburb") else "rural"
    if "land cover" in question:
        return cover
    if "color" in question:
        colors = {o.color for o in chosen}
        return colors.pop() if len(colors) == 1 else None
    if question.startswith(("Where", "In which")):
        places = set()
        for o in chosen:
            x, y = (o.box[0] + o.box[2]) / 2 / SIZE - 0.5, (o.box[1] + o.box[3]) / 2 / SIZE - 0.5
            corner = f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"
            places.add("center" if max(abs(x), abs(y)) < 0.135 else corner)
        return places.pop() if len(places) == 1 else None
    assert question.startswith(("Is there", "Are there any")), question
    return "yes" if chosen else "no"


def test_answers_agree_with_a_recount(drawn):
    kinds = Counter()
    for scene in drawn:
        asked = questions(scene)
        kinds.update(kind for kind, _, _ in asked)
        for _, question, said in asked + every_place(scene) + every_number(scene):
            assert said == answer(question, scene.objects, scene.cover), f"{scene_name(scene)}: {question}"
    assert set(kinds) == {"presence", "count", "comparison", "land cover", "position", "color"}


def test_a_blind_reader_gains_little():
    """The best constant answer to each question text is right in less than 45%; presence says yes as often as no."""
    asked = [q for i in range(800) for q in questions(Key("train", 0, i, SIZE))]
    by_text = {}
    for _, question, said in asked:
        by_text.setdefault(question, Counter())[said] += 1
    assert sum(max(c.values()) for c in by_text.values()) / len(asked) < 0.45
    presence = [said == "yes" for kind, _, said in asked if kind == "presence"]
    assert 0.46 < np.mean(presence) < 0.54


def test_region_questions_tell_the_truth(drawn):
    """Every answer against the drawn objects; yes and no as often; every object is asked for its class."""
    said = Counter()
    for scene in drawn[:30]:
        found = region_questions(scene)
        assert [i for kind, _, _, i, *_ in found if kind == "region class"] == list(range(len(scene.objects)))
        for kind, question, answer, i, *others in found:
            o = scene.objects[i]
            truth = {"region class": o.name, "region color": o.color,
                     "region count": str(sum(p.name == o.name for p in scene.objects)),
                     "region presence": "yes" if f"a {o.name}" in question else "no",
                     "region comparison": "yes" if others and scene.objects[others[0]].name == o.name else "no"}
            assert answer == truth.get(kind, answer)
            if kind == "region caption":
                assert answer.startswith(f"{o.color} {o.name}")
            if kind == "region position":
                x, y = (o.box[0] + o.box[2]) / 2 / scene.size, (o.box[1] + o.box[3]) / 2 / scene.size
                assert answer == "center" or (("top" in answer) == (y < 0.5) and ("left" in answer) == (x < 0.5))
            said[kind, answer] += kind in ("region presence", "region comparison")
    assert said["region presence", "yes"] == said["region presence", "no"] > 30
    assert said["region comparison", "yes"] == said["region comparison", "no"] > 5


def test_region_records_name_their_masks():
    """A chat numbers its regions as they come up, and says each number's mask once."""
    for record in make_records("train", 20, "region chat", size=SIZE):
        text = " ".join(t["value"] for t in record["conversations"] if t["from"] == "human")
        numbers = [int(n) for n in re.findall(r"<region(\d+)>", text)]
        assert list(dict.fromkeys(numbers)) == list(range(1, len(record["masks"]) + 1))
        assert len(set(record["masks"])) == len(record["masks"])
    single = [r for r in make_records("test", 5, "region", size=SIZE) if len(r["masks"]) == 1]
    assert all(r["conversations"][0]["value"].count("<region>") == 1 for r in single)


def test_records_need_no_pixels(monkeypatch):
    def forbidden(*_):
        raise AssertionError("make_records drew a picture")

    monkeypatch.setattr(scenes, "make_scene", forbidden)
    monkeypatch.setattr(drawing, "draw_cover", forbidden)
    train = make_records("train", 3, "caption", start=10, size=SIZE)
    val = make_records("val", 3, "caption", size=SIZE)
    assert len(train) == 15 and len(val) == 3 and len({r["id"] for r in train}) == 15
    assert train[0]["image"] == "scene:train/0/10/128" and train[0]["id"] == "train-10-c0"
    assert val[0]["references"] == captions(Key("val", 0, 0, SIZE))
    assert val[0]["conversations"][1]["value"] == val[0]["references"][0] and "references" not in train[0]
    vqa = make_records("test", 4, "vqa", size=SIZE)
    assert all(r["conversations"][0]["value"].endswith(f"?\n{SHORT_ANSWER}") and r["type"] for r in vqa)
    for r in make_records("train", 20, "chat", size=SIZE):
        turns = r["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2) and len(turns) >= 8
        assert [t["value"].count("<image>") for t in turns] == [1] + [0] * (len(turns) - 1)
    json.dumps(vqa)
    places = make_records("train", 20, "places", size=SIZE)            # none of a scene without a group in one place
    asked = [len(every_place(Key("train", 0, i, SIZE))) for i in range(20)]
    assert [len(r["conversations"]) // 2 for r in places] == [n for n in asked if n] and 0 in asked
    assert len(make_records("train", 20, "numbers", size=SIZE)) == 20


def test_names_open_the_scene_they_name():
    scene = make_scene("val", 12, 1, 64)
    assert scene_name(scene) == scene_name(Key("val", 1, 12, 64)) == "scene:val/1/12/64"
    again = open_scene("scene:val/1/12/64")
    assert np.array_equal(scene.image, again.image) and (again.split, again.index) == ("val", 12)


@pytest.mark.parametrize("name, says", [
    ("scene:val/1/12", "SPLIT/SEED/INDEX/SIZE"), ("scene:val/-1/1/64", "SPLIT/SEED/INDEX/SIZE"),
    ("scene:dev/0/1/64", "'dev'"), ("scene:val/0/1/63", "size 63"), ("scene:val/0/1/2049", "size 2049"),
    (f"scene:val/{'9' * 9999}/1/64", "SPLIT/SEED/INDEX/SIZE"), ("scene:val/0/5000000000/64", "index 5000000000")])
def test_a_bad_name_is_one_clear_line(name, says):
    with pytest.raises(ValueError, match=says) as error:
        open_scene(name)
    assert "\n" not in str(error.value)


def test_the_command_writes_and_refuses(tmp_path):
    done = command("--out", tmp_path / "out", "-n", 2, "--size", 64, "--start", 3)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in open(tmp_path / "out" / "scenes.jsonl")]
    assert [line["name"] for line in lines] == ["scene:test/0/3/64", "scene:test/0/4/64"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"scenes.jsonl", "test-3.png", "test-4.png"}
    (tmp_path / "file").write_text("")
    refused = command("--out", tmp_path / "file", "-n", 1, "--size", 64)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "file" in refused.stderr
