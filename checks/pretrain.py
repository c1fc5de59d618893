"""
Makes the tiny stand-ins for CLIP and Llama in weights/ from the built-in train scenes. What the papers take from the
web is imitated in kind: the vision tower learns which short texts belong to which pictures, never an object class as a
label; the language model reads text alone. The files have the published layouts, so the usual loaders read them.
What is drawn follows from the seed and the step: a run that was cut off goes on from its last 500 steps.

    python -m checks.pretrain vision           # weights/tiny-clip.safetensors: a ConvNeXt and a text tower
    python -m checks.pretrain llm              # weights/tiny-llm/: a Llama and its tokenizer; without a word: both
"""
import dataclasses
import json
import math
import pathlib
import re
import time
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from commands.arguments import SEEDS, Parser, whole
from convnext import CONVNEXTS, ChannelNorm, ConvNeXt
from corpora.prompts import SHORT_ANSWER
from data import VICUNA_SYSTEM, collate, encode_record
from files.text import write_json, written_whole
from files.weights import fill, open_tensors, write_tensors
from llama import LLAMAS, Llama, load_llama, save_llama
from pictures.image_files import CLIP_MEAN, CLIP_STD
from tokenizer import BYTE_OF, IGNORE, load_tokenizer
from toy.drawing import make_scene
from toy.layout import Key, make_layout
from toy.scenes import (CAPTION_PROMPTS, captions, count_objects, draw_question, phrase, place_in_fifths, questions,
                        region_questions, take_turns)
from train import optimizer_for

NINTHS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")


def train(model, loss_of_step, steps, decay, name, state, peak=2e-3):
    """
    AdamW on loss_of_step(step); linear warm-up, then cosine to a hundredth of the peak; a line every 50 steps. The file
    `state` is what a run goes on from; it is removed at the end.
    """
    optimizer, rise, first = optimizer_for(list(model.parameters()), decay), 0.05 * steps, 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    model.train()
    started, losses = time.time(), []
    for step in range(first, steps):
        t = (step - rise) / (steps - rise)
        lr = peak * (step + 1) / rise if t < 0 else peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * t)))
        for group in optimizer.param_groups:
            group.update(lr=lr, betas=(0.9, 0.98))
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            spent = time.time() - started
            print(f"{name} step {step + 1}/{steps} | loss {np.mean(losses[-50:]):.4f} | {spent:.0f} s | "
                  f"left {spent / (step + 1 - first) * (steps - step - 1):.0f} s", flush=True)
        if (step + 1) % 500 == 0:
            with written_whole(state) as temporary:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
                           temporary)
    state.unlink(missing_ok=True)


class TextTower(nn.Module):
    """A small CLIP text tower over whole words, with open_clip's parameter names."""

    def __init__(self, words, width, length=16, layers=2):
        super().__init__()
        self.index = {word: i for i, word in enumerate(words, 1)}                  # 0 pads
        self.token_embedding = nn.Embedding(len(words) + 1, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width) * 0.02)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(self.block(width) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, width) * width ** -0.5)

    @staticmethod
    def block(width):
        b = nn.Module()
        b.ln_1, b.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, width // 32, batch_first=True)
        b.ln_2, b.mlp = nn.LayerNorm(width), nn.Module()
        b.mlp.c_fc, b.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        return b

    def forward(self, texts):
        rows = [torch.tensor([self.index[word] for word in text.split()]) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)                    # (U, longest)
        x, padding = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]], ids == 0
        for b in self.transformer.resblocks:
            y = b.ln_1(x)
            x = x + b.attn(y, y, y, key_padding_mask=padding, need_weights=False)[0]
            x = x + b.mlp.c_proj(F.gelu(b.mlp.c_fc(b.ln_2(x))))
        real = (~padding)[..., None].float()
        return (self.ln_final(x) * real).sum(1) / real.sum(1) @ self.text_projection


