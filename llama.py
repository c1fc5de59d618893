"""
Llama: the decoder of Llama-2/3, Vicuna, TinyLlama and SmolLM2, with its KV cache, LoRA, tokenizers and weight loaders.

    model, tokenizer = load_llama("Meta-Llama-3-8B-Instruct", dtype=torch.bfloat16), load_tokenizer("Meta-Llama-3-8B-Instruct")
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
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from safetensors import safe_open
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
    "tiny": LlamaConfig(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=384, vocab_size=264, max_len=2048,
                        tied=True),
}


def rope_frequencies(config, device=None):
    """The hd/2 angles a position adds, float32, slowed down as Llama-3.1 does when the config says so."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    freq = config.rope_theta ** (-half / config.head_dim)                          # (hd/2,)
    s = config.rope_scaling
    if s is None:
        return freq
    turns = s.original_max_len * freq / (2 * math.pi)                              # full turns in the old context
    smooth = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * freq / s.factor + smooth * freq


def rotate(x, cos, sin):
    """x: (B, n, T, hd); cos, sin: (T, hd) or (B, 1, T, hd), the two halves of hd alike."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
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

    def write(self, i, k, v):
        """Put k, v (B, nkv, T, hd) behind what each row holds; return all keys and values up to the longest row."""
        B, _, T, _ = k.shape
        end = self.filled + T
        if end > self.k.shape[3]:
            raise ValueError(f"KV cache holds {self.k.shape[3]} positions, {end} are needed; make it longer")
        if B == 1 or self.filled == 0:
            self.k[i, :, :, self.filled:end], self.v[i, :, :, self.filled:end] = k, v
        else:                               # rows of unequal length: each goes on at its own place
            rows = torch.arange(B, device=k.device)[:, None]
            at = self.lengths[:, None] + torch.arange(T, device=k.device)          # (B, T)
            self.k[i].transpose(1, 2)[rows, at] = k.transpose(1, 2)
            self.v[i].transpose(1, 2)[rows, at] = v.transpose(1, 2)
        return self.k[i, :, :, :end], self.v[i, :, :, :end]

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
        self.q = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.k = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.v = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.o = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x, rope, mask, cache=None, i=0):
        c, (B, T, _) = self.config, x.shape
        q = rotate(self.q(x).view(B, T, c.n_heads, c.head_dim).transpose(1, 2), *rope)       # (B, nh, T, hd)
        k = rotate(self.k(x).view(B, T, c.n_kv_heads, c.head_dim).transpose(1, 2), *rope)    # (B, nkv, T, hd)
        v = self.v(x).view(B, T, c.n_kv_heads, c.head_dim).transpose(1, 2)
        if cache is not None:
            first = cache.filled == 0
            keys, values = cache.write(i, k, v)
            if not first:
                k, v = keys, values
        # T queries over T keys: plain causal. One query of one row: sees all keys. Else the mask says which.
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                           enable_gqa=c.n_heads != c.n_kv_heads)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.up = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.down = nn.Linear(c.ffn_dim, c.dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(c.dim, c.norm_eps), Attention(c)
        self.mlp_norm, self.mlp = RMSNorm(c.dim, c.norm_eps), FeedForward(c)

    def forward(self, x, rope, mask, cache=None, i=0):
        x = x + self.attn(self.attn_norm(x), rope, mask, cache, i)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The decoder (Meta's llama3/llama/model.py). Weights start as N(0, 0.02)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.grad_checkpoint = False        # recompute each layer in the backward pass: less memory, a third more time
        for p in self.parameters():
            if p.dim() == 2 and not p.is_meta:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, cache=None, between=None, at=None):
        """
        in:  ids (B, T) long, or embeddings (B, T, D). With a cache, the positions that follow what it holds.
        between(i, x) -> x runs before layer i. at: an index into (B, T) that picks the positions to get logits.
        out: logits (B, T, vocab), or (n, vocab) for the n positions picked.
        """
        x = self.embed(x) if not x.is_floating_point() else x
        B, T, _ = x.shape
        rope, mask = self.positions(B, T, x, cache)
        for i, layer in enumerate(self.layers):
            if self.grad_checkpoint and self.training:
                x = checkpoint(self.run_layer, i, x, rope, mask, between, use_reentrant=False)
            else:
                x = self.run_layer(i, x, rope, mask, between, cache)
        if cache is not None:
            cache.advance(T)
        x = self.norm(x if at is None else x[at])
        return F.linear(x, self.embed.weight.to(x.dtype)) if self.head is None else self.head(x)

    def run_layer(self, i, x, rope, mask, between, cache=None):
        if between is not None:
            x = between(i, x)
        return self.layers[i](x, rope, mask, cache, i)

    def positions(self, B, T, x, cache):
        """-> (cos, sin) of the T new positions, and the mask (B, 1, T, keys), or None where none is needed."""
        new = torch.arange(T, device=x.device)
        mask = None
        if cache is not None and cache.filled:
            new = cache.lengths[:, None] + new                                     # (B, T)
            if T > 1 or B > 1:
                keys = torch.arange(cache.filled + T, device=x.device)
                mask = (keys <= new[..., None])[:, None]                           # (B, 1, T, keys)
        angle = new[..., None].float() * rope_frequencies(self.config, x.device)   # ([B,] T, hd/2)
        angle = torch.cat((angle, angle), dim=-1)
        if angle.dim() == 3:
            angle = angle[:, None]                                                 # (B, 1, T, hd): the same for all heads
        return (angle.cos().to(x.dtype), angle.sin().to(x.dtype)), mask


def pick(logits, temperature, top_p, generator=None):
    """logits (B, vocab) -> ids (B,): the best one at temperature 0, else a draw from the nucleus of mass top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                                # the first one always stays
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


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
            logits = model(ids[:, None], cache=cache)[:, -1]


