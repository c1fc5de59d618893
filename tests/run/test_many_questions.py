"""
Proves that an evaluation of many questions loses nothing and repeats nothing: cut off anywhere it goes on where it was
and writes the same bytes, in one process or two; what cannot be gone on with, or written, is refused in one line; an
image is read and encoded once for all its questions.

    pytest tests/run/test_many_questions.py
"""
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command_line
from PIL import Image

import commands.progress
import evaluate
from aquila import PRESETS, Aquila, LoRAConfig, build, save_model
from convnext import ConvNeXt
from lora import lora_layers

N = 22                                      # records: not a multiple of a slice
FLAGS = ("--max-new-tokens", 4, "--batch", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random checkpoint with LoRA over the committed tiny parts, 3 images and their questions, and the answers."""
    folder = tmp_path_factory.mktemp("questions")
    torch.manual_seed(0)
    model = build(PRESETS["tiny"].__class__(**{**vars(PRESETS["tiny"]), "lora": LoRAConfig(4, 8, 0.0)}))
    with torch.no_grad():
        for p in model.own_parameters().values():
            p.add_(0.1 * torch.randn(p.shape))
    save_model(model, folder / "model")
    for i in range(3):
        Image.effect_noise((64, 64), 60 + i).save(folder / f"{i}.png")
    turns = [[{"from": "human", "value": f"<image>\nIs it {'very ' * (i % 5)}\u8239?"}, {"from": "gpt", "value": "no"}]
             for i in range(N)]
    records = [{"id": str(i), "image": f"{i // 8}.png", "conversations": turns[i]} for i in range(N)]
    (folder / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    code, out, err = evaluate_in(folder, "--out", folder / "whole.jsonl")
    assert code == 0 and not (folder / "whole.jsonl.partial").exists(), err
    (folder / "printed.txt").write_text(out)
    return folder


def evaluate_in(folder, *flags):
    return command_line(evaluate.main, "--model", folder / "model", "--data", folder / "d.jsonl", "--images", folder,
                        *FLAGS, *flags)


class Killed(BaseException):
    pass


@pytest.fixture
def killed_after(monkeypatch):
    """killed_after(n): the process ends when n slices have been asked; [names] of all that are asked from then on."""
    asked, answer = [], Aquila.answer

    def limit(n):
        asked.clear()

        def answer_or_die(self, batch, *rest, **options):
            if len(asked) == n:
                raise Killed
            asked.append(batch["names"])
            return answer(self, batch, *rest, **options)

        monkeypatch.setattr(Aquila, "answer", answer_or_die)
        return asked
    return limit


@pytest.mark.parametrize("cut", [0, -1, -9, -200, 40, 1])
def test_a_killed_evaluation_goes_on_where_it_was(folder, tmp_path, killed_after, cut):
    """After 3 of 6 slices; then with a file of which the end, or all but some bytes, did not reach the disk."""
    killed_after(3)
    with pytest.raises(Killed):
        evaluate_in(folder, "--out", tmp_path / "p.jsonl")
    partial, whole = tmp_path / "p.jsonl.partial", (folder / "whole.jsonl").read_bytes()
    content = partial.read_bytes()
    assert content.partition(b"\n")[2] == b"".join(whole.splitlines(True)[:12])
    partial.write_bytes(content[:cut] if cut else content)
    rows = max(partial.read_bytes().count(b"\n") - 1, 0)
    asked = killed_after(-1)
    code, out, err = evaluate_in(folder, "--out", tmp_path / "p.jsonl")
    assert code == 0 and (tmp_path / "p.jsonl").read_bytes() == whole and not partial.exists(), err
    assert sum(map(len, asked)) == N - rows // 4 * 4                               # the slice that was cut, once more


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_and_loses_nothing(folder, tmp_path, monkeypatch, number):
    answer, asked = Aquila.answer, []

    def answer_then_signal(self, batch, *rest, **options):
        asked.append(batch["names"])
        if len(asked) == 3:
            os.kill(os.getpid(), number)
        return answer(self, batch, *rest, **options)

    monkeypatch.setattr(Aquila, "answer", answer_then_signal)
    code, out, err = evaluate_in(folder, "--out", tmp_path / "p.jsonl")
    assert code == 128 + number and err == f"evaluate.py: ended by {number.name}\n"
    assert (tmp_path / "p.jsonl.partial").read_text().count("\n") == 1 + 2 * 4
    assert evaluate_in(folder, "--out", tmp_path / "p.jsonl")[0] == 0
    assert (tmp_path / "p.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


def test_all_columns_are_gone_on_with(folder, tmp_path, killed_after):
    flags = ("--out", tmp_path / "p.jsonl", "--compare")
    code, whole, err = evaluate_in(folder, *flags)
    assert code == 0, err
    killed_after(6 + 6 + 2)                 # in the third column, two slices of six
    with pytest.raises(Killed):
        evaluate_in(folder, *flags)
    assert (tmp_path / "p.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    asked = killed_after(-1)
    code, out, err = evaluate_in(folder, *flags)
    assert code == 0 and out == whole and len(asked) == 4, err


@pytest.fixture
def cut_off(folder, tmp_path, killed_after, monkeypatch):
    """The --out of an evaluation of which the first slice was asked."""
    killed_after(1)
    with pytest.raises(Killed):
        evaluate_in(folder, "--out", tmp_path / "p.jsonl")
    killed_after(-1)
    return tmp_path / "p.jsonl"


@pytest.mark.parametrize("flags, message", [
    (("--batch", 8), "batch 4, now it is 8"), (("--max-new-tokens", 5), "max-new-tokens 4, now it is 5"),
    (("--blind",), "blind False, now it is True"), (("--no-mda",), "MDA layers 4, now it is 0"),
    (("--dtype", "bfloat16"), "dtype float32, now it is bfloat16"), (("--limit", 20), "records "),
    (("--images", ROOT / "weights"), "images ")])
def test_other_answers_are_not_gone_on_with(folder, cut_off, flags, message):
    before = os.listdir(cut_off.parent), (cut_off.parent / "p.jsonl.partial").read_bytes()
    code, out, err = evaluate_in(folder, "--out", cut_off, *flags)
    assert code == 2 and f"p.jsonl.partial was begun with {message}" in err and "--overwrite" in err
    assert err.count("\n") == 1 and len(err) < 600
    assert before == (os.listdir(cut_off.parent), (cut_off.parent / "p.jsonl.partial").read_bytes())


def test_overwrite_asks_all_anew(folder, cut_off, killed_after):
    asked = killed_after(-1)
    code, out, err = evaluate_in(folder, "--out", cut_off, "--overwrite", "--batch", 8)
    assert code == 0 and len(asked) == 3 and len(cut_off.read_text().splitlines()) == N, err


@pytest.mark.parametrize("content", [b"x\n", b"[]\n", b'{"prediction": "x"}\n', b'{"settings": 3}\n', b"\xff\n"])
def test_a_file_that_is_no_partial_file_is_refused(folder, tmp_path, content):
    (tmp_path / "p.jsonl.partial").write_bytes(content)
    code, out, err = evaluate_in(folder, "--out", tmp_path / "p.jsonl")
    assert code == 2 and "p.jsonl.partial" in err and err.count("\n") == 1
    assert (tmp_path / "p.jsonl.partial").read_bytes() == content and not (tmp_path / "p.jsonl").exists()


def test_a_full_disk_is_one_line_and_loses_nothing(folder, tmp_path):
    """No file may grow beyond 1500 bytes here, which is within a row."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        code, out, err = evaluate_in(folder, "--out", tmp_path / "p.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and "p.jsonl.partial cannot be written: File too large" in err and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["p.jsonl.partial"] and (tmp_path / "p.jsonl.partial").stat().st_size == 1500
    code, out, err = evaluate_in(folder, "--out", tmp_path / "p.jsonl")
    assert code == 0 and (tmp_path / "p.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes(), err


@pytest.mark.parametrize("out, message", [("folder", "is no regular file"), ("file/p.jsonl", "cannot be written"),
                                          ("/proc/p.jsonl", "/proc/p.jsonl cannot be written")])
def test_what_cannot_be_written_is_refused_before_the_model_loads(folder, tmp_path, monkeypatch, out, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate, "load_model", None)
    code, _, err = evaluate_in(folder, "--out", tmp_path / out)
    assert code == 2 and message in err and err.count("\n") == 1 and sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_two_evaluations_do_not_write_one_file(folder, tmp_path):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "p.jsonl.partial"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        code, out, err = evaluate_in(folder, "--out", tmp_path / "p.jsonl")
        other.communicate(b"\n")
    assert code == 2 and "p.jsonl.partial: another evaluation is writing it" in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------- two processes

def torchrun(logs, *flags):
    """evaluate.py in two processes -> (exit code, stdout, what they wrote on stderr without torchrun's own lines)"""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--redirects", 2,
            "--log-dir", logs, "evaluate.py", *FLAGS, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, line)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=150)
    return done.returncode, done.stdout, "".join(path.read_text() for path in sorted(logs.rglob("stderr.log")))


