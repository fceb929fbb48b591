"""Features of images that are learned without labels: k-means on whitened patches. What --patches asks a code to tell.

Papers: Coates, Ng & Lee 2011, "An analysis of single-layer networks in unsupervised feature learning" (AISTATS); its
spherical k-means is that of Coates & Ng 2012, "Learning feature representations with k-means".

    reader = patches.Reader(latent_dim, images, seed)     # learns the features, (N, 128), of these images
    value = reader.nll(mu, rows)                          # (B,) in nats, to be weighted and averaged: how well mu tells

How often an image shows each of 600 small patterns in each of its quarters says more about what it shows than its
pixels do. Not theirs: an image and its mirror image share their features, the mean of both, since training shows
either; and what counts is the first 128 principal components, each scaled to variance 1.
"""

import torch
import torch.nn.functional as F
from torch import nn

from common import devices, ranks

SIZE, STRIDE = 6, 2  # of the patches, in pixels
FILTERS = 300  # means of k-means; each counts with both signs
THRESHOLD = 0.25  # a pattern that is weaker is not there
DIMS = 128  # principal components
LEARNED_FROM = 100_000  # patches


def patches(images, stride):
    """uint8 images (N, 3, H, W) -> their patches (N, L, 108), each less its mean and over its standard deviation."""
    found = F.unfold(images.float() / 255, SIZE, stride=stride).transpose(1, 2)
    found = found - found.mean(-1, keepdim=True)
    return found / (found.var(-1, keepdim=True) + 1e-4).sqrt()  # the constant keeps the noise of flat patches small


def learn_filters(images, generator, rounds=12):
    """Whitening and spherical k-means of random patches -> weight (108, FILTERS) and bias (FILTERS,) of `responses`.

    images: uint8 (N, 3, H, W); generator: on the CPU, of what is drawn
    """
    some = torch.randperm(len(images), generator=generator)[: LEARNED_FROM // 25].to(images.device)
    x = patches(images[some], stride=SIZE).flatten(0, 1)  # 25 an image of 32 x 32
    x = x[torch.randperm(len(x), generator=generator)[:LEARNED_FROM].to(x.device)]
    mean = x.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov(x.T))
    whiten = directions * (variances + 0.1).rsqrt() @ directions.T
    x = (x - mean) @ whiten
    centres = F.normalize(torch.randn(FILTERS, x.shape[1], generator=generator).to(x), dim=1)
    for _ in range(rounds):
        similarity = x @ centres.T
        nearest = similarity.abs().argmax(1)
        along = similarity.gather(1, nearest[:, None])
        sums = torch.zeros_like(centres).index_add_(0, nearest, along * x)
        centres = F.normalize(sums + 1e-6 * centres, dim=1)  # one that is nearest to no patch stays where it is
    weight = whiten @ centres.T
    return weight, mean @ weight


def responses(images, weight, bias):
    """How strongly each filter's pattern, and its negative, is there on average in each quarter of the image.

    images: uint8 (N, 3, H, W), weight: (108, K), bias: (K,) -> (N, 8 K)
    """
    rows, columns = ((side - SIZE) // STRIDE + 1 for side in images.shape[2:])
    z = patches(images, STRIDE) @ weight - bias  # (N, L, K)
    present = torch.cat([F.relu(z - THRESHOLD), F.relu(-z - THRESHOLD)], 2)
    return F.adaptive_avg_pool2d(present.unflatten(1, (rows, columns)).permute(0, 3, 1, 2), 2).flatten(1)


@torch.no_grad()
def targets(images, generator, batch_size=100):
    """What a code of each image is to tell: principal components of its responses and its mirror image's, together.

    images: uint8 (N, 3, H, W); generator: on the CPU, of what learning draws
    -> (N, DIMS) float32 on the images' device, columns of mean 0 and variance 1; those without any variance are 0
    """
    weight, bias = learn_filters(images, generator)
    found = images.new_empty(len(images), 8 * FILTERS, dtype=torch.float32)
    for i in range(0, len(images), batch_size):
        part = images[i : i + batch_size]
        found[i : i + batch_size] = (responses(part, weight, bias) + responses(part.flip(3), weight, bias)) / 2
    found -= found.mean(0)
    found /= found.std(0) + 1e-6
    variances, directions = torch.linalg.eigh(found.T @ found / len(found))
    variances, directions = variances[-DIMS:].flip(0), directions[:, -DIMS:].flip(1)
    scale = variances.clamp(min=0).rsqrt()
    scale[variances < 1e-5 * variances[0]] = 0
    return found @ directions * scale


class Reader(nn.Module):
    """p(t|z) = N(t; a linear map of z, sigma2 I) for the `targets` t of the images that it is given: one decoder more.

    Its state holds the targets, for --resume: another machine would find the same components with other signs.
    learn: whether to make them now, or leave them to load_state_dict.
    """

    def __init__(self, latent_dim, images, seed, learn=True):
        super().__init__()
        self.linear = nn.Linear(latent_dim, DIMS).to(images.device)
        t = torch.zeros(len(images), DIMS, device=images.device)
        if learn:
            t = targets(images, devices.generator("cpu", seed, "patches"))
        self.register_buffer("t", t)

    def nll(self, mu, rows):
        """-log p(t|mu) of each image, in nats, with the batch's best sigma2.

        mu: (B, Z), rows: (B,) which of the images -> (B,)
        """
        t = self.t[rows]
        t_hat = self.linear(mu).to(t.dtype)
        sigma2 = (t - t_hat).detach().square().mean()
        ranks.all_reduce_mean(sigma2)
        return F.gaussian_nll_loss(t_hat, t, sigma2.expand(len(t), 1), full=True, reduction="none").sum(1)


def reader(args, images):
    """For --patches of a script: its Reader; without the flag a module without weights."""
    if not args.patches:
        return nn.Module()
    return Reader(args.latent_dim, images, args.seed, learn=not args.resume)
