"""
Proves that the seam holds which README describes under "Other parts": another vision encoder and another LM go in at
the lines of aquila.py named there, and train, generate, save and load without an edit elsewhere.

    pytest tests/method/test_other_parts.py
"""
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import ROWS, SMALL
from torch import nn

import aquila
from data import collate


@dataclasses.dataclass(frozen=True)
class PatchesConfig:
    dims: tuple
    patch: int = 4


class Patches(nn.Module):
    """The least vision encoder that fits: averaged pixels, one linear layer a stride."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(nn.Conv2d(3, dim, 1) for dim in config.dims)

    def forward(self, images):
        return [layer(F.avg_pool2d(images, self.config.patch * 2 ** s)) for s, layer in enumerate(self.layers)]


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    dim: int
    n_layers: int
    vocab_size: int = 264
    n_kv_heads: int = 1
    head_dim: int = 8
    norm_eps: float = 1e-5
    max_len: int = 512


class Mixer(nn.Module):
    """The least LM that fits: each position sees the mean of all up to it. It keeps that mean in the KV cache."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(config.n_layers))
        self.small = nn.Linear(config.dim, config.head_dim)
        self.head = nn.Linear(config.head_dim, config.vocab_size)

    def forward(self, x, cache=None, before_layer=None, at=None):
        x = x if x.is_floating_point() else self.embed(x)
        B, T, _ = x.shape
        for i, layer in enumerate(self.layers):
            x = before_layer(i, x) if before_layer else x
            x = x + torch.tanh(layer(x))
        k = self.small(x)[:, None]                                                 # (B, 1, T, 8)
        positions = torch.arange(T)[None]
        if cache is not None:
            positions = cache.next_positions(T)
            k, _ = cache.store(0, positions, k, k)
            cache.advance(T)
        keys = torch.arange(k.shape[2])
        seen = (keys <= positions[..., None]).to(k.dtype)                          # (1 or B, T, keys)
        mean = seen @ k[:, 0] / seen.sum(-1, keepdim=True)
        return self.head(mean if at is None else mean[at])


@pytest.fixture
def other_parts(monkeypatch):
    """aquila.py with the two lines changed; the loaders give seeded weights."""
    def load(kind, config):
        def loaded(path, dtype=torch.float32, device="cpu"):
            torch.manual_seed(1)
            return kind(config).to(device, dtype).eval()
        return loaded

    vision, llm = PatchesConfig((6, 8, 10, 12)), MixerConfig(dim=24, n_layers=3)
    for name, value in {"VisionEncoder": Patches, "VisionConfig": PatchesConfig, "load_vision": load(Patches, vision),
                        "LM": Mixer, "LMConfig": MixerConfig, "load_lm": load(Mixer, llm)}.items():
        monkeypatch.setattr(aquila, name, value)
    return dataclasses.replace(SMALL, vision=vision, llm=llm, vision_file=__file__, llm_dir=__file__)


def test_they_train_generate_save_and_load(other_parts, tmp_path):
    model = aquila.build(other_parts)
    assert isinstance(model.vision, Patches) and isinstance(model.llm, Mixer)
    params = aquila.set_stage(model.train(), 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(collate(ROWS))[0].backward()
    torch.optim.SGD(params.values(), lr=0.1).step()
    moved = {aquila.part_of(name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"pyramid", "tokens", "mda"}

    together = torch.stack(list(model.eval().generate(collate(ROWS), stop_ids=(), max_new_tokens=5)))
    for i, row in enumerate(ROWS):
        alone = torch.stack(list(model.generate(collate([row]), stop_ids=(), max_new_tokens=5)))
        assert torch.equal(together[:, i], alone[:, 0])
    aquila.save_model(model, tmp_path)
    again = aquila.load_model(tmp_path)
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in model.named_parameters())
