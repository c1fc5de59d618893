"""
Llama: the decoder of Llama-2/3, Vicuna, TinyLlama and SmolLM2, with its KV cache, LoRA, weight loaders and tokenizers.

    model, tokenizer = load_llama(folder, dtype=torch.bfloat16), load_tokenizer(folder)
    prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("The capital of France is")]])
    for ids in generate(model, model.embed(prompt), stop_ids=tokenizer.stop_ids): ...

Three decisions to know before reading:
- Rotary pairs are (i, i + hd/2), Hugging Face's order; Meta's files interleave them and are re-ordered when loaded.
- Batches are padded on the right, always. Under a causal mask a real token never sees the padding, so prompts of
  unequal length need no mask; in decoding each row goes on at its own length.
- Layers take a `between` hook, the door through which Aquila's MDA reaches the residual stream.

Shapes: B batch, T sequence, D width, nh/nkv/hd query heads, key-value heads, width of a head.
"""
import base64
import json
import math
import os
import pathlib
import pickle
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import sentencepiece
import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------------------------------------------------- the model

@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's stretched rotary frequencies (Hugging Face: `rope_scaling` of type "llama3")."""
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    head_dim: int = 0                       # 0: dim / n_heads
    max_len: int = 8192                     # positions the weights were trained for
    tied: bool = False                      # the output layer is the embedding table
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")


LLAMAS = {
    "llama-3-8b": LlamaConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336, vocab_size=128256,
                              rope_theta=500000.0),
    "vicuna-7b": LlamaConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, ffn_dim=11008, vocab_size=32000,
                             max_len=4096),
    "tiny": LlamaConfig(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=384, vocab_size=701, max_len=2048,
                        tied=True),
}


def rope_frequencies(config, device=None):
    """
    The hd/2 angles a position adds, slowed down as Llama-3.1 does when the config says so. In float32 and in the order
    of Meta's code: the last bit of a frequency is a difference of 0.4 % in a cosine at position 100,000.
    """
    freq = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return freq                                                                # (hd/2,)
    turns = s.original_max_len / (2 * math.pi / freq)                              # full turns in the old context
    smooth = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * freq / s.factor + smooth * freq


