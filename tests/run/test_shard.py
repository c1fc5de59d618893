"""
Proves that a model cut over two processes (--shard) trains as one that each process holds whole, takes half as much
memory, and writes the same files.

    pytest tests/run/test_shard.py
"""
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, assert_near, command_line
from safetensors.torch import load_file

import commands.processes
import train
from aquila import load_model
from toy.scenes import make_records

SAY = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "it"}]


def held(tensors):
    """Bytes of what this process holds of them."""
    return sum(t.nbytes for t in (t.to_local() if hasattr(t, "to_local") else t for t in tensors))


def train_and_count(run, *rest):
    """train.train; writes to OUT/held-RANK.json what this process held, in bytes."""
    params, count = list(run.model.parameters()), {}
    trained = run.trainable.values()
    run.optimizer.register_step_pre_hook(lambda *_: count.update(gradients=held(p.grad for p in trained)))
    just_train(run, *rest)
    count["optimizer"] = held(mean for p in trained for mean in run.optimizer.state[p].values())
    count["weights"] = held(params)
    (run.out / f"held-{os.environ['RANK']}.json").write_text(json.dumps(count))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """
    All runs, one after the other in the same two processes, for these take seconds to start. Of the four samples of a
    step three have no image; the fourth is in a process while the other one has none.
    """
    out = tmp_path_factory.mktemp("runs")
    for name, task in (("tiny", "chat"), ("tiny-plus", "region chat")):
        [record] = make_records("train", 1, task, size=128)[:1]
        records = [record, *({"id": str(i), "conversations": SAY} for i in range(3))]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def flags(name, preset, stage, *more, steps=2):
        return ["--out", out / name, "--preset", preset, "--stage", stage, "--data", out / f"{preset}.jsonl", "--steps",
                steps, "--batch", 4, "--micro", 1, "--workers", 0, "--image-size", 64, *more]

    second = "tiny", 2, "--init-from", out / "1", "--lora-dropout", 0.5
    third = "tiny-plus", 3, "--init-from", out / "plus", "--full-llm", "--val", out / "val.jsonl", "--val-every", 1
    lines = [flags("1", "tiny", 1, steps=1),
             flags("2", *second), flags("2 cut", *second, "--shard", "--grad-checkpoint"),
             flags("plus", "tiny-plus", 1, steps=1),
             flags("3", *third, steps=3), flags("3 cut", *third, "--shard", steps=3)]
    in_turn = ("--stop-after", 1), ("--stop-after", 2, "--resume", "auto", "--shard"), ("--resume", "auto")
    lines += [flags("3 in turn", *third, *more, steps=3) for more in in_turn]
    (out / "val.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:3]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            __file__, json.dumps(lines, default=str)]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def drifted(one, two):
    """How far two files of tensors lie apart, in parts of their length."""
    one, two = load_file(one), load_file(two)
    assert one.keys() == two.keys()
    length = lambda tensors: sum(t.square().sum().item() for t in tensors) ** 0.5
    return length(one[k] - two[k] for k in one) / length(one.values())


@pytest.mark.parametrize("whole, cut", [("2", "2 cut"), ("3", "3 cut"), ("3", "3 in turn")])
def test_it_trains_as_one_that_is_not_cut(runs, whole, cut):
    """
    Stage 2 (recomputing its layers; it trains all that stage 1 does) and stage 3 with all of the LM, accumulating, one
    process without an image; cut in one of three steps, with a resume before and after it. Adam forgives a factor, the
    norm in the log does not.
    """
    last = [max((runs / name).glob("step-*")) for name in (whole, cut)]
    assert sorted(path.name for path in last[0].iterdir()) == sorted(path.name for path in last[1].iterdir())
    assert_near("--shard = DDP, weights after the steps", drifted(*(path / "model.safetensors" for path in last)), 1e-6)
    assert_near("--shard = DDP, Adam's means", drifted(*(path / "optimizer.safetensors" for path in last)), 1e-5)
    logs = [[json.loads(line) for line in (runs / name / "log.jsonl").open()] for name in (whole, cut)]
    assert len(logs[0]) == len(logs[1])
    for one, two in zip(*logs):
        for name in {"loss", "gnorm", "val"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=1e-4), name


def test_each_process_holds_half(runs):
    """Of gradients and Adam's means half, to rounding up; of the weights half, and the vision encoder."""
    vision = held(load_model(runs / "3").vision.parameters())
    for rank in (0, 1):
        whole, cut = (json.loads((runs / name / f"held-{rank}.json").read_text()) for name in ("3", "3 cut"))
        assert cut["gradients"] == pytest.approx(whole["gradients"] / 2, rel=0.01)
        assert cut["optimizer"] == pytest.approx(whole["optimizer"] / 2, rel=0.01)
        assert cut["weights"] - vision == pytest.approx((whole["weights"] - vision) / 2, rel=0.01)


def test_its_files_are_those_of_any_run(runs):
    stored, model = load_file(runs / "3 cut/model.safetensors"), load_model(runs / "3 cut")
    assert all(torch.equal(p, stored[name]) for name, p in model.own_parameters().items())
    assert (runs / "3 cut/config.json").read_text() == (runs / "3/config.json").read_text()


def test_a_single_process_has_nothing_to_cut(tmp_path):
    code, _, err = command_line(train.main, "--stage", 1, "--shard", "--out", tmp_path)
    assert code == 2 and "several processes" in err and err.count("\n") == 1


if __name__ == "__main__":
    place, just_train = train.start_processes(), train.train
    train.start_processes, train.train = lambda: place, train_and_count
    commands.processes.end_at_once = lambda error: None        # the process has more to do
    for line in json.loads(sys.argv[1]):
        sys.argv = ["train.py", *map(str, line)]
        train.main()
    dist.destroy_process_group()
