"""
How answers are scored, in plain Python: BLEU-1..4, ROUGE-L, CIDEr, accuracy (Aquila Sec. 4.2, Tables 3 and 4), and for
regions POPE, semantic IoU and the nearest class name (Aquila-plus).

The caption metrics equal pycocoevalcap's on the same tokens. METEOR and SPICE are Java programs with data files of
their own: a look-alike would compare with nobody's numbers. Scores are fractions (CIDEr goes up to 10). Score a whole
test set at once, as CIDEr depends on all of it.
"""
import math
import re
from collections import Counter
from functools import cache

SMALL, TINY = 1e-9, 1e-15                   # pycocoevalcap's guards against 0 / 0 in BLEU; seen on very short answers
PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."})
CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ll|ve|m|d))\b")
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
REMOVED = {"'", "`", '"', ".", "?", "!", ",", ":", "-", ";"}
TOKEN = re.compile(r"""
    '(?:s|re|ll|ve|m|d)\b                                   # what CLITIC cut off
  | \w+ (?: (?: [-/.&'] | (?<=\d),(?=\d) ) \w+ )*           # t-shaped, roads/paths, 5.5, 3,000
  | [^\w\s]
""", re.VERBOSE)


def tokenize(text):
    """
    Lower-case words as pycocoevalcap's PTBTokenizer gives them, without its punctuation list; a list is tokens already.
    "building's" gives "building", "'s"; "don't" gives "do", "n't"; a bracket becomes "-lrb-" and stays, because the
    published tokenizer lower-cases before it looks for "-LRB-". Not imitated: abbreviations ("U.S." keeps its last
    period there), runs like "?!" (kept there), signs and leading points of numbers, addresses, hash tags, "gonna".
    """
    if not isinstance(text, str):
        return text
    text = CLITIC.sub(r" \1", text.lower().translate(PLAIN))
    text = re.sub(r"\bcannot\b", "can not", text)
    return [BRACKETS.get(token, token) for token in TOKEN.findall(text) if token not in REMOVED]


