"""
Proves that the page holds every prediction, escaped, with its image inside it; that the attention drawn is that which
the model computes; and that a user's mistake gives one line, exit code 2 and no file.

    pytest tests/run/test_gallery.py
"""
import base64
import dataclasses
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ByteTokenizer
import torch
from PIL import Image

from aquila import PRESETS, Aquila
from convnext import ConvNeXtConfig
from data import encode_turns
from checks import attention
from pictures import gallery
from pictures.image_files import load_image, to_tensor

BAD = '<script>alert("1")</script>'
ROWS = [
    {"id": "right", "image": "wide.png", "question": "How many?", "prediction": "Two.", "answer": "2", "type": "count"},
    {"id": "wrong", "image": "gone.png", "question": BAD, "prediction": '"<b>', "type": 'a "type" <i>',
     "answer": "3 \ud83d"},                 # half of a character, which JSON can hold and UTF-8 cannot
    {"id": "caption", "image": ["wide.png", "scene:test/0/1/64"], "question": "Describe.", "prediction": "a red ship",
     "references": ["a gray ship", "ships at sea"], "type": "caption"},
    {"id": "text", "image": None, "question": "Is it?", "prediction": "yes", "answer": "Yes", "type": "count"},
]


def run(folder, *arguments, main=gallery.main):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (640, 100), "blue").save(tmp_path / "wide.png")
    write_rows(tmp_path, ROWS)
    return tmp_path


def write_rows(folder, rows):
    (folder / "pred.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def articles(folder):
    return re.findall(r"<article.*?</article>", (folder / "gallery.html").read_text(encoding="utf-8"), re.S)


# ---- the page

def test_a_card_for_every_prediction(folder):
    run(folder, "pred.jsonl", "--out", "gallery.html")
    right, wrong, caption, text = articles(folder)
    assert 'class="right" data-type="count" data-order="0" data-points="1"' in right and "<b>right</b>" in right
    assert 'class="wrong"' in wrong and "<b>wrong</b>" in wrong and 'data-points="0"' in wrong
    assert "image gone.png: no such file" in wrong and "<img" not in wrong
    assert 'class="caption"' in caption and "<b>BLEU-1 67</b>" in caption and "a gray ship\nships at sea" in caption
    assert 'data-points="0.66' in caption and caption.count("<img") == 2
    assert "no image, text only" in text
    found = re.findall(r'base64,([^"]*)"', right + caption)
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in found]
    assert sizes == [(320, 50), (320, 50), (64, 64)]                               # shrunk, never enlarged


def test_the_page_is_escaped_and_needs_nothing_else(folder):
    run(folder, "pred.jsonl", "--out", "gallery.html")
    page = (folder / "gallery.html").read_text(encoding="utf-8")
    assert BAD not in page and "&lt;script&gt;alert(&quot;1&quot;)" in page
    assert 'data-type="a &quot;type&quot; &lt;i&gt;"' in page and page.count("<script>") == page.count("</script>") == 1
    assert not re.findall(r"(?:src|href)=(?!\"data:)|https?:|@import|url\(", page)
    assert sorted(p.name for p in folder.iterdir()) == ["gallery.html", "pred.jsonl", "wide.png"]


def test_scores_stand_above_the_cards(folder):
    run(folder, "pred.jsonl", "--out", "gallery.html")
    page = (folder / "gallery.html").read_text(encoding="utf-8")
    for name, value, n in (("BLEU-1", "66.7", 1), ("accuracy", "66.7", 3), ("count", "100.0", 2)):
        assert f"<tr><td>{name}<td>{value}<td>{n}</tr>" in page


