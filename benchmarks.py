"""
The paper's benchmarks: which records are asked (its Table 1), which answers need no model, and how its Tables 3 and 4
print with our figures below theirs. evaluate.py asks and scores; nothing here needs a model.

- A figure of theirs is the paper's, not measured here, and every line of it says so.
- The best constant answer and the true class show what a number is worth: the first never looks at an image.
- Rows are predictions, as evaluate.py describes them; scores are {name: (value in percent, how many rows it counts)}.
"""
import dataclasses
import json
import pathlib
import re
from collections import Counter

import corpora
from metrics import best_constant, references_of


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A row of the paper's Table 1, and the metric of its Table 3 or 4."""
    title: str
    split: str
    metric: str


BENCHMARKS = {                              # by the name of the corpus in corpora.py
    "rsicd": Benchmark("RSICD", "test", "BLEU-1"),
    "sydney": Benchmark("Sydney", "test", "BLEU-1"),
    "ucm": Benchmark("UCM", "test", "BLEU-1"),
    "fit-rsfg-captions": Benchmark("FIT-RSFG-Captions", "val", "BLEU-1"),
    "rsvqa-lr": Benchmark("RSVQA-LR", "test", "accuracy"),
    "rsvqa-hr": Benchmark("RSVQA-HR", "test", "accuracy"),
    "fit-rsfg-vqa": Benchmark("FIT-RSFG-VQA", "val", "accuracy"),
}
# Theirs: the paper's Tables 3 and 4, columns in the order of BENCHMARKS; the baseline rows are its Table 5.
PUBLISHED = {
    "BLEU-1": {
        "LLaVA1.5-7B": (55.26, 52.21, 57.58, 15.38),
        "GeoChat": (45.86, 39.79, 44.09, 8.79),
        "RSGPT": (70.32, 82.26, 86.12, None),
        "SkySenseGPT": (None, None, None, 27.31),
        "Aquila, baseline": (None, None, None, 26.67),
        "its baseline + MDA": (None, None, None, 29.22),
        "its baseline + SFI": (None, None, None, 32.29),
        "Aquila": (74.6, 83.42, 88.25, 35.08),
    },
    "accuracy": {
        "LLaVA1.5-7B": (65.86, 53.99, 58.59),
        "GeoChat": (91.81, 70.82, 53.47),
        "RSGPT": (92.29, 92.15, None),
        "LHRS-Bot": (89.19, 92.55, None),
        "H2RSVLM": (89.12, 74.35, None),
        "SkyEyeGPT": (88.23, 86.87, None),
        "SkySenseGPT": (92.69, 82.56, 79.76),
        "Aquila, baseline": (None, None, 75.29),
        "its baseline + MDA": (None, None, 79.93),
        "its baseline + SFI": (None, None, 82.14),
        "Aquila": (92.72, 92.64, 83.87),
    },
}
CONSTANT = {"rsicd": "many buildings and some green trees are in a school"}      # one caption for every image


# ---------------------------------------------------------------------------------------------- what to ask

def benchmark_jobs(args):
    """{benchmark: (split, records, folder)}. With "all", what is not there is said and skipped."""
    everything = args.benchmark == "all"
    if args.benchmark not in (*BENCHMARKS, "all") or not args.root:
        raise ValueError(f"--benchmark {args.benchmark} --root {args.root}: expected one of {', '.join(BENCHMARKS)} or "
                         "all, and its folder")
    if everything and args.split:
        raise ValueError(f"--split {args.split} goes with one benchmark; all takes the splits of the paper's Table 1")
    jobs, left_out = {}, args.leave_out.split(",")
    for name in BENCHMARKS if everything else [args.benchmark]:
        root, split = pathlib.Path(args.root, name if everything else ""), args.split or BENCHMARKS[name].split
        if everything and not root.is_dir():
            print(f"{name}: no folder {root}, skipped")
            continue
        records = [record for record in corpora.records(name, root, split, raw_answers=args.raw_answers)
                   if record.get("type") not in left_out]
        if records:
            jobs[name] = split, records[:args.limit], root
        elif everything:
            print(f"{name}: {root} has no record of split {split}, skipped")
        else:
            raise ValueError(f"{name}: {root} has no record of split {split} (left out: {args.leave_out or 'nothing'})")
    if not jobs:
        raise ValueError(f"--root {args.root}: nothing to ask; expected sub-folders named {', '.join(BENCHMARKS)}")
    return jobs


