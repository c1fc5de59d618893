"""
Proves the two steps of evaluation: predictions are written as they are scored, scores are what a person counts, and
asking about one image or region gives what a batch would. Benchmarks and the answers that need no model are counted
by hand on small corpora in the published layout. Mistakes end with one line and exit code 2.

    pytest tests/run/test_evaluate.py
"""
import argparse
import contextlib
import io
import json
import math
import re
import sys

import pytest
import torch
from PIL import Image

import evaluate
from aquila import PRESETS, build, load_model, save_model
from scoring.benchmarks import BENCHMARKS, PUBLISHED, benchmark_jobs, constant_rows
from scoring.scores import score

ROWS = [{"id": "1", "prediction": "2", "answer": "2", "type": "count"},
        {"id": "2", "prediction": "Two.", "answer": "2", "type": "count"},
        {"id": "3", "prediction": "yes", "answer": "no", "type": "presence"},
        {"id": "4", "prediction": "a red ship", "references": ["a red ship on water", "one ship"]}]


def command(*args):
    old, sys.argv, out, err = sys.argv, ["evaluate.py", *map(str, args)], io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            evaluate.main()
        return 0, out.getvalue(), err.getvalue()
    except SystemExit as e:
        return e.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = old


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint over the committed tiny parts, its trained part random: it says something, whatever that is."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    built = build(PRESETS["tiny"])
    with torch.no_grad():
        for p in built.own_parameters().values():
            p.add_(0.1 * torch.randn(p.shape))
    save_model(built, folder)
    return folder


def test_scores_are_what_a_person_counts():
    scores = score(ROWS)
    assert scores["accuracy"] == (pytest.approx(200 / 3), 3)
    assert scores["count"] == (100.0, 2) and scores["presence"] == (0.0, 1)
    # "a red ship": 3 of 3 words right; the closest reference length is 2, so no brevity penalty
    assert scores["BLEU-1"] == (pytest.approx(100.0), 1)


def answers(*rows):
    """(type, prediction, answer) -> rows"""
    return [{"type": t, "prediction": p, "answer": a} for t, p, a in rows]


def test_vqa_scores_over_questions_over_types_and_without_counts():
    scores = score(answers(*[("presence", "yes", "yes")] * 6, *[("presence", "yes", "no")] * 2, ("comp", "no", "no"),
                           ("comp", "no", "yes"), ("count", "1", "2"), ("area", "0m2", "0m2")))
    figures = {name: value for name, value in scores.items() if ": " not in name}
    assert figures == {"accuracy": (pytest.approx(800 / 12), 12), "area": (100, 1), "comp": (50, 2), "count": (0, 1),
                       "presence": (75, 8), "mean over types": (pytest.approx(225 / 4), 12),
                       "without count, area": (pytest.approx(70), 10), "its mean over types": (62.5, 10)}


def test_presence_gets_popes_figures_each_type_and_sampling_apart():
    rows = answers(("presence", "yes", "yes"), ("presence", "yes", "no"), ("presence", "no", "no"),
                   ("region presence", "no", "yes"), ("presence", "2", "2 ships"))
    for row, sampling in zip(rows, ("random", "random", "popular")):
        row["sampling"] = sampling
    scores = score(rows)
    assert scores["presence, POPE: F1"] == (pytest.approx(200 / 3), 3)             # the last row is no yes-no question
    assert scores["presence, POPE random: precision"] == (50, 2)
    assert scores["presence, POPE popular: share of yes"] == (0, 1)
    assert scores["region presence, POPE: recall"] == (0, 1)
    assert "region presence, POPE random: recall" not in scores


def test_region_classes_and_sentences():
    rows = answers(("region class", "a ship", "ship"), ("region class", "planes", "plane"),
                   ("region class", "ship", "plane"), ("region class", "ship", "ship"),
                   ("region caption", "two red ships", "two red ships"), ("region caption", "a plane", "a plane"),
                   ("region detail", "trees", "many trees"))
    scores = score(rows)
    assert scores["region class: accuracy"] == scores["accuracy"] == (25, 4)
    assert scores["region class: semantic IoU"] == (37.5, 4)                       # 1/2, 0, 0, 1
    assert scores["region class: nearest class"] == (75, 4)
    assert scores["region caption: BLEU-2"][0] == pytest.approx(100) and scores["region caption: CIDEr"][1] == 2
    assert scores["region detail: ROUGE-L"][1] == 1 and "region detail: CIDEr" not in scores
    assert not any(name.startswith("BLEU") for name in scores)                     # no caption of a whole image


