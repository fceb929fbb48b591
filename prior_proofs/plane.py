"""The ELBO and the likelihood of given maps in one dimension: float64 quadrature over the plane, no sampling.

Symbols. Data x ~ p_d and prior z ~ p have densities. Encoder q(z|x) = N(m(x), v(x)), decoder p(x|z) = N(mu(z), s(z));
v and s are variances. P = p_d(x) q(z|x), Q = p(z) p(x|z), p_theta the model's density: the x-marginal of Q. Then
(README.md, sections 1 and 4)

    L = E_P[log p(z) + log p(x|z) - log q(z|x)] = -H(p_d) - KL(P || Q),    gap = KL(P || Q) = -H(p_d) - L >= 0,
    gap = KL(p_d || p_theta) + E_{p_d} KL(q(z|x) || p_theta(z|x)):    the likelihood's own gap, and the encoder's.

`evaluate` computes L from the left expression and KL(P || Q) from its own definition, and refuses when the two differ,
or when the prior's mass is not 1: both sums hold the same terms of Q, so their difference would not show that.

The quadrature: panels in x and in z, broken where the densities have kinks, and split until the encoder's spread
covers each; 8-point Gauss on every panel. `error` is the largest difference among that rule, the same with every panel
halved, and Fejer's rule on the panels; plus what the data's left-away tails can hold, plus the largest residual.
"""

import math
from dataclasses import dataclass

import numpy as np

from common.runs import UserError
from prior_proofs.densities import fejer, gauss

IDENTITY_TOLERANCE = 1e-6  # nats, between L and -H - KL, and of the prior's mass; the scripts print the largest seen
LOG_2PI = math.log(2 * math.pi)
MOST_PANELS = 4000  # along an axis: half of them resolve whatever the pages show


def split(edges, too_wide):
    """Halve panels as long as too_wide(a, b) says so, at most 30 times. edges: (n+1,) -> (m+1,)

    Raises UserError before what is too steep takes all memory.
    """
    for _ in range(30):
        wide = too_wide(edges[:-1], edges[1:])
        if not wide.any():
            break
        if len(edges) > MOST_PANELS:
            raise UserError("these maps are too steep to be integrated: raise the floor, or allow more knots")
        edges = np.sort(np.concatenate([edges, (edges[:-1] + edges[1:])[wide] / 2]))
    return edges


def between(breaks, low, high):
    return np.unique(np.concatenate([[low], breaks[(breaks > low) & (breaks < high)], [high]]))


class Grid:
    """Nodes and weights in x (with p_d) and z that resolve an encoder: spread at least a quarter of a panel.

    whole: z covers the prior too, for the model's density, and not only what the encoder reaches.
    """

    def __init__(self, data, prior, mean, variance, floor=math.inf, rule=gauss, halve=False, width=4.0, whole=False):
        sd = math.sqrt(data.variance)

        def rough(a, b):
            spread = np.sqrt(np.minimum(variance(a), variance(b)))
            jump = np.abs(mean(b) - mean(a)) > width * spread
            matters = np.exp(data((a + b) / 2)) * (b - a) > 1e-12
            wide = b - a > width * min(floor, 0.15) * np.sqrt(1 + np.abs(a - data.mean) / sd)
            return matters & (wide | jump | (np.abs(np.log(variance(b) / variance(a))) > 1.5))

        x_edges = split(between(data.breaks, data.low, data.high), rough)
        middle = (x_edges[1:] + x_edges[:-1]) / 2
        middle = middle[np.isfinite(data(middle))]  # a hole in the support needs no codes
        m, spread = mean(middle), np.sqrt(variance(middle))
        reach = 9 * spread

        def coarse(a, b):
            touched = (a[:, None] < m + reach) & (b[:, None] > m - reach)
            wide = b - a > width * np.where(touched, spread, np.inf).min(1)
            return wide | (b - a > math.sqrt(prior.variance)) & (np.abs(a + b - 2 * prior.mean) < 30) & whole

        ends = np.min(m - reach), np.max(m + reach)
        if whole:
            ends = min(ends[0], prior.low), max(ends[1], prior.high)
        z_edges = split(between(prior.breaks, *ends), coarse)
        if halve:
            x_edges, z_edges = (np.sort(np.append(e, (e[1:] + e[:-1]) / 2)) for e in (x_edges, z_edges))
        self.x, weight = rule(x_edges)
        self.z, self.dz = rule(z_edges)
        self.log_data = np.maximum(data(self.x), -1e4)  # a hole in the support has weight 0, not 0 times -infinity
        self.log_prior = prior(self.z)
        if not np.isfinite(self.log_prior).all():
            raise vanishing_prior(self.z[~np.isfinite(self.log_prior)])
        self.weight = np.exp(self.log_data) * weight
        self.powers = self.weight * np.stack([np.ones_like(self.x), self.x, self.x**2])


