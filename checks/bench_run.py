"""
What a large run costs beside the model, as scripts: the memory of many records, the time of many questions.

    python -m checks.bench_run records                          # 1.4 million, in 4 processes of 4 data workers each
    python -m checks.bench_run questions --model DIR            # one process of one thread against two of one thread
    python -m checks.bench_run questions --model DIR --other CHECKOUT   # this evaluate.py against that of a checkout

Memory is what the processes hold together (PSS: a shared page counts once). Times are of whole commands, in turns.
"""
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from commands.arguments import Parser, whole
from data import RecordFile
from files.text import write_json_lines
from toy.drawing import make_scene
from toy.scenes import make_records

ROOT = pathlib.Path(__file__).resolve().parent.parent
READ = 140_000                              # records that the workers of a process read


# ---------------------------------------------------------------------------------------------- records

def write_records(path, n):
    """Records as long as those of FIT-RS, some 600 bytes each."""
    words = random.Random(0).choices("ship harbor crane road building near left of the two large small".split(), k=1000)
    with path.open("w") as file:
        for i in range(n):
            turns = [("human", f"<image>\nWhich {' '.join(words[i % 900:i % 900 + 20])}?"),
                     ("gpt", " ".join(words[i % 890:i % 890 + 60]))]
            record = {"id": str(i), "image": f"{i // 5:04}__512__0___0.png",
                      "conversations": [{"from": role, "value": text} for role, text in turns]}
            file.write(json.dumps(record) + "\n")


class Lengths(Dataset):
    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return sum(len(turn["value"]) for turn in self.records[i]["conversations"])


def hold(form, path):
    """One process of a run: its workers read READ records from all over the file. Ends when its stdin does."""
    records = RecordFile(path) if form == "offsets" else list(map(json.loads, open(path)))
    numbers = random.Random(0).sample(range(len(records)), min(READ, len(records)))
    loader = DataLoader(Lengths(records), batch_size=64, sampler=numbers, num_workers=4, persistent_workers=True)
    print(sum(map(len, loader)), flush=True)
    sys.stdin.read()


def shared_out(pid):
    """PSS of a process and of those it has started, in bytes."""
    total = 0
    for line in open(f"/proc/{pid}/smaps_rollup"):
        total += int(line.split()[1]) * 1024 if line.startswith("Pss:") else 0
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return total + sum(map(shared_out, children))


def memory_of(form, path, processes=4):
    command = [sys.executable, "-m", "checks.bench_run", "hold", form, path]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    held = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(processes)]
    for process in held:
        process.stdout.readline()
    total = sum(shared_out(process.pid) for process in held)
    for process in held:
        process.communicate()
    return total


def bench_records(n):
    """
    In 4 processes of 4 workers, above what the same processes hold with a few records. As Python objects a tenth of
    them is measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        for form, count in (("offsets", n), ("objects", n // 10)):
            few, many = pathlib.Path(folder, "few.jsonl"), pathlib.Path(folder, "many.jsonl")
            write_records(few, 64)
            write_records(many, count)
            began = time.time()
            extra = memory_of(form, many) - memory_of(form, few)
            print(f"{form:8} {count:10,} records of {many.stat().st_size / count:.0f} bytes: {extra / 1e6:,.0f} MB, "
                  f"{extra / count:.0f} bytes a record ({time.time() - began:.0f} s)", flush=True)


# ---------------------------------------------------------------------------------------------- questions

def write_questions(folder, images, each):
    """Scenes as PNG files, and `each` questions about every one."""
    records = []
    for i in range(images):
        asked = make_records("test", 1, "vqa", size=128, start=i)
        Image.fromarray(make_scene("test", i, size=512).image).save(folder / f"{i}.png")
        records += [{**asked[k % len(asked)], "id": f"{i}-{k}", "image": f"{i}.png"} for k in range(each)]
    write_json_lines(folder / "asked.jsonl", records)


def evaluate(checkout, model, folder, processes, threads):
    """-> seconds of evaluate.py, and the answers."""
    out = folder / "answers.jsonl"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    start = torchrun if processes > 1 else []
    line = [sys.executable, *start, "evaluate.py", "--model", model, "--data", folder / "asked.jsonl",
            "--images", folder, "--out", out]
    began = time.time()
    subprocess.run(list(map(str, line)), cwd=checkout, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=True,
                   stdout=subprocess.DEVNULL)
    seconds, answers = time.time() - began, [json.loads(line)["prediction"] for line in out.open()]
    out.unlink()
    return seconds, answers


def bench_questions(args):
    """Two ways in turns. Seconds hold the start of Python and torch, some 5; more --images make them weigh less."""
    other = pathlib.Path(args.other or ROOT).resolve()
    ways = {"one process": (ROOT, 1, 1), "two processes": (ROOT, 2, 1)}
    if args.other:
        ways = {"the other": (other, 1, 2), "this one": (ROOT, 1, 2)}
    seconds, answers = {way: [] for way in ways}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_questions(pathlib.Path(folder), args.images, args.each)
        for _ in range(args.rounds):
            for way, (checkout, processes, threads) in ways.items():
                took, answers[way] = evaluate(checkout, args.model.resolve(), pathlib.Path(folder), processes, threads)
                seconds[way].append(took)
    first, second = ways
    same = sum(a == b for a, b in zip(answers[first], answers[second]))
    ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[second]))
    took = ", ".join(f"{way} {statistics.median(seconds[way]):.1f} s" for way in ways)
    print(f"{args.images} images x {args.each} questions: {took}, {ratio:.2f}x; {same} of {len(answers[first])} "
          "answers are equal")


def bench(args):
    if args.what == "records":
        return bench_records(args.records)
    if not args.model:
        raise ValueError("questions needs --model, a folder that train.py wrote")
    bench_questions(args)


def main():
    if sys.argv[1:2] == ["hold"]:           # our own child process
        return hold(*sys.argv[2:])
    parser = Parser(prog="python -m checks.bench_run", description=__doc__)
    add = parser.add_argument
    add("what", choices=("records", "questions"))
    add("--records", type=whole(1000, 10 ** 7), default=1_400_000, help="how many (default 1.4 million)")
    add("--model", type=pathlib.Path, help="questions: folder that train.py wrote")
    add("--other", help="questions: another checkout of this repository")
    add("--images", type=whole(1), default=150, help="questions: images (default 150)")
    add("--each", type=whole(1), default=20, help="questions about each (default 20)")
    add("--rounds", type=whole(1), default=3, help="questions: rounds; the median is printed (default 3)")
    parser.run(bench)


if __name__ == "__main__":
    main()
