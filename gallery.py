"""
Pictures to look at: predictions as one HTML page, and where an image token looks (Aquila, Sec. 3.3 and 3.4).

    python gallery.py pred.jsonl --out gallery.html --images DIR      # the page, and gallery.png, a contact sheet
    python gallery.py --model DIR --image scene.png --token 1,2 --layer 4 --out attention.png

- A caption is neither right nor wrong; under "worst first" its own BLEU-1 places it among the questions.
- The masks of a row lie on its first image, each in its color and with its number, <region1> first.
- `--layer tokens` is the first SFI, a number MDA's SFI before that LM layer. The LM is causal: words after <image>
  cannot change what MDA asks, words before it can.
"""
import argparse
import base64
import io
import json
import math
import os
import pathlib
import re
import textwrap
from html import escape
from string import Template

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from aquila import find, load_model
from data import encode_turns, fit_image, image_names, load_image, load_masks, open_image, to_tensor
from evaluate import read_rows, score
from llama import load_tokenizer
from metrics import bleu, normalize_answer, references_of

SIDE = 320                                  # of pictures on the page, at most, and of attention panels, in pixels
SHEET = 60                                  # predictions on the contact sheet
COLORS = {"right": "#1b6e3c", "wrong": "#b3261e", "caption": "#34557a"}
# Of regions, in turn; the first are colors that the ground seldom has.
REGIONS = ((255, 50, 220), (60, 225, 255), (255, 230, 60), (255, 140, 20), (90, 255, 130), (160, 110, 255))
# Viridis (github.com/BIDS/colormap, CC0) at equal steps: lighter is more, in gray and to the color-blind as well.
RAMP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])


def graded(path):
    """The predictions of a file, each with truth (texts), points (0 to 1), state, verdict and pictures (keys)."""
    rows = [{"id": n, "type": "question", "question": "", **row} for n, row in enumerate(read_rows(path), 1)]
    for number, row in enumerate(rows, 1):
        names, masks = image_names(row), row.get("masks", [])
        if not all(isinstance(text, str) for text in [row["question"], *names]) or not isinstance(masks, list):
            raise ValueError(f"{path}, line {number}: question and image must be texts, masks a list")
        row["truth"] = references_of(row) or [row["answer"]]
        row["pictures"] = [(name, json.dumps([] if i else masks)) for i, name in enumerate(names)] or [(None, "[]")]
        if references_of(row):
            row["points"] = bleu([row["prediction"]], [row["truth"]])[0]
            row["state"], row["verdict"] = "caption", f"BLEU-1 {100 * row['points']:.0f}"
        else:
            row["points"] = int(normalize_answer(row["prediction"]) == normalize_answer(row["answer"]))
            row["state"] = row["verdict"] = ("wrong", "right")[row["points"]]
    return rows


