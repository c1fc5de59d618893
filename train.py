"""
Trains one stage of Aquila or Aquila-plus, on CPU or GPU, in one process or several.

    torchrun train.py --stage 1                                    # tiny preset, built-in scenes, no download
    torchrun train.py --stage 2                                    # goes on from runs/tiny/stage1
    torchrun train.py --preset tiny-plus --stage 1                 # Aquila-plus: stages 1, 2 and 3
    torchrun --nproc-per-node 4 train.py --preset aquila-8b --stage 1 --vision FILE --llm DIR --data FILE --images DIR

One step is one global batch, whatever the number of processes and micro-batches: the loss is summed over the learned
tokens and divided by their number in the whole batch, over all micro-batches and processes. A mean of means would be
another gradient, for answers are long and short.

Every run writes to its --out folder: log.jsonl; state.pt, what --resume needs besides the files that the run started
from: step, weights, optimizer; and, when the schedule is finished, model.safetensors and config.json (what was trained)
and loss.png. No random state is kept, for every draw follows from the seed, the step and the process.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from aquila import (PRESETS, TRAINS, LoRAConfig, build, config_to_dict, count_parameters, load_config, load_checkpoint,
                    locate_weights, part_of, save_model, set_stage)
from commands.arguments import SEEDS, Parser, end, real, whole
from data import CHATS, Records, collate, image_names, read_records, to_device
from files.checked_json import checked
from files.text import one_line, path_inside, regular_file, written_whole
from files.weights import StoredTensor, fill
from pictures.curve import draw_curve
from tokenizer import IGNORE, load_tokenizer
from toy.scenes import make_records

# ---------------------------------------------------------------------------------------------- recipes

@dataclass(frozen=True)
class Recipe:
    lr: float                               # peak, after a linear warm-up; then cosine down to zero
    decay: float                            # AdamW's weight decay
    warmup: float                           # share of the steps
    batch: int = 32                         # global: samples of one optimizer step
    micro: int = 8                          # samples a process takes at once
    epochs: float = 1.0
    scenes: int = 0                         # built-in train scenes when no --data is given; 0: 1,000
    lora: LoRAConfig | None = None


# What each stage trains stands in aquila.TRAINS. The numbers of aquila-8b are the paper's (Table 2). ASSUMPTION: those
# of aquila-plus are not in its summary: stage 1 is Aquila's, 2 and 3 are Osprey's (with Aquila's batch and betas, and
# LoRA on the LM).
RECIPES = {
    #                      lr           weight decay  warm-up ratio
    "aquila-8b": {1: Recipe(lr=1e-3, decay=0.05, warmup=0.06),
                  2: Recipe(lr=4e-5, decay=0.10, warmup=0.03, lora=LoRAConfig(rank=64, alpha=16, dropout=0.05))},
    # The tiny parts learn from thousands of samples, not millions: larger steps, and more of them at once.
    "tiny": {1: Recipe(lr=3e-3, decay=0.05, warmup=0.06, micro=16, scenes=2400),
             2: Recipe(lr=2e-3, decay=0.10, warmup=0.03, micro=16, scenes=7200,
                       lora=LoRAConfig(rank=32, alpha=32, dropout=0.0))},
    "aquila-plus-7b": {1: Recipe(lr=1e-3, decay=0.05, warmup=0.06),
                       2: Recipe(lr=2e-5, decay=0.0, warmup=0.03),
                       3: Recipe(lr=1e-5, decay=0.0, warmup=0.03,
                                 lora=LoRAConfig(rank=64, alpha=16, dropout=0.05))},
    "tiny-plus": {1: Recipe(lr=3e-3, decay=0.05, warmup=0.06, micro=16, scenes=2400),
                  2: Recipe(lr=3e-3, decay=0.0, warmup=0.03, micro=16, scenes=5120),
                  3: Recipe(lr=2e-3, decay=0.0, warmup=0.03, micro=16, scenes=3700,
                            lora=LoRAConfig(rank=32, alpha=32, dropout=0.0))},
}
BETAS = (0.9, 0.95)
MAX_NORM = 1.0                              # ASSUMPTION: the gradient's norm is clipped at 1; the papers do not say


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first warmup * steps, then cosine. ASSUMPTION: down to zero."""
    rise = warmup * steps
    if step < rise:
        return peak * min(1.0, (step + 1) / rise)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def optimizer_for(params, decay):
    """AdamW. ASSUMPTION: norms, biases and other vectors are not decayed."""
    groups = [dict(params=[p for p in params if p.dim() > 1], weight_decay=decay),
              dict(params=[p for p in params if p.dim() <= 1], weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=BETAS)


# ---------------------------------------------------------------------------------------------- one step

def train_step(model, optimizer, batches, params, lr, autocast, world=1, max_norm=MAX_NORM):
    """
    One optimizer step over all micro-batches of all processes. -> (loss a learned token, gradient norm, tokens read)
    The learned tokens are counted before the first backward, over all processes.
    """
    device = params[0].device
    counts = torch.tensor([sum(int((b["labels"] != IGNORE).sum()) for b in batches),
                           sum(int(b["lengths"].sum()) for b in batches)], dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(counts)
    learned, tokens = counts.tolist()
    total = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        # DDP exchanges gradients in the last backward only. The forward must run inside no_sync, too: it is there that
        # the choice is made.
        last = i == len(batches) - 1
        with contextlib.nullcontext() if world == 1 or last else model.no_sync():
            with autocast:
                loss, _, _ = model(batch)
            (loss * world / max(learned, 1)).backward()                            # DDP averages: undo it with * world
        total += loss.detach()
    if world > 1:
        dist.all_reduce(total)
    if not math.isfinite(total.item()):
        raise ValueError(f"the loss is {total.item()}, over {learned:.0f} learned tokens; samples "
                         f"{[n for b in batches for n in b['names']][:8]}; lower --lr or look at these records")
    norm = nn.utils.clip_grad_norm_(params, max_norm).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total.item() / max(learned, 1), norm, int(tokens)


# ---------------------------------------------------------------------------------------------- the loop

@dataclass
class Run:
    model: nn.Module
    recipe: Recipe
    out: pathlib.Path                       # its folder
    steps: int                              # of the whole schedule
    dtype: torch.dtype                      # of frozen weights, and of autocast if it is bfloat16
    trainable: dict                         # {name: parameter} that this stage trains
    optimizer: torch.optim.Optimizer
    settings: dict                          # what must be the same when the run is resumed
    first: int = 0                          # steps that were done before
    loader: Iterator = None                 # batches of this process, from step `first` on


def train(run, args, rank, world, device):
    model, recipe = run.model, run.recipe
    ids = [device.index] if device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel(model, device_ids=ids) if world > 1 else model
    model.train()
    model.vision.eval()
    autocast = torch.autocast(device.type, run.dtype, enabled=run.dtype == torch.bfloat16)
    params, turns = list(run.trainable.values()), recipe.batch // (recipe.micro * world)
    log = Log(run.out, run.first, run.steps) if rank == 0 else None
    for step in range(run.first, min(run.steps, args.stop_after or run.steps)):
        # Dropout draws from (seed, step, process), so a resumed run needs no saved random state.
        torch.manual_seed((args.seed * 1_000_003 + step) * 1024 + rank)
        lr = learning_rate(step, run.steps, recipe.lr, recipe.warmup)
        batches = together(lambda: [to_device(next(run.loader), device) for _ in range(turns)], world)
        loss, norm, tokens = train_step(ddp, run.optimizer, batches, params, lr, autocast, world)
        if rank == 0:
            if step == run.first:
                report_idle_parts(run)
            log.step(step + 1, loss, norm, lr, tokens)
            if (step + 1) % args.save_every == 0 or step + 1 in (run.steps, args.stop_after):
                save_state(run, step + 1)
    if rank == 0 and log.rows and log.rows[-1]["step"] == run.steps:
        report_idle_parts(run)
        save_model(model, run.out)
        draw_curve([row["loss"] for row in log.rows], run.out / "loss.png")
        norms = [f"layer {i} {layer.sfi.wo.weight.norm():.2f}" for i, layer in model.mda.items()]
        print(f"MDA returns, norm of W_O (0 at the start): {', '.join(norms) or 'no MDA'}")
        print(f"wrote {run.out}/model.safetensors, config.json, log.jsonl, loss.png")


def report_idle_parts(run):
    """Say which trained parts have never had a gradient: all of Adam's means of it are still zero."""
    moved = {part_of(name) for name, p in run.trainable.items() if run.optimizer.state[p]["exp_avg"].any()}
    idle = sorted({*map(part_of, run.trainable)} - moved)
    if idle:
        print(f"warning: no gradient has reached {', '.join(idle)}; do the records have images, or masks?", flush=True)


def set_up(args, rank, world, device):
    """All that the loop needs, and every mistake that can be found before the first step."""
    config, recipe, out, start_from = resolve(args)
    if recipe.batch % (recipe.micro * world):
        raise ValueError(f"batch {recipe.batch} is not a multiple of micro {recipe.micro} x {world} process(es); "
                         "set --micro")
    records, digest = open_data(args, recipe, config)
    steps = args.steps or math.ceil(len(records) * recipe.epochs / recipe.batch)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch.manual_seed(args.seed)
    model = build(config, dtype, device)
    if start_from:
        load_checkpoint(model, start_from, new_parts_keep_start=True)
    trainable = set_stage(model, args.stage)
    model.llm.grad_checkpoint = args.grad_checkpoint
    optimizer = optimizer_for(list(trainable.values()), recipe.decay)
    settings = dict(stage=args.stage, config=config_to_dict(model.config), recipe=config_to_dict(recipe), steps=steps,
                    data=digest, processes=world, seed=args.seed)
    run = Run(model, recipe, out, steps, dtype, trainable, optimizer, settings)
    state = find_state(args, out)
    if rank == 0:                           # one process makes the folder; the others wait where set_up ends
        make_folder(out)
    run.first = load_state(run, state) if state else 0
    run.loader = load_batches(records, args, run, rank, world, device)
    if rank == 0:
        describe_run(run, args, records, world)
    return run


def together(work, world):
    """
    -> work(), done in every process. A mistake in one of them stops all with the same ValueError: its line is printed
    once, whichever process met it, and no process prints a traceback because another is gone.
    """
    result = mistake = None
    try:
        result = work()
    except (ValueError, OSError) as e:
        mistake = str(e)
    mistakes = [mistake] * world
    if world > 1:
        dist.all_gather_object(mistakes, mistake)
    for mistake in filter(None, mistakes):
        raise ValueError(mistake)
    return result


def start_processes():
    """-> (rank, number of processes, device). torchrun sets the environment; a plain python run is one process."""
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank, world, torch.device("cuda", local) if cuda else torch.device("cpu")


# ---------------------------------------------------------------------------------------------- data

BUILT_IN = {"aquila": {1: ("chat", "caption"), 2: ("chat", "caption")},
            "aquila-plus": {1: ("chat", "caption"), 2: ("region chat",), 3: ("region chat", "region", "chat")}}


def open_data(args, recipe, config):
    """The records of the run, all checked for form and for missing image files, and a fingerprint of them."""
    if args.data is None:
        records = built_in_records(config.family, args.stage, recipe.scenes or 1000, config.image_size)
    else:
        records = read_records(args.data)
    for record in records:
        for name in image_names(record):
            try:
                if not name.startswith("scene:"):
                    path_inside(name, args.images, "image")
            except (ValueError, FileNotFoundError) as e:
                raise ValueError(f"{args.data}, record {record['id']}: {e}") from None
    lines = "\n".join(json.dumps(record, sort_keys=True) for record in records)
    return records, hashlib.sha256(lines.encode()).hexdigest()[:16]


def built_in_records(family, stage, n, size):
    """Of n train scenes, from number (stage - 1) * n on, a record of every kind above, wordings taking turns."""
    found = []
    for task in BUILT_IN[family][stage]:
        by_scene = {}
        for record in make_records("train", n, task, size=size, start=(stage - 1) * n):
            by_scene.setdefault(record["image"], []).append(record)
        found += [group[i % len(group)] for i, group in enumerate(by_scene.values())]
    return found


class Batches:
    """
    The sample numbers of each micro-batch of this process, from step `start` to `steps`.

    Every epoch is a permutation drawn from (seed, epoch); the last batch is filled up from the next epoch, so that
    nothing is dropped. Inside a step samples are sorted by length (in characters, before tokens are made), for those of
    one micro-batch are padded to the longest; the gradient of the step is the same sum.
    """

    def __init__(self, lengths, batch, micro, steps, start, seed, rank, world):
        self.lengths, self.batch, self.micro, self.steps, self.start = lengths, batch, micro, steps, start
        self.seed, self.rank, self.world = seed, rank, world

    def __len__(self):
        return (self.steps - self.start) * self.batch // (self.micro * self.world)

    def __iter__(self):
        n, epoch, order = len(self.lengths), -1, None
        for step in range(self.start, self.steps):
            picked = []
            for i in range(step * self.batch, (step + 1) * self.batch):
                if i // n != epoch:
                    epoch = i // n
                    generator = torch.Generator().manual_seed(self.seed * 10007 + epoch)
                    order = torch.randperm(n, generator=generator).tolist()
                picked.append(order[i % n])
            picked.sort(key=lambda i: self.lengths[i])
            for turn, begin in enumerate(range(0, self.batch, self.micro * self.world)):
                # Every second time in reverse order, so that no process always gets the longest.
                place = self.rank if turn % 2 == 0 else self.world - 1 - self.rank
                first = begin + place * self.micro
                yield picked[first:first + self.micro]


def load_batches(records, args, run, rank, world, device):
    """An iterator over the batches of this process, from step run.first on."""
    lengths = [sum(len(turn["value"]) for turn in record["conversations"]) for record in records]
    batches = Batches(lengths, run.recipe.batch, run.recipe.micro, run.steps, run.first, args.seed, rank, world)
    config = run.model.config
    tokenizer = load_tokenizer(locate_weights(config.llm_dir, "language model"))
    return iter(DataLoader(Records(records, args.images, tokenizer, config), batch_sampler=batches, collate_fn=collate,
                           num_workers=args.workers, pin_memory=device.type == "cuda"))


# ---------------------------------------------------------------------------------------------- files of a run

def find_state(args, out):
    """The state.pt that the run goes on from, or None; a run that is there is not overwritten unasked."""
    named = args.resume not in (None, "auto")
    state = pathlib.Path(args.resume if named else out, "state.pt")
    if named and not state.exists():
        raise ValueError(f"--resume {args.resume}: no state.pt there; --resume auto starts anew when there is none")
    if args.resume is None and state.exists() and not args.overwrite:
        raise ValueError(f"{out} holds a run; --resume auto goes on with it, --overwrite starts anew, "
                         "--out takes another folder")
    return state if args.resume is not None and state.exists() else None


def make_folder(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as e:
        raise ValueError(f"{out} cannot be written: {e.strerror}; choose another --out") from None


def save_state(run, step):
    with written_whole(run.out / "state.pt") as temporary:
        torch.save({"step": step, "settings": run.settings, "optimizer": run.optimizer.state_dict(),
                    "trained": {name: p.detach().cpu() for name, p in run.trainable.items()}}, temporary)


def load_state(run, path):
    """Put a run back where it was, -> the next step; refused when one of its settings is another."""
    try:
        state = torch.load(regular_file(path), map_location="cpu", weights_only=True)
        step, settings = state["step"], state["settings"]
        changed = [name for name, value in run.settings.items() if settings.get(name) != value]
        if not changed:
            checked(step, int, "step", 1, run.steps)
            stored = [(name, StoredTensor(tuple(t.shape), t.dtype, t.clone)) for name, t in state["trained"].items()]
            fill(run.trainable, stored, "its weights")
            run.optimizer.load_state_dict(state["optimizer"])
    except Exception as e:                  # a damaged pickle fails in every way there is
        raise ValueError(f"{path} is damaged ({one_line(e)[:200]}); --overwrite starts anew") from None
    for name in changed:
        raise ValueError(one_line(f"{path}: the run to resume had {name} {settings.get(name)}, now it is "
                                  f"{run.settings[name]}; give the same flags, or start a new run with --init-from"))
    return step


class Log:
    """log.jsonl, a line a step, and the line a person watches."""

    def __init__(self, folder, start, steps):
        self.path, self.start, self.steps = folder / "log.jsonl", start, steps
        old = self.path.read_text().splitlines() if start and self.path.exists() else []
        self.rows = [row for row in map(json.loads, old) if row["step"] <= start]
        self.file = None
        self.began = self.last = time.time()

    def step(self, step, loss, norm, lr, tokens):
        now = time.time()
        seconds, self.last = now - self.last, now
        self.rows.append(dict(step=step, loss=round(loss, 5), gnorm=round(norm, 4), lr=lr, tokens=tokens,
                              seconds=round(seconds, 3)))
        new = self.rows[-1:]
        if self.file is None:               # not before the first step has worked; a resumed run keeps its lines
            self.file, new = self.path.open("w"), self.rows
        self.file.writelines(json.dumps(row) + "\n" for row in new)
        self.file.flush()
        left = (self.last - self.began) / (step - self.start) * (self.steps - step)
        line = (f"step {step}/{self.steps} | loss {loss:.4f} | {tokens / seconds:7,.0f} tok/s | "
                f"lr {lr:.2e} | gnorm {norm:6.2f} | {left:5.0f} s left")
        if sys.stdout.isatty():
            print(f"\r{line}", end="\n" if step == self.steps else "", flush=True)
        elif step % 20 == 0 or step in (1, self.steps):
            print(line, flush=True)


def describe_run(run, args, records, world):
    recipe, trained = run.recipe, count_parameters(run.trainable.items())
    frozen = sum(p.numel() for p in run.model.parameters()) - sum(trained.values())
    parts = ", ".join(f"{part} {count:,}" for part, count in trained.items())
    print(f"{args.preset}, stage {args.stage}: trains {parts}; frozen {frozen:,}")
    blank = sum(not image_names(record) for record in records)
    print(f"{len(records):,} samples" + (f" ({blank:,} of them without an image)" if blank else "") +
          f", {run.steps} steps of {recipe.batch} = micro {recipe.micro} x {world} process(es) "
          f"x {recipe.batch // (recipe.micro * world)} accumulated")
    print(f"AdamW lr {recipe.lr:g}, betas {BETAS}, weight decay {recipe.decay:g}, warm-up {recipe.warmup:g}, cosine, "
          f"seed {args.seed}" + (f", LoRA rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}, dropout "
                                 f"{recipe.lora.dropout:g}" if recipe.lora else ""), flush=True)
    if run.first:
        print(f"resumed after step {run.first} of {run.steps}", flush=True)


# ---------------------------------------------------------------------------------------------- command line

def layers(text):
    """An argparse type: "0,4,8" -> (0, 4, 8)."""
    try:
        return () if text == "none" else tuple(sorted({int(i) for i in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 'none' or numbers such as 0,4,8") from None


def parse_args():
    p = Parser(prog="train.py", description=__doc__)
    add = p.add_argument
    add("--preset", default="tiny", choices=PRESETS, help="default tiny")
    add("--stage", type=int, required=True, choices=(1, 2, 3), help="aquila: 1 aligns, 2 instructs with LoRA; "
        "aquila-plus: 1 image-text, 2 mask-text, 3 all with LoRA")
    add("--data", help=".jsonl or .json file of records (default: the built-in scenes)")
    add("--images", default=".", help="folder that image paths start from (default: here)")
    add("--scenes", type=whole(1), help="built-in train scenes, when there is no --data (default: the recipe's)")
    add("--vision", help="ConvNeXt weights: open_clip, timm or original file (default: the preset's)")
    add("--llm", help="Llama folder, Hugging Face or Meta layout (default: the preset's)")
    add("--out", help="folder of the run (default runs/PRESET/stageN)")
    add("--init-from", help="start from the weights of this run (default, from stage 2 on: the stage before)")
    add("--resume", help="'auto': go on with the run in --out if there is one; or the folder of a run")
    add("--overwrite", action="store_true", help="start anew although --out holds a run")
    add("--steps", type=whole(1), help="length of the schedule (default: as --epochs says)")
    add("--stop-after", type=whole(1), help="end the process after this step, the schedule unchanged; then --resume")
    add("--save-every", type=whole(1), default=200, help="steps between saves of state.pt (default 200)")
    add("--seed", type=whole(0, SEEDS), default=0, help="default 0")
    add("--workers", type=whole(0, 1000), default=min(4, os.cpu_count() // 4),
        help="data processes of each process; 0: none (default: a quarter of the cores, at most 4)")
    add("--dtype", choices=("float32", "bfloat16"), help="of frozen weights and of autocast (default: bfloat16 on GPU)")
    add("--grad-checkpoint", action=argparse.BooleanOptionalAction, default=False,
        help="recompute LM layers in the backward pass: less memory, more time")
    add = p.add_argument_group("model (stage 1 decides, later stages keep it)").add_argument
    add("--integration", choices=("sfi", "concat"), help="Table 5: SFI or the Concat baseline")
    add("--mda-layers", type=layers, help="Table 5: 'none', or LM layers that SFI runs before, for instance 0,4,8")
    add("--pooling", choices=("area", "binary"), help="aquila-plus: how masks weigh features")
    add("--image-size", type=whole(32, 8192), help="side in pixels, a multiple of 32")
    add("--fit", choices=("resize", "letterbox"), help="how an image becomes square")
    add("--chat", choices=tuple(CHATS), help="chat format")
    add("--max-len", type=whole(1), help="tokens of a prompt with its answer, image tokens included")
    add = p.add_argument_group("recipe (defaults: the preset's, printed at the start)").add_argument
    add("--lr", type=real(1e-12, 10), help="peak learning rate")
    add("--decay", type=real(0, 1), help="weight decay")
    add("--warmup", type=real(0, 1), help="share of the steps that the learning rate rises")
    add("--epochs", type=real(1e-6, 1000), help="passes over the data")
    add("--batch", type=whole(1), help="global batch: samples of one optimizer step")
    add("--micro", type=whole(1), help="samples a process takes at once; batch / (micro x processes) accumulate")
    add("--lora-rank", type=whole(1, 4096), help="last stage")
    add("--lora-alpha", type=real(1e-6, 10_000), help="last stage")
    add("--lora-dropout", type=real(0, 0.99), help="last stage")
    add("--full-llm", action="store_true", help="aquila-plus, stage 3: the LM's own weights learn, instead of LoRA")
    return p.parse_args()


def given(args, *fields, prefix=""):
    """{field: value} of the flags that were given."""
    values = {field: getattr(args, prefix + field) for field in fields}
    return {field: value for field, value in values.items() if value is not None}


def resolve(args):
    """Flags -> (config, recipe, out folder, folder to start from or None); ValueError for what makes no sense."""
    if args.stage not in RECIPES[args.preset]:
        stages = ", ".join(map(str, RECIPES[args.preset]))
        raise ValueError(f"--stage {args.stage}: {args.preset} has the stages {stages}")
    recipe = resolve_recipe(args, RECIPES[args.preset][args.stage])
    out = pathlib.Path(args.out or f"runs/{args.preset}/stage{args.stage}")
    start = args.init_from or (f"runs/{args.preset}/stage{args.stage - 1}" if args.stage > 1 else None)
    if start and not os.path.exists(os.path.join(start, "model.safetensors")):
        advice = "give another --init-from" if args.init_from else f"run --stage {args.stage - 1} first, or --init-from"
        raise ValueError(f"no model.safetensors in {start}, the finished stage to start from; {advice}")
    model = given(args, "integration", "image_size", "fit", "chat", "max_len", "pooling", "mda_layers")
    config = load_config(start) if start else PRESETS[args.preset]
    wrong = [f"{k} {v!r}" for k, v in model.items() if start and getattr(config, k) != v]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} contradicts {start}, which decides it; leave the flag out")
    config = replace(config, **model, vision_file=args.vision or config.vision_file,
                     llm_dir=args.llm or config.llm_dir, lora=recipe.lora, full_llm=args.full_llm)
    return config, recipe, out, start


def resolve_recipe(args, recipe):
    lora = given(args, "rank", "alpha", "dropout", prefix="lora_")
    if lora and not recipe.lora:
        raise ValueError(f"stage {args.stage} trains no LoRA; leave out --lora-{next(iter(lora))}")
    if args.full_llm and (lora or "llm" not in TRAINS[PRESETS[args.preset].family][args.stage]):
        raise ValueError("--full-llm trains the LM's own weights in stage 3 of an aquila-plus preset; "
                         "leave it out, or --lora-...")
    changes = given(args, "lr", "decay", "warmup", "epochs", "batch", "micro", "scenes")
    if args.full_llm:
        changes["lora"] = None
    elif lora:
        changes["lora"] = replace(recipe.lora, **lora)
    return replace(recipe, **changes)


def main():
    rank, world, device = start_processes()
    try:
        args = together(parse_args, world)
        run = together(lambda: set_up(args, rank, world, device), world)
        train(run, args, rank, world, device)
    except (ValueError, OSError) as e:
        # Found together, it is the same in every process; one that a process meets alone stands in torchrun's report.
        end("train.py", e, rank)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
