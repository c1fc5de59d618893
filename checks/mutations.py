"""
Valid files of every kind that the code reads, as small as they come, and ways to damage them, for checks/cases.py.

Whatever is drawn comes from the `rng` that is handed in, so that a case can be made again.
"""
import base64
import contextlib
import copy
import functools
import io
import json
import os
import re
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import aquila
from convnext import ConvNeXtConfig
from files.run_folder import seal
from llama import hf_config, load_llama, names_of

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
SIZE = (48, 40)                             # of the example images
EXAMPLES = None                             # the folder of all examples, inside of examples()
BAD_NUMBERS = (float("nan"), float("inf"), -float("inf"))
NESTED = json.loads("[" * 30 + "]" * 30)
ODD = [None, True, False, 0, -1, 7, 1e308, *BAD_NUMBERS, 2 ** 63, 10 ** 9, 10 ** 40, 0.5, "", " ", "\ud800", "a\udfff",
       "\u2028", "\0", "a\0b.png", "\n", "x" * 3000, "\u202e\u0301", "\U0001f4a5", [], {}, [[]], [1], [None], {"a": 1},
       ["human"], NESTED, [NESTED] * 3, "human", "gpt", "system", "<|eot_id|></s>", "<image>", "<region>",
       "<region1><region2>", "<region0>", "<region\u0663>", "<region" + "9" * 5000 + ">", "../up.png",
       "../model-0.safetensors", "/etc/passwd", "/dev/zero", "/", ".", "mask.png", "none.png", "(?=(a+))*b",
       "(?:(?:a?){99}){99}", "scene:test/0/3/64", "scene:test/0/3/64#0", "scene:test/0/3/64#\u00b2", "scene:x",
       "scene:train/0/0/99999999", "scene:test/" + "9" * 5000 + "/3/64", {"size": [40, 48], "counts": "\ud8000"},
       {"size": [10 ** 5 - 1] * 2, "counts": [10 ** 10]}, {"segmentation": {"segmentation": {"counts": 3}}}]
OUTSIDE = ("../model-0.safetensors", "/dev/zero", "none/../../model-0.safetensors", "/etc/passwd", "..")
BROKEN = [b"", b"null", b"[]", b"3", b'"x"', b"{", b"[" * 10 ** 5, b'{"a":' * 10 ** 5,
          b'{"a": ' * 200 + b"1" + b"}" * 200, b"\xff\xfe", b"9" * 5000, b"NaN", b"PK\3\4", b"\0" * 300]


# ---------------------------------------------------------------------------------------------- damage

def places(value, path=()):
    """The paths of all values inside a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from places(inner, (*path, key))


def at(value, path):
    for step in path:
        value = value[step]
    return value


def mutate_json(rng, value, only=None):
    """A copy of a JSON value with one to three values, or keys, made odd. only: the key of values to prefer."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        everywhere = list(places(value))
        if everywhere:
            chosen = [path for path in everywhere if path[-1] == only]
            *path, key = rng.choice(chosen if chosen and rng.random() < 0.4 else everywhere)
            mutate_at(rng, at(value, path), key)
    return value


def mutate_at(rng, home, key):
    how = rng.choice((2, 2, 2, 2, *range(9)))
    if how == 0:
        del home[key]
    elif how == 1 and isinstance(home, list):
        home.insert(key, copy.deepcopy(rng.choice((home[key], *ODD))))
    elif how == 2 and isinstance(home[key], str):
        at = rng.randrange(len(home[key]) + 1)
        odd = rng.choice([odd for odd in ODD if isinstance(odd, str)])
        home[key] = home[key][:at] + odd + home[key][at + rng.randrange(3):]
    elif how in (2, 3) and type(home[key]) in (int, float):
        n = home[key] if abs(home[key]) < 1e300 else 7
        home[key] = rng.choice((0, 1, -1, -n, n * 2, n * 1000, n + 0.5, n + 1, n - 1, float(n), str(n), 10 ** 5,
                                10 ** 9, 10 ** 12, 2 ** 63, 10 ** 400, *BAD_NUMBERS, 1e-320, 1e308))
    elif how == 4 and isinstance(home[key], list):
        rng.shuffle(home[key])
    elif how == 5 and isinstance(home, dict):
        home[misspelt(rng, key)] = home.pop(key)
    else:
        home[key] = copy.deepcopy(rng.choice(ODD))


