"""
How far a long piece of work is, on stderr: "model: 3,200/220,000, 410 s, 27,780 s left".
"""
import sys
import time

SECONDS = 30                                # between two lines, where there is no terminal


class Progress:
    """On a terminal one line that changes. done: what was there at the start."""

    def __init__(self, label, total, done=0):
        self.label, self.total, self.first = label, total, done
        self.began = self.shown = time.time()

    def show(self, done):
        now, terminal = time.time(), sys.stderr.isatty()
        if now - self.shown >= (0.2 if terminal else SECONDS) or terminal and done == self.total:
            self.shown, passed = now, now - self.began
            left = passed / max(done - self.first, 1) * (self.total - done)
            start, end = ("\r", "  " if done < self.total else "  \n") if terminal else ("", "\n")
            print(f"{start}{self.label}: {done:,}/{self.total:,}, {passed:,.0f} s, {left:,.0f} s left", end=end,
                  file=sys.stderr, flush=True)
