"""
Proves Llama against transformers, peft and Meta's own model.py, live, on the same random weights: logits, gradients,
tokens, files.

    python -m pytest tests/peers/test_llama_peers.py           # in the environment of tests/requirements-peers.txt
"""
import json
import sys
import types

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import assert_near, assert_same, difference

from fast_decoding import fastest_step
from llama import (HUGGING_FACE, generate, load_llama, load_lora, names_of, plain_step, rope_frequencies, rotary,
                   save_llama, save_lora)
from lora import apply_lora, lora_layers, merge_lora

SCALED = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)
SIZES = {
    "grouped-query": dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=48),
    "one head each": dict(num_attention_heads=6, num_key_value_heads=6, hidden_size=48),
    "odd widths": dict(num_attention_heads=5, num_key_value_heads=1, head_dim=14, hidden_size=35),
    "tied": dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=40, tie_word_embeddings=True),
    "Llama-3.1": dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, rope_parameters=SCALED,
                      max_position_embeddings=131072),
    "Llama-3.2": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32, hidden_size=64,
                      tie_word_embeddings=True, rope_parameters=SCALED | {"factor": 32.0},
                      max_position_embeddings=131072),
    "another base": dict(num_attention_heads=4, num_key_value_heads=4, hidden_size=64, rms_norm_eps=1e-6,
                         rope_parameters=dict(rope_type="default", rope_theta=100000.0)),
}
LIMIT = 1e-5
TRANSFORMERS, META, PEFT = "Llama = transformers'", "Llama = Meta's model.py", "LoRA = peft's"


@torch.no_grad()
def randomize(model):
    for p in model.parameters():
        p.normal_(std=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3).add_(p.ndim == 1)
    return model.eval()


def peer(name):
    torch.manual_seed(0)
    options = dict(vocab_size=90, intermediate_size=52, num_hidden_layers=3, rms_norm_eps=1e-5) | SIZES[name]
    return randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)))


IDS = torch.randint(90, (2, 70), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SIZES)
def test_logits_and_gradients(tmp_path, name):
    model = peer(name)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours = load_llama(tmp_path)
    logits, theirs = ours(IDS), model(IDS).logits
    assert_near(f"{TRANSFORMERS}, logits", difference(logits, theirs), LIMIT)
    for out in (logits, theirs):
        F.cross_entropy(out.flatten(0, 1), IDS.flatten()).backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    for key, p in ours.named_parameters():
        assert_near(f"{TRANSFORMERS}, gradients", difference(p.grad, gradients[names_of(key)[HUGGING_FACE]]), LIMIT)


@pytest.mark.parametrize("position", [0, 9000, 100000])
@pytest.mark.parametrize("name", ["Llama-3.1", "Llama-3.2"])
@torch.no_grad()
def test_far_positions(tmp_path, name, position):
    """Angles are large there: the last bit of a frequency shows, so both must round it alike."""
    model = peer(name)
    model.save_pretrained(tmp_path)
    positions = position + torch.arange(4)[None]
    theirs = model.model.rotary_emb(torch.randn(1, 4, model.config.hidden_size), positions)
    for our_angles, their_angles in zip(rotary(load_llama(tmp_path).config, positions, torch.float32), theirs):
        apart = difference(our_angles.reshape(their_angles.shape), their_angles)
        assert_near(f"{TRANSFORMERS}, rotary angles up to position 100,003", apart, 1e-6)


@pytest.mark.parametrize("name", ["grouped-query", "tied"])
def test_greedy_tokens(tmp_path, name):
    model = peer(name)
    model.save_pretrained(tmp_path)
    ours, prompt = load_llama(tmp_path), IDS[:1, :9]
    theirs = model.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 9:]
    x = ours.embed(prompt)
    for step in (plain_step, fastest_step(ours, x)):
        tokens = [int(i) for i in generate(ours, x, max_new_tokens=30, next_logits=step)]
        assert_same(f"{TRANSFORMERS}, greedy tokens", tokens, theirs.tolist())


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_transformers_reads_what_we_save(tmp_path, name, dtype):
    peer(name).save_pretrained(tmp_path / "theirs")
    save_llama(load_llama(tmp_path / "theirs", dtype=dtype), tmp_path / "ours")
    read = transformers.AutoModelForCausalLM.from_pretrained
    model, info = read(tmp_path / "ours", dtype="auto", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")) and model.dtype == dtype
    config = transformers.AutoConfig.from_pretrained(tmp_path / "theirs")
    for key in ("hidden_size", "head_dim", "rope_parameters", "rms_norm_eps", "tie_word_embeddings",
                "max_position_embeddings", "num_key_value_heads", "vocab_size", "intermediate_size"):
        assert getattr(model.config, key) == getattr(config, key), key
    apart = difference(model.float()(IDS).logits, load_llama(tmp_path / "ours")(IDS))
    assert_near(f"{TRANSFORMERS}, logits, from files that we saved", apart, LIMIT)


# ---------------------------------------------------------------------------------------------- Meta's own code

@pytest.fixture
def meta_model(monkeypatch):
    """llama_models' Transformer in one process: fairscale's layers, which split a matrix over GPUs, are plain there."""
    parallel = "fairscale.nn.model_parallel"
    names = ("fairscale", "fairscale.nn", parallel, f"{parallel}.initialize", f"{parallel}.layers")
    modules = {name: types.ModuleType(name) for name in names}

    class Linear(torch.nn.Linear):
        def __init__(self, n, m, bias, **options):
            super().__init__(n, m, bias=bias)

    class Embedding(torch.nn.Embedding):
        def __init__(self, n, dim, init_method):
            super().__init__(n, dim)

    modules[f"{parallel}.initialize"].get_model_parallel_world_size = lambda: 1
    layers = modules[f"{parallel}.layers"]
    layers.ColumnParallelLinear = layers.RowParallelLinear = Linear
    layers.VocabParallelEmbedding = Embedding
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, _, last = name.rpartition(".")
            monkeypatch.setattr(modules[parent], last, module, raising=False)
    from llama_models.llama3 import args, model

    def make(**params):
        torch.manual_seed(0)
        return randomize(model.Transformer(args.ModelArgs(max_batch_size=2, max_seq_len=128, **params)))

    return make


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("n_kv_heads", [2, 8])
@torch.no_grad()
def test_metas_files_on_metas_model(tmp_path, meta_model, shards, embedding_dim, n_kv_heads):
    params = dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=n_kv_heads, vocab_size=90, multiple_of=12, norm_eps=1e-5,
                  rope_theta=500000.0)
    model = meta_model(**params)
    state = {k: p.bfloat16() for k, p in model.state_dict().items()}
    split = dict(tok_embeddings=embedding_dim, output=0, wq=0, wk=0, wv=0, wo=1, w1=0, w2=1, w3=0)
    dims = {k: split.get(k.split(".")[-2]) for k in state}
    for j in range(shards):
        part = {k: p if dims[k] is None else p.chunk(shards, dims[k])[j].clone() for k, p in state.items()}
        torch.save(part, tmp_path / f"consolidated.{j:02}.pth")
    (tmp_path / "params.json").write_text(json.dumps(params))
    model.load_state_dict({k: p.float() for k, p in state.items()})
    assert_near(f"{META}, logits", difference(load_llama(tmp_path)(IDS), model(IDS, 0)), LIMIT)


