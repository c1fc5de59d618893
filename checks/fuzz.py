"""
Damaged records against `data.py check`: every one is reported, in one line, or it goes through the training path.
Dropped keys, wrong types, huge numbers, odd unicode, cut and scrambled images and masks, wrong slots, broken JSON.

    python -m checks.fuzz 2000 [SEED]      # tests/data/test_fuzz.py runs a slice of it
"""
import contextlib
import copy
import io
import json
import pathlib
import random
import sys
import tempfile
from argparse import Namespace

import numpy as np
from PIL import Image

from commands.records import check
from data import Records, collate, read_records
from tokenizer import IGNORE, load_tokenizer

WEIGHTS = pathlib.Path(__file__).resolve().parent.parent / "weights/tiny-llm"
SIZE = (48, 40)
BOX = {"bbox": [5, 5, 20, 10]}
MASKS = ["mask.png", [[5, 5, 25, 5, 25, 15]], [5, 5, 25, 5, 25, 15, 5, 15], BOX,
         {"size": [40, 48], "counts": [100, 50, 1770]}, {"size": [40, 48], "counts": "T3b1Zg1"},
         {"segmentation": [[5, 5, 25, 5, 25, 15]], "bbox": [5, 5, 20, 10], "category_id": 1}]
NESTED = json.loads("[" * 30 + "]" * 30)
ODD = [None, True, False, 0, -1, 7, 1e308, float("nan"), float("inf"), -float("inf"), 2 ** 63, 10 ** 40, 0.5, "", " ",
       "\ud800", "a\udfff", "\u2028", "\0", "a\0b.png", "\n", "x" * 3000, "\u202e\u0301", "\U0001f4a5",
       [], {}, [[]], [1], [None], {"a": 1}, ["human"], NESTED, [NESTED] * 3, "human", "gpt", "system", "<|eot_id|></s>",
       "<image>", "<region>", "<region1><region2>", "<region0>", "<region\u0663>", "<region" + "9" * 5000 + ">",
       "../up.png", "/etc/passwd", "/", ".", "mask.png", "none.png", "scene:test/0/3/64", "scene:test/0/3/64#0",
       "scene:test/0/3/64#\u00b2", "scene:train/0/0/99999999", "scene:x", "scene:test/" + "9" * 5000 + "/3/64",
       "scene:test/" + "9" * 40 + "/3/64", {"size": [10 ** 5 - 1] * 2, "counts": [10 ** 10]},
       {"size": [40, 48], "counts": "\ud8000"}, {"segmentation": {"segmentation": {"counts": 3}}}]


def make_images(folder):
    """Files of every kind that the loader takes, and some that it does not -> their names."""
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
    gray16 = Image.fromarray(rng.integers(0, 60000, (SIZE[1], SIZE[0]), dtype=np.uint16))
    float32 = Image.fromarray(rng.normal(size=(SIZE[1], SIZE[0])).astype(np.float32))
    kinds = {"a.png": color, "a.jpg": color, "a.tif": color, "a.bmp": color, "a.gif": color.convert("P"),
             "a.webp": color, "a.jp2": color, "p.png": color.convert("P"), "la.png": color.convert("LA"),
             "one.png": color.convert("1"), "rgba.png": color.convert("RGBA"), "cmyk.jpg": color.convert("CMYK"),
             "deep.png": gray16, "deep.tif": gray16, "float.tif": float32, "gray.jpg": color.convert("L"),
             "dot.png": color.resize((1, 1))}
    for name, image in kinds.items():
        image.save(folder / name)
    color.save(folder / "lzw.tif", compression="tiff_lzw")
    color.resize((700, 1)).save(folder / "thin.png")
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    mask[5:15, 5:25] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return [*kinds, "lzw.tif", "thin.png"]


def good_records(images):
    def turns(*texts):
        return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]

    found = [{"image": name, "conversations": turns("<image>\nWhat is here?", "a port")} for name in images]
    found += [{"image": "a.png", "masks": [mask], "conversations": turns("<image>\nWhat is <region>?", "a ship")}
              for mask in MASKS] * 2
    found += [{"conversations": turns("What is a port?", "ships lie in it", "And?", "cranes")},
              {"conversations": [{"from": "system", "value": "Be brief."}, *turns("Hi", "yes")], "image": None},
              {"image": ["a.png", "scene:test/0/3/64"],
               "conversations": turns("<image><image> same?", "no", "sure?", "yes"),
               "references": ["no", "never"], "type": "comparison"},
              {"image": "scene:test/0/3/64", "masks": ["scene:test/0/3/64#0", BOX],
               "conversations": turns("<image>Are <region2> and <region1> alike?", "no", "<region1>?", "a ship")}]
    return found


