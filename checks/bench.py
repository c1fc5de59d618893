"""
Benchmarks, as scripts: ratios measured in one run, medians of interleaved rounds. Run them on an idle machine.

    python -m checks.bench sfi             # SFI at three sizes: folded form, printed one, masked global attention
    python -m checks.bench scale           # how the cost grows with image side, MDA layers and batch
    python -m checks.bench loss            # logits where they are needed, in training and prefill, or everywhere

Times are of the module alone, weights and inputs ready. Memory is the peak of the process above weights, inputs and
their gradients (VmHWM), each form in a process of its own.
"""
import pathlib
import statistics
import subprocess
import sys
import time
from functools import partial

import torch

from commands.arguments import Parser, whole
from llama import Llama, LlamaConfig
from sfi import SFI, window_partition

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIDES = (8, 4, 2, 1)
FORMS = ("folded", "printed", "masked")
SIZES = {"paper": (32, 1024), "half": (16, 512), "small": (8, 256)}                # L, C; the LM is four times as wide


def masked_sfi(sfi, queries, maps, hidden):
    """What one writes first: all cells of all scales as keys, and a mask that hides what is not in the window."""
    q = sfi.wq(queries)
    k = torch.cat([wk(x).flatten(1, 2) for wk, x in zip(sfi.wk, maps)], 1)
    v = torch.cat([wv(x).flatten(1, 2) for wv, x in zip(sfi.wv, maps)], 1)
    scores = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
    return sfi.wo(q + scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)


