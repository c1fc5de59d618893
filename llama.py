"""
Llama: the decoder of Llama-2/3, Vicuna and SmolLM2 (mirrors Meta's llama3/llama/model.py) and its weight loaders.

    model, tokenizer = load_llama(folder, dtype=torch.bfloat16), load_tokenizer(folder)
    prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("The capital of France is")]])
    for ids in generate(model, model.embed(prompt), stop_ids=tokenizer.stop_ids): ...

Three decisions to know before reading:
- Rotary pairs are (i, i + hd/2), Hugging Face's order; Meta's files interleave them and are re-ordered when loaded.
- Batches are padded on the right, always. Under a causal mask a real token never sees the padding, so prompts of
  unequal length need no mask; in decoding each row goes on at its own length.
- `before_layer(i, x) -> x` may change the hidden states before layer i: this is how Aquila's MDA enters.

Shapes: B batch, T sequence, D width, nh/nkv/hd query heads, key-value heads, width of a head.
"""
import math
import pathlib
import re
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from files.checked_json import Fields, make_config, read_fields
from files.peft import load_lora, save_lora         # noqa: F401    this and those below may be imported from here
from files.text import one_line, write_json
from files.weights import fill_new, open_pickle, open_tensors, weight_files, write_tensors
from lora import LORA_TARGETS, apply_lora, lora_layers, merge_lora        # noqa: F401
from tokenizer import load_tokenizer                # noqa: F401

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
        if self.n_heads % self.n_kv_heads or self.head_dim % 2 or not 1 < self.head_dim <= 4096 or self.n_layers > 1000:
            raise ValueError(f"{self}: expected at most 1,000 layers, heads of an even width, in groups of one size")


LLAMAS = {
    "llama-3-8b": LlamaConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336, vocab_size=128256,
                              rope_theta=500000.0),
    "vicuna-7b": LlamaConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, ffn_dim=11008, vocab_size=32000,
                             max_len=4096),
    "small": LlamaConfig(dim=256, n_layers=6, n_heads=4, n_kv_heads=2, ffn_dim=768, vocab_size=2048, max_len=2048,
                         tied=True),
    "tiny": LlamaConfig(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=384, vocab_size=701, max_len=2048,
                        tied=True),
}


def rope_frequencies(config, device=None):
    """
    The hd/2 angles that one position adds, slowed down as Llama-3.1 does when the config says so. In float32 and in the
    order of Meta's code: the last bit of a frequency is a difference of 0.4 % in a cosine at position 100,000.
    """
    freq = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return freq                                                                # (hd/2,)
    turns = s.original_max_len / (2 * math.pi / freq)                              # full turns in the old context
    smooth = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * freq / s.factor + smooth * freq


