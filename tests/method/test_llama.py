"""
Proves that Llama computes what transformers and Meta's formulation compute, loads every published layout, and decodes
right, plainly and fast. Golden files come from checks/make_golden.py; live against transformers and Meta: tests/peers.

    pytest tests/method/test_llama.py
"""
import dataclasses
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, ROOT, assert_near, assert_same, difference, one_line
from safetensors.torch import load_file, save_file

import fast_decoding
import llama
from fast_decoding import compile_decoding, fast_step, fastest_step, multiply, run_layer
from llama import KVCache, Llama, LlamaConfig, RMSNorm, RopeScaling, generate, load_llama, plain_step, save_llama
from lora import apply_lora

CONFIG = LlamaConfig(dim=24, n_layers=3, n_heads=6, n_kv_heads=2, ffn_dim=20, vocab_size=50, head_dim=8)
META_CONFIG = LlamaConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=20, vocab_size=52, rope_theta=500.0)


def random_llama(lora=False, **changes):
    """A small model, no parameter of which is at its start value."""
    generator = torch.Generator().manual_seed(0)
    model = Llama(dataclasses.replace(CONFIG, **changes)).eval()
    if lora:
        apply_lora(model, rank=2, dropout=0.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5 + ("norm" in name))
    return model


def random_ids(B, T, seed=1):
    return torch.randint(CONFIG.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- Meta's formulation
# An independent one: Meta's names, interleaved pairs as complex numbers, naive attention, float64.

def meta_state(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    D, q, kv, ffn = config.dim, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.ffn_dim
    shapes = {"tok_embeddings.weight": (config.vocab_size, D), "norm.weight": (D,),
              "output.weight": (config.vocab_size, D)}
    layer = {"attention_norm": (D,), "attention.wq": (q, D), "attention.wk": (kv, D), "attention.wv": (kv, D),
             "attention.wo": (D, q), "ffn_norm": (D,), "feed_forward.w1": (ffn, D), "feed_forward.w2": (D, ffn),
             "feed_forward.w3": (ffn, D)}
    for i in range(config.n_layers):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 + (len(shape) == 1)
            for name, shape in shapes.items()}


def meta_frequencies(config):
    freqs = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    s, out = config.rope_scaling, []
    for f in freqs.tolist():
        wavelength = 2 * math.pi / f
        if s is None or wavelength < s.original_max_len / s.high_freq_factor:
            out.append(f)
        elif wavelength > s.original_max_len / s.low_freq_factor:
            out.append(f / s.factor)
        else:
            smooth = (s.original_max_len / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            out.append((1 - smooth) * f / s.factor + smooth * f)
    return torch.tensor(out, dtype=torch.float64)


def meta_logits(state, config, ids):
    """ids (T,) -> logits (T, vocab)."""
    w = {name: tensor.double() for name, tensor in state.items()}
    norm = lambda x, weight: x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight
    T, hd, group = len(ids), config.head_dim, config.n_heads // config.n_kv_heads
    turn = torch.polar(torch.ones(T, hd // 2).double(), torch.outer(torch.arange(T).double(), meta_frequencies(config)))
    rotated = lambda v: torch.view_as_real(torch.view_as_complex(v.view(T, hd // 2, 2)) * turn).flatten(1)
    x = w["tok_embeddings.weight"][ids]
    for i in range(config.n_layers):
        at = lambda name, i=i: w[f"layers.{i}.{name}.weight"]
        y, heads = norm(x, at("attention_norm")), []
        for h in range(config.n_heads):
            rows, shared = slice(h * hd, h * hd + hd), slice(h // group * hd, h // group * hd + hd)
            q, k = rotated(y @ at("attention.wq")[rows].T), rotated(y @ at("attention.wk")[shared].T)
            scores = (q @ k.T / hd ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ (y @ at("attention.wv")[shared].T))
        x = x + torch.cat(heads, -1) @ at("attention.wo").T
        y = norm(x, at("ffn_norm"))
        x = x + (F.silu(y @ at("feed_forward.w1").T) * (y @ at("feed_forward.w3").T)) @ at("feed_forward.w2").T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def write_meta(folder, state, params, shards=1, embedding_dim=0):
    """Meta's files; embedding_dim: 1 as Llama-2 is split, 0 as Llama-3 is."""
    split = dict(tok_embeddings=embedding_dim, output=0, wq=0, wk=0, wv=0, wo=1, w1=0, w2=1, w3=0)
    dims = {name: split.get(name.split(".")[-2]) for name in state}
    for j in range(shards):
        part = {name: t if dims[name] is None else t.chunk(shards, dims[name])[j].clone() for name, t in state.items()}
        torch.save(part, folder / f"consolidated.{j:02}.pth")
    (folder / "params.json").write_text(json.dumps(params))


def meta_params(config, **changes):
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "vocab_size", "rope_theta")
    return {name: getattr(config, name) for name in names} | {"multiple_of": 4} | changes


@pytest.mark.parametrize("shards, embedding_dim", [(1, 0), (2, 0), (2, 1)])
@torch.no_grad()
def test_meta_files_give_the_logits_of_the_naive_formulation(tmp_path, shards, embedding_dim):
    state, ids = meta_state(META_CONFIG), random_ids(1, 40)
    write_meta(tmp_path, state, meta_params(META_CONFIG), shards, embedding_dim)
    model = load_llama(tmp_path)
    assert dataclasses.replace(model.config, max_len=8192) == META_CONFIG
    apart = difference(model(ids)[0], meta_logits(state, META_CONFIG, ids[0]))
    assert_near("Llama = Meta's formulation, written naively in float64, logits", apart, 1e-5)


@pytest.mark.parametrize("changes", [
    {}, {"n_kv_heads": 6}, {"n_kv_heads": 1, "head_dim": 4}, {"rope_scaling": RopeScaling()},
    {"rope_theta": 500.0, "rope_scaling": RopeScaling(4.0, 1.0, 4.0, 96)}])
@torch.no_grad()
def test_attention_rope_and_norm_equal_the_naive_formulation(changes):
    """Interleaved pairs (Meta) and halves (ours) are the same rotation once the rows of q and k are re-ordered."""
    config = dataclasses.replace(CONFIG, **changes)
    state, model, ids = meta_state(config), Llama(config), random_ids(2, 30)
    for name, p in model.named_parameters():
        theirs = state[llama.names_of(name)[llama.META]]
        if name.endswith(("attn.q.weight", "attn.k.weight")):
            theirs = torch.cat([torch.cat((head[0::2], head[1::2])) for head in theirs.split(config.head_dim)])
        p.copy_(theirs)
    for row, row_ids in zip(model(ids), ids):
        apart = difference(row, meta_logits(state, config, row_ids))
        assert_near("Llama = Meta's formulation, written naively in float64, logits", apart, 1e-5)


# ---------------------------------------------------------------------------------------------- decoding

@pytest.mark.parametrize("steps", [[1] * 12, [5, 3, 1, 3], [12]])
@torch.no_grad()
def test_cached_equals_uncached(steps):
    model, ids = random_llama(), random_ids(1, 12)
    cache = KVCache(model.config, 1, 12, torch.float32, "cpu")
    logits = torch.cat([model(part, cache=cache) for part in ids.split(steps, 1)], 1)
    assert_near("cached decoding = uncached, logits", difference(logits, model(ids)), 1e-5)


@torch.no_grad()
def test_cached_rows_of_unequal_length_go_on_at_their_own_place():
    model, lengths, more = random_llama(), [4, 9, 7], [1, 3, 1, 2]
    rows = [random_ids(1, n + sum(more), seed=n)[0] for n in lengths]
    prompt = torch.zeros(3, 9, dtype=torch.long)
    for b, n in enumerate(lengths):
        prompt[b, :n] = rows[b][:n]
    cache = KVCache(model.config, 3, 9 + sum(more), torch.float32, "cpu")
    model(prompt, cache=cache)
    cache.set_lengths(torch.tensor(lengths))
    rest = torch.stack([row[n:] for row, n in zip(rows, lengths)])
    logits = torch.cat([model(part, cache=cache) for part in rest.split(more, 1)], 1)
    for b, n in enumerate(lengths):
        assert_near("cached decoding = uncached, logits", difference(logits[b], model(rows[b][None])[0, n:]), 1e-5)


@torch.no_grad()
def test_padding_on_the_right_does_not_touch_a_row():
    model, ids = random_llama(), random_ids(2, 12)
    other = ids.clone()
    other[0, 7:] = random_ids(1, 5, seed=9)
    assert not torch.equal(ids, other)
    assert torch.equal(model(ids)[0, :7], model(other)[0, :7])                     # whatever stands in the padding
    assert difference(model(ids)[0, :7], model(ids[:1, :7])[0]) <= 1e-5


def answers(model, prompts, n=12, fast=False, **options):
    """Lists of ids -> the list of what is generated after each, in one batch; fast: by fast_decoding."""
    lengths = torch.tensor([len(p) for p in prompts])
    padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, p in zip(padded, prompts):
        row[:len(p)] = torch.tensor(p)
    x = model.embed(padded)
    step = fastest_step(model, x) if fast else plain_step
    steps = list(generate(model, x, lengths, n, next_logits=step, **options))
    return [[i for i in row if i >= 0] for row in torch.stack(steps, 1).tolist()]


PROMPTS = [random_ids(1, n, seed=n)[0].tolist() for n in (3, 11, 1, 7)]


def test_a_batch_of_unequal_prompts_gives_the_tokens_of_each_alone():
    model = random_llama()
    together = answers(model, PROMPTS)
    assert together == [answers(model, [p])[0] for p in PROMPTS]
    for p, answer in zip(PROMPTS, together):                                       # and of no cache at all
        ids = torch.tensor([p + answer])
        assert model(ids)[0, len(p) - 1:-1].argmax(-1).tolist() == answer
    assert len({tuple(a) for a in together}) == len(PROMPTS)                       # else the comparison says nothing


def test_a_stop_token_ends_its_row_and_no_other():
    model = random_llama()
    free = answers(model, PROMPTS)
    stop = next(i for i in free[1] if free[1].index(i) >= 3 and not all(i in a for a in free))
    cut = [a[:a.index(stop)] if stop in a else a for a in free]
    assert answers(model, PROMPTS, stop_ids=[stop, 10 ** 6]) == cut != free
    alone = list(generate(model, model.embed(torch.tensor(PROMPTS[1:2])), max_new_tokens=12, stop_ids=[stop]))
    assert 3 <= len(alone) == len(cut[1]) < 12                                     # all rows stopped: no more steps


def test_sampling():
    model = random_llama()
    draw = lambda seed, **o: answers(model, PROMPTS, generator=torch.Generator().manual_seed(seed), **o)
    assert draw(0, temperature=1.0) == draw(0, temperature=1.0) != draw(1, temperature=1.0)
    assert draw(0, temperature=1.0, top_p=1e-6) == answers(model, PROMPTS)         # the nucleus has at least the best
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])

    def shares(temperature, top_p):
        generator = torch.Generator().manual_seed(0)
        return llama.next_tokens(p.log().expand(4000, 4), temperature, top_p, generator).bincount(minlength=4) / 4000

    assert (shares(1.0, 0.6) - torch.tensor([4 / 7, 3 / 7, 0, 0])).abs().max() < 0.04            # 0.4 is not 0.6
    assert (shares(0.5, 1.0) - p ** 2 / (p ** 2).sum()).abs().max() < 0.04         # temperature 1/2 squares


def test_before_layer_runs_before_every_layer_and_in_the_prompt_only():
    model, seen = random_llama(), []

    def before_layer(i, x):
        seen.append((i, tuple(x.shape)))
        return x + (i == 1)

    x = model.embed(torch.tensor([PROMPTS[1]]))
    changed = [int(i) for i in generate(model, x, max_new_tokens=5, before_layer=before_layer)]
    assert seen == [(i, (1, 11, 24)) for i in range(3)]
    fast = generate(model, x, max_new_tokens=5, before_layer=before_layer, next_logits=fastest_step(model, x))
    assert [int(i) for i in fast] == changed and len(seen) == 6
    with torch.no_grad():
        rope = llama.rotary(model.config, torch.arange(11)[None], x.dtype)
        naive = model.layers[0](x, rope) + 1
        for layer in model.layers[1:]:
            naive = layer(naive, rope)
        logits = model(x, before_layer=before_layer)
        assert torch.equal(logits, model.head(model.norm(naive)))
    assert changed[0] == int(logits[0, -1].argmax()) and changed != answers(model, PROMPTS[1:2], 5)[0]


@torch.no_grad()
def test_at_picks_positions():
    model, ids = random_llama(), random_ids(2, 9)
    learned = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    assert difference(model(ids, at=learned), model(ids)[learned]) <= 1e-6


def test_recomputing_layers_gives_the_same_gradients():
    grads = []
    for recompute in (False, True):
        model = random_llama().train()
        model.grad_checkpoint = recompute
        model(random_ids(2, 9), before_layer=lambda i, x: x * 1.5).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_full_cache_says_so():
    model = random_llama()
    with pytest.raises(ValueError, match="KV cache holds 4 positions, 5 are needed") as error, torch.no_grad():
        model(random_ids(1, 5), cache=KVCache(model.config, 1, 4, torch.float32, "cpu"))
    assert one_line(error)


# ---------------------------------------------------------------------------------------------- fast decoding

WITH_LORA = pytest.mark.parametrize("lora", [False, True], ids=["plain weights", "LoRA"])


@WITH_LORA
def test_fast_decoding_gives_the_same_tokens(lora):
    """One row as a bare vector; several rows need no other way before a layer is compiled."""
    model = random_llama(lora)
    assert fastest_step(model, torch.zeros(1, 3, 24)) is not plain_step is fastest_step(model, torch.zeros(2, 3, 24))
    for prompts in ([PROMPTS[0]], [PROMPTS[1]], [PROMPTS[2]], [PROMPTS[3]], PROMPTS):
        assert_same("fast decoding = plain, tokens", sum(answers(model, prompts, fast=True), []),
                   sum(answers(model, prompts), []))


@WITH_LORA
def test_compiled_decoding_gives_the_same_tokens(lora):
    model, graphs = random_llama(lora), []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    compile_decoding(model, backend)
    for prompts, n in ((PROMPTS, 12), (PROMPTS[1:2], 20), (PROMPTS[1:2], 31)):
        assert_same("fast decoding = plain, tokens", sum(answers(model, prompts, n, fast=True), []),
                   sum(answers(model, prompts, n), []))
    # One graph for a batch, one for a lone vector, perhaps one for other lengths; all layers share them.
    assert 2 <= len(graphs) <= 3


@WITH_LORA
@pytest.mark.parametrize("lengths, lone, fixed_shapes", [
    ([5], True, False), ([5], True, True), ([3, 5, 1], False, True)], ids=["vector", "vector, all keys", "rows"])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_one_fast_step_equals_a_plain_one(dtype, near, lengths, lone, fixed_shapes, lora):
    """Logits, the keys and values that are stored, and how far the cache has come, two steps in a row."""
    model, ids, rows = random_llama(lora).to(dtype), random_ids(3, 7), len(lengths)
    caches = []
    for _ in range(2):
        caches.append(KVCache(model.config, rows, 8, dtype, "cpu"))
        model(ids[:rows, :5], cache=caches[-1])
        caches[-1].set_lengths(torch.tensor(lengths))
    for step in (5, 6):
        ours = fast_step(model, ids[:rows, step], caches[0], run_layer if fixed_shapes else None, lone)
        theirs = plain_step(model, ids[:rows, step], caches[1])
        assert ours.shape == (rows, 50) and ours.dtype == dtype
        if dtype == torch.float32:
            assert_near("fast decoding = plain, logits of a step (float32)", difference(ours, theirs), near)
        assert difference(ours, theirs) <= near
    assert caches[0].filled == caches[1].filled and torch.equal(caches[0].lengths, caches[1].lengths)
    assert difference(caches[0].k, caches[1].k) < near and difference(caches[0].v, caches[1].v) < near


@torch.no_grad()
@pytest.mark.parametrize("wanted", [True, False])
def test_bfloat16_decodes_near_float32(wanted, monkeypatch):
    """A bare vector takes other products than a batch: all must round once, from a float32 sum."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", wanted)
    x, w = torch.randn(512, dtype=torch.bfloat16), torch.randn(300, 512, dtype=torch.bfloat16)
    assert difference(multiply(w, x).double(), F.linear(x.double(), w.double())) < 2 ** -8


@torch.no_grad()
def test_onednn_is_off_for_one_row_and_back_after_an_error():
    model, seen = random_llama(), []

    def layer(*_):
        seen.append(torch.backends.mkldnn.enabled)
        raise KeyError

    for ids, lone in ((torch.tensor([1]), True), (torch.tensor([1, 2]), False)):
        with pytest.raises(KeyError):
            fast_step(model, ids, KVCache(model.config, len(ids), 4, torch.float32, "cpu"), layer, lone)
    assert seen == [False, True] and torch.backends.mkldnn.enabled


def test_the_norm_of_a_bare_vector():
    """Decoding's shorter norm has the value of RMSNorm but no gradient; RMSNorm itself keeps it on a bare vector."""
    norm, x = RMSNorm(8, 1e-5), torch.randn(8)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        assert difference(fast_decoding.norm(norm, x), norm(x[None])[0]) < 1e-6
        assert torch.equal(fast_decoding.norm(norm, x[None]), norm(x[None]))
    expected = torch.autograd.functional.jacobian(lambda v: norm(v[None])[0], x)
    assert difference(torch.autograd.functional.jacobian(norm, x), expected) < 1e-6


# ---------------------------------------------------------------------------------------------- Hugging Face's folders

@pytest.fixture(params=["gqa", "mha"])
def published(request, tmp_path):
    """-> (a folder as transformers writes it, ids, transformers' logits)"""
    return golden_folder(tmp_path / "published", request.param), *golden_logits(request.param)


def golden_folder(folder, name):
    folder.mkdir()
    shutil.copy(GOLDEN / f"llama_{name}.json", folder / "config.json")
    shutil.copy(GOLDEN / f"llama_{name}.safetensors", folder / "model.safetensors")
    return folder


def golden_logits(name):
    out = load_file(GOLDEN / "llama_logits.safetensors")
    return out[f"{name}.ids"], out[f"{name}.logits"]


def read_state(folder):
    """Copies: load_file's tensors are mapped, and the file is about to be rewritten."""
    return {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def test_logits_equal_transformers(published):
    folder, ids, logits = published
    assert_near("Llama = transformers', logits (golden files)", difference(load_llama(folder)(ids), logits), 1e-5)


@pytest.mark.parametrize("name, changes", [
    ("gqa", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}), ("gqa", {"rms_norm_eps": 1e-6}),
    ("mha", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}), ("mha", {"rms_norm_eps": 1e-5})])
@torch.no_grad()
def test_the_golden_files_see_scaling_base_and_epsilon(tmp_path, name, changes):
    folder, (ids, logits) = golden_folder(tmp_path / "published", name), golden_logits(name)
    edit_json(folder / "config.json", **changes)
    assert difference(load_llama(folder)(ids), logits) > 1e-4


def shard(folder, suffix, how):
    """Rewrite the folder's weights as two shards with an index."""
    state = read_state(folder)
    (folder / "model.safetensors").unlink()
    stem, names, index = {"safetensors": "model", "bin": "pytorch_model"}[suffix], sorted(state), {}
    for j, part in enumerate((names[0::2], names[1::2])):
        file = f"{stem}-{j + 1:05}-of-00002.{suffix}"
        how({k: state[k] for k in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


old_format = lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("suffix, how", [("safetensors", save_file), ("bin", torch.save), ("bin", old_format)])
@torch.no_grad()
def test_shards_load_to_the_same_model(published, suffix, how):
    folder, ids, logits = published
    shard(folder, suffix, how)
    assert difference(load_llama(folder)(ids), logits) <= 1e-5
    last = sorted(folder.glob(f"*.{suffix}"))[-1]
    last.unlink()
    with pytest.raises(FileNotFoundError, match=last.name):
        load_llama(folder)


def test_dtype_and_what_is_left_out(published):
    folder, ids, _ = published
    state = read_state(folder)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}       # in old Vicuna files
    tied = "lm_head.weight" not in state
    if tied:
        extra["lm_head.weight"] = state["model.embed_tokens.weight"].clone()      # some files repeat it
    save_file(state | extra, folder / "model.safetensors")
    model = load_llama(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert (model.head is None) == tied
    assert model(ids).dtype == torch.bfloat16


def test_older_configs_say_less(tmp_path):
    """No head_dim, no rope_theta, no num_key_value_heads: the defaults of transformers."""
    folder = golden_folder(tmp_path / "published", "mha")
    config = json.loads((folder / "config.json").read_text())
    for key in ("head_dim", "num_key_value_heads", "rope_parameters", "rms_norm_eps", "mlp_bias", "attention_bias",
                "model_type"):
        config.pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    c = load_llama(folder).config
    assert (c.head_dim, c.n_kv_heads, c.rope_theta, c.norm_eps) == (4, 5, 10000.0, 1e-6)


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "qwen2"}, "model_type 'qwen2'"), ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'")])
def test_other_architectures_are_refused_by_name(tmp_path, changes, words):
    folder = golden_folder(tmp_path / "published", "gqa")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=words) as error:
        load_llama(folder)
    assert one_line(error)


def test_a_config_without_a_size_is_named(tmp_path):
    folder = golden_folder(tmp_path / "published", "gqa")
    config = json.loads((folder / "config.json").read_text())
    del config["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'intermediate_size'"):
        load_llama(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        load_llama(folder)


def test_tensors_that_do_not_fit_are_named_in_one_error(tmp_path):
    folder = golden_folder(tmp_path / "published", "gqa")
    state = read_state(folder)
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(20, 24)
    state["lm_head.weight"] = torch.zeros(41, 24)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_llama(folder)
    for words in ("1 missing: model.layers.1.mlp.up_proj.weight", "1 unexpected: model.layers.2.mlp.up_proj.weight",
                  "1 misshapen: lm_head.weight (41, 24) instead of (40, 24)"):
        assert words in str(error.value)
    assert one_line(error)


def test_cut_off_and_foreign_files_are_refused(tmp_path):
    folder = golden_folder(tmp_path / "published", "gqa")
    whole, state = (folder / "model.safetensors").read_bytes(), read_state(folder)
    for content in (whole[:-100], whole[:50], b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file") as error:
            load_llama(folder)
        assert one_line(error)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"<html>not found</html>"):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match="pytorch_model.bin: not a whole PyTorch file") as error:
            load_llama(folder)
        assert one_line(error)
    torch.save({"weights": state, "step": 3}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="something else than named tensors"):
        load_llama(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no model.*safetensors and no pytorch_model"):
        load_llama(folder)
    with pytest.raises(FileNotFoundError, match="neither config.json .* nor params.json"):
        load_llama(tmp_path)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, file, zipped):
    folder = golden_folder(tmp_path / "published", "gqa")
    (folder / "model.safetensors").unlink()
    if file.startswith("consolidated"):
        (folder / "config.json").unlink()
        (folder / "params.json").write_text(json.dumps(meta_params(META_CONFIG)))
    tensors = {"norm.weight": torch.ones(3), "x": Hostile(tmp_path / "ran")}
    torch.save(tensors, folder / file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f"{file}: refused, its pickle wants to run \\w+.mkdir") as error:
        load_llama(folder)
    assert one_line(error) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("changes", [
    {}, {"tied": True, "n_kv_heads": 6}, {"rope_scaling": RopeScaling(4.0, 1.0, 4.0, 96)}])
def test_a_saved_model_loads_again(tmp_path, changes):
    model = random_llama(**changes).to(torch.bfloat16)
    save_llama(model, tmp_path / "new/folder")
    again = load_llama(tmp_path / "new/folder", dtype=torch.bfloat16)
    assert again.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    files = {file.name for file in (tmp_path / "new/folder").iterdir()}
    assert files == {"config.json", "model.safetensors"}                           # and nothing temporary


# ---------------------------------------------------------------------------------------------- Meta's folders

def test_what_params_json_does_not_say(tmp_path):
    """Llama-2: vocab_size -1, no n_kv_heads, no rope_theta; the file may hold rope.freqs. Llama-3.2: a tied output."""
    state = meta_state(dataclasses.replace(META_CONFIG, n_kv_heads=4))
    freqs = 10000.0 ** -(torch.arange(0, 6, 2) / 6)
    params = meta_params(META_CONFIG, vocab_size=-1)
    del params["n_kv_heads"], params["rope_theta"]
    write_meta(tmp_path, state | {"rope.freqs": freqs.bfloat16()}, params, 2, 1)
    c = load_llama(tmp_path).config
    assert (c.vocab_size, c.n_kv_heads, c.rope_theta, c.max_len, c.tied) == (52, 4, 10000.0, 4096, False)
    (tmp_path / "params.json").write_text(json.dumps(params | {"rope_theta": 500000.0}))
    with pytest.raises(ValueError, match="rope.freqs contradicts rope_theta 500000") as error:
        load_llama(tmp_path)
    assert one_line(error)
    (tmp_path / "consolidated.01.pth").unlink()
    state["output.weight"] = state["tok_embeddings.weight"]                    # one storage, two names
    torch.save(state, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert load_llama(tmp_path).head is None
    del state["output.weight"]
    torch.save(state, tmp_path / "consolidated.00.pth")
    assert load_llama(tmp_path).head is None


@pytest.mark.parametrize("dim, vocab, params, theta, factor, max_len", [
    (4096, 32000, {"vocab_size": -1}, 10000.0, None, 4096),                                      # Llama-2
    (4096, 128256, {"vocab_size": 128256, "rope_theta": 500000.0}, 500000.0, None, 8192),        # Llama-3
    (4096, 128256, {"vocab_size": 128256}, 500000.0, None, 8192),
    (4096, 128256, {"use_scaled_rope": True}, 500000.0, 8.0, 131072),                            # Llama-3.1
    (2048, 128256, {"use_scaled_rope": True}, 500000.0, 32.0, 131072),                           # Llama-3.2 1B
])
def test_metas_constants(tmp_path, dim, vocab, params, theta, factor, max_len):
    one = lambda *shape: torch.zeros(1).expand(shape)          # stored as a single number
    torch.save({"tok_embeddings.weight": one(vocab, dim), "output.weight": one(vocab, dim),
                "layers.0.feed_forward.w1.weight": one(14336, dim)}, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(dict(dim=dim, n_layers=32, n_heads=32, norm_eps=1e-5) | params))
    c = llama.meta_config(tmp_path)
    assert (c.vocab_size, c.rope_theta, c.max_len, c.ffn_dim) == (vocab, theta, max_len, 14336)
    assert c.rope_scaling == (factor and RopeScaling(factor, 1.0, 4.0, 8192))


def test_meta_files_that_do_not_fit(tmp_path):
    state = meta_state(META_CONFIG)
    write_meta(tmp_path, state, meta_params(META_CONFIG), 2)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match="is a shard missing") as error:
        load_llama(tmp_path)
    assert one_line(error)
    write_meta(tmp_path, state, meta_params(META_CONFIG), 2, 1)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match="is a shard missing"):
        load_llama(tmp_path)
    write_meta(tmp_path, state, meta_params(META_CONFIG), 4)
    with pytest.raises(ValueError, match="2 key-value heads do not fit 4 files"):
        load_llama(tmp_path)
    for file in list(tmp_path.iterdir()):
        file.unlink()
    del state["layers.1.ffn_norm.weight"]
    state["layers.1.attention.wk.weight"] = torch.zeros(16, 24)
    write_meta(tmp_path, state | {"extra.weight": torch.ones(1)}, meta_params(META_CONFIG))
    with pytest.raises(ValueError) as error:
        load_llama(tmp_path)
    for words in ("1 missing: layers.1.ffn_norm.weight in consolidated.00.pth",
                  "unexpected: extra.weight in consolidated.00.pth",
                  "1 misshapen: layers.1.attention.wk.weight in consolidated.00.pth (16, 24) instead of (12, 24)"):
        assert words in str(error.value)
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(FileNotFoundError, match="no consolidated"):
        load_llama(tmp_path)


# ---------------------------------------------------------------------------------------------- memory
MEASURE = """
import gc, sys, threading, torch
import llama

def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon"))

peak, copy, stop = 0, torch.Tensor.copy_, threading.Event()

def sample():
    global peak
    peak = max(peak, anonymous())

def watch():
    while not stop.wait(0.001):
        sample()

def sampled_copy(self, *args):             # source and destination are both there now
    result = copy(self, *args)
    sample()
    return result

torch.Tensor.copy_ = sampled_copy
threading.Thread(target=watch, daemon=True).start()
for folder in sys.argv[1:]:
    gc.collect()
    before = peak = anonymous()
    model = llama.load_llama(folder, dtype=torch.float32)
    sample()
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
    print(size, peak - before)
    del model
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_needs_little_more_memory_than_the_model(tmp_path):
    config = LlamaConfig(dim=512, n_layers=4, n_heads=8, n_kv_heads=4, ffn_dim=1024, vocab_size=5000)
    state = {name: t.bfloat16() for name, t in meta_state(config).items()}
    folders = [tmp_path / name for name in ("first", "meta", "safetensors", "bin")]
    for folder in folders:
        folder.mkdir()
    write_meta(folders[0], meta_state(META_CONFIG), meta_params(META_CONFIG))      # the first load imports much
    write_meta(folders[1], state, meta_params(config), 2, 1)
    for folder, suffix, how in ((folders[2], "safetensors", save_file), (folders[3], "bin", torch.save)):
        save_llama(load_llama(folders[1], dtype=torch.bfloat16), folder)
        shard(folder, suffix, how)
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}               # freed is given back
    out = subprocess.run([sys.executable, "-c", MEASURE, *folders], cwd=ROOT, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    for folder, line in zip(folders[1:], out.stdout.splitlines()[1:], strict=True):
        size, grown = map(float, line.split())
        assert 50_000 < size and 0.9 * size < grown < 1.1 * size, f"{folder.name}: {grown / size:.2f} times the model"
