"""
Damaged, lying and hostile inputs of every kind: each is refused in one line that names it, or it works to its end.

    python -m checks.fuzz 10000 [--seed 0]              # all kinds in turn, some minutes on two cores
    python -m checks.fuzz --only images --case 17       # this case alone, with its traceback

A case (checks/cases.py) follows from (seed, kind, number) alone. It runs in another process and may take 10 seconds and
2 GB. A failure is an exception other than ValueError and FileNotFoundError, a message that is long, of several lines or
without the name of its file or flag, a hang, too much memory, an untouched example that is refused, or nonsense that is
accepted.
"""
import collections
import itertools
import multiprocessing
import os
import pathlib
import random
import re
import resource
import shutil
import sys
import time
import traceback
from multiprocessing.connection import wait

import torch

from checks import mutations as m
from checks.cases import KINDS, Nonsense, Refused
from commands.arguments import Parser, whole

SECONDS, MEMORY, LONGEST = 10, 2 * 2 ** 30, 600             # that a case may take; characters of a message
SOME = 16                                   # cases in turn in a process


# ---------------------------------------------------------------------------------------------- one case

def run_case(seed, kind, number, folder, debug=False):
    """-> (what became of it, in a word; a line about it). debug: print the case, and any traceback."""
    make, run = KINDS[kind]
    case = make(random.Random(f"{seed} {kind} {number}"), folder)
    if debug:
        print(f"{case}\n")
    try:
        run(case)
    except Nonsense as e:
        return "nonsense", str(e)[:300]
    except BaseException as e:              # tiktoken panics with what is no Exception
        if debug:
            traceback.print_exc()
        if isinstance(e, (ValueError, FileNotFoundError)):
            return judge_refusal(case, e)
        place, text = traceback.extract_tb(e.__traceback__)[-1], f"{type(e).__name__}: {e}"[:200].replace("\n", " ")
        memory = isinstance(e, MemoryError) or "allocate memory" in str(e)
        return "memory" if memory else "traceback", f"{text} ({place.name}, {place.lineno})"
    return ("nonsense", f"accepted: {case.wrong}") if case.wrong else ("worked", "")


def judge_refusal(case, error):
    text = str(error)
    if re.search(r"allocate|[Mm]emory|cannot be read, $", text):
        return "memory", text[:300]
    if case.valid:
        return "nonsense", f"refused, though valid: {text[:300]}"
    named = case.path.name in text or names_flag_or_file(case, text, type(error) is Refused)
    if "\n" in text or len(text) > LONGEST or not named:
        lines = text.count("\n") + 1
        return "traceback", f"{'' if named else 'nameless, '}{len(text)} characters, {lines} lines: {text!r:.300}"
    return "refused", text


def names_flag_or_file(case, text, of_command):
    """Whether a message has a flag, a path or a file in it, or a flag's value, which says as much."""
    text = text.partition(": ")[2] if of_command else text                         # without the command's name
    if not of_command and case.value is not None:
        return True                         # what is read is no file, or more than one
    given = [part for argument in (case.value or ())[1:] for part in (argument, *argument.split("="))]
    words = [word[:50] for part in given for word in (part, *part.split(","))]
    words += [word.encode("ascii", "backslashreplace").decode() for word in words]
    words += [word.strip("-").replace("-", "_") for word in words]                 # max_len for --max-len
    return bool(re.search(r"\w\.[a-z]|^\w+_\w+ |(^|[\s'])\.*/|(^|\s)--?[a-z]|''", text)
                or any(text.startswith(f"{word} ") or f"'{word}'" in text for word in words)
                or any(len(word) > 1 and word in text for word in words))


# ---------------------------------------------------------------------------------------------- all cases

