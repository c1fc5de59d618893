"""
Where an image token looks: the SFI attention of one token over its window at every scale (Aquila, Sec. 3.3 and 3.4).

    python -m checks.attention --model DIR --image scene.png --token 1,2 --layer tokens --out attention.png
    python -m checks.attention --model DIR --summary 50

`--layer tokens` is the first SFI, a number MDA's SFI before that LM layer. The LM is causal: words after <image> cannot
change what MDA asks, words before it can. --summary N: the weight that each scale gets, and over how many cells the
weight of a head is spread (e to the power of its entropy), means over the tokens of N built-in test scenes.
"""
import math
import pathlib
import re

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from aquila import load_model, locate_weights
from commands.arguments import Parser, whole
from convnext import STRIDES
from data import encode_turns
from files.text import written_whole
from pictures.image_files import fit_image, load_image, open_image, to_tensor
from sfi import attention_weights
from tokenizer import load_tokenizer

SIDE = 320                                  # of a panel, in pixels
# Viridis (github.com/BIDS/colormap, CC0) at equal steps: lighter is more, in gray and to the color-blind as well.
RAMP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])


def sfi_weights(model, images, layer="tokens", ids=None):
    """The mean over heads of head_weights, as a list of (n, N, k_s*k_s) arrays."""
    return [a.mean(dim=2).numpy() for a in head_weights(model, images, layer, ids)]


def head_weights(model, images, layer, ids):
    """
    in:  images (n, 3, H, W); layer "tokens" or an LM layer with MDA, which needs ids (B, T), prompts with image slots.
    out: that SFI's attention, a list of (n, N, nh, k_s*k_s) tensors, together 1 for each token and head.
    """
    places = {"tokens": model.tokens.sfi} if model.config.integration == "sfi" else {}
    places |= {name: layer.sfi for name, layer in model.mda.items()}
    if str(layer) not in places:
        raise ValueError(f"--layer {layer}: this model has an SFI at {', '.join(places) or 'no place'}")
    weights = []
    # The hook sees the queries and the pyramid that the model itself hands to this SFI.
    watch = lambda sfi, given, out: weights.extend(attention_weights(sfi, given[0], given[1]))
    with places[str(layer)].register_forward_hook(watch), torch.inference_mode():
        if layer == "tokens":
            model.image_tokens(model.encode_images(images))
        else:
            model({"ids": ids, "images": images})
    return [a.float().cpu() for a in weights]