def rotary(config, positions, dtype):
    """positions (B, T) -> (cos, sin), each (B, 1, T, hd), the two halves of hd alike."""
    angle = positions[..., None].float() * rope_frequencies(config, positions.device)            # (B, T, hd/2)
    angle = torch.cat((angle, angle), dim=-1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """x (B, n, T, hd): each pair of coordinates (i, i + hd/2) turned by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def at_least_float32(x):
    """bfloat16 is too coarse for a sum; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = at_least_float32(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight.to(x.dtype)


class KVCache:
    """Keys and values of every layer, (layers, B, nkv, max_len, hd), and how many positions of each row are real."""

    def __init__(self, config, batch, max_len, dtype, device):
        shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.filled = 0                     # the longest row, as a plain number, so that nothing waits for a GPU

    def next_positions(self, T):
        """The positions (B, T) of each row's next T tokens."""
        max_len = self.k.shape[3]
        if self.filled + T > max_len:
            raise ValueError(f"KV cache holds {max_len} positions, {self.filled + T} are needed; make it longer")
        return self.lengths[:, None] + torch.arange(T, device=self.k.device)

    def mask(self, positions):
        """Which keys each new position sees, (B, 1, T, keys); None: all before it (empty cache), or all there are."""
        B, T = positions.shape
        if self.filled == 0 or B * T == 1:
            return None
        key = torch.arange(self.filled + T, device=positions.device)
        return (key <= positions[..., None])[:, None]

    def store(self, i, positions, k, v):
        """Layer i's new keys and values (B, nkv, T, hd) -> those of all positions so far, (B, nkv, keys, hd)."""
        end = self.filled + k.shape[2]
        keys, values = self.k[i, :, :, :end], self.v[i, :, :, :end]
        if len(k) == 1 or self.filled == 0:
            keys[:, :, self.filled:] = k
            values[:, :, self.filled:] = v
            return keys, values
        rows = torch.arange(len(k), device=k.device)[:, None]                      # each row at its own place
        keys.transpose(1, 2)[rows, positions] = k.transpose(1, 2)
        values.transpose(1, 2)[rows, positions] = v.transpose(1, 2)
        return keys, values

    def advance(self, by):
        self.lengths = self.lengths + by
        self.filled += by

    def set_lengths(self, lengths):
        """After a prompt padded on the right: row b really holds lengths[b] positions; the rest is overwritten."""
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

    def forward(self, x, rope, mask=None, store=None):
        """
        x (B, T, D); rope: cos, sin, each (B, 1, T, hd); mask (B, 1, T, keys), True: the key is seen; None: causal.
        store: takes the new keys and values, returns those of all positions (KVCache.store).
        """
        B, T, _ = x.shape
        hd = self.config.head_dim
        q = self.q(x).view(B, T, -1, hd).transpose(1, 2)                           # (B, nh, T, hd)
        k = self.k(x).view(B, T, -1, hd).transpose(1, 2)                           # (B, nkv, T, hd)
        v = self.v(x).view(B, T, -1, hd).transpose(1, 2)                           # (B, nkv, T, hd)
        q = rotate(q, *rope)
        k = rotate(k, *rope)
        if store is not None:
            k, v = store(k, v)                                                     # (B, nkv, keys, hd)
        causal = mask is None and T > 1     # one query without a mask sees all keys
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        y = y.transpose(1, 2).reshape(B, T, -1)                                    # (B, nh, T, hd) -> (B, T, nh*hd)
        return self.o(y)


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

    def forward(self, x, rope, mask=None, store=None):
        x = x + self.attn(self.attn_norm(x), rope, mask, store)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The decoder. Weights start as N(0, 0.02)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # nn.Embedding() would draw a random start first: seconds, even on the meta device.
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.grad_checkpoint = False        # recompute each layer in the backward pass: less memory, a third more time
        for p in self.parameters():
            if p.dim() == 2 and not p.is_meta:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, cache=None, before_layer=None, at=None):
        """
        in:  ids (B, T) long, or embeddings (B, T, D). With a cache, the positions that follow what it holds.
             before_layer(i, x) -> x runs before layer i. at: an index into (B, T), the positions that get logits.
        out: logits (B, T, vocab), or (n, vocab) for the n positions that `at` picks.
        """
        x = x if x.is_floating_point() else self.embed(x)
        T = x.shape[1]
        positions = torch.arange(T, device=x.device)[None] if cache is None else cache.next_positions(T)
        rope = rotary(self.config, positions, x.dtype)
        mask = None if cache is None else cache.mask(positions)
        for i in range(len(self.layers)):
            store = None if cache is None else partial(cache.store, i, positions)
            if self.grad_checkpoint and self.training:
                x = checkpoint(self.run_layer, i, x, rope, mask, store, before_layer, use_reentrant=False)
            else:
                x = self.run_layer(i, x, rope, mask, store, before_layer)
        if cache is not None:
            cache.advance(T)
        x = self.norm(x if at is None else x[at])
        return F.linear(x, self.output_weight())

    def run_layer(self, i, x, rope, mask, store, before_layer):
        if before_layer is not None:
            x = before_layer(i, x)
        return self.layers[i](x, rope, mask, store)

    def output_weight(self):                # (vocab, D)
        return self.embed.weight if self.head is None else self.head.weight


# ---------------------------------------------------------------------------------------------- generation

def next_tokens(logits, temperature, top_p, generator=None):
    """logits (B, vocab) -> ids (B,): the best one at temperature 0, else a draw from the nucleus of mass top_p."""
    if temperature < 1e-6:                  # below, the best one has all the mass
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                                # the first one always stays
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


def plain_step(model, ids, cache):
    """One more token of each row: ids (B,) -> logits (B, vocab) of the next."""
    return model(ids[:, None], cache=cache)[:, -1]


@torch.inference_mode()
def generate(model, x, lengths=None, max_new_tokens=256, stop_ids=(), temperature=0.0, top_p=1.0, before_layer=None,
             generator=None, next_logits=plain_step):
    """
    in:  x (B, T, D) embeddings of prompts padded on the right, lengths (B,) their true lengths (default: all T).
         before_layer reaches the prompt only (MDA acts on image positions, and those are all in the prompt).
         next_logits: plain_step, or fast_decoding.fastest_step(model, x), which gives the same tokens sooner.
    out: yields a (B,) long tensor a step; -1 for rows that have stopped. The stop token itself is not yielded.
    """
    B, T, _ = x.shape
    lengths = torch.full((B,), T, device=x.device) if lengths is None else lengths.to(x.device)
    last = torch.arange(B, device=x.device), lengths - 1
    cache = KVCache(model.config, B, T + max_new_tokens, x.dtype, x.device)
    logits = model(x, cache=cache, before_layer=before_layer, at=last)             # (B, vocab)
    cache.set_lengths(lengths)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=x.device)
    running = torch.ones(B, dtype=torch.bool, device=x.device)
    for step in range(max_new_tokens):
        ids = next_tokens(logits, temperature, top_p, generator)
        running = running & ~torch.isin(ids, stops)
        if not running.any():
            return
        yield ids.masked_fill(~running, -1)
        if step + 1 < max_new_tokens:
            logits = next_logits(model, ids, cache)


