"""torchrun's processes: who is who, who gets which rows, means over all. The only file that knows torch.distributed.

With a single process everything here is a no-op. Rank 0, the main process, is the one that writes files and prints.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def launched():
    """Whether torchrun started this process."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def is_main():
    """True in the one process that writes files and prints, also before the group is joined and after it is left."""
    if launched() and not dist.is_initialized():
        return os.environ["RANK"] == "0"
    return rank() == 0


def shard(*tensors):
    """This rank's rows of global batches, which every rank has drawn alike -> a list. They must divide among ranks."""
    return [tensor[rank() :: world_size()] for tensor in tensors]


def unshard(parts):
    """Every rank's rows, as `shard` gave them out, in the order of the ranks -> all rows in their own order."""
    rows = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    for i, part in enumerate(parts):
        rows[i :: len(parts)] = part
    return rows


def broadcast(tensor):
    """Rank 0's tensor in all ranks, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)


def all_reduce_mean(*tensors):
    """Average tensors over ranks, in place, with one message. A no-op for one rank.

    Works for gradients from torch.autograd.grad too, which DistributedDataParallel's hooks never see.
    """
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def average_buffers(*modules):
    """Average batch norm's running statistics over ranks: each rank has seen its own part of every batch."""
    all_reduce_mean(*(b for module in modules for b in module.buffers() if b.is_floating_point()))


def group_device():
    """The device on which the process group's messages live."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def start(device):
    """Join torchrun's group, if this process was started by it. `device`: where its messages live."""
    if launched() and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_group():
    """End the ranks' common work, e.g. after training. -> True in the process that goes on, False in the others."""
    main = is_main()
    if dist.is_initialized():
        dist.barrier()
        leave()
    return main


def gather(thing):
    """Every rank's picklable `thing`, in the order of the ranks."""
    everything = [thing] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everything, thing)
    return everything


def any_rank(flag):
    """Whether `flag` is true in at least one rank; all ranks must ask at the same time."""
    if world_size() == 1:
        return flag
    found = torch.tensor(float(flag), device=group_device())
    dist.all_reduce(found)
    return found.item() > 0


def main_first(function):
    """Call function() in the main process first (it may download or cache), then in the others. -> its result."""
    if world_size() == 1:
        return function()
    failed, result = torch.zeros(1, device=group_device()), None
    if is_main():
        try:
            result = function()
        except BaseException:
            failed += 1
            dist.all_reduce(failed)
            raise
    dist.all_reduce(failed)
    if failed.item():
        sys.exit(2)  # the main process has said why
    return result if is_main() else function()
