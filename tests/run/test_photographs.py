"""
Proves of the small preset's tools: pictures and their captions are drawn as said, the rivals without a language model
answer as worked out by hand, and the ways to score move a figure as they should.

    pytest tests/run/test_photographs.py
"""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from aquila import PRESETS, build, load_lm, load_model, locate_weights, save_model
from checks import photographs, pretrain_small, told
from checks.stand_ins import karpathy, put
from evaluate import main as evaluate
from scoring.contract import answer_choices, caption_choices
from tokenizer import load_tokenizer


class Drawn:
    """A generator whose draws are given: each is the next of a list, of its range."""

    def __init__(self, *shares):
        self.shares = list(shares)

    def uniform(self, low, high, shape):
        return np.full(shape, low + (high - low) * self.shares.pop(0))


def test_augmented_pictures_are_turned_and_mirrored():
    image = torch.randint(256, (1, 32, 32, 3), dtype=torch.uint8)
    plain = image.permute(0, 3, 1, 2).float()
    # quarter turns, whether any angle, zoom, mirror, shift, brightness, tint, contrast
    even = (1 - 0.75) / 0.55, (1 - 0.92) / 0.16, (1 - 0.75) / 0.55
    for turns in range(4):
        for mirrored in (0, 1):
            rng = Drawn((turns + 0.5) / 4, 0, 1, 1 - mirrored, 0.5, *even)
            found = pretrain_small.augment(image, 32, rng)
            same = [torch.rot90(plain.flip(3) if m else plain, k, (2, 3)) for m in (0, 1) for k in range(4)]
            assert min((found - one).abs().max() for one in same[4 * mirrored:4 * mirrored + 4]) < 0.05
    bright = pretrain_small.augment(image, 32, Drawn(0, 0, 1, 1, 0.5, 1, even[1], even[2]))
    assert bright.mean() > 1.1 * plain.mean() and bright.max() <= 255
    assert pretrain_small.augment(image, 64, np.random.default_rng(0)).shape == (1, 3, 64, 64)


def test_a_photograph_in_words():
    captions, asked = ["many planes are in an airport", "a plane"], [("Is there a plane?", "yes")]
    with_words = 0
    for seed in range(40):
        record = pretrain_small.photo_in_words(captions, asked, np.random.default_rng(seed))
        texts = [turn["value"] for turn in record["conversations"]]
        assert {texts[1], texts[3]} > {"yes"} and {texts[1], texts[3]} & set(captions)
        words, _, question = texts[0].rpartition("\n")
        assert set(words.split()) <= {"many", "planes", "plane", "airport"}
        with_words += bool(words)
    assert 25 < with_words < 40


def test_what_is_shipped_is_the_model_in_half_precision(tmp_path):
    model = build(PRESETS["tiny"])
    save_model(model, tmp_path / "trained")
    pretrain_small.main(["ship", "--model", str(tmp_path / "trained"), "--out", str(tmp_path)])
    shipped = load_model(tmp_path / "small")
    assert shipped.config == model.config
    for (name, p), q in zip(model.named_parameters(), shipped.parameters(), strict=True):
        assert torch.equal(p.half().float() if name in model.own_parameters() else p, q)
    size = lambda name: (tmp_path / name / "model.safetensors").stat().st_size
    assert size("small") < 0.52 * size("trained")