def test_constant_rows_are_the_best_single_answers():
    rows = [{**ROWS[0], "answer": a, "prediction": "?"} for a in ("1", "1", "3")] + [ROWS[3]]
    scores = score(constant_rows(rows))
    assert scores["count"] == (pytest.approx(200 / 3), 3) and scores["BLEU-1"][0] == pytest.approx(100.0)


def test_a_prediction_keeps_what_scores_and_pictures_need():
    record = {"id": "1", "image": "a.png", "type": "region presence", "sampling": "popular", "masks": ["m.png"],
              "conversations": [{"from": "human", "value": "<image>\nIs <region> a ship?"},
                                {"from": "gpt", "value": "no"}]}
    assert evaluate.row_of(record, "yes") == {
        "id": "1", "image": "a.png", "question": "Is <region> a ship?", "type": "region presence", "prediction": "yes",
        "answer": "no", "sampling": "popular", "masks": ["m.png"]}


# ---------------------------------------------------------------------------------------------- others' predictions

def score_lines(tmp_path, *rows, flags=()):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return command("--score", tmp_path / "p.jsonl", *flags)


def figures(out):
    """{name: its numbers} of a printed table"""
    return {line[:20].rstrip(): line[20:].split() for line in out.splitlines()}


def test_answer_files_of_fit_rsfg(tmp_path):
    rows = [{"question_id": 1, "ground_truth": "two ships", "answer": "Two ships."},
            {"question_id": 2, "ground_truth": "two ships", "answer": "a"}]
    code, out, err = score_lines(tmp_path, *rows)
    assert code == 0 and figures(out)["accuracy"] == ["2", "50.00"], err
    code, out, err = score_lines(tmp_path, *rows, flags=("--captions", "--metrics", "bleu,cider"))
    assert code == 0 and figures(out)["CIDEr"][0] == "2" and "accuracy" not in out and "ROUGE-L" not in out


def test_all_caption_metrics_are_printed_and_no_cider_of_one(tmp_path):
    code, out, _ = score_lines(tmp_path, ROWS[3], ROWS[3])
    assert [name for name in figures(out) if name] == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    code, out, _ = score_lines(tmp_path, ROWS[3])
    assert code == 0 and "CIDEr" not in figures(out) and "no CIDEr of a single caption" in out


@pytest.mark.parametrize("row, flags, message", [
    (ROWS[0], ("--metrics", "bleu,METEOR"), "meteor is not computed here: it is a Java program"),
    (ROWS[3], ("--metrics", "cider"), "CIDEr needs 2 or more"),
    ({"prediction": "x"}, (), "line 1: expected 'prediction' and 'answer' or 'references'"),
    ({"ground_truth": "x"}, (), "line 1: expected 'prediction'"), ([1], (), "line 1: expected 'prediction'"),
    ({"prediction": "x", "answer": 2}, (), "line 1: answer 2: expected a text"),
    ({"prediction": "x", "answer": None}, (), "line 1: answer None: expected a text"),
    ({"prediction": "x", "references": ["a", 3]}, (), "line 1: references"),
    ({"prediction": "x", "answer": "x", "type": 4}, (), "line 1: type 4: expected a text"),
    ({"prediction": "x", "answer": "x", "type": "accuracy"}, (), "line 1: type 'accuracy' is the name of the sum"),
    ({"prediction": "x", "answer": "x", "type": "all"}, (), "line 1: type 'all' is the name of the sum"),
    ({"prediction": "x", "answer": "x" * 4000, "references": 10 ** 4000}, (), "line 1: references '1000"),
    (ROWS[0], ("--benchmark", "rsicd"), "no BLEU-1 to compare"),
])
def test_bad_rows_and_metrics_are_one_line(tmp_path, row, flags, message):
    code, out, err = score_lines(tmp_path, row, flags=flags)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("line, message", [
    (b'{"prediction": "x", "answer": "x", "id": ' + b"[" * 900 + b"]" * 900 + b"}", "nested"),
    (b'{"prediction": "x", "answer": ' + b"[" * 10 ** 5, "nested"),
    (b'{"prediction": "x", "answer": ' + b"9" * 10 ** 5 + b"}", "digits"),
    (b'{"prediction": "\xff", "answer": "x"}', "not UTF-8")])
