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
import json
import os
import pathlib
import shutil
import sys
import time

import torch
from torch.utils.data import DataLoader

import metrics
import scenes
from aquila import find, load_model
from benchmarks import BENCHMARKS, benchmark_jobs, constant_rows, print_published, print_sanity, sanity_rows
from data import Records, check_form, collate, read_records
from llama import load_tokenizer
from metrics import SENTENCES, references_of

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
    texts = {"answer": row.get("answer", "" if references else None), "type": row.get("type", ""),
             "sampling": row.get("sampling", "")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{key} {str(value)[:60]}: expected a text")
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


def score(rows, wanted=None):
    """
    Prediction rows -> {name: (value in percent, how many rows it counts)}; "type: figure" is of one type of rows.

    - Captions: BLEU-1..4, ROUGE-L and CIDEr, or those wanted; no CIDEr of one row alone. SENTENCES apart, type by type.
    - All others: accuracy, see score_questions. Types in YES_NO also get POPE's figures, see score_yes_no, and "region
      class" what score_classes says.
    """
    captions, questions = {}, []
    for row in rows:
        if references_of(row):
            captions.setdefault(row["type"] if row.get("type") in SENTENCES else "", []).append(row)
        else:
            questions.append(row)
    scores = {}
    for kind, group in sorted(captions.items()):
        names = wanted or (("bleu", "rouge-l", "cider") if len(group) > 1 else ("bleu", "rouge-l"))
        found = metrics.score_captions([row["prediction"] for row in group], [*map(references_of, group)], names)
        scores |= in_percent(found, len(group), kind)
    if questions:
        scores |= score_questions(questions)
    for kind in YES_NO:
        scores |= score_yes_no(questions, kind)
    group = [row for row in questions if row.get("type") == "region class"]
    if group:
        scores |= in_percent(score_classes(group), len(group), "region class")
    return dict(sorted(scores.items(), key=lambda item: ": " in item[0]))          # what has a heading comes last


def in_percent(found, n, heading):
    return {f"{heading}: {name}" if heading else name: (100 * value, n) for name, value in found.items()}


def said_and_true(rows):
    return [row["prediction"] for row in rows], [row["answer"] for row in rows]


def score_questions(rows):
    """
    Accuracy over all questions (the paper's), of each type, and the mean over types. Later papers leave RSVQA's counts
    and areas out: where there are any, both figures stand there without them as well.
    """
    counts = metrics.accuracy(*said_and_true(rows), [row.get("type", "question") for row in rows])
    scores = {("accuracy" if kind == "all" else kind): (100 * right / n, n) for kind, (right, n) in counts.items()}
    some = {kind: value for kind, value in counts.items() if kind not in ("all", "count", "area")}
    if len(counts) > 2:
        scores["mean over types"] = 100 * metrics.mean_over_types(counts), len(rows)
    if some and len(some) < len(counts) - 1:
        right, n = map(sum, zip(*some.values()))
        scores["without count, area"] = 100 * right / n, n
        scores["its mean over types"] = 100 * metrics.mean_over_types(some), n
    return scores


def score_yes_no(rows, kind):
    """POPE's figures of one type's questions whose answer is yes or no: of all, and by the `sampling` of negatives."""
    rows = [row for row in rows
            if row.get("type") == kind and metrics.normalize_answer(row["answer"]) in ("yes", "no")]
    parts = {"": rows} if rows else {}
    for sampling in sorted({row["sampling"] for row in rows if row.get("sampling")}):
        parts[sampling] = [row for row in rows if row.get("sampling") == sampling]
    scores = {}
    for sampling, part in parts.items():
        scores |= in_percent(metrics.pope(*said_and_true(part)), len(part), f"{kind}, POPE {sampling}".rstrip())
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
    ids, printed, clock = [], "", [time.perf_counter()]                            # clock: start, vision, every token
    seen = model.vision.register_forward_hook(lambda *_: clock.append(time.perf_counter()))
    for step in model.generate(batch, tokenizer.stop_ids, args.max_new_tokens, args.temperature, args.top_p, generator):
        ids.append(step.item())
        clock.append(time.perf_counter())
        text = tokenizer.decode(ids)
        text = text.rstrip("\ufffd")        # a character of several tokens is printed when it is whole
        print(text[len(printed):], end="", flush=True)
        printed = text
    print()
    seen.remove()
    if args.timings and row["images"].numel():
        vision, prefill, *tokens = [b - a for a, b in zip(clock, clock[1:])]
        each = f", {sum(tokens) / len(tokens):.3f} s for each of {len(tokens)} more tokens" if tokens else ""
        print(f"vision {vision:.2f} s, prefill of {len(row['ids'])} tokens with SFI and MDA {prefill:.2f} s{each}",
              file=sys.stderr)


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
    p.add_argument("--timings", action="store_true",
                   help="--ask: print seconds for loading, vision, prefill and a token")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                   help="of all weights (default float32)")
    p.add_argument("--compile", action="store_true",
                   help="compile the decoding of the answer: some 10 s once, then more tokens a second; needs a C++ "
                        "compiler on a CPU")
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
    if args.compile and not (torch.cuda.is_available() or os.environ.get("CXX") or shutil.which("g++")):
        raise ValueError("--compile needs a C++ compiler, and there is no g++ and no CXX in the environment; "
                         "install one or leave --compile out")
    if args.metrics:
        metrics.check_metrics(args.metrics)


def checked(records):
    for record in records:
        check_form(record)
    return records


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


def run_benchmarks(model, tokenizer, jobs, args):
    results = {}
    for name, (split, records, root) in jobs.items():
        out = pathlib.Path(args.out) if args.out else None
        if out and args.benchmark == "all":
            out = out.with_stem(f"{out.stem}-{name}")
        columns = answer_columns(model, tokenizer, records, root, args, out) if model else {}
        unasked = sanity_rows([row_of(record, "") for record in records], name, root)
        columns |= {heading: score(rows, args.metrics) for heading, rows in unasked.items()}
        print(f"\n{BENCHMARKS[name].title}, {split} split, {len(records):,} records, {args.model or 'no model'}")
        print_table(columns)
        results[name] = split, columns
    print_sanity(results)
    print_published(results, args.benchmark == "all")


def run(args):
    check_args(args)
    if args.score:
        return score_file(args)
    jobs = benchmark_jobs(args) if args.benchmark else {}                          # mistakes before the model loads
    for _, records, _ in jobs.values():
        checked(records)
    if args.sanity:
        return run_benchmarks(None, None, jobs, args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()
    model = load_model(args.model, args.vision, args.llm, getattr(torch, args.dtype), device)
    if args.timings:
        print(f"loading {time.perf_counter() - began:.1f} s", file=sys.stderr)
    tokenizer = load_tokenizer(find(model.config.llm_dir, "language model"))
    if args.no_mda:
        model.mda = torch.nn.ModuleDict()
    if args.compile:
        model.llm.compile_decoding()
    if args.image:
        ask(model, tokenizer, args)
    elif jobs:
        run_benchmarks(model, tokenizer, jobs, args)
    else:
        records = read_records(args.data) if args.data else scene_records(args, model.config)
        root = args.images if args.data else "."
        print_table(answer_columns(model, tokenizer, checked(records[:args.limit]), root, args, args.out))


def main():
    parser, args = parse_args()
    try:
        run(args)
    except (ValueError, FileNotFoundError) as e:
        parser.exit(2, f"evaluate.py: {e}\n")


if __name__ == "__main__":
    main()
