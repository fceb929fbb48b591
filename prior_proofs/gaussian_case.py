"""Question 4, second claim: Gaussian data with a prior that is not Gaussian.

    python prior_proofs/gaussian_case.py                # proof, numbers and figure
    python prior_proofs/gaussian_case.py --slip ridge   # a proof with a mistake in it FAILs, exit status 1

Measured (AMD EPYC, one thread, Python 3.11, nothing random; one core's 169 s): the smallest gap over affine maps is
0.68588894 nats for a two-Gaussian mixture as prior, 0.04841729 for Laplace, 0.01813889 for Student-t and 0 for N(0,
1). Over free maps with a decoder of standard deviation at least 0.5 / 0.1 / 0.02, the mixture has 0.1336 / 0.02422 /
0.001979, of which 0.0216 / 0.00483 / 0.000519 are the likelihood's, KL(p_d || p_theta); a decoder alone would have 0.

The proof's text is README.md, sections 2 to 6; each step of algebra named here is a function, checked by sympy.
"""

import math
import sys
from pathlib import Path

import sympy as sp

# The scripts of this folder are run as files, and then Python looks here, not in the repository's root, for common/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import runs  # noqa: E402
from prior_proofs import approach, likelihood, sweep  # noqa: E402
from prior_proofs.lemma import SHARED, a, c, d, expect, log_normal, mu, sigma, v, x, z  # noqa: E402

THEOREM = """
Theorem B. Let p_d be Gaussian, p a density that is not Gaussian, and let encoder N(m(x), v(x)) and decoder
N(mu(z), s(z)) be Gaussian with any measurable m, mu and v, s > 0. Then L < -H(p_d): the optimum is never attained.
Proof. gap = -H(p_d) - L = KL(P || Q) is 0 only if P = Q almost everywhere. Then P has both conditionals Gaussian and
the marginal p_d is Gaussian, so by Lemma 1 the other marginal, p, is Gaussian: a contradiction.
The likelihood is another matter: mu(z) = E x and s = Var x, a decoder that ignores z, has the data's density with every
prior (Theorem E). The supremum of L is -H(p_d) all the same for every prior with a Lipschitz log-density (Theorem D),
and under a floor on either variance it is less (Theorem C). With a Gaussian prior affine maps attain -H(p_d)."""

tau2 = c**2 * sigma**2 + v  # the variance of z under P, for the encoder N(c x + d, v)
eta = c * mu + d  # and its mean
joint = log_normal(x, mu, sigma**2) + log_normal(z, c * x + d, v)  # log P(x, z)
back = log_normal(x, mu + c * sigma**2 / tau2 * (z - eta), sigma**2 * v / tau2)  # log P(x|z)


def encoder_marginal(slip=0):
    """N(x; mu, sigma^2) N(z; c x + d, v) has z-marginal g = N(eta, tau^2), and a Gaussian P(x|z)."""
    yield "eta = c mu + d, tau^2 = c^2 sigma^2 + v", joint - log_normal(z, eta, tau2) - back + slip * x * z


def chain_rule(slip=0):
    """gap = KL(g || p) + E_g KL(P(x|z) || p(x|z)) >= min over Gaussian g of KL(g || p) = R, for any decoder."""
    log_p, log_decoder = sp.Function("log_p")(z), sp.Function("log_decoder")(x, z)  # any prior, any decoder
    parts = log_normal(z, eta, tau2) - log_p + (back + slip * x * z - log_decoder)
    yield "log P - log Q = log g(z) - log p(z) + log P(x|z) - log p(x|z)", joint - log_p - log_decoder - parts
    m1, m2 = sp.symbols("m1 m2", real=True)
    v1, v2, r = sp.symbols("v1 v2 r", positive=True)
    excess = (r - 1 - sp.log(r)) / 2
    kl = expect(log_normal(x, m1, v1) - log_normal(x, m2, v2), [(x, m1, v1)])
    claimed = excess.subs(r, v1 / v2) + (m1 - m2) ** 2 / (2 * v2)
    yield "KL of Gaussians = (r - 1 - log r)/2 + (m1 - m2)^2 / 2 v2, r = v1 / v2", kl - claimed + slip * r
    yield "r - 1 - log r is 0 at 1", excess.subs(r, 1) + slip
    yield "it is stationary there only", sp.Matrix(sp.solve((excess + slip * r).diff(r), r)) - sp.Matrix([1])
    yield "and convex: KL is 0 only for P(x|z) = p(x|z)", excess.diff(r, 2) - (1 + slip) / (2 * r**2)


