"""
Is the prediction of `python aquila.py --memory` right? Models of a CPU's size are trained for two real steps, each in a
process of its own, and the peak of the process is compared with what commands/memory.py says.

    python -m checks.memory                # a line a case; exit code 1 if one is further than 15 % off
    python -m checks.memory --cases lora --dtype bfloat16

Measured is the resident memory (VmHWM) above that before the model was built, after a step of a small model has set up
threads and libraries. Blocks of 64 kB and more come from the system and go back to it: else the peak has holes in it,
left by what was freed ("align" measures a fifth more). In bfloat16 oneDNN keeps packed weights of its own: without it
"align" is within 2 %. "checkpoint" measures less than predicted: the gradients of the windows are added in place.
"""
import dataclasses
import os
import subprocess
import sys
from functools import partial

import torch

from aquila import LM, PRESETS, LoRAConfig, VisionEncoder, assemble, set_stage
from checks.bench import ROOT, peak_memory
from commands.arguments import Parser
from commands.memory import predict
from convnext import ConvNeXtConfig
from data import collate
from llama import LlamaConfig
from tokenizer import IGNORE, IMAGE_SLOT
from train import Recipe, optimizer_for, train_step

TINY, WITHIN = PRESETS["tiny"], 0.15
WIDE, NARROW = (ConvNeXtConfig((2, 2, 2, 2), (w, 2 * w, 4 * w, 8 * w)) for w in (64, 32))
RECIPE = Recipe(lr=1e-3, decay=0.1, warmup=0, batch=4, micro=2)


def lm(dim, layers, vocab=32000):
    return LlamaConfig(dim=dim, n_layers=layers, n_heads=8, n_kv_heads=2, ffn_dim=3 * dim, vocab_size=vocab)


CASES = {                                   # name: config, stage, recipe, tokens of a sample
    "align": (dataclasses.replace(TINY, vision=WIDE, image_size=512, dim=256, mda_layers=(0, 4), llm=lm(384, 8)),
              1, RECIPE, 384),
    "lora": (dataclasses.replace(TINY, vision=NARROW, image_size=256, dim=256, mda_layers=(0, 4), llm=lm(512, 8),
                                 lora=LoRAConfig()), 2, RECIPE, 256),
    "checkpoint": (dataclasses.replace(TINY, vision=WIDE, image_size=512, dim=512, mda_layers=(0, 4),
                                       llm=lm(512, 8), lora=LoRAConfig()),
                   2, dataclasses.replace(RECIPE, grad_checkpoint=True), 384),
}


def train_two_steps(config, stage, recipe, tokens, dtype):
    """As train.py does it, on random numbers."""
    model = assemble(config, VisionEncoder(config.vision).to(dtype), LM(config.llm).to(dtype)).train()
    params = list(set_stage(model, stage).values())
    optimizer = optimizer_for(params, recipe.decay)
    model.llm.grad_checkpoint = recipe.grad_checkpoint
    autocast = torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)
    for step in range(2):
        batches = [real_batch(config, recipe.micro, tokens) | {"draw": step} for _ in range(2)]
        train_step(model, optimizer, batches, params, recipe.lr, autocast)


def real_batch(config, micro, tokens):
    slots = config.tokens_per_image
    text = torch.randint(config.llm.vocab_size, (tokens - slots,)).tolist()
    return collate([dict(id="", ids=[IMAGE_SLOT] * slots + text, labels=[IGNORE] * slots + text,
                         images=[torch.randn(3, config.image_size, config.image_size)]) for _ in range(micro)])


def compare(name, dtype):
    """Print a line about a case. -> predicted over measured"""
    config, stage, recipe, tokens = CASES[name]
    torch.manual_seed(0)
    small = dataclasses.replace(config, vision=TINY.vision, image_size=64, dim=32, mda_layers=(0,), llm=lm(64, 2, 320))
    train_two_steps(small, stage, recipe, 24, dtype)
    measured = peak_memory(partial(train_two_steps, config, stage, recipe, tokens, dtype)) * 2 ** 20
    found = predict(config, stage, recipe, optimizer_for, tokens, dtype)
    ratio = found["peak"] / measured
    print(f"{name:12}{str(dtype).removeprefix('torch.'):10}{found['activations'] / 1e6:18.0f}"
          f"{found['peak'] / 1e6:14.0f}{measured / 1e6:13.0f}{ratio:8.3f}", flush=True)
    return ratio


def run(args):
    print(f"{'case':12}{'dtype':10}{'activations, MB':>18}{'predicted':>14}{'measured':>13}{'ratio':>8}", flush=True)
    wrong = 0
    for dtype in args.dtype:
        for name in args.cases:
            command = [sys.executable, "-m", "checks.memory", "one", name, dtype]
            wrong += subprocess.run(command, cwd=ROOT, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}).returncode
    sys.exit(bool(wrong))


def main():
    if sys.argv[1:2] == ["one"]:            # our own child process
        sys.exit(abs(compare(sys.argv[2], getattr(torch, sys.argv[3])) - 1) > WITHIN)
    parser = Parser(prog="python -m checks.memory", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default all")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"],
                        help="of frozen weights and autocast (default float32)")
    parser.run(run)


if __name__ == "__main__":
    main()