def test_masks_lie_where_they_are_with_their_numbers(folder):
    """A box over the left half of a 640 x 100 image, another over one pixel: shrunk by two, the second keeps one."""
    masks = [[[0, 0, 320, 0, 320, 100, 0, 100]], {"bbox": [600, 50, 1, 1]}]
    rows = [{**ROWS[0], "masks": masks}, ROWS[0], {**ROWS[0], "masks": [{"bbox": [640, 0, 9, 9]}]}]
    write_rows(folder, [{**row, "id": str(i)} for i, row in enumerate(rows)])
    run(folder, "pred.jsonl", "--out", "gallery.html")
    drawn, plain, broken = articles(folder)
    picture, other = (np.array(Image.open(io.BytesIO(base64.b64decode(re.findall(r'base64,([^"]*)"', card)[0]))), int)
                      for card in (drawn, plain))
    assert picture.shape == other.shape == (50, 320, 3)
    assert (abs(other - (0, 0, 254)) < 3).all()                        # nothing is drawn where there is no mask
    assert (abs(picture - other).max(-1)[5:45, 200:280] < 16).all()    # nor outside of them
    fill = 0.7 * np.array((0, 0, 255)) + 0.3 * np.array(gallery.REGIONS[0])
    assert (abs(picture[5:45, 10:140] - fill) < 12).all()
    assert abs(picture[0, 3:150] - gallery.REGIONS[0]).mean() < 25     # the outline; JPEG blurs it
    assert abs(picture[25, 300] - other[25, 300]).max() > 30           # the pixel, its number beside it
    assert "<img" not in broken and "is empty on an image of 640 x 100" in broken


def test_a_number_lies_on_its_region():
    """The middle of a C lies outside it."""
    mask = np.zeros((1, 60, 60), bool)
    mask[0, 5:55, 5:55], mask[0, 15:45, 15:] = True, False
    plain = gallery.draw_masks(Image.new("RGB", (60, 60)), mask)
    black = (np.array(plain) == 0).all(-1)
    assert black[20:40, 30:55].all() and not black[mask[0]].all()


def test_region_sentences_are_captions_not_wrong_answers(folder):
    write_rows(folder, [{**ROWS[0], "type": "region caption", "answer": "two red ships", "prediction": "two ships"}])
    run(folder, "pred.jsonl", "--out", "gallery.html")
    card, = articles(folder)
    assert 'class="caption"' in card and "<b>BLEU-1 61</b>" in card              # exp(1 - 3 / 2)