def test_two_processes_write_what_one_does(folder, cut_off, tmp_path):
    """They go on with a file of one process; what is printed is printed once."""
    code, out, err = torchrun(tmp_path / "logs", "--model", folder / "model", "--data", folder / "d.jsonl", "--images",
                              folder, "--out", cut_off)
    assert code == 0 and cut_off.read_bytes() == (folder / "whole.jsonl").read_bytes(), err
    assert out == (folder / "printed.txt").read_text()
    assert not (tmp_path / "p.jsonl.partial").exists()


def test_a_mistake_of_the_second_process_is_one_line(folder, tmp_path):
    """Record 5 is of the slice that the second one takes; the rows before it are there."""
    records = [json.loads(line) for line in (folder / "d.jsonl").open()]
    records[13]["image"] = "none.png"
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    code, out, err = torchrun(tmp_path / "logs", "--model", folder / "model", "--data", tmp_path / "d.jsonl",
                              "--images", folder, "--out", tmp_path / "p.jsonl")
    assert code and err.count("\n") == 1 and "evaluate.py: record 13: image none.png: no such file" in err, err
    assert (tmp_path / "p.jsonl.partial").read_text().count("\n") == 1 + 8


# ---------------------------------------------------------------------------------------------- cheaper answers

def test_an_image_is_read_and_encoded_once_for_its_questions(folder, monkeypatch):
    encoded, opened = [], []
    forward, load_image = ConvNeXt.forward, sys.modules["data"].load_image
    monkeypatch.setattr(ConvNeXt, "forward", lambda self, images: encoded.append(len(images)) or forward(self, images))
    monkeypatch.setattr("data.load_image", lambda name, root: opened.append(name) or load_image(name, root))
    if hasattr(sys.modules["data"], "fitted_image"):
        sys.modules["data"].fitted_image.cache_clear()
    code, out, err = evaluate_in(folder, "--batch", 8)
    assert code == 0 and encoded == [1, 1, 1] and opened == ["0.png", "1.png", "2.png"], err


