"""
An eye chart: how small may an object be? One object of 2, 4, 8, 16 or 32 pixels on plain ground, and what a trained
tiny model says of it: its class, its color, and whether it is there.

    python -m checks.eye_chart --rows concat,sfi,whole         # of checks.ladder, all seeds in runs/ladder
    python -m checks.eye_chart --rows whole,without-4,without-8 --seeds 1
    python -m checks.eye_chart --model runs/tiny/stage2 --teach 0
    python -m checks.eye_chart --chart chart.png               # the chart itself

In the built-in scenes objects of a class are of about one size. So a model is taught before it is asked: stage 2 goes
on for --teach steps with charts of other objects, of all five sides. The vision encoder stays frozen, and has learned
from the sizes of the scenes only.

The class is right if a caption names it and no other class; half of the questions "Is there a ...?" are about a class
that is absent. The last row is the last model, shown the ground without the object: water gives a ship away.
"""
import contextlib
import math
import pathlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import aquila
from aquila import load_model, locate_weights, set_stage
from checks.ladder import ROWS
from checks.variants import VARIANTS
from commands.arguments import Parser, whole
from commands.progress import Progress
from corpora.prompts import IMAGE_LINE, SHORT_ANSWER
from data import collate, encode_record
from files.text import check_target, written_whole
from lora import merge_lora
from pictures.image_files import to_tensor
from scoring.metrics import same_answer, tokenize
from tokenizer import load_tokenizer
from toy.drawing import draw_scene
from toy.layout import CLASSES, COLORS, CONTRAST, GROUNDS, PALETTES, Item, Key, Layout
from toy.scenes import CAPTION_PROMPTS, WORDINGS, plural, take_turns
from train import RECIPES, learning_rate, optimizer_for, train_step

SIDES = (32, 16, 8, 4, 2)                   # of the object's length, in pixels
USUAL = {"storage tank": 0.112, "building": 0.172, "plane": 0.182, "ship": 0.172, "vehicle": 0.052}  # length in scenes
SLIM = {"storage tank": 1, "building": 0.75, "plane": 1, "ship": 0.36, "vehicle": 0.5}         # width over length
FIGURES = ("class", "color", "presence")
LINES = ((0, 0, 0), (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0),
         (240, 228, 66), (150, 150, 150))   # Okabe and Ito's colors, told apart by the color-blind, too


def chart_layout(index, side, size):
    """One object of the class number index % 5, `side` of `size` pixels long, at a random place of a plain ground."""
    rng, name = np.random.default_rng([index, side]), CLASSES[index % len(CLASSES)]
    grounds = ["water"] if name == "ship" else ["grass", "farmland", "sand", "concrete", "asphalt"]
    suited = [(ground, color) for ground in grounds for color in PALETTES[name]
              if math.dist(COLORS[color], GROUNDS[ground]) >= CONTRAST]
    ground, color = suited[rng.integers(len(suited))]
    length = side / size
    x, y, angle = *rng.uniform(length / 2 + 0.05, 0.95 - length / 2, 2), rng.uniform(0, 2 * math.pi)
    item = Item(name, color, x, y, angle, length, SLIM[name] * length, 0.71 * length, rng.random())
    return Layout(ground, None, rng.uniform(0, math.pi / 2), [item])


def chart_scene(index, side, size, empty=False):
    """The Scene of chart_layout. Its shadow or foam is as small or large as the object. empty: the ground alone."""
    layout = chart_layout(index, side, size)
    scale = side / size / USUAL[layout.items[0].name]
    layout = layout._replace(items=[]) if empty else layout
    return draw_scene(layout, Key("test", side, index, size), true_size=True, scale=scale)


def chart_image(index, side, size, empty=False):
    """-> (size, size, 3) uint8."""
    return chart_scene(index, side, size, empty).image


