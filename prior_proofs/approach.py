"""Theorem D: the bound of the ELBO can be approached, for both claims; the algebra, and the construction's exact gap.

    python prior_proofs/approach.py                     # the proof's steps
    python prior_proofs/approach.py --slip pointwise_gap

T is the increasing map that carries the prior to the data, p_d(T(z)) T'(z) = p(z), and w(z) = 1 / (1 + |z|). For
eps > 0 take the maps

    m(x) = z0 = T^-1(x),    v(x) = eps^2 w(z0)^2,    mu = T,    s(z) = eps^2 w(z)^2 T'(z)^2.

If |(log T')'| <= lam (1 + |z|) and log p is the sum of an ell-Lipschitz function and one with second derivative at
least -K, their gap goes to 0 with eps. README.md, section 5, has the proof, and why every row of the tables qualifies.
"""

import sys
from pathlib import Path

import numpy as np
import sympy as sp

# The scripts of this folder are run as files, and then Python looks here, not in the repository's root, for common/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import runs  # noqa: E402
from prior_proofs.densities import fejer, gauss, normal  # noqa: E402
from prior_proofs.lemma import expect, log_normal, main_of, normal_mean, v, z  # noqa: E402

eps, lam, ell, K = sp.symbols("eps lam ell K", positive=True)


def pointwise_gap(slip=0):
    """With S = w T', gap at x = E_q[log p(z0) - log p(z) + log S(z) - log S(z0) + (x - T)^2 / 2 eps^2 S^2] - 1/2."""
    w0, slope0 = sp.symbols("w0 slope0", positive=True)  # w(z0), T'(z0)
    log_p, log_p0, log_s, miss = sp.symbols("log_p log_p0 log_s miss", real=True)  # E_q of log p, log S, (x-T)^2 / S^2
    log_data = log_p0 - sp.log(slope0)  # the change of variables p(z0) = p_d(x) T'(z0)
    log_encoder = -sp.log(2 * sp.pi * sp.E * eps**2 * w0**2) / 2  # minus the entropy of N(z0, eps^2 w0^2)
    log_decoder = -sp.log(2 * sp.pi * eps**2) / 2 - log_s - miss / (2 * eps**2)
    gap = log_data + log_encoder - log_p - log_decoder
    claimed = log_p0 - log_p + log_s - sp.log(w0 * slope0) + miss / (2 * eps**2) * (1 + slip) - sp.Rational(1, 2)
    yield "as claimed, for every positive w", sp.expand_log(gap - claimed, force=True)


def prior_term(slip=0):
    """E_q[log p(z0) - log p(z)]: at most K v/2 if (log p)'' >= -K, and v/2 exactly for p = N(0, 1)."""
    z0, bend = sp.symbols("z0 bend", real=True)
    first = log_normal(z0, 0, 1) - expect(log_normal(z, 0, 1), [(z, z0, v)])
    yield "v/2 for p = N(0, 1)", first - v / (2 + slip)
    below = bend * (z - z0) - K * (z - z0) ** 2 / 2  # log p(z) - log p(z0) is at least this
    yield "the linear term has mean 0: K v/2 is left", -expect(below, [(z, z0, v)]) - K * v / (2 + slip)


def bound(slip=0):
    """gap <= sqrt(2/pi)(ell + 1 + lam) eps + (K/2 + lam) eps^2 + (e^a (1 - 2b)^(-3/2) - 1)/2 -> 0; a = (1 + lam) eps,
    b = a + 2 lam eps^2."""
    u = sp.symbols("u", real=True)
    a, b = (1 + lam) * eps, (1 + lam) * eps + 2 * lam * eps**2
    half = sp.integrate(u * sp.exp(-(u**2) / 2), (u, 0, sp.oo)) / sp.sqrt(2 * sp.pi)
    yield "E|u| = sqrt(2/pi) for u ~ N(0, 1)", 2 * half - sp.sqrt(2 / sp.pi) * (1 + slip)
    # E u^2 e^(b u^2) is, with r^2 = 1/(1 - 2b), r times the second moment of N(0, r^2)
    r = sp.symbols("r", positive=True)
    tilted = 2 * sp.integrate(u**2 * sp.exp(-(u**2) / (2 * r**2)), (u, 0, sp.oo)) / sp.sqrt(2 * sp.pi)
    yield "E u^2 e^(b u^2) = (1 - 2b)^(-3/2)", tilted - r**3 * (1 + slip)
    room = a + b * u**2 - 2 * (1 + lam) * eps * u - 2 * lam * eps**2 * u**2  # for u = |u|
    yield "2(1 + lam) eps|u| + 2 lam eps^2 u^2 <= a + b u^2, by a (1 - |u|)^2", room - (a + slip) * (1 - u) ** 2
    claimed = sp.sqrt(2 / sp.pi) * (ell + 1 + lam) * eps + (K / 2 + lam) * eps**2
    claimed += (sp.exp(a) * (1 - 2 * b) ** sp.Rational(-3, 2) - 1) / 2
    of_prior = ell * eps * 2 * half + K * eps**2 / 2
    of_slope = (1 + lam) * eps * 2 * half + lam * eps**2
    of_miss = sp.exp(a) * tilted.subs(r, (1 - 2 * b) ** sp.Rational(-1, 2)) / 2
    total = of_prior + of_slope * (1 + slip) + of_miss - sp.Rational(1, 2)
    yield "it is the sum of the bounds of the three terms, less 1/2", total - claimed
    yield "it is 0 at eps = 0, where it is continuous", claimed.subs(eps, 0) + slip


