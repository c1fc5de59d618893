"""
Proves that weights and configs that lie are refused, in one line that names the file, before memory is taken for what
they claim: sizes, types, NaN, files outside the folder, tokens, adapters, checkpoints.

    pytest tests/data/test_hostile_weights.py
"""
import base64
import dataclasses
import json
import os
import shutil

import pytest
import torch
from conftest import GOLDEN, SMALL
from safetensors.torch import load_file, save_file

from aquila import Aquila, LoRAConfig, load_checkpoint, load_model, save_model
from convnext import load_convnext
from files.text import one_line
from llama import Llama, LlamaConfig, load_llama, load_lora, save_llama, save_lora
from lora import apply_lora
from tokenizer import load_tokenizer

LLAMA = LlamaConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=20, vocab_size=52, head_dim=6)
LORA = LoRAConfig(rank=2, alpha=4, dropout=0.0)
NO_OBJECT = ["[]", "null", '"text"', "1e999", '{"a": ' * 60 + "1" + "}" * 60]


def refused(load, file, *words):
    """The call raises one bounded line that begins with the file."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load()
    message = str(error.value)
    assert message.startswith(str(file)) and message.isprintable() and len(message) <= 600, message
    assert all(word in message for word in words), message


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_llama(Llama(LLAMA), tmp_path / "llama")
    return tmp_path / "llama"


def edit_tensor(folder, name, tensor, pickled=False):
    """Put a tensor into a Hugging Face folder's file."""
    file = folder / "model.safetensors"
    tensors = {key: t.clone() for key, t in load_file(file).items()} | {name: tensor}
    if pickled:
        file.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, file)


# ---------------------------------------------------------------------------------------------- configs of a Llama

@pytest.mark.parametrize("key, value", [
    ("num_hidden_layers", 10 ** 9), ("num_hidden_layers", "2"), ("num_hidden_layers", None), ("hidden_size", 24.0),
    ("hidden_size", True), ("hidden_size", 10 ** 12), ("intermediate_size", [20]), ("num_attention_heads", 3),
    ("num_key_value_heads", 10 ** 400), ("vocab_size", -1), ("rope_theta", 0), ("rope_theta", -1.0),
    ("rope_theta", float("nan")), ("rope_theta", float("inf")), ("rms_norm_eps", -1), ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", "small"), ("tie_word_embeddings", "no"), ("max_position_embeddings", 0.5), ("rope_scaling", 3),
    ("rope_scaling", ["llama3"]),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                      "original_max_position_embeddings": 64})])
def test_a_config_that_lies(folder, key, value):
    edit_json(folder / "config.json", **{key: value})
    refused(lambda: load_llama(folder), folder)


def test_the_message_says_what_was_expected(folder):
    edit_json(folder / "config.json", rms_norm_eps=float("nan"))
    refused(lambda: load_llama(folder), folder / "config.json", "'rms_norm_eps' is nan, expected a number from ")


@pytest.mark.parametrize("text", NO_OBJECT)
def test_a_config_that_is_no_object(folder, text):
    (folder / "config.json").write_text(text)
    refused(lambda: load_llama(folder), folder / "config.json")


@pytest.mark.parametrize("key, value", [
    ("n_layers", 10 ** 9), ("n_layers", None), ("n_heads", []), ("n_kv_heads", 3),
    ("norm_eps", float("nan")), ("rope_theta", 0), ("rope_theta", "x"), ("use_scaled_rope", 1)])
def test_params_of_meta_that_lie(tmp_path, key, value):
    params = dict(dim=24, n_layers=1, n_heads=4, n_kv_heads=2, norm_eps=1e-5, vocab_size=52)
    (tmp_path / "params.json").write_text(json.dumps(params | {key: value}))
    torch.save({"tok_embeddings.weight": torch.ones(52, 24), "layers.0.feed_forward.w1.weight": torch.ones(20, 24)},
               tmp_path / "consolidated.00.pth")
    refused(lambda: load_llama(tmp_path), tmp_path / "params.json")


