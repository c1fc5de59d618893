"""
Small stand-ins for all that a user of aquila-8b fetches, in the published layouts: the weights random, the corpora of a
few built-in scenes each.

    python -m checks.stand_ins DIR

writes DIR/CLIP.safetensors as open_clip's file, DIR/Meta-Llama-3-8B-Instruct as Hugging Face's folder, and DIR/DATA
with a folder for each corpus of the papers' mixes and benchmarks. RSICD's is a link to where the user keeps it.
"""
import itertools
import json
import pathlib
import shutil

from PIL import Image

from checks.full_size import ROOT, write_clip, write_llama
from commands.arguments import Parser
from convnext import CONVNEXTS, ConvNeXt
from corpora.prompts import SHORT_ANSWER
from corpora.table import CORPORA
from llama import Llama, LlamaConfig
from toy.scenes import captions, make_scene, questions, take_turns

LM = LlamaConfig(dim=64, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=701)
SPLITS = ("train", "train", "val", "test")  # of the images of a corpus
NUMBERS = itertools.count()                 # of the scenes


def put(path, content):
    """A file, folders and all; what is not text is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------- published layouts

def karpathy(*images):
    """What RSICD, UCM, Sydney and RSITMD hold, of (file name, split, captions)."""
    rows = [{"filename": name, "imgid": i, "split": split, "sentids": list(range(len(captions))),
             "sentences": [{"tokens": ["wrong"], "raw": caption, "imgid": i, "sentid": k}
                           for k, caption in enumerate(captions)]}
            for i, (name, split, captions) in enumerate(images)]
    return {"images": rows, "dataset": "x"}


def write_rsvqa(root, prefix, split, rows, texts=True, image=7):
    """
    RSVQA's lists of a split, of (type, question, answer) about an image: index == id, inactive stubs in the places of
    other splits. Answers stand in reverse order. texts: False leaves the texts to all_questions.json, all_answers.json.
    """
    n = len(rows)
    questions = [{"id": i, "img_id": image, "type": kind, "question": question, "answers_ids": [n + 1 - i],
                  "active": True}
                 for i, (kind, question, _) in enumerate(rows, start=1)]
    answers = [{"id": i, "question_id": n + 1 - i, "answer": answer, "active": True}
               for i, (_, _, answer) in enumerate(reversed(rows), start=1)]
    for kind, content in (("questions", questions), ("answers", answers)):
        content.insert(0, {"id": 0, "active": False})
        flags = [{"id": row["id"], "active": row["active"]} for row in content]
        put(root / f"{prefix}_split_{split}_{kind}.json", {kind: content if texts else flags})
        if not texts:
            put(root / f"all_{kind}.json", {kind: content})


# ---------------------------------------------------------------------------------------------- the corpora

def picture(path):
    """Draw the next scene into a file -> the Scene."""
    scene = make_scene("train", next(NUMBERS), 0, 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(path)
    return scene


def write_captions(root):
    """RSICD, UCM, Sydney, RSITMD, NWPU and CapERA, and WHU-RS19, whose folders are all its text."""
    for name, suffix in (("rsicd", "jpg"), ("ucm", "tif"), ("sydney", "tif"), ("rsitmd", "tif")):
        images = [(f"airport_{i}.{suffix}", split) for i, split in enumerate(SPLITS)]
        put(root / name / CORPORA[name].file, karpathy(*[
            (file, split, captions(picture(root / name / CORPORA[name].images / file))) for file, split in images]))
    rows = []
    for i, split in enumerate(SPLITS):
        texts = captions(picture(root / f"nwpu/NWPU_images/airport/airport_{i}.jpg"))
        rows.append({"filename": f"airport_{i}.jpg", "split": split,
                     **dict(zip(("raw", "raw_1", "raw_2", "raw_3", "raw_4"), texts))})
    put(root / "nwpu/dataset_nwpu.json", {"airport": rows})
    for split in ("train", "test"):
        texts = captions(picture(root / f"capera/{split.capitalize()}/Harvesting_Car/Harvesting_Car_001.jpg"))
        clip = {"video_id": "Harvesting_Car_001.mp4", "annotation": {"English_caption": texts}}
        put(root / f"capera/CapERA_DATASET_{split}.json", {"ERA_caption": [clip]})
    for name in ("Airport/airport_01.jpg", "railwayStation/railwayStation_02.jpg"):
        picture(root / "whu-rs19" / name)


def write_questions(root):
    """RSVQA, and FIT-RS with its benchmarks: LLaVA's list to train on, a line a caption or a question to ask."""
    for name, prefix in (("rsvqa-lr", "LR"), ("rsvqa-hr", "USGS")):
        for i, split in enumerate(("train", "val", "test")):
            scene = picture(root / name / CORPORA[name].images / f"{i}.tif")
            write_rsvqa(root / name, prefix, split, questions(scene), image=i)
    train, described, asked = [], [], []
    for i in range(8):
        name = f"{i:04}.png"
        scene = picture(root / "fit-rs" / CORPORA["fit-rs"].images / name)
        if i < 6:
            train += [{"id": name, "image": name, "conversations": take_turns([f"<image>\n{question}", answer])}
                      for _, question, answer in questions(scene)]
            continue
        described.append({"question_id": i, "image": name, "question": "Describe the image.",
                          "ground_truth": captions(scene)[0]})
        asked += [{"question_id": i, "image": name, "text": f"{question}\n{SHORT_ANSWER}", "category": kind,
                   "ground_truth": answer} for kind, question, answer in questions(scene)]
    put(root / "fit-rs" / CORPORA["fit-rs"].file, train)
    for name, rows in (("fit-rsfg-captions", described), ("fit-rsfg-vqa", asked)):
        put(root / "fit-rs" / CORPORA[name].file, "".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------- all of it

def write(args):
    args.folder.mkdir(parents=True)
    write_clip(ConvNeXt(CONVNEXTS["tiny"]), args.folder / "CLIP.safetensors")
    llama = args.folder / "Meta-Llama-3-8B-Instruct"
    write_llama(Llama(LM), llama, shard_size=100_000)
    for name in ("tokenizer.json", "tokenizer_config.json"):                       # it has the tokens of Llama-3's chat
        shutil.copy(ROOT / "weights/tiny-llm" / name, llama)
    data = args.folder / "DATA"
    write_captions(data)
    write_questions(data)
    (data / "rsicd").rename(args.folder / "storage")
    (data / "rsicd").symlink_to("../storage")


def main():
    parser = Parser(prog="python -m checks.stand_ins", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="a new folder")
    parser.run(write)


if __name__ == "__main__":
    main()
