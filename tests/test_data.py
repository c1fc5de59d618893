"""
Proves that prompts and labels are what the chat formats say, written out by hand; that images go through one door; and
that every mistake in a record is found and said in one line.

    pytest tests/test_data.py
"""
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import scenes
from data import (CLIP_MEAN, CLIP_STD, IGNORE, IMAGE_SLOT, Records, check_form, collate, encode_record, encode_turns,
                  fit_image, load_image, read_records, to_tensor)
from llama import ByteTokenizer

TOKENIZER = ByteTokenizer()
BEGIN, END, START, STOP, EOT = 256, 257, 258, 259, 260
CONFIG = SimpleNamespace(image_size=64, fit="resize", chat="llama-3", image_tokens=4, max_len=200)


def record(*turns, **more):
    roles = ["human", "gpt"] * len(turns)
    return {"id": "r", "conversations": [{"from": r, "value": t} for r, t in zip(roles, turns)], **more}


def text_of(tokens):
    names = {i: name for name, i in TOKENIZER.special.items()} | {IMAGE_SLOT: "#"}
    return "".join(names.get(t) or chr(t) for t in tokens)


def learned(row):
    return text_of([t for t in row["labels"] if t != IGNORE])


def test_golden_llama3_two_turns_with_an_image():
    """Written out id by id: what is masked, and what is learned with its end token."""
    row = encode_record(record("<image>\nHi?", "ok", "And?", "no", image="x.png"), TOKENIZER, "llama-3", image_tokens=3)
    head = lambda role: [START, *role.encode(), STOP, 10, 10]
    prompt1 = [BEGIN, *head("user"), IMAGE_SLOT, IMAGE_SLOT, IMAGE_SLOT, *b"\nHi?", EOT, *head("assistant")]
    answer1, prompt2, answer2 = [*b"ok", EOT], [*head("user"), *b"And?", EOT, *head("assistant")], [*b"no", EOT]
    assert row["ids"] == prompt1 + answer1 + prompt2 + answer2
    assert row["labels"] == [IGNORE] * len(prompt1) + answer1 + [IGNORE] * len(prompt2) + answer2


def test_golden_vicuna():
    row = encode_record(record("<image>\nHi?", "ok", "And?", "no", image="x.png"), TOKENIZER, "vicuna", image_tokens=2)
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


# ---- images

def test_one_marker_pixel_goes_where_the_geometry_says():
    """Letterbox: a 40x20 image in a 64 frame is scaled by 1.6 and stands 16 rows down; resize stretches it."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[10, 30] = 255
    for fit, (y, x) in (("letterbox", (16 + 10.5 * 1.6, 30.5 * 1.6)), ("resize", (10.5 * 3.2, 30.5 * 1.6))):
        out = np.asarray(fit_image(Image.fromarray(pixels), 64, fit)).astype(float).sum(-1)
        out = out * (out < 700) if fit == "letterbox" else out
        frame = out[16:48] if fit == "letterbox" else out
        row, column = np.unravel_index(frame.argmax(), frame.shape)
        assert abs(row + (16 if fit == "letterbox" else 0) + 0.5 - y) < 2 and abs(column + 0.5 - x) < 1.5


def test_normalisation_is_clips():
    x = to_tensor(Image.new("RGB", (4, 4), (255, 0, 51)))
    expected = [(v - m) / s for v, m, s in zip((1, 0, 0.2), CLIP_MEAN, CLIP_STD)]
    assert torch.allclose(x[:, 0, 0], torch.tensor(expected), atol=1e-6) and x.shape == (3, 4, 4)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_8_bit_mode_becomes_rgb(tmp_path, mode):
    Image.new("RGB", (6, 5), (200, 200, 200)).convert(mode).save(tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}")
    image = load_image(next(tmp_path.iterdir()).name, tmp_path)
    assert image.mode == "RGB" and image.size == (6, 5)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image("a.jpg", tmp_path).size == (4, 8)


def broken_images(folder):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:3000])
    (folder / "text.png").write_text("<html>not found</html>")
    Image.new("I;16", (4, 4)).save(folder / "deep.png")


@pytest.mark.parametrize("name, message", [
    ("none.png", "no such file"), ("cut.png", "cannot be read"), ("text.png", "not an image"),
    ("../x.png", "leaves the image folder"), ("deep.png", "16 or 32 bit")])
def test_a_bad_image_is_one_line(tmp_path, name, message):
    broken_images(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
        load_image(name, tmp_path)
    assert name.removeprefix("../") in str(e.value) and "\n" not in str(e.value)


def test_a_bad_sample_comes_out_of_a_worker_as_its_line(tmp_path):
    broken_images(tmp_path)
    data = Records([record("<image>\na", "b", image="cut.png")], tmp_path, TOKENIZER, CONFIG)
    out = collate([data[0]])
    assert isinstance(out, ValueError) and str(out).startswith("record r: image")


def test_built_in_scenes_are_images_by_name():
    rows = scenes.records("val", 2, "caption", size=64)
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
    assert read_records(write(tmp_path / "lines.jsonl", *rows)) == read_records(tmp_path / "list.json")


BAD = [
    ({}, "no 'conversations'"), ({"conversations": []}, "no 'conversations'"), ([1], "no 'conversations'"),
    ({"conversations": [{"from": "gpt", "value": "first"}, {"from": "human", "value": "?"}]}, "turns are from"),
    ({"conversations": [{"from": "human", "value": "?"}]}, "turns are from"),
    ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]}, "has no text"),
    (record("a", " "), "empty answer"), (record("a", "b", image=7), "expected a path"),
    (record("a", "b", image=[1]), "expected a path"),
    ('{"conversations": [{"from": "hu', "cut off"),
]


@pytest.mark.parametrize("bad, message", BAD)
def test_a_bad_record_is_named_with_its_line(tmp_path, bad, message):
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        read_records(write(tmp_path / "f.jsonl", record("a", "b"), bad))


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
    return subprocess.run([sys.executable, str(ROOT / "data.py"), *map(str, args)],
                          capture_output=True, text=True, cwd=ROOT)


def test_check_lists_every_problem_in_one_pass(tmp_path):
    broken_images(tmp_path)
    images = ["good.png", "none.png", "cut.png", "text.png"]
    rows = [record("<image>\na", "b", image=name) for name in images]
    rows += [record("no slot", "b", image="good.png"), "{", record("a", "b")]
    out = run("check", write(tmp_path / "f.jsonl", *rows), "--images", tmp_path, "--workers", 2)
    lines = out.stdout.splitlines()
    assert out.returncode == 1 and [line.split()[1] for line in lines[:-1]] == ["2", "3", "4", "5", "6"]
    assert lines[-1].endswith("7 records, 5 with a problem") and not out.stderr
    good = run("check", write(tmp_path / "g.jsonl", rows[0], rows[-1]), "--images", tmp_path, "--workers", 1)
    assert good.returncode == 0


def test_show_marks_what_is_learned(tmp_path):
    row = scenes.records("val", 1, "caption", size=128)[0]
    out = run("show", write(tmp_path / "f.jsonl", row))
    plus = [line for line in out.stdout.splitlines() if line.startswith("  +")]
    assert out.returncode == 0 and len(plus) == 2
    assert row["conversations"][1]["value"] in plus[0] and "<|eot_id|>" in plus[1]
    assert any("16  <image>" in line for line in out.stdout.splitlines())
    missing = run("show", tmp_path / "none.jsonl")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
