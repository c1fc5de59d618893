"""
Trains one stage of Aquila or Aquila-plus, on CPU or GPU, in one process or several.

    torchrun train.py --stage 1                                    # tiny preset, built-in scenes, no download
    torchrun train.py --stage 2                                    # goes on from runs/tiny/stage1
    torchrun train.py --preset tiny-plus --stage 1                 # Aquila-plus: stages 1, 2 and 3
    torchrun --nproc-per-node 4 train.py --preset aquila-8b --stage 1 --vision FILE --llm DIR --data FILE --images DIR

One step is one global batch, whatever the number of processes and micro-batches: the loss is summed over the learned
tokens and divided by their number in the whole batch, over all micro-batches and processes. A mean of means would be
another gradient, for answers are long and short.

A run that was interrupted goes on with --resume auto. No random state is kept, for every draw follows from the seed,
the step and the sample. Which samples a step has stands in commands/samples.py, the flags in commands/training.py, what
a run writes into its --out folder in files/run_folder.py.
"""
import contextlib
import math
import pathlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from aquila import LoRAConfig, build, config_to_dict, load_checkpoint, part_of, set_stage
from commands.memory import describe_memory
from commands.processes import (SharedMistake, Stopped, StopSignal, ending, from_first, gather, lock,
                                rank_and_world, start_processes, together)
from commands.samples import Batches, load_batches, open_data, share_out
from commands.sharding import joined, shard
from commands.training import describe_run, parse_args, resolve
from data import to_device
from files.run_folder import Log, check_checkpoint, clear, find_checkpoint, finish, load_state, save_checkpoint
from files.text import file_digest
from tokenizer import IGNORE

# ---------------------------------------------------------------------------------------------- recipes

@dataclass(frozen=True)
class Recipe:
    lr: float                               # peak, after a linear warm-up; then cosine down to zero
    decay: float                            # AdamW's weight decay
    warmup: float                           # share of the steps
    batch: int = 32                         # global: samples of one optimizer step
    micro: int = 8                          # samples a process takes at once
    grad_checkpoint: bool = False           # the LM's layers are computed again in the backward pass: less memory
    epochs: float = 1.0
    scenes: int = 0                         # built-in train scenes when no --data is given; 0: 1,000
    lora: LoRAConfig | None = None


