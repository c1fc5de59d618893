"""
Proves what the assembled model promises: text alone is the base LM bit for bit, batches equal single prompts, cached
decoding equals a full forward, a checkpoint comes back whole, a stage trains what its table says, and what is exported
for other programs is the model that was trained.

    pytest tests/method/test_aquila.py
"""
import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, ROWS, SMALL, ByteTokenizer, assert_near, command_line, difference, prompt

from aquila import (PRESETS, TRAINS, Aquila, LoRAConfig, build, config_from_dict, config_to_dict, load_checkpoint,
                    part_of, save_model, set_stage)
from commands import model as model_command
from data import collate
from llama import KVCache, load_llama, load_lora, lora_layers, merge_lora
from lora import seed_dropout
from tokenizer import IGNORE, load_tokenizer


@pytest.mark.parametrize("mda", [(0, 2), ()], ids=["MDA", "no MDA"])
@pytest.mark.parametrize("integration", ["sfi", "concat"])
def test_text_alone_is_the_base_lm_bit_for_bit(small, integration, mda):
    """Random (so: trained) MDA weights; prefill and cached decoding. All four rows of Table 5."""
    model = small(integration=integration, mda_layers=mda)
    batch = collate([prompt("no image here"), prompt("nor here, and longer")])
    ids = batch["ids"]
    logits = model({**batch, "labels": None})[1]
    assert_near("Aquila on text alone = its LM, logits", difference(logits, model.llm(ids)), 0)
    ours = list(model.generate({**batch, "labels": None}, stop_ids=(), max_new_tokens=5))
    cache = KVCache(SMALL.llm, 2, ids.shape[1] + 5, torch.float32, "cpu")
    logits = model.llm(ids, cache=cache, at=(torch.arange(2), batch["lengths"] - 1))
    cache.set_lengths(batch["lengths"])
    for step in ours:
        assert torch.equal(step, logits.argmax(-1))
        logits = model.llm(step[:, None], cache=cache)[:, -1]


def test_text_rows_of_a_mixed_batch_never_see_the_images(small):
    model = small()
    mixed = collate([ROWS[0], ROWS[1]])
    text = {**mixed, "images": None, "ids": mixed["ids"].clamp(min=0)}
    assert torch.equal(model({**mixed, "labels": None})[1][1], model({**text, "labels": None})[1][1])


@pytest.mark.parametrize("heads", [1, 4])
def test_a_batch_equals_its_rows_one_by_one(small, heads):
    """Rows with no, one and two images and unequal lengths: logits at the answers and generated tokens."""
    model = small(heads=heads)
    loss, logits, n = model(collate(ROWS))
    singles = [model(collate([row])) for row in ROWS]
    assert n == sum(s[2] for s in singles)
    assert_near("Aquila on a batch = on its rows, logits", difference(logits, torch.cat([s[1] for s in singles])), 1e-5)
    assert abs(loss - sum(s[0] for s in singles)) <= 1e-5 * loss
    steps = torch.stack(list(model.generate(collate(ROWS), stop_ids=(), max_new_tokens=6)))
    for i, row in enumerate(ROWS):
        alone = torch.stack(list(model.generate(collate([row]), stop_ids=(), max_new_tokens=6)))
        assert torch.equal(steps[:, i], alone[:, 0])


def test_cached_decoding_equals_a_full_forward_with_mda(small):
    model = small()
    row = prompt("how many?", 2)
    steps = [int(t) for t in model.generate(collate([row]), stop_ids=(), max_new_tokens=8)]
    full = collate([{**row, "ids": row["ids"] + steps, "labels": row["labels"] + [IGNORE] * 8}])
    logits = model({**full, "labels": None})[1][0]
    assert logits[len(row["ids"]) - 1:-1].argmax(-1).tolist() == steps


