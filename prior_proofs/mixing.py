"""The best likelihood that a Gaussian decoder can reach alone, whatever the prior: a convex problem, with a bound.

    python prior_proofs/non_gaussian_case.py                           # prints it beside the ELBO
    found = best_marginal(Density(log_p_data, "data"), floor=0.3)      # found.gap, found.least, found.error in nats

The model's density is the integral of N(x; mu(z), s(z)) p(z) over z: a mixture of normal densities whose mixing measure
pi is the law of (mu(z), s(z)). A prior that is a density can be carried to any pi by measurable maps, so the prior does
not matter, and KL(p_d || p_theta) is convex in pi. Under a floor, s >= floor^2, the mixture is N(0, floor^2) convolved
with some probability measure (README.md, section 4), and that is the only restriction.

Method: Wang, J. R. Stat. Soc. B 69 (2007), the constrained Newton method. For the current pi and each candidate normal
density let D be the mean of N(x; m, s) / p_pi(x) over the data. Where D > 1, a bit of mass lowers the divergence; the
candidates at D's peaks join, and the weights are those of the quadratic approximation, by non-negative least squares.
The bound is Lindsay's: no pi at all can be better by more than log sup D over m at s = floor^2, since
E log(p_best / p_pi) <= log E(p_best / p_pi), and p_best is a mixture of such densities. The sup is taken on a grid of
its own, much finer than the candidates', with what D can rise between its nodes.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from prior_proofs.densities import fejer, gauss
from prior_proofs.plane import LOG_2PI, between, split

ACTIVE = 400  # candidates that enter the least squares with weight; besides, those at peaks
SPARE = 1e-13  # mass, so nats, given away to keep the density positive everywhere
PITCH = 1 / 100  # of a floor: between the means at which the bound looks at D


@dataclass
class Marginal:
    """In nats: KL(p_d || p_pi) of the mixture found, its quadrature's error, and what no mixture can be below."""

    gap: float
    error: float
    least: float
    means: np.ndarray
    variances: np.ndarray
    weights: np.ndarray

    def __call__(self, x):
        """The mixture's density. array -> array"""
        return np.exp(log_normal(x[:, None], self.means, self.variances)) @ self.weights


def log_normal(x, mean, variance):
    return -((x - mean) ** 2) / (2 * variance) - (np.log(variance) + LOG_2PI) / 2


def nodes(data, floor, rule, halve=False):
    """Nodes, weights times p_d, and log p_d; panels at most twice the floor where most of the data are."""
    sd = math.sqrt(data.variance)

    def wide(a, b):
        away = np.maximum(np.abs((a + b) / 2 - data.mean) / sd - 3, 0)
        return b - a > 2 * min(floor, sd / 2) * (1 + away**2)

    edges = split(between(data.breaks, data.low, data.high), wide)
    if halve:
        edges = np.sort(np.append(edges, (edges[1:] + edges[:-1]) / 2))
    x, weight = rule(edges)
    log_p = np.maximum(data(x), -1e4)
    weight = weight * np.exp(log_p)
    matters = weight > 1e-18
    return x[matters], weight[matters], log_p[matters]


