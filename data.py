"""
Records -> prompts with labels, and images -> tensors.

A record is LLaVA's (one a line in a .jsonl file, or a .json list):
    {"id": "7", "image": "scene_7.png",
     "conversations": [{"from": "human", "value": "<image>\nHow many ships are there?"},
                       {"from": "gpt", "value": "2"}]}
`image` may be a list (one `<image>` each) or be absent (text only). `masks` lists regions of the image (masks.py says in
which forms); the k-th `<region>` of the human turns is the k-th mask, and `<region2>` the second, as often as it is named.
For scoring a record may have `references` (a list of reference answers) and `type`. "scene:..." names a built-in scene
instead of a file (scenes.py).

- ids and labels grow together in one pass; only the answers and their end token are learned.
- `<image>` in a human turn becomes N slots, `<region>` two (mask and position): ids below zero, which no tokenizer makes
  and no model can emit. Specials typed in a text (`<|eot_id|>`, `<mask>`) stay plain text.
- Training and asking go through the same functions, so a prompt is always a prefix of the training ids.

    python data.py check FILE --images DIR      # every problem of every record; exit code 1 if there is one
    python data.py show FILE --images DIR       # what a model reads, the learned tokens marked
"""
import argparse
import json
import os
import pathlib
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

import scenes
from masks import decode_mask

IGNORE = -100                               # label of a token that is not learned (PyTorch's ignore_index)
IMAGE_SLOT, MASK_SLOT, POSITION_SLOT = -1, -2, -3           # ids of positions that an image or a region fills
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHORT = "Answer the question using a single word or phrase."                       # the paper's words, Sec. 4.1.1
SLOTS = {IMAGE_SLOT: "<image>", MASK_SLOT: "<mask>", POSITION_SLOT: "<position>"}
GRAY = 128                                  # the picture that a blind model is shown


# ---------------------------------------------------------------------------------------------- files

def parse_records(path):
    """Yield (line number, record or ValueError) of a .jsonl file, or (position, record) of a .json list."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected a .jsonl or .json file of records")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), 1)
        except ValueError as e:
            raise ValueError(f"{path} is not valid JSON: {e}; was the file cut off?") from None
        return
    for number, line in enumerate(text.split("\n"), 1):                            # splitlines() also cuts at U+2028
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as e:
                yield number, ValueError(f"not valid JSON: {e}; was the file cut off?")


def read_records(path):
    """All records of a file as a list, checked for their form; ValueError with the line of the first bad one."""
    records = []
    for number, record in parse_records(path):
        try:
            if isinstance(record, ValueError):
                raise record
            check_form(record)
        except ValueError as e:
            raise ValueError(f"{path}, line {number}: {e}") from None
        records.append({**record, "id": str(record.get("id", number))})
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def check_form(record):
    """ValueError unless the record is a conversation of text turns, human first, that ends with an answer."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        raise ValueError("no 'conversations', expected a list of {from, value} turns")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {str(turn)[:60]} has no text under 'value'")
    roles = [turn.get("from") for turn in turns]
    rest = roles[1:] if roles[0] == "system" else roles
    if rest != ["human", "gpt"] * (len(rest) // 2) or not rest:
        raise ValueError(f"turns are from {roles[:6]}; expected human, gpt, human, gpt, ... "
                         "(a system turn may come first)")
    empty = [i for i, turn in enumerate(turns) if turn["from"] == "gpt" and not turn["value"].strip()]
    if empty:
        raise ValueError(f"turn {empty[0]} is an empty answer")
    if not all(isinstance(name, str) and name for name in image_names(record)):
        raise ValueError(f"image {record['image']!r}: expected a path or a list of paths")
    masks = record.get("masks") or []
    if not isinstance(masks, list) or masks and len(image_names(record)) != 1:
        raise ValueError(f"masks {str(masks)[:60]}: expected a list of masks, of the record's one image")


def image_names(record):
    image = record.get("image") or []
    return image if isinstance(image, list) else [image]


# ---------------------------------------------------------------------------------------------- images

def image_path(name, root):
    """The file of an image; a path that leads out of root is refused, since data files come from anywhere."""
    path, root = pathlib.Path(root, name), pathlib.Path(root)
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"image {name}: the path leaves the image folder {root}")
    if not path.is_file():
        raise FileNotFoundError(f"image {name}: no such file in {root}; is --images right?")
    return path


def load_image(name, root="."):
    """A path under root, or the name of a built-in scene -> an RGB PIL image, upright."""
    if name.startswith("scene:"):
        return Image.fromarray(scenes.open_scene(name).image)
    return open_image(image_path(name, root))


