"""
Proves that a run loses no more than what a kill must cost it, and never goes on with something else: signals, a full
disk, one writer a folder, resumes that are the same run or refused, numbers that are not finite, errors of any process,
mistakes in data, held-back records.

    pytest tests/run/test_survival.py
"""
import contextlib
import io
import json
import math
import multiprocessing
import os
import pathlib
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command_line, one_line
from PIL import Image
from safetensors.torch import load_file, save_file

import commands.processes
import commands.progress
import commands.records
import commands.samples
import data
import evaluate
import files.run_folder as run_folder
import train
from aquila import load_model
from tokenizer import load_tokenizer

RUN = ("--stage", 2, "--lora-rank", 2, "--lora-dropout", 0.5, "--batch", 2, "--micro", 1, "--steps", 4,
       "--save-every", 1, "--keep", 9, "--workers", 0)
STATE = ("config.json", "model.safetensors", "optimizer.safetensors", "run.json", "SHA256SUMS")
VISION, LLM = ROOT / "weights/tiny-clip.safetensors", ROOT / "weights/tiny-llm"


# ---------------------------------------------------------------------------------------------- the run

@pytest.fixture(scope="module")
def one_thread():
    """As the processes have that are started here: so the bits are the same."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


def write_records(path, names, answers=("no", "a longer answer", "yes", "two of them")):
    with path.open("w") as file:
        for i, name in enumerate(names):
            turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answers[i % len(answers)]}]
            file.write(json.dumps({"id": f"the {i}.", "image": name, "conversations": turns}) + "\n")


@pytest.fixture(scope="module")
def folder(one_thread, tmp_path_factory):
    """
    data.jsonl and images/, four of each; start/, a finished stage 1 of 2 steps; and of a stage 2 of 4 steps, with LoRA
    and its dropout, whole/, and half/, which was stopped after step 2.
    """
    folder = tmp_path_factory.mktemp("survival")
    (folder / "images").mkdir()
    for i in range(4):
        Image.effect_noise((64, 64), 50 + i).save(folder / f"images/{i}.bmp")
    write_records(folder / "data.jsonl", [f"{i}.bmp" for i in range(4)])
    first = ("--stage", 1, "--batch", 2, "--micro", 1, "--steps", 2, "--save-every", 1, "--workers", 0)
    flags = ("--data", folder / "data.jsonl", "--images", folder / "images", "--out", folder / "start")
    for made in (command_line(train.main, *first, *flags), train_in(folder, "--out", folder / "whole"),
                 train_in(folder, "--out", folder / "half", "--stop-after", 2)):
        assert made[0] == 0 and made[2] == "", made
    return folder


def flags_of(folder):
    return (*RUN, "--data", folder / "data.jsonl", "--images", folder / "images", "--init-from", folder / "start")


def train_in(folder, *flags):
    """-> (exit code, stdout, stderr)"""
    commands.records.size_of.cache_clear()  # files change here under the same names
    data.fitted_image.cache_clear()
    return command_line(train.main, *flags_of(folder), *flags)


@pytest.fixture
def half(folder, tmp_path):
    """A copy of half/ to go on with, or to damage."""
    return pathlib.Path(shutil.copytree(folder / "half", tmp_path / "half"))


def refused(done, *texts):
    """Whether a command ended with exit code 2 and one line that has these texts."""
    code, _, err = done
    assert code == 2 and err.count("\n") == 1 and err.startswith("train.py: ") and len(err) < 600, err
    assert all(str(text) in err for text in texts), err
    return True


def contents(folder):
    """{path: bytes} of all its files but the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "run.lock"}


def rows_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").open()]


def same_state(one, two):
    """Whether two checkpoints have the same weights and means, bit for bit."""
    pairs = [[load_file(path / name) for path in (one, two)] for name in ("model.safetensors", "optimizer.safetensors")]
    assert all(a.keys() == b.keys() and len(a) for a, b in pairs)
    return all(torch.equal(a[k], b[k]) for a, b in pairs for k in a)


def drift(one, two):
    """How far the weights of two checkpoints lie apart, in parts of their length."""
    a, b = (load_file(path / "model.safetensors") for path in (one, two))
    length = lambda tensors: sum(t.square().sum().item() for t in tensors) ** 0.5
    return length(a[k] - b[k] for k in a) / length(a.values())


# ---------------------------------------------------------------------------------------------- processes

FORKED = multiprocessing.get_context("forkserver")      # a server imports all once, its children are processes
FORKED.set_forkserver_preload(["pytest", "evaluate", "train", "torch._dynamo", "torch.optim"])


@pytest.fixture(autouse=True)
def no_process_is_left():
    """Of a test that failed."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


class Process:
    """train.py in a process of its own, with one thread. change: a function that is called there before."""

    def __init__(self, log, *flags, change=None, **environment):
        self.log = log
        self.process = FORKED.Process(target=run_here, args=(log, [*map(str, flags)], change, environment))
        self.process.start()

    def send(self, number):
        os.kill(self.process.pid, number)

    def end(self, seconds=60):
        """-> (exit code, stderr)"""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.log.read_text()}"
        return self.process.exitcode, self.log.read_text()


def run_here(log, flags, change, environment):
    os.chdir(ROOT)
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    multiprocessing.set_start_method("fork", force=True)       # of data workers, as always
    torch.set_num_threads(1)
    sys.argv = ["train.py", *flags]
    if change:
        change()
    train.main()


def two_processes(tmp_path, *flags, change=None):
    """Two that are one run, without torchrun. -> both"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2")
    return [Process(tmp_path / f"stderr-{port}-{rank}", *flags, change=change, RANK=str(rank), **where)
            for rank in range(2)]


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def steps_of(run):
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


# ---------------------------------------------------------------------------------------------- 1: signals

LONG = ("--steps", 1000, "--save-every", 1000)


