"""
The paper's benchmarks: which records are asked (its Table 1), which answers need no model, and how its Tables 3 and 4
print with our figures below theirs. evaluate.py asks and scores; nothing here needs a model.

A figure of theirs is the paper's, not measured here, and every line of it says so. Rows and scores: as in scores.py.
"""
import re
from collections import Counter, namedtuple
from pathlib import Path

from corpora.reading import scene_classes
from corpora.table import CORPORA, folder_of, read_corpus
from scoring.metrics import best_constant
from scoring.scores import references_of

# The paper's Table 1, by the name of the corpus, with the metric of its Table 3 (BLEU-1) or 4 (accuracy).
Benchmark = namedtuple("Benchmark", "title split metric")
BENCHMARKS = {
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
    "LLaVA1.5-7B":         (55.26, 52.21, 57.58, 15.38, 65.86, 53.99, 58.59),
    "GeoChat":             (45.86, 39.79, 44.09, 8.79, 91.81, 70.82, 53.47),
    "RSGPT":               (70.32, 82.26, 86.12, None, 92.29, 92.15, None),
    "LHRS-Bot":            (None, None, None, None, 89.19, 92.55, None),
    "H2RSVLM":             (None, None, None, None, 89.12, 74.35, None),
    "SkyEyeGPT":           (None, None, None, None, 88.23, 86.87, None),
    "SkySenseGPT":         (None, None, None, 27.31, 92.69, 82.56, 79.76),
    "Aquila, baseline":    (None, None, None, 26.67, None, None, 75.29),
    "its baseline + MDA":  (None, None, None, 29.22, None, None, 79.93),
    "its baseline + SFI":  (None, None, None, 32.29, None, None, 82.14),
    "Aquila":              (74.6, 83.42, 88.25, 35.08, 92.72, 92.64, 83.87),
}
CONSTANT = {"rsicd": "many buildings and some green trees are in a school"}        # one caption for every image
SANITY = """Without a model, so that a number can be judged:
- best constant: one answer to everything, chosen with this split's answers known: of all reference captions the one
  with the highest BLEU-1; of questions the most common answer of each type
- true class: for each image the most common caption, in the train split, of its true scene class"""


def benchmark_jobs(args):
    """{benchmark: (split, records, folder)}. With "all", what is not there is said and skipped."""
    everything = args.benchmark == "all"
    if args.benchmark not in (*BENCHMARKS, "all") or not args.root:
        raise ValueError(f"--benchmark {args.benchmark} --root {args.root}: expected one of {', '.join(BENCHMARKS)} or "
                         "all, and its folder")
    if everything and args.split:
        raise ValueError(f"--split {args.split} goes with one benchmark; all takes the splits of the paper's Table 1")
    jobs, types, left_out = {}, set(), {name.strip() for name in (args.leave_out or "").split(",")} - {""}
    for name in BENCHMARKS if everything else [args.benchmark]:
        root, split = Path(args.root, folder_of(name) if everything else ""), args.split or BENCHMARKS[name].split
        if split == "train" and BENCHMARKS[name].metric == "BLEU-1":
            raise ValueError(f"--split train: its records are single captions to learn, of {name} ask another split")
        try:                                # the folder may be there for training alone
            records = list(read_corpus(name, root, split, raw_answers=args.raw_answers))
            types |= {record["type"] for record in records if record.get("type")}
            records = [record for record in records if record.get("type") not in left_out]
            if not records:
                raise FileNotFoundError(f"{root}: no record of split {split}, --leave-out {args.leave_out or 'none'}")
        except FileNotFoundError as error:
            if not everything:
                raise
            print(f"{name}: {error}; skipped")
        else:
            jobs[name] = split, records[:args.limit], root
    if not jobs:
        folders = dict.fromkeys(map(folder_of, BENCHMARKS))
        raise ValueError(f"--root {args.root}: nothing to ask; expected sub-folders named {', '.join(folders)}")
    unknown = left_out - types - {"count", "area"}                                 # only one of RSVQA's two has areas
    if unknown:
        raise ValueError(f"--leave-out {args.leave_out}: no question is of type {', '.join(sorted(unknown))}; the "
                         f"types are {', '.join(sorted(types)) or 'none'}")
    return jobs


