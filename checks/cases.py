"""
The cases of checks/fuzz.py, kind by kind: how one is made from a random number generator, and how it is run.

make_case(rng, folder) writes what is damaged or lies into an empty folder. run_case(case) uses it as a user would, and
raises what the code raises, or Nonsense for what no code should let pass. What is nonsense is known from how the case
was made (Case.wrong), or judged by other rules than those of the code.
"""
import contextlib
import copy
import functools
import io
import json
import math
import os
import pathlib
import re
import shutil
from argparse import Namespace
from dataclasses import dataclass
from unittest import mock

import torch
from torch.utils.data import DataLoader

import aquila
import commands.model
import commands.records
import commands.samples
import corpora.__main__
import evaluate
import pictures.gallery
import toy.scenes
import train
from checks import mutations as m
from commands.records import check
from convnext import load_convnext
from data import RecordFile, Records, collate
from files.run_folder import check_checkpoint, load_state, seal
from llama import load_llama, load_lora, rope_frequencies
from pictures.image_files import fit_image, load_image, to_tensor
from pictures.mask_files import decode_mask
from tokenizer import IGNORE, load_tokenizer

TINY_LLM = m.ROOT / "weights/tiny-llm"


@dataclass
class Case:
    path: pathlib.Path                      # what is read
    wrong: str = ""                         # why it must be refused, where that is known
    value: object = None                    # what the kind needs besides
    valid: bool = False                     # it must not be refused


class Nonsense(Exception):
    """Something was accepted that makes no sense."""


def forbid(nonsense, text):
    if nonsense:
        raise Nonsense(text)


# ---------------------------------------------------------------------------------------------- records

def good_records():
    def turns(*texts):
        return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]

    names = sorted(os.listdir(m.EXAMPLES / "images"))
    found = [{"image": name, "conversations": turns("<image>\nWhat is here?", "a port")} for name in names]
    found += [{"image": "a.png", "masks": [mask], "conversations": turns("<image>\nWhat is <region>?", "a ship")}
              for mask in m.MASKS] * 2
    found += [{"image": ["a.png", "scene:test/0/3/64"], "references": ["no", "never"], "type": "comparison",
               "conversations": turns("<image><image> same?", "no", "sure?", "yes")},
              {"image": "scene:test/0/3/64", "masks": ["scene:test/0/3/64#0", m.MASKS[3]],
               "conversations": turns("<image>Are <region2> and <region1> alike?", "no", "<region1>?", "a ship")},
              {"conversations": [{"from": "system", "value": "Be brief."}, *turns("Hi", "yes")], "image": None},
              {"conversations": turns("What is a port?", "ships lie in it", "And?", "cranes")}]
    return found


def make_record(rng, folder):
    """A good record and, on line 2, a damaged one: its image, a key of it, or any value."""
    record, how, wrong = rng.choice(good_records()), rng.randrange(20), ""
    names = [name for name in sorted(os.listdir(m.EXAMPLES / "images")) if name in json.dumps(record)]
    for name in names:
        shutil.copy(m.EXAMPLES / "images" / name, folder)
    if how > 14 and names:
        m.damage(rng, folder / rng.choice(names))
    elif how > 10:
        key = rng.choice([key for key in record if len(key) > 3])
        record = {m.misspelt(rng, k) if k == key else k: v for k, v in record.items()}
        wrong = f"its keys are {list(record)}" if key not in record else ""
    elif how > 0:
        record = m.mutate_json(rng, record, only="value")
    line = m.to_json(rng, record, damage=0 if wrong or how == 0 else 0.05)
    (folder / "records.jsonl").write_bytes(json.dumps(good_records()[-1]).encode() + b"\n" + line)
    return Case(folder / "records.jsonl", wrong, rng.choice((("vicuna", "letterbox"), ("llama-3", "resize"))), how == 0)


