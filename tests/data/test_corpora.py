"""
Proves that every corpus converts from small files in its published layout, that every answer about a region follows
from its COCO file, that mixes leave out test images, and that a mistake gives one line, exit code 2 and no file.

    pytest tests/data/test_corpora.py
"""
import json
import pathlib
import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from checks.stand_ins import karpathy, put, write_rsvqa
from corpora.__main__ import main
from corpora.coco import SAMPLINGS, SHARES, plural
from corpora.conversations import read_llava
from corpora.photo_questions import PER_PHOTO, SURPLUS, THINGS, choose_things
from corpora.prompts import PROMPTS, SCENE_TEXT
from corpora.questions import answer_class
from corpora.table import CORPORA, MIXES, read_corpus

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUFFIX = "\nAnswer the question using a single word or phrase."


def convert(tmp_path, name, *flags):
    out = tmp_path / "out.jsonl"
    main([name, "--root", str(tmp_path), "--out", str(out), *flags])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["conversations"][0]["value"].startswith("<image>\n") for row in rows if "image" in row)
    return rows


def turns(row):
    return [turn["value"] for turn in row["conversations"]]


CAPTIONS = ["many planes . ", "many planes .", "a  long building .", "", "an airport"]


@pytest.mark.parametrize("name, file, folder", [
    ("rsicd", "dataset_rsicd.json", "RSICD_images"), ("ucm", "dataset.json", "imgs"),
    ("sydney", "dataset.json", "imgs"), ("rsitmd", "dataset_RSITMD.json", "images")])
def test_caption_corpora(tmp_path, name, file, folder, capsys):
    put(tmp_path / file, karpathy(("1.tif", "train", CAPTIONS), ("2.tif", "test", CAPTIONS), ("3.tif", "train", ["x"])))
    rows = convert(tmp_path, name)
    # The repeated caption stays, the empty one goes, the double space inside stays: raw means raw.
    kept = ["many planes .", "many planes .", "a  long building .", "an airport"]
    assert [turns(row)[1] for row in rows] == [*kept, "x"]
    assert [row["id"] for row in rows] == [f"{name}-1.tif-{k}" for k in (0, 1, 2, 4)] + [f"{name}-3.tif-0"]
    assert {row["image"] for row in rows} == {f"{folder}/1.tif", f"{folder}/3.tif"}
    assert all("references" not in row for row in rows)
    assert capsys.readouterr().out.startswith(f"{name} train: 5 records, 2 images -> ")
    test, = convert(tmp_path, name, "--split", "test")
    assert test["references"] == kept
    assert turns(test)[1] == "many planes ." and test["image"] == f"{folder}/2.tif"


def test_photo_questions_are_answered_by_the_captions(tmp_path, capsys):
    """Of what is asked for, all captions of the photograph name it or none does; a bare number tells no class."""
    airport = ["two planes on a runway .", "many planes"] * 2 + ["a Plane near cars"]
    forest = ["a road in a forest"] * 5
    rows = [(f"airport_{i}.jpg", "train", airport) for i in range(40)]
    rows += [(f"forest_{i}.jpg", "train", forest) for i in range(40)]
    put(tmp_path / "dataset_rsicd.json", karpathy(*rows, ("00007.jpg", "train", airport), ("1.jpg", "val", airport)))
    asked, answers = convert(tmp_path, "rsicd-questions"), Counter()
    named = {"airport": {"plane"}, "forest": {"road", "forest"}}
    for row in asked:
        scene, (question, answer) = row["image"].split("/")[1].split("_")[0], turns(row)
        answers[row["type"], answer] += 1
        if row["type"] == "presence":
            thing = re.search(r"(?:there|Is) an? (.*?)(?: present| in the|\?)", question)[1]
            assert answer == ("yes" if thing in named[scene] else "no")
            assert thing not in ("car", "runway") or scene == "forest"             # some captions name it, some do not
        elif row["type"] == "comp":
            way, many, few = re.search(r"Are there (more|less) (.*?)s than (.*?)s(?: in|\?)", question).groups()
            there = {name for name in named[scene] for pair in [(many, few)] if name in pair}
            assert answer == ("yes" if (many if way == "more" else few) in there else "no")
    assert answers["scene", "airport"] == answers["scene", "forest"] == 40
    assert answers["rural_urban", "rural"] == 40 and not answers["rural_urban", "urban"]
    assert answers["presence", "yes"] == answers["presence", "no"] > 60
    assert {"yes", "no"} <= {answer for kind, answer in answers if kind == "comp"}
    put(tmp_path / "classes.json", {"00007.jpg": "Airport"})
    assert len(convert(tmp_path, "rsicd-questions")) > len(asked)
    put(tmp_path / "classes.json", {"00007.jpg": ["Airport"]})
    assert f"{tmp_path}/classes.json" in fails(tmp_path, capsys, "rsicd-questions", "--root", str(tmp_path))


