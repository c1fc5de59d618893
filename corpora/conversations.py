"""
Readers of published conversations: LLaVA's form (LLaVA, GeoChat, FIT-RS; Aquila Sec. 4.1.1), and Osprey-724K
(github.com/CircleRadon/Osprey), the kind of text about regions that Aquila-plus trains on.
"""
import re

from corpora.prompts import IMAGE_LINE, SHORT_ANSWER, choose_prompt
from corpora.reading import expect, get, mask_of, published_file
from files.text import read_json

REGION = re.compile(r"<region(\d{1,4})>")


def published_rows(corpus, root, split):
    """(where, record id, row). Ids are row numbers, as published ids may repeat."""
    path = published_file(corpus, root, split)
    for number, row in enumerate(expect(read_json(path), list, path)):
        yield f"{path}: row {number}", f"{corpus.name}-{number}", row


def published_turns(row, where):
    return [{"from": get(turn, "from", str, where), "value": get(turn, "value", str, where)}
            for turn in get(row, "conversations", list, where)]


def read_llava(corpus, root, split):
    """{"image", "conversations"}; rows without "image" are text only. `<image>` moves to the front."""
    for where, record_id, row in published_rows(corpus, root, split):
        record, turns = {"id": record_id}, published_turns(row, where)
        if row.get("image") is not None:
            record["image"] = corpus.images + get(row, "image", str, where)
            for turn in turns[:1]:          # none at all is for `data.py check` to report
                turn["value"] = IMAGE_LINE + turn["value"].replace("<image>", "").strip()
        yield {**record, "conversations": turns}


def read_osprey(corpus, root, split):
    """
    Training rows: {"file_name", "annotation": [{"segmentation"}], "conversations" or "description"}. Rows of its
    evaluation: {"image", "annotation": {"segmentation"}, "text"}, without answers, so that these are "unknown" here.

    Only regions that the text mentions are kept, and numbered anew. In questions `<region2>` is a slot. Answers name a
    region by its number, which a slot does not show: in such a row, as in Osprey's own prompt, the first question
    begins with a list of names and slots, and the rest of the text has the names only.
    """
    for where, record_id, row in published_rows(corpus, root, split):
        annotations = get(row, "annotation", (list, dict), where)
        annotations = [annotations] if isinstance(annotations, dict) else annotations
        # COCO_train2014_000000057870.jpg lies in COCO's 2017 folder, under the number alone.
        image = get(row, "image" if "text" in row else "file_name", str, where).split("_")[-1]
        turns = osprey_turns(row, record_id, where)
        if not turns:
            continue                        # Osprey passes over these too
        mentioned = sorted({int(n) for turn in turns for n in REGION.findall(turn["value"])})
        if not all(1 <= n <= len(annotations) for n in mentioned):
            raise ValueError(f"{where}: the text mentions regions {mentioned}, but the row has {len(annotations)}")
        named = any(REGION.search(turn["value"]) for turn in turns if turn["from"] == "gpt")
        form = "region{}" if named else "<region{}>"
        new_name = {n: form.format(i) for i, n in enumerate(mentioned, 1)}
        for turn in turns:
            text = turn["value"].replace("<image>", "").strip()
            turn["value"] = REGION.sub(lambda match, new_name=new_name: new_name[int(match[1])], text)
            if corpus.type in ("region short answer", "region part") and turn["from"] == "human":
                turn["value"] += f"\n{SHORT_ANSWER}"
        if named:
            names = ", ".join(f"region{i} <region{i}>" for i in range(1, len(mentioned) + 1))
            turns[0]["value"] = choose_prompt("region names", record_id, regions=names) + " " + turns[0]["value"]
        turns[0]["value"] = IMAGE_LINE + turns[0]["value"]
        masks = [mask_of(expect(annotations[n - 1], dict, where), f"{where}: region {n}") for n in mentioned]
        yield {"id": record_id, "image": corpus.images + image, "conversations": turns, "masks": masks,
               "type": corpus.type}


def osprey_turns(row, record_id, where):
    """The turns of a row, with the published region numbers."""
    if "conversations" in row:
        return published_turns(row, where)
    texts = []
    if "text" in row:
        texts = [get(row, "text", str, where).replace("<region>", "<region1>"), "unknown"]
    else:
        for text in get(row, "description", list, where):
            match = re.fullmatch(r"\s*(<region\d+>):\s*(.*)", expect(text, str, f"{where}: description"), re.DOTALL)
            if match is None:
                raise ValueError(f"{where}: description {text[:40]!r}, expected '<region1>: text'")
            question = choose_prompt("region detail", record_id + match[1]).replace("<region>", match[1])
            texts += [question, match[2].strip()]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
