"""
ConvNeXt as the vision encoder (A-CCN, Aquila Sec. 3.2): an image in, the maps of all four stages out.

The paper leaves out CLIP's "final layer"; ASSUMPTION: its norm, pooling and projection. Parameters carry the names of
timm's models/convnext.py, which it mirrors, so the loader's map is mostly the identity. What may surprise:
- maps are channels-last in memory, so the norms and the MLPs (over channels) work on views and nothing is transposed;
- epsilon is no tensor and so in no file: 1e-5 for XXLarge, 1e-6 for every other size;
- `load_convnext` fills the model one tensor at a time, and refuses a file that does not fit exactly.
"""
import re
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import nn

from files.text import naming
from files.weights import fill_new, open_tensors

STRIDES = (4, 8, 16, 32)                    # of the four maps, in pixels


@dataclass(frozen=True)
class ConvNeXtConfig:
    depths: tuple[int, ...]                 # blocks in each of the four stages
    dims: tuple[int, ...]                   # channels of each stage
    eps: float = 1e-6

    def __post_init__(self):                # JSON gives lists; a config that was saved must equal itself
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "dims", tuple(self.dims))
        if max(self.depths, default=0) > 1000 or not len(self.depths) == len(self.dims) == 4 or min(self.dims) < 1:
            raise ValueError(f"depths {self.depths}, dims {self.dims}: expected four of each, at most 1,000 blocks")


CONVNEXTS = {
    "xxlarge": ConvNeXtConfig((3, 4, 30, 3), (384, 768, 1536, 3072), eps=1e-5),
    "large": ConvNeXtConfig((3, 3, 27, 3), (192, 384, 768, 1536)),
    "femto": ConvNeXtConfig((2, 2, 6, 2), (48, 96, 192, 384)),                     # timm's
    "tiny": ConvNeXtConfig((2, 2, 4, 2), (32, 64, 128, 256)),  # ours, far smaller than ConvNeXt-T
}


class ChannelNorm(nn.LayerNorm):            # over the channels of a map (B, c, H, W)
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise 7x7, then an MLP on every cell (https://arxiv.org/abs/2201.03545, Figure 4)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps)
        fc1, fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))    # layer scale: a new block starts as almost the identity

    def forward(self, x):
        y = self.conv_dw(x).permute(0, 2, 3, 1)                # (B, c, H, W) -> (B, H, W, c), a view
        y = self.mlp(self.norm(y))
        return torch.addcmul(x, y.permute(0, 3, 1, 2), self.gamma.view(-1, 1, 1))


class Stage(nn.Module):
    def __init__(self, dim_in, dim, depth, eps):
        super().__init__()
        self.downsample = nn.Identity()     # the first stage: the stem has already brought it to its width
        if dim_in:
            self.downsample = nn.Sequential(ChannelNorm(dim_in, eps), nn.Conv2d(dim_in, dim, 2, stride=2))
        self.blocks = nn.Sequential(*[Block(dim, eps) for _ in range(depth)])

    def forward(self, x):
        return self.blocks(self.downsample(x))


