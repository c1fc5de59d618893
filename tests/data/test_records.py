"""
Proves that prompts and labels are what the chat formats say, written out by hand, and that every mistake in a record is
found and said in one line. More: test_fuzz.py.

    pytest tests/data/test_records.py
"""
import contextlib
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, ByteTokenizer
from PIL import Image

from commands import records
from data import RecordFile, Records, check_form, collate, encode_record, encode_turns
from pictures import image_files
from tokenizer import IGNORE, IMAGE_SLOT, load_tokenizer
from toy import scenes

TOKENIZER = ByteTokenizer()
BEGIN, END, START, STOP, EOT = 256, 257, 258, 259, 260
CONFIG = SimpleNamespace(image_size=64, fit="resize", chat="llama-3", tokens_per_image=4, max_len=200)


def record(*turns, **more):
    roles = ["human", "gpt"] * len(turns)
    return {"id": "r", "conversations": [{"from": r, "value": t} for r, t in zip(roles, turns)], **more}


def read_records(path):
    return list(RecordFile(path))


def text_of(tokens):
    names = {i: name for name, i in TOKENIZER.special.items()} | {IMAGE_SLOT: "#"}
    return "".join(names.get(t) or chr(t) for t in tokens)


def learned(row):
    return text_of([t for t in row["labels"] if t != IGNORE])


def test_golden_llama3_two_turns_with_an_image():
    """Written out id by id: what is masked, and what is learned with its end token."""
    row = encode_record(record("<image>\nHi?", "ok", "And?", "no", image="x.png"), TOKENIZER, "llama-3", 3)
    head = lambda role: [START, *role.encode(), STOP, 10, 10]
    prompt1 = [BEGIN, *head("user"), IMAGE_SLOT, IMAGE_SLOT, IMAGE_SLOT, *b"\nHi?", EOT, *head("assistant")]
    answer1, prompt2, answer2 = [*b"ok", EOT], [*head("user"), *b"And?", EOT, *head("assistant")], [*b"no", EOT]
    assert row["ids"] == prompt1 + answer1 + prompt2 + answer2
    assert row["labels"] == [IGNORE] * len(prompt1) + answer1 + [IGNORE] * len(prompt2) + answer2


def test_golden_vicuna():
    row = encode_record(record("<image>\nHi?", "ok", "And?", "no", image="x.png"), TOKENIZER, "vicuna", 2)
    assert text_of(row["ids"]) == ("<s> A chat between a curious user and an artificial intelligence assistant. "
                                   "The assistant gives helpful, detailed, and polite answers to the user's "
                                   "questions. USER:##\nHi? ASSISTANT: ok</s> USER: And? ASSISTANT: no</s>")
    assert learned(row) == " ok</s> no</s>"


def test_golden_chatml():
    tokenizer = SimpleNamespace(special={"<|im_start|>": 300, "<|im_end|>": 301}, encode=TOKENIZER.encode,
                                adds_space=False)
    ids, labels = encode_turns([("system", "Be brief."), ("user", "Hi?"), ("assistant", "ok")], tokenizer, "chatml")
    assert ids == [300, *b"system\nBe brief.", 301, 10, 300, *b"user\nHi?", 301, 10,
                   300, *b"assistant\n", *b"ok", 301, 10]
    assert [t for t in labels if t != IGNORE] == [*b"ok", 301]


@pytest.mark.parametrize("chat", ["llama-3", "vicuna"])
def test_a_prompt_is_a_prefix_of_its_training_ids(chat):
    r = record("<image>\nHow many?", "two", "Sure?", "yes", image="x.png")
    whole, prompt = encode_record(r, TOKENIZER, chat, 4), encode_record(r, TOKENIZER, chat, 4, answer=False)
    assert whole["ids"][:len(prompt["ids"])] == prompt["ids"]
    assert whole["labels"][len(prompt["ids"])] != IGNORE and set(prompt["labels"][-8:]) == {IGNORE}


def test_slots_only_where_images_are():
    """Without an image, in answers and in system text `<image>` is text; two images take two slots in order."""
    plain = encode_record(record("what is <image>?", "an <image> tag"), TOKENIZER, "llama-3", 4)
    assert IMAGE_SLOT not in plain["ids"] and "an <image> tag" in learned(plain)
    r = record("<image><image>\nsame?", "the <image> differ", image=["a", "b"])
    r["conversations"].insert(0, {"from": "system", "value": "An <image> is a slot."})
    row = encode_record(r, TOKENIZER, "llama-3", 4)
    assert row["ids"].count(IMAGE_SLOT) == 8
    assert "<image> is a slot" in text_of(row["ids"]) and "the <image>" in learned(row)


