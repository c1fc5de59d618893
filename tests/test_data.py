"""
Proves that prompts and labels are what the chat formats say, written out by hand; that images of every kind go through
one door, rightly or not at all; and that every mistake in a record is found and said in one line. More: test_fuzz.py.

    pytest tests/test_data.py
"""
import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import scenes
from data import (CLIP_MEAN, CLIP_STD, IGNORE, IMAGE_SLOT, Records, check_form, collate, encode_record, encode_turns,
                  fit_image, load_image, open_image, read_records, to_tensor)
from llama import ByteTokenizer, load_tokenizer

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


@pytest.mark.parametrize("mode, kind, color", [
    ("L", "png", (90, 90, 90)), ("RGBA", "png", (200, 90, 10)), ("P", "gif", (204, 102, 0)),
    ("CMYK", "jpg", (200, 90, 10)), ("1", "png", (255, 255, 255)), ("LA", "png", (90, 90, 90)),
    ("RGB", "tif", (200, 90, 10)), ("RGB", "jp2", (200, 90, 10)), ("RGB", "webp", (200, 90, 10)),
    ("RGB", "bmp", (200, 90, 10)), ("CMYK", "tif", (200, 90, 10))])
def test_every_8_bit_kind_becomes_rgb(tmp_path, mode, kind, color):
    """Alpha is dropped: a pixel that is fully transparent keeps its color."""
    image = Image.new("RGB", (6, 5), color)                                       # of the palette's own colors for P
    image = image.convert(mode, dither=Image.Dither.NONE)
    if mode in ("RGBA", "LA"):
        image.putalpha(0)
    image.save(tmp_path / f"a.{kind}")
    image = load_image(f"a.{kind}", tmp_path)
    assert image.mode == "RGB" and image.size == (6, 5)
    assert np.abs(np.asarray(image).astype(int) - color).max() <= 6


def tiff(path, bands, bits, colors=1, kind=1, order="<", pixels=None, side=4):
    """A TIFF file by hand: one strip behind the tags; colors is PhotometricInterpretation, kind SampleFormat."""
    if pixels is None:
        pixels = bytes(side * side * bands * bits // 8)
    lists, at = {258: [bits] * bands, 339: [kind] * bands}, 8 + 2 + 11 * 12 + 4
    tags = {256: side, 257: side, 258: None, 259: 1, 262: colors, 273: at + 4 * bands, 277: bands, 278: side,
            279: len(pixels), 284: 1, 339: None}
    out, behind = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags)), b""
    for tag, value in tags.items():
        if value is not None:
            out += struct.pack(order + "HHII", tag, 4, 1, value)
        elif bands < 3:
            out += struct.pack(order + "HHI2H", tag, 3, bands, *(lists[tag] * 2)[:2])
        else:
            out += struct.pack(order + "HHII", tag, 3, bands, at + len(behind))
        if value is None:
            behind += struct.pack(f"{order}{bands}H", *lists[tag])
    path.write_bytes(out + bytes(4) + behind + pixels)


def png(path, color_type, bits, side=4):
    """A PNG file by hand: its header and gray or black rows."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    rows = bytes(side * (1 + side * {0: 1, 2: 3, 4: 2, 6: 4}[color_type] * bits // 8)) if side < 100 else b""
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", side, side, bits, color_type, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits, kind, order", [(16, 1, "<"), (16, 1, ">"), (16, 2, "<"), (32, 2, "<"), (32, 3, "<"),
                                               (32, 3, ">")])
def test_one_deep_band_is_stretched(tmp_path, bits, kind, order):
    """A ramp with two outliers: percentile 2 is black, 98 white; bits and byte order are read right."""
    ramp = np.arange(10000) / 2 + 300
    ramp[:2] = -30000 if kind > 1 else 0, 32000
    form = order + {(16, 1): "u2", (16, 2): "i2", (32, 2): "i4", (32, 3): "f4"}[bits, kind]
    tiff(tmp_path / "a.tif", 1, bits, kind=kind, order=order, pixels=ramp.astype(form).tobytes(), side=100)
    image = np.asarray(open_image(tmp_path / "a.tif")).astype(int)
    assert image.shape == (100, 100, 3) and (image[..., 0] == image[..., 2]).all()
    low, high = np.percentile(ramp, (2, 98))
    assert np.abs(image[..., 0] - 255 * np.clip((ramp.reshape(100, 100) - low) / (high - low), 0, 1)).max() <= 1


def test_a_16_bit_png_is_stretched_too(tmp_path):
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "a.png")
    image = np.asarray(open_image(tmp_path / "a.png"))
    assert image.min() == 0 and image.max() == 255 and 120 < image.mean() < 135


@pytest.mark.parametrize("pixels, dark, bright", [
    (np.full((4, 4), 7.5), 0, 0), (np.full((4, 4), np.nan), 0, 0), (np.full((4, 4), 1e-45), 0, 0),
    (np.float32([[np.nan, np.inf], [1, 2]]), 0, 255), (np.float32([[-3e38, 3e38], [0, 0]]), 0, 0),
    (np.pad(np.ones((1, 1)), (0, 99)), 0, 255)])
def test_stretching_odd_pixels(tmp_path, pixels, dark, bright):
    """Constant, without a number, beyond float32's range, and almost constant: one pixel differs and must be seen."""
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "a.tif")
    image = np.asarray(open_image(tmp_path / "a.tif"))
    assert (image.min(), image.max()) == (dark, bright)


