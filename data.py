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
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import runs
from runs import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
SHAPES = ("disc", "ring", "square", "triangle", "cross", "crescent", "stripes", "checks", "dots", "zigzag")
SHAPES_SHA256 = {
    "train": "eaeeb585adbaf0b117f0da1f0ca1f2186f426e65c17103997091a30f7040d3cd",
    "test": "2ba4c8f99cec35e050961575b27e55a184d93c82c685d4422e15af7498bd0963",
}


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


def splits(args, device):
    """-> train images, train labels, test images, test labels, as --data, --limit and --holdout say.

    With --holdout N the "test" images are the last N training images, which are then not trained on: that is how
    defaults are chosen here without a look at the test split. Raises UserError.
    """
    where = args.data, args.data_dir
    train, train_labels = runs.main_first(lambda: load(*where, "train", device))
    if args.holdout >= len(train):
        raise UserError(f"--holdout {args.holdout} leaves nothing of the {len(train)} training images: lower it")
    if args.holdout:
        test, test_labels = train[-args.holdout :], train_labels[-args.holdout :]
        train, train_labels = train[: -args.holdout], train_labels[: -args.holdout]
    else:
        test, test_labels = runs.main_first(lambda: load(*where, "test", device))
    return train[: args.limit], train_labels[: args.limit], test, test_labels


def load(name, data_dir, split, device="cpu"):
    """-> images (N, 3, 32, 32) uint8 and labels (N,) int64 of split 'train' or 'test', on `device`.

    Raises UserError when the data cannot be had or a file is damaged.
    """
    if name == "cifar10":
        images, labels = load_cifar10(Path(data_dir), split)
    elif name == "shapes":
        images, labels = load_shapes(Path(data_dir), split)
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
        bar = tqdm(pool.map(read_image, files), "reading", len(files), leave=False, disable=not runs.is_main())
        images = list(bar)
    broken = [str(f) for f, image in zip(files, images, strict=True) if image is None]
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UserError(f"cannot read as 8-bit images: {', '.join(broken[:5])}{more}; repair or remove them")
    labels = [classes.index(f.relative_to(root).parts[0]) if f.parent != root else 0 for f in files]
    return np.stack(images), np.array(labels, np.int64)