class CLIP(nn.Module):
    def __init__(self, config, words, width=128, length=16):
        super().__init__()
        self.trunk = ConvNeXt(config)
        for block in (b for stage in self.trunk.stages for b in stage.blocks):
            nn.init.constant_(block.gamma, 0.5)             # 1e-6 is for training much longer than this
        self.norm, self.proj = ChannelNorm(config.dims[-1], config.eps), nn.Linear(config.dims[-1], width, bias=False)
        self.text = TextTower(words, width, length)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-4.0))                         # most pairs do not belong together

    def forward(self, images, texts):
        """images (B, 3, H, W), U texts -> logits (B, U): does text j belong to image i?"""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):          # the trunk takes most of the time
            last = self.trunk(images)[-1].float()
        return self.compare(last, texts)

    def compare(self, last, texts):
        """The coarsest maps (B, c, h, w) of images, U texts -> logits (B, U)."""
        image = F.normalize(self.proj(self.norm(last).mean((2, 3))), dim=-1)
        text = F.normalize(self.text(texts), dim=-1)
        return self.logit_scale.exp().clamp(max=100) * image @ text.T + self.logit_bias

    def open_clip_state(self):
        """{open_clip's name: tensor}, the parameters themselves."""
        return {"logit_scale": self.logit_scale.data, "logit_bias": self.logit_bias.data, **self.text.state_dict(),
                **self.trunk.state_dict(prefix="visual.trunk."), **self.proj.state_dict(prefix="visual.head.proj."),
                **self.norm.state_dict(prefix="visual.trunk.head.norm.")}


@torch.no_grad()
def balance(trunk, pixels):
    """
    Scales each stage so that its maps have RMS 1 on these images. Norms undo it, so that nothing else changes (but for
    epsilon); a linear layer over the raw maps of all stages then learns from each alike.
    """
    for number, (stage, out) in enumerate(zip(trunk.stages, trunk(pixels))):
        first = stage.downsample[1] if number else trunk.stem[1]
        for p in (first.weight, first.bias, *(p for b in stage.blocks for p in (b.conv_dw.bias, b.gamma))):
            p.div_(out.square().mean().sqrt())


def place_in_words(item):
    """As a question about a place is answered; near a border between two fifths, the ninth of the picture."""
    row, column = min(int(item.y * 3), 2), min(int(item.x * 3), 2)
    return place_in_fifths(item) or NINTHS[3 * row + column]


def object_in_words(item):
    """Color, class and place, as "red ship top left"."""
    return f"{item.color} {item.name} {place_in_words(item)}"


def land_in_words(layout):
    return f"{layout.cover} with {layout.feature.kind}" if layout.feature else layout.cover


def phrases(index, turn=0):
    """The short texts that are true of a turned scene: its land, "four red ships", "red ship top left"."""
    layout = make_layout("train", int(index), 0)
    counted = [phrase([group]) for group in count_objects(layout).items()]
    return {land_in_words(layout), *counted, *(object_in_words(turned(item, turn)) for item in layout.items)}


def miscounts(index):
    """Texts with one object more or less than there are: what is nearly true must be told from what is."""
    groups = count_objects(make_layout("train", int(index), 0)).items()
    return {phrase([(group, n + step)]) for group, n in groups for step in (-1, 1) if 0 < n + step < 6}


def turned(item, turn):
    """The item in a scene that is mirrored (turns 4 to 7), then turned left by 90 degrees, turn % 4 times."""
    x, y = (1 - item.x if turn >= 4 else item.x), item.y
    for _ in range(turn % 4):
        x, y = y, 1 - x
    return item._replace(x=x, y=y)


def turned_image(image, turn):
    """The same of an image (3, H, W)."""
    return torch.rot90(image.flip(2) if turn >= 4 else image, turn % 4, (1, 2))


def pairs(indices, turns):
    """-> the texts of all these scenes, U different ones, and which are true of which: (B, U) zeros and ones."""
    told = list(map(phrases, indices, turns))
    texts = sorted(set().union(*told, *map(miscounts, indices)))
    return texts, torch.tensor([[float(text in own) for text in texts] for own in told])


