"""The exact ELBO in one dimension, and the best one: float64 quadrature, no sampling.

    best = best_elbo(log_p_data, log_prior, family="free", floor=0.1)      # any two log-densities, as callables
    best.elbo, best.entropy, best.gap, best.error                          # nats

Symbols. Data x ~ p_d and prior z ~ p have densities. Encoder q(z|x) = N(m(x), v(x)), decoder p(x|z) = N(mu(z), s(z));
v and s are variances. P = p_d(x) q(z|x), Q = p(z) p(x|z). Then (README.md, section 1)

    L = E_P[log p(z) + log p(x|z) - log q(z|x)] = -H(p_d) - KL(P || Q),    gap = KL(P || Q) = -H(p_d) - L >= 0.

`evaluate` computes L from the left expression and KL(P || Q) from its own definition, and refuses when the two differ.

Families. "free": m, v arbitrary (cubic splines in asinh of the standardised x, here), mu, s arbitrary with
s >= floor^2; for a given encoder the best decoder is exact, mu = E_P[x|z] and s = max(Var_P[x|z], floor^2), and so is
profiled out. "affine": m = c x + d, mu = a z + b, with v, s constant (s >= floor^2). Every gap that is returned is one
that the returned maps attain, to within `error`: an upper bound of the family's infimum.

The quadrature: panels in x and in z, broken where the densities have kinks, and split until the encoder's spread
covers each; 8-point Gauss on every panel. `error` is the largest difference among that rule, the same with every panel
halved, and Fejer's rule on the panels; plus what the data's left-away tails can hold, plus the identity's residual.
"""

import math
from dataclasses import dataclass, field
from numbers import Real

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize

from common.runs import UserError
from prior_proofs.densities import Density, fejer, gauss

IDENTITY_TOLERANCE = 1e-6  # nats, between L and -H - KL; the scripts print the largest seen, 2e-9
LOG_2PI = math.log(2 * math.pi)


@dataclass
class Best:
    """What best_elbo found, in nats. The maps are functions of arrays; v and s are variances."""

    elbo: float
    entropy: float  # H(p_d)
    gap: float  # KL(P || Q) = -entropy - elbo
    error: float  # of elbo and gap, see the module's text
    identity: float  # |L + H + KL|, the largest of all evaluations
    starts: dict  # name of the start -> the gap that it led to
    encoder_mean: object
    encoder_variance: object
    decoder_mean: object
    decoder_variance: object
    parameters: dict = field(default_factory=dict)  # a, b, s, c, d, v of the affine family


# --- quadrature over the plane ------------------------------------------------------------------------------------


def split(edges, too_wide):
    """Halve panels as long as too_wide(a, b) says so, at most 30 times. edges: (n+1,) -> (m+1,)"""
    for _ in range(30):
        wide = too_wide(edges[:-1], edges[1:])
        if not wide.any():
            break
        edges = np.sort(np.concatenate([edges, (edges[:-1] + edges[1:])[wide] / 2]))
    return edges


def between(breaks, low, high):
    return np.unique(np.concatenate([[low], breaks[(breaks > low) & (breaks < high)], [high]]))


class Grid:
    """Nodes and weights in x (with p_d) and z that resolve an encoder: spread at least a quarter of a panel."""

    def __init__(self, data, prior, mean, variance, floor=math.inf, rule=gauss, halve=False, width=4.0):
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
            return b - a > width * np.where(touched, spread, np.inf).min(1)

        ends = np.min(m - reach), np.max(m + reach)
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
    q = np.maximum(moments[0], 1e-300)
    mu = moments[1] / q
    return mu, np.maximum(np.maximum(moments[2] / q - mu**2, 1e-30), floor**2)


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


def evaluate(data, prior, mean, variance, decoder, floor=math.inf):
    """The ELBO of an encoder and its decoder on three quadratures -> elbo, error, the identity's residual (nats).

    floor only limits the panels' width. Raises UserError when L and -H - KL differ.
    """
    values, residuals = [], []
    for rule, halve in ((gauss, True), (gauss, False), (fejer, False)):
        grid = Grid(data, prior, mean, variance, floor, rule, halve)
        m, v = mean(grid.x), variance(grid.x)
        values.append(elbo(grid, m, v, decoder)[0])
        residuals.append(abs(values[-1] + data.entropy + divergence(grid, m, v, decoder)))
    identity = max(residuals)
    if not identity < IDENTITY_TOLERANCE:
        raise UserError(
            f"the quadrature does not resolve these densities: L and -H - KL differ by {identity:.1e} nats; "
            "smooth them, rescale them to standard deviations near 1, or raise the floor"
        )
    tail = data.tail * (1 + abs(data(np.array([data.high]))[0])) if data.tail > 1e-15 else 0.0
    return values[0], max(np.ptp(values), identity) + tail, identity


# --- encoders -----------------------------------------------------------------------------------------------------


