"""Features of images that are learned without labels: k-means on whitened patches. What --patches has mu predict.

Papers: Coates, Ng & Lee 2011, "An analysis of single-layer networks in unsupervised feature learning" (AISTATS), for
patches, whitening and pooling; Coates & Ng 2011, "The importance of encoding versus training with sparse coding and
vector quantization" (ICML), for the spherical k-means (there: OMP-1) and the soft threshold on both signs.

    head = patches.Head(latent_dim, images, seed)      # learns the features, (N, DIMS), of these images
    value = head.nll(mu, rows)                         # (B,) in nats, to be weighted and averaged

How strongly an image shows each of 600 small patterns, on average over each of its quarters, says more about what it
shows than its pixels do. Not theirs: an image and its mirror image share their features, the mean of both, since
training shows either; and what counts is the first 64 principal components, each scaled to variance 1.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common import devices, ranks

SIZE, STRIDE = 6, 2  # of the patches, in pixels
FILTERS = 300  # means of k-means; each counts with both signs
THRESHOLD = 0.25  # a pattern that is weaker is not there
DIMS = 64  # principal components
LEARNED_FROM = 4000  # images, whose patches side by side are learned from


def extract(images, stride):
    """uint8 images (N, 3, H, W) -> their patches (N, L, 108), each less its mean and over its standard deviation."""
    found = F.unfold(images.float() / 255, SIZE, stride=stride).transpose(1, 2)
    found = found - found.mean(-1, keepdim=True)
    return found / (found.var(-1, keepdim=True) + 1e-4).sqrt()  # the constant keeps the noise of flat patches small


def principal_axes(covariance):
    """(D, D) -> its eigenvalues (D,), the largest first, and unit eigenvectors (D, D), one a column."""
    variances, axes = torch.linalg.eigh(covariance.cpu().double())
    return variances.flip(0).to(covariance), axes.flip(1).to(covariance)


def learn_filters(images, generator, rounds=12):
    """Whitening and spherical k-means of patches -> weight (108, FILTERS) and bias (FILTERS,) of `encode`.

    images: uint8 (N, 3, H, W); generator: on the CPU, of what is drawn
    """
    some = torch.randperm(len(images), generator=generator)[:LEARNED_FROM]
    x = extract(images[some.to(images.device)], stride=SIZE).flatten(0, 1)
    mean = x.mean(0)
    variances, axes = principal_axes(torch.cov(x.T))
    whiten = (axes * (variances + 0.1).rsqrt()) @ axes.T
    x = (x - mean) @ whiten
    centres = F.normalize(torch.randn(FILTERS, x.shape[1], generator=generator).to(x), dim=1)
    for _ in range(rounds):
        similarity = x @ centres.T
        nearest = similarity.abs().argmax(1, keepdim=True)
        code = torch.zeros_like(similarity).scatter_(1, nearest, similarity.gather(1, nearest))
        centres = F.normalize(code.T @ x + 1e-6 * centres, dim=1)  # one that is nearest to no patch stays where it is
    weight = whiten @ centres.T
    return weight, -mean @ weight


def encode(images, weight, bias):
    """How strongly each filter's pattern, and its negative, is there on average in each quarter of the image.

    images: uint8 (N, 3, H, W), weight: (108, K), bias: (K,) -> (N, 8 K)
    """
    rows, columns = ((side - SIZE) // STRIDE + 1 for side in images.shape[2:])
    z = extract(images, STRIDE) @ weight + bias  # (N, L, K)
    present = torch.cat([F.relu(z - THRESHOLD), F.relu(-z - THRESHOLD)], 2)
    return F.adaptive_avg_pool2d(present.unflatten(1, (rows, columns)).permute(0, 3, 1, 2), 2).flatten(1)


@torch.no_grad()
def targets(images, generator, batch_size=100):
    """What a code of each image is to predict: principal components of its encoding and its mirror image's, together.

    images: uint8 (N, 3, H, W); generator: on the CPU, of what learning draws
    -> (N, DIMS) float32 on the images' device, columns of mean 0 and variance 1; those without any variance are 0
    """
    weight, bias = learn_filters(images, generator)
    found = images.new_empty(len(images), 8 * FILTERS, dtype=torch.float32)
    for i in range(0, len(images), batch_size):
        part = images[i : i + batch_size]
        found[i : i + batch_size] = (encode(part, weight, bias) + encode(part.flip(3), weight, bias)) / 2
    found -= found.mean(0)
    found /= found.std(0) + 1e-6
    variances, axes = principal_axes(found.T @ found / len(found))
    scale = variances[:DIMS].clamp(min=0).rsqrt()
    scale[variances[:DIMS] <= 1e-5 * variances[0]] = 0
    return found @ (axes[:, :DIMS] * scale)


class Head(nn.Module):
    """N(t; a linear map of mu, sigma2 I): an auxiliary likelihood of the `targets` t of the images that it is given.

    Its state holds the targets, for --resume: another machine would find the same components with other signs.
    learn: whether to make them now, or leave them to load_state_dict.
    """

    def __init__(self, latent_dim, images, seed, learn=True):
        super().__init__()
        self.linear = nn.Linear(latent_dim, DIMS).to(images.device)
        t = torch.zeros(len(images), DIMS, device=images.device)
        if learn and ranks.is_main():
            print(f"patches: learning {DIMS} features of {len(images)} images; on a CPU 50,000 take a minute or two")
            t = targets(images, devices.generator("cpu", seed, "patches"))
        ranks.broadcast(t)
        self.register_buffer("t", t)

    def nll(self, mu, rows):
        """-log N(t; linear(mu), sigma2 I) of each image, in nats, with the batch's best sigma2.

        mu: (B, Z), rows: (B,) which of the images -> (B,). As in vae.gaussian_nll, sigma2's gradient may be left out.
        """
        t = self.t[rows]
        error = t - self.linear(mu).to(t.dtype)
        sigma2 = error.detach().square().mean()
        ranks.all_reduce_mean(sigma2)
        return error.square().sum(1) / (2 * sigma2) + DIMS / 2 * torch.log(2 * math.pi * sigma2)


def head(args, images):
    """For --patches of a script: its Head; without the flag a module without weights."""
    if not args.patches:
        return nn.Module()
    return Head(args.latent_dim, images, args.seed, learn=not args.resume)
