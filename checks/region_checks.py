"""
Looks inside Aquila-plus: do pooled features match their region, what stands where <region> was, what does the spatial
token know, and how good must a mask be? Prints tables and writes pictures. Not a test: nothing is asserted.

    python -m checks.region_checks --model runs/tiny-plus/stage3 --scenes 150 --out runs/regions

The first three are the experiments that the summary of arXiv 2411.06142 calls for, the last two its open questions.
"""
import pathlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from aquila import load_model, locate_weights
from commands.arguments import Parser, whole
from data import Records, collate
from mask_extractor import mask_pool
from pictures.image_files import to_tensor
from tokenizer import SLOTS, load_tokenizer
from toy import scenes
from toy.drawing import PLANE
from toy.layout import CLASSES

POOLINGS = ("area", "binary")


def scene(index, size):
    return scenes.open_scene(f"scene:test/0/{index}/{size}")


def runs(mask):
    """(h, w) bool -> COCO's uncompressed run lengths."""
    flat = np.concatenate(([False], mask.T.ravel()))
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return {"size": list(mask.shape), "counts": np.diff([0, *edges.tolist(), mask.size]).tolist()}


def grown(mask, by):
    """A mask, by some pixels wider on all sides."""
    return F.max_pool2d(torch.from_numpy(mask)[None, None].float(), 2 * by + 1, 1, by)[0, 0].bool().numpy()


def answers(model, tokenizer, records, batch=64):
    rows, data = [], Records(records, ".", tokenizer, model.config, answer=False)
    for i in range(0, len(records), batch):
        packed = collate([data[j] for j in range(i, min(i + batch, len(records)))])
        if isinstance(packed, ValueError):
            raise packed
        rows += model.answer(packed, tokenizer, max_new_tokens=12)
    return np.array([said.lower() == r["conversations"][-1]["value"] for said, r in zip(rows, records)])


def percent(right):
    return f"{100 * np.mean(right):6.1f} ({len(right):4})" if len(right) else "     - (   0)"


# ---------------------------------------------------------------------------------------------- 1. pooled features

@dataclass
class Region:
    scene: int
    name: str
    color: str
    area: int                               # pixels
    pooled: dict                            # {"area", "binary": (2, channels), of the region and of the ring around it}


def pool_regions(model, n):
    """Every object of n scenes as a Region; its ring is of 8 pixels of background."""
    found, size = [], model.config.image_size
    for index in range(n):
        s = scene(index, size)
        maps = model.encode_images(to_tensor(s.image)[None])
        everything = np.any([o.mask for o in s.objects], axis=0)
        for o in s.objects:
            masks = torch.from_numpy(np.stack([o.mask, grown(o.mask, 8) & ~everything]))[None]
            pooled = {}
            for pooling in POOLINGS:
                scales = [F.normalize(mask_pool(x, masks, pooling)[0], dim=-1) for x in maps]
                pooled[pooling] = torch.cat(scales, -1)
            found.append(Region(index, o.name, o.color, int(o.mask.sum()), pooled))
    return found


def mean_cosines(regions, own, pooling):
    """Mean cosines of the own (bool) regions with those of the same kind, of another, and with their background."""
    x = torch.stack([r.pooled[pooling] for r in regions])                          # (regions, 2, channels)
    x = F.normalize(x - x.mean((0, 1)), dim=-1).double()
    cosine, background = (x[:, 0] @ x[:, 0].T).numpy(), (x[:, 0] * x[:, 1]).sum(-1).numpy()
    scene_of, name = np.array([r.scene for r in regions]), np.array([r.name for r in regions])
    kind = np.array([f"{r.color} {r.name}" for r in regions])
    pairs = own[:, None] & own & (scene_of[:, None] != scene_of)
    same, other = pairs & (kind[:, None] == kind), pairs & (name[:, None] != name)
    return cosine[same].mean(), cosine[other].mean(), background[own].mean()


def features_match(model, n, out):
    """
    Cosine of pooled features, mean-free, all scales side by side: of two objects of one class and color in other
    scenes, of two other objects, and of an object with the ring of background around it; by size, area against binary.
    """
    regions, size = pool_regions(model, n), model.config.image_size
    areas = np.array([r.area for r in regions])
    small, middle = np.quantile(areas, (1 / 3, 2 / 3))
    print(f"1. Cosine of pooled features, {len(regions)} objects of {n} scenes; pixels at {size} x {size}")
    print(f"{'':22}{'same kind':>22}{'another kind':>22}{'own background':>22}")
    print(f"{'region':22}" + f"{'area':>11}{'binary':>11}" * 3)
    for low, high, words in ((0, small, "small"), (small, middle, "middle"), (middle, 1e9, "large")):
        own = (low < areas) & (areas <= high)
        by_pooling = [mean_cosines(regions, own, pooling) for pooling in POOLINGS]
        cells = "".join(f"{area:11.2f}{binary:11.2f}" for area, binary in zip(*by_pooling))
        print(f"{words + f', {areas[own].min()}-{areas[own].max()} px':22}{cells}")
    draw_similarity(model, out / "features.png")


