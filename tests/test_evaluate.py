"""
Proves the two steps of evaluation: predictions are written as they are scored, scores are what a person counts, and
asking about one image goes through the same door. Mistakes end with one line and exit code 2.

    pytest tests/test_evaluate.py
"""
import contextlib
import io
import json
import sys

import pytest
import torch
from PIL import Image

import evaluate
from aquila import PRESETS, build, save_model

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
    built = build(PRESETS["tiny"])
    torch.manual_seed(0)
    with torch.no_grad():
        for p in built.trained().values():
            p.add_(0.02 * torch.randn(p.shape))
    save_model(built, folder)
    return folder


def test_scores_are_what_a_person_counts():
    scores = evaluate.score(ROWS)
    assert scores["accuracy"] == (pytest.approx(200 / 3), 3)
    assert scores["count"] == (100.0, 2) and scores["presence"] == (0.0, 1)
    # "a red ship": 3 of 3 words right; the closest reference length is 2, so no brevity penalty
    assert scores["BLEU-1"] == (pytest.approx(100.0), 1)


def test_constant_scores_are_the_best_single_answers():
    rows = [{**ROWS[0], "answer": a, "prediction": "?"} for a in ("1", "1", "3")] + [ROWS[3]]
    assert evaluate.constant_scores(rows)["count"] == (pytest.approx(200 / 3), 3)
    assert evaluate.constant_scores(rows)["BLEU-1"][0] == pytest.approx(100.0)


def test_predict_then_score_separately(model, tmp_path):
    code, out, err = command("--model", model, "--scenes", 2, "--max-new-tokens", 5,
                             "--out", tmp_path / "p.jsonl", "--compare")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").open()]
    assert {"id", "image", "question", "type", "prediction"} <= rows[0].keys() and len(rows[0]["references"]) == 5
    assert all("<image>" not in row["question"] for row in rows)
    for heading in ("model", "gray image", "best constant", "no MDA", "BLEU-1", "accuracy"):
        assert heading in out
    code, again, _ = command("--score", tmp_path / "p.jsonl")
    line = lambda text: next(x for x in text.splitlines() if x.startswith("accuracy"))
    assert code == 0 and line(again).split()[:3] == line(out).split()[:3]


def test_blind_answers_do_not_depend_on_the_image(model, tmp_path):
    rows = [{"id": str(i), "image": f"scene:test/0/{i}/128", "references": ["x"],
             "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]}
            for i in range(3)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    answers = []
    for flags in (("--blind",), ()):
        command("--model", model, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "p.jsonl",
                "--max-new-tokens", 12, *flags)
        answers.append([json.loads(line)["prediction"] for line in (tmp_path / "p.jsonl").open()])
    assert len(set(answers[0])) == 1 and answers[1] != answers[0]


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


@pytest.mark.parametrize("args, message", [
    ((), "give one of"), (("--scenes", 1, "--data", "x"), "give one of"), (("--scenes", 1), "give --model"),
    (("--score", "none.jsonl"), "none.jsonl is not there"),
    (("--model", "nowhere", "--scenes", 1), "config.json is not there"),
    (("--model", "nowhere", "--image", "x.png"), "go together"),
    (("--model", "x", "--scenes", 1, "--out", "no/such/f"), "no such folder")])
def test_a_mistake_is_one_line_and_exit_code_2(args, message):
    code, out, err = command(*args)
    assert code == 2 and message in err and err.count("\n") == 1 and not out


def test_a_bad_image_or_prediction_file_is_one_line(model, tmp_path):
    (tmp_path / "x.png").write_text("no image")
    code, _, err = command("--model", model, "--image", tmp_path / "x.png", "--ask", "?")
    assert code == 2 and "not an image" in err and err.count("\n") == 1
    (tmp_path / "p.jsonl").write_text('{"prediction": "a", "answer": "b"}\n{"prediction": 3}\n')
    code, _, err = command("--score", tmp_path / "p.jsonl")
    assert code == 2 and "line 2" in err and err.count("\n") == 1
