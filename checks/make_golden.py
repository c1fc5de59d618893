"""
Make the golden files: inputs, weights and outputs of small random peers, for the tests that run without the peers.

Runs in the peers' environment and imports nothing of ours, so that a golden file cannot repeat our own mistake:
    pip install -r tests/requirements-peers.txt && python -m checks.make_golden
Every parameter is random, norms and layer scales too, so that no block is close to the identity.
"""
import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent.parent / "tests/golden"


@torch.no_grad()
def randomize(model):
    for name, p in model.named_parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 1
        p.normal_(std=fan_in ** -0.5)
        if "norm" in name and name.endswith("weight"):
            p.add_(1)
        # What writes to the residual stream is kept small: only in a small stream does the norms' epsilon show.
        if "stem" in name or name.endswith(("gamma", "conv_dw.bias")) or "downsample.1" in name:
            p.mul_(0.02)
        p.copy_(p.half())                   # exact in float16, which is what is stored


def convnext():
    """An open_clip model with its text tower, and all four maps of its trunk for both epsilons in use."""
    import open_clip
    import timm

    @timm.models.register_model
    def golden_convnext(**options):
        return timm.models.convnext_large(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), **options)

    torch.manual_seed(0)
    vision = dict(timm_model_name="golden_convnext", timm_pool="", timm_proj="linear", image_size=64)
    text = dict(context_length=4, vocab_size=8, width=8, heads=1, layers=1)
    clip = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).eval()
    randomize(clip)
    weights = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    save_file(weights, GOLDEN / "convnext.safetensors")

    images = torch.randn(1, 3, 96, 64).half()
    out = {"images": images}
    for eps in (1e-6, 1e-5):
        trunk = golden_convnext(norm_eps=eps, num_classes=0).eval()
        names = {name: f"visual.trunk.{name}" for name in trunk.state_dict()}
        trunk.load_state_dict({name: clip.state_dict()[theirs] for name, theirs in names.items()})
        with torch.no_grad():
            x = trunk.stem(images.float())
            for s, stage in enumerate(trunk.stages):
                x = stage(x)
                out[f"eps{eps:.0e}.map{s}"] = x.contiguous()
    save_file(out, GOLDEN / "convnext_maps.safetensors")


LLAMAS = {
    "gqa": dict(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=6,
        intermediate_size=20, rms_norm_eps=1e-5, tie_word_embeddings=False, max_position_embeddings=256,
        rope_parameters=dict(rope_type="llama3", rope_theta=1000.0, factor=4.0, low_freq_factor=1.0,
                             high_freq_factor=4.0, original_max_position_embeddings=96)),
    "mha": dict(
        vocab_size=36, hidden_size=20, num_hidden_layers=2, num_attention_heads=5, intermediate_size=28,
        rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=500.0)),
}


def llama():
    """Two transformers models, their config.json, and their logits; for the first also with a LoRA made by peft."""
    import peft
    import transformers
    torch.manual_seed(1)
    out = {}
    for name, options in LLAMAS.items():
        config = transformers.LlamaConfig(**options, bos_token_id=None, eos_token_id=None)
        model = transformers.LlamaForCausalLM(config).eval()
        randomize(model)
        model.model.embed_tokens.weight.data.mul_(0.03125)        # a power of two: exact in float16
        save_file({k: p.half() for k, p in model.named_parameters()}, GOLDEN / f"llama_{name}.safetensors")
        (GOLDEN / f"llama_{name}.json").write_text(config.to_json_string(use_diff=False))
        out[f"{name}.ids"] = torch.randint(config.vocab_size, (2, 48))
        with torch.no_grad():
            out[f"{name}.logits"] = model(out[f"{name}.ids"]).logits
        if name == "gqa":
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            lora_config = peft.LoraConfig(r=3, lora_alpha=8, lora_dropout=0.1, target_modules=targets)
            model = peft.get_peft_model(model, lora_config).eval()
            lora = {k: p for k, p in model.named_parameters() if "lora_" in k}
            with torch.no_grad():
                for p in lora.values():
                    p.normal_(std=0.15)
                out["lora.logits"] = model(out["gqa.ids"]).logits
            model.save_pretrained(GOLDEN / "lora")
            (GOLDEN / "lora" / "README.md").unlink()
    save_file(out, GOLDEN / "llama_logits.safetensors")