def rotate(x, cos, sin):
    """x: (B, n, T, hd); cos, sin: (T, hd) or (B, 1, T, hd), the two halves of hd alike."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def linear(x, weight):
    """F.linear, except that a bare vector, as in decoding, goes through the faster matrix-vector product."""
    return torch.mv(weight, x) if x.dim() == 1 else F.linear(x, weight)


class Linear(nn.Linear):
    def __init__(self, in_features, out_features, device=None):
        super().__init__(in_features, out_features, bias=False, device=device)

    def forward(self, x):
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        if x.dim() == 1 and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The same in half the operations; item() stops gradients and cannot be compiled.
            square = torch.linalg.vector_norm(x, dtype=torch.float32).item() ** 2
            return x * (square / len(x) + self.eps) ** -0.5 * self.weight.to(x.dtype)
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight.to(x.dtype)


class KVCache:
    """Keys and values of every layer, (layers, B, nkv, max_len, hd), and how many of each row are real."""

    def __init__(self, config, batch, max_len, dtype, device):
        shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.filled = 0                     # the longest row, as a plain number, so that nothing waits for a GPU

    def place(self, T, fixed=False):
        """
        -> where, an index into (B, max_len) for the next T positions, and how many keys they have. fixed: tensors, and
        all the keys at every step, as compiled code wants it; a mask hides those that are not real yet.
        """
        _, B, _, max_len, _ = self.k.shape
        end = self.filled + T
        if end > max_len:
            raise ValueError(f"KV cache holds {max_len} positions, {end} are needed; make it longer")
        if not fixed and (B == 1 or self.filled == 0):
            return (slice(None), slice(self.filled, end)), end
        rows, new = torch.arange(B, device=self.k.device), torch.arange(T, device=self.k.device)
        return (rows[:, None], self.lengths[:, None] + new), max_len if fixed else end       # each row at its own place

    def advance(self, by):
        self.lengths, self.filled = self.lengths + by, self.filled + by

    def set_lengths(self, lengths):
        """After a prefill padded on the right: row b really holds lengths[b] positions; the rest is overwritten."""
        self.lengths = lengths.to(self.lengths)
        self.filled = int(lengths.max())


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.q = Linear(c.dim, c.n_heads * c.head_dim)
        self.k = Linear(c.dim, c.n_kv_heads * c.head_dim)
        self.v = Linear(c.dim, c.n_kv_heads * c.head_dim)
        self.o = Linear(c.n_heads * c.head_dim, c.dim)

    def forward(self, x, rope, mask, stored=None, where=None):
        """stored: keys and values (B, nkv, keys, hd) of this layer; where: the place in them for the new ones."""
        c, (B, T) = self.config, x.shape[:-1] or (1, 1)
        qk = torch.cat((self.q(x), self.k(x)), dim=-1).view(B, T, -1, c.head_dim).transpose(1, 2)
        q, k = rotate(qk, *rope).split((c.n_heads, c.n_kv_heads), dim=1)           # (B, nh, T, hd), (B, nkv, T, hd)
        v = self.v(x).view(B, T, c.n_kv_heads, c.head_dim).transpose(1, 2)
        if stored is not None:
            keys, values = stored
            keys.transpose(1, 2)[where], values.transpose(1, 2)[where] = k.transpose(1, 2), v.transpose(1, 2)
            if keys.shape[2] > T:
                k, v = keys, values
        # T queries over T keys: plain causal. One query of one row: sees all keys. Else the mask says which.
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                           enable_gqa=c.n_heads != c.n_kv_heads)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:-1], -1))


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = Linear(c.dim, c.ffn_dim)
        self.up = Linear(c.dim, c.ffn_dim)
        self.down = Linear(c.ffn_dim, c.dim)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(c.dim, c.norm_eps), Attention(c)
        self.mlp_norm, self.mlp = RMSNorm(c.dim, c.norm_eps), FeedForward(c)

    def forward(self, x, rope, mask, stored=None, where=None):
        x = x + self.attn(self.attn_norm(x), rope, mask, stored, where)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The decoder (Meta's llama3/llama/model.py). Weights start as N(0, 0.02)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Not nn.Embedding(): its own random start costs seconds and 60 MB of imports on the meta device.
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else Linear(config.dim, config.vocab_size)
        self.grad_checkpoint = False        # recompute each layer in the backward pass: less memory, a third more time
        self.compiled_layer = None          # set by compile_decoding
        for p in self.parameters():
            if p.dim() == 2 and not p.is_meta:
                nn.init.normal_(p, std=0.02)

    def compile_decoding(self, backend="inductor"):
        """
        Compiles the steps of one position a row, as generate takes them after the prompt. One layer is compiled, at
        the first such step (some 10 s; on a CPU a C++ compiler must be there), and serves them all.
        """
        self.compiled_layer = torch.compile(Layer.forward, backend=backend)

    def forward(self, x, cache=None, between=None, at=None):
        """
        in:  ids (B, T) long, or embeddings (B, T, D). With a cache, the positions that follow what it holds.
        between(i, x) -> x runs before layer i. at: an index into (B, T) that picks the positions to get logits.
        out: logits (B, T, vocab), or (n, vocab) for the n positions picked.
        """
        x = self.embed(x) if not x.is_floating_point() else x
        B, T, _ = x.shape
        compiled = self.compiled_layer is not None and cache is not None and cache.filled and T == 1 and between is None
        where, keys = cache.place(T, compiled) if cache is not None else (None, T)
        rope, mask = self.positions(B, T, x, cache, keys if compiled else 0)
        # Decoding on a CPU runs on a bare vector: after the weights have passed through the caches, each call is slow.
        alone = B * T == 1 and x.is_cpu and between is None and at is None and not torch.is_grad_enabled()
        x = x[0, 0] if alone else x                                                # (D,)
        for i, layer in enumerate(self.layers):
            stored = (cache.k[i, :, :, :keys], cache.v[i, :, :, :keys]) if cache is not None else None
            if compiled:
                x = self.compiled_layer(layer, x, rope, mask, stored, where)
            elif self.grad_checkpoint and self.training:
                x = checkpoint(self.run_layer, i, x, rope, mask, between, use_reentrant=False)
            else:
                x = self.run_layer(i, x, rope, mask, between, stored, where)
        if cache is not None:
            cache.advance(T)
        x = self.norm(x if at is None else x[at])
        x = linear(x, self.embed.weight) if self.head is None else self.head(x)
        return x.view(1, 1, -1) if alone else x

    def run_layer(self, i, x, rope, mask, between, stored=None, where=None):
        if between is not None:
            x = between(i, x)
        return self.layers[i](x, rope, mask, stored, where)

    def positions(self, B, T, x, cache, keys=0):
        """
        -> (cos, sin) of the T new positions, and the mask (B, 1, T, keys), or None where none is needed.
        keys: how many there are where that is more than the real ones.
        """
        new = torch.arange(T, device=x.device)
        mask = None
        if cache is not None and cache.filled:
            new = cache.lengths[:, None] + new                                     # (B, T)
            if T > 1 or B > 1 or keys:
                key = torch.arange(keys or cache.filled + T, device=x.device)
                mask = (key <= new[..., None])[:, None]                            # (B, 1, T, keys)
        angle = new[..., None].float() * rope_frequencies(self.config, x.device)   # ([B,] T, hd/2)
        angle = torch.cat((angle, angle), dim=-1)
        if angle.dim() == 3:
            angle = angle[:, None]                                                 # (B, 1, T, hd): same for all heads
        return (angle.cos().to(x.dtype), angle.sin().to(x.dtype)), mask


def pick(logits, temperature, top_p, generator=None):
    """logits (B, vocab) -> ids (B,): the best one at temperature 0, else a draw from the nucleus of mass top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                                # the first one always stays
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


