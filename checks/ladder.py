"""
Does each part of the method matter? The four rows of Table 5 and the method with one thing changed, trained alike with
several seeds on the built-in scenes and asked about unseen ones.

    python -m checks.ladder --seeds 3                  # trains what checks/ladder.jsonl lacks, two runs at a time
    python -m checks.ladder --seeds 3 --only concat,whole
    python -m checks.ladder --table --figure ladder.png        # of the runs that are there

A run is README's at half its length: both stages of the tiny preset with their own recipes, over half of the records
(--epochs 0.5; 1 is README's run), one process and one thread; then captions and questions of 300 scenes, of the method
with a gray picture, too. All runs share a folder of the frozen encoder's maps. A run that was cut off goes on.

Each row stands beside the one that it is compared with: the difference, and p, twice the share of bootstrap samples
whose difference is zero or has the other sign, at least 0.001 (seeds and scenes are drawn with replacement, the same
for both rows). With few seeds p says little of other seeds. The table is of runs of one length and one number of
scenes, on the weights in weights/ and with today's recipe; others in the file of results are left alone.
"""
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from commands.arguments import Parser, real, whole
from commands.samples import BUILT_IN
from files.text import check_target, file_digest, read_json_lines, written_whole
from scoring.metrics import brevity_penalty, closest_length, largest_counts, ngrams, same_answer, tokenize
from scoring.scores import score
from train import RECIPES

HERE = pathlib.Path(__file__).resolve().parent
Row = namedtuple("Row", "says beside variant flags", defaults=("whole", ""))       # flags: of stage 1
CONCAT = "--integration concat"
ROWS = {
    "concat": Row("baseline", None, "whole", f"{CONCAT} --mda-layers none"),
    "concat-mda": Row("baseline + MDA", "concat", "whole", CONCAT),
    "sfi": Row("SFI", "concat", "whole", "--mda-layers none"),
    "whole": Row("SFI + MDA: the method", "sfi"),
    # SFI of one cell a query: its softmax is 1, so W_O (Q + W_V x) is what is left.
    "projector": Row("the coarsest map alone, no MDA: a projector", "concat", "only-32", "--mda-layers none"),
    "one-cell": Row("baseline + MDA of one cell a query", "concat", "one-cell", CONCAT),
    **{name: Row(says, "whole", name) for name, says in {
        "no-look": "MDA with the pyramid set to zero", "without-4": "without the map of stride 4",
        "without-8": "without stride 8", "without-16": "without stride 16", "without-32": "without stride 32",
        "only-4": "the map of stride 4 alone", "only-8": "stride 8 alone", "only-16": "stride 16 alone",
        "only-32": "stride 32 alone",
        "keys-only": "cells' position codes in keys only",
        "learned-places": "learned places in the window, no cell codes", "no-norms": "none of the three norms",
        "no-norm-before": "no norm before the projectors", "no-norm-cells": "no norm of cells",
        "no-norm-queries": "no norm of queries", "heads-1": "1 head", "heads-16": "16 heads",
        "bare": "none of the three norms, 1 head"}.items()},
    # MDA after layer i is MDA before layer i + 1; after the last, nothing reads image positions. So this row is both.
    "mda-after": Row("MDA after layers instead of before; not before layer 0", "whole", "whole", "--mda-layers 1,2,3"),
    "mda-two": Row("MDA before layers 0 and 2", "whole", "whole", "--mda-layers 0,2"),
}
TYPES = ("color", "comparison", "count", "land cover", "position", "presence")


# ---------------------------------------------------------------------------------------------- runs

def train_and_ask(name, seed, args):
    """One run in processes of one thread -> its row for the results file."""
    row, folder, began = ROWS[name], args.out / f"{name}-{seed}", time.time()
    folder.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-m", "checks.variants", "--maps", args.out / "maps", row.variant]
    length = ["--steps", args.steps] if args.steps else ["--epochs", args.epochs]
    train = [*program, "train.py", "--micro", 8, "--seed", seed, *length, "--resume", "auto", "--stage"]
    with open(folder / "said.txt", "a") as said:
        def call(*command):
            done = subprocess.run(list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=HERE.parent,
                                  stdout=said, stderr=said)
            if done.returncode:
                raise ValueError(f"{name}, seed {seed}: exit code {done.returncode}; the last lines of "
                                 f"{folder / 'said.txt'} say why")

        call(*train, 1, *row.flags.split(), "--out", folder / "stage1")
        call(*train, 2, "--init-from", folder / "stage1", "--out", folder / "stage2")
        trained = time.time() - began
        ask = [*program, "evaluate.py", "--model", folder / "stage2", "--scenes", args.scenes, "--overwrite", "--out"]
        call(*ask, folder / "said.jsonl")
        if name == "whole":
            call(*ask, folder / "blind.jsonl", "--blind")
    blind = {"blind": summary(folder / "blind.jsonl")["scores"]} if name == "whole" else {}
    return {"row": name, "seed": seed, "basis": basis(args), "seconds": round(trained),
            **summary(folder / "said.jsonl"), **blind}


