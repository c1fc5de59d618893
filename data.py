"""
Records -> prompts with labels, and images -> tensors: everything between a data file and a batch.

A record is LLaVA's (one a line in a .jsonl file, or a .json list):
    {"id": "7", "image": "scene_7.png",
     "conversations": [{"from": "human", "value": "<image>\nHow many ships are there?"},
                       {"from": "gpt", "value": "2"}]}
`image` may be a list (one `<image>` each) or be absent (text only). `masks` lists regions of the image
(pictures/mask_files.py says in which forms); the k-th `<region>` of the human turns is the k-th mask, and `<region2>`
the second, as often as it is named. For scoring a record may have `references` (a list of reference answers) and
`type`. "scene:..." names a built-in scene instead of a file. pictures/image_files.py says which images are read.

- ids and labels grow together in one pass; only the answers and their end token are learned.
- `<image>` in a human turn becomes N slots, `<region>` two (mask and position): ids below zero, which no tokenizer
  makes and no model can emit. Specials typed in a text (`<|eot_id|>`, `<mask>`) stay plain text.
- Training and asking go through the same functions, so a prompt is always a prefix of the training ids.

    python data.py check FILE --images DIR      # every problem of every record; --fix OUT writes those without one
    python data.py show FILE --images DIR       # what a model reads, the learned tokens marked
"""
import copy
import difflib
import io
import json
import re
from array import array
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from files.text import naming, one_line, parse_json, regular_file
from pictures.image_files import MAX_IMAGES, MAX_MASKS, fit_image, fit_mask, load_image, to_tensor
from pictures.mask_files import decode_mask
from tokenizer import IGNORE, IMAGE_SLOT, MASK_SLOT, POSITION_SLOT

GRAY = (128, 128, 128)                      # the picture that a blind model is shown
READ = ("conversations", "image", "masks", "references", "type")                   # keys of a record; slips are errors
KNOWN = (*READ, "id", "sampling", "task", "tasks", "style")                        # the last three are not read
near_keys = lru_cache(difflib.get_close_matches)                                   # a million records share a few keys


# ---------------------------------------------------------------------------------------------- records

class RecordFile(Sequence):
    """
    The records of a .jsonl file or a .json list, each parsed when it is asked for. What is kept is where they lie, 24
    bytes a record that forked workers share; as Python objects a million records would be 3 GB in every process.
    """

    def __init__(self, path):
        self.path, self.packed, self.unit = regular_file(path), None, "line"
        with open(path, "rb") as lines:
            if lines.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                lines = [json.dumps(record).encode() for record in parse_json(self.path.read_bytes(), path)]
                self.packed, self.unit = b"".join(lines), "record"
            else:
                lines.seek(0)
            places, end = array("q"), 0
            for number, line in enumerate(lines, 1):
                begin, end = end, end + len(line)
                if line.strip():
                    places.extend((number, begin, end))
        if not places:
            raise ValueError(f"{path} holds no records")
        self.places = np.frombuffer(places, np.int64).reshape(-1, 3)               # number of the line, begin, end

    def __len__(self):
        return len(self.places)

    def raw(self, i):
        """-> the number of a record's line, and the record as it stands there, or the ValueError in its place."""
        number, begin, end = self.places[i].tolist()
        with io.BytesIO(self.packed) if self.packed else open(self.path, "rb") as file:
            file.seek(begin)
            try:
                return number, parse_json(file.read(end - begin))
            except ValueError as e:
                return number, e

    def __getitem__(self, i):
        if isinstance(i, slice):
            part = copy.copy(self)
            part.places = self.places[i]
            return part
        number, record = self.raw(i)
        with naming(f"{self.path}, {self.unit} {number}"):
            check_form(record)
        return {**record, "id": str(record.get("id", number))}


def check_form(record):
    """ValueError unless the record is a conversation of text turns, human first, that ends with an answer."""
    for _, problem in form_problems(record):
        raise ValueError(problem)


