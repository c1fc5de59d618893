"""
Readers of questions about whole images, one record each with its `type`: RSVQA and FIT-RSFG's benchmarks.
"""
import re

from corpora.prompts import choose_prompt
from corpora.reading import get, listed, make_record, published_file
from files.text import read_json, read_json_lines


def read_rsvqa(corpus, root, split, count_classes=False):
    """Questions and answers in a file each, joined by id; count_classes: counts are answered by their class."""
    questions_path = published_file(corpus, root, split, "questions")
    answers_path = published_file(corpus, root, split, "answers")
    questions, answers = active_rows(questions_path, "questions"), active_rows(answers_path, "answers")
    for number, row in questions.items():
        where = f"{questions_path}: question {number}"
        answer_ids = get(row, "answers_ids", list, where)
        if len(answer_ids) != 1:
            raise ValueError(f"{where}: expected one answer, found {len(answer_ids)}; this is not the published layout")
        answer = get(active_row(answers, answer_ids[0], answers_path), "answer", str, where).strip()
        if not corpus.raw_answers:
            answer = answer_class(answer, count_classes)
        record_id = f"{corpus.name}-{split}-{number}"
        question = choose_prompt("question", record_id, question=get(row, "question", str, where).strip())
        image = f"{corpus.images}{get(row, 'img_id', int, where)}.tif"
        yield make_record(record_id, image, question, answer, type=get(row, "type", str, where))


def active_rows(path, kind):
    """
    {id: row} of one split. The lists hold {"id", "active": false} in the places of other splits' rows. Some copies of
    the split files have flags only; the text then comes from all_questions.json, all_answers.json.
    """
    def load(path):
        rows = listed(read_json(path), kind, path)
        return {get(row, "id", int, where): row for where, row in rows if get(row, "active", bool, where)}

    rows = load(path)
    if all(kind.removesuffix("s") in row for row in rows.values()):
        return rows
    all_path = path.with_name(f"all_{kind}.json")
    all_rows = load(all_path)
    return {number: active_row(all_rows, number, all_path) for number in rows}


def active_row(rows, number, path):
    if not isinstance(number, int) or number not in rows:
        raise ValueError(f"{path}: no active row with id {number}; do the files belong together?")
    return rows[number]


def answer_class(answer, count_classes):
    """RSVQA's own answer classes: areas ("37m2") always, counts in the low-resolution set only."""
    match = re.fullmatch(r"([0-9]+)(m2)?", answer)
    if match is None or not (match[2] or count_classes):
        return answer
    value, unit = int(match[1]), match[2] or ""
    if value == 0:
        return f"0{unit}"
    for low, high in ((0, 10), (10, 100), (100, 1000)):
        if value <= high:
            return f"between {low}{unit} and {high}{unit}"
    return f"more than 1000{unit}"


def read_fit_benchmark(corpus, root, split, captions=False):
    """FIT-RSFG's lines. Captions: `question` and one reference. Questions: `text` with its format, and `category`."""
    for number, (where, row) in enumerate(read_json_lines(published_file(corpus, root, split))):
        question = get(row, "question" if captions else "text", str, where).removeprefix("<image>").strip()
        answer = get(row, "ground_truth", str, where).strip()
        image = corpus.images + get(row, "image", str, where)
        more = {"references": [answer]} if captions else {"type": get(row, "category", str, where)}
        yield make_record(f"{corpus.name}-{number}", image, question, answer, **more)