def vanishing_prior(z):
    return UserError(
        f"the prior vanishes where every Gaussian encoder has mass (at z = {z[np.argmin(np.abs(z))]:.4g}), so the ELBO "
        "is -infinity: give a prior that is positive everywhere, written as a log-density so that it does not underflow"
    )


def posterior(grid, m, v):
    """N(z; m(x), v(x)) in blocks that leave out what is farther than 9 deviations: yields rows, columns, (x, z)."""
    reach = 9 * np.sqrt(v)
    for start in range(0, len(m), 64):
        rows = slice(start, start + 64)
        low, high = (m - reach)[rows].min(), (m + reach)[rows].max()
        columns = slice(*np.searchsorted(grid.z, (low, high)))
        scaled = (grid.z[columns] - m[rows, None]) ** 2 / (2 * v[rows, None])
        yield rows, columns, np.exp(-scaled - (np.log(v)[rows, None] + LOG_2PI) / 2)


def moments_of(grid, blocks):
    """The integrals of x^k P(x, z) over x, k = 0, 1, 2. -> (3, z)"""
    moments = np.zeros((3, len(grid.z)))
    for rows, columns, density in blocks:
        moments[:, columns] += grid.powers[:, rows] @ density
    return moments


def free_decoder(floor):
    """The best decoder: mu = E[x|z], s = max(Var[x|z], floor^2), from the moments q(z) E[x^k|z], k = 0, 1, 2."""
    return lambda z, moments: best_conditional(moments, floor)


def best_conditional(moments, floor):
    """moments: (3, z) -> mu, s: (z,), (z,)"""
    known = np.flatnonzero(moments[0] > 1e-280)
    where = np.arange(moments.shape[1])
    q, first, second = moments[:, known]
    mu = first / q
    s = np.maximum(np.maximum(second / q - mu**2, 1e-30), floor**2)
    return np.interp(where, known, mu), np.interp(where, known, s)  # no code comes there: as at the nearest that does


def elbo(grid, m, v, decoder):
    """L in nats with its gradients in m and log v (the decoder held: it is optimal, so its own terms vanish).

    decoder: a function of z and of the moments -> mu, s.
    m, v: (x,) -> float, (x,), (x,)
    """
    blocks = list(posterior(grid, m, v))
    moments = moments_of(grid, blocks)
    mu, s = decoder(grid.z, moments)
    # log p(z) + log p(x|z) = c0 + c1 x + c2 x^2
    c = np.stack([grid.log_prior - (np.log(s) + LOG_2PI) / 2 - mu**2 / (2 * s), mu / s, -1 / (2 * s)])
    value = grid.dz @ (c * moments).sum(0) + grid.weight @ ((np.log(v) + LOG_2PI + 1) / 2)
    z = np.stack([np.ones_like(grid.z), grid.z, grid.z**2])
    table = (np.concatenate([z * c[0], z * c[1], z * c[2]]) * grid.dz).T
    sums = np.concatenate([density @ table[columns] for _, columns, density in blocks]).T.reshape(3, 3, -1)
    one, first, second = sums[0] + sums[1] * grid.x + sums[2] * grid.x**2
    grad_m = grid.weight * (first - m * one) / v
    grad_log_v = grid.weight * ((second - 2 * m * first + m**2 * one) / v - one + 1) / 2
    return value, grad_m, grad_log_v


