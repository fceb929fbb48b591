"""Frechet Inception Distance: pytorch-fid's number for the same files and weights, in less time.

Paper: Heusel et al. 2017 (arXiv 1706.08500). Network, resize and scaling are pytorch-fid's (mseitzer/pytorch-fid).

    python fid.py real/ fake/                       # two folders of images, searched through, sizes may be mixed
    python fid.py cifar10:test fake/ --kid          # a data set by name; kernel distance with its standard error
    python fid.py --save-stats real/ real.npz       # mu and sigma once; then: python fid.py real.npz fake/
    python fid.py shapes:test fake/ --features net.pt2               # your own network (torch.export), not Inception
    torchrun --nproc-per-node=4 fid.py real/ fake/  # the images divided among four GPUs, or CPU processes

Symbols: mu (D,) and sigma (D, D) are mean and covariance (n - 1 in the denominator) of n feature vectors, D = 2048.

Where it differs from pytorch-fid: batch norm is folded into the convolutions (in float64), TF32 is off on every device,
sums run in float64, and the matrix root is taken from Cholesky factors, not by scipy's sqrtm. Stated and tested: the
same number to 1e-4 of it. With fewer images than features sqrtm itself rounds coarsely: for two equal sets of 16
images pytorch-fid gives -0.00025, this 1e-13. Folders are searched through, hidden files are passed over.

Measured with OMP_NUM_THREADS=2 python benchmarks/fid.py --images 1000 (CIFAR-10, seeded random weights, torch 2.13.0,
both cores of an AMD EPYC): 1000 + 1000 images in 75 s where pytorch-fid took 210 s. On CUDA: not measured.
"""

import json
import math
import os
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import lapack
from tqdm import tqdm

from common import data, devices, moments, ranks, runs
from common.images import batches, in_words, path_hash, quiet_pillow
from common.inception import WEIGHTS, load_extractor, of_any_sizes, precision
from common.runs import UserError
from common.sides import find_side, load_both, load_stats
from common.streams import note

FEWEST = 4  # images a side for a kernel distance and its standard error
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


class Part(NamedTuple):
    """What a rank knows once its images are done: its sums, its features if they are kept, or what went wrong."""

    sums: moments.Sums
    features: list
    problem: str | None


