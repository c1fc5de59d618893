"""
Weight files: what safetensors and torch.save wrote, read tensor by tensor and filled into a model strictly.
"""
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from files.text import written_whole


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple
    read: Callable                          # -> the tensor; to be called once, for what is read is forgotten


def open_tensors(path):
    """
    {name: StoredTensor} of a .safetensors file or of what torch.save wrote (.bin, .pt, .pth): the shapes at once, a
    tensor when it is read, so that a model of 16 GB is loaded with little more memory than its own.
    """
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        file = open_safetensors(path)
        return {name: StoredTensor(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
                for name in file.keys()}
    tensors = open_pickle(path)
    return {name: StoredTensor(tuple(t.shape), partial(tensors.pop, name)) for name, t in tensors.items()}


def open_safetensors(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not there")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: not a whole safetensors file ({e}); download it again") from None


def open_pickle(path):
    """
    {name: tensor} of a file of torch.save, without running any code in it; mapped and not read, where it is a zip. A
    training checkpoint's "model" or "state_dict" is taken out of it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not there")
    if pathlib.Path(path).suffix not in (".bin", ".pt", ".pth"):
        raise ValueError(f"{path}: expected weights that end in .safetensors, .bin, .pt or .pth")
    try:                                    # torch.save before 1.6 wrote no zip: such a file is read whole
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as e:
        code = re.search(r"GLOBAL (\S+)", str(e))
        if code:
            raise ValueError(f"{path}: refused, its pickle wants to run {code[1]}; get the safetensors file") from None
        reason = re.split(r"\n|\. ", str(e))[0] or "it ends too early"
        raise ValueError(f"{path}: not a whole PyTorch file ({reason}); download it again") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: holds something else than named tensors; expected a model's state dict")
    return tensors


@torch.no_grad()
def fill(targets, stored, source):
    """
    Copy stored, an iterable of (name, StoredTensor), into targets {name: parameter}, one tensor at a time. Before
    anything is read, every name must be there once, with its shape, else one ValueError lists what is wrong.
    """
    missing, pairs, unexpected, misshapen = dict(targets), [], [], []
    for name, tensor in stored:
        target = missing.pop(name, None)
        if target is None:
            unexpected.append(f"{name} {tensor.shape}")
        elif tensor.shape != tuple(target.shape):
            misshapen.append(f"{name} {tensor.shape} instead of {tuple(target.shape)}")
        else:
            pairs.append((target, tensor))
    lists = {"missing": [f"{name} {tuple(p.shape)}" for name, p in missing.items()], "unexpected": unexpected,
             "misshapen": misshapen}
    wrong = [f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
             for kind, names in lists.items() if names]
    if wrong:
        raise ValueError(f"{source}: does not fit the model; {'; '.join(wrong)}; is it the file of another model?")
    for target, tensor in pairs:
        target.copy_(tensor.read())


def write_tensors(path, tensors, metadata=None):
    """{name: tensor} as a safetensors file; metadata: {name: text}."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
