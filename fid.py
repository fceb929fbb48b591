"""Frechet Inception Distance: pytorch-fid's number for the same files and weights, in less time.

Paper: Heusel et al. 2017 (arXiv 1706.08500). Network, resize and scaling are pytorch-fid's (mseitzer/pytorch-fid).

    python fid.py real/ fake/                       # two folders of images, searched through, sizes may be mixed
    python fid.py cifar10:test fake/ --kid          # a data set by name; kernel distance with its standard error
    python fid.py --save-stats real/ real.npz       # mu and sigma once; then: python fid.py real.npz fake/
    python fid.py shapes:test fake/ --features net.pt2               # your own network (torch.export), not Inception
    torchrun --nproc-per-node=4 fid.py real/ fake/  # the images divided among four GPUs, or CPU processes

From Python (vae.py does this), with `images` a uint8 tensor (N, 3, H, W), or an iterator of such batches:

    extractor = fid.load_extractor(weights=None, features=None, device=device, fast=None)
    mu, sigma, n = fid.statistics(images, extractor, batch_size=None, progress=None)
    mu, sigma, n = fid.cached_statistics(images, extractor, folder, label, batch_size=None, progress=None)
    distance = fid.frechet_distance(mu1, sigma1, mu2, sigma2)

Symbols: mu (D,) and sigma (D, D) are mean and covariance (n - 1 in the denominator) of n feature vectors, D = 2048.

Where it differs from pytorch-fid: batch norm is folded into the convolutions (in float64), TF32 is off on every
device, sums run in float64, and the matrix root is taken from Cholesky factors, not by scipy's sqrtm. Stated and
tested: the same number to 1e-4 of it. With fewer images than features sqrtm itself rounds coarsely: for two equal sets
of 16 images pytorch-fid gives -0.00025, this 1e-13.

Measured with OMP_NUM_THREADS=2 python benchmarks/fid.py --images 1000 (CIFAR-10, seeded random weights, torch 2.13.0,
both cores of an AMD EPYC): 1000 + 1000 images in 75 s where pytorch-fid took 210 s, and the same number to 4e-5; the
distance alone, 5000 images a side, in 0.84 s where it took 9.3 s, to 4e-14. On CUDA: not measured.
"""

import hashlib
import json
import math
import os
import re
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from scipy.linalg import lapack
from tqdm import tqdm

from common import data, devices, ranks, runs
from common.inception import WEIGHTS, first_line, load_extractor, note, precision, wanted_extractor  # noqa: F401
from common.runs import UserError

SUFFIXES = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # pytorch-fid's
CHECKED = 1000  # images a side on which --fast is compared with float32


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    parser.add_argument("first", help="a folder, an .npz of statistics, or cifar10:test, cifar10:train, shapes:test")
    parser.add_argument("second", help="the same choice; with --save-stats the .npz to write")
    parser.add_argument("--save-stats", action="store_true", help="write the statistics of FIRST into SECOND")
    parser.add_argument("--kid", action="store_true", help="also the kernel distance and its standard error")
    parser.add_argument("--weights", help=f"the file {WEIGHTS}, if not in torch hub's cache or $FID_WEIGHTS")
    parser.add_argument("--features", help="a torch.export program, (B, 3, H, W) uint8 to (B, D), not Inception")
    parser.add_argument("--fast", choices=["tf32", "bf16"], help="lower precision; its deviation is measured, printed")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 is or is downloaded to; caches go there too")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    parser.add_argument("--batch-size", type=runs.number(int, 1), help="images a pass; default: 25 on a CPU, else 128")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    return parser.parse_args(argv)


