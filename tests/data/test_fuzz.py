"""
Proves on some of the cases of checks/fuzz.py, of every kind, that what is damaged, lying or hostile is refused in one
line or works to its end, and that the fuzzer sees it when this is not so. `python -m checks.fuzz 10000` is the same at
length.

    pytest tests/data/test_fuzz.py
"""
import pathlib
import random
import re
import subprocess
import sys

import pytest

from checks import fuzz, mutations
from checks.cases import KINDS, Case, Nonsense, Refused, lies
from checks.fuzz import judge_refusal

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_no_case_fails():
    """In a process of its own: cases are forked, and this one may have threads."""
    done = subprocess.run([sys.executable, "-m", "checks.fuzz", "156", "--seed", "1"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    counts = re.findall(r"(\w+) +13 cases, +(\d+) refused, +(\d+) worked", done.stdout)
    assert [kind for kind, *_ in counts] == list(KINDS)
    assert all(int(refused) > 3 and int(refused) + int(worked) == 13 for _, refused, worked in counts), done.stdout


def judged(monkeypatch, tmp_path, run, **case):
    case = Case(tmp_path / "model.bin", **case)
    monkeypatch.setitem(KINDS, "images", (lambda rng, folder: case, run))
    return fuzz.run_case(0, "images", 0, tmp_path)[0]


def fail(error):
    raise error


@pytest.mark.parametrize("error, outcome", [
    (ValueError("model.bin: cut off"), "refused"), (FileNotFoundError("model.bin is not there"), "refused"),
    (ValueError("cut off"), "traceback"), (ValueError("model.bin\nis cut off"), "traceback"),
    (ValueError("model.bin" + 600 * "x"), "traceback"), (KeyError("model.bin"), "traceback"),
    (BaseException("panic"), "traceback"), (MemoryError(), "memory"), (Nonsense("NaN"), "nonsense"),
    (ValueError("model.bin: cannot be read, "), "memory"),
    (RuntimeError("model.bin: can't allocate memory"), "memory")])
def test_what_counts_as_a_failure(monkeypatch, tmp_path, error, outcome):
    assert judged(monkeypatch, tmp_path, lambda case: fail(error)) == outcome


def test_wrong_cases_must_be_refused_and_valid_ones_must_not(monkeypatch, tmp_path):
    assert judged(monkeypatch, tmp_path, lambda case: None) == "worked"
    assert judged(monkeypatch, tmp_path, lambda case: None, wrong="NaN") == "nonsense"
    refuse = lambda case: fail(ValueError("model.bin is damaged"))
    assert judged(monkeypatch, tmp_path, refuse, wrong="NaN") == "refused"
    assert judged(monkeypatch, tmp_path, refuse, valid=True) == "nonsense"


def test_a_command_must_name_its_flag_or_file(tmp_path):
    case = Case(tmp_path, value=["train", "--steps=-1", "--data=none.jsonl"])
    lines = {"train.py: argument --steps: -1": "refused", "train.py: none.jsonl is not there": "refused",
             "train.py: no": "traceback", "usage: train.py\n--steps": "traceback"}
    for line, outcome in lines.items():
        assert judge_refusal(case, Refused(line))[0] == outcome


@pytest.mark.parametrize("config, lie", [
    ({"hidden_size": 24, "rope_theta": 1e4, "n_kv_heads": None, "vocab_size": -1}, ""),
    ({"rope_theta": 0}, "rope_theta is 0"), ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ({"r": True}, "r is True"), ({"hidden_size": 24.0}, "hidden_size is 24.0"), ({"lora": {"rank": 0}}, "rank is 0"),
    ({"lora_alpha": "x"}, "lora_alpha is 'x'"), ([], ""),
    ({"weight_map": {"a": "../b.bin"}}, "its index names '../b.bin'")])
def test_lies_of_configs(config, lie):
    assert lies(config) == lie


def test_a_case_follows_from_its_number(tmp_path):
    with mutations.examples():
        for kind, (make, _) in KINDS.items():
            found = []
            for folder in (tmp_path / f"{kind}-a", tmp_path / f"{kind}-b"):
                folder.mkdir()
                found.append(str(make(random.Random(f"0 {kind} 3"), folder)).replace(str(folder), ""))
            assert found[0] == found[1]
