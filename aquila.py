"""
Aquila: image -> ConvNeXt: four maps -> SFI: image tokens -> Llama, with SFI again before some layers (MDA) -> text.
(arXiv 2411.06074, Sec. 3, Figure 1)

    python aquila.py --preset aquila-8b                     # what flows where: shapes, parameters, stages
    python aquila.py --model runs/tiny/stage2 --export DIR  # its LM for other programs (PEFT, transformers)

Read sfi.py (the method) before, convnext.py and llama.py next. Guesses where the paper is silent: grep ASSUMPTION.
Shapes: B batch, T sequence, D LM width, C SFI width, L side of the query grid, N image tokens
of an image, k window side at a scale, (c, H, W) a feature map, nh/nkv/hd heads.
"""
import dataclasses
import json
import os
import pathlib
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from convnext import CONVNEXTS, STRIDES, ConvNeXt, ConvNeXtConfig, load_convnext
from fast_decoding import fastest_step
from files.checked_json import Fields, make_config
from files.text import naming, one_line, parse_json, read_json, write_json
from files.weights import fill, open_safetensors, open_tensors, write_tensors
from llama import LLAMAS, Llama, LlamaConfig, RMSNorm, at_least_float32, generate, load_llama
from lora import LORA_TARGETS, apply_lora, merge_lora, seed_dropout
from mask_extractor import MaskExtractor
from sfi import SFI, ConcatTokens, ImageTokens, Pyramid
from tokenizer import IGNORE, IMAGE_SLOT, MASK_SLOT, POSITION_SLOT

# The two parts that come from elsewhere: class, config and loader. Others go in here (README, "Other parts").
VisionEncoder, VisionConfig, load_vision = ConvNeXt, ConvNeXtConfig, load_convnext
LM, LMConfig, load_lm = Llama, LlamaConfig, load_llama

# ---------------------------------------------------------------------------------------------- configs

@dataclass(frozen=True)
class LoRAConfig:
    rank: int = 64
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = LORA_TARGETS                    # ASSUMPTION: all linear layers of the LM's blocks


@dataclass(frozen=True)
class AquilaConfig:
    vision: VisionConfig
    llm: LMConfig
    image_size: int = 1024                  # side in pixels, a multiple of the coarsest stride
    fit: str = "resize"                     # how an image becomes square: "resize" (the paper) or "letterbox"
    dim: int = 1024                         # C
    heads: int = 1                          # of every SFI
    integration: str = "sfi"                # or "concat", the baseline of Table 5
    mda_layers: tuple[int, ...] = tuple(range(0, 32, 4))  # SFI before these LM layers, () none; ASSUMPTION: each fourth
    chat: str = "llama-3"                   # ASSUMPTION: the Instruct model, so its chat format
    max_len: int = 4096                     # tokens of a prompt and its answer, image tokens included
    region_dim: int = 0                     # width of Aquila-plus's mask extractor; 0: no regions, Aquila
    region_side: int = 224                  # side of the mask that the spatial token reads
    pooling: str = "area"                   # what a cell under a mask weighs: its covered share; or "binary" (Osprey)
    lora: LoRAConfig | None = None
    full_llm: bool = False                  # the LM's own weights were trained, too, and are in the checkpoint
    vision_file: str | None = None          # where the frozen parts lie
    llm_dir: str | None = None

    def __post_init__(self):
        if self.image_size % STRIDES[-1] or not 0 < self.image_size <= 8192:
            raise ValueError(f"image_size {self.image_size}: expected a multiple of {STRIDES[-1]}, at most 8192")
        if not 0 < self.region_side <= 8192:
            raise ValueError(f"region_side {self.region_side}: expected 1 to 8192")
        for name, known in (("integration", "sfi concat"), ("fit", "resize letterbox"), ("pooling", "area binary")):
            if getattr(self, name) not in known.split():
                raise ValueError(f"{name} {getattr(self, name)!r}: expected {' or '.join(known.split())}")

    @property
    def family(self):
        return "aquila-plus" if self.region_dim else "aquila"

    @property
    def side(self):                         # L
        return self.image_size // STRIDES[-1]

    @property
    def tokens_per_image(self):             # N
        return self.side ** 2