def open_image(path):
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"image {path}: {image.mode} pixels (16 or 32 bit); "
                                 "convert it to 8 bit a channel first")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path}: no such file") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"image {path}: not an image that Pillow can read") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"image {path}: cannot be read, {e}") from None


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
                masks = torch.stack([fit_mask(m, size, config.fit) for m in load_masks(record, root, shown.size)])
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
        raise ValueError(f"{masks} mask(s) but the human turns name {['<region' + n + '>' for n in numbers][:8]}; expected "
                         "one <region> a mask, or <region1>, <region2>, ... with each number once or more")
    return found


def encode_turns(turns, tokenizer, chat, images=0, image_tokens=0, masks=0):
    """
    in:  turns, a list of (role, text), role system, user or assistant; text None in the last one asks for an answer.
         images of the conversation (0 makes `<image>` plain text) and the slots that each takes; masks of the
         conversation (0 makes `<region>` plain text).
    out: ids and labels, two lists of equal length.
    """
    if chat not in CHATS:
        raise ValueError(f"chat format {chat!r}: expected one of {', '.join(CHATS)}")
    found = sum(text.count("<image>") for role, text in turns if role == "user")
    if images and found != images:
        raise ValueError(f"{images} image(s) but {found} <image> in the human turns; the numbers must be equal")
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
            text = str(e)
            return ValueError(text if text.startswith("record ") else f"record {record['id']}: {text}")


def collate(rows):
    """
    Samples -> one batch, padded on the right: ids (B, T) long, labels (B, T) long, lengths (B,), names, and of all rows in
    the order of their slots: images (n, 3, H, W); masks (n, R, H, W), padded with empty ones; regions (m, 2) long, the
    image and the mask that each region slot means. What no row has is None. With an error among the rows, the error.
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

def check_record(item, root):
    """(line, record or ValueError) -> (line, id, problem or None)."""
    number, record = item
    try:
        if isinstance(record, ValueError):
            raise record
        check_form(record)
        text = sum(turn["value"].count("<image>") for turn in record["conversations"] if turn["from"] == "human")
        names = image_names(record)
        if names and text != len(names):
            raise ValueError(f"{len(names)} image(s) but {text} <image> in the human turns")
        pictures = [load_image(name, root) for name in names]
        if record.get("masks"):
            mentions(turns_of(record), len(record["masks"]))
            load_masks(record, root, pictures[0].size)
        return number, record.get("id"), None
    except (ValueError, FileNotFoundError) as e:
        return number, record.get("id") if isinstance(record, dict) else None, str(e)


def check(path, root, workers):
    """Print every problem of every record and a summary; return the number of bad records."""
    items, bad = list(parse_records(path)), 0
    with ProcessPoolExecutor(workers) as pool:
        checked = pool.map(partial(check_record, root=root), items, chunksize=16)
        for done, (number, name, problem) in enumerate(checked, 1):
            if problem:
                bad += 1
                print(f"line {number} ({name}): {problem}")
            if sys.stderr.isatty() and done % 100 == 0:
                print(f"\r{done}/{len(items)}", end="\r", file=sys.stderr)
    print(f"{path}: {len(items)} records, {bad} with a problem")
    return bad


def show(path, root, tokenizer, config, n):
    """Print the first n records as a model reads them: runs of masked (-) and learned (+) tokens, and their number."""
    names = {i: name for name, i in tokenizer.special.items()}
    for record in read_records(path)[:n]:
        row = encode_record(record, tokenizer, config.chat, config.image_tokens, config.max_len)
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
    parser.add_argument("--images", default=".", help="folder that image paths start from (default: here)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="check: processes (default: all cores)")
    parser.add_argument("-n", type=int, default=3, help="show: how many records (default 3)")
    parser.add_argument("--tokenizer", default="weights/tiny-llm",
                        help="show: tokenizer file or folder (default the tiny one)")
    parser.add_argument("--chat", default="llama-3", choices=CHATS, help="show: chat format (default llama-3)")
    parser.add_argument("--image-size", type=int, default=128, help="show: image side in pixels (default 128)")
    parser.add_argument("--fit", default="resize", choices=("resize", "letterbox"), help="show: how images are fitted")
    args = parser.parse_args()
    try:
        if args.command == "check":
            sys.exit(1 if check(args.file, args.images, args.workers) else 0)
        from llama import load_tokenizer
        config = argparse.Namespace(image_size=args.image_size, fit=args.fit, chat=args.chat, max_len=None,
                                    image_tokens=(args.image_size // 32) ** 2)
        show(args.file, args.images, load_tokenizer(args.tokenizer), config, args.n)
    except (ValueError, FileNotFoundError) as e:
        parser.exit(2, f"data.py: {e}\n")


if __name__ == "__main__":
    main()