def damaged_file(rng, folder, name, number):
    """A copy of a file, cut, scrambled or with one number of its header changed -> its name."""
    content = bytearray((folder / name).read_bytes())
    how = rng.randrange(4)
    if how == 0:
        content = content[:rng.randrange(len(content))]
    else:
        reach = len(content) if how == 1 else min(len(content), 200)
        for _ in range(rng.choice((1, 1, 3, 20))):
            content[rng.randrange(reach)] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
    new = f"{number}-{name}"
    (folder / new).write_bytes(content)
    return new


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def mutate_value(rng, record):
    everywhere = list(places(record))
    in_texts = [path for path in everywhere if path[-1] == "value"]                # else few records would pass
    *path, key = rng.choice(in_texts if in_texts and rng.random() < 0.4 else everywhere)
    home = record
    for step in path:
        home = home[step]
    how = rng.choice((2, 2, 2, 2, *range(8)))
    if how == 0:
        del home[key]
    elif how == 1 and isinstance(home, list):
        home.insert(key, copy.deepcopy(rng.choice((home[key], *ODD))))
    elif how == 2 and isinstance(home[key], str):
        at = rng.randrange(len(home[key]) + 1)
        odd = rng.choice([odd for odd in ODD if isinstance(odd, str)])
        home[key] = home[key][:at] + odd + home[key][at + rng.randrange(3):]
    elif how == 3 and type(home[key]) in (int, float):
        home[key] = rng.choice((-home[key], home[key] * 1000, home[key] + 0.5, home[key] + 1, 10 ** 5, 10 ** 400))
    elif how == 4 and isinstance(home[key], list):
        rng.shuffle(home[key])
    else:
        home[key] = copy.deepcopy(rng.choice(ODD))


def mutated_line(rng, folder, images, number):
    """One damaged record as the bytes of a line."""
    record = copy.deepcopy(rng.choice(good_records(images)))
    record["id"] = f"r{number}"
    if rng.random() < 0.3 and isinstance(record.get("image"), str) and not record["image"].startswith("scene"):
        record["image"] = damaged_file(rng, folder, rng.choice(images), number)
    elif record.get("masks") == ["mask.png"] and rng.random() < 0.5:
        record["masks"] = [damaged_file(rng, folder, "mask.png", number)]
    else:
        for _ in range(rng.choice((1, 1, 2, 3))):
            if record:
                mutate_value(rng, record)
    line = json.dumps(record if rng.random() < 0.98 else rng.choice(ODD), ensure_ascii=rng.random() < 0.5)
    line = line.encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        at = max(1, rng.randrange(len(line)))
        line = rng.choice((line[:at], line[:at] + b"\xff" + line[at:], line.replace(b":", b"", 1), b"[" * 10 ** 5,
                           b'{"a": ' * 200 + b"1" + b"}" * 200))
    return line.replace(b"\n", b" ")


def fuzz(n, seed, folder, chat="vicuna", fit="letterbox"):
    """
    n damaged records through check and, if it lets them pass, through Records and collate -> (reported, passed).
    An AssertionError names a record that is neither reported nor trained on.
    """
    rng, images = random.Random(seed), make_images(folder)
    lines = [json.dumps({**good_records(images)[0], "id": "0"}).encode()]          # a "[" first would make it a list
    lines += [mutated_line(rng, folder, images, i) for i in range(1, n + 1)]
    (folder / "records.jsonl").write_bytes(b"\n".join(lines))
    (folder / "good.json").write_text(json.dumps(good_records(images)))
    config = Namespace(image_size=64, tokens_per_image=4, fit=fit, chat=chat, max_len=1024, region_dim=8,
                       tokenizer=WEIGHTS)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        bad = check(folder / "records.jsonl", folder, 1, config, folder / "clean.jsonl")
    reports = printed.getvalue().split("\n")[:-3]
    reports = [report for report in reports if report[:1] != " "]                  # the rest is the summary by kind
    for report in reports:
        assert report.startswith("line ") and report.isprintable() and len(report) < 900, report
    reported = {int(report.split()[1]) for report in reports}
    assert len(reported) == bad

    clean = read_records(folder / "clean.jsonl")
    rows = Records(clean, folder, load_tokenizer(WEIGHTS), config)
    assert len(clean) == n + 1 - bad
    for i in range(len(clean)):
        batch = collate([rows[i], rows[i // 2]])
        assert not isinstance(batch, ValueError), f"{chat}, seed {seed}: {batch}"
        assert (batch["labels"] != IGNORE).any() and batch["lengths"].max() <= config.max_len
        assert batch["images"] is None or batch["images"].isfinite().all()
    with contextlib.redirect_stdout(io.StringIO()):
        assert check(folder / "clean.jsonl", folder, 1, config) == 0
        assert check(folder / "good.json", folder, 1, config) == 0, "undamaged records are reported"
    return bad, len(clean) - 1


if __name__ == "__main__":
    total, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for half, (chat, fit) in enumerate((("vicuna", "letterbox"), ("llama-3", "resize"))):
        with tempfile.TemporaryDirectory() as temporary:
            bad, good = fuzz(total // 2, 2 * seed + half, pathlib.Path(temporary), chat, fit)
        print(f"{chat}: {bad} reported, {good} passed and went through the training path")