PRESETS = {
    "aquila-8b": AquilaConfig(CONVNEXTS["xxlarge"], LLAMAS["llama-3-8b"]),
    # ASSUMPTION: how Aquila-plus makes its image tokens is not in its summary. Here it shares Aquila's SFI, and MDA if
    # wanted: it is off at full size, where nothing asks for it, and on in tiny-plus, which answers better with it. The
    # summary has ConvNeXt-Large and Vicuna; 512 pixels and 7B are Osprey's.
    "aquila-plus-7b": AquilaConfig(CONVNEXTS["large"], LLAMAS["vicuna-7b"], image_size=512, mda_layers=(),
                                   chat="vicuna", region_dim=1024),
    "tiny": AquilaConfig(CONVNEXTS["tiny"], LLAMAS["tiny"], image_size=128, dim=128, heads=4, mda_layers=(0, 1, 2, 3),
                         max_len=1024, vision_file="weights/tiny-clip.safetensors", llm_dir="weights/tiny-llm"),
    # between: for photographs on a laptop (README, "Photographs")
    "small": AquilaConfig(CONVNEXTS["femto"], LLAMAS["small"], image_size=192, dim=192, heads=4, mda_layers=(0, 2, 4),
                          max_len=1024, vision_file="weights/small-clip.safetensors", llm_dir="weights/small-llm"),
}
PRESETS["tiny-plus"] = dataclasses.replace(PRESETS["tiny"], chat="vicuna", region_dim=128, region_side=32)

# Which parts a stage trains; all else is frozen, the vision encoder always. "pyramid" has the projectors, "tokens" the
# learned queries and the first SFI, "mda" the SFIs before the LM's layers. Aquila: Sec. 3.5, which names "the SFI
# module" and in stage 2 LoRA. ASSUMPTION: in both stages that takes in the projectors and MDA's SFIs. Aquila-plus: its
# summary says three stages and lists the first and the last; ASSUMPTION: the one between is Osprey's. In stage 3 the LM
# learns by LoRA, or with its own weights (full_llm).
TRAINS = {
    "aquila": {1: ("pyramid", "tokens", "mda"),                                    # align
               2: ("pyramid", "tokens", "mda", "lora")},                           # instruct
    "aquila-plus": {1: ("pyramid", "tokens", "mda"),                               # image and text
                    2: ("extractor",),                                             # mask and text
                    3: ("pyramid", "tokens", "mda", "extractor", "lora", "llm")},  # end to end
}


# ---------------------------------------------------------------------------------------------- the model

class MDALayer(nn.Module):
    """One SFI of the Multi-layer Deep Alignment (Sec. 3.4): hidden states at image positions ask the pyramid again."""

    def __init__(self, config):
        super().__init__()
        # ASSUMPTION: the paper says no more than "multiple SFI operations within the LLM layers". Here the queries are
        # the hidden states at image positions, RMS-normed, before a layer; text positions stay as they are; W_O starts
        # at zero, so that training begins with the untouched LM; every MDA layer has its own weights.
        self.norm = RMSNorm(config.llm.dim, config.llm.norm_eps)
        self.sfi = SFI(config.llm.dim, config.dim, len(config.vision.dims), config.llm.dim, config.heads)
        nn.init.zeros_(self.sfi.wo.weight)

    def forward(self, hidden, pyramid):     # (B, N, D), pyramid -> what is added to hidden
        return self.sfi(self.norm(hidden), pyramid)