# ---------------------------------------------------------------------------------------------- published weights

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


def names_of(ours):
    """Our name of a parameter -> its row in NAMES, with the number of its layer filled in."""
    hugging_face, meta, split = NAMES[re.sub(r"\d+", "{}", ours)]
    layer = re.findall(r"\d+", ours)
    return hugging_face.format(*layer), meta.format(*layer), split


def load_llama(folder, dtype=torch.float32, device="cpu"):
    """
    Read a Llama-architecture model from a Hugging Face folder (config.json) or Meta's (params.json), one tensor at a
    time, into dtype on device. One ValueError names the first five missing, unexpected and misshapen tensors each.
    """
    folder = pathlib.Path(folder)
    if (folder / "config.json").exists():
        read_config, open_files = hf_config, hf_tensors
    elif (folder / "params.json").exists():
        read_config, open_files = meta_config, meta_tensors
    else:
        raise FileNotFoundError(one_line(f"{folder} has neither config.json (Hugging Face) nor params.json (Meta)"))
    config = read_config(folder)
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    return fill_new(model, device, *open_files(folder, config), folder)


def save_llama(model, folder):
    """Write the model as a Hugging Face folder (LoRA must be merged first)."""
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
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", {names_of(k)[HUGGING_FACE]: p for k, p in model.named_parameters()})
    write_json(folder / "config.json", config)


def hf_config(folder):
    """config.json -> LlamaConfig. What older files leave out has the value that transformers gives it."""
    c = read_fields(folder / "config.json")
    scaling = c.take("rope_scaling" if c.values.get("rope_scaling") else "rope_parameters", Fields, default=Fields({}))
    kind = scaling.values.get("rope_type", scaling.values.get("type", "default"))
    known = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    wrong = [f"{key} {c.values[key]!r}" for key, value in known.items() if c.values.get(key, value) != value]
    wrong += [f"rope_scaling of type {kind!r}"] if kind not in ("default", "llama3") else []
    if wrong:
        raise ValueError(one_line(f"{c.where}: {', '.join(wrong)}: only models of Llama's architecture are read"))
    stretched = None
    if kind == "llama3":
        low = scaling.take("low_freq_factor", float, 0.01)
        stretched = dict(factor=scaling.take("factor", float, 1), low_freq_factor=low,
                         high_freq_factor=scaling.take("high_freq_factor", float, low + 0.01),
                         original_max_len=scaling.take("original_max_position_embeddings", int, 1))
    heads = c.take("num_attention_heads", int, 1)
    return make_config(LlamaConfig, dict(
        dim=c.take("hidden_size", int, 1), n_layers=c.take("num_hidden_layers", int, 1), n_heads=heads,
        n_kv_heads=c.take("num_key_value_heads", int, 1, default=heads), ffn_dim=c.take("intermediate_size", int, 1),
        vocab_size=c.take("vocab_size", int, 1), norm_eps=c.take("rms_norm_eps", float, 1e-12, 0.1, 1e-6),
        rope_theta=float(c.take("rope_theta", float, 1, default=scaling.take("rope_theta", float, 1, default=10000))),
        head_dim=c.take("head_dim", int, default=0), tied=c.take("tie_word_embeddings", bool, default=False),
        max_len=c.take("max_position_embeddings", int, 1, default=2048), rope_scaling=stretched), c.where)


def hf_tensors(folder, config):
    """-> a function that names a model's parameters as Hugging Face does, and all (name, StoredTensor) of the files."""
    # In old Vicuna files, and computed here; the embedding once more.
    left_out = ("rotary_emb.inv_freq", "lm_head.weight") if config.tied else ("rotary_emb.inv_freq",)
    stored = [(name, tensor) for file in weight_files(folder) for name, tensor in open_tensors(file).items()
              if not name.endswith(left_out)]
    return lambda model: {names_of(ours)[HUGGING_FACE]: p for ours, p in model.named_parameters()}, stored


