"""
Proves that the metrics equal values worked out by hand, that words are split as stated, and that sets which cannot be
scored are refused.

    pytest tests/run/test_metrics.py
"""
import math
import time

import pytest

from scoring.metrics import (accuracy, best_constant, bleu, cider, edit_distance, mean_over_types, nearest_class,
                             normalize_answer, pope, rouge_l, says_yes, score_captions, semantic_iou, tokenize)


@pytest.mark.parametrize("text, tokens", [
    ("Many planes are parked next to a long building in an airport .",
     "many planes are parked next to a long building in an airport"),
    ("a T-shaped, half-circle-shaped roof; roads/paths.", "a t-shaped half-circle-shaped roof roads/paths"),
    ("the building's roof isn't red: we can't see", "the building 's roof is n't red we ca n't see"),
    ("the dogs' house and 'single' words", "the dogs house and single words"),
    ("cars (red and white) cannot stop", "cars -lrb- red and white -rrb- can not stop"),
    ("3,000 m2, 10% water - 5.5 km -- there...", "3,000 m2 10 % water 5.5 km there"),
    ("the building’s “y” – dash — em… a  b", "the building 's y dash em a b"),
    (" . ", ""),
])
def test_tokenize(text, tokens):
    assert tokenize(text) == tokens.split()


def test_bleu_by_hand():
    """
    Clipping, closest length and the penalty, over two images.

    Image 1 predicts 3 words, "the the cat"; references of 3 and 5 words: closest 3. "the" counts once, "cat" once:
    2 of 3 words, and of 2 bigrams "the cat" is right. Image 2 predicts 2 words; references of 3 and 1 are equally near:
    the shorter, 1. 2 of 2 words, 1 of 1 bigrams. In all 4/5 of the words, 2/3 of the bigrams, no penalty since 5 > 4.
    """
    scores = bleu(["the the cat", "a road"], [["the cat sat", "the cat sat on mats"], ["a road here", "road"]])
    assert scores[0] == pytest.approx(4 / 5, abs=1e-8)
    assert scores[1] == pytest.approx(math.sqrt(4 / 5 * 2 / 3), abs=1e-8)
    assert scores[2] < 1e-4 and scores[3] < 1e-3


def test_bleu_penalises_short_answers():
    assert bleu(["many trees"], [["many trees are here now"]])[0] == pytest.approx(math.exp(1 - 5 / 2), abs=1e-7)


def test_bleu_counts_the_set_not_the_images():
    """One word right of one, none of three: 1/4 over the set, where a mean over images would say 1/2."""
    assert bleu(["trees", "x y z"], [["trees"], ["a b c"]])[0] == pytest.approx(1 / 4, abs=1e-8)


def test_rouge_l_by_hand():
    """
    "a b c d" shares "a c d" with the first reference (3 of 6 words) and "b" with the second (1 of 1).

    P = 3/4, R = max(3/6, 1/1) = 1: the two come from different references, as in the original. The other image: 0.
    """
    predictions, references = ["a b c d", "x"], [["a c q d r s", "b"], ["y"]]
    expected = (1 + 1.44) * 0.75 * 1 / (1 + 1.44 * 0.75)
    assert rouge_l(predictions, references) == pytest.approx(expected / 2, abs=1e-12)


def test_rouge_l_matches_a_word_once():
    """"b" shares one word with "b b", not two: P = 1, R = 1/2."""
    assert rouge_l(["b"], [["b b"]]) == pytest.approx(2.44 * 0.5 / (0.5 + 1.44), abs=1e-12)


def test_cider_by_hand():
    """Three images. "b" and "d" are in the references of one image (weight v = log 3), "a" of two (w = log 1.5).

    Image 1 predicts "a b" for "a b": cosine 1 for words and for bigrams, 0 for longer n-grams (none): 10 * 2/4.
    Image 2 predicts "a a" for "a d": only words meet: min(2 w, w) * w / (2 w * sqrt(w^2 + v^2)). Image 3: 0.
    """
    score = cider(["a b", "a a", "q"], [["a b", "a b"], ["a d"], ["e"]])     # images are counted, not references
    w, v = math.log(1.5), math.log(3)
    first, second = 10 * 2 / 4, 10 / 4 * w * w / (2 * w * math.hypot(w, v))
    assert score == pytest.approx((first + second) / 3, abs=1e-12)


def test_cider_punishes_other_lengths():
    """"b b b" against "b": cosine 1/3 after clipping, and two words too many: exp(-4 / 72)."""
    score = cider(["b b b", "q"], [["b"], ["e"]])
    assert score == pytest.approx(10 / 4 / 3 * math.exp(-4 / 72) / 2, abs=1e-12)


def test_cider_refuses_one_image():
    with pytest.raises(ValueError, match="2 or more images"):
        cider(["a b"], [["a b"]])


def test_strings_and_tokens_score_alike():
    predictions = ["Many trees .", "A road, a river."]
    references = [["many trees"], ["a road and a river", "A river ."]]
    split = [tokenize(p) for p in predictions], [[tokenize(a) for a in answers] for answers in references]
    assert score_captions(predictions, references) == score_captions(*split)
    assert list(score_captions(predictions, references)) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]


def test_an_empty_prediction_scores_zero():
    scores = score_captions(["", "."], [["many trees"], ["a road"]])
    assert all(score == pytest.approx(0, abs=1e-6) for score in scores.values())


