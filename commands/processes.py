"""
The processes that torchrun starts, `torchrun --nproc-per-node 2 train.py ...`: what they tell each other, and how they
end. A plain python run is one process.

What is done by a process alone may fail in it alone, while the others wait for it: so it is done `together`.
"""
import contextlib
import errno
import fcntl
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from commands.arguments import end
from files.text import one_line


def start_processes():
    """-> (rank, number of processes, device). torchrun sets the environment."""
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    if cuda:
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"{gpus} GPU(s) for more processes; start one for each, torchrun --nproc-per-node {gpus}")
        torch.cuda.set_device(local)
    if world > 1:                           # the others may wait long while the first looks at a million records
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    return rank, world, torch.device("cuda", local) if cuda else torch.device("cpu")


def rank_and_world():
    """-> (rank, number of processes) of what start_processes started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """-> a list of the values that the processes gave, in the order of their ranks, the same in every process."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------------------------------------- mistakes

class SharedMistake(ValueError):
    """All processes have this one: the first prints it."""


class Stopped(BaseException):
    """By a signal: (its number, a line about it). No Exception: what catches those of a damaged file lets it pass."""


def together(work):
    """-> work(), done in every process. A mistake in one of them stops all with the same SharedMistake."""
    result = mistake = None
    try:
        result = work()
    except Exception as e:
        mistake = explain(e)
        if mistake is None:
            raise
    for line in filter(None, gather(mistake)):
        raise SharedMistake(line)
    return result


def from_first(work):
    """-> what work() gives in the first process, in every process; a mistake there stops all."""
    rank, world = rank_and_world()
    given = [together(lambda: work() if rank == 0 else None)]
    if world > 1:
        dist.broadcast_object_list(given)
    return given[0]


def explain(error):
    """One line about an error that its user can mend; None for one of ours, which needs its traceback."""
    text, (_, world) = str(error) or type(error).__name__, rank_and_world()
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory; take fewer samples at once, --micro or --batch ({one_line(text)[:200]})"
    if world > 1 and re.search("onnection (closed|reset)|roken pipe|NCCL", text):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)                       # torchrun ends this process before, and tells of the one that failed
        return f"another process has ended ({one_line(text)[:200]})"
    known = isinstance(error, ValueError | OSError | ModuleNotFoundError) or "DataLoader worker" in text
    return text if known else None


@contextlib.contextmanager
def ending(command):
    """
    Around all that a command does in its processes: a mistake ends it with one line and exit code 2, printed by the
    first process if all have it, else by the one that has it; Stopped with a line and the exit code of its signal.
    """
    try:
        yield
    except Stopped as e:
        end(command, e.args[1], code=128 + e.args[0], silent=rank_and_world()[0] > 0)
    except Exception as e:
        (rank, world), line = rank_and_world(), explain(e)
        if line is None:
            raise
        alone = world > 1 and not isinstance(e, SharedMistake)
        end(command, f"process {rank}: {line}" if alone else line, silent=rank > 0 and not alone)
    finally:
        if dist.is_initialized():
            end_at_once(sys.exception())


def end_at_once(error):
    """
    One of several processes takes nothing apart that they share: gloo's destructor holds Python's lock and waits for a
    thread, which may wait for this lock.
    """
    code = getattr(error, "code", 0) or 0
    if error and not isinstance(error, SystemExit):
        traceback.print_exception(error)
        code = 1
    for worker in multiprocessing.active_children():
        worker.kill()
    with contextlib.suppress(OSError):      # of a terminal that is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


# ---------------------------------------------------------------------------------------------- signals, lock

STOPS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP      # of schedulers and torchrun; Ctrl-C; a terminal that closes


class StopSignal:
    """
    Those three, from `with StopSignal() as stop` on. The first one raises Stopped; or, once `stop.wait` is set, is kept
    in `stop.number` for a loop to find. One that follows within `same` seconds is the same, sent by a scheduler and by
    torchrun; a later one ends the process at once.
    """
    same = 2

    def __enter__(self):
        self.number, self.since, self.wait = 0, 0.0, False
        heard = [n for n in STOPS if dist.is_torchelastic_launched() or signal.getsignal(n) != signal.SIG_IGN]   # nohup
        self.before = {n: signal.signal(n, self.receive) for n in heard}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if self.number:
            if time.monotonic() - self.since > self.same:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.number, self.since = number, time.monotonic()
        if not self.wait:
            raise Stopped(number, f"ended by {signal.Signals(number).name}")


def ignore_signals(worker):
    """A DataLoader's worker_init_fn: torchrun signals to data workers, too; they end with the process they work for."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def lock(path):
    """-> a file, made at this path for nothing else, locked until it is closed or this process ends in whatever way."""
    file = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)       # not flock, which data workers would inherit
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
    except OSError as e:
        if file and e.errno in (errno.EAGAIN, errno.EACCES):
            file.seek(0)
            raise ValueError(f"{path} is locked by process {file.read(20)}, which still runs; wait for it or end it, "
                             "or choose another --out") from None
        raise ValueError(f"{path.parent} cannot be written: {e.strerror}; choose another --out") from None
    return file