@pytest.mark.parametrize("names, text", [(["a"], "none here"), (["a"], "<image> and <image>"), (["a", "b"], "<image>")])
def test_numbers_of_images_and_slots_must_agree(names, text):
    with pytest.raises(ValueError, match=r"record r: \d image\(s\) but \d <image>"):
        encode_record(record(text, "x", image=names), TOKENIZER, "llama-3", 4)


@pytest.mark.parametrize("chat", ["llama-3", "vicuna"])
def test_typed_specials_stay_text(chat):
    r = record("<|eot_id|></s><|start_header_id|>", "<|end_of_text|> </s>")
    row = encode_record(r, TOKENIZER, chat)
    clean = encode_record(record("a", "b"), TOKENIZER, chat)
    assert [t for t in row["ids"] if t > 255] == [t for t in clean["ids"] if t > 255]


@pytest.mark.parametrize("chat", ["llama-3", "vicuna"])
def test_what_ends_an_answer_stops_the_tiny_lm(chat):
    """Else an answer would run on: both chat formats of the tiny presets, with the tokenizer that is shipped."""
    tokenizer = load_tokenizer(ROOT / "weights/tiny-llm")
    row = encode_record(record("a", "b"), tokenizer, chat)
    assert [label for label in row["labels"] if label != IGNORE][-1] in tokenizer.stop_ids


def test_too_long_is_an_error_and_never_cut():
    with pytest.raises(ValueError, match=r"record r: \d+ tokens, at most 50 fit"):
        encode_record(record("x" * 60, "y"), TOKENIZER, "llama-3", max_len=50)


def test_collate_pads_on_the_right():
    rows = [encode_record(record("a", "b"), TOKENIZER, "llama-3"),
            encode_record(record("abc", "def"), TOKENIZER, "llama-3")]
    batch = collate([{**row, "images": torch.zeros(0, 3, 64, 64)} for row in rows])
    n = len(rows[0]["ids"])
    assert batch["lengths"].tolist() == [n, n + 4] and batch["images"] is None
    assert batch["ids"][0, :n].tolist() == rows[0]["ids"] and (batch["labels"][0, n:] == IGNORE).all()


# ---- samples

def broken_images(folder):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:3000])
    (folder / "text.png").write_text("<html>not found</html>")


def test_a_bad_sample_comes_out_of_a_worker_as_its_line(tmp_path):
    broken_images(tmp_path)
    data = Records([record("<image>\na", "b", image="cut.png")], tmp_path, TOKENIZER, CONFIG)
    out = collate([data[0]])
    assert isinstance(out, ValueError) and str(out).startswith("record r: image")


def test_built_in_scenes_are_images_by_name():
    rows = scenes.make_records("val", 2, "caption", size=64)
    batch = collate([Records(rows, ".", TOKENIZER, CONFIG)[i] for i in range(2)])
    assert batch["images"].shape == (2, 3, 64, 64) and (batch["ids"] == IMAGE_SLOT).sum() == 8
    gray = collate([Records(rows, ".", TOKENIZER, CONFIG, blind=True)[0]])["images"]
    assert gray.amax((2, 3)).equal(gray.amin((2, 3)))


# ---- files

def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_json_list_and_jsonl_read_alike(tmp_path):
    rows = [record("a", "b"), record("c", "d")]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    assert list(read_records(write(tmp_path / "lines.jsonl", *rows))) == list(read_records(tmp_path / "list.json"))
    for name, where in (("list.json", "record 2"), ("lines.jsonl", "line 2")):     # a list has no line a record
        write(tmp_path / "lines.jsonl", rows[0], record("a", ""))
        (tmp_path / "list.json").write_text(json.dumps([rows[0], record("a", "")], indent=1))
        with pytest.raises(ValueError, match=f"{name}, {where}: turn 1 is an empty answer"):
            read_records(tmp_path / name)