def saved_line(number, step, out):
    return f"train.py: {number.name}: saved step {step} of 1000 in {out}; --resume auto goes on from there\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_the_running_step(folder, tmp_path, number):
    """Sent twice, as a scheduler and torchrun do. One line; the step is saved; what goes on from it is the same run."""
    out = tmp_path / "out"
    run = Process(tmp_path / "log", *flags_of(folder), *LONG, "--out", out)
    wait_until(lambda: steps_of(out) >= 2)
    run.send(number)
    time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        run.send(number)
    code, err = run.end()
    step = steps_of(out)
    assert code == 128 + number and err == saved_line(number, step, out)
    saved = f"step-{step:06d}"
    assert sorted(os.listdir(out)) == ["log.jsonl", "loss.png", "run.lock", saved]
    assert sorted(os.listdir(out / saved)) == sorted(STATE) and rows_of(out)[-1]["step"] == step
    if number == signal.SIGTERM:
        stop = ("--stop-after", step + 1)
        assert train_in(folder, *LONG, "--out", tmp_path / "whole", *stop)[0] == 0
        assert train_in(folder, *LONG, "--out", out, "--resume", "auto", *stop)[0] == 0
        assert same_state(tmp_path / "whole" / f"step-{step + 1:06d}", out / f"step-{step + 1:06d}")


def wait_in_survey():
    """As if there were a million records."""
    def survey(*rest):
        pathlib.Path(sys.argv[-1], "here").touch()
        time.sleep(60)
    commands.samples.survey = survey


def wait_in_step():
    """As if a step took a minute."""
    def train_step(*rest):
        pathlib.Path(sys.argv[-1], "here").touch()
        time.sleep(60)
    train.train_step, commands.processes.StopSignal.same = train_step, 0.05


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_at_once(folder, tmp_path, number):
    """One process, or two, of which the second waits for the first."""
    out = tmp_path / "out"
    flags = (*flags_of(folder), "--out", out)
    runs = (two_processes(tmp_path, *flags, change=wait_in_survey) if number == signal.SIGTERM else
            [Process(tmp_path / "log", *flags, change=wait_in_survey)])
    wait_until((out / "here").exists)
    for run in runs:
        run.send(number)
    assert [run.end(10) for run in runs] == [(128 + number, f"train.py: ended by {number.name}\n")] * len(runs)
    assert sorted(os.listdir(out)) == ["here", "run.lock"]


def test_a_second_signal_ends_at_once(folder, tmp_path):
    out = tmp_path / "out"
    run = Process(tmp_path / "log", *flags_of(folder), "--out", out, change=wait_in_step)
    wait_until((out / "here").exists)
    run.send(signal.SIGINT)
    time.sleep(0.2)
    assert run.process.is_alive()
    run.send(signal.SIGINT)
    assert run.end(10)[0] == -signal.SIGINT


def ignore_hangups():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_what_nohup_ignores_stays_ignored(folder, tmp_path):
    out = tmp_path / "out"
    run = Process(tmp_path / "log", *flags_of(folder), *LONG, "--out", out, change=ignore_hangups)
    wait_until(lambda: steps_of(out) >= 1)
    run.send(signal.SIGHUP)
    now = steps_of(out)
    wait_until(lambda: steps_of(out) > now + 1)
    run.send(signal.SIGTERM)
    assert run.end()[0] == 128 + signal.SIGTERM


def on_a_terminal():
    os.dup2(os.open(os.environ["TERMINAL"], os.O_WRONLY | os.O_NOCTTY), 1)
    sys.stdout = open(1, "w")


def test_a_terminal_that_closes_saves_the_running_step(folder, tmp_path):
    """What was to be printed there cannot be printed."""
    out, (ours, terminal) = tmp_path / "out", pty.openpty()
    run = Process(tmp_path / "log", *flags_of(folder), *LONG, "--out", out, change=on_a_terminal,
                  TERMINAL=os.ttyname(terminal))
    wait_until(lambda: steps_of(out) >= 1)
    os.close(ours)
    os.close(terminal)
    now = steps_of(out)
    wait_until(lambda: steps_of(out) > now + 1)
    run.send(signal.SIGHUP)
    assert run.end()[0] == 128 + signal.SIGHUP and (out / f"step-{steps_of(out):06d}").exists()


def torchrun(logs, script, *flags):
    """Two processes -> (the running torchrun, a function that gives what the two wrote on stderr)."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--redirects", 2,
            "--log-dir", logs, script, *flags]
    run = subprocess.Popen([*map(str, line)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    return run, lambda: "".join(path.read_text() for path in sorted(logs.rglob("stderr.log")))


def test_torchrun_that_is_ended_saves_the_running_step(folder, tmp_path):
    """
    SIGTERM to torchrun alone, which sends it to data workers, too; then two processes go on, and end with the weights
    of two that were not ended.
    """
    out, flags = tmp_path / "out", (*flags_of(folder), *LONG)
    run, written = torchrun(tmp_path / "logs", "train.py", *flags, "--out", out, "--workers", 1)
    wait_until(lambda: steps_of(out) >= 2)
    run.terminate()
    run.communicate(timeout=60)
    step = steps_of(out)
    assert run.returncode and written() == saved_line(signal.SIGTERM, step, out)
    stop = ("--stop-after", step + 1)
    pairs = [two_processes(tmp_path, *flags, "--out", out, "--resume", "auto", *stop),
             two_processes(tmp_path, *flags, "--out", tmp_path / "whole", *stop)]
    assert [process.end() for pair in pairs for process in pair] == [(0, "")] * 4
    assert same_state(tmp_path / "whole" / f"step-{step + 1:06d}", out / f"step-{step + 1:06d}")


def take_nothing_apart():
    commands.processes.dist.destroy_process_group = lambda: time.sleep(600)


def test_a_signal_to_one_process_stops_both(folder, tmp_path):
    """Neither waits for the other in the end, where gloo's destructor would, now and then, for ever."""
    out = tmp_path / "out"
    pair = two_processes(tmp_path, *flags_of(folder), *LONG, "--out", out, "--workers", 1, change=take_nothing_apart)
    wait_until(lambda: steps_of(out) >= 1)
    pair[1].send(signal.SIGTERM)
    assert [process.end()[0] for process in pair] == [128 + signal.SIGTERM] * 2
    assert (out / f"step-{steps_of(out):06d}").exists()


# ---------------------------------------------------------------------------------------------- 1: disk, checkpoints

