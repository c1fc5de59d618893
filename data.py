"""
Records -> prompts with labels, and images -> tensors.

A record is LLaVA's (one a line in a .jsonl file, or a .json list):
    {"id": "7", "image": "scene_7.png",
     "conversations": [{"from": "human", "value": "<image>\nHow many ships are there?"},
                       {"from": "gpt", "value": "2"}]}
`image` may be a list (one `<image>` each) or be absent (text only). `masks` lists regions of the image (masks.py says
in which forms); the k-th `<region>` of the human turns is the k-th mask, and `<region2>` the second, as often as it is
named. For scoring a record may have `references` (a list of reference answers) and `type`. "scene:..." names a built-in
scene instead of a file (scenes.py). open_image says which images are read, and how.

- ids and labels grow together in one pass; only the answers and their end token are learned.
- `<image>` in a human turn becomes N slots, `<region>` two (mask and position): ids below zero, which no tokenizer
  makes and no model can emit. Specials typed in a text (`<|eot_id|>`, `<mask>`) stay plain text.
- Training and asking go through the same functions, so a prompt is always a prefix of the training ids.

    python data.py check FILE --images DIR      # every problem of every record; exit code 1 if any, 2: wrong usage
    python data.py check FILE --images DIR --fix OUT         # and the records without one into another file
    python data.py show FILE --images DIR       # what a model reads, the learned tokens marked
"""
import argparse
import collections
import json
import os
import pathlib
import re
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin
from torch.utils.data import Dataset

import scenes
from masks import MAX_PIXELS, PILLOW_ERRORS, decode_mask, open_scene, tolerated

IGNORE = -100                               # label of a token that is not learned (PyTorch's ignore_index)
IMAGE_SLOT, MASK_SLOT, POSITION_SLOT = -1, -2, -3           # ids of positions that an image or a region fills
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHORT = "Answer the question using a single word or phrase."                       # the paper's words, Sec. 4.1.1
SLOTS = {IMAGE_SLOT: "<image>", MASK_SLOT: "<mask>", POSITION_SLOT: "<position>"}
GRAY = 128                                  # the picture that a blind model is shown
DEEPEST = 50                                # brackets within brackets of a record
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000")                # others may run programs (EPS)
warnings.filterwarnings("ignore", module=r"PIL\.")                           # on metadata, as a rule


# ---------------------------------------------------------------------------------------------- files

def one_line(text):
    """Text from a file of any origin as one printable line of bounded length, for a message."""
    text = str(text)
    text = text if len(text) <= 600 else f"{text[:400]} ... {text[-200:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def parse_json(data, hint):
    """Bytes -> a JSON value; a ValueError is returned."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        return ValueError("brackets are nested too deeply")
    except ValueError as e:
        return ValueError(f"not valid JSON: {e}; {hint}")
    layer = [[value]]
    for _ in range(DEEPEST):
        parts = [part.values() if isinstance(part, dict) else part for part in layer]
        layer = [inner for part in parts for inner in part if isinstance(inner, (dict, list))]
    return ValueError("brackets are nested too deeply") if layer else value


def parse_records(path):
    """Yield (line number, record or ValueError) of a .jsonl file, or (position, record) of a .json list."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected a .jsonl or .json file of records")
    data = path.read_bytes()
    if data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        records = parse_json(data, "was the file cut off?")
        if isinstance(records, ValueError):
            raise ValueError(f"{path}: {records}")
        yield from enumerate(records, 1)
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield number, parse_json(line, "expected one record a line; was the file cut off?")


def read_records(path):
    """All records of a file as a list, checked for their form; ValueError with the line of the first bad one."""
    records = []
    for number, record in parse_records(path):
        try:
            if isinstance(record, ValueError):
                raise record
            check_form(record)
        except ValueError as e:
            raise ValueError(f"{path}, line {number}: {one_line(e)}") from None
        records.append({**record, "id": str(record.get("id", number))})
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def check_form(record):
    """ValueError unless the record is a conversation of text turns, human first, that ends with an answer."""
    for _, problem in form_problems(record):
        raise ValueError(problem)


