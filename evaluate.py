"""
Asks a trained model: a benchmark or a file of records (predict, then score), or one question about one image.

    python evaluate.py --model runs/tiny/stage2 --scenes 200 --compare            # built-in scenes nobody trained on
    python evaluate.py --model runs/tiny/stage2 --benchmark rsicd --root DIR --out pred.jsonl
    python evaluate.py --benchmark rsicd --root DIR --split val --sanity          # what no model need be asked for
    torchrun --nproc-per-node 2 evaluate.py --model runs/tiny/stage2 --data val.jsonl --images DIR --out pred.jsonl
    python evaluate.py --score pred.jsonl                                         # no model: anybody's predictions
    python evaluate.py --contract pred.jsonl                                      # the same under other ways to score
    python evaluate.py --model runs/tiny/stage2 --image scene.png --ask "How many ships are there?"
    python evaluate.py --model DIR --image scene.png --mask ship.png --ask "What is <region>?"

Predictions are one JSON object a line: `prediction`, and `answer` (for a question, right or wrong) or `references` (a
list, for a caption); id, image, question, type, sampling and masks if known. --score also reads FIT-RSFG's rows of
question_id, ground_truth and answer. scoring/scores.py says which rows get which metric; the flags stand in
commands/evaluation.py.
"""
import json
import os
import pathlib
import sys
import time
import zlib
from functools import partial

import torch
from torch.utils.data import DataLoader

from aquila import load_model, locate_weights
from commands.evaluation import parse_args
from commands.processes import (StopSignal, ending, from_first, gather, ignore_signals, rank_and_world,
                                start_processes, together)
from commands.progress import Progress
from data import RecordFile, Records, check_form, collate, encode_record, to_device
from fast_decoding import compile_decoding
from files.text import file_digest, naming, regular_file, write_json_lines
from scoring.benchmarks import (BENCHMARKS, benchmark_jobs, constant_rows, print_published, print_sanity,
                                sanity_rows)
from scoring.contract import print_choices, tell_contract
from scoring.partial_file import PartialFile
from scoring.scores import prediction_row, print_table, read_predictions, references_of, score
from tokenizer import load_tokenizer
from toy.scenes import make_records

# ---------------------------------------------------------------------------------------------- predict

def row_of(record, prediction):
    """A prediction row: the last turn's question, what was said, what should have been."""
    turns = record["conversations"]
    truth = {"references": record["references"]} if record.get("references") else {"answer": turns[-1]["value"]}
    row = {"id": record["id"], "image": record.get("image"),
           "question": turns[-2]["value"].replace("<image>", "").strip(),
           "type": record.get("type") or "question", "prediction": prediction, **truth,
           **{key: record[key] for key in ("sampling", "masks") if key in record}}
    return prediction_row(row, f"record {record['id']}")


def predict(model, tokenizer, records, root, args, file=None, blind=False, label="model"):
    """
    The model's answer to the last turn of every record, as prediction rows. The records are cut into slices of --batch,
    the same in however many processes, and asked in rounds: in a round each process takes a slice.
    file: the PartialFile that rows go to as they come, in the first process; what stands there is not asked again.
    """
    rank, world = rank_and_world()
    said = from_first(lambda: file.begin(settings_of(model, records, root, args, blind)) if file else [])
    rows = [row_of(record, answer) for record, answer in zip(records, said)]
    # A slice that was cut is asked whole again: its batch stays the same, and so its answers in bfloat16.
    known = len(said) % args.batch if len(said) < len(records) else 0
    slices = [range(i, min(i + args.batch, len(records))) for i in range(len(said) - known, len(records), args.batch)]
    data = Records(records, root, tokenizer, model.config, answer=False, blind=blind)
    loader = iter(DataLoader(data, batch_sampler=slices[rank::world], collate_fn=collate, num_workers=args.workers,
                             worker_init_fn=ignore_signals))
    progress, device = Progress(label, len(records), len(rows)), next(model.parameters()).device

    def ask_slice():
        batch = next(loader, None)
        if batch is None:                   # in the last round some processes have none
            return []
        return model.answer(to_device(batch, device), tokenizer, max_new_tokens=args.max_new_tokens)

    for _ in range(0, len(slices), world):
        answers = [answer for part in gather(together(ask_slice)) for answer in part]
        new = [row_of(records[len(rows) + i], answer) for i, answer in enumerate(answers[known:])]
        known = 0
        from_first(lambda new=new: file and file.append(new))
        rows += new
        if rank == 0:
            progress.show(len(rows))
    return rows


