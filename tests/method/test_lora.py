"""
Proves that LoRA starts as nothing, trains its own matrices alone, merges exactly, and that its files are PEFT's. The
adapter in tests/golden/lora and its logits are peft's (checks/make_golden.py); live against peft: tests/peers.

    pytest tests/method/test_lora.py
"""
import json
import shutil

import pytest
import torch
from conftest import GOLDEN, assert_near, difference, one_line
from safetensors.torch import load_file, save_file

from llama import Llama, LlamaConfig, load_llama, load_lora, save_llama, save_lora
from lora import LORA_TARGETS, apply_lora, lora_layers, merge_lora

CONFIG = LlamaConfig(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, ffn_dim=20, vocab_size=50, head_dim=8)
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))


def plain():
    torch.manual_seed(0)
    return Llama(CONFIG).eval()


def with_lora(targets=LORA_TARGETS, dropout=0.0):
    """LoRA whose matrices are no longer at their start, so that it changes the output."""
    model = apply_lora(plain(), rank=3, alpha=8, dropout=dropout, targets=targets)
    for _, m in lora_layers(model):
        torch.nn.init.normal_(m.lora_b, std=0.1)
    return model


@pytest.fixture
def published(tmp_path):
    """The golden model of transformers as a folder."""
    shutil.copy(GOLDEN / "llama_gqa.json", tmp_path / "config.json")
    shutil.copy(GOLDEN / "llama_gqa.safetensors", tmp_path / "model.safetensors")
    return tmp_path


# ---------------------------------------------------------------------------------------------- the formula

@torch.no_grad()
def test_untrained_lora_changes_nothing():
    assert torch.equal(apply_lora(plain())(IDS), plain()(IDS))
    assert difference(with_lora()(IDS), plain()(IDS)) > 1e-2


@torch.no_grad()
def test_the_formula():
    m = with_lora().layers[1].mlp.down
    x = torch.randn(4, 20)
    w, a, b = (p.double() for p in (m.weight, m.lora_a, m.lora_b))
    assert difference(m(x).double(), x.double() @ (w + 8 / 3 * b @ a).T) <= 1e-6


def test_its_own_matrices_alone_are_trained():
    model = with_lora(("q", "down")).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not any(m.weight.requires_grad for _, m in lora_layers(model))
    model.requires_grad_(False)
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(trained) == 2 * 2 * CONFIG.n_layers and {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.SGD([p.requires_grad_() for p in trained], lr=1.0)
    model(IDS).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_dropout_is_for_training_and_for_the_low_rank_path():
    model = with_lora(dropout=0.5)
    assert torch.equal(model(IDS), with_lora()(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))
    for _, m in lora_layers(model):
        torch.nn.init.zeros_(m.lora_b)
    assert torch.equal(model(IDS), plain()(IDS))                                   # W x itself is never dropped


@torch.no_grad()
def test_merged_equals_unmerged():
    expected = with_lora()(IDS)
    merged = merge_lora(with_lora())
    assert difference(merged(IDS), expected) <= 1e-5
    assert not lora_layers(merged) and merged.state_dict().keys() == plain().state_dict().keys()


@torch.no_grad()
def test_merging_into_bfloat16_rounds_once():
    model = with_lora().to(torch.bfloat16)
    for _, m in lora_layers(model):
        m.lora_a, m.lora_b = torch.nn.Parameter(m.lora_a.float()), torch.nn.Parameter(m.lora_b.float())
    m = model.layers[0].attn.q
    exact = m.weight.double() + 8 / 3 * m.lora_b.double() @ m.lora_a.double()
    merged = merge_lora(model).layers[0].attn.q.weight
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.bfloat16())


@torch.no_grad()
def test_the_merged_model_is_a_hugging_face_folder(tmp_path):
    model = merge_lora(with_lora())
    save_llama(model, tmp_path)
    assert torch.equal(load_llama(tmp_path)(IDS), model(IDS))


# ---------------------------------------------------------------------------------------------- PEFT's files

