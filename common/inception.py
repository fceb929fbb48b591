"""Images to feature vectors: pytorch-fid's Inception with its official weights, or a program of torch.export.

    extractor = load_extractor(weights=None, features=None, device=device, fast=None)
    x = extractor([images])                         # a list of uint8 (b, 3, H, W), one tensor a size -> (B, D) float32

    extractor.name    what a distance of these features is called: "FID (pytorch-fid Inception, float32)"; without the
                      official weights it begins with "Frechet distance" and never says FID
    extractor.key     "fid" or "fd", how a distance is called in JSON
    extractor.ruler   the same, but "fd_NAME" for a program NAME.pt2: in metrics.json several stand side by side
    extractor.recipe  as the name, with a hash of the weights: statistics of two recipes are never compared
    extractor.dims    D, or None while unknown

The network is pytorch-fid's own definition (mseitzer/pytorch-fid), imported. Its inputs are resized and scaled as
pytorch-fid does, but on the device; each batch norm is folded into the convolution before it, in float64; tensors are
in channels_last order. The outputs are the same to float32's rounding.
"""

import hashlib
import io
import os
import pickle
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.export.passes import move_to_device_pass

from common import data, devices, ranks, runs
from common.runs import UserError, is_out_of_memory
from common.streams import first_line, note

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
SAME_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # the same file, by torch-fidelity's and torchmetrics' name
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_BYTES = 95_628_359
PIXELS_AT_ONCE = 2**26  # colour values that become floats at a time: 256 MB


def load_extractor(weights=None, features=None, device="cpu", fast=None):
    """-> what `statistics` takes: pytorch-fid's Inception, or with `features` the program in that .pt2 file.

    weights: path of the Inception weights; else $FID_WEIGHTS, torch hub's cache, or a download into that.
    fast: None (float32, TF32 off: the reference), "tf32" or "bf16". Raises UserError.
    """
    device = torch.device(device)
    if fast == "tf32" and device.type != "cuda":
        raise UserError("--fast tf32 is a mode of CUDA devices: omit it, or try --fast bf16")
    if features is None:
        return Inception(ranks.main_first(lambda: find_weights(weights)), device, fast)
    if weights or fast:
        raise UserError("--features brings its own weights and precision: omit --weights and --fast")
    return Exported(Path(features), device)


def export(net, path):
    """Write `net`, a module on the CPU that maps uint8 images to features, as a program of torch.export that takes any
    number and size of images.

    It leaves out from which source lines the operators came: fid.py keeps statistics under the program's hash, which
    must not change with the folder of a script or with a comment in it.
    """
    example, buffer = torch.zeros(2, 3, 48, 40, dtype=torch.uint8), io.BytesIO()
    sizes = {0: torch.export.Dim("B"), 2: torch.export.Dim("H"), 3: torch.export.Dim("W")}
    program = torch.export.export(net.eval(), (example,), dynamic_shapes=(sizes,))
    for node in program.graph.nodes:
        for key in ("stack_trace", "torch_fn", "nn_module_stack"):
            node.meta.pop(key, None)
    torch.export.save(program, buffer)
    runs.write_bytes(path, buffer.getbuffer())


def find_weights(path=None):
    """-> the path of Inception's weights: as given, $FID_WEIGHTS, in torch hub's cache, or downloaded into that."""
    path = path or os.environ.get("FID_WEIGHTS")
    if path:
        return Path(path)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path, same = folder / WEIGHTS, folder / SAME_WEIGHTS
    if path.exists():
        return path
    if same.exists():
        if read_file(same, "the weights")[1] == WEIGHTS_SHA256:
            return same
        note(f"{same} does not hold the official weights (another SHA-256): it is not used")
    data.import_torchvision()
    from pytorch_fid.inception import FID_WEIGHTS_URL

    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(path), WEIGHTS_SHA256)
    except (OSError, RuntimeError) as error:  # no network, a broken transfer, a folder that cannot be written
        raise UserError(
            f"the Inception weights are not here and could not be downloaded ({first_line(error)}): put {WEIGHTS} "
            f"({WEIGHTS_BYTES:,} bytes, from pytorch-fid's releases) at {path}, or its path in FID_WEIGHTS"
        ) from error
    return path


def check_official(path):
    """Raises UserError unless the file holds the official weights, without which no distance is an FID."""
    if read_file(path, "the weights")[1] != WEIGHTS_SHA256:
        raise UserError(
            f"{path} does not hold the official Inception weights (another SHA-256): put {WEIGHTS} ({WEIGHTS_BYTES:,} "
            "bytes, from pytorch-fid's releases) there, or its path in FID_WEIGHTS"
        )