def divergence(grid, m, v, decoder):
    """KL(P || Q) in nats from its definition, the integral of P log(P / Q) over the plane; nothing is simplified."""
    blocks = list(posterior(grid, m, v))
    mu, s = decoder(grid.z, moments_of(grid, blocks))
    total = 0.0
    for rows, columns, density in blocks:
        log_p = grid.log_data[rows, None] + np.log(np.maximum(density, 1e-300))
        square = (grid.x[rows, None] - mu[columns]) ** 2 / (2 * s[columns])
        log_q = grid.log_prior[columns] - (np.log(s[columns]) + LOG_2PI) / 2 - square
        total += grid.weight[rows] @ ((density * (log_p - log_q)) @ grid.dz[columns])
    return total


def log_marginal(grid, mu, s):
    """log p_theta = the logarithm of the integral of p(z) N(x; mu(z), s(z)) over z, at grid.x. mu, s: (z,) -> (x,)"""
    log_mass = grid.log_prior + np.log(grid.dz) - (np.log(s) + LOG_2PI) / 2
    reach, result = 20 * np.sqrt(s), np.zeros_like(grid.x)
    for start in range(0, len(grid.x), 64):
        x = grid.x[start : start + 64, None]
        near = (mu - reach < x.max()) & (mu + reach > x.min())  # the others are below e^-200 of their top
        for columns in (near, slice(None)):
            terms = log_mass[columns] - (x - mu[columns]) ** 2 / (2 * s[columns])
            top = terms.max(1, initial=-math.inf, keepdims=True)
            if (top > -150).all():  # else an x is far from all that is generated: every z counts
                break
        result[start : start + 64] = (top + np.log(np.exp(terms - top).sum(1, keepdims=True)))[:, 0]
    return result


@dataclass
class Measured:
    """An encoder and its decoder, in nats: elbo with its error; the likelihood's gap KL(p_d || p_theta) with its own.

    identity: |L + H + KL(P || Q)| or |prior's mass - 1|, the largest on three quadratures.
    """

    elbo: float
    error: float
    identity: float
    likelihood_gap: float
    likelihood_error: float


def evaluate(data, prior, mean, variance, decoder, floor=math.inf):
    """What an encoder and its decoder reach, on three quadratures -> Measured.

    floor only limits the panels' width. Raises UserError when L and -H - KL differ, or the prior's mass is not 1.
    """
    values, residuals, likelihood = [], [], []
    for rule, halve in ((gauss, True), (gauss, False), (fejer, False)):
        grid = Grid(data, prior, mean, variance, floor, rule, halve, whole=True)
        m, v = mean(grid.x), variance(grid.x)
        values.append(elbo(grid, m, v, decoder)[0])
        residuals.append(abs(values[-1] + data.entropy + divergence(grid, m, v, decoder)))
        residuals.append(abs(np.exp(grid.log_prior) @ grid.dz - 1))
        mu, s = decoder(grid.z, moments_of(grid, posterior(grid, m, v)))
        likelihood.append(grid.weight @ (grid.log_data - log_marginal(grid, mu, s)))
    identity = max(residuals)
    if not identity < IDENTITY_TOLERANCE:
        raise UserError(
            f"the quadrature does not resolve these densities: L and -H - KL, or the prior's mass and 1, differ by "
            f"{identity:.1e}; "
            "smooth them, rescale them to standard deviations near 1, or raise the floor"
        )
    tail = data.tail * (1 + abs(data(np.array([data.high]))[0])) if data.tail > 1e-15 else 0.0
    error = float(max(np.ptp(values), identity) + tail)
    return Measured(float(values[0]), error, float(identity), float(likelihood[0]), float(np.ptp(likelihood) + tail))
