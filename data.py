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
import difflib
import re
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from files.text import naming, one_line, parse_json, regular_file
from pictures.image_files import MAX_IMAGES, MAX_MASKS, fit_image, fit_mask, load_image, to_tensor
from pictures.mask_files import decode_mask
from tokenizer import IGNORE, IMAGE_SLOT, MASK_SLOT, POSITION_SLOT

GRAY = (128, 128, 128)                      # the picture that a blind model is shown
READ = ("conversations", "image", "masks", "references", "type")                   # keys of a record; slips are errors
KNOWN = (*READ, "id", "sampling", "task", "tasks", "style")                        # the last three are no such slips
near_keys = lru_cache(difflib.get_close_matches)                                   # a million records share a few keys


# ---------------------------------------------------------------------------------------------- records

def parse_records(path):
    """Yield (line number, record or ValueError) of a .jsonl file, or (position, record) of a .json list."""
    data = regular_file(path).read_bytes()
    if data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from enumerate(parse_json(data, path), 1)
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                record = parse_json(line)
            except ValueError as e:         # the records after it are still looked at
                record = e
            yield number, record


def read_records(path):
    """All records of a file as a list, checked for their form; ValueError with the line of the first bad one."""
    records = []
    for number, record in parse_records(path):
        with naming(f"{path}, line {number}"):
            check_form(record)
        records.append({**record, "id": str(record.get("id", number))})
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


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


def encode_turns(turns, tokenizer, chat, images=0, tokens_per_image=0, masks=0):
    """
    in:  turns, a list of (role, text), role system, user or assistant; text None in the last one asks for an answer.
         images of the conversation (0 makes `<image>` plain text) and the slots that each takes; masks of the
         conversation (0 makes `<region>` plain text).
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
        ids, labels = encode_turns(turns, tokenizer, chat, len(image_names(record)), tokens_per_image, masks)
        if max_len and len(ids) > max_len:
            raise ValueError(f"{len(ids)} tokens, at most {max_len} fit (max_len); shorten it, nothing is cut")
    return {"id": record["id"], "ids": ids, "labels": labels, "mentions": mentions(turns, masks) if masks else []}


# ---------------------------------------------------------------------------------------------- batches

def load_pixels(record, root, config, blind=False):
    """
    A record's images (n, 3, size, size) and masks (R, size, size), float32; blind: gray images, the masks as they are.
    """
    size, fit, images, masks = config.image_size, config.fit, [], []
    gray = Image.new("RGB", (size, size), GRAY)
    for name in image_names(record):
        image = gray if blind and not record.get("masks") else load_image(name, root)
        images.append(to_tensor(fit_image(gray if blind else image, size, fit)))
        image_size = image.size
        del image                           # it may be huge, and so may each of the masks
        masks = [fit_mask(decode_mask(value, image_size, root), size, fit) for value in record.get("masks") or ()]
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
        record, c = self.records[i], self.config
        try:
            if record.get("masks") and not c.region_dim:
                raise ValueError("the record has masks; this model reads whole images only, an aquila-plus one regions")
            row = encode_record(record, self.tokenizer, c.chat, c.tokens_per_image, c.max_len, self.answer)
            row["images"], row["masks"] = load_pixels(record, self.root, c, self.blind)
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
    masks, regions = collate_masks(rows)
    return {"ids": ids, "labels": labels, "lengths": lengths, "names": [row["id"] for row in rows],
            "images": torch.cat(images) if images else None, "masks": masks, "regions": regions}


def collate_masks(rows):
    """-> masks and regions of a batch."""
    most = max(len(row.get("masks", ())) for row in rows)
    if not most:
        return None, None
    masks, regions = [], []
    for row in rows:
        if len(row["masks"]):               # all of the row's one image
            regions += [(len(masks), mask) for mask in row["mentions"]]
        for i in range(len(row["images"])):
            own = row["masks"] if i == 0 else row["masks"][:0]
            masks.append(F.pad(own, (0, 0, 0, 0, 0, most - len(own))))
    return torch.stack(masks), torch.tensor(regions)


def to_device(batch, device):
    """The batch on the device; a sample that could not be read is raised here, in the main process."""
    if isinstance(batch, ValueError):
        raise batch
    return {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()}


if __name__ == "__main__":
    from commands.records import main
    main()
