"""
What a stage of training needs of a device's memory, before there is a device: the model's own forward, backward and
optimizer step run on tensors that have a size and no numbers, and the storages that are alive are counted.

    python aquila.py --preset aquila-8b --memory
    python aquila.py --preset aquila-8b --memory --micro 4 --tokens 1400 --processes 4 --no-grad-checkpoint

Not counted: what a kernel takes for itself while it runs, gaps between blocks, a GPU's driver (0.5 to 1 GB).
"""
import weakref

import torch
from torch import nn

from aquila import LM, VisionEncoder, assemble, set_stage
from data import collate
from tokenizer import IGNORE, IMAGE_SLOT, MASK_SLOT, POSITION_SLOT


class Ledger:
    """The bytes of all storages that are alive, and the most there ever were."""

    def __init__(self):
        self.alive, self.now, self.peak = set(), 0, 0

    def add(self, storage):
        if id(storage) not in self.alive:
            self.alive.add(id(storage))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, id(storage), storage.nbytes())

    def remove(self, key, size):
        self.alive.remove(key)
        self.now -= size


class SizedTensor(torch.Tensor):
    """
    A tensor without numbers. It says that it is on the CPU, so that autocast and attention choose as they do there; the
    work goes to its twin on the meta device. Token ids and what follows from them stay real tensors.
    """
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, meta, ledger):
        x = torch.Tensor._make_wrapper_subclass(cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device="cpu",
                                                storage_offset=meta.storage_offset())
        x.meta, x.ledger = meta, ledger
        ledger.add(meta.untyped_storage())
        return x

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index.Tensor:            # how many places a mask picks, its numbers say
            args = args[0], [place for index in args[1] for place in places(index)]
        ledgers = []

        def twin(x):
            if isinstance(x, list | tuple):
                return type(x)(map(twin, x))
            if isinstance(x, SizedTensor):
                ledgers.append(x.ledger)
                return x.meta
            return x.to("meta") if isinstance(x, torch.Tensor) else x

        def sized(x):
            if isinstance(x, list | tuple):
                return type(x)(map(sized, x))
            return cls(x, ledgers[0]) if isinstance(x, torch.Tensor) else x

        kwargs = {key: "meta" if key == "device" else twin(x) for key, x in (kwargs or {}).items()}
        return sized(function(*twin(args), **kwargs))


def places(index):
    return index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else [index]


def sized_model(config, dtype, ledger):
    """The model as aquila.build makes it, without numbers."""
    with torch.device("meta"):
        model = assemble(config, VisionEncoder(config.vision).to(dtype),
                         LM(config.llm).to(torch.float32 if config.full_llm else dtype))
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(SizedTensor(p.detach(), ledger)))
    return model


def sized_batch(config, micro, tokens, ledger):
    """Records of one image each, all of the same length; all that follows the image is learned."""
    slots = [IMAGE_SLOT] * config.tokens_per_image + [MASK_SLOT, POSITION_SLOT] * bool(config.region_dim)
    ids, labels = slots + [0] * (tokens - len(slots)), [IGNORE] * len(slots) + [0] * (tokens - len(slots))
    shape = 3, config.image_size, config.image_size
    masks = dict(masks=[torch.ones(shape[1:])], mentions=[0]) if config.region_dim else {}
    return collate([dict(id="", ids=ids, labels=labels, **masks,
                         images=[SizedTensor(torch.empty(shape, device="meta"), ledger)]) for _ in range(micro)])


def predict(config, stage, make_optimizer, micro, tokens, dtype, processes=1, grad_checkpoint=False):
    """
    {what: bytes} of a step of a stage in one process, with the peak as the last. Gradients are there from the start, as
    in every micro-batch of a step but the first. make_optimizer: of a list of parameters.
    """
    ledger = Ledger()
    model = sized_model(config, dtype, ledger)
    trained = set_stage(model, stage).values()
    size = lambda tensors: sum(p.numel() * p.element_size() for p in tensors)
    found = {"frozen weights": size(set(model.parameters()) - set(trained)), "trained weights": size(trained)}
    model.llm.grad_checkpoint = grad_checkpoint

    def grown(what, before):
        found[what] = ledger.now - before

    before = ledger.now
    for p in trained:
        p.grad = torch.zeros_like(p)
    grown("gradients", before)
    before = ledger.now
    optimizer = make_optimizer(list(trained))
    optimizer.step()
    grown("optimizer", before)
    found["buckets of DDP"] = found["gradients"] if processes > 1 else 0
    before = ledger.now
    batch = sized_batch(config, micro, tokens, ledger)
    ledger.peak = ledger.now
    model.train()
    model.vision.eval()
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        loss, _, _ = model(batch)
    grown("activations", before)
    loss.backward()
    optimizer.step()
    peak = ledger.peak + found["buckets of DDP"]
    return found | {"largest passing": peak - sum(found.values()), "peak": peak}
