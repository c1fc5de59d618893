"""
`train.py --shard`: of every weight, its gradient and Adam's means each process keeps a slice (torch's fully_shard).

    shard(model, device, dtype)             # in place, before set_stage: its parameters are others from then on
    joined(p), joined_in_first({name: p})     # put together again, by all processes
    copy_to(p, tensor)                      # each process its slice of it

A layer of the LM is whole while it runs, forward and backward, and a slice otherwise. What lies around the layers is
whole from the start of a forward to the end of its backward: which SFI runs depends on the batch, but all processes
must put together the same in the same order. The vision encoder, small beside the LM and frozen, is not cut.
"""
import torch

from commands.processes import rank_and_world


def shard(model, device, dtype):
    """
    Cut a model that lies on the CPU, on to the device. dtype: of autocast. Layers are put together in it, so that no
    copy of theirs in bfloat16 lives from forward to backward; gradients are summed in float32.
    """
    # These modules take some seconds to import, which every other run would pay.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (rank_and_world()[1],))
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    parts = [fully_shard(layer, mesh=mesh, mp_policy=policy) for layer in model.llm.layers]
    parts.append(fully_shard(model, mesh=mesh, ignored_params=set(model.vision.parameters())))
    for part in parts:
        part.set_force_sum_reduction_for_comms(True)           # and then divide: gloo of torch 2.8 cannot average
    model.vision.to(device)
    # A layer runs backward if its input needs a gradient. In a batch without image it may need none, while it does in
    # another process, which would wait for this one for ever.
    model.llm.register_forward_pre_hook(lambda llm, args: (args[0].requires_grad_(), *args[1:]))


def joined(x):
    """A tensor that is cut as a whole one, in the CPU's memory; any other as it is. All processes must ask for it."""
    return x.detach().full_tensor().cpu() if hasattr(x, "full_tensor") else x


def joined_in_first(tensors):
    """{name: tensor}, each whole, one after the other, in the first process; in the others, which must ask, too, {}."""
    found = {}
    for name, x in tensors.items():
        x = joined(x)
        if rank_and_world()[0] == 0:
            found[name] = x
    return found


def copy_to(target, x):
    """target.copy_(x) of a whole x, the same in all processes; the target may be cut. -> what this one has written."""
    if not hasattr(target, "full_tensor"):
        return target.copy_(x)
    from torch.distributed.tensor import distribute_tensor
    slices = distribute_tensor(x.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    return target.to_local().copy_(slices.to_local())
