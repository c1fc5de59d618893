"""
Proves that neither accumulation nor the number of processes changes a gradient, and that a mistake ends a run with one
line, exit code 2 and nothing half-written. What becomes of a run that is cut off: tests/run/test_survival.py.

    pytest tests/run/test_train.py
"""
import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, ROWS, assert_near, command_line
from PIL import Image
from safetensors.torch import load_file
from test_survival import two_processes

import train
from aquila import set_stage
from commands import samples
from data import collate
from toy.scenes import make_records

PLAIN = contextlib.nullcontext()


def one_step(small, lora, batches):
    model = small(lora=lora).train()
    params = list(set_stage(model, 2).values())
    optimizer = torch.optim.SGD(params, lr=0.0)
    loss, norm, _ = train.train_step(model, optimizer, batches, params, 0.01, PLAIN, max_norm=1e9)
    return loss, norm, {k: p.detach().clone() for k, p in model.own_parameters().items()}


def test_accumulation_equals_one_big_batch(small, lora):
    """Answers of very unequal length, one row without an image: four micro-batches against one batch of four."""
    whole = one_step(small, lora, [collate(ROWS)])
    parts = one_step(small, lora, [collate([row]) for row in ROWS])
    assert abs(whole[0] - parts[0]) < 1e-5 and abs(whole[1] - parts[1]) < 1e-4 * whole[1]
    for name, p in whole[2].items():
        far = (p - parts[2][name]).abs().max()
        assert_near("accumulated micro-batches = one batch, weights after a step", far, 1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(small, lora):
    with pytest.raises(ValueError, match="the loss is nan.*a scene"):
        bad = collate(ROWS)
        one_step(small, lora, [{**bad, "images": bad["images"] * float("nan")}])


def test_batches_split_one_stream_among_processes():
    """
    Two processes take what one takes, in every step; every sample once an epoch; a resumed stream goes on; inside a
    step the longer samples come last.
    """
    lengths = [7, 3, 9, 1, 8, 2, 6, 4, 5, 0]

    def of(rank, world, start=0, micro=2):
        return list(samples.Batches(lengths, 4, micro, steps=5, start=start, seed=1, rank=rank, world=world))

    one, two = of(0, 1), [of(r, 2) for r in range(2)]
    assert one == [micro for pair in zip(*two) for micro in pair]
    stream = [i for micro in one for i in micro]
    assert sorted(stream) == sorted([*range(10)] * 2) and set(stream[:8] + stream[8:12]) == set(range(10))
    assert stream[:8] != stream[12:]
    assert of(0, 1, start=3) == one[6:] and len(samples.Batches(lengths, 4, 2, 5, 3, 1, 0, 1)) == 4
    for step in range(5):
        inside = [lengths[i] for i in stream[4 * step:4 * step + 4]]
        assert inside == sorted(inside)
        # Two rounds: who gets the longer of the first gets the shorter of the second.
        dealt = [[lengths[i] for [i] in of(rank, 2, micro=1)[2 * step:2 * step + 2]] for rank in range(2)]
        assert dealt == [[inside[0], inside[3]], [inside[1], inside[2]]]


@pytest.mark.parametrize("n, micro, world", [(1, 1, 1), (7, 2, 1), (3, 1, 2), (5, 2, 2), (16, 4, 2), (1, 8, 4)])
def test_held_back_records_are_shared_out(n, micro, world):
    """Each once, in batches of at most `micro` of like length; every process has as many, no more than needed."""
    lengths = [(7 * i) % 11 for i in range(n)]
    shares = [samples.share_out(lengths, micro, rank, world) for rank in range(world)]
    batches = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert sorted(sum(batches, [])) == list(range(n)) and max(map(len, batches)) <= micro
    assert len(shares[0]) == -(-n // (micro * world))
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)


def test_learning_rate_rises_then_falls_to_zero():
    rates = [train.learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert max(rates) == 2.0 and rates[55] == pytest.approx(1.0, abs=0.01) and 0 < rates[99] < 0.01


def test_the_published_recipe_is_the_papers():
    """Table 2."""
    one, two = train.RECIPES["aquila-8b"][1], train.RECIPES["aquila-8b"][2]
    assert (one.lr, one.decay, one.warmup, one.batch, one.epochs) == (1e-3, 0.05, 0.06, 32, 1)
    assert (two.lr, two.decay, two.warmup, two.batch, two.epochs) == (4e-5, 0.1, 0.03, 32, 1)
    assert (two.lora.rank, two.lora.alpha, two.lora.dropout) == (64, 16, 0.05) and train.BETAS == (0.9, 0.95)


def test_built_in_records_are_of_their_share_of_scenes():
    rows = samples.built_in_records("aquila", 2, 8, 128)
    indices = {kind: [int(row["id"].split("-")[1]) for row in rows if row["id"].endswith(kind)]
               for kind in ("chat", "places", "numbers")}
    assert indices["chat"] == list(range(8, 16)) and indices["numbers"] == list(range(16, 32))
    assert 0 < len(indices["places"]) < 40 and set(indices["places"]) <= set(range(40, 80))
    first = samples.built_in_records("aquila", 1, 8, 128)
    assert {row["id"].split("-")[2] for row in first} == {"c0", "c1", "c2", "c3", "c4", "places"}


# ---------------------------------------------------------------------------------------------- the command

def command(*args):
    """train.py in this process -> (exit code, stderr)"""
    code, _, err = command_line(train.main, *args, "--workers", 0)
    return code, err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Every other record has no image, so that with micro-batches of one some process meets none."""
    rows = make_records("train", 4, "chat", size=128)
    rows += [{"id": f"t{i}",
              "conversations": [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "it " * i}]}
             for i in range(1, 5)]
    path = tmp_path_factory.mktemp("data") / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


VISION = os.path.relpath(ROOT / "weights/tiny-clip.safetensors")


@pytest.fixture(scope="module")
def stage1(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "stage1"
    assert command("--stage", 1, "--data", data, "--out", out, "--batch", 4, "--micro", 2, "--steps", 2,
                   "--vision", VISION) == (0, "")
    return out


STEP2 = ("--stage", 2, "--batch", 4, "--micro", 1, "--lora-dropout", 0, "--lora-rank", 4, "--seed", 3)


def torchrun_two(logs, *flags):
    """train.py under torchrun with two gloo processes -> (exit code, what the two wrote on stderr)"""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
            "--redirects", 2, "--log-dir", logs,               # of the two alone, without torchrun's own lines
            "train.py", *flags, "--workers", 0]
    done = subprocess.run(list(map(str, line)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=150)
    written = sorted(logs.rglob("stderr.log"))
    assert len(written) == 2, done.stderr[-2000:]
    return done.returncode, "".join(file.read_text() for file in written)


def drifted(one, two):
    """How far two checkpoints lie apart, in parts of their length. (Adam makes a step of any single tiny gradient.)"""
    length = lambda tensors: sum(t.square().sum().item() for t in tensors) ** 0.5
    return length(one[k] - two[k] for k in one) / length(one.values())


AS_ONE = "two processes = one, weights after the steps"


def test_two_processes_train_as_one(data, stage1, tmp_path):
    """torchrun, gloo, LoRA dropout 0, two steps: the weights of one process to rounding; no hang without images."""
    flags = ("--init-from", stage1, "--data", data, "--steps", 2)
    assert command(*STEP2, *flags, "--out", tmp_path / "one")[0] == 0
    code, err = torchrun_two(tmp_path / "logs", *STEP2, *flags, "--out", tmp_path / "two")
    assert code == 0, err
    one, two = (load_file(tmp_path / k / "model.safetensors") for k in ("one", "two"))
    start = load_file(stage1 / "model.safetensors")
    assert one.keys() == two.keys() and any(not torch.equal(one[k], start[k]) for k in start)
    assert_near(AS_ONE, drifted(one, two), 1e-4)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / k / "log.jsonl").open()] for k in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_the_three_stages_of_aquila_plus(data, tmp_path):
    """Each starts from the one before; stage 3 by LoRA, and with the LM's own weights, which the checkpoint holds."""
    small = ("--preset", "tiny-plus", "--scenes", 4, "--batch", 4, "--micro", 2, "--steps", 1)
    for stage, start in ((1, ()), (2, ("--init-from", tmp_path / "1")), (3, ("--init-from", tmp_path / "2"))):
        assert command(*small, "--stage", stage, *start, "--out", tmp_path / str(stage)) == (0, "")
    full = ("--init-from", tmp_path / "2", "--full-llm", "--out", tmp_path / "full")
    assert command(*small, "--stage", 3, *full) == (0, "")
    one, two, three, full = (load_file(tmp_path / k / "model.safetensors") for k in ("1", "2", "3", "full"))
    moved = lambda a, b, part: any(not torch.equal(a[k], b[k]) for k in a if k.startswith(part))
    assert moved(one, two, "extractor") and not moved(one, two, "pyramid") and moved(two, three, "pyramid")
    assert any("lora_" in k for k in three) and not any("lora_" in k for k in full) and "llm.embed.weight" in full
    code, out, err = command_line(train.main, *small, "--workers", 0, "--stage", 3, "--init-from", tmp_path / "2",
                                  "--data", data, "--out", tmp_path / "x")
    assert code == 0 and "warning: no gradient has reached extractor; do the records have" in out, err    # no masks


def test_two_processes_one_without_regions(data, tmp_path):
    """Stage 2 of aquila-plus trains the extractor alone; a micro-batch without a region must not stop the other."""
    regions = make_records("train", 3, "region chat", size=128)
    rows = data.read_text().splitlines()[:3] + [json.dumps(record) for record in regions]
    (tmp_path / "mixed.jsonl").write_text("\n".join(rows))
    common = ("--preset", "tiny-plus", "--batch", 2, "--micro", 1, "--steps", 3, "--data", tmp_path / "mixed.jsonl")
    assert command(*common, "--stage", 1, "--out", tmp_path / "start")[0] == 0
    flags = (*common, "--stage", 2, "--init-from", tmp_path / "start")
    assert command(*flags, "--out", tmp_path / "one")[0] == 0
    both = two_processes(tmp_path, *flags, "--out", tmp_path / "two", "--workers", 0)
    assert [process.end() for process in both] == [(0, "")] * 2
    one, two = (load_file(tmp_path / k / "model.safetensors") for k in ("one", "two"))
    assert_near(AS_ONE, drifted(one, two), 1e-4)


def test_the_rows_of_table_5(data, tmp_path):
    """{concat, sfi} x {no MDA, MDA} by flags; stage 2 keeps what stage 1 decided and refuses a flag against it."""
    for integration in ("concat", "sfi"):
        for layers in ("none", "1,3"):
            out = tmp_path / f"{integration}-{layers}"
            flags = ("--data", data, "--batch", 2, "--micro", 2, "--steps", 1)
            assert command("--stage", 1, *flags, "--out", out, "--integration", integration,
                           "--mda-layers", layers) == (0, "")
            names = load_file(out / "model.safetensors")
            assert any(k.startswith("mda.3") for k in names) == (layers != "none")
            assert any("conv" in k for k in names) == (integration == "concat")
    code, err = command("--stage", 2, *flags, "--init-from", out, "--mda-layers", "0", "--out", tmp_path / "x")
    assert code == 2 and "contradicts" in err


def test_a_checkpoint_can_be_read_from_elsewhere_and_by_others(stage1, tmp_path):
    """It holds the whole path of what --vision names, and its files have the rights that files here get."""
    assert json.loads((stage1 / "config.json").read_text())["vision_file"] == os.path.abspath(VISION)
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in (tmp_path / "plain", *stage1.rglob("*")) if path.is_file()} == {
        (tmp_path / "plain").stat().st_mode}


def write_images(folder):
    """whole.png, and cut.png, which is the beginning of it."""
    folder.mkdir()
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:2000])