def test_perplexity_of_a_text():
    """An LM that knows nothing has the perplexity of its vocabulary; the published one less; every token is read."""
    folder = locate_weights(PRESETS["tiny"].llm_dir, "language model")
    text = " ".join(record["conversations"][0]["value"] for record in told.told_records(5))
    llm, tokenizer = load_lm(folder), load_tokenizer(folder)
    read, tokens = told.read_plain(llm, tokenizer, text)["perplexity"]
    pieces = -(-len(tokenizer.encode(text)) // told.PIECE)
    assert pieces > 1 and tokens == len(tokenizer.encode(text)) - pieces           # but the first of a piece
    torch.nn.init.zeros_(llm.embed.weight)                                         # tied: its output matrix, too
    blank, _ = told.read_plain(llm, tokenizer, text)["perplexity"]
    assert blank == pytest.approx(llm.embed.weight.shape[0], rel=1e-4) and read < blank / 2


def test_consensus_shares_most_words():
    near = ["many planes in an airport", "planes in an airport", "many planes in the airport", "a green forest"]
    assert photographs.consensus(near) == "many planes in an airport"
    assert photographs.consensus([*near, *["a green forest"] * 5]) == "a green forest"


def test_classes_are_told_by_features():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    draw = lambda n: (i := torch.arange(n) % 3, centers[i] + 0.3 * torch.randn(n, 8, generator=generator).double())
    (kinds, train), (true, val) = draw(90), draw(30)
    told = photographs.tell_classes(train, [f"class {k}" for k in kinds.tolist()], val)
    assert np.mean([name == f"class {k}" for name, k in zip(told, true.tolist())]) > 0.9


@pytest.fixture
def rsicd(tmp_path):
    rows = [(f"airport_{i}.jpg", "train", ["many planes ."] * 5) for i in range(20)]
    rows += [(f"forest_{i}.jpg", "train", ["a green forest ."] * 5) for i in range(20)]
    rows += [("airport_50.jpg", "val", ["many planes .", "two planes ."]), ("forest_50.jpg", "val", ["a forest ."])]
    put(tmp_path / "dataset_rsicd.json", karpathy(*rows))
    (tmp_path / "RSICD_images").mkdir()
    for number, (name, *_) in enumerate(rows):
        color = (200, 200, 200 - number) if "airport" in name else (20, 120 + number, 20)
        Image.new("RGB", (64, 64), color).save(tmp_path / "RSICD_images" / name)
    return tmp_path


def test_rivals_compare_and_picture(rsicd, capsys):
    flags = ["--root", str(rsicd)]
    vision = ["--vision", "weights/tiny-clip.safetensors", "--side", "64", "--out", str(rsicd / "out")]
    photographs.main(["rivals", *flags, *vision])
    assert "probe: 100.0 % of 2 val photographs" in capsys.readouterr().out
    for name in ("class-lookup", "neighbours"):
        rows = [json.loads(line) for line in (rsicd / "out" / f"{name}.jsonl").read_text().splitlines()]
        assert [row["prediction"] for row in rows] == ["many planes .", "a green forest ."]
    photographs.main(["compare", *[str(rsicd / "out" / f"{name}.jsonl") for name in ("class-lookup", "neighbours")],
                      *flags])
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert "100.0%" in first and "+0.00" in second
    rows = [json.loads(line) for line in (rsicd / "out/neighbours.jsonl").read_text().splitlines()]
    good, bad = "many planes .", "sand ."
    for name, words in {"a-0": good, "a-1": bad, "b-0": bad, "b-1": good, "c-1": bad}.items():
        put(rsicd / f"{name}.jsonl", "\n".join(json.dumps(row | {"prediction": words}) for row in rows))
    names = "a-0", "a-1", "b-1", "b-0", "c-1", "out/neighbours"    # two seeds, one of them, and what needs no seed
    photographs.main(["compare", *[str(rsicd / f"{name}.jsonl") for name in names], *flags])
    a, b, c, beside = (line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:])
    assert a[0] == b[0] == "2" and a[1] == b[1] and c[0] == "1"
    assert float(b[2]) == float(c[2]) == 0                         # seed beside seed: c has what a has with seed 1
    assert float(beside[2]) == pytest.approx(float(a[1]) - float(beside[1]), abs=0.02)
    put(rsicd / "fewer.jsonl", json.dumps(rows[1]))
    put(rsicd / "asked.jsonl", json.dumps({"prediction": "yes", "answer": "yes"}))
    for wrong, message in (
            (["compare", str(rsicd / "fewer.jsonl"), str(rsicd / "a-0.jsonl")], "not of the photographs of"),
            (["picture", str(rsicd / "asked.jsonl"), "--out", str(rsicd / "p.png")], "no captions with"),
            (["rivals", "--out", str(rsicd / "out")], "give --vision")):
        with pytest.raises(SystemExit) as e:
            photographs.main([*wrong, *flags])
        assert e.value.code == 2 and message in capsys.readouterr().err
    photographs.main(["picture", str(rsicd / "out/neighbours.jsonl"), *flags, "--out", str(rsicd / "p.png")])
    assert np.asarray(Image.open(rsicd / "p.png"))[100, 100].tolist() != [255, 255, 255]