def test_mda_and_the_image_change_the_answer(small):
    """A test of the tests above: with random weights both really reach the logits."""
    model = small()
    batch = {**collate([prompt("what?", 1)]), "labels": None}
    logits = model(batch)[1]
    other = model({**batch, "images": batch["images"] + 1})[1]
    model.mda = torch.nn.ModuleDict()
    assert (logits - other).abs().max() > 1e-3 and (logits - model(batch)[1]).abs().max() > 1e-3


def test_training_starts_from_the_lm_without_mda():
    """Zero-initialized returns: a new model gives the same logits with and without MDA."""
    torch.manual_seed(0)
    model = Aquila(SMALL).eval()
    batch = {**collate([prompt("what?", 1)]), "labels": None}
    logits = model(batch)[1]
    model.mda = torch.nn.ModuleDict()
    assert torch.equal(logits, model(batch)[1])


def test_loss_is_the_textbook_loss(small):
    """Logits at the learned positions only; the same numbers as all logits, shifted, with ignore_index."""
    model, batch = small(), collate(ROWS)
    loss, logits, n = model(batch)
    every = model({**batch, "labels": None})[1]
    target = batch["labels"][:, 1:].flatten()
    expected = F.cross_entropy(every[:, :-1].flatten(0, 1), target, ignore_index=IGNORE, reduction="sum")
    assert logits.shape == (n, 264) and n == int((target != IGNORE).sum())
    assert_near("loss = the textbook's", difference(loss, expected), 1e-5)


def test_grad_checkpoint_changes_no_gradient(small, lora):
    gradients = []
    for flag in (False, True):
        model = small(lora=lora).train()
        set_stage(model, 2)
        model.llm.grad_checkpoint = flag
        model(collate(ROWS))[0].backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(a, gradients[1][k], rtol=1e-5, atol=1e-6) for k, a in gradients[0].items())


# ---------------------------------------------------------------------------------------------- what a batch is made of

def gradient(model, rows, micro=4, pad=0, copies=False, **more):
    """The gradient of the rows' loss, of micro-batches of so many rows, each padded by so many more."""
    model.zero_grad()
    for i in range(0, len(rows), micro):
        some = [{k: v for k, v in row.items() if not (copies and k == "files")} for row in rows[i:i + micro]]
        batch = collate(some)
        batch["ids"], batch["labels"] = F.pad(batch["ids"], (0, pad)), F.pad(batch["labels"], (0, pad), value=IGNORE)
        batch["images"] = None if batch["images"] is None else batch["images"].double()
        model({**batch, **more})[0].backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}


def largest_difference(ours, theirs):
    return max(difference(ours[k], theirs[k]) for k in ours if theirs[k].any())


@pytest.fixture
def training(small):
    def make(dropout):
        model = small(torch.float64, lora=LoRAConfig(rank=4, alpha=8, dropout=dropout)).train()
        set_stage(model, 2)
        return model
    return make


NUMBERED = [{**row, "number": number} for row, number in zip(ROWS, (70, 3, 11, 1_000_000))]


@pytest.mark.parametrize("changes", [dict(micro=1), dict(micro=2), dict(pad=7), dict(micro=1, pad=3), "again",
                                     "shuffled"], ids=str)
def test_dropout_is_of_the_sample_and_the_step(training, changes):
    """Micro-batches, padding, the order of rows and activation checkpointing change no mask."""
    model, rows = training(0.3), NUMBERED
    expected = gradient(model, rows, draw=5)
    if changes == "again":
        model.llm.grad_checkpoint, changes = True, {}
    elif changes == "shuffled":
        rows, changes = rows[::-1], {}
    found = gradient(model, rows, draw=5, **changes)
    far = largest_difference(found, expected)
    assert_near("LoRA dropout: a batch = its micro-batches, gradient (float64)", far, 1e-12)


