"""Data sets as one uint8 tensor on the device: CIFAR-10, a generated stand-in for it, or a folder of images.

    dataset = data.splits(args, device)                   # Data: images, labels, test, test_labels, classes
    x = data.batch(dataset.images, index, flip)           # (B, 3, 32, 32) float32 in [0, 1]

A split of CIFAR-10 is 154 MB: it fits on every device, so batches are drawn by index where they are needed, and there
is no loader, no worker process and no copy from the host in a training step.

--data cifar10   the official files (Krizhevsky 2009), found in --data-dir or downloaded into it
--data shapes    generated here: 50,000 + 10,000 images, ten classes of shapes and textures; needs nothing, is cached
--data FOLDER    your own images, brought to 32x32: flat, in class folders, or in train/ and test/ (see folders.py)
"""

import hashlib
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import folders, ranks, runs, shapes
from common.images import in_words
from common.runs import UserError
from common.streams import first_line, note

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLASSES = {"cifar10": CIFAR10_CLASSES, "shapes": shapes.CLASSES}


@dataclass(frozen=True)
class Data:
    """Training and test images (N, 3, 32, 32) uint8, their labels (N,) int64, the classes' names in the labels' order.

    fingerprint: of a folder's list of files, to be kept with a checkpoint (see `note_files`). total: how many training
    images there are before --limit and --holdout.
    """

    images: torch.Tensor
    labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple[str, ...]
    fingerprint: str
    total: int


def add_flags(parser):
    """The flags of `splits`."""
    parser.set_defaults(data_files=None)  # no flag: a checkpoint's, see note_files
    parser.add_argument("--data", default="cifar10", help="cifar10, shapes (built in), or a folder of images")
    parser.add_argument(
        "--data-dir", default="data", help="where CIFAR-10 is, or is downloaded to; caches go there too"
    )
    parser.add_argument("--limit", type=runs.number(int, 2), help="use only the first LIMIT training images")
    parser.add_argument(
        "--holdout", type=runs.number(int, 0), default=0, help="evaluate on the last HOLDOUT training images instead"
    )


def splits(args, device, labelled=False):
    """-> Data, as --data, --limit and --holdout say. One line says what was understood.

    With --holdout N the "test" images are the last N training images, which are then not trained on: that is how
    defaults are chosen here without a look at the test split. labelled: whether the labels matter; then an image
    without a class, or a class without training images, is refused. Raises UserError.
    """
    folder, done = None, Counter()
    if args.data not in CLASSES:
        folder = folders.find(args.data)
        if labelled:
            folder.check_labels()

    def read(split):
        if folder is None:
            return load(args.data, args.data_dir, split, device)
        images, labels, what = folders.read(folder, split)
        done.update(what)
        return torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)

    train, train_labels = ranks.main_first(lambda: read("train"))
    total = len(train)
    if args.holdout == 1:
        raise UserError("--holdout 1: one image is too few to be measured on; give two or more")
    if args.holdout >= len(train):
        raise UserError(f"--holdout {args.holdout} leaves nothing of the {len(train)} training images: lower it")
    if args.holdout:
        test, test_labels = train[-args.holdout :], train_labels[-args.holdout :]
        train, train_labels = train[: -args.holdout], train_labels[: -args.holdout]
    else:
        test, test_labels = ranks.main_first(lambda: read("test"))
    train, train_labels = train[: args.limit], train_labels[: args.limit]
    classes = folder.classes if folder else CLASSES[args.data]
    fingerprint = folder.fingerprint() if folder else args.data
    found = Data(train, train_labels, test, test_labels, classes, fingerprint, total)
    if ranks.is_main():
        print(understood(args, found, done, folder.left_out if folder else Counter()))
    if labelled:
        check_classes(args.data, found)
    return found


def note_files(args, found):
    """Let args.json and the checkpoint hold the data's fingerprint; say so when they are not what a checkpoint knew.

    Raises UserError where a training is to go on: it counts its epochs by the images.
    """
    if args.data_files not in (None, found.fingerprint):
        words = (
            f"--data {args.data} was {args.data_files} when the checkpoint was trained, and is {found.fingerprint} now"
        )
        if args.resume:
            raise UserError(f"{words}, so this training cannot go on: put the files back, or start another with --name")
        note(words)
    args.data_files = found.fingerprint


def measured_on(args):
    """What the images are on which a model is measured, in words."""
    return "held-out training" if args.holdout else "test"


