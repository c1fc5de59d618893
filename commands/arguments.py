"""
What all command lines share: numbers with a range, and one line with exit code 2 for every mistake.

    parser = Parser(prog="data.py", description=__doc__)
    parser.add_argument("--batch", type=whole(1))
    parser.run(work)                        # work(flags); "data.py: argument --batch: 0: expected a whole number ..."
"""
import argparse
import json
import math
import os
import pathlib
import sys
import time
from functools import partial

from files.text import one_line

MOST = 1_000_000                            # of whatever is counted
SEEDS = 2 ** 32 - 1                         # train.py multiplies a seed by a million: that fits 64 bits


class Parser(argparse.ArgumentParser):
    """Flags are given in full, and a mistake in them is a ValueError: it ends a command as every other mistake does."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")                      # for a terminal that lacks a letter

    def error(self, message):
        raise ValueError(message)

    def run(self, work, argv=None):
        """work(flags). A package that is not installed is a mistake like any other."""
        try:
            work(self.parse_args(argv))
        except (ValueError, OSError, ModuleNotFoundError) as e:
            end(self.prog.removeprefix("python -m "), e)


def end(command, mistake, code=2, silent=False):
    """
    End with one line and this exit code. torchrun, which reports at length that a process failed, reads the line from
    a file and ends with it. silent: another process of the command prints it.
    """
    line, report = one_line(f"{command}: {mistake}"), os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        message = {"message": line, "extraInfo": {"timestamp": int(time.time())}}
        pathlib.Path(report).write_text(json.dumps({"message": message}))
    if not (silent and report):
        print(line, file=sys.stderr)
    sys.exit(code)


def number(kind, words, least, most=MOST):
    """An argparse type; what lies outside the range, NaN too, is refused."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{one_line(text)[:60]}: expected {words} from {least:,} to {most:,}")
        return value
    return parse


whole = partial(number, int, "a whole number")
real = partial(number, float, "a number")