# Meta's params.json is silent about these; they stand in its code (model.py of llama, llama3 and llama-models).
META_THETA = {"Llama-2": 10000.0, "Llama-3": 500000.0}
META_SCALING = {"3.1": {"factor": 8.0}, "3.2": {"factor": 32.0}}


def meta_config(folder):
    """params.json and the first shard -> LlamaConfig."""
    params, files = read_fields(folder / "params.json"), meta_files(folder)
    first, shards = open_pickle(files[0]), len(files)
    dim, heads = params.take("dim", int, 1), params.take("n_heads", int, 1)
    kv_heads = params.take("n_kv_heads", int, 1, default=heads)
    none = torch.empty(0, 0)                # what is missing does not fit, and is named when the files are read
    table, gate = first.get("tok_embeddings.weight", none), first.get("layers.0.feed_forward.w1.weight", none)
    rows, columns = table.shape if table.dim() == 2 else none.shape
    vocab = rows * shards if columns == dim else rows          # Llama-3's shards split the rows, Llama-2's the columns
    told = params.take("vocab_size", int, -1, default=-1)      # -1 is what Llama-2 writes
    if dim not in (columns, columns * shards) or told not in (-1, vocab) or kv_heads % shards:
        raise ValueError(f"{params.where}: dim {dim}, vocab_size {told} and {kv_heads} key-value heads do "
                         f"not fit {shards} files, the first with an embedding of {tuple(table.shape)}; is a shard "
                         "missing?")
    family = "Llama-3" if vocab > 100000 else "Llama-2"
    scaling, max_len = None, 8192 if family == "Llama-3" else 4096
    if params.take("use_scaled_rope", bool, default=False):
        # Meta's code knows the factor 8 alone; its 3.2 models of 1B and 3B were trained with 32 (their config.json).
        scaling, max_len = META_SCALING["3.2" if dim < 4096 else "3.1"], 131072
    output = first.get("output.weight")                                            # Llama-3.2: the embedding again
    config = make_config(LlamaConfig, dict(
        dim=dim, n_layers=params.take("n_layers", int, 1), n_heads=heads, n_kv_heads=kv_heads, vocab_size=vocab,
        norm_eps=params.take("norm_eps", float, 1e-12, 0.1), ffn_dim=max(1, gate.numel() // dim) * shards,
        rope_theta=float(params.take("rope_theta", float, 1, default=META_THETA[family])), rope_scaling=scaling,
        max_len=max_len, tied=output is None or output.data_ptr() == table.data_ptr()), params.where)
    freqs, ours = first.get("rope.freqs"), rope_frequencies(config)
    if freqs is not None and (freqs.shape != ours.shape or not torch.allclose(freqs.float(), ours, 1e-2, 1e-6)):
        raise ValueError(f"{files[0]}: rope.freqs contradicts rope_theta {config.rope_theta:g} and scaling {scaling}")
    return config


def meta_files(folder):
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{folder} has params.json, but no consolidated.*.pth")
    return files


def meta_tensors(folder, config):
    """-> a function that gives {"Meta's name in file": the piece of a parameter}, and all (that, StoredTensor)."""
    files, c, stored = meta_files(folder), config, []
    split_columns = open_pickle(files[0])["tok_embeddings.weight"].shape[1] != c.dim             # Llama-2

    def named(model):
        targets = {}
        for ours, p in model.named_parameters():
            _, name, split = names_of(ours)
            split = 1 if ours == "embed.weight" and split_columns else split
            pieces = [p] * len(files) if split is None else p.detach().chunk(len(files), split)
            targets |= {f"{name} in {file.name}": piece for file, piece in zip(files, pieces)}
        return targets

    heads = {"wq": c.n_heads // len(files), "wk": c.n_kv_heads // len(files)}
    for file in files:
        for name, tensor in open_tensors(file).items():
            part = name.split(".")[-2:][0]
            if part in heads:
                tensor = replace(tensor, read=partial(deinterleave, tensor.read, heads[part]))
            if name != "rope.freqs" and not (c.tied and name == "output.weight"):
                stored.append((f"{name} in {file.name}", tensor))
    return named, stored


def deinterleave(read, heads):
    """Rows of a query or key weight from interleaved rotary pairs (Meta) to halves (Hugging Face)."""
    w = read()
    return w.view(heads, len(w) // heads // 2, 2, -1).transpose(1, 2).reshape(w.shape)
