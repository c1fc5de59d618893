"""
A file of records, looked at before training on it.

    python data.py check FILE --images DIR [--fix OUT]    # decodes images and masks, counts tokens, lists every problem
    python data.py show FILE --images DIR                 # prints what a model reads, the learned tokens marked

With --preset P or --model DIR as that run reads them: its sizes, chat format and tokenizer. `survey` is the shorter
look of train.py before its first step: it reads no pixels.
"""
import collections
import itertools
import os
import pathlib
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from zlib import crc32

import numpy as np
from torch.utils.data import DataLoader

from aquila import PRESETS, load_config, locate_weights
from commands.arguments import Parser, whole
from commands.processes import StopSignal, ending, ignore_signals
from commands.progress import Progress
from commands.training import given
from convnext import STRIDES
from data import (CHATS, KNOWN, RecordFile, Records, check_images, encode_record, encode_turns, form_problems,
                  image_names, is_text, load_pixels, meant, mentions, turns_of)
from files.text import check_target, one_line, path_inside, write_json_lines
from pictures.image_files import MAX_IMAGES, MAX_MASKS, load_image
from pictures.mask_files import decode_mask, tolerated
from tokenizer import IGNORE, SLOTS, load_tokenizer

SOME = 256                                  # records whose pictures a survey reads whole
FEW = 10_000                                # records that one process looks at
TOLERATED = "tolerated: "                   # begins the kinds that are counted, and are no problem
tokenizer_of = lru_cache(load_tokenizer)    # loaded once a worker


def problems_of(record, root, config):
    """[(kind, text)] of every problem of a record, or of the ValueError in its place; of what is TOLERATED, too."""
    found = list(form_problems(record))
    if not isinstance(record, dict):
        return found
    names = [name for name in image_names(record)[:MAX_IMAGES] if is_text(name) and name]
    masks = record["masks"][:MAX_MASKS] if isinstance(record.get("masks"), list) else []
    if all(kind in ("empty answer", "unknown key") for kind, _ in found):          # else it cannot be read as turns
        turns = turns_of(record)
        slots = problems_in("slots", check_images, turns, len(names)) if names else []
        slots += problems_in("slots", mentions, turns, len(masks)) if masks else []
        found += slots or problems_in("no room", encode_turns, turns, tokenizer_of(config.llm_dir), config.chat,
                                      len(names), config.tokens_per_image, len(masks), config.max_len)
    if masks and not config.region_dim:
        found.append(("no regions", f"{len(masks)} mask(s), and the model reads whole images only"))
    for name in names:
        size, problems = open_once(name, root)
        found += problems
        for value in masks if size and len(names) == 1 else []:
            wrong = problems_in("mask", decode_mask, value, size, root)
            found += wrong or [(TOLERATED + words, "") for words in tolerated(value, size)]
    unread = [key for key in record if key not in KNOWN and not meant(record, key)]
    return found + [(f"{TOLERATED}unknown key {key[:40]!r}", "") for key in unread]


def problems_in(kind, function, *args):
    """[(kind, text)] of the error that function(*args) raises, or []."""
    try:
        function(*args)
    except (ValueError, FileNotFoundError) as e:
        return [("missing file" if isinstance(e, FileNotFoundError) else kind, str(e))]
    return []


@lru_cache(maxsize=100_000)                 # an image is decoded once a worker, however many records it has
def open_once(name, root):
    """-> [width, height] of an image that decodes to its end, or [], and a list of its problem."""
    size = []
    return size, problems_in("image", lambda: size.extend(load_image(name, root).size))


class Checked(Records):
    """Of each record the number of its line, its name, whether it has an image (None: no record), all its problems."""

    def __getitem__(self, i):
        number, record = self.records.raw(i)
        problems = problems_of(record, self.root, self.config)
        if not isinstance(record, dict):
            return number, None, None, problems
        return number, record.get("id", number), bool(image_names(record)), problems