@contextlib.contextmanager
def disk_of(size):
    """No file may grow beyond `size` bytes here."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file, size", [("log.jsonl", 300), ("step-000003/model.safetensors", 10 ** 5),
                                        ("step-000003/optimizer.safetensors", 5 * 10 ** 6)])
def test_a_full_disk_is_one_line_and_loses_nothing(folder, half, file, size):
    before = contents(half)
    with disk_of(size):
        done = train_in(folder, "--out", half, "--resume", "auto")
    assert refused(done, f"{half / file} cannot be written: ")
    after = contents(half)
    assert not [name for name in after if "tmp" in name or "step-000003" in name]
    log = before.pop("log.jsonl")
    assert after.pop("log.jsonl").startswith(log) and after == before
    if "optimizer" in file:
        assert train_in(folder, "--out", half, "--resume", "auto")[0] == 0
        assert same_state(half / "step-000004", folder / "whole/step-000004")


def test_every_checkpoint_is_evaluated_and_started_from(folder, tmp_path):
    """Of a run that is not finished."""
    code, out, err = command_line(evaluate.main, "--model", folder / "half/step-000001", "--data",
                                  folder / "data.jsonl", "--images", folder / "images", "--max-new-tokens", 2)
    assert code == 0 and "accuracy" in out, err
    start = folder / "start/step-000001"
    assert train_in(folder, "--init-from", start, "--out", tmp_path / "out", "--stop-after", 1)[0] == 0
    before, after = (load_file(path / "model.safetensors") for path in (start, tmp_path / "out/step-000001"))
    assert 0 < max((after[name] - before[name]).abs().max().item() for name in before) < 0.01      # a step away


def test_the_last_checkpoints_are_kept(folder, half):
    assert train_in(folder, "--out", half, "--resume", "auto", "--keep", 3)[0] == 0
    assert [path.name for path in run_folder.checkpoints(half)] == [f"step-{i:06d}" for i in (2, 3, 4)]


def test_an_old_checkpoint_goes_after_the_new_one_is_there(folder, half, monkeypatch):
    there = []
    monkeypatch.setattr(run_folder, "save_model", lambda *rest, save=run_folder.save_model: there.append(
        len(run_folder.checkpoints(half))) or save(*rest))
    assert train_in(folder, "--out", half, "--resume", "auto", "--keep", 1)[0] == 0
    assert there == [2, 1] and len(run_folder.checkpoints(half)) == 1


def test_the_curve_is_drawn_at_every_checkpoint(folder, tmp_path, monkeypatch):
    drawn, draw = [], run_folder.draw_curve
    monkeypatch.setattr(run_folder, "draw_curve", lambda rows, path: drawn.append(len(rows)) or draw(rows, path))
    assert train_in(folder, "--out", tmp_path, "--save-every", 2, "--stop-after", 3)[0] == 0
    assert drawn == [2, 3] and Image.open(tmp_path / "loss.png").size == (800, 420)


@pytest.mark.parametrize("cut", [0, 40, "zeros"])
def test_the_log_is_only_appended_to_and_a_cut_line_is_healed(folder, half, cut):
    """As a kill in step 3 leaves it: whole lines of steps that come again, half a line, zeros after a power cut."""
    log = half / "log.jsonl"
    before = log.read_bytes()
    os.link(log, half / "the same file")
    lost = json.dumps({"step": 3, "loss": 1.5, "seconds": 1.0}) + "\n"
    log.write_bytes(before + (b"\0" * 50 if cut == "zeros" else lost.encode()[:-cut or None]))
    assert train_in(folder, "--out", half, "--resume", "auto")[0] == 0
    assert log.read_bytes().startswith(before) and log.samefile(half / "the same file")
    assert [row["step"] for row in rows_of(half)] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows_of(half)] == [row["loss"] for row in rows_of(folder / "whole")]


@pytest.mark.parametrize("lost", [[], [1, 2, 3]])
def test_a_run_finishes_although_its_log_is_lost(folder, tmp_path, lost):
    """Killed after its last checkpoint; the end of the log did not reach the disk."""
    out = pathlib.Path(shutil.copytree(folder / "whole", tmp_path / "out"))
    lines = (out / "log.jsonl").read_text().splitlines(True)
    (out / "log.jsonl").write_text("".join(lines[i - 1] for i in lost))
    (out / "model.safetensors").unlink()
    assert train_in(folder, "--out", out, "--resume", "auto")[0] == 0
    assert (out / "model.safetensors").read_bytes() == (out / "step-000004/model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------- 2: one writer

def look_often():
    """A data worker looks every 5 seconds whether its process lives."""
    torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.5


def lives(process):
    stat = pathlib.Path("/proc", str(process), "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(folder, tmp_path):
    """Killed by SIGKILL, it is gone on with at once; its data workers, which may live a little longer, hold nothing."""
    out = tmp_path / "out"
    run = Process(tmp_path / "log", *flags_of(folder), *LONG, "--out", out, "--workers", 1, change=look_often)
    wait_until(lambda: steps_of(out) >= 1)
    workers = pathlib.Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    assert len(workers) == 1
    for flags in ((), ("--resume", "auto"), ("--overwrite",)):
        done = train_in(folder, "--out", out, *flags)
        assert refused(done, f"{out}/run.lock is locked by process {run.process.pid}, which still runs")
    assert run.process.is_alive()
    os.kill(int(workers[0]), signal.SIGSTOP)
    run.send(signal.SIGKILL)
    assert run.end()[0] == -signal.SIGKILL
    assert lives(workers[0]) and train_in(folder, "--out", out, "--stop-after", 1)[0] == 0 and steps_of(out) == 1
    os.kill(int(workers[0]), signal.SIGCONT)
    wait_until(lambda: not lives(workers[0]), 15)


def only_the_first_has_files():
    if os.environ["RANK"] == "1":
        train.lock = train.Log = train.clear = train.find_checkpoint = train.finish = run_folder.save_model = None


def test_one_process_alone_keeps_the_folder(folder, tmp_path):
    """
    The other one would end with a traceback. They have one held-back record: the second has none of it, and the loss
    is that of one process.
    """
    write_records(tmp_path / "val.jsonl", ["0.bmp"])
    flags = ("--val", tmp_path / "val.jsonl", "--val-every", 1, "--steps", 1)
    (tmp_path / "two/step-000007.123.tmp").mkdir(parents=True)
    pair = two_processes(tmp_path, *flags_of(folder), *flags, "--out", tmp_path / "two",
                         change=only_the_first_has_files)
    assert train_in(folder, *flags, "--out", tmp_path / "one")[0] == 0
    assert [process.end() for process in pair] == [(0, "")] * 2
    assert sorted(os.listdir(tmp_path / "two")) == ["config.json", "log.jsonl", "loss.png", "model.safetensors",
                                                    "run.lock", "step-000001"]
    vals = [rows_of(tmp_path / name)[0]["val"] for name in ("one", "two")]
    assert vals[0] == pytest.approx(vals[1], abs=1e-4)


def test_what_a_kill_left_is_removed_and_nothing_else(folder, half):
    """Temporary files have names that no other file has."""
    left = ("step-000003.77.tmp", "model.safetensors.12.tmp", "loss.png.3.tmp", "step-000001.8.tmp")
    kept = ("notes.txt", "my.tmp", "log.jsonl.bak", "step-7", "a.12.tmp")
    for name in left + kept:
        (half / name).write_text("x")
    assert train_in(folder, "--out", half, "--resume", "auto", "--stop-after", 2)[0] == 0
    assert not [name for name in left if (half / name).exists()] and all((half / name).exists() for name in kept)


def test_overwrite_leaves_nothing_of_the_former_run(folder, tmp_path):
    """The next stage cannot take its model."""
    out = pathlib.Path(shutil.copytree(folder / "start", tmp_path / "out"))
    (out / "state.pt").touch()                          # as earlier versions wrote it
    (out / "notes.txt").touch()
    first = ("--stage", 1, "--data", folder / "data.jsonl", "--images", folder / "images", "--batch", 2, "--micro", 1,
             "--out", out, "--workers", 0)
    assert refused(command_line(train.main, *first), f"{out} holds a run (step-000002, ", "--overwrite")
    assert command_line(train.main, *first, "--overwrite", "--stop-after", 1)[0] == 0
    assert sorted(os.listdir(out)) == ["log.jsonl", "loss.png", "notes.txt", "run.lock", "step-000001"]
    assert steps_of(out) == 1
    done = train_in(folder, "--init-from", out, "--out", tmp_path / "next")
    assert refused(done, f"no model.safetensors in {out}", f"its last checkpoint is {out / 'step-000001'}")


def test_an_overwrite_that_was_killed_is_known_as_a_run(folder, tmp_path, monkeypatch):
    out, removed = pathlib.Path(shutil.copytree(folder / "whole", tmp_path / "out")), []
    remove = run_folder.remove

    def remove_some(path):
        if len(removed) == 6:
            raise OSError("killed")
        removed.append(path.name)
        remove(path)

    monkeypatch.setattr(run_folder, "remove", remove_some)
    assert train_in(folder, "--out", out, "--overwrite")[0] == 2
    monkeypatch.undo()
    assert refused(train_in(folder, "--out", out), "holds a run")
    assert train_in(folder, "--out", out, "--overwrite", "--stop-after", 1)[0] == 0


def test_overwrite_does_not_remove_what_the_run_needs(folder, half, tmp_path):
    """Neither what it goes on from, nor what it starts from."""
    before = contents(half)
    for resume in ("auto", half / "step-000001"):
        done = train_in(folder, "--out", half, "--resume", resume, "--overwrite")
        assert refused(done, "--overwrite would remove", "which --resume goes on from")
    start = pathlib.Path(shutil.copytree(folder / "start", tmp_path / "start"))
    for source in (start, start / "step-000001"):
        done = train_in(folder, "--init-from", source, "--out", start, "--overwrite")
        assert refused(done, f"--overwrite would remove {source}, which the run starts from")
    assert contents(half) == before and contents(start) == contents(folder / "start")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_model_of_others_is_not_overwritten(folder, tmp_path, file):
    """For instance when --out is given the folder of --llm."""
    (tmp_path / file).write_text("{}")
    for flags in ((), ("--overwrite",), ("--resume", folder / "half")):
        assert refused(train_in(folder, "--out", tmp_path, *flags), "holds a model that no run of train.py wrote")
    assert contents(tmp_path) == {file: b"{}"}


# ---------------------------------------------------------------------------------------------- 3: the same run

def test_a_resumed_run_is_the_same_run(folder, half):
    assert train_in(folder, "--out", half, "--resume", "auto")[0] == 0
    for step in (3, 4):
        assert same_state(half / f"step-{step:06d}", folder / f"whole/step-{step:06d}")
    assert (half / "model.safetensors").read_bytes() == (half / "step-000004/model.safetensors").read_bytes()


def flip(path, place=0.5, bit=0):
    """One bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)