# --- statistics ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def statistics(images, extractor, batch_size=None, progress=None, total=None, keep=None):
    """Mean and covariance of the features of images -> mu (D,), sigma (D, D), both float64 on the CPU, and n.

    images: uint8 (N, 3, H, W), divided among torchrun's ranks here; or an iterator of such batches, which is taken as
    this rank's part. Every rank returns the statistics of all.
    progress: a label for a progress bar, `total` its length. keep: a list that receives the features of all.
    Raises UserError for fewer than two images and for features that are not finite.

    Sums run in float64 relative to the mean of the first batch, so that their error does not grow with the distance
    of the features from zero. The ranks speak once, at the end.
    """
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 (N, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        total = len(images)
        images = ranks.shard(images)[0].split(batch_size or default_batch(extractor.device)) if total else ()
    where = torch.device("cpu") if extractor.device.type == "mps" else extractor.device  # MPS has no float64
    n, shift, kept, problem = 0, torch.zeros(1), [], None
    sums = outer = torch.zeros(1, 1)
    bar = tqdm(total=total, desc=progress, unit="image", leave=False, disable=not progress or not ranks.is_main())
    try:
        with bar, precision(extractor.fast):
            for groups in images:
                features = extractor([groups] if isinstance(groups, torch.Tensor) else groups)
                x = features.to(where).double()
                if n == 0:
                    shift = x.mean(0)
                    sums, outer = torch.zeros_like(shift), x.new_zeros(len(shift), len(shift))
                x -= shift
                sums += x.sum(0)
                outer.addmm_(x.T, x)
                n += len(x)
                bar.update(len(x) * ranks.world_size())
                if keep is not None:
                    kept.append(features.cpu())
    except UserError as error:  # to be told to the other ranks, which would wait for this one
        problem = str(error)
    parts = ranks.gather((problem, n, shift.cpu(), sums.cpu(), outer.cpu(), kept))
    problem = next((part[0] for part in parts if part[0]), None)
    if problem is None and sum(part[1] for part in parts) < 2:
        problem = f"{progress or 'the set'} has fewer than 2 images: a covariance takes at least 2"
    if problem is None and not all(part[4].isfinite().all() for part in parts):
        problem = f"{extractor.name}: features of {progress or 'the images'} are not finite; check its weights"
    if problem:
        raise UserError(problem)  # on every rank: torchrun ends the others as soon as one has ended
    mu, sigma, n = merge([part[1:5] for part in parts if part[1]])
    if keep is not None:
        keep.extend(features for part in parts for features in part[5])
    return mu, sigma, n


def merge(parts):
    """Parts (n, shift, sum of x - shift, sum of its outer products) -> mean, covariance and n of them together."""
    n = sum(part[0] for part in parts)
    mu = sum(k * shift + sums for k, shift, sums, _ in parts) / n
    scatter = 0
    for k, shift, sums, outer in parts:
        mean = sums / k
        scatter = scatter + outer - k * torch.outer(mean, mean) + k * torch.outer(shift + mean - mu, shift + mean - mu)
    return mu, scatter / (n - 1), n


def default_batch(device):
    return 25 if device.type == "cpu" else 128


def cached_statistics(images, extractor, folder, label, batch_size=None, progress=None):
    """`statistics` of a uint8 tensor, kept in folder/fid_stats/ under a key of the images' bytes and the recipe."""
    key = hashlib.sha256(images.cpu().contiguous().numpy())
    key.update(f"{tuple(images.shape)} {extractor.recipe}".encode())
    path = Path(folder) / "fid_stats" / f"{label}-{key.hexdigest()[:16]}.npz"
    try:
        mu, sigma, n, _ = read_stats(path)
    except UserError:  # not there yet, or damaged
        mu, sigma, n = statistics(images, extractor, batch_size, progress)
        if ranks.is_main():
            write_stats(path, mu, sigma, n, extractor.recipe)
    return mu, sigma, n


def read_stats(path):
    """An .npz of pytorch-fid or of `write_stats` -> mu, sigma, n or None, recipe or None. Raises UserError."""
    try:
        with open(path, "rb") as raw, np.load(raw) as file:  # np.load alone leaves a damaged file open
            mu, sigma = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
            n, recipe = (file[name].item() if name in file else None for name in ("n", "recipe"))
    except KeyError:
        raise UserError(f"{path} has no 'mu' and 'sigma': give statistics written by --save-stats") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable .npz ({first_line(error)}): write it anew") from error
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(f"{path}: mu and sigma are not a finite vector and a matrix of its size: write it anew")
    return mu, sigma, n, recipe


def write_stats(path, mu, sigma, n, recipe):
    with runs.writing(path) as part:
        np.savez_compressed(part, mu=mu.numpy(), sigma=sigma.numpy(), n=n, recipe=recipe)


# --- distances ----------------------------------------------------------------------------------------------------


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float.  Heusel et al. 2017, eq. 6.

    mu (D,), sigma (D, D): tensors or arrays. With sigma_i = A_i A_i^T the trace of the root is the sum of the singular
    values of A_1^T A_2. They are taken as roots of eigenvalues of its smaller Gram matrix, which is symmetric: no
    complex numbers and no failure, also when a covariance has a lower rank than D.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64).cpu() for a in (mu1, sigma1, mu2, sigma2))
    x = square_root(sigma1).T @ square_root(sigma2)
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    root = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root).item()