def test_ways_to_score_a_caption():
    rows = [{"prediction": "A Plane, two cars", "references": ["a plane . two car", "a"]}]
    found = caption_choices(rows)
    assert found["as scored"] == pytest.approx(75, abs=0.01) == found["mean over images"]
    assert found["letters' case kept"] == pytest.approx(20, abs=0.01)              # two, of A Plane , two cars
    assert found["plural s cut off"] == pytest.approx(100, abs=0.01)
    assert found["without stop words"] == pytest.approx(100 * 2 / 3, abs=0.01)
    later = caption_choices([{"prediction": "two cars", "references": ["a road", "two planes", "many cars"]}])
    assert [later[f"the first {n} references"] for n in (1, 2)] == pytest.approx([0, 50], abs=0.01)
    assert later["as scored"] == pytest.approx(100, abs=0.01)


def test_ways_to_score_an_answer():
    rows = [{"prediction": said, "answer": true} for said, true in
            [("Yes", "yes"), ("the airplane", "plane"), ("two", "2"), ("yes, two ships", "2"), ("no", "yes")]]
    found = answer_choices(rows)
    assert found["as scored"] == 40 and found["letter for letter"] == 0 and found["numbers as words differ"] == 20
    assert found["without articles"] == 40 and found["the answer is anywhere in it"] == 60
    assert answer_choices(rows[1:2])["synonyms are one"] == 0 and answer_choices(
        [{"prediction": "ships", "answer": "boat"}])["synonyms are one"] == 100


def test_as_scored_is_what_score_gives(tmp_path, capsys, monkeypatch):
    """Captions of regions type by type; with --captions every answer is one."""
    rows = [{"prediction": "a red ship", "answer": "a blue ship", "type": "region caption"},
            {"prediction": "a ship on water", "answer": "water", "type": "region detail"},
            {"prediction": "two ships", "answer": "two big ships", "type": "count"}]
    put(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))

    def printed(*flags):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *flags])
        evaluate()
        return capsys.readouterr().out

    for more in ((), ("--captions",)):
        figures = {line.split()[-1] for line in printed("--score", str(tmp_path / "p.jsonl"), *more).splitlines()
                   if "BLEU-1" in line or line.startswith("accuracy")}
        found = [line.split()[2] for line in printed("--contract", str(tmp_path / "p.jsonl"), *more).splitlines()
                 if "as scored" in line]
        assert set(found) == figures and len(found) == 3


def test_the_contract_names_what_a_figure_depends_on(rsicd, capsys, monkeypatch):
    command = ["evaluate.py", "--benchmark", "rsicd", "--root", str(rsicd), "--split", "val", "--sanity"]

    def told():
        monkeypatch.setattr("sys.argv", command)
        evaluate()
        out = capsys.readouterr().out
        return dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  ") and line[2] != " ")

    first = told()
    assert first["rows"] == "2" and "dataset_rsicd.json" in first["files"] and "number 2; missing 0" in first["images"]
    Image.new("RGB", (64, 64)).save(rsicd / "RSICD_images/airport_50.jpg")         # other pixels under the same name
    second = told()
    assert {key for key in first if first[key] != second[key]} == {"images"}
