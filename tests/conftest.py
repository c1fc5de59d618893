"""What the tests share: the repository on the import path, two threads, and a small random Aquila."""
import dataclasses
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)

from aquila import PRESETS, Aquila, LoRAConfig  # noqa: E402
from convnext import ConvNeXtConfig  # noqa: E402
from llama import LlamaConfig  # noqa: E402

SMALL = dataclasses.replace(
    PRESETS["tiny"], vision=ConvNeXtConfig((1, 1, 1, 1), (8, 12, 16, 24)), image_size=64, dim=16,
    mda_layers=(0, 2),
    llm=LlamaConfig(dim=24, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=40, vocab_size=264, head_dim=8))


@torch.no_grad()
def randomise(model, seed=0):
    """Every parameter random, MDA's returns and the layer scales too, so that no path is shut."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.3 if p.dim() > 1 else 0.1))
        if "norm" in name and name.endswith("weight"):
            p.add_(1)
    return model


@pytest.fixture
def small():
    """make(**changes of the config) -> a random Aquila in eval mode; its images are 64 pixels, 2x2 tokens."""
    def make(dtype=torch.float32, **changes):
        return randomise(Aquila(dataclasses.replace(SMALL, **changes)).to(dtype)).eval()
    return make


@pytest.fixture
def lora():
    return LoRAConfig(rank=4, alpha=8, dropout=0.0)