def test_lora_is_merged_for_decoding(folder, tmp_path, monkeypatch):
    """No layer has it, and the answers are those with it apart."""
    from aquila import load_model
    for merge in (True, False):
        seen = []

        def load(*args, merge=merge, seen=seen):
            seen.append(load_model(*args[:5], merge))
            return seen[0]

        monkeypatch.setattr(evaluate, "load_model", load)
        assert evaluate_in(folder, "--out", tmp_path / "p.jsonl")[0] == 0
        assert bool(lora_layers(seen[0].llm)) != merge
        assert (tmp_path / "p.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("device, flags, dtype", [
    ("cpu", (), torch.float32), ("cuda", (), torch.bfloat16), ("cuda", ("--dtype", "float32"), torch.float32)])
def test_the_dtype_is_that_of_the_device(folder, monkeypatch, device, flags, dtype):
    def load(folder, vision, llm, dtype, device, merge):
        raise ValueError(f"{dtype} {merge}")

    monkeypatch.setattr(evaluate, "start_processes", lambda: (0, 1, torch.device(device)))
    monkeypatch.setattr(evaluate, "load_model", load)
    assert evaluate_in(folder, *flags)[2] == f"evaluate.py: {dtype} True\n"


def test_progress_without_a_terminal(folder, monkeypatch):
    assert evaluate_in(folder)[2] == ""     # less than 30 seconds
    monkeypatch.setattr(commands.progress, "SECONDS", 0)
    lines = evaluate_in(folder)[2].splitlines()
    assert len(lines) == 6 and lines[-1].startswith("model: 22/22, ") and lines[-1].endswith(" 0 s left")


@pytest.mark.parametrize("flag", ["--data", "--score", "--benchmark", "--image", "--model", "--out", "--tasks"])
def test_an_empty_value_is_one_line(flag):
    code, out, err = command_line(evaluate.main, flag, "")
    assert code == 2 and err == f"evaluate.py: {flag}: the value is empty\n"