def check(path, root, workers, config, fix=None):
    """Print every problem of every record and a summary by kind; return the number of bad records."""
    if fix and pathlib.Path(fix).exists() and pathlib.Path(fix).samefile(path):
        raise ValueError(f"--fix {fix} is the file that is checked; give another name")
    if fix:
        check_target(fix)
    encode_turns([("user", ""), ("assistant", "")], tokenizer_of(config.llm_dir), config.chat)   # do they fit?
    records = RecordFile(path)
    clean, first_line, kinds, with_image = [], {}, collections.Counter(), collections.Counter()
    progress, rows = Progress("checked", len(records)), read_ahead(Checked(records, str(root), None, config), workers)
    for i, (number, name, has_image, found) in enumerate(rows):
        if isinstance(name, (str, int)) and first_line.setdefault(str(name), number) != number:
            found.append(("same id", f"id {str(name)!r} is that of {records.unit} {first_line[str(name)]}, too"))
        kinds.update({kind for kind, _ in found})                                  # records, not problems, are counted
        with_image[has_image] += 1
        problems = [text for kind, text in found if not kind.startswith(TOLERATED)]
        for text in problems:
            print(one_line(f"{records.unit} {number} ({str(name)[:80]}): {text}"))
        if not problems:
            clean.append(i)
        progress.show(i + 1)
    if with_image[True] and with_image[False]:
        kinds[f"{TOLERATED}no image, among records with images"] = with_image[False]
    for kind, n in sorted(kinds.most_common(50)):
        print(f"{n:7d}  {kind}")
    print(f"{path}: {len(records)} records, {len(records) - len(clean)} with a problem")
    if fix:
        write_json_lines(fix, ({"id": str(number), **record} for number, record in map(records.raw, clean)))
        print(f"{fix}: {len(clean)} records written")
    return len(records) - len(clean)


def read_ahead(data, workers):
    """The items of a Dataset in their order, made by this many worker processes (0 or 1: here)."""
    loader = DataLoader(data, batch_size=64, collate_fn=list, num_workers=workers if workers > 1 else 0,
                        worker_init_fn=ignore_signals)
    return itertools.chain.from_iterable(loader)


@lru_cache(maxsize=100_000)
def size_of(name, root, what):
    """Bytes of an image or mask file, which must be there; 0 of a built-in scene."""
    return 0 if name.startswith("scene:") else path_inside(name, root, what).stat().st_size


class Survey(Records):
    """Of a record its characters, its tokens, a checksum of them, the sizes of its files; or its error; no pixels."""

    def __getitem__(self, i):
        row = super().__getitem__(i)
        if isinstance(row, ValueError):
            return row
        characters = sum(len(turn["value"]) for turn in self.records[i]["conversations"])
        return characters, len(row["ids"]), crc32(str(row["ids"]).encode()), row["sizes"]

    def read_files(self, record):
        sizes = [(name, size_of(name, self.root, "image")) for name in image_names(record)]
        masks = [value for value in record.get("masks") or () if isinstance(value, str)]
        return {"sizes": sizes + [(name, size_of(name, self.root, "mask")) for name in masks]}


@dataclass
class Surveyed:
    lengths: np.ndarray                     # (n,) int32, characters of each record
    blank: int                              # records without an image
    longest: int                            # tokens of the longest one
    digests: dict                           # of all tokens; of the files: their names, sizes, and the bytes of some