def draw_similarity(model, path, indices=range(6)):
    """Cosine of one region's pooled feature with every cell of the finest map, red where it is high."""
    size, zoom = model.config.image_size, 2
    sheet = Image.new("RGB", (2 * zoom * size + 12, len(indices) * (zoom * size + 4)), "white")
    for row, index in enumerate(indices):
        s = scene(index, size)
        fine = F.normalize(model.encode_images(to_tensor(s.image)[None])[0], dim=1)
        fine = F.normalize(fine - fine.mean((2, 3), keepdim=True), dim=1)
        o = max(s.objects, key=lambda o: o.mask.sum())
        own = F.normalize(mask_pool(fine, torch.from_numpy(o.mask)[None, None])[0, 0], dim=0)
        heat = torch.einsum("chw,c->hw", fine[0], own).clamp(0, 1)[None, None]
        heat = F.interpolate(heat, (size, size), mode="bilinear")[0, 0].numpy()[..., None]
        red = s.image * (1 - heat) + np.array((255, 0, 0)) * heat
        outline = o.mask & grown(~o.mask, 1)
        left = np.where(outline[..., None], np.array((255, 255, 0)), s.image)
        for column, pixels in enumerate((left, red)):
            picture = Image.fromarray(pixels.astype(np.uint8)).resize((zoom * size,) * 2, Image.Resampling.NEAREST)
            sheet.paste(picture, (column * (zoom * size + 8), row * (zoom * size + 4)))
    sheet.save(path)


# ---------------------------------------------------------------------------------------------- 2. token sequence

def trace(model, tokenizer):
    """From words to embeddings: every token of a prompt with one region, its id and where its vector is from."""
    records = scenes.make_records("test", 5, "region", size=model.config.image_size)
    record = next(r for r in records if len(r["masks"]) == 1)
    row = Records([record], ".", tokenizer, model.config, answer=False)[0]
    x, _ = model.embed_batch(collate([row]))
    names = {i: name for name, i in tokenizer.special.items()}
    source = {"<image>": "SFI", "<mask>": "mask token", "<position>": "spatial token"}
    print(f"\n2. {record['conversations'][0]['value']!r}, mask {record['masks'][0]}")
    print(f"{'place':>5} {'id':>5}  {'token':22}{'vector from':16}norm")
    for i, token in enumerate(row["ids"]):
        word = SLOTS.get(token) or names.get(token) or tokenizer.decode([token])
        print(f"{i:5} {token:5}  {word!r:22}{source.get(word, 'embedding'):16}{x[0, i].norm():.2f}")


# ---------------------------------------------------------------------------------------------- 3. spatial token

def placed(dx=0.0, dy=0.0, scale=1.0, turn=0.0, side=224):
    """A plane's outline (toy.drawing.PLANE) as a mask, moved by shares of the image, scaled and turned (degrees)."""
    c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    points = PLANE @ np.array(((c, s), (-s, c))) * 0.3 * scale + (0.4 + dx, 0.4 + dy)
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).polygon((points * side).ravel().tolist(), 255)
    return torch.from_numpy(np.array(picture) > 0)