def run_all(cases, seed, folder, processes):
    """Yields (kind, number, outcome, text) of every case as it ends. A process that hangs is killed."""
    cases, running, fork = iter(cases), {}, multiprocessing.get_context("fork")
    while True:
        while len(running) < processes and (some := list(itertools.islice(cases, SOME))):
            ours, theirs = multiprocessing.Pipe(duplex=False)
            process = fork.Process(target=run_some, args=(theirs, seed, some, folder))
            process.start()
            theirs.close()
            running[ours] = process, some, time.time() + SECONDS
        if not running:
            return
        ready = wait(running, timeout=0.1)
        for pipe, (process, some, end) in list(running.items()):
            if pipe not in ready and time.time() < end:
                continue
            running[pipe], case, lost = (process, some, time.time() + SECONDS), some.pop(0), True
            try:
                result = pipe.recv() if pipe in ready else ("hang", f"more than {SECONDS} s")
                lost = result[0] == "hang"
            except EOFError:
                result = "traceback", "the process died"
            if lost or not some:
                cases = itertools.chain(some, cases)
                process.kill()
                process.join()
                del running[pipe]
            yield (*case, *result)


def run_some(pipe, seed, cases, folder):
    # What is asked for counts here, what is used below: Pillow asks to read as much as a damaged PNG says is to come.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_of("VmData") + 4 * MEMORY,) * 2)
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""             # a GPU takes more memory than that
    sys.stderr = open(os.devnull, "w")      # warnings; what a command writes there is read apart
    for kind, number in cases:
        place = folder / f"{kind}-{number}"
        place.mkdir()
        pathlib.Path("/proc/self/clear_refs").write_text("5")                      # the peak, VmHWM, counts from here
        before = memory_of("VmRSS")
        try:
            result = run_case(seed, kind, number, place)
        except Exception as e:
            result = "traceback", f"the case was not made: {type(e).__name__}: {e}"
        peak = memory_of("VmHWM") - before
        pipe.send(("memory", f"{peak / 2 ** 30:.1f} GiB") if peak > MEMORY else result)
        shutil.rmtree(place)


def memory_of(line):
    """Bytes of this process, by a line of /proc/self/status."""
    return 1024 * int(re.search(rf"{line}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])


def fuzz(n, seed=0, only=None):
    """n cases, the kinds in turn -> {kind: Counter of outcomes}; failures are printed."""
    kinds = [only] if only else list(KINDS)
    cases = [(kind, number) for number in range(-(-n // len(kinds))) for kind in kinds][:n]
    counts = {kind: collections.Counter() for kind in kinds}
    with m.examples() as folder:
        for kind, number, outcome, text in run_all(cases, seed, folder, os.cpu_count()):
            counts[kind][outcome] += 1
            if outcome not in ("worked", "refused"):
                print(f"{kind} case {number}, seed {seed}: {outcome}: {text}", flush=True)
    return counts


def run(args):
    if args.case is not None:
        with m.examples() as folder:
            (folder / "case").mkdir()
            print(*run_case(args.seed, args.only, args.case, folder / "case", debug=True), sep=": ")
        return
    began = time.time()
    counts = fuzz(args.n, args.seed, args.only)
    for kind, count in counts.items():
        print(f"{kind:12}{count.total():7,} cases, {count['refused']:6,} refused, {count['worked']:6,} worked")
    total = sum(counts.values(), collections.Counter())
    print(f"seed {args.seed}, {total.total():,} cases, {time.time() - began:.0f} s: {total['traceback']} tracebacks, "
          f"{total['hang']} hangs, {total['memory']} of too much memory, {total['nonsense']} nonsense accepted")
    sys.exit(total.total() > total["worked"] + total["refused"])


def main():
    parser = Parser(prog="python -m checks.fuzz", description=__doc__)
    parser.add_argument("n", type=whole(1), nargs="?", default=10000, help="cases (default 10000)")
    parser.add_argument("--seed", type=whole(0), default=0, help="default 0")
    parser.add_argument("--only", choices=KINDS, help="one kind")
    parser.add_argument("--case", type=whole(0), help="with --only: this case alone, in this process, without limits")
    parser.run(run)


if __name__ == "__main__":
    main()