def survey(records, root, tokenizer, config, workers, skip_bad=0):
    """
    Every record looked at before the first step, by `workers` processes: slots, tokens, files that are missing.
    More than skip_bad bad ones are a ValueError.
    """
    n, blank, longest, tokens, pictures, bad, first = len(records), 0, 0, sha256(), sha256(), 0, []
    lengths, progress = np.zeros(n, np.int32), Progress("records looked at", n)
    for i, row in enumerate(read_ahead(Survey(records, root, tokenizer, config), workers if n > FEW else 0)):
        progress.show(i + 1)
        if isinstance(row, ValueError):
            bad += 1
            first += [str(row)[:200]] if bad < 4 else []
            continue
        lengths[i], count, checksum, sizes = row
        longest = max(longest, count)
        blank += not sizes
        tokens.update(f"{i} {checksum}\n".encode())
        for name, size in sizes:
            pictures.update(f"{name} {size}\n".encode())
            if size and i % (n // SOME + 1) == 0:
                pictures.update(pathlib.Path(root, name).read_bytes())
    if bad > skip_bad or bad == n:
        raise ValueError(f"{bad:,} of {n:,} records are bad: {'; '.join(first)}; data.py check lists them all, "
                         f"--skip-bad {bad} leaves them out")
    return Surveyed(lengths, blank, longest, {"tokens": tokens.hexdigest()[:16], "pictures": pictures.hexdigest()[:16]})


def show(path, root, config, n):
    """Print the first n records as a model reads them: runs of masked (-) and learned (+) tokens, and their number."""
    tokenizer = tokenizer_of(config.llm_dir)
    special = {i: name for name, i in tokenizer.special.items()} | SLOTS
    for record in RecordFile(path)[:n]:
        row = encode_record(record, tokenizer, config.chat, config.tokens_per_image)
        images, masks = load_pixels(record, root, config)
        regions = f", {len(masks)} masks" if len(masks) else ""
        print(f"record {record['id']}: {len(row['ids'])} tokens, {sum(t != IGNORE for t in row['labels'])} learned, "
              f"images {image_names(record)} as {tuple(images.shape)}{regions}")
        kind = lambda pair: (pair[1] != IGNORE, special.get(pair[0], ""))          # pair: id, label
        for (learned, name), pairs in itertools.groupby(zip(row["ids"], row["labels"]), kind):
            tokens = [token for token, _ in pairs]
            print(f"  {'+' if learned else '-'} {len(tokens):5d}  {name or repr(tokenizer.decode(tokens))}")


def settings(args):
    """What decides how records are read: as --model or --preset has it, where no flag says otherwise."""
    known = load_config(args.model) if args.model else PRESETS[args.preset or "tiny"]
    regions = known.region_dim if args.model or args.preset else 1
    return replace(known, region_dim=regions, **given(args, "image_size", "chat", "max_len"),
                   llm_dir=args.tokenizer or locate_weights(known.llm_dir, "language model"))


def run(args):
    config = settings(args)
    if args.command == "show":
        return show(args.file, args.images, config, args.n)
    sys.exit(1 if check(args.file, args.images, args.workers or os.cpu_count(), config, args.fix) else 0)


def main():
    parser = Parser(prog="data.py", description="Look at a file of records before training on it.")
    add = parser.add_argument
    add("command", choices=("check", "show"), help="check: list every problem; show: print tokens and labels")
    add("file", help=".jsonl or .json file of records")
    add("--images", default=".", help="folder that image and mask paths start from (default: here)")
    add("--workers", type=whole(1, 1000), help="check: processes (default: all cores)")
    add("--fix", metavar="OUT", help="check: write the records without a problem to this .jsonl file")
    add("-n", type=whole(1), default=3, help="show: how many records (default 3)")
    add("--preset", choices=PRESETS, help="read as this preset does (default: tiny, but masks are welcome)")
    add("--model", help="read as the run in this folder, which train.py wrote, does")
    add("--tokenizer", "--llm", help="tokenizer file or folder (default: the model's)")
    add("--chat", choices=CHATS, help="chat format (default: the model's)")
    add("--max-len", type=whole(1), help="check: tokens of prompt, images and answer (default: the model's)")
    add("--image-size", type=whole(STRIDES[-1], 8192), help="image side in pixels (default: the model's)")
    with StopSignal(), ending("data.py"):
        run(parser.parse_args())
