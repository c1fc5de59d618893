"""
Predictions as one HTML page: python -m pictures.gallery pred.jsonl --out gallery.html --images DIR

A caption is neither right nor wrong; under "worst first" its own BLEU-1 places it among the questions. The masks of a
row lie on its first image, each in its color and with its number, <region1> first.
"""
import base64
import io
import json
import pathlib
from html import escape
from string import Template

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from commands.arguments import Parser, whole
from data import image_names
from files.text import written_whole
from pictures.image_files import load_image
from pictures.mask_files import decode_mask
from scoring.metrics import bleu, same_answer
from scoring.scores import read_predictions, references_of, score

SIDE = 320                                  # of pictures on the page, at most, in pixels
COLORS = {"right": "#1b6e3c", "wrong": "#b3261e", "caption": "#34557a"}
# Of regions, in turn; the first are colors that the ground seldom has.
REGIONS = ((255, 50, 220), (60, 225, 255), (255, 230, 60), (255, 140, 20), (90, 255, 130), (160, 110, 255))
PAGE = Template(pathlib.Path(__file__).with_name("gallery_page.html").read_text(encoding="utf-8"))
CARD = Template("""<article class="$state" data-type="$type" data-order="$order" data-points="$points">$images
<b>$verdict</b><p>$question</p><p><i>reference</i> $truth</p><p><i>answer</i> $prediction</p>
<p><small>$id, $type</small></p></article>""")


def graded(path):
    """The predictions of a file, each with truth (texts), points (0 to 1), state, verdict and pictures."""
    rows = []
    for number, (where, row) in enumerate(read_predictions(path), 1):
        row = {"id": number, "type": "question", "question": "", **row}
        names, masks, references = image_names(row), row.get("masks", []), references_of(row)
        if not all(isinstance(text, str) for text in [row["question"], *names]) or not isinstance(masks, list):
            raise ValueError(f"{where}: question and image must be texts, masks a list")
        row["pictures"] = [(name, "[]" if i else json.dumps(masks)) for i, name in enumerate(names)]
        row["truth"] = references or [row["answer"]]
        if references:
            row["points"] = bleu([row["prediction"]], [references])[0]
            row["state"], row["verdict"] = "caption", f"BLEU-1 {100 * row['points']:.0f}"
        else:
            row["points"] = int(same_answer(row["prediction"], row["answer"]))
            row["state"] = row["verdict"] = "right" if row["points"] else "wrong"
        rows.append(row)
    return rows


def draw_masks(image, masks):
    """Masks (R, h, w) bool laid on an RGB image of any size: a light fill, an outline and the number of the region."""
    out, numbers = np.array(image, dtype=float), []
    for i, mask in enumerate(masks):
        share = np.array(Image.fromarray(mask.astype(np.uint8) * 255).resize(image.size, Image.Resampling.BOX))
        inside = share > (127 if share.max() > 127 else 0)                         # less than a pixel keeps one
        wide = np.pad(inside, 1)
        edge = inside & ~(wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:])
        color = np.array(REGIONS[i % len(REGIONS)])
        out[inside] = 0.7 * out[inside] + 0.3 * color
        out[edge] = color
        pixels = np.argwhere(inside)
        (top, left), (bottom, right) = pixels.min(0), pixels.max(0)
        y, x = pixels[len(pixels) // 2]     # the number lies on the region, whatever its shape
        if min(right - left, bottom - top) < 20:                                   # beside one that it would hide
            y, x = (top + bottom) // 2, (right + 8 if right + 16 < image.width else max(left - 8, 8))
        numbers.append((int(x), int(y), str(i + 1), tuple(color.tolist())))
    out = Image.fromarray(out.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(13)
    for x, y, number, color in numbers:
        draw.text((x, y), number, color, font, anchor="mm", stroke_width=2, stroke_fill="black")
    return out


def picture(name, masks, root):
    """An image, its masks (JSON) laid on it, as HTML: the picture itself, or a line that says why there is none."""
    try:
        image, file = load_image(name, root), io.BytesIO()
        regions = [decode_mask(value, image.size, root) for value in json.loads(masks)]
        image.thumbnail((SIDE, SIDE))
        # JPEG halves the colors' detail unless told not to, and outlines are one pixel wide.
        draw_masks(image, regions).save(file, "JPEG", quality=85, subsampling=0 if regions else 2)
    except (ValueError, OSError) as e:
        return f"<p>{escape(str(e))}</p>"
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}" alt="{escape(name)}">'


def page(title, rows, shown, pictures):
    """The page as text: scores of all rows, cards of those shown."""
    note = f", {len(shown):,} of them below, evenly spread" if len(shown) < len(rows) else ""
    scores = {"scores": "", "more": ""}     # more: those of one type, "count: accuracy"
    for name, (value, n) in score(rows).items():
        scores["more" if ": " in name else "scores"] += f"<tr><td>{escape(name)}<td>{value:.1f}<td>{n:,}</tr>"
    kinds, cards = sorted({escape(row["type"]) for row in shown}), ""
    for order, row in enumerate(shown):
        texts = {key: escape(str(value)) for key, value in {**row, "truth": "\n".join(row["truth"])}.items()}
        images = "".join(pictures[key] for key in row["pictures"])
        cards += CARD.substitute(texts, order=order, images=images or "<p>no image, text only</p>")
    return PAGE.substitute(COLORS, **scores, title=escape(title), count=f"{len(rows):,} predictions{note}",
                           hidden="" if scores["more"] else "hidden", cards=cards,
                           types="".join(f'<option value="{kind}">{kind}</option>' for kind in kinds))


def write_gallery(args):
    if args.out.suffix != ".html" or not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: expected a name that ends in .html, in a folder that is there")
    rows = graded(args.predictions)
    n = min(args.limit, len(rows))
    shown = [rows[i * len(rows) // n] for i in range(n)]
    keys = {key for row in shown for key in row["pictures"]}                       # an image of many rows is read once
    pictures = {key: picture(*key, args.images) for key in keys}
    with written_whole(args.out) as temporary:
        temporary.write_text(page(args.predictions.name, rows, shown, pictures), encoding="utf-8", errors="replace")
    missing = sum(html.startswith("<p>") for html in pictures.values())
    print(f"{n} of {len(rows)} predictions in {args.out}; {missing} images could not be shown")


def main(argv=None):
    parser = Parser(prog="python -m pictures.gallery", description=__doc__)
    add = parser.add_argument
    add("predictions", type=pathlib.Path, help="predictions, a .jsonl file that evaluate.py wrote")
    add("--out", default="gallery.html", type=pathlib.Path, help="page to write (default gallery.html)")
    add("--images", default=".", help="folder that the image paths start from (default: here)")
    add("--limit", type=whole(1), default=300, help="cards on the page, at most (default 300, up to 10 MB)")
    parser.run(write_gallery, argv)


if __name__ == "__main__":
    main()
