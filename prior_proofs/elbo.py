"""The best ELBO that a Gaussian encoder and decoder were found to reach in one dimension. Nothing is drawn at random.

    best = best_elbo(log_p_data, log_prior, family="free", floor=0.1)      # any two log-densities, as callables
    best.elbo, best.entropy, best.gap, best.error                          # nats
    best.likelihood_gap                                                    # KL(p_d || p_theta) of the same maps

Symbols and quadrature: plane.py.

Families. "free": m, v arbitrary (cubic splines, here), mu, s arbitrary with s >= floor^2; for a given encoder the best
decoder is exact, mu = E_P[x|z] and s = max(Var_P[x|z], floor^2), and so is profiled out. "affine": m = c x + d,
mu = a z + b, with v, s constant (s >= floor^2). Every gap that is returned is an upper bound of the family's
infimum: the returned encoder attains it, to within `error`, with its exact decoder. (The decoder that "free" returns is
that one interpolated between the quadrature's nodes; its own gap is a little larger.)

The splines' knots are few at first, from several starts, and then doubled, from the best start on, until the gap moves
by less than SETTLED at a doubling, or they are as many as allowed. `Best.moved` says how far it moved at the last one.
"""

import math
from dataclasses import dataclass, field
from numbers import Real

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize

from common.runs import UserError
from prior_proofs.densities import Density
from prior_proofs.plane import (
    Grid,
    best_conditional,
    elbo,
    evaluate,
    free_decoder,
    moments_of,
    posterior,
    vanishing_prior,
)

FIRST_KNOTS = 41  # at most, before the first doubling
SETTLED = 0.01  # of the gap: a doubling of the knots that moves it less is the last


@dataclass
class Best:
    """What best_elbo found, in nats. The maps are functions of arrays; v and s are variances."""

    elbo: float
    entropy: float  # H(p_d)
    gap: float  # KL(P || Q) = -entropy - elbo
    error: float  # of elbo and gap, see plane.py
    identity: float  # |L + H + KL|, the largest of all evaluations
    likelihood_gap: float  # KL(p_d || p_theta) of these maps
    likelihood_error: float
    starts: dict  # name of the start -> the gap that it led to, with FIRST_KNOTS knots
    encoder_mean: object
    encoder_variance: object
    decoder_mean: object
    decoder_variance: object
    parameters: dict = field(default_factory=dict)  # a, b, s, c, d, v of the affine family
    knots: int = 0  # of the free family's splines, at the end
    moved: float | None = None  # how far the last doubling of the knots moved the gap, as a part of it


# --- encoders -----------------------------------------------------------------------------------------------------


class Spline:
    """m and log v as natural cubic splines in asinh((x - mean) / sd) of the data. knots: in this coordinate, rising"""

    def __init__(self, data, knots):
        self.centre, self.scale = data.mean, math.sqrt(data.variance)
        self.knots = knots
        self.x = self.centre + self.scale * np.sinh(self.knots)  # where the knots are

    @classmethod
    def even(cls, data, knots):
        """Knots at equal distances in the coordinate."""
        ends = np.arcsinh((np.array([data.low, data.high]) - data.mean) / math.sqrt(data.variance))
        return cls(data, np.linspace(*ends, knots))

    @classmethod
    def along(cls, data, encoder, knots):
        """Knots that divide equally what x, m and log v of an encoder cover: dense where the encoder is steep."""
        fine = cls.even(data, 4001)
        covered = np.zeros(4001)
        for curve in (fine.knots, encoder[0](fine.x), np.log(encoder[1](fine.x))):
            steps = np.abs(np.diff(curve))
            covered[1:] += np.cumsum(steps) / max(steps.sum(), 1e-12)
        return cls(data, np.interp(np.linspace(0, covered[-1], knots), covered, fine.knots))

    def doubled(self, data):
        """The same with a knot more in every interval; every spline with the old knots is one with the new."""
        return Spline(data, np.sort(np.append(self.knots, (self.knots[1:] + self.knots[:-1]) / 2)))

    def coordinate(self, x):
        return np.arcsinh((x - self.centre) / self.scale)

    def matrix(self, x):
        """Values at knots -> values at x: (x, knots)"""
        return CubicSpline(self.knots, np.eye(len(self.knots)), bc_type="natural")(self.coordinate(x))

    def functions(self, m, log_v):
        mean, log_variance = (CubicSpline(self.knots, y, bc_type="natural") for y in (m, log_v))
        return lambda x: mean(self.coordinate(x)), lambda x: np.exp(log_variance(self.coordinate(x)))


