"""Mean and covariance of feature vectors: gathered from parts, kept in a file that pytorch-fid reads, too."""

import hashlib
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import runs
from common.runs import UserError, is_out_of_memory
from common.streams import first_line


class Statistics(NamedTuple):
    """Mean (D,) and covariance (D, D), float64 on the CPU, of n feature vectors; n is None where it is not known."""

    mu: torch.Tensor
    sigma: torch.Tensor
    n: int | None


@dataclass
class Sums:
    """Sums over n feature vectors x (D,), in float64: of x - shift (D,), and of its outer products (D, D).

    shift is the mean of the first batch, so that rounding does not grow with the features' distance from zero.
    """

    n: int = 0
    shift: torch.Tensor | None = None
    first: torch.Tensor | None = None
    second: torch.Tensor | None = None

    def add(self, x):
        """x: (B, D) float64"""
        if self.n == 0:
            self.shift = x.mean(0)
            self.first = torch.zeros_like(self.shift)
            self.second = x.new_zeros(x.shape[1], x.shape[1])
        y = x - self.shift
        self.first += y.sum(0)
        self.second.addmm_(y.T, y)
        self.n += len(x)

    def cpu(self):
        return Sums(self.n, self.shift.cpu(), self.first.cpu(), self.second.cpu()) if self.n else self


def merge(parts):
    """The `Sums` of several parts -> Statistics of all their feature vectors together."""
    n = sum(part.n for part in parts)
    mu = sum(part.n * part.shift + part.first for part in parts) / n
    scatter = 0
    for part in parts:
        mean = part.first / part.n
        away = part.shift + mean - mu
        scatter = scatter + part.second - part.n * torch.outer(mean, mean) + part.n * torch.outer(away, away)
    return Statistics(mu, scatter / (n - 1), n)


def cache_file(folder, label, images, recipe):
    """Where the statistics of these images (N, 3, H, W) uint8 are kept: under a key of their bytes and the recipe."""
    key = hashlib.sha256(images.cpu().contiguous().numpy())
    key.update(f"{tuple(images.shape)} {recipe}".encode())
    return Path(folder) / "fid_stats" / f"{label}-{key.hexdigest()[:16]}.npz"


@contextmanager
def opened(path):
    """An .npz whose checksums agree. Raises UserError, and KeyError of an array that it does not hold."""
    try:
        with open(path, "rb") as raw:  # np.load alone leaves a damaged file open
            with zipfile.ZipFile(raw) as file:
                if file.testzip():  # np.load compares the checksums of arrays that it reads to the end, no others
                    raise zipfile.BadZipFile("a checksum does not agree")
            raw.seek(0)
            with np.load(raw) as file:
                yield file
    except KeyError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as it has parts
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} is not a readable .npz ({first_line(error)}): write it anew") from error


def read(path):
    """An .npz of pytorch-fid or of `write` -> Statistics, and its recipe or None. Raises UserError."""
    try:
        with opened(path) as file:
            mu, sigma = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
            n, recipe = (file[name].item() if name in file else None for name in ("n", "recipe"))
    except KeyError:
        raise UserError(f"{path} has no 'mu' and 'sigma': give statistics written by --save-stats") from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(f"{path}: mu and sigma are not a finite vector and a matrix of its size: write it anew")
    return Statistics(mu, sigma, n), recipe


def read_features(path, n):
    """The features that `write` was given of n images -> (n, D) float32. Raises UserError."""
    try:
        with opened(path) as file:
            features = torch.from_numpy(file["features"])
    except KeyError:
        raise UserError(f"{path} holds no features: write it anew") from None
    if features.ndim != 2 or len(features) != n or not features.isfinite().all():
        raise UserError(f"{path} does not hold finite features of {n} images: write it anew")
    return features


def write(path, found, recipe, features=None):
    """Statistics -> an .npz, whole or not at all. recipe: of the features, in words. Raises UserError.

    features: those of which the statistics are, a list of (n, D), for `read_features`. As they are, float32: as float16
    they would move a kernel distance by 1e-4 of its error only, but end at 65,504, which a program's may pass.
    """
    arrays = {"mu": found.mu.numpy(), "sigma": found.sigma.numpy(), "n": found.n, "recipe": recipe}
    if features is not None:
        arrays["features"] = torch.cat(features).numpy()
    with runs.writing(path) as part:
        np.savez_compressed(part, **arrays)
