"""What every reader of a published data set uses: its row of the table, all prompts, checked reading, our record.

- PROMPTS has every wording that we put to a model; what a data set asks in its own words stays as published.
- Files of others are read through `get` and `expect`: a layout that is not the published one gives one line with file,
  row and key.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

IMAGE_SLOT = "<image>\n"
SHORT = "\nAnswer the question using a single word or phrase."


def brief(*wordings: str) -> tuple[str, ...]:
    return tuple(wording + SHORT for wording in wordings)


# Every wording of every task. A record takes the one its id hashes to, so a corpus always converts to the same bytes.
# The papers print only the closing sentence of the question prompt; the caption and scene wordings are ours.
PROMPTS = {
    "caption": (
        "Describe this image in one sentence.",
        "Write a short caption for this aerial image.",
        "What does this remote sensing image show? Answer in one sentence.",
        "Summarize the content of the image in one sentence.",
        "Give a brief description of this satellite image.",
    ),
    "scene": (
        "What kind of scene is this?",
        "Name the scene class of this aerial image.",
        "Which type of land use or place does the image show?",
    ),
    "question": brief("{question}"),
    # about regions, each named once; {one} is a class with its article
    "region class": brief("What is <region>?", "What kind of object is <region>?",
                          "Which class does <region> belong to?"),
    "region caption": ("Describe <region> in one sentence.", "Write a short description of <region>.",
                       "What does <region> show? Answer in one sentence."),
    "region detail": ("Describe <region> in detail.", "Give a detailed description of <region>.",
                      "What can you tell about <region>, its size, its place and what is around it?"),
    "region position": brief("Where in the image is <region>?", "In which part of the image does <region> lie?"),
    "region count": brief("How many objects of the same kind as <region> are there, itself included?",
                          "Counting <region>, how many objects of its kind does the image show?"),
    "same kind": brief("Are <region1> and <region2> of the same kind?",
                       "Do <region1> and <region2> show the same kind of object?"),
    "larger": brief("Is <region1> larger than <region2>?", "Does <region1> cover more of the image than <region2>?"),
    "region reasoning": ("What do the surroundings of <region> say about it?",
                         "Look at what is around <region>. What follows from it?"),
    "region presence": brief("Is <region> {one}?", "Does <region> show {one}?"),
    "presence": brief("Is there {one} in the image?", "Does the image show {one}?"),
    # before the first question of an Osprey row whose answers name regions by number
    "region names": ("The image has these regions: {regions}.",),
}
SCENE_TEXT = "a remote sensing image of the scene class {name}"


@dataclass(frozen=True)
class Corpus:
    """One row of the table CORPORA, with what the command line adds."""
    read: Callable[["Corpus", Path, str], Iterator[dict]]
    file: str                   # published name; {split} and {kind} (questions, answers) stand for themselves
    splits: tuple[str, ...] = ("train",)
    images: str = ""            # put before an image's name, to give its path under --root
    type: str = ""              # of its records, where the rows do not tell
    name: str = ""
    raw_answers: bool = False
    per_image: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; --root should be the folder as published")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}; is the download damaged?") from error


def read_json(path: Path) -> object:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not whole JSON: {error.msg} at line {error.lineno} column {error.colno} (character "
                         f"{error.pos}); is the download cut off?") from error
    except (ValueError, RecursionError) as error:       # a number of thousands of digits, thousands of brackets
        raise ValueError(f"{path}: JSON that cannot be read: {error}") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) for every line; `where` is for error messages."""
    for number, line in enumerate(read_text(path).rstrip().split("\n"), start=1):
        where = f"{path}: line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not whole JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: JSON that cannot be read: {error}") from error


def expect(value: object, kind: type | tuple[type, ...], where: str):
    if not isinstance(value, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        found = "nothing" if value is None else type(value).__name__
        raise ValueError(f"{where} should be {wanted}, found {found}; this is not the published layout")
    return value


def get(row: object, key: str, kind: type | tuple[type, ...], where: str):
    """`row[key]`, or one line that says which row of which file lacks it."""
    return expect(row.get(key) if isinstance(row, dict) else None, kind, f"{where}: '{key}'")


def listed(data: object, key: str, path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) for every row of the list `data[key]`; `where` is for error messages."""
    for number, row in enumerate(get(data, key, list, str(path))):
        yield f"{path}: {key} {number}", row


def plain_name(name: str) -> str:
    """A class or folder name in plain words: "railwayStation" and "Railway_Station" -> "railway station"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[\s_-]+", " ", name).strip().lower()


def llava_turns(row: object, where: str) -> list[dict]:
    return [{key: get(turn, key, str, where) for key in ("from", "value")}
            for turn in get(row, "conversations", list, where)]


# ---------------------------------------------------------------------------------------------------------------------
# Records

def digest(text: str) -> int:
    return zlib.crc32(text.encode(errors="surrogatepass"))      # hash() differs from run to run


def prompt(task: str, record_id: str, **fields: str) -> str:
    return PROMPTS[task][digest(record_id) % len(PROMPTS[task])].format(**fields)


def record(record_id: str, image: str, question: str, answer: str, **extra: object) -> dict:
    turns = [{"from": "human", "value": IMAGE_SLOT + question}, {"from": "gpt", "value": answer}]
    return {"id": record_id, "image": image, "conversations": turns, **extra}