def form_problems(record):
    """Yield (kind, text) for all that is wrong with a record, or what is in its place, before a file is opened."""
    if isinstance(record, ValueError):
        yield "not JSON", str(record)
        return
    yield from turn_problems(record.get("conversations") if isinstance(record, dict) else None)
    if not isinstance(record, dict):
        return
    for key in filter(partial(meant, record), record):
        yield "unknown key", f"unknown key {key[:60]!r}, near {meant(record, key)!r}: rename it or take it out"
    names, masks, references = image_names(record), record.get("masks"), record.get("references")
    if len(names) > MAX_IMAGES or not all(is_text(name) and name for name in names):
        yield "form", f"image {str(record['image'])[:60]!r}: expected a path or a list of paths, {MAX_IMAGES} at most"
    if not isinstance(masks, list | None) or masks and (len(names) != 1 or len(masks) > MAX_MASKS):
        yield "form", f"masks {str(masks)[:60]}: expected a list of masks, of its one image, {MAX_MASKS} at most"
    if "id" in record and not is_text(record["id"]) and type(record["id"]) is not int:
        yield "form", f"id {str(record['id'])[:60]!r}: expected text or a whole number"
    if references is not None and not (isinstance(references, list) and all(map(is_text, references))):
        yield "form", f"references {str(references)[:60]!r}: expected a list of texts"
    if record.get("type") is not None and not is_text(record["type"]):
        yield "form", f"type {str(record['type'])[:60]!r}: expected text"


def meant(record, key):
    """The key that an unknown one may be meant for, if the record lacks that one; else None."""
    near = [] if key in KNOWN else near_keys(key.strip().lower(), READ, 1, 0.65)
    return near[0] if near and record.get(near[0]) is None else None