class Aquila(nn.Module):
    """config, and the loaded vision encoder and LM; those not given are built with random weights."""

    def __init__(self, config, vision=None, llm=None):
        super().__init__()
        wrong = [i for i in config.mda_layers if not 0 <= i < config.llm.n_layers]
        if wrong:
            raise ValueError(f"mda_layers {wrong}: the LM has layers 0 to {config.llm.n_layers - 1}")
        self.config = config
        self.vision = vision or VisionEncoder(config.vision)
        self.llm = llm or LM(config.llm)
        dims, C, D = config.vision.dims, config.dim, config.llm.dim
        self.pyramid = Pyramid(dims, C)
        # ASSUMPTION: over the Concat baseline MDA is what it is over SFI, "multiple SFI operations" on the four maps.
        self.tokens = (ImageTokens(config.side, C, len(dims), D, config.heads) if config.integration == "sfi" else
                       ConcatTokens(C, len(dims), D))
        self.mda = nn.ModuleDict({str(i): MDALayer(config) for i in config.mda_layers})
        self.vision.requires_grad_(False)
        self.llm.requires_grad_(False)
        if config.lora:
            apply_lora(self.llm, config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets)

    def own_parameters(self):
        """{name: parameter} of what is ours, not read from the published files: what a checkpoint holds."""
        published = ("vision",) if self.config.full_llm else ("vision", "llm")
        return {name: p for name, p in self.named_parameters() if part_of(name) not in published}

    def checksums(self, all_bits=False):
        """
        {frozen part: checksum of the first 64 values of each tensor, as bfloat16}: the same for any layout of the file,
        read as float32 or bfloat16. all_bits: of every bit of them (some 10 s for 8 B), the same in this dtype alone.
        """
        trained, sums = self.own_parameters(), {}
        for name, p in self.named_parameters():
            if name not in trained:
                some = p.detach().flatten() if all_bits else p.detach().flatten()[:64].to(torch.bfloat16)
                crc = zlib.crc32(some.cpu().view(torch.uint8).numpy())
                sums[part_of(name)] = (sums.get(part_of(name), 0) + crc) % 2 ** 32
        return sums

    def encode_images(self, images):
        """images (n, 3, H, W) -> the four feature maps. The vision encoder is frozen in every stage."""
        with torch.no_grad():
            return self.vision(images.to(next(self.vision.parameters()).dtype))

    def image_tokens(self, maps):
        """feature maps -> pyramid of windows, a list of (n, N, k_s*k_s, C), and image tokens (n, N, D)."""
        pyramid, grid = self.pyramid(maps)
        return pyramid, self.tokens(pyramid, grid)

    def embed_batch(self, batch):
        """-> the prompt's embeddings (B, T, D), and MDA as the LM's before_layer (None without image or MDA layers)."""
        ids, images = batch["ids"], batch["images"]
        x = self.llm.embed(ids.clamp(min=0))
        slots = ids == IMAGE_SLOT                                                  # (B, T)
        if images is None:
            if slots.any():
                raise ValueError(f"{int(slots.sum())} image slots in the prompts, but no image")
            return x, None
        maps = self.encode_images(images)
        pyramid, image_tokens = self.image_tokens(maps)
        uses = batch.get("image_of")
        if uses is not None:                # images that several records share were encoded once
            pyramid, image_tokens = [windows[uses] for windows in pyramid], image_tokens[uses]
        n, N, D = image_tokens.shape
        if slots.sum() != n * N:
            raise ValueError(f"{int(slots.sum())} image slots in the prompts, {n} images of {N} tokens: cut prompt?")
        x = x.masked_scatter(slots[..., None], image_tokens.to(x.dtype))           # fill the slots, in order
        x = self.fill_regions(x, batch, maps)

        def mda(i, hidden):                 # (B, T, D), before LM layer i
            if str(i) not in self.mda:
                return hidden
            seen = hidden[slots].view(n, N, D)
            seen = seen + self.mda[str(i)](seen, pyramid).to(hidden.dtype)
            return hidden.masked_scatter(slots[..., None], seen)                   # text positions stay as they are

        return x, mda if self.mda else None

    def fill_regions(self, x, batch, maps):
        """Aquila has no region slots; AquilaPlus fills them."""
        return x

    def forward(self, batch):
        """
        in:  batch of data.collate: ids (B, T), images (n, 3, H, W) or None, labels (B, T) or none; draw, a whole number
             that decides LoRA's dropout together with each row's number in the data set.
        out: (loss summed over the learned tokens, their logits (n, vocab), n); without labels (None, (B, T, vocab), 0).
        """
        if self.training and self.config.lora:
            rows = zip(batch["numbers"].tolist(), batch["lengths"].tolist())
            drawn = [(f"{batch['draw']} {number}", length) for number, length in rows] if "draw" in batch else None
            seed_dropout(self.llm, drawn)
        x, mda = self.embed_batch(batch)
        if batch.get("labels") is None:
            return None, self.llm(x, before_layer=mda), 0
        target = batch["labels"][:, 1:]                                            # position t predicts token t + 1
        learned = target != IGNORE
        at = F.pad(learned, (0, 1))                                                # the last position predicts nothing
        logits = self.llm(x, before_layer=mda, at=at)
        loss = F.cross_entropy(at_least_float32(logits), target[learned], reduction="sum")
        if self.training:
            # DDP waits for a gradient of every trainable parameter; a batch without image or region gives some none.
            # The LM runs with any batch; of a cut one (--shard) there are only slices here.
            loss = loss + 0.0 * sum(p.flatten()[0] for name, p in self.named_parameters()
                                    if p.requires_grad and part_of(name) not in ("llm", "lora"))
        return loss, logits, len(logits)

    def check_room(self, prompt, max_new_tokens):
        """ValueError if a prompt of that many tokens and the answer are longer than max_len."""
        most = self.config.max_len
        if prompt + max_new_tokens > most:
            raise ValueError(f"a prompt of {prompt} tokens and --max-new-tokens {max_new_tokens} need more than the "
                             f"{most} places of this model (max_len); at most {max(most - prompt, 0)} new tokens fit")

    @torch.inference_mode()
    def generate(self, batch, stop_ids, max_new_tokens=256, temperature=0.0, top_p=1.0, generator=None):
        """Yields a (B,) tensor of ids a step, -1 for rows that have stopped. batch: prompts, padded on the right."""
        self.check_room(int(batch["lengths"].max()), max_new_tokens)
        x, mda = self.embed_batch(batch)
        yield from generate(self.llm, x, batch["lengths"], max_new_tokens, stop_ids, temperature, top_p, mda, generator,
                            fastest_step(self.llm, x))

    def answer(self, batch, tokenizer, **options):
        """Prompts -> a list of answers. Options as for generate."""
        steps = [ids.tolist() for ids in self.generate(batch, tokenizer.stop_ids, **options)]
        rows = zip(*steps) if steps else [[]] * len(batch["ids"])
        return [tokenizer.decode([i for i in row if i >= 0]).strip() for row in rows]


