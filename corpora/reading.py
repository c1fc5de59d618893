"""
What every reader of a published data set uses: its files under --root, checked access to their rows, our record.

Others' files are read through `get` and `expect`: where the layout is not the published one, one line names file, row
and key. `where` is always that place, for the message.
"""
import pathlib
import re

from corpora.prompts import IMAGE_LINE
from files.checked_json import checked
from files.text import read_json


def published_file(corpus, root, split, kind=""):
    """The path of a corpus's file under --root. kind: which of two files ("questions", "answers")."""
    path = root / corpus.file.replace("{split}", split).replace("{kind}", kind)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; --root should be the folder as published")
    return path


def expect(value, kind, where):
    """The value, if it is of this kind, a type or several."""
    if not isinstance(value, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        found = "nothing" if value is None else type(value).__name__
        raise ValueError(f"{where} should be {wanted}, found {found}; this is not the published layout")
    return value


def get(row, key, kind, where):
    """`row[key]`, if row is a dict and the value of this type."""
    return expect(row.get(key) if isinstance(row, dict) else None, kind, f"{where}: '{key}'")


def listed(data, key, path):
    """(where, row) of every row of the list `data[key]`."""
    for number, row in enumerate(get(data, key, list, path)):
        yield f"{path}: {key} {number}", row


def pixels(value, where):
    """The value, if arithmetic cannot overflow on it; true, NaN and 10**400 are no coordinates."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e9:
        raise ValueError(f"{where}: expected a number of pixels, found {str(value)[:30]}")
    return value


def box_of(annotation, where):
    box = get(annotation, "bbox", list, where)
    if len(box) != 4:
        raise ValueError(f"{where}: 'bbox' has {len(box)} numbers, expected x, y, width, height")
    return [pixels(value, f"{where}: 'bbox'") for value in box]


def mask_of(annotation, where):
    """
    The `segmentation` of a COCO annotation as published, RLE or polygons; pictures/mask_files.py decodes it. A flat
    list is one polygon; what has no polygon of three corners is its box.
    """
    mask = expect(annotation.get("segmentation") or [], (dict, list), f"{where}: 'segmentation'")
    if isinstance(mask, dict):
        get(mask, "size", list, where)
        get(mask, "counts", (str, list), where)
        return mask
    place = f"{where}: polygon"
    polygons = [mask] if mask and not isinstance(mask[0], list) else mask
    polygons = [[pixels(x, place) for x in expect(polygon, list, place)] for polygon in polygons]
    return [polygon for polygon in polygons if len(polygon) >= 6] or {"bbox": box_of(annotation, where)}


def scene_classes(root):
    """{file name: scene class} of a classes.json beside the published files, if there is one."""
    path = pathlib.Path(root, "classes.json")
    return checked(read_json(path, {}), dict[str, str], path)


def make_record(record_id, image, question, answer, **more):
    """One question about one image and its answer; more: references, type, masks ..."""
    turns = [{"from": "human", "value": IMAGE_LINE + question}, {"from": "gpt", "value": answer}]
    return {"id": record_id, "image": image, "conversations": turns, **more}


def plain_name(name):
    """A class or folder name in plain words: "railwayStation" and "Railway_Station" -> "railway station"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[\s_-]+", " ", name).strip().lower()