@contextmanager
def onednn(wanted):
    """oneDNN on or off, in the whole process. For one vector, calling it costs more than it saves."""
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, wanted
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@torch.inference_mode()
def generate(model, x, lengths=None, max_new_tokens=256, stop_ids=(), temperature=0.0, top_p=1.0, between=None,
             generator=None):
    """
    in:  x (B, T, D) embeddings of prompts padded on the right, lengths (B,) their true lengths (default: all T).
         between reaches the prompt only (MDA lives at image positions, and those are all in the prompt).
    out: yields a (B,) long tensor a step; -1 for rows that have stopped. The stop token itself is not yielded.
    """
    B, T, _ = x.shape
    lengths = torch.full((B,), T, device=x.device) if lengths is None else lengths.to(x.device)
    cache = KVCache(model.config, B, T + max_new_tokens, x.dtype, x.device)
    logits = model(x, cache=cache, between=between, at=(torch.arange(B, device=x.device), lengths - 1))
    cache.set_lengths(lengths)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=x.device)
    running = torch.ones(B, dtype=torch.bool, device=x.device)
    for step in range(max_new_tokens):
        ids = pick(logits, temperature, top_p, generator)
        running = running & ~torch.isin(ids, stops)
        if not running.any():
            return
        yield ids.masked_fill(~running, -1)
        if step + 1 < max_new_tokens:
            with onednn(B > 1):
                logits = model(ids[:, None], cache=cache)[:, -1]


# ---------------------------------------------------------------------------------------------- LoRA

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A dropout(x), W frozen (Hu et al. 2021). Shares W with the layer it replaces."""

    def __init__(self, plain, rank, alpha, dropout):
        super().__init__()
        self.weight = plain.weight.requires_grad_(False)
        self.rank, self.alpha, self.p = rank, alpha, dropout
        like = dict(dtype=torch.float32, device=plain.weight.device)               # trained in float32 over any base
        self.lora_a = nn.Parameter(torch.empty(rank, plain.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(plain.out_features, rank, **like))
        if not self.lora_a.is_meta:
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))                  # as nn.Linear starts, and PEFT

    def forward(self, x):
        low = linear(F.dropout(x, self.p, self.training), self.lora_a.to(x.dtype)) * (self.alpha / self.rank)
        return linear(x, self.weight) + linear(low, self.lora_b.to(x.dtype))


def lora_layers(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def apply_lora(model, rank=64, alpha=16, dropout=0.05, targets=LORA_TARGETS):
    """Replace, in place, the named linear layers of every block by LoRALinear."""
    if not targets or set(targets) - set(LORA_TARGETS):
        raise ValueError(f"LoRA targets {sorted(targets)}: expected some of {', '.join(LORA_TARGETS)}")
    if lora_layers(model):
        raise ValueError("this model has LoRA already; merge it first")
    for layer in model.layers:
        for block in (layer.attn, layer.mlp):
            for name in targets:
                if hasattr(block, name):
                    setattr(block, name, LoRALinear(getattr(block, name), rank, alpha, dropout).train(model.training))
    return model


@torch.no_grad()
def merge_lora(model):
    """Fold every LoRA into its weight, in place: W + (alpha / rank) B A. The model is a plain Llama again."""
    for name, m in lora_layers(model):
        m.weight += (m.alpha / m.rank) * (m.lora_b @ m.lora_a)                     # summed in float32, rounded once
        plain = Linear(m.weight.shape[1], m.weight.shape[0], device="meta")
        plain.weight = m.weight
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    return model


def lora_parameters(model):
    """{name in PEFT's files: parameter}."""
    return {f"base_model.model.{their_name(name + '.weight', HUGGING_FACE).removesuffix('weight')}lora_{part}.weight": p
            for name, m in lora_layers(model) for part, p in (("A", m.lora_a), ("B", m.lora_b))}


def save_lora(model, folder):
    """Write adapter_config.json and adapter_model.safetensors, as PEFT does."""
    found = lora_layers(model)
    if not found:
        raise ValueError("this model has no LoRA to save; apply_lora first")
    m, targets = found[0][1], sorted({name.split(".")[-1] + "_proj" for name, _ in found})
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=m.rank, lora_alpha=m.alpha, lora_dropout=m.p, bias="none",
                  fan_in_fan_out=False, inference_mode=True, target_modules=targets, base_model_name_or_path=None)
    write_tensors(pathlib.Path(folder, "adapter_model.safetensors"), lora_parameters(model))
    write_json(pathlib.Path(folder, "adapter_config.json"), config)