def other_start(folder, tmp_path):
    return ("--init-from", folder / "start/step-000001"), "init-from"


def other_vision(folder, tmp_path):
    """One bit, the lowest of a float32."""
    shutil.copy(VISION, tmp_path / "vision.safetensors")
    tensors = load_file(tmp_path / "vision.safetensors")
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].flatten().view(torch.int32)[-1] ^= 1
    save_file(tensors, tmp_path / "vision.safetensors")
    return ("--vision", tmp_path / "vision.safetensors"), "weights of.vision"


def other_llm(folder, tmp_path):
    """Two rows of a matrix change places, far from its beginning."""
    shutil.copytree(LLM, tmp_path / "llm")
    tensors = load_file(tmp_path / "llm/model.safetensors")
    name = max((name for name in tensors if "down_proj" in name), key=str)
    tensors[name][[-1, -2]] = tensors[name][[-2, -1]]
    save_file(tensors, tmp_path / "llm/model.safetensors", {"format": "pt"})
    return ("--llm", tmp_path / "llm"), "weights of.llm"


def other_picture(folder, tmp_path):
    """Of the same name and size."""
    shutil.copytree(folder / "images", tmp_path / "images")
    flip(tmp_path / "images/2.bmp", 0.9, 7)
    return ("--images", tmp_path / "images"), "pictures"


def larger_picture(folder, tmp_path):
    shutil.copytree(folder / "images", tmp_path / "images")
    Image.effect_noise((65, 64), 50).save(tmp_path / "images/3.bmp")
    return ("--images", tmp_path / "images"), "pictures"


def other_data(folder, tmp_path):
    (tmp_path / "data.jsonl").write_text((folder / "data.jsonl").read_text().replace("two of", "six of"))
    return ("--data", tmp_path / "data.jsonl"), "data"


def other_tokenizer(folder, tmp_path):
    """Beside the same weights: two tokens change places."""
    shutil.copytree(LLM, tmp_path / "llm")
    path = tmp_path / "llm/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    return ("--llm", tmp_path / "llm"), "tokens"


def flag(*flags, told):
    return lambda folder, tmp_path: (flags, told)


