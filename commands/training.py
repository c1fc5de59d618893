"""
The flags of train.py, what they ask for, and what is printed before the first step.
"""
import argparse
import os
import pathlib
from dataclasses import replace

import torch

from aquila import PRESETS, TRAINS, count_parameters, load_config
from commands.arguments import SEEDS, Parser, real, whole
from data import CHATS
from files.run_folder import checkpoints


def layers(text):
    """An argparse type: "0,4,8" -> (0, 4, 8)."""
    try:
        return () if text == "none" else tuple(sorted({int(i) for i in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 'none' or numbers such as 0,4,8") from None


def parse_args(description):
    p = Parser(prog="train.py", description=description)
    add = p.add_argument
    add("--preset", default="tiny", choices=PRESETS, help="default tiny")
    add("--stage", type=int, required=True, choices=(1, 2, 3), help="aquila: 1 aligns, 2 instructs with LoRA; "
        "aquila-plus: 1 image-text, 2 mask-text, 3 all with LoRA")
    add("--data", help=".jsonl or .json file of records (default: the built-in scenes)")
    add("--images", default=".", help="folder that image paths start from (default: here)")
    add("--skip-bad", type=whole(0), default=0, metavar="N",
        help="leave out up to N records that cannot be read, and say which (default 0: the first one is an error)")
    add("--scenes", type=whole(1), help="built-in train scenes, when there is no --data (default: the recipe's); "
        "of some kinds of record a multiple of them")
    add("--val", help="file of held-back records: their loss goes to the log and the curve")
    add("--val-every", type=whole(1), default=200, help="steps between two such losses (default 200)")
    add("--vision", help="ConvNeXt weights: open_clip, timm or original file (default: the preset's)")
    add("--llm", help="Llama folder, Hugging Face or Meta layout (default: the preset's)")
    add("--seed", type=whole(0, SEEDS), default=0, help="default 0")
    add("--workers", type=whole(0, 1000), default=min(4, os.cpu_count() // 4),
        help="data processes of each process; 0: none (default: a quarter of the cores, at most 4)")
    add("--dtype", choices=("float32", "bfloat16"), help="of frozen weights and of autocast (default: bfloat16 on GPU)")
    add("--shard", action="store_true", help="cut weights, gradients and optimizer over the processes (fully_shard, "
        "torch 2.8): for a GPU that cannot hold the LM, or cannot train it with --full-llm; the same run otherwise")
    add = p.add_argument_group("the run").add_argument
    add("--out", help="its folder (default runs/PRESET/stageN)")
    add("--init-from", help="start from the weights of this run, or of a checkpoint of it (default, from stage 2 on: "
        "the stage before)")
    add("--resume", help="'auto': go on with the run in --out if there is one; or the folder of a run or a checkpoint")
    add("--force-resume", action="store_true", help="go on although the run was started with other settings or files")
    add("--overwrite", action="store_true", help="remove the run that --out holds, and start anew")
    add("--steps", type=whole(1), help="length of the schedule (default: as --epochs says)")
    add("--stop-after", type=whole(1), help="end the process after this step, the schedule unchanged; then --resume")
    add("--save-every", type=whole(1), default=200, help="steps between two checkpoints (default 200)")
    add("--keep", type=whole(1), default=2, help="the newest checkpoints that are kept (default 2)")
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
    add("--grad-checkpoint", action=argparse.BooleanOptionalAction,
        help="compute LM layers again in the backward pass: less memory, more time")
    add("--lora-rank", type=whole(1, 4096), help="last stage")
    add("--lora-alpha", type=real(1e-6, 10_000), help="last stage")
    add("--lora-dropout", type=real(0, 0.99), help="last stage")
    add("--full-llm", action="store_true", help="aquila-plus, stage 3: the LM's own weights learn, instead of LoRA")
    return p.parse_args()


def given(args, *fields, prefix=""):
    """{field: value} of the flags that were given."""
    values = {field: getattr(args, prefix + field) for field in fields}
    return {field: value for field, value in values.items() if value is not None}


def resolve(args, recipes, world):
    """
    Flags, the preset's {stage: Recipe} and the number of processes -> (config, recipe, out folder, folder to start from
    or None); ValueError for what makes no sense.
    """
    if args.stage not in recipes:
        raise ValueError(f"--stage {args.stage}: {args.preset} has the stages {', '.join(map(str, recipes))}")
    recipe = resolve_recipe(args, recipes[args.stage])
    if recipe.batch % (recipe.micro * world):
        raise ValueError(f"batch {recipe.batch} is not a multiple of micro {recipe.micro} x {world} process(es); "
                         "set --micro or --batch")
    if args.shard and (world == 1 or torch.__version__ < (2, 8)):
        raise ValueError("--shard cuts the model over several processes (torchrun --nproc-per-node N) and needs torch "
                         f"2.8 or newer; here are {world} process(es) and torch {torch.__version__}; leave it out")
    out = pathlib.Path(args.out or f"runs/{args.preset}/stage{args.stage}")
    start = args.init_from or (f"runs/{args.preset}/stage{args.stage - 1}" if args.stage > 1 else None)
    source = pathlib.Path(start or "").resolve()
    if start and args.overwrite and out.resolve() in (source, source.parent):
        raise ValueError(f"--overwrite would remove {start}, which the run starts from; choose another --out")
    config = start_config(args, pathlib.Path(start)) if start else PRESETS[args.preset]
    model = given(args, "integration", "image_size", "fit", "chat", "max_len", "pooling", "mda_layers")
    wrong = [f"{k} {v!r}" for k, v in model.items() if start and getattr(config, k) != v]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} contradicts {start}, which decides it; leave the flag out")
    given_paths = {"vision_file": args.vision, "llm_dir": args.llm}
    # Whole paths, for a checkpoint may be read from elsewhere.
    lie = {part: os.path.abspath(path) for part, path in given_paths.items() if path}
    config = replace(config, **model, **lie, lora=recipe.lora, full_llm=args.full_llm)
    return config, recipe, out, start


def start_config(args, start):
    """The config of the folder that a stage starts from, which must be of the preset's kind."""
    if not (start / "model.safetensors").exists():
        advice = "give another --init-from" if args.init_from else f"run --stage {args.stage - 1} first, or --init-from"
        found = [f"; the run there has not finished, its last checkpoint is {path}" for path in checkpoints(start)[-1:]]
        raise ValueError(f"no model.safetensors in {start}, the finished stage to start from; {advice}{''.join(found)}")
    config, preset = load_config(start), PRESETS[args.preset]
    for name in ("dim", "heads", "region_dim", "region_side"):                     # what no flag and no file changes
        if getattr(config, name) != getattr(preset, name):
            raise ValueError(f"--preset {args.preset} has {name} {getattr(preset, name)}, {start} has "
                             f"{getattr(config, name)}; give the preset that it was trained with")
    return config


def resolve_recipe(args, recipe):
    lora = given(args, "rank", "alpha", "dropout", prefix="lora_")
    if lora and not recipe.lora:
        raise ValueError(f"stage {args.stage} trains no LoRA; leave out --lora-{next(iter(lora))}")
    if args.full_llm and (lora or "llm" not in TRAINS[PRESETS[args.preset].family][args.stage]):
        raise ValueError("--full-llm trains the LM's own weights in stage 3 of an aquila-plus preset; "
                         "leave it out, or --lora-...")
    changes = given(args, "lr", "decay", "warmup", "epochs", "batch", "micro", "grad_checkpoint", "scenes")
    if args.full_llm:
        changes["lora"] = None
    elif lora:
        changes["lora"] = replace(recipe.lora, **lora)
    return replace(recipe, **changes)


def describe_run(run, args, samples, blank, world):
    """Print what trains, on what, and how."""
    recipe, trained = run.recipe, count_parameters(run.trainable.items())
    frozen = sum(p.numel() for p in run.model.parameters()) - sum(trained.values())
    parts = ", ".join(f"{part} {count:,}" for part, count in trained.items())
    print(f"{args.preset}, stage {args.stage}: trains {parts}; frozen {frozen:,}")
    print(f"{samples:,} samples" + (f" ({blank:,} of them without an image)" if blank else "") +
          f", {run.steps} steps of {recipe.batch} = micro {recipe.micro} x {world} process(es) "
          f"x {recipe.batch // (recipe.micro * world)} accumulated" +
          (", LM layers computed again in the backward pass" if recipe.grad_checkpoint else "") +
          (", the model cut over the processes" if args.shard else ""))
    print(f"AdamW lr {recipe.lr:g}, betas {run.optimizer.defaults['betas']}, weight decay {recipe.decay:g}, warm-up "
          f"{recipe.warmup:g}, cosine, seed {args.seed}" +
          (f", LoRA rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}, dropout {recipe.lora.dropout:g}"
           if recipe.lora else ""), flush=True)
    if run.first:
        print(f"resumed after step {run.first} of {run.steps}", flush=True)