def misspelt(rng, word):
    """A word one or two edits away."""
    at = rng.randrange(max(len(word), 1))
    return rng.choice((word + "s", word.capitalize(), word[:-1], word[:at] + word[at + 1:],
                       word[:at] + word[at:at + 1] + word[at:], word[:at] + "x" + word[at + 1:])) or "x"


def mutate_bytes(rng, content):
    """A file cut, scrambled, or with numbers of its first bytes changed."""
    content = bytearray(content)
    how = rng.randrange(6)
    if how == 0 or not content:
        return bytes(content[:rng.randrange(len(content) + 1)])
    if how == 1:
        at = rng.randrange(len(content))
        return bytes(content[:at] + content[at + rng.randrange(1, 64):])
    reach = len(content) if how == 2 else min(len(content), rng.choice((16, 200, 2000)))
    for _ in range(rng.choice((1, 1, 3, 20))):
        content[rng.randrange(reach)] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
    return bytes(content)


def to_json(rng, value, damage=0.05):
    """A value as one line of JSON, sometimes with its bytes damaged."""
    content = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < damage:
        content = rng.choice((mutate_bytes(rng, content), rng.choice(BROKEN)))
    return content.replace(b"\n", b" ")


def make_odd_file(rng, path):
    """No regular file in the place of a path: what opening it may hang on, or what leads elsewhere."""
    path.unlink(missing_ok=True)
    how = rng.randrange(6)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
    elif how == 2:
        path.write_bytes(b"")
    else:
        path.symlink_to(("/dev/zero", path.name, "/none/at/all")[how - 3])


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHER_TYPES = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


def mutate_tensors(rng, tensors):
    """-> named tensors with one of them changed, and why they must be refused, or ""."""
    tensors = {name: t.clone() for name, t in tensors.items()}
    name, how = rng.choice(list(tensors)), rng.randrange(7)
    t, kind, number = tensors[name], rng.choice(OTHER_TYPES), rng.choice(BAD_NUMBERS)
    if how == 0:
        tensors[name] = t.float().to(kind)
        return tensors, f"{name} is of {kind}"
    if how == 1:
        t.view(-1)[rng.randrange(t.numel())] = number
        return tensors, f"{name} holds {number}"
    if how == 2:
        tensors[name] = t.to(rng.choice(FLOATS))
        return tensors, ""
    if how == 3:
        shape = rng.choice(((), (0,), (*t.shape, 1), tuple(t.shape[::-1]), (t.numel(),), (1, *t.shape[1:])))
        tensors[name] = torch.zeros(shape)
        return tensors, f"{name} has shape {shape}" if shape != tuple(t.shape) else ""
    if how == 4:
        del tensors[name]
        return tensors, f"{name} is missing"
    new = re.sub(r"\d+", rng.choice(("7", "99999", "9" * 12)), name, count=1)
    if how == 6 or new in tensors:
        new = f"{name}.{rng.choice(('x', 'é', chr(10), 'x' * 3000, '1' * 5000))}"
    tensors[new] = t.clone()
    return tensors, ""


