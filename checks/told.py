"""
Is the LM hurt by learning to see? Unseen scenes told in words, no picture: what it answers as it was published, and
with the LoRA of a trained model.

    python -m checks.told --model runs/tiny/stage2 [--scenes 300]
    python -m checks.told --model runs/smollm2/stage2 --text english.txt

A scene is told as in pretraining, object by object or place by place, then one question is asked. The last row is the
loss a token of the whole text, in nats: an LM that has lost its language shows it there first. Without LoRA the
model's LM is compared with the published one bit for bit. --text: instead of scenes, the loss and the perplexity of a
text file, read in pieces of 512 tokens.
"""
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

from aquila import load_lm, load_model, locate_weights
from checks.pretrain import tell
from commands.arguments import Parser, whole
from commands.progress import Progress
from corpora.prompts import SHORT_ANSWER
from data import collate, encode_record
from files.text import naming, regular_file
from scoring.scores import print_table, score
from tokenizer import IGNORE, load_tokenizer
from toy.layout import Key, make_layout
from toy.scenes import questions, take_turns

PIECE = 512                                 # tokens of a text that are read at once


def told_records(scenes):
    """A record a question, of test scenes; none has an image."""
    records = []
    for index in range(scenes):
        key, layout, rng = Key("test", 0, index), make_layout("test", index, 0), np.random.default_rng(index)
        for i, (kind, question, answer) in enumerate(questions(key)):
            asked = f"{tell(layout, layout.items, rng)}\n{question}\n{SHORT_ANSWER}"
            records.append({"id": f"{index}-{i}", "type": kind, "conversations": take_turns([asked, answer])})
    return records


@torch.no_grad()
def text_loss(llm, ids, lengths):
    """ids (B, T), lengths (B,) -> the sum of the losses of their real tokens but the first, and how many they are."""
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    target = ids[:, 1:].masked_fill(~real[:, 1:], IGNORE)
    logits = llm(llm.embed(ids[:, :-1])).transpose(1, 2)
    return F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum").item(), int(real[:, 1:].sum())


def read_plain(llm, tokenizer, text):
    """-> loss and perplexity of a token, of a text in plain English."""
    pieces = torch.tensor(tokenizer.encode(text), dtype=torch.long).split(PIECE)
    rows, progress = [], Progress("pieces", len(pieces))
    for piece in pieces:
        rows.append(text_loss(llm, piece[None], torch.tensor([len(piece)])))
        progress.show(len(rows))
    total, tokens = map(sum, zip(*rows))
    return {"loss a token": (total / tokens, tokens), "perplexity": (math.exp(total / tokens), tokens)}


def read(model, tokenizer, records, chat, label):
    """-> scores of the answers, and the loss a token of prompts with their answers."""
    progress, rows, losses = Progress(label, len(records)), [], []
    for start in range(0, len(records), 64):
        some = records[start:start + 64]
        prompts, texts = (collate([encode_record(r, tokenizer, chat, answer=answer) for r in some])
                          for answer in (False, True))
        said = model.answer(prompts, tokenizer, max_new_tokens=16)
        rows += [{"type": r["type"], "prediction": text, "answer": r["conversations"][1]["value"]}
                 for r, text in zip(some, said)]
        losses.append(text_loss(model.llm, texts["ids"], texts["lengths"]))
        progress.show(len(rows))
    total, tokens = map(sum, zip(*losses))
    return {**score(rows), "loss a token": (total / tokens, tokens)}


def compare(args):
    model = load_model(args.model)
    c = model.config
    folder = locate_weights(c.llm_dir, "language model")
    tokenizer, published = load_tokenizer(folder), load_lm(folder)
    own = {name: p for name, p in model.llm.named_parameters() if ".lora_" not in name}
    same = sum(torch.equal(p, own[name]) for name, p in published.named_parameters())
    print(f"without LoRA {same} of {len(own)} tensors of the LM are the published ones bit for bit")
    if args.text:
        with naming(args.text):
            text = regular_file(args.text).read_text(encoding="utf-8")
            if len(tokenizer.encode(text)) < 2:
                raise ValueError("expected a text of two tokens or more")
        columns = {name: read_plain(llm, tokenizer, text)
                   for name, llm in (("trained", model.llm), ("published", published))}
    else:
        records = told_records(args.scenes)
        columns = {"trained": read(model, tokenizer, records, c.chat, "trained")}
        model.llm = published
        columns["published"] = read(model, tokenizer, records, c.chat, "published")
    print_table(columns)


def main():
    parser = Parser(prog="python -m checks.told", description=__doc__)
    parser.add_argument("--model", required=True, help="folder that train.py wrote")
    parser.add_argument("--scenes", type=whole(1), default=300, help="of the test split (default 300)")
    parser.add_argument("--text", type=pathlib.Path, metavar="FILE", help="read this text, not scenes")
    parser.run(compare)


if __name__ == "__main__":
    main()
