"""
How soon does the tiny model answer four questions of five? train.py with captions alone in stage 1 and conversations
alone in stage 2, and a sixth of the steps, on two cores:

    time torchrun --nproc-per-node 2 -m checks.speedrun --stage 1 --micro 8 --scenes 1600 --out runs/fast/stage1
    time torchrun --nproc-per-node 2 -m checks.speedrun --stage 2 --micro 8 --scenes 4800 --init-from runs/fast/stage1 \
        --out runs/fast/stage2
    python evaluate.py --model runs/fast/stage2 --scenes 300

It hardly learns places, and has seen too few captions to write good ones: README's recipe is for these.
"""
from unittest.mock import patch

import train
from commands import samples

if __name__ == "__main__":
    with patch.dict(samples.BUILT_IN, aquila={1: {"caption": 1}, 2: {"chat": 1}}):
        train.main()