class ConvNeXt(nn.Module):
    """images (B, 3, H, W), normalized, sides multiples of 32 -> four maps (B, c_s, H / stride, W / stride)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dims = config.dims
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), ChannelNorm(dims[0], config.eps))
        stages = zip((None, *dims), dims, config.depths)
        self.stages = nn.ModuleList([Stage(dim_in, dim, depth, config.eps) for dim_in, dim, depth in stages])
        self.apply(init_weights)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        wrong_side = any(side == 0 or side % STRIDES[-1] for side in images.shape[2:])
        if images.ndim != 4 or images.shape[1] != 3 or wrong_side:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, H, W) with H and W multiples "
                             f"of {STRIDES[-1]}: resize them")
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def init_weights(module):
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------- published weights

# A layout is known by how some name in the file begins, in this order; the prefix is cut off, the rest renamed.
LAYOUTS = {                                 # name: (a name begins with one of these, prefix to cut off)
    "open_clip": (("visual.trunk.",), "visual.trunk."),
    "facebookresearch/ConvNeXt": (("downsample_layers.",), ""),
    "timm": (("stem.", "stages."), ""),
}
RENAME = {                                  # layout: (pattern, what it becomes in timm's names, which are ours)
    "facebookresearch/ConvNeXt": (
        (r"downsample_layers\.0\.", "stem."),
        (r"downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"(.*\.)dwconv\.", r"\1conv_dw."),
        (r"(.*\.)pwconv(\d)\.", r"\1mlp.fc\2."),
    ),
}
LEFT_OUT = {                                # layout: how names begin, as the file has them, that are not loaded
    "open_clip": ("visual.head.", "visual.trunk.head.", "visual.trunk.norm_pre.",                # what follows the maps
                  "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection",
                  "attn_mask", "text.",                                                          # the text tower
                  "logit_scale", "logit_bias"),                                                  # of the loss
    "timm": ("head.", "norm_pre."),
    "facebookresearch/ConvNeXt": ("head.", "norm."),
}


def load_convnext(path, config=None, dtype=torch.float32, device="cpu"):
    """A file of open_clip, timm or facebookresearch/ConvNeXt -> ConvNeXt; config None: read from the shapes."""
    stored = open_tensors(path)
    with naming(path):
        file_names = match_names(stored)                       # our name: the file's
        found = read_config({ours: stored[name].shape for ours, name in file_names.items()})
    config = config or found
    if (config.depths, config.dims) != (found.depths, found.dims):
        raise ValueError(f"{path}: holds depths {found.depths}, dims {found.dims}, but the config says depths "
                         f"{config.depths}, dims {config.dims}; give the other file, or no config")
    with torch.device("meta"):
        model = ConvNeXt(config).to(dtype)
    named = lambda model: {file_names.get(ours, ours): p for ours, p in model.named_parameters()}
    return fill_new(model, device, named, [(name, stored[name]) for name in file_names.values()], path)


def match_names(names):
    """-> {our name: the file's name}, without what is left out on purpose."""
    found = [layout for layout, (starts, _) in LAYOUTS.items()
             if any(name.removeprefix("module.").startswith(starts) for name in names)]
    if not found:
        raise ValueError(f"no ConvNeXt in it; names begin {list(names)[:3]}, expected those of {list(LAYOUTS)}")
    layout, matched = found[0], {}
    for name in names:
        ours = name.removeprefix("module.")                    # added by DistributedDataParallel
        if ours.startswith(LEFT_OUT[layout]):
            continue
        ours = ours.removeprefix(LAYOUTS[layout][1])
        for pattern, to in RENAME.get(layout, ()):
            ours = re.sub("^" + pattern, to, ours)
        if ours in matched:
            raise ValueError(f"{matched[ours]} and {name} are both {ours}; keep one of them")
        matched[ours] = name
    return matched


def read_config(shapes):
    """Depths and dims from {our name: shape}; epsilon from the size."""
    depths, dims = [], []
    for stage in range(4):
        blocks = {name: shape for name, shape in shapes.items() if re.match(rf"stages\.{stage}\.blocks\.\d+\.", name)}
        # The most frequent width, so that one misshapen tensor is reported as that and not as another model.
        told_by = [shape for name, shape in blocks.items() if name.endswith(("norm.weight", "gamma", "conv_dw.bias"))]
        widths = Counter(shape[0] for shape in told_by if shape)
        if not widths:
            raise ValueError(f"no norm or gamma in stages.{stage}.blocks; expected a ConvNeXt of four stages")
        depths.append(len({name.split(".")[3] for name in blocks}))                # counted: numbers may be any
        dims.append(widths.most_common(1)[0][0])
    found = ConvNeXtConfig(depths, dims)
    same = [config for config in CONVNEXTS.values() if replace(config, eps=found.eps) == found]
    return same[0] if same else found       # for its epsilon
