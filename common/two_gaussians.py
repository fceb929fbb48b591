"""Two Gaussians in the plane: how to draw from them, how far samples are from them, and curves of that.

What wgan_gp.py learns, and how it is judged. Nothing here knows a network.
"""

import functools
import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from common import devices, pictures

MEANS = ((0.5, 0.5), (-0.5, -0.5))
N_W2, N_STATISTICS = 2000, 20_000  # samples in a W2; in the shares, means and standard deviations


@functools.cache
def means(device):
    """MEANS as a tensor (2, 2), copied to `device` once: a copy in each step would let the host wait for a GPU."""
    return torch.tensor(MEANS, device=device)


def sample_real(n, sigma=0.1, generator=None, device="cpu"):
    """n draws from 1/2 N((.5, .5), sigma^2 I) + 1/2 N((-.5, -.5), sigma^2 I) -> (n, 2)."""
    mode = torch.randint(len(MEANS), (n,), generator=generator, device=device)
    noise = torch.randn(n, 2, generator=generator, device=device)
    return means(device)[mode] + sigma * noise


def nearest_mode(x):
    """x (N, 2) -> index of the nearest mean (N,), distance to it (N,)."""
    nearest = torch.cdist(x, means(x.device)).min(1)
    return nearest.indices, nearest.values


def statistics(x, sigma):
    """What samples x (N, 2) say about the modes, as plain values; a sample belongs to the mode of the nearest mean.

    mode_weights: shares. mode_means, mode_covariances: of the samples within 4 sigma of their mean.
    within_3_sigma: share within 3 sigma of a mean. bridge: share farther than 4 sigma from both means whose
    projection on the line through them lies between them. A generator is continuous and z has a connected support, so
    its samples form a connected set: one that reaches both modes crosses the gap, and this share cannot be zero.
    log_likelihood: mean log density of x under the truth, nats; a collapse to the means scores higher than the truth.
    """
    mode, distance = nearest_mode(x)
    first, second = means(x.device)
    along = (x - second) @ (first - second) / (first - second).square().sum()
    core = [x[(mode == k) & (distance < 4 * sigma)] for k in range(len(MEANS))]
    core = [c if len(c) > 1 else torch.zeros(2, 2) for c in core]  # an empty mode has mean and spread zero
    covariances = [torch.cov(c.T) for c in core]
    energy = -torch.cdist(x, means(x.device)).square() / (2 * sigma**2)
    return {
        "mode_weights": [(mode == k).float().mean().item() for k in range(len(MEANS))],
        "mode_means": [c.mean(0).tolist() for c in core],
        "mode_covariances": [c.tolist() for c in covariances],
        "within_3_sigma": (distance < 3 * sigma).float().mean().item(),
        "bridge": ((distance > 4 * sigma) & (along > 0) & (along < 1)).float().mean().item(),
        "log_likelihood": energy.logsumexp(1).mean().item() - math.log(4 * math.pi * sigma**2),
    }


