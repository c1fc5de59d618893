"""
Proves that the memory which `aquila.py --memory` predicts is that of a real step: weights, gradients and optimizer as
their parameters count, activations as autograd saves them, the peak as every operation of a real step adds to it.

    pytest tests/run/test_memory.py
"""
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, assert_near, command_line
from torch.utils._python_dispatch import TorchDispatchMode

from aquila import PRESETS, assemble, set_stage
from commands import memory
from commands.memory import Ledger, describe_memory, predict, sized_batch
from commands.model import main
from llama import LlamaConfig
from train import RECIPES, Recipe, optimizer_for

CONFIG = dataclasses.replace(SMALL, dim=64, llm=LlamaConfig(64, 2, 4, 2, 160, 500), mda_layers=(0,))
RECIPE = Recipe(lr=1e-3, decay=0.1, warmup=0, batch=8, micro=4)
TOKENS = 40


def real_parts(config, stage, recipe):
    """What predict builds, with numbers. -> model, trained parameters, optimizer, the micro-batches of a step"""
    model = assemble(config).train()
    model.vision.eval()
    model.llm.grad_checkpoint = recipe.grad_checkpoint
    trained = list(set_stage(model, stage).values())
    batch = {name: torch.zeros(x.shape) if isinstance(x, memory.SizedTensor) else x
             for name, x in sized_batch(config, recipe.micro, TOKENS).items()}
    return model, trained, optimizer_for(trained, recipe.decay), [batch, {**batch, "images": batch["images"].clone()}]


def bytes_of(tensors):
    """Of all storages, each once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("stage, changes", [(1, {}), (3, {"lora": True, "region_dim": 32}),
                                            (3, {"full_llm": True, "region_dim": 32})])
def test_activations_are_what_autograd_saves(lora, stage, changes):
    """All else is exact. Activations: the tensors saved for the backward pass, and the images."""
    config = dataclasses.replace(CONFIG, **{k: lora if k == "lora" else v for k, v in changes.items()})
    found = predict(config, stage, RECIPE, optimizer_for, TOKENS, torch.float32)
    model, trained, _, batches = real_parts(config, stage, RECIPE)
    own, all_weights = bytes_of(trained), bytes_of(model.parameters())
    exact = {"frozen weights": all_weights - own, "trained weights": own, "gradients": own, "optimizer": 2 * own,
             "DDP's buckets": 0}
    assert {what: found[what] for what in exact} == exact
    saved, weights = [], {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss, _, _ = model(batches[0])
    saved = [x for x in saved if x.untyped_storage().data_ptr() not in weights]
    given = [x for batch in batches for x in (batch["images"], batch["masks"]) if x is not None]
    assert_near("predicted activations = what autograd saves", abs(found["activations"] / bytes_of(saved + given) - 1),
                0.03)


class Counting(TorchDispatchMode):
    """Every tensor that an operation makes is added to the ledger."""

    def __init__(self, ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, torch.Tensor):
                self.ledger.add(x.untyped_storage())
        return result


@pytest.mark.parametrize("dtype, grad_checkpoint", [(torch.float32, False), (torch.bfloat16, True)])
def test_the_peak_is_that_of_a_real_step(lora, dtype, grad_checkpoint):
    config = dataclasses.replace(CONFIG, lora=dataclasses.replace(lora, dropout=0.1))
    recipe = dataclasses.replace(RECIPE, grad_checkpoint=grad_checkpoint)
    state = torch.get_rng_state()
    found = predict(config, 2, recipe, optimizer_for, TOKENS, dtype)
    assert torch.equal(state, torch.get_rng_state())           # a run that asks goes on as one that does not
    ledger = Ledger()
    with Counting(ledger):
        model, trained, optimizer, batches = real_parts(config, 2, recipe)
        model.vision.to(dtype)
        for name, p in model.llm.named_parameters():
            p.data = p.data if "lora" in name else p.data.to(dtype)
        for p in trained:                                      # a step without a batch, for the optimizer's state
            p.grad = torch.zeros_like(p)
        optimizer.step()
        ledger.peak = ledger.now
        for batch in batches:
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                loss, _, _ = model(batch)
            loss.backward()
    assert_near("predicted peak = that of a real step", abs(found["peak"] / ledger.peak - 1), 0.02)


def test_processes_and_checkpoints_count():
    """DDP's buckets are one more copy of the gradients; layers computed again keep less."""
    found = [predict(CONFIG, 1, RECIPE, optimizer_for, TOKENS, torch.float32, processes) for processes in (1, 2)]
    assert found[1]["DDP's buckets"] == found[1]["gradients"]
    less = dataclasses.replace(RECIPE, grad_checkpoint=True)
    assert predict(CONFIG, 1, less, optimizer_for, TOKENS, torch.float32)["peak"] < 0.9 * found[0]["peak"]