def most_common(pairs):
    """(kind, text) pairs -> {kind: its most common text, of equals the first by alphabet}."""
    counts = {}
    for kind, text in pairs:
        counts.setdefault(kind, Counter())[text] += 1
    return {kind: min(sorted(found), key=lambda text: -found[text]) for kind, found in counts.items()}


def constant_rows(rows):
    """The best single answers: one caption for all, the most common answer of each type."""
    captions = [references_of(row) for row in rows if references_of(row)]
    if captions:
        caption, _ = best_constant(captions, sorted(set().union(*captions)))
    answer = most_common((row.get("type"), row["answer"]) for row in rows if not references_of(row))
    return [{**row, "prediction": caption if references_of(row) else answer[row.get("type")]} for row in rows]


def scene_class(image, benchmark, classes):
    """The class by classes.json ({file name: class}); else RSICD's airport_7.jpg; UCM has 100 numbers a class."""
    name = Path(image).name
    if name in classes:
        return classes[name]
    letters, digits = re.match(r"([A-Za-z]*)_?(\d*)", name).groups()
    return (int(digits) - 1) // 100 if benchmark == "ucm" and digits else letters


def true_class_rows(rows, benchmark, root):
    """Rows answered with the most common train caption of the image's class; None where names tell no class."""
    if BENCHMARKS[benchmark].metric != "BLEU-1" or "train" not in CORPORA[benchmark].splits:
        return None
    classes = scene_classes(root)
    answer = most_common((scene_class(record["image"], benchmark, classes), record["conversations"][1]["value"])
                         for record in read_corpus(benchmark, root, "train"))
    kinds = [scene_class(row["image"], benchmark, classes) for row in rows]
    if len(answer) < 2 or not answer.keys() >= set(kinds):
        return None
    return [{**row, "prediction": answer[kind]} for row, kind in zip(rows, kinds)]


def sanity_rows(rows, benchmark, root):
    """{heading: rows} of answers that need no model."""
    found = {"constant": [{**row, "prediction": CONSTANT[benchmark]} for row in rows]} if benchmark in CONSTANT else {}
    found |= {"best constant": constant_rows(rows), "true class": true_class_rows(rows, benchmark, root)}
    return {heading: answered for heading, answered in found.items() if answered}


def print_sanity(names):
    print(f"\n{SANITY}", *(f"- constant: \"{CONSTANT[name]}\"" for name in names if name in CONSTANT), sep="\n")


def print_published(results, everything=False):
    """
    The paper's Tables 3 and 4 with ours below, a column a benchmark: of those in results, or with everything of all.
    results: {benchmark: (split, {heading: scores})}.
    """
    for table, metric in ((3, "BLEU-1"), (4, "accuracy")):
        names = [name for name, benchmark in BENCHMARKS.items() if benchmark.metric == metric]
        if not set(names) & set(results):
            continue
        print(f"\nThe paper's Table {table}, {metric}; \"theirs\" was not measured here")
        for label, row in published_lines(metric, names, results).items():
            values = [row.get(name, "-") for name in names if everything or name in results]
            cells = [f"{value:.2f}" if isinstance(value, float) else value for value in values]
            print(f"{label:28}" + "".join(f"{cell:>19}" for cell in cells))


def published_lines(metric, names, results):
    """{label: {benchmark: figure}}; what has no figure is left out."""
    lines = {"": {name: BENCHMARKS[name].title for name in names},
             "theirs, split": {name: BENCHMARKS[name].split for name in names}}
    for label, figures in PUBLISHED.items():
        row = {name: figure for name, figure in zip(BENCHMARKS, figures) if figure and name in names}
        lines |= {f"theirs, {label}": row} if row else {}
    counted = {}
    lines |= {"ours, split": {name: results[name][0] for name in names if name in results}, "ours, counted": counted}
    for name in lines["ours, split"]:
        for heading, scores in results[name][1].items():
            row = lines.setdefault(f"ours, {heading}", {})
            if metric in scores:
                row[name], n = scores[metric]
                counted[name] = max(n, counted.get(name, 0))
    return lines