def pretrain_vision(out, n_scenes, steps, batch, seed, start=None):
    """Writes out/tiny-clip.safetensors; out is a path, start a file that an earlier run wrote, to go on from."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    # (n, H, W, 3) uint8, of 128 pixels, the image side of the tiny presets
    images = torch.from_numpy(np.stack([make_scene("train", i, 0, 128).image for i in range(n_scenes)]))
    print(f"vision: {n_scenes} scenes drawn", flush=True)
    some = range(min(n_scenes, 5000))
    words = sorted(set(" ".join(set().union(*map(phrases, some), *map(miscounts, some))).split()))
    model = CLIP(CONVNEXTS["tiny"], words)
    if start:
        fill(model.open_clip_state(), open_tensors(start).items(), start)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    pixels = lambda rows: (images[rows].permute(0, 3, 1, 2).float() / 255 - mean) / std

    def loss_of_step(step):
        rng = np.random.default_rng([seed, step])
        chosen, turns = rng.integers(0, n_scenes, batch), rng.integers(0, 8, batch)
        texts, true = pairs(chosen, turns)
        turned_pixels = torch.stack(list(map(turned_image, pixels(chosen), turns.tolist())))
        # SigLIP's loss: each of the B x U pairs belongs together or not. A text that is true of another image of the
        # batch, too, is no negative; "three red ships" is one for a picture of four, so that counts must be seen.
        return F.binary_cross_entropy_with_logits(model(turned_pixels, texts), true, reduction="sum") / true.sum()

    train(model, loss_of_step, steps, 0.05, "vision", out / "vision-state.pt")
    balance(model.trunk, pixels(slice(256)))
    state = {name: tensor.half() for name, tensor in model.open_clip_state().items()}
    write_tensors(out / "tiny-clip.safetensors", state, {"words": json.dumps(words)})
    print(f"wrote {out / 'tiny-clip.safetensors'}")


def conversation(index, rng):
    """A scene told in words, then questions and a caption: what an LM can learn of the world without pictures."""
    key, layout = Key("train", 0, index), make_layout("train", index, 0)
    facts = [object_in_words(item) for item in layout.items]
    asked, about = [qa[1:] for qa in questions(key)], region_questions(key)
    for i in rng.permutation(len(about))[:3]:
        _, question, answer, *objects = about[i]
        for n, j in enumerate(objects, 1):                                         # a region, too, is told in words
            question = question.replace(f"<region{n}>", facts[j])
        asked.append((question, answer))
    asked = [asked[i] for i in rng.permutation(len(asked))[:5]] + place_questions(layout, rng)
    texts = [text for i in rng.permutation(len(asked)) for text in asked[i]]
    texts[0] = f"{texts[0]}\n{SHORT_ANSWER}"
    caption = [str(rng.choice(CAPTION_PROMPTS)), str(rng.choice(captions(key)))]
    texts = caption + texts if rng.random() < 0.5 else texts + caption
    texts[0] = f"{tell(layout, layout.items, rng)}\n{texts[0]}"
    return {"id": str(index), "conversations": take_turns(texts)}


def reading_practice(index, rng):
    """
    Where is what? Up to six objects of another class or color each, of several scenes, told as one, and the place of
    each asked: two words found by two others are the hardest to learn, and a scene alone has few such questions.
    """
    found = [item for i in range(index, index + 6) for item in make_layout("train", i, 0).items]
    items = list({(item.name, item.color): item for item in found}.values())
    items, texts = [items[i] for i in rng.permutation(len(items))[:6]], []
    for item in items:
        texts += [draw_question(rng, "position", f"{item.color} {item.name}", 1), place_in_words(item)]
    told = tell(make_layout("train", index, 0), items, rng)
    texts[0] = f"{told}\n{texts[0]}\n{SHORT_ANSWER}"
    return {"id": str(index), "conversations": take_turns(texts)}


def tell(layout, items, rng):
    """
    The scene in words, object by object or place by place, in random order: "grass with river; red ship top left; ..."
    or "grass with river; top left: red ship, gray plane; ...".
    """
    items, facts = [items[i] for i in rng.permutation(len(items))], {}
    if rng.random() < 0.5:
        return "; ".join([land_in_words(layout), *map(object_in_words, items)])
    for item in items:
        facts.setdefault(place_in_words(item), []).append(f"{item.color} {item.name}")
    return "; ".join([land_in_words(layout), *(f"{place}: {', '.join(names)}" for place, names in facts.items())])


def place_questions(layout, rng):
    """(question, answer) for each group of objects, of one class and color, that stand in one place."""
    asked = []
    for (name, color), n in count_objects(layout).items():
        places = {place_in_words(item) for item in layout.items if (item.name, item.color) == (name, color)}
        if len(places) == 1:
            asked.append((draw_question(rng, "position", f"{color} {name}", n), places.pop()))
    return asked


def byte_pairs(words, size):
    """Byte-pair encoding (Sennrich et al. 2016): of words {pieces: count} merge the commonest pair, `size` times."""
    # A piece has a space on either side, so that replace() joins whole pieces, from left to right.
    words = {"".join(f" {piece} " for piece in pieces): count for pieces, count in words.items()}
    merges = []
    while len(merges) < size:
        pairs = Counter()
        for word, count in words.items():
            pieces = word.split()
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += count
        if not pairs:
            break
        a, b = max(sorted(pairs), key=pairs.get)
        merges.append((a, b))
        words = {word.replace(f" {a}  {b} ", f" {a}{b} "): count for word, count in words.items()}
    return merges


def write_tokenizer(folder, records, size):
    """
    A byte-level BPE in Hugging Face's layout, learned on the conversations of these records, with Llama-3's specials.
    One token is about a word, as it is for a real LM; with bytes an image token would have to stand for many letters at
    once.
    """
    texts = ["user", "assistant", VICUNA_SYSTEM, "USER:", "ASSISTANT:"]
    texts += [turn["value"] for record in records for turn in record["conversations"]]
    pieces = Counter()
    for text in texts:                      # on plain ASCII as GPT-2's pattern, which the tokenizer.json names
        pieces.update(re.findall(r" ?[A-Za-z]+| ?\d+| ?[^\sA-Za-z0-9]+|\s+", text))
    letter = {b: ch for ch, b in BYTE_OF.items()}
    words = {"".join(letter[b] for b in piece.encode()): n for piece, n in pieces.items()}
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>",
                "</s>")
    merges = byte_pairs(words, size - 256 - len(specials))
    vocab = [letter[b] for b in range(256)] + [a + b for a, b in merges]
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": name, **plain} for i, name in enumerate(specials, len(vocab))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": level,
                 "post_processor": None, "decoder": level,
                 "model": {"type": "BPE", "unk_token": None, "byte_fallback": False, "fuse_unk": False,
                           "vocab": {t: i for i, t in enumerate(vocab)}, "merges": [list(m) for m in merges]}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=0), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast",
                                                  "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
    return len(vocab) + len(specials)


def text_loss(model, tokenizer, records):
    """A language model's loss on all text of these records, and on the answers, few tokens among many, once more."""
    batched = collate([encode_record(record, tokenizer, ("llama-3", "vicuna")[k // 2 % 2])
                       for k, record in enumerate(records)])
    ids, real = batched["ids"], torch.arange(batched["ids"].shape[1]) < batched["lengths"][:, None]
    text, answers = ids[:, 1:].masked_fill(~real[:, 1:], IGNORE), batched["labels"][:, 1:]
    logits = model(ids[:, :-1]).flatten(0, 1).float()
    return sum(F.cross_entropy(logits, target.flatten(), ignore_index=IGNORE) for target in (text, answers))


def pretrain_llm(out, n_scenes, steps, batch, seed, start=None):
    """Writes the folder out/tiny-llm; out is a path, start a folder that an earlier run wrote, to go on from."""
    torch.manual_seed(seed)
    folder = out / "tiny-llm"
    if start:
        model = load_llama(start)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((start / name).read_bytes())
    else:
        rng = np.random.default_rng(seed)
        told = [conversation(i, rng) for i in range(min(n_scenes, 2000))]
        size = write_tokenizer(folder, told, 1024)             # fewer: words are whole
        model = Llama(dataclasses.replace(LLAMAS["tiny"], vocab_size=size))
    tokenizer = load_tokenizer(folder)

    def loss_of_step(step):
        rng = np.random.default_rng([seed, step])
        told = [(conversation, reading_practice)[k % 2](int(i), rng)
                for k, i in enumerate(rng.integers(0, n_scenes, batch))]
        return text_loss(model, tokenizer, told)

    train(model, loss_of_step, steps, 0.1, "llm", out / "llm-state.pt", 1e-3 if start else 2e-3)
    save_llama(model.to(torch.bfloat16), folder)
    print(f"wrote {folder}")


def pretrain(args):
    if args.part != "llm":
        pretrain_vision(args.out, args.vision_scenes, args.vision_steps, 64, args.seed, args.vision_start)
    if args.part != "vision":
        pretrain_llm(args.out, args.llm_scenes, args.llm_steps, 16, args.seed, args.llm_start)


def main():
    parser = Parser(prog="python -m checks.pretrain", description=__doc__)
    parser.add_argument("part", nargs="?", choices=("vision", "llm", "both"), default="both", help="default: both")
    parser.add_argument("--out", type=pathlib.Path, default="weights", help="folder to write (default weights)")
    parser.add_argument("--vision-scenes", type=whole(1), default=30000, help="train scenes drawn (default 30000)")
    parser.add_argument("--vision-steps", type=whole(1), default=6000, help="steps of 64 images (default 6000)")
    parser.add_argument("--vision-start", type=pathlib.Path, metavar="FILE", help="go on from an earlier run's file")
    parser.add_argument("--llm-scenes", type=whole(1), default=20000, help="train scenes told in words (default 20000)")
    parser.add_argument("--llm-steps", type=whole(1), default=8000, help="steps of 16 conversations (default 8000)")
    parser.add_argument("--llm-start", type=pathlib.Path, metavar="DIR", help="go on from an earlier run's tiny-llm")
    parser.add_argument("--seed", type=whole(0, SEEDS), default=0, help="default 0")
    parser.run(pretrain)


if __name__ == "__main__":
    main()