@pytest.mark.parametrize("preset", ["aquila-8b", "aquila-plus-7b"])
def test_the_large_presets_fit_80_gb(preset):
    """On 4 processes, with samples as long as they may be. The last stage trains all that the others do."""
    stage, recipe = list(RECIPES[preset].items())[-1]
    config = dataclasses.replace(PRESETS[preset], lora=recipe.lora)
    assert recipe.batch == 32 and recipe.batch % (4 * recipe.micro) == 0
    assert {(r.micro, r.grad_checkpoint) for r in RECIPES[preset].values()} == {(recipe.micro, recipe.grad_checkpoint)}
    found = predict(config, stage, recipe, optimizer_for, config.max_len, torch.bfloat16, 4)
    assert 20e9 < found["peak"] < 72e9


# ---------------------------------------------------------------------------------------------- the commands

def test_the_table():
    code, out, err = command_line(main, "--preset", "tiny-plus", "--memory", "--micro", 2, "--tokens", 30)
    assert (code, err) == (0, "") and "samples of 30 tokens" in out
    rows = [line.split() for line in out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [[str(stage), "2", "no"] for stage in (1, 2, 3)]
    for row in rows:                        # its numbers are rounded
        assert abs(sum(map(float, row[3:-1])) - float(row[-1])) < 0.05
    peaks = [float(line.split()[-1]) for line in out.splitlines()[2:]]
    code, out, _ = command_line(main, "--preset", "tiny-plus", "--memory", "--micro", 2, "--tokens", 30, "--full-llm")
    full = [float(line.split()[-1]) for line in out.splitlines()[2:]]
    assert code == 0 and full[:2] == peaks[:2] and full[2] > peaks[2]              # stage 3 alone can train the LM
    code, _, err = command_line(main, "--preset", "tiny", "--memory", "--full-llm")
    assert code == 2 and err == "aquila.py: --full-llm: tiny trains the LM by LoRA alone; take an aquila-plus preset\n"
    code, _, err = command_line(main, "--preset", "tiny", "--memory", "--tokens", 18)
    assert code == 2 and err == "aquila.py: --tokens 18: 16 of them are the image's; expected more than 18\n"


def test_a_run_says_its_peak_and_warns(capsys, monkeypatch):
    """A small model says nothing."""
    run = SimpleNamespace(model=assemble(CONFIG), recipe=RECIPE, dtype=torch.float32)
    cuda = torch.device("cuda", 0)

    def said(size):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=size))
        describe_memory(run, 1, optimizer_for, TOKENS, 2, cuda)
        return capsys.readouterr().out.splitlines()

    assert said(1) == []
    monkeypatch.setattr(memory, "SMALL", 0)
    peak = predict(CONFIG, 1, RECIPE, optimizer_for, TOKENS, torch.float32, 2)["peak"]
    [line] = said(peak)
    assert line.startswith(f"predicted peak of memory {peak / 1e9:.1f} GB") and f"{TOKENS} tokens" in line
    line, warning = said(peak - 1)
    assert warning.startswith("warning: the device has 0.0 GB, less than")
    describe_memory(run, 1, optimizer_for, TOKENS, 2, torch.device("cpu"))
    assert len(capsys.readouterr().out.splitlines()) == 1