def form_problems(record):
    """Yield (kind, text) for all that is wrong with a JSON value as a record, before a file is opened."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if isinstance(turns, list) and turns:
        yield from turn_problems(turns)
    else:
        yield "form", "no 'conversations', expected a list of {from, value} turns"
    if not isinstance(record, dict):
        return
    image, masks, references = record.get("image"), record.get("masks"), record.get("references")
    names = image if isinstance(image, list) else [] if image is None else [image]
    if not all(is_text(name) and name for name in names):
        yield "form", f"image {str(image)[:60]!r}: expected a path or a list of paths"
    if not isinstance(masks, list | None) or masks and len(names) != 1:
        yield "form", f"masks {str(masks)[:60]}: expected a list of masks, of the record's one image"
    if "id" in record and not is_text(record["id"]) and type(record["id"]) is not int:
        yield "form", f"id {str(record['id'])[:60]!r}: expected text or a whole number"
    if references is not None and not (isinstance(references, list) and all(map(is_text, references))):
        yield "form", f"references {str(references)[:60]!r}: expected a list of texts"
    if record.get("type") is not None and not is_text(record["type"]):
        yield "form", f"type {str(record['type'])[:60]!r}: expected text"


def turn_problems(turns):
    given, turns = turns, [turn if isinstance(turn, dict) else {} for turn in turns]
    for i, turn in enumerate(turns):
        if not is_text(turn.get("value")):
            yield "form", f"turn {i} {str(given[i])[:60]} has no text under 'value'"
    roles = [turn.get("from") for turn in turns]
    rest = roles[1:] if roles[0] == "system" else roles
    if rest != ["human", "gpt"] * (len(rest) // 2) or not rest:
        yield "roles", (f"turns are from {str(roles[:6])[:200]}; expected human, gpt, human, gpt, ... "
                        "(a system turn may come first)")
    for i, turn in enumerate(turns):
        if turn.get("from") == "gpt" and is_text(turn.get("value")) and not turn["value"].strip():
            yield "empty answer", f"turn {i} is an empty answer"


def is_text(value):
    """Whether a JSON value is text that can be written: half of a surrogate pair (an escape cut in two) cannot."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def image_names(record):
    image = record.get("image") or []
    return image if isinstance(image, list) else [image]


# ---------------------------------------------------------------------------------------------- images

