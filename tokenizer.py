"""
Text -> token ids and back, for the tokenizers of Llama-2 and Vicuna, Llama-3, SmolLM2 and the tiny LM; and the ids of
slots, which no tokenizer makes. `load_tokenizer(file or folder)` reads the kind from the content.

Every tokenizer has encode(text) -> ids (text is data: a special token typed in it is spelled out, never made; no BOS),
decode(ids) -> text (specials left out), special {name: id}, bos_id (None: there is no such token), stop_ids, which end
an answer, and adds_space: whether encode puts a space before the text by itself.
"""
import base64
import pathlib
import re

import sentencepiece
import tiktoken

from files.checked_json import Fields, checked, read_fields
from files.text import one_line, regular_file

IGNORE = -100                               # label of a token that is not learned (PyTorch's ignore_index)
IMAGE_SLOT, MASK_SLOT, POSITION_SLOT = -1, -2, -3           # ids of positions that an image or a region fills
SLOTS = {IMAGE_SLOT: "<image>", MASK_SLOT: "<mask>", POSITION_SLOT: "<position>"}
LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")                     # of the text, a message, a turn


class SentencePieceTokenizer:
    """tokenizer.model of Llama-2 and Vicuna."""

    def __init__(self, path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.adds_space = self.model.encode("a", out_type=str)[0].startswith("\u2581")
            self.size = self.model.vocab_size()
            self.special = {self.model.id_to_piece(i): i for i in filter(self.model.is_control, range(self.size))}
        except (RuntimeError, IndexError, UnicodeError):
            raise ValueError(f"{path}: neither a SentencePiece model nor Llama-3's token list") from None
        self.bos_id = self.model.bos_id() if self.model.bos_id() >= 0 else None
        self.stop_ids = {self.model.eos_id()} - {-1}           # -1: it has none

    def encode(self, text):
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode([i for i in ids if i < self.size and not self.model.is_control(i)])


# ---------------------------------------------------------------------------------------------- byte pairs

MAX_CHARS = 400_000                         # as Meta's tokenizer: tiktoken fails on very long texts


class BytePairs:
    """Byte-pair encoding run by tiktoken. ids[rank] is a token's id, None where the vocabulary has none."""
    adds_space = False
    max_run = MAX_CHARS                     # a longer run of spaces, or of anything else, is cut

    def __init__(self, pattern, ranks, ids, special):
        self.special, self.size = special, 1 + max([*special.values(), *(i for i in ids if i is not None)], default=0)
        self.bpe = tiktoken.Encoding("byte-pairs", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.id_of, self.rank_of = ids, {i: rank for rank, i in enumerate(ids)}

    def encode(self, text):
        ids = []
        for piece in cut_long_runs(text, self.max_run):
            ids += [self.id_of[rank] for rank in self.bpe.encode_ordinary(piece)]
        return [i for i in ids if i is not None]

    def decode(self, ids):
        return self.bpe.decode([self.rank_of[i] for i in ids if i in self.rank_of])


def cut_long_runs(text, max_run):
    """text cut every MAX_CHARS, and inside a run of more than max_run spaces, or of as many other characters."""
    for start in range(0, len(text), MAX_CHARS):
        part, cuts = text[start:start + MAX_CHARS], [0]
        if len(part) > max_run:
            for run in re.finditer(r"\s+|\S+", part):
                cuts += range(run.start() + max_run, run.end(), max_run)
        for begin, end in zip(cuts, [*cuts[1:], len(part)]):
            yield part[begin:end]


class Llama3Tokenizer(BytePairs):
    """Meta's tokenizer.model: one line a token, base64 and rank (llama-models, llama3/tokenizer.py)."""
    max_run = 25_000
    SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
                "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
                "<|eot_id|>", "<|python_tag|>", "<|image|>",
                *(f"<|reserved_special_token_{i}|>" for i in range(2, 246))]

    def __init__(self, path):
        lines = [line.split() for line in pathlib.Path(path).read_bytes().splitlines() if line]
        try:
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError:
            ranks = {}
        if not {bytes([b]) for b in range(256)} <= ranks.keys() or [*ranks.values()] != [*range(len(ranks))]:
            raise ValueError(f"{path}: expected tokens ranked 0, 1, 2, ..., every byte among them; download it again")
        special = {name: len(ranks) + i for i, name in enumerate(self.SPECIALS)}
        super().__init__(LLAMA3_SPLIT, ranks, range(len(ranks)), special)
        self.bos_id = self.special["<|begin_of_text|>"]
        self.stop_ids = {self.special[name] for name in LLAMA3_STOPS}


# The characters with which GPT-2's byte-level BPE writes the 256 bytes: printable ones stand for themselves.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}


def to_bytes(token):
    return bytes(BYTE_OF[character] for character in token)


class ByteLevelTokenizer(BytePairs):
    """
    tokenizer.json of a byte-level BPE model (Hugging Face's Llama-3, SmolLM2, the tiny LM).

    tiktoken merges the pair whose *result* has the lowest rank, Hugging Face the pair that stands first in `merges`: so
    the ranks made here are the 256 bytes, then the results of the merges in their order, whatever the ids are.
    Bytes that the vocabulary lacks are dropped, as by Hugging Face (which may merge what then stands together).
    """

    def __init__(self, path):
        spec = read_fields(path)
        config = read_fields(pathlib.Path(path).parent / "tokenizer_config.json", default={})
        pattern, model = split_pattern(spec), spec.take("model", Fields)
        vocab, merges = model.take("vocab", dict[str, int]), model.take("merges", list)
        added = spec.take("added_tokens", list[Fields], default=[])
        special = {token.take("content", str): token.take("id", int) for token in added}
        tokens = [bytes([b]) for b in range(256)]
        try:
            ids = {to_bytes(token): i for token, i in vocab.items() if token not in special}
            for merge in merges:
                a, b = merge.split(" ") if isinstance(merge, str) else merge
                tokens.append(to_bytes(a + b))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: some of its tokens or merges are not those of byte-level BPE") from None
        if len({*ids.values(), *special.values()}) < len(ids) + len(special):
            raise ValueError(f"{path}: two of its tokens have one id")
        if model.values.get("ignore_merges"):  # a piece that is a token becomes it, even if no merges lead there
            tokens += ids
        ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
        super().__init__(pattern, ranks, [ids.get(token) for token in ranks], special)

        def name_of(key):                   # written as text, or as {"content": text}
            value = config.values.get(key) or ""
            return checked(value.get("content") if isinstance(value, dict) else value, str, f"{config.where}: '{key}'")

        self.bos_id = self.special.get(name_of("bos_token") or "<|begin_of_text|>")
        stops = (name_of("eos_token"), "</s>", "<|im_end|>", *LLAMA3_STOPS)
        self.stop_ids = {self.special[name] for name in stops if name in self.special}


# Llama-3's split, GPT-2's, and that where every digit is cut out first: spaces before a digit then end their piece.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_SPLIT = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPLITS = {                                  # pattern: the steps before BPE that a tokenizer.json says
    GPT2_SPLIT: [BYTE_LEVEL],
    DIGITS_SPLIT: [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    LLAMA3_SPLIT: [{"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
                   {**BYTE_LEVEL, "use_regex": False}],
}


def split_pattern(spec):
    """What a tokenizer.json does before BPE: one of three patterns; another might take for ever, or stop tiktoken."""
    pre, normalizer = spec.take("pre_tokenizer", dict, default={}), spec.values.get("normalizer")
    steps = checked(pre.get("pretokenizers") or [pre], list[dict], f"{spec.where}: 'pretokenizers'")
    steps = [*steps[:-1], {"use_regex": True, **steps[-1]}]    # its default
    for pattern, known in SPLITS.items():
        fits = len(steps) == len(known) and all(a.items() <= b.items() for a, b in zip(known, steps))
        if fits and not normalizer:
            return pattern
    raise ValueError(one_line(f"{spec.where}: normalizer {normalizer} with pre_tokenizer {pre} is not known; known: "
                     "without normalizer, ByteLevel, Digits (each) + ByteLevel and Llama-3's Split + ByteLevel"))


# ---------------------------------------------------------------------------------------------- published files

def load_tokenizer(path):
    """The tokenizer in a file or folder, its kind read from the content."""
    path = pathlib.Path(path)
    if path.is_dir():
        return load_tokenizer_folder(path)
    if regular_file(path).suffix == ".json":
        return ByteLevelTokenizer(path)
    first_line = path.read_bytes()[:400].split(b"\n")[0]
    if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", first_line):
        return Llama3Tokenizer(path)
    return SentencePieceTokenizer(path)


def load_tokenizer_folder(folder):
    files = [folder / name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).exists()]
    if not files:
        raise FileNotFoundError(f"{folder} has no tokenizer.model and no tokenizer.json")
    tokenizer = load_tokenizer(files[0])
    rows = read_fields(folder / "config.json", default={}).take("vocab_size", int, default=tokenizer.size)
    if tokenizer.size > rows:
        raise ValueError(f"{files[0]}: has ids up to {tokenizer.size - 1}, but config.json has vocab_size {rows}")
    generation = read_fields(folder / "generation_config.json", default={})
    stops = generation.values.get("eos_token_id") or []
    stops = checked(stops if isinstance(stops, list) else [stops], list[int], f"{generation.where}: 'eos_token_id'")
    tokenizer.stop_ids.update(stops)
    return tokenizer