@pytest.mark.parametrize("shard", [
    {"tok_embeddings.weight": torch.ones(52)}, {"tok_embeddings.weight": torch.empty(5, device="meta")},
    {"tok_embeddings.weight": torch.ones(52, 24), "layers.0.feed_forward.w1.weight": torch.ones(())},
    {"tok_embeddings.weight": torch.ones(52, 24), "layers.0.feed_forward.w1.weight": torch.ones(20, 24),
     "no dot": torch.ones(1)}])
def test_a_shard_of_meta_that_lacks_what_sizes_it(tmp_path, shard):
    (tmp_path / "params.json").write_text(json.dumps(dict(dim=24, n_layers=1, n_heads=4, norm_eps=1e-5)))
    torch.save(shard, tmp_path / "consolidated.00.pth")
    refused(lambda: load_llama(tmp_path), tmp_path)


# ---------------------------------------------------------------------------------------------- weights

@pytest.mark.parametrize("names", [
    ["/dev/zero"], ["../llama/model.safetensors"], ["model.safetensors", None], [None], [3], ["\0"], ["x" * 5000]])
def test_an_index_that_names_what_is_no_file_of_its_folder(folder, names):
    index = {"weight_map": {f"tensor{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: load_llama(folder), folder)


@pytest.mark.parametrize("text", [*NO_OBJECT, "{}", '{"weight_map": []}', '{"weight_map": null}'])
def test_an_index_that_is_no_index(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    refused(lambda: load_llama(folder), folder / "model.safetensors.index.json")


def test_links_out_of_the_folder_are_followed(folder, tmp_path):
    """So does Hugging Face's cache."""
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "one.safetensors").symlink_to(tmp_path / "blob")
    index = {"weight_map": {"model.norm.weight": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_llama(folder).config == LLAMA


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int64])
def test_what_is_stored_as_no_float_is_refused(folder, dtype, pickled):
    edit_tensor(folder, "model.norm.weight", torch.ones(24).to(dtype), pickled)
    refused(lambda: load_llama(folder), folder, "1 not of float16, bfloat16, float32 or float64: model.norm.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(folder, value, dtype):
    weight = torch.ones(20, 24, dtype=dtype)
    weight[13, 7] = value
    edit_tensor(folder, "model.layers.1.mlp.up_proj.weight", weight)
    refused(lambda: load_llama(folder), folder, "model.layers.1.mlp.up_proj.weight holds NaN or infinite numbers")


def test_numbers_that_are_finite_but_not_their_sum(folder):
    edit_tensor(folder, "model.norm.weight", torch.full((24,), 60000.0, dtype=torch.float16))
    assert load_llama(folder, torch.float16).norm.weight[0] == 60000


def test_a_tensor_that_claims_more_than_its_file_holds(folder):
    edit_json(folder / "config.json", vocab_size=10 ** 7)
    edit_tensor(folder, "model.embed_tokens.weight", torch.zeros(1).expand(10 ** 7, 24), pickled=True)
    refused(lambda: load_llama(folder), folder / "pytorch_model.bin", "claim more numbers")


@pytest.mark.parametrize("name", ["x" * 5000, "two\nlines", "\x01"])
def test_a_tensor_with_a_hostile_name(folder, name):
    edit_tensor(folder, name, torch.ones(1))
    refused(lambda: load_llama(folder), folder, "1 unexpected: ")


@pytest.mark.parametrize("block", ["99999", "9" * 5000, "\u0663"])
def test_a_block_number_does_not_size_a_convnext(tmp_path, block):
    tensors = load_file(GOLDEN / "convnext.safetensors")
    tensors[f"visual.trunk.stages.2.blocks.{block}.gamma"] = torch.ones(24)
    save_file(tensors, tmp_path / "weights.safetensors")
    refused(lambda: load_convnext(tmp_path / "weights.safetensors"), tmp_path, "9 missing")


# ---------------------------------------------------------------------------------------------- adapters, checkpoints

@pytest.mark.parametrize("changes", [
    {"r": 0}, {"r": 10 ** 9}, {"r": 2 ** 20}, {"r": "3"}, {"r": None}, {"lora_alpha": 0}, {"lora_alpha": "x"},
    {"lora_alpha": float("nan")}, {"lora_dropout": 2}, {"target_modules": [3]}, {"target_modules": ["lm_head"]}])
def test_an_adapter_that_lies(tmp_path, changes):
    save_lora(apply_lora(Llama(LLAMA), 3, 8, 0.0), tmp_path)
    edit_json(tmp_path / "adapter_config.json", **changes)
    refused(lambda: load_lora(Llama(LLAMA), tmp_path), tmp_path)


@pytest.mark.parametrize("text", NO_OBJECT)
def test_an_adapter_config_that_is_no_object(tmp_path, text):
    save_lora(apply_lora(Llama(LLAMA), 3, 8, 0.0), tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    refused(lambda: load_lora(Llama(LLAMA), tmp_path), tmp_path / "adapter_config.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_model(Aquila(dataclasses.replace(SMALL, lora=LORA)), folder)
    return folder


@pytest.mark.parametrize("changes", [
    {"dim": 10 ** 9}, {"dim": 0.5}, {"heads": 0}, {"heads": 3}, {"image_size": 10 ** 6}, {"mda_layers": 3},
    {"mda_layers": [0, "2"]}, {"vision": []}, {"vision": None}, {"llm": {}}, {"llm": {"n_layers": 10 ** 9}},
    {"lora": 3}, {"lora": {"rank": 10 ** 9}}, {"lora": {"rank": 2, "targets": ["x"]}},
    {"lora": {"dropout": 10 ** 9}}, {"lora": {"alpha": float("nan")}}, {"llm_dir": 3}, {"vision_file": {}},
    {"region_dim": 10 ** 7}, {"of_tomorrow": 1}])
def test_a_checkpoint_that_lies(saved, tmp_path, changes):
    shutil.copytree(saved, tmp_path / "run")
    config = json.loads((saved / "config.json").read_text())
    for key, value in changes.items():      # some of a part alone are changed
        whole = isinstance(value, dict) and value and config[key]
        config[key] = {**config[key], **value} if whole else value
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    refused(lambda: load_model(tmp_path / "run"), tmp_path / "run")


@pytest.mark.parametrize("text", NO_OBJECT)
def test_a_checkpoint_config_that_is_no_object(saved, tmp_path, text):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run/config.json").write_text(text)
    refused(lambda: load_model(tmp_path / "run"), tmp_path / "run/config.json")


@pytest.mark.parametrize("text", [*NO_OBJECT, "{"])
def test_checksums_that_are_none(saved, tmp_path, text):
    shutil.copytree(saved, tmp_path / "run")
    save_file(load_file(saved / "model.safetensors"), tmp_path / "run/model.safetensors", {"frozen": text})
    model = Aquila(dataclasses.replace(SMALL, lora=LORA))
    refused(lambda: load_checkpoint(model, tmp_path / "run"), tmp_path / "run/model.safetensors", "'frozen'")


# ---------------------------------------------------------------------------------------------- tokenizers

@pytest.fixture
def tokens(tmp_path):
    shutil.copy(GOLDEN / "tokenizer_split.json", tmp_path / "tokenizer.json")
    return tmp_path


@pytest.mark.parametrize("text", [*NO_OBJECT, "{}"])
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "generation_config"])
def test_a_tokenizer_file_that_is_no_object(tokens, name, text):
    (tokens / f"{name}.json").write_text(text)
    if text == "{}" and name != "tokenizer":
        assert load_tokenizer(tokens).encode("a")
    else:
        refused(lambda: load_tokenizer(tokens), tokens / f"{name}.json")


SPLIT = json.loads((GOLDEN / "tokenizer_split.json").read_text(encoding="utf-8"))
VOCAB, MERGES = SPLIT["model"]["vocab"], SPLIT["model"]["merges"]


@pytest.mark.parametrize("changes", [
    {"model": None}, {"model": []}, {"added_tokens": 3}, {"added_tokens": [None]}, {"added_tokens": [{"id": 7}]},
    {"added_tokens": [{"content": "<s>", "id": -1}]}, {"added_tokens": [{"content": "<s>", "id": 10 ** 12}]},
    {"added_tokens": [{"content": "<s>", "id": 0}]}, {"pre_tokenizer": {"pretokenizers": [3]}},
    {"vocab": []}, {"vocab": VOCAB | {"a": -1}}, {"vocab": VOCAB | {"a": "x"}}, {"vocab": VOCAB | {"a": 10 ** 12}},
    {"vocab": VOCAB | {"\u2581a": 9999}}, {"merges": None}, {"merges": [*MERGES, 3]}, {"merges": [*MERGES, "a"]},
    {"merges": [*MERGES, ["a", "b", "c"]]}, {"merges": [*MERGES, [1, 2]]}, {"merges": [*MERGES, "\u2581 a"]}])
def test_a_tokenizer_that_lies(tokens, changes):
    spec = json.loads((tokens / "tokenizer.json").read_text(encoding="utf-8"))
    for key, value in changes.items():
        (spec["model"] if key in ("vocab", "merges") else spec)[key] = value
    (tokens / "tokenizer.json").write_text(json.dumps(spec))
    refused(lambda: load_tokenizer(tokens), tokens / "tokenizer.json")


@pytest.mark.parametrize("pattern", ["", "(", "a", r"\s*", r"(?=(a+))*b", r"(?<!x)(a|aa)+\1$"])
def test_a_pattern_of_a_file_never_runs(tokens, pattern):
    spec = json.loads((tokens / "tokenizer.json").read_text(encoding="utf-8"))
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    (tokens / "tokenizer.json").write_text(json.dumps(spec))
    refused(lambda: load_tokenizer(tokens), tokens / "tokenizer.json", "is not known")


@pytest.mark.parametrize("name, values", [
    ("generation_config", {"eos_token_id": 10 ** 12}), ("generation_config", {"eos_token_id": -1}),
    ("generation_config", {"eos_token_id": [1, None]}), ("generation_config", {"eos_token_id": {"a": 1}}),
    ("generation_config", {"eos_token_id": "</s>"}), ("tokenizer_config", {"eos_token": 3}),
    ("tokenizer_config", {"bos_token": ["<s>"]}), ("tokenizer_config", {"bos_token": {"content": None}}),
    ("config", {"vocab_size": "x"})])
def test_files_beside_a_tokenizer_that_lie(tokens, name, values):
    (tokens / f"{name}.json").write_text(json.dumps(values))
    refused(lambda: load_tokenizer(tokens), tokens / f"{name}.json")


def test_ids_that_the_model_has_no_row_for(tokens):
    (tokens / "config.json").write_text('{"vocab_size": 100}')
    refused(lambda: load_tokenizer(tokens), tokens / "tokenizer.json", "config.json has vocab_size 100")


BYTES = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)]


@pytest.mark.parametrize("lines", [
    BYTES[:100], BYTES[1:], BYTES[::-1], [*BYTES, b"aGU= 9999"], [*BYTES, b"aGU= x"], [*BYTES, b"aGU 256"],
    [*BYTES, b"aGU="], [*BYTES, b"aGU= 256", b"aGU= 257"], [*BYTES, b"\xff\xfe 256"]])
def test_a_token_list_of_llama3_that_is_damaged(tmp_path, lines):
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    refused(lambda: load_tokenizer(tmp_path), tmp_path / "tokenizer.model")


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.model")
    refused(lambda: load_tokenizer(tmp_path), tmp_path / "tokenizer.model", "no regular file")


# ---------------------------------------------------------------------------------------------- messages

@pytest.mark.parametrize("text", ["x" * 10 ** 6, "\U000e0001" * 5000, "\n" * 599, "a" * 590 + "\0" * 9])
def test_a_message_is_one_printable_line_of_600_characters_at_most(text):
    line = one_line(f"begin {text} end")
    assert line.isprintable() and len(line) <= 600 and line.startswith("begin ") and line.endswith(" end")
