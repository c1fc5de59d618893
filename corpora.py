"""Published data sets -> our JSONL: LLaVA's records, one a line (Aquila Sec. 4.1, Table 1).

    python corpora.py rsicd --root RSICD --split train --out rsicd.jsonl

`--root` is the folder as its authors publish it; `--help` lists every corpus with the files it expects.
Captions: in train one line a caption (an image that repeats a caption keeps every copy: the papers count image-text
pairs), in val and test one line an image with all its captions in `references`. The text is the published `raw` string,
stripped at both ends. Questions: one line each with their `type`. No image is opened here: `data.py check` does that.
"""

import argparse
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

IMAGE_SLOT = "<image>\n"

# Every wording of every task. A record takes the one its id hashes to, so a corpus always converts to the same bytes.
# The papers print only the closing sentence of the question prompt; the caption and scene wordings are ours.
PROMPTS = {
    "caption": (
        "Describe this image in one sentence.",
        "Write a short caption for this aerial image.",
        "What does this remote sensing image show? Answer in one sentence.",
        "Summarize the content of the image in one sentence.",
        "Give a brief description of this satellite image.",
    ),
    "scene": (
        "What kind of scene is this?",
        "Name the scene class of this aerial image.",
        "Which type of land use or place does the image show?",
    ),
    "question": ("{question}\nAnswer the question using a single word or phrase.",),
}
SCENE_TEXT = "a remote sensing image of the scene class {name}"


@dataclass(frozen=True)
class Corpus:
    """One row of the table CORPORA, with what the command line adds."""
    read: Callable[["Corpus", Path, str], Iterator[dict]]
    file: str                   # published name; {split} and {kind} (questions, answers) stand for themselves
    splits: tuple[str, ...] = ("train",)
    images: str = ""            # put before an image's name, to give its path under --root
    name: str = ""
    raw_answers: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers

def read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; --root should be the folder as published")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}; is the download damaged?") from error


def read_json(path: Path) -> object:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not whole JSON: {error.msg} at line {error.lineno} column {error.colno} (character "
                         f"{error.pos}); is the download cut off?") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) for every line; `where` is for error messages."""
    for number, line in enumerate(read_text(path).rstrip().split("\n"), start=1):
        where = f"{path}: line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not whole JSON: {error.msg} at column {error.colno}") from error


def expect(value: object, kind: type, where: str):
    if not isinstance(value, kind):
        found = "nothing" if value is None else type(value).__name__
        raise ValueError(f"{where} should be {kind.__name__}, found {found}; this is not the published layout")
    return value


def get(row: object, key: str, kind: type, where: str):
    """`row[key]`, or one line that says which row of which file lacks it."""
    return expect(row.get(key) if isinstance(row, dict) else None, kind, f"{where}: '{key}'")


def prompt(task: str, record_id: str, **fields: str) -> str:
    wordings = PROMPTS[task]
    return wordings[zlib.crc32(record_id.encode()) % len(wordings)].format(**fields)  # hash() differs from run to run


def record(record_id: str, image: str, question: str, answer: str, **extra: object) -> dict:
    turns = [{"from": "human", "value": IMAGE_SLOT + question}, {"from": "gpt", "value": answer}]
    return {"id": record_id, "image": image, "conversations": turns, **extra}


def caption_records(corpus: Corpus, split: str, key: str, image: str, captions: list[str]) -> Iterator[dict]:
    """Train: one record a caption. Val and test: one an image, answered by its first. Empty captions are left out."""
    captions = [caption.strip() for caption in captions]
    image_id = f"{corpus.name}-{key}"
    if split == "train":
        for number, caption in enumerate(captions):
            record_id = f"{image_id}-{number}"
            if caption:
                yield record(record_id, corpus.images + image, prompt("caption", record_id), caption)
    elif any(captions):
        references = [caption for caption in captions if caption]
        yield record(image_id, corpus.images + image, prompt("caption", image_id), references[0], references=references)


# ---------------------------------------------------------------------------------------------------------------------
# Captions and scenes

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
        words = re.sub(r"(?<=[a-z])(?=[A-Z])|[_-]+", " ", folder.name).lower()
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".tif", ".tiff"}:
                image = f"{folder.name}/{path.name}"
                record_id = f"{corpus.name}-{image}"
                yield record(record_id, image, prompt("scene", record_id), SCENE_TEXT.format(name=words))


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
        rows = [(f"{path}: row {i}", row) for i, row in enumerate(get(read_json(path), kind, list, str(path)))]
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
        turns = [{key: get(turn, key, str, where) for key in ("from", "value")}
                 for turn in get(row, "conversations", list, where)]
        out = {"id": f"{corpus.name}-{number}"}
        if row.get("image") is not None:
            out["image"] = corpus.images + get(row, "image", str, where)
            for turn in turns[:1]:      # none at all is for data.py check to report
                turn["value"] = IMAGE_SLOT + turn["value"].replace("<image>", "").strip()
        yield {**out, "conversations": turns}


ALL = ("train", "val", "test")
FIT = "FIT-RS_Instruction/"
FIT_TASK = FIT + "train_data_of_each_individual_task/train_instruction_"
FIT_BENCH = "FIT-RSFG/FIT-RSFG-Bench/test_FITRS_"
FIT_IMAGES = "imgv2_split_512_100_vaild/"       # sic

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
}


# ---------------------------------------------------------------------------------------------------------------------
# The whole of a corpus

def records(name: str, root: str | Path, split: str = "train", file: str | None = None,
            raw_answers: bool = False) -> Iterator[dict]:
    """Records of one split, in the published order. `file` and `raw_answers` are the command line's."""
    if name not in CORPORA:
        raise ValueError(f"unknown corpus '{name}'; known: {', '.join(CORPORA)}")
    corpus = replace(CORPORA[name], name=name, raw_answers=raw_answers)
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