def setup(form, L, C, dtype, B=1):
    """-> (call, leaves): call() runs the form once; leaves are the weights and inputs that get gradients."""
    torch.manual_seed(0)
    sfi = SFI(C, C, 4, 4 * C).to(dtype)
    queries = torch.randn(1, L * L, C).to(dtype)
    maps = [torch.randn(B, L * k, L * k, C).to(dtype) for k in SIDES]
    if form == "masked":
        owner = []
        for k in SIDES:
            y, x = torch.meshgrid(torch.arange(L * k) // k, torch.arange(L * k) // k, indexing="ij")
            owner.append((y * L + x).flatten())
        hidden = torch.cat(owner)[None] != torch.arange(L * L)[:, None]
        inputs, call = maps, lambda: masked_sfi(sfi, queries.expand(B, -1, -1), maps, hidden)
    else:
        inputs = [window_partition(x, L) for x in maps]                            # cut once an image, not once an SFI
        call = {"folded": lambda: sfi(queries, inputs), "printed": lambda: sfi.printed(queries, inputs)}[form]
    leaves = [x.requires_grad_() for x in (queries, *inputs)] + list(sfi.parameters())
    return call, leaves


def run_once(call, leaves, backward):
    if backward:
        for p in leaves:
            p.grad = None
        call().float().square().sum().backward()
    else:
        with torch.no_grad():
            call()


def interleaved(calls, rounds, clock=time.perf_counter):
    """{name: call} -> {name: median seconds}, and the median of each round's ratio to the first name."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()                              # once, not counted
    for _ in range(rounds):
        for name, call in calls.items():
            began = clock()
            call()
            times[name].append(clock() - began)
    first = next(iter(times))
    ratios = {name: statistics.median(t / f for t, f in zip(times[name], times[first])) for name in times}
    return {name: statistics.median(t) for name, t in times.items()}, ratios


def status(key):
    """A line of /proc/self/status, in MB."""
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) / 1024


def peak_memory(work):
    """MB by which work() raises this process's peak (Linux)."""
    open("/proc/self/clear_refs", "w").write("5")                                  # the peak starts again from here
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def memory_of(*args):
    """peak_memory in a fresh process, where no freed memory lies about."""
    command = [sys.executable, "-m", "checks.bench", "memory", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return float(done.stdout) if done.returncode == 0 else float("nan")


def measure_memory(form, size, dtype, backward):
    call, leaves = setup(form, *SIZES[size], getattr(torch, dtype))
    small, small_leaves = setup(form, 2, 16, getattr(torch, dtype))
    run_once(small, small_leaves, backward)                                        # thread pools and libraries are up
    gradients = sum(p.numel() * p.element_size() for p in leaves) / 2 ** 20 if backward else 0
    print(peak_memory(lambda: run_once(call, leaves, backward)) - gradients)


def bench_sfi(rounds, sizes):
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {rounds} interleaved rounds; "
          "x: that form's time over ours")
    print(f"{'size':8}{'dtype':10}{'pass':10}{'form':10}{'ms':>10}{'x':>8}{'extra MB':>10}{'of ours':>9}")
    for size in sizes:
        for dtype in ("float32", "bfloat16"):
            for backward in (False, True):
                compare_forms(rounds, size, dtype, backward)


def compare_forms(rounds, size, dtype, backward):
    """Three lines of bench_sfi's table. The masked form is slow: at the paper's size it has fewer rounds."""
    calls = {}
    for form in FORMS:
        call, leaves = setup(form, *SIZES[size], getattr(torch, dtype))
        calls[form] = partial(run_once, call, leaves, backward)
    few = max(1, rounds // 3) if size == "paper" else rounds
    seconds, ratios = interleaved({form: calls[form] for form in ("folded", "printed")}, rounds)
    slow_seconds, slow_ratios = interleaved({form: calls[form] for form in ("folded", "masked")}, few)
    seconds["masked"], ratios["masked"] = slow_seconds["masked"], slow_ratios["masked"]
    del calls, call, leaves
    memory = {form: memory_of(form, size, dtype, int(backward)) for form in FORMS}
    for form in FORMS:
        print(f"{size:8}{dtype:10}{'fwd+bwd' if backward else 'forward':10}{form:10}{1000 * seconds[form]:10.1f}"
              f"{ratios[form]:8.1f}{memory[form]:10.1f}{memory[form] / memory['folded']:9.1f}", flush=True)


def bench_scale(rounds):
    """The SFI of the image tokens and n more for MDA over one pyramid, C = 1024, float32, forward."""
    def sfis(side, layers, batch):
        L = side // 32
        torch.manual_seed(0)
        modules = [SFI(1024, 1024, 4, 4096) for _ in range(layers + 1)]
        pyramid = [torch.randn(batch, L * L, k * k, 1024) for k in SIDES]
        queries = [torch.randn(1 if i == 0 else batch, L * L, 1024) for i in range(layers + 1)]

        def work():
            with torch.no_grad():
                for module, q in zip(modules, queries):
                    module(q, pyramid)
        return work

    print(f"{'image side':>12}{'MDA layers':>12}{'batch':>8}{'ms':>10}{'ms a token and SFI':>20}")
    cases = [(side, 0, 1) for side in (512, 1024, 1536, 2048)]
    cases += [(1024, n, 1) for n in (2, 4, 8)] + [(1024, 0, b) for b in (2, 4)]
    for side, layers, batch in cases:
        seconds = interleaved({"": sfis(side, layers, batch)}, rounds)[0][""]
        tokens = (side // 32) ** 2 * batch * (layers + 1)
        print(f"{side:12}{layers:12}{batch:8}{1000 * seconds:10.1f}{1000 * seconds / tokens:20.4f}", flush=True)


LOSS = {"loss, at the labels": (True, False), "loss, everywhere": (True, True),
        "prefill, last position": (False, False), "prefill, everywhere": (False, True)}


def loss_work(name):
    """A narrow LM with Llama-3's vocabulary; a prompt of 1,024 image tokens and 76 of text, of which 12 are learned."""
    training, everywhere = LOSS[name]
    torch.manual_seed(0)
    config = LlamaConfig(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=64, vocab_size=128256)
    model = Llama(config).requires_grad_(False)
    x = torch.randn(1, 1100, 64, requires_grad=training)
    at = torch.zeros(1, 1100, dtype=torch.bool)
    at[:, -12 if training else -1:] = True
    target = torch.randint(0, 128256, (12,))

    def work():
        logits = model(x)[at] if everywhere else model(x, at=at)
        if training:
            torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum").backward()
    return work


def bench_loss(rounds):
    """Medians of interleaved rounds, and the peak memory of each in a process of its own."""
    seconds, _ = interleaved({name: loss_work(name) for name in LOSS}, rounds)
    print(f"{'logits':24}{'ms':>10}{'extra MB':>12}")
    for name in LOSS:
        print(f"{name:24}{1000 * seconds[name]:10.1f}{memory_of('loss', name):12.1f}")


def bench(args):
    if args.what == "sfi":
        bench_sfi(args.rounds, args.sizes)
    elif args.what == "scale":
        bench_scale(args.rounds)
    else:
        bench_loss(args.rounds)


def main():
    if sys.argv[1:2] == ["memory"]:         # our own child process
        if sys.argv[2] == "loss":
            return print(peak_memory(loss_work(sys.argv[3])))
        return measure_memory(*sys.argv[2:5], sys.argv[5] == "1")
    parser = Parser(prog="python -m checks.bench", description=__doc__)
    parser.add_argument("what", choices=("sfi", "scale", "loss"))
    parser.add_argument("--rounds", type=whole(1), default=7, help="interleaved; the median is printed (default 7)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="sfi: sizes (default all)")
    parser.run(bench)


if __name__ == "__main__":
    main()
