"""
Proves of the ladder: each variant changes the one thing that it names, its table's figures are the scorer's, and its p
tells a difference from none.

    pytest tests/run/test_ladder.py
"""
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
from aquila import IMAGE_SLOT, PRESETS, Aquila, build
from checks import ladder
from checks.variants import VARIANTS, BothWays, KeysOnly, keep_maps
from convnext import ConvNeXtConfig
from llama import LlamaConfig
from scoring.scores import score
from sfi import SFI
from tokenizer import load_tokenizer
from toy.scenes import make_records

CONFIG = dataclasses.replace(PRESETS["tiny"], vision=ConvNeXtConfig((1, 1, 1, 1), (8, 8, 8, 8)), image_size=64, dim=16,
                             llm=LlamaConfig(dim=16, n_layers=4, n_heads=2, n_kv_heads=1, ffn_dim=32, vocab_size=40))


def make(name, **changes):
    """The variant with fixed weights; MDA's way back does not start at zero, so that it counts."""
    torch.manual_seed(0)
    model = VARIANTS[name](dataclasses.replace(CONFIG, **changes)).eval()
    for number, (_, p) in enumerate(sorted(model.named_parameters())):
        p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number + 1))
    return model


@torch.no_grad()
def logits(model):
    ids = torch.full((2, 9), 5)
    ids[:, 2:6] = IMAGE_SLOT
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return model({"ids": ids, "images": images, "lengths": torch.tensor([9, 9])})[1]


def test_every_variant_is_another_model():
    said = {name: logits(make(name, integration="concat" if name == "one-cell" else "sfi")) for name in VARIANTS}
    said["concat"] = logits(make("whole", integration="concat"))
    assert all(out.isfinite().all() for out in said.values())
    names = list(said)
    alike = [(a, b) for i, a in enumerate(names) for b in names[:i] if torch.allclose(said[a], said[b], atol=1e-4)]
    assert not alike


def test_keys_only_without_codes_is_the_printed_equation():
    torch.manual_seed(0)
    sfi, queries = SFI(16, 16, 4, 8, heads=2), torch.randn(1, 6, 16)
    pyramid = [torch.randn(2, 6, k * k, 16) for k in (8, 4, 2, 1)]
    expected = sfi.printed(queries, pyramid)
    sfi.__class__ = KeysOnly
    assert torch.allclose(sfi(queries, [torch.cat((x, x), -1) for x in pyramid]), expected, atol=1e-5)
    nothing = sfi(queries, [torch.cat((x, 0 * x), -1) for x in pyramid])           # values are of the second half alone
    assert torch.allclose(nothing, sfi.wo(sfi.wq(queries)).expand(2, -1, -1), atol=1e-5)
    maps = [torch.randn(1, 8, 2 * k, 2 * k) for k in (8, 4, 2, 1)]
    both, plain = BothWays((8, 8, 8, 8), 16), Aquila(CONFIG).pyramid
    both.load_state_dict(plain.state_dict())
    for cells, known in zip(both(maps)[0], plain(maps)[0]):
        assert torch.equal(cells[..., :16], known) and not torch.allclose(cells[..., 16:], known, atol=0.1)


@pytest.mark.parametrize("left_out", range(4))
def test_a_scale_left_out_is_not_seen(left_out):
    model = make(f"without-{4 * 2 ** left_out}")
    maps = [x.requires_grad_() for x in model.encode_images(torch.randn(1, 3, 64, 64))]
    pyramid, tokens = model.image_tokens(maps)
    total = tokens.sum() + model.mda["0"](tokens, pyramid).sum()
    seen = [x.grad is not None and bool(x.grad.any()) for x in maps] if total.backward() is None else []
    assert seen == [scale != left_out for scale in range(4)]


@torch.no_grad()
def test_kept_maps_give_the_same_answers(tmp_path, monkeypatch):
    for place, name in ((data, "load_pixels"), (Aquila, "encode_images")):
        monkeypatch.setattr(place, name, getattr(place, name))                     # put back afterwards
    model = build(PRESETS["tiny"]).eval()
    records = make_records("train", 3, "chat", size=128)
    rows = data.Records(records, ".", load_tokenizer(model.config.llm_dir), model.config)
    read = lambda: model(data.collate([rows[i] for i in range(3)]))[1]
    pixels = data.collate([rows[i] for i in range(3)])["images"]
    maps, expected = model.encode_images(pixels), read()
    keep_maps(tmp_path)
    assert all(map(torch.equal, model.encode_images(pixels), maps))                # pixels are encoded as before
    first, again, row_size = read(), read(), rows[0]["images"].numel()
    assert torch.allclose(first, expected, atol=5e-3) and torch.equal(first, again)
    rows.records = [*records[1:], records[0]]                                      # other scenes, other maps
    assert len(list(tmp_path.rglob("*.npy"))) == 3 and not torch.allclose(read(), expected, atol=1e-2)
    assert model.bfloat16().encode_images(data.collate([rows[0]])["images"])[0].dtype == torch.bfloat16
    rows.config = dataclasses.replace(model.config, image_size=64)
    assert 4 * rows[0]["images"].numel() == row_size                               # another size, other maps
    for folder, color in (("a", "red"), ("b", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 32), color).save(tmp_path / folder / "x.png")
    config, wide = model.config, dataclasses.replace(model.config, fit="letterbox")
    of = lambda folder, config: data.load_pixels({"image": "x.png"}, tmp_path / folder, config)[0]
    different = of("a", config), of("b", config), of("a", wide)                  # other folders, other fit
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(different, 2))
    with pytest.raises(ValueError, match="one image a record"):
        data.load_pixels({}, tmp_path, config)


def test_figures_are_the_scorers(tmp_path):
    rows = [{"image": "a", "type": "count", "prediction": "2", "answer": "2"},
            {"image": "a", "type": "count", "prediction": "3", "answer": "2"},
            {"image": "b", "type": "color", "prediction": "Red.", "answer": "red"},
            {"image": "a", "type": "caption", "prediction": "two red ships", "references": ["two red ships on river"]},
            {"image": "b", "type": "caption", "prediction": "a plane", "references": ["one big white plane"]}]
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bleu, accuracy = ladder.figures(np.array(ladder.summary(path)["scenes"]))
    expected = score(rows)
    assert abs(bleu - expected["BLEU-1"][0]) < 1e-6 and abs(accuracy - expected["accuracy"][0]) < 1e-9


def test_p_tells_a_difference_from_none():
    rng = np.random.default_rng(0)

    def runs(right):
        return [{"scenes": [[int(rng.binomial(8, right)), 8, 6, 10, 10] for _ in range(100)]} for _ in range(3)]

    low, same, high = runs(0.7), runs(0.7), runs(0.8)
    mean, p = ladder.difference(high, low, 500)[1]
    assert 6 < mean < 14 and p < 0.01
    assert ladder.difference(low, high, 500)[1] == (-mean, p)
    assert ladder.difference(same, low, 500)[1][1] > 0.1