# What adapter_config.json may say without changing the mathematics of LoRALinear; all else that is set is refused.
PEFT_PLAIN = {"r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "auto_mapping", "peft_version",
              "revision", "base_model_name_or_path", "inference_mode", "megatron_core", "qalora_group_size"}
PEFT_VALUES = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal")}


def load_lora(model, folder):
    """Apply and fill the LoRA that PEFT (or save_lora) wrote to folder."""
    folder = pathlib.Path(folder)
    config = read_json(folder / "adapter_config.json")
    refused = [f"{k} {v!r}" for k, v in config.items()
               if v and k not in PEFT_PLAIN and v not in PEFT_VALUES.get(k, ())]
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        refused.append(f"target_modules {targets!r}, not a list of names such as q_proj")
    if refused:
        raise ValueError(f"{folder / 'adapter_config.json'}: {', '.join(refused)}: not plain LoRA; merge the adapter "
                         "with PEFT and load the merged model")
    apply_lora(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0),
               [t.removesuffix("_proj") for t in targets])
    file = folder / "adapter_model.safetensors"
    file = file if file.exists() else folder / "adapter_model.bin"                 # PEFT before 0.8
    fill(lora_parameters(model), open_tensors(file).items(), file)
    return model


# ---------------------------------------------------------------------------------------------- weights

# ours: (Hugging Face's name, Meta's, the dimension that Meta's shards split; None: each holds all); {} is the layer
HUGGING_FACE, META = 0, 1
NAMES = {
    "embed.weight": ("model.embed_tokens.weight", "tok_embeddings.weight", 0),     # dimension 1 in Llama-2
    "norm.weight": ("model.norm.weight", "norm.weight", None),
    "head.weight": ("lm_head.weight", "output.weight", 0),
    "layers.{}.attn_norm.weight": ("model.layers.{}.input_layernorm.weight", "layers.{}.attention_norm.weight", None),
    "layers.{}.attn.q.weight": ("model.layers.{}.self_attn.q_proj.weight", "layers.{}.attention.wq.weight", 0),
    "layers.{}.attn.k.weight": ("model.layers.{}.self_attn.k_proj.weight", "layers.{}.attention.wk.weight", 0),
    "layers.{}.attn.v.weight": ("model.layers.{}.self_attn.v_proj.weight", "layers.{}.attention.wv.weight", 0),
    "layers.{}.attn.o.weight": ("model.layers.{}.self_attn.o_proj.weight", "layers.{}.attention.wo.weight", 1),
    "layers.{}.mlp_norm.weight": ("model.layers.{}.post_attention_layernorm.weight", "layers.{}.ffn_norm.weight", None),
    "layers.{}.mlp.gate.weight": ("model.layers.{}.mlp.gate_proj.weight", "layers.{}.feed_forward.w1.weight", 0),
    "layers.{}.mlp.up.weight": ("model.layers.{}.mlp.up_proj.weight", "layers.{}.feed_forward.w3.weight", 0),
    "layers.{}.mlp.down.weight": ("model.layers.{}.mlp.down_proj.weight", "layers.{}.feed_forward.w2.weight", 1),
}


def named(ours):
    """Our name of a parameter -> its row in NAMES and the number of its layer, if it is in one."""
    return NAMES[re.sub(r"\d+", "{}", ours)], re.findall(r"\d+", ours)


def their_name(ours, column):
    row, layer = named(ours)
    return row[column].format(*layer)