BAD = [
    ({}, "no 'conversations'"), ({"conversations": []}, "no 'conversations'"), ([1], "no 'conversations'"),
    ("7", "no 'conversations'"), ("null", "no 'conversations'"), ({"conversations": [1, 2]}, "turn 0 1 has no text"),
    ({"conversations": [{"from": "gpt", "value": "first"}, {"from": "human", "value": "?"}]}, "turns are from"),
    ({"conversations": [{"from": "human", "value": "?"}]}, "turns are from"),
    ({"conversations": {"a": 1}}, "no 'conv"),
    ({"conversations": [{"value": "?"}, {"from": ["gpt"], "value": "?"}]}, "turns are from"),
    ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]}, "has no text"),
    (record("a", " "), "empty answer"), (record("a", "\ud800"), "has no text"),
    *[(record("a", "b", image=odd), "expected a path") for odd in (7, [1], "", {}, 0, [[]], False, "a\udfff.png")],
    *[(record("a", "b", image="a.png", masks=odd), "expected a list of masks") for odd in ("m.png", 7, {}, True, "")],
    (record("a", "b", image=["a", "b"], masks=["m.png"]), "expected a list of masks"),
    (record("a", "b", image="a.png", masks=1.5), "expected a list of masks"),
    (record("a", "b", image="a.png", masks=["m.png"] * 101), "expected a list of masks, of its one image, 100 at most"),
    (record("a", "b", image=["a.png"] * 10 ** 5), "a list of paths, 32 at most"),
    *[(record("a", "b", **{key: "x.png"}), f"unknown key '{key}', near 'image'")
      for key in ("images", "Image", "img", "imgs", "ixage", "mage", "IMAGE ", "image_path", "image_id")],
    *[(record("a", "b", image="x.png", **{key: []}), f"unknown key '{key}', near 'masks'")
      for key in ("mask", "maskss", "asks")],
    (record("a", "b", image="x.png", mask=[], masks=None), "unknown key 'mask', near 'masks'"),
    (record("a", "b", reference=["b"]), "near 'references'"), (record("a", "b", Type="x"), "near 'type'"),
    *[({**record("a", "b"), "id": odd}, "expected text or a whole number")
      for odd in ([1], {}, None, True, 0.5, "\ud800")],
    *[(record("a", "b", references=odd), "expected a list of texts") for odd in ("a", [1], {"a": 1}, 7, ["\ud800"])],
    *[(record("a", "b", type=odd), "expected text") for odd in (7, ["a"], {})],
    ('{"conversations": [{"from": "hu', "cut off"), ("[" * 100000, "deeply"),
    ('{"a":' * 200 + "1" + "}" * 200, "deeply"),
]


@pytest.mark.parametrize("bad, message", BAD)
def test_a_bad_record_is_named_with_its_line(tmp_path, bad, message):
    with pytest.raises(ValueError, match=f"line 2: .*{message}") as e:
        read_records(write(tmp_path / "f.jsonl", record("a", "b"), bad))
    assert str(e.value).isprintable() and len(str(e.value)) < 900


def test_what_a_record_may_also_be(tmp_path):
    """Null for nothing, whole numbers as ids, any odd character that is whole; U+2028 is no end of a line."""
    rows = [{**record("\u2028\0\U0001f4a5", "a\u2028b", image=None, masks=None, type=None), "id": 10 ** 30},
            record("a", "b", image=[], masks=[], references=[], extra=[float("nan")])]
    path = tmp_path / "f.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\ufeff" + "\r\n".join(lines) + "\n\n", encoding="utf-8")
    assert [row["id"] for row in read_records(path)] == [str(10 ** 30), "r"]
    path.write_bytes(path.read_bytes() + b'{"conversations": "\xff"}')
    with pytest.raises(ValueError, match="line 4: not UTF-8 text at byte 19"):
        read_records(path)


def test_files_that_are_not_there_cut_or_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="not there"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "cut.json").write_text('[{"conversations": [')
    with pytest.raises(ValueError, match="cut off"):
        read_records(tmp_path / "cut.json")
    with pytest.raises(ValueError, match="no records"):
        read_records(write(tmp_path / "empty.jsonl"))


def test_check_form_accepts_a_system_turn():
    r = record("a", "b")
    r["conversations"].insert(0, {"from": "system", "value": "s"})
    assert check_form(r) is None


