"""
The losses of a small run beside those that are committed: what changes a step, changes them.

    torchrun --nproc-per-node 2 train.py --stage 1 --steps 100 --scenes 200 --batch 4 --micro 2 --lr 1e-3 --out DIR
    python -m checks.golden_losses DIR          # --write puts these in their place

A loss may differ by 0.004. Measured, the largest difference: 0.0005 from rounding (other micro-batches, one process,
instructions of older CPUs); of real changes 0.026 from weight decay 0.1 instead of 0.05 and 0.047 from none, 0.55 from
a warm-up of 0.05 instead of 0.06.
"""
import pathlib
import sys

import torch

from commands.arguments import Parser
from files.text import read_json, read_json_lines, write_json

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests/golden/losses.json"
TOLERANCE = 0.004


def compare(args):
    losses = [row["loss"] for _, row in read_json_lines(args.run / "log.jsonl")]
    if args.write:
        write_json(GOLDEN, {"torch": torch.__version__, "losses": [round(loss, 6) for loss in losses]})
    golden = read_json(GOLDEN)["losses"]
    if len(losses) != len(golden):
        raise ValueError(f"{args.run} has {len(losses)} losses, expected {len(golden)}; train as --help says")
    far, step = max((abs(a - b), step) for step, (a, b) in enumerate(zip(losses, golden), 1))
    print(f"{len(losses)} losses, {losses[0]:.4f} to {losses[-1]:.4f}: the largest difference is {far:.1e}, at step "
          f"{step}; at most {TOLERANCE} was expected")
    sys.exit(1 if far > TOLERANCE else 0)


def main():
    parser = Parser(prog="python -m checks.golden_losses", description=__doc__)
    parser.add_argument("run", type=pathlib.Path, help="folder of the run")
    parser.add_argument("--write", action="store_true", help="put its losses in the place of those committed")
    parser.run(compare)


if __name__ == "__main__":
    main()
