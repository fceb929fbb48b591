"""Question 4, first claim: data that are not Gaussian, with the prior N(0, 1).

    python prior_proofs/non_gaussian_case.py            # proof, numbers and figure
    python prior_proofs/non_gaussian_case.py --slip residues   # a proof with a mistake in it FAILs, exit status 1

Measured (AMD EPYC, one thread, Python 3.11, nothing random; one core's 229 s): the smallest gap over affine maps is
0.42050517 nats for the two-Gaussian mixture, 0.17648521 for uniform data, 0.07236494 for Laplace, 0.0468487 for
Student-t. Over free maps with a decoder of standard deviation at least 0.5 / 0.1 / 0.02, the mixture has 0.2395 /
0.01497 / 0.0001976, of which 0.184 / 0.005 / 2.34e-5 are the likelihood's, KL(p_d || p_theta); a decoder alone would
have 0 from 0.35 downward.

The proof's text is README.md, sections 2 to 6; each step of algebra named here is a function, checked by sympy.
"""

import functools
import math
import sys
from pathlib import Path

import numpy as np
import sympy as sp
from scipy.optimize import minimize
from scipy.special import ndtr
from scipy.stats import t as t_distribution

# The scripts of this folder are run as files, and then Python looks here, not in the repository's root, for common/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import runs  # noqa: E402
from prior_proofs import approach, densities, elbo, likelihood, sweep  # noqa: E402
from prior_proofs.densities import Density, gauss  # noqa: E402
from prior_proofs.lemma import SHARED, a, b, expect, log_normal, mu, s, x, z  # noqa: E402
from prior_proofs.plane import evaluate  # noqa: E402

THEOREM = """
Theorem A. Let p_d be a density that is not Gaussian, p = N(0, 1), and let encoder N(m(x), v(x)) and decoder
N(mu(z), s(z)) be Gaussian with any measurable m, mu and v, s > 0. Then L < -H(p_d): the optimum is never attained.
Proof. gap = -H(p_d) - L = KL(P || Q) is 0 only if P = Q almost everywhere. Then P has both conditionals Gaussian and
the marginal p is Gaussian, so by Lemma 1 the other marginal, p_d, is Gaussian: a contradiction.
It does not follow that the likelihood cannot be maximal: a Gaussian decoder alone reaches p_theta = p_d whenever p_d is
a mixture of normal densities (Theorem E). But the maps that are best for the ELBO need not be those (Theorem F).
The supremum of L is -H(p_d) all the same for many p_d (Theorem D): both variances must then go to 0 (Theorem C)."""

V, t = sp.symbols("V t", positive=True)


# --- affine decoder, any encoder (README, section 6) --------------------------------------------------------------


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


STEPS = (*SHARED, *likelihood.STEPS, *approach.STEPS, decoder_marginal, moment_matching, ridge, laplace_data)
NORMAL_ENTROPY = math.log(2 * math.pi * math.e) / 2  # of variance 1, as the next one
STUDENT_T_ENTROPY = float(t_distribution.entropy(5, scale=math.sqrt(3 / 5)))
MIXTURE = sweep.Case("mixture", "normal", "two-Gaussian mixture", alone=densities.WIDTH)
CASES = (
    MIXTURE,
    sweep.Case("uniform", "normal", "uniform data", math.log(math.pi * math.e / 6) / 2),
    sweep.Case("laplace", "normal", "Laplace data", (math.log(math.pi) - 1) / 2, alone=0.0),
    sweep.Case("student_t", "normal", "Student-t data (5 d.o.f.)", NORMAL_ENTROPY - STUDENT_T_ENTROPY, alone=0.0),
)
CONTROL = sweep.Case("normal", "normal", "Gaussian data", 0.0, alone=1.0)


def positive_control():
    """p_d = p, neither Gaussian, with the maps of `one_marginal_is_needed`: the bound is attained."""
    density = Density(densities.control, "data density")
    mean, variance = (lambda y: 0 * y), (lambda y: 1 / (2 * (1 + y**2)))
    found = evaluate(density, density, mean, variance, lambda y, moments: (mean(y), variance(y)))
    gap = -density.entropy - found.elbo
    return "positive control", {"elbo": found.elbo, "gap": gap, "error": found.error, "identity": found.identity}


def sign_decoder(knots):
    """Theorem F, measured: mixture data, floor WIDTH. mu(z) = +-1 by the sign of z with s = WIDTH^2 has the data's
    density; its best Gaussian encoder, one for each x, leaves `gap`, more than the `smallest` of all maps."""
    data, prior = sweep.load(MIXTURE)
    x, weight = gauss(np.linspace(0, 5, 51))  # both halves are alike
    log_odds = 2 * x / densities.WIDTH**2  # of the right part, given x
    least = [min(encoder_gap(odds, start) for start in ((0.0, 0.0), (0.8, -1.0))) for odds in log_odds]
    best = elbo.best_elbo(data, prior, "free", densities.WIDTH, knots)
    gap = float(2 * weight @ (np.exp(data(x)) * least))
    return "sign decoder", {"floor": densities.WIDTH, "gap": gap, "smallest": best.gap,
                            "likelihood_gap_of_smallest": best.likelihood_gap}  # fmt: skip


def encoder_gap(log_odds, start):
    """The least KL(q || posterior) at one x over q = N(m, v). start: m, log v

    The posterior is p(z), times 2 sigmoid(log_odds) where z > 0 and 2 sigmoid(-log_odds) where z < 0.
    """
    right, left = (math.log(2) - np.logaddexp(0, sign * log_odds) for sign in (-1, 1))

    def kl(y):
        m, v = y[0], math.exp(y[1])
        positive = ndtr(m / math.sqrt(v))
        return (v + m**2 - 1 - y[1]) / 2 - positive * right - (1 - positive) * left

    return minimize(kl, start, method="BFGS").fun


def main(argv=None):
    args = sweep.parse_args(__doc__, "prior_non_gaussian", STEPS, argv)
    sweep.run(args, "prior_proofs/non_gaussian_case.py", THEOREM, STEPS, CASES, CONTROL,
              title="Data that are not Gaussian, prior N(0, 1): the bound is approached only as the floor falls",
              figure="non_gaussian_case.png", shown=(MIXTURE, (0.5, 0.2, 0.05)),
              losses=("where_it_is_lost.png", (0.3, 0.1)),
              extra=(positive_control, functools.partial(sign_decoder, args.knots)), argv=argv)  # fmt: skip


if __name__ == "__main__":
    runs.cli(main)
