"""
What the tests share: two threads, a small random Aquila with rows for it, and the claims.

A claim is an equality with a formulation that is published or independent. `assert_near` and `assert_same` check one;
what this run measured stands as a table at its end.
"""
import contextlib
import dataclasses
import io
import pathlib

import pytest
import torch

from aquila import PRESETS, Aquila, LoRAConfig
from convnext import ConvNeXtConfig
from llama import LlamaConfig
from tokenizer import IGNORE, IMAGE_SLOT

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"              # made from the published implementations by checks/make_golden.py
torch.set_num_threads(2)


# ---------------------------------------------------------------------------------------------- a small model

SMALL = dataclasses.replace(
    PRESETS["tiny"], vision=ConvNeXtConfig((1, 1, 1, 1), (8, 12, 16, 24)), image_size=64, dim=16,
    mda_layers=(0, 2),
    llm=LlamaConfig(dim=24, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=40, vocab_size=264, head_dim=8))


class ByteTokenizer:
    """Text as its UTF-8 bytes, ids 0-255, and a few specials behind them: the smallest tokenizer, for tests."""
    adds_space = False
    SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                "<s>", "</s>")

    def __init__(self):
        self.special = {name: 256 + i for i, name in enumerate(self.SPECIALS)}
        self.bos_id = self.special["<|begin_of_text|>"]
        self.stop_ids = {self.special[name] for name in ("<|end_of_text|>", "<|eot_id|>", "</s>")}

    def encode(self, text):
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


@torch.no_grad()
def randomize(model, seed=0):
    """Every parameter random, MDA's returns and the layer scales too, so that no path is shut."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.3 if p.dim() > 1 else 0.1))
        if "norm" in name and name.endswith("weight"):
            p.add_(1)
    return model


@pytest.fixture
def small():
    """make(**changes of the config) -> a random Aquila in eval mode; its images are 64 pixels, 2x2 tokens."""
    def make(dtype=torch.float32, **changes):
        return randomize(Aquila(dataclasses.replace(SMALL, **changes)).to(dtype)).eval()
    return make


@pytest.fixture
def lora():
    return LoRAConfig(rank=4, alpha=8, dropout=0.0)


def prompt(text, images=0, seed=0, answer=""):
    """A row as data.Records makes it: image slots first, then the bytes of text; the answer is learned."""
    ids = [256] + [IMAGE_SLOT] * (SMALL.tokens_per_image * images) + list(text.encode()) + list(answer.encode())
    labels = [IGNORE] * (len(ids) - len(answer)) + list(answer.encode())
    pixels = torch.randn(images, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return {"id": text, "ids": ids, "labels": labels, "images": pixels}


ROWS = [prompt("a scene", 1, 1, "two ships"), prompt("just text, no image at all", 0, 2, "yes"),
        prompt("?", 2, 3, "x"), prompt("another scene with a longer question", 1, 4, "on grass")]


# ---------------------------------------------------------------------------------------------- how tests look

def difference(ours, theirs):
    """The largest difference of two tensors, in parts of the largest value of theirs."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def one_line(error):
    """Whether the message of what pytest.raises caught is one line."""
    return "\n" not in str(error.value)


def command_line(main, *args):
    """A command in this process, for starting one takes seconds. -> (exit code, stdout, stderr)"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{main.__module__}.py", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


# ---------------------------------------------------------------------------------------------- claims

LARGEST = {}                                # what is claimed: the largest difference that this run measured
EQUAL = {}                                  # what is claimed: how many items were equal


def assert_near(text, measured, limit):
    """Assert measured <= limit; the table tells the largest measured."""
    measured = float(measured)
    LARGEST[text] = max(LARGEST.get(text, 0.0), measured)
    assert measured <= limit, f"{text}: the difference is {measured:.1e}, at most {limit:g} was expected"


def assert_same(text, ours, theirs):
    """Assert that two lists are equal; the table tells how many items were compared."""
    assert ours == theirs, text
    EQUAL[text] = EQUAL.get(text, 0) + len(ours)


def pytest_terminal_summary(terminalreporter):
    rows = [(text, f"largest difference {value:.0e}" if value else "no difference") for text, value in LARGEST.items()]
    rows += [(text, f"all {n:,} equal") for text, n in EQUAL.items()]
    if rows:
        terminalreporter.section("claims, as measured in this run")
        width = max(len(text) for text, _ in rows)
        for text, found in rows:
            terminalreporter.line(f"{text:{width}}   {found}")