def mutate_header(rng, path):
    """Let the header of a safetensors file say something else: types, shapes, places, names, metadata."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = mutate_json(rng, json.loads(content[8:8 + size]), rng.choice(("dtype", "shape", "data_offsets")))
    if rng.random() < 0.2:
        entry = header[rng.choice(sorted(header))]
        if isinstance(entry, dict) and "dtype" in entry:
            entry["dtype"] = rng.choice(("I16", "U16"))
    kinds = {str(entry.get("dtype")) for entry in header.values() if isinstance(entry, dict)}
    header = json.dumps(header).encode("utf-8", "replace")
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size:])
    return "a tensor of whole numbers" if kinds & {"I16", "U16"} else ""


def damage(rng, path):
    """Damage a file in the way of its kind. -> why it must be refused, where that is known, or ""."""
    content, how = path.read_bytes(), rng.randrange(20)
    if how == 0:
        make_odd_file(rng, path)
    elif path.suffix == ".json" and how > 1:
        value = mutate_json(rng, json.loads(content), rng.choice(("id", "content", "Regex", None)))
        names = value.get("weight_map") if isinstance(value, dict) else None
        if how > 14 and isinstance(names, dict) and names:
            names[min(names)] = rng.choice(OUTSIDE)
        path.write_bytes(to_json(rng, value))
    elif path.suffix == ".safetensors" and how > 10:
        tensors, wrong = mutate_tensors(rng, load_file(path))
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
        return wrong
    elif path.suffix == ".safetensors" and how > 5:
        return mutate_header(rng, path)
    elif path.suffix in (".bin", ".pt", ".pth") and how > 5:
        value, wrong = torch.load(path), ""
        if how > 10 and all(map(torch.is_tensor, value.values())):
            value, wrong = mutate_tensors(rng, value)
        else:
            value = mutate_json(rng, value)
        torch.save(value, path, _use_new_zipfile_serialization=rng.random() < 0.7)
        return wrong
    else:
        path.write_bytes(mutate_bytes(rng, content))
    return ""


# ---------------------------------------------------------------------------------------------- examples

MASKS = ["mask.png", [[5, 5, 25, 5, 25, 15]], [5, 5, 25, 5, 25, 15, 5, 15], {"bbox": [5, 5, 20, 10]},
         {"size": [40, 48], "counts": [100, 50, 1770]}, {"size": [40, 48], "counts": "T3b1Zg1"},
         {"segmentation": [[5, 5, 25, 5, 25, 15]], "bbox": [5, 5, 20, 10], "category_id": 1}]


@contextlib.contextmanager
def examples():
    """Makes the examples in a folder, EXAMPLES, and yields another one for what is made of them."""
    global EXAMPLES
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        EXAMPLES = Path(folder, "examples")
        EXAMPLES.mkdir()
        make_examples(EXAMPLES)
        yield Path(folder)


def make_examples(folder):
    """Images; Llama folders of every layout, tokenizers, a ConvNeXt, an adapter, a model, a run's checkpoint."""
    make_images(folder / "images")
    make_llamas(folder)
    make_tokenizers(folder)
    for name in ("convnext", "convnext_pt", "step-000003"):
        (folder / name).mkdir()
    vision = load_file(GOLDEN / "convnext.safetensors")
    vision = {name: t for name, t in vision.items() if name.startswith(("visual.trunk.stem", "visual.trunk.stages"))}
    save_file(vision, folder / "convnext/vision.safetensors")
    torch.save(vision, folder / "convnext_pt/vision.pt")
    shutil.copytree(GOLDEN / "lora", folder / "adapter")
    config = aquila.AquilaConfig(
        ConvNeXtConfig((1, 2, 1, 1), (8, 16, 24, 32)), hf_config(folder / "llama_gqa"), image_size=64, dim=16,
        mda_layers=(0,), lora=aquila.LoRAConfig(2, 4, 0.0), max_len=128, region_dim=8, region_side=16,
        vision_file=str(folder / "convnext/vision.safetensors"), llm_dir=str(folder / "llama_gqa"))
    aquila.save_model(aquila.build(config), folder / "checkpoint")
    p, step = torch.ones(2, 2), folder / "step-000003"
    save_file({"p": p}, step / "model.safetensors")
    save_file({"exp_avg.p": p, "exp_avg_sq.p": p.clone()}, step / "optimizer.safetensors")
    (step / "config.json").write_text('{"chat": "llama-3"}')
    (step / "run.json").write_text('{"step": 3, "settings": {"steps": 4, "recipe": {"lr": 0.001}}}')
    seal(step)