def square_root(sigma):
    """sigma (D, D) positive semidefinite -> A (D, rank) with A A^T = sigma: Cholesky, pivoted when rank < D."""
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if not failed:
        return factor
    packed, pivots, rank, _ = lapack.dpstrf(sigma.numpy(), lower=1)  # stops where what is left is rounding
    factor = torch.empty(len(sigma), rank, dtype=torch.float64)
    factor[torch.from_numpy(pivots).long() - 1] = torch.from_numpy(np.tril(packed)[:, :rank])
    return factor


def model_distances(sets, test, extractor, folder, label):
    """Distances of a model's images to the test images, for metrics.json -> {"fid_NAME": distance, ...} for each set.

    The keys begin with "fd_" for other features than the official Inception's. Also "fid_images", how many images a
    set has, and "fid_features", the extractor's name.

    sets: {name: uint8 images (n, 3, H, W)}, of as many each; test: uint8 images, whose statistics are cached in
    `folder` under `label`.
    """
    key = extractor.key
    real = cached_statistics(test, extractor, folder, label, progress="test images")
    found = {f"{key}_images": len(next(iter(sets.values()))), f"{key}_features": extractor.name}
    for name, images in sets.items():
        mu, sigma, _ = statistics(images, extractor, progress=name)
        found[f"{key}_{name}"] = frechet_distance(mu, sigma, *real[:2])
    return found