class AquilaPlus(Aquila):
    """Aquila that reads regions (arXiv 2411.06142): a mask extractor fills the two slots of each `<region>`."""

    def __init__(self, config, vision=None, llm=None):
        super().__init__(config, vision, llm)
        self.extractor = MaskExtractor(config.vision.dims, config.llm.dim, config.region_dim, config.region_side,
                                       config.pooling)

    def fill_regions(self, x, batch, maps):
        """x (B, T, D): the two tokens of every region that is mentioned go to its slots, in order."""
        ids, masks = batch["ids"], batch.get("masks")
        named = 0 if masks is None else len(batch["regions"])
        for slot in (MASK_SLOT, POSITION_SLOT):
            slots = int((ids == slot).sum())
            if slots != named:
                raise ValueError(f"{slots} region slots in the prompts, {named} regions: cut prompt?")
        if not named:
            return x
        mentioned = batch["regions"].unbind(1)                                     # image, mask
        for slot, region_tokens in zip((MASK_SLOT, POSITION_SLOT), self.extractor(maps, masks)):
            x = x.masked_scatter((ids == slot)[..., None], region_tokens[mentioned].to(x.dtype))
        return x


def assemble(config, vision=None, llm=None):
    """The model of a config: Aquila, or AquilaPlus if it has regions."""
    return (AquilaPlus if config.region_dim else Aquila)(config, vision, llm)


def part_of(name):
    """The part of the model that a parameter belongs to: vision, llm, pyramid, tokens, mda, extractor or lora."""
    return "lora" if ".lora_" in name else name.split(".")[0]


def parts_of_stage(config, stage):
    """The names in TRAINS; without full_llm the LM learns by LoRA, so "llm" drops out."""
    return set(TRAINS[config.family][stage]) - (set() if config.full_llm else {"llm"})


def count_parameters(named):
    """(name, parameter) pairs -> {part: number of its parameters}."""
    counts = {}
    for name, p in named:
        counts[part_of(name)] = counts.get(part_of(name), 0) + p.numel()
    return counts


