"""
Small runs of train.py, killed at random moments and while they write, and resumed until they finish: their last weights
and their log must be those of a run that nothing interrupted, bit for bit.

    python -m checks.kills                      # 50 kills, 10 of them of two processes: some 4 minutes on 2 cores
    python -m checks.kills --kills 5 --seed 7

A kill is SIGKILL to every process of a run: torchrun, its processes and their data workers. The moments are drawn from
the seed; what a run is doing then depends on the machine, too. "In a write" are those that left a half-written file.
"""
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from safetensors.torch import load_file

from commands.arguments import SEEDS, Parser, whole

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 12
SMALL = ("--scenes", 24, "--batch", 4, "--micro", 2, "--steps", STEPS, "--save-every", 1, "--resume", "auto")
STAGE2 = ("--stage", 2, "--lora-dropout", 0.1, "--init-from", "stage 1, whole")
KINDS = {                                   # of runs: their share of the kills, processes, flags
    "stage 1": (0.4, 1, ("--stage", 1, "--workers", 0)),
    "stage 2, data workers": (0.4, 1, (*STAGE2, "--workers", 2)),
    "stage 2, two processes": (0.2, 2, (*STAGE2, "--workers", 1)),
}


def start(kind, out):
    _, processes, flags = KINDS[kind]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes) if processes > 1 else ()
    line = [sys.executable, *torchrun, ROOT / "train.py", *SMALL, *flags, "--out", out]
    with (out.parent / "output.txt").open("w") as output:
        return subprocess.Popen([*map(str, line)], cwd=out.parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                stdout=output, stderr=output)


def kill_all(process, out):
    """SIGKILL to every process with this folder in its command line, until there is none."""
    def alive(pid):
        try:
            return str(out).encode() in pathlib.Path("/proc", pid, "cmdline").read_bytes()
        except OSError:                     # it has ended
            return False

    while found := [pid for pid in os.listdir("/proc") if pid.isdigit() and alive(pid)]:
        for pid in found:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
    process.wait()


def wait_for_moment(process, out, rng):
    """Until a random moment: of the start, after a step, or while the checkpoint of a step is being written."""
    last = max((int(path.name[5:11]) for path in out.glob("step-*")), default=0)
    awaited = f"step-{last + rng.randint(1, 4):06d}"
    kind, share = rng.choice(("start", "step", "step", "write", "write")), rng.random()
    there = {"start": lambda: True, "step": (out / awaited).exists, "write": lambda: any(out.glob(f"{awaited}.*.tmp"))}
    while process.poll() is None and not there[kind]():
        time.sleep(0.001)
    end = time.monotonic() + share * {"start": 5, "step": 0.4, "write": 0.05}[kind]
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)


def run(kind, out, rng, kills):
    """A run, killed up to this many times, to its end -> how many kills there were, and how many in a write."""
    killed, writes = 0, 0
    while True:
        before, process = {*out.glob("*.tmp")}, start(kind, out)
        if killed < kills:
            wait_for_moment(process, out, rng)
        else:
            process.wait()
        if process.poll() is not None:
            break
        kill_all(process, out)
        killed += 1
        writes += bool({*out.glob("*.tmp")} - before)
    if process.returncode:
        raise ValueError(f"{kind}: {(out.parent / 'output.txt').read_text()[-2000:]}")
    return killed, writes


def outcome(out):
    """What a run leaves: its weights, its log without the seconds, and the names of its files."""
    weights = {name: p.numpy().tobytes() for name, p in load_file(out / "model.safetensors").items()}
    rows = [{**json.loads(line), "seconds": 0} for line in (out / "log.jsonl").open()]
    return {"weights": weights, "log": rows, "files": {*os.listdir(out)}}


def check(args):
    rng, all_killed, all_writes, different = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, (share, _, _) in KINDS.items():
            undisturbed = pathlib.Path(folder, f"{kind}, whole")
            run(kind, undisturbed, rng, 0)
            expected, left = outcome(undisturbed), round(share * args.kills)
            assert [row["step"] for row in expected["log"]] == [*range(1, STEPS + 1)], expected["log"]
            while left > 0:
                out = pathlib.Path(folder, f"{kind}, {left} kills left")
                killed, writes = run(kind, out, rng, left)
                found = outcome(out)
                wrong = [part for part in expected if found[part] != expected[part]]
                print(f"{kind}: {killed} kills, {writes} of them in a write; "
                      f"{f'DIFFERENT {wrong}' if wrong else 'weights, log and files are the same'}", flush=True)
                left, all_killed, all_writes = left - killed, all_killed + killed, all_writes + writes
                different += bool(wrong)
    print(f"{all_killed} kills, {all_writes} in a write; {different} runs differ")
    sys.exit(1 if different else 0)


def main():
    parser = Parser(prog="python -m checks.kills", description=__doc__)
    parser.add_argument("--kills", type=whole(1), default=50, help="in all (default 50)")
    parser.add_argument("--seed", type=whole(0, SEEDS), default=0, help="of the moments (default 0)")
    parser.run(check)


if __name__ == "__main__":
    main()