@torch.inference_mode()
def statistics(images, extractor, batch_size=None, progress=None, total=None, keep=None):
    """Mean and covariance of the features of images -> Statistics.

    images: uint8 (N, 3, H, W), divided among torchrun's ranks here; or an iterator of this rank's batches, as `shard`
    divides: a tensor each, or a list of images of any sizes. Every rank returns the statistics of all.
    progress: a label for a progress bar, `total` its length. keep: a list that receives the features of all in the
    images' order, which KID's subsets go by.
    Raises UserError for fewer than two images and for features that are not finite.
    """
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 (N, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        total = len(images)
        images = ranks.shard(images)[0].split(batch_size or default_batch(extractor.device)) if total else ()
    where = torch.device("cpu") if extractor.device.type == "mps" else extractor.device  # MPS has no float64
    sums, kept, problem = moments.Sums(), [], None
    bar = tqdm(total=total, desc=progress, unit="image", leave=False, disable=not progress or not ranks.is_main())
    try:
        with bar, precision(extractor.fast):
            for batch in images:
                features = extractor([batch]) if isinstance(batch, torch.Tensor) else of_any_sizes(batch, extractor)
                sums.add(features.to(where).double())
                bar.update(len(features) * ranks.world_size())
                if keep is not None:
                    kept.append(features.cpu())
    except UserError as error:  # to be told to the other ranks, which would wait for this one
        problem = str(error)
    parts = ranks.gather(Part(sums.cpu(), kept, problem))
    every = [part.sums for part in parts if part.sums.n]
    problem = next((part.problem for part in parts if part.problem), None)
    if problem is None and sum(sums.n for sums in every) < 2:
        problem = f"{progress or 'the set'} has fewer than 2 images: a covariance takes at least 2"
    if problem is None and not all(sums.second.isfinite().all() for sums in every):
        problem = f"{extractor.name}: features of {progress or 'the images'} are not finite; check its weights"
    if problem:
        raise UserError(problem)  # on every rank: torchrun ends the others as soon as one has ended
    if keep is not None:
        keep.append(ranks.unshard([torch.cat(part.features) for part in parts if part.features]))
    return moments.merge(every)


def default_batch(device):
    return 25 if device.type == "cpu" else 128


def cached_statistics(images, extractor, folder, label, batch_size=None, progress=None, keep=None):
    """`statistics` of a uint8 tensor, kept in folder/fid_stats/ under a key of the images' bytes and the recipe; with
    `keep`, an empty list, also the features, which it receives.
    """
    path = moments.cache_file(folder, label, images, extractor.recipe)
    try:
        found = moments.read(path)[0]
        features = None if keep is None else moments.read_features(path, len(images))
    except UserError:  # not there yet, or without features, or damaged
        found = None
    if not ranks.any_rank(found is None):  # each rank has looked for itself, but measuring takes all of them
        if keep is not None:
            keep.append(features)
        return found
    found = statistics(images, extractor, batch_size, progress, keep=keep)
    if ranks.is_main():
        try:
            moments.write(path, found, extractor.recipe, keep)
        except UserError as error:
            note(f"these statistics will be measured again next time: {error}")
    return found


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
    """Distances of a model's images to the test images, for metrics.json -> {"fid_NAME": Frechet distance of each set,
    "fid_NAME_kid", "fid_NAME_kid_stderr": from FEWEST images on kernel distance and its standard error; "fid_images":
    how many a set has, "fid_name": extractor.name}. Other features than Inception's have extractor.ruler for "fid".

    sets: {NAME: uint8 images (n, 3, H, W)}, of as many each; test: uint8 images, whose statistics and features are
    cached in `folder` under `label`, as are those of the set "floor". Every model meets the same subsets of them.
    """
    key, reals = extractor.ruler, []
    real = cached_statistics(test, extractor, folder, label, progress="test images", keep=reals)
    found = {f"{key}_images": len(next(iter(sets.values()))), f"{key}_name": extractor.name}
    for name, made in sets.items():
        features = []
        if name == "floor":  # the same images for every model
            its = cached_statistics(made, extractor, folder, f"{label}-floor", progress=name, keep=features)
        else:
            its = statistics(made, extractor, progress=name, keep=features)
        found[f"{key}_{name}"] = frechet_distance(its.mu, its.sigma, real.mu, real.sigma)
        if min(len(made), len(test)) >= FEWEST:
            kid, error = kernel_distance(torch.cat(features), torch.cat(reals))
            found |= {f"{key}_{name}_kid": kid, f"{key}_{name}_kid_stderr": error}
    return found


def kernel_distance(x, y, seed=0):
    """KID: unbiased squared MMD with the kernel (x.y / D + 1)^3, and its standard error.  Binkowski et al. 2018.

    x (N, D), y (M, D) features -> mean and standard error over disjoint random subsets: ten or more (fewer below
    20 images) of up to 1000. Disjoint, because the error of subsets that share images would look smaller than it is.
    """
    n = min(len(x), len(y))
    if n < FEWEST:
        raise UserError(f"--kid takes at least {FEWEST} images on each side, not {n}: add some")
    size = max(2, min(1000, n // 10))
    order_x = torch.randperm(len(x), generator=devices.generator("cpu", seed, "kid", 0))
    order_y = torch.randperm(len(y), generator=devices.generator("cpu", seed, "kid", 1))
    values = []
    for i in range(n // size):
        rows = slice(i * size, (i + 1) * size)
        a, b = x[order_x[rows]].double(), y[order_y[rows]].double()
        kaa, kbb, kab = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = (kaa.sum() - kaa.trace() + kbb.sum() - kbb.trace()) / (size * (size - 1))
        values.append(within - 2 * kab.mean())
    values = torch.stack(values)
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


# --- what is compared ---------------------------------------------------------------------------------------------


def measure(side, extractor, data_dir, batch_size=None, keep=None, limit=None):
    """Statistics of a side that has images. keep: a list that receives its features. limit: of so many of them."""
    if side.data_set:
        name, split = side.data_set
        x, _ = ranks.main_first(lambda: data.load(name, data_dir, split, extractor.device))
        if limit is None:
            return cached_statistics(x, extractor, data_dir, f"{name}-{split}", batch_size, side.text, keep)
        return statistics(x[:limit], extractor, batch_size, side.text, keep=keep)
    files, done = side.files, Counter()
    if limit:
        files = sorted(files, key=path_hash)[:limit]  # at random: a sorted folder may begin with one class
    with quiet_pillow():
        mine, size = files[ranks.rank() :: ranks.world_size()], batch_size or default_batch(extractor.device)
        found = statistics(batches(mine, size, done), extractor, progress=side.text, total=len(files), keep=keep)
    done = sum(ranks.gather(done), Counter())
    if done and not limit:
        how = "converted to RGB as pytorch-fid does, alpha dropped, not turned as EXIF says"
        note(f"{side.text}: {how}: {in_words(done)}")
    return found


def measure_both(sides, extractor, data_dir, batch_size=None, keep=(None, None), limit=None):
    """-> Statistics of each side, in their order."""
    found = {}
    for i in sorted((0, 1), key=lambda i: (bool(sides[i].files), bool(sides[i].data_set))):  # what may not fit: first
        if found and sides[0].same_as(sides[1]):
            found[i] = found[1 - i]
        elif sides[i].npz:
            found[i] = load_stats(sides[i], extractor.recipe, extractor.name, extractor.dims)
        else:
            found[i] = measure(sides[i], extractor, data_dir, batch_size, keep[i], limit)
    return found[0], found[1]


def distance(sides, found):
    """Statistics of both sides -> their Frechet distance. Raises UserError where they have not the same dimensions."""
    (mu1, sigma1, _), (mu2, sigma2, _) = found
    if len(mu1) != len(mu2):
        both = f"{sides[0].text} has {len(mu1)} dimensions and {sides[1].text} {len(mu2)}"
        raise UserError(f"{both}: use one network for both")
    return frechet_distance(mu1, sigma1, mu2, sigma2)


def compare(sides, found, key, name, recipe, device):
    """Statistics of both sides -> what --json prints; says what to mind. key, name, recipe: see inception.py."""
    counts, dims = [side.n for side in found], len(found[0].mu)
    result = {key: distance(sides, found), "name": name, "sides": [side.text for side in sides], "n": counts}
    for text, n in dict(zip(result["sides"], counts, strict=True)).items():
        if n and n <= dims:
            note(f"{text} has {n} images, no more than features ({dims}): compare only at equal numbers of images")
    if sides[0].same_as(sides[1]):
        note("both sides are the same, so the distance is 0 but for rounding")
    return result | {"recipe": recipe, "device": str(device)}


def check_fast(sides, extractor, reference, data_dir, batch_size=None):
    """Both distances over up to CHECKED images a side, for --json; says them."""
    found = [measure_both(sides, each, data_dir, batch_size, limit=CHECKED) for each in (extractor, reference)]
    fast, exact = (distance(sides, both) for both in found)
    counts = [side.n for side in found[0]]
    note(f"over {counts[0]} images against {counts[1]} --fast {extractor.fast} gives {fast:.4f}, float32 {exact:.4f}")
    return {"checked": counts, "checked_fast": fast, "checked_reference": exact}


def main(argv=None):
    args = parse_args(argv)
    device = devices.start(args.device)
    sides = [find_side(text) for text in ([args.first] if args.save_stats else [args.first, args.second])]
    given = [side for side in sides if side.npz]
    if given and (args.kid or args.save_stats):
        raise UserError(f"{given[0].text} holds no images, which --kid and --save-stats take: give the folder it is of")
    few = [side for side in sides if 0 < len(side.files) < FEWEST]  # a data set has more
    if args.kid and few:
        has = f"{few[0].text} has {len(few[0].files)}"
        raise UserError(f"--kid takes at least {FEWEST} images on each side, and {has}: add some, or omit --kid")
    if args.save_stats and (args.kid or args.json):
        raise UserError("--save-stats measures no distance: omit --kid and --json")
    if len(given) == 2 and (args.weights or args.features or args.fast or args.batch_size):
        raise UserError("statistics need no network: omit --weights, --features, --fast and --batch-size")
    if args.save_stats and (not args.second.endswith(".npz") or os.path.exists(args.second)):
        raise UserError(f"--save-stats {args.second}: choose a name that ends in .npz and is not there yet")
    if len(given) == 2:  # no network is needed
        found, key, recipe = load_both(sides)
        result = compare(sides, found, key, recipe, recipe, device)
    elif args.save_stats:
        runs.try_writing(args.second)
        extractor = load_extractor(args.weights, args.features, device, args.fast)
        found = measure(sides[0], extractor, args.data_dir, args.batch_size)
        if ranks.is_main():
            moments.write(args.second, found, extractor.recipe)
            print(f"{args.second}: statistics of {found.n} images of {args.first}, {extractor.recipe}")
        if args.fast:
            note(f"what --fast {args.fast} changes was not measured, for --save-stats measures no distance")
        return
    else:
        extractor = load_extractor(args.weights, args.features, device, args.fast)
        key, kept = extractor.key, ([], []) if args.kid else (None, None)
        found = measure_both(sides, extractor, args.data_dir, args.batch_size, kept)
        result = compare(sides, found, key, extractor.name, extractor.recipe, device)
        if args.kid:
            same = sides[0].same_as(sides[1])
            result["kid"], result["kid_stderr"] = (0.0, 0.0) if same else kernel_distance(*map(torch.cat, kept))
        if args.fast and given:
            note(f"what --fast {args.fast} changes was not measured, for {given[0].text} holds no images")
        elif args.fast:
            reference = load_extractor(args.weights, None, device)
            result |= check_fast(sides, extractor, reference, args.data_dir, args.batch_size)
    if ranks.is_main():
        print(json.dumps(result) if args.json else in_a_line(result, key))


def in_a_line(result, key):
    """What --json prints -> the line without it."""
    sides = [f"{text} ({n or 'unknown'} images)" for text, n in zip(result["sides"], result["n"], strict=True)]
    line = f"{result['name']}: {max(result[key], 0.0):.4f}"
    if "kid" in result:
        kid = round(result["kid"], 6) + 0.0  # a tiny negative one must not be -0.000000
        line += f", KID {kid:.6f} +- {result['kid_stderr']:.6f}"
    return f"{line}; {' against '.join(sides)}"


if __name__ == "__main__":
    runs.cli(main)