# ---------------------------------------------------------------------------------------------- LoRA

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class LoRALinear(nn.Linear):
    """y = W x + (alpha / rank) B A dropout(x), W frozen (Hu et al. 2021). Shares the weight of the layer it replaces."""

    def __init__(self, linear, rank, alpha, dropout):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        self.rank, self.alpha, self.p = rank, alpha, dropout
        like = dict(dtype=torch.float32, device=linear.weight.device)              # trained in float32 over any base
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, **like))
        if not self.lora_a.is_meta:
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        low = F.linear(F.dropout(x, self.p, self.training), self.lora_a.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + F.linear(low, self.lora_b.to(x.dtype)) * (self.alpha / self.rank)


def lora_layers(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def apply_lora(model, rank=64, alpha=16, dropout=0.05, targets=LORA_TARGETS):
    """Replace, in place, the named linear layers of every block by LoRALinear."""
    unknown = set(targets) - set(LORA_TARGETS)
    if unknown or not targets:
        raise ValueError(f"LoRA targets {sorted(targets)}: expected some of {', '.join(LORA_TARGETS)}")
    if lora_layers(model):
        raise ValueError("this model has LoRA already; merge it first")
    for layer in model.layers:
        for block in (layer.attn, layer.mlp):
            for name in targets:
                if isinstance(getattr(block, name, None), nn.Linear):
                    setattr(block, name, LoRALinear(getattr(block, name), rank, alpha, dropout))
    return model


@torch.no_grad()
def merge_lora(model):
    """Fold every LoRA into its weight, in place: W + (alpha / rank) B A. The model is a plain Llama again."""
    for name, m in lora_layers(model):
        m.weight += ((m.alpha / m.rank) * (m.lora_b @ m.lora_a)).to(m.weight.dtype)
        plain = nn.Linear(m.in_features, m.out_features, bias=False, device="meta")
        plain.weight = m.weight
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    return model


# PEFT names the module by its Hugging Face path under "base_model.model."
def peft_name(name, part):
    layers, i, block, target = name.split(".")
    return f"base_model.model.model.layers.{i}.{dict(attn='self_attn', mlp='mlp')[block]}.{target}_proj.lora_{part}.weight"


def save_lora(model, folder):
    """Write adapter_config.json and adapter_model.safetensors, as PEFT does."""
    found = lora_layers(model)
    if not found:
        raise ValueError("this model has no LoRA to save; apply_lora first")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, m in found:
        tensors[peft_name(name, "A")] = m.lora_a.detach().contiguous()
        tensors[peft_name(name, "B")] = m.lora_b.detach().contiguous()
    targets = sorted({name.split(".")[-1] + "_proj" for name, _ in found})
    m = found[0][1]
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=m.rank, lora_alpha=m.alpha, lora_dropout=m.p, bias="none",
                  fan_in_fan_out=False, inference_mode=True, target_modules=targets, base_model_name_or_path=None)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


# An adapter_config.json with one of these set computes something else than LoRALinear does.
PEFT_REFUSED = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias",
                "layers_to_transform", "layer_replication", "megatron_config", "fan_in_fan_out", "trainable_token_indices",
                "exclude_modules", "target_parameters", "alora_invocation_tokens", "use_qalora")


