"""
Which rows of predictions get which metrics, and the table that is printed of them.

A row is a dict: `prediction`, and `answer` (for a question, right or wrong) or `references` (a list, for a caption);
type, sampling and others if known. Scores are {name: (value in percent, how many rows it counts)}, where "type: figure"
is of one type of rows.
"""
from files.text import one_line, read_json_lines
from scoring.metrics import (accuracy, mean_over_types, nearest_class, normalize_answer, pope, same_answer,
                             score_captions, semantic_iou)

SENTENCES = ("region caption", "region detail", "region reasoning")                # types answered by a caption


def read_predictions(path):
    """(where, row) of each line of a .jsonl file; ValueError names the first line that is no row."""
    rows = [(where, prediction_row(row, where)) for where, row in read_json_lines(path)]
    if not rows:
        raise ValueError(f"{path} holds no predictions; expected one JSON object a line")
    return rows


def prediction_row(row, where):
    """A checked row; the key names of FIT-RSFG and GeoChat are translated."""
    row = row if isinstance(row, dict) else {}
    if "ground_truth" in row and "prediction" not in row:
        row = {"id": row.get("question_id"), "image": row.get("image", row.get("image_id")),
               "question": row.get("question", row.get("text")), "type": row.get("category"),
               "prediction": row.get("answer"), "answer": row["ground_truth"]}
    if not isinstance(row.get("prediction"), str) or not ("answer" in row or "references" in row):
        raise ValueError(f"{where}: expected 'prediction' and 'answer' or 'references', or 'answer' and "
                         "'ground_truth'")
    row = {key: value for key, value in row.items() if value is not None}
    references = row.get("references") or []
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise ValueError(f"{where}: references {str(references)[:60]!r}: expected a list of texts")
    for key, default in {"answer": "" if references else None, "type": "", "sampling": ""}.items():
        value = row.get(key, default)
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key} {str(value)[:60]}: expected a text")
    if row.get("type") in ("all", "accuracy"):
        raise ValueError(f"{where}: type {row['type']!r} is the name of the sum over types; rename it")
    return row


def references_of(row):
    """The texts that a row is compared with as a caption; None for a question, right or wrong."""
    if row.get("references"):
        return row["references"]
    return [row["answer"]] if row.get("type") in SENTENCES else None


def score(rows, wanted=None):
    """
    Rows -> scores. Captions: BLEU-1..4, ROUGE-L and CIDEr, or those wanted; no CIDEr of one row alone; SENTENCES apart,
    type by type. All others: score_questions; besides score_yes_no and score_classes for the types that they fit.
    """
    captions, questions = by_kind(rows)
    scores = {}
    for kind, group in sorted(captions.items()):
        metrics = wanted or (("bleu", "rouge-l", "cider") if len(group) > 1 else ("bleu", "rouge-l"))
        found = score_captions([row["prediction"] for row in group], [references_of(row) for row in group], metrics)
        scores |= in_percent(found, len(group), kind)
    if questions:
        scores |= score_questions(questions)
    for kind in ("presence", "region presence"):
        scores |= score_yes_no(questions, kind)
    classes = [row for row in questions if row.get("type") == "region class"]
    if classes:
        scores |= in_percent(score_classes(classes), len(classes), "region class")
    return dict(sorted(scores.items(), key=lambda item: ": " in item[0]))          # what has a heading comes last


def by_kind(rows):
    """Rows -> {type, or "" for whole images: captions}, and the questions."""
    captions, questions = {}, []
    for row in rows:
        if references_of(row):
            captions.setdefault(row["type"] if row.get("type") in SENTENCES else "", []).append(row)
        else:
            questions.append(row)
    return captions, questions


def in_percent(found, n, heading):
    return {f"{heading}: {name}" if heading else name: (100 * value, n) for name, value in found.items()}


def said_and_true(rows):
    return [row["prediction"] for row in rows], [row["answer"] for row in rows]


def score_questions(rows):
    """
    Accuracy over all questions (the paper's), of each type, and the mean over types. Later papers leave RSVQA's counts
    and areas out: where there are any, both figures without them, too.
    """
    counts = accuracy(*said_and_true(rows), [row.get("type", "question") for row in rows])
    scores = {("accuracy" if kind == "all" else kind): (100 * right / n, n) for kind, (right, n) in counts.items()}
    if len(counts) > 2:
        scores["mean over types"] = 100 * mean_over_types(counts), len(rows)
    some = {kind: count for kind, count in counts.items() if kind not in ("all", "count", "area")}
    if some and len(some) < len(counts) - 1:
        right, n = sum(right for right, _ in some.values()), sum(n for _, n in some.values())
        scores["without count, area"] = 100 * right / n, n
        scores["its mean over types"] = 100 * mean_over_types(some), n
    return scores


def score_yes_no(rows, kind):
    """POPE's figures of one type's questions whose answer is yes or no: of all, and by the `sampling` of negatives."""
    rows = [row for row in rows if row.get("type") == kind and normalize_answer(row["answer"]) in ("yes", "no")]
    scores = in_percent(pope(*said_and_true(rows)), len(rows), f"{kind}, POPE") if rows else {}
    for sampling in sorted({row["sampling"] for row in rows if row.get("sampling")}):
        part = [row for row in rows if row.get("sampling") == sampling]
        scores |= in_percent(pope(*said_and_true(part)), len(part), f"{kind}, POPE {sampling}")
    return scores


def score_classes(rows):
    """{name: fraction}; the nearest class is sought among the names that occur as answers."""
    said, true = said_and_true(rows)
    classes = sorted(set(true))
    nearest = {text: nearest_class(text, classes) for text in set(said)}
    return {"accuracy": sum(map(same_answer, said, true)) / len(rows),
            "semantic IoU": sum(map(semantic_iou, said, true)) / len(rows),
            "nearest class": sum(nearest[text] == name for text, name in zip(said, true)) / len(rows)}


def print_table(columns):
    """columns: {heading: scores}, side by side; figures of one type stand under its name."""
    first = next(iter(columns.values()))
    width, above = max(20, *(len(name.rpartition(": ")[2]) + 2 for name in first)), ""
    print(f"{'':{width}}{'n':>9}" + "".join(f"{heading:>15}" for heading in columns))
    for name in first:
        group, _, figure = name.rpartition(": ")
        if group != above:
            print(one_line(group))
            above = group
        label = one_line(f"  {figure}" if group else name)
        values = "".join(f"{scores[name][0]:15.2f}" for scores in columns.values())
        print(f"{label:{width}}{first[name][1]:9,}{values}")
    if any(name.endswith("BLEU-1") and n == 1 for name, (_, n) in first.items()):
        print("no CIDEr of a single caption: it weighs words by how many images of the set mention them")