def slopes(slip=0):
    """(log T')' = (log p)' - (log p_d)'(T) T', and what it is for the tables' densities. M is Mills' ratio."""
    log_p, log_d, T = sp.Function("log_p"), sp.Function("log_d"), sp.Function("T")
    y = sp.symbols("y", real=True)
    log_slope = log_p(z) - log_d(T(z))
    slope_d = log_d(y).diff(y).subs(y, T(z))
    claimed = log_p(z).diff(z) - slope_d * T(z).diff(z) * (1 + slip)
    yield "the derivative of log p - log p_d(T)", (log_slope.diff(z) - claimed).doit()
    r2 = sp.sqrt(2)
    normal_tail, laplace_tail = sp.erfc(y / r2) / 2, sp.exp(-r2 * y) / 2  # both of variance 1, for y > 0
    mills = sp.sqrt(sp.pi / 2) * sp.erfc(y / r2) * sp.exp(y**2 / 2)
    yield "M = (1 - Phi)/phi", normal_tail + mills * normal_tail.diff(y) * (1 + slip)
    yield "M' = y M - 1", mills.diff(y) - y * mills + 1 + slip
    to_laplace = -sp.log(2 * normal_tail) / r2
    yield "Laplace data, z > 0: T = -log(2(1 - Phi(z)))/sqrt 2", laplace_tail.subs(y, to_laplace) - normal_tail + slip
    yield "T' = 1/(sqrt 2 M(z))", to_laplace.diff(y) - 1 / (r2 * mills) * (1 + slip)
    yield "(log T')' = 1/M(z) - z", sp.log(to_laplace.diff(y)).diff(y) - 1 / mills + (1 + slip) * y
    # 1 - Phi(T) = 1 - F(z), differentiated: the tail's slope at z over the normal's at T
    yield "Laplace prior, z > 0: p = sqrt 2 (1 - F)", laplace_tail.diff(y) + r2 * laplace_tail * (1 + slip)
    from_laplace = -r2 * normal_tail / normal_tail.diff(y)  # T' at y = T, where 1 - F(z) = 1 - Phi(T)
    yield "T' = sqrt 2 M(T)", from_laplace - r2 * mills * (1 + slip)
    yield "(log T')' = sqrt 2 (T M(T) - 1)", from_laplace.diff(y) - r2 * (y * mills - 1 + slip)
    to_uniform = sp.sqrt(3) * sp.erf(y / r2)  # sqrt 3 (2 Phi - 1): variance 1
    yield "uniform data: (log T')' = -z", sp.log(to_uniform.diff(y)).diff(y) + (1 + slip) * y
    student = (-3 * sp.log(1 + y**2 / 3)).diff(y)
    yield "Student-t: (log p_d)' = -6 y / (3 + y^2)", student + 6 * y / (3 + (1 + slip) * y**2)
    tail = sp.integrate((1 + y**2) ** -3, (y, 0, sp.oo))
    yield "Student-t: (1 - F)/p_d <= (3 pi/16) sqrt(3 + y^2), by this integral", tail - sp.pi * 3 / (16 + slip)