def spatial_token(model, out):
    """Cosine of the spatial token with that of the untouched mask: it should fall steadily with every change."""
    far = (0, 0.02, 0.05, 0.1, 0.2, 0.4)
    steps = {"moved right by": ("dx", far), "moved down by": ("dy", far),
             "scaled by": ("scale", (1, 1.1, 1.25, 1.5, 2, 0.5)), "turned by": ("turn", (0, 5, 15, 45, 90, 180))}
    print("\n3. Cosine of the spatial token with that of the mask as it was")
    pictures = []
    side = model.config.image_size
    maps = model.encode_images(torch.zeros(1, 3, side, side))
    for words, (name, values) in steps.items():
        masks = torch.stack([placed(**{name: v}) for v in values])[None]
        tokens = model.extractor(maps, masks)[1][0]
        cosine = F.cosine_similarity(tokens, tokens[:1], dim=-1)
        print(f"{words:16}" + "".join(f"{v:>8} {c:5.2f}" for v, c in zip(values, cosine.tolist())))
        pictures.append(masks[0].numpy())
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in pictures])
    picture = Image.fromarray((~grid * 255).astype(np.uint8))
    picture.resize((grid.shape[1] // 2, grid.shape[0] // 2)).save(out / "spatial.png")


# ---------------------------------------------------------------------------------------------- 4. and 5. prompts

def class_questions(n, size):
    """[(record, object, its scene)] of "What is <region>?"."""
    found = []
    for index in range(n):
        s = scene(index, size)
        for record in scenes.make_records("test", 1, "region", size=size, start=index):
            if record["type"] == "region class":
                found.append((record, s.objects[int(record["masks"][0].partition("#")[2])], s))
    return found


def with_masks(items, change):
    """The records with other masks; change(object, scene) -> a mask value, or None to leave the record out."""
    changed = [(record, o, change(o, s)) for record, o, s in items]
    return [({**record, "masks": [mask]}, o) for record, o, mask in changed if mask is not None]


def coarse(o, s, cells=16):
    """The mask on a grid of cells: every cell that it touches."""
    k = s.size // cells
    touched = o.mask.reshape(cells, k, cells, k).any((1, 3))
    return runs(np.kron(touched, np.ones((k, k), bool)))


def another(o, s):
    """The mask of an object of another class in the same scene."""
    others = [p for p in s.objects if p.name != o.name]
    return runs(others[int(o.mask.sum()) % len(others)].mask) if others else None


def prompts(model, tokenizer, n):
    items = class_questions(n, model.config.image_size)
    ways = {"mask": lambda o, s: runs(o.mask),
            "box": lambda o, s: {"bbox": [o.box[0], o.box[1], o.box[2] - o.box[0], o.box[3] - o.box[1]]},
            "coarse, 16 x 16": coarse, "grown by 4 px": lambda o, s: runs(grown(o.mask, 4)),
            "another's mask": another}
    print(f"\n4. Class of a region, accuracy (regions), {len(items)} regions of {n} test scenes, by the mask given")
    print(f"{'':16}{'all':>14}" + "".join(f"{name:>15}" for name in CLASSES) + f"{'majority':>15}")
    for words, change in ways.items():
        asked = with_masks(items, change)
        right, names = answers(model, tokenizer, [r for r, _ in asked]), np.array([o.name for _, o in asked])
        most = max((names == name).mean() for name in CLASSES)
        by_class = "".join(f"{percent(right[names == name]):>15}" for name in CLASSES)
        print(f"{words:16}{percent(right):>14}{by_class}{100 * most:15.1f}")


def taking(share, o, s):
    """The mask and a share of its nearest neighbor of another class; None: there is no such neighbor."""
    others = [p for p in s.objects if p.name != o.name]
    if not others:
        return None
    middle = lambda p: np.array(p.box).reshape(2, 2).mean(0)
    near = min(others, key=lambda p: np.linalg.norm(middle(p) - middle(o)))
    ys, xs = np.nonzero(near.mask)
    taken = np.zeros_like(near.mask)
    k = round(share * len(ys))
    taken[ys[:k], xs[:k]] = True
    return runs(o.mask | taken)


def overlaps(model, tokenizer, n):
    """The mask takes in a share of its nearest neighbor of another class; the answer should stay the object's."""
    items = class_questions(n, model.config.image_size)
    print("\n5. Overlap: the mask also covers this share of its nearest neighbor of another class")
    for share in (0, 0.25, 0.5, 1):
        asked = with_masks(items, partial(taking, share))
        right = answers(model, tokenizer, [r for r, _ in asked])
        areas = np.array([o.mask.sum() for _, o in asked])
        big = areas > np.median(areas)
        print(f"{share:5.2f}  all {percent(right)}  larger half of the objects {percent(right[big])}  "
              f"smaller half {percent(right[~big])}")


@torch.no_grad()
def look_inside(args):
    model = load_model(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(locate_weights(model.config.llm_dir, "language model"))
    features_match(model, args.scenes, args.out)
    trace(model, tokenizer)
    spatial_token(model, args.out)
    prompts(model, tokenizer, args.scenes)
    overlaps(model, tokenizer, args.scenes)
    print(f"\npictures in {args.out}: features.png (a region and where its feature is found again), spatial.png")


def main():
    parser = Parser(prog="python -m checks.region_checks", description=__doc__)
    parser.add_argument("--model", default="runs/tiny-plus/stage3", help="folder that train.py wrote")
    parser.add_argument("--scenes", type=whole(1), default=150, help="test scenes (default 150)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/regions"), help="folder of the pictures")
    parser.run(look_inside)


if __name__ == "__main__":
    main()
