"""Where a run computes: device, precision, memory, CUDA graphs, the optimiser, and stateless randomness.

Randomness is stateless: every draw comes from a `generator` keyed by (seed, purpose, step). So a resumed run draws what
the unbroken one would have drawn, evaluating does not disturb training, and two ranks draw what one would.
"""

import contextlib
import ctypes
import hashlib
import math
import os

import torch

from common import ranks
from common.runs import UserError

# --- device, precision, memory ------------------------------------------------------------------------------------


def pick_device(name):
    """'auto' or a torch device name -> torch.device that is really there. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is not a device: use auto, cpu, cuda, cuda:1 or mps")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= there:
        have = f"this machine has {there} of them" if device.type == "cuda" else "this machine has none"
        raise UserError(f"--device {name} is not there: {have}; --device auto takes what is")
    return device


def start(device_name, precision="fp32", capture=False, divides=True):
    """Pick the device, join torchrun's group if there is one, set precision; -> torch.device.

    divides: whether the script divides its work among torchrun's processes; one that does not refuses them.

    precision: fp32 (TF32 off), tf32, or bf16 (autocast, see `autocast`; what stays in float32 uses TF32).
    capture: whether a CUDA graph is wanted (see `Captured`). Raises UserError for what the device cannot do.
    """
    device = pick_device(device_name)
    if not divides and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("this script does not divide its work among processes: start it with python, not with torchrun")
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 is a mode of CUDA devices: choose another, or go on with the run on one")
    if capture and (device.type != "cuda" or ranks.launched()):
        raise UserError("--capture takes a CUDA device and a single process: omit it, or give --no-capture")
    if ranks.launched() and device.type == "mps":
        raise UserError("torchrun's processes cannot share an Apple GPU: give --device cpu, or start one with python")
    if ranks.launched() and device.type == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise UserError(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    ranks.start(device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # streams, graphs and messages go to the current device
        allow_tf32(precision != "fp32")
        torch.backends.cudnn.benchmark = True  # every batch has the same shape, so the search pays at once
    if device.type == "cpu":
        keep_memory()
    return device


def allow_tf32(allowed):
    """Whether CUDA may round the factors of float32 products and convolutions to TF32."""
    # Not by fp32_precision of matmul and conv, the newer way: torch.export asks for cudnn.allow_tf32, and raises where
    # that of convolutions and of recurrent layers differ
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def keep_memory():
    """Let glibc keep freed memory: by default each large tensor is mapped, zeroed page by page and unmapped anew."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to do
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: serve every size from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and never give the heap back


def autocast(device, precision):
    """The context for a forward pass: bfloat16 autocast for 'bf16', nothing otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class Captured:
    """Call `step(*tensors)` eagerly a few times, then as one CUDA graph: no launch overhead, same arithmetic.

    `step` does everything of one update (zero_grad(set_to_none=True), forward, backward, optimiser) on tensors of
    fixed shapes, draws nothing at random and reads nothing back. The optimiser must be capturable with its learning
    rate in a tensor. Returns static tensors that the next call overwrites.
    """

    def __init__(self, step, warmup=3):
        self.step, self.warmup, self.graph = step, warmup, None

    def __call__(self, *inputs):
        if self.graph is None and self.warmup > 0:  # real steps, on a side stream as capture requires
            self.warmup -= 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                output = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            return output
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, does not run
                self.output = self.step(*self.inputs)
        for static, tensor in zip(self.inputs, inputs, strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return self.output


# --- optimiser ----------------------------------------------------------------------------------------------------


def adam(parameters, lr, device, **options):
    """torch.optim.Adam, fused; on CUDA capturable with the learning rate in a tensor, so that a graph can hold it."""
    cuda = device.type == "cuda"
    lr = torch.tensor(lr, device=device) if cuda else lr
    return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=cuda, **options)


@torch.no_grad()
def average_weights(average, model, decay):
    """average <- decay * average + (1 - decay) * model, for weights and statistics. decay: a scalar tensor."""
    for a, m in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if m.is_floating_point():
            a.lerp_(m, 1 - decay)
        else:
            a.copy_(m)


def learning_rate(step, total, peak, schedule):
    """The rate of a step (counted from 1): a linear rise over the first 2 % of the steps, then 'constant', or half a
    'cosine' down to zero.
    """
    rise = min(1.0, step / (0.02 * total + 1))
    fall = 1.0
    if schedule == "cosine":
        fall = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / total)
    return peak * rise * fall


def average_decay(step, most, device):
    """The decay of averaged weights at a step (counted from 1), a scalar tensor: at most `most`, and at first less.

    step / (step + 9) is an average over about the last ninth of the steps so far, which soon forgets the start.
    """
    return torch.full((), min(most, step / (step + 9)), device=device)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


# --- randomness ---------------------------------------------------------------------------------------------------


def generator(device, *key):
    """A torch.Generator on `device` whose stream is a function of `key` alone, e.g. (seed, "noise", step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
