"""
Proves that each tokenizer gives its owner's ids, never makes a special token of text, and knows every stop token.
tokenizer_*.json and the ids that Hugging Face's `tokenizers` gives come from checks/make_golden.py; a SentencePiece
model is trained here; Llama-3's format is written here from a few merges. The real files: tests/peers.

    pytest tests/data/test_tokenizer.py
"""
import base64
import json
import shutil

import pytest
import sentencepiece
from conftest import GOLDEN, assert_same, one_line

from tokenizer import BYTE_OF, Llama3Tokenizer, SentencePieceTokenizer, cut_long_runs, load_tokenizer

IDS = json.loads((GOLDEN / "tokenizer_ids.json").read_text(encoding="utf-8"))
LONG = ["a" * 30_000, " " * 30_000, "\n" * 30_000, "ab " * 10_000, "é" * 30_000, "7" * 30_000]
TYPED = ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>",
         "<0x0A>"]


def golden(name):
    return json.loads((GOLDEN / f"tokenizer_{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    """Made as Llama-2's: BPE, byte fallback, each digit alone, no normalization, a space put before the text."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(t.replace("\n", " ") for t in IDS["texts"][-5:] * 4), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=1.0, minloglevel=2)
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def llama3_file(tmp_path_factory):
    """The 256 bytes and some merges, one base64 token and its rank a line."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"ld", b" world", b"12", b"123", b"  ", b"\n\n",
               b"'s"]
    file = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    file.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return file


@pytest.fixture(scope="module")
def every(sentencepiece_file, llama3_file):
    files = {"sentencepiece": sentencepiece_file, "llama-3": llama3_file}
    files |= {name: GOLDEN / f"tokenizer_{name}.json" for name in ("digits", "split")}
    return {name: load_tokenizer(file) for name, file in files.items()}


NAMES = ["sentencepiece", "llama-3", "digits", "split"]


@pytest.mark.parametrize("name", NAMES)
def test_round_trips(every, name):
    tokenizer = every[name]
    letters = golden("digits")["model"]["vocab"] if name == "digits" else BYTE_OF
    known = {BYTE_OF[letter] for letter in letters if letter in BYTE_OF}
    for text in IDS["texts"] + LONG + ["".join(map(chr, range(1, 0x250)))]:
        expected = text
        if name == "digits":                # its vocabulary lacks bytes: what it lacks is dropped, the rest stays
            expected = bytes(b for b in text.encode() if b in known).decode(errors="replace")
        assert tokenizer.decode(tokenizer.encode(text)) == expected, text[:50]


@pytest.mark.parametrize("name", NAMES)
def test_typed_specials_stay_text(every, name):
    tokenizer = every[name]
    for text in TYPED + list(tokenizer.special) + ["".join(tokenizer.special)]:
        ids = tokenizer.encode(text)
        assert not set(ids) & (set(tokenizer.special.values()) | tokenizer.stop_ids | {tokenizer.bos_id}), text
        assert name == "digits" or tokenizer.decode(ids) == text
    ids = tokenizer.encode("a b")
    assert tokenizer.decode([*tokenizer.special.values(), *ids, *tokenizer.special.values()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["digits", "split"])
def test_byte_level_bpe_equals_hugging_face(every, name):
    """Also where ids do not follow the order of the merges, and where no merge leads to a token (both in "split")."""
    ids = [every[name].encode(text) for text in IDS["texts"]]
    assert_same("byte pairs = Hugging Face's tokenizers, texts (golden files)", ids, IDS[name])
    assert [every[name].decode(i) for i in ids] == IDS[f"{name}.decoded"]


def test_the_golden_tokenizers_are_hard():
    """Each trap is there: ids in another order than merges, whole pieces without merges, bytes that are missing."""
    split, digits = golden("split")["model"], golden("digits")["model"]
    order = [split["vocab"]["".join(merge)] for merge in split["merges"]]
    assert order != sorted(order)
    whole = split["vocab"]["ĠHello"]
    assert split["ignore_merges"] and "ĠHello" not in {"".join(merge) for merge in split["merges"]}
    assert whole in load_tokenizer(GOLDEN / "tokenizer_split.json").encode("oh, Hello")
    assert sum(letter in digits["vocab"] for letter in BYTE_OF) < 150


def test_whole_pieces_win_only_where_the_file_says_so(tmp_path):
    t = golden("split")
    whole = t["model"]["vocab"]["ĠHello"]
    assert whole in load_tokenizer(GOLDEN / "tokenizer_split.json").encode("oh, Hello")
    t["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(t), encoding="utf-8")
    assert whole not in load_tokenizer(tmp_path).encode("oh, Hello")


def sequence(first, use_regex):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}
    return {"type": "Sequence", "pretokenizers": [first, byte_level]}


@pytest.mark.parametrize("pre_tokenizer, word", [
    ({"type": "Metaspace", "replacement": "▁"}, "Metaspace"), (None, "{}"),
    ({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, "ByteLevel"),
    (sequence({"type": "Digits", "individual_digits": False}, True), "Digits"),
    (sequence({"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}, False), "Split"),
    (sequence({"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed", "invert": False}, False), "Removed")])
def test_an_unknown_pre_tokenizer_is_refused_by_name(tmp_path, pre_tokenizer, word):
    t = golden("split")
    (tmp_path / "tokenizer.json").write_text(json.dumps(t | {"pre_tokenizer": pre_tokenizer}), encoding="utf-8")
    with pytest.raises(ValueError, match=word) as error:
        load_tokenizer(tmp_path)
    assert one_line(error)


def test_a_normalizer_is_refused_by_name(tmp_path):
    t = golden("split")
    (tmp_path / "tokenizer.json").write_text(json.dumps(t | {"normalizer": {"type": "NFC"}}), encoding="utf-8")
    with pytest.raises(ValueError, match="NFC"):
        load_tokenizer(tmp_path)


def test_the_llama3_format_by_hand(llama3_file):
    t = load_tokenizer(llama3_file.parent)
    assert t.encode("hello world") == [259, 264]
    assert t.encode("hello's 12345") == [259, 269, 32, 266, 52, 53]               # at most three digits, then merged
    assert t.encode("a\n\n\nb") == [97, 268, 10, 98]
    assert t.encode("") == []
    specials = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6, "<|end_header_id|>": 7,
                "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10, "<|reserved_special_token_245|>": 255}
    assert {name: t.special[name] - 270 for name in specials} == specials and len(t.special) == 256
    # With Llama-3's 128,000 tokens that is 128001, 128008 and 128009.
    assert t.bos_id == 270 and t.stop_ids == {271, 278, 279} and not t.adds_space


def test_long_runs_are_cut_where_meta_cuts_them():
    """Every 25,000 characters of one run, counted from its start, and every 400,000 of the text."""
    cuts = lambda text: [len(p) for p in cut_long_runs(text, 25_000)]
    assert cuts("a" * 60_000) == [25_000, 25_000, 10_000]
    assert cuts("a" * 24_999 + " " * 2 + "b" * 25_001) == [50_001, 1]
    assert cuts("ab " * 200_000) == [400_000, 200_000]
    assert cuts("") in ([], [0])
    for text in ("a" * 60_000, "ab " * 200_000, " " * 25_001 + "x"):
        assert "".join(cut_long_runs(text, 25_000)) == text


def test_sentencepiece_is_the_librarys_own(sentencepiece_file):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    ours, texts = load_tokenizer(sentencepiece_file), IDS["texts"] + LONG
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert ours.special == {"<s>": 1, "</s>": 2} and (ours.bos_id, ours.stop_ids, ours.adds_space) == (1, {2}, True)
    assert theirs.id_to_piece(ours.encode("hi")[0]).startswith("▁")


# ---------------------------------------------------------------------------------------------- folders

def hugging_face_folder(folder, **files):
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / "tokenizer_digits.json", folder / "tokenizer.json")
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return load_tokenizer(folder)


@pytest.mark.parametrize("eos, bos", [
    ("<|im_end|>", "<|im_start|>"), ({"content": "<|im_end|>"}, {"content": "<|im_start|>"})])
def test_bos_and_stop_ids_of_a_folder(tmp_path, eos, bos):
    t = hugging_face_folder(tmp_path, tokenizer_config={"eos_token": eos, "bos_token": bos})
    assert (t.special["<|im_start|>"], t.bos_id, t.stop_ids) == (1, 1, {2})
    t = hugging_face_folder(tmp_path, tokenizer_config={"eos_token": "<|endoftext|>"},
                            generation_config={"eos_token_id": [0, 7, 9]})
    assert (t.bos_id, t.stop_ids) == (None, {0, 2, 7, 9})
    t = hugging_face_folder(tmp_path, tokenizer_config={}, generation_config={"eos_token_id": 5})
    assert (t.bos_id, t.stop_ids) == (None, {2, 5})
    assert hugging_face_folder(tmp_path, generation_config={}).stop_ids == {2}


def test_all_three_stops_of_llama3_in_tokenizer_json(tmp_path):
    t = golden("split")
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    t["added_tokens"] += [{"id": 1000 + i, "content": name, "special": True} for i, name in enumerate(names)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(t), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == 1000 and {1001, 1002, 1003} <= tokenizer.stop_ids


def test_which_file_of_a_folder(tmp_path, sentencepiece_file, llama3_file):
    with pytest.raises(FileNotFoundError, match="no tokenizer.model and no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not there"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.json").write_text("{}")                                # Vicuna's says nothing that is needed
    for file, kind in ((sentencepiece_file, SentencePieceTokenizer), (llama3_file, Llama3Tokenizer)):
        shutil.copy(file, tmp_path / "tokenizer.model")
        assert isinstance(load_tokenizer(tmp_path), kind)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", sentencepiece_file.read_bytes()[:200]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="neither a SentencePiece model nor Llama-3's") as error:
            load_tokenizer(tmp_path)
        assert one_line(error)
