"""
The folder of a training run: its checkpoints and its log.

    run.lock                            locked by the run's first process while it lives
    log.jsonl, loss.png                 a row a step, only ever appended to; the same, drawn
    step-000200/                        a checkpoint:
        model.safetensors, config.json      what every command takes as --model or --init-from
        optimizer.safetensors, run.json     what --resume needs besides: Adam's means; the step, and the run's settings
        SHA256SUMS                          of these four, as sha256sum writes it
    model.safetensors, config.json      of the last step, when the schedule is finished

A checkpoint is written under another name and renamed: a folder called step-* is whole.
"""
import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import sys
import time

import torch

from aquila import save_model
from commands.processes import rank_and_world
from commands.sharding import copy_to, joined_in_first
from files.checked_json import Fields, read_fields
from files.text import file_digest, one_line, parse_json, regular_file, unwritten, write_json, written_whole
from files.weights import fill, open_tensors, write_tensors
from pictures.curve import draw_curve

STEP = re.compile(r"step-\d{6,9}")
# What a run writes, or wrote (state.pt), and what a kill leaves of it.
OURS = re.compile(rf"(log\.jsonl|loss\.png|model\.safetensors|config\.json|state\.pt|{STEP.pattern})((\.\d+\.tmp)*)")
FINISHED = ("config.json", "model.safetensors")
SEALED = (*FINISHED, "optimizer.safetensors", "run.json")


# ---------------------------------------------------------------------------------------------- which checkpoint

def checkpoints(folder):
    """The checkpoints of a run, oldest first."""
    found = (path for path in pathlib.Path(folder).glob("step-*") if STEP.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.name[5:]))


def find_checkpoint(out, resume, overwrite):
    """What a run in the folder `out` goes on from, or None. What lies there is not overwritten unasked."""
    own, found = checkpoints(out)[-1:], None
    there = [name for name in ("log.jsonl", "state.pt", *FINISHED) if (out / name).exists()]
    if not own and there and set(there) <= set(FINISHED):
        raise ValueError(f"{out} holds a model that no run of train.py wrote; choose another --out")
    if resume == "auto":
        found = own[0] if own else None
        if not own and "state.pt" in there and not overwrite:
            raise ValueError(f"--resume auto: {out}/state.pt is of earlier versions, which is not read; --overwrite "
                             "starts anew, --out takes another folder")
    elif resume:
        named = pathlib.Path(resume)
        found = named if STEP.fullmatch(named.name) else next(reversed(checkpoints(named)), named)
        if not (found / "run.json").exists():
            raise ValueError(f"--resume {resume}: no checkpoint there, a folder such as step-000200 (a state.pt of "
                             "earlier versions is not read)")
    if overwrite and found and found.resolve().parent == out.resolve():
        raise ValueError(f"--overwrite would remove {found}, which --resume goes on from; leave one of the two out (to "
                         "go on from an older checkpoint, take another --out)")
    holds_run = bool(own) or there not in ([], ["log.jsonl"])
    goes_on_here = bool(own and found) and own[0].resolve() == found.resolve()
    if holds_run and not goes_on_here and not overwrite:
        goes_on = "--resume auto goes on with its last checkpoint" if own else "it has no checkpoint to go on from"
        raise ValueError(f"{out} holds a run ({', '.join([path.name for path in own] + there)}); {goes_on}, "
                         "--overwrite starts anew, --out takes another folder")
    return found


def clear(out, everything):
    """Remove what killed runs left half-written, or all that a run wrote; never another file."""
    # The log last: it tells, should this be cut off, that the rest is a run's.
    for path in sorted(out.iterdir(), key=lambda path: path.name == "log.jsonl"):
        known = OURS.fullmatch(path.name)
        if known and (everything or known[2]):
            remove(path)


def remove(path):
    """A checkpoint loses its name first, so that it is whole as long as it has it."""
    if path.is_dir():
        shutil.rmtree(path.rename(temporary_for(path)))
    else:
        path.unlink()


def temporary_for(path):
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


# ---------------------------------------------------------------------------------------------- save and load

def save_checkpoint(run, step, keep):
    """Write the checkpoint of a step, then remove all but the `keep` newest. All processes call, the first writes."""
    weights, means = joined_in_first(run.model.own_parameters()), joined_in_first(moments(run))
    if rank_and_world()[0] > 0:
        return
    folder = checkpoint_of(run, step)
    for name, tensor in {**weights, **means}.items():
        if not tensor.isfinite().all():
            raise ValueError(f"step {step} is not saved: {name} holds NaN or infinite numbers; lower --lr")
    temporary = temporary_for(folder)
    try:
        save_model(run.model, temporary, weights, run.frozen)
        write_tensors(temporary / "optimizer.safetensors", means)
        write_json(temporary / "run.json", {"step": step, "settings": run.settings})
        seal(temporary)
        temporary.rename(folder)
        reach_disk(run.out)
    except (ValueError, OSError) as e:
        reason = str(e).replace(str(temporary), str(folder))
        raise ValueError(f"{reason}; --resume auto goes on from the checkpoint before, if there is one") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(run.out)[:-keep]:
        remove(old)