def load_llama(folder, dtype=torch.float32, device="cpu"):
    """
    Read a Llama-architecture model from a Hugging Face directory (config.json) or Meta's (params.json), one tensor at a
    time, into dtype on device. One ValueError names every missing, unexpected or misshapen tensor.
    """
    folder = pathlib.Path(folder)
    if (folder / "config.json").exists():
        read_config, match = hf_config, hf_tensors
    elif (folder / "params.json").exists():
        read_config, match = meta_config, meta_tensors
    else:
        raise FileNotFoundError(f"{folder} has neither config.json (Hugging Face) nor params.json (Meta)")
    try:
        config = read_config(folder)
    except KeyError as e:
        raise ValueError(f"{folder}: its configuration or its first file lacks {e.args[0]!r}") from None
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    model.to_empty(device=device)
    fill(*match(folder, model), folder)
    return model.eval()


@torch.no_grad()
def fill(params, tensors, source):
    """
    Copy tensors, an iterable of (name, read()), into params {name: parameter or tensor}, one at a time.
    Every name must be there once and every shape must fit, else one ValueError.
    """
    missing, unexpected, misshapen = dict(params), [], []
    for name, read in tensors:
        target = missing.pop(name, None)
        if target is None:
            unexpected.append(name)
            continue
        value = read()
        if value.shape != target.shape:
            misshapen.append(f"{name} {tuple(value.shape)}, expected {tuple(target.shape)}")
        else:
            target.copy_(value)
    wrong = [f"{len(names)} {what}: {', '.join(list(names)[:5])}{' ...' if len(names) > 5 else ''}"
             for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)) if names]
    if wrong:
        raise ValueError(f"{source} does not fit the model: {'; '.join(wrong)}")