def test_things_are_chosen_in_balance_and_never_against_a_caption():
    told = {"airport": {"plane", "car", "road"}, "forest": {"forest", "meadow", "pond"}}
    photos = []
    for i in range(1000):                   # one in four has a thing that is rare in its class, in some caption
        name, more = list(told)[i % 2], list(THINGS)[i // 4 % len(THINGS)]
        photos.append((str(i), (name, ""), told[name], told[name] | ({more} if i % 8 < 2 else set())))
    asked = choose_things(photos)
    assert all(len(present) == len(absent) <= PER_PHOTO for present, absent in asked.values())
    assert not any(set(asked[name][1]) & some for name, _, _, some in photos)
    present, absent = (Counter(thing for pair in asked.values() for thing in pair[k]) for k in (0, 1))
    assert sum(present.values()) > 50 and max((present - absent).values()) <= SURPLUS


def test_nwpu(tmp_path):
    def row(name, split):
        return {"filename": name, "imgid": 1, "split": split, "raw": "A .", "raw_1": "B .", "raw_2": "C .",
                "raw_3": "D .", "raw_4": "E .", "sentids": 0, "sentids_1": 1}
    put(tmp_path / "dataset_nwpu.json", {"airport": [row("airport_1.jpg", "train"), row("airport_2.jpg", "val")],
                                         "bridge": [row("bridge_1.jpg", "train")]})
    rows = convert(tmp_path, "nwpu")
    assert [turns(r)[1] for r in rows] == ["A .", "B .", "C .", "D .", "E ."] * 2
    assert rows[5]["image"] == "NWPU_images/bridge/bridge_1.jpg"
    val, = convert(tmp_path, "nwpu", "--split", "val")
    assert val["references"] == ["A .", "B .", "C .", "D .", "E ."]


def test_capera_takes_stills_of_the_split_folder(tmp_path):
    clip = {"video_id": "Harvesting_Car_001.mp4", "annotation": {"English_caption": ["one", "two"]}}
    for split in ("train", "test"):
        put(tmp_path / f"CapERA_DATASET_{split}.json", {"ERA_caption": [clip]})
    train, test = convert(tmp_path, "capera"), convert(tmp_path, "capera", "--split", "test")
    assert [row["image"] for row in train] == ["Train/Harvesting_Car/Harvesting_Car_001.jpg"] * 2
    assert test[0]["image"] == "Test/Harvesting_Car/Harvesting_Car_001.jpg"
    assert test[0]["references"] == ["one", "two"]
    assert (train[0]["id"], test[0]["id"]) == ("capera-train-Harvesting_Car_001-0", "capera-test-Harvesting_Car_001")


def test_whu_rs19_makes_text_of_the_folder_names(tmp_path):
    for name in ("railwayStation/railwayStation_02.jpg", "Airport/airport_01.jpg", "Airport/Thumbs.db",
                 "Airport/._airport_01.jpg", ".ipynb_checkpoints/a-checkpoint.jpg"):
        put(tmp_path / name, "")
    rows = convert(tmp_path, "whu-rs19")
    assert [row["image"] for row in rows] == ["Airport/airport_01.jpg", "railwayStation/railwayStation_02.jpg"]
    assert turns(rows[1])[1] == SCENE_TEXT.format(name="railway station")


LR = [("rural_urban", "Is it a rural or an urban area", "rural"), ("count", "How many roads are there?", "37"),
      ("comp", "Are there more roads than farms?", "no")]


@pytest.mark.parametrize("texts", [True, False], ids=["split files whole", "split files with flags only"])
def test_rsvqa_lr(tmp_path, texts):
    write_rsvqa(tmp_path, "LR", "val", LR, texts)
    rows = convert(tmp_path, "rsvqa-lr", "--split", "val")
    assert [(row["type"], *turns(row)) for row in rows] == [
        ("rural_urban", f"<image>\nIs it a rural or an urban area{SUFFIX}", "rural"),
        ("count", f"<image>\nHow many roads are there?{SUFFIX}", "between 10 and 100"),
        ("comp", f"<image>\nAre there more roads than farms?{SUFFIX}", "no")]
    assert {row["image"] for row in rows} == {"Images_LR/7.tif"}
    raw = convert(tmp_path, "rsvqa-lr", "--split", "val", "--raw-answers")
    assert [turns(row)[1] for row in raw] == ["rural", "37", "no"]


def test_rsvqa_hr_keeps_counts_and_buckets_areas(tmp_path):
    rows = [("count", "How many?", "37"), ("area", "What area?", "512m2"), ("presence", "Is there?", "yes")]
    write_rsvqa(tmp_path, "USGS", "test_phili", rows)
    converted = convert(tmp_path, "rsvqa-hr", "--split", "test_phili")
    assert [turns(row)[1] for row in converted] == ["37", "between 100m2 and 1000m2", "yes"]
    assert converted[0]["image"] == "Data/7.tif" and converted[0]["id"] == "rsvqa-hr-test_phili-1"


@pytest.mark.parametrize("answer, counts, areas_only", [
    ("0", "0", "0"), ("1", "between 0 and 10", "1"), ("10", "between 0 and 10", "10"),
    ("11", "between 10 and 100", "11"), ("100", "between 10 and 100", "100"), ("101", "between 100 and 1000", "101"),
    ("1000", "between 100 and 1000", "1000"), ("1001", "more than 1000", "1001"),
    ("0m2", "0m2", "0m2"), ("10m2", "between 0m2 and 10m2", "between 0m2 and 10m2"),
    ("11m2", "between 10m2 and 100m2", "between 10m2 and 100m2"), ("10632m2", "more than 1000m2", "more than 1000m2"),
    ("yes", "yes", "yes"), ("12 roads", "12 roads", "12 roads")])
def test_edges_of_the_answer_classes(answer, counts, areas_only):
    assert (answer_class(answer, True), answer_class(answer, False)) == (counts, areas_only)


LLAVA = [
    {"id": "same", "image": "a/1.png", "conversations": [{"from": "human", "value": "What is it?\n<image>"},
                                                         {"from": "gpt", "value": "A ship."},
                                                         {"from": "human", "value": "Where?", "weight": 1},
                                                         {"from": "gpt", "value": "{<1><2><3><4>|<5>}"}]},
    {"id": "same", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
]


@pytest.mark.parametrize("name", [name for name, corpus in CORPORA.items() if corpus.read is read_llava])
def test_llava_lists(tmp_path, name):
    put(tmp_path / CORPORA[name].file, LLAVA)
    first, second = convert(tmp_path, name)
    assert turns(first) == ["<image>\nWhat is it?", "A ship.", "Where?", "{<1><2><3><4>|<5>}"]
    assert first["image"] == ("imgv2_split_512_100_vaild/a/1.png" if name.startswith("fit-rs") else "a/1.png")
    assert "image" not in second and turns(second) == ["Hello", "Hi"]


def test_another_file_name(tmp_path):
    put(tmp_path / "parts" / "mine.json", LLAVA)
    assert len(convert(tmp_path, "llava", "--file", "parts/mine.json")) == 2


def test_fit_rsfg_benchmarks(tmp_path):
    folder = tmp_path / "FIT-RSFG" / "FIT-RSFG-Bench"
    answer = "A port.\u2028Two."     # a line separator, at which str.splitlines would cut the record
    caption = {"question_id": "9", "image": "t.png", "question": "Describe it.", "ground_truth": answer}
    question = {"question_id": 1, "image": "t.png", "text": "How many?" + SUFFIX, "category": "Count",
                "ground_truth": "2"}
    put(folder / "test_FITRS_image_caption_eval.jsonl", json.dumps(caption, ensure_ascii=False) + "\n")
    put(folder / "test_FITRS_vqa_eval.jsonl", json.dumps(question) + "\n" + json.dumps(question) + "\n")
    row, = convert(tmp_path, "fit-rsfg-captions", "--split", "val")
    assert turns(row)[0] == "<image>\nDescribe it." and row["references"] == [answer]
    rows = convert(tmp_path, "fit-rsfg-vqa", "--split", "val")
    assert [(r["type"], *turns(r)) for r in rows] == [("Count", "<image>\nHow many?" + SUFFIX, "2")] * 2


def test_wordings_vary_and_do_not_change_from_run_to_run(tmp_path):
    put(tmp_path / "dataset.json", karpathy(*[(f"{i}.tif", "train", ["a"] * 5) for i in range(40)]))
    used = {turns(row)[0].removeprefix("<image>\n") for row in convert(tmp_path, "ucm")}
    assert used == set(PROMPTS["caption"])
    first = (tmp_path / "out.jsonl").read_bytes()
    command = [sys.executable, "-m", "corpora", "ucm", "--root", tmp_path, "--out", tmp_path / "out.jsonl"]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONHASHSEED": "3"}, capture_output=True)
    assert (tmp_path / "out.jsonl").read_bytes() == first


def fails(tmp_path, capsys, *arguments):
    """The one line on stderr; exit code 2, and nothing new in the folder."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(tmp_path / "never.jsonl")])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    return line


@pytest.mark.parametrize("name, flags, message", [
    ("nope", [], "unknown corpus 'nope'; expected one of rsicd, "),
    ("rsitmd", ["--split", "val"], "rsitmd has no split 'val'; it has: train, test"),
    ("rsicd", [], "dataset_rsicd.json is not there; --root should be"),
    ("rsvqa-lr", [], "LR_split_train_questions.json is not there; --root should be"),
    ("rsvqa-hr", ["--file", "x.json"], "--file x.json: rsvqa-hr is read from several files"),
    ("llava", ["--file", "mine.json"], "mine.json is not there; --root should be"),
    ("whu-rs19", [], "whu-rs19 train: no record of this split"),
])
def test_wrong_names(tmp_path, capsys, name, flags, message):
    assert message in fails(tmp_path, capsys, name, "--root", str(tmp_path), *flags)


def test_missing_root(tmp_path, capsys):
    assert f"--root {tmp_path}/no: no such folder" in fails(tmp_path, capsys, "rsicd", "--root", f"{tmp_path}/no")


WHOLE = json.dumps(karpathy(("1.jpg", "train", ["a"])), indent=1)


@pytest.mark.parametrize("text, message", [
    (WHOLE[:60], "not valid JSON: .*: line 6 column .* \\(char 60\\); is the file cut off"),
    ("[]", "dataset_rsicd.json: 'images' should be list, found nothing"),
    ('{"images": [3]}', "images 0: 'split' should be str, found nothing; this is not the published layout"),
    ('{"images": [{"split": "train"}]}', "images 0: 'filename' should be str, found nothing"),
    (json.dumps(karpathy(("1.jpg", "train", [5]))), "images 0: 'raw' should be str, found int; this is not"),
    (json.dumps(karpathy(("1.jpg", "test", ["a"]))), "rsicd train: no record of this split"),
    (json.dumps(karpathy(*[("1.jpg", "train", ["a"])] * 2)), "record rsicd-1.jpg-0 comes twice"),
])
def test_wrong_annotation_files(tmp_path, capsys, text, message):
    put(tmp_path / "dataset_rsicd.json", text)
    line = fails(tmp_path, capsys, "rsicd", "--root", str(tmp_path))
    assert re.search(message, line), line


def test_bytes_that_are_no_text(tmp_path, capsys):
    (tmp_path / "dataset_rsicd.json").write_bytes(b'{"images": "\xff"}')
    assert "not UTF-8 text at byte 12" in fails(tmp_path, capsys, "rsicd", "--root", str(tmp_path))


def test_a_bad_line_of_a_benchmark(tmp_path, capsys):
    put(tmp_path / "b.jsonl", '{"image": "t.png", "text": "a", "ground_truth": "b", "category": "c"}\n{"image":\n')
    arguments = ["fit-rsfg-vqa", "--split", "val", "--root", str(tmp_path), "--file", "b.jsonl"]
    assert "b.jsonl, line 2: not valid JSON" in fails(tmp_path, capsys, *arguments)


def test_answers_of_another_copy(tmp_path, capsys):
    write_rsvqa(tmp_path, "LR", "train", LR)
    put(tmp_path / "LR_split_train_answers.json", {"answers": [{"id": 1, "answer": "no", "active": True}]})
    assert "no active row with id 3; do the files belong together?" in fails(
        tmp_path, capsys, "rsvqa-lr", "--root", str(tmp_path))


def test_a_failed_run_leaves_the_old_file(tmp_path, capsys):
    put(tmp_path / "dataset.json", karpathy(("1.tif", "train", ["a"])))
    convert(tmp_path, "ucm")
    old = (tmp_path / "out.jsonl").read_bytes()
    put(tmp_path / "dataset.json", karpathy(("1.tif", "train", ["a"]), ("2.tif", "train", [None])))
    with pytest.raises(SystemExit):
        convert(tmp_path, "ucm")
    assert (tmp_path / "out.jsonl").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset.json", "out.jsonl"]


def test_out_must_be_a_file_in_a_folder(tmp_path, capsys):
    put(tmp_path / "dataset.json", karpathy(("1.tif", "train", ["a"])))
    for out, message in ((tmp_path, "is no regular file"), (tmp_path / "no" / "out.jsonl", "cannot be written")):
        with pytest.raises(SystemExit) as stop:
            main(["ucm", "--root", str(tmp_path), "--out", str(out)])
        assert stop.value.code == 2 and f"{out} {message}" in capsys.readouterr().err


def test_help_lists_every_corpus_with_its_file(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text and corpus.file in text for name, corpus in CORPORA.items())


def test_records_can_be_read_without_a_file(tmp_path):
    put(tmp_path / "dataset_rsicd.json", WHOLE)
    row, = read_corpus("rsicd", tmp_path)
    assert row["image"] == "RSICD_images/1.jpg"


# ---------------------------------------------------------------------------------------------- regions

NAMES = ["Small_Vehicle", "harbor", "ship", "storage tank", "bus"]
RLE = {"size": [100, 200], "counts": "PPYo1"}


def instance(image, category, box, **other):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {"image_id": image, "category_id": category, "bbox": box, "area": w * h, "iscrowd": 0,
            "segmentation": [polygon], **other}


def coco(*annotations, images=1):
    return {"images": [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 100} for i in range(images)],
            "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
            "annotations": [{"id": i, **row} for i, row in enumerate(annotations)]}


def coco_records(tmp_path, data, *flags):
    put(tmp_path / "any.json", data)
    return convert(tmp_path, "coco-masks", "--file", "any.json", *flags)


def answers(rows, kind):
    return [turns(row)[1] for row in rows if row["type"] == kind]


def fleet(images=60):
    """Random boxes, all different, of classes 0 to 3 in random numbers; class 4 never."""
    rng = random.Random(1)
    rows = []
    for image in range(images):
        for k in range(rng.randint(1, 9)):
            box = [rng.randint(0, 150), rng.randint(0, 70), 5 + k, 5 + rng.randint(0, 20)]
            rows.append(instance(image, rng.choice((0, 0, 1, 2, 3)), box))
    return coco(*rows, images=images)


def test_every_region_answer_follows_from_the_file(tmp_path):
    data = fleet()
    rows = coco_records(tmp_path, data)
    by_mask = {json.dumps([row["image_id"], row["segmentation"]]): row for row in data["annotations"]}
    plain = [name.replace("_", " ").lower() for name in NAMES]
    for row in rows:
        image = int(row["image"].removesuffix(".png"))
        question, answer = turns(row)
        found = [by_mask[json.dumps([image, mask])] for mask in row.get("masks", [])]
        assert len(re.findall(r"<region\d?>", question)) == len(found) == {
            "presence": 0, "region comparison": 2}.get(row["type"], 1)
        names = [plain[one["category_id"]] for one in found]
        here = [plain[one["category_id"]] for one in data["annotations"] if one["image_id"] == image]
        asked = re.search(r" an? (.*?)( in the image)?\?", question)
        if row["type"] == "region class":
            assert answer == names[0]
        elif row["type"] == "region count":
            assert answer == str(here.count(names[0]))
        elif row["type"] == "region presence":
            assert answer == ("yes" if asked[1] == names[0] else "no")
        elif row["type"] == "presence":
            assert answer == ("yes" if asked[1] in here else "no")
        elif row["type"] == "region comparison" and "same kind" in question:
            assert answer == ("yes" if names[0] == names[1] else "no")
        elif row["type"] == "region comparison":
            assert answer == ("yes" if found[0]["area"] > found[1]["area"] else "no")
        elif row["type"] == "region position":
            x, y, w, h = found[0]["bbox"]
            column, line = int((x + w / 2) / 200 * 3), int((y + h / 2) / 100 * 3)
            assert answer == ("top left", "top", "top right", "left", "center", "right",
                              "bottom left", "bottom", "bottom right")[3 * line + column]
        else:
            assert f"a {names[0]}" in answer or f"this {names[0]}" in answer


def test_shares_hold_and_yes_and_no_are_balanced(tmp_path, capsys):
    rows = coco_records(tmp_path, fleet())
    printed = capsys.readouterr().out
    kinds = Counter(row["type"] for row in rows)
    assert sum(SHARES.values()) == 100 and len(rows) > 500
    assert all(abs(kinds[kind] - share / 100 * len(rows)) <= 2 for kind, share in SHARES.items())
    for kind in ("region presence", "presence"):
        for sampling in SAMPLINGS:
            said = Counter(turns(row)[1] for row in rows if (row["type"], row.get("sampling")) == (kind, sampling))
            assert said["yes"] > 2 and abs(said["yes"] - said["no"]) <= 1
            assert re.search(rf"  {kind} {sampling} +{said.total()} ", printed)
    said = Counter(answers(rows, "region comparison"))
    assert abs(said["yes"] - said["no"]) <= 2
    assert max(Counter(row["image"] for row in rows).values()) <= 20
    assert all(("sampling" in row) == row["type"].endswith("presence") for row in rows)
    sentences = ("region caption", "region detail", "region reasoning")
    assert all(turns(row)[0].endswith(SUFFIX) != (row["type"] in sentences) for row in rows)
    questions = [(row["image"], row["type"], json.dumps(row.get("masks")), turns(row)[0].split("\n")[1]) for row in rows
                 if row["type"] != "region comparison"]
    assert len(set(questions)) == len(questions)


def test_no_question_whose_answer_would_always_be_yes(tmp_path):
    """With one class there is nothing to say no to: one yes waits for its no, and no more are asked."""
    data = coco(*[instance(i, 0, [9 * k, 9, 9, 9]) for i in range(30) for k in range(5)], images=30)
    rows = coco_records(tmp_path, {**data, "categories": data["categories"][:1]})
    assert len(answers(rows, "region presence")) == len(answers(rows, "presence")) == len(SAMPLINGS)
    assert answers(rows, "region comparison") == ["yes"]        # of the same kind; all areas are equal
    assert len(answers(rows, "region class")) > 70


def test_regions_do_not_change_from_run_to_run(tmp_path):
    coco_records(tmp_path, fleet())
    first = (tmp_path / "out.jsonl").read_bytes()
    command = [sys.executable, "-m", "corpora", "coco-masks", "--root", tmp_path, "--file", "any.json",
               "--out", tmp_path / "out.jsonl"]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONHASHSEED": "7"}, capture_output=True)
    assert (tmp_path / "out.jsonl").read_bytes() == first


def test_limit_per_image(tmp_path):
    data = coco(*[instance(0, 2, [5 * i, 5, 4, 4]) for i in range(30)])
    assert len(coco_records(tmp_path, data)) == 20
    assert len(coco_records(tmp_path, data, "--limit-per-image", "50")) == 50
    assert len(coco_records(tmp_path, coco(instance(0, 2, [1, 1, 9, 9])))) == 3


def test_descriptions_and_reasons(tmp_path):
    boxes = [(1, [0, 10, 40, 40]), (2, [44, 20, 24, 8]), (0, [160, 90, 10, 5])]     # harbor, ship, small vehicle
    # The same picture thirty times, so that every region gets every question.
    rows = coco_records(tmp_path, coco(*[instance(i, *box) for i in range(30) for box in boxes], images=30))
    said = {(row["type"], row["masks"][0][0][0]): turns(row)[1] for row in rows if "masks" in row}
    assert said["region caption", 44] == "This is a ship at the top left of the image."
    assert said["region detail", 44] == (
        "This is a ship at the top left of the image. It covers about 0.96 percent of the image and is about 3.0 times "
        "as wide as tall. It is the only ship there. The nearest other object is a harbor to its left, close by.")
    assert said["region detail", 160].endswith("other object is a ship to its upper left, some way off.")
    assert said["region reasoning", 44] == "Near this ship there is a harbor, so it is probably moored there."
    assert said["region reasoning", 0] == "Near this harbor there is a ship, so it lies beside ships."
    assert said["region reasoning", 160] == "No other labeled object is near this small vehicle, so it stands alone."


def test_masks_are_taken_as_they_stand(tmp_path):
    square, other = [1, 1, 9, 1, 9, 9], [20.5, 20, 30, 20, 30, 30, 20, 30]
    made = {"flat": (square, [square]), "two": ([square, other], [square, other]), "rle": (RLE, RLE),
            "a line": ([[1, 1, 9, 9], square], [square]), "none": ([], {"bbox": [2, 2, 8, 8]}),
            "only a line": ([[1, 1, 9, 9]], {"bbox": [2, 2, 8, 8]}), "null": (None, {"bbox": [2, 2, 8, 8]})}
    for written, expected in made.values():
        rows = coco_records(tmp_path, coco(instance(0, 2, [2, 2, 8, 8], segmentation=written)))
        assert [row["masks"] for row in rows if row["type"] != "presence"] == [[expected]] * len(rows)


def test_crowds_and_empty_regions_are_not_asked_about(tmp_path):
    ships = [instance(0, 2, [9 * i, 5, 5, 5 + i]) for i in range(6)]
    group, nothing = instance(0, 2, [0, 50, 99, 40], iscrowd=1, segmentation=RLE), instance(0, 1, [7, 7, 0, 5], area=0)
    rows = coco_records(tmp_path, coco(*ships, group, nothing))
    masks = [ship["segmentation"] for ship in ships]
    assert all(mask in masks for row in rows for mask in row.get("masks", []))
    assert answers(rows, "region count") == []
    assert answers(rows, "region reasoning") == []
    assert all(text.endswith("It is one of many ships there.") for text in answers(rows, "region detail"))
    assert not any("a harbor" in turns(row)[0] and row["type"] == "presence" for row in rows)


def test_popular_and_adversarial_negatives(tmp_path):
    """Vehicles are in most images; beside harbors there are ships."""
    rows = [instance(i, 0, [9, 9, 9, 9]) for i in range(8)]
    rows += [instance(i, name, [30, 9, 9, 9]) for i in (8, 9) for name in (1, 2)]
    rows += [instance(10 + i, 1, [9, 9, 9, 9]) for i in range(12)]
    rows = coco_records(tmp_path, coco(*rows, images=22))
    said_no = [row for row in rows if turns(row)[1] == "no" and int(row["image"].removesuffix(".png")) > 9]
    for sampling, name in (("popular", "small vehicle"), ("adversarial", "ship")):
        asked = [turns(row)[0] for row in said_no if row.get("sampling") == sampling]
        assert asked and all(name in text for text in asked)


@pytest.mark.parametrize("change, message", [
    ({"category_id": 77}, "annotations 0: image 0 or category 77 is not in the file"),
    ({"image_id": 5}, "annotations 0: image 5 or category 2 is not in the file"),
    ({"bbox": [1, 2, 3]}, "'bbox' has 3 numbers, expected x, y, width, height"),
    ({"bbox": [1, 2, 3, float("nan")]}, "'bbox': expected a number of pixels, found nan"),
    ({"area": 10 ** 400}, "'area': expected a number of pixels, found 1000"),
    ({"segmentation": 3}, "'segmentation' should be dict or list, found int"),
    ({"segmentation": [[1, 2, "x", 4, 5, 6]]}, "polygon: expected a number of pixels, found x"),
    ({"segmentation": {"counts": "0"}}, "'size' should be list, found nothing"),
])
def test_wrong_annotations(tmp_path, capsys, change, message):
    put(tmp_path / "any.json", coco(instance(0, 2, [1, 1, 9, 9], **change)))
    assert message in fails(tmp_path, capsys, "coco-masks", "--root", str(tmp_path), "--file", "any.json")


def test_plurals():
    assert [plural(name) for name in ("ship", "bus", "tennis court", "wine glass", "person", "skis", "bench", "city")
            ] == ["ships", "buses", "tennis courts", "wine glasses", "people", "skis", "benches", "cities"]


BOXES = [{"bbox": [i, 0, 5, 5], "segmentation": [[i, 0, i + 5, 0, i, 5]]} for i in range(4)]
MASKS = [box["segmentation"] for box in BOXES]


def osprey(tmp_path, name, *texts, **other):
    conversation = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    row = {"file_name": "COCO_train2014_000000057870.jpg", "height": 9, "width": 9, "annotation": BOXES,
           **({"conversations": conversation} if texts else {}), **other}
    put(tmp_path / CORPORA[name].file, [row, {**row, "conversations": []}])
    return convert(tmp_path, name)[0]


def test_osprey_keeps_the_regions_that_the_text_mentions(tmp_path):
    row = osprey(tmp_path, "osprey-presence", "Is <region2> a cat?", "No", "Is <region4> like <region2>?", "Yes")
    assert turns(row) == ["<image>\nIs <region1> a cat?", "No", "Is <region2> like <region1>?", "Yes"]
    assert row["masks"] == [MASKS[1], MASKS[3]] and row["image"] == "coco/imgs/000000057870.jpg"
    row = osprey(tmp_path, "osprey-short", "What is <region1>?", "Cat")
    assert turns(row) == [f"<image>\nWhat is <region1>?{SUFFIX}", "Cat"] and row["masks"] == MASKS[:1]


def test_osprey_names_regions_that_an_answer_names(tmp_path):
    row = osprey(tmp_path, "osprey", "What is <region1>?\n<image>", "A cat on <region3>.", "And <region3>?", "A mat.")
    assert turns(row) == [
        "<image>\nThe image has these regions: region1 <region1>, region2 <region2>. What is region1?",
        "A cat on region2.", "And region2?", "A mat."]
    assert row["masks"] == [MASKS[0], MASKS[2]]


def test_osprey_descriptions(tmp_path):
    row = osprey(tmp_path, "osprey-details", annotation=BOXES[:2],
                 description=["<region1>: A cat.", "<region2>: A\nmat."])
    first, cat, second, mat = turns(row)
    assert (cat, mat) == ("A cat.", "A\nmat.") and row["masks"] == MASKS[:2] and row["type"] == "region detail"
    assert first.startswith("<image>\n") and first.count("<region1>") == second.count("<region2>") == 1


def test_osprey_questions(tmp_path):
    put(tmp_path / "q.json", [{"question_id": 0, "image": "1.jpg", "category": "description",
                               "text": "What is <region>?", "annotation": BOXES[2]}])
    row, = convert(tmp_path, "osprey-questions", "--split", "test", "--file", "q.json")
    assert turns(row) == ["<image>\nWhat is <region1>?", "unknown"] and row["masks"] == [MASKS[2]]


def test_osprey_mistakes(tmp_path, capsys):
    for texts, message in ((["Is <region5> a cat?", "No"], r"mentions regions \[5\], but the row has 4"),
                           (["Is <region0> a cat?", "No"], r"mentions regions \[0\], but the row has 4")):
        with pytest.raises(SystemExit):
            osprey(tmp_path, "osprey", *texts)
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit):
        osprey(tmp_path, "osprey-details", description=["A cat."])
    assert "expected '<region1>: text'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- mixes

def mix(tmp_path, name, capsys):
    capsys.readouterr()
    return convert(tmp_path, name), capsys.readouterr().out


def test_align_takes_what_is_there_and_no_test_image(tmp_path, capsys):
    rows = [(f"{i}.jpg", "train", ["a", "b"]) for i in range(20)] + [("7.jpg", "test", ["a"]), ("99.jpg", "val", ["a"])]
    put(tmp_path / "rsicd" / "dataset_rsicd.json", karpathy(*rows))
    write_rsvqa(tmp_path / "rsvqa-lr", "LR", "train", LR)
    put(tmp_path / "whu-rs19" / "Airport" / "airport_01.jpg", "")
    (tmp_path / "ucm").mkdir()
    records, table = mix(tmp_path, "align", capsys)
    assert Counter(row["id"].split("-")[0] for row in records) == {"rsicd": 38, "rsvqa": 3, "whu": 1}
    assert not any(row["image"].endswith(("/7.jpg", "/99.jpg")) for row in records)
    assert {row["image"].split("/")[0] for row in records} == {"rsicd", "rsvqa-lr", "whu-rs19"}
    assert "rsicd/RSICD_images/3.jpg" in {row["image"] for row in records}
    assert re.search(r"\nrsicd +38 +19 +2  val, test\n", table) and re.search(r"\nrsvqa-lr +3 +1 +0  nothing\n", table)
    assert re.search(r"\nucm +absent .*dataset.json is not there", table) and re.search(r"\nnwpu +absent ", table)
    assert all(f"\n{name} " in table for name in MIXES["align"])
    ids = [row["id"] for row in records]
    assert ids != sorted(ids) and ids == [row["id"] for row in mix(tmp_path, "align", capsys)[0]]


def test_instruct_leaves_out_tiles_of_the_benchmark(tmp_path, capsys):
    def row(image):
        return {"image": image, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    question = {"image": "b.png", "text": "q", "category": "c", "ground_truth": "a"}
    put(tmp_path / "fit-rs" / CORPORA["fit-rsfg-vqa"].file, json.dumps(question))
    put(tmp_path / "fit-rs" / CORPORA["fit-rs-vqa"].file, [row("a.png"), row("b.png"), row("c.png")])
    rows, table = mix(tmp_path, "instruct", capsys)
    folder = "fit-rs/imgv2_split_512_100_vaild/"
    assert sorted(row["image"] for row in rows) == [folder + "a.png", folder + "c.png"]
    assert re.search(r"\nfit-rs-vqa +2 +2 +1  fit-rsfg-vqa\n", table)
    put(tmp_path / "fit-rs" / CORPORA["fit-rs"].file, [row("a.png")])
    rows, table = mix(tmp_path, "instruct", capsys)
    assert [row["id"] for row in rows] == ["fit-rs-0"] and re.search(r"\nfit-rs-vqa +-  part of fit-rs\n", table)


def test_wrong_mixes(tmp_path, capsys):
    root = ["--root", str(tmp_path)]
    assert "align takes the train splits" in fails(tmp_path, capsys, "align", *root, "--split", "test")
    assert "align takes the train splits" in fails(tmp_path, capsys, "align", *root, "--file", "x.json")
    assert "instruct train: no record" in fails(tmp_path, capsys, "instruct", *root)


# ---------------------------------------------------------------------------------------------- broken files

def mutate(rng, value):
    """One place of a JSON value is dropped or becomes something of another type or size."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        value = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = mutate(rng, value[key])
        return value
    return rng.choice([None, True, -1, 10 ** 400, float("nan"), 1e308, "", "\ud800", "<region9>", [], {}, [[]], [None],
                       {"a": 1}, [[1, 2]]])


CAPERA = {"ERA_caption": [{"video_id": "A_1.mp4", "annotation": {"English_caption": ["one"]}}]}
NWPU = {"airport": [{"filename": "a.jpg", "split": "train", "raw": "A", "raw_1": "B", "raw_2": "C", "raw_3": "D",
                     "raw_4": "E"}]}
OSPREY = [{"file_name": "1.jpg", "annotation": BOXES, "conversations": [{"from": "human", "value": "Is <region1> it?"},
                                                                        {"from": "gpt", "value": "<region2> is."}]}]


@pytest.mark.parametrize("name, content", [
    ("rsicd", karpathy(("1.jpg", "train", ["a", "b"]))), ("nwpu", NWPU), ("capera", CAPERA), ("llava", LLAVA),
    ("coco-masks", coco(instance(0, 1, [0, 10, 40, 40]), instance(0, 2, [44, 20, 24, 8], segmentation=RLE))),
    ("osprey", OSPREY), ("osprey-details", [{"file_name": "1", "annotation": BOXES, "description": ["<region1>: A"]}])])
def test_broken_files_give_one_line(tmp_path, name, content):
    path, failed = tmp_path / CORPORA[name].file.replace("{split}", "train"), 0
    for seed in range(150):
        put(path, json.dumps(mutate(random.Random(seed), content)))
        try:
            json.dumps(list(read_corpus(name, tmp_path)))
        except ValueError as error:
            failed += 1
            assert "\n" not in str(error) and str(path) in str(error), error
    assert failed > 30


def test_depths_that_python_does_not_read(tmp_path, capsys):
    for text in ("[" * 100_000, '{"images": ' + "9" * 5000 + "}"):
        put(tmp_path / "dataset_rsicd.json", text)
        line = fails(tmp_path, capsys, "rsicd", "--root", str(tmp_path))
        assert re.search("dataset_rsicd.json: (brackets are nested|not valid JSON: Exceeds)", line)