def asked_about(index, side, size):
    """[(figure, question, answer, right(another answer))] of one scene."""
    item, = chart_layout(index, side, size).items
    others = [name for name in CLASSES if name != item.name]
    there = index // len(CLASSES) % 2 == 0
    name = item.name if there else others[index // (2 * len(CLASSES)) % 4]
    ask = lambda kind, **words: f"{WORDINGS[kind][0].format(**words)}\n{SHORT_ANSWER}"
    yes = "yes" if there else "no"
    return [("class", CAPTION_PROMPTS[0], f"one {item.color} {item.name}", lambda text: names(text) == {item.name}),
            ("color", ask("color", noun=item.name, be="is"), item.color, lambda text: same_answer(text, item.color)),
            ("presence", ask("presence", one=name), yes, lambda text: same_answer(text, yes))]


def names(text):
    """The classes that a caption names."""
    text = f" {' '.join(tokenize(text))} "
    return {name for name in CLASSES if f" {name} " in text or f" {plural(name)} " in text}


def read_charts(charts, model, tokenizer, answers=False, empty=False):
    """[(index, side)] -> a batch of their questions, with answers to learn or without, and [(figure, right)] of it."""
    c, rows, checks = model.config, [], []
    for number, (index, side) in enumerate(charts):
        image = to_tensor(Image.fromarray(chart_image(index, side, c.image_size, empty)))
        for figure, question, answer, right in asked_about(index, side, c.image_size):
            record = {"id": "", "image": "", "conversations": take_turns([IMAGE_LINE + question, answer])}
            row = encode_record(record, tokenizer, c.chat, c.tokens_per_image, c.max_len, answers)
            rows.append({**row, "images": [image], "files": [number]})
            checks.append((figure, right))
    return collate(rows), checks


def teach(model, steps, tokenizer, label, batch=16, first=100_000):
    """Stage 2 goes on with charts from number `first` on, of all sides."""
    torch.manual_seed(0)
    recipe, params, rng = RECIPES["tiny"][2], list(set_stage(model, 2).values()), np.random.default_rng(0)
    optimizer, progress = optimizer_for(params, recipe.decay), Progress(f"{label}, taught", steps)
    for step in range(steps):
        charts = [(first + step * batch + i, SIDES[rng.integers(len(SIDES))]) for i in range(batch)]
        learned, _ = read_charts(charts, model.train(), tokenizer, answers=True)
        lr = learning_rate(step, steps, recipe.lr, recipe.warmup)
        train_step(model, optimizer, [{**learned, "draw": step}], params, lr, contextlib.nullcontext())
        progress.show(step + 1)


@torch.no_grad()
def examine(model, n, tokenizer, label, empty=False):
    """-> {(figure, side): right answers in percent}."""
    found, progress = {}, Progress(label, n * len(SIDES))
    for number, side in enumerate(SIDES):
        for start in range(0, n, 16):
            charts = [(index, side) for index in range(start, min(start + 16, n))]
            batch, checks = read_charts(charts, model, tokenizer, empty=empty)
            for (figure, right), text in zip(checks, model.answer(batch, tokenizer, max_new_tokens=48)):
                found.setdefault((figure, side), []).append(right(text))
            progress.show(number * n + start + len(charts))
    return {key: 100 * np.mean(values) for key, values in found.items()}


def curves_of(args, row):
    """A row -> [(label, what `examine` found, the mean over its runs)]; the last row, the ground alone, too."""
    label, runs, last = row
    seen = []
    for run in runs:
        model, tokenizer = load(*run, args.teach, label)
        seen.append(examine(model, args.n, tokenizer, label))
    found = [(label, {key: np.mean([one[key] for one in seen]) for key in seen[0]})]
    return [*found, ("ground alone", examine(model, args.n, tokenizer, "ground alone", empty=True))] if last else found


def load(variant, folder, steps, label):
    """-> a run's model, taught, and its tokenizer."""
    aquila.assemble = VARIANTS[variant]
    model = load_model(folder)
    tokenizer = load_tokenizer(locate_weights(model.config.llm_dir, "language model"))
    if steps:
        teach(model, steps, tokenizer, label)
    merge_lora(model.llm)
    return model.eval(), tokenizer


def runs_of(args):
    """[(label, [(variant, folder), ...])]: a row of the ladder has a run a seed."""
    if args.model:
        return [(str(folder), [("whole", folder)]) for folder in args.model]
    found = []
    for name in args.rows:
        if name not in ROWS:
            raise ValueError(f"--rows {name!r}: expected some of {', '.join(ROWS)}")
        folders = sorted(args.runs.glob(f"{name}-[0-9]*/stage2/model.safetensors"))[:args.seeds]
        if not folders:
            raise ValueError(f"no run of {name} in {args.runs}; python -m checks.ladder --only {name} --results "
                             "FILE, with a new FILE, trains some")
        found.append((ROWS[name].says, [(ROWS[name].variant, path.parent) for path in folders]))
    return found


def draw(curves, path, side=300):
    """A panel a figure: x the object's side in pixels, y percent; a line a model."""
    font, legend = ImageFont.load_default(14), 22 * len(curves)
    image = Image.new("RGB", (len(FIGURES) * (side + 60), side + 70 + legend), "white")
    pencil = ImageDraw.Draw(image)
    for panel, figure in enumerate(FIGURES):
        left, top = panel * (side + 60) + 40, 30
        x = lambda px, left=left: left + side * (math.log2(px) - 0.7) / 4.6
        y = lambda percent, top=top: top + side * (1 - percent / 100)
        pencil.text((left, 6), figure, "black", font)
        for percent in range(0, 101, 25):
            pencil.line([(left, y(percent)), (left + side, y(percent))], fill=(225, 225, 225))
            pencil.text((left - 30, y(percent) - 8), str(percent), "black", font)
        for px in SIDES:
            pencil.text((x(px) - 6, top + side + 4), str(px), "black", font)
        for color, (_, found) in zip(LINES, curves):
            points = [(x(px), y(found[figure, px])) for px in SIDES]
            pencil.line(points, fill=color, width=2)
            for u, v in points:
                pencil.ellipse([u - 3, v - 3, u + 3, v + 3], fill=color)
    for place, (color, (label, _)) in enumerate(zip(LINES, curves)):
        v = side + 62 + 22 * place
        pencil.line([(40, v), (80, v)], fill=color, width=3)
        pencil.text((90, v - 9), label, "black", font)
    pencil.text((40 + side + 60, side + 54), "x: side of the object in pixels; y: right answers, %", "black", font)
    with written_whole(path) as temporary:
        image.save(temporary, "PNG")


def draw_chart(path, size=128):
    """A row a class, a column a side."""
    font = ImageFont.load_default(14)
    image = Image.new("RGB", (110 + len(SIDES) * (size + 6), 24 + len(CLASSES) * (size + 6)), "white")
    pencil = ImageDraw.Draw(image)
    for row, name in enumerate(CLASSES):
        pencil.text((4, 24 + row * (size + 6) + size // 2), name, "black", font)
        for column, side in enumerate(SIDES):
            pencil.text((110 + column * (size + 6), 4), f"{side} pixels", "black", font)
            place = 110 + column * (size + 6), 24 + row * (size + 6)
            image.paste(Image.fromarray(chart_image(row, side, size)), place)
    with written_whole(path) as temporary:
        image.quantize(64).save(temporary, "PNG")


def work(args):
    check_target(args.chart or args.out)
    if args.chart:
        return draw_chart(args.chart)
    rows = runs_of(args)
    if len(rows) >= len(LINES):
        raise ValueError(f"{len(rows)} rows or models: at most {len(LINES) - 1} can be told apart in one figure")
    tasks = [(*row, row is rows[-1]) for row in rows]
    with ProcessPoolExecutor(args.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        curves = [curve for found in pool.map(partial(curves_of, args), tasks) for curve in found]
    print("| | " + " | ".join(f"{figure} {side}" for figure in FIGURES for side in SIDES) + " |")
    print("|---|" + "--:|" * (len(FIGURES) * len(SIDES)))
    for label, found in curves:
        print(f"| {label} | " + " | ".join(f"{found[figure, side]:.1f}" for figure in FIGURES for side in SIDES) + " |")
    draw(curves, args.out)


def main():
    parser = Parser(prog="python -m checks.eye_chart", description=__doc__)
    add = parser.add_argument
    add("--rows", type=lambda text: text.split(","), default=list(ROWS)[:4], help="of checks.ladder (default: Table 5)")
    add("--runs", type=pathlib.Path, default=pathlib.Path("runs/ladder"), help="their folder (default runs/ladder)")
    add("--model", action="append", help="a folder that train.py wrote, instead of rows; may be given again")
    add("--seeds", type=whole(1), help="the first N runs of a row (default: all)")
    add("--teach", type=whole(0), default=200, metavar="STEPS", help="before a model is asked (default 200)")
    add("--jobs", type=whole(1, 100), default=2, help="models at a time, a core each (default 2)")
    add("-n", type=whole(1), default=300, help="scenes for each size (default 300)")
    add("--out", type=pathlib.Path, default=pathlib.Path("eye_chart.png"), help="figure (default eye_chart.png)")
    add("--chart", type=pathlib.Path, help="ask nobody, draw the chart into this PNG")
    parser.run(work)


if __name__ == "__main__":
    main()
