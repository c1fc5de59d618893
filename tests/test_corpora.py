"""Every corpus converts from small files in its published layout, and a user's mistake gives one line and no file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from corpora import CORPORA, PROMPTS, SCENE_TEXT, bucket, main, records  # noqa: E402

SUFFIX = "\nAnswer the question using a single word or phrase."


def put(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def convert(tmp_path: Path, name: str, *flags: str) -> list[dict]:
    out = tmp_path / "out.jsonl"
    main([name, "--root", str(tmp_path), "--out", str(out), *flags])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["conversations"][0]["value"].startswith("<image>\n") for row in rows if "image" in row)
    return rows


def turns(row: dict) -> list[str]:
    return [turn["value"] for turn in row["conversations"]]


def karpathy(*images: tuple[str, str, list[str]]) -> dict:
    rows = [{"filename": name, "imgid": i, "split": split, "sentids": list(range(len(captions))),
             "sentences": [{"tokens": ["wrong"], "raw": caption, "imgid": i, "sentid": k}
                           for k, caption in enumerate(captions)]}
            for i, (name, split, captions) in enumerate(images)]
    return {"images": rows, "dataset": "x"}


CAPTIONS = ["many planes . ", "many planes .", "a  long building .", "", "an airport"]


@pytest.mark.parametrize("name, file, folder", [
    ("rsicd", "dataset_rsicd.json", "RSICD_images"), ("ucm", "dataset.json", "imgs"),
    ("sydney", "dataset.json", "imgs"), ("rsitmd", "dataset_RSITMD.json", "images")])
def test_caption_corpora(tmp_path: Path, name: str, file: str, folder: str, capsys) -> None:
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


def test_nwpu(tmp_path: Path) -> None:
    def row(name: str, split: str) -> dict:
        return {"filename": name, "imgid": 1, "split": split, "raw": "A .", "raw_1": "B .", "raw_2": "C .",
                "raw_3": "D .", "raw_4": "E .", "sentids": 0, "sentids_1": 1}
    put(tmp_path / "dataset_nwpu.json", {"airport": [row("airport_1.jpg", "train"), row("airport_2.jpg", "val")],
                                         "bridge": [row("bridge_1.jpg", "train")]})
    rows = convert(tmp_path, "nwpu")
    assert [turns(r)[1] for r in rows] == ["A .", "B .", "C .", "D .", "E ."] * 2
    assert rows[5]["image"] == "NWPU_images/bridge/bridge_1.jpg"
    val, = convert(tmp_path, "nwpu", "--split", "val")
    assert val["references"] == ["A .", "B .", "C .", "D .", "E ."]


def test_capera_takes_stills_of_the_split_folder(tmp_path: Path) -> None:
    clip = {"video_id": "Harvesting_Car_001.mp4", "annotation": {"English_caption": ["one", "two"]}}
    for split in ("train", "test"):
        put(tmp_path / f"CapERA_DATASET_{split}.json", {"ERA_caption": [clip]})
    train, test = convert(tmp_path, "capera"), convert(tmp_path, "capera", "--split", "test")
    assert [row["image"] for row in train] == ["Train/Harvesting_Car/Harvesting_Car_001.jpg"] * 2
    assert test[0]["image"] == "Test/Harvesting_Car/Harvesting_Car_001.jpg"
    assert test[0]["references"] == ["one", "two"]
    assert (train[0]["id"], test[0]["id"]) == ("capera-train-Harvesting_Car_001-0", "capera-test-Harvesting_Car_001")


def test_whu_rs19_makes_text_of_the_folder_names(tmp_path: Path) -> None:
    for name in ("railwayStation/railwayStation_02.jpg", "Airport/airport_01.jpg", "Airport/Thumbs.db"):
        put(tmp_path / name, "")
    rows = convert(tmp_path, "whu-rs19")
    assert [row["image"] for row in rows] == ["Airport/airport_01.jpg", "railwayStation/railwayStation_02.jpg"]
    assert turns(rows[1])[1] == SCENE_TEXT.format(name="railway station")


def write_rsvqa(root: Path, prefix: str, split: str, rows: list[tuple], texts: bool = True) -> None:
    """Published lists: index == id, inactive stubs in the places of other splits. Answers stand in reverse order."""
    n = len(rows)
    questions = [{"id": i, "img_id": 7, "type": kind, "question": question, "answers_ids": [n + 1 - i], "active": True}
                 for i, (kind, question, _) in enumerate(rows, start=1)]
    answers = [{"id": i, "question_id": n + 1 - i, "answer": answer, "active": True}
               for i, (_, _, answer) in enumerate(reversed(rows), start=1)]
    for kind, content in (("questions", questions), ("answers", answers)):
        content.insert(0, {"id": 0, "active": False})
        flags = [{"id": row["id"], "active": row["active"]} for row in content]
        put(root / f"{prefix}_split_{split}_{kind}.json", {kind: content if texts else flags})
        if not texts:
            put(root / f"all_{kind}.json", {kind: content})


LR = [("rural_urban", "Is it a rural or an urban area", "rural"), ("count", "How many roads are there?", "37"),
      ("comp", "Are there more roads than farms?", "no")]


@pytest.mark.parametrize("texts", [True, False], ids=["split files whole", "split files with flags only"])
def test_rsvqa_lr(tmp_path: Path, texts: bool) -> None:
    write_rsvqa(tmp_path, "LR", "val", LR, texts)
    rows = convert(tmp_path, "rsvqa-lr", "--split", "val")
    assert [(row["type"], *turns(row)) for row in rows] == [
        ("rural_urban", f"<image>\nIs it a rural or an urban area{SUFFIX}", "rural"),
        ("count", f"<image>\nHow many roads are there?{SUFFIX}", "between 10 and 100"),
        ("comp", f"<image>\nAre there more roads than farms?{SUFFIX}", "no")]
    assert {row["image"] for row in rows} == {"Images_LR/7.tif"}
    raw = convert(tmp_path, "rsvqa-lr", "--split", "val", "--raw-answers")
    assert [turns(row)[1] for row in raw] == ["rural", "37", "no"]


def test_rsvqa_hr_keeps_counts_and_buckets_areas(tmp_path: Path) -> None:
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
def test_bucket_edges(answer: str, counts: str, areas_only: str) -> None:
    assert (bucket(answer, counts=True), bucket(answer, counts=False)) == (counts, areas_only)


LLAVA = [
    {"id": "same", "image": "a/1.png", "conversations": [{"from": "human", "value": "What is it?\n<image>"},
                                                         {"from": "gpt", "value": "A ship."},
                                                         {"from": "human", "value": "Where?", "weight": 1},
                                                         {"from": "gpt", "value": "{<1><2><3><4>|<5>}"}]},
    {"id": "same", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
]


@pytest.mark.parametrize("name", [name for name, corpus in CORPORA.items() if corpus.read.__name__ == "read_llava"])
def test_llava_lists(tmp_path: Path, name: str) -> None:
    put(tmp_path / CORPORA[name].file, LLAVA)
    first, second = convert(tmp_path, name)
    assert turns(first) == ["<image>\nWhat is it?", "A ship.", "Where?", "{<1><2><3><4>|<5>}"]
    assert first["image"] == ("imgv2_split_512_100_vaild/a/1.png" if name.startswith("fit-rs") else "a/1.png")
    assert "image" not in second and turns(second) == ["Hello", "Hi"]


def test_another_file_name(tmp_path: Path) -> None:
    put(tmp_path / "parts" / "mine.json", LLAVA)
    assert len(convert(tmp_path, "llava", "--file", "parts/mine.json")) == 2


def test_fit_rsfg_benchmarks(tmp_path: Path) -> None:
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


def test_wordings_vary_and_do_not_change_from_run_to_run(tmp_path: Path) -> None:
    put(tmp_path / "dataset.json", karpathy(*[(f"{i}.tif", "train", ["a"] * 5) for i in range(40)]))
    used = {turns(row)[0].removeprefix("<image>\n") for row in convert(tmp_path, "ucm")}
    assert used == set(PROMPTS["caption"])
    first = (tmp_path / "out.jsonl").read_bytes()
    command = [sys.executable, str(ROOT / "corpora.py"), "ucm", "--root", tmp_path, "--out", tmp_path / "out.jsonl"]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "3"}, capture_output=True)
    assert (tmp_path / "out.jsonl").read_bytes() == first


def fails(tmp_path: Path, capsys, *arguments: str) -> str:
    """The one line on stderr; exit code 2, and nothing new in the folder."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(tmp_path / "never.jsonl")])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    return line