def write_images(images, folder):
    """images (N, 3, H, W) uint8 -> folder/00000.png ...; a folder written earlier is replaced when all are there."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        for i, image in enumerate(tqdm(images.permute(0, 2, 3, 1).cpu().numpy(), "writing", leave=False)):
            Image.fromarray(image).save(part / f"{i:05d}.png")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; free some space first") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def plot_grid(images, path, title, columns=16):
    """images (N, 3, 32, 32) uint8, drawn row by row -> one PNG."""
    rows = math.ceil(len(images) / columns)
    sheet = torch.full((rows * columns, 3, 34, 34), 255, dtype=torch.uint8)
    sheet[: len(images), :, 1:33, 1:33] = images.cpu()
    sheet = sheet.view(rows, columns, 3, 34, 34).permute(0, 3, 1, 4, 2).reshape(rows * 34, columns * 34, 3)
    figure = plt.figure(figsize=(columns * 0.68, rows * 0.68 + 0.4), dpi=100)
    axes = figure.add_axes((0, 0, 1, rows * 0.68 / (rows * 0.68 + 0.4)))
    axes.imshow(sheet.numpy(), interpolation="nearest")
    axes.axis("off")
    figure.suptitle(title, fontsize=12)
    runs.save_figure(figure, path)


def plot_rows(sets, path, title):
    """Sets of as many uint8 images (N, 3, 32, 32) -> one PNG: a row of the first set, under it the second's, and so on.

    Rows have up to 16 images; images that fill no row are left out.
    """
    columns = min(16, len(sets[0]))
    whole = len(sets[0]) // columns * columns
    rows = zip(*(images[:whole].split(columns) for images in sets), strict=True)
    plot_grid(torch.cat([row for group in rows for row in group]), path, title, columns)


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


# --- shapes -------------------------------------------------------------------------------------------------------


def load_shapes(data_dir, split):
    """The generated set, from its cache when that is intact.

    A linear classifier on the pixels (L-BFGS to convergence on all 50,000) reaches 16.6 % on the test images.
    """
    path = data_dir / f"shapes-{split}.npy"
    n = {"train": 50_000, "test": 10_000}[split]
    try:
        images = np.load(path)
        intact = hashlib.sha256(images).hexdigest() == SHAPES_SHA256[split]
    except (OSError, ValueError, EOFError):
        intact = False
    if not intact:
        images = make_shapes(n, seed={"train": 0, "test": 1}[split])
        with runs.writing(path) as part:
            np.save(part, images)
    return images, np.arange(n) % 10


def make_shapes(n, seed):
    """-> (n, 3, 32, 32) uint8; image i shows class SHAPES[i % 10].

    Same seed, same bytes on every machine: NumPy's PCG64 words are guaranteed stable, and all that follows is integer
    arithmetic (float noise in sin and cos differs between processors). Lengths are in 1/16 pixel.
    """
    raw = np.random.PCG64(seed)
    words = raw.random_raw((n, 24)).astype(np.int64) & 0x7FFFFFFF
    noise = raw.random_raw((n, 3 * 32 * 32 // 8)).astype("<u8").view(np.uint8).reshape(n, 3, 32, 32)
    images = np.empty((n, 3, 32, 32), np.uint8)
    jobs = [range(c + 10 * i, n, 10)[:400] for c in range(10) for i in range(0, (n + 9 - c) // 10, 400)]

    def work(rows):
        index = np.fromiter(rows, np.int64)
        images[index] = draw(SHAPES[rows[0] % 10], words[index], noise[index])

    with ThreadPoolExecutor(2) as pool:
        list(tqdm(pool.map(work, jobs), "drawing shapes", len(jobs), leave=False, disable=not runs.is_main()))
    return images


# cos and sin of 64 angles in units of 1/1024, as integers: rounding hides the last bit in which processors differ
ANGLES = np.rint(1024 * np.exp(2j * np.pi * np.arange(64) / 64)).view(np.float64).reshape(64, 2).astype(np.int32)


def draw(kind, words, noise):
    """One class. kind: a name in SHAPES; words (n, 24) random ints; noise (n, 3, 32, 32) uint8 -> uint8 images."""

    def pick(column, low, high):  # uniform in low..high-1, shaped to broadcast over (n, y, x)
        return (low + words[:, column] % (high - low)).astype(np.int32)[:, None, None]

    grid = 8 * np.arange(64, dtype=np.int32) + 4 - 256  # 2 x 2 sub-pixels a pixel, origin in the centre
    x, y = grid[None, None, :] - pick(0, -80, 81), grid[None, :, None] - pick(1, -80, 81)
    cos, sin = (ANGLES[words[:, 2] % 64][:, i, None, None] for i in (0, 1))
    u, v = (x * cos - y * sin) >> 10, (x * sin + y * cos) >> 10
    r = pick(3, 96, 208)  # radius of a shape, 6 to 13 pixels
    p = pick(4, 64, 160)  # period of a texture, 4 to 10 pixels
    match kind:
        case "disc":
            inside = u * u + v * v < r * r
        case "ring":
            d = u * u + v * v
            inside = (d < r * r) & (16 * d > 5 * r * r)
        case "square":
            inside = np.maximum(abs(u), abs(v)) < r * 13 // 16
        case "triangle":
            inside = (2 * v < r) & ((1774 * abs(u) >> 10) - v < r)  # 1774 / 1024 = sqrt(3)
        case "cross":
            inside = (np.minimum(abs(u), abs(v)) < r * 5 // 16) & (np.maximum(abs(u), abs(v)) < r)
        case "crescent":
            inside = (u * u + v * v < r * r) & ((u - r // 2) ** 2 + v * v > r * r)
        case "stripes":
            inside = u % p < p // 2
        case "checks":
            inside = (u % p < p // 2) ^ (v % p < p // 2)
        case "dots":
            inside = (u % p - p // 2) ** 2 + (v % p - p // 2) ** 2 < p * p // 10
        case "zigzag":
            inside = (v + abs(u % p - p // 2)) % p < p // 2
    cover = inside.reshape(len(words), 32, 2, 32, 2).sum((2, 4), dtype=np.int32)[:, None]  # 0..4 of 4 sub-pixels

    # The background runs from one colour to another, and where it passes 255 it starts again at 0: an edge that
    # belongs to no class. The foreground is far from the middle of that range in every channel.
    def colour(column):
        return (words[:, column : column + 3] % 256).astype(np.int32)[:, :, None, None]

    cos, sin = (ANGLES[words[:, 5] % 64][:, i, None, None] for i in (0, 1))
    ramp = 512 + ((x[:, :, ::2] * cos + y[:, ::2] * sin) >> 10).clip(-512, 512)[:, None]  # 0..1024
    low, high = colour(6), colour(9) // 3
    ground = (low + (high * ramp >> 10)) % 256
    paint = (low + 64 + colour(12) // 2 + high // 2) % 256
    mixed = (cover * paint + (4 - cover) * ground) // 4 + noise % 17 - 8
    return mixed.clip(0, 255).astype(np.uint8)
