"""Data sets as one uint8 tensor on the device: CIFAR-10, a generated stand-in for it, or a folder of images.

    images, labels = data.load("cifar10", "data", "train", device)   # (50000, 3, 32, 32) uint8, (50000,) int64
    x = data.batch(images, index, flip)                              # (B, 3, 32, 32) float32 in [0, 1]

A split of CIFAR-10 is 154 MB: it fits on every device, so batches are drawn by index where they are needed, and there
is no loader, no worker process and no copy from the host in a training step.

--data cifar10   the official files (Krizhevsky 2009), found in --data-dir or downloaded into it
--data shapes    generated here: 50,000 + 10,000 images, ten classes of shapes and textures; needs nothing, is cached
--data FOLDER    your own images, brought to 32x32: class sub-folders or flat; FOLDER/train and FOLDER/test if both are
                 there, otherwise every sixth image is held out for testing
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import ranks, runs, shapes
from common.runs import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def add_flags(parser):
    """The flags of `splits`."""
    parser.add_argument("--data", default="cifar10", help="cifar10, shapes (built in), or a folder of images")
    parser.add_argument(
        "--data-dir", default="data", help="where CIFAR-10 is, or is downloaded to; caches go there too"
    )
    parser.add_argument("--limit", type=runs.number(int, 2), help="use only the first LIMIT training images")
    parser.add_argument(
        "--holdout", type=runs.number(int, 0), default=0, help="evaluate on the last HOLDOUT training images instead"
    )


class Split(NamedTuple):
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64, to train on and to measure on."""

    images: torch.Tensor
    labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def splits(args, device):
    """-> `Split`, as --data, --limit and --holdout say.

    With --holdout N the "test" images are the last N training images, which are then not trained on: that is how
    defaults are chosen here without a look at the test split. Raises UserError.
    """
    where = args.data, args.data_dir
    train, train_labels = ranks.main_first(lambda: load(*where, "train", device))
    if args.holdout >= len(train):
        raise UserError(f"--holdout {args.holdout} leaves nothing of the {len(train)} training images: lower it")
    if args.holdout:
        test, test_labels = train[-args.holdout :], train_labels[-args.holdout :]
        train, train_labels = train[: -args.holdout], train_labels[: -args.holdout]
    else:
        test, test_labels = ranks.main_first(lambda: load(*where, "test", device))
    return Split(train[: args.limit], train_labels[: args.limit], test, test_labels)


def load(name, data_dir, split, device="cpu"):
    """-> images (N, 3, 32, 32) uint8 and labels (N,) int64 of split 'train' or 'test', on `device`.

    Raises UserError when the data cannot be had or a file is damaged.
    """
    if name == "cifar10":
        images, labels = load_cifar10(Path(data_dir), split)
    elif name == "shapes":
        images, labels = shapes.load(Path(data_dir), split)
    elif Path(name).is_dir():
        images, labels = load_folder(Path(name), split)
    else:
        raise UserError(f"--data {name} is neither cifar10, shapes nor a folder that is there: check the path")
    return torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)


def batch(images, index, flip=None):
    """images (N, 3, H, W) uint8, index (B,) int64, flip (B,) bool or None -> (B, 3, H, W) float32 in [0, 1].

    Images where `flip` is set are mirrored left to right. All on the device of `images`.
    """
    x = images[index].float() / 255
    return x if flip is None else torch.where(flip[:, None, None, None], x.flip(3), x)


def high_frequency_energy(images):
    """How much of the pixels' energy lies in fine detail: the mean square of what is left above half the Nyquist
    frequency (0.25 cycles per pixel, in any direction), for pixels in [0, 1]. Blurred images have little of it, but
    noise has much: it tells sharp from soft, not good from bad.

    images: (N, C, H, W) uint8 -> float
    """
    height, width = images.shape[2:]
    frequency = torch.fft.fftfreq(height).view(-1, 1).square() + torch.fft.rfftfreq(width).square()
    fine = (frequency.sqrt() > 0.25).to(images.device)
    twice = torch.full((width // 2 + 1,), 2.0, device=images.device)  # rfft leaves out the mirrored half
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    energy = 0.0
    for part in images.split(1000):
        spectrum = torch.fft.rfft2(part.float() / 255, norm="ortho").abs().square()
        energy += (spectrum * (fine * twice)).sum().item()
    return energy / images.numel()


# --- CIFAR-10 -----------------------------------------------------------------------------------------------------


def import_torchvision():
    """torchvision, also beside a CPU-only torch.

    PyPI's torchvision for Linux is built for CUDA. Beside a torch without CUDA its import stops at operators that its
    binary would have declared ("operator torchvision::nms does not exist"). Nothing here uses them: declaring them
    is enough, and is done only when the plain import fails.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import_torchvision.library = torch.library.Library("torchvision", "DEF")  # must outlive this call
        for operator in ("nms", "qnms"):
            import_torchvision.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


def load_cifar10(data_dir, split):
    CIFAR10 = import_torchvision().datasets.CIFAR10
    archive, md5 = data_dir / CIFAR10.filename, CIFAR10.tgz_md5
    folder = data_dir / CIFAR10.base_folder
    files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    for name, want in files if folder.is_dir() else []:
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing: delete {folder}, and the next run unpacks or downloads it again")
        if hashlib.md5(file.read_bytes()).hexdigest() != want:
            raise UserError(f"{file} is damaged (its MD5 is not {want}): delete {folder}, and run again to replace it")
    try:
        dataset = CIFAR10(data_dir, train=split == "train", download=not folder.is_dir())
    except Exception as error:  # no network, a slow or failing host, a broken archive, a full disk: all end here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"CIFAR-10 is missing or damaged in {data_dir} and could not be downloaded ({reason}): put "
            f"{CIFAR10.filename} (MD5 {md5}) at {archive}, or use --data shapes, which needs no download"
        ) from error
    return np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2)), np.array(dataset.targets, np.int64)


# --- a folder of images -------------------------------------------------------------------------------------------


def load_folder(folder, split):
    whole = not ((folder / "train").is_dir() and (folder / "test").is_dir())
    root = folder if whole else folder / split
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    classes = sorted({f.relative_to(root).parts[0] for f in files if f.parent != root})
    if whole:
        files = [f for i, f in enumerate(files) if (i % 6 == 5) == (split == "test")]
    if len(files) < 2:
        raise UserError(f"--data {folder}: found {len(files)} {split} images (.png, .jpg, ...): it takes at least 2")
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        bar = tqdm(pool.map(read_image, files), "reading", len(files), leave=False, disable=not ranks.is_main())
        images = list(bar)
    broken = [str(f) for f, image in zip(files, images, strict=True) if image is None]
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UserError(f"cannot read as 8-bit images: {', '.join(broken[:5])}{more}; repair or remove them")
    labels = [classes.index(f.relative_to(root).parts[0]) if f.parent != root else 0 for f in files]
    return np.stack(images), np.array(labels, np.int64)


def read_image(file):
    """-> (3, 32, 32) uint8: the largest centred square, resized; None when the file is no readable 8-bit image."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                return None
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1)