def image_path(name, root):
    """The file of an image; a path that leads out of root is refused, since data files come from anywhere."""
    path, root = pathlib.Path(root, name), pathlib.Path(root)
    try:
        inside, there = path.resolve().is_relative_to(root.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as e:                               # too long, a NUL, a ring of links
        raise ValueError(f"image {one_line(name)}: not a path ({one_line(e)})") from None
    if not inside:
        raise ValueError(f"image {name}: the path leaves the image folder {root}")
    if not there:
        raise FileNotFoundError(f"image {name}: no such file in {root}; is --images right?")
    return path


def load_image(name, root="."):
    """A path under root, or the name of a built-in scene -> an RGB PIL image, upright."""
    if name.startswith("scene:"):
        return Image.fromarray(open_scene(name).image)
    return open_image(image_path(name, root))


def open_image(path):
    """
    The file of an image, as they come in remote sensing -> an RGB PIL image, upright (EXIF). Gray, palette and CMYK
    become RGB; alpha is dropped, not blended; only the first page is read. One band of 16 or 32 bits is stretched:
    percentile 2 becomes 0, percentile 98 255. What Pillow reads wrongly, and more than MAX_PIXELS, is refused first.
    """
    try:
        with open(path, "rb") as file:
            refused, nodata = read_header(file)
            if not refused:
                with Image.open(file, formats=FORMATS) as image:
                    image = ImageOps.exif_transpose(image)
                    return stretch(image, nodata) if image.mode.startswith(("I", "F")) else image.convert("RGB")
    except FileNotFoundError:
        refused = "no such file"
    except Image.UnidentifiedImageError:
        refused = f"not an image that Pillow can read ({', '.join(FORMATS)})"
    except Image.DecompressionBombError as e:
        refused = f"{str(e).split(',')[0]}; cut it into tiles first"
    except PILLOW_ERRORS as e:
        refused = f"cannot be read, {one_line(e)}"
    kind = FileNotFoundError if refused == "no such file" else ValueError
    raise kind(f"image {path}: {refused}")


# TIFF's tags by their numbers: 258 BitsPerSample, 262 PhotometricInterpretation, 277 SamplesPerPixel, 339 SampleFormat,
# 42113 GDAL_NODATA.

def read_header(file):
    """
    in:  an image file, open at its start; it is left there.
    out: why Pillow would read its bands or bits wrongly, or None, and GDAL's value for pixels without data, or None.
         Pillow cuts colors of 16 bits to 8 without a word, and takes any five bands for red, green, blue and two more.
    """
    head, nodata, colors, signed = file.read(512), None, None, False
    bands, bits = 1, 8
    if head.startswith(b"\x89PNG") and len(head) > 25:
        bands, bits = {2: 3, 4: 2, 6: 4}.get(head[25], 1), head[24]
    elif b"ihdr" in head[:80]:                                                     # JPEG 2000, its first box
        at = head.index(b"ihdr") + 12
        bands, bits = int.from_bytes(head[at:at + 2], "big"), (head[at + 2] & 127) + 1
    elif head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        tags = TiffImagePlugin.ImageFileDirectory_v2(head[:16] if b"+" in head[:4] else head[:8])
        file.seek(tags.next)
        tags.load(file)
        bands, bits, colors = tags.get(277, 1), max(tags.get(258, (1,))), tags.get(262)
        signed = 2 in tags.get(339, ())
        nodata = re.fullmatch(r"\s*([-+\d.eE]+|nan)[\s\0]*", str(tags.get(42113, "")))
    file.seek(0)
    reason = (f"{bands} bands" if bands > 4 else
              f"{bands} bands of {bits} bits" if bands > 1 and bits > 8 else
              "signed pixels of 8 bits" if signed and bits == 8 else
              f"{bands} bands that are marked as gray" if bands > 2 and colors in (0, 1) else None)
    if reason:
        reason += ("; make an 8-bit RGB image of it: gdal_translate -b 1 -b 2 -b 3 -ot Byte -scale -co PHOTOMETRIC=RGB "
                   "IN OUT.tif, with the numbers of its red, green and blue bands")
    return reason, float(nodata[1]) if nodata else None


def stretch(image, nodata=None):
    """One band of any depth -> RGB: percentile 2 to black, 98 to white; pixels without data (and NaN) are black."""
    pixels = np.asarray(image, np.float32)
    with np.errstate(all="ignore"):         # a range beyond float32 ends as black
        known = np.isfinite(pixels) if nodata is None else np.isfinite(pixels) & (pixels != np.float32(nodata))
        if not known.any():
            return Image.new("RGB", image.size)
        low, high = map(float, np.percentile(pixels[known], (2, 98)))
        if low == high:                     # few pixels differ, or none
            low, high = float(pixels[known].min()), float(pixels[known].max())
        gray = (np.where(known, pixels, low).clip(low, high) - low) / (high - low)
    return Image.fromarray((255 * np.nan_to_num(gray) + 0.5).astype(np.uint8)).convert("RGB")


def fit_image(image, size, fit, resample=Image.Resampling.BICUBIC, frame=tuple(round(255 * c) for c in CLIP_MEAN)):
    """
    Bring a PIL image to size x size: "resize" stretches it (the paper's way), "letterbox" keeps its shape and puts it
    in the middle of a frame, for a picture of CLIP's mean color.
    """
    if image.size == (size, size):
        return image
    if fit == "resize":
        return image.resize((size, size), resample)
    if fit != "letterbox":
        raise ValueError(f"fit {fit!r}: expected resize or letterbox")
    return ImageOps.pad(image, (size, size), resample, color=frame)


def fit_mask(mask, size, fit):
    """(h, w) bool -> (size, size) float32 in [0, 1], the covered share of each pixel, by the image's own geometry."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    return torch.from_numpy(np.array(fit_image(picture, size, fit, Image.Resampling.BOX, 0))).float() / 255


def to_tensor(image):
    """RGB PIL image or (H, W, 3) uint8 array -> (3, H, W) float32, normalised with CLIP's mean and deviation."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def load_masks(record, root, size):
    """The masks of a record as (R, h, w) bool; size is the image's own (width, height)."""
    found = [decode_mask(value, size, root) for value in record.get("masks") or []]
    return np.stack(found) if found else np.zeros((0, size[1], size[0]), bool)


def prepare(record, root, config, blind=False):
    """
    A record's images (n, 3, size, size) and masks (R, size, size), float32; blind: gray images, the masks as they are.
    """
    size, images, masks = config.image_size, [], torch.zeros(0, config.image_size, config.image_size)
    for name in image_names(record):
        image = Image.new("RGB", (size, size), (GRAY,) * 3)
        if not blind or record.get("masks"):
            shown = load_image(name, root)
            if record.get("masks"):
                masks = torch.stack([fit_mask(decode_mask(value, shown.size, root), size, config.fit)
                                     for value in record["masks"]])                # one by one: an image may be huge
            image = image if blind else shown
        images.append(to_tensor(fit_image(image, size, config.fit)))
    return torch.stack(images) if images else torch.zeros(0, 3, size, size), masks


# ---------------------------------------------------------------------------------------------- prompts

# A chat format turns (role, text) turns into parts: ("special", name), ("text", words) or ("said", what a user said and
# where slots may stand), each with whether it is learned: the answers and the special that ends them. None leaves an
# answer open.

def llama3_chat(turns):                     # github.com/meta-llama/llama3, llama/tokenizer.py, ChatFormat
    yield "special", "<|begin_of_text|>", False
    for role, text in turns:
        yield "special", "<|start_header_id|>", False
        yield "text", role, False
        yield "special", "<|end_header_id|>", False
        yield "text", "\n\n", False
        if text is not None:
            yield "said" if role == "user" else "text", text.strip(), role == "assistant"
            yield "special", "<|eot_id|>", role == "assistant"


VICUNA_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
                 "detailed, and polite answers to the user's questions.")


