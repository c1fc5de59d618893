"""
The table of all corpora, and the papers' mixes of them. A new corpus is one reader, if none fits, and one row in
CORPORA. A reader is called as read(corpus, root, split), corpus being its row, and yields records in the published
order. No image is opened: `python data.py check` does that.
"""
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from corpora.captions import read_capera, read_karpathy, read_nwpu, read_scene_folders
from corpora.coco import read_coco
from corpora.conversations import read_llava, read_osprey
from corpora.photo_questions import read_photo_questions
from corpora.questions import read_fit_benchmark, read_rsvqa
from corpora.reading import published_file


@dataclass(frozen=True)
class Corpus:
    read: Callable
    file: str                               # published name; {kind} is "questions" and "answers"
    splits: tuple = ("train",)
    images: str = ""                        # put before an image's name, to give its path under --root
    type: str = ""                          # of its records, where the rows do not tell
    name: str = ""                          # this and what follows is filled in by read_corpus
    raw_answers: bool = False
    per_image: int = 0


ALL = ("train", "val", "test")
FIT = "FIT-RS_Instruction/"
FIT_TASK = FIT + "train_data_of_each_individual_task/train_instruction_"
FIT_BENCH = "FIT-RSFG/FIT-RSFG-Bench/test_FITRS_"
FIT_IMAGES = "imgv2_split_512_100_vaild/"                                          # sic
OSPREY = "Osprey-724K/osprey_"
COCO = "coco/imgs/"

CORPORA = {
    "rsicd": Corpus(read_karpathy, "dataset_rsicd.json", ALL, "RSICD_images/"),
    "rsicd-questions": Corpus(read_photo_questions, "dataset_rsicd.json", ALL, "RSICD_images/"),
    "ucm": Corpus(read_karpathy, "dataset.json", ALL, "imgs/"),
    "sydney": Corpus(read_karpathy, "dataset.json", ALL, "imgs/"),
    "rsitmd": Corpus(read_karpathy, "dataset_RSITMD.json", ("train", "test"), "images/"),
    "nwpu": Corpus(read_nwpu, "dataset_nwpu.json", ALL, "NWPU_images/"),
    "capera": Corpus(read_capera, "CapERA_DATASET_{split}.json", ("train", "test")),
    "whu-rs19": Corpus(read_scene_folders, "<Class>/*.jpg"),
    "rsvqa-lr": Corpus(partial(read_rsvqa, count_classes=True), "LR_split_{split}_{kind}.json", ALL, "Images_LR/"),
    "rsvqa-hr": Corpus(read_rsvqa, "USGS_split_{split}_{kind}.json", (*ALL, "test_phili"), "Data/"),
    "fit-rs": Corpus(read_llava, FIT + "FIT-RS-train-1415k.json", images=FIT_IMAGES),
    "fit-rs-captions": Corpus(read_llava, FIT_TASK + "imagecaption_65k.json", images=FIT_IMAGES),
    "fit-rs-classes": Corpus(read_llava, FIT_TASK + "imageclassification_130k.json", images=FIT_IMAGES),
    "fit-rs-multiturn": Corpus(read_llava, FIT_TASK + "multiturn_50k.json", images=FIT_IMAGES),
    "fit-rs-regions": Corpus(read_llava, FIT_TASK + "regioncaption_72k.json", images=FIT_IMAGES),
    "fit-rs-vqa": Corpus(read_llava, FIT_TASK + "vqa_400k.json", images=FIT_IMAGES),
    "fit-rsfg-captions": Corpus(partial(read_fit_benchmark, captions=True), FIT_BENCH + "image_caption_eval.jsonl",
                                ("val",), FIT_IMAGES),
    "fit-rsfg-vqa": Corpus(read_fit_benchmark, FIT_BENCH + "vqa_eval.jsonl", ("val",), FIT_IMAGES),
    "geochat": Corpus(read_llava, "GeoChat_Instruct.json"),
    "llava": Corpus(read_llava, "llava_v1_5_mix665k.json"),
    "coco-masks": Corpus(read_coco, "annotations/instances_{split}2017.json", ("train", "val")),
    "osprey": Corpus(read_osprey, OSPREY + "conversations.json", images=COCO, type="region conversation"),
    "osprey-details": Corpus(read_osprey, OSPREY + "detail_description.json", images=COCO, type="region detail"),
    "osprey-short": Corpus(read_osprey, OSPREY + "short_form.json", images=COCO, type="region short answer"),
    "osprey-parts": Corpus(read_osprey, OSPREY + "part_level.json", images=COCO, type="region part"),
    "osprey-presence": Corpus(read_osprey, OSPREY + "lvis_positive_negative.json", images=COCO, type="region presence"),
    "osprey-questions": Corpus(read_osprey, "description/questions.json", ("test",), COCO, "region detail"),
}

# The papers' mixes: train splits only, each corpus from its folder_of, in a seeded order.
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


def folder_of(name):
    """
    Where a corpus lies when --root holds several, for a mix and for `evaluate.py --benchmark all`: in a sub-folder of
    its name; FIT-RS, its parts and its benchmarks, which are over the same pictures, all in fit-rs.
    """
    return "fit-rs" if name.startswith("fit-rs") else name


def read_corpus(name, root, split="train", file=None, raw_answers=False, per_image=20):
    """
    Yields the records of one split. file: read this one under root instead; raw_answers: RSVQA's counts and areas as
    written, not by class; per_image: coco-masks: records of an image at most. What is not there: FileNotFoundError.
    """
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}; expected one of {', '.join([*CORPORA, *MIXES])}")
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


def files_of(name, root, split):
    """The published files that the records of a split are read from."""
    kinds = ("questions", "answers") if "{kind}" in CORPORA[name].file else ("",)
    return [published_file(CORPORA[name], Path(root), split, kind) for kind in kinds]


def read_mix(mix, root, raw_answers=False):
    """
    A list of the train records of every corpus of the mix that is under root, but for those whose image is also in a
    val or test split, or in a benchmark over the same pictures; prints a line for each corpus. Only paths are compared:
    a picture that two corpora hold under different names goes unseen.
    """
    print(f"{'corpus':19}{'records':>10}{'images':>10}{'dropped':>9}  (their image is in val or test) checked against")
    records, there = [], set()
    for name in MIXES[mix]:
        if name in FIT_PARTS and "fit-rs" in there:
            print(f"{name:19}{'-':>10}  part of fit-rs")
            continue
        folder = folder_of(name)
        held_out, checked = held_out_images(name, Path(root, folder))
        try:
            rows = list(read_corpus(name, Path(root, folder), raw_answers=raw_answers))
        except FileNotFoundError as error:
            print(f"{name:19}{'absent':>10}  {error}")
            continue
        there.add(name)
        kept = [row for row in rows if row.get("image") not in held_out]
        images = {row["image"] for row in kept if "image" in row}
        print(f"{name:19}{len(kept):>10,}{len(images):>10,}{len(rows) - len(kept):>9,}  "
              f"{', '.join(checked) or 'nothing'}")
        records += [{**row, "image": f"{folder}/{row['image']}"} if "image" in row else row for row in kept]
    random.Random(0).shuffle(records)
    return records


def held_out_images(name, root):
    """Images on which nothing may be trained, and the splits and benchmarks with some that were there to read."""
    images, checked = set(), []
    for other in (name, *BENCHMARKS_OF.get(name, ())):
        for split in CORPORA[other].splits:
            try:
                found = {row["image"] for row in read_corpus(other, root, split)} if split != "train" else set()
            except FileNotFoundError:
                continue
            if found:
                images |= found
                checked.append(split if other == name else other)
    return images, checked
