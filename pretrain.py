"""
Makes the tiny stand-ins for CLIP and Llama that stand in weights/, from scratch, on the built-in scenes of the
train split.

    python pretrain.py vision     # weights/tiny-clip.safetensors: a ConvNeXt and a text tower, from pictures with texts
    python pretrain.py llm        # weights/tiny-llm/: a Llama, and its tokenizer, trained on text alone
    python pretrain.py            # both

What the papers take from the web is imitated in kind: the vision tower sees pictures with short texts and learns which
belong together, through a text tower, never an object class as a label; the language model reads sentences and
conversations, and never a picture. Neither sees a scene of the val or test split. The files have the published layouts
(open_clip's key names; a Hugging Face directory), so that the tiny parts go through the very loaders that read the
real ones.
"""
import argparse
import dataclasses
import json
import math
import pathlib
import re
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import scenes
from convnext import CONVNEXTS, ChannelNorm, ConvNeXt
from data import CLIP_MEAN, CLIP_STD, IGNORE, VICUNA_SYSTEM, collate, encode_record
from llama import BYTE_OF, LLAMAS, Llama, load_tokenizer, save_llama

SIZE = 128                                  # pixels; the image side of the tiny presets
NINTHS = [f"{v} {h}".strip() for v in ("top", "", "bottom") for h in ("left", "", "right")]
NINTHS[4] = "center"


def place(item):
    """Where an object lies, in the words of the questions; near a border between those, the ninth of the picture."""
    return scenes.cell(item) or NINTHS[3 * min(int(item.y * 3), 2) + min(int(item.x * 3), 2)]


def land(ground):
    return ground.cover + (f" with {ground.feature.kind}" if ground.feature else "")


def report(index, rng):
    """Every fact of a scene as one line: each object with its color and its place, and the land."""
    ground = scenes.layout("train", index, 0)
    facts = [f"{o.color} {o.name} {place(o)}" for o in ground.items]
    rng.shuffle(facts)
    return "; ".join([land(ground)] + facts)


# ---------------------------------------------------------------------------------------------- vision, as SigLIP

class TextTower(nn.Module):
    """A small CLIP text tower over whole words, with open_clip's parameter names."""

    def __init__(self, words, width, out_dim, length=16, layers=2):
        super().__init__()
        self.index = {w: i + 1 for i, w in enumerate(words)}                       # 0 pads
        self.length = length
        self.token_embedding = nn.Embedding(len(words) + 1, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width) * 0.02)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(self.block(width) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, out_dim) * width ** -0.5)

    @staticmethod
    def block(width):
        b = nn.Module()
        b.ln_1, b.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, width // 32, batch_first=True)
        b.ln_2, b.mlp = nn.LayerNorm(width), nn.Module()
        b.mlp.c_fc, b.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        return b

    def tokens(self, texts):
        ids = torch.zeros(len(texts), self.length, dtype=torch.long)
        for row, text in zip(ids, texts):
            found = [self.index[word] for word in text.split()][:self.length]
            row[:len(found)] = torch.tensor(found)
        return ids[:, :int((ids > 0).sum(1).max())]

    def forward(self, ids):
        x, pad = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]], ids == 0
        for b in self.transformer.resblocks:
            y = b.ln_1(x)
            x = x + b.attn(y, y, y, key_padding_mask=pad, need_weights=False)[0]
            x = x + b.mlp.c_proj(F.gelu(b.mlp.c_fc(b.ln_2(x))))
        real = (~pad)[..., None].float()
        mean = (self.ln_final(x) * real).sum(1) / real.sum(1)
        return mean @ self.text_projection


class CLIP(nn.Module):
    def __init__(self, config, words, out_dim=128):
        super().__init__()
        self.trunk = ConvNeXt(config)
        for block in (b for stage in self.trunk.stages for b in stage.blocks):
            nn.init.constant_(block.gamma, 0.5)         # 1e-6 is for training much longer than this
        self.norm, self.proj = ChannelNorm(config.dims[-1], config.eps), nn.Linear(config.dims[-1], out_dim, bias=False)
        self.text = TextTower(words, 128, out_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-4.0))                         # most pairs do not belong together

    def forward(self, images, ids):
        """images (B, 3, H, W), ids (U, length) -> logits (B, U): does text j belong to image i?"""
        image = F.normalize(self.proj(self.norm(self.trunk(images)[-1]).mean((2, 3))).float(), dim=-1)
        text = F.normalize(self.text(ids).float(), dim=-1)
        return self.logit_scale.exp().clamp(max=100) * image @ text.T + self.logit_bias

    def open_clip_state(self):
        names = {"trunk.": "visual.trunk.", "norm.": "visual.trunk.head.norm.", "proj.": "visual.head.proj.",
                 "text.": ""}
        rename = lambda k: next((new + k.removeprefix(old) for old, new in names.items() if k.startswith(old)), k)
        return {rename(k): v.detach().half().contiguous() for k, v in self.state_dict().items()}


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