@pytest.mark.parametrize("name, flags, message", [
    ("nope", [], "unknown corpus 'nope'; known: rsicd, "),
    ("rsitmd", ["--split", "val"], "rsitmd has no split 'val'; it has: train, test"),
    ("rsicd", [], "dataset_rsicd.json: not found"),
    ("rsvqa-lr", [], "LR_split_train_questions.json: not found"),
    ("rsvqa-hr", ["--file", "x.json"], "--file x.json: rsvqa-hr is read from several files"),
    ("llava", ["--file", "mine.json"], "mine.json: not found"),
    ("whu-rs19", [], "whu-rs19 train: no record of this split"),
])
def test_wrong_names(tmp_path: Path, capsys, name: str, flags: list[str], message: str) -> None:
    assert message in fails(tmp_path, capsys, name, "--root", str(tmp_path), *flags)


def test_missing_root(tmp_path: Path, capsys) -> None:
    assert f"--root {tmp_path}/no: no such folder" in fails(tmp_path, capsys, "rsicd", "--root", f"{tmp_path}/no")


WHOLE = json.dumps(karpathy(("1.jpg", "train", ["a"])), indent=1)


@pytest.mark.parametrize("text, message", [
    (WHOLE[:60], "not whole JSON: .* at line 6 column .* \\(character 60\\); is the download cut off"),
    ("[]", "dataset_rsicd.json: 'images' should be list, found nothing"),
    ('{"images": [3]}', "image 0: 'split' should be str, found nothing; this is not the published layout"),
    ('{"images": [{"split": "train"}]}', "image 0: 'filename' should be str, found nothing"),
    (json.dumps(karpathy(("1.jpg", "train", [5]))), "image 0: 'raw' should be str, found int; this is not"),
    (json.dumps(karpathy(("1.jpg", "test", ["a"]))), "rsicd train: no record of this split"),
    (json.dumps(karpathy(*[("1.jpg", "train", ["a"])] * 2)), "record rsicd-1.jpg-0 comes twice"),
])
def test_wrong_annotation_files(tmp_path: Path, capsys, text: str, message: str) -> None:
    put(tmp_path / "dataset_rsicd.json", text)
    line = fails(tmp_path, capsys, "rsicd", "--root", str(tmp_path))
    assert re.search(message, line), line