def settings_of(model, records, root, args, blind):
    """What the answers depend on."""
    weights, asked = file_digest(pathlib.Path(args.model, "model.safetensors"))[:16], 0
    for record in records:
        asked = zlib.crc32(json.dumps(record).encode(), asked)
    return {"model": weights, **model.checksums(), "records": asked, "images": os.path.abspath(root), "blind": blind,
            "dtype": args.dtype, "MDA layers": len(model.mda), "decoding": "greedy",
            "max-new-tokens": args.max_new_tokens, "batch": args.batch}


# ---------------------------------------------------------------------------------------------- ask

def ask(model, tokenizer, args):
    """Print the answer to one question about one image, and regions of it if masks are given, as it is made."""
    question = args.ask if "<image>" in args.ask else f"<image>\n{args.ask}"
    record = {"id": "--ask", "image": absolute(args.image),
              "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "(open)"}]}
    if args.mask:
        record["masks"] = [absolute(name) for name in args.mask]
    check_form(record)
    row = Records([record], os.path.abspath(os.sep), tokenizer, model.config, answer=False)[0]   # paths are absolute
    batch = to_device(collate([row]), next(model.parameters()).device)
    generator = torch.Generator(batch["ids"].device).manual_seed(args.seed)
    ids, printed, clock = [], "", []        # clock: start, vision, every token

    def tick(*_):
        if args.timings and torch.cuda.is_available():
            torch.cuda.synchronize()        # what was asked of the GPU is done
        clock.append(time.perf_counter())

    tick()
    hook = model.vision.register_forward_hook(tick)
    for step in model.generate(batch, tokenizer.stop_ids, args.max_new_tokens, args.temperature, args.top_p, generator):
        ids.append(step.item())
        tick()
        text = tokenizer.decode(ids).rstrip("\ufffd")          # a character of several tokens is printed once whole
        print(text[len(printed):], end="", flush=True)
        printed = text
    print()
    hook.remove()
    if args.timings and ids:                # an image was looked at, and something said of it
        vision, prefill, *tokens = [b - a for a, b in zip(clock, clock[1:])]
        each = f", {sum(tokens) / len(tokens):.3f} s for each of {len(tokens)} more tokens" if tokens else ""
        print(f"vision {vision:.2f} s, prefill of {len(row['ids'])} tokens with SFI and MDA {prefill:.2f} s{each}",
              file=sys.stderr)


def absolute(name):
    """A file of the command line, which may lie anywhere, or a built-in scene."""
    return name if name.startswith("scene:") else os.path.abspath(regular_file(name))


# ---------------------------------------------------------------------------------------------- command

def other_records(args, config):
    """The records of --data or --scenes. What cannot be scored is told before the first answer."""
    tasks = args.tasks or ("caption,vqa,region" if config.region_dim else "caption,vqa")
    records = RecordFile(args.data) if args.data else [
        record for task in tasks.split(",")
        for record in make_records(args.split or "test", args.scenes, task, size=config.image_size)]
    records = records[:args.limit]
    for record in records:
        row_of(record, "")
    return records


def check_room(model, tokenizer, records, args):
    """Each prompt must leave room for --max-new-tokens; told before the first answer."""
    for record in records:
        row = encode_record(record, tokenizer, model.config.chat, model.config.tokens_per_image, answer=False)
        with naming(f"record {record['id']}"):
            model.check_room(len(row["ids"]), args.max_new_tokens)


def read_rows(args):
    """The rows of --score or --contract."""
    rows = [row for _, row in read_predictions(args.score or args.contract)]
    return [{**row, "references": references_of(row) or [row["answer"]]} for row in rows] if args.captions else rows


def score_file(args):
    rows = read_rows(args)
    scores = score(rows, args.metrics)
    print_table({"": scores})
    if args.benchmark:
        if BENCHMARKS[args.benchmark].metric not in scores:
            raise ValueError(f"--score {args.score}: no {BENCHMARKS[args.benchmark].metric} to compare; is it of "
                             f"{args.benchmark}?")
        print_published({args.benchmark: (args.split or "as given", {pathlib.Path(args.score).name: scores})})


def answer_columns(model, tokenizer, records, root, args, file, out):
    """{heading: scores} of the model, whose answers go to out if given; --compare adds a gray image and no MDA."""
    ask_all = partial(predict, model, tokenizer, records, root, args, file)
    rows = ask_all(args.blind)
    from_first(lambda: out and write_json_lines(out, rows, ensure_ascii=False))
    columns = {"gray image" if args.blind else "model": score(rows, args.metrics)}
    if args.compare:
        blind = ask_all(True, "gray image")
        mda, model.mda = model.mda, torch.nn.ModuleDict()
        without = ask_all(args.blind, "MDA off")
        model.mda = mda
        columns |= {"gray image": score(blind, args.metrics), "MDA off": score(without, args.metrics),
                    "best constant": score(constant_rows(rows), args.metrics)}
        changed = sum(a["prediction"] != b["prediction"] for a, b in zip(rows, without))
        print(f"switching MDA off changes {100 * changed / len(rows):.1f} % of the answers")
    return columns


def run_benchmarks(model, tokenizer, jobs, args, file=None):
    results = {}
    for name, (split, records, root) in jobs.items():
        out = pathlib.Path(args.out) if args.out else None
        if out and args.benchmark == "all":
            out = out.with_stem(f"{out.stem}-{name}")
        columns = answer_columns(model, tokenizer, records, root, args, file, out) if model else {}
        unasked = sanity_rows([row_of(record, "") for record in records], name, root)
        columns |= {heading: score(rows, args.metrics) for heading, rows in unasked.items()}
        print(f"\n{BENCHMARKS[name].title}, {split} split, {len(records):,} records, {args.model or 'no model'}")
        print_table(columns)
        answered = settings_of(model, records, root, args, args.blind) if model else {}
        from_first(partial(tell_contract, out, name, split, records, root, columns, answered))
        results[name] = split, columns
    print_sanity(results)
    print_published(results, args.benchmark == "all")


def check_jobs(args):
    """The benchmarks to ask; mistakes in their files come before the model is loaded."""
    jobs = benchmark_jobs(args) if args.benchmark else {}
    for name, (_, records, _) in jobs.items():
        for record in records:
            with naming(f"{name}, record {record['id']}"):
                check_form(record)
    return jobs


def open_model(args, device):
    """-> the model, as the flags want it, and its tokenizer."""
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    began = time.perf_counter()
    model = load_model(args.model, args.vision, args.llm, getattr(torch, args.dtype), device, True)
    if args.timings:
        print(f"loading {time.perf_counter() - began:.1f} s", file=sys.stderr)
    tokenizer = load_tokenizer(locate_weights(model.config.llm_dir, "language model"))
    if args.no_mda:
        model.mda = torch.nn.ModuleDict()
    if args.compile:
        compile_decoding(model.llm)
    return model, tokenizer


def run(args, device):
    if args.score:
        return score_file(args)
    if args.contract:
        return print_choices(read_rows(args))
    jobs = together(lambda: check_jobs(args))
    if args.sanity:
        return run_benchmarks(None, None, jobs, args)
    model, tokenizer = together(lambda: open_model(args, device))
    if args.image:
        return ask(model, tokenizer, args)
    lists = [records for _, records, _ in jobs.values()] or [together(lambda: other_records(args, model.config))]
    for records in lists:
        from_first(partial(check_room, model, tokenizer, records, args))
    file = together(lambda: PartialFile(f"{args.out}.partial", args.overwrite)
                    if args.out and rank_and_world()[0] == 0 else None)
    if jobs:
        run_benchmarks(model, tokenizer, jobs, args, file)
    else:
        print_table(answer_columns(model, tokenizer, lists[0], args.images, args, file, args.out))
    if file:
        os.remove(file.path)


def main():
    with StopSignal(), ending("evaluate.py"):
        rank, _, device = start_processes()
        if rank:                            # every process has all answers; the first one says what comes of them
            sys.stdout = open(os.devnull, "w")
        run(together(lambda: parse_args(__doc__)), device)


if __name__ == "__main__":
    main()