def run_record(case):
    """Through check, and if it passes, through Records and collate."""
    chat, fit = case.value
    config = Namespace(image_size=64, tokens_per_image=4, fit=fit, chat=chat, max_len=1024, region_dim=8,
                       llm_dir=TINY_LLM)
    printed, clean = io.StringIO(), case.path.with_name("clean.jsonl")
    with contextlib.redirect_stdout(printed):
        bad = check(case.path, case.path.parent, 1, config, clean)
    if bad:
        reports = [line for line in printed.getvalue().split("\n") if line.startswith("line 2 ")]
        forbid(not reports, f"a problem, but no line about it: {printed.getvalue()!r:.300}")
        raise ValueError(max(reports, key=len))
    rows = Records(RecordFile(clean), case.path.parent, load_tokenizer(TINY_LLM), config)
    batch = collate([rows[0], rows[-1]])
    forbid(isinstance(batch, ValueError), f"check passes what training refuses: {batch}")
    forbid(not (batch["labels"] != IGNORE).any() or batch["lengths"].max() > config.max_len, "nothing to learn")
    forbid(batch["images"] is not None and not batch["images"].isfinite().all(), "pixels that are no numbers")


# ---------------------------------------------------------------------------------------------- images, masks

def make_image(rng, folder):
    path, how = folder / rng.choice(sorted(os.listdir(m.EXAMPLES / "images"))), rng.randrange(20)
    shutil.copy(m.EXAMPLES / "images" / path.name, path)
    if how > 5:
        m.damage(rng, path)
    elif how > 0:
        m.make_costly_image(rng, path)
    return Case(path, valid=how == 0)


def run_image(case):
    image = load_image(case.path.name, case.path.parent)
    forbid(image.mode != "RGB" or max(image.size) > 2 ** 16 or math.prod(image.size) > 2 ** 28, f"{image.size} pixels")
    for fit in ("resize", "letterbox"):
        forbid(not to_tensor(fit_image(image, 64, fit)).isfinite().all(), "pixels that are no numbers")


def make_mask(rng, folder):
    path, value, how, wrong = folder / "mask.png", rng.choice(m.MASKS), rng.randrange(20), ""
    shutil.copy(m.EXAMPLES / "images/mask.png", path)
    if how > 15:
        value = path.name
        m.damage(rng, path)
    elif how > 11:
        value, wrong = path.name, m.make_costly_image(rng, path)
    elif how > 7:
        numbers, n = (0, 5, -3, 47.5, 1e5, 999_999, 2 ** 31), rng.choice((6, 10, 80, 2000))
        value = [[rng.choice(numbers) for _ in range(n)] for _ in range(rng.choice((1, 20, 300)))]
    elif how > 0:
        value = m.mutate_json(rng, [value])
        value = value[0] if len(value) == 1 else value
        if isinstance(value, dict) and set(value) == {"bbox"} and re.search("true|false", json.dumps(value)):
            wrong = "true is no number of pixels"
    return Case(path, wrong, (value,), how == 0)


def run_mask(case):
    mask = decode_mask(*case.value, m.SIZE, case.path.parent)
    forbid(mask.shape != m.SIZE[::-1] or mask.dtype != bool or not mask.any(), f"a mask of {mask.dtype} {mask.shape}")


# ---------------------------------------------------------------------------------------------- models

INT, NUMBER, FLAG = (int,), (int, float), (bool,)
# What configs may say: {key: (types, least, most)}. Keys of files, not of our classes.
LIMITS = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                     "num_key_value_heads", "max_position_embeddings", "dim", "n_layers", "n_heads", "n_kv_heads",
                     "original_max_position_embeddings", "r", "rank", "image_size", "heads", "max_len", "region_side"),
                    (INT, 1, 10 ** 9)),
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), (NUMBER, 1e-9, 1e12)),
    **dict.fromkeys(("lora_alpha", "alpha"), (NUMBER, 1e-320, 1e12)),
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "lora_dropout", "dropout"), (NUMBER, 0, 1)),
    **dict.fromkeys(("tie_word_embeddings", "full_llm", "use_scaled_rope"), (FLAG, 0, 1)),
    "head_dim": (INT, 0, 10 ** 6), "region_dim": (INT, 0, 10 ** 6)}