OTHERS = {"another --init-from": other_start, "one bit of the vision file": other_vision, "rows of the LM": other_llm,
          "the tokenizer": other_tokenizer, "a picture": other_picture, "a larger picture": larger_picture,
          "an answer": other_data,
          "--lr": flag("--lr", 0.5, told="recipe.lr 0.002, now it is 0.5"),
          "--batch": flag("--batch", 4, told="recipe.batch 2, now it is 4"),
          "--lora-dropout": flag("--lora-dropout", 0, told="recipe.lora.dropout 0.5, now it is 0"),
          "--seed": flag("--seed", 1, told="seed 0, now it is 1"),
          "--steps": flag("--steps", 5, told="steps 4, now it is 5"),
          "--dtype": flag("--dtype", "bfloat16", told="dtype float32, now it is bfloat16")}


@pytest.mark.parametrize("what", OTHERS)
def test_a_resume_with_something_else_is_refused(folder, half, tmp_path, what):
    """By the name of what is different, old and new. Nothing is changed. --force-resume goes on."""
    before, (flags, told) = contents(half), OTHERS[what](folder, tmp_path)
    done = train_in(folder, "--out", half, "--resume", "auto", *flags)
    assert refused(done, f"the run to resume had {told}", ", now it is ", "go on with --force-resume")
    if " now " not in told:
        old, new = re.search(rf"had {told} (\w+), now it is (\w+)", done[2]).groups()
        assert old != new
    assert len(done[2]) < 350 and contents(half) == before
    if what in ("another --init-from", "--lr"):
        assert train_in(folder, "--out", half, "--resume", "auto", "--force-resume", "--stop-after", 3, *flags)[0] == 0
        assert not same_state(half / "step-000003", folder / "whole/step-000003") or what != "--lr"