def w2(x, y):
    """Exact 2-Wasserstein distance of two point sets of equal size (N, 2), by optimal assignment."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    # The best assignment has the largest sum of products x . y, whatever the shift and the scale of x. Brought to those
    # of y, points that all but coincide, as an untrained generator's do, are assigned in 1 to 3 seconds instead of 9.
    centred, target = x - x.mean(0), y - y.mean(0)
    scaled = centred * (target.std() / max(centred.std(), 1e-9))
    rows, columns = linear_sum_assignment(cdist(scaled, target, "sqeuclidean"))
    return float(np.sqrt(np.square(x[rows] - y[columns]).sum(1).mean()))


def w2_modes(x, sigma, generator=None, within=math.inf):
    """W2 between the samples nearest to a mode, at most `within` sigma away, and as many real ones -> [2], one a mode.

    A mode without two such samples is compared with all of x.
    """
    mode, distance = nearest_mode(x)
    values = []
    for k, mean in enumerate(MEANS):
        own = x[(mode == k) & (distance <= within * sigma)]
        own = own if len(own) > 1 else x
        values.append(w2(own, torch.tensor(mean) + sigma * torch.randn(own.shape, generator=generator)))
    return values


def measure(sample, sigma, draws, *key):
    """`statistics` of 20,000 and W2 of 2000 samples, the mean of `draws`; sample(n, generator) -> (n, 2) on the CPU.

    w2_mode takes all samples nearest to a mode, bridge included; w2_mode_core those within 4 sigma: the shape alone.
    """
    rows = []
    for draw in range(draws):
        stream = devices.generator("cpu", *key, draw)
        x = sample(N_W2, stream)
        modes, core = w2_modes(x, sigma, stream), w2_modes(x, sigma, stream, within=4)
        rows.append([w2(x, sample_real(N_W2, sigma, stream)), *modes, *core])
    mean = np.mean(rows, 0).tolist()
    found = {"w2": mean[0], "w2_mode": mean[1:3], "w2_mode_core": mean[3:5]}
    return found | statistics(sample(N_STATISTICS, devices.generator("cpu", *key, "statistics")), sigma)


def measure_truth(sigma, draws, seed):
    """What real samples measure against real samples: no generator can be asked for less.

    -> sigma; truth: what `measure` gives; w2_floor and w2_mode_floor: its distances, the latter the mean of both modes
    """
    truth = measure(lambda n, stream: sample_real(n, sigma, stream), sigma, draws, seed, "truth")
    floors = {"w2_floor": truth["w2"], "w2_mode_floor": float(np.mean(truth["w2_mode"]))}
    return floors | {"sigma": sigma, "truth": truth}


def mode_axes(covariance):
    """Standard deviations along the narrowest and the widest direction of a mode, from its covariance (2, 2) -> (2,).

    These are the roots of the eigenvalues. The standard deviations along x_1 and x_2 hide a mode that is flat along a
    diagonal, as the line through the means is.
    """
    return np.sqrt(np.linalg.eigvalsh(covariance).clip(min=0))


def correlation(covariance):
    """Correlation of x_1 and x_2 from a covariance (2, 2); 0 for a mode without any spread.

    Both means lie on the line x_1 = x_2: negative is flat along it, positive is drawn out along it.
    """
    (first, both), (_, second) = covariance
    scale = math.sqrt(max(first * second, 0))
    return both / scale if scale > 0 else 0.0


@dataclass(frozen=True)
class Goal:
    """One thing asked of a generator. value: the largest deviation of its kind; bound: what it may be at most."""

    what: str
    value: float
    bound: float

    @property
    def met(self):
        return self.value <= self.bound


def goals(metrics, sigma):
    """What `measure` gives, with w2_mode_floor -> {name: Goal}."""
    stds = np.array([mode_axes(c) for c in metrics["mode_covariances"]])
    worst_correlation = max(abs(correlation(c)) for c in metrics["mode_covariances"])
    mean_error = np.abs(np.array(metrics["mode_means"]) - MEANS).max()
    std_error = np.abs(stds / sigma - 1).max()
    w2_ratio = max(metrics["w2_mode"]) / metrics["w2_mode_floor"]
    return {
        "weights": Goal("mode weights: off 0.5 by", abs(metrics["mode_weights"][0] - 0.5), 0.02),
        "means": Goal("means: off by", float(mean_error), 0.02),
        "stds": Goal("standard deviation, worst direction: error", float(std_error), 0.1),
        "correlation": Goal("correlation within a mode: size", worst_correlation, 0.08),
        "far": Goal("share farther than 3 sigma from both modes", 1 - metrics["within_3_sigma"], 0.02),
        "w2": Goal("W2 within the worse mode over its floor", w2_ratio, 1.35),
    }


def print_goals(metrics):
    """The goals as a table on screen. metrics: `measure`'s and `measure_truth`'s together."""
    sigma = metrics["sigma"]
    best = goals(metrics | metrics["truth"], sigma)
    print(f"\n{'at most':>52} {'here':>8} {'truth':>8}")
    for name, goal in goals(metrics, sigma).items():
        verdict = "met" if goal.met else "missed"
        print(f"{goal.what:44} {goal.bound:7.3f} {goal.value:8.4f} {best[name].value:8.4f}  {verdict}")


def reach(sigma):
    """Every picture shows [-reach, reach]^2: 5 sigma around each mean, the means' square being [-0.5, 0.5]^2."""
    return 0.5 + 5 * sigma


def plot_curves(records, truth, sigma, path):
    """The log's curves; a dashed line is what as many samples of the truth give."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.2), layout="constrained", sharex=True)

    def panel(axis, title, scale, rows, lines):
        """lines: {label: function of a record}; one without a label has no counterpart in the truth."""
        for label, value in lines.items():
            (line,) = axis.plot([r["step"] for r in rows], [value(r) for r in rows], lw=1, label=label)
            if label and not (scale == "log" and value(truth) <= 0):
                axis.axhline(value(truth), color=line.get_color(), ls="--", lw=0.8)
        axis.set(title=title, xlabel="generator iterations")
        if scale == "symlog":
            axis.set_yscale(scale, linthresh=0.01)
        else:
            axis.set_yscale(scale)
        if "" not in lines:
            axis.legend(fontsize=8)

    def std(mode, direction):
        return lambda r: mode_axes(r["mode_covariances"][mode])[direction] / sigma

    game = [r for r in records if "wasserstein" in r]
    panel(axes[0, 0], "Wasserstein estimate of the critic", "symlog", game, {"": lambda r: r["wasserstein"]})
    panel(axes[0, 1], "critic's gradient norm at interpolates", "linear", game, {"": lambda r: r["gradient_norm"]})
    looks = [r for r in records if "w2" in r]
    weights = {f"mode {k + 1}": lambda r, k=k: r["mode_weights"][k] for k in (0, 1)}
    panel(axes[0, 2], "mode weights", "linear", looks, weights)
    distances = {"both modes": lambda r: r["w2"], "within a mode": lambda r: np.mean(r["w2_mode"])}
    panel(axes[1, 0], "exact $W_2$ on 2000 points", "log", looks, distances)
    stds = {f"mode {k + 1}, {way}": std(k, i) for k in (0, 1) for i, way in enumerate(("narrowest", "widest"))}
    panel(axes[1, 1], "standard deviations over the true one", "linear", looks, stds)
    shares = {"farther than 3 sigma": lambda r: 1 - r["within_3_sigma"], "bridge": lambda r: r["bridge"]}
    panel(axes[1, 2], "share of samples off the modes", "log", looks, shares)
    pictures.save_figure(figure, path, dpi=75)
