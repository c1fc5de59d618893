"""
JSON, the paths that a data file names, and writing a file whole or not at all.
"""
import contextlib
import json
import os
import pathlib


def one_line(text):
    """Text of any origin as one printable line of bounded length, for a message."""
    text = str(text)
    text = text if len(text) <= 600 else f"{text[:400]} ... {text[-200:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def path_inside(name, root, what):
    """A file that a data file names, under root; what: "image", "mask". Data files come from anywhere."""
    root = pathlib.Path(root)
    path = root / name
    try:
        inside, there = path.resolve().is_relative_to(root.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as e:                               # too long, a NUL, a ring of links
        raise ValueError(f"{what} {one_line(name)}: not a path ({one_line(e)})") from None
    if not inside:
        raise ValueError(f"{what} {name}: the path leaves the image folder {root}")
    if not there:
        raise FileNotFoundError(f"{what} {name}: no such file in {root}; is the folder right?")
    return path


def read_text(path):
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text at byte {e.start}; is the download damaged?") from None


def parse_json(text, where=None):
    """Text, or bytes of UTF-8, -> a JSON value; where: the file, or file and line, to begin an error with."""
    prefix = "" if where is None else f"{where}: "
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(f"{prefix}brackets are nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"{prefix}not valid JSON: {e}; is the file cut off?") from None


def read_json(path, default=None):
    """default: the value of a file that may be missing."""
    if default is not None and not pathlib.Path(path).exists():
        return default
    return parse_json(read_text(path), path)


def read_json_lines(path):
    """Yields (where, value) of every line that is not blank; where: file and line, to begin an error with."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where)


@contextlib.contextmanager
def written_whole(path):
    """Yields a temporary path beside `path` and renames it when all went well: a file that is there is whole."""
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_json_lines(path, rows, ensure_ascii=True):
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows)