@torch.no_grad()
def test_metas_scaled_rope(tmp_path, meta_model):
    """At the width of Llama-3.1, where use_scaled_rope means Meta's own factor 8."""
    params = dict(dim=4096, n_layers=1, n_heads=128, n_kv_heads=1, vocab_size=8, multiple_of=8,
                  ffn_dim_multiplier=0.001, norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True)
    model = meta_model(**params)
    torch.save(model.state_dict(), tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(params))
    ours, ids = load_llama(tmp_path), IDS[:1, :20] % 8
    assert_near(f"{META}, logits", difference(ours(ids), model(ids, 0)), LIMIT)
    angles = torch.outer(torch.arange(8).float(), rope_frequencies(ours.config))
    ours, theirs = torch.stack((angles.cos(), angles.sin()), -1), torch.view_as_real(model.freqs_cis[:8])
    assert_near(f"{META}, rotary angles", difference(ours, theirs), 1e-6)


# ---------------------------------------------------------------------------------------------- peft

TARGETS = {"all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
           "two": ["q_proj", "v_proj"]}


def peft_model(targets, **options):
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS[targets], **options)
    model = peft.get_peft_model(peer("grouped-query"), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("targets", TARGETS)
def test_pefts_adapter_in_our_model(tmp_path, targets):
    peer("grouped-query").save_pretrained(tmp_path / "base")
    model = peft_model(targets, lora_dropout=0.1)
    model.save_pretrained(tmp_path / "lora")
    ours = load_lora(load_llama(tmp_path / "base"), tmp_path / "lora")
    logits, theirs = ours(IDS), model(IDS).logits
    assert_near(f"{PEFT}, logits", difference(logits, theirs), LIMIT)
    for out in (logits, theirs):
        out.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    for name, m in lora_layers(ours):
        path = names_of(f"{name}.weight")[HUGGING_FACE].removesuffix(".weight")
        for part, p in (("A", m.lora_a), ("B", m.lora_b)):
            their_gradient = gradients[f"base_model.model.{path}.lora_{part}.default.weight"]
            assert_near(f"{PEFT}, gradients", difference(p.grad, their_gradient), LIMIT)


@pytest.mark.parametrize("targets", TARGETS)
@torch.no_grad()
def test_our_adapter_in_peft_and_the_merged_model_in_transformers(tmp_path, targets):
    peer("grouped-query").save_pretrained(tmp_path / "base")
    ours = apply_lora(load_llama(tmp_path / "base"), 4, 12, 0.05, [t.removesuffix("_proj") for t in TARGETS[targets]])
    for _, m in lora_layers(ours):
        m.lora_b.normal_(std=0.1)
    save_lora(ours, tmp_path / "lora")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    expected = theirs(IDS).logits
    assert_near(f"{PEFT}, logits", difference(ours(IDS), expected), LIMIT)
    save_llama(merge_lora(ours), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for logits in (theirs.merge_and_unload()(IDS).logits, expected):
        assert_near(f"{PEFT}, merged, logits", difference(merged(IDS).logits, logits), LIMIT)


@pytest.mark.parametrize("option, value", [
    ("use_rslora", True), ("use_dora", True), ("rank_pattern", {"q_proj": 2}), ("alpha_pattern", {"q_proj": 2}),
    ("layers_to_transform", [1]), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("init_lora_weights", "olora")])
def test_options_as_peft_writes_them_are_refused(tmp_path, option, value):
    peer("grouped-query").save_pretrained(tmp_path / "base")
    peft_model("two", **{option: value}).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=option):
        load_lora(load_llama(tmp_path / "base"), tmp_path / "lora")
