"""Question 4, first claim: data that are not Gaussian, with the prior N(0, 1).

    python prior_proofs/non_gaussian_case.py            # proof, numbers and figure
    python prior_proofs/non_gaussian_case.py --slip residues   # a proof with a mistake in it FAILs, exit status 1

Measured (AMD EPYC, one thread, Python 3.11, nothing random; 60 s): the smallest gap over affine maps is 0.42050517
nats for the two-Gaussian mixture, 0.17648521 for uniform data, 0.07236494 for Laplace, 0.04684867 for Student-t. Over
free maps with a decoder of standard deviation at least 0.5 / 0.1 / 0.02, the mixture has 0.2395 / 0.01497 / 0.0001976.

The proof's text is README.md, sections 2 to 5; each step of algebra named here is a function, checked by sympy.
"""

import math
import sys
from pathlib import Path

import numpy as np
import sympy as sp

# The scripts of this folder are run as files, and then Python looks here, not in the repository's root, for runs.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import runs  # noqa: E402
from prior_proofs import densities, elbo, sweep  # noqa: E402
from prior_proofs.lemma import SHARED, a, b, expect, log_normal, mu, normal_mean, s, v, x, z  # noqa: E402

THEOREM = """
Theorem A. Let p_d be a density that is not Gaussian, p = N(0, 1), and let encoder N(m(x), v(x)) and decoder
N(mu(z), s(z)) be Gaussian with any measurable m, mu and v, s > 0. Then L < -H(p_d): the optimum is never attained.
Proof. gap = -H(p_d) - L = KL(P || Q) is 0 only if P = Q almost everywhere. Then P has both conditionals Gaussian and
the marginal p is Gaussian, so by Lemma 1 the other marginal, p_d, is Gaussian: a contradiction.
The supremum is -H(p_d) all the same for many p_d (Theorem D): both variances must then go to 0 (Theorem C)."""

V, t, gamma = sp.symbols("V t gamma", positive=True)


# --- affine decoder, any encoder (README, section 5) --------------------------------------------------------------


def decoder_marginal(slip=0):
    """The model N(z; 0, 1) N(x; a z + b, s) has x-marginal N(b, a^2 + s), and a Gaussian posterior."""
    total = a**2 + s
    left = log_normal(z, 0, 1) + log_normal(x, a * z + b, s)
    right = log_normal(x, b, total) + log_normal(z, a * (x - b) / total, s / total)
    yield "p(z) p(x|z) = N(x; b, a^2 + s) N(z; a(x - b)/(a^2 + s), s/(a^2 + s))", left - right + slip * x * z


def moment_matching(slip=0):
    """Hence gap >= KL(p_d || N(b, t)) >= KL(p_d || N(E x, Var x)) = J = log(2 pi e Var)/2 - H(p_d)."""
    # a quadratic's expectation depends on p_d by mean and variance only, so a Gaussian may stand in for p_d
    cross = -expect(log_normal(x, b, t), [(x, mu, V)])
    best = sp.log(2 * sp.pi * sp.E * V) / 2
    r = sp.symbols("r", positive=True)
    excess = (r - 1 - sp.log(r)) / 2
    claimed = best + excess.subs(r, V / t) + (mu - b) ** 2 / (2 * t)
    yield "cross entropy = J + H + (r - 1 - log r)/2 + (E x - b)^2 / 2t, r = Var / t", cross - claimed + slip * b
    yield "r - 1 - log r is 0 at r = 1", excess.subs(r, 1) + slip
    yield "it is stationary there only", sp.Matrix(sp.solve((excess + slip * r).diff(r), r)) - sp.Matrix([1])
    yield "and convex: its second derivative is 1/2r^2 > 0", excess.diff(r, 2) - (1 + slip) / (2 * r**2)


def ridge(slip=0):
    """Equality on the whole ridge a^2 + s = Var, b = E x, with the posterior as encoder; a = 0 included."""
    S = V - a**2
    integrand = log_normal(z, 0, 1) + log_normal(x, a * z + mu, S) - log_normal(z, a * (x - mu) / V, S / V)
    yield (
        "log p(z) p(x|z) / q(z|x) = log N(x; E x, Var), whatever a and z",
        integrand - log_normal(x, mu, V * (1 + slip)),
    )


def laplace_data(slip=0):
    """For Laplace data J = (log pi - 1)/2, whatever the scale."""
    beta = sp.symbols("beta", positive=True)
    half = sp.exp(-x / beta) / (2 * beta)
    entropy = 2 * sp.integrate(half * (x / beta + sp.log(2 * beta)), (x, 0, sp.oo))
    variance = 2 * sp.integrate(half * x**2, (x, 0, sp.oo))
    yield "H = 1 + log(2 beta)", entropy - 1 - sp.log(2 * beta) + slip
    yield "Var = 2 beta^2", variance - (2 + slip) * beta**2
    j = sp.log(2 * sp.pi * sp.E * variance) / 2 - entropy
    yield "J = (log pi - 1)/2", j - (sp.log(sp.pi) - 1) / 2 + slip


# --- the supremum: Dai and Wipf's construction (README, section 4) ------------------------------------------------


