"""
Proves of every command that a number without sense, a misspelt flag or a missing one ends it with one line and exit
code 2 before it has done anything, and that the line names flag, value and what was expected; and that checks/walk.sh
types the commands of README.

    pytest tests/run/test_command_lines.py
"""
import pathlib
import re
import runpy
import shlex
import sys

import pytest
from conftest import ROOT, command_line

import commands.model
import commands.records
import corpora.__main__
import evaluate
import pictures.gallery
import toy.scenes
import train

MAINS = {"train": train.main, "evaluate": evaluate.main, "data": commands.records.main, "aquila": commands.model.main,
         "corpora": corpora.__main__.main, "gallery": pictures.gallery.main, "scenes": toy.scenes.main}
CHECKS = sorted(path.stem for path in pathlib.Path(ROOT, "checks").glob("*.py") if "\nif __name__" in path.read_text())


def run(line):
    command, *flags = shlex.split(line)
    return command_line(MAINS[command], *flags)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Where nothing lies, so that nothing runs long if a flag is taken, and where nothing may be written."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


# What stands before the flag makes the command whole.
@pytest.mark.parametrize("line", [
    *(f"train --stage 1 --data none.jsonl {flag}" for flag in (
        "--batch 0", "--batch -32", "--micro -8", "--micro 0", "--steps -1", "--steps 0", "--epochs 0", "--epochs inf",
        "--epochs nan", "--epochs 1e400", "--save-every 0", "--stop-after 0", "--stop-after -1", "--lora-rank 0",
        "--lora-alpha 0", "--lora-alpha nan", "--lora-dropout 1", "--lora-dropout -0.1", "--scenes -3", "--scenes 0",
        "--lr -1", "--lr 0", "--lr nan", "--lr inf", "--warmup 5", "--warmup -0.1", "--decay -1", "--seed -1",
        "--seed 99999999999999999999", "--workers -1", "--workers 1000000000", "--image-size 0", "--max-len 0",
        "--batch 1.5", "--batch 1e3", "--batch ''", "--batch x", "--lr x")),
    *(f"evaluate --model none --scenes 1 {flag}" for flag in (
        "--limit 0", "--limit -1", "--batch 0", "--workers -1", "--top-p 0", "--top-p nan", "--top-p 1.1",
        "--temperature nan", "--temperature -1", "--temperature inf", "--max-new-tokens 0", "--max-new-tokens -5",
        "--max-new-tokens 1000000000", "--seed -1", "--scenes -3", "--scenes 0")),
    *(f"data check none.jsonl {flag}" for flag in (
        "--workers 0", "--workers -2", "--workers 1000000000", "-n 0", "-n -1", "--max-len 0", "--image-size 0")),
    "corpora ucm --root none --out out.jsonl --limit-per-image 0", "gallery none.jsonl --limit 0",
    "gallery none.jsonl --limit -1", "scenes --out out -n 0", "scenes --out out --size 63",
    "scenes --out out --size 1000000000", "scenes --out out --start -1", "scenes --out out --seed -1"])
def test_numbers_without_sense(line):
    code, out, err = run(line)
    *_, flag, value = shlex.split(line)
    assert code == 2 and not out and err.count("\n") == 1, err
    # What begins with - and is no plain number counts as a flag for argparse, and the flag before it has no value.
    assert f"argument {flag}: {value}: expected a" in err or f"argument {flag}: expected one argument" in err


@pytest.mark.parametrize("line, message", [
    ("train --stage 1 --mic 4", "unrecognized arguments: --mic 4"), ("train", "required: --stage"),
    ("train --stage 1 --batch", "argument --batch: expected one argument"), ("train --stage 4", "invalid choice: 4"),
    ("train --stage 1 --init-from /none", "no model.safetensors in /none, the finished stage to start from"),
    ("evaluate --model none --scene 1", "unrecognized arguments: --scene 1"),
    ("evaluate --dtype int8 --scenes 1", "argument --dtype: invalid choice"),
    ("data look none.jsonl", "argument command: invalid choice: 'look'"), ("data check", "required: file"),
    ("aquila --preset huge", "argument --preset: invalid choice"), ("aquila --pre tiny", "unrecognized arguments"),
    ("corpora ucm --root none", "required: --out"), ("gallery none.jsonl --lim 3", "unrecognized arguments: --lim 3"),
    ("scenes", "required: --out")])
def test_flags_are_spelt_out_and_there(line, message):
    code, out, err = run(line)
    assert code == 2 and not out and err.count("\n") == 1 and message in err and "stage 0" not in err


@pytest.mark.parametrize("command", MAINS)
def test_a_line_is_never_long(command):
    """Also where a value comes back, with what no terminal should get."""
    code, out, err = command_line(MAINS[command], f"--{'x' * 5000}=\n\x1b[2J")
    assert code == 2 and not out and err.count("\n") == 1 and len(err) <= 601 and "\x1b" not in err


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_tells_its_use(name, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, f"checks.{name}", raising=False)              # runpy warns of one that is there
    for flag, expected in (("--help", 0), ("--none", 2)):
        monkeypatch.setattr("sys.argv", [f"{name}.py", flag])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(f"checks.{name}", run_name="__main__")
        assert stop.value.code == expected
    assert "usage" in capsys.readouterr().out


def test_the_walk_types_what_readme_says():
    """"The real thing", with two processes for four, and more flags behind, which make it small."""
    def typed(path):
        text = (ROOT / path).read_text().partition("\n## The real thing\n")[2] or (ROOT / path).read_text()
        lines = text.partition("\n## ")[0].replace("\\\n", "").replace("per-node 4", "per-node 2").splitlines()
        return [" ".join(line.split()) for line in lines if re.match("(python|torchrun) ", line)]

    readme, walk = typed("README.md"), typed("checks/walk.sh")
    assert len(readme) > 8
    for command in readme:
        assert any(line.startswith(command) for line in walk), command