def attention_picture(image, weights, grid, token):
    """
    The window of an image token at every scale, cells shaded from 0 to the panel's largest, beside the whole image.
    in:  PIL image; the token's weights, a (k_s*k_s,) array a scale, together 1; grid (rows, cols); token (row, col).
    """
    (rows, cols), (row, col), half = grid, token, SIDE // 2
    image, x, y = image.convert("RGB"), image.width / cols, image.height / rows
    box = [SIDE * col / cols, SIDE * row / rows, SIDE * (col + 1) / cols, SIDE * (row + 1) / rows]
    panels = [(image.resize((SIDE, SIDE)), box, f"token {row},{col} of {rows}x{cols}\nbright: a panel's largest cell")]
    # In the others the window is the middle half; gray where its surroundings leave the image.
    area = (col - 0.5) * x, (row - 0.5) * y, (col + 1.5) * x, (row + 1.5) * y
    near = image.transform((SIDE, SIDE), Image.Transform.EXTENT, area, Image.Resampling.BICUBIC, fillcolor="gray")
    box = [half // 2, half // 2, half * 3 // 2, half * 3 // 2]
    for stride, a in zip(STRIDES[-len(weights):], weights):                        # the concat baseline has the last
        k, steps, panel = math.isqrt(len(a)), np.linspace(0, max(a.max(), 1e-30), len(RAMP)), near.copy()
        shades = np.stack([np.interp(a, steps, channel) for channel in RAMP.T], axis=-1).reshape(k, k, 3)
        cells = Image.fromarray(shades.astype(np.uint8)).resize((half, half), Image.Resampling.NEAREST)
        panel.paste(cells, box, Image.new("L", cells.size, 160))
        text = f"stride {stride}: {100 * a.sum():.1f} % of the weight\n{k}x{k} cells, largest {100 * a.max():.2f} %"
        panels.append((panel, box, text))
    out = Image.new("RGB", (len(panels) * (SIDE + 8), SIDE + 48), "white")
    for i, (panel, box, text) in enumerate(panels):
        ImageDraw.Draw(panel).rectangle(box, outline="red", width=2)
        out.paste(panel, (i * (SIDE + 8), 0))
        ImageDraw.Draw(out).text((i * (SIDE + 8) + 4, SIDE + 4), text, "black", ImageFont.load_default(15))
    return out


def prompt_ids(config, text):
    """A question about one image -> ids (1, T)."""
    tokenizer = load_tokenizer(locate_weights(config.llm_dir, "language model"))
    text = text if "<image>" in text else f"<image>\n{text}"
    turns = [("user", text), ("assistant", None)]
    return torch.tensor([encode_turns(turns, tokenizer, config.chat, 1, config.tokens_per_image)[0]])


def summarize(args):
    model, scenes = load_model(args.model), args.summary
    c, ids = model.config, prompt_ids(model.config, args.ask).expand(scenes, -1)
    images = torch.stack([to_tensor(load_image(f"scene:test/0/{i}/{c.image_size}")) for i in range(scenes)])
    layers = (["tokens"] if c.integration == "sfi" else []) + list(model.mda)
    print(f"{'':12}" + "".join(f"{f'stride {stride}':>12}" for stride in STRIDES) + f"{'cells':>12}")
    for layer in layers:
        weights = head_weights(model, images, layer, ids)
        entropy = torch.special.entr(torch.cat(weights, dim=-1)).sum(-1)           # (n, N, nh), in nats
        shares = "".join(f"{100 * a.sum(-1).mean():10.1f} %" for a in weights)
        print(f"{layer:12}{shares}{entropy.exp().mean():12.1f}")


def draw_attention(args):
    if args.summary:
        return summarize(args)
    if not (args.image and args.token):
        raise ValueError("give --image and --token, or --summary")
    if args.out.suffix != ".png" or not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: expected a name that ends in .png, in a folder that is there")
    place = re.fullmatch(r"(\d{1,9}),(\d{1,9})", args.token)
    if not place:
        raise ValueError(f"--token {args.token}: expected --token ROW,COL as in 1,2")
    image = load_image(args.image) if args.image.startswith("scene:") else open_image(args.image)
    model, row, col = load_model(args.model), int(place[1]), int(place[2])
    c = model.config
    if max(row, col) >= c.side:
        raise ValueError(f"--token {args.token}: the image has {c.side}x{c.side} tokens, rows and columns count from 0")
    image = fit_image(image, c.image_size, c.fit)
    weights = sfi_weights(model, to_tensor(image)[None], args.layer, prompt_ids(c, args.ask))
    picture = attention_picture(image, [a[0, row * c.side + col] for a in weights], (c.side, c.side), (row, col))
    with written_whole(args.out) as temporary:
        picture.save(temporary, "PNG")


def main(argv=None):
    parser = Parser(prog="python -m checks.attention", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder that train.py wrote")
    add("--image", help="image file, or a built-in scene as in scene:test/0/3/128")
    add("--token", help="ROW,COL of the image token in the grid, from 0")
    add("--layer", default="tokens", help="tokens, or the number of an LM layer with MDA (default tokens)")
    add("--ask", default="Describe the image.", help="the prompt, for an LM layer (default: %(default)s)")
    add("--summary", type=whole(1), metavar="N", help="no picture: means over N built-in test scenes")
    add("--out", default="attention.png", type=pathlib.Path, help="file to write (default attention.png)")
    parser.run(draw_attention, argv)


if __name__ == "__main__":
    main()
