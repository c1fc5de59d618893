"""
LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen weight W learns a low-rank change, W + (alpha / rank) B A.

    apply_lora(llama, rank=64, alpha=16, dropout=0.05)      # the linear layers of every block learn by LoRA now
    merge_lora(llama)                                       # the change added to W: a plain Llama again

Dropout draws a mask of its own for every row of a batch, see seed_dropout.
"""
import math
import zlib

import torch
import torch.nn.functional as F
from torch import nn

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")       # our names of the linear layers of a block


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A dropout(x), W frozen. Shares W with the layer it replaces."""

    def __init__(self, plain, rank, alpha, dropout):
        super().__init__()
        self.draws = None                   # see seed_dropout
        self.weight = plain.weight.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        like = dict(dtype=torch.float32, device=plain.weight.device)               # trained in float32 over any base
        self.lora_a = nn.Parameter(torch.empty(rank, plain.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(plain.out_features, rank, **like))  # zero: training starts from W
        if not self.lora_a.is_meta:
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))                  # as nn.Linear starts, and PEFT

    def forward(self, x):
        low = F.linear(self.drop(x), self.lora_a.to(x.dtype))
        low = low * (self.alpha / self.rank)                                       # scaled where the tensor is smallest
        return F.linear(x, self.weight) + F.linear(low, self.lora_b.to(x.dtype))

    def drop(self, x):                      # (B, T, D)
        if not (self.draws and self.training and self.dropout):
            return F.dropout(x, self.dropout, self.training)
        keep = torch.ones_like(x)
        for mask, (seed, length) in zip(keep, self.draws):
            generator = torch.Generator(x.device).manual_seed(seed)
            mask[:length].bernoulli_(1 - self.dropout, generator=generator)
        return x * keep.div_(max(1 - self.dropout, 1e-9))


def lora_layers(model):
    """(name, LoRALinear) of every layer that learns by LoRA."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def seed_dropout(model, rows):
    """
    rows[b] = (text, length): until the next call the masks of row b follow from this text and the layer's number, over
    its first `length` positions. So padding, micro-batches and processes change no mask, and activation checkpointing
    makes the same one again. None: torch's own dropout.
    """
    for number, (_, m) in enumerate(lora_layers(model)):
        m.draws = rows and [(zlib.crc32(f"{text} {number}".encode()), length) for text, length in rows]


def apply_lora(model, rank=64, alpha=16, dropout=0.05, targets=LORA_TARGETS):
    """Replace, in place, the named linear layers of every block by LoRALinear."""
    if not targets or set(targets) - set(LORA_TARGETS) or not (rank > 0 and alpha > 0 and 0 <= dropout <= 1):
        raise ValueError(f"LoRA of rank {rank}, alpha {alpha}, dropout {dropout}, targets {sorted(targets)}: expected "
                         f"some of {', '.join(LORA_TARGETS)}, and a rank and an alpha above 0, a dropout up to 1")
    if lora_layers(model):
        raise ValueError("this model has LoRA already; merge it first")
    for layer in model.layers:
        for block in (layer.attn, layer.mlp):
            for name in dict.fromkeys(targets):                                    # each once
                if hasattr(block, name):
                    lora = LoRALinear(getattr(block, name), rank, alpha, dropout)
                    setattr(block, name, lora.train(model.training))
    return model


@torch.no_grad()
def merge_lora(model):
    """Fold every LoRA into its weight, in place: W + (alpha / rank) B A. The model is a plain Llama again."""
    for name, m in lora_layers(model):
        m.weight += (m.alpha / m.rank) * (m.lora_b @ m.lora_a)                     # summed in float32, rounded once
        plain = nn.Linear(m.weight.shape[1], m.weight.shape[0], bias=False, device="meta")
        plain.weight = m.weight
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    return model