# What each stage trains stands in aquila.TRAINS. The numbers of aquila-8b are the paper's (Table 2). ASSUMPTION: those
# of aquila-plus are not in its summary: stage 1 is Aquila's, 2 and 3 are Osprey's (with Aquila's batch and betas, and
# LoRA on the LM). micro and grad_checkpoint of the two large presets are such that 80 GB hold samples of any length up
# to max_len (python aquila.py --preset aquila-8b --memory).
RECIPES = {
    #                      lr           weight decay  warm-up ratio
    "aquila-8b": {1: Recipe(lr=1e-3, decay=0.05, warmup=0.06, micro=4, grad_checkpoint=True),
                  2: Recipe(lr=4e-5, decay=0.10, warmup=0.03, micro=4, grad_checkpoint=True,
                            lora=LoRAConfig(rank=64, alpha=16, dropout=0.05))},
    # The tiny parts learn from thousands of samples, not millions: larger steps, and more of them at once.
    "tiny": {1: Recipe(lr=3e-3, decay=0.05, warmup=0.06, micro=16, scenes=2400),
             2: Recipe(lr=2e-3, decay=0.10, warmup=0.03, micro=16, scenes=4400,
                       lora=LoRAConfig(rank=32, alpha=32, dropout=0.0))},
    # From some 80,000 captions and questions of 8,734 photographs.
    "small": {1: Recipe(lr=2e-3, decay=0.05, warmup=0.06, batch=64, micro=32),
              2: Recipe(lr=1.5e-3, decay=0.10, warmup=0.03, batch=32, micro=16,
                        lora=LoRAConfig(rank=32, alpha=32, dropout=0.05))},
    "aquila-plus-7b": {1: Recipe(lr=1e-3, decay=0.05, warmup=0.06, grad_checkpoint=True),
                       2: Recipe(lr=2e-5, decay=0.0, warmup=0.03, grad_checkpoint=True),
                       3: Recipe(lr=1e-5, decay=0.0, warmup=0.03, grad_checkpoint=True,
                                 lora=LoRAConfig(rank=64, alpha=16, dropout=0.05))},
    "tiny-plus": {1: Recipe(lr=3e-3, decay=0.05, warmup=0.06, micro=16, scenes=2400),
                  2: Recipe(lr=3e-3, decay=0.0, warmup=0.03, micro=16, scenes=5120),
                  3: Recipe(lr=2e-3, decay=0.0, warmup=0.03, micro=16, scenes=3700,
                            lora=LoRAConfig(rank=32, alpha=32, dropout=0.0))},
}
BETAS = (0.9, 0.95)
MAX_NORM = 1.0                              # ASSUMPTION: the gradient's norm is clipped at 1; nothing is said of it


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first warmup * steps, then cosine. ASSUMPTION: down to zero."""
    rise = warmup * steps
    if step < rise:
        return peak * min(1.0, (step + 1) / rise)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def optimizer_for(params, decay):
    """
    AdamW. ASSUMPTION: norms, biases and other vectors are not decayed. One tensor after the other: a GPU's default,
    all at once, would need room for one more copy of what is trained.
    """
    groups = [dict(params=[p for p in params if p.dim() > 1], weight_decay=decay),
              dict(params=[p for p in params if p.dim() <= 1], weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=BETAS, foreach=False)


# ---------------------------------------------------------------------------------------------- one step

def train_step(model, optimizer, batches, params, lr, autocast, world=1, max_norm=MAX_NORM):
    """
    One optimizer step over all micro-batches of all processes. -> (loss a learned token, gradient norm, tokens read)
    batches: this process's micro-batches of the step; params: the list of what is trained; lr: of this step; autocast:
    a context; world: the number of processes. The learned tokens are counted before the first backward, over all
    processes. Loss and gradient must be finite.
    """
    device = params[0].device
    counts = torch.tensor([sum(int((b["labels"] != IGNORE).sum()) for b in batches),
                           sum(int(b["lengths"].sum()) for b in batches)], dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(counts)
    learned, tokens = counts.tolist()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i, batch in enumerate(batches):
        # DDP exchanges gradients in the last backward only. The forward must run inside no_sync, too: it is there that
        # the choice is made. (A model of slices has no place to keep a whole gradient, and exchanges it each time.)
        wait = i < len(batches) - 1 and isinstance(model, nn.parallel.DistributedDataParallel)
        with model.no_sync() if wait else contextlib.nullcontext():
            with autocast:
                loss, _, _ = model(batch)
            (loss * world / max(learned, 1)).backward()                            # both average: undo it with * world
        total += loss.detach()
    if world > 1:
        dist.all_reduce(total)
    norm = joined(nn.utils.clip_grad_norm_(params, max_norm)).item()
    if not math.isfinite(total.item()) or not math.isfinite(norm):
        names = [name for part in gather([name for b in batches for name in b["names"]]) for name in part]
        raise SharedMistake(f"the loss is {total.item()}, the gradient's norm {norm}, over {learned:.0f} learned "
                            f"tokens; samples {names[:8]}; lower --lr or look at these records")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total.item() / max(learned, 1), norm, int(tokens)


@torch.no_grad()
def validate(model, batches, device, autocast):
    """-> the loss a learned token of held-back records, over all processes, and what here could not be read of them."""
    model.eval()
    sums, bad = torch.zeros(2, dtype=torch.float64, device=device), []             # loss, learned tokens
    for batch in batches:
        batch = to_device(batch, device)
        with autocast:
            loss, _, learned = model(batch)
        sums += torch.stack((loss, torch.full_like(loss, learned)))
        bad += batch["bad"]
    if rank_and_world()[1] > 1:
        dist.all_reduce(sums)
    mean = (sums[0] / sums[1]).item()
    if not math.isfinite(mean):
        raise SharedMistake(f"the loss of the --val records is {mean}, over {sums[1]:.0f} learned tokens; lower --lr")
    return mean, bad


# ---------------------------------------------------------------------------------------------- the loop

@dataclass
class Run:
    model: nn.Module
    recipe: Recipe
    out: pathlib.Path                       # its folder
    steps: int                              # of the whole schedule
    dtype: torch.dtype                      # of frozen weights, and of autocast if it is bfloat16
    frozen: dict                            # {frozen part: its checksum}, of what is in no checkpoint
    trainable: dict                         # {name: parameter} that this stage trains
    optimizer: torch.optim.Optimizer
    settings: dict                          # what must be the same when the run is resumed
    first: int = 0                          # steps that were done before
    loader: Iterator = None                 # batches of this process, from step `first` on
    held_back: DataLoader = None            # of --val, this process's share
    left_out: set = None                    # what was told of records that could not be read
    log: Log = None                         # of the first process, as what follows
    lock: IO = None


def train(run, args, device, stop):
    world, model, recipe = rank_and_world()[1], run.model, run.recipe
    ids = [device.index] if device.type == "cuda" else None
    ddp = model if world == 1 or args.shard else nn.parallel.DistributedDataParallel(model, device_ids=ids)
    autocast = torch.autocast(device.type, run.dtype, enabled=run.dtype == torch.bfloat16)
    params, accumulated = list(run.trainable.values()), recipe.batch // (recipe.micro * world)
    last = min(run.steps, args.stop_after or run.steps)
    stop.wait = True                        # from here on a signal waits until the running step is saved
    for step in range(run.first, last):
        lr = learning_rate(step, run.steps, recipe.lr, recipe.warmup)
        batches = together(lambda: [to_device(next(run.loader), device) for _ in range(accumulated)])
        for batch in batches:
            batch["draw"] = args.seed * 1_000_003 + step                           # LoRA's dropout draws from it
        model.train()
        model.vision.eval()
        loss, norm, tokens = train_step(ddp, run.optimizer, batches, params, lr, autocast, world)
        row = dict(step=step + 1, loss=loss, gnorm=norm, lr=lr, tokens=tokens)
        if device.type == "cuda":
            row["peak GB"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 1)
        bad = [text for batch in batches for text in batch["bad"]]
        if run.held_back is not None and (step + 1) % args.val_every == 0:
            row["val"], more = validate(model, run.held_back, device, autocast)
            bad += more
        end_step(run, args, row, bad, stop)
    if max(run.first, last) == run.steps:
        end_run(run)


def end_step(run, args, row, bad, stop):
    """
    Write the log, and a checkpoint when it is time; end the run if a signal has come, or if more records could not be
    read than --skip-bad allows. All processes call; row: of the log; bad: what this one could not read in the step.
    """
    rank, step = rank_and_world()[0], row["step"]
    signals, bad = zip(*gather((stop.number, bad)))
    new = sorted(set().union(*bad) - run.left_out)
    if new:
        row["left out"] = new
        run.left_out.update(new)
    if step == run.first + 1:
        report_idle_parts(run)
    if rank == 0:
        run.log.write(row)
    if any(signals) or step % args.save_every == 0 or step in (run.steps, args.stop_after):
        save_checkpoint(run, step, args.keep)
        if rank == 0:
            run.log.draw()
    if new and len(run.left_out) > args.skip_bad:
        raise SharedMistake(f"{len(run.left_out)} records could not be read, more than --skip-bad {args.skip_bad}; "
                            f"{run.out}/log.jsonl names them, the last is {new[-1]}")
    if any(signals) and step < run.steps:
        raise Stopped(max(signals), f"{signal.Signals(max(signals)).name}: saved step {step} of {run.steps} in "
                                    f"{run.out}; --resume auto goes on from there")


def end_run(run):
    report_idle_parts(run)
    norms = [f"layer {i} {joined(layer.sfi.wo.weight).norm():.2f}" for i, layer in run.model.mda.items()]
    if rank_and_world()[0] == 0:
        finish(run)
        print(f"MDA returns, norm of W_O (0 at the start): {', '.join(norms) or 'no MDA'}")
        print(f"wrote {run.out}/model.safetensors, config.json, log.jsonl, loss.png")


def report_idle_parts(run):
    """Say which trained parts have never had a gradient: all of Adam's means of it are still zero."""
    moved = {part_of(name) for name, p in run.trainable.items() if joined(run.optimizer.state[p]["exp_avg"]).any()}
    idle = sorted({*map(part_of, run.trainable)} - moved)
    if idle and rank_and_world()[0] == 0:
        print(f"warning: no gradient has reached {', '.join(idle)}; do the records have images, or masks?", flush=True)


