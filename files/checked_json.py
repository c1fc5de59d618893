"""
JSON that others wrote, checked where a value is taken out: one that is missing, of another kind or out of range is one
line with file, name, value and what was expected. `true` is no number, NaN lies in no range, null counts as missing.
"""
import dataclasses
import types
import typing

from files.text import naming, read_json

LARGEST = {int: 2 ** 24, float: 1e15}       # no size, token id or rate is larger, and no product of sizes overflows
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list",
         dict: "an object"}


def checked(value, kind, where, low=0, high=None):
    """
    The value, if it is of this kind: a type in NAMES (a number lies from low to high, default LARGEST), list[X],
    tuple[X, ...], tuple, dict[str, X], Fields, or a dataclass whose fields are of such kinds.
    """
    outer, inner = typing.get_origin(kind), typing.get_args(kind)
    if outer is dict:
        return {name: checked(item, inner[1], where) for name, item in checked(value, dict, where).items()}
    if outer:
        return outer(checked(item, inner[0], where) for item in checked(value, list, where))
    if kind is tuple:
        return tuple(checked(value, list, where))
    if kind not in NAMES:
        return Fields(value, where) if kind is Fields else make_config(kind, value, where)
    fits, wanted = isinstance(value, kind), NAMES[kind]
    if kind in LARGEST:
        high = high or LARGEST[kind]
        fits, wanted = type(value) in (int, kind) and low <= value <= high, f"{wanted} from {low} to {high}"
    if not fits:
        raise ValueError(f"{where} is {'missing' if value is None else repr(value)[:60]}, expected {wanted}")
    return value


class Fields:
    """A JSON object, its values taken by name; where: its file, to begin an error with."""

    def __init__(self, values, where=""):
        self.values, self.where = checked(values, dict, where), where

    def take(self, name, kind, low=0, high=None, default=dataclasses.MISSING):
        value = self.values.get(name)
        if value is None and default is not dataclasses.MISSING:
            return default
        return checked(value, kind, f"{self.where}: '{name}'", low, high)


def read_fields(path, default=None):
    """default: the values of a file that may be missing."""
    return Fields(read_json(path, default), path)


def make_config(kind, values, where, **kinds):
    """A dataclass from the object that dataclasses.asdict made of it. kinds: {field: dataclass} if not as annotated."""
    given, made = Fields(values, where), {}
    for field in dataclasses.fields(kind):
        wanted = kinds.get(field.name, field.type)
        if isinstance(wanted, types.UnionType):                # X | None: null is the default
            wanted = typing.get_args(wanted)[0]
        low = 0 if field.default == 0 or wanted is float else 1                    # a size of 0: off by default
        made[field.name] = given.take(field.name, wanted, low, default=field.default)
    unknown = [name for name in given.values if name not in made]
    if unknown:
        raise ValueError(f"{where}: {unknown[0][:60]!r} is not known; known are {', '.join(made)}")
    with naming(where):
        return kind(**made)