def hf_config(folder):
    """config.json of a Hugging Face directory -> LlamaConfig."""
    c = read_json(folder / "config.json")
    scaling = c.get("rope_scaling") or c.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    known = {"model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
    wrong = [f"{k} {c[k]!r}" for k, values in known.items() if c.get(k, values[0]) not in values]
    wrong += [f"rope_scaling of type {kind!r}"] if kind not in ("default", "llama3") else []
    if wrong:
        raise ValueError(f"{folder / 'config.json'}: {', '.join(wrong)}: only models of Llama's architecture are read")
    rope = None if kind == "default" else RopeScaling(scaling["factor"], scaling["low_freq_factor"],
                                                      scaling["high_freq_factor"],
                                                      scaling["original_max_position_embeddings"])
    # What older files leave out has the value that transformers gives it.
    return LlamaConfig(
        dim=c["hidden_size"], n_layers=c["num_hidden_layers"], n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"], ffn_dim=c["intermediate_size"],
        vocab_size=c["vocab_size"], rope_theta=float(c.get("rope_theta") or scaling.get("rope_theta") or 10000.0),
        norm_eps=c.get("rms_norm_eps", 1e-6), head_dim=c.get("head_dim") or 0, tied=bool(c.get("tie_word_embeddings")),
        max_len=c.get("max_position_embeddings", 2048), rope_scaling=rope)


def hf_files(folder):
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.exists():
            return [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        files = sorted(folder.glob(f"{stem}*{suffix}"))
        if files:
            return files
    raise FileNotFoundError(f"{folder} has config.json, but no model*.safetensors and no pytorch_model*.bin")


def hf_tensors(folder, model):
    """-> {Hugging Face's name: parameter}, and all (name, read()) in the files."""
    params = {their_name(ours, HUGGING_FACE): p for ours, p in model.named_parameters()}
    # Left out: the frequencies in old Vicuna files, computed here; and a tied embedding repeated as output layer.
    left_out = ("rotary_emb.inv_freq", "lm_head.weight") if model.config.tied else "rotary_emb.inv_freq"
    return params, ((name, read) for file in hf_files(folder) for name, read in open_tensors(file).items()
                    if not name.endswith(left_out))


# Meta's params.json is silent about these; they stand in its code (model.py of llama, llama3 and llama-models).
META_THETA = {"Llama-2": 10000.0, "Llama-3": 500000.0}
META_SCALING = {"3.1": RopeScaling(factor=8.0), "3.2": RopeScaling(factor=32.0)}


def meta_config(folder):
    """params.json and the first shard -> LlamaConfig."""
    p, files = read_json(folder / "params.json"), meta_files(folder)
    first, dim, heads, n = open_pickle(files[0]), p["dim"], p["n_heads"], len(files)
    table, vocab, kv_heads = first["tok_embeddings.weight"], p.get("vocab_size", -1), p.get("n_kv_heads") or heads
    rows, columns = table.shape
    rows, columns = (rows * n, columns) if columns == dim else (rows, columns * n)     # Llama-3's split, or Llama-2's
    if columns != dim or vocab not in (-1, rows) or kv_heads % n:                  # Llama-2 writes vocab_size -1
        raise ValueError(f"{folder / 'params.json'}: dim {dim}, vocab_size {vocab} and {kv_heads} key-value heads do "
                         f"not fit {n} files, the first with an embedding of {tuple(table.shape)}; is a shard missing?")
    family = "Llama-3" if rows > 100000 else "Llama-2"
    scaled = bool(p.get("use_scaled_rope"))
    # Meta's code knows the factor 8 alone; its 3.2 models of 1B and 3B were trained with 32 (their config.json).
    scaling = META_SCALING["3.2" if dim < 4096 else "3.1"] if scaled else None
    output = first.get("output.weight")                                            # Llama-3.2: the embedding again
    config = LlamaConfig(
        dim=dim, n_layers=p["n_layers"], n_heads=heads, n_kv_heads=kv_heads, vocab_size=rows, norm_eps=p["norm_eps"],
        ffn_dim=len(first["layers.0.feed_forward.w1.weight"]) * n, rope_scaling=scaling,
        rope_theta=float(p.get("rope_theta") or META_THETA[family]),
        max_len=131072 if scaled else 8192 if family == "Llama-3" else 4096,
        tied=output is None or output.data_ptr() == table.data_ptr())
    freqs = first.get("rope.freqs")
    if freqs is not None and not torch.allclose(freqs.float(), rope_frequencies(config), rtol=1e-2, atol=1e-6):
        raise ValueError(f"{files[0]}: rope.freqs contradicts rope_theta {config.rope_theta:g} and scaling {scaling}")
    return config


def meta_files(folder):
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{folder} has params.json, but no consolidated.*.pth")
    return files


def meta_tensors(folder, model):
    """-> {"Meta's name in file": the piece of a parameter that belongs there}, and all (that, read()) in the files."""
    files, c, params = meta_files(folder), model.config, {}
    table = open_pickle(files[0])["tok_embeddings.weight"]
    for ours, p in model.named_parameters():
        (_, name, dim), layer = named(ours)
        if ours == "embed.weight" and table.shape[1] != c.dim:
            dim = 1
        pieces = [p] * len(files) if dim is None else p.detach().chunk(len(files), dim)
        params |= {f"{name.format(*layer)} in {file.name}": piece for file, piece in zip(files, pieces)}
    heads = {"wq": c.n_heads // len(files), "wk": c.n_kv_heads // len(files)}

    def read_all():
        for file in files:
            for name, read in open_tensors(file).items():
                if name == "rope.freqs" or c.tied and name == "output.weight":
                    continue
                part = name.split(".")[-2]
                yield f"{name} in {file.name}", partial(halve, read, heads[part]) if part in heads else read
    return params, read_all()


def halve(read, heads):
    """Rows of a query or key weight from interleaved rotary pairs (Meta) to halves (Hugging Face)."""
    w = read()
    if len(w) % (2 * heads):                # misshapen: fill says so
        return w
    return w.view(heads, len(w) // heads // 2, 2, -1).transpose(1, 2).reshape(w.shape)


def save_llama(model, folder, tokenizer_config=None):
    """Write the model as a Hugging Face directory (LoRA must be merged first)."""
    if lora_layers(model):
        raise ValueError("merge_lora before saving the whole model, or save_lora for the adapter alone")
    folder, c, s = pathlib.Path(folder), model.config, model.config.rope_scaling
    scaling = s and dict(rope_type="llama3", factor=s.factor, low_freq_factor=s.low_freq_factor,
                         high_freq_factor=s.high_freq_factor, original_max_position_embeddings=s.original_max_len)
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=c.dim, intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim, vocab_size=c.vocab_size, max_position_embeddings=c.max_len, rope_theta=c.rope_theta,
        rope_scaling=scaling, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied, hidden_act="silu",
        bos_token_id=None, eos_token_id=None,                                      # if silent, transformers says 1, 2
        torch_dtype=str(model.embed.weight.dtype).removeprefix("torch."))
    write_tensors(folder / "model.safetensors", {their_name(k, HUGGING_FACE): p for k, p in model.named_parameters()})
    write_json(folder / "config.json", config)
    if tokenizer_config is not None:
        write_json(folder / "tokenizer_config.json", tokenizer_config)


# ---------------------------------------------------------------------------------------------- files

def read_json(path):
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there") from None
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from None


def read_json_if_there(path):
    return read_json(path) if path.exists() else {}


def write_json(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def write_tensors(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: p.detach().contiguous() for k, p in tensors.items()}
    save_file(tensors, path.with_suffix(".tmp"), metadata={"format": "pt"})
    os.replace(path.with_suffix(".tmp"), path)


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there") from None
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is not a whole safetensors file ({e}); download it again") from None


def open_pickle(path):
    """A .bin or .pth file as {name: tensor}, without running any code in it; mapped, not read, where it is a zip."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is not there")
    try:
        # torch.save before 1.6 wrote no zip: such a file is read whole.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as e:
        code = re.search(r"GLOBAL (\S+)", str(e))
        if code:
            raise ValueError(f"{path} is refused: its pickle wants to run {code[1]}; use a safetensors file") from None
        reason = re.split(r"\n|\. ", str(e))[0] or "it ends too early"
        raise ValueError(f"{path} is not a whole PyTorch file ({reason}); download it again") from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f"{path} holds something else than named tensors; expected a model's state dict")
    return state


def open_tensors(path):
    """{name: function that reads the tensor} of a .safetensors, .bin or .pth file; to be read once each."""
    if path.suffix == ".safetensors":
        file = open_safetensors(path)
        return {name: partial(file.get_tensor, name) for name in file.keys()}
    state = open_pickle(path)
    return {name: partial(state.pop, name) for name in state}


# ---------------------------------------------------------------------------------------------- tokenizers
# All have: encode(text) -> ids, never a special one; decode(ids) -> text, specials left out; bos_id (None: no such
# token); stop_ids; special {name: id}; adds_space: whether encode puts a space before the text by itself.

LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")                     # of the text, a message, a turn


class ByteTokenizer:
    """Text as its UTF-8 bytes, ids 0-255, and a few specials behind them. What the tiny model reads."""
    adds_space = False
    SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                "<s>", "</s>")

    def __init__(self):
        self.special = {name: 256 + i for i, name in enumerate(self.SPECIALS)}
        self.bos_id = self.special["<|begin_of_text|>"]
        self.stop_ids = {self.special[s] for s in ("<|end_of_text|>", "<|eot_id|>", "</s>")}

    def encode(self, text):
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """tokenizer.model of Llama-2 and Vicuna. Text goes in as data: a typed "</s>" is spelled out, not the token."""

    def __init__(self, path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise ValueError(f"{path} is neither a SentencePiece model nor Llama-3's token list") from None
        controls = filter(self.model.is_control, range(self.model.vocab_size()))
        self.special = {self.model.id_to_piece(i): i for i in controls}
        self.bos_id, self.stop_ids = self.model.bos_id(), {self.model.eos_id()}
        self.adds_space = self.model.encode("a", out_type=str)[0].startswith("\u2581")

    def encode(self, text):
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode([i for i in ids if i < self.model.vocab_size() and not self.model.is_control(i)])


MAX_CHARS = 400_000                         # as Meta's tokenizer: tiktoken fails on very long texts


def pieces(text, max_run):
    """text cut every MAX_CHARS, and inside a run of more than max_run spaces, or of as many other characters."""
    for i in range(0, len(text), MAX_CHARS):
        part = text[i:i + MAX_CHARS]
        runs = re.finditer(r"\s+|\S+", part) if len(part) > max_run else ()
        cuts = [cut for run in runs for cut in range(run.start() + max_run, run.end(), max_run)]
        yield from (part[a:b] for a, b in zip([0, *cuts], [*cuts, len(part)]))


class BytePairs:
    """Byte-pair encoding run by tiktoken. ids[rank] is a token's id, None where the vocabulary has none."""
    adds_space = False
    max_run = MAX_CHARS

    def __init__(self, pattern, ranks, ids):
        self.bpe = tiktoken.Encoding("byte-pairs", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.id_of, self.rank_of = ids, {i: rank for rank, i in enumerate(ids)}

    def encode(self, text):
        ids = (self.id_of[rank] for piece in pieces(text, self.max_run) for rank in self.bpe.encode_ordinary(piece))
        return [i for i in ids if i is not None]

    def decode(self, ids):
        return self.bpe.decode([self.rank_of[i] for i in ids if i in self.rank_of])


class Llama3Tokenizer(BytePairs):
    """Meta's tokenizer.model: one line a token, base64 and rank (llama-models, llama3/tokenizer.py)."""
    max_run = 25_000
    PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
                "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
                "<|eot_id|>", "<|python_tag|>", "<|image|>",
                *(f"<|reserved_special_token_{i}|>" for i in range(2, 246))]

    def __init__(self, path):
        lines = pathlib.Path(path).read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
        super().__init__(self.PATTERN, ranks, range(len(ranks)))
        self.special = {name: len(ranks) + i for i, name in enumerate(self.SPECIALS)}
        self.bos_id = self.special["<|begin_of_text|>"]
        self.stop_ids = {self.special[name] for name in LLAMA3_STOPS}


# The characters with which GPT-2's byte-level BPE writes the 256 bytes: printable ones stand for themselves.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}


class ByteLevelTokenizer(BytePairs):
    """
    tokenizer.json of a byte-level BPE model (Hugging Face's Llama-3, SmolLM2).
    tiktoken merges the pair whose *result* has the lowest rank, Hugging Face the pair that stands first in `merges`: so
    the ranks made here are the 256 bytes, then the results of the merges in their order, whatever the ids are.
    Bytes that the vocabulary lacks are dropped, as by Hugging Face (which may merge what then stands together).
    """

    def __init__(self, path):
        t, config = read_json(path), read_json_if_there(pathlib.Path(path).parent / "tokenizer_config.json")
        pattern, model = split_pattern(t, path), t["model"]
        self.special = {a["content"]: a["id"] for a in t.get("added_tokens", [])}
        vocab = {token: i for token, i in model["vocab"].items() if token not in self.special}
        ids = {bytes(BYTE_OF[ch] for ch in token): i for token, i in vocab.items()}
        merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        tokens = [bytes([b]) for b in range(256)] + [bytes(BYTE_OF[ch] for ch in a + b) for a, b in merges]
        if model.get("ignore_merges"):      # a piece of text that is a token becomes it, even if no merges lead there
            tokens += ids
        ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
        super().__init__(pattern, ranks, [ids.get(token) for token in ranks])
        name = lambda key: config[key]["content"] if isinstance(config.get(key), dict) else config.get(key)
        self.bos_id = self.special.get(name("bos_token") or "<|begin_of_text|>")
        stops = (name("eos_token"), "</s>", "<|im_end|>", *LLAMA3_STOPS)
        self.stop_ids = {self.special[s] for s in stops if s in self.special}


# GPT-2's split, and the same where every digit is cut out first: spaces before a digit then end their piece.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_SPLIT = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def split_pattern(t, path):
    """What a tokenizer.json does before BPE, as one pattern for tiktoken; ValueError names what cannot be one."""
    pre = t.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    first, last, kinds = steps[0], steps[-1], [step.get("type") for step in steps]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space", True) and not t.get("normalizer"):
        by_gpt2 = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and by_gpt2:
            return GPT2_SPLIT
        if kinds == ["Digits", "ByteLevel"] and by_gpt2 and first["individual_digits"]:
            return DIGITS_SPLIT
        isolated = first.get("behavior") == "Isolated" and not first["invert"] and "Regex" in first["pattern"]
        if kinds == ["Split", "ByteLevel"] and isolated and not by_gpt2:
            return first["pattern"]["Regex"]
    raise ValueError(f"{path}: normalizer {t.get('normalizer')} with pre_tokenizer {pre} is not known; known are, "
                     "without normalizer, ByteLevel, Digits (each) + ByteLevel and Split (Regex, Isolated) + ByteLevel")


def load_tokenizer(path):
    """The tokenizer in a file or directory, its kind read from the content."""
    path = pathlib.Path(path)
    if path.is_dir():
        return load_tokenizer_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if path.suffix == ".json":
        return ByteLevelTokenizer(path)
    first = path.read_bytes()[:400].split(b"\n")[0]
    return Llama3Tokenizer(path) if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", first) else SentencePieceTokenizer(path)


def load_tokenizer_folder(folder):
    files = [folder / name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).exists()]
    if read_json_if_there(folder / "tokenizer_config.json").get("tokenizer_class") == "ByteTokenizer":
        return ByteTokenizer()
    if not files:
        raise FileNotFoundError(f"{folder} has no tokenizer.model and no tokenizer.json")
    tokenizer = load_tokenizer(files[0])
    stops = read_json_if_there(folder / "generation_config.json").get("eos_token_id") or []
    tokenizer.stop_ids |= set(stops if isinstance(stops, list) else [stops])
    return tokenizer