def read_file(path, what):
    """-> the bytes of a file and their SHA-256."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}; check the path") from error
    return content, hashlib.sha256(content).hexdigest()


class Inception:
    """pytorch-fid's network as a function: uint8 images -> (B, 2048) float32 features."""

    dims = 2048

    def __init__(self, path, device, fast=None):
        content, sha256 = read_file(path, "the weights")
        official = sha256 == WEIGHTS_SHA256
        if path.name == WEIGHTS and not official:
            raise UserError(
                f"{path} is damaged: its SHA-256 is not {WEIGHTS_SHA256[:8]}... and it has {len(content):,} bytes "
                f"where the official file has {WEIGHTS_BYTES:,}; delete it, and fetch it anew"
            )
        self.key, what = "fid", f"FID (pytorch-fid Inception, {fast or 'float32'})"
        if not official:
            note(f"{path} does not hold the official weights: the number is not an FID")
            self.key, what = "fd", f"Frechet distance (Inception, weights {sha256[:16]}, {fast or 'float32'})"
        self.name, self.recipe, self.ruler = what, what, self.key
        self.device, self.fast, self.batch = device, fast, 0
        self.dtype = torch.bfloat16 if fast == "bf16" else torch.float32
        self.net = build_inception(content, path).to(device, self.dtype, memory_format=torch.channels_last)

    def __call__(self, groups):
        """groups: a list of (b, 3, H, W) uint8, one size each -> (sum of b, 2048) float32."""
        x = torch.cat([self.resize(part) for group in groups for part in group.split(few(group))])
        n = len(x)
        if self.device.type == "cuda":  # cuDNN searches for its kernels once per batch size: keep to one
            self.batch = max(self.batch, n)
            x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, self.batch - n))
        x = self.net(x.to(self.dtype, memory_format=torch.channels_last))[0]  # (n, 2048, 8, 8)
        return x[:n].float().mean((2, 3))

    def resize(self, images):
        """pytorch-fid's: to [0, 1] first, then bilinear, not antialiased, pixels centred at halves."""
        x = images.to(self.device).float().div_(255)
        return F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)


def of_any_sizes(images, extractor):
    """A list of images (3, H, W) -> their features (B, D) in its order; those of one size are computed together."""
    sizes = {}
    for i, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(i)
    features = extractor([torch.stack([images[i] for i in places]) for places in sizes.values()])
    order = torch.tensor([i for places in sizes.values() for i in places])
    return features[order.argsort()]


def few(images):
    """How many of these images (b, C, H, W) to make floats of at a time: of photographs one, of small images all."""
    return max(1, PIXELS_AT_ONCE // images[0].numel())


def build_inception(content, path):
    """The bytes of a weights file -> pytorch-fid's InceptionV3, batch norm folded, without the closing average."""
    data.import_torchvision()
    from pytorch_fid import inception

    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        # pytorch-fid fetches the weights while it builds the network: give it ours, which are verified
        with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
            net = inception.InceptionV3(resize_input=False)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} does not hold weights of pytorch-fid's Inception: use {WEIGHTS}") from error
    net.eval().blocks[3][-1] = nn.Identity()  # `Inception` averages, in float32 also when the rest is bfloat16
    for module in list(net.modules()):
        if isinstance(getattr(module, "bn", None), nn.BatchNorm2d):
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv.double(), module.bn.double()).float()
            module.bn = nn.Identity()
    return net


@contextmanager
def precision(fast):
    """TF32 on CUDA off, or with fast="tf32" on, whatever the program around has chosen."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    of_matmul, of_cudnn = matmul.allow_tf32, cudnn.allow_tf32
    try:
        devices.allow_tf32(fast == "tf32")
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = of_matmul, of_cudnn


class Exported:
    """A program of torch.export as a function: uint8 images -> (B, D) features."""

    key, dims, fast = "fd", None, None  # dims is known once it has run

    def __init__(self, path, device):
        content, sha256 = read_file(path, "--features")
        try:
            with warnings.catch_warnings():
                # torch 2.11 reads weights without a copy and warns that they could be written to; nothing here does
                warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
                program = torch.export.load(io.BytesIO(content))
            program = move_to_device_pass(program, device)
            node = next(n for n in program.graph.nodes if n.name == program.graph_signature.user_inputs[0])
            batch = node.meta["val"].shape[0]
        except Exception as error:  # a damaged archive fails in as many ways as it has parts
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"{path} is no program of torch.export ({first_line(error)}): make it with torch.export.save"
            ) from error
        self.path, self.device, self.module = path, device, program.module()
        self.batch = batch if isinstance(batch, int) else None  # a whole number: exported for this batch alone
        self.name = f"Frechet distance (features of {path.name})"
        self.recipe = f"Frechet distance (features {sha256[:16]})"
        self.ruler = f"fd_{path.stem}"

    def __call__(self, groups):
        """groups: a list of (b, 3, H, W) uint8, one size each -> (sum of b, D) float32."""
        return torch.cat([self.run(part) for group in groups for part in group.split(self.batch or few(group))])

    def run(self, images):
        # A program exported for batches of several images may refuse one of 1
        padding = (self.batch or max(len(images), 2)) - len(images)
        x = F.pad(images.to(self.device), (0, 0, 0, 0, 0, 0, 0, padding))
        try:
            features = self.module(x)[: len(images)].float()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            size = f"{images.shape[2]}x{images.shape[3]}"
            raise UserError(f"{self.path} fails on uint8 images of {size} ({first_line(error)})") from error
        if features.ndim != 2:
            raise UserError(f"{self.path} gives {features.ndim}-dimensional output: it must map images to (B, D)")
        return features