def test_limit_spreads_over_the_file_and_scores_all(folder):
    write_rows(folder, [{**ROWS[3], "id": f"row{i}", "prediction": "yes" if i % 2 else "no"} for i in range(1000)])
    run(folder, "pred.jsonl", "--out", "gallery.html", "--limit", 4)
    assert [re.search(r"row\d+", card)[0] for card in articles(folder)] == ["row0", "row250", "row500", "row750"]
    page = (folder / "gallery.html").read_text(encoding="utf-8")
    assert "1,000 predictions, 4 of them below" in page and "<tr><td>accuracy<td>50.0<td>1,000</tr>" in page


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize("text, arguments, message", [
    (None, (), "pred.jsonl is not there"),
    ("", (), "no predictions"),
    (GOOD + '\n{"id": 1, "predic', (), "line 2: not valid JSON"),
    (GOOD + '\n{"prediction": "x"}', (), "line 2: expected 'prediction' and 'answer' or 'references'"),
    (GOOD + '\n{"prediction": "x", "answer": 2}', (), "line 2: answer 2: expected a text"),
    (GOOD + '\n{"prediction": "x", "references": "one"}', (), "line 2: references 'one': expected a list of texts"),
    (GOOD + '\n{"prediction": "x", "answer": "x", "image": [3]}', (), "line 2: question and image must be texts"),
    ("\n\n" + GOOD + '\n\n{"prediction": "x", "answer": "x", "image": 3}', (), "line 5: question and image"),
    (GOOD + '\n{"prediction": "x", "answer": "x", "masks": "a.png"}', (), "line 2: question and image must be"),
    (GOOD, ("--limit", 0), "argument --limit: 0: expected a whole number from 1"),
    (GOOD, ("--out", "page.png"), "--out page.png: expected a name that ends in .html"),
    (GOOD, ("--out", "none/page.html"), "in a folder that is there"),
])
def test_mistakes_give_one_line_and_no_file(tmp_path, capsys, text, arguments, message):
    if text is not None:
        (tmp_path / "pred.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "pred.jsonl", *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["pred.jsonl"] * (text is not None)


# ---- attention

@pytest.fixture(scope="module")
def config():
    tiny = PRESETS["tiny"]
    llm = dataclasses.replace(tiny.llm, dim=32, n_layers=3, ffn_dim=32)
    return dataclasses.replace(tiny, vision=ConvNeXtConfig((1, 1, 1, 1), (4, 8, 8, 8)), llm=llm, image_size=64, dim=16,
                               heads=2, mda_layers=(0, 2))


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(0)
    model = Aquila(config).eval()
    with torch.no_grad():                   # attention that a wrong key or query would change
        for p in (*model.tokens.parameters(), *model.mda.parameters()):
            p.normal_(std=0.4)
    return model


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def prompts(config, *texts):
    turns = [[("user", text), ("assistant", None)] for text in texts]
    return torch.tensor([encode_turns(t, ByteTokenizer(), config.chat, 1, config.tokens_per_image)[0] for t in turns])


def plain_attention(sfi, queries, pyramid):
    """Softmax over all keys of a token, head by head, and the mean of the heads: (B, N, 85)."""
    keys = torch.cat([wk(x) for wk, x in zip(sfi.wk, pyramid)], dim=2)
    heads = []
    for q, k in zip(sfi.wq(queries).chunk(sfi.heads, -1), keys.chunk(sfi.heads, -1)):
        heads.append(((q[:, :, None] * k).sum(-1) / k.shape[-1] ** 0.5).softmax(-1))
    return torch.stack(heads).mean(0)


@torch.no_grad()
def test_weights_are_those_of_the_first_sfi(model, images):
    weights = attention.sfi_weights(model, images)
    assert [a.shape for a in weights] == [(2, 4, 64), (2, 4, 16), (2, 4, 4), (2, 4, 1)]
    assert np.allclose(sum(a.sum(-1) for a in weights), 1, atol=1e-5)
    pyramid, grid = model.pyramid(model.vision(images))
    queries = model.tokens.norm(model.tokens.grid_queries(grid))
    expected = plain_attention(model.tokens.sfi, queries, pyramid)
    assert np.allclose(np.concatenate(weights, -1), expected, atol=1e-5)


@torch.no_grad()
def test_weights_are_those_of_an_mda_layer(config, model, images):
    ids = prompts(config, "Hi. <image> What?", "Hm! <image> Where")
    weights = attention.sfi_weights(model, images, "2", ids)
    x, before_layer = model.embed_batch({"ids": ids, "images": images})
    seen = {}
    model.llm(x, before_layer=lambda i, x: before_layer(i, seen.setdefault(i, x)))
    hidden = seen[2][ids < 0].view(2, 4, -1)
    pyramid, _ = model.image_tokens(model.encode_images(images))
    expected = plain_attention(model.mda["2"].sfi, model.mda["2"].norm(hidden), pyramid)
    assert np.allclose(np.concatenate(weights, -1), expected, atol=1e-5)


def test_only_words_before_the_image_change_mda(config, model, images):
    def of(text):
        return np.concatenate(attention.sfi_weights(model, images[:1], 2, prompts(config, text)), -1)
    base = of("Hi. <image> What?")
    assert np.allclose(of("Hi. <image> Who, and where?"), base, atol=1e-5)
    assert np.abs(of("No! <image> What?") - base).max() > 1e-4


def test_layers_that_have_no_sfi(config, model, images):
    with pytest.raises(ValueError, match="layer 1: this model has an SFI at tokens, 0, 2"):
        attention.sfi_weights(model, images, "1")
    concat = Aquila(dataclasses.replace(config, integration="concat")).eval()
    with pytest.raises(ValueError, match="layer tokens: this model has an SFI at 0, 2"):
        attention.sfi_weights(concat, images)
    weights = attention.sfi_weights(concat, images[:1], 0, prompts(config, "<image>"))
    assert [a.shape[2] for a in weights] == [64, 16, 4, 1]                         # MDA has all four scales there, too


def test_the_bright_cell_is_where_the_weight_is():
    weights = [np.zeros(k * k) for k in (8, 4, 2, 1)]
    weights[0][1 * 8 + 6], weights[1][3 * 4 + 0] = 0.75, 0.25                      # row 1, column 6; row 3, column 0
    black = Image.new("RGB", (96, 64))
    picture = np.array(attention.attention_picture(black, weights, (2, 3), (1, 0)), dtype=int)
    side, yellow = attention.SIDE, attention.RAMP[-1] * 160 // 255
    panels = [picture[:side, i * (side + 8):][:, :side] for i in range(5)]
    for panel, k, row, col in ((panels[1], 8, 1, 6), (panels[2], 4, 3, 0)):
        cell = side // 2 // k
        inside = panel[side // 4:, side // 4:][:side // 2, :side // 2]
        centers = inside[cell // 2::cell, cell // 2::cell]
        bright = (np.abs(centers - yellow) <= 2).all(-1)
        assert bright.shape == (k, k) and np.argwhere(bright).tolist() == [[row, col]]
    red = (panels[0] == (255, 0, 0)).all(-1)
    rows, cols = np.where(red)
    assert (rows.min(), cols.min(), cols.max()) == (side // 2, 0, side // 3)       # the lower left of 2 x 3 tokens
    assert (panels[1][side // 2, :side // 4 - 2] == 128).all()                     # gray: outside of the image


@pytest.fixture
def command(model, monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "load_model", lambda folder: model)
    monkeypatch.setattr(attention, "load_tokenizer", lambda path: ByteTokenizer())
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "a.png")
    return lambda *arguments: run(tmp_path, "--model", "m", *arguments, main=attention.main)


def test_the_summary_is_the_mean_over_heads_tokens_and_scenes(command, config, model, capsys):
    command("--summary", "3")
    rows = {row.split()[0]: [float(n) for n in row.replace("%", "").split()[1:]]
            for row in capsys.readouterr().out.splitlines()[1:]}
    images = torch.stack([to_tensor(load_image(f"scene:test/0/{i}/64")) for i in range(3)])
    pyramid, grid = model.pyramid(model.vision(images))
    one_head = [plain_attention(sfi, q, pyramid) for sfi, q in heads_apart(model, grid)]
    shares = [100 * part.sum(-1).mean().item() for part in torch.stack(one_head).split((64, 16, 4, 1), dim=-1)]
    cells = torch.stack([(-a * a.clamp(min=1e-30).log()).sum(-1).exp() for a in one_head]).mean().item()
    assert list(rows) == ["tokens", "0", "2"] and all(abs(sum(row[:4]) - 100) < 0.3 for row in rows.values())
    assert np.allclose(rows["tokens"], [*shares, cells], atol=0.06)


def heads_apart(model, grid):
    """(an SFI of one head, its queries) for each of the two heads of the first SFI."""
    sfi, queries = model.tokens.sfi, model.tokens.norm(model.tokens.grid_queries(grid))
    for q, *keys in zip(sfi.wq.weight.chunk(2), *(wk.weight.chunk(2) for wk in sfi.wk)):
        layer = lambda weight: lambda x: x @ weight.T
        yield SimpleNamespace(wq=layer(q), wk=[layer(k) for k in keys], heads=1), queries


@pytest.mark.parametrize("layer", ["tokens", "2"])
def test_command_draws_a_file_or_a_scene(command, tmp_path, layer):
    for image in ("scene:test/0/3/64", str(tmp_path / "a.png")):
        command("--image", image, "--token", "1,0", "--layer", layer, "--out", "out.png")
        assert Image.open(tmp_path / "out.png").size == (5 * 328, 368)
        (tmp_path / "out.png").unlink()


def test_command_draws_the_token_asked_for(command, model, tmp_path):
    command("--image", "scene:test/0/3/64", "--token", "1,0", "--out", "out.png")
    image = load_image("scene:test/0/3/64")
    weights = [a[0, 2] for a in attention.sfi_weights(model, to_tensor(image)[None])]
    expected = attention.attention_picture(image, weights, (2, 2), (1, 0))
    assert (np.array(Image.open(tmp_path / "out.png")) == np.array(expected)).all()


@pytest.mark.parametrize("arguments, message", [
    (("--image", "a.png"), "give --image and --token"),
    (("--image", "a.png", "--token", "1;0"), "--token ROW,COL"),
    (("--token", "1,0"), "give --image and --token"),
    (("--image", "a.png", "--token", "0,2"), "token 0,2: the image has 2x2 tokens"),
    (("--image", "b.png", "--token", "0,1"), "b.png"),
    (("--image", "a.png", "--token", "0,1", "--layer", "first"), "layer first"),
    (("--image", "a.png", "--token", "0,1", "--out", "out.gif"), ".png"),
])
def test_mistakes_of_the_command(command, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error.splitlines()[-1]
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