def kernel_distance(x, y, seed=0):
    """KID: unbiased squared MMD with the kernel (x.y / D + 1)^3, and its standard error.  Binkowski et al. 2018.

    x (N, D), y (M, D) features -> mean and standard error over disjoint random subsets: ten or more of up to 1000
    images. Disjoint, because subsets that share images are not independent and would make the error look smaller.
    """
    n = min(len(x), len(y))
    if n < 4:
        raise UserError(f"--kid takes at least 4 images on each side, not {n}: add some")
    size = max(2, min(1000, n // 10))
    draws = [torch.randperm(len(f), generator=devices.generator("cpu", seed, "kid", i)) for i, f in enumerate((x, y))]
    values = []
    for i in range(n // size):
        a, b = (f[draw[i * size : (i + 1) * size]].double() for f, draw in zip((x, y), draws, strict=True))
        kaa, kbb, kab = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = (kaa.sum() - kaa.trace() + kbb.sum() - kbb.trace()) / (size * (size - 1))
        values.append(within - 2 * kab.mean())
    values = torch.stack(values)
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


# --- what is compared ---------------------------------------------------------------------------------------------


def find_side(text):
    """An argument -> ("set", (name, split)), ("stats", path) or ("folder", files). Raises UserError."""
    name, _, split = text.partition(":")
    if name in ("cifar10", "shapes"):
        if split not in ("train", "test"):
            raise UserError(f"{text} is no data set: say {name}:test or {name}:train")
        return "set", (name, split)
    path, files = Path(text), []

    def refuse(error):
        raise error

    try:
        if not path.exists():
            raise UserError(f"{text} does not exist: give a folder, an .npz, or a data set such as cifar10:test")
        if path.is_file():
            if path.suffix != ".npz":
                raise UserError(f"{text} is a file but no .npz of statistics: give a folder of images")
            return "stats", path
        for folder, _, names in os.walk(path, onerror=refuse):
            files += [Path(folder, name) for name in names]
    except OSError as error:
        raise UserError(f"cannot read {error.filename or text}: {error.strerror}; check its permissions") from error
    images = sorted(file for file in files if file.suffix.lower() in SUFFIXES)
    if not images:
        seen = ", ".join(sorted({file.suffix or file.name for file in files})[:5])
        raise UserError(f"{text} has no images, {f'only {seen}' if seen else 'it is empty'}: .png, .jpg ... are read")
    if len(images) == 1:
        raise UserError(f"{text} has only one image ({images[0]}): a covariance takes at least 2")
    return "folder", images


def read_images(files, batch_size, modes):
    """Decode ahead in threads -> lists of (b, 3, H, W) uint8, one tensor a size, batch_size images a list.

    modes: a Counter of the files' colour modes.
    """
    with ThreadPoolExecutor(min(16, os.cpu_count())) as pool:  # Pillow decodes outside Python's lock
        jobs = (pool.submit(read_image, file) for file in files)
        ahead = deque(islice(jobs, 4 * batch_size))  # bounded: a large folder must not pile up in memory
        while ahead:
            sizes = {}
            for _ in range(min(batch_size, len(ahead))):
                mode, image = ahead.popleft().result()
                ahead.extend(islice(jobs, 1))
                modes[mode] += 1
                sizes.setdefault(image.shape, []).append(image)
            yield [torch.stack(images) for images in sizes.values()]


def read_image(file):
    """-> the file's colour mode, and the image as (3, H, W) uint8, converted to RGB as pytorch-fid does."""
    try:
        with Image.open(file) as image:
            mode = image.mode
            # Pillow cuts colours of 16 bits down to 8 while it decodes; only the decoder's arguments tell
            if mode.startswith(("I", "F")) or re.search(r";16[BLN]", str(image.tile)):
                raise UserError(f"{file} has more than 8 bits a channel (mode {mode}): convert it to 8 bits first")
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read the image {file} ({reason}): repair or remove it") from error
    return mode, torch.from_numpy(pixels).permute(2, 0, 1)


def measure(text, side, extractor, args, keep=None, limit=None):
    """Statistics of one argument as `find_side` read it -> mu, sigma, n. limit: of its first images only."""
    kind, value = side
    if kind == "stats":
        mu, sigma, n, recipe = read_stats(value)
        if not limit and recipe not in (None, extractor.recipe):
            raise UserError(f"{text} was made with another recipe, {recipe}, not {extractor.recipe}: write it anew")
        if extractor.dims not in (None, len(mu)):
            raise UserError(f"{text} has {len(mu)} dimensions, not {extractor.dims}: write it anew with --save-stats")
        if not limit and recipe is None:
            note(f"{text} does not say of which network it is, and is taken to be of {extractor.name}")
        return mu, sigma, n
    batch_size = args.batch_size or default_batch(extractor.device)
    if kind == "set":
        images, _ = ranks.main_first(lambda: data.load(value[0], args.data_dir, value[1], extractor.device))
        if keep is None and limit is None:
            return cached_statistics(images, extractor, args.data_dir, "-".join(value), batch_size, text)
        return statistics(images[:limit], extractor, batch_size, text, keep=keep)
    files, modes = value[:limit], Counter()
    batches = read_images(files[ranks.rank() :: ranks.world_size()], batch_size, modes)
    result = statistics(batches, extractor, progress=text, total=len(files), keep=keep)
    other = ", ".join(f"{count} of mode {mode}" for mode, count in sorted(modes.items()) if mode != "RGB")
    if other and not limit:
        note(f"{text}: converted to RGB as pytorch-fid does (alpha is dropped): {other}")
    return result


def compare(texts, sides, extractor, args, limit=None):
    """-> the distance of the two sides, and the rest of what --json prints."""
    same, keep = sides[0] == sides[1], ([], []) if args.kid and not limit else (None, None)
    order = sorted((0, 1), key=lambda i: ("stats", "set", "folder").index(sides[i][0]))  # what may not fit comes first
    stats = {}
    for i in order:
        stats[i] = stats[1 - i] if same and stats else measure(texts[i], sides[i], extractor, args, keep[i], limit)
    (mu1, sigma1, n1), (mu2, sigma2, n2) = stats[0], stats[1]
    if len(mu1) != len(mu2):
        raise UserError(f"{texts[0]} has {len(mu1)} dimensions and {texts[1]} {len(mu2)}: use one network for both")
    result = {extractor.key: frechet_distance(mu1, sigma1, mu2, sigma2), "name": extractor.name, "sides": texts}
    result |= {"n": [n1, n2], "recipe": extractor.recipe, "device": str(extractor.device)}
    if limit:
        return result
    if args.kid:
        values = (0.0, 0.0) if same else kernel_distance(*map(torch.cat, keep))
        result |= dict(zip(("kid", "kid_stderr"), values, strict=True))
    for text, n in dict(zip(texts, (n1, n2), strict=True)).items():
        if n and n <= len(mu1):
            note(f"{text} has {n} images, no more than features ({len(mu1)}): compare only at equal numbers of images")
    if same:
        note("both sides are the same, so the distance is 0 but for rounding")
    return result


def main(argv=None):
    args = parse_args(argv)
    device = devices.start(args.device)
    texts = [args.first] if args.save_stats else [args.first, args.second]
    sides = [find_side(text) for text in texts]
    given = [value for kind, value in sides if kind == "stats"]
    if given and (args.kid or args.save_stats):
        raise UserError(f"{given[0]} holds no images, which --kid and --save-stats take: give the folder it is of")
    if args.save_stats and (not args.second.endswith(".npz") or os.path.exists(args.second)):
        raise UserError(f"--save-stats {args.second}: choose a name that ends in .npz and is not there yet")
    if len(given) == 2:  # no network is needed: the files say, or do not, of which they are
        recipe = next((r for r in (read_stats(path)[3] for path in given) if r), "FID (of unnamed statistics)")
        key = "fid" if recipe.startswith("FID") else "fd"
        extractor = SimpleNamespace(name=recipe, recipe=recipe, key=key, dims=None, device=device)
    else:
        extractor = load_extractor(args.weights, args.features, device, args.fast)
    if args.save_stats:
        mu, sigma, n = measure(args.first, sides[0], extractor, args)
        if ranks.is_main():
            write_stats(args.second, mu, sigma, n, extractor.recipe)
            print(f"{args.second}: statistics of {n} images of {args.first}, {extractor.recipe}")
        return
    result = compare(texts, sides, extractor, args)
    if args.fast and len(given) < 2:
        reference = load_extractor(args.weights, None, device)
        fast, exact = (compare(texts, sides, e, args, CHECKED)[e.key] for e in (extractor, reference))
        result |= {"checked": CHECKED, "checked_fast": fast, "checked_reference": exact}
        note(f"over the first {CHECKED} images of each side --fast {args.fast} gives {fast:.4f}, float32 {exact:.4f}")
    if ranks.is_main():
        counts = " against ".join(f"{t} ({n or 'unknown'} images)" for t, n in zip(texts, result["n"], strict=True))
        kid = f", KID {result['kid']:.6f} +- {result['kid_stderr']:.6f}" if args.kid else ""
        line = f"{extractor.name}: {max(result[extractor.key], 0.0):.4f}{kid}; {counts}"
        print(json.dumps(result) if args.json else line)


if __name__ == "__main__":
    runs.cli(main)