def test_a_line_that_is_no_json_is_named(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_bytes(json.dumps(ROWS[0]).encode() + b"\n\n" + line)
    code, _, err = command("--score", tmp_path / "p.jsonl")
    assert code == 2 and f"{tmp_path / 'p.jsonl'}, line 3: " in err and message in err and err.count("\n") == 1


def test_a_type_is_printed_on_one_line(tmp_path):
    """Half a character, and a code that clears the screen, on a terminal of ASCII."""
    rows = [{**ROWS[0], "type": text} for text in ("\udfff", "a\n\x1b[2J", "\u8239")]
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.argv", ["evaluate.py", "--score", str(tmp_path / "p.jsonl")])
        evaluate.main()
        out.seek(0)
        printed = out.read()
    assert r"\udfff " in printed and r"a\n\x1b[2J " in printed and r"\u8239 " in printed and "\x1b" not in printed


# ---------------------------------------------------------------------------------------------- benchmarks

@pytest.fixture
def corpora_root(tmp_path):
    """RSICD with two classes and RSVQA-LR, in the published layout; each test image is a picture."""
    def image(name, split, *captions):
        return {"filename": name, "split": split, "sentences": [{"raw": text} for text in captions]}

    images = [image("pond_1.jpg", "train", "a pond .", "a pond .", "a big pond ."),
              image("park_1.jpg", "train", "green trees .", "many trees .", "green trees ."),
              image("pond_2.jpg", "test", "a pond here"),
              image("park_2.jpg", "test", "many green trees", "green trees")]
    (tmp_path / "rsicd/RSICD_images").mkdir(parents=True)
    (tmp_path / "rsicd/dataset_rsicd.json").write_text(json.dumps({"images": images}))
    (tmp_path / "rsvqa-lr/Images_LR").mkdir(parents=True)
    asked = [("presence", "yes"), ("presence", "yes"), ("presence", "no"), ("count", "7")]
    rows = {"questions": [{"id": i, "active": True, "img_id": 0, "type": kind, "question": "Is it?", "answers_ids": [i]}
                          for i, (kind, _) in enumerate(asked)],
            "answers": [{"id": i, "active": True, "answer": text} for i, (_, text) in enumerate(asked)]}
    for kind, found in rows.items():
        (tmp_path / f"rsvqa-lr/LR_split_test_{kind}.json").write_text(json.dumps({kind: found}))
    for name in ("rsicd/RSICD_images/pond_2.jpg", "rsicd/RSICD_images/park_2.jpg", "rsvqa-lr/Images_LR/0.tif"):
        Image.effect_noise((64, 64), 50).save(tmp_path / name)
    return tmp_path


def test_sanity_rows_by_hand(corpora_root):
    """
    True class: "a pond" for 3 words, "green trees" for 2: all 4 words right, penalty exp(1 - 5 / 4). Constant: of 6
    words, "many green trees" and "a pond here" have 3 right, no penalty; "green trees" 2 of 4, and a penalty.
    """
    code, out, err = command("--benchmark", "rsicd", "--root", corpora_root / "rsicd", "--sanity")
    assert code == 0, err
    table = figures(out)
    assert table["BLEU-1"][0] == "2" and table["BLEU-1"][2:] == ["50.00", f"{100 * math.exp(1 - 5 / 4):.2f}"]
    assert {"CIDEr", "ROUGE-L"} <= table.keys() and "many buildings and some green trees are in a school" in out
    assert "theirs, Aquila" in out and "74.60" in out and "83.42" not in out      # one benchmark: one column


def test_all_benchmarks_that_are_there(corpora_root, model, tmp_path):
    code, out, err = command("--model", model, "--benchmark", "all", "--root", corpora_root, "--max-new-tokens", 2,
                             "--out", tmp_path / "p.jsonl")
    assert code == 0, err
    assert f"sydney: --root {corpora_root}/sydney: no such folder; skipped" in out
    ours = [line.split()[2:] for line in out.splitlines() if line.startswith("ours, counted")]
    assert ours == [["2", "-", "-", "-"], ["4", "-", "-"]]
    rows = [json.loads(line) for line in (tmp_path / "p-rsvqa-lr.jsonl").open()]
    assert [row["answer"] for row in rows] == ["yes", "yes", "no", "between 0 and 10"]
    code, again, _ = command("--score", tmp_path / "p-rsicd.jsonl", "--benchmark", "rsicd")
    assert figures(again)["BLEU-1"] == figures(out)["BLEU-1"][:2] and "theirs, RSGPT" in again


def test_conventions_of_rsvqa_are_options(corpora_root):
    lr = ("--benchmark", "rsvqa-lr", "--root", corpora_root / "rsvqa-lr", "--sanity")
    table = figures(command(*lr)[1])
    assert table["accuracy"] == ["4", "75.00"] and table["presence"] == ["3", "66.67"]
    assert figures(command(*lr, "--leave-out", "count,area")[1])["accuracy"] == ["3", "66.67"]
    assert figures(command(*lr, "--leave-out", " count, area,")[1])["accuracy"] == ["3", "66.67"]
    code, out, err = command(*lr, "--leave-out", "counts,area")
    assert code == 2 and not out and "no question is of type counts; the types are count, presence" in err
    args = argparse.Namespace(benchmark="rsvqa-lr", root=lr[3], split=None, leave_out="", raw_answers=True, limit=None)
    assert benchmark_jobs(args)["rsvqa-lr"][1][3]["conversations"][1]["value"] == "7"


def test_published_tables_are_whole():
    assert {len(figures) for figures in PUBLISHED.values()} == {len(BENCHMARKS)}
    assert PUBLISHED["Aquila"] == (74.6, 83.42, 88.25, 35.08, 92.72, 92.64, 83.87)


# ---------------------------------------------------------------------------------------------- predict and ask

def test_predict_then_score_separately(model, tmp_path):
    code, out, err = command("--model", model, "--scenes", 2, "--max-new-tokens", 5,
                             "--out", tmp_path / "p.jsonl", "--compare")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").open()]
    assert {"id", "image", "question", "type", "prediction"} <= rows[0].keys() and len(rows[0]["references"]) == 5
    assert all("<image>" not in row["question"] for row in rows)
    for heading in ("model", "gray image", "best constant", "MDA off", "BLEU-1", "CIDEr", "accuracy", "presence, POPE"):
        assert heading in out
    code, again, _ = command("--score", tmp_path / "p.jsonl")
    line = lambda text: next(x for x in text.splitlines() if x.startswith("accuracy"))
    assert code == 0 and line(again).split()[:3] == line(out).split()[:3]


def test_blind_answers_do_not_depend_on_the_image(model, tmp_path):
    rows = [{"id": str(i), "image": f"scene:test/0/{i}/128", "references": ["x"],
             "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]}
            for i in range(3)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    said = []
    for flags in (("--blind",), ()):
        command("--model", model, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "p.jsonl",
                "--max-new-tokens", 12, *flags)
        said.append([json.loads(line)["prediction"] for line in (tmp_path / "p.jsonl").open()])
    assert len(set(said[0])) == 1 and said[1] != said[0]


def test_ask_streams_what_a_batch_would_answer(model, tmp_path):
    Image.effect_noise((90, 70), 60).save(tmp_path / "a.png")
    code, out, err = command("--model", model, "--image", tmp_path / "a.png", "--ask", "What is this?",
                             "--max-new-tokens", 8)
    assert code == 0, err
    record = {"id": "a", "image": "a.png", "references": ["x"],
              "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "x"}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    command("--model", model, "--data", tmp_path / "d.jsonl", "--images", tmp_path,
            "--out", tmp_path / "p.jsonl", "--max-new-tokens", 8)
    assert out.strip() == json.loads((tmp_path / "p.jsonl").read_text())["prediction"]


def test_timings_of_an_answer_and_of_none(model, monkeypatch):
    ask = "--model", model, "--image", "scene:test/0/3/64", "--ask", "What is this?", "--max-new-tokens", 3, "--timings"
    code, out, err = command(*ask)
    assert code == 0 and re.search(r"vision .* s, prefill of \d+ tokens with SFI and MDA .* s", err), err
    tokenizer = evaluate.load_tokenizer("weights/tiny-llm")
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda path: tokenizer)
    tokenizer.stop_ids = set(range(701))                       # the first token ends it
    code, out, err = command(*ask)
    assert code == 0 and out == "\n" and "prefill" not in err, err


def test_ask_about_a_region_by_its_mask(tmp_path, monkeypatch):
    """The mask goes through the image's geometry to the extractor, and the answer is the one of a batch."""
    torch.manual_seed(0)
    save_model(build(PRESETS["tiny-plus"]), tmp_path / "plus")
    seen = []

    def load_and_watch(*args):
        model = load_model(*args)
        model.extractor.register_forward_hook(lambda extractor, given, out: seen.append(given[1]))
        return model

    monkeypatch.setattr(evaluate, "load_model", load_and_watch)
    Image.effect_noise((64, 64), 60).save(tmp_path / "a.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (2, 3, 40, 41))
    mask.save(tmp_path / "m.png")
    code, said, err = command("--model", tmp_path / "plus", "--image", tmp_path / "a.png", "--mask", tmp_path / "m.png",
                              "--ask", "What is <region>?", "--max-new-tokens", 6)
    assert code == 0 and seen[0].shape == (1, 1, 128, 128), err
    assert (seen[0][0, 0, 6:82, 4:80] == 1).all() and seen[0].sum() == 76 * 76
    record = {"id": "a", "image": "a.png", "masks": ["m.png"], "type": "region class", "conversations": [
        {"from": "human", "value": "<image>\nWhat is <region>?"}, {"from": "gpt", "value": "x"}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    code, out, err = command("--model", tmp_path / "plus", "--data", tmp_path / "d.jsonl", "--images", tmp_path,
                             "--out", tmp_path / "p.jsonl", "--max-new-tokens", 6)
    assert code == 0 and "semantic IoU" in out, err
    assert json.loads((tmp_path / "p.jsonl").read_text())["prediction"] == said.strip() and seen[1].equal(seen[0])


def test_prompt_and_answer_have_room(model, tmp_path):
    """As many new tokens as the refusal says fit; and it comes before the image is read or memory is taken."""
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_len": 60}))
    (tmp_path / "model.safetensors").symlink_to(model / "model.safetensors")
    ask = ("--model", tmp_path, "--image", "scene:test/0/3/64", "--ask", "What is this?", "--max-new-tokens")
    code, out, err = command(*ask, 10 ** 6)
    assert code == 2 and not out and err.count("\n") == 1
    assert "--max-new-tokens 1000000 need more than the 60 places of this model (max_len)" in err
    fits = int(re.search(r"at most (\d+) new tokens fit", err)[1])
    assert fits > 9 and command(*ask, fits)[0] == 0
    code, out, err = command(*ask, fits + 1)
    assert code == 2 and f"a prompt of {60 - fits} tokens" in err
    row = {"image": "scene:test/0/3/64", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                                           {"from": "gpt", "value": "x"}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    code, out, err = command("--model", tmp_path, "--data", tmp_path / "d.jsonl", "--max-new-tokens", fits + 1)
    assert code == 2 and f"at most {fits} new tokens fit" in err and err.count("\n") == 1


def test_a_model_without_regions_refuses_a_mask(model, tmp_path):
    Image.new("L", (64, 64), 255).save(tmp_path / "m.png")
    code, out, err = command("--model", model, "--image", "scene:test/0/3/64", "--mask", tmp_path / "m.png",
                             "--ask", "What is <region>?")
    assert code == 2 and "reads whole images only" in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("args, message", [
    ((), "give one of"), (("--scenes", 1, "--data", "x"), "give one of"), (("--scenes", 1), "give --model"),
    (("--score", "none.jsonl"), "none.jsonl is not there"),
    (("--model", "nowhere", "--scenes", 1), "config.json is not there"),
    (("--model", "nowhere", "--image", "x.png"), "--image needs --ask"),
    (("--model", "x", "--scenes", 1, "--out", "no/such/f"), "no/such/f cannot be written"),
    (("--model", "x", "--data", "s.jsonl", "--out", "./s.jsonl"), "--out ./s.jsonl is the file of records"),
    (("--model", "x", "--image", "x.png", "--ask", ""), "--ask: the value is empty"),
    (("--model", "x", "--scenes", 1, "--mask", "m.png"), "--mask goes with --image, not with --scenes; leave it out"),
    (("--model", "x", "--data", "x", "--temperature", 0.7), "--temperature goes with --image"),
    (("--model", "x", "--data", "x", "--split", "val"), "--split goes with --scenes or --benchmark"),
    (("--score", "p.jsonl", "--benchmark", "rsicd", "--out", "q.jsonl"), "--out goes with --scenes"),
    (("--model", "x", "--scenes", 1, "--leave-out", "count"), "--leave-out goes with --benchmark"),
    (("--score", "p.jsonl", "--blind"), "--blind goes with --scenes or --benchmark or --data, not with --score"),
    (("--benchmark", "rsicd", "--root", "x"), "give --model"), (("--scenes", 1, "--sanity"), "--sanity goes with"),
    (("--benchmark", "rsicd", "--root", "x", "--sanity", "--model", "x"), "--sanity goes without --model"),
    (("--benchmark", "coco", "--root", "x", "--sanity"), "expected one of rsicd, sydney"),
    (("--benchmark", "all", "--sanity"), "--root None"),
    (("--benchmark", "all", "--root", "nowhere", "--sanity", "--split", "val"), "--split val goes with one"),
    (("--benchmark", "rsicd", "--root", "nowhere", "--sanity"), "nowhere"),
    (("--benchmark", "all", "--score", "p.jsonl"), "one benchmark")])
def test_a_mistake_is_one_line_and_exit_code_2(args, message):
    code, out, err = command(*args)
    assert code == 2 and message in err and err.count("\n") == 1 and not out


def test_types_are_judged_before_the_first_answer(model, tmp_path, monkeypatch):
    row = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({**row, "type": kind}) + "\n" for kind in (None, "count")))
    code, out, err = command("--model", model, "--data", tmp_path / "d.jsonl", "--max-new-tokens", 1)
    assert code == 0 and "count" in figures(out), err
    with open(tmp_path / "d.jsonl", "a") as file:
        file.write(json.dumps({**row, "type": "accuracy"}))
    monkeypatch.setattr(evaluate, "predict", None)
    code, out, err = command("--model", model, "--data", tmp_path / "d.jsonl")
    assert code == 2 and "record 3: type 'accuracy' is the name of the sum" in err and err.count("\n") == 1 and not out


def test_a_prompt_without_room_is_told_before_the_first_answer(model, tmp_path, monkeypatch):
    rows = [{"conversations": [{"from": "human", "value": words}, {"from": "gpt", "value": "x"}]}
            for words in ("?", "word " * 900)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(evaluate, "predict", None)
    code, out, err = command("--model", model, "--data", tmp_path / "d.jsonl")
    assert code == 2 and "record 2: a prompt of" in err and "max_len" in err and err.count("\n") == 1 and not out


def test_train_captions_are_no_benchmark():
    code, out, err = command("--benchmark", "sydney", "--root", "x", "--split", "train", "--sanity")
    assert code == 2 and "--split train: its records are single captions" in err and not out


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    code, out, err = command("--model", "x", "--scenes", 1)
    assert code == 2 and "start one for each, torchrun --nproc-per-node 2" in err and err.count("\n") == 1 and not out


def test_compiling_without_a_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "nowhere")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = command("--model", "x", "--scenes", 1, "--compile")
    assert code == 2 and "needs a C++ compiler" in err and err.count("\n") == 1 and not out


def test_all_with_nothing_there_is_one_line(tmp_path):
    code, _, err = command("--benchmark", "all", "--root", tmp_path, "--sanity")
    assert code == 2 and "nothing to ask; expected sub-folders named rsicd" in err and err.count("\n") == 1


def test_a_bad_image_or_prediction_file_is_one_line(model, tmp_path):
    (tmp_path / "x.png").write_text("no image")
    code, _, err = command("--model", model, "--image", tmp_path / "x.png", "--ask", "?")
    assert code == 2 and "not an image" in err and err.count("\n") == 1
    (tmp_path / "p.jsonl").write_text('{"prediction": "a", "answer": "b"}\n{"prediction": 3}\n')
    code, _, err = command("--score", tmp_path / "p.jsonl")
    assert code == 2 and "line 2" in err and err.count("\n") == 1