def candidates(data, floor):
    """Means and variances: deviations from the floor up, doubling. -> (n,), (n,)"""
    means, variances, width, sd = [], [], floor, math.sqrt(data.variance)
    while not means or width < (data.high - data.low) / 4:
        reach = max(5 * sd, 24 * width)
        low, high = max(data.low, data.mean - reach), min(data.high, data.mean + reach)
        a_width, most = (3, 401) if means else (16, 1201)  # the floor's own are the most important, and the closest
        number = min(most, math.ceil((high - low) / width * a_width) // 2 * 2 + 3)  # odd: one is in the middle
        means.append(np.linspace(low, high, number))
        variances.append(np.full(len(means[-1]), width**2))
        width *= 2
    return np.concatenate(means), np.concatenate(variances)


def best_marginal(data, floor, rounds=20):
    """The least KL(p_d || p_theta) of decoders with s >= floor^2. data: a Density -> Marginal"""
    means, variances = candidates(data, floor)
    x, weight, log_p = nodes(data, floor, gauss)
    ratio = np.exp(log_normal(x[:, None], means, variances) - log_p[:, None])  # N(x; m, s) / p_d(x): (x, candidates)
    base = SPARE * ratio.mean(1)  # of all candidates alike: without it the far tails could be lost to rounding
    pi = np.full(len(means), 1 / len(means))
    value = -(weight @ np.log(ratio @ pi))
    for round_ in range(rounds):
        before = value
        for _ in range(5 if round_ else 100):  # EM: slow at the end, but safe where the quadratic approximation is not
            pi = pi * ((weight / (base + ratio @ pi)) @ ratio)
        value = -(weight @ np.log(base + ratio @ pi))
        gain = (weight / (base + ratio @ pi)) @ ratio
        if math.log(gain.max()) < max(1e-3 * value, 1e-12):
            break
        peak = (gain > np.roll(gain, 1)) & (gain >= np.roll(gain, -1)) & (gain > 1)
        heavy = pi > max(1e-3 * pi.max(), np.sort(pi)[-ACTIVE] if len(pi) > ACTIVE else 0)
        active = np.flatnonzero(heavy | peak)
        pi, value = newton(ratio, base, weight, pi, value, active)
        if round_ > 4 and before - value < 1e-3 * value:
            break
    pi = (1 - SPARE) * pi + SPARE / len(pi)
    found = Marginal(0.0, 0.0, 0.0, means, variances, pi)
    values, ratios = [], []
    for rule, halve in ((gauss, True), (gauss, False), (fejer, False)):
        x, weight, log_p = nodes(data, floor, rule, halve)
        log_ratio = log_p - np.log(found(x))
        values.append(weight @ log_ratio)
        ratios.append(better_by(data, floor, x, weight * np.exp(log_ratio - log_p)))
    found.gap, found.error = float(values[0]), float(np.ptp(values) + data.tail)
    found.least = max(0.0, found.gap - max(ratios))
    return found


def better_by(data, floor, x, weight):
    """No mixture is better by more than this: log sup D.  Lindsay 1983.

    x, weight: nodes in ascending order, and weights of the integral of p_d / p_pi, so that D(m) is the sum of weight
    times N(x; m, c^2), c = floor. D'' >= -D / c^2, so where D is highest the nearest node of a grid of pitch h has at
    least the share 1 - h^2 / 8c^2 of it. Outside the data's range D only falls.
    """
    means = np.arange(data.low, data.high + PITCH * floor, PITCH * floor)
    highest = 0.0
    for block in np.array_split(means, math.ceil(len(means) / 256)):
        first, last = np.searchsorted(x, (block[0] - 12 * floor, block[-1] + 12 * floor))
        if first < last:
            normals = np.exp(log_normal(block[:, None], x[first:last], floor**2))
            highest = max(highest, (normals @ weight[first:last]).max())
    return math.log(highest) - math.log(1 - PITCH**2 / 8)


def newton(ratio, base, weight, pi, value, active):
    """One step of the constrained Newton method on the weights of the active candidates -> pi, value."""
    mixture = base + ratio @ pi
    scaled = np.sqrt(weight)[:, None] * ratio[:, active] / mixture[:, None]
    total = 1e3  # the weight of the equation that the weights' sum is 1
    system = np.vstack([scaled, np.full(len(active), total)])
    target = np.append(2 * np.sqrt(weight), total)
    wanted = np.zeros_like(pi)
    wanted[active] = nnls(system, target, maxiter=30 * len(active))[0]
    wanted /= wanted.sum()
    for step in 0.5 ** np.arange(12):
        trial = (1 - step) * pi + step * wanted
        lower = -(weight @ np.log(base + ratio @ trial))
        if lower < value:
            return trial, lower
    return pi, value
