"""
Our parts against the published code in speed: same weights, same threads, interleaved, medians. On an idle machine, in
the environment of tests/requirements-peers.txt.

    python -m checks.bench_peers convnext               # ConvNeXt-Large at 512 pixels, timm in its faster memory format
    python -m checks.bench_peers prefill                # a Llama of 0.5 B, prompts of 1,100 tokens, transformers
    python -m checks.bench_peers decode DIR             # greedy decoding, bfloat16, of a Hugging Face model in DIR;
                                                        # "compiled" is evaluate.py's --compile, warmed up before

Prints milliseconds and the peer's time over ours (above 1: ours is faster).
"""
import tempfile

import torch

from checks.bench import interleaved
from commands.arguments import Parser, whole
from convnext import CONVNEXTS, ConvNeXt
from fast_decoding import compile_decoding, fastest_step
from llama import Llama, LlamaConfig, generate, load_llama, save_llama
from tokenizer import load_tokenizer


def report(what, times, ratios):
    for name in times:
        print(f"{what:24}{name:28}{1000 * times[name]:10.1f} ms{ratios[name]:8.2f}x", flush=True)


@torch.inference_mode()
def bench_convnext(rounds, dtype):
    import timm
    ours = ConvNeXt(CONVNEXTS["large"]).eval().to(dtype)
    plain = timm.create_model("convnext_large", features_only=True).eval().to(dtype)
    last = timm.create_model("convnext_large", features_only=True).eval().to(dtype, memory_format=torch.channels_last)
    x = torch.randn(1, 3, 512, 512).to(dtype)
    calls = {"ours": lambda: ours(x),
             "timm, channels_last": lambda: last(x.contiguous(memory_format=torch.channels_last)),
             "timm, contiguous": lambda: plain(x)}
    report(f"convnext {str(dtype)[6:]}", *interleaved(calls, rounds))


@torch.inference_mode()
def bench_prefill(rounds, dtype):
    import transformers
    config = LlamaConfig(dim=1536, n_layers=12, n_heads=24, n_kv_heads=8, ffn_dim=5376, vocab_size=32000, head_dim=64)
    torch.manual_seed(0)
    ours = Llama(config).eval().to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_llama(ours, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.randint(0, 32000, (1, 1100))
    at = torch.zeros(1, 1100, dtype=torch.bool)
    at[:, -1] = True
    assert torch.allclose(ours(ids, at=at).float(), theirs(ids, logits_to_keep=1).logits[:, -1].float(), atol=0.1)
    calls = {"ours": lambda: ours(ids, at=at),
             "transformers": lambda: theirs(ids, logits_to_keep=1, use_cache=True)}
    report(f"prefill {str(dtype)[6:]}", *interleaved(calls, rounds))


@torch.inference_mode()
def bench_decode(rounds, folder, n=64):
    """Seconds of n tokens after a short prompt, prompt and its prefill included."""
    if folder is None:
        raise ValueError("decode needs the folder of a Hugging Face model")
    import transformers
    ours, tokenizer = load_llama(folder, dtype=torch.bfloat16), load_tokenizer(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    compiled = load_llama(folder, dtype=torch.bfloat16)
    compile_decoding(compiled)
    ids = torch.tensor([tokenizer.encode("Once upon a time, in a harbor far away,")])

    def answer(model):
        x = model.embed(ids)
        return [int(i) for i in generate(model, x, max_new_tokens=n, next_logits=fastest_step(model, x))]

    calls = {"ours": lambda: answer(ours), "ours, compiled": lambda: answer(compiled),
             "transformers": lambda: theirs.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False,
                                                     pad_token_id=0)}
    times, ratios = interleaved(calls, rounds)
    report("decode bfloat16", times, ratios)
    print(", ".join(f"{name} {n / t:.1f} tokens/s" for name, t in times.items()))
    print(f"transformers over ours, compiled: {ratios['transformers'] / ratios['ours, compiled']:.2f}x")


def bench(args):
    if args.what == "decode":
        return bench_decode(args.rounds, args.folder)
    bench_it = bench_convnext if args.what == "convnext" else bench_prefill
    for dtype in (torch.float32, torch.bfloat16):
        bench_it(args.rounds, dtype)


def main():
    parser = Parser(prog="python -m checks.bench_peers", description=__doc__)
    parser.add_argument("what", choices=("convnext", "prefill", "decode"))
    parser.add_argument("folder", nargs="?", help="decode: a Hugging Face folder")
    parser.add_argument("--rounds", type=whole(1), default=7, help="interleaved rounds (default 7)")
    parser.run(bench)


if __name__ == "__main__":
    main()