AWKWARD = [
    "", " ", "   ", "Hello, world!", " leading space", "trailing space ", "two  spaces   three", "\ttab\t\ttabs",
    "line\nline\n\n\nline\r\n", "It's we'll I'VE they'd don't", "'s 's'S", "naïve café Ångström",
    "e\u0301 combining, n\u0303", "日本語の文章 中文 한국어", "Привет, мир", "שלום עולם مرحبا", "😀 👩‍👩‍👧‍👦 🇩🇪",
    "1234567890 3.14159 1,000,000", "x² ½ Ⅷ ٣", " 7  8   9", "year 2024: 15 ships", "snake_case CamelCase kebab-case",
    "a\u00a0b\u2003c\u200bd", "<s> </s> <unk> <0x0A>", "<|begin_of_text|><|eot_id|><|im_end|><|endoftext|>",
    "<image> <region1> [INST]", "!?;:...---***", "\x00\x04\x1c\x7f control", "\U000f0000 \ue000 private", "a" * 2000,
    " " * 2000, "ab " * 300, "\n" * 500, "!" * 500, "é" * 300, "7" * 300, "def f(x):\n    return x  # code",
]
CORPUS = [
    "The image shows an airport with two runways, a terminal and several airplanes parked beside it.",
    "There are 12 ships in the harbor; it's calm, and we'll count 345 containers on the pier.",
    "Dense residential area: houses, trees, roads. Some buildings are near a river with a bridge.",
    "Eine naïve Beschreibung: le café est près de l'église. Ångström, señor, 日本 and Привет.",
    "How many airplanes are there? There are 7 airplanes.\n\nWhat is the color of the roof? It's red.\tdone",
]


def byte_level():
    """Two byte-level BPE tokenizers as tokenizer.json, and how Hugging Face's tokenizers encodes awkward texts."""
    import tokenizers
    pre = tokenizers.pre_tokenizers
    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    kinds = {
        # As SmolLM2's: digits first, then GPT-2's split; of control and other bytes only those in the corpus are there.
        "digits": (pre.Sequence([pre.Digits(True), pre.ByteLevel(add_prefix_space=False)]), map(chr, range(33, 127))),
        # As Llama-3's: all bytes, ids not in the order of the merges, and tokens to which no merge leads.
        "split": (pre.Sequence([pre.Split(tokenizers.Regex(llama3), "isolated"),
                                pre.ByteLevel(False, use_regex=False)]), pre.ByteLevel.alphabet()),
    }
    encoded = {"texts": AWKWARD + CORPUS}
    for name, (pre_tokenizer, alphabet) in kinds.items():
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, tokenizers.decoders.ByteLevel()
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        alphabet = sorted(alphabet)
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=len(alphabet) + 250, initial_alphabet=alphabet,
                                                 special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(CORPUS * 2, trainer)
        t = json.loads(tokenizer.to_str())
        if name == "split":
            vocab = t["model"]["vocab"]
            first, n = len(special), len(vocab) - len(special)
            vocab = {token: i if i < first else first + (i * 101) % n for token, i in vocab.items()}
            whole = ["ĠHello", "code", "ĊĊĊ"]
            t["model"]["vocab"] = vocab | {token: len(vocab) + i for i, token in enumerate(whole)}
            t["model"]["ignore_merges"] = True
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(t))
        (GOLDEN / f"tokenizer_{name}.json").write_text(json.dumps(t, ensure_ascii=False), encoding="utf-8")
        tokenizer.encode_special_tokens = True             # text stays text
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in encoded["texts"]]
        encoded[name] = ids
        encoded[f"{name}.decoded"] = [tokenizer.decode(i) for i in ids]
    (GOLDEN / "tokenizer_ids.json").write_text(json.dumps(encoded), encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    GOLDEN.mkdir(exist_ok=True)
    convnext()
    llama()
    byte_level()
    for path in sorted(GOLDEN.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