def set_stage(model, stage):
    """Freeze everything but what the stage trains; return those parameters by name."""
    parts = parts_of_stage(model.config, stage)
    for name, p in model.named_parameters():
        p.requires_grad_(part_of(name) in parts)
    model.vision.eval()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------- files

def config_to_dict(config):
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(d, where="config"):
    return make_config(AquilaConfig, d, where, vision=VisionConfig, llm=LMConfig)


def locate_weights(path, what):
    """A path as given, or as it lies beside this file."""
    for place in () if path is None else (path, pathlib.Path(__file__).parent / path):
        if os.path.exists(place):
            return place
    flag = "vision FILE" if what == "vision encoder" else "llm DIR"
    where = "the preset names none" if path is None else f"it is not at {path}"
    raise ValueError(one_line(f"where is the {what}? {where}; give --{flag}"))


def build(config, dtype=torch.float32, device="cpu"):
    """
    Aquila with its published parts loaded from config.vision_file and config.llm_dir; the sizes are those of the files.
    Frozen parts are kept in dtype, the others in float32 (bfloat16 swallows small updates).
    """
    vision = load_vision(locate_weights(config.vision_file, "vision encoder"), dtype=dtype, device=device)
    llm_dtype = torch.float32 if config.full_llm else dtype
    llm = load_lm(locate_weights(config.llm_dir, "language model"), dtype=llm_dtype, device=device)
    config = dataclasses.replace(config, vision=vision.config, llm=llm.config)
    return assemble(config, vision, llm).to(device)


def save_model(model, folder, own=None, checksums=None):
    """
    Write what is ours (model.safetensors), and config.json, which says where the published parts lie.
    own, checksums: the model's own_parameters() and checksums(), if its tensors are not whole (train.py --shard).
    """
    folder, own, checksums = pathlib.Path(folder), own or model.own_parameters(), checksums or model.checksums()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", own, {"frozen": json.dumps(checksums)})
    write_json(folder / "config.json", config_to_dict(model.config))


def load_checkpoint(model, folder, new_parts_keep_start=False):
    """
    Fill what is ours from a checkpoint folder; every tensor must fit, and the frozen parts must be the same.
    new_parts_keep_start: LoRA or the LM's weights may be missing there, when the stage before did not train them.
    """
    path = pathlib.Path(folder, "model.safetensors")
    told, where = (open_safetensors(path).metadata() or {}).get("frozen", "{}"), f"{path}: 'frozen'"
    frozen = Fields(parse_json(told, where), where).values
    for part, checksum in model.checksums().items():
        if frozen.get(part, checksum) != checksum:
            now = model.config.vision_file if part == "vision" else model.config.llm_dir
            raise ValueError(f"{path}: was trained on other weights than those of {now}; give with --{part} the "
                             "ones it was trained on, or train again")
    stored, new = open_tensors(path), ("lora", "llm") if new_parts_keep_start else ()
    wanted = {name: p for name, p in model.own_parameters().items() if name in stored or part_of(name) not in new}
    fill(wanted, stored.items(), path)


def load_config(folder):
    """The config of a checkpoint. It claims sizes: they are compared with the tensors before a model is built."""
    path, weights = pathlib.Path(folder, "config.json"), pathlib.Path(folder, "model.safetensors")
    config = config_from_dict(read_json(path), path)
    with naming(path), torch.device("meta"):
        claimed = assemble(config)
    fill(claimed.own_parameters(), open_tensors(weights).items(), weights)
    return config


def load_model(folder, vision=None, llm=None, dtype=torch.float32, device="cpu", merge=False):
    """
    The model that save_model wrote, in dtype; vision (file) and llm (folder) override where the frozen parts lie.
    merge: without LoRA layers, their change added to the LM's weights.
    """
    config = load_config(folder)
    config = dataclasses.replace(config, vision_file=vision or config.vision_file, llm_dir=llm or config.llm_dir)
    model = build(config, dtype, device)
    load_checkpoint(model, folder)
    if merge:
        merge_lora(model.llm)
    return model.to(dtype).eval()


if __name__ == "__main__":
    from commands.model import main
    main()