def set_up(args, device):
    """All that the loop needs, and every mistake that can be found before the first step; all processes find it."""
    rank, world = rank_and_world()
    config, recipe, out, start = together(lambda: resolve(args, RECIPES[args.preset], world))
    held = together(lambda: lock(out / "run.lock") if rank == 0 else None)
    checkpoint = from_first(lambda: find_checkpoint(out, args.resume, args.overwrite))
    records, found = from_first(lambda: open_data(args, args.data, config, recipe))
    run = together(lambda: make_run(args, config, recipe, out, start, len(records), device))
    run.lock = held
    run.settings = from_first(lambda: settings_of(run, args, start, found.digests)) | run.settings
    if checkpoint:
        from_first(lambda: check_checkpoint(checkpoint, run.settings, args.force_resume))
        run.first = together(lambda: load_state(run, checkpoint))
    batches = Batches(found.lengths, recipe.batch, recipe.micro, run.steps, run.first, args.seed, rank, world)
    run.loader = iter(load_batches(records, batches, args, config, device))
    if args.val:
        held_back, told = from_first(lambda: open_data(args, args.val, config, recipe))
        batches = share_out(told.lengths, recipe.micro, rank, world)
        run.held_back = load_batches(held_back, batches, args, config, device)
    from_first(lambda: clear(out, args.overwrite))
    run.log = together(lambda: Log(out, run.first, run.steps) if rank == 0 else None)
    run.left_out = from_first(lambda: {text for row in run.log.rows for text in row.get("left out", ())})
    if rank == 0:
        describe_run(run, args, len(records), found.blank, world)
        if not args.shard:
            describe_memory(run, args.stage, optimizer_for, found.longest, world, device)
    return run