def write(rows: Iterator[dict], out: Path, label: str) -> tuple[int, int]:
    """Write all or nothing; returns the numbers of records and of different images."""
    if not out.parent.is_dir() or out.is_dir():
        raise FileNotFoundError(f"--out {out}: expected a file name in a folder that exists")
    ids, images = set(), set()
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                if row["id"] in ids:
                    raise ValueError(f"{label}: record {row['id']} comes twice; are two copies merged in one file?")
                ids.add(row["id"])
                images.add(row.get("image"))
                file.write(json.dumps(row) + "\n")
        if not ids:
            raise ValueError(f"{label}: no record of this split in the files under --root; nothing was written")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return len(ids), len(images - {None})


def build_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:19}{', '.join(c.splits):30}{c.file}" for name, c in CORPORA.items())
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog="corpora, their splits, and their files under --root ({kind}: questions and answers):\n" + listing)
    parser.add_argument("name", metavar="NAME", help="corpus, from the list below")
    parser.add_argument("--root", required=True, metavar="DIR", help="folder of the data set as published (required)")
    parser.add_argument("--split", default="train", help="one of the corpus's splits; test_phili is RSVQA-HR's second "
                        "test set, a city unseen in training, on which GeoChat and others report (default: train)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl", help="the file to write (required)")
    parser.add_argument("--file", help="read this file under --root, not the published one (default: see the list)")
    parser.add_argument("--raw-answers", action="store_true", help="RSVQA: keep counts and areas as written, \"37\" or "
                        "\"512m2\", instead of the authors' classes such as \"between 10 and 100\" (default: off)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    label = f"{args.name} {args.split}"
    try:
        rows = records(args.name, args.root, args.split, args.file, args.raw_answers)
        count, images = write(rows, args.out, label)
    except (ValueError, OSError) as error:
        parser.exit(2, f"corpora.py: {error}\n")
    print(f"{label}: {count:,} records, {images:,} images -> {args.out}")


if __name__ == "__main__":
    main()