def test_bytes_that_are_no_text(tmp_path: Path, capsys) -> None:
    (tmp_path / "dataset_rsicd.json").write_bytes(b'{"images": "\xff"}')
    assert "not UTF-8 text at byte 12" in fails(tmp_path, capsys, "rsicd", "--root", str(tmp_path))


def test_a_bad_line_of_a_benchmark(tmp_path: Path, capsys) -> None:
    put(tmp_path / "b.jsonl", '{"image": "t.png", "text": "a", "ground_truth": "b", "category": "c"}\n{"image":\n')
    arguments = ["fit-rsfg-vqa", "--split", "val", "--root", str(tmp_path), "--file", "b.jsonl"]
    assert "b.jsonl: line 2 is not whole JSON" in fails(tmp_path, capsys, *arguments)


def test_answers_of_another_copy(tmp_path: Path, capsys) -> None:
    write_rsvqa(tmp_path, "LR", "train", LR)
    put(tmp_path / "LR_split_train_answers.json", {"answers": [{"id": 1, "answer": "no", "active": True}]})
    assert "no active row with id 3; do the files belong together?" in fails(
        tmp_path, capsys, "rsvqa-lr", "--root", str(tmp_path))


def test_a_failed_run_leaves_the_old_file(tmp_path: Path, capsys) -> None:
    put(tmp_path / "dataset.json", karpathy(("1.tif", "train", ["a"])))
    convert(tmp_path, "ucm")
    old = (tmp_path / "out.jsonl").read_bytes()
    put(tmp_path / "dataset.json", karpathy(("1.tif", "train", ["a"]), ("2.tif", "train", [None])))
    with pytest.raises(SystemExit):
        convert(tmp_path, "ucm")
    assert (tmp_path / "out.jsonl").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset.json", "out.jsonl"]


def test_out_must_be_a_file_in_a_folder(tmp_path: Path, capsys) -> None:
    put(tmp_path / "dataset.json", karpathy(("1.tif", "train", ["a"])))
    for out in (tmp_path, tmp_path / "no" / "out.jsonl"):
        with pytest.raises(SystemExit) as stop:
            main(["ucm", "--root", str(tmp_path), "--out", str(out)])
        assert stop.value.code == 2 and f"--out {out}: expected a file name" in capsys.readouterr().err


def test_help_lists_every_corpus_with_its_file(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text and corpus.file in text for name, corpus in CORPORA.items())


def test_records_can_be_read_without_a_file(tmp_path: Path) -> None:
    put(tmp_path / "dataset_rsicd.json", WHOLE)
    row, = records("rsicd", tmp_path)
    assert row["image"] == "RSICD_images/1.jpg"