def test_dropout_is_another_in_another_step_sample_and_layer(training):
    model, row = training(0.3), {**ROWS[0], "number": 7}
    first = gradient(model, [row], draw=5)
    for number, draw in ((7, dict(draw=6)), (8, dict(draw=5)), (7, {})):
        assert largest_difference(gradient(model, [{**row, "number": number}], **draw), first) > 1e-3
    masks = [m.drop(torch.ones(1, 9, 24)) for m in (model.llm.layers[0].attn.q, model.llm.layers[0].attn.k)]
    assert not torch.equal(*masks) and {0.0} < set(masks[0].unique().tolist()) == {0.0, masks[0].max().item()}
    assert largest_difference(gradient(model, [row]), gradient(model, [row])) > 1e-3               # no draw: as usual


def test_the_share_that_dropout_drops(training):
    model = training(0.3)
    seed_dropout(model.llm, [("1 2", 400), ("1 3", 100)])
    m = model.llm.layers[0].attn.q
    x = m.drop(torch.ones(2, 500, 24))
    for row, length in zip(x, (400, 100)):
        assert abs((row[:length] == 0).float().mean() - 0.3) < 0.02 and row[:length].unique().numel() == 2
    assert not torch.equal(x[0, :100], x[1, :100])


def test_an_image_used_twice_is_encoded_once(training):
    """Four rows of two images, one row with both: the gradients are those with copies, each image is encoded once."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    uses = [("a",), ("b",), ("b", "a"), ("a",)]
    rows = [{**prompt(f"question {i}", len(names), answer="yes"), "files": names,
             "images": torch.stack([images["ab".index(name)] for name in names])} for i, names in enumerate(uses)]
    batch = collate(rows)
    assert batch["images"].shape[0] == 2 and batch["image_of"].tolist() == [0, 1, 1, 0, 0]
    model, seen = training(0.0), []
    model.vision.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    once, copied = gradient(model, rows), gradient(model, rows, copies=True)
    assert seen == [2, 5]
    assert_near("an image used twice = two of it, gradient (float64)", largest_difference(once, copied), 1e-12)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_trains_what_its_table_says(small, lora, stage):
    """One optimizer step: every parameter of the listed parts has a gradient and moves; nothing else changes a bit."""
    model = small(lora=lora if stage == 2 else None)
    model.train()
    trainable = set_stage(model, stage)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    model(collate(ROWS))[0].backward()
    assert all(p.grad is not None for p in trainable.values())
    torch.optim.SGD(trainable.values(), lr=0.1).step()
    moved = {part_of(k) for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert moved == set(TRAINS["aquila"][stage])


def test_a_batch_of_text_alone_gives_every_parameter_a_gradient(small):
    """Else DDP would wait for ever (or refuse) when one process has no image in its batch."""
    model = small().train()
    trainable = set_stage(model, 1)
    model(collate([ROWS[1]]))[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in trainable.values())


def test_wrong_number_of_slots_is_an_error(small):
    model, batch = small(), collate([ROWS[0]])
    for bad in ({**batch, "images": None}, {**batch, "ids": batch["ids"][:, 3:]}):
        with pytest.raises(ValueError, match="image slots in the prompts"):
            model({**bad, "labels": None})


@pytest.mark.parametrize("size", [(64, 96), (32, 128)])
def test_rectangular_images(size):
    """An image of H x W pixels has (H/32)(W/32) tokens; the learned grid is resized to it."""
    torch.manual_seed(0)
    model = Aquila(SMALL)
    pyramid, tokens = model.image_tokens(model.encode_images(torch.randn(2, 3, *size)))
    assert tokens.shape == (2, size[0] * size[1] // 1024, SMALL.llm.dim)
    assert [p.shape[2] for p in pyramid] == [64, 16, 4, 1]


def test_a_checkpoint_comes_back_whole(small, lora, tmp_path):
    """The trained part alone: saved, filled into a model with other weights, equal; a tensor too few is an error."""
    model = small(lora=lora)
    save_model(model, tmp_path)
    torch.manual_seed(1)

    def another(**changes):                 # the same frozen parts, other weights of our own
        new = Aquila(dataclasses.replace(model.config, **changes))
        published = {k: p for k, p in model.named_parameters() if k not in model.own_parameters()}
        unexpected = new.load_state_dict(published, strict=False).unexpected_keys
        assert not unexpected
        return new

    other = another()
    load_checkpoint(other, tmp_path)
    assert all(torch.equal(p, other.own_parameters()[k]) for k, p in model.own_parameters().items())
    assert not any(k.startswith("vision") or (k.startswith("llm") and "lora" not in k) for k in model.own_parameters())
    with pytest.raises(ValueError, match="missing.*mda.1"):
        load_checkpoint(another(mda_layers=(0, 1, 2)), tmp_path)
    with pytest.raises(ValueError, match="unexpected.*lora_a"):
        load_checkpoint(another(lora=None), tmp_path)


@pytest.mark.parametrize("part", ["vision", "llm"])
def test_a_checkpoint_knows_its_frozen_parts(small, part, tmp_path):
    """Other frozen weights are refused by name; the same in another dtype are not."""
    model = small()
    save_model(model, tmp_path)
    load_checkpoint(copy.deepcopy(model).to(torch.bfloat16), tmp_path)
    next(p for k, p in model.named_parameters() if part_of(k) == part).data[0] += 0.1
    with pytest.raises(ValueError, match=f"trained on other weights.*--{part}"):
        load_checkpoint(model, tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name, lora):
    for config in (PRESETS[name], dataclasses.replace(PRESETS[name], lora=lora)):
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_the_papers_sizes():
    """Built without memory: the shapes of Table 2 and Sec. 3.2, and Llama-3-8B's parameter count."""
    text = model_command.describe(PRESETS["aquila-8b"])
    for line in ("(1, 384, 256, 256)", "(1, 3072, 32, 32)", "(1, 1024, 64, 1024)", "(1, 1024, 4096)", "8,030,261,248"):
        assert line in text