def render(index):
    return scenes.make_scene("train", index, 0, SIZE).image


def phrases(index):
    """The short texts that are true of a scene: its land, "four red ships", "red ship top left"."""
    ground = scenes.layout("train", int(index), 0)
    counted = [scenes.phrase([group]) for group in scenes.count_objects(ground).items()]
    return {land(ground), *counted, *(f"{o.color} {o.name} {place(o)}" for o in ground.items)}


def pairs(indices):
    """-> the texts of all these scenes, U different ones, and which are true of which: (B, U) zeros and ones."""
    found = [phrases(i) for i in indices]
    texts = sorted(set().union(*found))
    return texts, torch.tensor([[float(text in own) for text in texts] for own in found])


def schedule(step, steps, peak, warmup=0.05):
    """Linear warm-up, then cosine to a hundredth of the peak."""
    if step < warmup * steps:
        return peak * (step + 1) / (warmup * steps)
    t = (step - warmup * steps) / (steps - warmup * steps)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * t)))


def train(model, loss_of_step, steps, lr, decay, name):
    """The loop both parts share: AdamW, warm-up and cosine, one line every 50 steps."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=decay), dict(params=plain, weight_decay=0.0)],
                                  lr=lr, betas=(0.9, 0.98))
    model.train()
    started, seen = time.time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, lr)
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            spent = time.time() - started
            print(f"{name} step {step + 1}/{steps} | loss {np.mean(seen[-50:]):.4f} | {spent:.0f} s | "
                  f"left {spent / (step + 1) * (steps - step - 1):.0f} s", flush=True)


def pretrain_vision(out, n_scenes, steps, batch, seed):
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    with ProcessPoolExecutor() as pool:
        images = torch.from_numpy(np.stack(list(pool.map(render, range(n_scenes), chunksize=64))))  # (n, H, W, 3) uint8
    print(f"vision: {n_scenes} scenes drawn", flush=True)
    words = sorted({word for i in range(min(n_scenes, 5000)) for text in phrases(i) for word in text.split()})
    model = CLIP(CONVNEXTS["tiny"], words)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    order = []

    def loss_of_step(step):
        while len(order) < batch:
            order.extend(rng.permutation(n_scenes).tolist())
        picked = [order.pop() for _ in range(batch)]
        pixels = (images[picked].permute(0, 3, 1, 2).float() / 255 - mean) / std
        texts, true = pairs(picked)
        # SigLIP's loss: each of the B x U pairs belongs together or not. A text that is true of another image of the
        # batch, too, is no negative; "three red ships" is one for a picture of four, so that counts must be seen.
        logits = model(pixels, model.text.tokens(texts))
        return F.binary_cross_entropy_with_logits(logits, true, reduction="sum") / true.sum()

    train(model, loss_of_step, steps, 2e-3, 0.05, "vision")
    balance(model.trunk, (images[:256].permute(0, 3, 1, 2).float() / 255 - mean) / std)
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.open_clip_state(), out / "tiny-clip.safetensors", metadata={"words": json.dumps(words)})
    print(f"wrote {out / 'tiny-clip.safetensors'}")


# ---------------------------------------------------------------------------------------------- language, from text

def conversation(index, rng):
    """A scene told in words, then questions and a caption: what an LM can learn of the world without pictures."""
    key = scenes.Key("train", 0, index, SIZE)
    items, asked = scenes.layout("train", index, 0).items, [qa[1:] for qa in scenes.questions(key)]
    about = scenes.region_questions(key)
    for i in rng.permutation(len(about))[:3]:
        _, question, answer, objects = about[i]
        for n, j in enumerate(objects, 1):                                         # a region, too, is told in words
            question = question.replace(f"<region{n}>", f"{items[j].color} {items[j].name} {place(items[j])}")
        asked.append((question, answer))
    turns = [text for i in rng.permutation(len(asked))[:8] for text in asked[i]]
    turns[0] = f"{turns[0]}\n{scenes.SHORT}"
    caption = [str(rng.choice(scenes.CAPTION_PROMPTS)), str(rng.choice(scenes.captions(key)))]
    turns = caption + turns if rng.random() < 0.5 else turns + caption
    turns[0] = f"{report(index, rng)}\n{turns[0]}"
    return {"id": str(index),
            "conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]}


SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
            "<s>", "</s>")


def byte_pairs(words, size):
    """
    Byte-pair encoding (Sennrich et al. 2016): words {tuple of pieces: count};
    merge the commonest pair till size merges.
    """
    merges = []
    while len(merges) < size:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        a, b = max(sorted(pairs), key=pairs.get)
        merges.append((a, b))
        merged = Counter()
        for word, count in words.items():
            pieces, i = [], 0
            while i < len(word):
                joined = word[i:i + 2] == (a, b)
                pieces.append(a + b if joined else word[i])
                i += 1 + joined
            merged[tuple(pieces)] += count
        words = merged
    return merges


def write_tokenizer(folder, n_scenes, size, rng):
    """
    A byte-level BPE in Hugging Face's layout, learned on the conversations, with Llama-3's specials. One token is about
    a word, as it is for a real LM; with bytes an image token would have to stand for many letters at once.
    """
    texts = [t["value"] for i in range(min(n_scenes, 2000)) for t in conversation(i, rng)["conversations"]]
    letter = {b: ch for ch, b in BYTE_OF.items()}
    # On plain ASCII these pieces are those of GPT-2's pattern, which the tokenizer.json names.
    pieces = Counter(p for text in [*texts, "user", "assistant", VICUNA_SYSTEM, "USER:", "ASSISTANT:"]
                     for p in re.findall(r" ?[A-Za-z]+| ?\d+| ?[^\sA-Za-z0-9]+|\s+", text))
    words = Counter({tuple(letter[b] for b in piece.encode()): n for piece, n in pieces.items()})
    merges = byte_pairs(words, size - 256 - len(SPECIALS))
    vocab = [letter[b] for b in range(256)] + [a + b for a, b in merges]
    added = [dict(id=len(vocab) + i, content=name, special=True, single_word=False, lstrip=False, rstrip=False,
                  normalized=False)
             for i, name in enumerate(SPECIALS)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": level,
                 "post_processor": None, "decoder": level,
                 "model": {"type": "BPE", "unk_token": None, "byte_fallback": False, "fuse_unk": False,
                           "vocab": {t: i for i, t in enumerate(vocab)}, "merges": [list(m) for m in merges]}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=0))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        indent=1))
    return len(vocab) + len(SPECIALS)


def pretrain_llm(out, n_scenes, steps, batch, seed):
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    folder = out / "tiny-llm"
    size = write_tokenizer(folder, n_scenes, 1024, rng)                            # fewer, when all words are whole
    model, tokenizer = Llama(dataclasses.replace(LLAMAS["tiny"], vocab_size=size)), load_tokenizer(folder)

    def loss_of_step(step):
        rows = [encode_record(conversation(int(i), rng), tokenizer, ("llama-3", "vicuna")[k % 2])
                for k, i in enumerate(rng.integers(0, n_scenes, batch))]
        batched = collate(rows)
        ids, real = batched["ids"], torch.arange(batched["ids"].shape[1]) < batched["lengths"][:, None]
        text, answers = ids[:, 1:].masked_fill(~real[:, 1:], IGNORE), batched["labels"][:, 1:]
        logits = model(ids[:, :-1]).flatten(0, 1)
        # All text is learned, and the answers, few tokens among many, once more.
        return sum(F.cross_entropy(logits, target.flatten(), ignore_index=IGNORE) for target in (text, answers))

    train(model, loss_of_step, steps, 2e-3, 0.1, "llm")
    save_llama(model.to(torch.bfloat16), folder)
    print(f"wrote {folder}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("vision", "llm", "both"), default="both")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("weights"),
                        help="folder to write (default weights)")
    parser.add_argument("--vision-scenes", type=int, default=30000, help="train scenes drawn (default 30000)")
    parser.add_argument("--vision-steps", type=int, default=4500,
                        help="steps of 64 images and their texts (default 4500)")
    parser.add_argument("--llm-scenes", type=int, default=20000, help="train scenes told in words (default 20000)")
    parser.add_argument("--llm-steps", type=int, default=4000, help="steps of 16 conversations (default 4000)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args()
    if args.part != "llm":
        pretrain_vision(args.out, args.vision_scenes, args.vision_steps, 64, args.seed)
    if args.part != "vision":
        pretrain_llm(args.out, args.llm_scenes, args.llm_steps, 16, args.seed)


if __name__ == "__main__":
    main()
