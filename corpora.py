"""Published data sets -> our JSONL: LLaVA's records, one a line (Aquila Sec. 4.1; Aquila-plus's mask-text data).

    python corpora.py rsicd --root RSICD --split train --out rsicd.jsonl
    python corpora.py align --root FOLDERS --out align.jsonl           # the paper's mixes: align, instruct
    python corpora.py coco-masks --root COCO --file instances.json --out regions.jsonl

`--root` is the folder as its authors publish it; `--help` lists every corpus with the files it expects.
Captions: in train one line a caption (an image that repeats a caption keeps every copy: the papers count image-text
pairs), in val and test one line an image with all its captions in `references`. The text is the published `raw` string,
stripped at both ends. Questions: one line each with their `type`. No image is opened here: `data.py check` does that.
Regions: `masks` has one entry a region; `<region2>` means masks[1], a plain `<region>` the next one in order.
"""

import argparse
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from corpus import (IMAGE_SLOT, SCENE_TEXT, Corpus, expect, get, listed, llava_turns, plain_name, prompt, read_json,
                    read_json_lines, record)
from region_corpora import PER_REGION, SHARES, read_coco, read_osprey


# ---------------------------------------------------------------------------------------------------------------------
# Captions and scenes

def caption_records(corpus: Corpus, split: str, key: str, image: str, captions: list[str]) -> Iterator[dict]:
    """Train: one record a caption. Val and test: one an image, answered by its first. Empty captions are left out."""
    captions = [caption.strip() for caption in captions]
    image_id = f"{corpus.name}-{key}"
    if split == "train":
        for number, caption in enumerate(captions):
            if caption:
                record_id = f"{image_id}-{number}"
                yield record(record_id, corpus.images + image, prompt("caption", record_id), caption)
    elif any(captions):
        references = [caption for caption in captions if caption]
        yield record(image_id, corpus.images + image, prompt("caption", image_id), references[0], references=references)


