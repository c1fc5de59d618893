"""
What a figure depends on, so that two figures can be compared.

The contract of a benchmark names its files by hash, its rows, prompts, scoring and decoding; evaluate.py prints it and
keeps it as pred.contract.json beside pred.jsonl. `python evaluate.py --contract pred.jsonl` scores the same predictions
under other choices: how far does each move the figure?
"""
import hashlib
import re
from collections import Counter
from pathlib import Path

import torch

from corpora.prompts import IMAGE_LINE
from corpora.table import files_of
from data import image_names
from files.text import file_digest, write_json
from scoring.benchmarks import BENCHMARKS
from scoring.metrics import bleu, normalize_answer, tokenize
from scoring.scores import by_kind, references_of

SCORING = {"BLEU-1": "the whole set at once, all references, closest reference length; lower case, pycocoevalcap's "
                     "tokens and its punctuation left out",
           "accuracy": "the whole answer must be equal, after lower case, single spaces, no closing punctuation, zero "
                       "to ten as digits"}
STOP_WORDS = set("a an the of and is are in on at to it its with there this that be by".split())
SYNONYMS = {"airplane": "plane", "aircraft": "plane", "vehicle": "car", "ship": "boat", "street": "road",
            "house": "building", "true": "yes", "false": "no", "none": "0"}


def contract(name, split, records, root, scores, answered):
    """
    {what: its value}, all that the figures of one benchmark depend on, and the figures. scores: {heading: scores};
    answered: what the model's answers depend on, {} without a model.
    """
    images = sorted({image for record in records for image in image_names(record)})
    seen, missing = hashlib.sha256(), 0
    for image in images:
        path = Path(root, image)
        missing += not path.is_file()
        seen.update(f"{image} {file_digest(path) if path.is_file() else 'missing'}\n".encode())
    prompts = Counter(record["conversations"][-2]["value"].removeprefix(IMAGE_LINE) for record in records)
    return {"benchmark": name, "split": split, "rows": len(records),
            "files": {path.name: file_digest(path)[:16] for path in files_of(name, root, split)},
            "images": {"number": len(images), "missing": missing, "digest": seen.hexdigest()[:16]},
            "prompts": dict(prompts.most_common(8)) | ({"other": len(prompts) - 8} if len(prompts) > 8 else {}),
            "scoring": SCORING[BENCHMARKS[name].metric], "torch": torch.__version__, "answers": answered,
            "figures": {heading: {what: round(value, 2) for what, (value, _) in found.items()}
                        for heading, found in scores.items()}}


def tell_contract(out, *parts):
    """Print the contract of these parts, and keep it beside the predictions, if they go to a file `out`."""
    found = contract(*parts)
    print("what these figures depend on:")
    for what, value in found.items():
        if isinstance(value, dict):
            value = "; ".join(f"{key} {each}" for key, each in value.items())
        if value and what != "figures":     # they stand above
            print(f"  {what:10} {' '.join(str(value).split())[:300]}")
    if out:
        write_json(out.with_suffix(".contract.json"), found)


# ---------------------------------------------------------------------------------------------- other choices

def caption_choices(rows):
    """{choice: BLEU-1} of the same captions."""
    said, true = [row["prediction"] for row in rows], [references_of(row) for row in rows]

    def score(tokens=tokenize, references=None):
        some = [texts[:references] for texts in true]
        return 100 * bleu([tokens(text) for text in said], [[tokens(text) for text in texts] for texts in some])[0]

    most = max(map(len, true))
    found = {"as scored": score(),
             "letters' case kept": score(lambda text: TOKENS.findall(text)),
             "punctuation kept": score(lambda text: TOKENS.findall(text.lower())),
             "split at spaces alone": score(str.split),
             "without stop words": score(lambda text: [t for t in tokenize(text) if t not in STOP_WORDS]),
             "plural s cut off": score(lambda text: [t.removesuffix("s") for t in tokenize(text)])}
    found |= {f"the first {n} references": score(references=n) for n in range(1, most)}
    one = [100 * bleu([text], [texts])[0] for text, texts in zip(said, true)]
    return found | {"mean over images": sum(one) / len(one)}


TOKENS = re.compile(r"\w+|[^\w\s]")


def answer_choices(rows):
    """{choice: accuracy} of the same answers."""
    pairs = [(row["prediction"], row["answer"]) for row in rows]

    def score(change, right=lambda a, b: a == b):
        return 100 * sum(right(change(said), change(true)) for said, true in pairs) / len(pairs)

    words = lambda text: re.findall(r"\w+", normalize_answer(text))
    return {"as scored": score(normalize_answer),
            "letter for letter": score(lambda text: text),
            "case and spaces alone": score(lambda text: " ".join(text.lower().split())),
            "numbers as words differ": score(lambda text: " ".join(text.lower().strip().rstrip(".,;:!?").split())),
            "without articles": score(lambda text: [w for w in words(text) if w not in ("a", "an", "the")]),
            "synonyms are one": score(lambda text: [SYNONYMS.get(w.removesuffix("s"), w.removesuffix("s"))
                                                    for w in words(text)]),
            "the first word alone": score(lambda text: words(text)[:1]),
            "the answer is anywhere in it": score(words, lambda a, b: set(b) <= set(a))}


def print_choices(rows):
    """Both tables, for rows of scoring.scores.read_predictions."""
    captions, answers = by_kind(rows)
    parts = [(f"{kind}: BLEU-1" if kind else "BLEU-1", some, caption_choices) for kind, some in captions.items()]
    for heading, some, choices in [*parts, ("accuracy", answers, answer_choices)]:
        if some:
            found = choices(some)
            print(f"{heading} of {len(some):,} rows{'':20}change")
            for choice, value in found.items():
                print(f"  {choice:30}{value:9.2f}{value - found['as scored']:+9.2f}")