PARTS = ("rope_scaling", "rope_parameters", "lora")         # whose own keys are read, too


def lies(config):
    """What a config or an index says, at any depth, that cannot be: the first such thing as text, or ""."""
    for path in m.places(config):
        value, key = m.at(config, path), path[-1]
        types, least, most = LIMITS.get(key, ((), 0, 0))
        unread = value is None or key == "vocab_size" and value == -1 or len(path) > 1 and path[0] not in PARTS
        if path[0] in PARTS[:2] and key != "rope_theta":
            unread = unread or "'rope_type': 'llama3'" not in str(config[path[0]])
        if types and not unread and not (type(value) in types and least <= value <= most):
            return f"{key} is {value!r:.60}"
        if path[0] == "weight_map" and isinstance(value, str) and (value[:1] == "/" or ".." in value):
            return f"its index names {value!r:.60}"
    return ""


def as_json(content):
    """What a file says, read as plainly as can be; None if it is no JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def one_file_of(*examples):
    """make_case: a copy of one of these folders, a file of which is damaged."""
    def make(rng, folder):
        example, valid = rng.choice(examples), rng.random() < 0.05
        shutil.copytree(m.EXAMPLES / example, folder / example)
        shutil.copy(m.EXAMPLES / "sharded/model-0.safetensors", folder)              # what "../" may lead to
        path, wrong = rng.choice(sorted((folder / example).iterdir())), ""
        if not valid:
            wrong = m.damage(rng, path)
            if path.name in ("config.json", "params.json", "adapter_config.json") or "index" in path.name:
                wrong = lies(as_json(path.read_bytes())) if path.is_file() and not path.is_symlink() else ""
        return Case(folder / example, wrong, valid=valid)
    return make


def check_loaded(model):
    forbid(not all(p.isfinite().all() for p in model.parameters()), "weights that are no finite numbers")


@torch.no_grad()
def run_llama(case):
    model = load_llama(case.path)
    check_loaded(model)
    forbid(not rope_frequencies(model.config).isfinite().all(), "rotary frequencies that are no finite numbers")
    model(torch.arange(8)[None])


def run_convnext(case):
    check_loaded(load_convnext(next(case.path.glob("vision.*"))))


def run_adapter(case):
    check_loaded(load_lora(load_llama(m.EXAMPLES / "llama_gqa"), case.path))


def make_checkpoint(rng, folder):
    """A model, or a run's checkpoint; of this its checksums are often right, though what they tell of is damaged."""
    case = one_file_of("checkpoint", "checkpoint", "step-000003")(rng, folder)
    if case.path.name == "step-000003" and rng.random() < 0.8:
        with contextlib.suppress(OSError):
            (case.path / "SHA256SUMS").unlink()
            seal(case.path)
    return case


def run_checkpoint(case):
    if case.path.name == "checkpoint":
        return check_loaded(aquila.load_model(case.path))
    p = torch.nn.Parameter(torch.zeros(2, 2))
    run = Namespace(trainable={"p": p}, optimizer=torch.optim.AdamW([p]), steps=4,
                    model=Namespace(own_parameters=lambda: {"p": p}))
    check_checkpoint(case.path, {"steps": 4, "recipe": {"lr": 0.001}})
    step, state = load_state(run, case.path), run.optimizer.state[p]
    forbid(type(step) is not int or step != 3, f"step {step!r:.60}")
    forbid(not (p.isfinite().all() and state["exp_avg"].isfinite().all() and state["exp_avg_sq"].isfinite().all()),
           f"weights or means that are no finite numbers: {p}, {state}")


TEXTS = ("Hello, 123 ports!\n\n", "<|eot_id|></s><s><|im_end|>", "a" * 3000, " \u00e9\u65e5\U0001f4a5", "")


