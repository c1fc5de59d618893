"""
How much of a caption model's score needs a language model? RSICD, asked without one, from the vision encoder alone.

    python -m checks.photographs rivals --root RSICD --vision weights/small-clip.safetensors --out runs/rivals
    python -m checks.photographs compare pred.jsonl runs/rivals/*.jsonl --root RSICD
    python -m checks.photographs picture pred.jsonl --root RSICD --out photographs.png

rivals: the frozen maps of the train photographs, mean and deviation of each channel, tell a photograph's scene class
(ridge regression; its accuracy on val is the probe) and its nearest neighbours. Two files of val captions come of it:
class-lookup.jsonl, the commonest train caption of the class so told, and neighbours.jsonl, of the captions of the 15
nearest train photographs the one most like the others (arXiv 1505.04467). compare: BLEU-1 of the first file beside each
other, with p as in checks.ladder, and how many different captions each has, and how many are train captions word for
word; NAME-0.jsonl and NAME-1.jsonl are one row, the mean of its seeds. picture: every hundredth photograph of the file
with its caption.
"""
import pathlib
import re
import textwrap
from collections import Counter

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader

from checks.ladder import difference, figures, summary
from commands.arguments import Parser, whole
from commands.progress import Progress
from convnext import load_convnext
from corpora.reading import scene_classes
from corpora.table import read_corpus
from evaluate import row_of
from files.text import check_target, write_json_lines, written_whole
from pictures.image_files import fit_image, load_image, to_tensor
from scoring.benchmarks import most_common, scene_class
from scoring.metrics import ngrams, tokenize
from scoring.scores import read_predictions

NEIGHBOURS = 15
STEP = 100                                  # of the picture


# ---------------------------------------------------------------------------------------------- without an LM

@torch.no_grad()
def features(vision, names, root, side):
    """File names -> (n, F): mean and deviation of each channel of the four maps."""
    load = lambda names: torch.stack([to_tensor(fit_image(load_image(name, root), side, "resize")) for name in names])
    found, progress = [], Progress("photographs", len(names))
    for images in DataLoader(names, batch_size=32, collate_fn=load):
        maps = [x.flatten(2) for x in vision(images)]
        found.append(torch.cat([x.mean(2) for x in maps] + [x.std(2) for x in maps], dim=1))
        progress.show(sum(map(len, found)))
    return torch.cat(found).double()


def ridge(x, y, strength):
    """x (n, F), y (n, K) -> (F, K)."""
    return torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


def tell_classes(train, classes, val):
    """The class of each val photograph by ridge regression; its strength is chosen on every tenth train photograph."""
    names = sorted(set(classes))
    true = torch.tensor([names.index(name) for name in classes])
    wanted, tenth = torch.eye(len(names), dtype=train.dtype)[true], torch.arange(len(train)) % 10 == 0
    right = lambda strength: (train[tenth] @ ridge(train[~tenth], wanted[~tenth], strength)).argmax(1) == true[tenth]
    strength = max((1.0, 10.0, 100.0, 1000.0, 10000.0), key=lambda strength: right(strength).sum())
    return [names[i] for i in (val @ ridge(train, wanted, strength)).argmax(1)]


def consensus(captions):
    """The caption that shares most words with the others: mean over them of 2 common / (its words + theirs)."""
    told = Counter(captions)
    words = {caption: ngrams(tokenize(caption), 1) for caption in told}
    like = lambda a, b: 2 * (words[a] & words[b]).total() / max(1, words[a].total() + words[b].total())
    return max(sorted(told), key=lambda a: sum(n * like(a, b) for b, n in told.items()))


def rivals(args):
    args.out.mkdir(parents=True, exist_ok=True)
    captions = {}
    for record in read_corpus("rsicd", args.root):
        captions.setdefault(record["image"], []).append(record["conversations"][1]["value"])
    val, vision = list(read_corpus("rsicd", args.root, "val")), load_convnext(args.vision).eval()
    classes = scene_classes(args.root)
    kind = lambda image: scene_class(image, "rsicd", classes)
    names = list(captions), [record["image"] for record in val]
    train, asked = (features(vision, some, args.root, args.side) for some in names)
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, asked = (train - mean) / std, (asked - mean) / std
    told = tell_classes(train, list(map(kind, captions)), asked)
    right = np.mean([kind(record["image"]) == name for record, name in zip(val, told)])
    print(f"probe: {100 * right:.1f} % of {len(val):,} val photographs' scene classes ({len(set(told))} classes)")
    commonest = most_common((kind(image), text) for image, texts in captions.items() for text in texts)
    answers = {"class-lookup": [commonest[name] for name in told]}
    unit = lambda x: x / x.norm(dim=1, keepdim=True)
    nearest, texts = (unit(asked) @ unit(train).T).topk(NEIGHBOURS).indices, list(captions.values())
    answers["neighbours"] = [consensus([text for i in near for text in texts[i]]) for near in nearest.tolist()]
    for name, said in answers.items():
        write_json_lines(args.out / f"{name}.jsonl", map(row_of, val, said))
        print(f"{name}: BLEU-1 {figures(counts(args.out / f'{name}.jsonl'))[0]:.2f} -> {args.out / name}.jsonl")


