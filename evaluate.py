"""
Asks a trained model: a benchmark or a file of records (predict, then score), or one question about one image.

    python evaluate.py --model runs/tiny/stage2 --scenes 200 --compare            # built-in scenes nobody trained on
    python evaluate.py --model runs/tiny/stage2 --benchmark rsicd --root DIR --out pred.jsonl
    python evaluate.py --model runs/tiny/stage2 --data val.jsonl --images DIR --out pred.jsonl
    python evaluate.py --score pred.jsonl                                         # no model: anybody's predictions
    python evaluate.py --model runs/tiny/stage2 --image scene.png --ask "How many ships are there?"

Predictions are one JSON object a line: id, image, question, type, prediction, and answer or references. Captions (rows
with references) get BLEU-1..4, the others accuracy by type; the definitions stand in metrics.py.
"""
import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time

import torch
from torch.utils.data import DataLoader

import corpora
import metrics
import scenes
from aquila import find, load_model
from data import Records, check_form, collate, encode_record, fit_image, load_image, open_image, read_records, to_tensor
from llama import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A row of the paper's Table 1, and Aquila's figure in its Table 3 or 4."""
    corpus: str
    split: str
    metric: str
    paper: float


BENCHMARKS = {
    "rsicd": Benchmark("rsicd", "test", "BLEU-1", 74.6),
    "sydney": Benchmark("sydney", "test", "BLEU-1", 83.42),
    "ucm": Benchmark("ucm", "test", "BLEU-1", 88.25),
    "fit-rsfg-captions": Benchmark("fit-rsfg-captions", "val", "BLEU-1", 35.08),
    "rsvqa-lr": Benchmark("rsvqa-lr", "test", "accuracy", 92.72),
    "rsvqa-hr": Benchmark("rsvqa-hr", "test", "accuracy", 92.64),
    "fit-rsfg-vqa": Benchmark("fit-rsfg-vqa", "val", "accuracy", 83.87),
}


# ---------------------------------------------------------------------------------------------- predict

def row_of(record, prediction):
    """A prediction row: the last turn's question, what was said, what should have been."""
    turns = record["conversations"]
    truth = {"references": record["references"]} if record.get("references") else {"answer": turns[-1]["value"]}
    return {"id": record["id"], "image": record.get("image"),
            "question": turns[-2]["value"].replace("<image>", "").strip(),
            "type": record.get("type", "question"), "prediction": prediction, **truth}


def predict(model, tokenizer, records, root, args, blind=False, label="model"):
    """The model's answer to the last turn of every record, as prediction rows. Batches go by, a progress line each."""
    device = next(model.parameters()).device
    data = Records(records, root, tokenizer, model.config, answer=False, blind=blind)
    loader = DataLoader(data, batch_size=args.batch, collate_fn=collate, num_workers=args.workers)
    rows, began = [], time.time()
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
        answers = model.answer(batch, tokenizer, max_new_tokens=args.max_new_tokens)
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
        if (not isinstance(row, dict) or not isinstance(row.get("prediction"), str)
                or not ("answer" in row or "references" in row)):
            raise ValueError(f"{path}, line {number}: expected 'prediction' and 'answer' or 'references'")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no predictions")
    return rows


def score(rows):
    """
    Prediction rows -> {name: (value in percent, how many it counts)}: BLEU of captions, accuracy overall and by type.
    """
    captions, questions = [r for r in rows if r.get("references")], [r for r in rows if not r.get("references")]
    scores = {}
    if captions:
        values = metrics.bleu([r["prediction"] for r in captions], [r["references"] for r in captions])
        scores |= {f"BLEU-{n}": (100 * v, len(captions)) for n, v in enumerate(values, 1)}
    if questions:
        counts = metrics.accuracy([r["prediction"] for r in questions], [r["answer"] for r in questions],
                                  [r.get("type", "question") for r in questions])
        scores |= {("accuracy" if t == "all" else t): (100 * right / n, n) for t, (right, n) in counts.items()}
    return scores


def constant_scores(rows):
    """What the best single answer to everything reaches: one caption for all, the most common answer of each type."""
    captions, questions = [r for r in rows if r.get("references")], [r for r in rows if not r.get("references")]
    constant = []
    if captions:
        candidates = sorted({text for r in captions for text in r["references"]})[:2000]
        best, _ = metrics.best_constant([r["references"] for r in captions], candidates)
        constant += [{**r, "prediction": best} for r in captions]
    by_type = {}
    for r in questions:
        by_type.setdefault(r.get("type"), []).append(r["answer"])
    most = {t: max(sorted(set(answers)), key=answers.count) for t, answers in by_type.items()}
    return score(constant + [{**r, "prediction": most[r.get("type")]} for r in questions])