def run_tokenizer(case):
    tokenizer = load_tokenizer(case.path)
    special = set(tokenizer.special.values())
    for text in TEXTS:
        ids = tokenizer.encode(text)
        tokenizer.decode(ids)
        for i in [*ids, *special, *tokenizer.stop_ids, *filter(None, [tokenizer.bos_id])]:
            forbid(type(i) is not int or not 0 <= i < 10 ** 7, f"token id {i!r:.60}")
        forbid(special & set(ids), f"the special tokens {special & set(ids)} from plain text {text[:20]!r}")


# ---------------------------------------------------------------------------------------------- commands

class Refused(ValueError):
    """What a command wrote on stderr before it ended with exit code 2."""


def command(main, *argv):
    """A command in this process -> what it printed; Refused if it ends with exit code 2."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("sys.argv", ["x.py", *argv]):
        try:
            main()
        except SystemExit as e:
            if e.code == 2:
                raise Refused(err.getvalue().strip("\n")) from None
            forbid(e.code not in (0, 1, None), f"exit code {e.code!r}")
    return out


ROWS = [{"id": "1", "prediction": "2", "answer": "2", "type": "count", "image": "a.png"},
        {"id": "2", "prediction": "yes", "answer": "no", "type": "presence", "sampling": "random"},
        {"id": "3", "prediction": "a red ship", "references": ["a red ship on water", "one ship"], "question": "What?"},
        {"id": "4", "prediction": "a ship", "answer": "a red ship", "type": "region caption", "masks": m.MASKS[1:2]},
        {"id": "5", "prediction": "ship", "answer": "ship", "type": "region class", "image": ["a.png"]},
        {"question_id": 6, "ground_truth": "2", "answer": "2", "category": "Count", "image": "a.png"}]


def make_predictions(rng, folder):
    rows, lines, wrong, valid = rng.sample(ROWS, rng.randrange(1, 5)), [], "", rng.random() < 0.05
    for row in rows:
        lines.append(m.to_json(rng, row if valid else m.mutate_json(rng, row), damage=0 if valid else 0.05))
        wrong = wrong or (f"no answer in {lines[-1]!r:.80}" if lines[-1].strip() and not has_answer(lines[-1]) else "")
    path = folder / "predictions.jsonl"
    path.write_bytes(b"\n".join(lines))
    return Case(path, wrong, [rng.choice(("score", "gallery"))], valid)


def has_answer(line):
    row = as_json(line)
    row = row if isinstance(row, dict) else {}
    said = row.get("prediction", row.get("answer") if "ground_truth" in row else None)
    true = row.get("ground_truth") if "prediction" not in row else row.get("references") or row.get("answer")
    return isinstance(said, str) and isinstance(true, (str, list))


def run_predictions(case):
    if case.value == ["score"]:
        printed = command(evaluate.main, "--score", str(case.path))
        printed.seek(0)
        forbid(re.search(r"\b(nan|inf)\b", printed.read()), "a score that is no number")
    else:
        page = str(case.path.with_name("page.html"))
        command(pictures.gallery.main, str(case.path), "--out", page, "--images", str(m.EXAMPLES / "images"))


TURNS = [{"from": "human", "value": "What is <region1>?\n<image>"}, {"from": "gpt", "value": "A ship."}]
REGION = {"image_id": 1, "category_id": 2, "bbox": [5, 5, 20, 10], "area": 200, "iscrowd": 0,
          "segmentation": [[5, 5, 25, 5, 25, 15]]}
CORPORA = {                                 # name: {file: what is in it, as published}
    "ucm": {"dataset.json": {"images": [{"filename": f"{i}.tif", "split": "train", "sentences": [{"raw": "a port"}]}
                                        for i in range(3)]}},
    "nwpu": {"dataset_nwpu.json": {"airport": [{"filename": "airport_1.jpg", "split": "train", "raw": "A .",
                                                "raw_1": "B .", "raw_2": "C .", "raw_3": "D .", "raw_4": "E ."}]}},
    "capera": {"CapERA_DATASET_train.json": {"ERA_caption": [
        {"video_id": "Car_001.mp4", "annotation": {"English_caption": ["one", "two"]}}]}},
    "rsvqa-lr": {"LR_split_train_questions.json": {"questions": [
        {"id": 0, "active": False}, {"id": 1, "img_id": 7, "type": "count", "question": "How many?", "answers_ids": [1],
                                     "active": True}]},
                 "LR_split_train_answers.json": {"answers": [{"id": 1, "answer": "37", "active": True}]}},
    "llava": {"llava_v1_5_mix665k.json": [{"image": "a/1.png", "conversations": TURNS}, {"conversations": TURNS}]},
    "fit-rsfg-vqa": {"FIT-RSFG/FIT-RSFG-Bench/test_FITRS_vqa_eval.jsonl": {
        "question_id": 1, "image": "t.png", "text": "How many?", "category": "Count", "ground_truth": "2"}},
    "coco-masks": {"annotations/instances_train2017.json": {
        "images": [{"id": 1, "file_name": "1.png", "width": 200, "height": 100}],
        "categories": [{"id": 2, "name": "ship"}, {"id": 3, "name": "Storage_Tank"}],
        "annotations": [REGION, {**REGION, "category_id": 3, "bbox": [40, 5, 20, 10], "iscrowd": 0}]}},
    "osprey": {"Osprey-724K/osprey_conversations.json": [
        {"file_name": "COCO_1.jpg", "annotation": [REGION], "conversations": TURNS}]},
    "osprey-details": {"Osprey-724K/osprey_detail_description.json": [
        {"file_name": "1.jpg", "annotation": [REGION], "description": ["<region1>: a ship"]}]}}


def make_corpus(rng, folder):
    name, valid = rng.choice(sorted(CORPORA)), rng.random() < 0.05
    for file, content in CORPORA[name].items():
        path = folder / "root" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content if valid else m.mutate_json(rng, content)
        path.write_bytes(m.to_json(rng, content, damage=0 if valid else 0.05))
    if not valid and rng.random() < 0.03:
        m.make_odd_file(rng, path)
    split = "val" if name.startswith("fit") else "train"
    return Case(folder, value=[name, "--root", str(folder / "root"), "--split", split], valid=valid)


def run_corpus(case):
    out = case.path / "out.jsonl"
    try:
        command(corpora.__main__.main, *case.value, "--out", str(out))
    except Refused:
        forbid(out.exists(), "refused, but there is a file")
        raise
    ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    forbid(not ids or len(set(ids)) < len(ids), "no records, or two with the same id")


# {flag: (type, least, most)}: beyond that, exit code 0 is nonsense. None: a path, a name or a list.
COUNT, SEED, SHARE, WORKERS = (int, 1, 10 ** 6), (int, -2 ** 63, 2 ** 64), (float, 0, 1), (int, 0, 1000)
RATE, SIDE = (float, 0, 10 ** 6), (int, 32, 16384)
FLAGS = {
    "train": {"--stage": (int, 1, 3), "--scenes": COUNT, "--steps": COUNT, "--stop-after": COUNT, "--save-every": COUNT,
              "--keep": COUNT, "--val-every": COUNT, "--skip-bad": (int, 0, 10 ** 6),
              "--seed": SEED, "--workers": WORKERS, "--image-size": SIDE, "--max-len": COUNT, "--lr": RATE,
              "--decay": RATE, "--warmup": SHARE, "--epochs": (float, 1e-9, 10 ** 6), "--batch": COUNT,
              "--micro": COUNT, "--lora-rank": COUNT, "--lora-alpha": RATE, "--lora-dropout": SHARE,
              **dict.fromkeys(("--preset", "--data", "--val", "--images", "--vision", "--llm", "--init-from",
                               "--resume", "--out", "--mda-layers", "--chat", "--fit", "--pooling", "--integration",
                               "--dtype"))},
    "evaluate": {"--limit": COUNT, "--batch": COUNT, "--workers": WORKERS, "--max-new-tokens": (int, 1, 4096),
                 "--scenes": COUNT, "--temperature": RATE, "--top-p": (float, 1e-9, 1), "--seed": SEED,
                 **dict.fromkeys(("--model", "--vision", "--llm", "--out", "--images", "--tasks", "--metrics",
                                  "--benchmark", "--data", "--score", "--image", "--root", "--split", "--leave-out",
                                  "--ask", "--mask"))},
    "data": {"--workers": (int, 1, 1000), "-n": COUNT, "--max-len": COUNT, "--image-size": SIDE,
             **dict.fromkeys(("--images", "--fix", "--tokenizer", "--chat"))},
    "aquila": dict.fromkeys(("--preset", "--export", "--model", "--llm", "--adapter")),
    "corpora": {"--limit-per-image": COUNT, **dict.fromkeys(("--root", "--split", "--file", "--out"))},
    "gallery": {"--limit": COUNT, "--images": None, "--out": None},
    "scenes": {"-n": COUNT, "--size": (int, 64, 16384), "--seed": SEED, "--start": (int, 0, 10 ** 12), "--split": None,
               "--out": None}}
NUMBERS = ("0", "-1", "-8", "-32", "1", "2", "3", "32", "64", "5", "0.5", "1.5", "1e-9", "nan", "inf", "-inf", "1e400",
           "1e-320", "1000000000", "-1000000000000", "9" * 30, "9" * 5000, "", " ", "1_0", "\u0663", "0x10", "true",
           "1e3")
WORDS = ("", " ", "none", "out", "fifo", ".", "x" * 5000, "\udcff", "\u65e5", "%s{}", "a,b", "0,99",
         "0,-1", "1,,2", "good.jsonl", "a.png", "mask.png", "bad.json", "scene:test/0/3/64", "scene:x", "llama_gqa",
         "checkpoint", "adapter", "convnext/vision.safetensors", "aquila-8b", "tiny-plus", "rsicd", "all", "test",
         "caption,vqa", "bleu", "good.jsonl/x", "out.jsonl", "out.html")
ELSEWHERE = ("/none", "..", "/dev/zero", "/dev/null", "/")         # never to be written to
BASES = {                                   # of each command: what is right, before flags are added
    "train": (["--data=good.jsonl"], [], ["--preset=tiny-plus", "--stage=2", "--init-from=checkpoint"]),
    "evaluate": (["--model=GOOD", "--scenes=1"], ["--model=GOOD", "--data=good.jsonl"], ["--score=rows.jsonl"], [],
                 ["--model=GOOD", "--image=a.png", "--ask=What?"]),
    "data": (["check", "good.jsonl"], ["check", "good.jsonl", "--workers=1"], ["show", "good.jsonl"]),
    "aquila": ([], ["--model=checkpoint", "--export=out"], ["--llm=llama_gqa", "--adapter=adapter", "--export=out"]),
    "corpora": [[name, "--root=.", "--out=out.jsonl"] for name in ("coco-masks", "llava", "align", "whu-rs19", "")],
    "gallery": (["rows.jsonl"], ["good.jsonl"], ["bad.json"], ["fifo"], ["none"]),
    "scenes": (["--out=out", "-n=2", "--size=64"],)}
FIRST = {"train": ["--stage=1", "--steps=1", "--batch=2", "--micro=2", "--scenes=2", "--workers=0"],
         "evaluate": ["--max-new-tokens=2"]}
MAINS = {"train": train.main, "evaluate": evaluate.main, "data": commands.records.main, "aquila": commands.model.main,
         "corpora": corpora.__main__.main, "gallery": pictures.gallery.main, "scenes": toy.scenes.main}


def make_command(rng, folder):
    name = rng.choice(sorted(FLAGS))
    argv, bad = [*FIRST.get(name, ()), *rng.choice(BASES[name])], []
    for flag in rng.choices(list(FLAGS[name]), k=rng.choice((1, 1, 2, 3))):
        values = WORDS if flag in ("--out", "--fix", "--export") else WORDS + ELSEWHERE
        if limits := FLAGS[name][flag]:     # what is within them and large would only take long
            values = [value for value in NUMBERS if not in_range(value, *limits) or float(value) <= 64]
        argv.append(f"{flag}={rng.choice(values)}")
        if limits and not in_range(argv[-1].partition("=")[2], *limits):
            bad.append(argv[-1])
    for file in ("a.png", "mask.png"):
        shutil.copy(m.EXAMPLES / "images" / file, folder)
    (folder / "good.jsonl").write_text(json.dumps(good_records()[0] | {"image": "a.png"}) + "\n")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "bad.json").write_bytes(rng.choice(m.BROKEN))
    os.mkfifo(folder / "fifo")
    for example in ("llama_gqa", "checkpoint", "adapter", "convnext"):
        shutil.copytree(m.EXAMPLES / example, folder / example)
    return Case(folder, f"{name} {' '.join(bad):.80}" if bad else "", [name, *argv])


def in_range(text, kind, least, most):
    """Whether the text is a number of this type within the limits."""
    try:
        return least <= kind(text) <= most
    except (ValueError, OverflowError):
        return False


def run_command(case):
    """The command, but for what would take long: few scenes, one step, one model for all, no processes."""
    name, *argv = case.value
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(case.path))
        for module, function, stub in STUBS:
            stack.enter_context(mock.patch.object(module, function, stub))
        try:
            command(MAINS[name], *argv)
        finally:
            left = [path.name for path in case.path.glob("*.tmp")]
            forbid(left, f"left half-written: {left}")
            forbid(not (case.path / "fifo").is_fifo(), "a FIFO was replaced by a file")


def one_step(run, *rest, train=train.train):
    if run.recipe.batch <= 8:
        run.steps = 1
        train(run, *rest)


@functools.cache
def tiny_model():
    return aquila.build(aquila.PRESETS["tiny"]).eval()


def load_once(folder, *rest, load_model=evaluate.load_model):
    return copy.deepcopy(tiny_model()) if folder == "GOOD" else load_model(folder, *rest)


def few_records(split, n, *rest, make_records=toy.scenes.make_records, **options):
    return make_records(split, min(n, 4), *rest, **options)


def no_processes(data, num_workers=0, **options):
    forbid(num_workers > 1000, f"{num_workers} processes")
    return DataLoader(data, num_workers=min(num_workers, 0), **options)


STUBS = ((train, "train", one_step), (commands.samples, "make_records", few_records),
         (commands.samples, "DataLoader", no_processes), (evaluate, "make_records", few_records),
         (evaluate, "load_model", load_once), (evaluate, "DataLoader", no_processes),
         (commands.records, "DataLoader", no_processes))

KINDS = {                                   # (rng, empty folder) -> Case; Case -> nothing, or what is raised
    "records": (make_record, run_record), "images": (make_image, run_image), "masks": (make_mask, run_mask),
    "llamas": (one_file_of("llama_gqa", "llama_mha", "meta"), run_llama),
    "weights": (one_file_of("sharded", "sharded_bin"), run_llama),
    "tokenizers": (one_file_of("digits", "split", "tiny", "llama3", "pieces"), run_tokenizer),
    "convnexts": (one_file_of("convnext", "convnext_pt"), run_convnext),
    "adapters": (one_file_of("adapter"), run_adapter),
    "checkpoints": (make_checkpoint, run_checkpoint),
    "predictions": (make_predictions, run_predictions), "corpora": (make_corpus, run_corpus),
    "commands": (make_command, run_command)}