def understood(args, found, done, left_out):
    """The line that says what the data are."""
    held = measured_on(args)
    line = f"data: {args.data}, {len(found.images)} training and {len(found.test)} {held} images"
    if found.classes:
        counts = []
        for i, name in enumerate(found.classes[:20]):
            counts.append(f"{name} {(found.labels == i).sum().item()} + {(found.test_labels == i).sum().item()}")
        more = f" and {len(found.classes) - 20} more" if len(found.classes) > 20 else ""
        line += f", {len(found.classes)} classes: {', '.join(counts)}{more}"
    without = sum((labels == folders.NO_CLASS).sum().item() for labels in (found.labels, found.test_labels))
    if without and found.classes:
        line += f"; without a class of these: {without}"
    if done:
        line += f"; {in_words(done)}"
    return line + (f"; left out: {in_words(left_out)}" if left_out else "")


def check_classes(name, found):
    """Raises UserError unless there are two classes or more, each with training images."""
    if len(found.classes) < 2:
        raise UserError(f"--data {name} has one class: put the images of each class into a sub-folder")
    have = set(found.labels.unique().tolist())
    lacking = [kind for i, kind in enumerate(found.classes) if i not in have]
    if lacking:
        raise UserError(
            f"--data {name}: of the {len(found.labels)} training images none is of class {', '.join(lacking)}: add "
            "some, raise --limit, or lower --holdout"
        )


def load(name, data_dir, split, device="cpu"):
    """-> images (N, 3, 32, 32) uint8 and labels (N,) int64 of cifar10's or shapes' split, train or test, on `device`.

    Raises UserError when the data cannot be had or a file is damaged.
    """
    read = {"cifar10": load_cifar10, "shapes": shapes.load}[name]
    images, labels = read(Path(data_dir), split)
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
    archive, folder = data_dir / CIFAR10.filename, data_dir / CIFAR10.base_folder
    files = dict([*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])])
    try:
        if (data_dir / CIFAR10.meta["filename"]).is_file():
            raise UserError(f"--data-dir {data_dir} is one level too deep: give --data-dir {data_dir.resolve().parent}")
        unpacked = folder.is_dir()
        for name, want in files.items() if unpacked else ():
            file = folder / name
            if not file.is_file():
                raise UserError(f"{file} is missing: delete {folder}, and the next run unpacks or downloads it again")
            if md5_of(file) != want:
                raise UserError(
                    f"{file} is damaged (its MD5 is not {want}): delete {folder}, and run again to replace it"
                )
        state = "missing"
        if not unpacked and archive.is_file():
            state = "intact" if md5_of(archive) == CIFAR10.tgz_md5 else "damaged"
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; check its permissions") from error
    try:
        if not unpacked:
            fetch_cifar10(data_dir, state == "intact")
        dataset = CIFAR10(data_dir, train=split == "train")
    except MemoryError:
        raise
    except Exception as error:  # no network, a slow or failing host, a broken archive, a full disk: all end here
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(no_cifar10(data_dir, archive, state, reason, CIFAR10.tgz_md5)) from error
    return np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2)), np.array(dataset.targets, np.int64)


def fetch_cifar10(data_dir, have_archive):
    """Unpack or download CIFAR-10 in a folder of its own, and move it into data_dir when it is whole.

    So a script that is started meanwhile sees all of it or none, and two that download do not write into one file.
    """
    CIFAR10 = import_torchvision().datasets.CIFAR10
    archive, folder = data_dir / CIFAR10.filename, data_dir / CIFAR10.base_folder
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".cifar10-") as work:
        if have_archive:
            Path(work, archive.name).symlink_to(archive.resolve())
        CIFAR10(work, download=True)
        if not have_archive:
            os.replace(Path(work, archive.name), archive)
        try:
            os.rename(Path(work, folder.name), folder)
        except OSError:
            if not folder.is_dir():  # else another script was first
                raise


def md5_of(file):
    return hashlib.md5(file.read_bytes()).hexdigest()


def no_cifar10(data_dir, archive, state, reason, md5):
    """The sentence for CIFAR-10 that cannot be had. state: of the archive, missing, damaged or intact."""
    instead = "or use --data shapes, which needs no download"
    if state == "intact":
        return f"{archive} is there but could not be unpacked ({reason}): unpack it into {data_dir}, {instead}"
    if state == "damaged":
        return (
            f"{archive} is damaged (its MD5 is not {md5}) and could not be downloaded anew ({reason}): put an intact "
            f"{archive.name} in its place, {instead}"
        )
    return (
        f"CIFAR-10 is not in {data_dir} and could not be downloaded ({reason}): put {archive.name} (MD5 {md5}) "
        f"at {archive}, {instead}"
    )
