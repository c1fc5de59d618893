"""
Proves the tokenizers against Hugging Face's `tokenizers` and Meta's llama_models, live, on awkward and on random text.

    python -m pytest tests/peers/test_tokenizer_peers.py       # in the environment of tests/requirements-peers.txt
    TOKENIZER_DIR=smollm2 python -m pytest tests/peers/test_tokenizer_peers.py       # with that folder's tokenizer.json

Meta's tokenizer.model is part of the package llama-models.
"""
import json
import os
import random
from pathlib import Path

import pytest
import tokenizers
from conftest import GOLDEN, assert_same

from tokenizer import BYTE_OF, load_tokenizer

TEXTS = json.loads((GOLDEN / "tokenizer_ids.json").read_text(encoding="utf-8"))["texts"]
LONG = [ch * 30_000 for ch in "a \n\té7!"] + ["ab " * 10_000, "a" * 24_999 + " b" + " " * 30_000 + "c"]
GIVEN = os.environ.get("TOKENIZER_DIR")


def random_texts(n=2000):
    """Words, spaces, digits, punctuation, letters of many scripts, in no order; seeded."""
    dice = random.Random(0)
    parts = ["the", "The", "ing", "'s", "'LL", "don't", " ", "  ", "\n", "\r\n", "\t", "1", "23", "4567", ".", ",",
             "!?", "...", "(", "_", "é", "e\u0301", "ñ", "日本", "中", "한국", "Привет", "שלום", "😀",
             "👩‍👩‍👧", "²", "½", "Ⅷ", "٣", "\u00a0", "\u2003", "\u200b", "<s>", "<|eot_id|>", "<|im_end|>", "ſ",
             "İ", "\x1c", "\x85", "\ufeff"]
    for _ in range(n):
        text = "".join(dice.choice(parts) for _ in range(dice.randrange(1, 30)))
        yield text if dice.random() < 0.7 else text + "".join(chr(dice.choice(range(32, 0xD7FF))) for _ in range(5))


def same(what, ours, theirs, texts, encode):
    """ids and, back from them, text; encode: theirs."""
    for text in texts:
        ids = encode(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text[:200])
        assert ours.encode(text) == ids, repr(text[:200])
        assert_same(f"token ids = {what}, texts", [ours.encode(text)], [ids])


def check_byte_level(folder):
    file = folder / "tokenizer.json"
    ours, theirs = load_tokenizer(file), tokenizers.Tokenizer.from_file(str(file))
    theirs.encode_special_tokens = True     # text stays text
    known = {BYTE_OF[token] for token in theirs.get_vocab() if token in BYTE_OF}
    # Of random text only what the vocabulary can spell: where a byte is dropped, theirs may merge across it.
    spelled = [text for text in random_texts() if set(text.encode()) <= known]
    same("Hugging Face's tokenizers", ours, theirs, [*TEXTS, *LONG, *spelled],
         lambda text: theirs.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", ["digits", "split"])
def test_trained_byte_level_bpe(tmp_path, name):
    (tmp_path / "tokenizer.json").write_bytes((GOLDEN / f"tokenizer_{name}.json").read_bytes())
    check_byte_level(tmp_path)


@pytest.mark.skipif(not GIVEN, reason="set TOKENIZER_DIR to a folder with a tokenizer.json")
def test_given_folder():
    check_byte_level(Path(GIVEN))


@pytest.fixture(scope="module")
def meta():
    import llama_models.llama3.tokenizer as llama3
    file = Path(llama3.__file__).parent / "tokenizer.model"
    return load_tokenizer(file), llama3.Tokenizer(file)


def test_llama3_equals_metas(meta):
    ours, theirs = meta
    texts = [*TEXTS, *LONG, *random_texts(), "x" * 450_000]
    same("Meta's llama_models", ours, theirs, texts, lambda text: theirs.encode(text, bos=False, eos=False))
    assert all(ours.decode(ours.encode(text)) == text for text in texts)
    assert ours.special == theirs.special_tokens and len(ours.special) == 256
    assert ours.bos_id == theirs.bos_id == 128000
    assert ours.stop_ids == set(theirs.stop_tokens) == {128001, 128008, 128009}


def test_llama3_as_hugging_face_publishes_it(tmp_path, meta):
    """tokenizer.json as Hugging Face's converter makes it of tokenizer.model: every way to split a token is a merge."""
    ours, theirs = meta
    letter = {b: ch for ch, b in BYTE_OF.items()}
    ranks = theirs.model._mergeable_ranks
    written = {token: "".join(letter[b] for b in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        ways = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(rank, ranks[a], ranks[b], written[a], written[b]) for a, b in ways]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    special = [dict(id=i, content=name, **flags) for name, i in theirs.special_tokens.items()]
    split = {"type": "Split", "pattern": {"Regex": theirs.pat_str}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {written[token]: rank for token, rank in ranks.items()} | theirs.special_tokens
    bpe = {"type": "BPE", "vocab": vocab, "merges": [[a, b] for *_, a, b in sorted(merges)], "ignore_merges": True}
    t = {"version": "1.0", "added_tokens": special, "normalizer": None, "post_processor": None,
         "decoder": byte_level | {"use_regex": True}, "model": bpe,
         "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(t), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}')
    check_byte_level(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.special, again.bos_id, again.stop_ids) == (ours.special, ours.bos_id, ours.stop_ids)
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text)
