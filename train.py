"""
Trains one stage of Aquila or Aquila-plus, on CPU or GPU, in one process or several.

    torchrun train.py --stage 1                                    # tiny preset, built-in scenes, no download
    torchrun train.py --stage 2                                    # goes on from runs/tiny/stage1
    torchrun train.py --preset tiny-plus --stage 1                 # Aquila-plus: stages 1, 2 and 3
    torchrun --nproc-per-node 4 train.py --preset aquila-8b --stage 1 --vision FILE --llm DIR --data FILE --images DIR

One step is one global batch, whatever the number of processes and micro-batches: the loss is summed over the learned
tokens and divided by their number in the whole batch, over all micro-batches and processes. A mean of means would be
another gradient, for answers are long and short.

Every run writes to its --out folder: model.safetensors and config.json (the trained part), state.pt (all that --resume
needs, in one file replaced at once), log.jsonl and loss.png.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader

import scenes
from aquila import (PRESETS, TRAINS, LoRAConfig, build, config_to_dict, find, load_config, load_trained, part_of,
                    save_model, set_stage)
from data import Records, collate, image_names, image_path, read_records
from llama import load_tokenizer


# ---------------------------------------------------------------------------------------------- recipes

@dataclass(frozen=True)
class Recipe:
    lr: float                               # peak, after a linear warm-up; then cosine down to zero
    decay: float                            # AdamW's weight decay
    warmup: float                           # share of the steps
    batch: int = 32                         # global: samples of one optimizer step
    micro: int = 8                          # samples a process takes at once
    epochs: float = 1.0
    scenes: int = 0                         # built-in train scenes when no --data is given
    lora: LoRAConfig | None = None


# What each stage trains stands in aquila.TRAINS. The numbers of aquila-8b are the paper's (Table 2). Those of
# aquila-plus are not in its summary: stage 1 is Aquila's, 2 and 3 are Osprey's (with Aquila's batch and betas, and LoRA
# on the LM).
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


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first warmup * steps, then cosine to zero."""
    rise = warmup * steps
    if step < rise:
        return peak * min(1.0, (step + 1) / rise)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def optimizer_for(params, decay):
    """AdamW. ASSUMPTION: norms, biases and other vectors are not decayed."""
    groups = [dict(params=[p for p in params if p.dim() > 1], weight_decay=decay),
              dict(params=[p for p in params if p.dim() <= 1], weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=BETAS)


# ---------------------------------------------------------------------------------------------- data

BUILT_IN = {"aquila": {1: ("chat", "caption"), 2: ("chat", "caption")},
            "aquila-plus": {1: ("chat", "caption"), 2: ("region chat",), 3: ("region chat", "region", "chat")}}


def built_in_records(family, stage, n, size):
    """
    n train scenes, from number (stage - 1) * n on, as records: of each one of every kind above, wordings taking turns.
    """
    found = []
    for task in BUILT_IN[family][stage]:
        by_scene = {}
        for record in scenes.records("train", n, task, size=size, start=(stage - 1) * n):
            by_scene.setdefault(record["image"], []).append(record)
        found += [group[i % len(group)] for i, group in enumerate(by_scene.values())]
    return found


class Batches:
    """
    The sample numbers of each micro-batch of this process, from step `start` to `steps`. Every epoch is a permutation
    drawn from (seed, epoch); the last batch is filled up from the next one, so that nothing is dropped. Inside a step
    samples stand by length, for those of one micro-batch are padded to the longest; its gradient stays the same sum.
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
            for i in range(0, self.batch, self.micro * self.world):
                # Dealt to and fro, so that no process always gets the longest.
                place = self.rank if i // (self.micro * self.world) % 2 == 0 else self.world - 1 - self.rank
                first = i + place * self.micro
                yield picked[first:first + self.micro]


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def take(loader, n, device):
    """The next n micro-batches; a sample that could not be read ends the run with its one line."""
    batches = []
    for _ in range(n):
        batch = next(loader)
        if isinstance(batch, ValueError):
            raise batch
        batches.append(to_device(batch, device))
    return batches


# ---------------------------------------------------------------------------------------------- one step

def train_step(model, optimizer, batches, params, lr, autocast, world=1, clip=1.0):
    """
    One optimizer step over all micro-batches of all processes. -> (loss a learned token, gradient norm, tokens read)
    The learned tokens are counted before the first backward, over all processes.
    """
    device = params[0].device
    counts = torch.tensor([sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches),
                           sum(int(b["lengths"].sum()) for b in batches)], dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(counts)
    learned, tokens = counts.tolist()
    total = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        # DDP sums gradients over processes in the last backward only. The forward must run inside no_sync, too: the
        # choice is made there.
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
    norm = nn.utils.clip_grad_norm_(params, clip).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total.item() / max(learned, 1), norm, int(tokens)


# ---------------------------------------------------------------------------------------------- files of a run

def save_state(path, step, settings, trainable, optimizer):
    torch.save({"step": step, "settings": settings, "trained": {k: p.detach().cpu() for k, p in trainable.items()},
                "optimizer": optimizer.state_dict()}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_state(path, settings, trainable, optimizer):
    """Put a run back where it was; refuse when anything that decides its course is another. -> the next step"""
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise ValueError(f"{path}: the run to resume had {name} {state['settings'].get(name)}, now it is {value}; "
                             "give the same flags, or start a new run from its weights with --init-from")
    with torch.no_grad():
        for name, p in trainable.items():
            p.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


class Log:
    """log.jsonl, a line a step, and the line a person watches."""

    def __init__(self, folder, start, steps):
        self.path, self.start, self.steps, self.began = folder / "log.jsonl", start, steps, time.time()
        old = self.path.read_text().splitlines() if start and self.path.exists() else []
        self.rows = [row for row in map(json.loads, old) if row["step"] <= start]
        self.file, self.last = None, time.time()

    def step(self, step, loss, norm, lr, tokens):
        now = time.time()
        row = dict(step=step, loss=round(loss, 5), gnorm=round(norm, 4), lr=lr, tokens=tokens,
                   seconds=round(now - self.last, 3))
        self.rows.append(row)
        new = self.rows[-1:]
        if self.file is None:               # not before the first step has worked; a resumed run keeps its lines
            self.file, new = self.path.open("w"), self.rows
        self.file.writelines(json.dumps(r) + "\n" for r in new)
        self.file.flush()
        left = (now - self.began) / (step - self.start) * (self.steps - step)
        line = (f"step {step}/{self.steps} | loss {loss:.4f} | {tokens / (now - self.last):7,.0f} tok/s | "
                f"lr {lr:.2e} | gnorm {norm:6.2f} | {left:5.0f} s left")
        self.last = now
        if sys.stdout.isatty():
            print(f"\r{line}", end="\n" if step == self.steps else "", flush=True)
        elif step % 20 == 0 or step in (1, self.steps):
            print(line, flush=True)


def draw_curve(losses, path, width=800, height=420):
    """The loss of every step (gray) and its running mean (blue), on a logarithmic axis, as a PNG."""
    image = Image.new("RGB", (width, height), "white")
    draw, left, top, right, bottom = ImageDraw.Draw(image), 60, 30, width - 20, height - 40
    mean, means = losses[0], []
    for loss in losses:
        mean += (loss - mean) * 0.05
        means.append(mean)
    low, high = math.log(max(min(losses), 1e-6)), math.log(max(max(losses), 2e-6))
    x = lambda i: left + (right - left) * i / max(len(losses) - 1, 1)
    y = lambda v: bottom - (bottom - top) * (math.log(max(v, 1e-6)) - low) / max(high - low, 1e-9)
    for value in (math.exp(low + (high - low) * k / 4) for k in range(5)):
        draw.line([(left, y(value)), (right, y(value))], fill=(225, 225, 225))
        draw.text((8, y(value) - 6), f"{value:.3f}", fill="black")
    for line, color, thick in ((losses, (190, 190, 190), 1), (means, (30, 90, 180), 2)):
        draw.line([(x(i), y(v)) for i, v in enumerate(line)] or [(left, top)], fill=color, width=thick)
    draw.text((left, 8), f"loss per learned token, {len(losses)} steps, last {means[-1]:.4f} (running mean)",
              fill="black")
    draw.text((left, bottom + 8), "1", fill="black")
    draw.text((right - 30, bottom + 8), str(len(losses)), fill="black")
    image.save(path)


# ---------------------------------------------------------------------------------------------- the run

def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="tiny", help=f"one of {', '.join(PRESETS)} (default tiny)")
    p.add_argument("--stage", type=int, required=True, choices=(1, 2, 3),
                   help="aquila: 1 aligns, 2 instructs with LoRA; "
                        "aquila-plus: 1 image-text, 2 mask-text, 3 all with LoRA")
    p.add_argument("--data", help=".jsonl or .json file of records (default: the built-in scenes)")
    p.add_argument("--images", default=".", help="folder that image paths start from (default: here)")
    p.add_argument("--scenes", type=int, help="built-in train scenes, when there is no --data (default: the recipe's)")
    p.add_argument("--vision", help="ConvNeXt weights: open_clip, timm or original file (default: the preset's)")
    p.add_argument("--llm", help="Llama folder, Hugging Face or Meta layout (default: the preset's)")
    p.add_argument("--out", help="folder of the run (default runs/PRESET/stageN)")
    p.add_argument("--init-from", help="start from the weights of this run (stage 2: default runs/PRESET/stage1)")
    p.add_argument("--resume", help="'auto': go on with the run in --out if there is one; or the folder of a run")
    p.add_argument("--overwrite", action="store_true", help="start anew although --out holds a run")
    model = p.add_argument_group("model (stage 1 decides, later stages keep it)")
    model.add_argument("--integration", choices=("sfi", "concat"), help="Table 5: SFI or the Concat baseline")
    model.add_argument("--mda-layers", help="Table 5: 'none', or LM layers that SFI runs before, for instance 0,4,8")
    model.add_argument("--pooling", choices=("area", "binary"), help="aquila-plus: how masks weigh features")
    model.add_argument("--image-size", type=int, help="side in pixels, a multiple of 32")
    model.add_argument("--fit", choices=("resize", "letterbox"), help="how an image becomes square")
    model.add_argument("--chat", choices=("llama-3", "vicuna", "chatml"), help="chat format")
    model.add_argument("--max-len", type=int, help="tokens of a prompt with its answer, image tokens included")
    recipe = p.add_argument_group("recipe (defaults: the preset's, printed at the start)")
    recipe.add_argument("--lr", type=float, help="peak learning rate")
    recipe.add_argument("--decay", type=float, help="weight decay")
    recipe.add_argument("--warmup", type=float, help="share of the steps that the learning rate rises")
    recipe.add_argument("--epochs", type=float, help="passes over the data")
    recipe.add_argument("--batch", type=int, help="global batch: samples of one optimizer step")
    recipe.add_argument("--micro", type=int,
                        help="samples a process takes at once; batch / (micro x processes) accumulate")
    recipe.add_argument("--lora-rank", type=int, help="last stage")
    recipe.add_argument("--lora-alpha", type=float, help="last stage")
    recipe.add_argument("--lora-dropout", type=float, help="last stage")
    recipe.add_argument("--full-llm", action="store_true",
                        help="aquila-plus, stage 3: the LM's own weights learn, instead of LoRA")
    p.add_argument("--steps", type=int, help="stop the schedule after this many steps (default: the epochs')")
    p.add_argument("--stop-after", type=int,
                   help="end the process after this step, the schedule unchanged; then --resume")
    p.add_argument("--save-every", type=int, default=200, help="steps between checkpoints (default 200)")
    p.add_argument("--seed", type=int, default=0, help="default 0")
    p.add_argument("--workers", type=int, default=min(4, os.cpu_count() // 4),
                   help="data processes of each process; 0: none (default: a quarter of the cores, at most 4)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"),
                   help="of frozen weights and of autocast (default: bfloat16 on GPU)")
    p.add_argument("--grad-checkpoint", action=argparse.BooleanOptionalAction, default=False,
                   help="recompute LM layers in the backward pass: less memory, more time")
    return p, p.parse_args()


def given(args, **names):
    """{field: value} of the flags that were given."""
    return {field: getattr(args, flag) for field, flag in names.items() if getattr(args, flag) is not None}


def resolve(args):
    """Flags -> (config, recipe, out folder, folder to start from or None); ValueError for what makes no sense."""
    if args.preset not in PRESETS:
        raise ValueError(f"unknown preset {args.preset!r}; expected one of {', '.join(PRESETS)}")
    if args.stage not in RECIPES[args.preset]:
        stages = ", ".join(map(str, RECIPES[args.preset]))
        raise ValueError(f"--stage {args.stage}: {args.preset} has the stages {stages}")
    recipe = RECIPES[args.preset][args.stage]
    changes = given(args, lr="lr", decay="decay", warmup="warmup", epochs="epochs", batch="batch", micro="micro",
                    scenes="scenes")
    lora = given(args, rank="lora_rank", alpha="lora_alpha", dropout="lora_dropout")
    if lora and not recipe.lora:
        raise ValueError(f"stage {args.stage} trains no LoRA; leave out --lora-{next(iter(lora))}")
    if args.full_llm and (lora or "llm" not in TRAINS[PRESETS[args.preset].family][args.stage]):
        raise ValueError("--full-llm trains the LM's own weights in stage 3 of an aquila-plus preset; "
                         "leave it out, or --lora-...")
    recipe = dataclasses.replace(recipe, **changes, lora=recipe.lora and dataclasses.replace(recipe.lora, **lora)
                                 if not args.full_llm else None)
    out = pathlib.Path(args.out or f"runs/{args.preset}/stage{args.stage}")
    start = args.init_from or (f"runs/{args.preset}/stage{args.stage - 1}" if args.stage > 1 else None)
    if start and not os.path.exists(os.path.join(start, "model.safetensors")):
        raise ValueError(f"stage {args.stage} starts from a finished stage: no model.safetensors in {start}; "
                         f"run --stage {args.stage - 1} first, or give --init-from")
    model = given(args, integration="integration", image_size="image_size", fit="fit", chat="chat", max_len="max_len",
                  pooling="pooling")
    if args.mda_layers is not None:
        model["mda_layers"] = parse_layers(args.mda_layers)
    config = load_config(start) if start else PRESETS[args.preset]
    wrong = [f"{k} {v!r}" for k, v in model.items() if start and getattr(config, k) != v]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} contradicts {start}, which decides it; leave the flag out")
    config = dataclasses.replace(config, **model, **given(args, vision_file="vision", llm_dir="llm"),
                                 lora=recipe.lora, full_llm=args.full_llm)
    return config, recipe, out, start


def parse_layers(text):
    try:
        return () if text == "none" else tuple(sorted({int(i) for i in text.split(",")}))
    except ValueError:
        raise ValueError(f"--mda-layers {text!r}: expected 'none' or numbers such as 0,4,8") from None


def open_data(args, recipe, config):
    """The records of the run, all checked for form and for missing image files, and a fingerprint of them."""
    if args.data is None:
        records = built_in_records(config.family, args.stage, recipe.scenes or 1000, config.image_size)
    else:
        records = read_records(args.data)
        for record in records:
            for name in image_names(record):
                if not name.startswith("scene:"):
                    try:
                        image_path(name, args.images)
                    except (ValueError, FileNotFoundError) as e:
                        raise ValueError(f"{args.data}, record {record['id']}: {e}") from None
    digest = hashlib.sha256("\n".join(json.dumps(r, sort_keys=True) for r in records).encode()).hexdigest()[:16]
    return records, digest


def prepare_out(args, out):
    """Make the run's folder; -> the state to resume from, or None."""
    source = out if args.resume in (None, "auto") else pathlib.Path(args.resume)
    state = source / "state.pt"
    if args.resume not in (None, "auto") and not state.exists():
        raise ValueError(f"--resume {args.resume}: no state.pt there; --resume auto starts anew when there is none")
    if args.resume is None and state.exists() and not args.overwrite:
        raise ValueError(f"{out} holds a run; --resume auto goes on with it, --overwrite starts anew, "
                         "--out takes another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as e:
        raise ValueError(f"{out} cannot be written: {e.strerror}; choose another --out") from None
    return state if args.resume and state.exists() else None


def start_processes():
    """-> (rank, number of processes, device). torchrun sets the environment; a plain python run is one process."""
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank, world, torch.device("cuda", local) if cuda else torch.device("cpu")


def describe_run(model, trainable, recipe, args, steps, n, world):
    counts = {}
    for name, p in trainable.items():
        counts[part_of(name)] = counts.get(part_of(name), 0) + p.numel()
    frozen = sum(p.numel() for p in model.parameters()) - sum(counts.values())
    accumulate = recipe.batch // (recipe.micro * world)
    print(f"{args.preset}, stage {args.stage}: trains " + ", ".join(f"{k} {v:,}" for k, v in counts.items())
          + f"; frozen {frozen:,}")
    print(f"{n:,} samples, {steps} steps of {recipe.batch} = micro {recipe.micro} x {world} process(es) "
          f"x {accumulate} accumulated")
    print(f"AdamW lr {recipe.lr:g}, betas {BETAS}, weight decay {recipe.decay:g}, warm-up {recipe.warmup:g}, cosine, "
          f"seed {args.seed}" + (f", LoRA rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}, "
                                 f"dropout {recipe.lora.dropout:g}" if recipe.lora else ""), flush=True)


def run(args, rank, world, device):
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
        load_trained(model, start_from, only_known=True)
    trainable = set_stage(model, args.stage)
    params = list(trainable.values())
    optimizer = optimizer_for(params, recipe.decay)
    model.llm.grad_checkpoint = args.grad_checkpoint
    settings = dict(stage=args.stage, config=config_to_dict(model.config),
                    recipe=json.loads(json.dumps(dataclasses.asdict(recipe))),
                    steps=steps, data=digest, processes=world, seed=args.seed)
    state = prepare_out(args, out)
    first = load_state(state, settings, trainable, optimizer) if state else 0

    lengths = [sum(len(turn["value"]) for turn in record["conversations"]) for record in records]
    batches = Batches(lengths, recipe.batch, recipe.micro, steps, first, args.seed, rank, world)
    tokenizer = load_tokenizer(find(model.config.llm_dir, "language model"))
    loader = iter(DataLoader(Records(records, args.images, tokenizer, model.config), batch_sampler=batches,
                             collate_fn=collate, num_workers=args.workers, pin_memory=device.type == "cuda"))
    if rank == 0:
        describe_run(model, trainable, recipe, args, steps, len(records), world)
        if state:
            print(f"resumed after step {first} of {steps}", flush=True)
    log = Log(out, first, steps) if rank == 0 else None
    ddp = nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None) \
        if world > 1 else model
    model.train()
    model.vision.eval()
    autocast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
    for step in range(first, min(steps, args.stop_after or steps)):
        # Dropout draws from (seed, step, process), so a resumed run needs no saved random state.
        torch.manual_seed((args.seed * 1_000_003 + step) * 1024 + rank)
        lr = learning_rate(step, steps, recipe.lr, recipe.warmup)
        micro = take(loader, recipe.batch // (recipe.micro * world), device)
        loss, norm, tokens = train_step(ddp, optimizer, micro, params, lr, autocast, world)
        if rank == 0:
            log.step(step + 1, loss, norm, lr, tokens)
            if (step + 1) % args.save_every == 0 or step + 1 in (steps, args.stop_after):
                save_state(out / "state.pt", step + 1, settings, trainable, optimizer)
    if rank == 0 and log.rows and log.rows[-1]["step"] == steps:
        save_model(model, out)
        draw_curve([row["loss"] for row in log.rows], out / "loss.png")
        if model.mda:                       # they started at zero
            print("MDA returns, norm of W_O: "
                  + ", ".join(f"layer {i} {m.sfi.wo.weight.norm():.2f}" for i, m in model.mda.items()))
        print(f"wrote {out}/model.safetensors, config.json, log.jsonl, loss.png")


def main():
    parser, args = parse_args()
    rank, world, device = start_processes()
    try:
        run(args, rank, world, device)
    except (ValueError, FileNotFoundError) as e:
        parser.exit(2, f"train.py: {e}\n" if rank == 0 or "record" in str(e) else "")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
