"""
Proves that BLEU-1..4, ROUGE-L and CIDEr equal pycocoevalcap's to 1e-6 on the same tokens, and the tokens its Java
tokenizer's.

    pytest tests/peers/test_metrics_peers.py
The captions are drawn from a small grammar with a fixed seed: five references an image, answers of every quality, with
repeated words, very short texts, words that no reference has, and references that repeat.
"""
import random
import shutil

import pycocoevalcap.bleu.bleu as bleu
import pycocoevalcap.cider.cider as cider
import pycocoevalcap.rouge.rouge as rouge
import pycocoevalcap.tokenizer.ptbtokenizer as ptb
import pytest

from scoring import metrics

COUNTS = ("a", "many", "several", "some", "two")
COLORS = ("", "green", "gray", "white", "dark green")
THINGS = ("buildings", "trees", "planes", "storage tanks", "ships", "baseball fields", "roads", "ponds")
PLACES = ("in an airport", "near a river", "next to a road", "in a dense residential area", "around a square", "")


def phrase(draw):
    return f"{draw.choice(COUNTS)} {draw.choice(COLORS)} {draw.choice(THINGS)}"


def caption(draw):
    parts = [phrase(draw) for _ in range(draw.randint(1, 3))]
    return f"{' and '.join(parts)} are {draw.choice(PLACES)}"


def synthetic_set(images=300):
    draw = random.Random(7)
    odd = ["trees", "trees trees trees trees", "zebra", "a", "many planes"]
    predictions, references = [], []
    for number in range(images):
        distinct = [caption(draw) for _ in range(draw.randint(1, 5))]
        answers = [distinct[i % len(distinct)] for i in range(draw.choice([1, 3, 5, 5]))]
        good = " ".join(word for word in answers[0].split() if draw.random() < 0.8) or "a"
        predictions.append(" ".join(draw.choice([good, answers[-1], caption(draw), odd[number % 5]]).split()))
        references.append([" ".join(answer.split()) for answer in answers])
    return predictions, references


def peer_inputs(predictions, references):
    return dict(enumerate(references)), {number: [text] for number, text in enumerate(predictions)}


PREDICTIONS, REFERENCES = synthetic_set()
TOKENS = [text.split() for text in PREDICTIONS], [[text.split() for text in answers] for answers in REFERENCES]
PEER = peer_inputs(PREDICTIONS, REFERENCES)


def test_bleu_equals_pycocoevalcap():
    theirs, _ = bleu.Bleu(4).compute_score(*PEER, verbose=0)
    assert metrics.bleu(*TOKENS) == pytest.approx(theirs, abs=1e-6)
    assert 0.2 < theirs[3] < theirs[0] < 0.9      # the set is neither hopeless nor copied


def test_bleu_of_hopeless_answers_equals_pycocoevalcap():
    """One-word answers that no reference has: only the guards against 0 / 0 are left."""
    predictions, references = ["zebra", "lion"], [["many trees"], ["a road", "a long gray road"]]
    theirs, _ = bleu.Bleu(4).compute_score(*peer_inputs(predictions, references), verbose=0)
    assert metrics.bleu(predictions, references) == pytest.approx(theirs, rel=1e-9)


def test_rouge_l_equals_pycocoevalcap():
    theirs, _ = rouge.Rouge().compute_score(*PEER)
    assert metrics.rouge_l(*TOKENS) == pytest.approx(theirs, abs=1e-6)


def test_cider_equals_pycocoevalcap():
    theirs, _ = cider.Cider().compute_score(*PEER)
    assert metrics.cider(*TOKENS) == pytest.approx(theirs, abs=1e-6)
    assert theirs > 0.5


def test_cider_of_a_sub_set_equals_pycocoevalcap():
    """Other images, other weights: the same answers score differently in a smaller set, here as there."""
    some = slice(0, 20)
    theirs, _ = cider.Cider().compute_score(*peer_inputs(PREDICTIONS[some], REFERENCES[some]))
    assert metrics.cider(TOKENS[0][some], TOKENS[1][some]) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.skipif(shutil.which("java") is None, reason="pycocoevalcap's tokenizer is a Java program")
def test_tokens_equal_the_java_tokenizer():
    texts = ["Many planes are parked next to a long building in an airport .", "It's a T-shaped building.",
             "don't, can't and isn't", "the building's roofs; the dogs' house: (red and white) [two] {x}",
             "a 3,000 m2 area, 10% water, 5.5 km", "roads/paths and trees & bushes",
             "cannot see: \"quoted\" 'single' ``ticks``",
             "half-circle-shaped,semi-circular... others - grey -- dark",
             "the ’s and building’s “y” – dash — em…",
             "we'll they're I've he'd I'm", "a_b_c #1 3x4 1st 1/2", "there is a river.there is a tree.",
             "café über 北京", "a   double  space , and a tab"]
    theirs = ptb.PTBTokenizer().tokenize({0: [{"caption": text} for text in texts]})[0]
    assert [" ".join(metrics.tokenize(text)) for text in texts] == theirs