def make_run(args, config, recipe, out, start, samples, device):
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch.manual_seed(args.seed)
    model = build(config, dtype, "cpu" if args.shard else device)
    if start:
        load_checkpoint(model, start, new_parts_keep_start=True)
    frozen, settings = model.checksums(), {"weights of": model.checksums(all_bits=True)}
    if args.shard:
        shard(model, device, dtype)
    trainable = set_stage(model, args.stage)
    model.llm.grad_checkpoint = recipe.grad_checkpoint
    steps = args.steps or math.ceil(samples * recipe.epochs / recipe.batch)
    optimizer = optimizer_for(list(trainable.values()), recipe.decay)
    return Run(model, recipe, out, steps, dtype, frozen, trainable, optimizer, settings)


def settings_of(run, args, start, digests):
    """
    What decides the gradient of every step, and must be the same when a run is resumed. Micro-batches, checkpoints of
    activations, processes and paths decide nothing; epochs and scenes show in steps and data.
    """
    recipe, model = config_to_dict(run.recipe), config_to_dict(run.model.config)
    free = "micro", "grad_checkpoint", "epochs", "scenes"
    return {"stage": args.stage, "steps": run.steps, "seed": args.seed, "dtype": str(run.dtype).removeprefix("torch."),
            "recipe": {name: recipe[name] for name in recipe if name not in free},
            "model": {name: model[name] for name in model if name not in ("vision_file", "llm_dir")},
            "init-from": start and file_digest(pathlib.Path(start, "model.safetensors"))[:16], **digests}


# ---------------------------------------------------------------------------------------------- command line

def main():
    with StopSignal() as stop, ending("train.py"):
        device = start_processes()[-1]
        args = together(lambda: parse_args(__doc__))
        train(set_up(args, device), args, device, stop)


if __name__ == "__main__":
    main()