def broken(tmp_path):
    """Data files and folders, each with one mistake: {name: (flags, what the line must say)}."""
    row = {"id": "7", "image": "a.png",
           "conversations": [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]}
    write_images(tmp_path / "images")
    (tmp_path / "images/text.png").write_text("no image")
    (tmp_path / "file").write_text("")

    def data(name, text):
        (tmp_path / name).write_text(text)
        return ("--data", tmp_path / name, "--images", tmp_path / "images")

    line = lambda **change: json.dumps({**row, **change}) + "\n"
    return {
        "missing data file": (("--data", tmp_path / "none.jsonl"), "none.jsonl is not there"),
        "missing image": (data("1.jsonl", line(image="none.png")), "record 7: image none.png: no such file"),
        "truncated image": (data("2.jsonl", line(image="cut.png")), "record 7: image"),
        "not an image": (data("3.jsonl", line(image="text.png")), "not an image"),
        "JSON cut off": (data("4.jsonl", line(image="whole.png") + line()[:40]), "line 2: not valid JSON"),
        "answer first": (data("5.jsonl", line(conversations=row["conversations"][::-1])), "turns are from"),
        "unknown preset": (("--preset", "huge"), "invalid choice: 'huge'"),
        "stage 2 without stage 1": (("--stage", 2, "--init-from", tmp_path / "nothing"), "give another --init-from"),
        "out cannot be written": (("--out", tmp_path / "file/run", "--scenes", 2), "cannot be written"),
        "batch does not divide": (("--batch", 7, "--micro", 2, "--scenes", 2), "not a multiple"),
        "no third stage": (("--stage", 3), "tiny has the stages 1, 2"),
        "full LM in stage 1": (("--full-llm",), "--full-llm trains the LM's own weights in stage 3"),
        "LoRA in stage 1": (("--lora-rank", 4), "trains no LoRA"),
        "bad layers": (("--mda-layers", "a"), "expected 'none' or numbers"),
        "layers out of range": (("--mda-layers", "99", "--scenes", 2), "the LM has layers"),
        "missing vision file": (("--vision", tmp_path / "v.safetensors", "--scenes", 2), "v.safetensors"),
        "missing llm": (("--llm", tmp_path / "llm", "--scenes", 2), "llm"),
    }