def basis(args):
    """What all runs of a table share: vision encoder, LM, recipe and records, and the length of both stages."""
    files, recipe = ("tiny-clip.safetensors", "tiny-llm/model.safetensors"), (RECIPES["tiny"], BUILT_IN["aquila"])
    told = hashlib.sha256(repr(recipe).encode()).hexdigest()
    length = f"{args.steps} steps" if args.steps else f"{args.epochs:g}"
    return " ".join([*(file_digest(HERE.parent / "weights" / name)[:8] for name in files), told[:8], length])


def summary(path):
    """Scores, and what a bootstrap over scenes needs: per scene its right answers and how many were asked, and BLEU-1's
    counts of its caption: words that are right, words, words of the closest reference."""
    rows = [row for _, row in read_json_lines(path)]
    kept, scenes = ("BLEU-1", "BLEU-4", "CIDEr", "accuracy", *TYPES), {}
    for row in rows:
        right, asked, *words = scenes.setdefault(row["image"], [0, 0, 0, 0, 0])
        if "references" in row:
            tokens, answers = tokenize(row["prediction"]), [tokenize(text) for text in row["references"]]
            words = [(ngrams(tokens, 1) & largest_counts(answers, 1)).total(), len(tokens),
                     closest_length(len(tokens), answers)]
        else:
            right, asked = right + same_answer(row["prediction"], row["answer"]), asked + 1
        scenes[row["image"]] = [int(right), asked, *words]
    scores = score(rows)
    return {"scores": {name: round(scores[name][0], 2) for name in kept if name in scores},
            "scenes": list(scenes.values())}


