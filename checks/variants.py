"""
The method with one thing changed: what checks.ladder trains beside it. A variant runs under train.py and evaluate.py:

    python -m checks.variants no-look train.py --stage 1 --out runs/no-look/stage1
    python -m checks.variants no-look train.py --stage 2 --init-from runs/no-look/stage1 --out runs/no-look/stage2
    python -m checks.variants no-look evaluate.py --model runs/no-look/stage2 --scenes 300

A variant is a function like aquila.assemble: config, vision encoder, LM -> model. "whole" is the method itself.
"""
import dataclasses
import pathlib
import sys
from functools import cache, partial
from hashlib import sha256

import numpy as np
import torch
from torch import nn

import aquila
import data
import evaluate
import train
from aquila import Aquila, MDALayer
from commands.arguments import Parser
from convnext import STRIDES, load_convnext
from files.text import file_digest, written_whole
from sfi import SFI, ImageTokens, Pyramid, position_codes, window_partition


def with_parts(model, pyramid=None, mda=None, tokens=None):
    """The model with another pyramid, image tokens, and MDA layers made by mda()."""
    model.pyramid, model.tokens = pyramid or model.pyramid, tokens or model.tokens
    if mda:
        model.mda = nn.ModuleDict({i: mda() for i in model.mda})
    return model


# ---------------------------------------------------------------------------------------------- MDA

class OneCell(Aquila):
    """
    The other reading of "+MDA" over Concat (train.py --integration concat): MDA asks the baseline's one map again, one
    cell a query.
    """

    def __init__(self, config, vision=None, llm=None):
        super().__init__(config, vision, llm)
        for layer in self.mda.values():
            layer.sfi.wk, layer.sfi.wv = layer.sfi.wk[:1], layer.sfi.wv[:1]

    def image_tokens(self, maps):
        seen = []                           # the map that the tokens are made of: (n, C, rows, cols)
        with self.tokens.conv.register_forward_hook(lambda conv, given, out: seen.append(out)):
            pyramid, tokens = super().image_tokens(maps)
        return [seen[0].flatten(2).transpose(1, 2)[:, :, None]], tokens


class NoLook(MDALayer):
    """MDA's parameters without MDA's sight: an adapter, nothing more."""

    def forward(self, hidden, pyramid):
        return super().forward(hidden, [torch.zeros_like(cells) for cells in pyramid])


def no_look(config, vision=None, llm=None):
    return with_parts(Aquila(config, vision, llm), mda=partial(NoLook, config))


# ---------------------------------------------------------------------------------------------- the pyramid

class SomeScales(Pyramid):
    """Of the scales `kept` alone (0 is the finest); the projectors of the others get no gradient."""

    def __init__(self, dims, dim, kept):
        super().__init__(dims, dim)
        self.kept = kept

    def forward(self, maps):
        windows, grid = super().forward(maps)
        return [windows[scale] for scale in self.kept], grid


def some_scales(kept, config, vision=None, llm=None):
    model, n = Aquila(config, vision, llm), len(kept)
    tokens = ImageTokens(config.side, config.dim, n, config.llm.dim, config.heads)
    model = with_parts(model, SomeScales(config.vision.dims, config.dim, kept), tokens=tokens)
    for layer in model.mda.values():
        layer.sfi.wk, layer.sfi.wv = layer.sfi.wk[-n:], layer.sfi.wv[-n:]
    return model


