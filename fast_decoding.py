"""
Decoding, faster: the step that `llama.plain_step` takes, computed in another way for speed alone.

    generate(model, x, ..., next_logits=fastest_step(model, x))

Nothing here changes an answer: without `next_logits` it is unused. One more token reads every weight once and does
little with it, so on a CPU it is the cost of each call that counts (`python -m checks.bench_peers decode DIR`):
- one row runs as a bare vector (D,), through the matrix-vector product, and its norms in half the operations;
- without oneDNN, whose call costs more than it saves for one vector;
- compile_decoding joins the operations of a layer into few; one compiled layer serves them all.
"""
from functools import partial

import torch
import torch.nn.functional as F

from llama import Llama, plain_step, rotary, rotate
from lora import LoRALinear


def fastest_step(model, x):
    """The fastest way to take the step plain_step(model, ids, cache) after the prompts x (B, T, D)."""
    compiled_layer, lone = getattr(model, "compiled_layer", None), len(x) == 1 and x.is_cpu
    if isinstance(model, Llama) and (lone or compiled_layer is not None):
        return partial(fast_step, compiled_layer=compiled_layer, lone=lone)
    return plain_step


def compile_decoding(model, backend="inductor"):
    """From now on a layer is compiled at the first step: some 10 s; on a CPU a C++ compiler must be there."""
    model.compiled_layer = torch.compile(run_layer, backend=backend)


def fast_step(model, ids, cache, compiled_layer, lone):
    """ids (B,) -> logits (B, vocab)."""
    positions = cache.next_positions(1)                                            # (B, 1)
    rope = rotary(model.config, positions, model.embed.weight.dtype)
    n_keys, mask = cache.filled + 1, None
    if compiled_layer is not None:          # fixed shapes, so one graph: all keys at every step, those to come masked
        n_keys = cache.k.shape[3]
        mask = (torch.arange(n_keys, device=ids.device) <= positions[..., None])[:, None]          # (B, 1, 1, n_keys)
    x = model.embed(ids[0] if lone else ids)                                       # (D,) or (B, D)
    step, wanted = compiled_layer or run_layer, torch.backends.mkldnn.enabled
    try:
        torch.backends.mkldnn.enabled = wanted and not lone
        for i, layer in enumerate(model.layers):
            x = step(layer, x, rope, mask, positions, cache.k[i, :, :, :n_keys], cache.v[i, :, :, :n_keys])
        cache.advance(1)
        return multiply(model.output_weight(), norm(model.norm, x)).view(len(ids), -1)
    finally:
        torch.backends.mkldnn.enabled = wanted


def run_layer(layer, x, rope, mask, positions, keys, values):
    """Layer.forward for one new position of each row, x (D,) or (B, D); without a mask it is the last of the keys."""
    attn, mlp, hd = layer.attn, layer.mlp, keys.shape[-1]
    y = norm(layer.attn_norm, x)
    q = linear(attn.q, y).view(len(keys), -1, 1, hd)                               # (B, nh, 1, hd)
    k = linear(attn.k, y).view(len(keys), -1, 1, hd)                               # (B, nkv, 1, hd)
    v = linear(attn.v, y).view(len(keys), -1, 1, hd)                               # (B, nkv, 1, hd)
    q, k = rotate(q, *rope), rotate(k, *rope)
    if mask is None:
        keys[:, :, -1:], values[:, :, -1:] = k, v
    else:
        rows = torch.arange(len(keys), device=x.device)
        keys[rows, :, positions[:, 0]], values[rows, :, positions[:, 0]] = k[:, :, 0], v[:, :, 0]
    y = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=q.shape[1] != k.shape[1])
    x = x + linear(attn.o, y.reshape(*x.shape[:-1], -1))                           # (B, nh, 1, hd) -> (B, nh*hd)
    y = norm(layer.mlp_norm, x)
    return x + linear(mlp.down, F.silu(linear(mlp.gate, y)) * linear(mlp.up, y))


def multiply(weight, x):
    return torch.mv(weight, x) if x.dim() == 1 else F.linear(x, weight)


def linear(m, x):
    y = multiply(m.weight, x)
    if isinstance(m, LoRALinear):
        low = multiply(m.lora_a.to(x.dtype), x) * (m.alpha / m.rank)
        y = y + multiply(m.lora_b.to(x.dtype), low)
    return y


def norm(m, x):
    if x.dim() > 1 or torch.compiler.is_compiling():           # item() cannot be compiled
        return m(x)
    square = torch.linalg.vector_norm(x, dtype=torch.float32).item() ** 2
    return x * (square / len(x) + m.eps) ** -0.5 * m.weight.to(x.dtype)
