"""ConvNeXt as the vision encoder (A-CCN, Aquila Sec. 3.2): an image in, the maps of all four stages out.

CLIP's final norm, pooling and projection are left out: the papers use the maps. Parameters carry timm's names, so
the loader's map is mostly the identity. What may surprise:
- maps are channels-last in memory, so the norms and the MLPs (over channels) work on views and nothing is transposed;
- epsilon is no tensor and so in no file: 1e-5 for XXLarge, 1e-6 for every other size;
- `load_convnext` fills a model built without memory tensor by tensor, and refuses a file that does not fit exactly.
"""

import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


@dataclass(frozen=True)
class ConvNeXtConfig:
    depths: tuple  # blocks in each of the four stages
    dims: tuple  # channels of each stage
    eps: float = 1e-6

    def __post_init__(self):  # JSON gives lists; a config that was saved must equal itself
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "dims", tuple(self.dims))


CONVNEXTS = {
    "xxlarge": ConvNeXtConfig((3, 4, 30, 3), (384, 768, 1536, 3072), eps=1e-5),
    "large": ConvNeXtConfig((3, 3, 27, 3), (192, 384, 768, 1536)),
    "tiny": ConvNeXtConfig((2, 2, 4, 2), (32, 64, 128, 256)),  # ours, far smaller than ConvNeXt-T
}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, c, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise 7x7, then an MLP on every cell; https://arxiv.org/abs/2201.03545, Figure 4."""

    def __init__(self, dim, eps):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps)
        fc1, fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))  # layer scale: a new block starts as almost the identity

    def forward(self, x):
        y = self.conv_dw(x).permute(0, 2, 3, 1)  # (B, c, H, W) -> (B, H, W, c), a view
        y = self.mlp(self.norm(y))
        return torch.addcmul(x, y.permute(0, 3, 1, 2), self.gamma.view(-1, 1, 1))


class Stage(nn.Module):
    def __init__(self, dim_in, dim, depth, eps):
        super().__init__()
        self.downsample = nn.Identity()  # the first stage: the stem has already brought it to its width
        if dim_in:
            self.downsample = nn.Sequential(ChannelNorm(dim_in, eps), nn.Conv2d(dim_in, dim, 2, stride=2))
        self.blocks = nn.Sequential(*[Block(dim, eps) for _ in range(depth)])

    def forward(self, x):
        return self.blocks(self.downsample(x))


class ConvNeXt(nn.Module):
    """images (B, 3, H, W), normalised, sides multiples of 32 -> four maps (B, c_s, H/2^(s+2), W/2^(s+2)), s = 0..3."""

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
        if images.ndim != 4 or images.shape[1] != 3 or any(side == 0 or side % 32 for side in images.shape[2:]):
            raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, H, W) with H and W multiples "
                             "of 32: resize them")
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


# ---- published weights ----

# A layout is known by how some name in the file begins; the prefix is cut off, the rest renamed below.
LAYOUTS = {  # name: (a name begins with one of these, prefix to cut off)
    "open_clip": (("visual.trunk.",), "visual.trunk."),
    "facebookresearch/ConvNeXt": (("downsample_layers.",), ""),
    "timm": (("stem.", "stages."), ""),
}

