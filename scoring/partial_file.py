"""
Predictions as they come, in OUT.partial: an evaluation that was cut off, by whatever, goes on where it ends.

Of each column of each benchmark, in the order in which they are asked: a line of settings, all that the answers depend
on, then a line for each row. Only the last line can be damaged; it is cut. What stands there is not asked again.
"""
import fcntl
import json
from collections import deque

from files.checked_json import checked
from files.text import one_line, parse_json, unwritten


class PartialFile:
    def __init__(self, path, anew=False):
        self.path, self.file = path, open(path, "a+b", buffering=0)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)                  # until this process ends
        except OSError:
            raise ValueError(f"{path}: another evaluation is writing it; give another --out") from None
        self.file.seek(0)
        lines = [] if anew else self.file.read().split(b"\n")[:-1]
        self.file.truncate(sum(len(line) + 1 for line in lines))
        self.there = deque(checked(parse_json(line, path), dict, path) for line in lines)

    def begin(self, settings):
        """-> the answers that are there of the part that begins now."""
        if not self.there:
            self.append([settings])
            return []
        found, answers = self.there.popleft(), []
        for name, value in settings.items():
            if found.get(name) != value:
                raise ValueError(one_line(f"{self.path} was begun with {name} {found.get(name)}, now it is {value}; "
                                          "the same flags go on with it, --overwrite asks all anew"))
        while self.there and "prediction" in self.there[0]:
            answers.append(checked(self.there.popleft()["prediction"], str, f"{self.path}: 'prediction'"))
        return answers

    def append(self, rows):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        try:
            while text:
                text = text[self.file.write(text):]
        except OSError as e:                # a full disk
            raise ValueError(f"{unwritten(self.path, e)}; the same command goes on from what is there") from None
