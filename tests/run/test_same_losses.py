"""
Proves that the way through the steps changes no loss and no weight, with LoRA's dropout on: in float64, where rounding
hides nothing. 100 steps on more ways, and in float32: python -m checks.same_losses

    pytest tests/run/test_same_losses.py
"""
import pytest
import torch
from conftest import assert_near, command_line

import train
from checks.same_losses import SMALL, drifted, furthest, in_float64, outcome, run

AS_ONE = "float64, LoRA dropout: accumulated, resumed in two processes = one process"


@pytest.fixture
def float64(monkeypatch):
    monkeypatch.setattr(train, "build", train.build)           # put back afterwards, as the number of threads
    in_float64()
    before = torch.get_num_threads()
    torch.set_num_threads(1)                # as the two processes have; more would wait for each other
    yield
    torch.set_num_threads(before)


def test_accumulated_and_resumed_in_two_processes(float64, tmp_path):
    stage1 = ("--stage", 1, *SMALL, "--steps", 1, "--micro", 4, "--out", tmp_path / "stage1")
    assert command_line(train.main, *stage1)[0] == 0
    flags = ("--stage", 2, "--lora-dropout", 0.1, "--init-from", tmp_path / "stage1", *SMALL, "--steps", 3)
    assert command_line(train.main, *flags, "--micro", 4, "--out", tmp_path / "whole")[0] == 0
    assert command_line(train.main, *flags, "--micro", 1, "--out", tmp_path / "parts", "--stop-after", 1)[0] == 0
    run("float64", 2, (*flags, "--micro", 1, "--out", tmp_path / "parts", "--resume", "auto"))
    (expected, whole), (losses, parts) = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    assert_near(f"{AS_ONE}, losses of 3 steps", furthest(losses, expected), 1e-10)
    assert_near(f"{AS_ONE}, last weights", drifted(whole, parts), 1e-10)
