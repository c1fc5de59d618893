"""
A real pretrained model in Meta's layout: stories260K (llama2.c), converted and loaded, tells its published story.

    python -m checks.stories260k DIR     # holds stories260K.bin, tok512.bin and expected.txt, how the story begins

260,000 parameters, 8 heads over 4, rotary pairs interleaved, output tied. Not part of the test suite, since it needs
the files. Exits with 1 if the text differs.
"""
import json
import re
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from commands.arguments import Parser
from llama import generate, load_llama

BOS, EOS = 1, 2


def convert(file, folder):
    """llama2.c's file: seven sizes, then float32 tensors, each kind for all layers together -> Meta's files."""
    raw = file.read_bytes()
    dim, ffn, layers, heads, kv_heads, vocab, _ = struct.unpack("7i", raw[:28])
    values, kv = torch.from_numpy(np.frombuffer(raw, "<f4", offset=28).copy()), dim // heads * kv_heads
    state, at = {}, 0

    def take(name, *shape):
        nonlocal at
        for i in range(layers) if "{}" in name else [0]:
            state[name.format(i)] = values[at:at + int(np.prod(shape))].view(shape).clone()
            at += int(np.prod(shape))

    take("tok_embeddings.weight", vocab, dim)
    take("layers.{}.attention_norm.weight", dim)
    take("layers.{}.attention.wq.weight", dim, dim)
    take("layers.{}.attention.wk.weight", kv, dim)
    take("layers.{}.attention.wv.weight", kv, dim)
    take("layers.{}.attention.wo.weight", dim, dim)
    take("layers.{}.ffn_norm.weight", dim)
    take("layers.{}.feed_forward.w1.weight", ffn, dim)
    take("layers.{}.feed_forward.w2.weight", dim, ffn)
    take("layers.{}.feed_forward.w3.weight", ffn, dim)
    take("norm.weight", dim)
    torch.save(state, folder / "consolidated.00.pth")
    params = dict(dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads, vocab_size=vocab, norm_eps=1e-5)
    (folder / "params.json").write_text(json.dumps(params))


def read_pieces(file):
    """llama2.c's tokenizer: the longest length, then for each token its score, length and bytes."""
    raw, at, pieces = file.read_bytes(), 4, []
    while at < len(raw):
        _, n = struct.unpack_from("<fi", raw, at)
        piece = raw[at + 8:at + 8 + n]
        byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
        pieces.append(bytes([int(byte[1], 16)]) if byte else piece)
        at += 8 + n
    return pieces


def tell(args):
    folder = args.folder
    with tempfile.TemporaryDirectory() as meta:
        convert(folder / "stories260K.bin", Path(meta))
        model = load_llama(meta)
    pieces, expected = read_pieces(folder / "tok512.bin"), (folder / "expected.txt").read_text()
    prompt = model.embed(torch.tensor([[BOS]]))
    ids = generate(model, prompt, max_new_tokens=200, stop_ids=[BOS, EOS])
    text = b"".join(pieces[int(i)] for i in ids).decode().lstrip()
    print(text)
    if not text.startswith(expected.strip()):
        print(f"\nDIFFERS: expected to begin\n{expected}")
        sys.exit(1)
    print(f"\nbegins with the {len(expected.strip())} characters of expected.txt")


def main():
    parser = Parser(prog="python -m checks.stories260k", description=__doc__)
    parser.add_argument("folder", type=Path, help="holds stories260K.bin, tok512.bin and expected.txt")
    parser.run(tell)


if __name__ == "__main__":
    main()
