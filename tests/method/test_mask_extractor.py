"""
Proves the mask pooling against a loop over pixels, pins what the published way loses and the area way keeps, and
follows regions through the whole model: slots, tokens, batches, decoding, stages.

    pytest tests/method/test_mask_extractor.py
"""
import dataclasses

import pytest
import torch
from conftest import ByteTokenizer, assert_near, randomize, SMALL

import aquila
from aquila import TRAINS, AquilaPlus, LoRAConfig, load_model, load_checkpoint, part_of, save_model, set_stage
from data import collate, encode_record, encode_turns
from mask_extractor import MaskExtractor, mask_pool, mask_weights
from tokenizer import IGNORE, IMAGE_SLOT, MASK_SLOT, POSITION_SLOT

TOKENIZER = ByteTokenizer()
PLUS = dataclasses.replace(SMALL, region_dim=20, region_side=16, mda_layers=(0,))


# ---------------------------------------------------------------------------------------------- pooling

def by_pixels(features, mask, pooling):
    """One map (c, H, W) and one mask (h, w), h and w multiples of H and W or the other way round, cell by cell."""
    c, H, W = features.shape
    h, w = mask.shape
    total, mass = torch.zeros(c, dtype=features.dtype), 0.0
    for y in range(H):
        for x in range(W):
            rows = range(y * h // H, max((y + 1) * h // H, y * h // H + 1))
            columns = range(x * w // W, max((x + 1) * w // W, x * w // W + 1))
            inside = [float(mask[i, j]) for i in rows for j in columns]
            if pooling == "area":
                weight = sum(inside) / len(inside)
            else:                           # bilinear, four neighbors of the cell's center, then > 0
                cy, cx = max((y + 0.5) * h / H - 0.5, 0), max((x + 0.5) * w / W - 0.5, 0)
                fy, fx, value = cy - int(cy), cx - int(cx), 0.0
                for i, a in ((int(cy), 1 - fy), (min(int(cy) + 1, h - 1), fy)):
                    for j, b in ((int(cx), 1 - fx), (min(int(cx) + 1, w - 1), fx)):
                        value += a * b * float(mask[i, j])
                weight = float(value > 0)
            total, mass = total + weight * features[:, y, x], mass + weight
    return total / mass if mass else total


@pytest.mark.parametrize("pooling", ["area", "binary"])
@pytest.mark.parametrize("size", [(32, 32), (48, 16), (8, 8), (4, 4)])
def test_pooling_equals_a_loop_over_pixels(pooling, size):
    """float64; maps of 8 x 8 and masks larger, longer, equal and smaller; an empty mask is 0."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 8, 8, dtype=torch.float64, generator=generator)
    masks = (torch.rand(2, 3, *size, dtype=torch.float64, generator=generator) > 0.6).double()
    masks[1, 2] = 0
    pooled = mask_pool(features, masks, pooling)
    expected = torch.stack([torch.stack([by_pixels(f, m, pooling) for m in own]) for f, own in zip(features, masks)])
    assert not pooled[1, 2].any()
    assert_near("mask pooling = a loop over pixels (float64)", (pooled - expected).abs().max(), 1e-12)


def test_small_regions_area_keeps_binary_loses():
    """
    Both ways pinned at a 1024 image: cells that an 8 x 8 and a 40 x 40 region cover at strides 4, 8, 16, 32, and the
    feature of the 8 x 8 one at stride 32, which is exactly zero in the published way.
    """
    masks = torch.zeros(1, 2, 1024, 1024, dtype=torch.bool)
    masks[0, 0, 512:520, 512:520] = True
    masks[0, 1, 512:552, 512:552] = True
    cells = {p: [] for p in ("area", "binary")}
    for stride in (4, 8, 16, 32):
        side = 1024 // stride
        for pooling in cells:
            ones = torch.ones(1, 1, side, side)
            cells[pooling].append(mask_weights(masks, (side, side), pooling).sum((2, 3))[0].tolist())
            assert (mask_pool(ones, masks, pooling)[0, 0, 0] == 1) == (pooling == "area" or stride < 32)
    assert cells["binary"] == [[4, 100], [1, 25], [1, 9], [0, 1]]
    assert cells["area"] == [[4, 100], [1, 25], [0.25, 6.25], [0.0625, 1.5625]]


def test_padding_and_no_regions():
    extractor = randomize(MaskExtractor((4, 6), 10, dim=8, side=8)).double()
    maps = [torch.randn(3, 4, 16, 16, dtype=torch.float64), torch.randn(3, 6, 8, 8, dtype=torch.float64)]
    masks = torch.rand(3, 4, 32, 32) > 0.5
    inside, where = extractor(maps, masks)
    for b, r in ((0, 4), (1, 1), (2, 3)):   # each image alone, unpadded
        one = extractor([x[b:b + 1] for x in maps], masks[b:b + 1, :r])
        assert (one[0] - inside[b, :r]).abs().max() < 1e-12 and (one[1] - where[b, :r]).abs().max() < 1e-12
    none = extractor(maps, masks[:, :0])
    assert none[0].shape == none[1].shape == (3, 0, 10)
    assert torch.isfinite(torch.stack(extractor(maps, torch.zeros_like(masks)))).all()


# ---------------------------------------------------------------------------------------------- slots

def turns(text):
    return [("user", text), ("assistant", "ok")]


def slots_of(text, masks, images=0):
    ids, labels = encode_turns(turns(text), TOKENIZER, "vicuna", images, 2, masks)
    assert all(label == IGNORE for i, label in zip(ids, labels) if i < 0)
    return [i for i in ids if i < 0]


def test_region_becomes_mask_and_position():
    assert slots_of("<image>\nWhat is <region>?", 1, 1) == [IMAGE_SLOT] * 2 + [MASK_SLOT, POSITION_SLOT]
    assert slots_of("<region1> or <region2> or <region1>?", 2) == [MASK_SLOT, POSITION_SLOT] * 3
    assert slots_of("What is <region>? <mask><position>", 0) == []                 # no mask: plain text
    assert slots_of("<mask><position> <region>", 1) == [MASK_SLOT, POSITION_SLOT]  # these two always are


def test_an_answer_and_a_system_turn_hold_no_slots():
    ids, _ = encode_turns([("system", "<region>"), ("user", "<region>"), ("assistant", "<region>")], TOKENIZER,
                          "vicuna", 0, 0, 1)
    assert [i for i in ids if i < 0] == [MASK_SLOT, POSITION_SLOT]


@pytest.mark.parametrize("text, masks", [("no region", 1), ("<region>", 2), ("<region> <region>", 1), ("<region3>", 2),
                                         ("<region0>", 1), ("<region1> <region>", 2), ("<region2>", 2)])
def test_numbers_of_masks_and_regions_must_agree(text, masks):
    with pytest.raises(ValueError, match=r"mask\(s\) but the human turns name"):
        slots_of(text, masks)


def row(text, masks, seed, images=1, answer="red"):
    record = {"id": text, "image": ["x"] * images, "masks": [0] * masks, "conversations": [
        {"from": "human", "value": "<image>" * images + text}, {"from": "gpt", "value": answer}]}
    generator = torch.Generator().manual_seed(seed)
    return {**encode_record(record, TOKENIZER, "vicuna", PLUS.tokens_per_image),
            "images": torch.randn(images, 3, 64, 64, generator=generator),
            "masks": (torch.rand(masks, 64, 64, generator=generator) > 0.7).float()}


ROWS = [row("What is <region>?", 1, 1), row("<region2> and <region1>, then <region2>", 2, 2, answer="both"),
        row("a picture", 0, 3), row("text", 0, 4, images=0), row("<region1><region2><region3> here", 3, 5)]


@pytest.fixture
def plus():
    def make(**changes):
        return randomize(AquilaPlus(dataclasses.replace(PLUS, **changes))).eval()
    return make


def test_each_slot_holds_the_token_of_its_own_region(plus):
    """Against a plain loop over rows and mentions; a region named twice gives the same two tokens twice."""
    model, batch = plus(), collate(ROWS)
    x, _ = model.embed_batch(batch)
    for b, r in enumerate(ROWS):
        if not r["mentions"]:
            continue
        inside, where = model.extractor(model.encode_images(r["images"]), r["masks"][None])
        at = [i for i, token in enumerate(r["ids"]) if token == MASK_SLOT]
        for place, mask in zip(at, r["mentions"]):
            assert torch.allclose(x[b, place], inside[0, mask], atol=1e-5)
            assert torch.allclose(x[b, place + 1], where[0, mask], atol=1e-5)
    assert ROWS[1]["mentions"] == [1, 0, 1] and not torch.equal(inside[0, 0], inside[0, 1])


def test_a_batch_equals_its_rows_one_by_one(plus):
    model = plus()
    asked = [{**r, "ids": r["ids"][:-5], "labels": r["labels"][:-5]} for r in ROWS]
    together = model.answer(collate(asked), TOKENIZER, max_new_tokens=6)
    alone = [model.answer(collate([r]), TOKENIZER, max_new_tokens=6)[0] for r in asked]
    assert together == alone


def test_without_regions_it_is_aquila(plus, small):
    """The same weights, no mask extractor: equal logits on images and text."""
    model = plus()
    other = small(mda_layers=(0,))
    other.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("extractor")})
    batch = {**collate(ROWS[2:4]), "labels": None}
    assert torch.equal(model(batch)[1], other(batch)[1])


def test_a_cut_prompt_is_refused(plus):
    batch = collate(ROWS[:1])
    with pytest.raises(ValueError, match="1 region slots in the prompts, 0 regions"):
        plus()({**batch, "masks": None, "regions": None})


# ---------------------------------------------------------------------------------------------- stages

@pytest.mark.parametrize("stage, full", [(1, False), (2, False), (3, False), (3, True)])
def test_a_stage_trains_what_its_table_says(plus, stage, full):
    lora = LoRAConfig(rank=2, alpha=4, dropout=0.0) if stage == 3 and not full else None
    model = plus(lora=lora, full_llm=full).train()
    trainable = set_stage(model, stage)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    model(collate(ROWS))[0].backward()
    torch.optim.SGD(trainable.values(), lr=0.1).step()
    moved = {part_of(k) for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert moved == set(TRAINS["aquila-plus"][stage]) - ({"lora"} if full else {"llm"})


@pytest.mark.parametrize("rows", [ROWS[2:3], ROWS[3:4]], ids=["no region", "no image"])
def test_without_a_region_every_parameter_has_a_gradient(plus, rows):
    """Else a process without regions would leave the others waiting."""
    model = plus().train()
    trainable = set_stage(model, 2)
    model(collate(rows))[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in trainable.values())


def test_a_full_lm_is_saved_and_comes_back(plus, tmp_path, monkeypatch):
    """full_llm: the LM's weights stand in the checkpoint; from a stage without them, they keep the published ones."""
    model = plus(full_llm=True)
    monkeypatch.setattr(aquila, "build", lambda config, *_: AquilaPlus(config, model.vision))
    save_model(model, tmp_path / "full")
    back = load_model(tmp_path / "full")
    assert all(torch.equal(p, back.state_dict()[k]) for k, p in model.own_parameters().items())
    names = list(model.own_parameters())
    assert "llm.embed.weight" in names and not any(name.startswith("vision") for name in names)
    save_model(plus(), tmp_path / "half")
    other = AquilaPlus(dataclasses.replace(PLUS, full_llm=True), model.vision)
    embed = other.llm.embed.weight.clone()
    load_checkpoint(other, tmp_path / "half", new_parts_keep_start=True)
    assert torch.equal(other.llm.embed.weight, embed)
    assert torch.equal(other.extractor.out.weight, model.extractor.out.weight)