def make_images(folder):
    """A file of every kind that is read, in all the ways of storing pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
    gray16 = Image.fromarray(rng.integers(0, 60000, (SIZE[1], SIZE[0]), dtype=np.uint16))
    float32 = Image.fromarray(rng.normal(size=(SIZE[1], SIZE[0])).astype(np.float32))
    images = {"a.png": color, "a.jpg": color, "a.tif": color, "a.bmp": color, "a.gif": color.convert("P"),
              "a.webp": color, "a.jp2": color, "p.png": color.convert("P"), "la.png": color.convert("LA"),
              "one.png": color.convert("1"), "rgba.png": color.convert("RGBA"), "cmyk.jpg": color.convert("CMYK"),
              "deep.png": gray16, "deep.tif": gray16, "float.tif": float32, "gray.jpg": color.convert("L"),
              "dot.png": color.resize((1, 1)), "thin.png": color.resize((700, 1))}
    for name, image in images.items():
        image.save(folder / name)
    color.save(folder / "lzw.tif", compression="tiff_lzw")
    color.save(folder / "progressive.jpg", progressive=True)
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    mask[5:15, 5:25] = 255
    Image.fromarray(mask).save(folder / "mask.png")


def make_llamas(folder):
    """Hugging Face's layout, whole and in two files with an index, and Meta's."""
    for name in ("llama_gqa", "llama_mha", "sharded", "sharded_bin", "meta"):
        (folder / name).mkdir()
    for name in ("llama_gqa", "llama_mha"):
        config = json.loads((GOLDEN / f"{name}.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        shutil.copy(GOLDEN / f"{name}.safetensors", folder / name / "model.safetensors")
    tensors = load_file(GOLDEN / "llama_gqa.safetensors")
    for name, stem, suffix in (("sharded", "model", ".safetensors"), ("sharded_bin", "pytorch_model", ".bin")):
        shutil.copy(folder / "llama_gqa/config.json", folder / name)
        halves = {f"{stem}-{i}{suffix}": sorted(tensors)[i::2] for i in (0, 1)}
        save = save_file if suffix == ".safetensors" else torch.save
        for file, names in halves.items():
            save({k: tensors[k] for k in names}, folder / name / file)
        index = {"metadata": {}, "weight_map": {k: file for file, names in halves.items() for k in names}}
        (folder / name / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    model, c = load_llama(folder / "llama_mha"), hf_config(folder / "llama_mha")
    torch.save({names_of(name)[1]: p.detach().clone() for name, p in model.named_parameters()},
               folder / "meta/consolidated.00.pth")
    params = dict(dim=c.dim, n_layers=c.n_layers, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, vocab_size=c.vocab_size,
                  norm_eps=c.norm_eps, rope_theta=c.rope_theta, multiple_of=4, use_scaled_rope=False)
    (folder / "meta/params.json").write_text(json.dumps(params))


def make_tokenizers(folder):
    """A folder for each kind of tokenizer."""
    for name in ("digits", "split", "tiny", "llama3", "pieces"):
        (folder / name).mkdir()
    for name in ("digits", "split"):
        shutil.copy(GOLDEN / f"tokenizer_{name}.json", folder / name / "tokenizer.json")
        (folder / name / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "weights/tiny-llm" / name, folder / "tiny")
    tokens = [*(bytes([b]) for b in range(256)), b"he"]
    lines = [b"%s %d" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    (folder / "llama3/tokenizer.model").write_bytes(b"\n".join(lines))
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a port with ships", "houses and roads"] * 4), model_writer=pieces, vocab_size=290,
        model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False)
    (folder / "pieces/tokenizer.model").write_bytes(pieces.getvalue())


# ---------------------------------------------------------------------------------------------- costly images

def make_costly_image(rng, path):
    """
    A small file that asks for much: a large picture, many scans, numbers that are none; or what is no image.
    -> why it must be refused as a mask, where that is known, or "".
    """
    how = rng.randrange(5)
    if how == 0:
        sides = rng.choice(((16384, 16384), (2 ** 28, 1), (1, 2 ** 28), (2 ** 31 - 1,) * 2, (0, 0), (20000, 20000),
                            (9000, 9000), (65536, 3)))
        path.write_bytes(png(*sides, *rng.choice(((1, 0), (8, 0), (16, 0), (8, 2), (8, 6)))))
    elif how == 1:
        path.write_bytes(many_scans(rng.choice((64, 3000)), rng.choice((2, 100, 400, 5000))))
    elif how == 2:
        pixels = np.full((SIZE[1], SIZE[0]), rng.choice((*BAD_NUMBERS, 3e38, 0.0)), np.float32)
        pixels[:rng.choice((0, 1, 20))] = rng.choice((0, 1, -3e38))
        Image.fromarray(pixels).save(path, format="TIFF")
        return "" if np.isfinite(pixels).all() else "its pixels are no finite numbers"
    elif how == 3:
        path.write_bytes(rng.choice((
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 40\n(x) show\n", b"P6 48 40 255\n" + b"\0" * 5760, *BROKEN,
            b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4\n", b"8BPS\0\1" + b"\0" * 40)))
    else:
        make_odd_file(rng, path)
    return ""


def png(width, height, bits, color):
    """A PNG of zeros; of a large one only the beginning."""
    row = 1 + (width * bits * {0: 1, 2: 3, 6: 4}[color] + 7) // 8
    data = zlib.compress(bytes(min(row * height, 2 ** 25)), 1)
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    for name, part in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    return content


@functools.lru_cache(4)
def progressive(side):
    file = io.BytesIO()
    Image.new("L", (side, side), 90).save(file, "JPEG", progressive=True)
    return file.getvalue()


def many_scans(side, n):
    """A progressive JPEG whose last scan is there n times."""
    content = progressive(side)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * n + content[-2:]