class LearnedPlaces(Pyramid):
    """As Cambrian-1: a learned vector for each place in a window of more than one cell; no codes on cells."""

    def __init__(self, dims, dim):
        super().__init__(dims, dim)
        sides = [STRIDES[-1] // stride for stride in STRIDES[:-1]]
        self.places = nn.ParameterList(nn.Parameter(torch.randn(side * side, dim) * 0.02) for side in sides)

    def forward(self, maps):
        grid = tuple(maps[-1].shape[2:])
        windows = [window_partition(projector(x.permute(0, 2, 3, 1)), grid)
                   for x, projector in zip(maps, self.projectors)]
        return [cells + place for cells, place in zip(windows, (*self.places, 0))], grid


def learned_places(config, vision=None, llm=None):
    return with_parts(Aquila(config, vision, llm), LearnedPlaces(config.vision.dims, config.dim))


class KeysOnly(SFI):
    """Cells' position codes in the keys alone: windows hold (cell with code, cell), side by side, 2C wide."""

    def forward(self, queries, pyramid):
        q = self.wq(queries)
        keyed, plain = zip(*(cells.chunk(2, dim=-1) for cells in pyramid))
        k = torch.cat([wk(x) for wk, x in zip(self.wk, keyed)], dim=2).unflatten(-1, (self.heads, -1))
        v = torch.cat([wv(x) for wv, x in zip(self.wv, plain)], dim=2).unflatten(-1, (self.heads, -1))
        scores = torch.einsum("bnhd,bnkhd->bnhk", q.unflatten(-1, (self.heads, -1)), k)
        weights = (scores * k.shape[-1] ** -0.5).softmax(-1)
        return self.wo(q + torch.einsum("bnhk,bnkhd->bnhd", weights, v).flatten(2))


class BothWays(Pyramid):
    def forward(self, maps):
        windows, grid = super().forward(maps)
        both = []
        for cells, x, stride in zip(windows, maps, STRIDES):
            codes = position_codes(*x.shape[2:], stride, cells.shape[-1], x.device).to(cells.dtype)
            both.append(torch.cat((cells, cells - window_partition(codes[None], grid)), dim=-1))
        return both, grid


def keys_only(config, vision=None, llm=None):
    model = with_parts(Aquila(config, vision, llm), BothWays(config.vision.dims, config.dim))
    for sfi in [model.tokens.sfi, *(layer.sfi for layer in model.mda.values())]:
        sfi.__class__ = KeysOnly            # the same parameters, another forward
    return model


# ---------------------------------------------------------------------------------------------- norms and heads

def no_norms(config, vision=None, llm=None, before=True, cells=True, queries=True):
    """Without the norms before the projectors, on the projected cells, or on the learned queries. MDA's own stays."""
    model = Aquila(config, vision, llm)
    for projector in model.pyramid.projectors:
        for place, leave_out in ((0, before), (-1, cells)):
            if leave_out:
                projector[place] = nn.Identity()
    if queries:
        model.tokens.norm = nn.Identity()
    return model


def heads(number, config, vision=None, llm=None, make=Aquila):
    """Of every SFI. The saved config keeps the preset's number: stage 2 compares the two."""
    model = make(dataclasses.replace(config, heads=number), vision, llm)
    model.config = dataclasses.replace(model.config, heads=config.heads)
    return model


VARIANTS = {
    "whole": aquila.assemble, "one-cell": OneCell, "no-look": no_look, "learned-places": learned_places,
    "keys-only": keys_only, "no-norms": no_norms,
    "no-norm-before": partial(no_norms, cells=False, queries=False),
    "no-norm-cells": partial(no_norms, before=False, queries=False),
    "no-norm-queries": partial(no_norms, before=False, cells=False),
    "heads-1": partial(heads, 1), "heads-16": partial(heads, 16),
    "bare": partial(heads, 1, make=no_norms),              # as printed and no more
    **{f"without-{left_out}": partial(some_scales, [s for s, stride in enumerate(STRIDES) if stride != left_out])
       for left_out in STRIDES},
    **{f"only-{stride}": partial(some_scales, [s]) for s, stride in enumerate(STRIDES)},
}


# ---------------------------------------------------------------------------------------------- kept maps

def keep_maps(folder):
    """
    From now on an image is opened and encoded once, by whatever run comes first: its four maps lie in a folder of this
    encoder and size, in half precision, and go through the batch in the place of its pixels (240 KB a scene of the tiny
    preset). The encoder is frozen, so a run learns the same, but for the rounding. Where images change under the same
    names, the folder must go.
    """
    draw, encode = data.load_pixels, aquila.Aquila.encode_images

    def load_maps(record, root, config, blind=False):
        if not blind and not isinstance(record.get("image"), str):
            raise ValueError(f"--maps keeps those of one image a record, not of {record.get('image')}")
        name = "gray" if blind else record["image"].removeprefix("scene:").replace("/", "-")
        if not blind and not record["image"].startswith("scene:"):                 # folders may share names
            name = f"{sha256(str(pathlib.Path(root, record['image']).resolve()).encode()).hexdigest()[:8]}-{name}"
        path = folder_of(config) / f"{name}.npy"
        if not path.exists():
            images, _ = draw(record, root, config, blind)
            with torch.no_grad():
                maps = [x.permute(0, 2, 3, 1).flatten() for x in encoder(config)(images)]
            with written_whole(path) as temporary, open(temporary, "wb") as file:
                np.save(file, torch.cat(maps).half().numpy())
        return torch.from_numpy(np.load(path))[None], torch.zeros(0, config.image_size, config.image_size)

    @cache
    def encoder(config):
        return load_convnext(aquila.locate_weights(config.vision_file, "vision encoder"))

    @cache
    def folder_of(config):
        digest = file_digest(pathlib.Path(aquila.locate_weights(config.vision_file, "vision encoder")))[:8]
        path = folder / f"{digest}-{config.image_size}{'' if config.fit == 'resize' else config.fit}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def unpack(model, images):
        if images.dim() == 4:               # pixels: the sizes of a step are predicted with them
            return encode(model, images)
        side, dims, own = model.config.image_size, model.config.vision.dims, next(model.pyramid.parameters())
        shapes = [(side // stride, side // stride, c) for stride, c in zip(STRIDES, dims)]
        parts = images.to(own.dtype).split([rows * cols * c for rows, cols, c in shapes], dim=1)
        return [x.unflatten(1, shape).permute(0, 3, 1, 2) for x, shape in zip(parts, shapes)]

    data.load_pixels, aquila.Aquila.encode_images = load_maps, unpack


def main():
    programs = {"train.py": train.main, "evaluate.py": evaluate.main}
    parser = Parser(prog="python -m checks.variants", description=__doc__)
    parser.add_argument("--maps", type=pathlib.Path, help="folder of the images' maps, kept for runs to come")
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("program", choices=programs)
    parser.add_argument("flags", nargs="...", help="of the program")

    def run(args):
        if args.maps:
            keep_maps(args.maps)
        aquila.assemble = VARIANTS[args.variant]               # where aquila.build and aquila.load_config look it up
        sys.argv = [args.program, *args.flags]
        programs[args.program]()

    parser.run(run)


if __name__ == "__main__":
    main()