def turn_problems(turns):
    if not isinstance(turns, list) or not turns:
        yield "form", "no 'conversations', expected a list of {from, value} turns"
        return
    readable = [turn if isinstance(turn, dict) else {} for turn in turns]
    for i, turn in enumerate(readable):
        if not is_text(turn.get("value")):
            yield "form", f"turn {i} {str(turns[i])[:60]} has no text under 'value'"
    roles = [turn.get("from") for turn in readable]
    pairs = roles[1:] if roles[0] == "system" else roles
    if not pairs or pairs != ["human", "gpt"] * (len(pairs) // 2):
        yield "roles", (f"turns are from {str(roles[:6])[:200]}; expected human, gpt, human, gpt, ... "
                        "(a system turn may come first)")
    for i, turn in enumerate(readable):
        if turn.get("from") == "gpt" and is_text(turn.get("value")) and not turn["value"].strip():
            yield "empty answer", f"turn {i} is an empty answer"


def is_text(value):
    """Whether a JSON value is text that UTF-8 can hold; an escape like "\\ud800" is half a character."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def image_names(record):
    image = record.get("image")
    if image is None:
        return []
    return image if isinstance(image, list) else [image]


# ---------------------------------------------------------------------------------------------- prompts

# A chat format is a generator: from turns, (role, text), it makes the parts of a prompt, (kind, value, learned). Kinds:
#   "special"   a special token, by its name
#   "text"      plain text
#   "said"      what a user said, where <image> and <region> become slots
# Learned are the answers and the special token that ends each. The answer None is left open, for the model to write.

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
    # A plain <region> is the next in order.
    found = [int(n) - 1 for n in numbers] if all(numbers) else list(range(len(numbers)))
    mixed = any(numbers) and not all(numbers)
    if mixed or sorted(set(found)) != list(range(masks)):
        raise ValueError(f"{masks} mask(s) but the human turns name {['<region' + n + '>' for n in numbers][:8]}; "
                         "expected one <region> a mask, or <region1>, <region2>, ... with each number once or more")
    return found


def check_images(turns, images):
    found = sum(text.count("<image>") for role, text in turns if role == "user")
    if found != images:
        raise ValueError(f"{images} image(s) but {found} <image> in the human turns; the numbers must be equal")


def encode_turns(turns, tokenizer, chat, images=0, tokens_per_image=0, masks=0, max_len=None):
    """
    in:  turns, a list of (role, text), role system, user or assistant; text None in the last one asks for an answer.
         images of the conversation (0 makes `<image>` plain text) and the slots that each takes; masks of the
         conversation (0 makes `<region>` plain text); max_len: more tokens are a ValueError.
    out: ids and labels, two lists of equal length.
    """
    if chat not in CHATS:
        raise ValueError(f"chat format {chat!r}: expected one of {', '.join(CHATS)}")
    slots = []                              # patterns of what becomes a slot
    if images:
        check_images(turns, images)
        slots.append("<image>")
    if masks:
        mentions(turns, masks)
        slots.append(r"<region\d*>")
    ids, labels = [], []

    def add(tokens, learn):
        ids.extend(tokens)
        labels.extend(tokens if learn else [IGNORE] * len(tokens))

    # Vicuna writes a space between its parts. A SentencePiece tokenizer adds it by itself, for others it is added here.
    space = " " if chat == "vicuna" and not tokenizer.adds_space else ""
    for kind, value, learn in CHATS[chat](turns):
        if kind == "special":
            if value not in tokenizer.special:
                raise ValueError(f"chat format {chat!r} needs the token {value}, which this tokenizer does not have")
            add([tokenizer.special[value]], learn)
            continue
        pieces = re.split(f"({'|'.join(slots)})", value) if kind == "said" and slots else [value]
        for i, piece in enumerate(pieces):                                         # every second one is a slot
            if i % 2 and piece == "<image>":
                add([IMAGE_SLOT] * tokens_per_image, learn=False)
            elif i % 2:
                add([MASK_SLOT, POSITION_SLOT], learn=False)
            elif piece:
                add(tokenizer.encode(space + piece if i == 0 else piece), learn)
    if max_len and len(ids) > max_len:
        raise ValueError(f"{len(ids)} tokens, at most {max_len} fit (max_len); shorten it, nothing is cut")
    return ids, labels


def turns_of(record, answer=True):
    """The (role, text) turns of a record; answer False: the last answer is left open."""
    turns = [(ROLES[turn["from"]], turn["value"]) for turn in record["conversations"]]
    return turns if answer else [*turns[:-1], ("assistant", None)]


def encode_record(record, tokenizer, chat, tokens_per_image=0, max_len=None, answer=True):
    """
    A record -> {"id", "ids", "labels", "mentions": the mask each region slot means}; answer False gives the prompt
    alone. ValueError names the record.
    """
    masks, turns = len(record.get("masks") or []), turns_of(record, answer)
    with naming(f"record {record['id']}"):
        ids, labels = encode_turns(turns, tokenizer, chat, len(image_names(record)), tokens_per_image, masks, max_len)
    return {"id": record["id"], "ids": ids, "labels": labels, "mentions": mentions(turns, masks) if masks else []}


# ---------------------------------------------------------------------------------------------- batches

@lru_cache(maxsize=4)                       # many records in a row may be of one image
def fitted_image(name, root, size, fit):
    """-> an image at the model's size, and the (width, height) that its file has."""
    image = load_image(name, root)
    return fit_image(image, size, fit), image.size


def load_pixels(record, root, config, blind=False):
    """
    A record's images (n, 3, size, size) and masks (R, size, size), float32; blind: gray images, the masks as they are.
    """
    size, fit, images, image_size = config.image_size, config.fit, [], None
    gray = Image.new("RGB", (size, size), GRAY)
    for name in image_names(record):
        image = gray
        if record.get("masks") or not blind:
            image, image_size = fitted_image(name, root, size, fit)
        images.append(to_tensor(gray if blind else image))
    masks = [fit_mask(decode_mask(value, image_size, root), size, fit)             # of the one image that there is then
             for value in record.get("masks") or ()]
    return (torch.stack(images) if images else torch.zeros(0, 3, size, size),
            torch.stack(masks) if masks else torch.zeros(0, size, size))


class Records(Dataset):
    """
    Records as training samples. config gives image_size, fit, chat, tokens_per_image, max_len and region_dim. A sample
    that cannot be read is returned as its error, so that a worker process hands the one line over, not a traceback.
    """

    def __init__(self, records, root, tokenizer, config, answer=True, blind=False):
        self.records, self.root, self.tokenizer, self.config = records, root, tokenizer, config
        self.answer, self.blind = answer, blind

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record, c = {"id": f"number {i}"}, self.config
        try:
            record = self.records[i]
            if record.get("masks") and not c.region_dim:
                raise ValueError("the record has masks; this model reads whole images only, an aquila-plus one regions")
            row = encode_record(record, self.tokenizer, c.chat, c.tokens_per_image, c.max_len, self.answer)
            return {**row, "number": i, "files": image_names(record), **self.read_files(record)}
        except (ValueError, FileNotFoundError) as e:
            text = one_line(e)
            return ValueError(text if text.startswith("record ") else f"record {record['id']}: {text}")

    def read_files(self, record):
        images, masks = load_pixels(record, self.root, self.config, self.blind)
        return {"images": images, "masks": masks}


def collate(rows, skip_bad=False):
    """
    Samples -> one batch, padded on the right: ids (B, T) long, labels (B, T) long, lengths (B,), names, numbers (B,) in
    the data set, and what collate_images makes. If a row is an error, the error; with skip_bad it becomes a row with
    nothing to learn, and its text goes to bad. Of no samples it makes such a row, too.
    """
    bad = [row for row in rows if isinstance(row, ValueError)]
    if bad and not skip_bad:
        return bad[0]
    nothing = {"id": "(left out)", "ids": [0], "labels": [IGNORE]}
    rows = [nothing if isinstance(row, ValueError) else row for row in rows] or [nothing]
    ids, labels = ([torch.tensor(row[key]) for row in rows] for key in ("ids", "labels"))
    return {"ids": pad_sequence(ids, batch_first=True), "labels": pad_sequence(labels, True, IGNORE),
            "lengths": torch.tensor([len(row) for row in ids]), "names": [row["id"] for row in rows],
            "numbers": torch.tensor([row.get("number", i) for i, row in enumerate(rows)]),
            "bad": [str(row) for row in bad], **collate_images(rows)}


def collate_images(rows):
    """
    images (n, 3, H, W), each once, in the order of their slots; image_of (m,) long, for each `<image>` of the prompts
    its row in images, or None when none is there twice; masks (n, R, H, W), of all rows with that image, padded with
    empty ones; regions (k, 2) long, the image and the mask that each region slot means. What no row has is None.
    """
    images, image_of, masks, regions, place = [], [], [], [], {}                   # place: of a file among images
    for b, row in enumerate(rows):
        for i, image in enumerate(row.get("images", ())):
            at = place.setdefault(row["files"][i] if "files" in row else (b, i), len(images))
            if at == len(images):
                images.append(image)
                masks.append([])
            image_of.append(at)
        if len(row.get("masks", ())):       # all of the row's one image, which `at` is
            regions += [(at, len(masks[at]) + mask) for mask in row["mentions"]]
            masks[at] += row["masks"]
    most = max(map(len, masks), default=0)
    padded = torch.zeros(len(images), most, *images[0].shape[1:]) if most else None
    for i in range(len(images)):
        for k, mask in enumerate(masks[i]):
            padded[i, k] = mask
    return {"images": torch.stack(images) if images else None,
            "image_of": torch.tensor(image_of) if len(images) < len(image_of) else None,
            "masks": padded, "regions": torch.tensor(regions) if most else None}


def to_device(batch, device):
    """The batch on the device; a sample that could not be read is raised here, in the main process."""
    if isinstance(batch, ValueError):
        raise batch
    return {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()}


if __name__ == "__main__":
    from commands.records import main
    main()