def read_karpathy(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """RSICD, UCM, Sydney, RSITMD: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}."""
    path = root / corpus.file
    for number, row in enumerate(get(read_json(path), "images", list, str(path))):
        where = f"{path}: image {number}"
        if get(row, "split", str, where) == split:
            name = get(row, "filename", str, where)
            captions = [get(sentence, "raw", str, where) for sentence in get(row, "sentences", list, where)]
            yield from caption_records(corpus, split, name, name, captions)


def read_nwpu(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """{class: [{"filename", "split", "raw", "raw_1", ..., "raw_4"}]}; images lie in a folder a class."""
    path = root / corpus.file
    for scene, rows in expect(read_json(path), dict, str(path)).items():
        for number, row in enumerate(expect(rows, list, f"{path}: '{scene}'")):
            where = f"{path}: {scene} {number}"
            if get(row, "split", str, where) == split:
                name = get(row, "filename", str, where)
                captions = [get(row, key, str, where) for key in ("raw", "raw_1", "raw_2", "raw_3", "raw_4")]
                yield from caption_records(corpus, split, name, f"{scene}/{name}", captions)


def read_capera(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """{"ERA_caption": [{"video_id", "annotation": {"English_caption": [5 strings]}}]}.

    The captions are of clips, Train/<Event>/<Event>_001.mp4 of the ERA set, and train and test use the same names.
    ASSUMPTION: the image of a clip is a still of it, saved by the user as .jpg under the clip's name.
    """
    path = root / corpus.file.replace("{split}", split)
    for number, row in enumerate(get(read_json(path), "ERA_caption", list, str(path))):
        where = f"{path}: clip {number}"
        clip = get(row, "video_id", str, where).removesuffix(".mp4")
        image = f"{split.capitalize()}/{clip.rpartition('_')[0]}/{clip}.jpg"
        captions = get(get(row, "annotation", dict, where), "English_caption", list, where)
        captions = [expect(caption, str, f"{where}: caption") for caption in captions]
        yield from caption_records(corpus, split, f"{split}-{clip}", image, captions)


def read_scene_folders(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """WHU-RS19: a folder of images a class and no text, so the class name is put into SCENE_TEXT."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".tif", ".tiff"}:
                image = f"{folder.name}/{path.name}"
                record_id = f"{corpus.name}-{image}"
                text = SCENE_TEXT.format(name=plain_name(folder.name))
                yield record(record_id, image, prompt("scene", record_id), text)


# ---------------------------------------------------------------------------------------------------------------------
# Questions

def bucket(answer: str, counts: bool) -> str:
    """RSVQA's answer classes, as its authors make them: areas always, counts in the low-resolution set only.

    0 stays; then "between 0 and 10" (1 to 10), "between 10 and 100" (11 to 100), "between 100 and 1000" and "more than
    1000"; areas alike, with m2 behind every number. Any other answer comes back as it is.
    """
    match = re.fullmatch(r"([0-9]+)(m2)?", answer)
    if match is None or not (match[2] or counts):
        return answer
    value, unit = int(match[1]), match[2] or ""
    if value == 0:
        return f"0{unit}"
    for low, high in ((0, 10), (10, 100), (100, 1000)):
        if value <= high:
            return f"between {low}{unit} and {high}{unit}"
    return f"more than 1000{unit}"


def active_rows(path: Path, kind: str) -> dict[int, dict]:
    """Rows of one split by id. The lists hold {"id", "active": false} in the places of other splits' rows.

    Some copies of the split files carry flags only; the text then comes from all_questions.json, all_answers.json.
    """
    def load(path: Path) -> dict[int, dict]:
        rows = listed(read_json(path), kind, path)
        return {get(row, "id", int, where): row for where, row in rows if get(row, "active", bool, where)}

    rows = load(path)
    if all(kind.removesuffix("s") in row for row in rows.values()):
        return rows
    all_path = path.with_name(f"all_{kind}.json")
    all_rows = load(all_path)
    return {key: active_row(all_rows, key, all_path) for key in rows}


def active_row(rows: dict[int, dict], key: object, path: Path) -> dict:
    if not isinstance(key, int) or key not in rows:
        raise ValueError(f"{path}: no active row with id {key}; do the files belong together?")
    return rows[key]


def read_rsvqa(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """Questions and answers in a file each, joined by id; every question has exactly one answer."""
    questions_path = root / corpus.file.replace("{split}", split).replace("{kind}", "questions")
    answers_path = root / corpus.file.replace("{split}", split).replace("{kind}", "answers")
    questions = active_rows(questions_path, "questions")
    answers = active_rows(answers_path, "answers")
    for number, row in questions.items():
        where = f"{questions_path}: question {number}"
        answer_ids = get(row, "answers_ids", list, where)
        if len(answer_ids) != 1:
            raise ValueError(f"{where}: expected one answer, found {len(answer_ids)}; this is not the published layout")
        answer = get(active_row(answers, answer_ids[0], answers_path), "answer", str, where).strip()
        if not corpus.raw_answers:
            answer = bucket(answer, counts=corpus.name == "rsvqa-lr")
        record_id = f"{corpus.name}-{split}-{number}"
        text = prompt("question", record_id, question=get(row, "question", str, where).strip())
        image = f"{corpus.images}{get(row, 'img_id', int, where)}.tif"
        yield record(record_id, image, text, answer, type=get(row, "type", str, where))


def read_fit_benchmark(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """FIT-RSFG lines. Captions: `question`, one reference. Questions: `text` with its answer format, `category`."""
    captions = corpus.name == "fit-rsfg-captions"
    for number, (where, row) in enumerate(read_json_lines(root / corpus.file)):
        text = get(row, "question" if captions else "text", str, where).removeprefix("<image>").strip()
        answer = get(row, "ground_truth", str, where).strip()
        extra = {"references": [answer]} if captions else {"type": get(row, "category", str, where)}
        yield record(f"{corpus.name}-{number}", corpus.images + get(row, "image", str, where), text, answer, **extra)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations

def read_llava(corpus: Corpus, root: Path, split: str) -> Iterator[dict]:
    """A list of {"image", "conversations"}; rows without "image" are text only and stay so.

    Ids are row numbers, as published ids may repeat. `<image>` moves to the front of the first turn.
    """
    path = root / corpus.file
    for number, row in enumerate(expect(read_json(path), list, str(path))):
        where = f"{path}: row {number}"
        turns = llava_turns(row, where)
        out = {"id": f"{corpus.name}-{number}"}
        if row.get("image") is not None:
            out["image"] = corpus.images + get(row, "image", str, where)
            for turn in turns[:1]:      # none at all is for data.py check to report
                turn["value"] = IMAGE_SLOT + turn["value"].replace("<image>", "").strip()
        yield {**out, "conversations": turns}


# ---------------------------------------------------------------------------------------------------------------------
# The table of corpora, and mixes of them

ALL = ("train", "val", "test")
FIT = "FIT-RS_Instruction/"
FIT_TASK = FIT + "train_data_of_each_individual_task/train_instruction_"
FIT_BENCH = "FIT-RSFG/FIT-RSFG-Bench/test_FITRS_"
FIT_IMAGES = "imgv2_split_512_100_vaild/"       # sic
OSPREY = "Osprey-724K/osprey_"
COCO_IMAGES = "coco/imgs/"

CORPORA = {
    "rsicd": Corpus(read_karpathy, "dataset_rsicd.json", ALL, "RSICD_images/"),
    "ucm": Corpus(read_karpathy, "dataset.json", ALL, "imgs/"),
    "sydney": Corpus(read_karpathy, "dataset.json", ALL, "imgs/"),
    "rsitmd": Corpus(read_karpathy, "dataset_RSITMD.json", ("train", "test"), "images/"),
    "nwpu": Corpus(read_nwpu, "dataset_nwpu.json", ALL, "NWPU_images/"),
    "capera": Corpus(read_capera, "CapERA_DATASET_{split}.json", ("train", "test")),
    "whu-rs19": Corpus(read_scene_folders, "<Class>/*.jpg"),
    "rsvqa-lr": Corpus(read_rsvqa, "LR_split_{split}_{kind}.json", ALL, "Images_LR/"),
    "rsvqa-hr": Corpus(read_rsvqa, "USGS_split_{split}_{kind}.json", (*ALL, "test_phili"), "Data/"),
    "fit-rs": Corpus(read_llava, FIT + "FIT-RS-train-1415k.json", images=FIT_IMAGES),
    "fit-rs-captions": Corpus(read_llava, FIT_TASK + "imagecaption_65k.json", images=FIT_IMAGES),
    "fit-rs-classes": Corpus(read_llava, FIT_TASK + "imageclassification_130k.json", images=FIT_IMAGES),
    "fit-rs-multiturn": Corpus(read_llava, FIT_TASK + "multiturn_50k.json", images=FIT_IMAGES),
    "fit-rs-regions": Corpus(read_llava, FIT_TASK + "regioncaption_72k.json", images=FIT_IMAGES),
    "fit-rs-vqa": Corpus(read_llava, FIT_TASK + "vqa_400k.json", images=FIT_IMAGES),
    "fit-rsfg-captions": Corpus(read_fit_benchmark, FIT_BENCH + "image_caption_eval.jsonl", ("val",), FIT_IMAGES),
    "fit-rsfg-vqa": Corpus(read_fit_benchmark, FIT_BENCH + "vqa_eval.jsonl", ("val",), FIT_IMAGES),
    "geochat": Corpus(read_llava, "GeoChat_Instruct.json"),
    "llava": Corpus(read_llava, "llava_v1_5_mix665k.json"),
    "coco-masks": Corpus(read_coco, "annotations/instances_{split}2017.json", ("train", "val")),
    "osprey": Corpus(read_osprey, OSPREY + "conversations.json", images=COCO_IMAGES, type="region conversation"),
    "osprey-details": Corpus(read_osprey, OSPREY + "detail_description.json", images=COCO_IMAGES, type="region detail"),
    "osprey-short": Corpus(read_osprey, OSPREY + "short_form.json", images=COCO_IMAGES, type="region short answer"),
    "osprey-parts": Corpus(read_osprey, OSPREY + "part_level.json", images=COCO_IMAGES, type="region part"),
    "osprey-presence": Corpus(read_osprey, OSPREY + "lvis_positive_negative.json", images=COCO_IMAGES,
                              type="region presence"),
    "osprey-questions": Corpus(read_osprey, "description/questions.json", ("test",), COCO_IMAGES,
                               "region detail"),
}

# The papers' mixes: train splits only, from a sub-folder of --root a corpus, in a seeded order.
FIT_PARTS = ("fit-rs-captions", "fit-rs-classes", "fit-rs-multiturn", "fit-rs-regions", "fit-rs-vqa")
MIXES = {
    # Aquila Sec. 4.1.1, about 1 M image-text pairs.
    "align": ("capera", "ucm", "sydney", "nwpu", "rsicd", "rsitmd", "rsvqa-hr", "rsvqa-lr", "whu-rs19"),
    # Sec. 4.1.1 says "up to 1.8 million" of FIT-RS; the published training file has 1,415 k.
    # ASSUMPTION: the files of single tasks are parts of that file, so they are read only where it is absent.
    "instruct": ("fit-rs", *FIT_PARTS),
}
# Benchmarks over the pictures of another corpus, in the same folder; besides these a corpus's own val and test count.
BENCHMARKS_OF = dict.fromkeys(MIXES["instruct"], ("fit-rsfg-captions", "fit-rsfg-vqa"))


# ---------------------------------------------------------------------------------------------------------------------
# The whole of a corpus or a mix

def records(name: str, root: str | Path, split: str = "train", file: str | None = None,
            raw_answers: bool = False, per_image: int = 20) -> Iterator[dict]:
    """Records of one split, in the published order. The last three are the command line's flags."""
    if name not in CORPORA:
        raise ValueError(f"unknown corpus '{name}'; known: {', '.join([*CORPORA, *MIXES])}")
    corpus = replace(CORPORA[name], name=name, raw_answers=raw_answers, per_image=per_image)
    if split not in corpus.splits:
        raise ValueError(f"{name} has no split '{split}'; it has: {', '.join(corpus.splits)}")
    if file is not None:
        if "{kind}" in corpus.file or "*" in corpus.file:
            raise ValueError(f"--file {file}: {name} is read from several files, {corpus.file}; leave the flag out")
        corpus = replace(corpus, file=file)
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"--root {root}: no such folder")
    return corpus.read(corpus, root, split)


def mix_records(mix: str, root: Path, raw_answers: bool) -> Iterator[dict]:
    """Train records of every corpus of the mix that is under root; prints a row of the table as each one ends.

    Records whose image also occurs in a val or test split, or in a benchmark over the same pictures, are dropped. Only
    paths can be compared here: a picture that two corpora hold under different names goes unseen.
    """
    print(f"{'corpus':19}{'records':>10}{'images':>10}{'dropped':>9}  (their image is in val or test) checked against")
    read = set()
    for name in MIXES[mix]:
        folder = "fit-rs" if name in MIXES["instruct"] else name
        if name in FIT_PARTS and "fit-rs" in read:
            print(f"{name:19}{'-':>10}  part of fit-rs")
            continue
        count, dropped, images = 0, 0, set()
        held_out, checked = held_out_images(name, root / folder)
        try:
            for row in records(name, root / folder, raw_answers=raw_answers):
                if row.get("image") in held_out:
                    dropped += 1
                    continue
                if "image" in row:
                    row["image"] = f"{folder}/{row['image']}"
                    images.add(row["image"])
                count += 1
                yield row
        except FileNotFoundError as error:
            print(f"{name:19}{'absent':>10}  {error}")
            continue
        read.add(name)
        print(f"{name:19}{count:>10,}{len(images):>10,}{dropped:>9,}  {', '.join(checked) or 'nothing'}")


def held_out_images(name: str, root: Path) -> tuple[set[str], list[str]]:
    """Images of the splits and benchmarks on which nothing may be trained, and which of these were there to read."""
    images, checked = set(), []
    for other in (name, *BENCHMARKS_OF.get(name, ())):
        for split in CORPORA[other].splits:
            try:
                found = {row["image"] for row in records(other, root, split)} if split != "train" else set()
            except FileNotFoundError:
                continue
            if found:
                images |= found
                checked.append(split if other == name else other)
    return images, checked


def write(rows: Iterator[dict], out: Path, label: str, shuffle: bool = False) -> tuple[Counter, int]:
    """Write all or nothing; returns how many records have each type, and the number of different images."""
    if not out.parent.is_dir() or out.is_dir():
        raise FileNotFoundError(f"--out {out}: expected a file name in a folder that exists")
    ids, images, types = set(), set(), Counter()
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                if row["id"] in ids:
                    raise ValueError(f"{label}: record {row['id']} comes twice; are two copies merged in one file?")
                ids.add(row["id"])
                images.add(row.get("image"))
                types[" ".join([row.get("type", ""), row.get("sampling", "")]).strip()] += 1
                file.write(json.dumps(row) + "\n")
        if not ids:
            raise ValueError(f"{label}: no record of this split in the files under --root; nothing was written")
        if shuffle:
            lines = temporary.read_text(encoding="utf-8").splitlines(keepends=True)
            random.Random(0).shuffle(lines)
            temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return types, len(images - {None})


def build_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:19}{', '.join(c.splits):30}{c.file}" for name, c in CORPORA.items())
    mixes = "\n".join(f"  {name:19}{', '.join(names)}" for name, names in MIXES.items())
    shares = "\n".join(f"  {kind:19}{share:3} %" for kind, share in SHARES.items())
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog="corpora, their splits, and their files under --root ({kind}: questions and answers):\n" + listing
        + "\n\nmixes of train splits; --root holds a sub-folder a corpus, under its name here (FIT-RS and its "
        "benchmarks: fit-rs/),\nimage paths then start from --root; corpora that are not there are listed as absent:\n"
        + mixes
        + "\n\ncoco-masks, any COCO instance file; share of each type of record:\n" + shares)
    parser.add_argument("name", metavar="NAME", help="corpus or mix, from the lists below")
    parser.add_argument("--root", required=True, metavar="DIR", help="folder of the data set as published (required)")
    parser.add_argument("--split", default="train", help="one of the corpus's splits; test_phili is RSVQA-HR's second "
                        "test set, a city unseen in training, on which GeoChat and others report (default: train)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl", help="the file to write (required)")
    parser.add_argument("--file", help="read this file under --root, not the published one (default: see the list)")
    parser.add_argument("--raw-answers", action="store_true", help="RSVQA: keep counts and areas as written, \"37\" or "
                        "\"512m2\", instead of the authors' classes such as \"between 10 and 100\" (default: off)")
    parser.add_argument("--limit-per-image", type=int, default=20, metavar="N", help="coco-masks: records of an image, "
                        f"at most; never more than {PER_REGION} times its regions (default: 20)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    label = f"{args.name} {args.split}"
    try:
        if args.name not in MIXES:
            rows = records(args.name, args.root, args.split, args.file, args.raw_answers, args.limit_per_image)
        elif args.split != "train" or args.file:
            raise ValueError(f"{args.name} takes the train splits as published; leave --split and --file out")
        else:
            rows = mix_records(args.name, Path(args.root), args.raw_answers)
        types, images = write(rows, args.out, label, shuffle=args.name in MIXES)
    except (ValueError, OSError) as error:
        parser.exit(2, f"corpora.py: {error}\n")
    print(f"{label}: {types.total():,} records, {images:,} images -> {args.out}")
    for name, count in sorted(types.items()) if "" not in types else ():
        print(f"  {name:30}{count:>10,}{100 * count / types.total():7.1f} %")


if __name__ == "__main__":
    main()