def pointwise_gap(slip=0):
    """With mu = T, s = gamma^2, m = T^-1(x) = z0, v = gamma^2 / T'(z0)^2 the gap at x is exact."""
    slope, square, log_p, log_p0 = sp.symbols("slope square log_p log_p0", real=True)  # T'(z0), E(T-x)^2, E log p
    slope = sp.Symbol("slope", positive=True)
    variance = gamma**2 / slope**2
    gap = -sp.log(2 * sp.pi * sp.E * variance) / 2 - log_p + sp.log(2 * sp.pi * gamma**2) / 2 + square / (2 * gamma**2)
    gap += log_p0 - sp.log(slope)  # log p_d(x), by the change of variables p(z0) / T'(z0)
    claimed = log_p0 - log_p - sp.Rational(1, 2) + square / (2 * gamma**2) * (1 + slip)
    yield "gap(x) = E_q[log p(z0) - log p(z)] - 1/2 + E_q[(T(z) - x)^2] / 2 gamma^2", gap - claimed
    z0 = sp.symbols("z0", real=True)
    first = log_normal(z0, 0, 1) - expect(log_normal(z, 0, 1), [(z, z0, v)])
    yield "its first term is v/2 for p = N(0, 1)", first - v / (2 + slip)


def rate(slip=0):
    """For smooth T the gap is gamma^2 (1/2T'^2 + 3T''^2/8T'^4 + T'''/2T'^3) + O(gamma^4)."""
    u, t2, t3, t4 = sp.symbols("u t2 t3 t4", real=True)
    t1 = sp.symbols("t1", positive=True)
    step = gamma * u / t1  # z - z0
    error = sum(d * step**k / sp.factorial(k) for k, d in enumerate((t1, t2, t3, t4), 1))
    gap = gamma**2 / (2 * t1**2) - sp.Rational(1, 2) + normal_mean(error**2, u) / (2 * gamma**2)
    series = sp.Poly(sp.expand(gap), gamma)
    yield (
        "the terms of order 0 and 1 cancel",
        sp.Matrix([series.coeff_monomial(gamma**k) for k in (0, 1)]).applyfunc(lambda term: term + slip),
    )
    claimed = 1 / (2 * t1**2) + 3 * t2**2 / (8 * t1**4) + t3 / (2 * t1**3)
    yield "the term of order 2 is as claimed", series.coeff_monomial(gamma**2) - claimed * (1 + slip)


def bound(slip=0):
    """With T' >= t0 and |T''| <= K: gap <= g^2/2t0^2 + gK sqrt(2/pi)/t0^2 + 3K^2g^2/8t0^4 -> 0 as g = gamma -> 0."""
    K, slope = sp.symbols("K slope", positive=True)
    u = sp.symbols("u", real=True)
    absolute = 2 * sp.integrate(u**3 * sp.exp(-(u**2) / 2) / sp.sqrt(2 * sp.pi), (u, 0, sp.oo))
    yield "E|u|^3 = 2 sqrt(2/pi)", absolute - 2 * sp.sqrt(2 / sp.pi) * (1 + slip)
    w = gamma / slope  # the encoder's standard deviation, |T(z) - x| <= T'|z - z0| + K (z - z0)^2 / 2
    square = slope**2 * w**2 + slope * K * w**3 * absolute + K**2 / 4 * 3 * w**4
    gap = w**2 / 2 - sp.Rational(1, 2) + square / (2 * gamma**2)
    claimed = gamma**2 / 2 + gamma * K * sp.sqrt(2 / sp.pi) + 3 * K**2 * gamma**2 / (8 * slope**2)
    yield "the bound with t0 = T'(z0), which falls as T' rises", gap - claimed / slope**2 * (1 + slip)


STEPS = (*SHARED, decoder_marginal, moment_matching, ridge, laplace_data, pointwise_gap, rate, bound)
LAPLACE = sweep.Case("laplace", "normal", "Laplace data", (math.log(math.pi) - 1) / 2)
MIXTURE = sweep.Case("mixture", "normal", "two-Gaussian mixture data")
CASES = (MIXTURE, sweep.Case("uniform", "normal", "uniform data"), LAPLACE,
         sweep.Case("student_t", "normal", "Student-t data (5 d.o.f.)"))  # fmt: skip
CONTROL = sweep.Case("normal", "normal", "Gaussian data", 0.0)


def positive_control(floors):
    """p_d = p, neither Gaussian, with the maps of `one_marginal_is_needed`: the bound is attained."""
    density = elbo.Density(densities.control, "data density")
    maps = (lambda y: 0 * y), (lambda y: 1 / (2 * (1 + y**2)))
    value, error, identity = elbo.evaluate(density, density, *maps, lambda y, moments: (maps[0](y), maps[1](y)))
    return "positive control", {"elbo": value, "gap": -density.entropy - value, "error": error, "identity": identity}


def construction(floors):
    """Dai and Wipf's construction for the mixture, gamma = floor: [[floor, gap, error]]"""
    data, prior = sweep.load(MIXTURE)
    rows = []
    for floor in floors:
        encoder = elbo.transport_encoder(data, prior, floor, pure=True)

        def decoder(y, moments, s=floor**2):
            return data.quantile(prior.logit(y)), np.full_like(y, s)

        value, error, _ = elbo.evaluate(data, prior, *encoder, decoder, floor)
        rows.append([floor, -data.entropy - value, error])
    return "Dai-Wipf construction, mixture", rows


def main(argv=None):
    args = sweep.parse_args(__doc__, "prior_non_gaussian", STEPS, argv)
    sweep.run(args, "prior_proofs/non_gaussian_case.py", THEOREM, STEPS, CASES, CONTROL,
              title="Data that are not Gaussian, prior N(0, 1): the bound is approached only as the floor falls",
              figure="non_gaussian_case.png", shown=(MIXTURE, (0.5, 0.2, 0.05)),
              extra=(construction, positive_control))  # fmt: skip


if __name__ == "__main__":
    runs.cli(main)
