"""
Asks a trained model: a benchmark or a file of records (predict, then score), or one question about one image.

    python evaluate.py --model runs/tiny/stage2 --scenes 200 --compare            # built-in scenes nobody trained on
    python evaluate.py --model runs/tiny/stage2 --benchmark rsicd --root DIR --out pred.jsonl
    python evaluate.py --model runs/tiny/stage2 --benchmark all --root DIR        # DIR/rsicd, DIR/sydney, ...
    python evaluate.py --benchmark rsicd --root DIR --split val --sanity          # what no model need be asked for
    python evaluate.py --model runs/tiny/stage2 --data val.jsonl --images DIR --out pred.jsonl
    python evaluate.py --score pred.jsonl                                         # no model: anybody's predictions
    python evaluate.py --model runs/tiny/stage2 --image scene.png --ask "How many ships are there?"
    python evaluate.py --model DIR --image scene.png --mask ship.png --ask "What is <region>?"

Predictions are one JSON object a line: `prediction`, and `answer` (for a question, right or wrong) or `references` (a
list, for a caption); id, image, question, type, sampling and masks if known. --score also reads FIT-RSFG's rows of
question_id, ground_truth and answer. metrics.py defines the metrics; `score` says which rows get which.
"""
import argparse
import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from collections import Counter

import torch
from torch.utils.data import DataLoader

import corpora
import metrics
import scenes
from aquila import find, load_model
from data import Records, check_form, collate, read_records
from llama import load_tokenizer


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
SENTENCES = ("region caption", "region detail", "region reasoning")              # types scored as captions
YES_NO = ("presence", "region presence")                                         # types that get POPE's figures


# ---------------------------------------------------------------------------------------------- predict

def row_of(record, prediction):
    """A prediction row: the last turn's question, what was said, what should have been."""
    turns = record["conversations"]
    truth = {"references": record["references"]} if record.get("references") else {"answer": turns[-1]["value"]}
    return {"id": record["id"], "image": record.get("image"),
            "question": turns[-2]["value"].replace("<image>", "").strip(),
            "type": record.get("type", "question"), "prediction": prediction, **truth,
            **{key: record[key] for key in ("sampling", "masks") if key in record}}