def vicuna_chat(turns):                     # github.com/lm-sys/FastChat, fastchat/conversation.py, "vicuna_v1.1"
    yield "special", "<s>", False
    if turns[0][0] != "system":
        turns = [("system", VICUNA_SYSTEM), *turns]
    for role, text in turns:
        if role != "system":
            yield "text", {"user": "USER:", "assistant": "ASSISTANT:"}[role], False
        if text is not None:
            yield "said" if role == "user" else "text", text.strip(), role == "assistant"
            if role == "assistant":
                yield "special", "</s>", True


def chatml_chat(turns):                     # SmolLM2 and others
    for role, text in turns:
        yield "special", "<|im_start|>", False
        yield "text", f"{role}\n", False
        if text is not None:
            yield "said" if role == "user" else "text", text.strip(), role == "assistant"
            yield "special", "<|im_end|>", role == "assistant"
            yield "text", "\n", False


CHATS = {"llama-3": llama3_chat, "vicuna": vicuna_chat, "chatml": chatml_chat}
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def mentions(turns, masks):
    """The mask (0 is the first) that each `<region>` of the user's turns means, in order; each must have its mask."""
    numbers = [n for role, text in turns if role == "user" for n in re.findall(r"<region(\d*)>", text)]
    found = [int(n) - 1 for n in numbers] if all(numbers) else list(range(len(numbers)))
    if (any(numbers) and not all(numbers)) or sorted(set(found)) != list(range(masks)):
        raise ValueError(f"{masks} mask(s) but the human turns name {['<region' + n + '>' for n in numbers][:8]}; "
                         "expected one <region> a mask, or <region1>, <region2>, ... with each number once or more")
    return found


def count_images(turns, images):
    found = sum(text.count("<image>") for role, text in turns if role == "user")
    if found != images:
        raise ValueError(f"{images} image(s) but {found} <image> in the human turns; the numbers must be equal")