def print_table(columns):
    """columns: {heading: scores}, side by side."""
    names = list(next(iter(columns.values())))
    print(f"{'':14}{'n':>7}" + "".join(f"{heading:>15}" for heading in columns))
    for name in names:
        n = next(iter(columns.values()))[name][1]
        print(f"{name:14}{n:7,}" + "".join(f"{scores[name][0]:15.2f}" for scores in columns.values()))


def changed(rows, others):
    """Share of answers that are not the same, in percent."""
    return 100 * sum(a["prediction"] != b["prediction"] for a, b in zip(rows, others)) / len(rows)


# ---------------------------------------------------------------------------------------------- ask

def ask(model, tokenizer, image, question, args):
    """Print the answer to one question about one image as it is made."""
    turns = [{"from": "human", "value": question if "<image>" in question else f"<image>\n{question}"},
             {"from": "gpt", "value": ""}]
    record = {"id": "--ask", "image": image, "conversations": turns}
    c, device = model.config, next(model.parameters()).device
    picture = load_image(image) if image.startswith("scene:") else open_image(image)
    row = encode_record(record, tokenizer, c.chat, c.image_tokens, c.max_len, answer=False)
    row["images"] = to_tensor(fit_image(picture, c.image_size, c.fit))[None]
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in collate([row]).items()}
    generator = torch.Generator(device).manual_seed(args.seed)
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
    what.add_argument("--benchmark", help=f"one of {', '.join(BENCHMARKS)}; needs --root")
    what.add_argument("--data", help=".jsonl or .json file of records")
    what.add_argument("--score", help="score this file of predictions; no model is needed")
    what.add_argument("--image", help="image file for --ask")
    p.add_argument("--ask", help="question about --image; the answer is printed as it is made")
    p.add_argument("--root", help="folder of the benchmark, as published")
    p.add_argument("--split", help="split of the benchmark (default: the paper's) or of the scenes (default test)")
    p.add_argument("--images", default=".", help="folder that the image paths of --data start from (default: here)")
    p.add_argument("--limit", type=int, help="at most this many records")
    p.add_argument("--out", help="write the predictions to this .jsonl file")
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


def wanted_records(args, config):
    """-> records, image folder, benchmark or None"""
    if args.benchmark:
        if args.benchmark not in BENCHMARKS or not args.root:
            raise ValueError(f"--benchmark {args.benchmark} --root {args.root}: expected one of "
                             f"{', '.join(BENCHMARKS)} and its folder")
        b = BENCHMARKS[args.benchmark]
        records, root = list(corpora.records(b.corpus, args.root, args.split or b.split)), args.root
    elif args.data:
        b, records, root = None, read_records(args.data), args.images
    else:
        b, root, split = None, ".", args.split or "test"
        records = [r for task in ("caption", "vqa")
                   for r in scenes.records(split, args.scenes, task, size=config.image_size)]
    for record in records:
        check_form(record)
    return records[:args.limit], root, b


def switch_off_mda(model):
    model.mda = torch.nn.ModuleDict()
    return model


def run(args):
    chosen = [name for name in ("scenes", "benchmark", "data", "score", "image") if getattr(args, name) is not None]
    if len(chosen) != 1:
        raise ValueError(f"give one of --scenes, --benchmark, --data, --score or --image with --ask; "
                         f"got {chosen or 'none'}")
    if args.score:
        return print_table({"": score(read_rows(args.score))})
    if not args.model:
        raise ValueError("give --model, the folder that train.py wrote")
    if (args.ask is None) == (args.image is not None):
        raise ValueError("--image and --ask go together")
    if args.out and not pathlib.Path(args.out).parent.is_dir():
        raise ValueError(f"--out {args.out}: no such folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model, args.vision, args.llm, getattr(torch, args.dtype), device)
    tokenizer = load_tokenizer(find(model.config.llm_dir, "language model"))
    if args.no_mda:
        switch_off_mda(model)
    if args.image:
        return ask(model, tokenizer, args.image, args.ask, args)
    records, root, benchmark = wanted_records(args, model.config)
    rows = predict(model, tokenizer, records, root, args, args.blind)
    if args.out:
        write_rows(rows, args.out)
    columns = {"gray image" if args.blind else "model": score(rows)}
    if args.compare:
        columns["gray image"] = score(predict(model, tokenizer, records, root, args, True, "gray image"))
        columns["best constant"] = constant_scores(rows)
        without = predict(switch_off_mda(model), tokenizer, records, root, args, args.blind, "no MDA")
        columns["no MDA"] = score(without)
    print_table(columns)
    if args.compare:
        print(f"switching MDA off changes {changed(rows, without):.1f} % of the answers")
    if benchmark:
        print(f"the paper's Aquila (theirs, {benchmark.split} split): {benchmark.metric} {benchmark.paper}")


def main():
    parser, args = parse_args()
    try:
        run(args)
    except (ValueError, FileNotFoundError) as e:
        parser.exit(2, f"evaluate.py: {e}\n")


if __name__ == "__main__":
    main()