def paired(predictions, references):
    """[(prediction, its references)], an image each, as tokens; ValueError for a set that cannot be scored."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} lists of references; expected as many")
    if not predictions:
        raise ValueError("nothing to score: no predictions were given")
    for number, answers in enumerate(references):
        if isinstance(answers, str) or not answers:
            raise ValueError(f"references of prediction {number}: expected a list of texts, found {answers!r}")
    return [(tokenize(prediction), [tokenize(answer) for answer in answers])
            for prediction, answers in zip(predictions, references)]


def ngrams(tokens, n):
    return Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))


def largest_counts(answers, n):
    """For every n-gram its largest count in one of the references, to which BLEU clips."""
    largest = Counter()
    for answer in answers:
        largest |= ngrams(answer, n)
    return largest


def closest_length(length, answers):
    """BLEU's reference length: the nearest to the prediction's, the shorter of two equally near."""
    return min((abs(len(tokens) - length), len(tokens)) for tokens in answers)[1]


def brevity_penalty(length, reference_length):
    ratio = (length + TINY) / (reference_length + SMALL)
    return 1.0 if ratio >= 1 else math.exp(1 - 1 / ratio)


def bleu(predictions, references):
    """
    [BLEU-1, ..., BLEU-4] of the whole set, not a mean over images:

    p_n    = sum of min(count in prediction, largest count in one reference) / number of predicted n-grams
    BLEU-N = BP * (p_1 * ... * p_N)^(1/N),   BP = min(1, exp(1 - r/c))
    with c the words of all predictions and r the sum over images of the closest reference length.
    """
    pairs = paired(predictions, references)
    penalty = brevity_penalty(sum(len(prediction) for prediction, _ in pairs),
                              sum(closest_length(len(prediction), answers) for prediction, answers in pairs))
    scores, product = [], 1.0
    for n in range(1, 5):
        right = total = 0
        for prediction, answers in pairs:
            right += (ngrams(prediction, n) & largest_counts(answers, n)).total()
            total += max(0, len(prediction) - n + 1)
        product *= (right + TINY) / (total + SMALL)
        scores.append(penalty * product ** (1 / n))
    return scores


def common_subsequence(a, b):
    """Length of the longest common subsequence, row by row."""
    row = [0] * (len(b) + 1)
    for token in a:
        previous, row = row, [0]
        for j, other in enumerate(b):
            row.append(previous[j] + 1 if token == other else max(previous[j + 1], row[j]))
    return row[-1]


def rouge_l(predictions, references, beta=1.2):
    """
    Mean over images of F = (1 + b^2) P R / (R + b^2 P). P = longest common subsequence / words of the prediction, R =
    the same / words of the reference; each is the largest over the references, which may be different ones.
    """
    total = 0.0
    for prediction, answers in paired(predictions, references):
        common = [common_subsequence(prediction, answer) for answer in answers]
        if any(common):
            precision = max(common) / len(prediction)
            recall = max(c / len(answer) for c, answer in zip(common, answers) if answer)
            total += (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision)
    return total / len(predictions)


def cider(predictions, references, sigma=6.0):
    """
    Mean over images of 10 / 4 * sum over n = 1..4 of the mean over references of
        exp(-(l_p - l_r)^2 / (2 sigma^2)) * sum of min(g_p, g_r) * g_r over n-grams / (|g_p| |g_r|)
    with l the number of words, g = count in the text * log(images / max(1, images with the n-gram in a reference)).
    This is what pycocoevalcap calls CIDEr; the min and the length term are CIDEr-D's.
    """
    pairs = paired(predictions, references)
    if len(pairs) < 2:
        raise ValueError("CIDEr needs 2 or more images: n-grams are weighed by how many images of the set mention them")

    def weigh(grams):
        vector = {gram: count * math.log(len(pairs) / max(1, images[gram])) for gram, count in grams.items()}
        return vector, math.sqrt(sum(value * value for value in vector.values()))

    total = 0.0
    for n in range(1, 5):
        images = Counter()                  # that have the n-gram in a reference
        for _, answers in pairs:
            images.update(set().union(*[ngrams(answer, n) for answer in answers]))
        for prediction, answers in pairs:
            vector, norm = weigh(ngrams(prediction, n))
            for answer in answers:
                other, other_norm = weigh(ngrams(answer, n))
                dot = sum(min(value, other[gram]) * other[gram] for gram, value in vector.items() if gram in other)
                # pycocoevalcap counts bigrams here: one less than the words, but 0 for a text of none.
                delta = max(0, len(prediction) - 1) - max(0, len(answer) - 1)
                if dot:
                    total += math.exp(-delta ** 2 / (2 * sigma ** 2)) * dot / (norm * other_norm) / len(answers)
    return 10 * total / 4 / len(pairs)


def check_metrics(names):
    for name in names:
        if name in ("meteor", "spice"):
            raise ValueError(f"{name} is not computed here: it is a Java program with its own word lists, to be run on "
                             "the predictions. Here: bleu, rouge-l, cider")
        if name not in ("bleu", "rouge-l", "cider"):
            raise ValueError(f"unknown caption metric '{name}'; known: bleu, rouge-l, cider")


def score_captions(predictions, references, metrics=("bleu", "rouge-l", "cider")):
    """{"BLEU-1": ..., "BLEU-4": ..., "ROUGE-L": ..., "CIDEr": ...}."""
    check_metrics(metrics)
    scores = {}
    if "bleu" in metrics:
        scores |= {f"BLEU-{n}": value for n, value in enumerate(bleu(predictions, references), 1)}
    if "rouge-l" in metrics:
        scores["ROUGE-L"] = rouge_l(predictions, references)
    if "cider" in metrics:
        scores["CIDEr"] = cider(predictions, references)
    return scores


def best_constant(references, candidates):
    """
    The caption with the highest BLEU-1 as the answer to every image (the first of equals), and that BLEU-1.
    enough[word, k]: images with a reference that has the word k times or more, so that no image is read again.
    """
    if not candidates:
        raise ValueError("no candidate captions were given")
    answers_of = [answers for _, answers in paired([[]] * len(references), references)]
    enough = Counter()
    for answers in answers_of:
        enough.update((word, k + 1) for word, count in largest_counts(answers, 1).items() for k in range(count))

    @cache
    def reference_length(size):
        return sum(closest_length(size, answers) for answers in answers_of)

    def score(candidate):
        tokens = tokenize(candidate)
        length = len(tokens) * len(answers_of)
        right = sum(enough[word, k + 1] for word, count in ngrams(tokens, 1).items() for k in range(count))
        return brevity_penalty(length, reference_length(len(tokens))) * (right + TINY) / (length + SMALL)

    best = max(candidates, key=score)
    return best, score(best)


NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), "0 1 2 3 4 5 6 7 8 9 10".split()))


def normalize_answer(text):
    """Lower-case, single spaces, no closing punctuation, zero..ten as digits. Articles stay."""
    words = text.lower().strip().rstrip(".,;:!?").split()
    return " ".join(NUMBERS.get(word, word) for word in words)


def same_answer(prediction, answer):
    return normalize_answer(prediction) == normalize_answer(answer)


def accuracy(predictions, answers, types):
    """{"all": (right, asked), type: (right, asked), ...}, by same_answer."""
    if not len(predictions) == len(answers) == len(types):
        raise ValueError(f"{len(predictions)} predictions, {len(answers)} answers, {len(types)} types: should be equal")
    if not predictions:
        raise ValueError("nothing to score: no predictions were given")
    if "all" in types:
        raise ValueError("question type 'all' is the name of the sum over types; rename it")
    right, asked = Counter(), Counter()
    for prediction, answer, kind in zip(predictions, answers, types):
        for key in ("all", kind):
            asked[key] += 1
            right[key] += same_answer(prediction, answer)
    return {key: (right[key], asked[key]) for key in ("all", *sorted(set(types)))}


def mean_over_types(scores):
    """RSVQA's average accuracy, of what accuracy gives: every type weighs the same."""
    fractions = [right / asked for kind, (right, asked) in scores.items() if kind != "all"]
    return sum(fractions) / len(fractions)