def encode_turns(turns, tokenizer, chat, images=0, image_tokens=0, masks=0):
    """
    in:  turns, a list of (role, text), role system, user or assistant; text None in the last one asks for an answer.
         images of the conversation (0 makes `<image>` plain text) and the slots that each takes; masks of the
         conversation (0 makes `<region>` plain text).
    out: ids and labels, two lists of equal length.
    """
    if chat not in CHATS:
        raise ValueError(f"chat format {chat!r}: expected one of {', '.join(CHATS)}")
    if images:
        count_images(turns, images)
    if masks:
        mentions(turns, masks)
    slots = "|".join(["<image>"] * bool(images) + [r"<region\d*>"] * bool(masks))
    ids, labels = [], []

    def add(tokens, learn):
        ids.extend(tokens)
        labels.extend(tokens if learn else [IGNORE] * len(tokens))

    # Vicuna's parts stand apart by a space, which a SentencePiece tokenizer puts before every piece by itself.
    space = " " if chat == "vicuna" and not tokenizer.adds_space else ""
    for kind, value, learn in CHATS[chat](turns):
        if kind == "special":
            if value not in tokenizer.special:
                raise ValueError(f"chat format {chat!r} needs the token {value}, which this tokenizer does not have")
            add([tokenizer.special[value]], learn)
            continue
        pieces = re.split(f"({slots})", value) if kind == "said" and slots else [value]
        for i, piece in enumerate(pieces):                                         # every second one is a slot
            if i % 2:
                add([IMAGE_SLOT] * image_tokens if piece == "<image>" else [MASK_SLOT, POSITION_SLOT], False)
            elif piece:
                add(tokenizer.encode(space + piece if i == 0 else piece), learn)
    return ids, labels


def turns_of(record, answer=True):
    """The (role, text) turns of a record; answer False: the last answer is left open."""
    turns = [(ROLES[turn["from"]], turn["value"]) for turn in record["conversations"]]
    return turns if answer else [*turns[:-1], ("assistant", None)]


def encode_record(record, tokenizer, chat, image_tokens=0, max_len=None, answer=True):
    """
    A record -> {"id", "ids", "labels", "mentions": the mask each region slot means}; answer False gives the prompt
    alone. ValueError names the record.
    """
    masks = len(record.get("masks") or [])
    try:
        turns = turns_of(record, answer)
        ids, labels = encode_turns(turns, tokenizer, chat, len(image_names(record)), image_tokens, masks)
        if max_len and len(ids) > max_len:
            raise ValueError(f"{len(ids)} tokens, at most {max_len} fit (max_len); shorten it, nothing is cut")
    except ValueError as e:
        raise ValueError(f"record {record['id']}: {e}") from None
    return {"id": record["id"], "ids": ids, "labels": labels, "mentions": mentions(turns, masks) if masks else []}


# ---------------------------------------------------------------------------------------------- batches

class Records(Dataset):
    """
    Records as training samples. config gives image_size, fit, chat, image_tokens, max_len and region_dim. A sample that
    cannot be read is returned as its error, so that a worker process hands the one line over instead of a traceback.
    """

    def __init__(self, records, root, tokenizer, config, answer=True, blind=False):
        self.records, self.root, self.tokenizer, self.config = records, root, tokenizer, config
        self.answer, self.blind = answer, blind

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record, c = self.records[i], self.config
        try:
            if record.get("masks") and not c.region_dim:
                raise ValueError("the record has masks; this model reads whole images only, an aquila-plus one regions")
            row = encode_record(record, self.tokenizer, c.chat, c.image_tokens, c.max_len, self.answer)
            row["images"], row["masks"] = prepare(record, self.root, c, self.blind)
            return row
        except (ValueError, FileNotFoundError) as e:
            text = one_line(e)
            return ValueError(text if text.startswith("record ") else f"record {record['id']}: {text}")


