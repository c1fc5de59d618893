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

from files.text import read_json

IGNORE = -100                               # label of a token that is not learned (PyTorch's ignore_index)
IMAGE_SLOT, MASK_SLOT, POSITION_SLOT = -1, -2, -3           # ids of positions that an image or a region fills
SLOTS = {IMAGE_SLOT: "<image>", MASK_SLOT: "<mask>", POSITION_SLOT: "<position>"}
LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")                     # of the text, a message, a turn


class SentencePieceTokenizer:
    """tokenizer.model of Llama-2 and Vicuna."""

    def __init__(self, path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise ValueError(f"{path}: neither a SentencePiece model nor Llama-3's token list") from None
        controls = filter(self.model.is_control, range(self.model.vocab_size()))
        self.special = {self.model.id_to_piece(i): i for i in controls}
        self.bos_id, self.stop_ids = self.model.bos_id(), {self.model.eos_id()}
        self.adds_space = self.model.encode("a", out_type=str)[0].startswith("\u2581")

    def encode(self, text):
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode([i for i in ids if i < self.model.vocab_size() and not self.model.is_control(i)])


# ---------------------------------------------------------------------------------------------- byte pairs

MAX_CHARS = 400_000                         # as Meta's tokenizer: tiktoken fails on very long texts


class BytePairs:
    """Byte-pair encoding run by tiktoken. ids[rank] is a token's id, None where the vocabulary has none."""
    adds_space = False
    max_run = MAX_CHARS                     # a longer run of spaces, or of anything else, is cut

    def __init__(self, pattern, ranks, ids):
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
    PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
                "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
                "<|eot_id|>", "<|python_tag|>", "<|image|>",
                *(f"<|reserved_special_token_{i}|>" for i in range(2, 246))]

    def __init__(self, path):
        lines = [line.split() for line in pathlib.Path(path).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        super().__init__(self.PATTERN, ranks, range(len(ranks)))
        self.special = {name: len(ranks) + i for i, name in enumerate(self.SPECIALS)}
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
        spec = read_json(path)
        config = read_json(pathlib.Path(path).parent / "tokenizer_config.json", default={})
        pattern, model = split_pattern(spec, path), spec["model"]
        self.special = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
        ids = {to_bytes(token): i for token, i in model["vocab"].items() if token not in self.special}
        tokens = [bytes([b]) for b in range(256)]
        for merge in model["merges"]:
            a, b = merge.split(" ") if isinstance(merge, str) else merge
            tokens.append(to_bytes(a + b))
        if model.get("ignore_merges"):      # a piece of text that is a token becomes it, even if no merges lead there
            tokens += ids
        ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
        super().__init__(pattern, ranks, [ids.get(token) for token in ranks])

        def name_of(key):                   # written as text, or as {"content": text}
            return config[key]["content"] if isinstance(config.get(key), dict) else config.get(key)

        self.bos_id = self.special.get(name_of("bos_token") or "<|begin_of_text|>")
        stops = (name_of("eos_token"), "</s>", "<|im_end|>", *LLAMA3_STOPS)
        self.stop_ids = {self.special[name] for name in stops if name in self.special}


# GPT-2's split, and the same where every digit is cut out first: spaces before a digit then end their piece.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_SPLIT = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def split_pattern(spec, path):
    """What a tokenizer.json does before BPE, as one pattern for tiktoken; ValueError names what cannot be one."""
    pre = spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    first, last, kinds = steps[0], steps[-1], [step.get("type") for step in steps]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space", True) and not spec.get("normalizer"):
        by_gpt2 = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and by_gpt2:
            return GPT2_SPLIT
        if kinds == ["Digits", "ByteLevel"] and by_gpt2 and first["individual_digits"]:
            return DIGITS_SPLIT
        isolated = first.get("behavior") == "Isolated" and not first["invert"] and "Regex" in first["pattern"]
        if kinds == ["Split", "ByteLevel"] and isolated and not by_gpt2:
            return first["pattern"]["Regex"]
    raise ValueError(f"{path}: normalizer {spec.get('normalizer')} with pre_tokenizer {pre} is not known; known are, "
                     "without normalizer, ByteLevel, Digits (each) + ByteLevel and Split (Regex, Isolated) + ByteLevel")


# ---------------------------------------------------------------------------------------------- published files

def load_tokenizer(path):
    """The tokenizer in a file or folder, its kind read from the content."""
    path = pathlib.Path(path)
    if path.is_dir():
        return load_tokenizer_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if path.suffix == ".json":
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
    stops = read_json(folder / "generation_config.json", default={}).get("eos_token_id") or []
    tokenizer.stop_ids |= set(stops if isinstance(stops, list) else [stops])
    return tokenizer