def test_pixels_without_data_do_not_stretch(tmp_path):
    pixels = np.full((20, 20), -9999, np.float32)
    pixels[:, 10:] = np.linspace(0, 1, 200).reshape(20, 10)
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo={42113: "-9999"})
    image = np.asarray(open_image(tmp_path / "a.tif")).astype(int)[..., 0]
    assert (image[:, :10] == 0).all() and 110 < image[:, 10:].mean() < 145


REFUSED = {
    "RGB of 16 bits": (lambda p: tiff(p, 3, 16, 2), "3 bands of 16 bits"),
    "the same, big endian": (lambda p: tiff(p, 3, 16, 2, order=">"), "3 bands of 16 bits"),
    "RGBA of 16 bits": (lambda p: tiff(p, 4, 16, 2), "4 bands of 16 bits"),
    "gray and alpha": (lambda p: tiff(p, 2, 16), "2 bands of 16 bits"),
    "five bands": (lambda p: tiff(p, 5, 8, 2), "5 bands;"), "thirteen": (lambda p: tiff(p, 13, 16), "13 bands;"),
    "floats": (lambda p: tiff(p, 3, 32, 2, kind=3), "3 bands of 32 bits"),
    "gray in three": (lambda p: tiff(p, 3, 8, 1), "3 bands that are marked as gray"),
    "signed": (lambda p: tiff(p, 1, 8, kind=2), "signed pixels of 8 bits"),
    "PNG RGB": (lambda p: png(p, 2, 16), "3 bands of 16 bits"),
    "PNG RGBA": (lambda p: png(p, 6, 16), "4 bands of 16 bits"),
    "PNG gray and alpha": (lambda p: png(p, 4, 16), "2 bands of 16 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_pillow_reads_wrongly_is_refused_by_its_tags(tmp_path, case):
    make, words = REFUSED[case]
    make(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=words) as e:
        open_image(tmp_path / "a.bin")
    assert "gdal_translate" in str(e.value) and str(e.value).isprintable()


def test_a_jpeg_2000_of_16_bits_is_refused(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jp2")
    content = (tmp_path / "a.jp2").read_bytes()
    at = content.index(b"ihdr") + 14
    assert content[at] == 7
    (tmp_path / "a.jp2").write_bytes(content[:at] + b"\x0f" + content[at + 1:])
    with pytest.raises(ValueError, match="3 bands of 16 bits"):
        open_image(tmp_path / "a.jp2")


def test_the_tiff_and_png_writers_above_are_right(tmp_path):
    """8-bit files of theirs are read, so that the refusals are not of broken files."""
    tiff(tmp_path / "a.tif", 3, 8, 2, pixels=bytes(range(48)))
    assert (np.asarray(open_image(tmp_path / "a.tif")).ravel() == range(48)).all()
    png(tmp_path / "a.png", 2, 8)
    assert open_image(tmp_path / "a.png").size == (4, 4)


def test_a_huge_image_is_refused_by_its_header(tmp_path, monkeypatch):
    png(tmp_path / "a.png", 2, 8, side=20000)
    with pytest.raises(ValueError, match=r"400000000 pixels\) exceeds limit of 268435456"):
        open_image(tmp_path / "a.png")
    png(tmp_path / "a.png", 2, 8, side=90)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert open_image(tmp_path / "a.png").size == (90, 90)                         # up to twice Pillow's number


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image("a.jpg", tmp_path).size == (4, 8)


def broken_images(folder):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:3000])
    (folder / "text.png").write_text("<html>not found</html>")
    png(folder / "deep.png", 2, 16)


@pytest.mark.parametrize("name, message", [
    ("none.png", "no such file"), ("cut.png", "cannot be read"), ("text.png", "not an image"),
    ("../x.png", "leaves the image folder"), ("/etc/hosts", "leaves the image folder"),
    ("deep.png", "3 bands of 16 bits"),
    ("x" * 5000, "no such file|not a path"), ("a\0.png", "not a path"), (".", "no such file")])
def test_a_bad_image_is_one_line(tmp_path, name, message):
    broken_images(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
        load_image(name, tmp_path)
    assert name.removeprefix("../")[:1] in str(e.value) and str(e.value).isprintable()


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
    with pytest.raises(ValueError, match="line 4: not valid JSON: 'utf-8'"):
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
            data.main()
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
    expected = [
        (2, "no such file"), (3, "cannot be read"), (4, "not an image"), (5, "leaves the image folder"),
        (6, "0 <image>"), (7, "not valid JSON"), (9, "id '8' is that of line 8"), (10, "turns are from"),
        (10, "empty answer"),
        (10, "expected a path"), (11, "no room: 1"), (12, "empty answer"), (12, "name []"), (12, "no such file"),
        (12, "is empty")]
    assert len(reports) == len(expected), out.stdout
    for report, (number, words) in zip(reports, expected):
        assert report.startswith(f"line {number} (") and words in report
    assert out.returncode == 1 and lines[-1].endswith("12 records, 10 with a problem") and not out.stderr
    kinds = dict(reversed(line.split(maxsplit=1)) for line in lines[len(reports):-1])
    assert kinds == {"missing file": "2", "image": "3", "slots": "2", "not JSON": "1", "same id": "1", "roles": "1",
                     "empty answer": "2", "form": "1", "no room": "1", "mask": "1"}
    good = run("check", write(tmp_path / "g.jsonl", rows[0], rows[7]), "--images", tmp_path, "--workers", 1)
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
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--fix" in refused.stderr
    assert path.read_bytes() == before

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.write_records(tmp_path / "half.jsonl", read_records(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean.jsonl", "f.jsonl", "link.jsonl"]


def test_check_opens_an_image_once(tmp_path, monkeypatch):
    opened, real = [], data.open_image
    broken_images(tmp_path)
    monkeypatch.setattr(data, "open_image", lambda path: opened.append(path.name) or real(path))
    rows = [{**record("<image>\na", "b", image=name), "id": i} for i, name in enumerate(["good.png", "cut.png"] * 5)]
    config = SimpleNamespace(**vars(CONFIG), tokenizer=ROOT / "weights/tiny-llm")
    assert data.check(write(tmp_path / "f.jsonl", *rows), tmp_path, 1, config) == 5
    assert opened == ["good.png", "cut.png"]


@pytest.mark.parametrize("args", [["none.jsonl"], ["f.jsonl", "--tokenizer", "none"], ["f.jsonl", "--workers", "0"],
                                  ["f.jsonl", "--chat", "chatml"], ["empty.jsonl"], ["cut.json"],
                                  ["f.jsonl", "--what"]])
def test_wrong_usage_is_exit_code_2(tmp_path, args):
    """A wrong chat format for the tokenizer, too: the tiny one does not know <|im_start|>."""
    write(tmp_path / "f.jsonl", record("a", "b"))
    write(tmp_path / "empty.jsonl")
    (tmp_path / "cut.json").write_text("[{")
    out = run("check", tmp_path / args[0], "--workers", 1, *args[1:])
    assert out.returncode == 2 and "Traceback" not in out.stderr and not out.stdout
    assert out.stderr.splitlines()[-1].startswith("data.py: ")


def test_show_prints_region_slots(tmp_path):
    row = scenes.records("train", 1, "region chat", size=128)[0]
    out = run("show", write(tmp_path / "f.jsonl", row))
    slots = [line.split()[-1] for line in out.stdout.splitlines() if line.endswith(("<mask>", "<position>"))]
    asked = sum(turn["value"].count("<region") for turn in row["conversations"] if turn["from"] == "human")
    assert out.returncode == 0 and slots == ["<mask>", "<position>"] * asked
    assert f"{len(row['masks'])} masks" in out.stdout


def test_show_marks_what_is_learned(tmp_path):
    row = scenes.records("val", 1, "caption", size=128)[0]
    out = run("show", write(tmp_path / "f.jsonl", row))
    plus = [line for line in out.stdout.splitlines() if line.startswith("  +")]
    assert out.returncode == 0 and len(plus) == 2
    assert row["conversations"][1]["value"] in plus[0] and "<|eot_id|>" in plus[1]
    assert any("16  <image>" in line for line in out.stdout.splitlines())
    missing = run("show", tmp_path / "none.jsonl")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