def run(*args):
    """A command line, in this process: starting one takes seconds."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["data.py", *map(str, args)])
        try:
            records.main()
            code = 0
        except SystemExit as e:
            code = e.code
    out.flush()
    return SimpleNamespace(returncode=code, stdout=out.buffer.getvalue().decode(), stderr=err.getvalue())


def test_check_lists_every_problem_in_one_pass(tmp_path):
    """Two workers; a record with four problems has four lines, a record without one has none."""
    broken_images(tmp_path)
    rows = [record("<image>\na", "b", image=name)
            for name in ("good.png", "none.png", "cut.png", "text.png", "../up.png")]
    rows += [record("no slot", "b", image="good.png"), {}, record("a", "b"), record("a", "b"),
             {"conversations": [{"from": "gpt", "value": ""}], "image": 7}, record("x" * 1100, "b"),
             record("<image>\na", " ", image="good.png", masks=["none.png", {"bbox": [99, 99, 1, 1]}])]
    rows = [{**row, "id": i} for i, row in enumerate(rows, 1)]
    rows[6], rows[8]["id"] = "{", "8"
    out = run("check", write(tmp_path / "f.jsonl", *rows), "--images", tmp_path, "--workers", 2)
    lines = out.stdout.splitlines()
    reports = [line for line in lines if line.startswith("line")]
    expected = [(2, "no such file"), (3, "cannot be read"), (4, "not an image"), (5, "leaves the image folder"),
                (6, "0 <image>"), (7, "not valid JSON"), (9, "id '8' is that of line 8"), (10, "turns are from"),
                (10, "empty answer"), (10, "expected a path"), (11, "tokens, at most"), (12, "empty answer"),
                (12, "name []"), (12, "no such file"), (12, "is empty")]
    assert len(reports) == len(expected), out.stdout
    for report, (number, words) in zip(reports, expected):
        assert report.startswith(f"line {number} (") and words in report
    assert out.returncode == 1 and lines[-1].endswith("12 records, 10 with a problem") and not out.stderr
    kinds = dict(reversed(line.split(maxsplit=1)) for line in lines[len(reports):-1])
    assert kinds == {"missing file": "2", "image": "3", "slots": "2", "not JSON": "1", "same id": "1", "roles": "1",
                     "empty answer": "2", "form": "1", "no room": "1", "mask": "1",
                     "tolerated: no image, among records with images": "3"}
    good = run("check", write(tmp_path / "g.jsonl", rows[0]), "--images", tmp_path, "--workers", 1)
    assert good.returncode == 0 and good.stdout.count("\n") == 1


def test_what_check_tolerates_is_counted(tmp_path):
    """A flat polygon list is one polygon, one that leaves the image is clipped; both are told, neither is a problem."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    masks = [[2, 2, 20, 2, 20, 20], [[2, 2, 60, 2, 60, 20]], {"segmentation": [-5, 2, 20, 2, 20, 20]},
             {"bbox": [1, 1, 9, 9]}]
    rows = [{**record("<image>\n<region>", "b", image="a.png", masks=[mask]), "id": i} for i, mask in enumerate(masks)]
    out = run("check", write(tmp_path / "f.jsonl", *rows), "--images", tmp_path, "--workers", 1)
    assert out.returncode == 0 and out.stdout.splitlines()[:-1] == [
        "      2  tolerated: a flat list, read as one polygon",
        "      2  tolerated: a polygon partly outside its image, clipped"]