# ---------------------------------------------------------------------------------------------- sanity

SANITY = """Without a model, so that a number can be judged:
- best constant: one answer to everything, chosen with this split's answers known: of all reference captions the one
  with the highest BLEU-1; of questions the most common answer of each type
- true class: for each image the most common caption, in the train split, of its true scene class"""


def most_common(counts):
    """Of equals the first by alphabet."""
    return min(counts, key=lambda text: (-counts[text], text))


def constant_rows(rows):
    """The best single answers: one caption for all, the most common answer of each type."""
    captions, answers = [references_of(row) for row in rows if references_of(row)], {}
    if captions:
        best, _ = best_constant(captions, sorted({text for references in captions for text in references}))
    for row in rows:
        if not references_of(row):
            answers.setdefault(row.get("type"), Counter())[row["answer"]] += 1
    return [{**row, "prediction": best if references_of(row) else most_common(answers[row.get("type")])}
            for row in rows]


def scene_class(image, benchmark, listed):
    """The class by classes.json ({file name: class}); else RSICD's airport_7.jpg; UCM has 100 numbers a class."""
    name = pathlib.Path(image).name
    letters, digits = re.match(r"([A-Za-z]*)_?(\d*)", name).groups()
    if name in listed:
        return listed[name]
    return (int(digits) - 1) // 100 if benchmark == "ucm" and digits else letters


def true_class_rows(rows, benchmark, root):
    """Rows answered with the most common train caption of the image's class; None where names tell no class."""
    if "train" not in corpora.CORPORA[benchmark].splits:
        return None
    classes, counts = pathlib.Path(root, "classes.json"), {}
    listed = json.loads(classes.read_text(encoding="utf-8")) if classes.is_file() else {}
    for record in corpora.records(benchmark, root, "train"):
        kind = scene_class(record["image"], benchmark, listed)
        counts.setdefault(kind, Counter())[record["conversations"][1]["value"]] += 1
    kinds = [scene_class(row["image"], benchmark, listed) for row in rows]
    if len(counts) < 2 or not all(kind in counts for kind in kinds):
        return None
    return [{**row, "prediction": most_common(counts[kind])} for row, kind in zip(rows, kinds)]


def sanity_rows(rows, benchmark, root):
    """{heading: rows} of answers that need no model."""
    found = {"constant": [{**row, "prediction": CONSTANT[benchmark]} for row in rows]} if benchmark in CONSTANT else {}
    found["best constant"] = constant_rows(rows)
    if BENCHMARKS[benchmark].metric == "BLEU-1":
        found["true class"] = true_class_rows(rows, benchmark, root)
    return {heading: answered for heading, answered in found.items() if answered}


def print_sanity(names):
    print(f"\n{SANITY}")
    for name in names:
        if name in CONSTANT:
            print(f"- constant: \"{CONSTANT[name]}\"")


# ---------------------------------------------------------------------------------------------- the paper's tables

def print_published(results, everything=False):
    """
    The paper's Tables 3 and 4 with ours below, a column a benchmark: of those in results, or with everything of all.
    results: {benchmark: (split, {heading: scores})}.
    """
    for metric in PUBLISHED:
        names = [name for name, benchmark in BENCHMARKS.items() if benchmark.metric == metric]
        if not set(names) & set(results):
            continue
        print(f"\nThe paper's Table {3 if metric == 'BLEU-1' else 4}, {metric}; \"theirs\" was not measured here")
        for label, cells in published_lines(metric, names, results).items():
            shown = ["-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else f"{cell}"
                     for name, cell in zip(names, cells) if everything or name in results]
            print(f"{label:28}" + "".join(f"{cell:>19}" for cell in shown))


def published_lines(metric, names, results):
    """{label: a cell for each of names}; None where there is no figure."""
    found = [results.get(name, (None, {})) for name in names]
    headings = dict.fromkeys(heading for _, columns in found for heading in columns)
    ours = {heading: [columns.get(heading, {}).get(metric, (None, None)) for _, columns in found]
            for heading in headings}
    return {"": [BENCHMARKS[name].title for name in names],
            "theirs, split": [BENCHMARKS[name].split for name in names],
            **{f"theirs, {label}": cells for label, cells in PUBLISHED[metric].items()},
            "ours, split": [split for split, _ in found],
            "ours, counted": [max((n for _, n in column if n), default=None) for column in zip(*ours.values())],
            **{f"ours, {heading}": [value for value, _ in cells] for heading, cells in ours.items()}}