@pytest.mark.parametrize("change, message", [
    ({"image_size": 100}, "multiple of 32"), ({"integration": "sum"}, "sfi or concat")])
def test_a_config_that_makes_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_mda_layers_are_those_of_the_lm_that_is_loaded():
    """A preset's LM may have fewer than that of --llm."""
    config = dataclasses.replace(PRESETS["tiny"], mda_layers=(0, 5), llm_dir="weights/small-llm")
    assert list(build(config).mda) == ["0", "5"]
    with pytest.raises(ValueError, match=r"mda_layers \[5\]: the LM has layers 0 to 3"):
        build(dataclasses.replace(config, llm_dir=PRESETS["tiny"].llm_dir))


def test_answers_are_text(small):
    model, tokenizer = small(), ByteTokenizer()
    answers = model.answer(collate(ROWS), tokenizer, max_new_tokens=4)
    assert len(answers) == 4 and all(isinstance(a, str) for a in answers)


def test_a_callers_gradients_stay_on_between_tokens(small):
    for _ in small().generate(collate(ROWS), stop_ids=(), max_new_tokens=2):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# ---------------------------------------------------------------------------------------------- export

IDS = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))


def command(*args):
    return command_line(model_command.main, *args)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """-> the LM as it was trained (bfloat16, LoRA in float32), and the folder that the command wrote."""
    folder, lora = tmp_path_factory.mktemp("export"), LoRAConfig(rank=4, alpha=8, dropout=0.0)
    torch.manual_seed(0)
    model = build(dataclasses.replace(PRESETS["tiny"], lora=lora), torch.bfloat16)
    for _, m in lora_layers(model.llm):
        torch.nn.init.normal_(m.lora_b, std=0.1)
    save_model(model, folder / "run")
    code, out, err = command("--model", folder / "run", "--export", folder / "out")
    assert (code, out, err) == (0, f"wrote {folder / 'out'}\n", "")
    return model.llm.eval(), folder / "out"


