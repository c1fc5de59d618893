"""
Our parts against the published code in speed: same weights, same threads, interleaved, medians. On an idle machine, in
the environment of tests/requirements-peers.txt.

    python -m checks.bench_peers convnext               # ConvNeXt-Large at 512 pixels, timm in its faster memory format
    python -m checks.bench_peers prefill                # a Llama of 0.5 B, prompts of 1,100 tokens, transformers
    python -m checks.bench_peers step                   # a training step of stage 2, of Aquila and of the same model
                                                        # put together from timm, transformers and peft; float32
    python -m checks.bench_peers decode DIR             # greedy decoding, bfloat16, of a Hugging Face model in DIR;
                                                        # "compiled" is evaluate.py's --compile, warmed up before

Prints milliseconds and the peer's time over ours (above 1: ours is faster).
"""
import copy
import ctypes
import dataclasses
import gc
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

from aquila import PRESETS, Aquila, LoRAConfig, set_stage
from checks.bench import ROOT, interleaved, peak_memory
from commands.arguments import Parser, whole
from convnext import CONVNEXTS, ConvNeXt
from data import collate
from fast_decoding import compile_decoding, fastest_step
from llama import Llama, LlamaConfig, generate, load_llama, save_llama, save_lora
from tokenizer import IGNORE, IMAGE_SLOT, load_tokenizer


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


# ---------------------------------------------------------------------------------------------- a training step

class PutTogether(torch.nn.Module):
    """Aquila of published parts: timm's ConvNeXt, transformers' Llama with peft's LoRA; SFI as printed, as MDA too."""

    def __init__(self, ours):
        super().__init__()
        import peft
        import timm
        import transformers
        self.vision = timm.create_model("convnext_large", features_only=True).requires_grad_(False).eval()
        timm_names = {k.replace("stages.", "stages_").replace("stem.", "stem_"): v
                      for k, v in ours.vision.state_dict().items()}
        self.vision.load_state_dict(timm_names)
        with tempfile.TemporaryDirectory() as folder:
            plain = Llama(ours.config.llm)
            plain.load_state_dict({k: v for k, v in ours.llm.state_dict().items() if "lora" not in k})
            save_llama(plain, folder)
            save_lora(ours.llm, folder)
            llm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self.llm = peft.PeftModel.from_pretrained(llm, folder, is_trainable=True)
        self.pyramid, self.tokens, self.mda = (copy.deepcopy(part) for part in (ours.pyramid, ours.tokens, ours.mda))
        layers = self.llm.base_model.model.model.layers
        for i, mda in self.mda.items():
            layers[int(i)].register_forward_pre_hook(lambda _, args, mda=mda: (self.inject(args[0], mda), *args[1:]))

    def inject(self, x, mda):
        hidden = x[self.slots].view(len(self.windows[0]), -1, x.shape[-1])
        hidden = hidden + mda.sfi.printed(mda.norm(hidden), self.windows)
        return x.masked_scatter(self.slots[..., None], hidden)

    def forward(self, batch):
        ids, self.slots = batch["ids"], batch["ids"] == IMAGE_SLOT
        with torch.no_grad():
            maps = self.vision(batch["images"])
        self.windows, grid = self.pyramid(maps)
        tokens = self.tokens.sfi.printed(self.tokens.norm(self.tokens.grid_queries(grid)), self.windows)
        x = self.llm.get_input_embeddings()(ids.clamp(min=0)).masked_scatter(self.slots[..., None], tokens)
        logits = self.llm(inputs_embeds=x, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE,
                               reduction="sum")


def step_setup(which, dropout=0.0):
    """-> {"ours", "theirs": call}; a call is one training step on two rows of an image and 64 tokens of text."""
    torch.manual_seed(0)
    llm = LlamaConfig(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_dim=1536, vocab_size=49152, tied=True)
    config = dataclasses.replace(PRESETS["aquila-8b"], vision=CONVNEXTS["large"], llm=llm, image_size=512, dim=512,
                                 mda_layers=(0, 8, 16, 24), lora=LoRAConfig(rank=64, alpha=16, dropout=dropout))
    ours = Aquila(config)
    for p in ours.parameters():
        if p.requires_grad and not p.any():                    # what starts at zero would hide a difference
            torch.nn.init.normal_(p, std=0.01)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 49152, (64,), generator=generator).tolist()
    rows = [{"id": "", "ids": [IMAGE_SLOT] * 256 + text, "labels": [IGNORE] * 300 + text[44:],
             "images": torch.randn(1, 3, 512, 512, generator=generator)} for _ in range(2)]
    batch, models = collate(rows), {}
    if which != "ours":
        models["theirs"] = PutTogether(ours).train()
        models["theirs"].vision.eval()
    if which != "theirs":
        set_stage(ours, 2)
        models = {"ours": ours.train(), **models}
        ours.vision.eval()
    return {name: lambda model=model: one_step(model, batch) for name, model in models.items()}


def one_step(model, batch):
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.0)
    loss = model(batch)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), norm


def bench_step(rounds, which):
    """Processor time of both in one process, interleaved; the peak of memory above the weights, each in its own."""
    if which:
        call = step_setup(which)[which]
        one_step(torch.nn.Linear(1, 1), torch.ones(1))         # what a step imports is there
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)                       # what building the model has freed is not in the way
        return print(peak_memory(call))
    calls = step_setup("both")
    results = {name: call() for name, call in calls.items()}
    print("loss and norm of the gradient:", results, flush=True)
    if not torch.allclose(*map(torch.tensor, results.values()), rtol=1e-3):
        raise ValueError("the two models do not compute the same")
    times, ratios = interleaved(calls, rounds, time.process_time)
    report("training step", times, ratios)
    for name in calls:
        command = [sys.executable, "-m", "checks.bench_peers", "step", name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        print(f"{name:10} {float(done.stdout):8.0f} MB above the weights", flush=True)


def bench(args):
    if args.what == "step":
        return bench_step(args.rounds, args.folder)
    if args.what == "decode":
        return bench_decode(args.rounds, args.folder)
    bench_it = bench_convnext if args.what == "convnext" else bench_prefill
    for dtype in (torch.float32, torch.bfloat16):
        bench_it(args.rounds, dtype)


def main():
    parser = Parser(prog="python -m checks.bench_peers", description=__doc__)
    parser.add_argument("what", choices=("convnext", "prefill", "step", "decode"))
    parser.add_argument("folder", nargs="?", help="decode: a Hugging Face folder; step: ours or theirs, for "
                        "its memory alone")
    parser.add_argument("--rounds", type=whole(1), default=7, help="interleaved rounds (default 7)")
    parser.run(bench)


if __name__ == "__main__":
    main()