def moments(run):
    """{name: tensor} of what AdamW keeps. Its count of steps is the run's."""
    return {f"{kind}.{name}": run.optimizer.state[p][kind]
            for name, p in run.trainable.items() for kind in ("exp_avg", "exp_avg_sq")}


def checkpoint_of(run, step):
    return run.out / f"step-{step:06d}"


def seal(folder):
    """Write SHA256SUMS, and wait until all has reached the disk: older checkpoints are removed next."""
    (folder / "SHA256SUMS").write_text("".join(f"{file_digest(folder / name)}  {name}\n" for name in SEALED))
    for path in (*folder.iterdir(), folder):
        reach_disk(path)


def reach_disk(path):
    """Of a file its content, of a folder its names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno != errno.EINVAL:         # of a folder, on some file systems
            raise
    finally:
        os.close(descriptor)


def check_checkpoint(folder, settings, force=False):
    """ValueError if a checkpoint is damaged, or (unless forced) of a run with other settings than these."""
    sums = regular_file(folder / "SHA256SUMS").read_text(errors="replace").splitlines()
    for name in SEALED:
        if f"{file_digest(folder / name)}  {name}" not in sums:
            raise ValueError(f"{folder / name} is damaged, it is not what was written (SHA256SUMS); remove {folder}, "
                             "and --resume auto takes the checkpoint before")
    was, now = flat(read_fields(folder / "run.json").take("settings", dict)), flat(settings)
    changed = [name for name in now | was if was.get(name) != now.get(name)]
    if changed and not force:
        name, more = changed[0], f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ValueError(f"{folder}: the run to resume had {name} {one_line(was.get(name))[:60]}, now it is "
                         f"{one_line(now.get(name))[:60]}{more}; give the same, or go on with --force-resume")


def flat(settings, prefix=""):
    """Nested settings as one level, {"recipe.lr": 0.001}: a mismatch is told by the smallest part."""
    named = {}
    for name, value in settings.items():
        named |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return named


def load_state(run, folder):
    """Put a run back where it was, -> the next step."""
    step = read_fields(folder / "run.json").take("step", int, 1, run.steps)
    if STEP.fullmatch(folder.name) and int(folder.name[5:]) != step:
        raise ValueError(f"{folder} holds step {step}: it was renamed; give it the name step-{step:06d} again")

    def load(tensors, path):
        fill(tensors, open_tensors(path).items(), path, copy_to)

    load(run.model.own_parameters(), folder / "model.safetensors")
    for p in run.trainable.values():
        run.optimizer.state[p] = {"step": torch.tensor(float(step)), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
    load(moments(run), folder / "optimizer.safetensors")
    return step


def finish(run):
    """Copy the last step's model to where a finished run has it."""
    for name in FINISHED:
        with written_whole(run.out / name) as temporary:
            shutil.copyfile(checkpoint_of(run, run.steps) / name, temporary)


# ---------------------------------------------------------------------------------------------- log

class Log:
    """log.jsonl, and the line a person watches."""

    def __init__(self, out, start, steps):
        self.path, self.picture, self.start, self.steps = out / "log.jsonl", out / "loss.png", start, steps
        self.rows, end = read_rows(self.path, start)
        if self.path.exists():
            os.truncate(self.path, end)     # rows after the checkpoint come again; a kill may have cut the last one
        self.began = self.last = time.time()

    def write(self, row):
        now = time.time()
        seconds, self.last = now - self.last, now
        self.rows.append({**row, "seconds": round(seconds, 3)})
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        except OSError as e:
            raise unwritten(self.path, e) from None
        step, val = row["step"], f" | val {row['val']:.4f}" if "val" in row else ""
        peak = f" | {row['peak GB']} GB" if "peak GB" in row else ""
        left = (self.last - self.began) / (step - self.start) * (self.steps - step)
        line = (f"step {step}/{self.steps} | loss {row['loss']:.4f}{val} | {row['tokens'] / seconds:7,.0f} tok/s | "
                f"lr {row['lr']:.2e} | gnorm {row['gnorm']:6.2f}{peak} | {left:5.0f} s left")
        with contextlib.suppress(OSError):  # a terminal that is gone is no reason to stop: the log has it
            if sys.stdout.isatty():
                print(f"\r{line}", end="\n" if step == self.steps else "", flush=True)
            elif step % 20 == 0 or step in (1, self.steps) or val:
                print(line, flush=True)

    def draw(self):
        with written_whole(self.picture) as temporary:
            draw_curve(self.rows, temporary)


def read_rows(path, last):
    """-> the rows of a log up to the step `last`, and where they end in the file."""
    rows, end = [], 0
    for number, line in enumerate(regular_file(path).open("rb") if path.exists() else (), 1):
        if not line.endswith(b"\n"):
            break
        where = f"{path}, line {number}"
        row = Fields(parse_json(line, where), where)
        row.take("loss", float)
        row.take("val", float, default=0.0)
        row.take("left out", list[str], default=[])
        if row.take("step", int, 1) > last:
            break
        rows.append(row.values)
        end += len(line)
    return rows, end