@torch.no_grad()
def test_the_exported_llm_is_the_merged_model(exported):
    """Every weight is W + (alpha / rank) B A, rounded to bfloat16 once; the logits, and the tokenizer beside it."""
    trained, folder = exported
    llm = load_llama(folder / "llm", torch.bfloat16)
    for name, m in lora_layers(trained):
        exact = m.weight.double() + 8 / 4 * m.lora_b.double() @ m.lora_a.double()
        merged = llm.get_parameter(f"{name}.weight").double()
        assert torch.allclose(merged, exact, rtol=1.01 * 2 ** -8, atol=1e-7), name                 # half a last bit
    assert torch.equal(llm(IDS), merge_lora(copy.deepcopy(trained))(IDS))
    untrained = load_llama(ROOT / "weights/tiny-llm", torch.bfloat16)
    assert difference(llm(IDS), trained(IDS)) < 0.05 < difference(llm(IDS), untrained(IDS))
    theirs, ours = load_tokenizer(ROOT / "weights/tiny-llm"), load_tokenizer(folder / "llm")
    assert ours.encode("a ship") == theirs.encode("a ship")
    ends = json.loads((folder / "llm/generation_config.json").read_text())["eos_token_id"]
    assert ends and set(ends) == theirs.stop_ids


@torch.no_grad()
def test_the_exported_adapter_is_the_lora(exported):
    trained, folder = exported
    llm = load_lora(load_llama(ROOT / "weights/tiny-llm", torch.bfloat16), folder / "adapter")
    theirs = dict(trained.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in llm.named_parameters()) and len(lora_layers(llm)) == 28
    assert torch.equal(llm(IDS), trained(IDS))


def test_an_adapter_is_merged_without_a_model(exported, tmp_path):
    """--llm and --adapter give the same files as --model."""
    _, folder = exported
    code, _, err = command("--llm", ROOT / "weights/tiny-llm", "--adapter", folder / "adapter", "--export", tmp_path)
    assert (code, err) == (0, "")
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    assert len(files) == 7
    assert all((tmp_path / file).read_bytes() == (folder / file).read_bytes() for file in files)


def test_an_export_never_writes_over_the_lm_that_it_reads(exported):
    _, folder = exported
    before = (folder / "llm/model.safetensors").read_bytes()
    code, _, err = command("--llm", folder / "llm", "--adapter", folder / "adapter", "--export", folder)
    assert code == 2 and "would write over" in err and (folder / "llm/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("flags, message", [
    ((), "--export needs --model, or --llm and --adapter"), (("--adapter", "lora"), "--export needs --model"),
    (("--model", "nothing"), "nothing/config.json is not there"),
    (("--llm", "nothing", "--adapter", "lora"), "nothing has neither config.json")])
def test_a_wrong_export_is_one_line_and_exit_code_2(tmp_path, flags, message):
    code, out, err = command("--export", tmp_path / "out", *flags)
    assert code == 2 and not out and err.startswith(f"aquila.py: {message}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_export_is_not_passed_over():
    code, out, err = command("--model", "nothing")
    assert code == 2 and not out and err == "aquila.py: --model, --vision, --llm and --adapter go with --export DIR\n"


def test_an_export_finds_a_vision_file_that_was_moved(exported, tmp_path):
    _, folder = exported
    config = json.loads((folder.parent / "run/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_file": "moved.safetensors"}))
    (tmp_path / "model.safetensors").symlink_to(folder.parent / "run/model.safetensors")
    flags = "--model", tmp_path, "--export", tmp_path / "out"
    code, _, err = command(*flags)
    assert code == 2 and "it is not at moved.safetensors; give --vision FILE" in err
    code, _, err = command(*flags, "--vision", ROOT / "weights/tiny-clip.safetensors")
    assert (code, err) == (0, "") and (tmp_path / "out/llm/model.safetensors").exists()