def to_device(batch, model):
    device = next(model.parameters()).device
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def predict(model, tokenizer, records, root, args, blind=False, label="model"):
    """The model's answer to the last turn of every record, as prediction rows. Batches go by, a progress line each."""
    data = Records(records, root, tokenizer, model.config, answer=False, blind=blind)
    loader = DataLoader(data, batch_size=args.batch, collate_fn=collate, num_workers=args.workers)
    rows, began = [], time.time()
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        answers = model.answer(to_device(batch, model), tokenizer, max_new_tokens=args.max_new_tokens)
        rows += [row_of(records[len(rows) + i], answer) for i, answer in enumerate(answers)]
        if sys.stderr.isatty():
            print(f"\r{label}: {len(rows)}/{len(records)}, {time.time() - began:.0f} s", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return rows


def write_rows(rows, path):
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------- score

def prediction_row(row):
    """A row as `score` needs it; FIT-RSFG's and GeoChat's key names are translated. ValueError says what is wrong."""
    if isinstance(row, dict) and "ground_truth" in row and "prediction" not in row:
        row = {"id": row.get("question_id"), "image": row.get("image", row.get("image_id")),
               "question": row.get("question", row.get("text")), "type": row.get("category"),
               "prediction": row.get("answer"), "answer": row["ground_truth"]}
    if (not isinstance(row, dict) or not isinstance(row.get("prediction"), str)
            or not ("answer" in row or "references" in row)):
        raise ValueError("expected 'prediction' and 'answer' or 'references' (or 'answer' and 'ground_truth')")
    row = {key: value for key, value in row.items() if value is not None}
    references = row.get("references") or []
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise ValueError(f"references {str(references)[:60]!r}: expected a list of texts")
    for key in ("answer", "type", "sampling"):
        if not isinstance(row.get(key, None if key == "answer" and not references else ""), str):
            raise ValueError(f"{key} {str(row.get(key))[:60]}: expected a text")
    return row


def read_rows(path):
    """Prediction rows of a .jsonl file; ValueError names the first line that is none."""
    path, rows = pathlib.Path(path), []
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected predictions, one JSON object a line")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise ValueError(f"{path}, line {number}: not valid JSON: {e}") from None
        try:
            rows.append(prediction_row(row))
        except ValueError as e:
            raise ValueError(f"{path}, line {number}: {e}") from None
    if not rows:
        raise ValueError(f"{path} holds no predictions")
    return rows


def is_sentence(row):
    return row.get("type") in SENTENCES


def references_of(row):
    """The texts that a row is compared with as a caption; None for a question, which is right or wrong."""
    return row.get("references") or ([row["answer"]] if is_sentence(row) else None)


def score(rows, wanted=None):
    """
    Prediction rows -> {name: (value in percent, how many rows it counts)}; "type: figure" is of one type of rows.

    - Captions: BLEU-1..4, ROUGE-L and CIDEr, or those wanted; no CIDEr of one row alone. SENTENCES apart, type by type.
    - All others: accuracy, see score_questions. Types in YES_NO also get POPE's figures, for each `sampling` of the
      negatives as well; "region class" gets what score_classes says.
    """
    scores, questions = {}, [row for row in rows if not references_of(row)]
    for kind in ("", *SENTENCES):
        group = [row for row in rows if references_of(row) and kind == (row["type"] if is_sentence(row) else "")]
        if group:
            names = wanted or (("bleu", "rouge-l", "cider") if len(group) > 1 else ("bleu", "rouge-l"))
            found = metrics.score_captions([row["prediction"] for row in group], [*map(references_of, group)], names)
            scores |= in_percent(found, len(group), kind)
    if questions:
        scores |= score_questions(questions)
    for kind in YES_NO:
        group = [row for row in questions if row.get("type") == kind
                 and metrics.normalize_answer(row["answer"]) in ("yes", "no")]
        for sampling in ("", *sorted({row["sampling"] for row in group if row.get("sampling")})) if group else ():
            part = [row for row in group if sampling in ("", row.get("sampling"))]
            found = metrics.pope([row["prediction"] for row in part], [row["answer"] for row in part])
            scores |= in_percent(found, len(part), f"{kind}, POPE {sampling}".rstrip())
    group = [row for row in questions if row.get("type") == "region class"]
    if group:
        scores |= in_percent(score_classes(group), len(group), "region class")
    return dict(sorted(scores.items(), key=lambda item: ": " in item[0]))          # what has a heading comes last


def in_percent(found, n, heading):
    return {f"{heading}: {name}" if heading else name: (100 * value, n) for name, value in found.items()}


def score_questions(rows):
    """
    Accuracy over all questions (the paper's), of each type, and the mean over types. Later papers leave RSVQA's counts
    and areas out: where there are any, both figures stand there without them as well.
    """
    counts = metrics.accuracy([row["prediction"] for row in rows], [row["answer"] for row in rows],
                              [row.get("type", "question") for row in rows])
    scores = {("accuracy" if kind == "all" else kind): (100 * right / n, n) for kind, (right, n) in counts.items()}
    some = {kind: value for kind, value in counts.items() if kind not in ("all", "count", "area")}
    if len(counts) > 2:
        scores["mean over types"] = 100 * metrics.mean_over_types(counts), len(rows)
    if some and len(some) < len(counts) - 1:
        right, n = map(sum, zip(*some.values()))
        scores["without count, area"] = 100 * right / n, n
        scores["its mean over types"] = 100 * metrics.mean_over_types(some), n
    return scores


def score_classes(rows):
    """
    Accuracy, mean semantic IoU, and accuracy once every prediction is replaced by the nearest of the class names that
    occur as answers.
    """
    classes = sorted({row["answer"] for row in rows})
    nearest = {text: metrics.nearest_class(text, classes) for text in {row["prediction"] for row in rows}}
    same = [metrics.normalize_answer(row["prediction"]) == metrics.normalize_answer(row["answer"]) for row in rows]
    return {"accuracy": sum(same) / len(rows),
            "semantic IoU": sum(metrics.semantic_iou(row["prediction"], row["answer"]) for row in rows) / len(rows),
            "nearest class": sum(nearest[row["prediction"]] == row["answer"] for row in rows) / len(rows)}


def print_table(columns):
    """columns: {heading: scores}, side by side; figures of one type stand under its name."""
    first = next(iter(columns.values()))
    width, above = max(20, *(len(name.rpartition(": ")[2]) + 2 for name in first)), ""
    print(f"{'':{width}}{'n':>9}" + "".join(f"{heading:>15}" for heading in columns))
    for name in first:
        group, _, figure = name.rpartition(": ")
        if group != above:
            print(group)
            above = group
        figure = f"  {figure}" if group else name
        cells = "".join(f"{scores[name][0]:15.2f}" for scores in columns.values())
        print(f"{figure:{width}}{first[name][1]:9,}{cells}")
    if any(name.endswith("BLEU-1") and n == 1 for name, (_, n) in first.items()):
        print("no CIDEr of a single caption: it weighs words by how many images of the set mention them")


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
        best, _ = metrics.best_constant(captions, sorted({text for references in captions for text in references}))
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
    listed, counts = pathlib.Path(root, "classes.json"), {}
    listed = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else {}
    for record in corpora.records(benchmark, root, "train"):
        kind = scene_class(record["image"], benchmark, listed)
        counts.setdefault(kind, Counter())[record["conversations"][1]["value"]] += 1
    kinds = [scene_class(row["image"], benchmark, listed) for row in rows]
    if len(counts) < 2 or not all(kind in counts for kind in kinds):
        return None
    return [{**row, "prediction": most_common(counts[kind])} for row, kind in zip(rows, kinds)]


def sanity(rows, benchmark, root, wanted):
    """{heading: scores} of answers that need no model."""
    found = {"best constant": constant_rows(rows)}
    if benchmark in CONSTANT:
        found = {"constant": [{**row, "prediction": CONSTANT[benchmark]} for row in rows], **found}
    if BENCHMARKS[benchmark].metric == "BLEU-1":
        found["true class"] = true_class_rows(rows, benchmark, root)
    return {heading: score(answered, wanted) for heading, answered in found.items() if answered}


# ---------------------------------------------------------------------------------------------- benchmarks

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
            jobs[name] = split, checked(records, args.limit), root
        elif everything:
            print(f"{name}: {root} has no record of split {split}, skipped")
        else:
            raise ValueError(f"{name}: {root} has no record of split {split} (left out: {args.leave_out or 'nothing'})")
    if not jobs:
        raise ValueError(f"--root {args.root}: nothing to ask; expected sub-folders named {', '.join(BENCHMARKS)}")
    return jobs


def run_benchmarks(model, tokenizer, jobs, args):
    results, model_name = {}, args.model or ""
    for name, (split, records, root) in jobs.items():
        out = pathlib.Path(args.out) if args.out else None
        if out and args.benchmark == "all":
            out = out.with_stem(f"{out.stem}-{name}")
        columns = answer_columns(model, tokenizer, records, root, args, out) if model else {}
        columns |= sanity([row_of(record, "") for record in records], name, root, args.metrics)
        print(f"\n{BENCHMARKS[name].title}, {split} split, {len(records):,} records, {model_name or 'no model'}")
        print_table(columns)
        results[name] = split, columns
    print(f"\n{SANITY}" + "".join(f"\n- constant: \"{CONSTANT[name]}\"" for name in results if name in CONSTANT))
    print_published(results, args.benchmark == "all")


def print_published(results, everything=False):
    """The paper's Tables 3 and 4 with ours below. results: {benchmark: (split, {heading: scores})}."""
    for metric, theirs in PUBLISHED.items():
        names = [name for name, benchmark in BENCHMARKS.items() if benchmark.metric == metric]
        if not set(names) & set(results):
            continue
        ours = [results.get(name, (None, {})) for name in names]
        headings = dict.fromkeys(heading for _, columns in ours for heading in columns)
        of = lambda heading: [columns.get(heading, {}).get(metric, (None, None)) for _, columns in ours]
        lines = {"": [BENCHMARKS[name].title for name in names],
                 "theirs, split": [BENCHMARKS[name].split for name in names],
                 **{f"theirs, {label}": cells for label, cells in theirs.items()},
                 "ours, split": [split for split, _ in ours],
                 "ours, counted": [max((n for n in found if n), default=None) for found in
                                   zip(*([n for _, n in of(heading)] for heading in headings))],
                 **{f"ours, {heading}": [value for value, _ in of(heading)] for heading in headings}}
        print(f"\nThe paper's Table {3 if metric == 'BLEU-1' else 4}, {metric}; \"theirs\" was not measured here")
        for label, cells in lines.items():
            shown = ["-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else f"{cell}" for cell in cells]
            at = [i for i, name in enumerate(names) if everything or name in results]
            print(f"{label:28}" + "".join(f"{shown[i]:>19}" for i in at))


# ---------------------------------------------------------------------------------------------- ask

def ask(model, tokenizer, args):
    """Print the answer to one question about one image, and regions of it if masks are given, as it is made."""
    def place(name):                        # files of a command line may lie anywhere
        if name.startswith("scene:"):
            return name
        if not os.path.isfile(name):
            raise FileNotFoundError(f"{name} is not there; expected the file of an image or a mask")
        return os.path.abspath(name)

    question = args.ask if "<image>" in args.ask else f"<image>\n{args.ask}"
    record = {"id": "--ask", "image": place(args.image),
              "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "(open)"}]}
    if args.mask:
        record["masks"] = [place(name) for name in args.mask]
    check_form(record)
    row = Records([record], pathlib.Path.cwd().anchor, tokenizer, model.config, answer=False)[0]
    if isinstance(row, ValueError):
        raise row
    batch = to_device(collate([row]), model)
    generator = torch.Generator(batch["ids"].device).manual_seed(args.seed)
    ids, printed = [], ""
    for step in model.generate(batch, tokenizer.stop_ids, args.max_new_tokens, args.temperature, args.top_p, generator):
        ids.append(step.item())
        text = tokenizer.decode(ids)
        text = text.rstrip("\ufffd")        # a character of several tokens is printed when it is whole
        print(text[len(printed):], end="", flush=True)
        printed = text
    print()


# ---------------------------------------------------------------------------------------------- command

def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="folder that train.py wrote")
    p.add_argument("--vision", help="the frozen ConvNeXt's file, if it is no longer where it was in training")
    p.add_argument("--llm", help="the frozen Llama's folder, if it is no longer where it was in training")
    what = p.add_argument_group("what to ask (one of these)")
    what.add_argument("--scenes", type=int, help="captions and questions of this many built-in scenes")
    what.add_argument("--benchmark", help=f"one of {', '.join(BENCHMARKS)}, or all; needs --root")
    what.add_argument("--data", help=".jsonl or .json file of records")
    what.add_argument("--score", help="score this file of predictions; no model is needed; with --benchmark NAME the "
                                      "paper's rows are printed, too")
    what.add_argument("--image", help="image file for --ask, or a built-in scene as in scene:test/0/3/128")
    p.add_argument("--ask", help="question about --image; the answer is printed as it is made")
    p.add_argument("--mask", action="append",
                   help="--ask: mask file of a <region> in the question; once for each, in their order")
    p.add_argument("--tasks", help="--scenes: what is asked (default caption,vqa, and region if the model reads masks)")
    p.add_argument("--root", help="folder of the benchmark, as published; of all: holds a folder for each by its name")
    p.add_argument("--split", help="split of the benchmark (default: that of the paper's Table 1) or of the scenes "
                                   "(default test). RSVQA-HR: test_phili is its second test set, a city unseen in "
                                   "training, on which GeoChat and others report")
    p.add_argument("--sanity", action="store_true",
                   help="--benchmark: no model, only the answers that need none (otherwise printed beside the model)")
    p.add_argument("--leave-out", default="", metavar="TYPES",
                   help="--benchmark: question types not to ask, as count,area, which GeoChat and LHRS-Bot leave out "
                        "of RSVQA (default: none, the paper averages over all questions)")
    p.add_argument("--raw-answers", action="store_true",
                   help="RSVQA: ask for counts and areas as written, \"37\" or \"512m2\" (default: in the classes that "
                        "its authors score, \"between 10 and 100\"; in HR only areas have classes)")
    p.add_argument("--images", default=".", help="folder that the image paths of --data start from (default: here)")
    p.add_argument("--limit", type=int, help="at most this many records, of each benchmark")
    p.add_argument("--out", help="write the predictions to this .jsonl file; with all, the benchmark's name is added")
    p.add_argument("--captions", action="store_true",
                   help="--score: every answer is a caption, not a question (FIT-RSFG's caption files do not say so)")
    p.add_argument("--metrics", type=lambda text: text.lower().split(","), metavar="NAMES",
                   help="of captions (default bleu,rouge-l,cider); figures are percent, CIDEr goes up to 1000")
    p.add_argument("--blind", action="store_true", help="show the model a gray image instead")
    p.add_argument("--no-mda", action="store_true", help="switch MDA off, to see what it does")
    p.add_argument("--compare", action="store_true",
                   help="print --blind, --no-mda and the best constant answers beside the model")
    p.add_argument("--batch", type=int, default=32, help="prompts at once (default 32)")
    p.add_argument("--workers", type=int, default=0, help="data processes (default 0)")
    p.add_argument("--max-new-tokens", type=int, default=256, help="length of an answer at most (default 256)")
    p.add_argument("--temperature", type=float, default=0.0,
                   help="--ask: 0 takes the best token, more draws (default 0)")
    p.add_argument("--top-p", type=float, default=1.0,
                   help="--ask: draw from the likeliest tokens of this mass (default 1)")
    p.add_argument("--seed", type=int, default=0, help="--ask: of the draws (default 0)")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                   help="of all weights (default float32)")
    return p, p.parse_args()


def check_args(args):
    chosen = [name for name in ("scenes", "benchmark", "data", "score", "image") if getattr(args, name) is not None]
    if len(chosen) != 1 and chosen != ["benchmark", "score"]:
        raise ValueError(f"give one of --scenes, --benchmark, --data, --score or --image with --ask; "
                         f"got {chosen or 'none'}")
    if args.score and args.benchmark not in (None, *BENCHMARKS):
        raise ValueError(f"--score with --benchmark {args.benchmark}: expected one benchmark, {', '.join(BENCHMARKS)}")
    if (args.ask is None) == (args.image is not None) or args.mask and not args.image:
        raise ValueError("--image and --ask go together, and --mask only with them")
    if args.out and not pathlib.Path(args.out).parent.is_dir():
        raise ValueError(f"--out {args.out}: no such folder")
    if args.sanity and (args.model or chosen != ["benchmark"]):
        raise ValueError("--sanity goes with --benchmark and without --model, where it is printed anyway")
    if not (args.model or args.score or args.sanity):
        raise ValueError("give --model, the folder that train.py wrote")
    if args.metrics:
        metrics.check_metrics(args.metrics)


def checked(records, limit):
    for record in records[:limit]:
        check_form(record)
    return records[:limit]


def scene_records(args, config):
    tasks = args.tasks or ("caption,vqa,region" if config.region_dim else "caption,vqa")
    return [record for task in tasks.split(",")
            for record in scenes.records(args.split or "test", args.scenes, task, size=config.image_size)]


def score_file(args):
    rows = read_rows(args.score)
    if args.captions:
        rows = [{**row, "references": references_of(row) or [row["answer"]]} for row in rows]
    scores = score(rows, args.metrics)
    print_table({"": scores})
    if args.benchmark:
        if BENCHMARKS[args.benchmark].metric not in scores:
            raise ValueError(f"--score {args.score}: no {BENCHMARKS[args.benchmark].metric} to compare; is it of "
                             f"{args.benchmark}?")
        print_published({args.benchmark: (args.split or "as given", {pathlib.Path(args.score).name: scores})})


def answer_columns(model, tokenizer, records, root, args, out):
    """{heading: scores} of the model, whose answers go to out if given; --compare adds a gray image and no MDA."""
    rows = predict(model, tokenizer, records, root, args, args.blind)
    if out:
        write_rows(rows, out)
    columns = {"gray image" if args.blind else "model": score(rows, args.metrics)}
    if args.compare:
        blind = predict(model, tokenizer, records, root, args, True, "gray image")
        mda, model.mda = model.mda, torch.nn.ModuleDict()
        without = predict(model, tokenizer, records, root, args, args.blind, "no MDA")
        model.mda = mda
        columns |= {"gray image": score(blind, args.metrics), "no MDA": score(without, args.metrics),
                    "best constant": score(constant_rows(rows), args.metrics)}
        changed = sum(a["prediction"] != b["prediction"] for a, b in zip(rows, without))
        print(f"switching MDA off changes {100 * changed / len(rows):.1f} % of the answers")
    return columns


def run(args):
    check_args(args)
    if args.score:
        return score_file(args)
    jobs = benchmark_jobs(args) if args.benchmark else None                        # mistakes before the model loads
    if args.sanity:
        return run_benchmarks(None, None, jobs, args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model, args.vision, args.llm, getattr(torch, args.dtype), device)
    tokenizer = load_tokenizer(find(model.config.llm_dir, "language model"))
    if args.no_mda:
        model.mda = torch.nn.ModuleDict()
    if args.image:
        ask(model, tokenizer, args)
    elif jobs:
        run_benchmarks(model, tokenizer, jobs, args)
    else:
        records = read_records(args.data) if args.data else scene_records(args, model.config)
        root = args.images if args.data else "."
        print_table(answer_columns(model, tokenizer, checked(records, args.limit), root, args, args.out))


def main():
    parser, args = parse_args()
    try:
        run(args)
    except (ValueError, FileNotFoundError) as e:
        parser.exit(2, f"evaluate.py: {e}\n")


if __name__ == "__main__":
    main()
