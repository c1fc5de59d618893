"""
Proves of the pretraining: a text is true of every image that it fits, balancing changes nothing but the size of the
maps, the file that is written loads, and what the LM is told holds what it is asked.

    pytest tests/run/test_pretrain.py
"""
import re
from collections import Counter

import numpy as np
import torch

from checks import pretrain, told
from convnext import CONVNEXTS, load_convnext
from llama import Llama, LlamaConfig
from toy.layout import make_layout
from toy.scenes import NUMBERS, make_scene, plural


def test_a_text_is_true_of_every_image_it_fits():
    texts, true = pretrain.pairs(range(40), [0] * 40)
    assert true.shape == (40, len(texts)) and len(set(texts)) == len(texts)
    for index, row in enumerate(true):
        objects = make_layout("train", index, 0).items
        for text, fits in zip(texts, row):
            number, color, name = (text.split(maxsplit=2) + ["", ""])[:3]
            if number in NUMBERS and name:
                told = NUMBERS.index(number)
                assert fits == (told == sum(o.color == color and plural(o.name, told) == name for o in objects))
    shared = (true.sum(0) > 1).float().mean()
    assert 0.1 < shared < 0.9               # else either no text is shared, or none tells images apart


def test_a_turned_image_and_its_objects_turn_alike():
    item = make_layout("train", 0, 0).items[0]._replace(x=0.8, y=0.3)
    image = torch.zeros(3, 10, 10)
    image[:, 3, 8] = 1
    places = set()
    for turn in range(8):
        row, column = pretrain.turned_image(image, turn)[0].nonzero()[0].tolist()
        there = pretrain.turned(item, turn)
        # The cell 8 of 10 from 0.8 on ends at 0.9; mirrored it is cell 1, which 0.2 ends.
        assert abs(10 * there.x - column - 0.5) < 0.51 and abs(10 * there.y - row - 0.5) < 0.51
        places.add((row, column))
    assert len(places) == 8


def test_balanced_maps_have_rms_one_and_the_logits_stay():
    torch.manual_seed(0)
    model = pretrain.CLIP(CONVNEXTS["tiny"], ["red", "ship"]).eval()
    for p in model.trunk.parameters():
        p.data += 0.1 * torch.randn_like(p)
    images, texts = torch.randn(4, 3, 64, 64), ["red ship", "ship"]
    with torch.no_grad():
        before = model(images, texts)
        pretrain.balance(model.trunk, images)
        after, maps = model(images, texts), model.trunk(images)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert all(abs(x.square().mean().sqrt() - 1) < 1e-3 for x in maps)


def test_the_vision_file_is_an_open_clip_file(tmp_path, capsys):
    pretrain.pretrain_vision(tmp_path, n_scenes=8, steps=2, batch=4, seed=0)
    assert "step 2/2" in capsys.readouterr().out
    vision = load_convnext(tmp_path / "tiny-clip.safetensors")
    assert vision.config == CONVNEXTS["tiny"]
    pictures = np.stack([make_scene("train", i, 0, 128).image for i in range(2)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    assert all(0.3 < x.square().mean().sqrt() < 3 for x in vision(images))


def test_what_is_told_holds_the_answers():
    """Of every question about a place, in practice texts and in what checks.told asks, the story holds the answer."""
    asked = Counter()
    for record in [pretrain.reading_practice(i, np.random.default_rng(i)) for i in range(20)] + told.told_records(20):
        texts = [turn["value"] for turn in record["conversations"]]
        story, _, texts[0] = texts[0].partition("\n")
        for question, answer in zip(texts[::2], texts[1::2]):
            found = re.search(r"(?:Where|In which part of the image) (?:is|are) the (.*?)s?\?", question)
            if found:
                by_place = re.search(f"; {answer}: ([^;]*)", story)                # or object by object
                assert found[1] in by_place[1].split(", ") if by_place else f"; {found[1]} {answer}" in story
                asked[bool(by_place)] += 1
    assert asked[True] > 50 and asked[False] > 50


def test_text_loss_is_the_mean_over_real_tokens():
    torch.manual_seed(0)
    llm = Llama(LlamaConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=16, vocab_size=20)).eval()
    rows = [torch.randint(20, (n,)) for n in (7, 4)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    expected = sum(-llm(llm.embed(row[None]))[0, :-1].log_softmax(-1).gather(1, row[1:, None]).sum() for row in rows)
    total, n = told.text_loss(llm, ids, torch.tensor([7, 4]))
    assert n == 9 and abs(total - expected.item()) < 1e-4
