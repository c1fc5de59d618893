"""
Aquila at its full size on a CPU: writes an 8B Llama-3 and a ConvNeXt-XXLarge with random weights in the published
layouts (about 18 GB), a trained part beside them, and asks a question about a 1024 x 1024 image through evaluate.py.

    python -m checks.full_size DIR               # DIR needs 20 GB; what is already there is used again

Prints the seconds for loading, vision, prefill and a token, and the peak of anonymous memory (RssAnon; the mapped pages
of the files do not count). Random weights say nothing sensible; sizes, layouts and memory are the real ones.
"""
import base64
import dataclasses
import json
import pathlib
import subprocess
import sys
import threading
import time
from functools import cache

import torch
from PIL import Image
from safetensors.torch import save_file

from aquila import PRESETS, Aquila, config_to_dict
from commands.arguments import Parser, whole
from llama import HUGGING_FACE, names_of
from toy import scenes

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARD = 4 * 2 ** 30                         # bytes


@cache
def bank():
    return torch.randn(2 ** 26, generator=torch.Generator().manual_seed(0))


def noise(shape, scale):
    """A bfloat16 tensor cut out of one bank of normal numbers."""
    whole, rest = divmod(shape.numel(), len(bank()))
    return (torch.cat([bank()] * whole + [bank()[:rest]]) * scale).to(torch.bfloat16).view(shape)


def write_llama(model, folder, shard_size=SHARD):
    """A Hugging Face folder: random weights in shards, their index, and config.json."""
    folder.mkdir(parents=True)
    c, index, shard, size = model.config, {}, {}, 0
    names = [(names_of(k)[HUGGING_FACE], p) for k, p in model.named_parameters()]

    def flush():
        file = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, p in names:
        shard[name] = torch.ones(p.shape, dtype=torch.bfloat16) if p.dim() == 1 else noise(p.shape, 0.02)
        size += shard[name].nbytes
        if size > shard_size:
            flush()
            size = 0
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="llama", hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, vocab_size=c.vocab_size, hidden_act="silu",
        max_position_embeddings=c.max_len, rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=False)))


def write_clip(model, path):
    """Random weights of a ConvNeXt as in open_clip's file: the trunk has timm's names, as ours; more stands beside."""
    trunk = {f"visual.trunk.{k}": noise(p.shape, 0.02 if p.dim() > 1 else 0.1) for k, p in model.named_parameters()}
    others = ("visual.head.proj.weight", "transformer.resblocks.0.ln_1.weight", "text_projection", "logit_scale")
    save_file(trunk | {name: torch.ones(4) for name in others}, path)


def made_up_pieces():
    """128,000 different ones: every byte, every pair of bytes, then some of four bytes."""
    pieces = [bytes([a]) for a in range(256)]
    pieces += [bytes([a, b]) for a in range(256) for b in range(256)]
    for i in range(128000 - len(pieces)):
        pieces.append(bytes([97 + i // 2600 % 26, 97 + i // 100 % 26, 28 + i % 100, i // 67600]))
    return pieces


def write_files(folder):
    """What is not there yet: llama/, clip.safetensors, run/ and scene.png."""
    config = dataclasses.replace(PRESETS["aquila-8b"], vision_file=str(folder / "clip.safetensors"),
                                 llm_dir=str(folder / "llama"))
    with torch.device("meta"):
        model = Aquila(config)
    if not (folder / "llama").exists():
        print("writing the Llama", flush=True)
        write_llama(model.llm, folder / "llama")
        lines = [f"{base64.b64encode(piece).decode()} {i}\n" for i, piece in enumerate(made_up_pieces())]
        (folder / "llama/tokenizer.model").write_text("".join(lines))
    if not (folder / "clip.safetensors").exists():
        print("writing the ConvNeXt", flush=True)
        write_clip(model.vision, folder / "clip.safetensors")
    (folder / "run").mkdir(exist_ok=True)
    save_file({k: noise(p.shape, 0.02) for k, p in model.own_parameters().items()}, folder / "run/model.safetensors")
    (folder / "run/config.json").write_text(json.dumps(config_to_dict(config)))
    Image.fromarray(scenes.make_scene("test", 0, 0, 1024).image).save(folder / "scene.png")


def watch(pid, peak):
    """Keeps the highest RssAnon of a process, in GiB, in peak[0]."""
    while True:
        try:
            lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return
        for line in lines:
            if line.startswith("RssAnon"):
                peak[0] = max(peak[0], int(line.split()[1]) / 2 ** 20)
        time.sleep(0.05)


def measure(args):
    args.folder.mkdir(parents=True, exist_ok=True)
    folder = args.folder.resolve()
    write_files(folder)
    command = [sys.executable, "evaluate.py", "--model", folder / "run", "--image", folder / "scene.png", "--ask",
               "How many ships are there?", "--dtype", "bfloat16", "--max-new-tokens", args.tokens, "--timings"]
    child, peak = subprocess.Popen([str(c) for c in command], cwd=ROOT), [0.0]
    watcher = threading.Thread(target=watch, args=(child.pid, peak))
    watcher.start()
    code = child.wait()
    watcher.join()
    print(f"peak anonymous memory {peak[0]:.2f} GiB")
    sys.exit(code)


def main():
    parser = Parser(prog="python -m checks.full_size", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="where the files are written, about 20 GB")
    parser.add_argument("--tokens", type=whole(1), default=24, help="tokens of the answer (default 24)")
    parser.run(measure)


if __name__ == "__main__":
    main()