def load_lora(model, folder):
    """Apply and fill the LoRA that PEFT (or save_lora) wrote to folder."""
    folder = pathlib.Path(folder)
    config = read_json(folder / "adapter_config.json")
    refused = [k for k in PEFT_REFUSED if config.get(k)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if config.get("peft_type", "LORA") != "LORA" or refused:
        raise ValueError(f"{folder}: adapter of type {config.get('peft_type')} with {refused or 'no options'}: only plain "
                         "LoRA without these options is read; merge the adapter with PEFT and load the merged model")
    targets = config["target_modules"]
    if isinstance(targets, str):
        raise ValueError(f"{folder}: target_modules is the pattern {targets!r}; a list of names such as q_proj is expected")
    apply_lora(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0),
               tuple(t.removesuffix("_proj") for t in targets))
    file = folder / "adapter_model.safetensors"
    wanted = {peft_name(name, part): p for name, m in lora_layers(model) for part, p in (("A", m.lora_a), ("B", m.lora_b))}
    fill(wanted, [(k, lambda k=k: f.get_tensor(k)) for f in [open_safetensors(file)] for k in f.keys()], str(file))
    return model


# ---------------------------------------------------------------------------------------------- weights

# Hugging Face's name -> ours; {} is the layer. None: left out on purpose.
HF_KEYS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attn.q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attn.k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attn.v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attn.o.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "layers.{}.mlp.gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "layers.{}.mlp.up.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.mlp.down.weight",
    "model.layers.{}.self_attn.rotary_emb.inv_freq": None,                         # old Vicuna files; computed here
}
# Meta's name -> (ours, the dimension along which the shards of a model split it; None: every shard holds all of it)
META_KEYS = {
    "tok_embeddings.weight": ("embed.weight", None),                               # Llama-2 splits dim 1, Llama-3 dim 0
    "norm.weight": ("norm.weight", None),
    "output.weight": ("head.weight", 0),
    "layers.{}.attention_norm.weight": ("layers.{}.attn_norm.weight", None),
    "layers.{}.attention.wq.weight": ("layers.{}.attn.q.weight", 0),
    "layers.{}.attention.wk.weight": ("layers.{}.attn.k.weight", 0),
    "layers.{}.attention.wv.weight": ("layers.{}.attn.v.weight", 0),
    "layers.{}.attention.wo.weight": ("layers.{}.attn.o.weight", 1),
    "layers.{}.ffn_norm.weight": ("layers.{}.mlp_norm.weight", None),
    "layers.{}.feed_forward.w1.weight": ("layers.{}.mlp.gate.weight", 0),
    "layers.{}.feed_forward.w3.weight": ("layers.{}.mlp.up.weight", 0),
    "layers.{}.feed_forward.w2.weight": ("layers.{}.mlp.down.weight", 1),
}
# params.json is silent about these; they stand in Meta's code (llama/model.py, llama3/model.py, llama-models rope_scaling).
META_ROPE = {"llama-2": 10000.0, "llama-3": 500000.0}
META_SCALED_ROPE = RopeScaling()


def read_json(path):
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there") from None
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from None


def open_safetensors(path):
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is not there")
    try:
        return safe_open(path, framework="pt")
    except (OSError, ValueError, RuntimeError) as e:
        raise ValueError(f"{path} is not a safetensors file: {e}") from None
    except BaseException as e:              # safetensors' own error derives from Exception directly
        if type(e).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{path} is not a whole safetensors file: {e}") from None