class Spline:
    """m and log v as natural cubic splines in asinh((x - mean) / sd) of the data."""

    def __init__(self, data, knots):
        self.centre, self.scale = data.mean, math.sqrt(data.variance)
        self.knots = np.linspace(*self.coordinate(np.array([data.low, data.high])), knots)
        self.x = self.centre + self.scale * np.sinh(self.knots)  # where the knots are

    def coordinate(self, x):
        return np.arcsinh((x - self.centre) / self.scale)

    def matrix(self, x):
        """Values at knots -> values at x: (x, knots)"""
        return CubicSpline(self.knots, np.eye(len(self.knots)), bc_type="natural")(self.coordinate(x))

    def functions(self, m, log_v):
        mean, log_variance = (CubicSpline(self.knots, y, bc_type="natural") for y in (m, log_v))
        return lambda x: mean(self.coordinate(x)), lambda x: np.exp(log_variance(self.coordinate(x)))


def transport_encoder(data, prior, floor, pure=False):
    """Dai & Wipf's construction (README.md, section 4): m = T^-1(x), T the monotone map from prior to data.

    pure: v = floor^2 / T'^2, as in the theorem. Otherwise the spread follows T' where it is large, which lowers the
    gap, and stays below the prior's where T' vanishes. -> m, v as functions of arrays
    """

    def mean(x):
        return prior.quantile(np.clip(data.logit(x), -27, 27))  # beyond: 1e-12 of the mass

    def variance(x):
        slope = np.exp(np.clip(prior(mean(x)) - data(x), -40, 16))  # T' at z = m(x)
        if pure:
            return floor**2 / slope**2
        return 1 / (1 / prior.variance + slope**2 / (floor**2 * np.maximum(1, slope)))

    return mean, variance


# --- the best ELBO ------------------------------------------------------------------------------------------------