def ridge(slip=0):
    """Equality for every c, v on the ridge c^2 sigma^2 + v = tau^2, with P(x|z) as decoder; c = 0 included."""
    t2 = sp.symbols("t2", positive=True)  # tau^2
    width, centre = t2 - c**2 * sigma**2, sp.symbols("eta", real=True)
    encoder = log_normal(z, centre + c * (x - mu), width)
    decoder = log_normal(x, mu + c * sigma**2 / t2 * (z - centre), sigma**2 * width / t2)
    pointwise = log_normal(x, mu, sigma**2) + encoder - decoder
    yield (
        "log P(x, z) / p(x|z) = log N(z; eta, tau^2), whatever c and x",
        pointwise - log_normal(z, centre, t2 * (1 + slip)),
    )


def ignoring_the_latent(slip=0):
    """mu(z) = mu, s = sigma^2 has the data's density with every prior; its ELBO, by definition, lacks KL(q || p)."""
    log_p, log_q = sp.Function("log_p")(z), sp.Function("log_q")(z)  # any prior; any encoder that ignores x
    decoder = log_normal(x, mu, sigma**2 * (1 + slip))
    integrand = log_p + decoder - log_q
    yield (
        "its ELBO is -H(p_d) - KL(q || p), at best -H(p_d) - R",
        integrand - log_normal(x, mu, sigma**2) - log_p + log_q,
    )


def matched_case(slip=0):
    """With p = N(0, 1) the gap is 0 on the whole ridge a^2 + s = sigma^2 (probabilistic PCA)."""
    S = sigma**2 - a**2
    lower = log_normal(z, 0, 1) + log_normal(x, a * z + mu, S) - log_normal(z, a * (x - mu) / sigma**2, S / sigma**2)
    yield "log p(z) p(x|z) / q(z|x) = log p_d(x), whatever a and z", lower - log_normal(x, mu, sigma**2) + slip * a


def laplace_prior(slip=0):
    """For a Laplace prior R = 1/2 + log(2/pi), whatever its scale."""
    beta, tau = sp.symbols("beta tau", positive=True)
    y, shift = sp.symbols("y shift", real=True)
    density = sp.exp(-((y - shift) ** 2) / (2 * tau**2)) / (tau * sp.sqrt(2 * sp.pi))
    right = sp.integrate(density * y, (y, 0, sp.oo))
    left = sp.integrate(density.subs(y, -y) * y, (y, 0, sp.oo))
    absolute = sp.simplify((right + left).rewrite(sp.erf))  # E|z| for z ~ N(shift, tau^2)
    yield "dE|z|/dshift = erf(shift / tau sqrt 2)", absolute.diff(shift) - sp.erf(shift / (tau * sp.sqrt(2))) - slip
    yield "so E|z| is least at shift 0: tau sqrt(2/pi)", absolute.subs(shift, 0) - tau * sp.sqrt(2 / sp.pi) * (1 + slip)
    kl = -sp.log(2 * sp.pi * sp.E * tau**2) / 2 + sp.log(2 * beta) + absolute.subs(shift, 0) / beta
    best = beta * sp.sqrt(sp.pi / 2) * (1 + slip)
    yield "KL(N(0, tau^2) || p) is stationary at tau = beta sqrt(pi/2)", kl.diff(tau).subs(tau, best)
    yield "and convex in tau: its second derivative is 1/tau^2", kl.diff(tau, 2) - (1 + slip) / tau**2
    yield "its value there is 1/2 + log(2/pi)", kl.subs(tau, best) - sp.Rational(1, 2) - sp.log(2 / sp.pi)


STEPS = (*SHARED, *likelihood.STEPS, *approach.STEPS, encoder_marginal, chain_rule, ridge, ignoring_the_latent,
         matched_case, laplace_prior)  # fmt: skip
MIXTURE = sweep.Case("normal", "mixture", "two-Gaussian mixture prior", alone=1.0)
CASES = (
    MIXTURE,
    sweep.Case("normal", "laplace", "Laplace prior", 0.5 + math.log(2 / math.pi), alone=1.0),
    sweep.Case("normal", "student_t", "Student-t prior (5 d.o.f.)", alone=1.0),
)
CONTROL = sweep.Case("normal", "normal", "Gaussian prior", 0.0, alone=1.0)


def main(argv=None):
    args = sweep.parse_args(__doc__, "prior_gaussian", STEPS, argv)
    sweep.run(args, "prior_proofs/gaussian_case.py", THEOREM, STEPS, CASES, CONTROL,
              title="Gaussian data, a prior that is not: the bound is approached only as the floor falls",
              figure="gaussian_case.png", shown=(MIXTURE, (0.5, 0.2, 0.05)), argv=argv)  # fmt: skip


if __name__ == "__main__":
    runs.cli(main)