def constant_variance(slip=0):
    """w = 1/T' makes s = eps^2 (Dai and Wipf): gap ~ eps^2 E[1/2T'^2 + 3T''^2/8T'^4 + T'''/2T'^3], formally."""
    u, t1, t2, t3 = sp.symbols("u t1 t2 t3", real=True)  # z = z0 + eps u / T'(z0); derivatives of T at z0
    step = eps * u / t1
    miss = t1 * step + t2 * step**2 / 2 + t3 * step**3 / 6
    gap = eps**2 / (2 * t1**2) - sp.Rational(1, 2) + normal_mean(sp.expand(miss**2), u) / (2 * eps**2)
    series = sp.Poly(sp.expand(gap), eps)
    yield "the term of order 0 vanishes", series.coeff_monomial(1) + slip
    yield "and that of order 1", series.coeff_monomial(eps) + slip
    claimed = 1 / (2 * t1**2) + 3 * t2**2 / (8 * t1**4) + t3 / (2 * t1**3)
    yield "the term of order 2 is as claimed", series.coeff_monomial(eps**2) - claimed * (1 + slip)
    # with T' >= t0 and |T''| <= B, |T(z) - x| <= T'|z - z0| + B (z - z0)^2 / 2; here for t0 = T'(z0)
    B, slope = sp.symbols("B slope", positive=True)
    third = 2 * sp.integrate(u**3 * sp.exp(-(u**2) / 2), (u, 0, sp.oo)) / sp.sqrt(2 * sp.pi)  # E|u|^3
    r = eps / slope  # the encoder's standard deviation
    square = slope**2 * r**2 + slope * B * r**3 * third + B**2 / 4 * 3 * r**4
    gap = r**2 / 2 - sp.Rational(1, 2) + square / (2 * eps**2)
    claimed = eps**2 / 2 + eps * B * sp.sqrt(2 / sp.pi) + 3 * B**2 * eps**2 / (8 * slope**2)
    yield "gap <= eps^2/2t0^2 + eps B sqrt(2/pi)/t0^2 + 3B^2 eps^2/8t0^4", gap - claimed / slope**2 * (1 + slip)


STEPS = (pointwise_gap, prior_term, bound, slopes, constant_variance)


# --- the construction's gap by quadrature -------------------------------------------------------------------------


class Transport:
    """T and log T' from the two distribution functions. data, prior: Density."""

    def __init__(self, data, prior):
        self.data, self.prior = data, prior

    def __call__(self, z):
        return self.data.quantile(self.prior.logit(z))

    def log_slope(self, z):
        return self.prior(z) - self.data(self(z))


def gap_of_construction(data, prior, epsilon, constant=False):
    """The gap of Theorem D's maps, or with constant=True of those with w = 1/T' -> gap, error in nats

    By the pointwise identity, with one integral over z0 (the data x = T(z0) have the density p(z0) dz0) and one over
    (z - z0) / epsilon w.
    """
    transport = Transport(data, prior)
    u, weight_u = gauss(np.linspace(-8, 8, 33))
    weight_u = weight_u * np.exp(normal(u))
    ends = prior.breaks[(np.abs(prior.logit(prior.breaks)) < 26)]  # all but 1e-11 of the mass
    edges = np.unique(np.concatenate([np.linspace(a, b, 5) for a, b in zip(ends[:-1], ends[1:], strict=True)]))
    totals = []
    for rule in (gauss, fejer):
        z0, weight = rule(edges)
        weight = weight * np.exp(prior(z0))
        z0, weight = z0[weight > 1e-16], weight[weight > 1e-16]
        total = 0.0
        for start in range(0, len(z0), 256):
            at, part = z0[start : start + 256, None], weight[start : start + 256]
            width = np.exp(-transport.log_slope(at)) if constant else 1 / (1 + np.abs(at))
            z1 = at + epsilon * width * u
            log_slope0, log_slope = transport.log_slope(at), transport.log_slope(z1)
            log_s0 = 0.0 if constant else log_slope0 + np.log(width)
            log_s = np.zeros_like(z1) if constant else log_slope - np.log1p(np.abs(z1))
            miss = (transport(z1) - transport(at)) ** 2 * np.exp(-2 * log_s) / (2 * epsilon**2)
            inner = (prior(at) - prior(z1) + log_s - log_s0 + miss - 0.5) @ weight_u
            total += part @ inner
        totals.append(total)
    return float(totals[0]), float(abs(totals[0] - totals[1]))


def least_lambda(data, prior):
    """The least lam of Theorem D between the prior's 1e-10 quantiles, by differences of log T' on a fine grid."""
    z = np.linspace(*prior.quantile(np.array([-23.0, 23.0])), 20001)
    slope = np.diff(Transport(data, prior).log_slope(z)) / np.diff(z)
    return float(np.max(np.abs(slope) / (1 + np.abs(z[1:] + z[:-1]) / 2)))


def measure(data, prior, epsilons, constant=False):
    """-> {"lambda", "rows": [[epsilon, gap, error]]} of Theorem D's maps; constant=True adds "constant variance"."""
    record = {"lambda": least_lambda(data, prior)}
    record["rows"] = [[epsilon, *gap_of_construction(data, prior, epsilon)] for epsilon in epsilons]
    if constant:
        record["constant variance"] = [
            [epsilon, *gap_of_construction(data, prior, epsilon, constant=True)] for epsilon in epsilons
        ]
    return record


if __name__ == "__main__":
    runs.cli(main_of(__doc__, STEPS))