def test_other_paths_and_layouts_and_workers_are_the_same_run(folder, half, tmp_path):
    """Copies of all that is read, the LM in two files; the same bits come out."""
    for name in ("images", "start"):
        shutil.copytree(folder / name, tmp_path / f"my {name}")
    shutil.copy(folder / "data.jsonl", tmp_path / "d.jsonl")
    shutil.copy(VISION, tmp_path / "v.safetensors")
    shutil.copytree(LLM, tmp_path / "llm")
    tensors = load_file(tmp_path / "llm/model.safetensors")
    for i in (0, 1):
        save_file({k: tensors[k] for k in sorted(tensors)[i::2]}, tmp_path / f"llm/model-{i}.safetensors")
    index = {"weight_map": {k: f"model-{i % 2}.safetensors" for i, k in enumerate(sorted(tensors))}}
    (tmp_path / "llm/model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "llm/model.safetensors").unlink()
    done = train_in(folder, "--out", half, "--resume", "auto", "--data", tmp_path / "d.jsonl", "--images",
                    tmp_path / "my images", "--init-from", tmp_path / "my start", "--vision",
                    tmp_path / "v.safetensors", "--llm", tmp_path / "llm", "--workers", 1)
    assert done[0] == 0, done
    assert same_state(half / "step-000004", folder / "whole/step-000004")


def test_other_micro_batches_and_processes_are_the_same_run(folder, half, tmp_path):
    """To rounding, LoRA's dropout included."""
    assert train_in(folder, "--out", half, "--resume", "auto", "--micro", 2)[0] == 0
    assert drift(half / "step-000004", folder / "whole/step-000004") < 1e-4
    two = pathlib.Path(shutil.copytree(folder / "half", tmp_path / "two"))
    pair = two_processes(tmp_path, *flags_of(folder), "--out", two, "--resume", "auto")
    assert [process.end() for process in pair] == [(0, "")] * 2
    assert drift(two / "step-000004", folder / "whole/step-000004") < 1e-4


def test_grad_checkpoint_is_the_same_run(folder, half):
    """Bit for bit: what is computed again is the same, and the run says that it does so."""
    code, out, _ = train_in(folder, "--out", half, "--resume", "auto", "--grad-checkpoint")
    assert code == 0 and "computed again in the backward pass" in out
    assert same_state(half / "step-000004", folder / "whole/step-000004")


def seal_again(checkpoint):
    (checkpoint / "SHA256SUMS").unlink()
    run_folder.seal(checkpoint)


DAMAGE = {"a bit": flip, "the last bit": lambda path: flip(path, 1 - 1e-9, 7),
          "cut": lambda path: path.write_bytes(path.read_bytes()[:-2]), "empty": lambda path: path.write_bytes(b""),
          "gone": lambda path: path.unlink(), "a FIFO": lambda path: path.unlink() or os.mkfifo(path)}


@pytest.mark.parametrize("file", STATE)
def test_a_damaged_checkpoint_is_one_line(folder, half, file):
    """That names the file, or SHA256SUMS for what it tells wrongly; the one before can be gone on with."""
    path = half / "step-000002" / file
    flip(path)
    before = contents(half)
    done = train_in(folder, "--out", half, "--resume", "auto")
    told = f"{path} is damaged, " if file != "SHA256SUMS" else " is damaged, it is not what was written (SHA256SUMS)"
    assert refused(done, told, f"remove {path.parent}, and --resume auto takes the checkpoint before")
    assert contents(half) == before
    if file == "model.safetensors":
        shutil.rmtree(path.parent)
        assert train_in(folder, "--out", half, "--resume", "auto", "--stop-after", 2)[0] == 0
        assert same_state(path.parent, folder / "whole/step-000002")


@pytest.mark.parametrize("file", STATE)
@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damage_of_a_checkpoint_passes(folder, half, file, damage):
    path, settings = half / "step-000002" / file, json.loads((half / "step-000002/run.json").read_text())["settings"]
    run_folder.check_checkpoint(path.parent, settings)
    DAMAGE[damage](path)
    with pytest.raises((ValueError, FileNotFoundError), match="damaged.*SHA256SUMS" if path.is_file() else str(path)):
        run_folder.check_checkpoint(path.parent, settings)


def change_run(**values):
    def change(checkpoint):
        path = checkpoint / "run.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        seal_again(checkpoint)
    return change


def not_finite(file, value):
    def change(checkpoint):
        tensors = load_file(checkpoint / file)
        tensors[max(tensors)].view(-1)[-1] = value
        save_file(tensors, checkpoint / file)
        seal_again(checkpoint)
    return change


def another_shape(checkpoint):
    tensors = load_file(checkpoint / "optimizer.safetensors")
    tensors[max(tensors)] = torch.zeros(3)
    save_file(tensors, checkpoint / "optimizer.safetensors")
    seal_again(checkpoint)


LIES = {"step 99": (change_run(step=99), "run.json: 'step' is 99, expected a whole number from 1 to 4"),
        "step 0": (change_run(step=0), "'step' is 0"), "step true": (change_run(step=True), "'step' is True"),
        "no step": (change_run(step=None), "'step' is missing"), "text": (change_run(step="2"), "'step' is '2'"),
        "another step": (change_run(step=1), "step-000002 holds step 1: it was renamed"),
        "no settings": (change_run(settings=[]), "run.json: 'settings' is []"),
        "NaN": (not_finite("model.safetensors", math.nan), "model.safetensors: "),
        "infinite means": (not_finite("optimizer.safetensors", math.inf), "optimizer.safetensors: "),
        "misshapen means": (another_shape, "optimizer.safetensors: does not fit the model; 1 misshapen"),
        "renamed": (lambda checkpoint: checkpoint.rename(checkpoint.with_name("step-000009")), "holds step 2")}


@pytest.mark.parametrize("lie", LIES)
def test_a_checkpoint_that_lies_is_one_line(folder, half, lie):
    """Its checksums are right."""
    change, told = LIES[lie]
    change(half / "step-000002")
    assert refused(train_in(folder, "--out", half, "--resume", "auto"), half, told)


@pytest.mark.parametrize("line, told", [
    ('{"step": 1, "loss": NaN}', "line 1: 'loss'"), ("{}", "line 1: 'loss' is missing"), ("[]", "line 1"),
    ("step 1", "line 1: not valid JSON"), ('{"step": -1, "loss": 1}', "line 1: 'step' is -1"), ("\x00", "line 1"),
    ('{"step": 1, "loss": 1, "left out": [[]]}', "line 1: 'left out'"), ("[" * 99, "line 1"), ("\udcff", "line 1")])
def test_a_damaged_log_is_one_line(folder, half, line, told):
    lines = (half / "log.jsonl").read_text().splitlines(True)
    (half / "log.jsonl").write_bytes((line + "\n" + lines[1]).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"log.jsonl, {told}") as error:
        run_folder.Log(half, 2, 4)
    assert one_line(error)
    if line == "{}":
        before = contents(half)
        assert refused(train_in(folder, "--out", half, "--resume", "auto"), half / "log.jsonl", told)
        assert contents(half) == before


def test_the_preset_is_compared_with_what_the_run_starts_from(folder, tmp_path):
    for preset in ("aquila-8b", "aquila-plus-7b", "tiny-plus"):
        done = command_line(train.main, "--preset", preset, "--stage", 2, "--init-from", folder / "start", "--out",
                            tmp_path / "out")
        assert refused(done, f"--preset {preset} has ", f"{folder / 'start'} has ")


def test_a_resume_does_not_overwrite_another_run(folder, half, tmp_path):
    """A finished one, or one that is not; unless it is told to. Into a folder of its own it is the same run."""
    finished = pathlib.Path(shutil.copytree(folder / "start", tmp_path / "finished"))
    other = pathlib.Path(shutil.copytree(folder / "start", tmp_path / "other"))
    for name in ("model.safetensors", "config.json"):
        (other / name).unlink()
    for out in (finished, other):
        before = contents(out)
        done = train_in(folder, "--resume", half, "--out", out)
        assert refused(done, f"{out} holds a run (step-000002, log.jsonl", "--overwrite") and contents(out) == before
    done = train_in(folder, "--resume", half / "step-000001", "--out", half)
    assert refused(done, f"{half} holds a run (step-000002")
    assert train_in(folder, "--resume", half, "--out", finished, "--overwrite")[0] == 0
    assert train_in(folder, "--resume", half / "step-000001", "--out", tmp_path / "own")[0] == 0
    for out in (finished, tmp_path / "own"):
        assert same_state(out / "step-000004", folder / "whole/step-000004")
    assert contents(half) == contents(folder / "half")


def test_a_checkpoint_of_earlier_versions_is_refused_by_name(folder, tmp_path):
    torch.save({"step": 2, "settings": {}}, tmp_path / "state.pt")
    (tmp_path / "log.jsonl").write_text("")
    before = contents(tmp_path)
    done = train_in(folder, "--out", tmp_path, "--resume", "auto")
    assert refused(done, f"{tmp_path}/state.pt is of earlier versions, which is not read", "--overwrite")
    assert refused(train_in(folder, "--out", tmp_path), f"{tmp_path} holds a run (log.jsonl, state.pt)")
    done = train_in(folder, "--out", tmp_path / "out", "--resume", tmp_path)
    assert refused(done, f"--resume {tmp_path}: no checkpoint there", "state.pt of earlier versions is not read")
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------------------------------- 4: not finite

def spoil(monkeypatch, step, spoiler):
    """spoiler(run) is called before this step."""
    steps, train_step = [], train.train_step
    runs, set_up = [], train.set_up
    monkeypatch.setattr(train, "set_up", lambda *rest: runs.append(set_up(*rest)) or runs[0])

    def spoilt_step(*rest):
        steps.append(1)
        if len(steps) == step:
            spoiler(runs[0])
        return train_step(*rest)

    monkeypatch.setattr(train, "train_step", spoilt_step)
    return runs


def test_a_gradient_that_is_not_finite_stops_before_the_step(folder, tmp_path, monkeypatch):
    """The loss is finite. No weight changes, nothing is saved, the checkpoint before is there."""
    weights = {}

    def spoiler(run):
        weights.update({name: p.detach().clone() for name, p in run.trainable.items()})
        next(iter(run.trainable.values())).register_hook(lambda gradient: gradient * math.inf)

    runs = spoil(monkeypatch, 2, spoiler)
    done = train_in(folder, "--out", tmp_path / "out")
    assert refused(done, "the loss is ", "the gradient's norm ", "samples ['the ", "lower --lr")
    assert not re.search(r"the loss is (nan|inf)", done[2])
    assert weights and all(torch.equal(p, weights[name]) for name, p in runs[0].trainable.items())
    assert sorted(os.listdir(tmp_path / "out")) == ["log.jsonl", "loss.png", "run.lock", "step-000001"]
    assert steps_of(tmp_path / "out") == 1


@pytest.mark.parametrize("kind, value", [("weight", math.nan), ("exp_avg", -math.inf), ("exp_avg_sq", math.inf)])
def test_what_is_not_finite_is_never_saved(folder, tmp_path, monkeypatch, kind, value):
    """Here a number that no gradient of the step comes from or goes to: LoRA's A, while B is zero."""
    def spoiler(run):
        step = run.optimizer.step

        def spoilt_step():
            step()
            name, p = next(pair for pair in run.trainable.items() if "lora_a" in pair[0])
            with torch.no_grad():
                (p if kind == "weight" else run.optimizer.state[p][kind]).view(-1)[-1] = value

        run.optimizer.step = spoilt_step

    spoil(monkeypatch, 2, spoiler)
    done = train_in(folder, "--out", tmp_path / "out")
    assert refused(done, "step 2 is not saved: ", "lora_a holds NaN or infinite numbers")
    assert sorted(os.listdir(tmp_path / "out")) == ["log.jsonl", "loss.png", "run.lock", "step-000001"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_never_evaluated_or_started_from(folder, tmp_path, value):
    model = pathlib.Path(shutil.copytree(folder / "start/step-000002", tmp_path / "model"))
    not_finite("model.safetensors", value)(model)
    code, _, err = command_line(evaluate.main, "--model", model, "--data", folder / "data.jsonl", "--images",
                                folder / "images")
    assert code == 2 and err.count("\n") == 1
    for line in (err, train_in(folder, "--init-from", model, "--out", tmp_path / "out")[2]):
        assert f"{model}/model.safetensors: " in line and "holds NaN or infinite numbers" in line, line


# ---------------------------------------------------------------------------------------------- 5: any process

FAILING = """
import os, sys, train
step = train.train_step

def failing_step(*rest):
    if os.environ["RANK"] == "1":
        raise FileNotFoundError("the text that nobody foresaw")
    return step(*rest)

train.train_step = failing_step
train.main()
"""


@pytest.fixture(scope="module", autouse=True)
def begun(folder):
    """Begun with the first test, for they take seconds to start: FAILING in torchrun, and python without data."""
    (folder / "failing.py").write_text(FAILING)
    failing = torchrun(folder / "logs", folder / "failing.py", *flags_of(folder), "--out", folder / "failing")
    line = [sys.executable, "train.py", *flags_of(folder), "--out", folder / "alone", "--data", folder / "none.jsonl"]
    alone = subprocess.Popen([*map(str, line)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return failing, alone


def test_an_error_of_one_process_is_one_line_before_those_of_torchrun(folder, begun):
    """Of the second one alone, while the first waits for it."""
    run, written = begun[0]
    report = run.communicate(timeout=60)[1]
    assert run.returncode and written() == "train.py: process 1: the text that nobody foresaw\n"
    assert "traceback : train.py: process 1: the text that nobody foresaw" in report
    assert sorted(os.listdir(folder / "failing")) == ["run.lock"]


def test_python_alone_says_nothing_but_the_line(folder, begun):
    out, err = begun[1].communicate(timeout=60)
    assert (begun[1].returncode, out) == (2, "")
    assert err == f"train.py: {folder}/none.jsonl is not there, or no regular file\n"


# ---------------------------------------------------------------------------------------------- 7: mistakes in data

@pytest.fixture
def mixed(folder, tmp_path):
    """
    images/ and records of them, in an order: write(names). "cut.bmp" ends in the middle, which is found when it is
    read; "none.bmp" is not there, which is found before.
    """
    shutil.copytree(folder / "images", tmp_path / "images")
    for name in ("cut.bmp", "cut2.bmp"):
        (tmp_path / "images" / name).write_bytes((folder / "images/0.bmp").read_bytes()[:3000])

    def write(*names, **options):
        write_records(tmp_path / "d.jsonl", names, **options)
        return ("--data", tmp_path / "d.jsonl", "--images", tmp_path / "images", "--out", tmp_path / "out")
    return write


def test_mistakes_are_found_before_the_first_step(folder, mixed, tmp_path):
    """A record that is too long, one whose image is missing, a line that is no JSON: all, with their names."""
    flags = mixed("0.bmp", "none.bmp", "1.bmp", "2.bmp", "3.bmp", answers=("no", "yes", "no", "so " * 999, "no"))
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write('{"id": "the 5.", \n')
    for skip in (0, 2):
        done = train_in(folder, *flags, "--skip-bad", skip)
        assert refused(done, "3 of 6 records are bad: ", "record the 1.: image none.bmp: no such file",
                       "d.jsonl, line 6", "record the 3.: ", "at most 1024 fit", "--skip-bad 3 leaves them out")
    assert os.listdir(tmp_path / "out") == ["run.lock"]
    assert train_in(folder, *flags, "--skip-bad", 3)[0] == 0
    left_out = [text for row in rows_of(tmp_path / "out") for text in row.get("left out", ())]
    assert len(left_out) == 3
    assert all(any(name in text for text in left_out) for name in ("the 1.", "the 3.", "line 6"))
    assert refused(train_in(folder, *mixed("none.bmp"), "--skip-bad", 9, "--overwrite"), "1 of 1 records are bad")


def test_records_are_looked_at_in_parallel_with_progress(folder, tmp_path, monkeypatch):
    """The same is found by two processes."""
    write_records(tmp_path / "d.jsonl", [f"{i % 4}.bmp" for i in range(300)])
    config, records = load_model(folder / "start").config, data.RecordFile(tmp_path / "d.jsonl")
    survey = lambda workers: commands.records.survey(records, folder / "images", load_tokenizer(LLM), config, workers)
    one = survey(2)
    monkeypatch.setattr(commands.records, "FEW", 100)
    monkeypatch.setattr(commands.progress, "SECONDS", 0)
    started, loader = [], commands.records.DataLoader
    monkeypatch.setattr(commands.records, "DataLoader", lambda *rest, num_workers, **options: started.append(
        num_workers) or loader(*rest, num_workers=num_workers, **options))
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        started.append(survey(2))
    shown = shown.getvalue().splitlines()
    loading, two = started
    assert loading == 2 and (two.lengths == one.lengths).all()
    assert (two.blank, two.longest, two.digests) == (one.blank, one.longest, one.digests)
    assert shown[-1].startswith("records looked at: 300/300, ")


def test_which_pictures_are_others(folder, tmp_path, monkeypatch):
    """By their sizes; of so many by every bit, here of the first."""
    write_records(tmp_path / "d.jsonl", [f"{i}.bmp" for i in range(4)])
    config, records = load_model(folder / "start").config, data.RecordFile(tmp_path / "d.jsonl")
    monkeypatch.setattr(commands.records, "SOME", 1)

    def digest(name, change):
        shutil.copytree(folder / "images", tmp_path / name)
        change(tmp_path / name)
        return commands.records.survey(records, tmp_path / name, load_tokenizer(LLM), config, 1).digests["pictures"]

    larger = lambda images: Image.effect_noise((65, 64), 50).save(images / "3.bmp")
    same, size, first, last = (digest("same", lambda images: None), digest("size", larger),
                               digest("first", lambda images: flip(images / "0.bmp", 0.9)),
                               digest("last", lambda images: flip(images / "3.bmp", 0.9)))
    assert same == last and len({same, size, first}) == 3


def test_a_record_that_turns_bad_is_an_error(folder, mixed, tmp_path):
    done = train_in(folder, *mixed("0.bmp", "1.bmp", "2.bmp", "cut.bmp"))
    assert refused(done, "train.py: record the 3.: image ", "cut.bmp: cannot be read")


def test_a_record_that_turns_bad_is_left_out_and_named(folder, mixed, tmp_path):
    """Once, over two epochs, and when the run is resumed: --skip-bad 1 is enough for one."""
    flags = (*mixed("0.bmp", "1.bmp", "2.bmp", "cut.bmp"), "--skip-bad", 1)
    assert train_in(folder, *flags, "--stop-after", 2)[0] == 0
    assert train_in(folder, *flags, "--resume", "auto")[0] == 0
    left_out = [row["left out"] for row in rows_of(tmp_path / "out") if "left out" in row]
    assert len(left_out) == 1 and len(left_out[0]) == 1 and "cut.bmp: cannot be read" in left_out[0][0]


def test_the_run_stops_after_so_many(folder, mixed, tmp_path):
    flags = mixed("0.bmp", "1.bmp", "cut2.bmp", "cut.bmp")
    done = train_in(folder, *flags, "--skip-bad", 1)
    assert refused(done, "2 records could not be read, more than --skip-bad 1", "out/log.jsonl names them")
    left_out = [text for row in rows_of(tmp_path / "out") for text in row.get("left out", ())]
    assert sorted(text[:12] for text in left_out) == ["record the 2", "record the 3"] and left_out[-1] in done[2]


def test_a_held_back_record_that_turns_bad_is_told_too(folder, mixed, tmp_path):
    flags = mixed("0.bmp", "cut.bmp")
    done = train_in(folder, "--images", tmp_path / "images", "--out", tmp_path / "out", "--val", tmp_path / "d.jsonl",
                    "--val-every", 1, "--skip-bad", 1, "--stop-after", 1)
    assert done[0] == 0 and flags, done
    assert "record the 1." in rows_of(tmp_path / "out")[0]["left out"][0]


def test_check_reads_as_the_run_does(folder, mixed, tmp_path):
    """--preset and --model: whether masks are read, and how much fits; the tokenizer and the chat of the run."""
    mixed("0.bmp", answers=("yes " * 300,))
    box = json.loads((tmp_path / "d.jsonl").read_text()) | {"id": "box", "masks": [{"bbox": [5, 5, 20, 10]}]}
    box["conversations"] = [{"from": "human", "value": "<image>\n<region>?"}, {"from": "gpt", "value": "no"}]
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write(json.dumps(box) + "\n")
    check = lambda *flags: command_line(commands.records.main, "check", tmp_path / "d.jsonl", "--images",
                                        tmp_path / "images", "--workers", 1, *flags)
    code, out, _ = check("--preset", "tiny-plus")
    assert code == 0 and "2 records, 0 with a problem" in out
    code, out, _ = check("--preset", "tiny")
    assert code == 1 and "line 2" in out and "the model reads whole images only" in out and "no room" not in out
    small = pathlib.Path(shutil.copytree(folder / "start/step-000001", tmp_path / "small"))
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "max_len": 200}))
    code, out, _ = check("--model", small)
    assert code == 1 and "at most 200 fit" in out and "the model reads whole images only" in out
    (small / "config.json").write_text(json.dumps({**config, "llm_dir": str(tmp_path / "none")}))
    code, _, err = check("--model", small)
    assert code == 2 and f"it is not at {tmp_path / 'none'}" in err


# ---------------------------------------------------------------------------------------------- 8: held-back records

def test_the_loss_of_held_back_records(folder, tmp_path):
    """In the log at every second step, as the checkpoint's model has it, record by record; red in the picture."""
    write_records(tmp_path / "val.jsonl", ["0.bmp", "3.bmp", "2.bmp"], answers=("a port", "x", "none of these"))
    out = tmp_path / "out"
    done = train_in(folder, "--out", out, "--val", tmp_path / "val.jsonl", "--val-every", 2, "--micro", 2)
    assert done[0] == 0 and "| val " in done[1], done
    rows = rows_of(out)
    assert ["val" in row for row in rows] == [False, True, False, True]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in rows_of(folder / "whole")], abs=1e-4)
    held_back = data.RecordFile(tmp_path / "val.jsonl")
    for row in rows[1::2]:
        model = load_model(out / f"step-{row['step']:06d}")
        records = data.Records(held_back, folder / "images", load_tokenizer(LLM), model.config)
        with torch.no_grad():
            losses, _, learned = zip(*[model(data.collate([records[i]])) for i in range(3)])
        assert row["val"] == pytest.approx(float(sum(losses) / sum(learned)), abs=1e-4)
    colors = {color for _, color in Image.open(out / "loss.png").getcolors(10 ** 6)}
    assert (200, 40, 40) in colors
    assert (200, 40, 40) not in {color for _, color in Image.open(folder / "whole/loss.png").getcolors(10 ** 6)}


def test_a_mistake_in_held_back_records_is_found_before_the_first_step(folder, mixed, tmp_path):
    flags = mixed("0.bmp", "none.bmp")
    done = train_in(folder, "--out", tmp_path / "out", "--val", flags[1])
    assert refused(done, "record the 1.: image none.bmp: no such file") and os.listdir(tmp_path / "out") == ["run.lock"]