def transport_encoder(data, prior, floor):
    """A start after Dai & Wipf (README.md, section 5): m = T^-1(x), T the increasing map from prior to data.

    The variance follows T' where T' is large, which lowers the gap, and stays below the prior's where T' vanishes.
    -> m, v as functions of arrays
    """

    def mean(x):
        return prior.quantile(np.clip(data.logit(x), -27, 27))  # beyond: 1e-12 of the mass

    def variance(x):
        slope = np.exp(np.clip(prior(mean(x)) - data(x), -40, 16))  # T' at z = m(x)
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
        try:
            grid = Grid(data, prior, *encoder, floor, halve=True)
        except UserError:  # no grid resolves it; `evaluate` refuses a start of that kind
            return -math.inf
        return elbo(grid, encoder[0](grid.x), encoder[1](grid.x), decoder)[0]

    best = spline.functions(start[0](spline.x), np.log(start[1](spline.x)))
    value, width = honest(best), 4.0
    for _ in range(8):
        m0, log_v0 = best[0](spline.x), np.log(best[1](spline.x))
        try:
            grid = Grid(data, prior, *best, floor, width=width)
        except UserError:  # it would be too large: the encoder is as good as it gets
            break
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


def best_free(data, prior, floor, most_knots, more_starts):
    """-> Best. Several starts with few knots; then the best of them with ever more (see the module's text).

    The smallest gap + error is kept, so that no quadrature error can win.
    """
    centre, sd, tau = data.mean, math.sqrt(data.variance), math.sqrt(prior.variance)
    knots = most_knots
    while knots > FIRST_KNOTS:
        knots = (knots + 1) // 2
    even, transport = Spline.even(data, knots), transport_encoder(data, prior, floor)
    starts = {"transport": (even, transport), "along": (Spline.along(data, transport, knots), transport)}
    starts |= {name: (even, start) for name, start in more_starts.items()}
    if floor >= 0.1 * sd:  # below, it leads nowhere better and costs most
        gentle = (
            lambda x: prior.mean + 0.8 * tau * np.arcsinh((x - centre) / sd),
            lambda x: np.full(np.shape(x), 0.36 * prior.variance),
        )
        starts["gentle"] = even, gentle
    tried, failed = {}, None
    for name, (spline, start) in starts.items():
        try:
            encoder = descend(data, prior, floor, spline, start)
            measured = evaluate(data, prior, *encoder, free_decoder(floor), floor)
            tried[name] = Attempt(measured, encoder, spline)
        except UserError as error:
            failed = error
    if not tried:
        raise failed
    best = max(tried.values(), key=Attempt.surely)
    spread = {name: -data.entropy - attempt.measured.elbo for name, attempt in tried.items()}
    best, moved = refine(data, prior, floor, best, most_knots)
    measured, encoder = best.measured, best.encoder
    grid = Grid(data, prior, *encoder, floor, halve=True)
    mu, s = best_conditional(moments_of(grid, posterior(grid, encoder[0](grid.x), encoder[1](grid.x))), floor)
    decoder = (lambda z: np.interp(z, grid.z, mu)), (lambda z: np.interp(z, grid.z, s))
    return summary(data, measured, spread, encoder, decoder, knots=len(best.spline.knots), moved=moved)


@dataclass
class Attempt:
    measured: object  # plane.Measured
    encoder: tuple  # m, v as functions
    spline: object = None
    point: tuple = ()  # of the affine family

    def surely(self):
        return self.measured.elbo - self.measured.error