# ---------------------------------------------------------------------------------------------- files of captions

def counts(path):
    return np.array(summary(path)["scenes"])


def by_row(files):
    """Paths -> {"folder/NAME": {seed: path}}, where a path without "-SEED" at its end has the seed ""."""
    rows = {}
    for path in files:
        name, seed = re.fullmatch(r"(.+?)(?:-(\d+))?", str(path.with_suffix(""))).groups("")
        rows.setdefault(name, {})[seed] = path
    return rows


def compare(args):
    answers = {path: [row for _, row in read_predictions(path)] for path in args.files}
    images = {path: [row.get("image") for row in rows] for path, rows in answers.items()}
    for path in args.files:
        if images[path] != images[args.files[0]]:
            raise ValueError(f"{path}: its rows are not of the photographs of {args.files[0]}, in the same order")
    known = {record["conversations"][1]["value"].strip() for record in read_corpus("rsicd", args.root)}
    print(f"{'':34}{'seeds':>6}{'BLEU-1':>8}{'first':>8}{'p':>7}{'different':>11}{'copies':>8}")
    rows = by_row(args.files)
    found = {path: summary(path) for path in args.files}
    first = next(iter(rows.values()))
    for name, seeds in rows.items():
        said = [[row["prediction"].strip() for row in answers[path]] for path in seeds.values()]
        mean = lambda values: np.mean(list(values))
        pairs = [(found[path], found[seeds.get(seed, seeds.get(""))]) for seed, path in first.items()
                 if seed in seeds or "" in seeds]
        beside = f"{'':15}"
        if seeds is not first and pairs:
            (gain, p), _ = difference(*zip(*pairs))
            beside = f"{gain:+8.2f}{p:7.3f}"
        print(f"{name[-33:]:34}{len(seeds):6}{mean(found[path]['scores']['BLEU-1'] for path in seeds.values()):8.2f}"
              f"{beside}{mean(len(set(texts)) for texts in said):11,.0f}"
              f"{100 * mean(text in known for texts in said for text in texts):7.1f}%")


def picture(args, side=192, wide=300, high=290):
    """Five in a row, each above what was said of it and its first reference."""
    rows = [row for _, row in read_predictions(args.files[0]) if row.get("references")]
    if not rows:
        raise ValueError(f"{args.files[0]}: no captions with references to draw")
    chosen = range(0, len(rows), STEP)[:10]
    sheet = Image.new("RGB", (5 * wide, 2 * high), "white")
    pencil, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, number in enumerate(chosen):
        x, y, row = place % 5 * wide + 8, place // 5 * high + 8, rows[number]
        sheet.paste(load_image(row["image"], args.root).resize((side, side)), (x, y))
        pencil.text((x + side + 6, y), str(number), "gray", font)
        lines = textwrap.wrap(row["prediction"], 42)[:3]
        pencil.multiline_text((x, y + side + 4), "\n".join(lines), "black", font)
        said = "\n".join(textwrap.wrap(row["references"][0], 42)[:2])
        pencil.multiline_text((x, y + side + 8 + 16 * len(lines)), said, (90, 120, 90), font)
    with written_whole(args.out) as temporary:
        sheet.save(temporary, "PNG")
    print(f"wrote {args.out}: what the model says in black, the first reference in green")


def main(argv=None):
    parser = Parser(prog="python -m checks.photographs", description=__doc__)
    add = parser.add_argument
    add("what", choices=("rivals", "compare", "picture"))
    add("files", nargs="*", type=pathlib.Path, help="of evaluate.py --benchmark rsicd --split val --out FILE")
    add("--root", type=pathlib.Path, required=True, help="the folder of RSICD, as published (required)")
    add("--vision", type=pathlib.Path, help="rivals: a ConvNeXt's file")
    add("--side", type=whole(32), default=192, help="rivals: side of the pictures (default 192)")
    add("--out", type=pathlib.Path, help="rivals: folder; picture: PNG file")
    parser.run(work, argv)


def work(args):
    if (args.what == "rivals") == bool(args.files) or args.what != "compare" and not args.out:
        raise ValueError(f"{args.what}: expected " + {"rivals": "--vision and --out, no files", "compare": "files",
                                                      "picture": "one file and --out"}[args.what])
    if args.what == "rivals" and not args.vision:
        raise ValueError("rivals: give --vision, a ConvNeXt's file")
    if args.what == "picture":
        check_target(args.out)
    {"rivals": rivals, "compare": compare, "picture": picture}[args.what](args)


if __name__ == "__main__":
    main()