def run_all(args):
    done, lock = {(run["row"], run["seed"]) for run in read_runs(args)}, Lock()
    wanted = [(name, seed) for seed in range(args.seeds) for name in args.only if (name, seed) not in done]

    def one(task):
        found = train_and_ask(*task, args)
        with lock, open(args.results, "a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{task[0]}, seed {task[1]}: {found['seconds']} s, {found['scores']}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(one, wanted))
        except KeyboardInterrupt:           # the runs have had it, too, and have saved
            raise ValueError("interrupted; the same command goes on from the last saved steps") from None


def read_runs(args):
    rows, wanted = read_json_lines(args.results) if args.results.exists() else (), basis(args)
    return [run for _, run in rows if run.get("basis") == wanted and len(run["scenes"]) == args.scenes]


# ---------------------------------------------------------------------------------------------- the table

def figures(counts):
    """(..., scenes, 5) counts of `summary` -> BLEU-1 and accuracy in percent, (...,) each."""
    right, asked, words, said, closest = np.moveaxis(counts.sum(-2).astype(float), -1, 0)
    penalty = np.vectorize(brevity_penalty)(said, closest)
    return 100 * penalty * words / np.maximum(said, 1), 100 * right / np.maximum(asked, 1)


def difference(runs, base, samples=2000):
    """Two lists of runs of the same seeds -> for BLEU-1 and accuracy: the mean difference, and p."""
    a, b = (np.array([run["scenes"] for run in some]) for some in (runs, base))    # (seeds, scenes, 5)
    rng, (seeds, scenes) = np.random.default_rng(0), a.shape[:2]
    drawn = []
    for _ in range(samples):
        pick = np.ix_(rng.integers(0, seeds, seeds), rng.integers(0, scenes, scenes))
        drawn.append([(x - y).mean() for x, y in zip(figures(a[pick]), figures(b[pick]))])
    mean = [(x - y).mean() for x, y in zip(figures(a), figures(b))]
    wrong = [np.mean(np.sign(m) * column <= 0) for m, column in zip(mean, np.array(drawn).T)]
    return [(m, min(1.0, 2 * max(w, 1 / samples))) for m, w in zip(mean, wrong)]


def table(runs):
    by_row = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        by_row.setdefault(run["row"], {})[run["seed"]] = run
    columns = ("BLEU-1", "accuracy", *TYPES)
    print("| row | seeds | " + " | ".join(columns) + " | compared with | Δ BLEU-1 | p | Δ accuracy | p |")
    print("|---|" + "--:|" * (1 + len(columns)) + "---|" + "--:|" * 4)
    for name, row in ROWS.items():
        if name not in by_row:
            continue
        own, cells = by_row[name], []
        for column in columns:
            values = [run["scores"].get(column, np.nan) for run in own.values()]          # of few scenes none has some
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 and column in columns[:2] else ""
            cells.append(f"{np.mean(values):.1f}{spread}")
        cells.append(row.beside or "")
        common = [seed for seed in own if seed in by_row.get(row.beside, ())]
        if common:
            for mean, p in difference([own[s] for s in common], [by_row[row.beside][s] for s in common]):
                cells += [f"{mean:+.1f}", f"{p:.3f}"]
        print(f"| {row.says} (`{name}`) | {len(own)} | " + " | ".join(cells) + " |")
    blind = [run["blind"] for run in runs if "blind" in run]
    if blind:
        means = " | ".join(f"{np.mean([scores.get(column, np.nan) for scores in blind]):.1f}" for column in columns)
        print(f"| the method, shown a gray picture | {len(blind)} | {means} |")


def draw(runs, path, width=760, step=34):
    """A line a row: a dot for each seed's accuracy (blue) and BLEU-1 (orange), a bar at their mean."""
    names = [name for name in ROWS if any(run["row"] == name for run in runs)]
    values = [run["scores"][key] for run in runs for key in ("accuracy", "BLEU-1")]
    low, high, left = 5 * np.floor(min(values) / 5), 5 * np.ceil(max(values) / 5), 330
    image = Image.new("RGB", (width, step * (len(names) + 2)), "white")
    pencil, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    x = lambda value: left + (width - left - 30) * (value - low) / (high - low)
    for tick in np.arange(low, high + 1, 5):
        pencil.line([(x(tick), 0), (x(tick), step * (len(names) + 0.6))], fill=(225, 225, 225))
        pencil.text((x(tick) - 8, step * (len(names) + 0.7)), f"{tick:.0f}", "black", font)
    for place, name in enumerate(names):
        y = step * (place + 0.5)
        pencil.text((6, y - 9), ROWS[name].says, "black", font)
        for key, color, shift in (("accuracy", (0, 114, 178), -5), ("BLEU-1", (230, 159, 0), 5)):
            scores = [run["scores"][key] for run in runs if run["row"] == name]
            for value in scores:
                pencil.ellipse([x(value) - 3, y + shift - 3, x(value) + 3, y + shift + 3], fill=color)
            pencil.line([(x(np.mean(scores)), y + shift - 7), (x(np.mean(scores)), y + shift + 7)], fill=color, width=3)
    pencil.text((6, step * (len(names) + 0.7)), "accuracy (blue), BLEU-1 (orange)", "black", font)
    with written_whole(path) as temporary:
        image.save(temporary, "PNG")


def main():
    parser = Parser(prog="python -m checks.ladder", description=__doc__)
    add = parser.add_argument
    add("--seeds", type=whole(1, 100), default=3, metavar="N", help="seeds 0 to N-1 (default 3)")
    add("--only", type=lambda text: text.split(","), default=list(ROWS)[:4], metavar="ROWS",
        help=f"default: the first four of {', '.join(ROWS)}")
    add("--scenes", type=whole(1), default=300, help="of the test split (default 300)")
    add("--steps", type=whole(1), help="of each stage, for a short try with its own --out and --results")
    add("--epochs", type=real(1e-3, 10), default=0.5, help="of each stage (default 0.5)")
    add("--jobs", type=whole(1, 100), default=2, help="runs at a time (default 2)")
    add("--out", type=pathlib.Path, default="runs/ladder", help="folder of runs of one length (default runs/ladder)")
    add("--results", type=pathlib.Path, default=HERE / "ladder.jsonl", help="file of results (default: the committed)")
    add("--table", action="store_true", help="train nothing, print the table of the results")
    add("--figure", type=pathlib.Path, help="draw the results into this PNG")
    parser.run(work)


def work(args):
    unknown = [name for name in args.only if name not in ROWS]
    if unknown:
        raise ValueError(f"--only {unknown[0]!r}: expected some of {', '.join(ROWS)}")
    if args.figure:
        check_target(args.figure)
    if not args.table:
        run_all(args)
    runs = read_runs(args)
    if not runs:
        raise ValueError(f"{args.results} holds no run of this length with these weights yet; leave --table out")
    table(runs)
    if args.figure:
        draw(runs, args.figure)


if __name__ == "__main__":
    main()
