"""
What a stage of training needs of a device's memory, found without that memory: the model's own forward, backward and
optimizer step run on tensors that have a size and no numbers, and the storages that are alive are counted.

    python aquila.py --preset aquila-8b --memory
    python aquila.py --preset aquila-8b --memory --micro 2 --tokens 1152 --no-grad-checkpoint

Operations are those of a CPU. Not counted: what a kernel takes for itself while it runs, gaps between blocks, a GPU's
driver and libraries (0.5 to 1 GB), tensors made of token ids or positions alone, images and regions after a record's
first. A sum of two gradients counts as a new tensor, though torch often adds in place. `python -m checks.memory`
compares with measured peaks.
"""
import math
import os
import weakref

import torch
from torch import nn

from aquila import LM, VisionEncoder, assemble, set_stage
from data import collate
from tokenizer import IGNORE, IMAGE_SLOT, MASK_SLOT, POSITION_SLOT

SMALL = 100_000_000                         # parameters of a model that is not predicted when a run starts


class Ledger:
    """The bytes of all storages that are alive, and the most there ever were."""

    def __init__(self):
        self.alive, self.now, self.peak, self.noted = set(), 0, 0, 0

    def add(self, storage):                 # torch keeps one Python object a storage, as long as any tensor has it
        key, size = id(storage), storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.alive.remove(key)
        self.now -= size

    def grown(self):
        """Bytes more than when this was last asked."""
        before, self.noted = self.noted, self.now
        return self.now - before


class SizedTensor(torch.Tensor):
    """
    A tensor without numbers. It says that it is on the CPU, so that autocast and attention choose as they do there; the
    work goes to its twin on the meta device, whose storage is counted. Token ids, and what is computed from them alone,
    stay real tensors: they decide sizes.
    """
    __torch_function__ = torch._C._disabled_torch_function_impl
    ledger = None                           # of the prediction that runs

    @staticmethod
    def __new__(cls, meta):
        x = torch.Tensor._make_wrapper_subclass(cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device="cpu",
                                                storage_offset=meta.storage_offset())
        x.meta = meta
        cls.ledger.add(meta.untyped_storage())
        return x

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Each operation that has a SizedTensor among its arguments."""
        if function is torch.ops.aten.index.Tensor:            # how many places a mask picks, its numbers say
            args = args[0], [place for index in args[1] for place in places(index)]
        kwargs = {key: "meta" if key == "device" else twin(value) for key, value in (kwargs or {}).items()}
        return sized(function(*map(twin, args), **kwargs))


def twin(x):
    """Tensors, alone or in lists -> on the meta device."""
    if isinstance(x, list | tuple):
        return type(x)(map(twin, x))
    return x.meta if isinstance(x, SizedTensor) else x.to("meta") if isinstance(x, torch.Tensor) else x


def sized(x):
    """Tensors on the meta device, alone or in lists -> SizedTensors."""
    if isinstance(x, list | tuple):
        return type(x)(map(sized, x))
    return SizedTensor(x) if isinstance(x, torch.Tensor) else x


def places(index):
    return index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else [index]


def sized_model(config, dtype):
    """The model as aquila.build makes it, without numbers."""
    with torch.device("meta"):
        model = assemble(config, VisionEncoder(config.vision).to(dtype),
                         LM(config.llm).to(torch.float32 if config.full_llm else dtype))
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(SizedTensor(p.detach())))
    return model


def sized_batch(config, micro, tokens):
    """Records of one image each, and one region; all of the same length, all that follows the image is learned."""
    slots = [IMAGE_SLOT] * config.tokens_per_image + [MASK_SLOT, POSITION_SLOT] * bool(config.region_dim)
    text = [0] * max(tokens - len(slots), 2)
    shape = config.image_size, config.image_size
    masks = dict(masks=[torch.ones(shape)], mentions=[0]) if config.region_dim else {}
    row = dict(id="", ids=slots + text, labels=[IGNORE] * len(slots) + text,
               images=[torch.empty(3, *shape, device="meta")], **masks)
    return {name: SizedTensor(x.to("meta")) if torch.is_tensor(x) and x.is_floating_point() else x
            for name, x in collate([row] * micro).items()} | {"draw": 0}


def predict(config, stage, recipe, make_optimizer, tokens, dtype, processes=1):
    """
    {what: bytes} of a step of a stage in one of the processes, the peak last; what is "in passing" comes and goes.
    Gradients are there from the start, as in every micro-batch of a step but its first, and so are the images of all.
    recipe: a train.Recipe; make_optimizer(parameters, weight decay); tokens: of every sample; dtype: of frozen weights,
    and of autocast if it is bfloat16.
    """
    ledger = SizedTensor.ledger = Ledger()
    model = sized_model(config, dtype)
    trained = list(set_stage(model, stage).values())
    own = sum(p.numel() * p.element_size() for p in trained)
    found = {"frozen weights": ledger.grown() - own, "trained weights": own}
    for p in trained:
        p.grad = torch.zeros_like(p)
    found["gradients"] = ledger.grown()
    optimizer = make_optimizer(trained, recipe.decay)
    optimizer.step()
    found["optimizer"] = ledger.grown()
    found["DDP's buckets"] = found["gradients"] if processes > 1 else 0
    ledger.peak = ledger.now
    accumulated = math.ceil(recipe.batch / (recipe.micro * processes))
    batches = [sized_batch(config, recipe.micro, tokens) for _ in range(accumulated)]
    model.train()
    model.vision.eval()
    model.llm.grad_checkpoint = recipe.grad_checkpoint
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        loss, _, _ = model(batches[0])
    found["activations"] = ledger.grown()
    loss.backward()
    optimizer.step()
    peak = ledger.peak + found["DDP's buckets"]
    return found | {"in passing": peak - sum(found.values()), "peak": peak}


def describe_memory(run, stage, make_optimizer, tokens, processes, device):
    """
    Print what a step of train.Run needs if all samples have this many tokens, and a warning if the device has less.
    Nothing for a small model, which fits anywhere: the prediction takes seconds.
    """
    if sum(p.numel() for p in run.model.parameters()) < SMALL:
        return
    peak = predict(run.model.config, stage, run.recipe, make_optimizer, tokens, run.dtype, processes)["peak"]
    print(f"predicted peak of memory {peak / 1e9:.1f} GB a process, samples as long as the longest, {tokens:,} tokens",
          flush=True)
    there = device_memory(device)
    if peak > there:
        print(f"warning: the device has {there / 1e9:.1f} GB, less than the predicted peak; --grad-checkpoint or a "
              "smaller --micro needs less", flush=True)


def device_memory(device):
    """Bytes that the device has for a process, free or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