def open_pickle(path):
    """A .bin or .pth file as a dict of tensors, without running any code in it, mapped rather than read where it can be."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is not there")
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:                # the format before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path} holds more than tensors and is not opened, since it could run code "
                         f"({str(e).splitlines()[0]}); convert it to safetensors where you trust it") from None
    except (RuntimeError, EOFError) as e:
        raise ValueError(f"{path} is not a whole PyTorch file: {str(e).splitlines()[0]}") from None


def named(template_keys, n_layers):
    """{their name: our name}, the table above written out for every layer."""
    return {k.format(i): v and v.format(i) for k, v in template_keys.items() for i in (range(n_layers) if "{}" in k else [0])}


def problems(source, missing, unexpected, misshapen):
    """One error that lists what does not fit, the first five of each; nothing when all fits."""
    parts = [f"{len(names)} {what}: {', '.join(map(str, list(names)[:5]))}{' ...' if len(names) > 5 else ''}"
             for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)) if names]
    if parts:
        raise ValueError(f"{source} does not fit the model: " + "; ".join(parts))


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
    problems(source, missing, unexpected, misshapen)


def hf_config(folder):
    """config.json of a Hugging Face directory -> LlamaConfig."""
    c = read_json(folder / "config.json")
    if c.get("model_type", "llama") != "llama":
        raise ValueError(f"{folder / 'config.json'}: model_type {c['model_type']!r}; only Llama-architecture models are read")
    if c.get("attention_bias") or c.get("mlp_bias") or c.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder / 'config.json'}: biases or an activation other than SiLU are not Llama's")
    scaling = c.get("rope_scaling") or c.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{folder / 'config.json'}: rope_scaling of type {kind!r}; default and llama3 are known")
    rope = None if kind == "default" else RopeScaling(
        scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["original_max_position_embeddings"])
    try:
        return LlamaConfig(
            dim=c["hidden_size"], n_layers=c["num_hidden_layers"], n_heads=c["num_attention_heads"],
            n_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"], ffn_dim=c["intermediate_size"],
            vocab_size=c["vocab_size"], rope_theta=float(c.get("rope_theta") or scaling.get("rope_theta") or 10000.0),
            norm_eps=c.get("rms_norm_eps", 1e-6), head_dim=c.get("head_dim") or 0,
            max_len=c.get("max_position_embeddings", 2048), tied=bool(c.get("tie_word_embeddings", False)), rope_scaling=rope)
    except KeyError as e:
        raise ValueError(f"{folder / 'config.json'} has no {e.args[0]!r}") from None


def hf_tensors(folder):
    """Yield (name, read()) of every tensor in a Hugging Face directory, shard by shard."""
    for pattern, index in (("*.safetensors", "model.safetensors.index.json"), ("pytorch_model*.bin", "pytorch_model.bin.index.json")):
        if (folder / index).exists():
            files = [folder / f for f in sorted(set(read_json(folder / index)["weight_map"].values()))]
        else:
            files = sorted(f for f in folder.glob(pattern) if not f.name.startswith(("adapter_", "consolidated")))
        for file in files:
            if file.suffix == ".safetensors":
                with open_safetensors(file) as f:
                    yield from ((k, lambda k=k: f.get_tensor(k)) for k in f.keys())
            else:
                state = open_pickle(file)
                yield from ((k, lambda k=k: state[k]) for k in state)
        if files:
            return
    raise FileNotFoundError(f"{folder} holds no model*.safetensors and no pytorch_model*.bin")


def empty_llama(config, dtype, device):
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    return model.to_empty(device=device).eval()


def load_hf(folder, dtype, device):
    config = hf_config(folder)
    model = empty_llama(config, dtype, device)
    keys, params = named(HF_KEYS, config.n_layers), dict(model.named_parameters())
    if config.tied:
        keys["lm_head.weight"] = None       # some files repeat the embedding under this name
    tensors = ((keys.get(k, f"{k} (theirs)"), read) for k, read in hf_tensors(folder))
    fill(params, ((k, read) for k, read in tensors if k is not None), str(folder))
    return model


def meta_config(folder, shards):
    """params.json and the shapes in the shards -> LlamaConfig."""
    p, one, n = read_json(folder / "params.json"), shards[0], len(shards)
    dim, heads = p["dim"], p["n_heads"]
    table = one["tok_embeddings.weight"].shape
    vocab = one["output.weight"].shape[0] * n                                      # Llama-2 writes vocab_size -1
    if p.get("vocab_size", -1) not in (-1, vocab) or table not in ((vocab, dim // n), (vocab // n, dim)):
        raise ValueError(f"{folder}: params.json says vocab_size {p.get('vocab_size')} and dim {dim}, the {n} shards hold an "
                         f"embedding of {tuple(table)} each and {vocab} outputs")
    family = "llama-3" if vocab >= 100000 else "llama-2"
    config = LlamaConfig(
        dim=dim, n_layers=p["n_layers"], n_heads=heads, n_kv_heads=p.get("n_kv_heads") or heads, vocab_size=vocab,
        ffn_dim=one["layers.0.feed_forward.w1.weight"].shape[0] * n, norm_eps=p["norm_eps"],
        rope_theta=p.get("rope_theta", META_ROPE[family]), max_len=8192 if family == "llama-3" else 4096,
        rope_scaling=META_SCALED_ROPE if p.get("use_scaled_rope") else None)
    freqs = one.get("rope.freqs")
    if freqs is not None and not torch.allclose(freqs.float(), rope_frequencies(config), rtol=1e-2):
        raise ValueError(f"{folder}: rope.freqs in the file contradicts rope_theta {config.rope_theta:g}")
    return config


def load_meta(folder, dtype, device):
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{folder} has params.json but no consolidated.*.pth")
    shards = [open_pickle(f) for f in files]
    config = meta_config(folder, shards)
    model = empty_llama(config, dtype, device)
    params, n = dict(model.named_parameters()), len(shards)
    dims = {k: dim for k, (_, dim) in META_KEYS.items()}
    dims["tok_embeddings.weight"] = 0 if shards[0]["tok_embeddings.weight"].shape[1] == config.dim else 1
    keys = {k.format(i): (ours.format(i), dims[k]) for k, (ours, _) in META_KEYS.items()
            for i in (range(config.n_layers) if "{}" in k else [0])}
    wanted, tensors = {}, []
    for theirs, (ours, dim) in keys.items():
        whole = params[ours]
        pieces = [whole] if dim is None or n == 1 else whole.chunk(n, dim)         # views: a shard goes to its place
        for j, piece in enumerate(pieces):
            wanted[f"{theirs} of shard {j}"] = piece
    for j, shard in enumerate(shards):
        for theirs in shard:
            if theirs == "rope.freqs" or (j and theirs in keys and keys[theirs][1] is None):
                continue                    # recomputed; or the same in every shard
            heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(theirs.split(".")[-2], 0) // n
            tensors.append((f"{theirs} of shard {j}", lambda shard=shard, k=theirs, h=heads: halve(shard[k], h)))
    fill(wanted, tensors, str(folder))
    return model


def halve(w, heads):
    """Rows of a query or key weight from interleaved rotary pairs (Meta) to halves (Hugging Face); heads 0: as it is."""
    if not heads:
        return w
    return w.view(heads, w.shape[0] // heads // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def load_llama(folder, dtype=torch.float32, device="cpu"):
    """
    Read a Llama-architecture model from a Hugging Face directory (config.json) or Meta's (params.json), one tensor at a
    time, into dtype on device. ValueError names every missing, unexpected or misshapen tensor.
    """
    folder = pathlib.Path(folder)
    if (folder / "config.json").exists():
        return load_hf(folder, dtype, device)
    if (folder / "params.json").exists():
        return load_meta(folder, dtype, device)
    raise FileNotFoundError(f"{folder} has neither config.json (Hugging Face) nor params.json (Meta)")


def save_llama(model, folder, tokenizer_config=None):
    """Write the model as a Hugging Face directory (LoRA must be merged first)."""
    if lora_layers(model):
        raise ValueError("merge_lora before saving the whole model, or save_lora for the adapter alone")
    folder, c = pathlib.Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    theirs = {ours: k for k, ours in named(HF_KEYS, c.n_layers).items() if ours}
    save_file({theirs[k]: p.detach().contiguous() for k, p in model.named_parameters()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    rope = c.rope_scaling and dict(rope_type="llama3", factor=c.rope_scaling.factor,
                                   low_freq_factor=c.rope_scaling.low_freq_factor,
                                   high_freq_factor=c.rope_scaling.high_freq_factor,
                                   original_max_position_embeddings=c.rope_scaling.original_max_len)
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=c.dim, intermediate_size=c.ffn_dim,
                  num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
                  head_dim=c.head_dim, vocab_size=c.vocab_size, max_position_embeddings=c.max_len, rope_theta=c.rope_theta,
                  rope_scaling=rope, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied, hidden_act="silu", torch_dtype=dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if tokenizer_config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1))


# ---------------------------------------------------------------------------------------------- tokenizers
# All have: encode(text) -> ids, never a special one; decode(ids) -> text, specials left out; bos_id (None: no such
# token); stop_ids; special {name: id}; adds_space: whether encode puts a space before the text by itself.

class ByteTokenizer:
    """Text as its UTF-8 bytes, ids 0-255, and a few specials behind them. What the tiny model reads."""
    adds_space = False
    SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>")

    def __init__(self):
        self.special = {name: 256 + i for i, name in enumerate(self.SPECIALS)}
        self.bos_id = self.special["<|begin_of_text|>"]
        self.stop_ids = {self.special[s] for s in ("<|end_of_text|>", "<|eot_id|>", "</s>")}

    def encode(self, text):
        return list(text.encode("utf-8"))

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class Llama3Tokenizer:
    """Meta's tokenizer.model: one line a token, base64 and rank (llama3/tokenizer.py)."""
    adds_space = False
    PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    NAMES = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
             "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
             "<|eot_id|>", "<|python_tag|>"]

    def __init__(self, path):
        lines = pathlib.Path(path).read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
        names = self.NAMES + [f"<|reserved_special_token_{i}|>" for i in range(2, 256 - len(self.NAMES) + 2)]
        self.special = {name: len(ranks) + i for i, name in enumerate(names)}
        self.model = BytePairs(self.PATTERN, ranks, self.special)
        self.bos_id = self.special["<|begin_of_text|>"]
        self.stop_ids = {self.special[s] for s in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")}

    def encode(self, text):
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode(ids)


class BytePairs:
    """tiktoken, fed in pieces: its regular expressions slow down, then fail, on very long runs of one kind of character."""
    MAX_CHARS, MAX_RUN = 400_000, 25_000    # Meta's numbers (llama3/tokenizer.py)

    def __init__(self, pattern, ranks, special):
        import tiktoken
        self.bpe = tiktoken.Encoding("byte-pairs", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.is_special = set(special.values())

    def pieces(self, text):
        for i in range(0, len(text), self.MAX_CHARS):
            part = text[i:i + self.MAX_CHARS]
            start = run = 0
            for j, ch in enumerate(part):
                run = run + 1 if j and ch.isspace() == part[j - 1].isspace() else 1
                if run > self.MAX_RUN:
                    yield part[start:j]
                    start, run = j, 1
            yield part[start:]

    def encode(self, text):
        return [t for piece in self.pieces(text) for t in self.bpe.encode_ordinary(piece)]

    def decode(self, ids):
        return self.bpe.decode([i for i in ids if i not in self.is_special])


class SentencePieceTokenizer:
    """tokenizer.model of Llama-2 and Vicuna. Text goes in as data: a typed "</s>" is spelled out, not the token."""
    adds_space = True

    def __init__(self, path):
        import sentencepiece
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.special = {self.model.id_to_piece(i): i for i in range(self.model.vocab_size()) if self.model.is_control(i)}
        self.bos_id, self.stop_ids = self.model.bos_id(), {self.model.eos_id()}

    def encode(self, text):
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode([i for i in ids if not self.model.is_control(i)])


# The characters with which GPT-2's byte-level BPE writes the 256 bytes: printable ones stand for themselves.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class ByteLevelTokenizer:
    """tokenizer.json of a byte-level BPE model (Hugging Face Llama-3, SmolLM2), run by tiktoken."""
    adds_space = False

    def __init__(self, path):
        t = read_json(path)
        vocab, added = t["model"]["vocab"], t.get("added_tokens", [])
        self.special = {a["content"]: a["id"] for a in added}
        self.splits, self.pattern = split_pattern(t.get("pre_tokenizer"), path)
        ranks = {bytes(BYTE_OF[ch] for ch in token): i for token, i in vocab.items() if token not in self.special}
        self.known = {b for token in ranks if len(token) == 1 for b in token}
        self.ids_of_ranks, ranks = merge_order(t["model"]["merges"], ranks)
        self.model = BytePairs(self.pattern, ranks, {})
        self.rank_of_ids = {v: k for k, v in self.ids_of_ranks.items()}
        config = pathlib.Path(path).parent / "tokenizer_config.json"
        config = read_json(config) if config.exists() else {}
        name = lambda key: (config.get(key) or {}).get("content") if isinstance(config.get(key), dict) else config.get(key)
        self.bos_id = self.special.get(name("bos_token"))
        stops = [name("eos_token"), "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>"]
        self.stop_ids = {self.special[s] for s in stops if s in self.special}

    def encode(self, text):
        pieces = [text]
        for split in self.splits:
            pieces = [p for piece in pieces for p in re.split(split, piece) if p]
        if len(self.known) < 256:           # a vocabulary without some bytes: they are dropped, as Hugging Face does
            return [i for p in pieces for i in self.encode_known(p)]
        return [self.ids_of_ranks[r] for p in pieces for r in self.model.encode(p)]

    def encode_known(self, piece):
        out = []
        for r in self.model.encode(piece):
            i = self.ids_of_ranks.get(r)
            out += [] if i is None else [i]
        return out

    def decode(self, ids):
        return self.model.decode([self.rank_of_ids[i] for i in ids if i in self.rank_of_ids])


def merge_order(merges, ids):
    """
    tiktoken merges the pair whose *result* has the lowest rank; Hugging Face the pair that stands first in `merges`.
    Ranks are therefore: the single bytes, then the results of the merges in order. -> ({rank: id}, {token: rank})
    """
    ranks = {bytes([b]): b for b in range(256)}
    for merge in merges:
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        token = bytes(BYTE_OF[ch] for ch in a + b)
        ranks.setdefault(token, len(ranks))
    return {r: ids[token] for token, r in ranks.items() if token in ids}, ranks


def split_pattern(pre, path):
    """A tokenizer.json's pre_tokenizer -> (patterns whose matches are cut out first, the pattern for tiktoken)."""
    cuts, pattern = [], None
    for step in (pre or {}).get("pretokenizers", [pre] if pre else []):
        kind = step["type"]
        if kind == "Digits":
            cuts.append(r"(\d)" if step["individual_digits"] else r"(\d+)")
        elif kind == "Split" and "Regex" in step["pattern"] and step["behavior"] == "Isolated" and not step.get("invert"):
            pattern = step["pattern"]["Regex"]
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            pattern = GPT2_SPLIT if step.get("use_regex", True) else pattern
        else:
            raise ValueError(f"{path}: pre_tokenizer {step} is not known; Digits, Split (Regex, Isolated) and ByteLevel are")
    if pattern is None:
        raise ValueError(f"{path}: the pre_tokenizer has no pattern to split by")
    return cuts, pattern


def load_tokenizer(path):
    """The tokenizer in a file or directory, its kind read from the content."""
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
            if (path / name).exists() and (name != "tokenizer.json" or is_byte_level(path / name)):
                return load_tokenizer(path / name)
        raise FileNotFoundError(f"{path} has no tokenizer.model and no tokenizer.json of a byte-level BPE model")
    if path.name == "tokenizer_config.json":
        if read_json(path).get("tokenizer_class") == "ByteTokenizer":
            return ByteTokenizer()
        raise FileNotFoundError(f"{path.parent} has no tokenizer.model and no tokenizer.json of a byte-level BPE model")
    if path.suffix == ".json":
        return ByteLevelTokenizer(path)
    first = path.read_bytes()[:64].split(b"\n")[0]
    return Llama3Tokenizer(path) if re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+", first) else SentencePieceTokenizer(path)


def is_byte_level(path):
    t = read_json(path)
    return t.get("model", {}).get("type") == "BPE" and not t["model"].get("byte_fallback")