RENAME = [  # facebookresearch/ConvNeXt's names -> timm's, which are ours
    (r"downsample_layers\.0\.", "stem."),
    (r"downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"(.*\.)dwconv\.", r"\1conv_dw."),
    (r"(.*\.)pwconv(\d)\.", r"\1mlp.fc\2."),
]

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number that opens torch.save's older format

LEFT_OUT = {  # layout: {beginning of a name as the file has it: why it is not loaded}
    "open_clip": {
        "visual.head.": "projection of the pooled image into CLIP's joint space",
        "visual.trunk.head.": "norm after the pooling",
        "visual.trunk.norm_pre.": "norm before the pooling",
        "transformer.": "text tower",
        "token_embedding.": "text tower",
        "positional_embedding": "text tower",
        "ln_final.": "text tower",
        "text_projection": "text tower",
        "attn_mask": "text tower, a constant",
        "text.": "text tower of models with their own text class",
        "logit_scale": "temperature of the contrastive loss",
        "logit_bias": "offset of the sigmoid loss",
    },
    "timm": {"head.": "norm after the pooling, classifier", "norm_pre.": "norm before the pooling"},
    "facebookresearch/ConvNeXt": {"head.": "classifier", "norm.": "norm after the pooling"},
}


def load_convnext(path, config=None, dtype=torch.float32, device="cpu"):
    """A file of open_clip, timm or facebookresearch/ConvNeXt -> ConvNeXt; config None: read from the shapes."""
    shapes, read = open_tensors(Path(path))
    names = our_names(path, shapes)  # ours -> the file's
    found = read_config(path, {ours: shapes[name] for ours, name in names.items()})
    config = config or found
    if (config.depths, config.dims) != (found.depths, found.dims):
        raise ValueError(f"{path}: holds depths {found.depths}, dims {found.dims}, but the config says depths "
                         f"{config.depths}, dims {config.dims}; give the other file, or no config")
    with torch.device("meta"):
        model = ConvNeXt(config).to(dtype)
    check_fit(path, model.state_dict(), names, shapes)
    model.to_empty(device=device)
    with torch.no_grad():
        for ours, parameter in model.named_parameters():
            parameter.copy_(read(names[ours]))
    return model.eval()


def open_tensors(path):
    """-> shapes {name: shape}, and read(name) -> tensor, to be called once for each."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected ConvNeXt weights (.safetensors, .bin, .pt or .pth)")
    if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        raise ValueError(f"{path}: ends in '{path.suffix}'; expected .safetensors, .bin, .pt or .pth")
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.get_tensor
        tensors = read_pickle(path)
    except (SafetensorError, RuntimeError, EOFError) as error:
        reason = re.split(r"\n|\. ", str(error))[0] or "it ends too early"
        raise ValueError(f"{path}: cannot be read ({reason}); download the weights again") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: holds something else than named tensors; expected a model's state dict")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.pop


def read_pickle(path):
    """What torch.save wrote, mapped and not read where it is a zip; the format before torch 1.6 is not."""
    zipped = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        legacy = file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
    if not zipped and not legacy:
        raise ValueError(f"{path}: not a file of torch.save; is it cut short, an error page, a git-lfs pointer? "
                         "Download it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"its pickle wants to run {code[1]}" if code else "its pickle is damaged"
        raise ValueError(f"{path}: refused, {reason}; get the model's .safetensors file, or tensors only") from None


def our_names(path, names):
    """-> {our name: the file's name}, without what is left out on purpose."""
    for layout, (starts, prefix) in LAYOUTS.items():
        if any(name.removeprefix("module.").startswith(starts) for name in names):
            break
    else:
        raise ValueError(f"{path}: no ConvNeXt in it; names begin {list(names)[:3]}, expected those of {list(LAYOUTS)}")
    ours = {}
    for name in names:
        plain = name.removeprefix("module.")  # added by DistributedDataParallel
        if plain.startswith(tuple(LEFT_OUT[layout])):
            continue
        plain = plain.removeprefix(prefix)
        for pattern, to in RENAME if layout.startswith("facebook") else ():
            plain = re.sub("^" + pattern, to, plain)
        if plain in ours:
            raise ValueError(f"{path}: {ours[plain]} and {name} are both {plain}; keep one of them")
        ours[plain] = name
    return ours


def read_config(path, shapes):
    """Depths and dims from {our name: shape}; epsilon from the size."""
    depths, dims = [], []
    for stage in range(4):
        blocks = {name: shape for name, shape in shapes.items() if re.match(rf"stages\.{stage}\.blocks\.\d+\.", name)}
        # The most frequent width, so that one misshapen tensor is reported as that and not as another model.
        told_by = [shape for name, shape in blocks.items() if name.endswith(("norm.weight", "gamma", "conv_dw.bias"))]
        widths = Counter(shape[0] for shape in told_by if shape)
        if not widths:
            raise ValueError(f"{path}: no norm or gamma in stages.{stage}.blocks; expected a ConvNeXt of four stages")
        depths.append(1 + max(int(name.split(".")[3]) for name in blocks))
        dims.append(widths.most_common(1)[0][0])
    found = ConvNeXtConfig(tuple(depths), tuple(dims))
    xxlarge = CONVNEXTS["xxlarge"]
    return xxlarge if (found.depths, found.dims) == (xxlarge.depths, xxlarge.dims) else found


def check_fit(path, expected, names, shapes):
    missing = [f"{ours} {tuple(t.shape)}" for ours, t in expected.items() if ours not in names]
    unexpected = [f"{name} {shapes[name]}" for ours, name in names.items() if ours not in expected]
    misshapen = [f"{names[ours]} {shapes[names[ours]]} instead of {tuple(t.shape)}" for ours, t in expected.items()
                 if ours in names and shapes[names[ours]] != tuple(t.shape)]
    lists = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    problems = [f"{len(found)} {kind}: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
                for kind, found in lists.items() if found]
    if problems:
        raise ValueError(f"{path}: does not fit a ConvNeXt; {'; '.join(problems)}; download it again, or give "
                         "the file of another model")