@pytest.mark.parametrize("mistake", [
    "missing data file", "missing image", "truncated image", "not an image", "JSON cut off", "answer first",
    "unknown preset", "stage 2 without stage 1", "out cannot be written", "batch does not divide", "LoRA in stage 1",
    "no third stage", "full LM in stage 1", "bad layers", "layers out of range", "missing vision file", "missing llm"])
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, mistake):
    flags, expected = broken(tmp_path)[mistake]
    out = tmp_path / "out"
    stage = () if "--stage" in flags else ("--stage", 1)
    small = () if "--batch" in flags else ("--batch", 1, "--micro", 1)
    code, err = command(*stage, *small, "--out", out, "--steps", 2, *flags)
    assert code == 2 and err.count("\n") == 1 and expected in err, err
    assert not out.exists() or os.listdir(out) == ["run.lock"]


def test_torchrun_ends_with_our_line(tmp_path):
    """Two processes: the first one says it, torchrun's report ends with it, and nothing else of ours is written."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py",
            "--stage", "1", "--batch", "0", "--out", str(tmp_path / "out")]
    done = subprocess.run(line, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    said = [text for text in done.stderr.splitlines() if "train.py: " in text]
    ours = "train.py: argument --batch: 0: expected a whole number from 1 to 1,000,000"
    assert done.returncode != 0 and said[0] == ours and said[-1] == f"  traceback : {ours}", done.stderr
    assert said.count(ours) == 1 and not (tmp_path / "out").exists()
    assert done.stderr.splitlines()[-2:] == [said[-1], "=" * 60]


def test_parts_without_a_gradient_are_said(data, tmp_path):
    """Text alone trains nothing of what reads the image: said after the first step, and at the end."""
    text = [line for line in data.read_text().splitlines() if '"image"' not in line]
    (tmp_path / "text.jsonl").write_text("\n".join(text))
    small = ("--workers", 0, "--batch", 4, "--micro", 2, "--steps", 1)
    code, out, err = command_line(train.main, *small, "--stage", 1, "--data", tmp_path / "text.jsonl",
                                  "--out", tmp_path / "text")
    assert code == 0 and "4 samples (4 of them without an image)" in out, err
    assert out.count("warning: no gradient has reached mda, pyramid, tokens; do the records have images") == 2
    code, out, err = command_line(train.main, *small, "--stage", 1, "--data", data, "--out", tmp_path / "mixed")
    assert code == 0 and "8 samples (4 of them without an image)" in out and "warning" not in out, err


def test_a_mistake_of_the_second_process_is_one_line(tmp_path):
    """Of the two records of a step the longer one goes to the second process; its image is cut off."""
    write_images(tmp_path / "images")
    with (tmp_path / "data.jsonl").open("w") as file:
        for name, answer in (("whole", "short"), ("cut", "a longer answer")):
            turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": f"the {name} one", "image": f"{name}.png", "conversations": turns}) + "\n")
    code, err = torchrun_two(tmp_path / "logs", "--stage", 1, "--data", tmp_path / "data.jsonl", "--images",
                             tmp_path / "images", "--batch", 2, "--micro", 1, "--steps", 1, "--out", tmp_path / "out")
    said = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert code != 0 and len(said) == 1 and said[0].startswith("train.py: record the cut one: image"), err
    assert "Traceback" not in err and os.listdir(tmp_path / "out") == ["run.lock"]
