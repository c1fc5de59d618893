"""
Weight files: what safetensors and torch.save wrote, read tensor by tensor and filled into a model strictly.
"""
import pathlib
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from files.checked_json import read_fields
from files.text import one_line, regular_file, unwritten, written_whole

FLOATS = ("F16", "BF16", "F32", "F64", torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple
    dtype: torch.dtype | str                # or its name in safetensors
    read: Callable                          # -> the tensor; to be called once, for what is read is forgotten


def open_tensors(path):
    """
    {name: StoredTensor} of a .safetensors file or of what torch.save wrote (.bin, .pt, .pth): the shapes at once, a
    tensor when it is read, so that a model of 16 GB is loaded with little more memory than its own.
    """
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        file = open_safetensors(path)
        headers = [(name, file.get_slice(name)) for name in file.keys()]
        return {name: StoredTensor(tuple(header.get_shape()), header.get_dtype(), partial(file.get_tensor, name))
                for name, header in headers}
    tensors = open_pickle(path)
    if sum(t.nbytes for t in tensors.values()) > 2 * path.stat().st_size:          # two names may share one storage
        raise ValueError(f"{path}: its tensors claim more numbers than the file holds; download it again")
    return {name: StoredTensor(tuple(t.shape), t.dtype, partial(tensors.pop, name)) for name, t in tensors.items()}


def open_safetensors(path):
    path = regular_file(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(one_line(f"{path}: not a whole safetensors file ({e}); download it again")) from None


def open_pickle(path):
    """
    {name: tensor} of a file of torch.save, without running any code in it; mapped and not read, where it is a zip. A
    training checkpoint's "model" or "state_dict" is taken out of it.
    """
    if regular_file(path).suffix not in (".bin", ".pt", ".pth"):
        raise ValueError(f"{path}: expected weights that end in .safetensors, .bin, .pt or .pth")
    try:                                    # torch.save before 1.6 wrote no zip: such a file is read whole
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:                  # a damaged pickle fails in every way there is
        code = re.search(r"GLOBAL ([\w.]{1,60})", str(e))
        if code:
            raise ValueError(f"{path}: refused, its pickle wants to run {code[1]}; get the safetensors file") from None
        reason = one_line(re.split(r"\n|\. ", str(e))[0])[:200] or "it ends too early"
        raise ValueError(f"{path}: not a whole PyTorch file ({reason}); download it again") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    plain = isinstance(tensors, dict) and all(isinstance(t, torch.Tensor) for t in tensors.values())
    if not plain or any(t.layout != torch.strided or t.is_meta for t in tensors.values()):
        raise ValueError(f"{path}: holds something else than named tensors; expected a model's state dict")
    return tensors


def weight_files(folder):
    """The files of a Hugging Face folder: those that its index names, else all whose names begin as they should."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.exists():
            names = set(read_fields(index).take("weight_map", dict[str, str]).values())
            if any(name != pathlib.PurePath(name).name for name in names):
                raise ValueError(one_line(f"{index}: names {sorted(names)}, expected files of its folder"))
            return [folder / name for name in sorted(names)]
        files = sorted(folder.glob(f"{stem}*{suffix}"))
        if files:
            return files
    raise FileNotFoundError(f"{folder} has config.json, but no model*.safetensors and no pytorch_model*.bin")


@torch.no_grad()
def fill(targets, stored, source, copy_to=torch.Tensor.copy_):
    """
    Copy stored, pairs of (name, StoredTensor), into targets {name: parameter}, one tensor at a time. Before anything is
    read, every name must be there once, with its shape and as floats, else one ValueError lists what is wrong. Into
    targets on the meta device nothing is copied: that compares, before memory is taken for what a config claims.
    copy_to(target, tensor) does it and returns what it has written.
    """
    no_floats = "not of float16, bfloat16, float32 or float64"
    missing, pairs, wrong = dict(targets), [], {"missing": [], "unexpected": [], "misshapen": [], no_floats: []}
    for name, tensor in stored:
        target = missing.pop(name, None)
        if target is None:
            wrong["unexpected"].append(f"{name} {tensor.shape}")
        elif tensor.shape != tuple(target.shape):
            wrong["misshapen"].append(f"{name} {tensor.shape} instead of {tuple(target.shape)}")
        elif tensor.dtype not in FLOATS:
            wrong[no_floats].append(f"{name} {tensor.dtype}")
        elif not target.is_meta:
            pairs.append((name, target, tensor))
    wrong["missing"] += [f"{name} {tuple(p.shape)}" for name, p in missing.items()]
    found = "; ".join(f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
                      for kind, names in wrong.items() if names)
    if found:
        raise ValueError(one_line(f"{source}: does not fit the model; {found}; is it the file of another model?"))
    for name, target, tensor in pairs:
        written = copy_to(target, tensor.read())
        if not written.sum().isfinite() and not written.isfinite().all():          # a sum is fast; it may overflow
            raise ValueError(f"{source}: {name} holds NaN or infinite numbers; download it again")


def fill_new(model, device, named, stored, source):
    """Compare a model on the meta device with what is stored, then make it and fill it. named(model): the targets."""
    fill(named(model), stored, source)
    model.to_empty(device=device)
    fill(named(model), stored, source)
    return model.eval()


def write_tensors(path, tensors, metadata=None):
    """{name: tensor} as a safetensors file; metadata: {name: text}."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with written_whole(path) as temporary:
        temporary.touch()                   # with the rights that files here get; safetensors would keep it private
        rights = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as e:        # of a full disk, too
            raise unwritten(path, OSError(str(e))) from None
        temporary.chmod(rights)
