"""
The same losses on every way through the same steps: in one process, with accumulated micro-batches, in two processes,
and stopped in the middle and resumed in another number of them; LoRA's dropout is on in stage 2.

    python -m checks.same_losses                # 100 steps of each way, stage and dtype: some 12 minutes on 2 cores

train.py runs as it is, in float32, and again with its whole model in float64, where rounding hides nothing. Printed are
the largest difference of the losses from those of one process, and that of the last weights, in parts of their length:
at most 1e-10 in float64, and 1e-5 (the weights) in float32, or the exit code is 1. The learning rate is that of the
paper's stage 1; with the tiny preset's, three times as large, a rounding error grows a millionfold in 100 steps.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file

import train
from commands.arguments import Parser, whole

ROOT = pathlib.Path(__file__).resolve().parent.parent
WAYS = {                                    # legs, each (processes, samples at once) of a batch of 4
    "one process": [(1, 4)],
    "accumulated": [(1, 1)],
    "two processes": [(2, 2)],
    "two, accumulated": [(2, 1)],
    "two, then one": [(2, 1), (1, 2)],
    "one, then two": [(1, 4), (2, 2)],
}
LIMITS = {"float64": (1e-10, 1e-10), "float32": (None, 1e-5)}                      # of losses, of weights
SMALL = ("--scenes", 24, "--batch", 4, "--lr", 1e-3, "--workers", 0)
STAGES = {1: (), 2: ("--lora-dropout", 0.1)}


def in_float64():
    """From now on train.py's models are in float64, trained parts too."""
    build = train.build
    train.build = lambda config, dtype, device: build(config, torch.float64, device).double()


def run(dtype, processes, flags):
    """train.py with these flags, its models in dtype."""
    double = "checks.same_losses.in_float64(); " if dtype == "float64" else ""
    program = [sys.executable, "-c", f"import checks.same_losses, train; {double}train.main()", *map(str, flags)]
    if processes > 1:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--no-python")
        program = [sys.executable, *torchrun, *program]
    done = subprocess.run(program, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(program)}: {done.stderr[-2000:]}")


def walk(dtype, legs, steps, out, flags):
    """A run in these legs -> its losses and its last weights."""
    for i, (processes, micro) in enumerate(legs):
        part = ("--resume", "auto") if i else ("--stop-after", steps // len(legs))
        run(dtype, processes, (*flags, "--micro", micro, "--steps", steps, "--out", out, *part))
    return outcome(out)


def outcome(out):
    """The losses of a run's steps, and its last weights."""
    rows = [json.loads(line) for line in (out / "log.jsonl").open()]
    assert [row["step"] for row in rows] == [*range(1, len(rows) + 1)], rows
    return [row["loss"] for row in rows], load_file(out / "model.safetensors")


def furthest(losses, expected):
    assert len(losses) == len(expected)
    return max(abs(a - b) for a, b in zip(losses, expected))


def drifted(one, two):
    """How far two sets of weights lie apart, in parts of their length."""
    length = lambda tensors: sum(t.double().square().sum().item() for t in tensors) ** 0.5
    return length([one[k] - two[k] for k in one]) / length(one.values())


def compare(args):
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype, (loss_limit, weight_limit) in LIMITS.items():
            start = ()
            for stage, more in STAGES.items():
                flags = ("--stage", stage, *SMALL, *more, *start)
                for name, legs in WAYS.items():
                    out = pathlib.Path(folder, f"{dtype} {stage} {name}")
                    losses, weights = walk(dtype, legs, args.steps, out, flags)
                    if name == "one process":
                        expected, start = (losses, weights), ("--init-from", out)
                        print(f"{dtype}, stage {stage}: loss {losses[0]:.4f} to {losses[-1]:.4f}", flush=True)
                        continue
                    loss, weight = furthest(losses, expected[0]), drifted(expected[1], weights)
                    bad = weight > weight_limit or loss_limit is not None and loss > loss_limit
                    wrong += [name] if bad else []
                    print(f"  {name:18} losses {loss:.1e}   weights {weight:.1e}{'   TOO FAR' if bad else ''}",
                          flush=True)
    sys.exit(1 if wrong else 0)


def main():
    parser = Parser(prog="python -m checks.same_losses", description=__doc__)
    parser.add_argument("--steps", type=whole(2), default=100, help="of each run (default 100)")
    parser.run(compare)


if __name__ == "__main__":
    main()