@pytest.mark.parametrize("metric", ["meteor", "spice"])
def test_java_metrics_are_refused_with_the_reason(metric):
    with pytest.raises(ValueError, match=f"{metric}.*Java"):
        score_captions(["a"], [["a"]], metrics=("bleu", metric))
    with pytest.raises(ValueError, match="unknown caption metric 'bleurt'; known: bleu, rouge-l, cider"):
        score_captions(["a"], [["a"]], metrics=("bleurt",))


@pytest.mark.parametrize("predictions, references, message", [
    (["a"], [], "1 predictions but 0 lists"),
    ([], [], "no predictions"),
    (["a", "b"], [["a"], []], "references of prediction 1"),
    (["a"], ["a road"], "references of prediction 0.*'a road'"),
])
def test_sets_that_cannot_be_scored(predictions, references, message):
    for metric in (bleu, rouge_l, cider):
        with pytest.raises(ValueError, match=message):
            metric(predictions, references)


def test_best_constant_is_the_best_by_bleu():
    references = [["many trees are here", "green trees trees"], ["many roads"], ["a road and some trees", "one road"]]
    candidates = ["a zebra", "trees trees", "many trees", "many many many trees", "a road and many trees are here ."]
    scores = [bleu([candidate] * 3, references)[0] for candidate in candidates]
    best, score = best_constant(references, candidates)
    assert best == candidates[scores.index(max(scores))]
    assert score == pytest.approx(max(scores), abs=1e-12)
    assert all(best_constant(references, [c])[1] == pytest.approx(s, abs=1e-12) for c, s in zip(candidates, scores))


def test_best_constant_is_quick_for_500_images_and_300_candidates():
    references = [[f"there are {i % 7} trees and {j} roads near river {i % 11}" for j in range(5)] for i in range(500)]
    start = time.perf_counter()
    best_constant(references, [f"{i} trees and roads near river" for i in range(300)])
    assert time.perf_counter() - start < 5  # 0.3 s when idle; bleu() a candidate would take a minute


def test_best_constant_needs_candidates():
    with pytest.raises(ValueError, match="no candidate"):
        best_constant([["a"]], [])


@pytest.mark.parametrize("text, normal", [
    (" Yes. ", "yes"), ("Two", "2"), ("ten  ships!", "10 ships"), ("the river", "the river"), ("10.5", "10.5"),
    ("between 0 and 10", "between 0 and 10"), ("someone", "someone"),
])
def test_normalize_answer(text, normal):
    assert normalize_answer(text) == normal


def test_accuracy_counts_every_type():
    scores = accuracy(["Yes.", "no", "two", "rural area", "No"], ["yes", "yes", "2", "rural", "no"],
                      ["presence", "presence", "count", "rural_urban", "presence"])
    assert scores == {"all": (3, 5), "count": (1, 1), "presence": (2, 3), "rural_urban": (0, 1)}
    assert mean_over_types(scores) == pytest.approx((1 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("arguments, message", [
    ((["a"], ["a"], []), "1 predictions, 1 answers, 0 types"), (([], [], []), "no predictions"),
    ((["a"], ["a"], ["all"]), "type 'all'"),
])
def test_accuracy_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        accuracy(*arguments)


@pytest.mark.parametrize("text, yes", [
    ("Yes", True), ("no", False), ("No, there is none.", False), ("NO!", False), ("There is not any ship", False),
    ("Yes. There is no doubt", True), ("a notable ship", True), ("2", True), ("", True),
])
def test_says_yes(text, yes):
    assert says_yes(text) == yes


def test_pope_by_hand():
    """TP 2, FP 2, FN 1, TN 2 of 7."""
    predictions = ["yes", "Yes.", "no", "No, there is none", "it is not there", "yes", "a ship"]
    scores = pope(predictions, ["yes", "no", "yes", "no", "no", "yes", "no"])
    assert scores == pytest.approx({"accuracy": 4 / 7, "precision": 1 / 2, "recall": 2 / 3,
                                    "F1": 2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3), "share of yes": 4 / 7})


def test_pope_of_a_model_that_never_says_yes():
    assert list(pope(["no", "no"], ["yes", "no"]).values()) == [0.5, 0, 0, 0, 0]
    for predictions, answers in (([], []), (["no"], ["no", "yes"])):
        with pytest.raises(ValueError, match="at least one"):
            pope(predictions, answers)


@pytest.mark.parametrize("prediction, answer, value", [
    ("ship", "ship", 1), ("A big, big ship.", "ship", 1 / 3), ("small ship", "large ship", 1 / 3),
    ("Small_Vehicle", "small vehicle", 1), ("ships", "ship", 0), ("", "ship", 0), ("", "", 0),
])
def test_semantic_iou(prediction, answer, value):
    assert semantic_iou(prediction, answer) == pytest.approx(value)


@pytest.mark.parametrize("prediction, name", [
    ("a large gray ship", "ship"), ("large vehicle", "large vehicle"), ("a vehicle", "vehicle"),
    ("ships", "ship"), ("Plain", "plane"), ("vehicle ship", "vehicle"), ("", "ship"),
])
def test_nearest_class(prediction, name):
    """Words first, also of longer names; with no word in common, or as many, the fewest letters to change."""
    assert nearest_class(prediction, ["large vehicle", "plane", "vehicle", "ship"]) == name


def test_nearest_class_takes_the_first_of_equals_and_needs_one():
    assert nearest_class("x", ["b", "a"]) == "b"
    with pytest.raises(ValueError, match="no class names"):
        nearest_class("x", [])


def test_edit_distance():
    assert [edit_distance(a, b) for a, b in (("kitten", "sitting"), ("", "abc"), ("ship", "ship"))] == [3, 3, 0]