def word_set(text):
    """Lower-case words; whatever is no letter or digit parts them, so that "Small_Vehicle" is two."""
    return set(re.findall(r"[^\W_]+", text.lower()))


def says_yes(text):
    """
    POPE's rule (github.com/AoiDragon/POPE, evaluate.py): no, if the text before the first period has the word "no" or
    "not"; else yes, so that "2" or an empty answer is a yes; `accuracy` counts it as wrong.
    """
    return not {"no", "not"} & word_set(text.split(".")[0])


def pope(predictions, answers):
    """
    Does the model see what is not there? Of questions whose answer is yes or no, read by says_yes; positive is yes:
    precision P = TP / (TP + FP), recall R = TP / (TP + FN), F1 = 2 P R / (P + R). 0 / 0 is 0.
    """
    if len(predictions) != len(answers) or not answers:
        raise ValueError(f"{len(predictions)} predictions, {len(answers)} answers; expected as many, and at least one")
    cases = Counter((says_yes(prediction), says_yes(answer)) for prediction, answer in zip(predictions, answers))
    both = cases[True, True]
    said, true = both + cases[True, False], both + cases[False, True]
    return {"accuracy": (both + cases[False, False]) / len(answers), "precision": both / max(1, said),
            "recall": both / max(1, true), "F1": 2 * both / max(1, said + true), "share of yes": said / len(answers)}


def semantic_iou(prediction, answer):
    """Words in both / words in either, as sets (Osprey's S-IoU); 0 if there is none. "a big ship", "ship": 1/3."""
    a, b = word_set(prediction), word_set(answer)
    return len(a & b) / max(1, len(a | b))


def edit_distance(a, b):
    """The least number of letters to put in, take out or exchange that makes b of a."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        previous, row = row, [i]
        for j, other in enumerate(b):
            row.append(min(previous[j] + (letter != other), previous[j + 1] + 1, row[j] + 1))
    return row[-1]


def nearest_class(prediction, classes):
    """
    The class name that a free answer means: that of the largest semantic IoU; of several, that of the least edit
    distance (lower case); of several again, the first. Every answer gets a class.
    """
    if not classes:
        raise ValueError("no class names were given")
    return min(classes, key=lambda name: (-semantic_iou(prediction, name),
                                          edit_distance(prediction.lower().strip(), name.lower())))