@torch.no_grad()
def test_an_adapter_of_peft(published):
    out = load_file(GOLDEN / "llama_logits.safetensors")
    model = load_lora(load_llama(published), GOLDEN / "lora")
    assert_near("LoRA = peft's, logits (golden files)", difference(model(out["gqa.ids"]), out["lora.logits"]), 1e-5)
    assert difference(out["gqa.logits"], out["lora.logits"]) > 1e-2                # so the file does see the adapter
    merged = merge_lora(model)(out["gqa.ids"])
    assert_near("LoRA = peft's, logits (golden files)", difference(merged, out["lora.logits"]), 1e-5)


def test_what_is_saved_is_what_peft_writes(published, tmp_path):
    """Same names, shapes, values; and of the options those that PEFT needs to read it back."""
    saved = tmp_path / "out/lora"
    save_lora(load_lora(load_llama(published), GOLDEN / "lora"), saved)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (GOLDEN / "lora", saved))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)
    theirs, ours = (json.loads((folder / "adapter_config.json").read_text()) for folder in (GOLDEN / "lora", saved))
    assert sorted(theirs.pop("target_modules")) == sorted(ours.pop("target_modules"))
    assert {k: theirs.get(k) for k in ours} == ours | {"task_type": None}
    assert {f.name for f in saved.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.parametrize("targets", [("q", "v"), LORA_TARGETS])
@torch.no_grad()
def test_saved_and_loaded(tmp_path, targets):
    model = with_lora(targets, dropout=0.25)
    save_lora(model, tmp_path)
    again = load_lora(plain(), tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    m = again.layers[0].attn.q
    assert (m.rank, m.alpha, m.dropout) == (3, 8, 0.25)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert torch.equal(load_lora(plain(), tmp_path)(IDS), model(IDS))              # as PEFT wrote before 0.8


@pytest.mark.parametrize("option, value", [
    ("use_rslora", True), ("use_dora", True), ("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 4}),
    ("modules_to_save", ["lm_head"]), ("lora_bias", True), ("bias", "all"), ("layers_to_transform", [0]),
    ("fan_in_fan_out", True), ("init_lora_weights", "pissa"), ("peft_type", "LOHA"), ("target_modules", "all-linear"),
    ("an_option_of_tomorrow", 1)])
def test_what_changes_the_mathematics_is_refused_by_name(tmp_path, option, value):
    save_lora(with_lora(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {option: value}))
    with pytest.raises(ValueError, match=option) as error:
        load_lora(plain(), tmp_path)
    assert one_line(error)


def test_a_layer_named_twice_learns_once():
    assert len(lora_layers(apply_lora(plain(), targets=("q", "up", "q")))) == 2 * CONFIG.n_layers


def test_adapters_that_do_not_fit(tmp_path):
    save_lora(with_lora(), tmp_path)
    torch.manual_seed(0)
    other = Llama(LlamaConfig(dim=16, n_layers=2, n_heads=6, n_kv_heads=2, ffn_dim=20, vocab_size=50, head_dim=8))
    says = r"14 misshapen: .*up_proj.lora_A.weight \(3, 24\) instead of \(3, 16\)"
    with pytest.raises(ValueError, match=says) as error:
        load_lora(other, tmp_path)
    assert one_line(error)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gone = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({k: t.clone() for k, t in tensors.items() if k != gone}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"1 missing: {gone}"):
        load_lora(plain(), tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter_config.json is not there"):
        load_lora(plain(), tmp_path / "nothing")


def test_wrong_use_is_one_line(tmp_path):
    for call, words in ((lambda: apply_lora(plain(), targets=("q", "head")), "expected some of q, k, v"),
                        (lambda: apply_lora(plain(), targets=()), "expected some of"),
                        (lambda: apply_lora(with_lora()), "has LoRA already"),
                        (lambda: save_lora(plain(), tmp_path), "no LoRA to save"),
                        (lambda: save_llama(with_lora(), tmp_path), "merge_lora before")):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert one_line(error)
    assert not list(tmp_path.iterdir())