def test_unknown_keys_are_said(tmp_path):
    """A slip is a problem; a key of its own meaning, or beside the one that it is near to, is counted."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    picture = {**record("<image>\na", "b", image="a.png"), "source": "web", "image_id": 7, "task": "vqa"}
    rows = [picture, {**picture, "id": 2}, {**record("a", "b", images=["a.png"], uid=3), "id": 3}]
    out = run("check", write(tmp_path / "f.jsonl", *rows), "--images", tmp_path, "--workers", 1)
    first, *kinds, _ = out.stdout.splitlines()
    assert out.returncode == 1 and first == "line 3 (3): unknown key 'images', near 'image': rename it or take it out"
    assert kinds == ["      1  tolerated: no image, among records with images",
                     "      2  tolerated: unknown key 'image_id'", "      2  tolerated: unknown key 'source'",
                     "      1  tolerated: unknown key 'uid'", "      1  unknown key"]


def test_many_masks_and_images_are_not_opened(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    opened, real = [], records.decode_mask
    monkeypatch.setattr(records, "decode_mask", lambda *args: opened.append(args) or real(*args))
    row = record("<image>\n<region1>", "b", image="a.png", masks=[{"bbox": [1, 1, 5, 5]}] * 5000)
    out = run("check", write(tmp_path / "f.jsonl", row), "--images", tmp_path, "--workers", 1)
    assert out.returncode == 1 and "100 at most" in out.stdout and len(opened) <= 100


def test_a_printed_problem_is_bounded(tmp_path):
    out = run("check", write(tmp_path / "f.jsonl", record("<image>a", "b", image="x" * 3000)), "--workers", 1)
    assert max(map(len, out.stdout.splitlines())) <= 600


def test_the_command_line_itself(tmp_path):
    out = subprocess.run([sys.executable, ROOT / "data.py", "check", write(tmp_path / "f.jsonl", record("a", ""))],
                         capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 1 and "empty answer" in out.stdout and not out.stderr


def test_fix_writes_the_clean_part_and_nothing_else(tmp_path, monkeypatch):
    path, out = tmp_path / "f.jsonl", tmp_path / "clean.jsonl"
    rows = [{**record("a\u2028", "b"), "id": 3}, "{", record("a", ""), record("c", "d", extra={"kept": [1]})]
    del rows[-1]["id"]
    before = write(path, *rows).read_bytes()
    done = run("check", path, "--workers", 1, "--fix", out)
    assert done.returncode == 1 and done.stdout.endswith("2 records written\n")
    assert [json.loads(line) for line in out.read_text().splitlines()] == [rows[0], {"id": "4", **rows[3]}]
    assert run("check", out, "--workers", 1).returncode == 0

    (tmp_path / "link.jsonl").symlink_to(path)
    for name in (path, tmp_path / "link.jsonl", tmp_path / "none" / "x.jsonl"):
        refused = run("check", path, "--workers", 1, "--fix", name)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and name.name in refused.stderr
    assert path.read_bytes() == before

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("check", path, "--workers", 1, "--fix", tmp_path / "half.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean.jsonl", "f.jsonl", "link.jsonl"]


def test_check_opens_an_image_once(tmp_path, monkeypatch):
    opened, real = [], image_files.open_image
    broken_images(tmp_path)
    monkeypatch.setattr(image_files, "open_image", lambda path: opened.append(path.name) or real(path))
    rows = [{**record("<image>\na", "b", image=name), "id": i} for i, name in enumerate(["good.png", "cut.png"] * 5)]
    config = SimpleNamespace(**vars(CONFIG), llm_dir=ROOT / "weights/tiny-llm")
    assert records.check(write(tmp_path / "f.jsonl", *rows), tmp_path, 1, config) == 5
    assert opened == ["good.png", "cut.png"]


@pytest.mark.parametrize("args", [["none.jsonl"], ["f.jsonl", "--tokenizer", "none"], ["f.jsonl", "--workers", "0"],
                                  ["f.jsonl", "--chat", "chatml"], ["empty.jsonl"], ["cut.json"],
                                  ["f.jsonl", "--what"], ["f.jsonl", "-n", "0"], ["f.jsonl", "--max-len", "-1"],
                                  ["f.jsonl", "--image-size", "5"], ["f.jsonl", "--image-size", "100"],
                                  ["f.jsonl", "--workers", "-8"]])
def test_wrong_usage_is_exit_code_2(tmp_path, args):
    """A wrong chat format for the tokenizer, too: the tiny one does not know <|im_start|>."""
    write(tmp_path / "f.jsonl", record("a", "b"))
    write(tmp_path / "empty.jsonl")
    (tmp_path / "cut.json").write_text("[{")
    out = run("check", tmp_path / args[0], "--workers", 1, *args[1:])
    assert out.returncode == 2 and "Traceback" not in out.stderr and not out.stdout
    assert out.stderr.splitlines()[-1].startswith("data.py: ")


def test_show_prints_region_slots(tmp_path):
    row = scenes.make_records("train", 1, "region chat", size=128)[0]
    out = run("show", write(tmp_path / "f.jsonl", row))
    slots = [line.split()[-1] for line in out.stdout.splitlines() if line.endswith(("<mask>", "<position>"))]
    asked = sum(turn["value"].count("<region") for turn in row["conversations"] if turn["from"] == "human")
    assert out.returncode == 0 and slots == ["<mask>", "<position>"] * asked
    assert f"{len(row['masks'])} masks" in out.stdout


def test_show_marks_what_is_learned(tmp_path):
    row = scenes.make_records("val", 1, "caption", size=128)[0]
    out = run("show", write(tmp_path / "f.jsonl", row))
    plus = [line for line in out.stdout.splitlines() if line.startswith("  +")]
    assert out.returncode == 0 and len(plus) == 2
    assert row["conversations"][1]["value"] in plus[0] and "<|eot_id|>" in plus[1]
    assert any("16  <image>" in line for line in out.stdout.splitlines())
    missing = run("show", tmp_path / "none.jsonl")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
