"""pretrain.py: what its texts say, that balancing changes nothing else, and that its files load."""

import numpy as np
import torch

import pretrain
import scenes
from convnext import CONVNEXTS, load_convnext


def test_a_text_is_true_of_every_image_it_fits():
    texts, true = pretrain.pairs(range(40))
    assert true.shape == (40, len(texts)) and len(set(texts)) == len(texts)
    for index, row in enumerate(true):
        objects = scenes.layout("train", index, 0).items
        for text, fits in zip(texts, row):
            number, color, name = (text.split(maxsplit=2) + ["", ""])[:3]
            if number in scenes.NUMBERS and name:
                told = scenes.NUMBERS.index(number)
                assert fits == (told == sum(o.color == color and scenes.plural(o.name, told) == name for o in objects))
    shared = (true.sum(0) > 1).float().mean()
    assert 0.1 < shared < 0.9  # else either no text is shared, or none tells images apart


def test_balanced_maps_have_rms_one_and_the_logits_stay():
    torch.manual_seed(0)
    model = pretrain.CLIP(CONVNEXTS["tiny"], ["red", "ship"]).eval()
    for p in model.trunk.parameters():
        p.data += 0.1 * torch.randn_like(p)
    images, ids = torch.randn(4, 3, 64, 64), model.text.tokens(["red ship", "ship"])
    with torch.no_grad():
        before = model(images, ids)
        pretrain.balance(model.trunk, images)
        after, maps = model(images, ids), model.trunk(images)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert all(abs(x.square().mean().sqrt() - 1) < 1e-3 for x in maps)


def test_the_vision_file_is_an_open_clip_file(tmp_path, capsys):
    pretrain.pretrain_vision(tmp_path, n_scenes=8, steps=2, batch=4, seed=0)
    assert "step 2/2" in capsys.readouterr().out
    vision = load_convnext(tmp_path / "tiny-clip.safetensors")
    assert vision.config == CONVNEXTS["tiny"]
    images = torch.from_numpy(np.stack([pretrain.render(i) for i in range(2)])).permute(0, 3, 1, 2).float() / 255
    assert all(0.3 < x.square().mean().sqrt() < 3 for x in vision(images))
