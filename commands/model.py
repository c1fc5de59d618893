"""
What flows where in a preset, what memory its training needs, and the LM of a trained stage for other programs.

    python aquila.py --preset aquila-8b
    python aquila.py --preset aquila-8b --memory [--micro 8 --tokens 1152 --no-grad-checkpoint]
    python aquila.py --model runs/tiny/stage2 --export DIR, or --llm LLAMA --adapter PEFT --export DIR
"""
import argparse
import dataclasses
import pathlib
import shutil

import torch

from aquila import (PRESETS, TRAINS, assemble, build, count_parameters, load_config, load_checkpoint,
                    locate_weights, parts_of_stage)
from commands.arguments import Parser, whole
from commands.memory import predict
from commands.training import given
from convnext import STRIDES
from files.peft import load_lora, save_lora
from files.text import write_json
from llama import load_llama, save_llama
from lora import lora_layers, merge_lora
from tokenizer import load_tokenizer
from train import RECIPES, optimizer_for


def describe(config):
    """Shapes, by running the model without memory, and parameters, as text."""
    with torch.device("meta"):
        model = assemble(config)
        images = torch.empty(1, 3, config.image_size, config.image_size)
        maps = model.encode_images(images)
        pyramid, image_tokens = model.image_tokens(maps)
    lines = [f"image                {tuple(images.shape)}"]
    lines += [f"map {s}, stride {STRIDES[s]:<2}     {tuple(x.shape)}" for s, x in enumerate(maps)]
    lines += [f"windows of scale {s}   {tuple(x.shape)}" for s, x in enumerate(pyramid)]
    lines += [f"image tokens         {tuple(image_tokens.shape)}",
              f"MDA before layers    {list(config.mda_layers)} of {config.llm.n_layers}"]
    if config.region_dim:
        lines.append(f"region tokens        2 of {config.llm.dim} per <region>")
    for part, n in count_parameters(model.named_parameters()).items():
        stages = [stage for stage in TRAINS[config.family] if part in parts_of_stage(config, stage)]
        lines.append(f"{part:9} {n:14,} parameters" + "".join(f", stage {stage} trains it" for stage in stages))
    return "\n".join(lines)


def memory_table(args):
    """What each stage of a preset needs in one process, as text."""
    config, dtype = PRESETS[args.preset], getattr(torch, args.dtype)
    tokens, image = args.tokens or config.max_len, config.tokens_per_image
    if tokens <= image + 2:
        raise ValueError(f"--tokens {tokens}: {image} of them are the image's; expected more than {image + 2}")
    if args.full_llm and "llm" not in sum(TRAINS[config.family].values(), ()):
        raise ValueError(f"--full-llm: {args.preset} trains the LM by LoRA alone; take an aquila-plus preset")
    lines = [f"{args.preset}, {args.dtype}, {args.processes} process(es), samples of {tokens:,} tokens, {image:,} of "
             "them the image's. GB of 10^9 bytes in each process:"]
    for stage, recipe in RECIPES[args.preset].items():
        recipe = dataclasses.replace(recipe, **given(args, "micro", "grad_checkpoint"))
        full = args.full_llm and "llm" in TRAINS[config.family][stage]
        config = dataclasses.replace(config, lora=None if full else recipe.lora, full_llm=full)
        found = predict(config, stage, recipe, optimizer_for, tokens, dtype, args.processes)
        row = {"stage": stage, "micro": recipe.micro, "checkpoint": "yes" if recipe.grad_checkpoint else "no"}
        row |= {what: f"{n / 1e9:.2f}" for what, n in found.items()}
        if stage == 1:
            lines.append("  ".join(row))
        lines.append("  ".join(f"{value:>{len(what)}}" for what, value in row.items()))
    return "\n".join(lines)


def export(llm, source, out):
    """
    out/adapter: the LoRA as PEFT's files; out/llm: the LM with it merged, the tokenizer files of source, and the tokens
    that end an answer, without which transformers would never stop.
    """
    if (out / "llm").resolve() == pathlib.Path(source).resolve():
        raise ValueError(f"--export {out} would write over {source}, the LM that is read; give another folder")
    stop_ids = load_tokenizer(source).stop_ids
    if lora_layers(llm):
        save_lora(llm, out / "adapter")
    save_llama(merge_lora(llm), out / "llm")
    write_json(out / "llm" / "generation_config.json", {"eos_token_id": sorted(stop_ids)})
    for name in ("*token*", "chat_template*"):
        for file in pathlib.Path(source).glob(name):
            shutil.copy(file, out / "llm")
    print(f"wrote {out}")


def run(args):
    if not args.export and (args.model or args.vision or args.llm or args.adapter):
        raise ValueError("--model, --vision, --llm and --adapter go with --export DIR")
    if args.memory:
        print(memory_table(args))
    elif not args.export:
        last = list(RECIPES[args.preset].values())[-1]
        print(describe(dataclasses.replace(PRESETS[args.preset], lora=last.lora)))
    elif args.model:
        config = load_config(args.model)
        config = dataclasses.replace(config, vision_file=args.vision or config.vision_file,
                                     llm_dir=args.llm or config.llm_dir)
        model = build(config, torch.bfloat16)                  # LoRA stays in float32: a merged weight is rounded once
        load_checkpoint(model, args.model)
        export(model.llm, locate_weights(config.llm_dir, "language model"), args.export)
    elif args.llm and args.adapter:
        export(load_lora(load_llama(args.llm, torch.bfloat16), args.adapter), args.llm, args.export)
    else:
        raise ValueError("--export needs --model, or --llm and --adapter")


def main():
    parser = Parser(prog="aquila.py", description=__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", choices=PRESETS, help="what to describe (default tiny)")
    add("--export", type=pathlib.Path, metavar="DIR", help="write DIR/llm, the LM with its LoRA merged, as a Hugging "
        "Face folder in bfloat16, and DIR/adapter, the LoRA alone, as PEFT's files")
    add("--model", help="--export: folder that train.py wrote")
    add("--vision", help="--export: the ConvNeXt's file, if it is no longer where it was in training")
    add("--llm", help="--export: Llama folder (default: the one that --model was trained on)")
    add("--adapter", help="--export, without --model: a LoRA for --llm in PEFT's files")
    add = parser.add_argument_group("memory").add_argument
    add("--memory", action="store_true", help="predict what a process needs in each stage of --preset")
    add("--micro", type=whole(1), help="samples at once (default: the recipe's)")
    add("--tokens", type=whole(1), help="length of all samples, image included (default: the longest, max_len)")
    add("--processes", type=whole(1), default=4, help="that train together (default 4)")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of frozen weights and of autocast "
        "(default bfloat16)")
    add("--full-llm", action="store_true", help="Aquila-plus, stage 3: the LM's own weights instead of LoRA")
    add("--grad-checkpoint", action=argparse.BooleanOptionalAction, help="(default: the recipe's)")
    parser.run(run)