def draw_masks(image, masks):
    """
    Masks (R, h, w) bool, of the picture before it was made smaller, laid on an RGB image of any size: a light fill, an
    outline and the number of the region. A region of less than a pixel keeps one.
    """
    out, numbers = np.array(image, dtype=float), []
    for i, mask in enumerate(masks):
        small = Image.fromarray(mask.astype(np.uint8) * 255).resize(image.size, Image.Resampling.BOX)
        inside = np.array(small) > 127 if (np.array(small) > 127).any() else np.array(small) > 0
        wide = np.pad(inside, 1)
        edge = inside & ~(wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:])
        color = np.array(REGIONS[i % len(REGIONS)])
        out[inside] = 0.7 * out[inside] + 0.3 * color
        out[edge] = color
        pixels = np.argwhere(inside)
        (top, left), (bottom, right) = pixels.min(0), pixels.max(0)
        y, x = pixels[len(pixels) // 2]                    # the number lies on the region, whatever its shape
        if min(right - left, bottom - top) < 20:           # beside one that it would hide
            y, x = (top + bottom) // 2, right + 8 if right + 16 < image.width else max(left - 8, 8)
        numbers.append((int(x), int(y), str(i + 1), tuple(int(c) for c in color)))
    out = Image.fromarray(out.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(13)
    for x, y, number, color in numbers:
        draw.text((x, y), number, color, font, anchor="mm", stroke_width=2, stroke_fill="black")
    return out


def thumbnails(rows, root):
    """{(image name, masks as JSON): JPEG bytes, or the line that says why there is no picture}"""
    found = {(None, "[]"): "no image, text only"}
    for name, masks in {key for row in rows for key in row["pictures"] if key[0]}:
        try:
            image, file = load_image(name, root), io.BytesIO()
            regions = load_masks({"masks": json.loads(masks)}, root, image.size)
            image.thumbnail((SIDE, SIDE))
            # JPEG halves the colors' detail unless told not to, and outlines are one pixel wide.
            draw_masks(image, regions).save(file, "JPEG", quality=85, subsampling=0 if len(regions) else 2)
            found[name, masks] = file.getvalue()
        except (ValueError, OSError) as e:
            found[name, masks] = str(e)
    return found


PAGE = Template("""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>$title</title>
<style>body { font: 15px system-ui, sans-serif; margin: auto; padding: 0 20px; max-width: 1400px; background: #f4f4f2 }
td, th { text-align: right; padding-right: 24px } td:first-child, th:first-child { text-align: left }
form { position: sticky; top: 0; background: #f4f4f2; padding: 10px 0; display: flex; gap: 14px; flex-wrap: wrap }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px; align-items: start }
article { background: white; border-top: 6px solid; border-radius: 4px; padding: 10px; overflow-wrap: anywhere }
article[hidden] { display: none } article p { color: #222; margin: 4px 0; white-space: pre-line } i { color: #555 }
img { width: 100% } .right { color: $right } .wrong { color: $wrong } .caption { color: $caption }</style>
<h1>$title</h1><p>$count</p><table><tr><th>score<th>percent<th>predictions</tr>$scores</table>
<details $hidden><summary>more on some types</summary><table>$more</table></details>
<form onsubmit="return false" autocomplete="off">
<label>type <select name="type"><option value="">all</option>$types</select></label>
<label>show <select name="show"><option value="">all</option><option>right<option>wrong<option>caption</select></label>
<label>sort <select name="sort"><option>worst first<option>as in the file</select></label>
<label>search <input name="search" type="search"></label> <output></output></form>
<main>$cards</main><script>
const form = document.forms[0], cards = [...document.querySelectorAll("article")];
for (const [key, value] of new URLSearchParams(location.hash.slice(1))) if (form[key]) form[key].value = value;
function update() {
  const want = Object.fromEntries(new FormData(form)), words = want.search.toLowerCase();
  for (const card of cards)
    card.hidden = want.type && card.dataset.type != want.type || want.show && card.className != want.show
                  || !card.textContent.toLowerCase().includes(words);
  const by = (key, a, b) => a.dataset[key] - b.dataset[key];
  cards.sort((a, b) => want.sort == "worst first" && by("points", a, b) || by("order", a, b));
  document.querySelector("main").append(...cards);
  form.querySelector("output").value = cards.filter(card => !card.hidden).length + " of " + cards.length + " shown";
  location.replace("#" + new URLSearchParams(want));
}
(form.oninput = update)();</script>""")
CARD = Template("""<article class="$state" data-type="$type" data-order="$order" data-points="$points">$images
<b>$verdict</b><p>$question</p><p><i>reference</i> $truth</p><p><i>answer</i> $prediction</p>
<p><small>$id, $type</small></p></article>""")


def page(title, rows, shown, pictures):
    """The page as text: scores of all rows, cards of those shown."""
    note = f", {len(shown):,} of them below, evenly spread" if len(shown) < len(rows) else ""
    figures = {name: f"<tr><td>{escape(name)}<td>{value:.1f}<td>{n:,}</tr>" for name, (value, n) in score(rows).items()}
    scores = ["".join(line for name, line in figures.items() if (": " in name) == more) for more in (False, True)]
    types = [f'<option value="{kind}">{kind}</option>' for kind in sorted({escape(row["type"]) for row in shown})]
    html, cards = {}, []
    for key, picture in pictures.items():
        if isinstance(picture, str):
            html[key] = f"<p>{escape(picture)}</p>"
        else:
            data = base64.b64encode(picture).decode()
            html[key] = f'<img src="data:image/jpeg;base64,{data}" alt="{escape(key[0])}">'
    for order, row in enumerate(shown):
        texts = {**row, "truth": "\n".join(row["truth"])}
        cards.append(CARD.substitute({key: escape(str(text)) for key, text in texts.items()}, order=order,
                                     images="".join(map(html.get, row["pictures"]))))
    return PAGE.substitute(COLORS, title=escape(title), count=f"{len(rows):,} predictions{note}",
                           scores=scores[0], more=scores[1], hidden="" if scores[1] else "hidden",
                           types="".join(types), cards="".join(cards))


def contact_sheet(rows, pictures, columns=6, side=212, height=322):
    """The rows as one picture: image, verdict, question, reference, answer."""
    font, across, down = ImageFont.load_default(12), min(columns, len(rows)), math.ceil(len(rows) / columns)
    sheet = Image.new("RGB", (across * (side + 8), down * (height + 8)), "white")
    for i, row in enumerate(rows):
        cell = Image.new("RGB", (side, height), "#eeeeee")                         # cuts text that is too long
        draw, picture = ImageDraw.Draw(cell), pictures[row["pictures"][0]]
        if isinstance(picture, str):
            draw.text((4, 4), textwrap.fill(picture, 34), "black", font)
        else:
            cell.paste(ImageOps.pad(Image.open(io.BytesIO(picture)), (side, side), color="#eeeeee"))
        draw.rectangle((0, side, side, side + 16), COLORS[row["state"]])
        draw.text((4, side + 1), row["verdict"], "white", font)
        for line, text in enumerate((row["question"], "reference: " + row["truth"][0], "answer: " + row["prediction"])):
            draw.text((4, side + 19 + 29 * line), "\n".join(textwrap.wrap(text, 33)[:2]), "black", font)
        sheet.paste(cell, (i % columns * (side + 8), i // columns * (height + 8)))
    return sheet


def gallery(args, out):
    rows = graded(args.predictions)
    n = min(args.limit, len(rows))
    if n < 1:
        raise ValueError(f"--limit {args.limit}: expected at least 1")
    shown = [rows[i * len(rows) // n] for i in range(n)]
    pictures, worst = thumbnails(shown, args.images), sorted(shown, key=lambda row: row["points"])[:SHEET]
    html, sheet = page(pathlib.Path(args.predictions).name, rows, shown, pictures), contact_sheet(worst, pictures)
    write(out, lambda name: pathlib.Path(name).write_text(html, encoding="utf-8", errors="replace"))
    write(out.with_suffix(".png"), lambda name: sheet.save(name, "PNG"))
    missing = sum(isinstance(picture, str) for (name, _), picture in pictures.items() if name)
    print(f"{n} of {len(rows)} predictions in {out} and {out.with_suffix('.png')}; {missing} images could not be shown")


def sfi_weights(model, images, layer="tokens", ids=None):
    """
    in:  images (n, 3, H, W); layer "tokens" or an LM layer with MDA, which needs ids (B, T), prompts with image slots.
    out: that SFI's attention, the mean of its heads: a list of (n, N, k_s*k_s) arrays, together 1 for each token.
    """
    known = [*(["tokens"] if model.config.integration == "sfi" else []), *model.mda]
    if str(layer) not in known:
        raise ValueError(f"--layer {layer}: this model has an SFI at {', '.join(known) or 'no place'}")
    sfi, seen = model.tokens.sfi if layer == "tokens" else model.mda[str(layer)].sfi, []
    # The hook sees the queries and the pyramid that the model itself hands to this SFI.
    watch = lambda sfi, given, out: seen.append(sfi.attention(sfi.wq(given[0]), given[1]))
    with sfi.register_forward_hook(watch), torch.inference_mode():
        model.look(model.see(images)) if layer == "tokens" else model({"ids": ids, "images": images})
    return [a.mean(dim=2).float().cpu().numpy() for a in seen[0]]


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
    box = [half // 2, half // 2, half * 3 // 2, half * 3 // 2]
    near = image.transform((SIDE, SIDE), Image.Transform.EXTENT, area, Image.Resampling.BICUBIC, fillcolor="gray")
    for stride, a in zip((4, 8, 16, 32)[-len(weights):], weights):          # the concat baseline has the last alone
        k, steps = math.isqrt(len(a)), np.linspace(0, max(a.max(), 1e-30), len(RAMP))
        shades = np.stack([np.interp(a, steps, channel) for channel in RAMP.T], axis=-1).reshape(k, k, 3)
        cells = Image.fromarray(shades.astype(np.uint8)).resize((half, half), Image.Resampling.NEAREST)
        panel = near.copy()
        panel.paste(cells, box, Image.new("L", cells.size, 160))
        panels.append((panel, box, f"stride {stride}: {100 * a.sum():.1f} % of the weight\n"
                                   f"{k}x{k} cells, largest {100 * a.max():.2f} %"))
    out = Image.new("RGB", (len(panels) * (SIDE + 8), SIDE + 48), "white")
    for i, (panel, box, text) in enumerate(panels):
        ImageDraw.Draw(panel).rectangle(box, outline="red", width=2)
        out.paste(panel, (i * (SIDE + 8), 0))
        ImageDraw.Draw(out).text((i * (SIDE + 8) + 4, SIDE + 4), text, "black", ImageFont.load_default(15))
    return out


def attention(args, out):
    place = re.fullmatch(r"(\d+),(\d+)", args.token or "")
    if not args.image or not place:
        raise ValueError(f"--model needs --image FILE and --token ROW,COL as in 1,2; got {args.image} and {args.token}")
    image = load_image(args.image) if args.image.startswith("scene:") else open_image(args.image)
    model, row, col = load_model(args.model), int(place[1]), int(place[2])
    c = model.config
    if max(row, col) >= c.side:
        raise ValueError(f"--token {args.token}: the image has {c.side}x{c.side} tokens, rows and columns count from 0")
    image, ask = fit_image(image, c.image_size, c.fit), args.ask if "<image>" in args.ask else f"<image>\n{args.ask}"
    tokenizer = load_tokenizer(find(c.llm_dir, "language model"))
    ids, _ = encode_turns([("user", ask), ("assistant", None)], tokenizer, c.chat, 1, c.image_tokens)
    weights = sfi_weights(model, to_tensor(image)[None], args.layer, torch.tensor([ids]))
    picture = attention_picture(image, [a[0, row * c.side + col] for a in weights], (c.side, c.side), (row, col))
    write(out, lambda name: picture.save(name, "PNG"))


def write(path, save):
    """save(a temporary name), then rename: a file that is there is whole."""
    save(f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, one_of = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    one_of.add_argument("predictions", nargs="?", help="predictions, a .jsonl file that evaluate.py wrote")
    add("--out", help="file to write (default gallery.html; with --model attention.png)")
    add("--images", default=".", help="folder that the image paths of the predictions start from (default: here)")
    add("--limit", type=int, default=300, help="cards on the page, at most (default 300, up to 10 MB)")
    one_of.add_argument("--model", help="folder that train.py wrote: draw the attention of one image token instead")
    add("--image", help="--model: image file, or a built-in scene as in scene:test/0/3/128")
    add("--token", help="--model: ROW,COL of the token in the grid, from 0")
    add("--layer", default="tokens", help="--model: tokens, or an LM layer with MDA (default tokens)")
    add("--ask", default="Describe the image.", help="--model: the prompt, for an LM layer (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        run, ending, out = (attention, ".png", "attention.png") if args.model else (gallery, ".html", "gallery.html")
        out = pathlib.Path(args.out or out)
        if out.suffix != ending or not out.parent.is_dir():
            raise ValueError(f"--out {out}: expected a name that ends in {ending}, in a folder that is there")
        run(args, out)
    except (ValueError, OSError) as e:
        parser.exit(2, f"gallery.py: {e}\n")


if __name__ == "__main__":
    main()