def collate(rows):
    """
    Samples -> one batch, padded on the right: ids (B, T) long, labels (B, T) long, lengths (B,), names, and of all rows
    in the order of their slots: images (n, 3, H, W); masks (n, R, H, W), padded with empty ones; regions (m, 2) long,
    the image and the mask that each region slot means. What no row has is None. If a row is an error, the error.
    """
    for row in rows:
        if isinstance(row, ValueError):
            return row
    lengths = torch.tensor([len(row["ids"]) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for i, row in enumerate(rows):
        ids[i, :lengths[i]] = torch.tensor(row["ids"])
        labels[i, :lengths[i]] = torch.tensor(row["labels"])
    images = [row["images"] for row in rows if len(row.get("images", ()))]
    return {"ids": ids, "labels": labels, "lengths": lengths, "names": [row["id"] for row in rows],
            "images": torch.cat(images) if images else None, **collate_masks(rows)}


def collate_masks(rows):
    most = max(len(row.get("masks", ())) for row in rows)
    if not most:
        return {"masks": None, "regions": None}
    masks, regions = [], []
    for row in rows:
        if len(row["masks"]):               # of the row's one image
            regions += [(len(masks), mask) for mask in row["mentions"]]
        for i in range(len(row["images"])):
            own = row["masks"] if i == 0 else row["masks"][:0]
            masks.append(torch.nn.functional.pad(own, (0, 0, 0, 0, 0, most - len(own))))
    return {"masks": torch.stack(masks), "regions": torch.tensor(regions)}


# ---------------------------------------------------------------------------------------------- look at a file

TOLERATED = "tolerated"


@lru_cache(maxsize=100_000)                 # an image is decoded once a worker, however many records it has
def look_at(name, root):
    """-> the size of an image that decodes to its end, or None, and a list of its problem."""
    sizes = []
    problem = attempt("image", lambda: sizes.append(load_image(name, root).size))
    return sizes[0] if sizes else None, problem


@lru_cache
def tokenizer_of(path):                     # once a worker
    from llama import load_tokenizer        # only the commands need it
    return load_tokenizer(path)


def attempt(kind, function, *args):
    """The problem (kind, text) that function raises, in a list, or an empty list."""
    try:
        function(*args)
    except (ValueError, FileNotFoundError) as e:
        return [("missing file" if isinstance(e, FileNotFoundError) else kind, str(e))]
    return []


def problems_of(record, root, config):
    """Every problem of a record, or of the ValueError in its place, as (kind, text); what is TOLERATED, too."""
    if isinstance(record, ValueError):
        return [("not JSON", str(record))]
    found = list(form_problems(record))
    if not isinstance(record, dict):
        return found
    names, masks = [name for name in image_names(record) if is_text(name) and name], record.get("masks") or []
    if {kind for kind, _ in found} <= {"empty answer"}:
        turns = turns_of(record)
        slots = attempt("slots", count_images, turns, len(names)) if names else []
        slots += attempt("slots", mentions, turns, len(masks)) if masks else []
        found += slots or attempt("no room", check_room, turns, len(names), len(masks), config)
    for name in names:
        size, problem = look_at(name, root)
        found += problem
        if size and len(names) == 1 and isinstance(masks, list):
            for value in masks:
                wrong = attempt("mask", decode_mask, value, size, root)
                found += wrong or [(TOLERATED, words) for words in tolerated(value, size)]
    return found


def check_room(turns, images, masks, config):
    ids, _ = encode_turns(turns, tokenizer_of(config.tokenizer), config.chat, images, config.image_tokens, masks)
    if len(ids) > config.max_len:
        raise ValueError(f"no room: {len(ids)} tokens with the answer, at most {config.max_len} fit (--max-len)")


def check(path, root, workers, config, fix=None):
    """Print every problem of every record and a summary by kind; return the number of bad records."""
    if fix and os.path.exists(fix) and os.path.samefile(fix, path):
        raise ValueError(f"--fix {fix} is the file that is checked; give another name")
    if fix and not pathlib.Path(fix).resolve().parent.is_dir():
        raise ValueError(f"--fix {fix}: no such folder")
    encode_turns([("user", ""), ("assistant", "")], tokenizer_of(config.tokenizer), config.chat)   # do they fit?
    items, clean, kinds, notes, seen = list(parse_records(path)), [], collections.Counter(), collections.Counter(), {}
    if not items:
        raise ValueError(f"{path} holds no records")
    pool = ProcessPoolExecutor(workers) if workers != 1 else None
    test, records = partial(problems_of, root=str(root), config=config), [record for _, record in items]
    results = pool.map(test, records, chunksize=32) if pool else map(test, records)
    for done, ((number, record), problems) in enumerate(zip(items, results), 1):
        name = record.get("id", number) if isinstance(record, dict) else None
        if isinstance(name, (str, int)) and seen.setdefault(str(name), number) != number:
            problems.append(("same id", f"id {str(name)!r} is that of line {seen[str(name)]}, too"))
        notes.update({text for kind, text in problems if kind == TOLERATED})
        problems = [(kind, text) for kind, text in problems if kind != TOLERATED]
        kinds.update({kind for kind, _ in problems})
        for kind, text in problems:
            print(f"line {number} ({one_line(str(name)[:80])}): {one_line(text)}")
        if not problems:
            clean.append({"id": str(number), **record})
        if sys.stderr.isatty() and (done % 100 == 0 or done == len(items)):
            print(f"\r{done}/{len(items)}", end="\n" if done == len(items) else "", file=sys.stderr, flush=True)
    if pool:
        pool.shutdown()
    for kind, n in sorted(kinds.items()):
        print(f"{n:7d}  {kind}")
    for words, n in sorted(notes.items()):
        print(f"{n:7d}  tolerated: {words}")
    print(f"{path}: {len(items)} records, {len(items) - len(clean)} with a problem")
    if fix:
        write_records(fix, clean)
    return len(items) - len(clean)


def write_records(path, records):
    """Records as JSONL: whole, or not at all."""
    part = pathlib.Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    print(f"{path}: {len(records)} records written")


def show(path, root, config, n):
    """Print the first n records as a model reads them: runs of masked (-) and learned (+) tokens, and their number."""
    tokenizer = tokenizer_of(config.tokenizer)
    names = {i: name for name, i in tokenizer.special.items()}
    for record in read_records(path)[:n]:
        row = encode_record(record, tokenizer, config.chat, config.image_tokens)
        images, masks = prepare(record, root, config)
        print(f"record {record['id']}: {len(row['ids'])} tokens, {sum(t != IGNORE for t in row['labels'])} learned, "
              f"images {image_names(record)} as {tuple(images.shape)}" + f", {len(masks)} masks" * bool(len(masks)))
        runs = []
        for token, label in zip(row["ids"], row["labels"]):
            kind = SLOTS.get(token) or names.get(token, "")
            if not runs or runs[-1][:2] != (label != IGNORE, kind):
                runs.append((label != IGNORE, kind, []))
            runs[-1][2].append(token)
        for learned, kind, tokens in runs:
            print(f"  {'+' if learned else '-'} {len(tokens):5d}  {kind or repr(tokenizer.decode(tokens))}")


def main():
    parser = argparse.ArgumentParser(description="Look at a file of records before training on it.")
    parser.add_argument("command", choices=("check", "show"),
                        help="check: list every problem; show: print tokens and labels")
    parser.add_argument("file", help=".jsonl or .json file of records")
    parser.add_argument("--images", default=".", help="folder that image and mask paths start from (default: here)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="check: processes (default: all cores)")
    parser.add_argument("--fix", metavar="OUT", help="check: write the records without a problem to this .jsonl file")
    parser.add_argument("-n", type=int, default=3, help="show: how many records (default 3)")
    parser.add_argument("--tokenizer", default=pathlib.Path(__file__).parent / "weights/tiny-llm",
                        help="tokenizer file or folder (default: the tiny preset's, as all that follows)")
    parser.add_argument("--chat", default="llama-3", choices=CHATS, help="chat format (default llama-3)")
    parser.add_argument("--max-len", type=int, default=1024,
                        help="check: tokens that prompt and answer may have, image tokens included (default 1024)")
    parser.add_argument("--image-size", type=int, default=128, help="image side in pixels (default 128)")
    parser.add_argument("--fit", default="resize", choices=("resize", "letterbox"), help="show: how images are fitted")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    config = argparse.Namespace(**vars(args), image_tokens=(args.image_size // 32) ** 2)
    try:
        if args.command == "check":
            sys.exit(1 if check(args.file, args.images, args.workers, config, args.fix) else 0)
        show(args.file, args.images, config, args.n)
    except (ValueError, OSError, BrokenProcessPool) as e:
        parser.exit(2, f"data.py: {one_line(e)}\n")


if __name__ == "__main__":
    main()
