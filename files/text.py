"""
JSON, the paths that a data file names, and writing a file whole or not at all.
"""
import contextlib
import hashlib
import json
import os
import pathlib
import tempfile

DEEPEST = 50                                # brackets within brackets


def one_line(text):
    """Text of any origin as one printable line of at most 600 characters, for a message."""
    text = str(text)
    text = text if len(text) <= 1200 else text[:600] + text[-600:]
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return line if len(line) <= 600 else f"{line[:400]} ... {line[-195:]}"


def path_inside(name, root, what):
    """
    A file that a data file names, under root; what: "image", "mask". Data files come from anywhere, so a name may not
    climb out. A link in the folder may lead anywhere: it is the user's own.
    """
    root, named = pathlib.Path(root), pathlib.PureWindowsPath(name)                # it knows "C:", "\\" and "/"
    path, name = root / name, one_line(name)[:200]
    try:
        inside, there = path.resolve().is_relative_to(root.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError):                                    # too long, a NUL, a ring of links
        raise ValueError(f"{what} {name}: not a path of this system") from None
    if not inside and (named.anchor or ".." in named.parts):
        raise ValueError(f"{what} {name}: the path leaves the image folder {root}")
    if not there:
        raise FileNotFoundError(f"{what} {name}: no such file in {root}; is the folder right?")
    return path


@contextlib.contextmanager
def naming(where=None):
    """A ValueError inside is one bounded line, and begins with the file, or file and line, that it is about."""
    try:
        yield
    except ValueError as e:
        raise ValueError(one_line(e if where is None else f"{where}: {e}")) from None


def regular_file(path):
    """The path, if a file is there: no folder, and no FIFO or device, which might never end."""
    if not os.path.isfile(path):
        raise FileNotFoundError(one_line(f"{path} is not there, or no regular file"))
    return pathlib.Path(path)


def file_digest(path):
    with regular_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text, where=None):
    """Text, or bytes of UTF-8, -> a JSON value; where: to begin an error with."""
    with naming(where):
        try:
            value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
        except UnicodeDecodeError as e:
            raise ValueError(f"not UTF-8 text at byte {e.start}; is the download damaged?") from None
        except RecursionError:
            raise ValueError("brackets are nested too deeply") from None
        except ValueError as e:
            raise ValueError(f"not valid JSON: {e}; is the file cut off?") from None
        layer = [[value]]
        for _ in range(DEEPEST):
            if not layer:
                break
            parts = [part.values() if isinstance(part, dict) else part for part in layer]
            layer = [inner for part in parts for inner in part if isinstance(inner, (dict, list))]
        if layer:
            raise ValueError("brackets are nested too deeply")
    return value


def read_json(path, default=None):
    """default: the value of a file that may be missing."""
    if default is not None and not pathlib.Path(path).exists():
        return default
    return parse_json(regular_file(path).read_bytes(), path)


def read_json_lines(path):
    """Yields (where, value) of every line that is not blank; where: file and line, to begin an error with."""
    for number, line in enumerate(regular_file(path).read_bytes().split(b"\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where)


@contextlib.contextmanager
def written_whole(path):
    """Yields a temporary path beside `path` and renames it when all went well: a file that is there is whole."""
    path = check_target(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        if e.errno is None or e.filename not in (None, str(temporary)):            # of a file that is read
            raise
        raise unwritten(path, e) from None
    finally:
        temporary.unlink(missing_ok=True)


def check_target(path):
    """The path, if a file can be written there; asked for before the work whose result goes there."""
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file; write to another")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as e:
        raise unwritten(path, e) from None
    return path


def unwritten(path, error):
    """What a full disk, or whatever else kept a file from being written, is told by."""
    return ValueError(one_line(f"{path} cannot be written: {error.strerror or error}"))


def write_json(path, value):
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_json_lines(path, rows, ensure_ascii=True):
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows)