def refine(data, prior, floor, best, most_knots):
    """Double the knots of an Attempt until its gap has settled. -> Attempt, how far it moved at the last doubling"""
    moved = None
    while 2 * len(best.spline.knots) - 1 <= most_knots:
        spline = best.spline.doubled(data)
        encoder = descend(data, prior, floor, spline, best.encoder)
        finer = Attempt(evaluate(data, prior, *encoder, free_decoder(floor), floor), encoder, spline)
        gain, gap = finer.measured.elbo - best.measured.elbo, -data.entropy - finer.measured.elbo
        moved = abs(gain) / max(abs(gap), 1e-300)
        best = finer
        if abs(gain) < max(SETTLED * gap, finer.measured.error):
            break
    return best, moved


def summary(data, measured, spread, encoder, decoder, **more):
    """-> Best"""
    gap = -data.entropy - measured.elbo
    return Best(measured.elbo, data.entropy, gap, measured.error, measured.identity, measured.likelihood_gap,
                measured.likelihood_error, spread, *encoder, *decoder, **more)  # fmt: skip


def affine_maps(data, eta, tau, rho, floor):
    """The affine maps whose latent has mean eta, deviation tau and correlation rho with x -> encoder, decoder, dict

    The decoder is the regression of x on z, which is the best affine one. At a fixed eta and tau, rho runs along the
    ridge c^2 Var x + v = tau^2 (README.md, section 6).
    """
    sd = math.sqrt(data.variance)
    c, v = rho * tau / sd, tau**2 * (1 - rho**2)
    a, s = rho * sd / tau, max(data.variance * (1 - rho**2), floor**2)
    d = eta - c * data.mean
    b = data.mean - a * eta
    encoder = (lambda x: c * x + d), (lambda x: np.full(np.shape(x), v))
    decoder = (lambda z: a * z + b), (lambda z: np.full(np.shape(z), s))
    return encoder, decoder, {"a": a, "b": b, "s": s, "c": c, "d": d, "v": v}


def affine_elbo(data, prior, eta, tau, rho, floor):
    """-> plane.Measured"""
    encoder, (mu, s), parameters = affine_maps(data, eta, tau, rho, floor)
    measured = evaluate(data, prior, *encoder, lambda z, moments: (mu(z), s(z)))
    reach = max(data.high - data.mean, data.mean - data.low)
    measured.error += data.tail * reach**2 / parameters["s"]  # an affine decoder misses the tails by |x|
    return measured


def best_affine(data, prior, floor):
    """-> Best. Nelder-Mead over eta, log tau and rho (|rho| < 0.95) from the prior's mean and either side of it."""

    def loss(y):
        encoder, (mu, s), _ = affine_maps(data, y[0], math.exp(y[1]), 0.95 * math.tanh(y[2]), floor)
        grid = Grid(data, prior, *encoder)
        return -elbo(grid, encoder[0](grid.x), encoder[1](grid.x), lambda z, moments: (mu(z), s(z)))[0]

    tau, tried = math.sqrt(prior.variance), {}
    for side in (-1, 0, 1):
        start = [prior.mean + side * tau, math.log(tau) - abs(side) / 2, math.atanh(0.5)]
        options = {"xatol": 1e-6, "fatol": 1e-13, "maxiter": 600}
        y = minimize(loss, start, method="Nelder-Mead", options=options).x
        point = float(y[0]), math.exp(y[1]), 0.95 * math.tanh(y[2])
        tried[f"mean {side:+d} sd"] = Attempt(affine_elbo(data, prior, *point, floor), (), None, point)
    best = max(tried.values(), key=Attempt.surely)
    encoder, decoder, parameters = affine_maps(data, *best.point, floor)
    parameters |= dict(zip(("eta", "tau", "rho"), best.point, strict=True))
    spread = {name: -data.entropy - attempt.measured.elbo for name, attempt in tried.items()}
    return summary(data, best.measured, spread, encoder, decoder, parameters=parameters)


def best_elbo(log_p_data, log_prior, family="affine", floor=0.0, knots=321, starts=()):
    """The best ELBO that a Gaussian encoder and decoder were found to reach -> Best. All in nats.

    log_p_data, log_prior: log-densities, numpy array -> array (densities.py says what is checked), or `Density`s.
    family: "affine" or "free". floor: the least standard deviation of the decoder, above 0 for "free" (without one the
    infimum is not attained). knots: of the splines, at most. starts: further Best objects whose encoders to start from.
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