def descend(data, prior, floor, spline, start):
    """Improve an encoder by L-BFGS on grids that follow it. start: m, v as functions -> better ones

    A step counts only if the ELBO rises on a grid that resolves the new encoder with half the panels' width: an
    optimiser would otherwise hide in the gaps between the nodes.
    """
    decoder = free_decoder(floor)

    def honest(encoder):
        grid = Grid(data, prior, *encoder, floor, halve=True)
        return elbo(grid, encoder[0](grid.x), encoder[1](grid.x), decoder)[0]

    best = spline.functions(start[0](spline.x), np.log(start[1](spline.x)))
    value, width = honest(best), 4.0
    for _ in range(8):
        m0, log_v0 = best[0](spline.x), np.log(best[1](spline.x))
        grid = Grid(data, prior, *best, floor, width=width)
        matrix = spline.matrix(grid.x)
        # unknowns scaled by spread and probability at their knot, so that all matter alike
        scale = 1 / np.sqrt(matrix.T**2 @ grid.weight + 1e-6)
        scale = np.concatenate([np.exp(log_v0 / 2) * scale, scale])
        limit = np.repeat([2 * math.sqrt(prior.variance), 1.5], len(m0)) / scale  # as far as the grid can be trusted
        origin = np.concatenate([m0, log_v0])

        def loss(y, grid=grid, matrix=matrix, scale=scale, origin=origin):
            m, log_v = (matrix @ half for half in np.split(origin + scale * y, 2))
            result, by_m, by_log_v = elbo(grid, m, np.exp(log_v), decoder)
            return -result, -scale * np.concatenate([by_m @ matrix, by_log_v @ matrix])

        options = {"maxiter": 80, "maxcor": 30, "ftol": 1e-15, "gtol": 1e-11}
        bounds = np.stack([-limit, limit], 1)
        found = minimize(loss, np.zeros_like(origin), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        candidate = spline.functions(*np.split(origin + scale * found.x, 2))
        reached = honest(candidate)
        if reached > value:
            gain, best, value = reached - value, candidate, reached
            if gain < 1e-4 * abs(value + data.entropy) + 1e-12:
                break
        elif width > 1:
            width /= 2
        else:
            break
    return best


def best_free(data, prior, floor, knots, more_starts):
    """-> Best. Several starts; the smallest gap + error is kept, so that no quadrature error can win."""
    spline, centre, sd = Spline(data, knots), data.mean, math.sqrt(data.variance)
    tau = math.sqrt(prior.variance)
    starts = {
        "transport": transport_encoder(data, prior, floor),
        **more_starts,
    }
    if floor >= 0.1 * sd:  # below, it leads nowhere better and costs most
        starts["gentle"] = (
            lambda x: prior.mean + 0.8 * tau * np.arcsinh((x - centre) / sd),
            lambda x: np.full(np.shape(x), 0.36 * prior.variance),
        )
    tried, failed = {}, None
    for name, start in starts.items():
        try:
            encoder = descend(data, prior, floor, spline, start)
            tried[name] = (*evaluate(data, prior, *encoder, free_decoder(floor), floor), encoder)
        except UserError as error:
            failed = error
    if not tried:
        raise failed
    value, error, identity, encoder = max(tried.values(), key=lambda found: found[0] - found[1])
    grid = Grid(data, prior, *encoder, floor, halve=True)
    m, v = encoder[0](grid.x), encoder[1](grid.x)
    mu, s = best_conditional(moments_of(grid, posterior(grid, m, v)), floor)
    spread = {name: -data.entropy - found[0] for name, found in tried.items()}
    decoder = (lambda z: np.interp(z, grid.z, mu)), (lambda z: np.interp(z, grid.z, s))
    return Best(value, data.entropy, -data.entropy - value, error, identity, spread, *encoder, *decoder)


def affine_maps(data, d, tau, rho, floor):
    """The affine maps whose latent has mean d, deviation tau and correlation rho with x -> encoder, decoder, dict

    The decoder is the regression of x on z, which is the best affine one. At a fixed d and tau, rho runs along the
    ridge c^2 Var x + v = tau^2 (README.md, section 5).
    """
    sd = math.sqrt(data.variance)
    c, v = rho * tau / sd, tau**2 * (1 - rho**2)
    a, s = rho * sd / tau, max(data.variance * (1 - rho**2), floor**2)
    at = d - c * data.mean
    b = data.mean - a * d
    encoder = (lambda x: c * x + at), (lambda x: np.full(np.shape(x), v))
    decoder = (lambda z: a * z + b), (lambda z: np.full(np.shape(z), s))
    return encoder, decoder, {"a": a, "b": b, "s": s, "c": c, "d": at, "v": v}


def affine_elbo(data, prior, d, tau, rho, floor):
    """-> elbo, error, identity, see `evaluate`."""
    encoder, (mu, s), parameters = affine_maps(data, d, tau, rho, floor)
    value, error, identity = evaluate(data, prior, *encoder, lambda z, moments: (mu(z), s(z)))
    reach = max(data.high - data.mean, data.mean - data.low)
    return value, error + data.tail * reach**2 / parameters["s"], identity  # an affine decoder misses the tails by |x|


def best_affine(data, prior, floor):
    """-> Best. Nelder-Mead over d, log tau and rho (|rho| < 0.95) from the prior's mean and from either side of it."""

    def loss(y):
        encoder, (mu, s), _ = affine_maps(data, y[0], math.exp(y[1]), 0.95 * math.tanh(y[2]), floor)
        grid = Grid(data, prior, *encoder)
        return -elbo(grid, encoder[0](grid.x), encoder[1](grid.x), lambda z, moments: (mu(z), s(z)))[0]

    tau, tried = math.sqrt(prior.variance), {}
    for side in (-1, 0, 1):
        for rho in (0.0, 0.5):
            start = [prior.mean + side * tau, math.log(tau) - abs(side) / 2, math.atanh(rho)]
            options = {"xatol": 1e-6, "fatol": 1e-13, "maxiter": 600}
            y = minimize(loss, start, method="Nelder-Mead", options=options).x
            point = float(y[0]), math.exp(y[1]), 0.95 * math.tanh(y[2])
            tried[f"mean {side:+d} sd, rho {rho}"] = (*affine_elbo(data, prior, *point, floor), point)
    value, error, identity, point = max(tried.values(), key=lambda found: found[0] - found[1])
    encoder, decoder, parameters = affine_maps(data, *point, floor)
    parameters |= dict(zip(("eta", "tau", "rho"), point, strict=True))
    spread = {name: -data.entropy - found[0] for name, found in tried.items()}
    return Best(value, data.entropy, -data.entropy - value, error, identity, spread, *encoder, *decoder, parameters)


def best_elbo(log_p_data, log_prior, family="affine", floor=0.0, knots=80, starts=()):
    """The best ELBO that a Gaussian encoder and decoder were found to reach -> Best. All in nats.

    log_p_data, log_prior: log-densities, numpy array -> array (densities.py says what is checked), or `Density`s.
    family: "affine" or "free". floor: the least standard deviation of the decoder, above 0 for "free" (without one the
    infimum is not attained). knots: of the splines. starts: further Best objects whose encoders to start from.
    Raises UserError for bad input, in one sentence.
    """
    if family not in ("affine", "free"):
        raise UserError(f"family {family!r} is not known: choose 'affine' or 'free'")
    if not (isinstance(floor, Real) and math.isfinite(floor) and floor >= 0):
        raise UserError(f"the floor {floor} must be a finite standard deviation, at least 0")
    if family == "free" and floor == 0:
        raise UserError(
            "free maps need a floor above 0 on the decoder's standard deviation: without, no best one exists"
        )
    data = log_p_data if isinstance(log_p_data, Density) else Density(log_p_data, "data density")
    prior = log_prior if isinstance(log_prior, Density) else Density(log_prior, "prior")
    if prior.edges:
        raise vanishing_prior(np.array(prior.edges))
    if family == "affine":
        return best_affine(data, prior, float(floor))
    more = {f"start {i}": (best.encoder_mean, best.encoder_variance) for i, best in enumerate(starts, 1)}
    return best_free(data, prior, float(floor), knots, more)
